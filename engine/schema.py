"""The schema of a corpus: datasets, records, and what is wrong where a file breaks the rules.

A corpus is a folder of datasets, CORPUS/<dataset>/{dataset.json, train|dev|test.jsonl, images/}: a
new dataset is a new folder. In its dataset.json "units" names, for each record task, a column of
the result table (a new one needs a line in UNIT_TASK and a reference F1, --aml-reference); "note"
(optional) is one line that stands beside scores; labels are lower-case words:

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
Where the med record of a sample is NAME/med and its meae record NAME/meae, arguments of the answer
are looked for near the triggers of the answer.
Med and meae records may have one key more, "accepted": a list like "events", of events in the text
alone that are right although they are not gold of the sample.
"""

import difflib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

TASKS = ("mner", "mre", "mee")                       # one task expert each
RECORD_TASKS = ("mner", "mre", "med", "meae")        # med and meae share the expert "mee"
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


# ---------------------------------------------------------------------------- rules
# A rule has the shape of the JSON that it demands: a dict stands for an object with exactly these
# keys, a list of one rule for a list whose elements obey it, a Must for a value that passes a test.
# A function, given the value, returns the rule for it.

@dataclass(frozen=True)
class Must:
    """A value for which `holds` is true and that then obeys the rule `further`, if there is one."""
    holds: Callable[[object], object]
    problem: str | Callable[[object], str]           # if it is not true: "is no ...: what to do"
    further: "Rule | None" = None


Rule = Must | dict | list | Callable


class Problems(list):
    """Collects "file:line: field: problem: what to do", so that many mistakes show at once."""

    def add(self, where: str, place: str, problem: str) -> None:
        self.append(f"{where}: {place}: {problem}")

    def raise_if_any(self) -> None:
        first = f", the first {MAX_PROBLEMS}" if len(self) > MAX_PROBLEMS else ""
        if self:
            raise DataError(f"{len(self)} problem(s) in the data{first}:\n  "
                            + "\n  ".join(self[:MAX_PROBLEMS]))

    def check(self, value: object, rule: Rule, where: str, place: str) -> bool:
        """Whether `value` obeys the rule; everything in it that does not is added."""
        before = len(self)
        if callable(rule):
            rule = rule(value)
        if isinstance(rule, Must):
            if not rule.holds(value):
                problem = rule.problem(value) if callable(rule.problem) else rule.problem
                self.add(where, place, f"{show(value)} {problem}")
            elif rule.further is not None:
                self.check(value, rule.further, where, place)
        elif not isinstance(value, type(rule)):
            name = "object" if isinstance(rule, dict) else "list"
            self.add(where, place, f"{show(value)} is no JSON {name}: correct it")
        elif isinstance(rule, list):
            for i, element in enumerate(value):
                self.check(element, rule[0], where, f"{place}[{i}]")
        else:
            for key in sorted(value.keys() - rule.keys()):
                self.add(where, place, f"key {show(key)} is unknown: {nearest(key, rule)}")
            for key, inner in rule.items():
                if key in value:
                    self.check(value[key], inner, where, f"{place}.{key}".removeprefix("record."))
                else:
                    self.add(where, place, f'key "{key}" is missing: add it, if only as null or []')
        return len(self) == before

    def check_record(self, raw: object, dataset: Dataset, where: str, seen: dict[str, str]) -> bool:
        """Whether `raw` is a record with a new id; seen, {id: where}, holds those before it."""
        right = self.check(raw, RecordRules(raw, dataset).record(), where, "record")
        if right and (first := seen.setdefault(raw["id"], where)) != where:
            self.add(where, "id", f'"{raw["id"]}" is the id of {first} too: make ids unique')
        entities = get(raw, "entities", ()) if right else ()
        if again := twice([json.dumps(entity, sort_keys=True) for entity in entities]):
            self.add(where, "entities", f"{again} stands twice: write it once")
        return right


def show(value: object) -> str:
    """A value as it stands in the file, shortened."""
    try:
        text = json.dumps(value, default=repr, skipkeys=True)
    except RecursionError:
        text = "something nested deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: object, known: Collection[str]) -> str:
    """The advice for an unknown word: the known one that resembles it, else all of them."""
    close = difflib.get_close_matches(str(word), known, n=1)
    choices = ", ".join(sorted(known)) or "nothing, as none is allowed here"
    return f'did you mean "{close[0]}"?' if close else f"use one of: {choices}"


def get(mapping: object, key: object, default: object = None) -> object:
    """mapping[key], or the default where it is no object, or lacks the key."""
    known = isinstance(mapping, dict) and isinstance(key, str)
    return mapping.get(key, default) if known else default


def are_numbers(value: object, types: tuple[type, ...], count: int) -> bool:
    """Whether it is a list of `count` numbers of these types below 1e9; True is no number here."""
    return (isinstance(value, list) and len(value) == count
            and all(type(x) in types and abs(x) < 1e9 for x in value))


def twice(value: object) -> str:
    """The first string that stands twice in a list; "" if there is none, or it is no list."""
    words = Counter(x for x in value if isinstance(x, str)) if isinstance(value, list) else {}
    return next((word for word, count in words.items() if count > 1), "")


def one_of(choices: Collection[str]) -> Must:
    """A string out of a closed set."""
    return Must(lambda v: isinstance(v, str) and v in choices,
                lambda v: f"is unknown: {nearest(v, choices)}")


ANYTHING = Must(lambda v: True, "")                  # another rule names its problems
STRING = Must(lambda v: isinstance(v, str) and v != "" and v.isprintable(),
              "is no non-empty printable string: correct it")
TOKEN = Must(lambda v: isinstance(v, str) and re.fullmatch("[^\0- \x7f\ud800-\udfff]+", v),
             "is no non-empty string without blanks, control characters and half surrogates: "
             "repair it, mind the spans")
LABEL = Must(lambda v: STRING.holds(v) and v == unicodedata.normalize("NFKC", v).lower()
             and re.fullmatch("[^ ,:;<>%]+( [^ ,:;<>%]+)*", v),
             "is no lower-case word, in Unicode's form NFKC, without , : ; < > %: rename the label")
LABELS = Must(lambda v: not twice(v), lambda v: f'has "{twice(v)}" twice: write it once', [LABEL])
IMAGE_NAME = Must(lambda v: v is None or STRING.holds(v)
                  and not re.search(r"[\\:]|^~|(^|/)[ .]*(/|$)", v) and len(v) < 1000
                  and all(len(name.encode()) < 256 for name in v.split("/")),
                  "is neither null nor a plain relative path: name a file below images/")
SIZE = Must(lambda v: v is None or are_numbers(v, (int,), 2) and min(v) > 0,
            "is neither null nor [width, height] in pixels: correct it")


def box_within(right: float = math.inf, bottom: float = math.inf) -> Must:
    """[x1, y1, x2, y2] in a picture, without bounds where its size is unknown."""
    return Must(lambda v: are_numbers(v, (int, float), 4) and 0 <= v[0] < v[2] <= right
                and 0 <= v[1] < v[3] <= bottom, f"is no box 0 <= x1 < x2 <= {right}, 0 <= y1 < y2 "
                f"<= {bottom}: order its corners and clip it, or correct the size")


class RecordRules:
    """The rules of a record, whose tokens bound its spans, and whose size its boxes."""

    def __init__(self, raw: object, dataset: Dataset):
        self.dataset, self.task, size = dataset, get(raw, "task"), get(raw, "size")
        self.labels = get(dataset.labels, self.task, ())
        self.tokens, self.objects = get(raw, "tokens"), get(raw, "objects")
        self.has_image = get(raw, "image", "unknown") is not None  # a missing key: one problem
        self.has_accepted = isinstance(raw, dict) and "accepted" in raw
        length = len(self.tokens) if isinstance(self.tokens, list) else math.inf
        self.span = Must(lambda v: are_numbers(v, (int,), 2) and 0 <= v[0] < v[1] <= length,
                         f"is no span 0 <= start < end <= {length} (tokens): correct the offsets")
        self.box = box_within(*(size if size is not None and SIZE.holds(size) else ()))

    def record(self) -> Rule:
        """The fields of every record and, unless its task is unknown, the gold of that task."""
        events = {"events": [self.event]}
        if self.has_accepted:
            events["accepted"] = [lambda event: self.event(event, in_text=True)]
        gold = {"mner": {"entities": [self.entity]}, "med": events, "meae": events,
                "mre": {"head": self.span, "tail": self.span, "relation": one_of(self.labels)}}
        needs_text = self.task in ("mner", "mre") or not self.has_image
        return {"id": STRING, "dataset": one_of([self.dataset.name]),
                "task": one_of(self.dataset.labels),
                "tokens": Must(lambda v: v != [] or not needs_text, "is no text: only med and meae "
                               "records with an image may lack it", [TOKEN]),
                "image": IMAGE_NAME, "size": SIZE, "objects": self.in_image([self.box]),
                **(gold[self.task] if self.labels else {})}

    def in_image(self, rule: Rule) -> Rule:
        return Must(lambda v: self.has_image or v == [], "needs an image: name it", rule)

    def entity(self, entity: object) -> Rule:
        span = [get(entity, "start"), get(entity, "end")]
        return {"type": one_of(self.labels), "start": ANYTHING,    # "end" judges both
                "end": Must(lambda v: self.span.holds(span), self.span.problem)}

    def event(self, event: object, in_text: bool = False) -> Rule:
        """in_text: the event is in the text, where no trigger may be null (the whole image)."""
        of_image = not in_text and get(event, "trigger") is None
        role = one_of(get(get(self.dataset.labels, "meae"), get(event, "type"), ()))
        if not one_of(self.labels).holds(get(event, "type")):
            role = ANYTHING                          # one problem, not one more for each role
        return {"type": one_of(self.labels),
                "trigger": self.in_image(ANYTHING) if of_image else self.span,
                "arguments": [lambda argument: self.argument(argument, role, in_text)]}

    def argument(self, argument: object, role: Rule, in_text: bool) -> Rule:
        if in_text or not isinstance(argument, dict) or not argument.keys() & {"box", "object"}:
            return {"role": role, "span": self.span}
        return {"role": role, "box": self.in_image(self.box),
                "object": lambda number: self.number(number, argument.get("box"))}

    def number(self, number: object, box: object) -> Rule:
        """null, or the number of an object that has IoU >= 0.5 with the box."""
        count = len(self.objects) if isinstance(self.objects, list) else 0
        if type(number) is not int or not 0 < number <= count:
            return Must(lambda v: v is None,
                        "is neither null nor the number of one of the objects: correct it")
        boxes = box, self.objects[number - 1]        # other rules name those that are no boxes
        return Must(lambda v: not all(map(self.box.holds, boxes)) or iou(*boxes) >= 0.5, "is the "
                    "number of an object with IoU < 0.5 to the box: correct it or write null")


def dataset_rule(raw: object, name: str) -> Rule:
    """The rule for dataset.json in the folder `name`; `raw` itself chooses the tasks."""
    def labels(with_none: bool) -> Rule:
        return Must(lambda v: not isinstance(v, list) or v and ("none" in v) == with_none,
                    'is empty or breaks that "none" is a label of mre and of no other task: '
                    "correct it", LABELS)

    roles = Must(lambda v: isinstance(v, dict) and v and all(map(LABEL.holds, v)),
                 "is no {event type: [roles]} in lower-case words: correct it",
                 lambda v: dict.fromkeys(v, LABELS))
    rules = {"mner": labels(False), "mre": labels(True), "med": labels(False), "meae": roles}
    units = get(raw, "units")
    tasks = [t for t in RECORD_TASKS if isinstance(units, dict) and t in units] or ["mner"]
    return {"name": Must(lambda v: v == name,
                         f'is not "{name}", the name of its folder: rename one of them'),
            **({} if get(raw, "note") is None else {"note": STRING}),
            "units": {t: one_of([u for u in UNITS if UNIT_TASK[u] == t]) for t in tasks},
            "labels": {t: rules[t] for t in tasks}}
