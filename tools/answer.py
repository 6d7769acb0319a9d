"""Answer examples: texts with their images, from the command line, a file or a folder."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import data
from engine.command import Parser
from engine.corpus import frozen, parse_json, read_bytes
from engine.files import write_whole
from engine.images import load_image, resolve_image
from engine.processes import World, carry_out
from engine.schema import RECORD_TASKS, DataError, Dataset, Problems, Record, show
from evaluate import Job, Row, evaluate_split, items_json, load_model, run_options
from tools.page import Strip, answer_lines, draw_example, has_image, marks, token_strips
from tools.routing import lacks_gate
from vision import FeatureCache, ViT

# --------------------------------------------------------------------------- answering examples
# Texts with their images, from the command line, a file or a folder, go the way of test records.

GOLDLESS = {"mner": {"entities": []}, "mre": {"relation": "none"}, "med": {"events": []},
            "meae": {"events": []}}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
Given = list[tuple[str, Path, bytes | dict]]  # where a row stands, folder of its image, the row


def given_rows(args: argparse.Namespace) -> Given:
    """The examples that the command line asks for, not yet looked at."""
    path, image = args.examples, args.image
    if image and image.is_symlink():
        image = image.resolve()  # a row may not follow links, the user may
    if path is None:
        row = {"text": args.text, "image": image and image.name,
               "objects": parse_boxes(args.objects)}
        if args.task == "mre" or args.head or args.tail:
            row |= {"head": args.head or "", "tail": args.tail or ""}
        return [("--text", image.parent if image else Path(), row)]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) > 1:
            raise DataError(f"{path}: expected one .jsonl file, got {len(files)}; name one of: "
                            f"{', '.join(map(str, files))}")
        if not files:
            return folder_rows(path)
        path, = files
    lines = read_bytes(path).removesuffix(b"\n").split(b"\n")
    return [(f"{path}:{number}", path.parent, line) for number, line in enumerate(lines, 1)]


def folder_rows(folder: Path) -> Given:
    """A row per name in the folder: NAME.txt is its text, NAME.png or the like its image."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        part = "text" if file.suffix.lower() == ".txt" else "image"
        files = found.setdefault(file.stem, {})
        if part in files or file.suffix.lower() not in (".txt", *IMAGE_SUFFIXES):
            raise DataError(f"{file}: expected one .txt and at most one image ("
                            f"{' '.join(IMAGE_SUFFIXES)}) of each name, got another file; move it "
                            "away, or list the examples in a .jsonl file")
        files[part] = file
    if not found:
        raise DataError(f"{folder}: expected a .jsonl file, or .txt and image files, found none; "
                        "name the folder that holds them")
    rows: Given = []
    for name, files in found.items():
        text, image = files.get("text"), files.get("image")
        words = read_bytes(text).decode("utf-8", "surrogateescape") if text else ""
        rows.append((str(text or image), folder,
                     {"id": name, "text": words, "image": image and image.name}))
    return rows


def parse_boxes(words: Sequence[str]) -> list:
    """--objects: boxes as x1,y1,x2,y2, or .json files that hold a list of [x1,y1,x2,y2]."""
    boxes = []
    for word in words:
        try:
            file = word.endswith(".json")
            found = parse_json(read_bytes(Path(word)) if file else f"[{word}]".encode())
            boxes += found if file else [found]
        except (ValueError, TypeError) as error:
            raise DataError(f"--objects {word}: expected x1,y1,x2,y2 in pixels, or a .json file "
                            f"with a list of such boxes, got something else ({error}); correct "
                            "it") from None
    return boxes


def find_words(tokens: Sequence[str], words: str, name: str) -> tuple[int, int]:
    """The first span of `tokens` that reads `words`; DataError if there is none."""
    spans = data.occurrences([data.canon(token) for token in tokens], data.canon(words))
    if not spans:
        raise DataError(f"{name}: expected words of the text, got {words!r}, which is not in "
                        f"{' '.join(tokens)!r}; give whole tokens as they stand there")
    return spans[0]


def image_path(folder: Path, name: str) -> Path:
    """The file of an image that a row names: in the row's folder, or in images/ below it."""
    roots = (folder, folder / "images")
    for root in roots:
        resolve_image(root, name)  # refuses names that lead elsewhere
    return next((root / name for root in roots if (root / name).is_file()), folder / name)


def completed(row: bytes | dict, folder: Path, name: str, args: argparse.Namespace,
              datasets: Mapping[str, Dataset]) -> dict:
    """A row as the JSON of a record: what it leaves out is filled in, words are looked up.

    Raises ValueError "field: problem; what to do".
    """
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
    able = [key for key, dataset in datasets.items() if raw["task"] in dataset.units]
    raw = {"dataset": args.dataset or (able or [None])[0], **GOLDLESS[raw["task"]], **raw}
    if raw["dataset"] not in able:
        raise DataError(f"dataset: expected one with the task {raw['task']}, got "
                        f"{raw['dataset']!r}; use one of: "
                        f"{', '.join(able) or 'none in this corpus'}, or another task")
    if isinstance(raw.get("text"), str) and "tokens" not in raw:
        raw["tokens"] = raw.pop("text").split()
    for end in ("head", "tail"):
        if isinstance(raw.get(end), str):
            tokens = raw.get("tokens") if isinstance(raw.get("tokens"), list) else []
            raw[end] = list(find_words(list(map(str, tokens)), raw[end], end))
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

    Raises DataError that names every faulty row (the first 20).
    """
    problems, records, seen = Problems(), [], {}
    for number, (where, folder, row) in enumerate(given_rows(args), 1):
        try:
            raw = completed(row, folder, str(number), args, datasets)
        except ValueError as error:
            field, _, problem = str(error).partition(": ")
            problems.add(where, field, problem)
            continue
        if problems.check_record(raw, datasets[raw["dataset"]], where, seen):
            path = raw["image"] and str(image_path(folder, raw["image"]))
            raw = {key: frozen(value) for key, value in raw.items()}
            records.append(Record(**{**raw, "image": path}, source=where))
    problems.raise_if_any()
    return records


class GivenImages:
    """Image features of examples, as Features for a corpus; kept while this object lives."""

    def __init__(self, tower: Path, records: Sequence[Record], most: int, device: torch.device):
        self.width, self.most = ViT.feature_width(tower), most
        if named := [record for record in records if has_image(record)]:
            self.folder = TemporaryDirectory()
            vit = ViT.from_pretrained(tower).to(device).eval()
            self.cache = FeatureCache(vit, "once", self.folder.name)
            self.cache.prepare(map(self.key, named))

    def key(self, record: Record) -> tuple:
        return record.image, record.objects[:self.most], record.size

    def __call__(self, record: Record) -> tuple[Tensor, Tensor] | None:
        return self.cache.get(*self.key(record)) if has_image(record) else None


TERMINAL = (34, 33, 32, 35, 36, 31)  # codes of about the same colours
HARMLESS = str.maketrans(dict.fromkeys((*range(32), *range(127, 160)), "?"))  # on a terminal


def coloured(row: Row, dataset: Dataset) -> str:
    """The text for a terminal, the words of each item in a colour."""
    words = [token.translate(HARMLESS) for token in row.record.tokens]
    for mark in marks(row, dataset):
        if mark.item.span:
            start, end = mark.item.span
            words[start] = f"\033[1;{TERMINAL[mark.colour]}m{words[start]}"
            words[end - 1] += "\033[0m"
    return " ".join(words)


def tell(row: Row, dataset: Dataset) -> None:
    """Print an answer in words, below its text."""
    text = " ".join(row.record.tokens).translate(HARMLESS)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        text = coloured(row, dataset)
    lines = [line.translate(HARMLESS) for line in answer_lines(row)]
    print(text or "(no text)", *lines, sep="\n  ")


def answer_json(row: Row, strips: Sequence[Strip]) -> str:
    """An answer as one line of JSON; spans count the tokens.

    "gates": {token stream: mean gate of the task expert}, empty where no `strips` were made.
    """
    record, answer = row.record, row.answer
    return json.dumps({"id": record.id, "dataset": record.dataset, "task": record.task,
                       "tokens": record.tokens, "image": record.image, "answer": answer.text,
                       "items": items_json(row.predicted), "malformed": row.counts.malformed,
                       "cut": answer.cut, "missing_image": answer.missing,
                       "gates": {strip.stream: fmean(strip.gates) for strip in strips}},
                      ensure_ascii=False)


def answer_examples(args: argparse.Namespace, world: World) -> None:
    """Answer the examples of the command line: in words, as JSON, as pictures."""
    job = Job(args.checkpoint[0], args)
    setup = load_model(job.checkpoint, world.device, **job.changes)
    config, datasets = setup.config, setup.datasets
    records = example_records(args, datasets)

    def note(text: str) -> None:
        if world.main:
            print(text, file=sys.stderr)

    examples = data.encode_records(records, datasets, setup.tokenizer, config.max_source,
                                   config.max_target, note)
    crowded = [record.source for record in records if len(record.objects) > config.max_objects]
    if crowded:
        note(f"note: {len(crowded)} example(s), first {crowded[0]}, have more than "
             f"{config.max_objects} objects; the model sees the first {config.max_objects}")
    features = GivenImages(setup.sources.vit, records, config.max_objects, world.device)
    world.join()
    rows = evaluate_split(setup, examples, features, job.decoding, world)
    if not world.main:
        return
    why = lacks_gate(config)
    wanted = not why and (args.draw or args.text is not None)
    strips = [token_strips(setup, example, row, features, world.device, job.decoding)
              if wanted else [] for example, row in zip(examples, rows)]
    lines = list(map(answer_json, rows, strips))
    if args.out:
        write_whole(args.out, "".join(line + "\n" for line in lines))
    for number, (row, line) in enumerate(zip(rows, lines)):
        dataset = datasets[row.record.dataset]
        if not args.json:
            tell(row, dataset)
        if not args.out:
            print(line)
        if args.draw:
            name = re.sub(r"[^A-Za-z0-9.]+", "-", row.record.id)[:80]
            path = args.draw / f"{number + 1:04d}-{name}.png" if args.examples else args.draw
            draw_example(row, dataset, strips[number], why, path)
            if not args.json:
                print(f"picture: {path}")


def parser() -> Parser:
    """The options that describe examples to be answered."""
    result = Parser(
        prog="python -m tools.answer", usage="%(prog)s CKPT --text T --task TASK [options]",
        description="Answer examples. Printed are the text, in colours on a terminal unless "
        "NO_COLOR is set, what was found, and a line of JSON, with --text or --draw with the mean "
        "gates of the task expert.")
    add = result.add_argument_group("examples").add_argument
    add("--text", metavar="T", help="the sentence, tokens separated by spaces")
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
    add("--dataset", metavar="NAME",
        help="whose labels to offer where a row does not say; default: the first dataset with the "
             "task")
    add = result.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FILE", help="the lines of JSON; default: they are printed")
    add("--json", action="store_true", help="print the JSON alone")
    add("--draw", type=Path, metavar="FILE",
        help="a picture (.png) of the image with its boxes, the text with its spans and the gates "
             "token by token; with --examples a folder for one picture each")
    run_options(result)
    return result


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of options, if anything is."""
    one, many, draw = args.text is not None, args.examples is not None, args.draw
    single = [name for name in ("image", "objects", "head", "tail") if getattr(args, name)]
    return next((message for wrong, message in (
        (one == many, "give either --text or --examples"),
        (many and single, f"--{' --'.join(single)} would do nothing here: they go with --text"),
        (one and not args.task, "--text needs --task mner, mre, med or meae"),
        (args.objects and not args.image, "--objects are boxes in an image; name it with --image"),
        (one and draw and (draw.suffix != ".png" or draw.is_dir()),
         f"--draw {draw}: name a .png file"),
        (many and draw and draw.is_file(), f"--draw {draw}: with --examples name a folder"),
    ) if wrong), None)


def main(argv: Sequence[str] | None = None) -> None:
    command = parser()
    args = command.parse_args(argv)
    if wrong := misuse(args):
        command.error(wrong)
    carry_out(answer_examples, args)


if __name__ == "__main__":
    main()
