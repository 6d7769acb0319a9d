"""What all pictures share: resolution, colours, the styles of the units, and how they are saved."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from engine.schema import UNITS

if TYPE_CHECKING:  # matplotlib takes a third of a second: it is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
STYLES = {unit: {"color": colour, "marker": marker, "markersize": 4}
          for unit, colour, marker in zip(UNITS, COLOURS, "osD^vPX")}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1,
           **options: object) -> "tuple[Figure, list[Axes]]":
    """(a figure of this size in inches, its rows x columns axes as a list in reading order)."""
    from matplotlib.figure import Figure
    figure = Figure((width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()


def write_figure(figure: "Figure", path: Path, legend: "Axes | None" = None,
                 photo: bool = False) -> Path:
    """Save as PNG, with a legend of one of its axes; what the font lacks becomes an empty box.
    Without a photo 256 colours are enough, which take a third of the room."""
    if legend:
        figure.legend(*legend.get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content := BytesIO())
    picture = Image.open(content).convert("RGB")
    picture = picture if photo else picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True)
    return path
