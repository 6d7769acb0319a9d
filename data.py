"""Records, prompts, target strings and batches: everything between the files and the model.

In reading order: what a record must be; the files of a corpus; prompts, targets and how answers
are read; T5's tokenizer; examples and batches; published files and their conversion; the commands.

A corpus is a folder of datasets, CORPUS/<dataset>/{dataset.json, train|dev|test.jsonl, images/}.
dataset.json describes its dataset. "units" names, for each record task, its column of the result
table; labels are sorted lower-case words; "note" (optional) is one line that stands beside scores:

    {"name": "twitter2017", "units": {"mner": "T17"}, "labels": {"mner": ["location", "person"]}}

mner, mre (with "none") and med have a list of labels, meae has {event type: [roles]}. A record is
one JSON object on one line: the seven keys that every record has, and the gold of its task.

    {"id": "17_06_4705", "dataset": "twitter2017", "task": "mner",
     "tokens": ["Kyrie", "in", "Boston"], "image": "17_06_4705.jpg" (below images/) or null,
     "size": [width, height] or null (unknown), "objects": [[x1, y1, x2, y2], ...] (O1, O2, ...),
     mner:        "entities": [{"type": "person", "start": 0, "end": 1}, ...]
     mre:         "head": [0, 1], "tail": [2, 3], "relation": "none"
     med, meae:   "events": [{"type": "attack", "trigger": [4, 5] or null (the whole image, O0),
                              "arguments": [{"role": "attacker", "span": [0, 2]},
                                            {"role": "target", "box": [1, 2, 9, 9], "object": 1}]}]}

Spans are [start, end) in tokens, boxes are pixels. "object" is the 1-based number of the object
that shows a gold box (IoU >= 0.5), null where none does. A sample without text has "tokens": [].
Med and meae records may have one key more, "accepted": a list like "events", of events in the text
alone that are right although they are not gold of the sample.

A prompt states the task and its labels first and the text last: only text is ever truncated.
The model answers in this grammar (text is percent-escaped where it looks like structure):

    mner = "none" | type, text {<spot> type, text}          med = the same with fillers
    mre  = head <spot> relation <spot> tail
    meae = "none" | event {<asoc> event}                    event  = type {<spot> role, filler}
    <spot>, <asoc>: T5's <extra_id_0>, <extra_id_1>         filler = text | O0 | O1 | O2 ...

References: C-LoRAE (arXiv 2505.06303), UMIE (Sun et al., AAAI 2024), T5 (Raffel et al., 2020).
Shape legend: B batch, S source tokens, T target tokens, V visual tokens, F image-feature width.

    python data.py convert KIND SRC DST      KIND and the files that SRC holds:
        twitter2015, twitter2017, snap       {train,valid,test}.txt
        mnre_v1 | mnre_v2                    ours_{train,val,test}.txt | mnre_{train,val,test}.txt
        ace2005                              {train,dev}.oneie.json (licensed; OneIE's JSON lines)
        swig                                 {train,dev}.json, ace_sr_mapping.txt (of M2E2)
        m2e2_gold                            crossmedia_coref.txt, *_multimedia_event.json and, for
                                             "accepted", text_only_event.json
        m2e2                                 the same, m2e2_yolov8_objects.json
    python data.py check DST                 validate everything, print counts and shared texts

m2e2 is the detector mode and the one to report: objects are the --max-objects most confident
detections. m2e2_gold is the gold-box mode: objects are the gold boxes, which leaks their number.
ace2005 and swig train what m2e2 tests, with its event types and roles (--event-types all: theirs).

A converter writes DST/KIND in the format above; put (or link) the pictures into
DST/KIND/images. Sources: Twitter-15/17 github.com/jefferyYu/UMT; SNAP (Lu et al., ACL 2018); MNRE
github.com/thecharm/MNRE; M2E2 github.com/limanling/m2e2, its detections seebergerph/MMUTF; SWiG
github.com/allenai/swig; ACE2005 from the LDC, as OneIE (Lin et al., ACL 2020) prepares it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import math
import os
import random
import re
import sys
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F

TASKS = ("mner", "mre", "mee")                       # one task expert each
RECORD_TASKS = ("mner", "mre", "med", "meae")        # kinds of record; med and meae share "mee"
UNIT_TASK = {"T15": "mner", "T17": "mner", "SNAP": "mner", "V1": "mre", "V2": "mre",
             "MED": "med", "MEAE": "meae"}
UNITS = tuple(UNIT_TASK)
SPLITS = ("train", "dev", "test")
MAX_PROBLEMS = 20                                    # shown at once, the others are counted

Span = tuple[int, int]                               # [start, end) in tokens
Box = tuple[float, float, float, float]              # x1, y1, x2, y2 in pixels


class DataError(ValueError):
    """Data that cannot be used; every line says where, what is wrong and what to do."""


@dataclass(frozen=True)
class Dataset:
    """dataset.json: record task -> unit, and record task -> labels (meae: {type: [roles]})."""
    name: str
    units: dict[str, str]
    labels: dict
    note: str = ""                                   # what a result on it must name


@dataclass(frozen=True)
class Record:
    """One line of a file (see the top); the gold fields of other tasks keep their defaults."""
    id: str
    dataset: str
    task: str
    tokens: tuple[str, ...]
    image: str | None = None
    size: tuple[int, int] | None = None
    objects: tuple[Box, ...] = ()
    entities: tuple[dict, ...] = ()
    head: Span | None = None
    tail: Span | None = None
    relation: str | None = None
    events: tuple[dict, ...] = ()
    accepted: tuple[dict, ...] = ()                  # right as well, but not gold of this sample
    source: str = "<memory>"                         # file:line, for messages


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in the same unit."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


# ---------------------------------------------------------------------------- what is right
# A rule says what a JSON value must be. A dict demands an object with exactly these keys, a list of
# one rule demands a list of such elements, None demands nothing, and a string is what is wrong and
# what to do. A function looks at the value and returns its rule; None then means: it is right.

Rule = dict | list | str | Callable | None


class Problems(list):
    """Collects "file:line: field: problem: what to do", so that many mistakes show at once."""

    count = 0                                        # of all; the list holds the first of them

    def add(self, where: str, place: str, problem: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.append(f"{where}: {place}: {problem}")

    def raise_if_any(self) -> None:
        first = f", the first {MAX_PROBLEMS}" if self.count > MAX_PROBLEMS else ""
        if self:
            raise DataError(f"{self.count} problem(s) in the data{first}:\n  " + "\n  ".join(self))

    def check(self, value: object, rule: Rule, where: str, place: str) -> bool:
        """Whether `value` keeps the rule; every place where it does not is added."""
        before = self.count
        while callable(rule):
            rule = rule(value)
        if isinstance(rule, str):
            self.add(where, place, f"{show(value)} {rule}")
        elif rule is not None and not isinstance(value, type(rule)):
            name = "object" if isinstance(rule, dict) else "list"
            self.add(where, place, f"{show(value)} is no JSON {name}: correct it")
        elif isinstance(rule, list):
            for i, element in enumerate(value):
                self.check(element, rule[0], where, f"{place}[{i}]")
        elif isinstance(rule, dict):
            for key in sorted(value.keys() - rule.keys()):
                self.add(where, place, f"key {show(key)} is unknown: {nearest(key, rule)}")
            for key, inner in rule.items():
                if key in value:
                    self.check(value[key], inner, where, f"{place}.{key}".removeprefix("record."))
                else:
                    self.add(where, place, f'key "{key}" is missing: add it, if only as null or []')
        return self.count == before

    def check_record(self, raw: object, dataset: Dataset, where: str, seen: dict[str, str]) -> bool:
        """Whether `raw` is a record; seen, {id: where}, makes an id that comes twice a problem."""
        right = self.check(raw, record_rule(raw, dataset), where, "record")
        if right and (first := seen.setdefault(raw["id"], where)) != where:
            self.add(where, "id", f'"{raw["id"]}" is the id of {first} too: make ids unique')
        return right


def show(value: object) -> str:
    """A value as it stands in the file, shortened."""
    try:
        text = json.dumps(value, default=repr, skipkeys=True)
    except RecursionError:
        text = "something nested deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: object, known: Iterable[str]) -> str:
    """What to do about an unknown word: the likely intention, else the choices."""
    close = difflib.get_close_matches(str(word), known, n=1)
    choices = ", ".join(sorted(known)) or "nothing, as none is allowed here"
    return f'did you mean "{close[0]}"?' if close else f"use one of: {choices}"


def must(test: Callable[[object], object], problem: str) -> Rule:
    """The rule that the test holds."""
    return lambda value: None if test(value) else problem


def one_of(known: Iterable[str]) -> Rule:
    """The rule for a name out of a closed set."""
    return lambda value: (None if isinstance(value, str) and value in known
                          else f"is unknown: {nearest(value, known)}")


def numbers(value: object, kinds: tuple[type, ...], count: int) -> bool:
    """A list of `count` sane numbers of these types (type(), because True is an int)."""
    return (isinstance(value, list) and len(value) == count
            and all(type(x) in kinds and abs(x) < 1e9 for x in value))


def get(mapping: object, key: object, default: object = None) -> object:
    """mapping[key] where both are what they should be, else the default."""
    known = isinstance(mapping, dict) and isinstance(key, str)
    return mapping.get(key, default) if known else default


BLANK = re.compile("[\0- \x7f\ud800-\udfff]")         # no token holds these
string = must(lambda v: isinstance(v, str) and v and v.isprintable(),
              "is no non-empty printable string: correct it")
token = must(lambda v: isinstance(v, str) and v and not BLANK.search(v),
             "is no non-empty string without blanks, control characters and half surrogates: "
             "repair it, mind the spans")
word = must(lambda v: not string(v) and v == v.lower()
            and re.fullmatch("[^ ,:;<>%]+( [^ ,:;<>%]+)*", v),
            "is no lower-case word without , : ; < > %: rename the label")
image_name = must(lambda v: v is None or not string(v)
                  and not re.search(r"[\\:]|^~|(^|/)[ .]*(/|$)", v) and len(v) < 1000
                  and all(len(part.encode()) < 256 for part in v.split("/")),
                  "is neither null nor a plain relative path: name a file below images/")
image_size = must(lambda v: v is None or numbers(v, (int,), 2) and min(v) > 0,
                  "is neither null nor [width, height] in pixels: correct it")


def box_within(right: float = math.inf, bottom: float = math.inf) -> Rule:
    """The rule for a box in a picture of this size, which may be unknown."""
    return must(lambda v: numbers(v, (int, float), 4) and 0 <= v[0] < v[2] <= right
                and 0 <= v[1] < v[3] <= bottom, f"is no box 0 <= x1 < x2 <= {right}, 0 <= y1 < y2 "
                f"<= {bottom}: order its corners and clip it, or correct the size")


def record_rule(raw: object, dataset: Dataset) -> Rule:
    """The rule for one record; `raw` itself sets the bounds of its spans and boxes."""
    tokens, objects = get(raw, "tokens"), get(raw, "objects")
    task, size, image = get(raw, "task"), get(raw, "size"), get(raw, "image", "(missing key)")
    labels = get(dataset.labels, task, ())
    length = len(tokens) if isinstance(tokens, list) else math.inf       # one problem is enough
    box = box_within(*(() if size is None or image_size(size) else size))
    span = must(lambda v: numbers(v, (int,), 2) and 0 <= v[0] < v[1] <= length,
                f"is no span 0 <= start < end <= {length} (tokens): correct the offsets")

    def in_image(rule: Rule) -> Rule:
        return lambda v: "needs an image: name it" if image is None and v != [] else rule

    def entity(value: object) -> Rule:
        pair = [get(value, "start"), get(value, "end")]
        return {"type": one_of(labels), "start": None, "end": lambda v: span(pair)}

    def event(value: object, in_text: bool = False) -> Rule:
        kind = get(value, "type")
        whole_image = not in_text and get(value, "trigger") is None
        role = one_of(get(get(dataset.labels, "meae"), kind, ()))
        if one_of(labels)(kind):                     # one problem, not one more for each role
            role = None
        return {"type": one_of(labels), "trigger": in_image(None) if whole_image else span,
                "arguments": [lambda a: argument(a, role, in_text)]}

    def argument(value: object, role: Rule, in_text: bool) -> Rule:
        if in_text or not isinstance(value, dict) or not value.keys() & {"box", "object"}:
            return {"role": role, "span": span}
        return {"role": role, "box": in_image(box),
                "object": lambda k: None if k is None else shown(k, value.get("box"))}

    def shown(k: object, wanted: object) -> str | None:
        if not isinstance(objects, list) or type(k) is not int or not 0 < k <= len(objects):
            return "is neither null nor the number of one of the objects: correct it"
        if not box(wanted) and not box(objects[k - 1]) and iou(wanted, objects[k - 1]) < 0.5:
            return "is the number of an object with IoU < 0.5 to the box: correct it or write null"

    events, text = {"events": [event]}, [token]
    if task in ("med", "meae") and "accepted" in raw:                    # the one optional key
        events["accepted"] = [lambda e: event(e, in_text=True)]
    gold = {"mner": {"entities": [entity]}, "med": events, "meae": events,
            "mre": {"head": span, "tail": span, "relation": one_of(labels)}}
    if tokens == [] and (image is None or task in ("mner", "mre")):
        text = "is no text: only med and meae records with an image may lack it"
    return {"id": string, "dataset": one_of([dataset.name]), "task": one_of(dataset.labels),
            "tokens": text, "image": image_name, "size": image_size, "objects": in_image([box]),
            **(gold[task] if labels else {})}


def dataset_rule(raw: object, name: str) -> Rule:
    """The rule for dataset.json in the folder `name`; `raw` itself chooses the tasks."""
    def labels(none: bool) -> Rule:
        right = must(lambda v: not isinstance(v, list) or v and ("none" in v) == none, "is empty "
                     'or breaks that "none" is a label of mre and of no other task: correct it')
        return lambda v: right(v) or [word]

    def roles(value: object) -> Rule:
        if not isinstance(value, dict) or not value or any(map(word, value)):
            return "is no {event type: [roles]} in lower-case words: correct it"
        return dict.fromkeys(value, [word])

    rules = {"mner": labels(False), "mre": labels(True), "med": labels(False), "meae": roles}
    units = get(raw, "units")
    tasks = [t for t in RECORD_TASKS if isinstance(units, dict) and t in units] or ["mner"]
    same = must(lambda v: v == name, f'is not "{name}", the name of its folder: rename one of them')
    return {"name": same, **({} if get(raw, "note") is None else {"note": string}),
            "units": {t: one_of([u for u in UNITS if UNIT_TASK[u] == t]) for t in tasks},
            "labels": {t: rules[t] for t in tasks}}


# ---------------------------------------------------------------------------- files of a corpus

def read_bytes(path: Path) -> bytes:
    """The content of a file, DataError where there is none."""
    try:
        if path.exists() and not path.is_file():     # a pipe or a device would never end
            raise OSError(0, "no regular file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def parse_json(data: bytes) -> object:
    """Strict JSON from UTF-8 bytes; ValueError with the reason otherwise."""
    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):            # json would keep the last one silently
            raise ValueError(f"a key stands twice in {show(dict(pairs))}")
        return dict(pairs)

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_dataset(folder: Path) -> Dataset:
    """The descriptor in folder/dataset.json."""
    path, problems = folder / "dataset.json", Problems()
    data = read_bytes(path)
    try:
        raw = parse_json(data)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): repair the file") from None
    problems.check(raw, dataset_rule(raw, folder.name), str(path), "dataset")
    problems.raise_if_any()
    return Dataset(raw["name"], raw["units"], raw["labels"], raw.get("note", ""))


def read_split(folder: Path, split: str, dataset: Dataset, problems: Problems) -> list[Record]:
    """The records of folder/split.jsonl that are right; anything wrong is added to `problems`."""
    path, records, seen = folder / f"{split}.jsonl", [], {}
    lines = read_bytes(path).removesuffix(b"\n").split(b"\n")            # U+2028 ends no line
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            raw = parse_json(line)
            if not isinstance(raw, dict):
                raise ValueError(f"a {type(raw).__name__}")
        except ValueError as error:
            reason = re.sub(r": line 1 (column \d+) .*", r", \1", str(error))
            text = show(line.decode("utf-8", "replace"))
            problems.add(where, "line", f"{text} is no JSON object ({reason}): write each record "
                         "as one object on one line, in UTF-8")
            continue
        if problems.check_record(raw, dataset, where, seen):
            records.append(Record(**{k: frozen(v) for k, v in raw.items()}, source=where))
    return records


def frozen(value: object) -> object:
    """Lists as tuples, so that a record stays as it was checked and its boxes can be hashed."""
    if isinstance(value, dict):
        return {key: frozen(element) for key, element in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def load_datasets(corpus: str | os.PathLike) -> dict[str, Dataset]:
    """name -> descriptor of every dataset below `corpus`, sorted by name.

    A file that would be passed over in silence, *.jsonl of no split or no dataset, is an error.
    """
    corpus, files = Path(corpus), sorted(Path(corpus).glob("*/*.jsonl"))
    folders = sorted({path.parent for path in [*files, *corpus.glob("*/dataset.json")]})
    if not folders:
        found = "none" if corpus.is_dir() else "no folder"
        if (corpus / "dataset.json").exists():
            found = "a single dataset: give the folder above it"
        raise DataError(f"{corpus}: expected folders with a dataset.json, found {found}; "
                        "`python data.py convert` and `python demo.py` make a corpus")
    for path in files:
        if path.stem not in SPLITS:
            raise DataError(f'{path}: "{path.stem}" is no split: rename it to one of '
                            f"{', '.join(SPLITS)}, or move it away")
    return {folder.name: read_dataset(folder) for folder in folders}


def load_corpus(corpus: str | os.PathLike, split: str,
                units: Iterable[str] | None = None) -> list[Record]:
    """Every record of one split, datasets in the order of their names, lines in file order.

    units: only records of these units (default all). A dataset may lack a split; a split that no
    dataset has, an unknown name and any faulty line raise DataError.
    """
    wanted = set(units or UNITS)
    if unknown := {split} - set(SPLITS) | wanted - set(UNITS):
        name = min(unknown)
        raise DataError(f'"{name}" is no split or unit: ' + nearest(name, SPLITS + UNITS))
    holding = {Path(corpus) / name: dataset for name, dataset in load_datasets(corpus).items()
               if wanted & set(dataset.units.values())
               and (Path(corpus) / name / f"{split}.jsonl").exists()}
    if not holding:
        raise DataError(f"{corpus}: no {split}.jsonl for the units {', '.join(sorted(wanted))}: "
                        "convert that split or choose other units")
    problems = Problems()
    records = [record for folder, dataset in holding.items()
               for record in read_split(folder, split, dataset, problems)
               if dataset.units[record.task] in wanted]
    problems.raise_if_any()
    return records


Rows = list[tuple[str, dict]]                        # (where it comes from, record as JSON)


def write_dataset(folder: Path, descriptor: dict, splits: dict[str, Rows]) -> None:
    """Checks everything, then writes folder/{dataset.json, <split>.jsonl, images/}."""
    dataset, problems = Dataset(folder.name, descriptor["units"], descriptor["labels"]), Problems()
    problems.check(descriptor, dataset_rule(descriptor, folder.name), str(folder), "dataset")
    for split, rows in splits.items():
        seen = {}
        if not rows:
            problems.add(str(folder), split, "has no record: leave its file out")
        for where, record in rows:
            problems.check_record(record, dataset, where, seen)
    problems.raise_if_any()
    texts = {f"{split}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n"
                                       for _, record in rows) for split, rows in splits.items()}
    texts["dataset.json"] = json.dumps(descriptor, ensure_ascii=False, indent=1) + "\n"
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():             # renamed when whole: never half a file
            (folder / f".{name}.part").write_text(text, encoding="utf-8", newline="\n")
            os.replace(folder / f".{name}.part", folder / name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}): give another folder or "
                        "make room") from None


# ---------------------------------------------------------------------------- prompts, targets

RESERVED = re.compile(r"<(?=(?:spot|asoc|pad|unk|s|/s|extra_id_[0-9]+)>)")
OBJECT = re.compile(r"O([0-9]+)")


def escape(text: str, filler: bool = False) -> str:
    """Text that cannot be read as structure nor, for a filler, as an object; the rest is kept."""
    if filler and OBJECT.fullmatch(text):
        return "%4F" + text[1:]
    return RESERVED.sub("%3C", re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", text))


def unescape(text: str) -> str:
    """What `escape` was given."""
    return re.sub("%(25|3C|4F)", lambda match: chr(int(match[1], 16)), text)


def words(record: Record, span: Span) -> str:
    """The text of a span."""
    return " ".join(record.tokens[span[0]:span[1]])


def prompt(record: Record, dataset: Dataset) -> tuple[str, str]:
    """(prefix, text): the model reads prefix + text, and only the text may be truncated."""
    labels = dataset.labels[record.task]
    listed = ", ".join(sorted(labels))
    if record.task == "meae":
        listed = "; ".join(f"{kind}: {', '.join(sorted(labels[kind]))}" for kind in sorted(labels))
    what = {"mner": "the following entity type", "med": "event trigger", "meae": "event argument"}
    if record.task == "mre":
        head, tail = (escape(words(record, span)) for span in (record.head, record.tail))
        what["mre"] = f"the following relation between {head} and {tail}"
    text = escape(" ".join(record.tokens)) or "none"
    return f"Please extract {what[record.task]}: {listed}. Text: ", text


@dataclass(frozen=True)
class Item:
    """A gold or predicted fact as metrics compare it. Located nowhere, it can never match."""
    label: str                                       # entity type, relation or event type
    role: str | None = None                          # of an argument
    span: Span | None = None
    box: Box | None = None
    whole_image: bool = False
    text: str | None = None                          # surface text; "Ok" for the k-th object
    object: int | None = field(default=None, compare=False)      # that k, 0 = whole image
    event: int = field(default=0, compare=False)     # which event of the output a role belongs to


def sorted_events(record: Record) -> list[dict]:
    """By trigger; events of the whole image last."""
    return sorted(record.events, key=lambda e: (e["trigger"] is None, e["trigger"] or ()))


def gold_items(record: Record) -> list[Item]:
    """The gold facts of a record in the order of its target, unreachable boxes included.

    Entities and triggers by offset; arguments event by event: those in the text by offset, then
    objects by number, then boxes that no object shows.
    """
    def located(label: str, span: Span | None, number: int | None = None, role: str | None = None,
                box: Box | None = None, event: int = 0) -> Item:
        text = None if number is None else f"O{number}"
        if span:
            text = words(record, span)
        return Item(label, role, span, box, number == 0, text, number, event)

    def order(argument: dict) -> tuple:
        span, number = argument.get("span"), argument.get("object")
        return span is None, span or (), number is None, number or 0

    if record.task == "mre":
        return [Item(record.relation)]
    if record.task == "mner":
        return [located(label, (start, end)) for start, end, label in sorted(
            (e["start"], e["end"], e["type"]) for e in record.entities)]
    events = sorted_events(record)
    if record.task == "med":
        return [located(e["type"], e["trigger"], None if e["trigger"] else 0) for e in events]
    return [located(e["type"], a.get("span"), a.get("object"), a["role"], a.get("box"), k)
            for k, e in enumerate(events) for a in sorted(e["arguments"], key=order)]


def target_groups(record: Record, visible: int | None = None) -> list[list[str]]:
    """The target's fields: groups (joined by <asoc>) of items (joined by <spot>).

    visible: number of leading tokens that the model can see (default all); items with a span
    beyond are left out. A relation is always kept, as its prompt names head and tail.
    """
    if record.task == "mre":
        head, tail = (escape(words(record, span)) for span in (record.head, record.tail))
        return [[head, record.relation, tail]]
    meae = record.task == "meae"
    groups = [[event["type"]] for event in sorted_events(record)] if meae else [[]]
    for item in gold_items(record):
        hidden = item.span and visible is not None and item.span[1] > visible
        if item.text is not None and not hidden:     # a box that no object shows has no text
            text = escape(item.text, record.task != "mner") if item.span else item.text
            groups[item.event].append(f"{item.role or item.label}, {text}")
    return groups


def join_groups(groups: list[list[str]]) -> str:
    return " <asoc> ".join(" <spot> ".join(group) for group in groups) or "none"


def target(record: Record) -> str:
    """The string that the model should write for a record."""
    return join_groups(target_groups(record))


def split_item(item: str, labels: Iterable[str]) -> tuple[str, str] | None:
    """"label, text" -> (label, text), or None. Without a comma the longest label in front."""
    label, comma, text = item.partition(",")
    label = label.strip(" ").lower()
    if not comma:
        label = max((x for x in labels if item.lower().startswith(x + " ")), key=len, default="")
        text = item[len(label):]
    text = text.strip(" ")
    return (label, text) if label in labels and text else None


def parse(task: str, text: str, labels: Iterable[str] | dict,
          cut: bool = False) -> tuple[list[Item], int]:
    """Lenient reading of a model's output: items, not yet located, and how many pieces fit no rule.

    labels: dataset.labels[task]. cut: the output hit the length limit, so that its last item may
    be incomplete and is dropped. mre always gives one item, "none" where no relation is found.
    """
    text = re.sub(r"\s+", " ", re.sub("<pad>|</s>", " ", text), flags=re.ASCII).strip(" ")
    groups = re.split(" ?<asoc> ?", text) if task == "meae" else [text]
    groups = [re.split(" ?<spot> ?", group) for group in groups]
    if task == "mre":
        [fields] = groups
        label = fields[len(fields) // 2].lower()
        known = len(fields) in (1, 3) and label in labels
        return [Item(label if known else "none")], int(not known)
    if text in ("", "none"):
        return [], 0
    if cut:
        groups[-1].pop()
    items, malformed = [], int(cut)
    for event, group in enumerate(groups):
        kind, known = None, labels                   # an event type, and what may follow it
        if task == "meae" and group:
            kind = group.pop(0).lower()
            known = labels.get(kind, ())
            malformed += kind not in labels and not group
        for found in (split_item(item, known) for item in group):
            if found is None:
                malformed += 1
                continue
            name, filler = found
            match = OBJECT.fullmatch(filler) if task != "mner" else None
            number = int(match[1][:9]) if match else None    # longer ones are beyond any list too
            items.append(Item(kind or name, name if kind else None, object=number, event=event,
                              text=filler if match else unescape(filler)))
    return items, malformed


def canon(text: str) -> str:
    """The form in which output and text are compared (sentencepiece, too, applies NFKC)."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join(re.sub("[\u200b-\u200f\ufe0e\ufe0f\u2060]", "", text).split())


def occurrences(tokens: list[str], text: str) -> list[Span]:
    """All token-aligned places of `text`, left to right; tokens and text are canonical."""
    found = []
    for start in (i for i, token in enumerate(tokens) if token and text.startswith(token)):
        joined, end = tokens[start], start + 1
        while len(joined) < len(text) and end < len(tokens):
            joined, end = joined + (" " + tokens[end] if tokens[end] else ""), end + 1
        found += [(start, end)] if joined == text else []
    return found


def predicted_items(record: Record, text: str, dataset: Dataset,
                    triggers: dict[str, int] | None = None,
                    cut: bool = False) -> tuple[list[Item], int]:
    """(items, malformed) of a model's output, located in the record's text and objects.

    The k-th entity or trigger with one text is its k-th occurrence. An argument is the occurrence
    nearest to its event's trigger; triggers: {event type: first token} as predicted for the same
    sample; where it is unknown, the first occurrence is meant. A role uses an occurrence once.
    """
    parsed, malformed = parse(record.task, text, dataset.labels[record.task], cut)
    tokens, used, items = [canon(token) for token in record.tokens], set(), []
    for item in parsed:
        if item.object is not None:                  # a number beyond the list has no box
            known = item.role and 0 < item.object <= len(record.objects)
            item = replace(item, box=record.objects[item.object - 1] if known else None,
                           whole_image=item.object == 0)
        elif item.text is not None:
            near = (triggers or {}).get(item.label, 0) if item.role else 0
            free = [span for span in occurrences(tokens, canon(item.text))
                    if (item.event, item.role, span) not in used]
            item = replace(item, span=min(free, key=lambda span: abs(span[0] - near), default=None))
            used.add((item.event, item.role, item.span))
        items.append(item)
    return items, malformed


# ---------------------------------------------------------------------------- tokenizer

SENTINEL = re.compile(r"<(?:spot|asoc|extra_id_(0|[1-9][0-9]?))>")
STRUCTURE = ("<spot>", "<asoc>")                     # stand for <extra_id_0> and <extra_id_1>


class Tokenizer:
    """T5's tokenizer: sentencepiece for text, T5's sentinel ids for structure.

    path: a sentencepiece model, or a folder that holds it as spiece.model. With n pieces,
    <extra_id_k> has the id n + 99 - k.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path) / "spiece.model" if Path(path).is_dir() else Path(path)
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(read_bytes(path))
        except RuntimeError:
            raise DataError(f"{path}: expected a sentencepiece model: fetch the file again "
                            "(T5 calls it spiece.model)") from None
        self.vocab_size = self.pieces.get_piece_size()
        self.pad_id, self.eos_id = self.pieces.pad_id(), self.pieces.eos_id()
        if min(self.pad_id, self.eos_id) < 0:
            raise DataError(f"{path}: expected pad and eos pieces, got ids {self.pad_id} and "
                            f"{self.eos_id}: use a T5 model's own file")
        self.spot_id, self.asoc_id = self.vocab_size + 99, self.vocab_size + 98

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with eos. It is split at sentinels, each part is encoded by itself."""
        ids, start = [], 0
        for match in SENTINEL.finditer(text):
            k = int(match[1]) if match[1] else STRUCTURE.index(match[0])
            ids += self.pieces.encode(text[start:match.start()]) + [self.spot_id - k]
            start = match.end()
        return ids + self.pieces.encode(text[start:]) + [self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to eos; <spot>, <asoc> and <extra_id_k> stay visible, pad does not."""
        parts, run = [], []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            k = self.spot_id - i
            if 0 <= i < self.vocab_size:
                run += [i] if i != self.pad_id else []
            elif 0 <= k < 100:
                name = STRUCTURE[k] if k < len(STRUCTURE) else f"<extra_id_{k}>"
                parts, run = parts + [self.pieces.decode(run), name], []
            else:
                raise DataError(f"decode: id {i} is neither one of {self.vocab_size} pieces nor a "
                                "sentinel: ban undecodable() ids when generating")
        return " ".join(part for part in parts + [self.pieces.decode(run)] if part)

    def undecodable(self, vocab_size: int) -> list[int]:
        """Ids below vocab_size (the model's) that stand for no output: never generate them."""
        kept = {i for i in range(self.vocab_size) if not self.pieces.is_control(i)}
        kept |= {self.pad_id, self.eos_id, self.spot_id, self.asoc_id}
        return [i for i in range(vocab_size) if i not in kept]


# ---------------------------------------------------------------------------- examples, batches

@dataclass(frozen=True)
class Example:
    """A record as ids: `unit` and `task` index UNITS and TASKS, `row` the list it came from."""
    record: Record
    unit: int
    task: int
    input_ids: list[int]
    labels: list[int]
    row: int


def encode_records(records: list[Record], datasets: dict[str, Dataset], tokenizer: Tokenizer,
                   max_source: int = 256, max_target: int = 192,
                   announce: Callable[[str], None] = print) -> list[Example]:
    """Records -> examples of at most max_source and max_target ids, eos included.

    Only text is truncated: a prefix that does not fit is an error. Items whose words were lost are
    left out of the target, and so are the last items of a target that is too long; both are
    counted and announced. The gold that metrics see is the record's and stays whole.
    """
    examples, lost = [], Counter()
    for row, record in enumerate(records):
        dataset = datasets[record.dataset]
        input_ids, visible = encode_source(record, dataset, tokenizer, max_source)
        groups = target_groups(record, visible)
        labels, dropped = encode_target(record, groups, tokenizer, max_target)
        lost.update(texts=int(visible is not None), too_long=dropped,
                    items=sum(map(len, target_groups(record))) - sum(map(len, groups)))
        task = TASKS.index("mee" if record.task in ("med", "meae") else record.task)
        unit = UNITS.index(dataset.units[record.task])
        examples.append(Example(record, unit, task, input_ids, labels, row))
    if lost.total():
        announce(f"truncation: {lost['texts']} of {len(records)} texts cut to {max_source} ids; "
                 f"targets lost {lost['items']} items with the text and {lost['too_long']} beyond "
                 f"{max_target} ids")
    return examples


def encode_source(record: Record, dataset: Dataset, tokenizer: Tokenizer,
                  limit: int) -> tuple[list[int], int | None]:
    """(ids, number of leading tokens that are left whole, None when nothing was cut)."""
    prefix, text = prompt(record, dataset)
    ids = tokenizer.encode(prefix + text)
    if len(ids) <= limit:
        return ids, None
    if (least := len(tokenizer.encode(prefix))) >= limit:
        raise DataError(f"{record.source}: the {record.task} instruction of {record.dataset} takes "
                        f"{least} ids, which leaves no room for text in {limit}: raise the limit")

    def length(count: int) -> int:
        return len(tokenizer.encode(prefix + escape(" ".join(record.tokens[:count]))))

    whole = bisect_right(range(1, len(record.tokens)), limit, key=length)
    return ids[:limit - 1] + [tokenizer.eos_id], whole


def encode_target(record: Record, groups: list[list[str]], tokenizer: Tokenizer,
                  limit: int) -> tuple[list[int], int]:
    """(ids, number of last items dropped until they fit); of a relation its label stays."""
    count = sum(map(len, groups))
    while len(ids := tokenizer.encode(join_groups(groups))) > limit and any(groups):
        if record.task == "mre" and len(groups[0]) > 1:
            groups = [[record.relation]]             # which parse() reads as well
        else:
            groups = [group for group in (*groups[:-1], groups[-1][:-1]) if group]
    return ids, count - sum(map(len, groups))


@dataclass
class Batch:
    """Padded tensors of some examples, rows sorted by task."""
    input_ids: Tensor                                # [B,S] long, padded with pad
    attention_mask: Tensor                           # [B,S] bool
    labels: Tensor                                   # [B,T] long, padded with -100
    tasks: Tensor                                    # [B] long, index into TASKS
    units: Tensor                                    # [B] long, index into UNITS
    features: Tensor                                 # [B,V,F] float32, 0 where masked
    boxes: Tensor                                    # [B,V,5] float32
    visual_mask: Tensor                              # [B,V] bool; V = 0 when no row has an image
    rows: Tensor                                     # [B] long, Example.row
    real: Tensor | None = None                       # [n] long, which of the B T labels count

    def to(self, device: torch.device | str) -> Batch:
        """The batch there, but for `tasks` and `rows`: only the host reads them, and it would
        have to wait for a GPU to get them back."""
        there = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()
                 if value is not None and name not in ("tasks", "rows")}
        return replace(self, **there)

    def widened(self, most_visual: int) -> Batch:
        """The batch with padding, also whole rows of it, up to sizes that other batches have, too:
        multiples of 4 rows, of 16 tokens and of 6 visual ones, of which there are at most so many.
        All labels are counted among the real ones: which are is no matter of size."""
        (B, S), T, V = self.input_ids.shape, self.labels.shape[1], self.features.shape[1]
        extra = {"B": -B % 4, "S": -S % 16, "T": -T % 16, "V": min(-V % 6, most_visual - V)}
        values = {"labels": -100, "tasks": int(self.tasks.max()), "rows": -1}  # or 0

        def wide(name: str, dimensions: str) -> Tensor:
            by = [size for letter in reversed(dimensions) for size in (0, extra.get(letter, 0))]
            return F.pad(getattr(self, name), by, value=values.get(name, 0))

        padded = {name: wide(name, dimensions) for name, dimensions in {
            "input_ids": "BS", "attention_mask": "BS", "labels": "BT", "tasks": "B", "units": "B",
            "features": "BVF", "boxes": "BVF", "visual_mask": "BV", "rows": "B"}.items()}
        return Batch(**padded, real=torch.arange(padded["labels"].numel()))


def collate(examples: list[Example],
            features: Callable[[Record], tuple[Tensor, Tensor] | None],
            feature_width: int, pad_id: int = 0) -> Batch:
    """Examples -> Batch, stably sorted by task so that each task's rows form one segment.

    features(record) -> (features [V,F], boxes [V,5]) or None for a record without an image.
    """
    def padded(rows: list, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, rows)), True, value)

    def mask(rows: list) -> Tensor:
        return padded([torch.ones(len(row), dtype=torch.bool) for row in rows], False)

    examples = sorted(examples, key=lambda example: example.task)
    nothing = torch.zeros(0, feature_width), torch.zeros(0, 5)
    visual = [features(example.record) or nothing for example in examples]
    ids, tokens = [e.input_ids for e in examples], [rows for rows, _ in visual]
    labels = padded([e.labels for e in examples], -100)
    return Batch(
        input_ids=padded(ids, pad_id),
        attention_mask=mask(ids),
        labels=labels,
        tasks=torch.tensor([e.task for e in examples]),
        units=torch.tensor([e.unit for e in examples]),
        features=padded(tokens, 0),
        boxes=padded([boxes for _, boxes in visual], 0),
        visual_mask=mask(tokens),
        rows=torch.tensor([e.row for e in examples]),
        real=(labels.flatten() != -100).nonzero()[:, 0])


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count), a pure function of its arguments (resume needs no state)."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator).tolist()


def global_batches(examples: list[Example], seed: int, epoch: int,
                   batch_size: int) -> list[list[int]]:
    """One epoch as lists of indices into `examples`, each exactly once; the last may be short."""
    order = epoch_order(len(examples), seed, epoch)
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def micro_batches(indices: list[int], examples: list[Example], rows: int) -> list[list[int]]:
    """`indices` in slices of `rows` examples on average, each of examples of similar length.

    The examples, sorted by length, are cut where the sum of the slices' computed tokens, squared,
    is least: little of it is padding, and processes that get a slice each finish together. At most
    2 * rows are in a slice. Found by dynamic programming, one slice more in each round.
    """
    order = sorted(indices, key=lambda i: (len(examples[i].input_ids), len(examples[i].labels), i))
    best = {0: (0, [])}                              # examples placed -> least sum, its slices
    for _ in range(math.ceil(len(order) / rows)):
        found = {}
        for stop in range(1, len(order) + 1):
            longest = 0                              # target of order[start:stop]
            for start in range(stop - 1, max(-1, stop - 2 * rows - 1), -1):
                longest = max(longest, len(examples[order[start]].labels))
                width = len(examples[order[stop - 1]].input_ids) + longest
                cost = ((stop - start) * width) ** 2 + best.get(start, (math.inf,))[0]
                if cost < found.get(stop, (math.inf,))[0]:
                    found[stop] = cost, best[start][1] + [order[start:stop]]
        best = found
    return best[len(order)][1]


# ---------------------------------------------------------------------------- published files

# The fourth type is OTHER in Twitter-15 and MISC in Twitter-17.
TAGS = {"PER": "person", "LOC": "location", "ORG": "organization", "OTHER": "miscellaneous",
        "MISC": "miscellaneous"}
# The annotation schemes, not the labels of a training split: two of V1's occur in test only.
SHARED = """/loc/loc/contain /misc/loc/held_on /misc/misc/part_of /org/loc/locate_at
    /org/org/alternate_names /org/org/subsidiary /per/loc/place_of_birth
    /per/loc/place_of_residence /per/misc/awarded /per/misc/nationality /per/misc/present_in
    /per/misc/race /per/misc/religion /per/org/member_of /per/per/alternate_names
    /per/per/charges /per/per/couple /per/per/neighbor /per/per/parent /per/per/peer
    /per/per/siblings""".split()
RELATIONS = {
    "mnre_v1": [*SHARED, *"""none /loc/loc/administration_divisions /loc/loc/capital
        /misc/misc/held_on /per/loc/place_of_death /per/misc/creat /per/org/founder_of
        /per/org/leader /per/per/classmate /per/per/colleague /per/per/relative""".split()],
    "mnre_v2": [*SHARED, "None", "/per/per/alumi"]}
RENAMED = {"None": "none", "/per/per/alumi": "alumni", "/misc/misc/held_on": "held on (event)",
           "/per/per/alternate_names": "alternate names (person)",
           "/org/org/alternate_names": "alternate names (organization)"}
ACE_TYPES = """Business:Declare-Bankruptcy Business:End-Org Business:Merge-Org Business:Start-Org
    Conflict:Attack Conflict:Demonstrate Contact:Meet Contact:Phone-Write Justice:Acquit
    Justice:Appeal Justice:Arrest-Jail Justice:Charge-Indict Justice:Convict Justice:Execute
    Justice:Extradite Justice:Fine Justice:Pardon Justice:Release-Parole Justice:Sentence
    Justice:Sue Justice:Trial-Hearing Life:Be-Born Life:Die Life:Divorce Life:Injure Life:Marry
    Movement:Transport Personnel:Elect Personnel:End-Position Personnel:Nominate
    Personnel:Start-Position Transaction:Transfer-Money Transaction:Transfer-Ownership""".split()
M2E2 = {                                             # eight of these types, with their roles
    "attack": ["attacker", "instrument", "place", "target"],
    "demonstrate": ["entity", "instrument", "place", "police"],
    "meet": ["entity", "place"],
    "phone write": ["entity", "instrument", "place"],
    "arrest jail": ["agent", "instrument", "person", "place"],
    "die": ["agent", "instrument", "place", "victim"],
    "transport": ["agent", "artifact", "destination", "origin", "vehicle"],
    "transfer money": ["giver", "money", "recipient"]}
# Two rows of ace_sr_mapping.txt that contradict the 225 others (what is carried is no agent, who
# steers is no vehicle). Its type "Transfer|MONEY" needs no entry, as labels are lower-case words.
ROLE_FIXES = {("carrying", "item"): "Artifact", ("steering", "agent"): "Agent"}


def relation_word(path: str) -> str:
    """"/per/loc/place_of_birth" -> "place of birth"; injective within a dataset."""
    return RENAMED.get(path, path.split("/")[-1].replace("_", " "))


def event_word(name: str) -> str:
    """"Justice:Arrest-Jail" -> "arrest jail"."""
    return name.split(":")[1].replace("-", " ").lower()


def raw_record(kind: str, task: str, name: str, tokens: list[str], image: str | None, objects: list,
               **gold: object) -> dict:
    """A record as JSON; the size of the image is unknown unless `gold` holds it too."""
    return {"id": name, "dataset": kind, "task": task, "tokens": tokens, "image": image,
            "size": None, "objects": objects, **gold}


@contextmanager
def expecting(what: str, where: object, line: str | None = None) -> Iterator[None]:
    """Whatever is found inside that cannot be read as `what` becomes an error that says where."""
    try:
        yield
    except DataError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, SyntaxError,
            RecursionError, MemoryError) as error:
        got = repr(error) if line is None else f"{show(line)} ({error!r})"
        raise DataError(f"{where}: expected {what}, got {got}: fetch the file again") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of a UTF-8 file; only LF and CRLF end a line."""
    for number, line in enumerate(read_bytes(path).removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield f"{path}:{number}", line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error}): save it as UTF-8") from None


def read_conll(path: Path, kind: str) -> Rows:
    """`IMGID:name`, then token<TAB>tag lines, then a blank line.

    Chunks are read leniently: an I- tag that continues nothing starts an entity, as the scorers
    of the field have it (Twitter-15 has hundreds of them).
    """
    rows, inside = [], False
    for where, line in read_lines(path):
        token, tab, tag = line.rpartition("\t")
        mark, _, label = tag.partition("-")
        if line.startswith("IMGID:") and not tab:
            name, inside = line.removeprefix("IMGID:"), True
            rows.append((where, raw_record(kind, "mner", name, [], f"{name}.jpg", [], entities=[])))
        elif not line:
            inside = False
        elif not inside or not token or tag != "O" and not (mark in ("B", "I") and label in TAGS):
            raise DataError(f"{where}: expected token<TAB>tag below an IMGID line, tag O or B-/I- "
                            f"and one of {', '.join(TAGS)}, got {show(line)}: correct the file")
        else:
            tokens, entities = rows[-1][1]["tokens"], rows[-1][1]["entities"]
            tokens.append(token)
            here = {"type": TAGS.get(label), "start": len(tokens) - 1, "end": len(tokens)}
            last = entities[-1] if entities else {"type": None, "end": None}
            if mark == "I" and (last["type"], last["end"]) == (here["type"], here["start"]):
                last["end"] += 1
            elif mark != "O":
                entities.append(here)
    return rows


def read_mnre(path: Path, kind: str) -> Rows:
    """One Python literal per line. Names come from the offsets; V1's image ids may be numbers."""
    rows = []
    for number, (where, line) in enumerate(read_lines(path), 1):
        with expecting("a Python dict with token, h, t, img_id, relation", where, line):
            row = ast.literal_eval(line)
            relation, image = row["relation"], row["img_id"]
            if relation not in RELATIONS[kind]:
                raise ValueError(f"relation {show(relation)} is not in the scheme of {kind}: "
                                 + nearest(relation, RELATIONS[kind]))
            if type(image) is int:
                image = f"{image}.jpg"
            if not isinstance(image, str):
                raise ValueError(f"img_id {show(image)} names no picture")
            rows.append((where, raw_record(
                kind, "mre", f"{number}", row["token"], image, [], head=row["h"]["pos"],
                tail=row["t"]["pos"], relation=relation_word(relation))))
    return rows


# Readers of events return a row for a sample, without a task and with the gold boxes as objects;
# event_rows() makes its med and meae records with the objects that the model is to see.

def text_event(mention: dict) -> dict:
    """An event in M2E2's or ACE's text; only its offsets are used, not the words beside them."""
    name, trigger = mention["event_type"], mention["trigger"]
    if name not in ACE_TYPES:
        raise ValueError(f"event type {show(name)} is unknown: {nearest(name, ACE_TYPES)}")
    return {"type": event_word(name), "trigger": [trigger["start"], trigger["end"]], "arguments": [
        {"role": a["role"].lower(), "span": [a["start"], a["end"]]} for a in mention["arguments"]]}


def read_ace(path: Path, kind: str) -> Rows:
    """A sample for each line of OneIE's JSON lines, sentences without event too; no pictures.

    An argument stands where the entity mention stands that it names.
    """
    rows = []
    for where, line in read_lines(path):
        with expecting("a sentence as OneIE writes it (doc_id, sent_id, tokens, entity_mentions, "
                       "event_mentions)", where, line):
            sentence = parse_json(line.encode())
            mentions = {mention["id"]: mention for mention in sentence["entity_mentions"]}
            for argument in (a for event in sentence["event_mentions"] for a in event["arguments"]):
                if argument["entity_id"] not in mentions:
                    raise ValueError(f"entity_id {show(argument['entity_id'])} of an argument is "
                                     "none of the entity_mentions")
                argument |= {key: mentions[argument["entity_id"]][key] for key in ("start", "end")}
            document, name = sentence["doc_id"], str(sentence["sent_id"])
            if not name.startswith(document):        # the number of the sentence in its document
                name = f"{document}-{name}"
            rows.append((where, raw_record(
                kind, "", name, sentence["tokens"], None, [],
                events=list(map(text_event, sentence["event_mentions"])))))
    return rows


def read_text_only(folder: Path, sentences: dict[str, dict]) -> dict[str, list[dict]]:
    """{sentence id: its events in M2E2's text-only file}, of these sentences; {} without file.

    A sentence that has other words there is left out, since its offsets would mean nothing.
    """
    path = folder / "text_only_event.json"
    if not path.exists():
        print(f"{path} is not here, so no other event is accepted")
        return {}
    with expecting("M2E2's text-only events", path):
        return {one["sentence_id"]: list(map(text_event, one["golden-event-mentions"]))
                for one in parse_json(read_bytes(path)) if one["golden-event-mentions"]
                and one["words"] == sentences.get(one["sentence_id"], {}).get("words")}


def read_m2e2(path: Path, kind: str) -> Rows:
    """A sample for each line of crossmedia_coref.txt: the one event of a sentence, and a picture.

    Where line and picture disagree about the event type, the arguments in the picture are dropped
    and those in the text stay. Other events of the same sentence, which M2E2 annotates in its file
    of text-only events, are no gold of the pair: they become "accepted".
    """
    texts, images = (path.with_name(f"{what}_multimedia_event.json") for what in ("text", "image"))
    with expecting("M2E2's annotations", path.parent):
        sentences = {one["sentence_id"]: one for one in parse_json(read_bytes(texts))}
        pictures = parse_json(read_bytes(images))
    rows, accepted = [], read_text_only(path.parent, sentences)
    for where, line in read_lines(path):
        with expecting("sentence<TAB>image.jpg<TAB>event type, all annotated", where, line):
            name, image, coref = line.split("\t")
            sentence, picture = sentences[name], pictures[image.removesuffix(".jpg")]
            boxes = [(role, box[1:]) for role, some in picture["role"].items() for box in some]
            for _, box in boxes:
                if problem := box_within()(box):
                    raise ValueError(f"{show(box)} {problem}")
            [mention] = sentence["golden-event-mentions"]
            event = text_event(mention)
            if coref == picture["event_type"]:
                event["arguments"] += [{"role": role.lower(), "box": box} for role, box in boxes]
            more = {"accepted": accepted[name]} if name in accepted else {}
            rows.append((where, raw_record(kind, "", f"{name}+{image}", sentence["words"], image,
                                           [box for _, box in boxes], events=[event], **more)))
    print(f"{kind}: {sum('accepted' in row for _, row in rows)} of {len(rows)} samples have other "
          f"events in their sentence, which are accepted ({len(accepted)} sentences)")
    return rows


def read_mapping(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """{verb: (event type, {SWiG's role: role})} from M2E2's ace_sr_mapping.txt, LF or CRLF."""
    verbs = {}
    for where, line in read_lines(path):
        with expecting("verb<TAB>role<TAB>Type||Sub|Type<TAB>ACE role", where, line):
            verb, name, kind, role = line.split("\t")
            kind = event_word(kind.replace("||", ":").replace("|", "-"))
            if kind not in M2E2 or verbs.setdefault(verb, (kind, {}))[0] != kind:
                raise ValueError(f"{kind} is no type of M2E2, or {verb} has another one above")
            verbs[verb][1][name] = ROLE_FIXES.get((verb, name), role).lower()
    return verbs


def read_swig(path: Path, kind: str) -> Rows:
    """A sample without text for each picture whose verb is mapped; the whole picture triggers.

    SWiG's verb template is not used as text, as it gives the verb away. Objects are the grounded
    boxes, whatever their role; two roles may share one. [-1, -1, -1, -1] is not grounded.
    """
    verbs, rows, flat = read_mapping(path.with_name("ace_sr_mapping.txt")), [], 0
    with expecting("SWiG's {image: {verb, height, width, bb}}", path):
        pictures = dict(parse_json(read_bytes(path)))
    for image, picture in pictures.items():
        where = f"{path}: {image}"
        with expecting("{verb, height, width, bb: {role: box}}", where):
            if picture["verb"] not in verbs:
                continue
            event, roles = verbs[picture["verb"]]
            if image_size(size := [picture["width"], picture["height"]]):
                raise ValueError(f"the size {size}")
            objects, arguments = [], []
            for name, box in picture["bb"].items():
                if max(box) < 0:                     # not grounded
                    continue
                if not (box := tidy(box, *size)):
                    flat += 1
                    continue
                if box not in objects:
                    objects.append(box)
                argument = {"role": roles.get(name), "box": box}
                if name in roles and argument not in arguments:
                    arguments.append(argument)
            event = {"type": event, "trigger": None, "arguments": arguments}
            rows.append((where, raw_record(kind, "", image, [], image, objects, size=size,
                                           events=[event])))
    print(f"{path}: {len(pictures) - len(rows)} of {len(pictures)} pictures left out (verb unmapped"
          f"); {flat} boxes without area dropped")
    return rows


# ---------------------------------------------------------------------------- objects of pictures

def tidy(box: list, right: float = math.inf, bottom: float = math.inf) -> list | None:
    """A box with its corners in order, clipped to the picture; None where no area is left."""
    (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, right), min(y2, bottom)
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def shown_by(box: list, objects: list[list]) -> int | None:
    """The number of the object that overlaps a box most, if IoU >= 0.5; ties go to the first."""
    overlap, number = max(((iou(box, other), -k) for k, other in enumerate(objects, 1)),
                          default=(0, 0))
    return -number if overlap >= 0.5 else None


def detections(path: Path) -> dict[str, list[list]]:
    """{image: boxes of its detections, the most confident first}.

    Corners are put in order and clipped at 0 (the other borders are unknown without the picture);
    a detection without area is dropped and counted.
    """
    if not path.exists():
        raise DataError(f"{path}: expected what YOLOv8 detects in M2E2's pictures, {{image.jpg: "
                        '[{"bbox", "class", "conf"}]}, found no file: put MMUTF\'s objects '
                        "(github.com/seebergerph/MMUTF) there as JSON, or convert m2e2_gold")
    with expecting('{image.jpg: [{"bbox", "class", "conf"}]}', path):
        found = {image: [tidy(one["bbox"]) for one in sorted(some, key=lambda one: -one["conf"])]
                 for image, some in parse_json(read_bytes(path)).items()}
    flat = sum(box is None for boxes in found.values() for box in boxes)
    print(f"{path}: detections in {len(found)} pictures; {flat} without area dropped")
    return {image: [box for box in boxes if box] for image, boxes in found.items()}


def reachable(rows: Rows, found: dict[str, list[list]], limit: int) -> tuple[int, int]:
    """(gold boxes that one of `limit` detections shows, gold boxes), each picture counted once."""
    gold = {row["image"]: row["objects"] for _, row in rows}
    best = [shown_by(box, found[image][:limit]) for image, boxes in gold.items() for box in boxes]
    return len(best) - best.count(None), len(best)


def mixed(row: dict, count: int) -> list[list]:
    """`count` objects: the grounded boxes and distractors, in an order that tells nothing.

    A distractor has the sides of a grounded box times 0.5 to 1.5, lies anywhere in the picture and
    overlaps no grounded box with IoU >= 0.5. The number of objects is `count` everywhere, but for
    tiny pictures; the generator is seeded with the picture's name.
    """
    rng, (right, bottom), objects = random.Random(row["image"]), row["size"], row["objects"][:]
    for _ in range(100 * count):
        if len(objects) >= count:
            break
        x1, y1, x2, y2 = rng.choice(row["objects"] or [[0, 0, right, bottom]])
        width = min(math.ceil((x2 - x1) * rng.uniform(0.5, 1.5)), right)
        height = min(math.ceil((y2 - y1) * rng.uniform(0.5, 1.5)), bottom)
        x, y = rng.randint(0, right - width), rng.randint(0, bottom - height)
        box = [x, y, x + width, y + height]
        if box not in objects and shown_by(box, row["objects"]) is None:
            objects.append(box)
    rng.shuffle(objects)
    return objects[:count]


# ---------------------------------------------------------------------------- converters

@dataclass(frozen=True)
class Kind:
    """A published dataset: what reads it, and what is known about it."""
    read: Callable[[Path, str], Rows]
    units: dict[str, str]                            # as in Dataset
    labels: dict
    files: dict[str, tuple[str, int | None]]         # split -> (file, number of records if known)
    note: str = ""                                   # {objects}, {types}: options of the command


TWITTER = {"mner": sorted(set(TAGS.values()))}
V1, V2 = ({"mre": sorted(map(relation_word, paths))} for paths in RELATIONS.values())
EVENTS = {"med": sorted(M2E2), "meae": M2E2}
MEE = {"med": "MED", "meae": "MEAE"}
FOREIGN = ("ace2005", "swig")                        # these train what M2E2 tests
DETECTIONS = "m2e2_yolov8_objects.json"
KINDS = {
    "twitter2015": Kind(read_conll, {"mner": "T15"}, TWITTER, {
        "train": ("train.txt", 4000), "dev": ("valid.txt", 1000), "test": ("test.txt", 3257)}),
    "twitter2017": Kind(read_conll, {"mner": "T17"}, TWITTER, {
        "train": ("train.txt", 3373), "dev": ("valid.txt", 723), "test": ("test.txt", 723)}),
    "snap": Kind(read_conll, {"mner": "SNAP"}, TWITTER, {
        "train": ("train.txt", 4290), "dev": ("valid.txt", 1432), "test": ("test.txt", 1459)}),
    "mnre_v1": Kind(read_mnre, {"mre": "V1"}, V1, {
        "train": ("ours_train.txt", 7824), "dev": ("ours_val.txt", 975),
        "test": ("ours_test.txt", 1282)}),
    "mnre_v2": Kind(read_mnre, {"mre": "V2"}, V2, {
        "train": ("mnre_train.txt", 12247), "dev": ("mnre_val.txt", 1624),
        "test": ("mnre_test.txt", 1614)}),
    "ace2005": Kind(
        read_ace, MEE, EVENTS, {
            "train": ("train.oneie.json", None), "dev": ("dev.oneie.json", None)},
        "ACE2005 with event types {types}, sentences without event included, no test file"),
    "swig": Kind(
        read_swig, MEE, EVENTS, {"train": ("train.json", None), "dev": ("dev.json", 6700)},
        "SWiG with event types {types}: pictures without text, {objects} objects each (grounded "
        "boxes and distractors, shuffled), no test file, two rows of the role mapping corrected"),
    "m2e2": Kind(
        read_m2e2, MEE, EVENTS, {"test": ("crossmedia_coref.txt", 618)},
        "M2E2 in detector mode: objects are the {objects} most confident YOLOv8 detections"),
    "m2e2_gold": Kind(
        read_m2e2, MEE, EVENTS, {"test": ("crossmedia_coref.txt", 618)},
        "M2E2 in gold-box mode: objects are exactly the gold boxes in file order, which leaks "
        "their number")}


def published(source: Path, name: str) -> Path:
    """Where a published file lies: MNRE-V2's dev file has a blank in its name, OneIE's may lack a
    part of theirs."""
    names = (name.replace(".txt", " .txt"), name, name.replace(".oneie", ""))
    return next((source / other for other in names if (source / other).exists()), source / name)


def only_m2e2(rows: Rows) -> None:
    """Drops events and roles that M2E2 does not have, and prints which."""
    lost = Counter()
    for _, row in rows:
        lost.update(e["type"] for e in row["events"] if e["type"] not in M2E2)
        row["events"] = [event for event in row["events"] if event["type"] in M2E2]
        for event in row["events"]:
            known, every = M2E2[event["type"]], event["arguments"]
            lost.update(f"{a['role']} of {event['type']}" for a in every if a["role"] not in known)
            event["arguments"] = [a for a in every if a["role"] in known]
    if lost:
        print("left out, as M2E2 has no such event or role:",
              ", ".join(f"{count} x {name}" for name, count in lost.most_common()))


def found_labels(rows: Rows) -> dict:
    """The event types and roles of these samples."""
    roles = {}
    for event in (event for _, row in rows for event in row["events"]):
        roles.setdefault(event["type"], set()).update(a["role"] for a in event["arguments"])
    return {"med": sorted(roles), "meae": {kind: sorted(roles[kind]) for kind in sorted(roles)}}


def event_rows(kind: str, rows: Rows, folder: Path, max_objects: int,
               event_types: str) -> tuple[Rows, str]:
    """(med and meae records of samples with the objects of this kind, what a result must name).

    Every sample has a med record, "none" where it has no event; arguments need an event.
    """
    note = KINDS[kind].note.format(objects=max_objects, types=event_types)
    if kind in FOREIGN and event_types == "m2e2":
        only_m2e2(rows)
    if kind == "m2e2":
        found = detections(folder / DETECTIONS)
        with expecting("detections, if only [], for each picture of M2E2", folder / DETECTIONS):
            reached, total = reachable(rows, found, max_objects)
        share = 100 * reached / max(total, 1)
        note += f"; they show {reached} of {total} gold boxes ({share:.1f} %)"
    print(f"{kind}: {note}")
    for _, row in rows:
        if kind == "m2e2":
            row["objects"] = found[row["image"]][:max_objects]
        elif kind == "swig":
            row["objects"] = mixed(row, max_objects)
        for argument in (a for event in row["events"] for a in event["arguments"] if "box" in a):
            argument["object"] = shown_by(argument["box"], row["objects"])
    return [(where, row | {"id": f"{row['id']}/{task}", "task": task}) for where, row in rows
            for task in ("med", "meae") if task == "med" or row["events"]], note


def convert(kind: str, source: Path, corpus: Path, max_objects: int = 16,
            event_types: str = "m2e2") -> None:
    """Reads the published files of a dataset in `source` and writes corpus/kind.

    max_objects: number of objects in m2e2 and swig. event_types: "m2e2" or, for ace2005 and swig,
    "all" that their files hold.
    """
    other = {"m2e2": "m2e2_gold", "m2e2_gold": "m2e2"}.get(kind)
    if other and (corpus / other / "dataset.json").exists():
        raise DataError(f"{corpus}: holds {other}, which would be scored together with {kind}: "
                        "give another folder")
    if (corpus / "dataset.json").exists():
        raise DataError(f"{corpus}: expected a folder of datasets, found a single dataset: give "
                        "the folder above it")
    if max_objects < 1:
        raise DataError(f"--max-objects: expected 1 or more, got {max_objects}: raise it")
    if event_types == "all" and kind not in FOREIGN:
        raise DataError(f"--event-types all: {kind} has one set of labels only: leave it out")
    known = KINDS[kind]
    paths = {split: published(source, name) for split, (name, _) in known.files.items()}
    rows = {split: known.read(path, kind) for split, path in paths.items() if path.exists()}
    if not rows:
        raise DataError(f"{source}: expected at least one of "
                        f"{', '.join(name for name, _ in known.files.values())}, found none: "
                        "give the folder that holds them")
    descriptor = {"name": kind, "units": known.units, "labels": known.labels}
    if event_types == "all":
        descriptor["labels"] = found_labels(sum(rows.values(), []))
    if known.units == MEE:
        for split, some in rows.items():
            rows[split], descriptor["note"] = event_rows(kind, some, source, max_objects,
                                                         event_types)
    for split, (_, expected) in known.files.items():
        count = len(rows.get(split, ()))
        found = f"{count} records found" if split in rows else "FILE NOT FOUND, nothing written"
        wanted = f", {expected} expected" if expected else ""
        differs = "  <-- differs" if expected and count != expected else ""
        print(f"{kind} {split}: {found}{wanted}, from {paths[split]}{differs}")
    if "test" not in known.files and (path := published(source, "test.oneie.json")).exists():
        print(f"{kind} test: {path} left out, as M2E2 is the only test of events")
    write_dataset(corpus / kind, descriptor, rows)


# ---------------------------------------------------------------------------- check, command line

def normalised(record: Record) -> str:
    """A text as duplicates are compared: no URLs, lower case, letters and digits only."""
    text = " ".join(token for token in record.tokens if not token.lower().startswith("http"))
    return "".join(filter(str.isalnum, text.lower()))


def texts_of(records: Iterable[Record]) -> set[str]:
    """The different texts of records, normalised; pictures without text have none."""
    return set(map(normalised, records)) - {""}


def shared_texts(texts: dict[tuple[str, str], set[str]]) -> list[str]:
    """A line for each two splits, {(dataset, split): texts}, that share texts; test before dev.

    What two training splits share is no leak and not listed.
    """
    order = sorted(texts, key=lambda key: (-SPLITS.index(key[1]), key[0]))
    return [f"{' '.join(a)} in {' '.join(b)}: {len(texts[a] & texts[b])} of {len(texts[a])} texts"
            for a, b in combinations(order, 2) if a[1] != "train" and texts[a] & texts[b]]


def check(corpus: Path, require_images: bool) -> None:
    """Validates every split of every dataset and prints what is in it and what two splits share."""
    problems, texts = Problems(), {}
    for name, dataset in load_datasets(corpus).items():
        images = corpus / name / "images"
        splits = [s for s in SPLITS if (corpus / name / f"{s}.jsonl").exists()]
        if not splits:
            problems.add(str(corpus / name), "files", f"none of {', '.join(SPLITS)}.jsonl is here: "
                         "convert the dataset again")
        for split in splits:
            records = read_split(corpus / name, split, dataset, problems)
            texts[name, split] = texts_of(records)
            for task in dataset.units:
                some = [record for record in records if record.task == task]
                print(f"{name} {split} {task}: {summary(some, dataset, images)}")
            for record in records:
                if require_images and record.image and not (images / record.image).is_file():
                    problems.add(record.source, "image", f'"{record.image}" is not in {images}: '
                                 "put it there or write null")
    print("\n".join(shared_texts(texts)) or "no text stands in two splits")
    problems.raise_if_any()


def summary(records: list[Record], dataset: Dataset, folder: Path) -> str:
    """The counts of one task's records in one split."""
    images = {record.image for record in records if record.image}
    missing = sum(not (folder / image).is_file() for image in images)
    prompts = max((len("".join(prompt(r, dataset)).split()) for r in records), default=0)
    targets = max((len(target(r).split()) for r in records), default=0)
    return (f"{len(records)} records, {sum(len(gold_items(r)) for r in records)} gold items, "
            f"{len(images)} images ({missing} missing), longest prompt {prompts} words, "
            f"longest target {targets} words")


class Parser(argparse.ArgumentParser):
    """The argparse of all four commands: no abbreviated flags, an unknown flag is answered with
    the nearest known one, and the help names each default that is not "nothing" or "no"."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            silent = action.default is None or action.default is False or "default" in action.help
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, **options: object):
        super().__init__(**{"allow_abbrev": False, "formatter_class": self.Help, **options})

    def flags(self) -> list[str]:
        """All flags, those of subcommands included."""
        inner = [parser for action in self._actions if isinstance(action.choices, dict)
                 for parser in action.choices.values() if isinstance(parser, Parser)]
        own = [flag for action in self._actions for flag in action.option_strings]
        return sum((parser.flags() for parser in inner), own)

    def error(self, message: str) -> None:
        flags = self.flags()
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            if word.startswith("--") and near and word not in flags:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def parser() -> Parser:
    """The command line of data.py."""
    result = Parser(prog="data.py", description="Convert published datasets, check a corpus "
                    "(format: top of data.py).")
    commands = result.add_subparsers(dest="command", required=True, title="commands")
    does = "read a dataset's published files, write DST/KIND, print found and expected counts"
    command = commands.add_parser("convert", help=does, description=does)
    what = command.add_argument_group("what to convert")
    what.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    what.add_argument("src", type=Path, metavar="SRC", help="folder of the published files")
    what.add_argument("dst", type=Path, metavar="DST",
                      help="corpus folder; the pictures belong into DST/KIND/images")
    events = command.add_argument_group("events")
    events.add_argument("--max-objects", type=int, default=16, metavar="K",
                        help="m2e2, swig: objects of a picture")
    events.add_argument("--event-types", choices=("m2e2", "all"), default="m2e2",
                        help="ace2005, swig: M2E2's event types and roles, or all of their own")
    does = "validate every record of a corpus; print counts, lengths and texts that splits share"
    command = commands.add_parser("check", help=does, description=does)
    what = command.add_argument_group("what to check")
    what.add_argument("dir", type=Path, metavar="DIR", help="corpus folder")
    what.add_argument("--require-images", action="store_true",
                      help="a missing picture is an error instead of a count")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs data.py's command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "convert":
            convert(args.kind, args.src, args.dst, args.max_objects, args.event_types)
        else:
            check(args.dir, args.require_images)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
