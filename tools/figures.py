"""tools/figures."""

import warnings
from pathlib import Path

from engine.schema import UNITS

# --------------------------------------------------------------------------------- pictures of runs
# Routing (Fig. 6), AML weights and curves of a run; systems (Fig. 4), ranks (Fig. 5), errors.

DPI = 150
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
STYLES = {unit: {"color": colour, "marker": marker, "markersize": 4}
          for unit, colour, marker in zip(UNITS, COLOURS, "osD^vPX")}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1,
           **options: object) -> tuple:
    """(figure of so many inches, its axes in reading order)."""
    from matplotlib.figure import Figure  # imported only where a picture is wanted
    figure = Figure((width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()


def write_figure(figure: object, path: Path) -> Path:
    """Save as PNG; a character that matplotlib's own font lacks is drawn as an empty box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path)
    return path
