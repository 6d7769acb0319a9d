"""The page that tools.answer draws, as one HTML file for a browser: nothing comes from outside, no
script runs, and whatever a user wrote is escaped.  tools/page.py decides what is drawn."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from engine.images import load_image
from engine.schema import Box, Dataset
from evaluate import Row
from tools.page import (PLACE_COLOURS, TASK, UNIVERSAL, Place, Strip, answer_lines, drawn_boxes,
                        expert_of, gate_text, has_image, label_place, places, strip_caption,
                        strip_words, title_of, whole_image, words_and_labels)

MOST_PIXELS = 1200  # of the longer side of a picture in the file
SIDE, TALL, WIDE, LETTER = 400, 520, 700, 13  # CSS pixels: of a picture, of its labels
LEAST = 150  # CSS pixels: least width and height of the space for its labels

HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'">
<title>%s</title>
<style>
:root { color-scheme: light; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { font: 16px/1.5 "DejaVu Sans", Verdana, Arial, sans-serif; color: #111; background: #fff;
  max-width: 1060px; margin: 0 auto; padding: 24px 20px }
section { display: flow-root; margin-bottom: 28px; padding-bottom: 20px }
section + section { border-top: 1px solid #ccc; padding-top: 24px }
figure { float: left; max-width: 46%%; margin: 4px 28px 16px 0 }
figure.wide { float: none; max-width: 100%%; margin-right: 0 }
figure svg { display: block; width: 100%%; height: auto }
figcaption { font-size: 14px }
h1, h2 { font-size: 18px; line-height: 1.4; margin: 0 0 10px }
h2 { font-size: 15px; margin: 0 }
h2 small { font-weight: normal; color: #444; margin-left: 6px; white-space: nowrap }
p, ul { margin: 0 0 14px }
.text { font-size: 18px; line-height: 1.9; overflow-wrap: anywhere }
mark { color: inherit; padding: 3px 5px; border-radius: 3px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone }
mark small { color: #333; font-size: 13px; margin-left: 4px }
ul { list-style: none; padding: 0; overflow-wrap: anywhere }
.legend { font-size: 14px }
.legend i { display: inline-block; width: 13px; height: 13px; margin: 0 5px -1px 0 }
.legend span { margin-right: 18px; white-space: nowrap }
.strip { margin-bottom: 8px }
.word { display: inline-block; margin: 4px 9px 4px 0; vertical-align: top }
.bar { display: inline-block; min-width: 30px; font: 13px/1.4 "DejaVu Sans Mono", monospace;
  text-align: center; vertical-align: top; margin-right: 1px; white-space: pre }
.bar b::before { content: ""; position: absolute; left: 0; right: 0; top: 50%%;
  border-top: 1px dotted #000 }
.bar b { display: block; position: relative; height: 44px; padding-top: 26px; font-weight: normal;
  box-sizing: border-box; font-size: 12px; line-height: 18px }
@media (max-width: 700px) { body { padding: 14px 12px }
  figure { float: none; max-width: 100%%; margin-right: 0 } }
@media print { section { break-inside: avoid } }
</style>
"""


def page(answered: Sequence[tuple[Row, Dataset, Sequence[Strip]]], no_gate: str | None) -> str:
    """The file's text: a section for each row, with its strips if there is a gate."""
    title = escape("; ".join(dict.fromkeys(title_of(row.record) for row, *_ in answered)))
    return HEAD % title + "".join(section(*one, no_gate) for one in answered) + "</html>\n"


def section(row: Row, dataset: Dataset, strips: Sequence[Strip], no_gate: str | None) -> str:
    """One example: its picture, its text, the answer, the gates."""
    record, answer = row.record, places(row, dataset)
    spans = [place for place in answer if place.item.span]
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in answer_lines(row))
    legend = f'<p class="legend">no gates to draw: {escape(no_gate)}</p>\n' if no_gate else ""
    if strips:
        names = "".join(f'<span><i style="background:{colour}"></i>{name}</span>' for colour, name
                        in ((TASK, expert_of(record)), (UNIVERSAL, "universal expert")))
        legend = f'<p class="legend">{names}</p>\n'
    figure = picture(row, answer) if has_image(record) else ""
    return (f'<section>\n{figure}<h1>{escape(title_of(record))}</h1>\n'
            f'<p class="text">{marked(record.tokens, spans)}</p>\n<ul>\n{lines}</ul>\n{legend}'
            f'{"".join(map(bars, strips))}</section>\n')


def marked(tokens: Sequence[str], spans: Sequence[Place]) -> str:
    """The words of a text; those of a span are coloured, with its label behind them."""
    pieces, begun = [], set()
    for word, inside, is_label in words_and_labels(tokens, spans):
        if is_label:
            pieces.append(f"<small>{escape(word)}</small></mark>")
            continue
        tags = [f'<mark style="background:{PLACE_COLOURS[span.colour]}59">'
                for span in inside if id(span) not in begun]
        begun |= set(map(id, inside))
        pieces += [" ", *tags, escape(word)]
    return "".join(pieces).strip()


def bars(strip: Strip) -> str:
    """A bar over each token: below the task expert's share, above it the universal expert's."""
    words = []
    for word in strip_words(strip):
        cells = []
        for name, gate in word:
            text, colour = gate_text(gate)
            share = f"{100 * gate:.1f}%"
            cells.append(f'<span class="bar"><b style="color:{colour};background:linear-gradient('
                         f'to top,{TASK} {share},{UNIVERSAL} {share})">{text}</b>'
                         f'{escape(name) or "&nbsp;"}</span>')
        words.append(f'<span class="word">{"".join(cells)}</span>')
    return (f'<div class="strip"><h2>{escape(strip.title)} <small>{strip_caption(strip)}</small>'
            f'</h2>\n{"".join(words)}</div>\n')


def inline(image: Image.Image) -> str:
    """A picture as a data URI: small ones as they are, photographs smaller and as JPEG."""
    small, content = max(image.size) <= 256, BytesIO()
    if not small:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    form = "png" if small else "jpeg"
    image.save(content, form, quality=88)
    return f"data:image/{form};base64,{base64.b64encode(content.getvalue()).decode()}"


def picture(row: Row, answer: Sequence[Place]) -> str:
    """The image with its numbered boxes, and what the answer says of them, as SVG in the units of
    a wide window; a narrow one shrinks it as a whole."""
    image = load_image(row.record.image)
    width, height = image.size
    wide = width >= 2 * height
    scale = min((WIDE if wide else SIDE) / width, (SIDE if wide else TALL) / height)
    w, h = width * scale, height * scale
    space = max(w, LEAST), max(h, LEAST)
    letter = LETTER * (1.4 if wide else 1)
    told, edge = whole_image(answer)
    frames, labels, taken = [], [], []
    for box in drawn_boxes(row.record, answer):
        x1, y1, x2, y2 = (value * scale for value in box.box)
        size = (0.64 * letter * max(map(len, box.lines)) + 8, 1.25 * letter * len(box.lines) + 4)
        x, y, apart = label_place(size, (x1, y1, x2, y2), taken, space)
        frames.append(frame((x1, y1, x2, y2), box.colour, "none", 3 if box.named else 1.5))
        if apart:
            frames.append(f'<path d="M{x:.1f} {y:.1f}L{x1:.1f} {y1:.1f}" stroke="{box.colour}"/>')
        labels.append(frame(taken[-1], "none", box.colour, 0))
        labels += [f'<text x="{x + 4:.1f}" y="{y + 1.25 * letter * (k + 0.82):.1f}" fill="'
                   f'{box.ink}">{escape(line)}</text>' for k, line in enumerate(box.lines)]
    pixels = "image-rendering:pixelated" if width < w else ""
    whole = f"<figcaption>{escape(told)}</figcaption>" if told else ""
    return (f'<figure{" class=wide" if wide else ""} style="width:{space[0]:.0f}px"><svg viewBox="'
            f'-2 -2 {space[0] + 4:.1f} {space[1] + 4:.1f}" role="img" font-size="{letter}">\n'
            f'<image width="{w:.1f}" height="{h:.1f}" preserveAspectRatio="none" style="{pixels}" '
            f'href="{inline(image)}"/>{frame((0, 0, w, h), edge, "none", 4 if told else 1)}'
            f'{"".join(reversed(frames))}{"".join(labels)}</svg>{whole}</figure>\n')


def frame(box: Box, stroke: str, fill: str, width: float) -> str:
    """A rectangle of SVG."""
    x1, y1, x2, y2 = box
    return (f'\n<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'stroke="{stroke}" fill="{fill}" stroke-width="{width}"/>')
