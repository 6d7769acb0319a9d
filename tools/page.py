"""The page that tools.answer draws of an example: the image and its boxes, the text and its spans,
and token by token how much weight the gate gives to the task expert and to the universal one."""

import dataclasses
import itertools
import math
import os
import textwrap
import unicodedata
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

PAGE, MARGIN, GAP = 7.6, 0.3, 0.22  # inches: width, margins, from one block to the next
SIDE, TALL, FLAT, LEAST = 2.9, 3.4, 2.3, 1.3  # most width and height of a picture; height of one
# that is wide and stands above the text; least side of the space for its labels
CHAR, LINE = 13 / DPI, 0.2  # of matplotlib's monospaced font at 10 points, hinted at 150 DPI
LEADING = 1.3  # from one line of the text to the next, in LINE
BAR, NAME, HEAD, LEGEND = 0.3, 0.26, 0.25, 0.3  # heights: a bar, names below, a title above
UNIVERSAL, TASK, PLACE_COLOURS, UNNAMED = *COLOURS[:2], COLOURS[:6], "#777777"
TITLES = {"mner": "named entities", "mre": "relation of head and tail", "med": "events",
          "meae": "event arguments"}


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
    read = [f"prompt ({n})", *drawn(tokenizer, ids[n:])]
    strips = (Strip("memory", "reading the text", read, [fmean(source[:n]), *source[n:]]),
              Strip("visual", "looking at the picture", names, visual),
              Strip("target", "writing the answer", drawn(tokenizer, answer), means["target"]))
    return [strip for strip in strips if strip.gates]


def strip_caption(strip: Strip) -> str:
    """How much a stream listens to the task expert, in words."""
    ahead = sum(gate > 0.5 for gate in strip.gates)
    return f"mean {fmean(strip.gates):.2f}, ahead at {ahead} of {len(strip.gates)} tokens"


def gate_text(gate: float) -> tuple[str, str]:
    """A gate as it stands on its bar, and the colour that can be read there."""
    return f"{gate:.2f}".removeprefix("0"), "black" if gate > 0.15 else "white"


def strip_words(strip: Strip) -> list[list[tuple[str, float]]]:
    """The (token, gate) of each word of a strip."""
    words: list[list[tuple[str, float]]] = []
    for name, gate in zip(strip.names, strip.gates):
        if name[:1] in " <" or not words:
            words.append([])
        words[-1].append((name.strip(), gate))
    return words


def strip_rows(strip: Strip, width: float) -> list[list[tuple[float, float, str, float]]]:
    """Rows of bars (x, width, name, gate) in inches; words stand apart, long rows wrap at them."""
    rows, x = [[]], 0.0
    for word in strip_words(strip):
        cells = [max(0.22, 0.81 * CHAR * len(name) + 0.03) for name, _ in word]
        x += 0.1 * (x > 0)
        for k, ((name, gate), cell) in enumerate(zip(word, cells)):
            if x and x + (cell if k else min(sum(cells), width)) > width:
                rows.append([])
                x = 0.0
            rows[-1].append((x, cell, name, gate))
            x += cell
    return rows


def draw_bars(ax: "Axes", bars: Sequence[tuple[float, float, str, float]]) -> None:
    """A bar per token: below the task expert's share, above it the universal expert's."""
    ax.set(ylim=(0, 1))
    at, widths, names, gates = zip(*bars)
    options = {"align": "edge", "linewidth": 0}
    thin = [cell - 0.015 for cell in widths]
    ax.bar(at, gates, thin, color=TASK, **options)
    ax.bar(at, [1 - gate for gate in gates], thin, gates, color=UNIVERSAL, **options)
    for x, cell, name, gate in bars:
        text, colour = gate_text(gate)
        ax.text(x + cell / 2, 0.06, text, fontsize=6.5, ha="center", color=colour)
        ax.text(x + cell / 2, -0.12, name, fontsize=8, ha="center", va="top", family="monospace")
    ax.plot([0, at[-1] + thin[-1]], [0.5, 0.5], color="black", linewidth=0.8, linestyle=":")


Word = tuple[int, str, list[Place], bool]  # column, text, spans it is in, whether it is a label


def words_and_labels(tokens: Sequence[str],
                     spans: Sequence[Place]) -> list[tuple[str, list[Place], bool]]:
    """The words of a text and, behind each span, its label: (text, spans it is in, whether it is a
    label)."""
    words: list[tuple[str, list[Place], bool]] = []
    for i, token in enumerate(tokens or ("(no text)",)):
        inside = [span for span in spans if i in range(*span.item.span)]
        words.append((token, inside, False))
        words += [(span.label, [span], True) for span in inside if span.item.span[1] == i + 1]
    return words


def lay_out(tokens: Sequence[str], spans: Sequence[Place], width: int) -> list[list[Word]]:
    """The words of a text, and behind each span its label, in lines of `width` characters."""
    lines, column = [[]], 0
    for token, inside, is_label in words_and_labels(tokens, spans):
        for word in [token] if is_label else textwrap.wrap(token, width):
            wide = sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in word)
            if column and column + wide > width:
                lines, column = [*lines, []], 0
            lines[-1].append((column, word, inside, is_label))
            column += wide + 1
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


class DrawnBox(NamedTuple):
    """A box of the image, and what the answer says of it."""
    box: Box
    lines: list[str]  # its number, then the labels that the answer gives it
    colour: str
    named: bool  # whether the answer names it

    @property
    def ink(self) -> str:
        """What can be read on its colour."""
        return "white" if self.colour in (PLACE_COLOURS[0], UNNAMED) else "black"


def drawn_boxes(record: Record, answer: Sequence[Place]) -> list[DrawnBox]:
    """The boxes of an image, those first that the answer names."""
    boxes = []
    for k, box in enumerate(record.objects, 1):
        named = [place for place in answer if place.item.object == k and place.item.box]
        boxes.append(DrawnBox(box, [f"O{k}", *(place.label for place in named)],
                              PLACE_COLOURS[named[0].colour] if named else UNNAMED, bool(named)))
    return sorted(boxes, key=lambda box: not box.named)


def whole_image(answer: Sequence[Place]) -> tuple[str, str]:
    """(what the answer says of the image as a whole, its colour)."""
    whole = [place for place in answer if place.item.whole_image]
    return (f"O0, the whole image: {', '.join(place.label for place in whole)}" if whole else "",
            PLACE_COLOURS[whole[0].colour] if whole else "black")


def draw_image(ax: "Axes", image: Image, boxes: Sequence[DrawnBox], whole: tuple[str, str]) -> None:
    """The image with its numbered boxes and what the answer says of them, in image pixels; each
    label stands where it covers no earlier one.  The axes may be wider or taller than the image."""
    from matplotlib.patches import Rectangle
    space = ax.get_xlim()[1], ax.get_ylim()[0]
    pixel = space[0] / ax.bbox.width  # one of the page, in those of the image
    ax.imshow(image, extent=(0, image.width, image.height, 0), aspect="auto")
    ax.set(xlim=(0, space[0]), ylim=(space[1], 0))
    told, colour = whole
    ax.add_patch(Rectangle((0, 0), *image.size, fill=False, edgecolor=colour, clip_on=False,
                           linewidth=4 if told else 0.8))
    ax.text(0, image.height + 8 * pixel, told, fontsize=9, va="top")
    taken: list[Box] = []
    for box in boxes:
        (x1, y1, x2, y2), colour = box.box, box.colour
        width, above = (2.5, 3) if box.named else (1, 2)
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                               linewidth=width, zorder=above))
        label = ax.text(0, 0, "\n".join(box.lines), fontsize=8, color=box.ink, va="top",
                        zorder=5, bbox={"facecolor": colour, "pad": 1.5, "edgecolor": "none"})
        extent = label.get_window_extent().padded(3)
        w, h = extent.width * pixel, extent.height * pixel
        x, y, apart = label_place((w, h), box.box, taken, space)
        label.set_position((x + 3 * pixel, y + 3 * pixel))
        if apart:
            ax.plot([x, x1], [y, y1], color=colour, linewidth=1, scalex=False, scaley=False)


def label_place(size: tuple[float, float], box: Box, taken: list[Box],
                space: tuple[float, float]) -> tuple[float, float, bool]:
    """Top left corner for a label of `size` in a `space` where it covers nothing that is `taken`,
    and whether it lies apart from its box: at a corner of that, outside or inside, else as near as
    there is room.  The label's place is then `taken` as well."""
    (x1, y1, x2, y2), (w, h) = box, size
    right, bottom = max(0, space[0] - w), max(0, space[1] - h)
    corners = [(min(max(0, x), right), min(max(0, y), bottom))
               for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w)]
    grid = itertools.product(numpy.linspace(0, right, 16), numpy.linspace(0, bottom, 25))
    near = [*corners, *sorted(grid, key=lambda point: math.dist(point, (x1, y1)))]
    x, y = next(((x, y) for x, y in near if not any(
        iou((x, y, x + w, y + h), other) for other in taken)), corners[0])
    taken.append((x, y, x + w, y + h))
    return x, y, not (x <= x2 and x1 <= x + w and y <= y2 and y1 <= y + h)


def title_of(record: Record) -> str:
    """What is asked, above a page."""
    return f"{TITLES[record.task]}, by the labels of {record.dataset}"


def expert_of(record: Record) -> str:
    """The task expert that answers, in a legend."""
    return f"task expert {record.task if record.task in TASKS else 'mee'}"


def fitted(image: Image) -> tuple[float, float, bool]:
    """(width, height) in inches of a picture on the page, and whether text stands beside it."""
    beside = image.width < 2 * image.height
    scale = min((SIDE if beside else PAGE - 2 * MARGIN) / image.width,
                (TALL if beside else FLAT) / image.height)
    return image.width * scale, image.height * scale, beside


class Sheet:
    """A figure, in inches from its top left corner."""

    def __init__(self, height: float):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        self.height, self.figure = height, Figure((PAGE, height), dpi=DPI)
        FigureCanvasAgg(self.figure)  # which can measure texts

    def panel(self, x: float, y: float, w: float, h: float, right: float,
              bottom: float) -> "Axes":
        """Axes at a place, whose own units count to `right` and down to `bottom`."""
        ax = self.figure.add_axes((x / PAGE, 1 - (y + h) / self.height, w / PAGE, h / self.height))
        ax.set(xlim=(0, right), ylim=(bottom, 0))
        ax.axis("off")
        return ax

    def write(self, x: float, y: float, text: str, **options: object) -> float:
        """Write a line; returns where it ends."""
        line = self.figure.text(x / PAGE, 1 - y / self.height, text,
                                **{"fontsize": 9, "va": "top", **options})
        return line.get_window_extent().x1 / DPI


Placed = tuple[float, float, Strip, list]  # x, y, and the rows of bars


def place_strips(strips: Sequence[Strip], left: float, y: float,
                 end: float) -> tuple[list[Placed], float]:
    """(the strips from y on, to the right of `left` while they end above `end`, else in the whole
    width; where they end).  A legend stands above the first."""
    placed, above = [], LEGEND + HEAD
    for strip in strips:
        x, rows = left, strip_rows(strip, PAGE - MARGIN - left)
        if y + above + len(rows) * (BAR + NAME) > end + GAP:
            x, y, rows = MARGIN, max(y, end), strip_rows(strip, PAGE - 2 * MARGIN)
        placed.append((x, y + above, strip, rows))
        y, above = y + above + len(rows) * (BAR + NAME) + 0.06, HEAD
    return placed, y


def draw_strips(sheet: Sheet, placed: Sequence[Placed], record: Record) -> None:
    """The legend, and each strip with its title."""
    x, y = placed[0][0], placed[0][1] - HEAD - LEGEND
    for dx, colour, name in ((0, TASK, expert_of(record)), (1.5, UNIVERSAL, "universal expert")):
        sheet.write(x + dx, y, "\u25a0", color=colour, fontsize=11)
        sheet.write(x + dx + 0.16, y, name)
    for x, y, strip, rows in placed:
        end = sheet.write(x, y - HEAD, strip.title, weight="bold")
        sheet.write(end + 0.1, y - HEAD, strip_caption(strip), color="#444444", fontsize=8)
        width = PAGE - MARGIN - x
        for k, bars in enumerate(rows):
            draw_bars(sheet.panel(x, y + k * (BAR + NAME), width, BAR, width, 1), bars)


def example_figure(row: Row, dataset: Dataset, strips: Sequence[Strip],
                   no_gate: str | None) -> "Figure":
    """The page of an answer.  no_gate says why there are no strips, if it is known."""
    from matplotlib import rc_context
    with rc_context({"text.parse_math": False}):  # a $ in a text is a $
        return draw_page(row, dataset, strips, no_gate)


def draw_page(row: Row, dataset: Dataset, strips: Sequence[Strip],
              no_gate: str | None) -> "Figure":
    """As example_figure: everything is measured first, then set from the top down.  Strips stand
    beside the picture where they fit there, else below it."""
    record, answer = row.record, places(row, dataset)
    spans = [place for place in answer if place.item.span]
    image, whole = load_image(record.image) if has_image(record) else None, whole_image(answer)
    left, top, end = MARGIN, MARGIN, 0.0  # of the text; where the picture ends
    if image:
        w, h, beside = fitted(image)
        space = max(w, LEAST), max(h, LEAST)
        end = MARGIN + space[1] + GAP + 0.1 * bool(whole[0])
        left, top = (MARGIN + space[0] + GAP, top) if beside else (left, end)
    width = int((PAGE - MARGIN - left) / CHAR)  # of the text, in characters
    lines = lay_out(record.tokens, spans, width)
    below = [line for text in answer_lines(row) for line in
             textwrap.wrap(text, width, subsequent_indent="  ")]
    tall = LINE * (LEADING * (len(lines) + 1) + len(below) + 0.9)
    placed, y = place_strips(strips, left, top + tall, end)
    sheet = Sheet(max(y + HEAD * bool(no_gate), end) + MARGIN - GAP / 2)
    if image:
        ax = sheet.panel(MARGIN, MARGIN, *space, space[0] * image.width / w,
                         space[1] * image.height / h)
        draw_image(ax, image, drawn_boxes(record, answer), whole)
    draw_text(sheet.panel(left, top, width * CHAR, tall, width, tall / LINE), title_of(record),
              lines, spans, below)
    if no_gate:
        sheet.write(left, top + tall, f"no gates to draw: {no_gate}")
    if placed:
        draw_strips(sheet, placed, record)
    return sheet.figure
