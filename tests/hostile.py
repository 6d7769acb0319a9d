"""Bad input of every kind, made from a seed, and what the product must answer to it.

Each function r11() ... r16() of this file measures one promise about input, raises AssertionError
where it is broken and returns the figure as a line of text. tests/test_inputs.py runs their short
forms; the long ones, LONG at the end, are run by

    python tests/hostile.py
"""

import io
import json
import os
import pickle
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load as parse
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import evaluate
from engine.checkpoints import Sources, find_checkpoint
from engine.corpus import load_corpus, load_datasets, read_split
from engine.features import FeatureCache, Features
from engine.files import ImageError, UsageError, WeightsError
from engine.images import MAX_PIXELS, load_image
from engine.schema import DataError, Dataset, Problems, Record, iou
from t5 import T5, T5Config
from vision import ViT, ViTConfig

# ----------------------------------------------------------------------------------- R11: records
# A mutation takes (generator, a valid row) and returns the bytes of a line. Whether the result is
# right is decided by valid(), a second and much simpler reading of engine/schema.py's head.

ROLES = {"attack": ["attacker", "place", "target"], "phone write": ["entity"]}
DATASETS = {
    "tweets": {"name": "tweets", "units": {"mner": "T17"},
               "labels": {"mner": ["location", "organization", "person"]}},
    "pairs": {"name": "pairs", "units": {"mre": "V2"},
              "labels": {"mre": ["couple", "held on", "held on (event)", "none"]}},
    "news": {"name": "news", "units": {"med": "MED", "meae": "MEAE"},
             "labels": {"med": sorted(ROLES), "meae": ROLES}}}
ATTACK = {"type": "attack", "trigger": [2, 3], "arguments": [
    {"role": "target", "box": [1, 2, 30, 41], "object": 1},
    {"role": "place", "box": [1, 2, 3, 4], "object": None}, {"role": "attacker", "span": [0, 2]}]}
CALL = {"type": "phone write", "trigger": None, "arguments": []}
PICTURE = {"image": "a/1.jpg", "size": [100, 50], "objects": [[1, 2, 30, 40], [0, 0.5, 100, 50]]}
ALONE = {"image": None, "size": None, "objects": []}
ROWS = [
    {"id": "1", "dataset": "tweets", "task": "mner", "tokens": ["Bob", "is", "in", "New", "York"],
     **PICTURE, "entities": [{"type": "person", "start": 0, "end": 1},
                             {"type": "location", "start": 3, "end": 5}]},
    {"id": "2", "dataset": "tweets", "task": "mner", "tokens": ["\u00fc", "\U0001f602", "\u200b"],
     **PICTURE, "size": None, "entities": []},
    {"id": "3", "dataset": "pairs", "task": "mre", "tokens": ["Ann", "met", "Bob"], **PICTURE,
     "head": [0, 1], "tail": [1, 3], "relation": "held on (event)"},
    {"id": "4", "dataset": "pairs", "task": "mre", "tokens": ["Ann", "Bob"], **ALONE,
     "head": [1, 2], "tail": [0, 1], "relation": "none"},
    {"id": "5", "dataset": "news", "task": "meae", "tokens": ["A", "mob", "struck", "Rome"],
     **PICTURE, "events": [ATTACK, CALL]},
    {"id": "6", "dataset": "news", "task": "med", "tokens": [], **PICTURE, "events": [CALL]},
    {"id": "7", "dataset": "news", "task": "med", "tokens": ["A", "mob", "struck", "Rome"], **ALONE,
     "events": [ATTACK | {"arguments": ATTACK["arguments"][2:]}], "accepted": [
         {"type": "attack", "trigger": [1, 2], "arguments": [{"role": "place", "span": [3, 4]}]}]}]


def valid(line: bytes, name: str) -> bool:
    """Whether a line is a record of the dataset `name`, by the letter of the format."""
    def once(pairs: list) -> dict:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=once)
        return bool(is_record(row, DATASETS[name]))
    except Exception:  # whatever goes wrong in here, it was no record
        return False


def is_record(row: dict, dataset: dict) -> bool:
    """One condition after the other; a value of another type fails some of them or raises."""
    def span(pair: list) -> bool:
        a, b = pair
        return type(a) is type(b) is int and type(pair) is list and 0 <= a < b <= len(row["tokens"])

    def box(four: list) -> bool:
        (a, b, c, d), right, bottom = four, *(row["size"] or (1e9, 1e9))
        return (type(four) is list and {type(x) for x in four} <= {int, float}
                and 0 <= a < c <= right and 0 <= b < d <= bottom and max(four) < 1e9)

    def argument(a: dict, kind: str, text: bool) -> bool:
        fits = a["role"] in ROLES[kind]
        if text or a.keys() == {"role", "span"}:
            return fits and a.keys() == {"role", "span"} and span(a["span"])
        k = a["object"]
        return (fits and a.keys() == {"role", "box", "object"} and box(a["box"]) and bool(image)
                and (k is None or type(k) is int and 1 <= k <= len(row["objects"])
                     and iou(a["box"], row["objects"][k - 1]) >= 0.5))

    def event(e: dict, text: bool = False) -> bool:
        whole = e["trigger"] is None and not text and image is not None
        return (e.keys() == {"type", "trigger", "arguments"} and e["type"] in labels
                and type(e["arguments"]) is list and (whole or span(e["trigger"]))
                and all(argument(a, e["type"], text) for a in e["arguments"]))

    task, tokens, image, size = row["task"], row["tokens"], row["image"], row["size"]
    labels, keys = dataset["labels"][task], set("id dataset task tokens image size objects".split())
    gold = {"mner": ["entities"], "mre": ["head", "tail", "relation"]}.get(task, ["events"])
    optional = {"accepted"} if gold == ["events"] else set()
    right = (keys | set(gold) <= row.keys() <= keys | set(gold) | optional
             and row["dataset"] == dataset["name"] and row["id"].isprintable() and row["id"] != ""
             and type(tokens) is list and (tokens or (gold == ["events"] and image))
             and all(t and not re.search("[\0- \x7f\ud800-\udfff]", t) for t in tokens)
             and (size is None or type(size) is list and len(size) == 2
                  and all(type(n) is int and 0 < n < 1e9 for n in size))
             and type(row["objects"]) is list and all(map(box, row["objects"])))
    if image is None:
        right = right and row["objects"] == []
    else:
        right = (right and image.isprintable() and not re.search(r"[\\:]|^~", image)
                 and len(image) < 1000 and all(part.strip(" .") and len(part.encode()) < 256
                                               for part in image.split("/")))
    if task == "mner":
        different = {json.dumps(e, sort_keys=True) for e in row["entities"]}
        right = right and len(different) == len(row["entities"])
        return right and type(row["entities"]) is list and all(
            e.keys() == {"type", "start", "end"} and e["type"] in labels
            and span([e["start"], e["end"]]) for e in row["entities"])
    if task == "mre":
        return right and span(row["head"]) and span(row["tail"]) and row["relation"] in labels
    return (right and type(row["events"]) is list and all(map(event, row["events"]))
            and all(event(e, True) for e in row.get("accepted", [])) and type(
                row.get("accepted", [])) is list)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of every value inside `value`."""
    inner = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    return [p for k, v in inner for p in ((*path, k), *places(v, (*path, k)))]


def at(row: object, path: tuple) -> object:
    for key in path:
        row = row[key]
    return row


def put(row: dict, path: tuple, value: object) -> dict:
    """A copy of the row with another value at `path`, or with none (...)."""
    copy = json.loads(json.dumps(row))
    inner = at(copy, path[:-1])
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def line(row: object) -> bytes:
    return json.dumps(row).encode()


def somewhere(fits: Callable[[object, tuple], bool],
              change: Callable[[random.Random, object], object]) -> Callable:
    """The mutation that changes one value which fits(value, path); a row without one is skipped."""
    def mutate(rng: random.Random, row: dict) -> bytes | None:
        found = [path for path in places(row) if fits(at(row, path), path)]
        if not found:
            return None
        path = rng.choice(found)
        return line(put(row, path, change(rng, at(row, path))))
    return mutate


def is_span(value: object, path: tuple) -> bool:
    return path[-1] in ("head", "tail", "span", "trigger") and value is not None


def is_offset(value: object, path: tuple) -> bool:
    return path[-1] in ("start", "end") or len(path) > 1 and is_span(value, path[:-1])


def is_box(value: object, path: tuple) -> bool:
    return path[-1] == "box" or len(path) == 2 and path[0] == "objects"


def is_number(value: object, path: tuple) -> bool:
    return type(value) in (int, float)


def is_token(value: object, path: tuple) -> bool:
    return path[0] == "tokens" and len(path) == 2


def is_label(value: object, path: tuple) -> bool:
    return path[-1] in ("type", "role", "relation")


def anywhere(value: object, path: tuple) -> bool:
    return True


def key(name: str) -> Callable[[object, tuple], bool]:
    return lambda value, path: path[-1] == name


def pick(*values: object) -> Callable[[random.Random, object], object]:
    return lambda rng, old: rng.choice(values)


def typo(rng: random.Random, word: str) -> str:
    """A word with two neighbours exchanged, or one letter lost, doubled or capitalised."""
    i = rng.randrange(len(word))
    return rng.choice([word[:i] + word[i + 1:], word[:i] + word[i] * 2 + word[i + 1:],
                       word[:i] + word[i].upper() + word[i + 1:],
                       word[:i] + word[i + 1:i + 2] + word[i] + word[i + 2:]])


def rename(how: Callable[[random.Random, str], str], keep: bool = False) -> Callable:
    """The mutation that gives a key of some object another name, or one more key (keep)."""
    def mutate(rng: random.Random, row: dict) -> bytes:
        path = rng.choice([p for p in places(row) if isinstance(p[-1], str)])
        new = put(row, (*path[:-1], how(rng, path[-1])), at(row, path))
        return line(new if keep else put(new, path, ...))
    return mutate


def in_text(change: Callable[[random.Random, bytes], bytes]) -> Callable:
    """The mutation that changes the bytes of the line."""
    return lambda rng, row: change(rng, line(row) if rng.random() < 0.5 else
                                   json.dumps(row, ensure_ascii=False).encode())


def splice(rng: random.Random, text: bytes, piece: bytes, instead: int = 0) -> bytes:
    i = rng.randrange(len(text))
    return text[:i] + piece + text[i + instead:]


def scaled(rng: random.Random, four: list) -> list:
    """A box that leaves its picture or is turned round."""
    x1, y1, x2, y2 = four
    return rng.choice([[x2, y1, x1, y2], [x1, y2, x2, y1], [x1, y1, x1, y2], [-x1 - 1, y1, x2, y2],
                       [x1, y1, x2 + 1e3, y2], [x1, -0.5, x2, y2], [x1, y1, x2, 1e4], four[:3],
                       four + [1], [x1, y1, x2 - x1, -y2], []])


def deep(rng: random.Random, old: object) -> list:
    for _ in range(rng.choice((2, 30, 400))):
        old = [old]
    return old


CONTROLS = "\n\r\t\0\x07\x1b\x1c\x7f \x0b"
PATHS = ["../1.jpg", "/etc/passwd", "a\\b.jpg", "C:1.jpg", "http://a/b.jpg", "a//b.jpg", "a/./b",
         "a/../../b", "", ".", "..", "~/a.jpg", "a/", "a\0.jpg", "a\n.jpg", ".. /a.jpg", " ",
         "a" * 300, "a/" * 600 + "a", 3]
WHATEVER = [None, True, False, -1, 0, 1, 3.5, "", "x", "none", "1", [], [0], [0, 1], [0, 9], [[]],
            {}, {"x": 1}, [1, 2, 3, 4], [1.5, 2, 3, 4], "O1", [None], "person", "tweets", "mner"]
HARMLESS = {
    "other spacing": lambda rng, row: json.dumps(row, separators=(" , ", " :\t")).encode() + b"  ",
    "line end of Windows": lambda rng, row: line(row) + b"\r",
    "keys in another order": lambda rng, row: line(dict(rng.sample(sorted(row.items()), len(row)))),
    "characters unescaped": lambda rng, row: json.dumps(row, ensure_ascii=False).encode(),
    "size unknown": lambda rng, row: line(row | {"size": None}),
    "odd token": somewhere(is_token, pick("\u2028", "\x85", "\x92", "\u00a0", "\u200b", "\u202e",
                                          "\ufe0f", "\U0001f602", "<spot>", "%", "\ufeff",
                                          "a" * 9000)),
    "odd file name": somewhere(lambda v, p: p == ("image",) and v is not None, pick(
        "\u00fc \u4e2d/VOA (1).jpg", "..a.jpg", "a..jpg", "-x", "a'b\".jpg", "a" * 200))}
MUTATIONS = {
    "wrong type": somewhere(anywhere, lambda rng, old: rng.choice(
        [new for new in (7, 2.5, "x", True, [], {}, None) if type(new) is not type(old)])),
    "missing key": somewhere(lambda v, p: isinstance(p[-1], str), pick(...)),
    "misspelt key": rename(typo),
    "extra key": rename(lambda rng, old: rng.choice(("text", "img_id", old + "s", "")), keep=True),
    "unknown label": somewhere(is_label, lambda rng, old: rng.choice(
        [typo(rng, old), old.title(), "O0", "", "giver", "none, couple"])),
    "span out of range": somewhere(is_offset, lambda rng, old: old + rng.choice((-9, -3, 9, 99))),
    "span reversed or empty": somewhere(is_span, lambda rng, old: rng.choice(
        [old[::-1], [old[0], old[0]], old[:1], [*old, old[1]], []])),
    "span of no integers": somewhere(is_offset, lambda rng, old: rng.choice(
        [float(old), bool(old), str(old), None, [old]])),
    "huge number": somewhere(is_number, pick(10 ** 12, 10 ** 400, -10 ** 30, 1e308, 2 ** 63)),
    "not a number": somewhere(is_number, pick(float("nan"), float("inf"), -float("inf"))),
    "nested": somewhere(anywhere, deep),
    "deeply nested": in_text(lambda rng, text: splice(
        rng, text, rng.choice((b"[", b'{"a":')) * rng.choice((990, 5000, 10 ** 5)))),
    "empty token or text": somewhere(lambda v, p: p[0] == "tokens", lambda rng, old: "" if
                                     isinstance(old, str) else rng.choice([[], [""], [[]], "Bob"])),
    "control in a token": somewhere(is_token, lambda rng, old: old + rng.choice(CONTROLS)),
    "half a surrogate": somewhere(lambda v, p: isinstance(v, str), lambda rng, old:
                                  rng.choice("\ud800\udfff") + old),
    "control in a name": somewhere(lambda v, p: p in (("id",), ("image",)) and v,
                                   lambda rng, old: old + rng.choice("\n\0\x1b\u2028")),
    "bad UTF-8": in_text(lambda rng, text: splice(
        rng, text, rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f", b"\x80")))),
    "other encoding": lambda rng, row: json.dumps(row, ensure_ascii=False).encode(
        rng.choice(("utf-8-sig", "utf-16", "utf-32", "utf-16-le"))).replace(b"\n", b""),
    "truncated": in_text(lambda rng, text: text[:rng.randrange(len(text))]),
    "flipped byte": in_text(lambda rng, text: splice(rng, text, bytes(
        [rng.choice([b for b in range(256) if b != 10])]), 1)),
    "key twice": lambda rng, row: line(row).replace(
        b'"%s":' % rng.choice((b"id", b"task")), b'"id": "1", "task": "mner", "id":', 1),
    "very long line": lambda rng, row: rng.choice((b'"', b"9", b"[0,", b'{"id":"')) * rng.choice(
        (10 ** 3, 10 ** 5)),
    "no object": lambda rng, row: line(rng.choice(([row], [], "x", 3, None, True, [row, row]))),
    "blank line": lambda rng, row: rng.choice((b"", b" ", b"\t", b"\r", b"\0")),
    "two rows on a line": lambda rng, row: line(row) + rng.choice((b"", b",", b"\r")) + line(row),
    "another language": lambda rng, row: rng.choice((
        repr(row).encode(), b"# " + line(row), line(row) + b",", line(row)[:-1] + b",}",
        ",".join(map(str, row.values())).encode(), b"<row/>", b"id\tdataset\ttask", b"---")),
    "box wrong": somewhere(is_box, scaled),
    "object number wrong": somewhere(key("object"), pick(0, -1, 3, 99, True, "1", 1.0, 2, [1])),
    "no image": lambda rng, row: line(row | {"image": None}),
    "image path": lambda rng, row: line(row | {"image": rng.choice(PATHS)}),
    "image size": lambda rng, row: line(row | {"size": rng.choice(
        ([0, 50], [100], [100, -50], [1, 1], [100.0, 50], "100x50", 100, [True] * 2, [None] * 2))}),
    "wrong file": lambda rng, row: line(row | rng.choice(
        ({"dataset": "tweet"}, {"dataset": 1}, {"task": "mer"}, {"task": "meae"}))),
    "anything": somewhere(anywhere, lambda rng, old: rng.choice(WHATEVER)),
}
PROBLEM = re.compile(r"[a-z]\w*(\[\d+\]|\.\w+)*: [^\n\0\x1b]+: [^\n\0\x1b]+")  # field: problem: fix


def read(folder: Path, name: str, lines: list[bytes]) -> tuple[list[Record], list[str]]:
    """What engine/corpus.py makes of the lines of one file."""
    raw, problems = DATASETS[name], Problems()
    (folder / "dev.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    dataset = Dataset(raw["name"], raw["units"], raw["labels"])
    records = read_split(folder, "dev", dataset, problems)
    for record in records:  # what is let through can be used
        data.prompt(record, dataset), data.target(record), data.gold_items(record)
    return records, list(problems)


def answered(folder: str, name: str, mutant: bytes, right: bool) -> str:
    """What is wrong with the answer to a line that stands between two right ones, or ""."""
    before, after = (line(next(row for row in ROWS if row["dataset"] == name) | {"id": word})
                     for word in ("before", "after"))
    records, problems = read(Path(folder), name, [before, mutant, after])
    start = f"{folder}/dev.jsonl:2: "
    if [r.id for r in records[:1] + records[-1:]] != ["before", "after"]:
        return "a right row was lost"
    if len(records) != 2 + right or bool(problems) == right:
        return f"right: {right}, {len(records) - 2} read, {problems}"
    odd = [p for p in problems if not p.startswith(start) or len(p) - len(start) > 500
           or not PROBLEM.fullmatch(p.removeprefix(start))]
    return f"message: {odd}" if odd else ""


def r11(count: int = 1500, seed: int = 0) -> str:
    """`count` rows with mistakes are refused by file, line and field; all right rows are read."""
    rng, counts, faults, kinds = random.Random(seed), Counter(), [], MUTATIONS | HARMLESS
    with tempfile.TemporaryDirectory() as folder:
        while counts[False] < count:
            kind, row = list(kinds)[counts.total() % len(kinds)], rng.choice(ROWS)
            mutant = kinds[kind](rng, row)
            if mutant is None:  # this row holds no place for it
                continue
            right = valid(mutant, row["dataset"])
            assert right or kind not in HARMLESS, (kind, mutant)
            fault = answered(folder, row["dataset"], mutant, right)
            faults += [f"{kind}: {fault}: {mutant[:400]!r}"] if fault else []
            counts[right] += 1
    assert not faults, "\n".join([f"{len(faults)} rows answered wrongly", *faults[:40]])
    return (f"{count:,} wrong rows of {len(MUTATIONS)} kinds refused with file, line and field; "
            f"{counts[True]:,} changed but right ones read; 0 tracebacks, 0 rows lost")


# ----------------------------------------------------------------------------------- R12: pictures

def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes | None = b"", extra: bytes = b"") -> bytes:
    """A PNG of one bit that claims a size; body None: the rows of a white picture."""
    if body is None:
        body = zlib.compress((b"\0" + b"\xff" * ((width + 7) // 8)) * height, 1)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body)
            + chunk(b"IEND", b""))


def gif(screen: tuple[int, int], frame: tuple[int, int], frames: int = 1) -> bytes:
    """A GIF whose screen and frames claim sizes; the frames hold next to nothing."""
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0"
    return (b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
            + one * frames + b";")


def sized(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    i = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:i] + struct.pack(">HH", height, width) + jpeg[i + 4:]


def picture(kind: str, **options: object) -> bytes:
    """A noisy picture of 50 x 40 in a format."""
    stream, noise = io.BytesIO(), random.Random(kind).randbytes(50 * 40 * 3)
    Image.frombytes("RGB", (50, 40), noise).save(stream, kind, **options)
    return stream.getvalue()


def broken_pictures() -> dict[str, bytes]:
    """Files that hold no whole picture of the four formats, or too large a one."""
    jpeg = picture("JPEG")
    files = {
        "empty.jpg": b"", "text.jpg": b"no picture\n", "page.jpg": b"<html>404</html>" * 90,
        "script.png": b"#!/bin/sh\nexit 1\n", "drawing.png": b"<svg width='9' height='9'/>",
        "zip.jpg": b"PK\3\4" + bytes(99), "zeros.jpg": bytes(10 ** 6), "pdf.jpg": picture("PDF"),
        "fits.jpg": b"SIMPLE  =" + b"T".rjust(21) + bytes(2850), "psd.jpg": b"8BPS\0\1" + bytes(99),
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "xpm.png": b"/* XPM */",
        "bomb13.png": png(13_000, 13_000, None), "bomb20.png": png(20_000, 20_000, None),
        "above.png": png(8000, MAX_PIXELS // 8000 + 1, None), "claim.png": png(50_000, 50_000),
        "claim.jpg": sized(jpeg, 65_500, 65_500), "large.jpg": sized(jpeg, 6000, 6000),
        "screen.gif": gif((65_535, 65_535), (1, 1)), "frame.gif": gif((9, 9), (65_535, 65_535)),
        "canvas.webp": b"RIFF\x1a\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2,
        "below.png": png(11_000, 11_000), "below.jpg": sized(jpeg, 11_000, 11_000),
        "below.gif": gif((11_000, 11_000), (11_000, 11_000)),
        "below.webp": b"RIFF\x1a\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff\x2a\0" * 2,
        "chunk.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ", "no rows.png": png(40, 40),
        "zero.png": png(0, 9), "flat.png": png(9, 0), "zero.gif": gif((0, 0), (0, 0)),
        "zero.jpg": sized(jpeg, 0, 40), "short.png": png(40, 40, zlib.compress(bytes(9))),
        "length.png": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR" + bytes(99),
        "page first.jpg": b"<html>" + jpeg, "sum.png": bytes(picture("PNG")[:30]) + bytes(99)}
    for kind in ("BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000"):
        files[f"{kind}.png"] = picture(kind)
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        whole = picture(kind)
        files |= {f"cut {cut} {kind}": whole[:cut]
                  for cut in (9, 20, 60, len(whole) // 3, len(whole) // 2, len(whole) * 3 // 4)}
        files[f"signature {kind}"] = b"\0" + whole[1:]
    return files


def doubtful_pictures() -> dict[str, bytes]:
    """Whole pictures in bad company, and damaged ones: right or refused, but quick and small."""
    text, rng = zlib.compress(bytes(10 ** 8), 9), random.Random(0)
    files = {"comment.png": png(9, 9, None, chunk(b"zTXt", b"a\0\0" + text)),
             "profile.png": png(9, 9, None, chunk(b"iCCP", b"a\0\0" + text)),
             "comments.png": png(9, 9, None, chunk(b"tEXt", b"a\0" + bytes(10 ** 6)) * 70),
             "frames.gif": gif((5000, 5000), (5000, 5000), 3000), "gif and js.gif":
             picture("GIF") + b"=1;alert(1)", "jpeg and zip.jpg": picture("JPEG") + b"PK\5\6" * 9,
             "rotated.jpg": picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40))}
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        for number in range(6):
            damaged = bytearray(picture(kind))
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            files[f"flip {number} {kind}"] = bytes(damaged)
    return files


def special_files(folder: Path) -> None:
    """What is no file at all."""
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(folder / "socket.jpg"))
    for name, target in (("endless.jpg", "/dev/zero"), ("random.jpg", "/dev/urandom"),
                         ("loop.jpg", "loop.jpg"), ("dangling.jpg", "absent"), ("to a pipe.jpg",
                                                                               "pipe.jpg")):
        (folder / name).symlink_to(target)
    (folder / "locked.jpg").write_bytes(picture("JPEG"))
    (folder / "locked.jpg").chmod(0)


def peak() -> int:
    """The most memory that this process has held, in kB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def look(folder: Path) -> None:
    """Print as JSON what load_image and the feature cache make of each file, {path: [answer, ...,
    seconds]}, and by how many MB this process grew meanwhile."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # for the machine's sake
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                      intermediate_size=8, image_size=8, patch_size=8)
    cache = FeatureCache(ViT(small), "tower", folder.parent / "features")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    memory, answers = peak(), {}
    for path in [*sorted(folder.iterdir()), folder / "absent.jpg"]:
        start, answer = time.process_time(), []
        for read in (load_image, lambda path: cache.get(path, [], None),
                     lambda path: cache.get(path, [], (50, 40))):
            try:
                read(path)
                answer.append("read")
            except ImageError as error:
                answer.append(str(error))
        answers[str(path)] = [*answer, time.process_time() - start]
    print(json.dumps({"MB": (peak() - memory) / 1000, **answers}))


def r12() -> str:
    """No file that poses as a picture does harm: refused by path, in a second, in 200 MB."""
    with tempfile.TemporaryDirectory() as root:
        folder, broken, doubtful = Path(root) / "images", broken_pictures(), doubtful_pictures()
        folder.mkdir()
        special_files(folder)
        for name, content in (broken | doubtful).items():
            (folder / name).write_bytes(content)
        code = "import hostile, sys; hostile.look(hostile.Path(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT / "tests", timeout=60,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout)
        memory = answers.pop("MB")
    refused = 0
    for path, (*said, seconds) in answers.items():
        name = Path(path).name
        may = name in doubtful or name == "locked.jpg" and os.geteuid() == 0  # root reads anything
        refused += said[0] != "read"
        assert all(one.startswith(f"{path}: expected ") or may and one == "read"
                   for one in said), (name, said)
        assert seconds < 1, (name, seconds)
    slowest = max(seconds for *_, seconds in answers.values())
    assert memory < 200, memory
    return (f"{len(answers)} hostile files: {refused} refused with their path, "
            f"{len(answers) - refused} whole enough to be read; slowest {slowest:.2f} s, memory "
            f"grew by {memory:.0f} MB")


# ------------------------------------------------------------------------- R13, R14: names, missing

REFUSED_NAMES = [
    "", ".", "..", "/", "//", "../a.jpg", "../img_x/a.jpg", "../../etc/passwd", "a/../../b.jpg",
    "a/..", "a/../b.jpg", "./a.jpg", "a/./b.jpg", "a//b.jpg", "/etc/passwd", "//host/share/a.jpg",
    "a.jpg/", "/../a.jpg", ".. /a.jpg", " ../a.jpg", "... /a.jpg", ".../a.jpg", "..\\a.jpg",
    "a\\b.jpg", "\\\\host\\a.jpg", "C:\\a.jpg", "C:/a.jpg", "c:a.jpg", "Z:", "a\0.jpg", "\0",
    "a.jpg\0.png", "~", "~/a.jpg", "~root/a.jpg", "file:///etc/passwd", "http://host/a.jpg",
    "/dev/zero", "a\n.jpg", "a\u202egpj.exe", "\ud800.jpg", "a" * 5000, " ",
    "\u4e2d" * 90, 7, ["a.jpg"], {}]
LINKS = {"link_out": "/etc", "link_file.jpg": "../images_x/a.jpg", "link_twin": "../images_x",
         "link_up": "..", "link_far": "sub/../../images_x", "link_chain": "link_out"}
NO_PICTURES = ["link_out/passwd", "link_up/train.jsonl", "link_up", "link_chain/passwd", "link_out"]
KEPT_NAMES = ["a.jpg", "sub/a.jpg", "VOA.2016 (1).jpg", "\u00fc\u4e2d\u6587.png", "..a.jpg", "-rf",
              "a..jpg", "a'b\".jpg", "sub/sub/b c.jpg", "a~.jpg", "a" * 200, "link_in/a.jpg",
              "link_file.jpg", "link_twin/a.jpg", "link_far/a.jpg"]  # links of the keeper's


def write_names(corpus: Path, names: list) -> Path:
    """Let the records of the corpus name these images."""
    rows = [ROWS[1] | {"id": str(i), "objects": [], "image": name} for i, name in enumerate(names)]
    path = corpus / "tweets" / "train.jsonl"
    path.write_bytes(b"".join(line(row) + b"\n" for row in rows))
    return path


def make_corpus(root: Path, names: list) -> Path:
    """A corpus of mner records that name these images, and the images; beside it a tower."""
    folder = root / "corpus" / "tweets"
    (folder / "images" / "sub" / "sub").mkdir(parents=True)
    (folder / "images_x").mkdir()
    (folder / "images_x" / "a.jpg").write_bytes(picture("JPEG"))
    for link, target in (LINKS | {"link_in": "sub"}).items():
        (folder / "images" / link).symlink_to(target)
    (folder / "dataset.json").write_text(json.dumps(DATASETS["tweets"]))
    write_names(folder.parent, names)
    for name in names:
        (folder / "images" / name).write_bytes(picture("JPEG"))
    tower(root / "vit")
    return folder.parent


def tower(folder: Path) -> Path:
    """A folder with a tiny vision tower."""
    ViT(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                  image_size=8, patch_size=8)).save_pretrained(folder)
    return folder


def features(corpus: Path, missing_images: str) -> Features:
    """The image features of a run on this corpus."""
    sources = Sources(corpus, corpus, corpus.parent / "vit")
    return Features(sources, load_corpus(corpus, "train"), missing_images, 4,
                    torch.device("cpu"), ViT)


def complaint(act: Callable[[], object], *kinds: type) -> str:
    """The error of one of these kinds that `act` ends with, "" if it ends well."""
    try:
        act()
    except kinds as error:
        return str(error)
    return ""


def r13() -> str:
    """A missing image is an error that says which and how many; masked, its rows are counted."""
    names = ["a.jpg", "lost 1.jpg", "sub/lost 2.jpg", "link_in/lost 2.jpg", "b.jpg"]
    with tempfile.TemporaryDirectory() as root:
        corpus = make_corpus(Path(root), ["a.jpg", "b.jpg"])
        path = write_names(corpus, names)
        said = complaint(lambda: features(corpus, "error"), UsageError)
        for part in ("for each of 5 records, 3 are missing, first", f"({path}:2)",
                     f"{corpus}/tweets/images/lost 1", "--missing-images mask"):
            assert part in said, (part, said)
        found = features(corpus, "mask")
        records = load_corpus(corpus, "train")
        assert found.missing_rows == 3
        assert [found(record) is None for record in records] == [False, True, True, True, False]
        scores = evaluate.score_rows(records, [evaluate.Answer("none", missing=found(r) is None)
                                               for r in records], load_datasets(corpus))
        counts = evaluate.total(scores)
        assert counts["T17"].missing == 3
        assert evaluate.counts_json("T17", counts["T17"])["missing"] == 3
        [note] = evaluate.notes(counts, load_datasets(corpus))
        assert "3 of 5 rows" in note, note
    return "3 missing images: refused with first file, line and count; masked, counted and stored"


def r14() -> str:
    """No name leads out of the images' folder, and what links lead to is read as a picture or not
    at all; each is refused with file and line."""
    with tempfile.TemporaryDirectory() as root:
        corpus = make_corpus(Path(root), KEPT_NAMES)
        found = features(corpus, "error")
        assert all(found(record) for record in load_corpus(corpus, "train"))
        for name in REFUSED_NAMES + NO_PICTURES:
            path = write_names(corpus, ["a.jpg", name])
            for policy in ("error", "mask"):
                said = complaint(lambda: features(corpus, policy), DataError, ImageError)
                assert f"{path}:2: image" in said, (name, said)
    return (f"{len(REFUSED_NAMES + NO_PICTURES)} names refused with file and line, "
            f"{len(KEPT_NAMES)} odd ones read")


# -------------------------------------------------------------------------------- R15, R16: weights

SMALL_T5 = T5Config(vocab_size=29, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
                    feed_forward_proj="gated-gelu", tie_head=False, scale_logits=False)
Load = Callable[[Path], torch.nn.Module]


def towers(root: Path) -> dict[str, Load]:
    """A folder with a small T5 and one with a small ViT, and how each is loaded."""
    torch.manual_seed(0)
    T5(SMALL_T5).save_pretrained(root / "t5")
    tower(root / "vit")
    return {"t5": T5.from_pretrained, "vit": ViT.from_pretrained}


class Canary:
    """Unpickling this object leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def r15() -> str:
    """No pickled file is read, whoever is asked to; the message says what to do instead."""
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        canary, load, asked = root / "canary", towers(root), 0
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "best.ckpt"):
            for kind in load:
                (root / kind / "model.safetensors").unlink(missing_ok=True)
                (root / kind / name).write_bytes(pickle.dumps(Canary(canary)))
            run = root / "run"
            run.mkdir(exist_ok=True)
            (run / name).write_bytes(pickle.dumps(Canary(canary)))
            for act in (lambda: load["t5"](root / "t5"), lambda: load["vit"](root / "vit"),
                        lambda: find_checkpoint(run / name),
                        lambda: find_checkpoint(run)):
                said, asked = complaint(act, WeightsError, UsageError), asked + 1
                assert name in said and "safetensors" in said and "run code" in said, (name, said)
            for kind in load:
                (root / kind / name).unlink()
            (run / name).unlink()
        assert not canary.exists(), "a pickle was read"
        with open(root / "proof", "wb") as file:
            pickle.dump(Canary(canary), file)
        pickle.loads((root / "proof").read_bytes()).close()  # the canary does sing
        assert canary.exists()
    return f"{asked} requests to read a pickled checkpoint refused, none unpickled"


def same_or_refused(load: Load, folder: Path, good: dict, must: tuple = ()) -> str:
    """The refusal, "" if the tensors are those of `good`; anything else is an AssertionError."""
    try:
        state = load(folder).state_dict()
    except WeightsError as error:
        assert str(folder) in str(error), error
        assert all(word in str(error) for word in must), (must, str(error))
        return str(error)
    assert state.keys() == good.keys() and all(torch.equal(state[k], good[k]) for k in good), must
    return ""


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """A safetensors file with a damaged header or end."""
    size = int.from_bytes(whole[:8], "little")
    head, body = whole[8:8 + size], whole[8 + size:]
    how = rng.randrange(8)
    if how == 0:  # bytes anywhere in the header and its length
        new = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            new[rng.randrange(8 + size)] = rng.randrange(256)
        return bytes(new)
    if how == 1:
        return whole[:rng.choice((0, 1, 7, 8, 9, size, 8 + size, rng.randrange(len(whole))))]
    if how == 2:
        return rng.choice((2 ** 63, 2 ** 64 - 1, 10 ** 8, size + 1, size - 1, 0)).to_bytes(
            8, "little") + whole[8:]
    if how == 3:
        return whole + bytes(rng.choice((1, 8, 4096)))
    raw = json.loads(head)
    name, other = rng.sample([key for key in raw if key != "__metadata__"], 2)
    if how == 4:
        field = rng.choice(("dtype", "shape", "data_offsets"))
        raw[name][field] = rng.choice((
            "I32", "F64", "F8_E5M2", "BOOL", "X", [], [-1], [2 ** 40, 2 ** 40], [0], None, 7,
            raw[other][field], raw[name][field][::-1], [0, 2 ** 63]))
    elif how == 5:
        raw[rng.choice((name + "x", "", name.upper(), "../x"))] = raw.pop(name)
    elif how == 6 and raw[name]["shape"] != raw[other]["shape"]:  # else it is another right file
        raw[name], raw[other] = raw[other], raw[name]
    else:
        raw.pop(name)
    text = json.dumps(raw).encode()
    return len(text).to_bytes(8, "little") + text + body


def fuzzed_headers(root: Path, loads: dict[str, Load], count: int) -> int:
    """How many of `count` damaged files were refused; all others gave the right tensors."""
    rng, refused = random.Random(0), 0
    for kind, load in loads.items():
        path, good = root / kind / "model.safetensors", load(root / kind).state_dict()
        whole = path.read_bytes()
        for _ in range(count // len(loads)):
            path.write_bytes(damaged(rng, whole))
            refused += bool(same_or_refused(load, root / kind, good))
        path.write_bytes(whole)
    return refused


ABSENT = object()


def broken_configs() -> dict[str, list[tuple[str, str, object]]]:
    """(file, field, value) for the settings of each tower, none of which can be meant."""
    def cases(fields: str, *values: object, file: str = "config.json") -> list[tuple]:
        return [(file, field, value) for field in fields.split() for value in values]

    odd = (None, "8", 8.0, True, [8], {}, 0, -1, 10 ** 9, 2 ** 63, 10 ** 30, 7)
    pictures = "preprocessor_config.json"
    return {"t5": [
        *cases("vocab_size d_model d_kv d_ff num_layers num_heads", ABSENT, *odd),
        *cases("num_decoder_layers relative_attention_num_buckets relative_attention_max_distance",
               "x", 1.5, -1, 0, True, 10 ** 9, 10 ** 30, []),
        *cases("dropout_rate layer_norm_epsilon", "x", -0.5, [], 7.0, True, float("nan")),
        *cases("pad_token_id eos_token_id decoder_start_token_id", "x", -1, 29, 1.0, [], 10 ** 9),
        *cases("feed_forward_proj", "gated-silu", 3, []), *cases("model_type", "bert", ["t5"]),
        *cases("scale_decoder_outputs", "no", 1, [])], "vit": [
        *cases("hidden_size num_hidden_layers num_attention_heads intermediate_size image_size "
               "patch_size", *odd),
        *cases("model_type hidden_act", "swin", [], 3, None), ("config.json", "model_type", ABSENT),
        *cases("layer_norm_eps", "x", -1, 2.0, None), *cases("qkv_bias", "x", 1, None),
        *cases("vision_config", [], None, 3),
        *cases("image_mean image_std", "x", 0.5, [], [0.5], [1, 2, "x"], [float("nan")] * 3,
               file=pictures), (pictures, "image_std", [0, 0, 0]),
        *cases("resample", "x", 99, -1, 2.5, file=pictures),
        *cases("size", "x", 9, [8], {"height": None}, {"width": 8}, file=pictures)]}


def refused_configs(root: Path, loads: dict[str, Load]) -> int:
    """Every setting that cannot be meant is refused by folder, nothing being allocated for it."""
    count = 0
    for kind, cases in broken_configs().items():
        for file, field, value in cases:
            path = root / kind / file
            whole = path.read_text()
            raw = {k: v for k, v in (json.loads(whole) | {field: value}).items() if v is not ABSENT}
            path.write_text(json.dumps(raw))
            said = complaint(lambda: loads[kind](root / kind), WeightsError)
            assert str(root / kind) in said, (kind, field, value, said)
            path.write_text(whole)
            count += 1
        path = root / kind / "config.json"
        whole = path.read_text()
        for text in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 10 ** 5, b'{"a": ' * 10 ** 5, b"null",
                     whole.replace("{", '{"d_ff": 1, "patch_size": 1,', 1).encode()):
            path.write_bytes(text)
            said = complaint(lambda: loads[kind](root / kind), WeightsError)
            assert f"{path}: " in said, (text[:9], said)
            count += 1
        path.write_text(whole)
        loads[kind](root / kind)
    return count


def refused_shards(root: Path, loads: dict[str, Load]) -> int:
    """Two shards and an index that lies about them in every way; the lie is named."""
    count = 0
    for kind, load in loads.items():
        folder = root / kind
        good, stored = load(folder).state_dict(), load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = {key: names[i % 2] for i, key in enumerate(sorted(stored))}
        first, second = sorted(stored)[:2]
        both = [{k: v for k, v in stored.items() if index[k] == name} for name in names]
        twice = json.dumps(index).replace("{", f'{{"{first}": "{names[0]}", ', 1)
        cases = [
            ("absent", {}, None), ("empty", {names[1]: b""}, names[1]),
            ("cut", {names[1]: -9}, names[1]), ("gone", {names[1]: ABSENT}, names[1]),
            ("both", {names[1]: both[1] | {first: stored[first] + 1}}, first),
            ("exchanged", {"map": index | {first: names[1], second: names[0]}}, first),
            ("ghost", {"map": index | {"ghost": names[0]}}, "ghost"),
            ("extra", {names[0]: both[0] | {"extra": stored[first] + 1}}, "extra"),
            ("lacking", {names[0]: {k: v for k, v in both[0].items() if k != first}}, first),
            ("twice", {"map": twice}, "stands twice"), ("no map", {"map": "3"}, "weight_map"),
            ("list", {"map": "[]"}, "weight_map"), ("none", {"map": "{}"}, "weight_map"),
            ("number", {"map": index | {first: 3}}, "3"),
            ("null", {"map": index | {first: None}}, "")]
        cases += [(name, {"map": index | {first: name}}, name) for name in (
            "../model.safetensors", "/etc/passwd", "/dev/zero", "weights.bin", "", ".", "a/b")]
        for what, change, word in cases:
            for name, tensors in zip(names, both):
                save_file(change.get(name) if isinstance(change.get(name), dict) else tensors,
                          folder / name)
                if isinstance(change.get(name), (bytes, int)):
                    (folder / name).write_bytes(change[name] if change[name] != -9 else
                                                (folder / name).read_bytes()[:-9])
                if change.get(name) is ABSENT:
                    (folder / name).unlink()
            text = change.get("map", index)
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": ' + (text if isinstance(text, str) else json.dumps(text)) + "}")
            said = same_or_refused(load, folder, good, (word,) if word else ())
            assert bool(said) == (what != "absent"), (kind, what, said)
            count += bool(said)
    return count


def refused_tensors(root: Path, loads: dict[str, Load], most: int) -> int:
    """A tensor too many, too few, of another shape or of whole numbers, each named."""
    rng, count = random.Random(0), 0
    for kind, load in loads.items():
        path, good = root / kind / "model.safetensors", load(root / kind).state_dict()
        stored, whole = parse(path.read_bytes()), path.read_bytes()  # no view of the file
        for key in rng.sample(sorted(stored), min(len(stored), most)):
            tensor = stored[key]
            wrong = (tensor.int(), tensor.double(), tensor > 0, torch.cat([tensor, tensor]),
                     tensor[:0], tensor.flatten()[None], tensor.unsqueeze(-1), None)
            for other in wrong:
                some = stored | {key: other} if other is not None else {
                    k: v for k, v in stored.items() if k != key}
                save_file(some, path)
                copy = key == "lm_head.weight" and other is None  # tied then, another right file
                assert copy or same_or_refused(load, root / kind, good, (key,)), (key, other)
                count += not copy
        save_file(stored | {"extra.weight": torch.ones(2)}, path)
        assert same_or_refused(load, root / kind, good, ("extra.weight",))
        path.write_bytes(whole)
    return count + len(loads)


def refused_tokenizers(folder: Path, count: int) -> int:
    """A damaged spiece.model is a DataError or still a tokenizer, never a crash."""
    path, rng, refused = folder / "spiece.model", random.Random(0), 0
    whole = (Path(__file__).parent / "golden" / "tokenizer" / "spiece.model").read_bytes()
    cases = [b"", b"text", bytes(999), *(whole[:rng.randrange(len(whole))] for _ in range(count))]
    for _ in range(count):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    for content in cases:
        path.write_bytes(content)
        said = complaint(lambda: data.Tokenizer(folder).encode("a b"), DataError)
        assert not said or str(path) in said, said
        refused += bool(said)
    path.unlink()
    assert f"{path}: cannot be read" in complaint(lambda: data.Tokenizer(folder), DataError)
    return refused + 1


def r16(count: int = 200) -> str:
    """Damaged weights are refused by file and key; what is accepted has the right tensors."""
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        loads = towers(root)
        refused = fuzzed_headers(root, loads, count)
        tensors, configs = refused_tensors(root, loads, count // 40), refused_configs(root, loads)
        tokenizers = refused_tokenizers(root / "t5", count // 10)
        shards = refused_shards(root, loads)
    assert refused > 0.9 * count, refused
    return (f"{count:,} damaged safetensors files: {refused:,} refused, the others equal; refused "
            f"as well: {tensors} wrong tensors, {configs} settings, {tokenizers} tokenizers, "
            f"{shards} sets of shards")


LONG = {"R11": lambda: r11(10_000), "R12": r12, "R13": r13, "R14": r14, "R15": r15,
        "R16": lambda: r16(2_000)}

if __name__ == "__main__":
    for promise, measure in LONG.items():
        print(promise, measure(), flush=True)
