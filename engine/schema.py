"""What a record and a dataset must be."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
