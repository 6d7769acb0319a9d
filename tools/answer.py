"""Answer examples: texts with their images, from the command line, a file or a folder.  Printed are
the text, in colours on a terminal unless NO_COLOR is set, the answer in words, and a line of JSON,
with --text or --draw with the mean gates of the task expert.

    python -m tools.answer RUN --text "..." --image I --task mner --draw page.png      one example
    python -m tools.answer RUN --examples ROWS.jsonl --out ANSWERS.jsonl --draw p.html    many

An example becomes a record without gold, is checked as those of a corpus are, and is answered by an
Extractor (tools/extract.py), which Python programs call without this command.  Typed text is split
as the published tweets are, see `word_offsets` there; tokens that a row gives stay as they are.
Faulty rows are named by file and line; none is answered before all are right."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from engine.command import Parser
from engine.corpus import frozen, parse_json, read_bytes
from engine.files import note, write_whole
from engine.images import load_image, resolve_image
from engine.processes import World, carry_out
from engine.schema import RECORD_TASKS, DataError, Dataset, Problems, Record, show
from evaluate import Job, Row, items_json, run_options
from tools import html
from tools.extract import Extractor, find_words, split_words, with_labels
from tools.figures import write_figure
from tools.page import Strip, answer_lines, example_figure, places

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
GivenRow = tuple[str, Path, bytes | dict]  # where it stands, the folder of its image, the row


def given_rows(args: argparse.Namespace) -> list[GivenRow]:
    """The examples that the command line asks for, not yet looked at."""
    path, image = args.examples, args.image
    if path is None:
        if image and image.is_symlink():
            image = image.resolve()  # a row may not follow links, the user may
        row = {"text": args.text, "image": image and image.name,
               "objects": parse_boxes(args.objects)}
        if args.task == "mre" or args.head or args.tail:
            row |= {"head": args.head or "", "tail": args.tail or ""}
        return [("--text", image.parent if image else Path(), row)]
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        return folder_rows(path)
    if len(files) > 1:
        raise DataError(f"{path}: expected one .jsonl file, got {len(files)}; name one of: "
                        f"{', '.join(map(str, files))}")
    lines = read_bytes(files[0]).removesuffix(b"\n").split(b"\n")
    return [(f"{files[0]}:{number}", files[0].parent, line) for number, line in enumerate(lines, 1)]


def folder_rows(folder: Path) -> list[GivenRow]:
    """A row per name in the folder: NAME.txt is its text, NAME.png or the like its image."""
    examples: dict[str, dict[str, Path]] = {}  # {name: {"text": file, "image": file}}
    for file in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        content = "text" if file.suffix.lower() == ".txt" else "image"
        first = examples.setdefault(file.stem, {}).setdefault(content, file)
        if first != file or file.suffix.lower() not in (".txt", *IMAGE_SUFFIXES):
            raise DataError(f"{file}: expected one .txt and at most one image ("
                            f"{' '.join(IMAGE_SUFFIXES)}) of each name, got another file; move it "
                            "away, or list the examples in a .jsonl file")
    if not examples:
        raise DataError(f"{folder}: expected a .jsonl file, or .txt and image files, found none; "
                        "name the folder that holds them")
    rows: list[GivenRow] = []
    for name, files in examples.items():
        text, image = files.get("text"), files.get("image")
        words = read_bytes(text).decode("utf-8", "surrogateescape") if text else ""
        row = {"id": name, "text": words, "image": image and image.name}
        rows.append((str(text or image), folder, row))
    return rows


def parse_boxes(words: Sequence[str]) -> list:
    """--objects: boxes as x1,y1,x2,y2, or .json files that hold a list of [x1,y1,x2,y2]."""
    boxes = []
    for word in words:
        try:
            boxes += (parse_json(read_bytes(Path(word))) if word.endswith(".json") else
                      [parse_json(f"[{word}]".encode())])
        except (ValueError, TypeError) as error:
            raise DataError(f"--objects {word}: expected x1,y1,x2,y2 in pixels, or a .json file "
                            f"with a list of such boxes, got something else ({error}); correct "
                            "it") from None
    return boxes


def image_path(folder: Path, name: str) -> Path:
    """The file of an image that a row names: in the row's folder, or in images/ below it."""
    roots = (folder, folder / "images")
    for root in roots:
        resolve_image(root, name)  # refuses names that lead elsewhere
    return next(filter(Path.is_file, (root / name for root in roots)), folder / name)


def completed(row: bytes | dict, folder: Path, name: str, args: argparse.Namespace,
              datasets: Mapping[str, Dataset]) -> dict:
    """A row as the JSON of a record: what it leaves out is filled in, words are looked up.
    Raises ValueError "field: problem; what to do"."""
    try:
        row = parse_json(row) if isinstance(row, bytes) else row
    except ValueError as error:
        raise DataError(f"row: not JSON in UTF-8 ({error}): repair or delete it") from None
    if not isinstance(row, dict):
        raise DataError(f"row: {show(row)} is no JSON object: write one per line")
    raw = {"id": name, "task": args.task, "image": None, "size": None, "objects": [], **row}
    if raw["task"] not in RECORD_TASKS:
        raise DataError(f"task: expected one of {', '.join(RECORD_TASKS)}, got "
                        f"{raw['task']!r}; write it into the row, or name one for all by --task")
    raw = with_labels(raw, (raw["task"],), datasets, args.dataset)
    if isinstance(raw.get("text"), str) and "tokens" not in raw:
        raw["tokens"] = split_words(raw.pop("text"))
    tokens = list(map(str, raw["tokens"])) if isinstance(raw.get("tokens"), list) else []
    for end in ("head", "tail"):
        if isinstance(words := raw.get(end), str):
            spans = find_words(tokens, words, end)
            raw[end] = list(spans[0])
            if len(spans) > 1:
                note(f"{name}: {end} {words!r} stands {len(spans)} times in the text; the first is "
                     "taken (a row of --examples may give tokens, [start, end])")
    if isinstance(raw["image"], str):
        path = image_path(folder, raw["image"])
        if path.is_file() or args.missing_images != "mask":
            size = list(load_image(path).size)
            if raw["size"] not in (None, size):
                raise DataError(f"size: {raw['size']} is not that of {path}, {size}: correct it, "
                                "or leave it out")
            raw["size"] = size
    return raw


def example_records(args: argparse.Namespace, datasets: Mapping[str, Dataset]) -> list[Record]:
    """The examples as records, checked as those of a corpus; `image` is the path of the file.
    Raises DataError that names every faulty row (the first 20)."""
    problems, records, seen = Problems(), [], {}
    for number, (where, folder, row) in enumerate(given_rows(args), 1):
        try:
            raw = completed(row, folder, str(number), args, datasets)
        except ValueError as error:
            field, _, problem = str(error).partition(": ")
            problems.add(where, field, problem)
            continue
        if problems.check_record(raw, datasets[raw["dataset"]], where, seen):
            raw["image"] = raw["image"] and str(image_path(folder, raw["image"]))
            records.append(Record(**frozen(raw), source=where))
    problems.raise_if_any()
    return records


TERMINAL = (34, 33, 32, 35, 36, 31)  # codes of about the same colours as on a page
HARMLESS = str.maketrans(dict.fromkeys((*range(32), *range(127, 160)), "?"))  # on a terminal


def coloured(row: Row, dataset: Dataset) -> str:
    """The text for a terminal, the words of each item in a colour."""
    words = [token.translate(HARMLESS) for token in row.record.tokens]
    for place in places(row, dataset):
        if place.item.span:
            start, end = place.item.span
            words[start] = f"\033[1;{TERMINAL[place.colour]}m{words[start]}"
            words[end - 1] += "\033[0m"
    return " ".join(words)


def print_answer(row: Row, dataset: Dataset) -> None:
    """Print an answer in words, below its text."""
    text = " ".join(row.record.tokens).translate(HARMLESS)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        text = coloured(row, dataset)
    lines = [line.translate(HARMLESS) for line in answer_lines(row)]
    print(text or "(no text)", *lines, sep="\n  ")


def answer_json(row: Row, strips: Sequence[Strip]) -> str:
    """An answer as one line of JSON; spans count the tokens.  "gates" is {token stream: mean gate
    of the task expert}, empty if no `strips` were made."""
    record, answer = row.record, row.answer
    line = {name: getattr(record, name) for name in ("id", "dataset", "task", "tokens", "image")}
    line |= {"answer": answer.text, "items": items_json(row.predicted),
             "malformed": row.counts.malformed, "cut": answer.cut, "missing_image": answer.missing,
             "gates": {strip.stream: fmean(strip.gates) for strip in strips}}
    return json.dumps(line, ensure_ascii=False)


def run(args: argparse.Namespace, world: World) -> None:
    """Answer the examples of the command line: in words, as JSON, as pictures."""
    extractor = Extractor.of(Job(args.checkpoint[0], args), world)
    datasets, no_gate = extractor.setup.datasets, extractor.no_gate
    most = extractor.setup.config.max_objects
    records = example_records(args, datasets)
    announce = partial(print, file=sys.stderr) if world.main else str
    crowded = [record.source for record in records if len(record.objects) > most]
    if crowded:
        announce(f"note: {len(crowded)} example(s), first {crowded[0]}, have more than {most} "
                 f"objects; the model sees the first {most}")
    with TemporaryDirectory() as folder:
        gates = bool(args.draw) or args.text is not None
        answered = extractor.read(records, folder, gates, announce)
    if not world.main:
        return
    lines = [answer_json(row, strips) for row, strips in answered]
    if args.out:
        write_whole(args.out, "".join(line + "\n" for line in lines))
    for number, ((row, strips), line) in enumerate(zip(answered, lines), 1):
        dataset = datasets[row.record.dataset]
        if not args.json:
            print_answer(row, dataset)
        if not args.out:
            print(line)
        for path in (path for path in args.draw if path.suffix != ".html"):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", row.record.id)[:80]
            path = path / f"{number:04d}-{name}.png" if args.examples else path
            write_figure(example_figure(row, dataset, strips, no_gate), path, photo=True)
            if not args.json:
                print(f"picture: {path}")
    sections = [(row, datasets[row.record.dataset], strips) for row, strips in answered]
    for path in (path for path in args.draw if path.suffix == ".html"):
        write_whole(path, html.page(sections, no_gate))
        if not args.json:
            print(f"page: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    command = Parser(prog="python -m tools.answer", description=__doc__.partition("\n\n")[0],
                     usage="%(prog)s CKPT --text T --task TASK [options]")
    add = command.add_argument_group("examples").add_argument
    add("--text", metavar="T", help="the sentence; punctuation becomes tokens")
    add("--image", type=Path, metavar="FILE", help="its image, if it has one")
    add("--task", choices=RECORD_TASKS, help="what to extract")
    add("--objects", nargs="+", metavar="BOX", default=(),
        help="boxes O1, O2 ... in the image, each x1,y1,x2,y2 in pixels, or .json files with lists "
             "of [x1,y1,x2,y2]; default: none")
    add("--head", metavar="WORDS", help="mre: the head entity, as in the text")
    add("--tail", metavar="WORDS", help="mre: the tail entity, as in the text")
    add("--examples", type=Path, metavar="PATH",
        help="many examples: a .jsonl file with records as engine/schema.py has them (gold may "
             'lack), or rows {"text", "image", "objects", "head", "tail", "task", "dataset"}, all '
             "but the text optional; or a folder with one such file, or with NAME.txt and NAME.png "
             "(jpg, webp, gif). Images are looked for beside the file and in images/ there")
    add("--dataset", metavar="NAME", help="whose labels to offer where a row does not say; "
        "default: the first dataset with the task")
    run_options(command, without=("split", "units", "cache"))
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FILE", help="the lines of JSON; default: they are printed")
    add("--json", action="store_true", help="print the JSON alone")
    add("--draw", type=Path, nargs="+", metavar="FILE", default=(),
        help="a page with the image and its boxes, the text and its spans, and the gates token by "
             "token: a .png file (with --examples a folder for one each), a .html file that needs "
             "no other (with --examples one for all), or both")
    args = command.parse_args(argv)
    has_text = args.text is not None
    idle = [name for name in ("image", "objects", "head", "tail") if getattr(args, name)]
    misnamed = [path for path in args.draw if (
        path.suffix not in (".png", ".html") or path.is_dir() if has_text else
        path.is_dir() if path.suffix == ".html" else path.is_file())]
    misnamed = misnamed and str(misnamed[0])
    for wrong, problem in (
            (has_text == (args.examples is not None), "give either --text or --examples"),
            (not has_text and idle, f"--{' --'.join(idle)} would do nothing without --text"),
            (has_text and not args.task, "--text needs --task mner, mre, med or meae"),
            (args.objects and not args.image, "--objects are boxes in an image; add --image"),
            (has_text and misnamed, f"--draw {misnamed}: name a .png file (or a .html file)"),
            (misnamed, f"--draw {misnamed}: name a folder for --examples (or a .html file)")):
        if wrong:
            command.error(problem)
    carry_out(run, args)


if __name__ == "__main__":
    main()
