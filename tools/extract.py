"""What a text and its picture hold, from Python:

    from tools.answer import Extractor
    extractor = Extractor("runs/demo-tiny-clorae")
    for entity in extractor.extract("Lelin lives in Gegen.", "photo.jpg").entities:
        print(entity.type, entity.text, entity.start, entity.end)

An example becomes a record without gold, is checked as those of a corpus are, and goes the way of
test records; the command tools.answer does the same through the same class.  A program in another
folder, whose own modules may be called data or tools as ours are, loads it by tools/load.py."""

import argparse
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy
import torch
from PIL import Image
from torch import Tensor

import data
from engine.checkpoints import Sources, find_checkpoint, read_state
from engine.corpus import frozen
from engine.features import FeatureCache
from engine.files import ImageError, UsageError, note
from engine.images import MAX_PIXELS, load_image, upright
from engine.processes import World
from engine.schema import RECORD_TASKS, Box, DataError, Dataset, Problems, Record, show
from engine.settings import IMPLS
from evaluate import Job, Row, evaluate_split
from tools.page import Strip, answer_notes, has_image, token_strips
from tools.routing import no_gate_reason
from vision import ViT

ROOT = Path(__file__).resolve().parent.parent
NO_GOLD = {"mner": {"entities": []}, "mre": {"relation": "none"}, "med": {"events": []},
           "meae": {"events": []}}

# ------------------------------------------------------------------------------- text as tokens
SHORT = """Adm Apr Aug Ave Bros Capt Co Col Corp Dec Dr Feb Fr Ft Gen Gov Inc Jan Jr Lt Ltd Mr Mrs
    Ms Mt No Nov Oct Prof Rep Rev Sen Sept Sgt Sr St vs"""
# Tokens by themselves, as in Twitter-17 and MNRE: emoji, arrows, dingbats; Chinese punctuation.
SIGN = "\u2190-\u2bff\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\U0001f000-\U0001faff"
BETWEEN = r"(?<=\w)--+(?=\w) | (?<=\w{3})/(?=\w{3})"  # words: home--Gegen, Lelin/Gegen, not w/o
IN_WORD = rf"""(?!{BETWEEN})[^\s.,:;!?"'‘’“”«»()\[\]{{}}…–—#$€£¥%*|~¿¡•{SIGN}]"""
WORD = re.compile(rf"""
      (?:https?://|www\.)\S*[^\s.,:;!?"'’”)\]…] | @\w+          # addresses, users
    | [:;=]['’]?-?[()DPp]+(?!\w) | \.{{2,}} | {BETWEEN}          # :-) and ...
    | [\U0001f1e6-\U0001f1ff]{{2}} | [{SIGN}](?:[\ufe0f\U0001f3fb-\U0001f3ff]|\u200d[{SIGN}])*
    | (?:{"|".join(SHORT.split())}|[A-Z])\.(?=\s+\S)            # Dr. and J., not at the end
    | (?:[^\W\d_]\.){{2,}}(?![\w-])                            # U.S. and p.m.
    | ['’](?i:s|m|d|re|ve|ll)(?!\w)
    | {IN_WORD}(?:{IN_WORD}|[.'’](?=[\w-])|(?<=\d)[,:](?=\d))*  # words, 3.5, 10:30, O'Brien, A&M
    | \S""", re.VERBOSE)
ENDING = re.compile(r"(?i)(?<=\S)(?=(?:n['’]t|['’](?:s|m|d|re|ve|ll))(?!\w))")
Offsets = tuple[int, int]  # half open: [start, end)


def word_offsets(text: str) -> list[Offsets]:
    """Where the tokens of a typed text stand in it, in characters, by the habits that most of the
    published tweets share: punctuation and # are tokens, "Ann's" and "don't" are two, and @user,
    http://..., :), ..., U.S., 3.5, 10:30 and pro-Russia are one.  (Twitter-15 alone has #word;
    Twitter-17 splits 's and @user further.)"""
    blanks = [match.start() + k for k, match in enumerate(ENDING.finditer(text))]  # put in below
    return [(match.start() - (before := bisect_left(blanks, match.start())), match.end() - before)
            for match in WORD.finditer(ENDING.sub(" ", text))]


def split_words(text: str) -> list[str]:
    """Typed text as tokens, see `word_offsets`."""
    return [text[start:end] for start, end in word_offsets(text)]


def find_words(tokens: Sequence[str], words: str, name: str) -> list[Offsets]:
    """The spans of `tokens` that read `words`, as they stand or split as typed text is; DataError
    if there is none."""
    forms = (words, " ".join(split_words(words)))
    spans = [span for form in forms for span in data.occurrences(
        [data.canon(token) for token in tokens], data.canon(form))]
    if not spans:
        raise DataError(f"{name}: expected words of the text, got {words!r}, which is not in "
                        f"{' '.join(tokens)!r}; give whole tokens as they stand there")
    return sorted(set(spans), key=spans.index)


# ------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class Span:
    """Words of the given text, text[start:end], which are its tokens[first:last]; blanks within
    them are those of the given text."""
    text: str
    start: int
    end: int
    tokens: Offsets


@dataclass(frozen=True)
class Entity(Span):
    """A named entity."""
    type: str


@dataclass(frozen=True)
class Relation:
    """How the given head and tail are related; type "none": not at all."""
    type: str
    head: Span
    tail: Span


@dataclass(frozen=True)
class Argument:
    """What plays a role in an event: words of the text, or the object with this number (from 1, in
    the order given) and its box (x1, y1, x2, y2) in pixels; number 0, no box: the whole image."""
    role: str
    span: Span | None
    object: int | None
    box: Box | None


@dataclass(frozen=True)
class Event:
    """An event.  Task "med" asks for its trigger, or whether the image as a whole shows it, task
    "meae" for its arguments, and task "mee" for both."""
    type: str
    trigger: Span | None
    whole_image: bool
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Unplaced:
    """What an answer names and the example lacks: words that are not in the text, or not once
    more, or an object without a box."""
    type: str
    role: str | None
    text: str


@dataclass(frozen=True)
class Extraction:
    """What was read from one example.

    tokens, offsets: the words of `text`, and their characters in it.  answer: what the model wrote;
    of task "mee" two lines.  malformed: pieces of it that cannot be read.  cut: it reached the
    length limit.  gates: {stream: mean gate of the task expert, Eq. (6)}, if asked for.  notes:
    whatever the model did not see or say in full, in words."""
    text: str
    task: str
    dataset: str
    tokens: tuple[str, ...]
    offsets: tuple[Offsets, ...]
    answer: str
    entities: tuple[Entity, ...]
    relation: Relation | None
    events: tuple[Event, ...]
    unplaced: tuple[Unplaced, ...]
    malformed: int
    cut: bool
    gates: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def extraction(text: str, task: str, rows: Sequence[Row], strips: Sequence[Strip],
               notes: Sequence[str]) -> Extraction:
    """The scored rows of one example, two of task "mee", as a result."""
    record, offsets = rows[0].record, tuple(word_offsets(text))

    def span(tokens: Offsets | None) -> Span | None:
        start, end = (offsets[tokens[0]][0], offsets[tokens[1] - 1][1]) if tokens else (0, 0)
        return Span(text[start:end], start, end, tokens) if tokens else None

    items = [item for row in rows for item in row.predicted]
    relation = (Relation(items.pop().label, span(record.head), span(record.tail))
                if task == "mre" else None)
    placed = [item for item in items if item.span or item.box or item.whole_image]
    events = [Event(item.label, span(item.span), item.whole_image, ()) for item in placed
              if task != "mner" and item.role is None]
    for number in dict.fromkeys(item.event for item in placed if item.role):
        inner = [item for item in placed if item.role and item.event == number]
        arguments = tuple(Argument(item.role, span(item.span), item.object, item.box)
                          for item in inner)
        alone = Event(inner[0].label, None, False, ())  # where no trigger of its type is free
        at = next((i for i, event in enumerate(events)
                   if event.type == alone.type and not event.arguments), len(events))
        events[at:at + 1] = [replace((events + [alone])[at], arguments=arguments)]
    return Extraction(
        text, task, record.dataset, record.tokens, offsets,
        "\n".join(row.answer.text for row in rows),
        tuple(Entity(**vars(span(item.span)), type=item.label) for item in placed
              if task == "mner"), relation, tuple(events),
        tuple(Unplaced(item.label, item.role, item.text) for item in items if item not in placed),
        sum(row.counts.malformed for row in rows), any(row.answer.cut for row in rows),
        {strip.stream: fmean(fmean(other.gates) for other in strips if other.stream ==
                             strip.stream) for strip in strips},
        tuple(dict.fromkeys([*(note for row in rows for note in answer_notes(row)), *notes])))


# ----------------------------------------------------------------------- what is given, checked
def with_labels(raw: Mapping, tasks: Sequence[str], datasets: Mapping[str, Dataset],
                wanted: str | None) -> dict:
    """A record without gold and its dataset, which must have all tasks: its own, else the one
    wanted, else the first that has them."""
    able = [key for key, dataset in datasets.items() if set(tasks) <= dataset.units.keys()]
    raw = {"dataset": wanted or (able or [None])[0], **NO_GOLD[raw["task"]], **raw}
    if raw["dataset"] not in able:
        choices = ", ".join(able) or "none in this corpus"
        raise DataError(f"dataset: expected one with the task {' and '.join(tasks)}, got "
                        f"{raw['dataset']!r}; use one of: {choices}, or another task")
    return raw


def the_words(text: str, words: str | Offsets, name: str) -> list[int]:
    """The tokens [start, end) of a text that are meant by words, which must stand there once, or by
    their characters (start, end)."""
    offsets = word_offsets(text)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if isinstance(words, str):
        spans = find_words([text[start:end] for start, end in offsets], words, name)
        if len(spans) == 1:
            return list(spans[0])
        places = ", ".join(str((starts[i], ends[j - 1])) for i, j in spans)
        raise DataError(f"{name}: expected words that stand once in the text, got {words!r}, which "
                        f"stands {len(spans)} times; give one of their places in characters, "
                        f"(start, end): {places}")
    if (isinstance(words, (tuple, list)) and len(words) == 2 and words[0] in starts
            and words[1] in ends and words[0] < words[1]):
        return [starts.index(words[0]), ends.index(words[1]) + 1]
    raise DataError(f"{name}: expected words of the text, or the characters (start, end) of whole "
                    f"ones, got {show(words)}; words begin at {show(starts)}, end at {show(ends)}")


def image_file(image: object, aside: Path) -> tuple[str | None, list[int] | None]:
    """(path, [width, height]) of an image.  One in memory is written to the file `aside`, upright
    and in RGB as it would be read from a file of its own; ImageError if it cannot be."""
    if image is None:
        return None, None
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image), list(load_image(image).size)
    if isinstance(image, numpy.ndarray) and (
            image.dtype == numpy.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size):
        image = Image.fromarray(numpy.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        got = f"{getattr(image, 'dtype', '')} {getattr(image, 'shape', '')}".strip()
        raise ImageError("image: expected a path, a PIL image or a NumPy array [height, width, 3] "
                         f"of uint8 in RGB, got {type(image).__name__} {got}; convert it")
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ImageError(f"image: expected 1 to {MAX_PIXELS:,} pixels, got {image.width} x "
                         f"{image.height}; resize it")
    try:
        copy = upright(image.copy())
    except Exception as error:  # of a file that PIL has opened and not read to its end
        raise ImageError(f"image: expected a whole picture, got {type(error).__name__}: {error}; "
                         "open another file") from None
    copy.save(aside, compress_level=1)
    return str(aside), list(copy.size)


def plain_boxes(objects: object) -> list:
    """Boxes as lists of numbers, as records have them, from lists, tuples or arrays."""
    try:
        return [[x.item() if hasattr(x, "item") else x for x in box]
                for box in (() if objects is None else objects)]
    except (TypeError, ValueError):
        raise DataError(f"objects: expected a list of boxes (x1, y1, x2, y2) in pixels, got "
                        f"{show(objects)}; correct it") from None


def raw_record(row: Mapping, tasks: Sequence[str], task: str, size: list[int] | None,
               datasets: Mapping[str, Dataset]) -> dict:
    """One of the tasks of an example as the JSON of a record; its image is called "image"."""
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"text: expected a string, or a list of them, got {type(text).__name__}; "
                        "give it as it was typed, it is split here")
    raw = {"task": task, "image": size and "image", "size": size, "tokens": split_words(text),
           "objects": plain_boxes(row["objects"])}
    raw = with_labels(raw, tasks, datasets, row["dataset"])
    for end in ("head", "tail"):
        if (row[end] is None) == (task == "mre"):
            raise DataError(f"{end}: expected words of the text with task mre and None with any "
                            f"other, got {show(row[end])} with {task}; change one of them")
        if task == "mre":
            raw[end] = the_words(text, row[end], end)
    return raw


def given_records(rows: Sequence[Mapping], datasets: Mapping[str, Dataset],
                  folder: Path) -> list[Record]:
    """Checked records of examples, two of one with the task "mee"; pictures in memory are written
    to the folder.  DataError names every example that is wrong."""
    problems, records = Problems(), []
    for number, row in enumerate(rows):
        where = f"text[{number}]"
        try:
            if row["task"] not in (*RECORD_TASKS, "mee"):
                raise DataError(f"task: expected one of {', '.join(RECORD_TASKS)}, mee, got "
                                f"{show(row['task'])}; correct it")
            path, size = image_file(row["image"], folder / f"{number}.png")
            tasks = ("med", "meae") if row["task"] == "mee" else (row["task"],)
            for task in tasks:  # a scorer sees by NUMBER/med, NUMBER/meae that they are a pair
                raw = {"id": f"{number}/{task}", **raw_record(row, tasks, task, size, datasets)}
                if not problems.check_record(raw, datasets[raw["dataset"]], where, {}):
                    break
                records.append(Record(**frozen(raw | {"image": path}), source=where))
        except ValueError as error:
            name, _, problem = str(error).partition(": ")
            problems.add(where, name, problem)
    problems.raise_if_any()
    return records


def as_rows(columns: Mapping[str, object]) -> list[dict]:
    """The arguments of `extract` as one mapping for each text."""
    texts = columns["text"]
    if not isinstance(texts, (list, tuple)):
        return [dict(columns)]
    rows = [{} for _ in texts]
    for name, values in columns.items():
        if values is None or name in ("task", "dataset") and isinstance(values, str):
            values = [values] * len(texts)  # one for all
        listed = isinstance(values, (list, tuple))
        if not listed or len(values) != len(texts):
            got = len(values) if listed else f"one {type(values).__name__}"
            raise DataError(f"{name}: expected a list of {len(texts)}, one for each text, got "
                            f"{got}; give as many, None where there is none")
        for row, value in zip(rows, values):
            row[name] = value
    return rows


# ----------------------------------------------------------------------------------- the model
class GivenImages:
    """Image features of examples, as Features for a corpus; kept in `folder` while it exists."""

    def __init__(self, sources: Sources, tower: ViT | None, records: Sequence[Record], most: int,
                 folder: str):
        """tower: of `sources`; None where no record has an image.  most: objects in use."""
        self.width, self.most = ViT.feature_width(sources.vit), most
        if tower:
            self.cache = FeatureCache(tower, "once", folder)
            self.cache.prepare(map(self.key, filter(has_image, records)))

    def key(self, record: Record) -> tuple:
        return record.image, record.objects[:self.most], record.size

    def __call__(self, record: Record) -> tuple[Tensor, Tensor] | None:
        return self.cache.get(*self.key(record)) if has_image(record) else None


class Alone(World):
    """This process by itself, whatever has started it, on a device of one's choice."""

    def __init__(self, device: str | torch.device | None):
        self.rank, self.size, self.main = 0, 1, True
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.device.type not in ("cpu", "cuda"):
                raise TypeError("of another type")
            torch.zeros(1).to(self.device)
        except (RuntimeError, AssertionError, TypeError) as problem:
            raise UsageError(f"device: expected cpu, or cuda where there is a GPU, got {device!r} "
                             f"({str(problem).splitlines()[0]}); name another one") from None


def beside_the_code(run: Path) -> dict[str, str]:
    """The folders of a run that lie below this code's folder and not below the present one."""
    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    then = {name: state.get(name) for name in ("t5", "vit", "init")}
    if not (checkpoint / "corpus").is_dir():
        then["data"] = state["config"].get("data") or "data/demo"
    return {name: str(ROOT / folder) for name, folder in then.items()
            if folder and not Path(folder).is_dir() and (ROOT / folder).is_dir()}


class Extractor:
    """A trained model that reads entities, relations and events from texts with pictures.

    run: a run folder (its best checkpoint is used), a checkpoint folder, or an exported adapter.
    Backbone and labels are looked for where they lay in training, below the present folder and
    below that of this code; t5, vit, init and data name other folders.  impl, weights, beams,
    batch_size: as the command's --impl, --weights, --beams, --batch-size.  device: "cpu", "cuda",
    "cuda:1"; default: a GPU if there is one.  ValueError says what cannot be loaded, and why."""

    def __init__(self, run: str | os.PathLike, *, t5: str | os.PathLike | None = None,
                 vit: str | os.PathLike | None = None, init: str | os.PathLike | None = None,
                 data: str | os.PathLike | None = None, impl: str | None = None,
                 weights: str = "stored", beams: int = 1, batch_size: int | None = None,
                 device: str | torch.device | None = None):
        for name, value, holds, wanted in (
                ("impl", impl, impl in (None, *IMPLS), f"one of {', '.join(IMPLS)}"),
                ("weights", weights, weights in ("stored", "int8"), "stored or int8"),
                ("beams", beams, type(beams) is int and beams > 0, "a whole number from 1"),
                ("batch_size", batch_size,
                 batch_size is None or type(batch_size) is int and batch_size > 0,
                 "a whole number from 1")):
            if not holds:
                raise UsageError(f"{name}: expected {wanted}, got {value!r}; correct it")
        args = argparse.Namespace(
            split="test", units=None, missing_images=None, graphs=None, cache=None, impl=impl,
            weights=weights, beams=beams, batch_size=batch_size)
        lying = beside_the_code(Path(run))
        for name, folder in {"t5": t5, "vit": vit, "init": init, "data": data}.items():
            setattr(args, name, lying.get(name) if folder is None else os.fspath(folder))
        self.load(Job(Path(run), args), Alone(device))

    @classmethod
    def of(cls, job: Job, world: World) -> "Extractor":
        """The extractor of a command, on all of its processes."""
        extractor = cls.__new__(cls)
        extractor.load(job, world)
        return extractor

    def load(self, job: Job, world: World) -> None:
        if not any((job.folder / name).exists() for name in ("state.json", "table.txt")):
            note(f"{job.folder}: its training has not ended (no table.txt there), so the answers "
                 f"are those of {job.checkpoint.name}; train.py with the same options goes on "
                 "with it")
        self.decoding, self.world, self.setup = job.decoding, world, job.load_model(world)
        self.no_gate = no_gate_reason(self.setup.config)

    @cached_property
    def tower(self) -> ViT:
        """The image tower, loaded for the first picture."""
        return ViT.from_pretrained(self.setup.sources.vit).to(self.world.device).eval()

    def read(self, records: Sequence[Record], folder: str, gates: bool = False,
             announce: Callable[[str], None] = str) -> list[tuple[Row, list[Strip]]]:
        """Answer checked records, whose `image` is the path of a file: rows as of a scorer and, if
        wanted, on the main process, the gates token by token.  folder: for image features.
        announce: is told what had to be cut."""
        setup, config, world = self.setup, self.setup.config, self.world
        examples = data.encode_records(records, setup.datasets, setup.tokenizer, config.max_source,
                                       config.max_target, announce)
        tower = self.tower if any(map(has_image, records)) else None
        features = GivenImages(setup.sources, tower, records, config.max_objects, folder)
        world.join()
        rows = evaluate_split(setup, examples, features, self.decoding, world)
        wanted = gates and world.main and not self.no_gate
        return [(row, token_strips(setup, example, row, features, world.device, self.decoding)
                 if wanted else []) for example, row in zip(examples, rows)]

    def extract(self, text: str | Sequence[str], image: object = None,
                task: str | Sequence[str] = "mner", objects: object = None, head: object = None,
                tail: object = None, dataset: str | Sequence[str] | None = None,
                gates: bool = False) -> Extraction | list[Extraction]:
        """Read one example, or a list of them in batches.

        text: any string, as it was typed; it is split into tokens here.  image: a path, a PIL image
        or an array [height, width, 3] of uint8.  task: "mner" (entities), "mre" (how head and tail
        are related), "med" (events), "meae" (their arguments), "mee" (both).  objects: boxes (x1,
        y1, x2, y2) in pixels of the upright image.  head, tail: words that the text holds once, or
        their characters (start, end).  dataset: whose labels are offered; default: the first with
        the task.  gates: measure them as well, by a pass more for each example.

        Of a list of texts, the others are lists of its length with None where there is none; task
        and dataset may be one word for all.  DataError names every example that is wrong; then none
        is answered."""
        if gates and self.no_gate:
            raise UsageError(f"gates: expected a run with a gate between a universal and a task "
                             f"expert, got {self.no_gate}; leave gates out")
        given = as_rows({"text": text, "image": image, "task": task, "objects": objects,
                         "head": head, "tail": tail, "dataset": dataset})
        answered: list[list[tuple[Row, list[Strip]]]] = [[] for _ in given]
        with TemporaryDirectory() as folder:
            records = given_records(given, self.setup.datasets, Path(folder))
            for row, strips in self.read(records, folder, gates) if records else ():
                answered[int(row.record.id.partition("/")[0])].append((row, strips))
        results = []
        for example, pairs in zip(given, answered):
            notes = [note for row, _ in pairs for note in self.unseen(row.record)]
            strips = [strip for _, strips in pairs for strip in strips]
            results.append(extraction(example["text"], example["task"], [row for row, _ in pairs],
                                      strips, notes))
        return results if isinstance(text, (list, tuple)) else results[0]

    def unseen(self, record: Record) -> list[str]:
        """What of an example the model is not shown, in words."""
        setup, config = self.setup, self.setup.config
        ids, visible = data.encode_source(record, setup.datasets[record.dataset], setup.tokenizer,
                                          config.max_source)
        most, count = config.max_objects, len(record.objects)
        notes = ((visible is not None, f"the model read {visible} of {len(record.tokens)} tokens, "
                  f"as the text is longer than {config.max_source} ids"),
                 (setup.tokenizer.pieces.unk_id() in ids, "the tokenizer lacks characters of it"),
                 (count > most, f"the model saw {most} of {count} objects"))
        return [note for holds, note in notes if holds]
