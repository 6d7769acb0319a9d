"""The page that tools.answer draws of an example: the image and its boxes, the text and its spans,
and token by token how much weight the gate gives to the task expert and to the universal one."""

import dataclasses
import itertools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

import data
from data import Example, Item, Tokenizer
from engine.features import Features
from engine.images import load_image
from engine.schema import TASKS, Box, Dataset, Record, iou
from evaluate import Decoding, Row, Setup, type_of
from tools.figures import COLOURS, DPI
from tools.routing import gates_on

if TYPE_CHECKING:  # loaded when a page is drawn: most answers are only printed
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, SIDE, MARGIN = 11.0, 3.6, 0.35  # inches: width, side of the image, margins and gaps
CHAR, LINE = 13 / DPI, 0.21  # of matplotlib's monospaced font at 10 points, hinted at 150 DPI
LEADING = 1.3  # from one line of the text to the next, in LINE
SCALE, BAR, BARS = 0.3, 0.24, 0.65  # of a row of bars: space to its left, width of a bar, height
ROW = PAGE - 2 * MARGIN - SCALE  # width of a row of bars
UNIVERSAL, TASK, PLACE_COLOURS = *COLOURS[:2], COLOURS[:6]


class Place(NamedTuple):
    """A place in the text or the image, and what the answer says of it."""
    item: Item
    label: str
    colour: int  # of PLACE_COLOURS, the same in every text of a dataset


def places(row: Row, dataset: Dataset) -> list[Place]:
    """The places of all items of an answer; of a relation its ends.  Where there is one event type,
    an argument is called by its role alone."""
    record, labels = row.record, dataset.labels[row.record.task]
    if record.task == "mre":
        return [Place(Item(end, span=getattr(record, end)), end, colour)
                for colour, end in enumerate(("head", "tail"))]
    names = sorted(labels)
    if record.task == "meae":
        names = [f"{event}:{role}" for event in names for role in labels[event]]
    one = len({item.label for item in row.predicted}) == 1
    return [Place(item, one and item.role or type_of(item),
                  names.index(type_of(item)) % len(PLACE_COLOURS)) for item in row.predicted]


def where(item: Item) -> str:
    """Where an item lies, in words."""
    if item.span:
        return item.text
    if item.object is None:
        return f"{item.text} (not in the text)"
    box = f"[{', '.join(f'{x:g}' for x in item.box)}]" if item.box else "(no such object)"
    return "O0, the whole image" if item.whole_image else f"O{item.object} {box}"


def answer_lines(row: Row) -> list[str]:
    """An answer in words: a line per item, then what could not be used, or was missing."""
    record = row.record
    lines = [f"{type_of(item).replace(':', ', ')}: {where(item)}" for item in row.predicted]
    if record.task == "mre":
        head, tail = data.words(record, record.head), data.words(record, record.tail)
        lines = [f"{head} -- {row.predicted[0].label} -- {tail}"]
    return [*(lines or ["nothing found"]), *(f"note: {note}" for note in answer_notes(row))]


def answer_notes(row: Row) -> list[str]:
    """What of an answer could not be used, or was missing, in words."""
    record, answer = row.record, row.answer
    notes = ((row.counts.malformed, f"unreadable in the output, {row.counts.malformed} piece(s): "
              f"{answer.text!r}"), (answer.cut, "cut at the length limit"),
             (answer.missing, f"answered without {record.image}, which is not there"))
    return [note for holds, note in notes if holds]


def has_image(record: Record) -> bool:
    return record.image is not None and Path(record.image).is_file()


class Strip(NamedTuple):
    """The task expert's gate at each token of one stream, mean over the layers that see it."""
    stream: str  # "memory", "visual" or "target"
    title: str
    names: list[str]  # of the tokens; one that begins a word begins with a blank
    gates: list[float]


def drawn(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as they are drawn; a blank in front begins a word."""
    return [tokenizer.decode([i]) if i >= tokenizer.vocab_size else
            tokenizer.pieces.id_to_piece(i).replace("\u2581", " ") for i in ids]


@torch.inference_mode()
def token_strips(setup: Setup, example: Example, row: Row, features: Features,
                 device: torch.device, decoding: Decoding) -> list[Strip]:
    """The gates, Eq. (6), while the model reads an example, looks at its image and writes its
    answer: those of a target token are those that wrote it; the prompt is one mean."""
    tokenizer, record = setup.tokenizer, example.record
    ids, answer = example.input_ids, row.answer.ids
    written = dataclasses.replace(example, labels=list(answer))
    batch = data.collate([written], features, features.width).to(device)
    layers: dict[str, list[Tensor]] = {}
    for layer, gates in gates_on(setup.model, batch, decoding.precision).items():
        layers.setdefault(layer.stream, []).append(gates[0, :, 1].double())
    means = {stream: torch.stack(gates).mean(dim=0).tolist() for stream, gates in layers.items()}
    prefix, _ = data.prompt(record, setup.datasets[record.dataset])
    n = len(os.path.commonprefix([ids, tokenizer.encode(prefix)]))
    source, visual = means["memory"][-len(ids):], means.get("visual", [])  # concat: visual first
    names = ["image", *(f" O{k}" for k in range(1, len(visual)))]
    strips = (Strip("memory", f"reading the text (prompt: mean of {n} tokens)",
                    ["prompt", *drawn(tokenizer, ids[n:])], [fmean(source[:n]), *source[n:]]),
              Strip("visual", "looking at the picture", names, visual),
              Strip("target", "writing the answer", drawn(tokenizer, answer), means["target"]))
    return [strip for strip in strips if strip.gates]


def strip_rows(strips: Sequence[Strip]) -> list[tuple[str, list[tuple[float, str, float]]]]:
    """(title, bars (x, name, gate)) of every row of bars; words stand apart, long rows wrap."""
    rows = []
    for strip in strips:
        ahead = sum(gate > 0.5 for gate in strip.gates)
        rows.append((f"{strip.title}: task expert {fmean(strip.gates):.2f} on average, ahead at "
                     f"{ahead} of {len(strip.gates)} tokens", []))
        x = 0.0
        for name, gate in zip(strip.names, strip.gates):
            x += 0.35 * (name[0] in " <" and x > 0)
            if x > ROW / BAR - 1:
                rows.append(("", []))
                x = 0.0
            rows[-1][1].append((x, name.strip(), gate))
            x += 1
    return rows


def draw_strip(ax: "Axes", title: str, bars: Sequence[tuple[float, str, float]]) -> None:
    """A bar per token: below the task expert's share, above it the universal expert's."""
    at, names, gates = zip(*bars)
    ax.bar(at, gates, 0.92, color=TASK)
    ax.bar(at, [1 - gate for gate in gates], 0.92, gates, color=UNIVERSAL)
    for x, gate in zip(at, gates):
        ax.text(x, 0.04, f"{gate:.2f}".removeprefix("0"), fontsize=6.5, ha="center", va="bottom",
                color="black" if gate > 0.2 else "white")
    ax.plot([-0.5, at[-1] + 0.5], [0.5, 0.5], color="black", linewidth=0.8, linestyle=":")
    ax.set(xlim=(-0.6, ROW / BAR - 0.4), ylim=(0, 1))
    ax.set_xticks(at, names, rotation=90, fontsize=8, family="monospace")
    ax.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    ax.tick_params(axis="x", length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=9, loc="left", pad=3)


Word = tuple[int, str, list[Place], bool]  # column, text, spans it is in, whether it is a label


def lay_out(tokens: Sequence[str], spans: Sequence[Place], width: int) -> list[list[Word]]:
    """The words of a text, and behind each span its label, in lines of `width` characters."""
    words: list[tuple[str, list[Place], bool]] = []
    for i, token in enumerate(tokens):
        inside = [span for span in spans if i in range(*span.item.span)]
        words += [(piece, inside, False) for piece in textwrap.wrap(token, width)]
        words += [(span.label, [span], True) for span in inside if span.item.span[1] == i + 1]
    lines, column = [[]], 0
    for word, inside, is_label in words:
        if column and column + len(word) > width:
            lines, column = [*lines, []], 0
        lines[-1].append((column, word, inside, is_label))
        column += len(word) + 1
    return lines


def draw_text(ax: "Axes", title: str, lines: Sequence[Sequence[Word]], spans: Sequence[Place],
              below: Sequence[str]) -> None:
    """A title, the lines of `lay_out` and plain lines below; x in characters, y in lines."""
    from matplotlib.patches import Rectangle
    ax.text(0, 0.3, title, fontsize=10, weight="bold")
    font = {"family": "monospace", "va": "center"}
    for y, line in enumerate(lines, 1):
        for span in spans:
            ends = [(x, x + len(word)) for x, word, inside, _ in line if span in inside]
            if ends:
                start, end = ends[0][0], ends[-1][1]
                ax.add_patch(Rectangle((start, LEADING * y), end - start, 1, alpha=0.35,
                                       linewidth=0, facecolor=PLACE_COLOURS[span.colour]))
        for x, word, _, is_label in line:
            size, colour = (8, "#444444") if is_label else (10, "black")
            ax.text(x, LEADING * y + 0.5, word, fontsize=size, color=colour, **font)
    for y, text in enumerate(below, 1):
        ax.text(0, LEADING * (len(lines) + 1) + y, text, fontsize=9, **font)


def draw_image(ax: "Axes", record: Record, answer: Sequence[Place], image: Image) -> None:
    """The image with its numbered boxes and what the answer says of them, in image pixels.  Boxes
    that the answer names come first, and each label stands where it covers no earlier one."""
    from matplotlib.patches import Rectangle
    ax.imshow(image, extent=(0, image.width, image.height, 0))
    ax.set(xticks=[], yticks=[], anchor="NW")
    ax.apply_aspect()  # now, as labels are measured below
    pixel = image.width / ax.bbox.width  # one of the page, in those of the image
    if whole := [place for place in answer if place.item.whole_image]:
        ax.spines[:].set(linewidth=5, color=PLACE_COLOURS[whole[0].colour])
        ax.set_xlabel("O0, the whole image: " + ", ".join(place.label for place in whole),
                      loc="left")
    named = {k: [place for place in answer if place.item.object == k and place.item.box]
             for k in range(1, len(record.objects) + 1)}
    taken: list[Box] = []
    for k in sorted(named, key=lambda k: not named[k]):
        x1, y1, x2, y2 = box = record.objects[k - 1]
        colour = PLACE_COLOURS[named[k][0].colour] if named[k] else "#777777"
        width, above = (2.5, 3) if named[k] else (1, 2)
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                               linewidth=width, zorder=above))
        label = ax.text(0, 0, "\n".join([f"O{k}", *(place.label for place in named[k])]),
                        fontsize=8, color="white", va="top", zorder=above + 2,
                        bbox={"facecolor": colour, "pad": 1.5, "edgecolor": "none"})
        extent = label.get_window_extent().padded(3)
        w, h = extent.width * pixel, extent.height * pixel
        x, y = label_place((w, h), box, taken, image.size)
        label.set_position((x + 3 * pixel, y + 3 * pixel))
        taken.append((x, y, x + w, y + h))
        if not (x <= x2 and x1 <= x + w and y <= y2 and y1 <= y + h):
            ax.plot([x, x1], [y, y1], color=colour, linewidth=1, scalex=False, scaley=False)


def label_place(size: tuple[float, float], box: Box, taken: Sequence[Box],
                image: tuple[int, int]) -> tuple[float, float]:
    """Top left corner for a label of `size` in an `image` where it covers nothing that is `taken`:
    at a corner of its box, outside or inside, else as near as there is room."""
    (x1, y1, x2, y2), (w, h) = box, size
    right, bottom = max(0, image[0] - w), max(0, image[1] - h)
    corners = [(min(max(0, x), right), min(max(0, y), bottom))
               for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w)]
    grid = itertools.product(numpy.linspace(0, right, 16), numpy.linspace(0, bottom, 25))
    near = [*corners, *sorted(grid, key=lambda point: math.dist(point, (x1, y1)))]
    return next(((x, y) for x, y in near if not any(
        iou((x, y, x + w, y + h), other) for other in taken)), corners[0])


def example_figure(row: Row, dataset: Dataset, strips: Sequence[Strip],
                   no_gate: str | None) -> "Figure":
    """The page of an answer.  no_gate says why there are no strips, if it is known."""
    from matplotlib import rc_context
    with rc_context({"text.parse_math": False}):  # a $ in a text is a $
        return draw_page(row, dataset, strips, no_gate)


def draw_page(row: Row, dataset: Dataset, strips: Sequence[Strip],
              no_gate: str | None) -> "Figure":
    """As example_figure: everything is measured first, then set from the top down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    record, answer = row.record, places(row, dataset)
    spans = [place for place in answer if place.item.span]
    image = load_image(record.image) if has_image(record) else None
    left = MARGIN + (SIDE + MARGIN if image else 0)
    width = int((PAGE - MARGIN - left) / CHAR)  # of the text, in characters
    lines = lay_out(record.tokens or ("(no text)",), spans, width)
    below = [line for text in answer_lines(row) for line in
             textwrap.wrap(text, width, subsequent_indent="  ")]
    tall = max(LINE * (LEADING * (len(lines) + 1) + len(below) + 1), SIDE * bool(image) + 0.3)
    rows = strip_rows(strips)
    feet = [0.1 + 0.068 * max(len(name) for _, name, _ in bars) for _, bars in rows]
    height = MARGIN + tall + 0.5 + sum(0.4 + BARS + foot for foot in feet)
    figure = Figure((PAGE, height), dpi=DPI)
    FigureCanvasAgg(figure)  # which can measure texts

    def panel(x: float, y: float, w: float, h: float) -> "Axes":
        return figure.add_axes((x / PAGE, 1 - (y + h) / height, w / PAGE, h / height))

    if image:
        draw_image(panel(MARGIN, MARGIN, SIDE, SIDE), record, answer, image)
    text = panel(left, MARGIN, width * CHAR, tall)
    text.set(xlim=(0, width), ylim=(tall / LINE, 0))
    text.axis("off")
    draw_text(text, f"{record.task} by the labels of {dataset.name}", lines, spans, below)
    y = MARGIN + tall + 0.2
    if no_gate:
        figure.text(MARGIN / PAGE, 1 - y / height, f"no gates to draw: {no_gate}", fontsize=9)
    else:
        task = record.task if record.task in TASKS else "mee"
        patches = [Patch(color=UNIVERSAL, label="universal expert"),
                   Patch(color=TASK, label=f"task expert {task}")]
        figure.legend(handles=patches, ncols=2, frameon=False, fontsize=9, loc="upper right",
                      bbox_to_anchor=(1 - MARGIN / PAGE, 1 - y / height))
    for (title, bars), foot in zip(rows, feet):
        draw_strip(panel(MARGIN + SCALE, y + 0.4, ROW, BARS), title, bars)
        y += 0.4 + BARS + foot
    return figure
