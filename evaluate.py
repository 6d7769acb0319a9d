"""Decode a split with trained models, score it, print the paper's tables; or answer one example.

    python evaluate.py runs/demo-tiny-clorae                    the test split, all seven columns
    torchrun --nproc_per_node=4 evaluate.py RUN --data DIR      the same, shared by four processes
    python evaluate.py runs/a runs/b runs/c --csv FILE          systems side by side, with intervals
    python evaluate.py RUN --plot DIR                           every picture of a run
    python evaluate.py RUN --text "..." --image I --task mner --draw FILE.png     one example

References: C-LoRAE (arXiv 2505.06303), Table 2 for the columns and Eq. (9) for `unit_f1`; entities
as in UMT's ner_evaluate, relations as in HVPNeT's eval_result, events as in M2E2 (ACL 2020).
DEFINITIONS, RULES and VARIANTS below say in one line each what a number counts.

Scoring is integer counting per record; percentages are formed once, at the end, without rounding.
Batches are built from the whole split and dealt to the processes whole, so the texts, and with them
the counts, do not depend on how many processes there are.

In this order: counts, matching, scoring, table, decoding, files, one system, systems side by side,
costs, routing, replay, pictures of runs, answering examples, picture of one example, export, the
command.  Nothing up to "systems side by side" needs what follows it: a reader of the scores can
stop there.

Shapes: B rows, S source, T target and V visual tokens, D model width, E experts, R universal and
r task rank, F image-feature width.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import numpy
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

import clorae
import data
import losses
import vision
from data import UNITS, DataError, Dataset, Example, Item, Record, Tokenizer
from t5 import T5, Attention, RMSNorm, T5Config, hf_names
from vision import UMIE, FeatureCache, ViT, load_image, resolve_image

if TYPE_CHECKING:
    import train  # imports this file; at run time only the functions that need it do the same

IOU_MATCH = 0.5  # M2E2: an object argument is right from this overlap on
RESAMPLES = 1000  # of the test records, for the interval of a difference

ENTITY = "entity (type, first token, last token), multiset per tweet"
RELATION = "relation label of the given pair; none counts neither as found nor as gold"
DEFINITIONS = {
    "T15": ENTITY, "T17": ENTITY, "SNAP": ENTITY, "V1": RELATION, "V2": RELATION,
    "MED": "event (type, trigger span), or (type, whole image)",
    "MEAE": f"argument (type, role, span), or (type, role, box) one-to-one at IoU >= {IOU_MATCH}",
}
RULES = {
    "F1, P, R": "micro-averaged over records, in %, from whole counts, never rounded before they "
                "are printed; 0/0 = 0",
    "F1 UMIE": "UMIE's rule: strings instead of places, (type, string), (type, role, string) with "
               "O1, O2 ... for objects, relation labels with none; a gold string is found once it "
               "is predicted at all, an unreadable relation is no prediction, and P, R, F1 are "
               "rounded to 4 digits",
    "accuracy": "relations answered right, none included, an unreadable answer read as none",
    "wrong type": "a gold and a predicted item at one place (equal spans, boxes at IoU >= "
                  f"{IOU_MATCH}, or the given pair) whose types or roles differ",
    "boundary": "a gold and a predicted item of one type and role whose spans or boxes overlap "
                "without being right; one to one, after the rows above, so that gold = tp + wrong "
                "type + boundary + missed and pred = tp + wrong type + boundary + spurious",
    "malformed": "unparsable pieces of output: not scored, no part of pred",
    "missing": "rows whose image file was not there",
}
VARIANTS = {
    "once": "M2E2 with every (sentence, event) and every image counted once, in the first of its "
            "pairs",
    "accepted": "M2E2 with predictions that are right for the sentence's other events left out: "
                "neither right nor wrong",
}


# ---------------------------------------------------------------------------------------- counts

def percent(part: int, whole: int) -> float:
    """100 part / whole, and 0 when there is nothing to score."""
    return 100.0 * part / whole if whole else 0.0


@dataclass(frozen=True)
class Counts:
    """Integers that add up over records, datasets and processes."""

    tp: int = 0  # predicted items that are in the gold
    pred: int = 0
    gold: int = 0
    malformed: int = 0  # pieces of output that are no item; reported, never scored
    correct: int = 0  # rows answered exactly; for relations, the numerator of accuracy
    rows: int = 0
    missing: int = 0  # rows that name an image which was not there
    wrong_type: int = 0  # pairs of a gold and a predicted item, see `count`
    boundary: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(vars(self).values(), vars(other).values())))

    @property
    def precision(self) -> float:
        return percent(self.tp, self.pred)

    @property
    def recall(self) -> float:
        return percent(self.tp, self.gold)

    @property
    def f1(self) -> float:
        return percent(2 * self.tp, self.pred + self.gold)

    @property
    def accuracy(self) -> float:
        return percent(self.correct, self.rows)

    @property
    def missed(self) -> int:
        """Gold items in no pair of any kind."""
        return self.gold - self.tp - self.wrong_type - self.boundary

    @property
    def spurious(self) -> int:
        """Predicted items in no pair of any kind."""
        return self.pred - self.tp - self.wrong_type - self.boundary

    @property
    def rounded_f1(self) -> float:
        """F1 as UMIE prints it: P and R are fractions of 4 digits before F1 is, and F1 again."""
        p, r = (round(self.tp / whole, 4) if whole else 0.0 for whole in (self.pred, self.gold))
        return 100 * round(2 * p * r / (p + r), 4) if p + r else 0.0


# By unit, "MEAE"; by unit, a mark and a part of it: its dataset "MEAE@swig", its items in the text
# "MEAE/text", one type "MEAE:attack:target", another rule of counting "MEAE~umie".
Scores = dict[str, Counts]


def parts(scores: Scores, unit: str, mark: str) -> Scores:
    """The parts of a unit that stand behind `mark`, sorted by their own names."""
    return {name.removeprefix(unit + mark): scores[name] for name in sorted(scores)
            if name.startswith(unit + mark)}


def unit_f1(scores: Scores) -> dict[str, float]:
    """F1 in % of each unit: the s of Eq. (9).

    Where several datasets share a unit (ACE2005 and SWiG both train MED), it is the mean of their
    F1, so that the larger one does not speak for both.
    """
    each = {unit: parts(scores, unit, "@").values() for unit in UNITS}
    return {unit: sum(counts.f1 for counts in some) / len(some)
            for unit, some in each.items() if some}


# -------------------------------------------------------------------------------------- matching

def kind(item: Item) -> str:
    """Entity type, relation, event type, or event type and role: what per-type scores go by."""
    return item.label if item.role is None else f"{item.label}:{item.role}"


def overlap(a: Item, b: Item) -> float:
    """IoU of two boxes or of two token spans; 1 if both are the whole image; else 0."""
    if a.box and b.box:
        return data.iou(a.box, b.box)
    if a.span and b.span:
        both = max(min(a.span[1], b.span[1]) - max(a.span[0], b.span[0]), 0)
        return both / (a.span[1] - a.span[0] + b.span[1] - b.span[0] - both)
    return float(a.whole_image and b.whole_image)


def same_place(a: Item, b: Item) -> bool:
    """Equal spans, boxes of enough overlap, or the whole image; what was not found is nowhere."""
    return overlap(a, b) >= (IOU_MATCH if a.box else 1)


def right(gold: Item, predicted: Item) -> bool:
    """One type and role, one place."""
    return kind(gold) == kind(predicted) and same_place(gold, predicted)


def inexact(gold: Item, predicted: Item) -> bool:
    """One type and role, places that overlap."""
    return kind(gold) == kind(predicted) and overlap(gold, predicted) > 0


def pair_off(gold: list[Item], predicted: list[Item], fits: Callable[[Item, Item], bool]) -> int:
    """Take the pairs that fit out of both lists and return their number.

    Pairs are one to one, those of the largest overlap first.  (The official M2E2 scorer lets two
    predictions match one gold box.)
    """
    pairs = sorted((-overlap(g, p), i, j) for i, g in enumerate(gold)
                   for j, p in enumerate(predicted) if fits(g, p))
    used_gold, used_predicted = set(), set()
    for _, i, j in pairs:
        if i not in used_gold and j not in used_predicted:
            used_gold.add(i)
            used_predicted.add(j)
    gold[:] = [item for i, item in enumerate(gold) if i not in used_gold]
    predicted[:] = [item for j, item in enumerate(predicted) if j not in used_predicted]
    return len(used_gold)


def count(task: str, gold: Sequence[Item], predicted: Sequence[Item], malformed: int = 0) -> Counts:
    """Counts of one record; `malformed` is what the parser could not use of its output.

    Every item falls into the first class that takes it: right, wrong type, wrong boundary (see
    RULES).  Gold items that are left over are missed, predicted ones are spurious.
    """
    gold, predicted = list(gold), list(predicted)
    if task == "mre":  # none is no relation; the others share one place, as if it were an image
        gold, predicted = ([dataclasses.replace(item, whole_image=True) for item in items
                            if item.label != "none"] for items in (gold, predicted))
    sizes = len(predicted), len(gold)
    tp = pair_off(gold, predicted, right)
    return Counts(tp, *sizes, malformed, correct=int(sizes == (tp, tp)), rows=1,
                  wrong_type=pair_off(gold, predicted, same_place),
                  boundary=pair_off(gold, predicted, inexact))


def count_umie(task: str, gold: Sequence[Item], predicted: Sequence[Item],
               malformed: int = 0) -> Counts:
    """Counts of one record by UMIE's rule (see RULES), for `Counts.rounded_f1`.

    A predicted string is right as often as the gold has it.  A gold string that occurs nowhere in
    the prediction is missed, and `gold` is tp + missed: UMIE divides by that for its recall.
    """
    if task == "mre" and malformed:  # the parser reads it as "none"
        predicted = []
    wanted, found = (Counter((kind(item), item.text and data.canon(item.text)) for item in items)
                     for items in (gold, predicted))
    tp = (wanted & found).total()
    missed = sum(number for string, number in wanted.items() if string not in found)
    return Counts(tp, found.total(), tp + missed, rows=1)


# --------------------------------------------------------------------------------------- scoring

@dataclass(frozen=True)
class Answer:
    """What the model wrote for one record, before it is read."""

    text: str
    cut: bool = False  # it reached the length limit, so its last item may be incomplete
    missing: bool = False  # the record names an image, and the model was shown none
    ids: tuple[int, ...] = ()  # the same, with eos


@dataclass(frozen=True)
class Row:
    """One scored record."""

    record: Record
    unit: str
    answer: Answer
    gold: list[Item]
    predicted: list[Item]
    counts: Counts
    parts: Scores = field(default_factory=dict)  # see `breakdown`


def score_rows(records: Sequence[Record], answers: Sequence[Answer],
               datasets: Mapping[str, Dataset]) -> list[Row]:
    """Parse and score one answer per record.

    The string of an argument is mapped to its occurrence nearest to the trigger that the same run
    predicted for the same sentence-image pair, never to the gold trigger: triggers come first.
    """
    triggers: dict[tuple[str, str], dict[str, int]] = {}  # pair: {event type: start of the first}
    rows: dict[int, Row] = {}
    given = list(zip(records, answers, strict=True))
    for i in sorted(range(len(given)), key=lambda i: records[i].task == "meae"):
        record, answer = given[i]
        pair = record.dataset, record.id.rsplit("/", 1)[0]  # ids are PAIR/med and PAIR/meae
        dataset, known = datasets[record.dataset], triggers.setdefault(pair, {})
        predicted, malformed = data.predicted_items(record, answer.text, dataset, known, answer.cut)
        if record.task == "med":
            for item in predicted:
                if item.span is not None:
                    known.setdefault(item.label, item.span[0])
        gold = data.gold_items(record)
        counts = count(record.task, gold, predicted, malformed)
        rows[i] = Row(record, dataset.units[record.task], answer, gold, predicted,
                      counts + Counts(missing=int(answer.missing)),
                      breakdown(record.task, gold, predicted, malformed))
    return [rows[i] for i in range(len(rows))]


def breakdown(task: str, gold: list[Item], predicted: list[Item], malformed: int) -> Scores:
    """One record's counts by UMIE's rule, by type and, of arguments, apart for text and image."""
    def share(belongs: Callable[[Item], bool]) -> Counts:
        return count(task, list(filter(belongs, gold)), list(filter(belongs, predicted)))

    found = {"~umie": count_umie(task, gold, predicted, malformed)}
    for name in sorted({kind(item) for item in (*gold, *predicted)} - {"none"}):
        found[f":{name}"] = share(lambda item: kind(item) == name)
    if task == "meae":
        found |= {"/text": share(lambda item: not is_object(item)), "/object": share(is_object)}
    return found


def is_object(item: Item) -> bool:
    """Whether an argument is a box, or names an object by number, existing or not."""
    return item.box is not None or item.object is not None


def total(rows: Sequence[Row]) -> Scores:
    """Sum the rows per unit and per part of a unit."""
    scores: Scores = {}
    for row in rows:
        mine = {"": row.counts, f"@{row.record.dataset}": row.counts, **row.parts}
        for part, counts in mine.items():
            scores[row.unit + part] = scores.get(row.unit + part, Counts()) + counts
    return scores | m2e2_variants(rows)


def m2e2_variants(rows: Sequence[Row]) -> Scores:
    """Events by the rules of VARIANTS, each where there is a row that it concerns."""
    scores = {}
    for unit in ("MEAE", "MED"):
        mine = [row for row in rows if row.unit == unit]
        if any(row.record.accepted for row in mine):
            scores[f"{unit}~accepted"] = sum(map(count_accepted, mine), Counts())
        if any(m2e2_sentence(row.record) for row in mine):
            scores[f"{unit}~once"] = count_once(mine)
    return scores


def m2e2_sentence(record: Record) -> str | None:
    """The sentence of a record whose id is SENTENCE+IMAGE/TASK, as those of M2E2 are."""
    rest = f"+{record.image}/{record.task}"
    return record.id.removesuffix(rest) if record.id.endswith(rest) else None


def count_once(rows: Sequence[Row]) -> Counts:
    """Counts of one unit without what an earlier row has shown: items in the text belong to
    (sentence, gold events), those in the image to the image."""
    counts, seen = Counts(), set()
    for row in rows:
        record, sentence = row.record, m2e2_sentence(row.record)
        events = repr([(event["type"], event["trigger"]) for event in record.events])
        text = (record.dataset, sentence or record.id, events)
        image = (record.dataset, record.image if sentence else record.id)
        new_text, new_image = text not in seen, image not in seen
        gold, predicted = ([item for item in items
                            if (new_image if is_object(item) else new_text)]
                           for items in (row.gold, row.predicted))
        counts += count(record.task, gold, predicted)
        seen |= {text, image}
    return counts


def count_accepted(row: Row) -> Counts:
    """tp, pred and gold of a row without the predictions that are wrong by its gold, but right by
    `record.accepted`."""
    wrong = list(row.predicted)
    pair_off(list(row.gold), wrong, right)  # takes out what is right
    other = dataclasses.replace(row.record, events=row.record.accepted)
    excused = pair_off(data.gold_items(other), wrong, right)
    return Counts(row.counts.tp, row.counts.pred - excused, row.counts.gold)


# ----------------------------------------------------------------------------------------- table

COUNTED = ("tp", "pred", "gold", "wrong_type", "boundary", "missed", "spurious", "malformed",
           "rows", "missing")


def table(scores: Scores, datasets: Mapping[str, Dataset] | None = None) -> str:
    """The paper's seven columns, their sum, and below what each number counts.

    datasets: whose notes to print below, for those that have rows.
    """
    present = [unit for unit in UNITS if unit in scores]
    rates = {"F1": {unit: scores[unit].f1 for unit in present},
             "P": {unit: scores[unit].precision for unit in present},
             "R": {unit: scores[unit].recall for unit in present},
             "F1 UMIE": {unit: scores[f"{unit}~umie"].rounded_f1 for unit in present},
             "accuracy": {unit: scores[unit].accuracy for unit in present
                          if data.UNIT_TASK[unit] == "mre"}}
    lines = [f"{'':10}" + "".join(f"{name:>8}" for name in UNITS) + f"{'All':>9}{'mean':>8}"]
    for name, cells in rates.items():
        if cells:
            summed = sum(cells.values())
            ends = f"{summed:9.2f}{summed / len(cells):8.2f}" if name.startswith("F1") else ""
            lines.append(table_row(name, cells, ".2f") + ends)
    for name in COUNTED:
        cells = {unit: getattr(scores[unit], name) for unit in present}
        lines.append(table_row(name.replace("_", " "), cells, "d") + f"{sum(cells.values()):9d}")
    return "\n".join([*lines, "", *legend(scores), *notes(scores, datasets or {})])


def table_row(name: str, cells: Mapping[str, float], form: str) -> str:
    """One line of the table, with "-" in the columns that have no rows."""
    return f"{name:10}" + "".join(f"{cells[u]:8{form}}" if u in cells else f"{'-':>8}"
                                  for u in UNITS)


def legend(scores: Scores) -> list[str]:
    """What each column counts, its parts, and by which rule each row is computed."""
    present = [unit for unit in UNITS if unit in scores]
    lines = []
    for unit in present:
        datasets = parts(scores, unit, "@")
        shown = [f"{name} only F1 {c.f1:.2f}" for name, c in parts(scores, unit, "/").items()]
        if len(datasets) > 1:
            shown += [f"{name} F1 {c.f1:.2f}" for name, c in datasets.items()]
        lines.append(f"{unit:5}{DEFINITIONS[unit]}" + (f" ({', '.join(shown)})" if shown else ""))
    lines.append(f"All  sum of the F1 of {len(present)} of {len(UNITS)} columns, as in the paper")
    lines += [f"{name}: {rule}" for name, rule in RULES.items()]
    return lines + [
        f"{unit} {name}: F1 {c.f1:.2f}, P {c.precision:.2f}, R {c.recall:.2f} (tp {c.tp}, pred "
        f"{c.pred}, gold {c.gold}): {VARIANTS[name]}"
        for unit in present for name, c in parts(scores, unit, "~").items() if name in VARIANTS]


def notes(scores: Scores, datasets: Mapping[str, Dataset]) -> list[str]:
    """What a reader of these scores must know of their data."""
    used = {name for unit in UNITS for name in parts(scores, unit, "@")}
    lines = [f"note on {name}: {dataset.note}" for name, dataset in datasets.items()
             if name in used and dataset.note]
    whole = sum((scores[unit] for unit in UNITS if unit in scores), Counts())
    if whole.missing:
        lines.append(f"note on images: {whole.missing} of {whole.rows} rows were answered without "
                     "their image, whose file was not there")
    return lines


def type_table(scores: Scores) -> str:
    """P, R, F1 and counts of every type: entity type, relation, event type, event type:role."""
    lines = [f"{'':5}{'type':40}{'F1':>8}{'P':>8}{'R':>8}{'tp':>7}{'pred':>7}{'gold':>7}"]
    lines += [f"{unit:5}{name:40}{c.f1:8.2f}{c.precision:8.2f}{c.recall:8.2f}{c.tp:7}{c.pred:7}"
              f"{c.gold:7}" for unit in UNITS for name, c in parts(scores, unit, ":").items()]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with straight columns, the first to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [row[0].ljust(widths[0]) + "".join(cell.rjust(width + 2) for cell, width
                                              in zip(row[1:], widths[1:])) for row in rows]


# -------------------------------------------------------------------------------------- decoding

class Features(Protocol):
    """Image features: features(record) -> ([V,F], boxes [V,5]), or None without an image."""

    width: int  # F

    def __call__(self, record: Record) -> tuple[Tensor, Tensor] | None: ...


@dataclass(frozen=True)
class Decoding:
    """How answers are generated; greedy unless beams > 1."""

    batch_size: int = 32
    beams: int = 1
    max_new_tokens: int = 192
    precision: str = "fp32"  # "bf16": under autocast

    @classmethod
    def of(cls, config: "train.Config", batch_size: int = 32, beams: int = 1) -> "Decoding":
        return cls(batch_size, beams, config.max_target, config.precision)


def deal(lengths: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This process' batches, as positions into `lengths`.

    The batches are those of the whole split, longest rows first, whatever the number of processes;
    process r takes batches r, r + world, ...
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::world]


@torch.inference_mode()
def generate_answers(model: nn.Module, examples: Sequence[Example], features: Features,
                     tokenizer: Tokenizer, device: torch.device, decoding: Decoding = Decoding(),
                     rank: int = 0, world: int = 1) -> list[Answer]:
    """Answers, one per example and all of them on every process.

    Each process fills in the rows of its own batches and leaves the others at zero, so that one sum
    over the processes completes them.
    """
    banned = tokenizer.undecodable(model.t5.config.vocab_size)
    position = {example.row: i for i, example in enumerate(examples)}
    # the ids of each answer, and in the last column 1 where an image was named but not shown
    answers = torch.zeros(len(examples), decoding.max_new_tokens + 1, dtype=torch.long)
    batches = deal([len(e.input_ids) for e in examples], decoding.batch_size, rank, world)
    was_training = model.training
    model.eval()
    quiet = rank > 0 or len(batches) < 2
    for chosen in tqdm(batches, desc="decoding", unit="batch", disable=quiet, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=decoding.precision == "bf16"):
            ids = model.generate(batch, decoding.max_new_tokens, num_beams=decoding.beams,
                                 banned_ids=banned)
        places = [position[row] for row in batch.rows.tolist()]
        answers[places, :ids.shape[1]] = ids.cpu()
        named = torch.tensor([examples[i].record.image is not None for i in places])
        answers[places, -1] = (named & ~batch.visual_mask.any(dim=1).cpu()).long()
    model.train(was_training)
    if world > 1:
        answers = answers.to(device)  # where the process group's backend expects it
        dist.all_reduce(answers)
    return [read_answer(ids, bool(missing), tokenizer) for *ids, missing in answers.tolist()]


def read_answer(ids: list[int], missing: bool, tokenizer: Tokenizer) -> Answer:
    """The ids that were generated, padding included, as text."""
    cut = tokenizer.eos_id not in ids
    ids = ids if cut else ids[:ids.index(tokenizer.eos_id) + 1]
    return Answer(tokenizer.decode(ids), cut, missing, tuple(ids))


def evaluate_split(model: nn.Module, examples: Sequence[Example], datasets: Mapping[str, Dataset],
                   features: Features, tokenizer: Tokenizer, device: torch.device,
                   decoding: Decoding = Decoding(), rank: int = 0, world: int = 1) -> list[Row]:
    """Decode and score a split; every process returns the same rows.  `total` sums them."""
    answers = generate_answers(model, examples, features, tokenizer, device, decoding, rank, world)
    return score_rows([example.record for example in examples], answers, datasets)


# ----------------------------------------------------------------------------------------- files

def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vision.write_whole(path, text.encode())


def save_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Write rows under the names of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def save_predictions(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per row."""
    lines = [{"id": row.record.id, "dataset": row.record.dataset, "task": row.record.task,
              "unit": row.unit, "gold": data.target(row.record), "text": row.answer.text,
              "cut": row.answer.cut, "predicted_items": items_json(row.predicted),
              "gold_items": items_json(row.gold), "malformed": row.counts.malformed,
              "missing_image": bool(row.counts.missing), "tp": row.counts.tp,
              "pred": row.counts.pred, "n_gold": row.counts.gold} for row in rows]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def items_json(items: Sequence[Item]) -> list[dict]:
    """Items as JSON objects without their empty fields; only arguments belong to an event."""
    return [{name: value for name, value in dataclasses.asdict(item).items()
             if value is not None and value is not False and (name != "event" or item.role)}
            for item in items]


def save_scores(path: Path, rows: Sequence[Row], checkpoint: Path, config: "train.Config",
                split: str, decoding: Decoding | None = None) -> None:
    """Write what was scored, by which rules and with which result, as one JSON object.

    "made_from" is what the scores depend on; "scores" has the keys of `Scores`; "records" holds
    [tp, pred, gold] of every record, for comparing two systems on the same ones.
    """
    corpus, scores = corpus_of(config), total(rows)
    records: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        records.setdefault(row.unit, {})[f"{row.record.dataset}/{row.record.id}"] = [
            row.counts.tp, row.counts.pred, row.counts.gold]
    report = {"made_from": made_from(checkpoint, config, split, decoding or Decoding.of(config)),
              "data": str(corpus), "notes": notes(scores, data.load_datasets(corpus)),
              "scores": {name: counts_json(name, counts) for name, counts in scores.items()},
              "records": records}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                       for key, value in report.items())
    write_whole(path, f"{{{lines}}}\n")


def counts_json(name: str, counts: Counts) -> dict[str, float]:
    """One entry of `Scores` as JSON; only whole units have classes of errors."""
    if name.endswith("~umie"):
        return {"tp": counts.tp, "pred": counts.pred, "gold": counts.gold, "f1": counts.rounded_f1}
    shown = ["tp", "pred", "gold", "f1", "precision", "recall"]
    if name in UNITS:
        shown += COUNTED[3:]
    if data.UNIT_TASK.get(name) == "mre":
        shown.append("accuracy")
    return {value: getattr(counts, value) for value in shown}


def made_from(checkpoint: Path, config: "train.Config", split: str, decoding: Decoding) -> dict:
    """Everything that scores depend on, as JSON; equal for two that need not be made twice."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return {"checkpoint": state["sha256"]["model.safetensors"], "split": split,
            "data": split_digest(corpus_of(config), split),
            "units": list(config.units) if config.units else None,
            "missing_images": config.missing_images, "decoding": dataclasses.asdict(decoding),
            "definitions": {**DEFINITIONS, **RULES, **VARIANTS}}


def corpus_of(config: "train.Config") -> Path:
    """The corpus that settings name, else the demo world."""
    return Path(config.data or "data/demo")


def split_digest(corpus: Path, split: str) -> str:
    """sha256 over the files of a split and the names of the images that are there."""
    digest = hashlib.sha256()
    for path in sorted([*corpus.glob("*/dataset.json"), *corpus.glob(f"*/{split}.jsonl")]):
        digest.update(path.read_bytes())
    images = sorted(str(path.relative_to(corpus)) for path in corpus.glob("*/images/**/*"))
    digest.update("\n".join(images).encode(errors="surrogateescape"))
    return digest.hexdigest()


def still_true(path: Path, wanted: dict) -> bool:
    """Whether the scores in a file were made from exactly what is wanted."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["made_from"] == wanted
    except (OSError, ValueError, TypeError, KeyError):
        return False  # none, or not whole: they will be made


# ------------------------------------------------------------------------------------ one system

def changed(args: argparse.Namespace) -> dict:
    """The stored settings that the command line replaces; all units unless it names some."""
    given = {name: getattr(args, name)
             for name in ("data", "missing_images", "impl", "graphs", "t5", "vit", "init")}
    return {n: value for n, value in given.items() if value is not None} | {"units": args.units}


@dataclass(frozen=True)
class Job:
    """A checkpoint to be scored on a split."""

    folder: Path  # as it was named
    checkpoint: Path
    changes: dict  # to the stored settings
    config: "train.Config"  # the settings with these changes
    split: str
    decoding: Decoding
    predictions: Path  # the file for them; the scores are written beside it

    @classmethod
    def of(cls, folder: Path, args: argparse.Namespace) -> "Job":
        import train
        checkpoint, changes = train.find_checkpoint(folder), changed(args)
        config = train.stored_config(checkpoint, **changes)
        out = args.out or folder / f"predictions-{args.split}.jsonl"
        if out.is_dir():
            raise train.UsageError(f"--out {out}: expected a file to be written, got a folder; "
                                   "name a file in it")
        return cls(folder, checkpoint, changes, config, args.split,
                   Decoding.of(config, args.batch_size, args.beams), out)

    @property
    def scores(self) -> Path:
        name = self.predictions.stem.removeprefix("predictions-")
        return self.predictions.with_name(f"scores-{name}.json")

    @cached_property
    def made_from(self) -> dict:
        return made_from(self.checkpoint, self.config, self.split, self.decoding)

    def load(self, world: "train.World") -> tuple["train.Setup", list[Example]]:
        """The model and the examples of the split."""
        import train
        setup = train.load_model(self.checkpoint, world.device, **self.changes)
        return setup, self.examples(setup, self.split, world)

    def examples(self, setup: "train.Setup", split: str, world: "train.World") -> list[Example]:
        records = data.load_corpus(setup.sources.corpus, split, self.config.units)
        return data.encode_records(records, setup.datasets, setup.tokenizer,
                                   self.config.max_source, self.config.max_target, world.print)

    def features(self, setup: "train.Setup", examples: Sequence[Example],
                 world: "train.World") -> "train.Features":
        import train
        return train.Features(setup.sources, [e.record for e in examples],
                              self.config.missing_images, self.config.max_objects, world.device)

    def score(self, world: "train.World") -> tuple[Scores, dict[str, Dataset]]:
        """Decode and score; write predictions and scores.

        Returns the scores, the same on every process, and the descriptors of the datasets.
        """
        setup, examples = self.load(world)
        features = self.features(setup, examples, world)
        world.join()
        rows = evaluate_split(setup.model, examples, setup.datasets, features, setup.tokenizer,
                              world.device, self.decoding, world.rank, world.size)
        if world.main:
            save_predictions(self.predictions, rows)
            save_scores(self.scores, rows, self.checkpoint, self.config, self.split, self.decoding)
        return total(rows), setup.datasets


def score_one(args: argparse.Namespace, world: "train.World") -> None:
    """Score one checkpoint and print its table."""
    job = Job.of(args.checkpoint[0], args)
    scores, datasets = job.score(world)
    world.print(f"{job.folder}, {job.split} split of {corpus_of(job.config)}, "
                f"{'greedy' if args.beams == 1 else f'{args.beams} beams'}; predictions: "
                f"{job.predictions}, scores: {job.scores}", table(scores, datasets))
    if args.details:
        world.print("", type_table(scores))


# ------------------------------------------------------------------------- systems side by side

def system_names(configs: Sequence["train.Config"]) -> list[str]:
    """Method and options of each run, as far as the runs differ in them, seed and folder apart.

    An option at its default for the method and size is not named; names differ where settings do.
    """
    import train
    fields = [spec.name for spec in dataclasses.fields(train.Config)
              if spec.name not in ("method", "seed", "out", "save_every")
              and len({repr(getattr(config, spec.name)) for config in configs}) > 1]
    names = []
    for config in configs:
        usual = train.Config(size=config.size, method=config.method).resolved()
        words = [config.method]
        for name in fields:
            value, flag = getattr(config, name), name.replace("_", "-")
            if value is None or value == getattr(usual, name) and name != "size":
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, (list, tuple)) else [value]
                words += [f"--{flag}", *map(str, values)]
        names.append(" ".join(words))
    return names


COLUMNS = (*UNITS, "All", "mean")
COMPARISON = (
    "All, mean: sum and mean of a system's columns; +-: sample standard deviation over its seeds, "
    "below the mean over them",
    "TP: trainable parameters, those of the visual adapter and of L_MIM included",
    "vs first: difference to the first system in the mean of the columns that both have, and its "
    f"95 % bootstrap interval: {RESAMPLES:,} times the records of each column are drawn anew, the "
    "same for both, and the seeds of each system; where a system has one seed, the interval leaves "
    "out what another seed would change, and is too narrow",
)


@dataclass
class System:
    """Runs that differ only in their seed, so they are scored on the same units."""

    name: str
    config: "train.Config"  # of the first seed
    trainable: int  # parameters
    reports: list[dict] = field(default_factory=list)  # scores-SPLIT.json of each seed

    def columns(self) -> dict[str, list[float]]:
        """F1 of every unit, their sum and their mean: one value per seed."""
        f1 = {unit: [report["scores"][unit]["f1"] for report in self.reports]
              for unit in UNITS if unit in self.reports[0]["scores"]}
        sums = list(map(sum, zip(*f1.values())))
        return {**f1, "All": sums, "mean": [whole / len(f1) for whole in sums]}


def collect(jobs: Sequence[Job], names: Sequence[str]) -> list[System]:
    """The jobs' scores, read from their files, by system in the order of the command line."""
    systems: dict[str, System] = {}
    for job, name in zip(jobs, names):
        with safe_open(job.checkpoint / "model.safetensors", "pt") as file:
            trainable = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
        report = json.loads(job.scores.read_text(encoding="utf-8"))
        systems.setdefault(name, System(name, job.config, trainable)).reports.append(report)
    return list(systems.values())


def draws(random: numpy.random.Generator, n: int) -> numpy.ndarray:
    """How often each of n things is drawn in n draws with replacement, [1 + RESAMPLES, n].

    The first row draws each of them once: it gives the figure itself.
    """
    drawn = random.multinomial(n, numpy.full(n, 1 / n), RESAMPLES)
    return numpy.vstack([numpy.ones_like(drawn[:1]), drawn])


def resampled_f1(system: System, unit: str, ids: Sequence[str], records: numpy.ndarray,
                 seeds: numpy.ndarray) -> numpy.ndarray:
    """F1 in % of a unit, mean over the seeds, under `draws` of the records `ids` and of the seeds
    -> [1 + RESAMPLES]."""
    counts = numpy.array([[report["records"][unit][i] for i in ids] for report in system.reports])
    tp, pred, gold = numpy.moveaxis(records @ counts, -1, 0)  # each [seeds, 1 + RESAMPLES]
    f1 = 200 * tp / numpy.maximum(pred + gold, 1)
    return (seeds.T * f1).sum(axis=0) / len(f1)


def difference(first: System, other: System) -> tuple[float, float, float] | None:
    """other - first in the mean of the columns they share, and its bootstrap 95 % interval.

    Drawn with replacement are the records of each column, alike for both systems, and the seeds of
    each system, alike for all columns; without the seeds, two runs of one system would differ
    "significantly".  A record that one side lacks is left out.  None where nothing is shared.
    """
    random, deltas = numpy.random.default_rng(0), []
    seeds = [draws(random, len(system.reports)) for system in (first, other)]
    for unit in UNITS:
        sides = [report["records"].get(unit, {}) for system in (first, other)
                 for report in system.reports]
        ids = sorted(set.intersection(*map(set, sides)))
        if ids:
            records = draws(random, len(ids))
            deltas.append(resampled_f1(other, unit, ids, records, seeds[1])
                          - resampled_f1(first, unit, ids, records, seeds[0]))
    if not deltas:
        return None
    delta = numpy.mean(deltas, axis=0)
    return float(delta[0]), *map(float, numpy.percentile(delta[1:], (2.5, 97.5)))


def comparison_line(system: System, first: System) -> dict:
    """What the table and the CSV file say about a system; None where there is nothing to say."""
    line, cells = {"system": system.name}, system.columns()
    for name in COLUMNS:
        seeds = cells.get(name, [])
        line[name] = fmean(seeds) if seeds else None
        line[f"{name} sd"] = stdev(seeds) if len(seeds) > 1 else None
    found = None if system is first else difference(first, system)
    return {**line, "TP": system.trainable / 1e6, "seeds": len(system.reports),
            **dict(zip(("difference", "low", "high"), found or (None,) * 3))}


def comparison_table(lines: Sequence[dict]) -> str:
    """The systems as text, standard deviations below their means."""
    def cells(line: dict, end: str, empty: str) -> str:
        return "".join(f"{empty:>8}" if line[name + end] is None else f"{line[name + end]:8.2f}"
                       for name in COLUMNS)

    width = max(len(line["system"]) for line in lines) + 2
    text = [f"{'':{width}}{''.join(f'{name:>8}' for name in COLUMNS)}{'TP':>9}  seeds  vs first"]
    for line in lines:
        text.append(f"{line['system']:{width}}{cells(line, '', '-')}{line['TP']:8.2f}M"
                    f"{line['seeds']:7}")
        if line["difference"] is not None:
            text[-1] += "  {difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**line)
        if line["seeds"] > 1:
            text.append(f"{'+-':>{width}}{cells(line, ' sd', '')}")
    return "\n".join(text)


def comparison_legend(systems: Sequence[System]) -> list[str]:
    """By which rules the numbers of a comparison are made, and the notes on their data."""
    units = [unit for unit in UNITS if unit in systems[0].reports[0]["scores"]]
    said = {note for system in systems for report in system.reports for note in report["notes"]}
    return [*(f"{unit:5}{DEFINITIONS[unit]}" for unit in units), f"F1: {RULES['F1, P, R']}",
            *COMPARISON, *sorted(said)]


def refresh(jobs: Sequence[Job], world: "train.World") -> None:
    """Score the runs whose stored scores, if there are any, are not of this very checkpoint, split,
    data and decoding.  All processes look before any of them writes."""
    stored = [still_true(job.scores, job.made_from) for job in jobs]
    for job, known in zip(jobs, stored):
        world.print(f"{job.checkpoint}: " + (f"scores of {job.scores}" if known else "decoding"))
        if not known:
            job.score(world)


def compare(args: argparse.Namespace, world: "train.World") -> None:
    """Print several systems side by side, and what they differ by; --csv writes it, too."""
    import train
    jobs = [Job.of(folder, args) for folder in args.checkpoint]
    names = system_names([job.config for job in jobs])
    runs = [(name, job.config.seed) for name, job in zip(names, jobs)]
    twice = next((run for run in runs if runs.count(run) > 1), None)
    if twice:
        raise train.UsageError("checkpoints: expected runs that differ in a setting or the seed, "
                               f"got two of {twice[0]} with seed {twice[1]}; name one of them")
    if len({job.made_from["data"] for job in jobs}) > 1:
        raise train.UsageError("checkpoints: expected runs on one corpus, got "
                               f"{', '.join(str(corpus_of(job.config)) for job in jobs)}, which "
                               "differ; name one for all with --data DIR")
    refresh(jobs, world)
    if world.main:
        systems = collect(jobs, names)
        lines = [comparison_line(system, systems[0]) for system in systems]
        world.print(f"{args.split} split", comparison_table(lines), "",
                    *comparison_legend(systems))
        if args.csv:
            save_csv(args.csv, lines)


# -------------------------------------------------------------------------------------------- costs
# What a method costs: parameters and FLOPs, Table 5.

# flan-t5: model width D, feed-forward width, layers of the encoder and of the decoder, heads
GEOMETRY = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32)}
# method as it is printed: options of clorae.adapt
COSTED = {"full": {}, "lora": {}, "moslora": {}, "loramoe": {}, "clorae": {}, "tlora": {},
          "clorae --no-egr": {"egr": False}, "clorae --no-mim": {"mim": False}}
VISUAL_POLICIES = ("frozen", "paper", "train")  # of train.Config, each adding to the one before
# Table 5 (arXiv 2505.06303v1, HTML): TP in millions, GFLOPs of fwd and of fwd + bwd.
PAPER_COSTS = {
    "base": {"full": (287.0, 21.3, 63.8), "lora": (15.5, 22.0, 65.9), "moslora": (15.8, 26.3, 78.9),
             "loramoe": (30.5, 22.7, 68.2), "clorae": (30.4, 23.2, 69.5)},
    "large": {"full": (843.0, 73.2, 219.0), "lora": (20.3, 74.1, 223.4),
              "moslora": (20.4, 89.1, 267.3), "loramoe": (40.0, 75.2, 225.5),
              "clorae": (39.9, 75.7, 227.2)}}
PAPER_LENGTHS = (95, 1, 21)  # source, target, visual tokens that reproduce its figures of "full"
UMIE_FEATURES = 512  # F in UMIE


def passing(path: str) -> str:
    """The token stream that passes through a module of a UMIE: "memory", "target" or "visual"."""
    names = path.split(".")
    if names[0] == "visual_embedding" or names[0] == "fusion" and names[-1] in ("k", "v"):
        return "visual"
    return clorae.stream_of(path)


class FlopCounter:
    """FLOPs of one row of a UMIE: 2 per multiply-add of a matrix product, the rest is free.

    `backward` has one product for each gradient that is formed: that of a weight if it is trained,
    that of a linear's input if something below is trained.  `live` says of each token stream
    whether its hidden states need a gradient so far; so the walk follows the forward pass.  Experts
    count as their layer runs them: in rank space, one task of N.
    """

    def __init__(self, model: nn.Module, source: float, target: float, visual: float):
        embedded = model.t5.shared.weight.requires_grad
        self.tokens = {"memory": source, "target": target, "visual": visual}
        self.live = {"memory": embedded, "target": embedded, "visual": False}
        self.forward = self.backward = 0.0
        if visual:
            self.walk("visual_embedding", model.visual_embedding)
            self.walk("vstack", model.vstack)
            if model.fusion is None:
                self.tokens["memory"] += visual
                self.live["memory"] |= self.live["visual"]
        self.walk("encoder", model.t5.encoder)
        if visual and model.fusion is not None:
            self.walk("fusion", model.fusion)
        self.walk("decoder", model.t5.decoder)
        self.linear(model.t5.lm_head or model.t5.shared, target, self.live["target"])

    def walk(self, path: str, module: nn.Module) -> None:
        """Count what lies below a module, and note whether its stream is live behind it."""
        stream = passing(path)
        if isinstance(module, Attention):
            self.attention(path, module)
        elif isinstance(module, nn.Linear):
            tokens = 1 if path.startswith("fusion.proj_") else self.tokens[stream]  # reads a mean
            live = self.live[stream] and not path.startswith("visual_embedding")  # reads data
            self.live[stream] |= self.linear(module, tokens, live)
        elif isinstance(module, (RMSNorm, nn.Embedding)):
            self.live[stream] |= module.weight.requires_grad
        else:
            for name, child in module.named_children():
                self.walk(f"{path}.{name}", child)

    def attention(self, path: str, module: Attention) -> None:
        """q, k, v, o, and two products per head of forward: scores, and their mix of values."""
        query, source = passing(path + ".q"), passing(path + ".k")
        q, k, v = (self.linear(getattr(module, name), self.tokens[stream], self.live[stream])
                   for name, stream in (("q", query), ("k", source), ("v", source)))
        product = 2 * module.o.in_features * self.tokens[query] * self.tokens[source]
        self.forward += 2 * product
        self.backward += product * (q + k + v + (q or k))  # dQ, dK, dV, and dScores for either
        self.live[query] |= self.linear(module.o, self.tokens[query], q or k or v)

    def linear(self, module: nn.Module, tokens: float, live: bool) -> bool:
        """Count one linear with its experts; returns whether its output needs a gradient."""
        gate = getattr(module, "W_g", None) if hasattr(module, "A_T") else None
        for name, weight in module.named_parameters():
            leaf = name.split(".")[-1]
            if weight.dim() > 1:  # not the variance rho
                # A row meets one task of N; two gates that sum to 1 cost one product.
                shared = len(weight) if leaf in ("A_T", "B_T") or weight is gate else 1
                product = 2 * tokens * weight.numel() / shared
                below = live or leaf.startswith(("B", "M"))  # their input comes from a trained A
                self.forward += product
                self.backward += product * (weight.requires_grad + below)
        return live or any(weight.requires_grad for weight in module.parameters())


def mim_flops(model: nn.Module, lengths: Sequence[float]) -> tuple[float, float]:
    """FLOPs that L_MIM (clorae.stream_moments) adds to a training step, forward and backward: once
    for all rows of one task, and for each row of these lengths (source, target, visual)."""
    tokens = dict(zip(("memory", "target", "visual"), lengths))
    once = each = 0.0
    for layer in clorae.expert_layers(model).values():
        if hasattr(layer, "rho"):
            R, r = layer.B_U.shape[1], layer.B_T.shape[2]
            one = 4 * (R * R + R * r + r * r)  # a token, or a channel of the output
            once += one * len(layer.rho)
            each += one * tokens[layer.stream]
    return once, each


@dataclass(frozen=True)
class Geometry:
    """What the cost of a method depends on besides the method."""

    name: str
    t5: T5Config
    rank: int
    features: int  # F
    objects: int  # most object tokens of a row
    lengths: tuple[float, float, float]  # source, target, visual tokens of a row
    fusion: str = "gate"

    @classmethod
    def of_size(cls, size: str, rank: int, lengths: Sequence[int]) -> "Geometry":
        """flan-t5-SIZE with UMIE's image features."""
        import train
        if min(lengths[:2]) < 1 or lengths[2] < 0:
            raise train.UsageError("--lengths: expected source and target tokens, and visual ones "
                                   f"or 0, got {' '.join(map(str, lengths))}; correct them")
        D, hidden, layers, heads = GEOMETRY[size]
        t5 = T5Config(32128, D, 64, hidden, layers, heads, feed_forward_proj="gated-gelu",
                      tie_head=False, scale_logits=False)
        objects = max(16, lengths[2] - 1)
        return cls(f"flan-t5-{size}", t5, rank, UMIE_FEATURES, objects, tuple(lengths))

    @classmethod
    def of_run(cls, setup: "train.Setup", examples: Sequence[Example]) -> "Geometry":
        """A run's own backbone, fusion and rank, at the mean lengths of these rows."""
        import train
        config, tasks = setup.config, len(data.TASKS)
        if config.rank < tasks:
            raise train.UsageError(f"--costs: expected a run of rank {tasks} or more, one for each "
                                   f"task expert of the methods it is compared with, got rank "
                                   f"{config.rank}; name another run, or --size instead of one")
        most = config.max_objects
        visual = [1 + min(len(e.record.objects), most) for e in examples if e.record.image]
        sums = sum(len(e.input_ids) for e in examples), sum(len(e.labels) for e in examples)
        lengths = tuple(n / max(len(examples), 1) for n in (*sums, sum(visual)))
        return cls("this run", setup.model.t5.config, config.rank,
                   ViT.feature_width(setup.sources.vit), most, lengths, config.fusion)

    def model(self, method: str, **options: object) -> nn.Module:
        """The adapted model, on the meta device: without memory for its weights."""
        with torch.device("meta"):
            model = UMIE(T5(self.t5), self.features, self.objects, self.fusion)
        return clorae.adapt(model, method, self.rank, data.TASKS, **options)

    def forward(self, method: str) -> float:
        """GFLOPs of a forward pass."""
        return FlopCounter(self.model(method), *self.lengths).forward / 1e9


@dataclass(frozen=True)
class Cost:
    """What one row costs a method under one visual policy."""

    trainable: dict[str, int]  # parameters by kind, as clorae.parameter_split
    forward: float  # GFLOPs
    backward: float


Costs = dict[str, dict[str, Cost]]  # {method: {visual policy: cost}}


def costs(geometry: Geometry) -> Costs:
    """The costs of every method of COSTED under every visual policy."""
    import train
    found: Costs = {}
    for label, options in COSTED.items():
        model, found[label] = geometry.model(label.split()[0], **options), {}
        for policy in VISUAL_POLICIES:
            train.free_visual_adapter(model, policy)
            flops = FlopCounter(model, *geometry.lengths)
            found[label][policy] = Cost(clorae.parameter_split(model), flops.forward / 1e9,
                                        flops.backward / 1e9)
    return found


def cost_tables(found: Costs, paper: Mapping[str, tuple]) -> list[str]:
    """Trainable parameters and GFLOPs of every method, beside the paper's where it has them."""
    kinds, policies = ("experts", "gate", "mim", "backbone"), VISUAL_POLICIES
    millions = [["trainable, M", *kinds, *(f"visual:{p}" for p in policies),
                 *(f"all:{p}" for p in policies), "paper"]]
    gflops = [["GFLOPs", "fwd", "3 fwd", *(f"fwd+bwd:{p}" for p in policies), "paper fwd",
               "paper fwd+bwd"]]
    for label, each in found.items():
        splits, forward = [each[p].trainable for p in policies], each["train"].forward
        counts = [*(splits[0][name] for name in kinds), *(split["visual"] for split in splits),
                  *(sum(split.values()) for split in splits)]
        work = [forward, 3 * forward, *(forward + each[p].backward for p in policies)]
        theirs = paper.get(label, ("-", "-", "-"))
        millions.append([label, *(f"{n / 1e6:.3f}" for n in counts), str(theirs[0])])
        gflops.append([label, *(f"{n:.{2 if n > 1 else 5}f}" for n in work), *map(str, theirs[1:])])
    return [*aligned(millions), "", *aligned(gflops)]


def paper_notes(geometry: Geometry, found: Costs, paper: Mapping[str, tuple]) -> list[str]:
    """Where our figures and the paper's part, each difference as a number."""
    t5, (S, T, V), R = geometry.t5, geometry.lengths, geometry.rank
    means = 2 * (t5.d_model * 384 + 384 * 128) * (S + V - 2) / 1e9
    scores = t5.num_heads * (t5.num_layers * (S * S + T * T + S * T) + 2 * V * V + S * V) / 1e9
    full, ours, lora = (found[label]["train"].forward + means + scores
                        for label in ("full", "clorae", "lora"))
    halved = dataclasses.replace(geometry, rank=R // 2)
    half, pair = (halved.forward(method) + means + scores for method in ("lora", "loramoe"))
    twice = half + (lora - full) * t5.d_model / (2 * R)  # a frozen q or v has 2 D^2, its LoRA 4 D R
    millions = {label: sum(each["paper"].trainable.values()) / 1e6 for label, each in found.items()}
    return [
        f"full: UMIE projects each token for its gate, we the means (+{means:.3f}); the paper's "
        f"tool adds 1 FLOP per attention score (+{scores:.3f}). So counted: {full:.2f}, paper "
        f"{paper['full'][1]}; and likewise below.",
        f"clorae: {ours:.2f}, paper {paper['clorae'][1]}: U, one task expert, gate, all at rank R.",
        f"lora: {lora:.2f} at rank R, {half:.2f} at R/2, paper {paper['lora'][1]}; its TP is that "
        "of rank R.",
        f"moslora: {twice:.2f} if it were rank R/2 with the frozen q and v computed twice, paper "
        f"{paper['moslora'][1]}; here they are computed once.  Its TP fits a mixer of (R/2)^2.",
        f"loramoe: {pair:.2f} with two experts of rank R/2, paper {paper['loramoe'][1]}; its TP "
        "is that of rank R.",
        f"TP: all:paper leaves {paper['full'][0] - millions['full']:.1f} (full) and "
        f"{paper['clorae'][0] - millions['clorae']:.2f} (clorae) that no part of the model has."]


def cost_report(geometry: Geometry, paper: Mapping[str, tuple]) -> str:
    """Table 5 for one backbone, beside the paper's figures, and how to read it."""
    found, model = costs(geometry), geometry.model("clorae")
    ours, full = found["clorae"]["train"], found["full"]["train"]
    share = (ours.forward + ours.backward) / (full.forward + full.backward)
    once, each = mim_flops(model, geometry.lengths)
    S, T, V = geometry.lengths
    lines = [
        f"{geometry.name}, rank {geometry.rank}; one row of {S:.4g} source, {T:.4g} target, "
        f"{V:.4g} visual tokens; image features {geometry.features} wide", "",
        *cost_tables(found, paper), "",
        "visual: train = the whole adapter learns, paper = its embedding, frozen = nothing of it; "
        "VStack's experts always do.  3 fwd: the paper's convention.  fwd+bwd: input gradients "
        "above the lowest trained weight, weight gradients of trained weights.",
        f"clorae:train costs {100 * share:.0f} % of full, by 3 fwd "
        f"{100 * ours.forward / full.forward:.0f} %.  L_MIM comes on top, in training: "
        f"{once / 1e9:.2f} GFLOPs per micro-batch of one task, {each / 1e9:.2f} per row.  Not "
        "counted: image tower, optimizer, norms, softmax."]
    if paper and geometry.lengths == PAPER_LENGTHS:
        lines += paper_notes(geometry, found, paper)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ routing
# Where the gates send the tokens, Fig. 6.

def lacks_gate(config: "train.Config") -> str | None:
    """Why a run has no gate between a universal and a task expert; None if it has one."""
    if config.method == "clorae" and config.egr:
        return None
    why = "whose gate knows no task expert" if config.method == "loramoe" else "which has none"
    return f"method {config.method}{'' if config.egr else ' --no-egr'}, {why}"


def gates_on(model: nn.Module, batch: data.Batch, precision: str) -> dict[nn.Module, Tensor]:
    """{expert layer: its gates [B,S,E], Eq. (6), at the tokens that it meets}, teacher-forced.

    In eval mode.  Layers that meet nothing are absent: those of the visual stack without images.
    """
    found: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        found[layer] = layer.gates(inputs[0])

    hooks = [layer.register_forward_pre_hook(hook)
             for layer in clorae.expert_layers(model).values()]
    was_training = model.training
    model.eval()
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        model(batch)
    model.train(was_training)
    for handle in hooks:
        handle.remove()
    return found


@torch.inference_mode()
def gate_sums(model: nn.Module, examples: Sequence[Example], groups: Sequence[int],
              features: Features, device: torch.device, decoding: Decoding, rank: int = 0,
              world: int = 1) -> Tensor:
    """Sums over valid tokens [layers, groups, 6] float64, complete on every process.

    groups[i] is the group of example i.  Summed: 1, g1, g2, g2 > .5, g2^2, entropy.
    """
    layers = list(clorae.expert_layers(model).values())
    sums = torch.zeros(len(layers), max(groups) + 1, 6, dtype=torch.float64, device=device)
    group = {example.row: g for example, g in zip(examples, groups, strict=True)}
    batches = deal([len(e.input_ids) for e in examples], decoding.batch_size, rank, world)
    for chosen in tqdm(batches, desc="routing", unit="batch", disable=rank > 0, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width).to(device)
        rows = torch.tensor([group[row] for row in batch.rows.tolist()], device=device)
        for layer, gates in gates_on(model, batch, decoding.precision).items():
            g1, g2 = gates.double().unbind(dim=-1)
            entropy = -(g1.xlogy(g1) + g2.xlogy(g2))
            values = torch.stack([torch.ones_like(g2), g1, g2, g2 > 0.5, g2 * g2, entropy], dim=-1)
            valid = layer.routing.masks[layer.stream][..., None]
            sums[layers.index(layer)].index_add_(0, rows, (values * valid).sum(dim=1))
    if world > 1:
        dist.all_reduce(sums)
    return sums


def routing_rows(paths: Sequence[str], groups: Sequence[tuple[str, str]],
                 sums: Tensor) -> list[dict]:
    """One row per wrapped linear and (task, dataset) with tokens there, from `gate_sums`."""
    rows = []
    for path, layer in zip(paths, sums.tolist(), strict=True):
        parts = path.split(".")  # ..., stack, "blocks", layer, site, projection
        place = {"stack": next(s for s in ("vstack", "encoder", "decoder") if s in parts),
                 "layer": int(parts[-3]), "site": parts[-2].split("_")[0], "proj": parts[-1]}
        for (task, dataset), (n, *totals) in zip(groups, layer, strict=True):
            if n:
                g1, soft, hard, square, entropy = (value / n for value in totals)
                rows.append({**place, "task": task, "dataset": dataset, "n_tokens": int(n),
                             "soft_universal": g1, "soft": soft, "hard": hard,
                             "var": max(0.0, square - soft * soft), "entropy": entropy})
    return rows


def pooled(rows: Sequence[Mapping], stacks: Sequence[str]) -> dict[tuple[int, str], float]:
    """{(layer, "dataset task"): soft share of the task expert}, each token with equal weight."""
    tokens, heard = Counter(), Counter()
    for row in rows:
        if row["stack"] in stacks:
            key = row["layer"], f"{row['dataset']} {row['task']}"
            tokens[key] += row["n_tokens"]
            heard[key] += row["n_tokens"] * row["soft"]
    return {key: heard[key] / n for key, n in tokens.items()}


def route(job: Job, folder: Path, chosen: Sequence[int] | None, world: "train.World") -> list[Path]:
    """Fig. 6: write routing.csv over all layers, routing.png over the `chosen` ones."""
    import train
    if why := lacks_gate(job.config):
        raise train.UsageError("expected a run with a live gate between a universal and a task "
                               f"expert, got {why}; name a run of clorae with --egr")
    setup, examples = job.load(world)
    paths = list(clorae.expert_layers(setup.model))
    deepest = max(int(path.split(".")[-3]) for path in paths)
    if chosen and not set(chosen) <= set(range(deepest + 1)):
        raise train.UsageError(f"--layers: expected numbers from 0 to {deepest}, got "
                               f"{' '.join(map(str, chosen))}; leave it out for all layers")
    pairs = [(e.unit, e.record.task, e.record.dataset) for e in examples]
    groups = sorted(set(pairs))  # in the order of the table
    features = job.features(setup, examples, world)
    world.join()
    sums = gate_sums(setup.model, examples, list(map(groups.index, pairs)), features, world.device,
                     job.decoding, world.rank, world.size)
    if world.main:
        rows = routing_rows(paths, [group[1:] for group in groups], sums.cpu())
        save_csv(folder / "routing.csv", rows)
        plot_routing(rows, chosen, folder / "routing.png")
    return [folder / "routing.csv", folder / "routing.png"]


# ------------------------------------------------------------------------------------------- replay
# How much the AML weights, Eq. (9), depend on p_m and its other settings.

def replay_table(rows: Sequence[Mapping]) -> list[str]:
    """Per setting: largest shift of a weight and where, of a share, and the achieved units."""
    own = {(r["after_epoch"], r["unit"]): r["share"] for r in rows if r["setting"] == "run"}
    table = [["setting", "shift", "unit", "after epoch", "share by", "units at or above margin p"]]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row for row in rows if row["setting"] == setting]
        worst = max(some, key=lambda row: abs(row["shift"]))
        share = max(abs(r["share"] - own[r["after_epoch"], r["unit"]]) for r in some)
        units = dict.fromkeys(row["unit"] for row in some if row["achieved"])
        table.append([setting, f"{worst['shift']:+.3f}", worst["unit"], str(worst["after_epoch"]),
                      f"{100 * share:.1f} %", " ".join(units) or "-"])
    return aligned(table)


def replay(job: Job, folder: Path) -> tuple[list[Path], list[str]]:
    """Write aml.csv and aml.png; how much the weights of a run depend on what was assumed."""
    import train
    newest = train.newest_checkpoint(job.folder) or job.checkpoint
    state, config, corpus = train.read_state(newest), job.config, corpus_of(job.config)
    history = state["history"]
    if not history:
        raise train.UsageError(f"{newest}: expected a run that has finished an epoch, got none; "
                               "let it train on: its dev F1 is what is replayed")
    units = list(history[0]["f1"])
    own = {"reference": state["reference"], "margin": config.aml_margin,
           "gamma": config.aml_gamma, "temperature": 1.0}
    counts = train.unit_rows(data.load_corpus(corpus, "train", units), data.load_datasets(corpus))
    rows = losses.replay(history, losses.variants(own), counts)
    save_csv(folder / "aml.csv", rows)
    plot_replay(rows, folder / "aml.png")
    steepest = max(abs(slope) for past in history
                   for slope in losses.weight_slopes(past["f1"], **own).values())
    trained = {(past["epoch"], m): past["weights"][m] for past in history for m in units}
    off = max(abs(row["weight"] - trained[row["after_epoch"], row["unit"]]) for row in rows
              if row["setting"] == "run")
    lines = [*replay_table(rows), f"first order: a p_m wrong by 10 % moves a weight by at most "
             f"{steepest / 10:.3f}"]
    if off > 1e-9:
        lines.append(f"note: the run trained with other weights, up to {off:.3f} away: without AML")
    return [folder / "aml.csv", folder / "aml.png"], lines


# --------------------------------------------------------------------------------- pictures of runs
# Routing (Fig. 6), AML weights and curves of a run; systems (Fig. 4), ranks (Fig. 5), errors.

DPI = 150
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
STYLES = {unit: {"color": colour, "marker": marker, "markersize": 4}
          for unit, colour, marker in zip(UNITS, COLOURS, "osD^vPX")}
PANELS = {"encoder": ("encoder",), "decoder": ("decoder",),
          "encoder + decoder": ("encoder", "decoder"), "visual stack": ("vstack",)}
ERRORS = ("wrong_type", "boundary", "missed", "spurious", "malformed")  # of Counts
Results = Mapping[object, Mapping[str, Sequence[float]]]  # {system: {unit: F1 in %, one a seed}}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1,
           **options: object) -> tuple:
    """(figure of so many inches, its axes in reading order)."""
    from matplotlib.figure import Figure  # imported only where a picture is wanted
    figure = Figure((width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()


def write_figure(figure: object, path: Path) -> Path:
    """Save as PNG; a character that matplotlib's own font lacks is drawn as an empty box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path)
    return path


def plot_routing(rows: Sequence[Mapping], layers: Sequence[int] | None, path: Path) -> Path:
    """Fig. 6: mean gate of the task expert, layers x datasets, values in the cells."""
    chosen = [row for row in rows if not layers or row["layer"] in layers]
    columns = list(dict.fromkeys(f"{row['dataset']} {row['task']}" for row in rows))
    panels = {name: cells for name, stacks in PANELS.items() if (cells := pooled(chosen, stacks))}
    depth = len({row["layer"] for row in chosen})
    figure, axes = canvas(1.5 + (0.8 + 0.45 * len(columns)) * len(panels), 3 + 0.35 * depth,
                          columns=len(panels))
    for ax, (name, cells) in zip(axes, panels.items()):
        found = sorted({layer for layer, _ in cells})
        grid = [[cells.get((layer, column), math.nan) for column in columns] for layer in found]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="PuOr_r", aspect="auto")
        ax.set_title(name)
        ax.set_yticks(range(len(found)), [f"layer {layer}" for layer in found])
        ax.set_xticks(range(len(columns)), columns, rotation=50, ha="right", rotation_mode="anchor")
        for (i, line), (j, _) in itertools.product(enumerate(grid), enumerate(columns)):
            ax.text(j, i, f"{line[j]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if abs(line[j] - 0.5) > 0.35 else "black")
    figure.colorbar(image, ax=axes, label="mean gate of the task expert")
    return write_figure(figure, path)


def plot_replay(rows: Sequence[Mapping], path: Path) -> Path:
    """A panel per unit: the run's weight, before the range over all settings and over the p_m."""
    units = list(dict.fromkeys(row["unit"] for row in rows))
    epochs = sorted({row["after_epoch"] for row in rows})
    figure, axes = canvas(2.5 + 1.6 * len(units), 3.6, columns=len(units), sharey=True)
    for ax, unit in zip(axes, units):
        weights = {(row["setting"], row["after_epoch"]): row["weight"] for row in rows
                   if row["unit"] == unit}
        for start, alpha, label in (("", 0.2, "all settings"), ("p ", 0.45, "other p_m")):
            range_of = [[w for (name, t), w in weights.items() if t == epoch
                         and name.startswith((start, "run"))] for epoch in epochs]
            ax.fill_between(epochs, list(map(min, range_of)), list(map(max, range_of)),
                            color=STYLES[unit]["color"], alpha=alpha, linewidth=0, label=label)
        ax.plot(epochs, [weights["run", t] for t in epochs], **STYLES[unit], label="run")
        ax.set_title(unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("after epoch")
    figure.supylabel("weight of the unit's loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return write_figure(figure, path)


def plot_curves(run: Path, path: Path) -> Path:
    """Losses per step, dev F1 and AML weights per epoch, from a run's metrics.csv and eval.jsonl;
    the latter is not there before the first epoch has ended."""
    import train
    rows = [{name: float(value) for name, value in row.items()}
            for row in csv.DictReader(whole_lines(run / "metrics.csv"))]
    history = list(map(json.loads, whole_lines(run / "eval.jsonl")))
    if not rows:
        raise train.UsageError(f"{run}: expected a run folder with a metrics.csv that has a row, "
                               "got none; name a run that has taken a step")
    units = [unit for unit in UNITS if f"CE_{unit}" in rows[0]]
    window = max(1, len(rows) // 40)
    figure, (whole, each, dev, weights) = canvas(12, 8, 2, 2)
    steps = [row["step"] for row in rows]
    whole.plot(steps, [row["loss"] for row in rows], color="#BBBBBB", linewidth=0.6)
    whole.plot(steps, running_mean([row["loss"] for row in rows], window), color="black")
    whole.set(title=f"training loss, and mean of {window} steps", xlabel="step")
    for unit in units:
        each.plot(steps, running_mean([row[f"CE_{unit}"] for row in rows], window), label=unit,
                  markevery=max(1, len(rows) // 8), **STYLES[unit])
    each.set(title=f"cross-entropy per token, mean of {window} steps", xlabel="step", yscale="log")
    used = [dict.fromkeys(units, 1.0), *(past["weights"] for past in history[:-1])]
    for ax, title, series in ((dev, "dev F1, %", [past["f1"] for past in history]),
                              (weights, "AML weight in the epoch", used[:len(history)])):
        for unit in units:
            ax.plot(range(1, len(series) + 1), [values[unit] for values in series], **STYLES[unit])
        ax.set(title=title, xlabel="epoch", xlim=(0.5, max(len(series), 1) + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
    if not history:
        dev.text(0.5, 0.5, "no epoch has ended yet", ha="center", transform=dev.transAxes)
    figure.legend(*each.get_legend_handles_labels(), loc="outside right upper")
    return write_figure(figure, path)


def whole_lines(log: Path) -> list[str]:
    """The lines of a file, without a last one that is still being written; [] without the file."""
    return log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, without those that are NaN (no such rows)."""
    sums, numbers = (numpy.convolve(part, numpy.ones(window))[:len(values)] for part in (
        numpy.nan_to_num(values), ~numpy.isnan(values)))
    with numpy.errstate(invalid="ignore"):
        return (sums / numbers).tolist()


def plot_systems(results: Results, path: Path) -> Path:
    """Fig. 4: F1 relative to each unit's best system; means and deviations over seeds."""
    units = [u for u in UNITS if any(u in scores for scores in results.values())]
    best = {u: max(fmean(s[u]) for s in results.values() if u in s) or 1.0 for u in units}
    figure, (ax,) = canvas(4 + 1.2 * len(units), 4)
    width, lowest = 0.8 / len(results), 1.0
    for i, (system, scores) in enumerate(results.items()):
        at = {j: [f1 / best[u] for f1 in scores[u]] for j, u in enumerate(units) if u in scores}
        ax.bar([j + (i + 0.5) * width - 0.4 for j in at], [fmean(r) for r in at.values()], width,
               yerr=[deviation(r) for r in at.values()], capsize=2, label=system, edgecolor="white",
               color=COLOURS[i % len(COLOURS)], hatch="//" * (i // len(COLOURS)))
        lowest = min([lowest, *(min(r) for r in at.values())])
    start = max(0, math.floor(10 * lowest - 0.5) / 10)
    ax.set_ylim(bottom=start)
    ax.set_xticks(range(len(units)), units)
    ax.set_ylabel(f"F1 / F1 of the best system (from {start:g})")
    figure.legend(loc="outside right upper")
    return write_figure(figure, path)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN, which draws no error bar, for a single one."""
    return stdev(values) if len(values) > 1 else math.nan


def plot_sweep(results: Results, name: str, path: Path) -> Path:
    """Fig. 5: F1 of each unit, and their mean, at each value of a setting (the results' keys)."""
    values = sorted(results)
    units = [u for u in UNITS if all(u in results[x] for x in values)]
    figure, (ax,) = canvas(7, 4.5)
    for unit in units:
        ax.errorbar(range(len(values)), [fmean(results[x][unit]) for x in values],
                    [deviation(results[x][unit]) for x in values], capsize=2, label=unit,
                    **STYLES[unit])
    ax.errorbar(range(len(values)), [fmean(fmean(results[x][u]) for u in units) for x in values],
                label="mean", color="#777777", linestyle="--", linewidth=2.5)
    ax.set_xticks(range(len(values)), [f"{x:g}" for x in values])
    ax.set_xlabel(name)
    ax.set_ylabel("F1, %")
    figure.legend(loc="outside right upper")
    return write_figure(figure, path)


def swept(systems: Sequence[System]) -> str | None:
    """The one setting, rank or dropout, in which systems differ, if there is one."""
    for name in ("rank", "dropout"):
        rest = [dataclasses.replace(system.config, **dict.fromkeys((
            name, "seed", "out", "save_every"))) for system in systems]
        values = {getattr(system.config, name) for system in systems}
        if len(values) == len(systems) > 1 and all(other == rest[0] for other in rest):
            return name
    return None


def error_counts(systems: Sequence[System]) -> dict[str, Counter]:
    """{system, or of a single one its unit: {class of errors: number per seed}}."""
    bars: dict[str, Counter] = {}
    for system, unit in itertools.product(systems, UNITS):
        bar = bars.setdefault(unit if len(systems) == 1 else system.name, Counter())
        for report, kind in itertools.product(system.reports, ERRORS):
            bar[kind] += report["scores"].get(unit, {}).get(kind, 0) / len(system.reports)
    return {name: bar for name, bar in bars.items() if bar.total()}


def plot_errors(counts: Mapping[str, Counter], path: Path) -> Path:
    """Stacked bars of `error_counts`, in % of a bar's errors, whose number is named."""
    figure, (ax,) = canvas(9, 1.5 + 0.4 * len(counts))
    left = [0.0] * len(counts)
    for kind, colour in zip(ERRORS, COLOURS):
        parts = [percent(bar[kind], bar.total()) for bar in counts.values()]
        bars = ax.barh(range(len(counts)), parts, 0.7, left, label=kind.replace("_", " "),
                       edgecolor="white", color=colour)
        ax.bar_label(bars, [f"{bar[kind]:.0f}" if part > 4 else "" for bar, part
                            in zip(counts.values(), parts)], label_type="center", color="white")
        left = [a + b for a, b in zip(left, parts)]
    ax.set_yticks(range(len(counts)), [f"{name} ({bar.total():.0f})"
                                       for name, bar in counts.items()])
    ax.invert_yaxis()
    ax.set_xlabel("% of the errors (their number per seed)")
    figure.legend(loc="outside right upper")
    return write_figure(figure, path)


def draw_systems(systems: Sequence[System], folder: Path) -> list[Path]:
    """Systems side by side, over the setting in which they differ, and their errors."""
    results = {system.name: {unit: f1 for unit, f1 in system.columns().items() if unit in UNITS}
               for system in systems}
    made = []
    if len(systems) > 1:
        made.append(plot_systems(results, folder / "systems.png"))
    if name := swept(systems):
        made.append(plot_sweep({getattr(system.config, name): results[system.name]
                                for system in systems}, name, folder / f"{name}.png"))
    if errors := error_counts(systems):
        made.append(plot_errors(errors, folder / "errors.png"))
    return made


def draw_run(job: Job, folder: Path, args: argparse.Namespace,
             world: "train.World") -> list[str]:
    """A run's routing, curves and AML weights: what was made, and what was not and why."""
    import train
    run, lines = job.checkpoint.parent, []
    curves = folder / f"curves-{run.resolve().name}.png"
    makers = {"routing": lambda: route(job, folder, args.layers, world)}
    if world.main:
        makers["curves"] = lambda: [plot_curves(run, curves)]
    if world.main and job.config.aml:
        makers["AML weights"] = lambda: replay(job, folder)[0]
    for name, make in makers.items():
        try:
            lines += map(str, make())
        except train.UsageError as why:
            lines.append(f"no {name}: {why}")
    return lines + ["no AML weights: trained without them"] * (not job.config.aml)


def pictures(args: argparse.Namespace, world: "train.World") -> list[str]:
    """Draw what these runs and their systems allow; what was made, and what was not and why.

    Needs fresh scores in every folder.  Of several runs each has a folder of its own for what
    concerns it alone, numbered in the order of the command line.
    """
    jobs, lines = [Job.of(folder, args) for folder in args.checkpoint], []
    for number, job in enumerate(jobs, 1):
        own = f"{number:02d}-{job.checkpoint.parent.resolve().name}" if len(jobs) > 1 else ""
        lines += draw_run(job, args.plot / own, args, world)
    if world.main:
        systems = collect(jobs, system_names([job.config for job in jobs]))
        lines += map(str, draw_systems(systems, args.plot))
    return lines


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
    lines = data.read_bytes(path).removesuffix(b"\n").split(b"\n")
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
        words = data.read_bytes(text).decode("utf-8", "surrogateescape") if text else ""
        rows.append((str(text or image), folder,
                     {"id": name, "text": words, "image": image and image.name}))
    return rows


def parse_boxes(words: Sequence[str]) -> list:
    """--objects: boxes as x1,y1,x2,y2, or .json files that hold a list of [x1,y1,x2,y2]."""
    boxes = []
    for word in words:
        try:
            file = word.endswith(".json")
            found = data.parse_json(data.read_bytes(Path(word)) if file else f"[{word}]".encode())
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
        row = data.parse_json(row) if isinstance(row, bytes) else row
    except ValueError as error:
        raise DataError(f"row: not JSON in UTF-8 ({error}): repair or delete it") from None
    if not isinstance(row, dict):
        raise DataError(f"row: {data.show(row)} is no JSON object: write one per line")
    raw = {"id": name, "task": args.task, "image": None, "size": None, "objects": [], **row}
    if raw["task"] not in data.RECORD_TASKS:
        raise DataError(f"task: expected one of {', '.join(data.RECORD_TASKS)}, got "
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
    problems, records, seen = data.Problems(), [], {}
    for number, (where, folder, row) in enumerate(given_rows(args), 1):
        try:
            raw = completed(row, folder, str(number), args, datasets)
        except ValueError as error:
            field, _, problem = str(error).partition(": ")
            problems.add(where, field, problem)
            continue
        if problems.check(raw, data.record_rule(raw, datasets[raw["dataset"]]), where, "record"):
            if seen.setdefault(raw["id"], where) != where:
                problems.add(where, "id", f'"{raw["id"]}" is the id of {seen[raw["id"]]} too: make '
                             "ids unique")
            path = raw["image"] and str(image_path(folder, raw["image"]))
            raw = {key: data.frozen(value) for key, value in raw.items()}
            records.append(Record(**{**raw, "image": path}, source=where))
    problems.raise_if_any()
    return records


class GivenImages:
    """Image features of examples, as train.Features for a corpus; kept while this object lives."""

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


def has_image(record: Record) -> bool:
    return record.image is not None and Path(record.image).is_file()


SPOKEN = COLOURS[:6]  # of marks on a page
TERMINAL = (34, 33, 32, 35, 36, 31)  # codes of about the same colours
HARMLESS = str.maketrans(dict.fromkeys((*range(32), *range(127, 160)), "?"))  # on a terminal


@dataclass(frozen=True)
class Mark:
    """A place in the text or the image, and what the answer says of it."""

    item: Item
    label: str
    colour: int  # of SPOKEN, the same in every text of a dataset


def marks(row: Row, dataset: Dataset) -> list[Mark]:
    """Everything that an answer finds; of a relation its ends.  Where there is one event type, an
    argument is called by its role alone."""
    record, labels = row.record, dataset.labels[row.record.task]
    if record.task == "mre":
        return [Mark(Item(end, span=getattr(record, end)), end, colour)
                for colour, end in enumerate(("head", "tail"))]
    names = sorted(labels)
    if record.task == "meae":
        names = [f"{event}:{role}" for event in names for role in labels[event]]
    one = len({item.label for item in row.predicted}) == 1
    return [Mark(item, one and item.role or kind(item), names.index(kind(item)) % len(SPOKEN))
            for item in row.predicted]


def place(item: Item) -> str:
    """Where an item lies, in words."""
    if item.span:
        return item.text
    if item.object is None:
        return f"{item.text} (not in the text)"
    box = f"[{', '.join(f'{x:g}' for x in item.box)}]" if item.box else "(no such object)"
    return "O0, the whole image" if item.whole_image else f"O{item.object} {box}"


def answer_lines(row: Row) -> list[str]:
    """An answer in words: a line per item, then what could not be used, or was not there."""
    record, answer = row.record, row.answer
    if record.task == "mre":
        head, tail = (data.words(record, span) for span in (record.head, record.tail))
        lines = [f"{head} -- {row.predicted[0].label} -- {tail}"]
    else:
        lines = [f"{kind(item).replace(':', ', ')}: {place(item)}" for item in row.predicted]
    notes = [f"unreadable in the output, {row.counts.malformed} piece(s): {answer.text!r}"
             ] * bool(row.counts.malformed)
    notes += ["cut at the length limit"] * answer.cut
    notes += [f"answered without {record.image}, which is not there"] * answer.missing
    return (lines or ["nothing found"]) + [f"note: {note}" for note in notes]


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


def answer_json(row: Row, strips: Sequence["Strip"]) -> str:
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


def answer_examples(args: argparse.Namespace, world: "train.World") -> None:
    """Answer the examples of the command line: in words, as JSON, as pictures."""
    import train
    job = Job.of(args.checkpoint[0], args)
    setup = train.load_model(job.checkpoint, world.device, **job.changes)
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
    rows = evaluate_split(setup.model, examples, datasets, features, setup.tokenizer, world.device,
                          job.decoding, world.rank, world.size)
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


# ------------------------------------------------------------------------- picture of one example
# A page in inches: the image and its boxes, the text and its spans, the gates token by token.

PAGE, SIDE, MARGIN = 11.0, 3.6, 0.35  # width, side of the image, margins and gaps
CHAR, LINE = 13 / DPI, 0.21  # of matplotlib's monospaced font at 10 points, hinted at 150 DPI
LEADING = 1.3  # from one line of the text to the next, in LINE
BAR, BARS = 0.24, 0.65  # width of a bar, height of a row of bars
SCALE = 0.3  # left of a row of bars
ROW = PAGE - 2 * MARGIN - SCALE  # its width
UNIVERSAL, TASK = COLOURS[:2]


@dataclass(frozen=True)
class Strip:
    """The task expert's gate at each token of one stream, mean over the layers that see it."""

    stream: str  # "memory", "visual" or "target"
    title: str
    names: list[str]  # of the tokens; one that begins a word begins with a blank
    gates: list[float]


def piece(tokenizer: Tokenizer, i: int) -> str:
    """A token as it is drawn; a blank in front begins a word."""
    if i >= tokenizer.vocab_size:
        return tokenizer.decode([i])
    return tokenizer.pieces.id_to_piece(i).replace("\u2581", " ")


@torch.inference_mode()
def token_strips(setup: "train.Setup", example: Example, row: Row, features: Features,
                 device: torch.device, decoding: Decoding) -> list[Strip]:
    """The gates while the model reads an example, looks at its image and writes its answer.

    Those of a target token are those that wrote it; the prompt before the text is one mean.
    """
    tokenizer, record = setup.tokenizer, example.record
    ids, answer = example.input_ids, row.answer.ids
    batch = data.collate([dataclasses.replace(example, labels=list(answer))], features,
                         features.width).to(device)
    layers: dict[str, list[Tensor]] = {}
    for layer, gates in gates_on(setup.model, batch, decoding.precision).items():
        layers.setdefault(layer.stream, []).append(gates[0, :, 1].double())
    found = {stream: torch.stack(some).mean(dim=0).tolist() for stream, some in layers.items()}
    prefix, _ = data.prompt(record, setup.datasets[record.dataset])
    n = len(os.path.commonprefix([ids, tokenizer.encode(prefix)]))
    source = found["memory"][-len(ids):]  # visual tokens may come first
    strips = [Strip("memory", f"reading the text (prompt: mean of {n} tokens)",
                    ["prompt", *(piece(tokenizer, i) for i in ids[n:])],
                    [fmean(source[:n]), *source[n:]])]
    if "visual" in found:
        objects = [f" O{k}" for k in range(1, len(found["visual"]))]
        strips.append(Strip("visual", "looking at the picture", ["image", *objects],
                            found["visual"]))
    return [*strips, Strip("target", "writing the answer", [piece(tokenizer, i) for i in answer],
                           found["target"])]


Word = tuple[int, str, list[Mark], bool]  # column, text, spans it is in, whether it is a label


def lay_out(tokens: Sequence[str], spans: Sequence[Mark], width: int) -> list[list[Word]]:
    """The words of a text, and behind each span its label, in lines of `width` characters."""
    words: list[tuple[str, list[Mark], bool]] = []
    for i, token in enumerate(tokens):
        inside = [mark for mark in spans if i in range(*mark.item.span)]
        words += [(part, inside, False) for part in textwrap.wrap(token, width)]
        words += [(mark.label, [mark], True) for mark in inside if mark.item.span[1] == i + 1]
    lines, column = [[]], 0
    for word, inside, is_label in words:
        if column and column + len(word) > width:
            lines, column = [*lines, []], 0
        lines[-1].append((column, word, inside, is_label))
        column += len(word) + 1
    return lines


def draw_text(ax: object, title: str, lines: Sequence[Sequence[Word]], spans: Sequence[Mark],
              below: Sequence[str]) -> None:
    """A title, the lines of `lay_out` and plain lines below; x in characters, y in lines."""
    from matplotlib.patches import Rectangle
    ax.text(0, 0.3, title, fontsize=10, weight="bold")
    font = {"family": "monospace", "va": "center"}
    for y, line in enumerate(lines, 1):
        for mark in spans:
            ends = [(x, x + len(word)) for x, word, inside, _ in line if mark in inside]
            if ends:
                ax.add_patch(Rectangle((ends[0][0], LEADING * y), ends[-1][1] - ends[0][0], 1,
                                       alpha=0.35, linewidth=0, facecolor=SPOKEN[mark.colour]))
        for x, word, _, is_label in line:
            size, colour = (8, "#444444") if is_label else (10, "black")
            ax.text(x, LEADING * y + 0.5, word, fontsize=size, color=colour, **font)
    for y, text in enumerate(below, 1):
        ax.text(0, LEADING * (len(lines) + 1) + y, text, fontsize=9, **font)


def draw_image(ax: object, record: Record, found: Sequence[Mark], image: object) -> None:
    """The image with its numbered boxes and what the answer says of them, in image pixels.

    Boxes that the answer names come first, and each label stands where it covers no earlier one.
    """
    from matplotlib.patches import Rectangle
    ax.imshow(image, extent=(0, image.width, image.height, 0))
    ax.set(xticks=[], yticks=[], anchor="NW")
    ax.apply_aspect()  # now, as labels are measured below
    pixel = image.width / ax.bbox.width  # one of the page, in those of the image
    if whole := [mark for mark in found if mark.item.whole_image]:
        ax.spines[:].set(linewidth=5, color=SPOKEN[whole[0].colour])
        ax.set_xlabel(f"O0, the whole image: {', '.join(mark.label for mark in whole)}", loc="left")
    said = {k: [mark for mark in found if mark.item.object == k and mark.item.box]
            for k in range(1, len(record.objects) + 1)}
    taken: list[data.Box] = []
    for k in sorted(said, key=lambda k: not said[k]):
        x1, y1, x2, y2 = box = record.objects[k - 1]
        colour, width, above = (SPOKEN[said[k][0].colour], 2.5, 3) if said[k] else ("#777777", 1, 2)
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                               linewidth=width, zorder=above))
        label = ax.text(0, 0, "\n".join([f"O{k}", *(mark.label for mark in said[k])]), fontsize=8,
                        color="white", va="top", zorder=above + 2,
                        bbox={"facecolor": colour, "pad": 1.5, "edgecolor": "none"})
        extent = label.get_window_extent().padded(3)
        size = extent.width * pixel, extent.height * pixel
        x, y = label_place(size, box, taken, image.size)
        label.set_position((x + 3 * pixel, y + 3 * pixel))
        taken.append((x, y, x + size[0], y + size[1]))
        if not (x <= x2 and x1 <= x + size[0] and y <= y2 and y1 <= y + size[1]):
            ax.plot([x, x1], [y, y1], color=colour, linewidth=1, scalex=False, scaley=False)


def label_place(size: tuple[float, float], box: data.Box, taken: Sequence[data.Box],
                image: tuple[int, int]) -> tuple[float, float]:
    """Top left corner for a label of `size` in an `image` where it covers nothing that is `taken`:
    at a corner of its box, outside or inside, else as near as there is room."""
    (x1, y1, x2, y2), (w, h) = box, size
    right, bottom = (max(0, whole - part) for whole, part in zip(image, size))
    corners = [(min(max(0, x), right), min(max(0, y), bottom))
               for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w)]
    grid = itertools.product(numpy.linspace(0, right, 16), numpy.linspace(0, bottom, 25))
    places = [*corners, *sorted(grid, key=lambda place: math.dist(place, (x1, y1)))]
    return next(((x, y) for x, y in places if not any(
        data.iou((x, y, x + w, y + h), other) for other in taken)), corners[0])


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


def draw_strip(ax: object, title: str, bars: Sequence[tuple[float, str, float]]) -> None:
    """A bar per token: below the task expert's share, above it the universal expert's."""
    at, names, gates = zip(*bars)
    ax.bar(at, gates, 0.92, color=TASK)
    ax.bar(at, [1 - gate for gate in gates], 0.92, gates, color=UNIVERSAL)
    for x, gate in zip(at, gates):
        ax.text(x, 0.04, f"{gate:.2f}".removeprefix("0"), fontsize=6.5, ha="center", va="bottom",
                color="black" if gate > 0.2 else "white")
    ax.plot([-0.5, at[-1] + 0.5], [0.5, 0.5], color="black", linewidth=0.8, linestyle=":")
    ax.set_xlim(-0.6, ROW / BAR - 0.4)
    ax.set_ylim(0, 1)
    ax.set_xticks(at, names, rotation=90, fontsize=8, family="monospace")
    ax.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    ax.tick_params(axis="x", length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=9, loc="left", pad=3)


def draw_example(row: Row, dataset: Dataset, strips: Sequence[Strip], why: str | None,
                 path: Path) -> None:
    """One page: the image and its boxes, the text and what was found, the gates or `why` none."""
    from matplotlib import rc_context
    with rc_context({"text.parse_math": False}):  # a $ in a text is a $
        write_figure(example_figure(row, dataset, strips, why), path)


def example_figure(row: Row, dataset: Dataset, strips: Sequence[Strip], why: str | None) -> object:
    """The page of `draw_example`: its parts are measured first, then set from the top down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    record, found = row.record, marks(row, dataset)
    spans = [mark for mark in found if mark.item.span]
    image = load_image(record.image) if has_image(record) else None
    left = MARGIN + (SIDE + MARGIN if image else 0)
    width = int((PAGE - MARGIN - left) / CHAR)
    lines = lay_out(record.tokens or ("(no text)",), spans, width)
    below = [line for text in answer_lines(row) for line in
             textwrap.wrap(text, width, subsequent_indent="  ")]
    tall = max(LINE * (LEADING * (len(lines) + 1) + len(below) + 1), SIDE * bool(image) + 0.3)
    bars = strip_rows(strips)
    feet = [0.1 + 0.068 * max(len(name) for _, name, _ in some) for _, some in bars]
    height = MARGIN + tall + 0.5 + sum(0.4 + BARS + foot for foot in feet)
    figure = Figure((PAGE, height), dpi=DPI)
    FigureCanvasAgg(figure)  # which can measure texts

    def panel(x: float, y: float, w: float, h: float) -> object:
        return figure.add_axes((x / PAGE, 1 - (y + h) / height, w / PAGE, h / height))

    if image:
        draw_image(panel(MARGIN, MARGIN, SIDE, SIDE), record, found, image)
    text = panel(left, MARGIN, width * CHAR, tall)
    text.set(xlim=(0, width), ylim=(tall / LINE, 0))
    text.axis("off")
    draw_text(text, f"{record.task} by the labels of {dataset.name}", lines, spans, below)
    y = MARGIN + tall + 0.2
    if why:
        figure.text(MARGIN / PAGE, 1 - y / height, f"no gates to draw: {why}", fontsize=9)
    else:
        task = record.task if record.task in data.TASKS else "mee"
        figure.legend(handles=[Patch(color=UNIVERSAL, label="universal expert"),
                               Patch(color=TASK, label=f"task expert {task}")], ncols=2,
                      frameon=False, fontsize=9, loc="upper right",
                      bbox_to_anchor=(1 - MARGIN / PAGE, 1 - y / height))
    for (title, some), foot in zip(bars, feet):
        draw_strip(panel(MARGIN + SCALE, y + 0.4, ROW, BARS), title, some)
        y += 0.4 + BARS + foot
    return figure


# ---------------------------------------------------------------------------------------- export
# Adapters travel: without the backbone, whose sha256 they remember; or as one plain LoRA per task.

def export(args: argparse.Namespace, world: "train.World") -> list[str]:
    """Write what --export asks for into a folder that holds nothing yet; returns the report."""
    import train
    if args.export.is_file() or args.export.is_dir() and any(args.export.iterdir()):
        raise train.UsageError(f"--export {args.export}: expected a new or empty folder, got one "
                               "that holds files; name another one, or delete them first")
    make, report = (plain_lora if args.task else adapter)(args, world)
    if world.main:
        train.whole(args.export, make)
    return report


def adapter(args: argparse.Namespace, world: "train.World") -> tuple[Callable, list[str]]:
    """How to write the checkpoint as one that needs nothing of this machine (no moments, no
    variance of L_MIM, no paths, its datasets' labels beside it), and the report.

    Of method full it is the whole model, since all of it was trained.
    """
    import train
    checkpoint = train.find_checkpoint(args.checkpoint[0])
    state = train.read_state(checkpoint)
    corpus = Path(args.data or corpus_of(train.stored_config(checkpoint)))
    tensors = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()
               if not name.endswith(".rho")}
    config = {**state["config"], "mim": False,
              **dict.fromkeys(("data", "t5", "vit", "init", "aml_reference"))}

    def make(folder: Path) -> None:
        for name in data.load_datasets(corpus):
            (folder / "corpus" / name).mkdir(parents=True)
            shutil.copy(corpus / name / "dataset.json", folder / "corpus" / name)
        (folder / "model.safetensors").write_bytes(save(tensors))
        digest = {"model.safetensors": train.file_hash(folder / "model.safetensors")}
        train.write_state(folder, {**state, **dict.fromkeys(("t5", "vit", "init")),
                                   "config": config}, digest)

    numbers = sum(tensor.numel() for tensor in tensors.values())
    needs = {part: state[f"{part}_sha256"] for part in ("t5", "vit", "init")
             if state.get(f"{part}_sha256")}
    return make, [
        f"{args.export}: {numbers:,} trained parameters of {checkpoint}, method "
        f"{config['method']}, rank {config['rank']}, and the labels of its datasets",
        "it needs " + ", ".join(f"{part} of sha256 {needs[part][:12]}" for part in needs),
        f"elsewhere: python evaluate.py {args.export.name} --data DIR (or --text T --task mner); "
        + " ".join(f"--{part} DIR" for part in needs) + " where these are neither in weights/ nor "
        "in the hub's cache"]


def mean_gates(model: nn.Module, sums: Tensor) -> dict[str, tuple[float, ...]]:
    """{path: gates of a wrapped linear, averaged over the tokens of `gate_sums`}."""
    return {path: tuple((total[1:3] / total[0]).tolist()) for path, total in
            zip(clorae.expert_layers(model), sums[:, 0].cpu(), strict=True)}


def fix_gates(model: nn.Module, task: int, gates: Mapping[str, Sequence[float] | None]) -> None:
    """Put a plain LoRA in the place of each wrapped linear of T5, for one task."""
    for path, layer in clorae.expert_layers(model).items():
        if path.startswith("t5."):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.as_lora(task, gates[path]))


def write_peft(model: nn.Module, base: str | None, folder: Path) -> None:
    """The plain LoRAs of T5 as PEFT stores them, under the names of T5ForConditionalGeneration."""
    names, tensors = hf_names(model.t5.config), {}
    for path, layer in clorae.expert_layers(model.t5).items():
        key = f"base_model.model.{names[path + '.weight'].removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": layer.A_U.detach().cpu().contiguous(),
                    f"{key}.lora_B.weight": layer.B_U.detach().cpu().contiguous()}
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    write_whole(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": base,
        "r": layer.config.rank, "lora_alpha": layer.config.alpha, "lora_dropout": 0.0,
        "target_modules": list(layer.config.targets), "bias": "none", "inference_mode": True},
        indent=1) + "\n")


def plain_lora(args: argparse.Namespace, world: "train.World") -> tuple[Callable, list[str]]:
    """How to write one task's experts as a LoRA, and the report of what fixing the gates costs.

    A gate that depends on the token cannot be merged; its mean over the task's dev tokens can.
    F1 is that of our model before, after, and after without images, which is what PEFT runs.
    """
    import train
    job = Job.of(args.checkpoint[0], args)
    setup, examples = job.load(world)
    model, config = setup.model, setup.config
    if config.method == "full" or setup.sources.init:
        raise train.UsageError("--export with --task: expected a run whose experts sit on a hub's "
                               f"T5, got {config.method if config.method == 'full' else '--init'}: "
                               "all of its T5 was trained; export it without --task")
    task = data.TASKS.index("mee" if args.task in ("med", "meae") else args.task)
    dev, split = ([e for e in some if e.task == task]
                  for some in (job.examples(setup, "dev", world), examples))
    if not dev or not split:
        raise train.UsageError(f"--export with --task {args.task}: expected rows of it in the dev "
                               f"and the {job.split} split of {setup.sources.corpus}, got "
                               f"{len(dev)} and {len(split)}; name another task")
    features = job.features(setup, dev + split, world)
    world.join()
    here = {"device": world.device, "decoding": job.decoding, "rank": world.rank,
            "world": world.size}
    score = partial(evaluate_split, model, datasets=setup.datasets, features=features,
                    tokenizer=setup.tokenizer, **here)
    gates = dict.fromkeys(clorae.expert_layers(model))
    if any(hasattr(layer, "W_g") for layer in clorae.expert_layers(model).values()):
        gates = mean_gates(model, gate_sums(model, dev, [0] * len(dev), features, **here))
    before = score(split)
    fix_gates(model, task, gates)
    scores = {"before": before, "after, gates fixed": score(split),
              "after, without images": score(list(map(without_image, split)))}
    rank = next(iter(clorae.expert_layers(model.t5).values())).config.rank
    record = split[0].record
    return partial(write_peft, model, train.SIZES[config.size].t5), [
        f"{args.export}: LoRA of rank {rank} for {data.TASKS[task]} on the q and v of T5, sha256 "
        f"{train.folder_hash(setup.sources.t5)[:12]}",
        *(f"F1 {name}: " + ", ".join(f"{u} {f1:.2f}" for u, f1 in unit_f1(total(some)).items())
          for name, some in scores.items()),
        "the visual adapter, with its experts, is not part of it: in PEFT the model reads text "
        "alone, as in the last line, such as",
        "".join(data.prompt(record, setup.datasets[record.dataset]))]


def without_image(example: Example) -> Example:
    """The same row for a model that is given its text alone."""
    return dataclasses.replace(example, record=dataclasses.replace(example.record, image=None))


# ------------------------------------------------------------------------------------ the command

def add_pictures(result: data.Parser) -> None:
    """The options that ask for analyses and pictures of runs."""
    add = result.add_argument_group("pictures of runs").add_argument
    add("--plot", type=Path, metavar="DIR",
        help="of one CKPT its losses, dev F1, AML weights (and under other assumptions), routing "
             "and classes of errors; of several the systems side by side, the setting in which "
             "they differ, and the pictures of each in a folder of its own; scores that still hold "
             "are not made again")
    add("--layers", nargs="+", type=int, metavar="N",
        help="layers that the routing picture shows; default: all")
    add = result.add_argument_group("analyses (instead of scoring)").add_argument
    add("--routing", type=Path, metavar="DIR",
        help="share of tokens that the gates give the task experts, as Fig. 6")
    add("--aml-replay", type=Path, metavar="DIR",
        help="AML weights of the run's history under other references p_m, margins, exponents and "
             "temperatures; nothing is trained")
    add("--costs", action="store_true",
        help="parameters and FLOPs of every method, as Table 5: of flan-t5-SIZE, or with CKPT of "
             "its backbone at its rows' mean lengths")
    add("--size", choices=tuple(GEOMETRY), default="base",
        help="--costs without CKPT: the backbone")
    add("--lengths", nargs=3, type=int, default=PAPER_LENGTHS, metavar=("N_E", "N_D", "N_V"),
        help="--costs without CKPT: source, target, visual tokens of a row; default: 95 1 21, "
             "which give the paper's figures")


def add_examples(result: data.Parser) -> None:
    """The options that describe examples to be answered."""
    add = result.add_argument_group(
        "answering examples (instead of scoring)", "Printed are the text, in colours on a terminal "
        "unless NO_COLOR is set, what was found, and a line of JSON, with --text or --draw with "
        "the mean gates of the task expert.").add_argument
    add("--text", metavar="T", help="the sentence, tokens separated by spaces")
    add("--image", type=Path, metavar="FILE", help="its image, if it has one")
    add("--task", choices=data.RECORD_TASKS, help="what to extract")
    add("--objects", nargs="+", metavar="BOX", default=(),
        help="boxes O1, O2 ... in the image, each x1,y1,x2,y2 in pixels, or .json files with lists "
             "of [x1,y1,x2,y2]; default: none")
    add("--head", metavar="WORDS", help="mre: the head entity, as in the text")
    add("--tail", metavar="WORDS", help="mre: the tail entity, as in the text")
    add("--examples", type=Path, metavar="PATH",
        help="many examples: a .jsonl file with records as at the top of data.py (gold may lack), "
             'or rows {"text", "image", "objects", "head", "tail", "task", "dataset"}, all but the '
             "text optional; or a folder with one such file, or with NAME.txt and NAME.png (jpg, "
             "webp, gif). Images are looked for beside the file and in images/ there")
    add("--dataset", metavar="NAME",
        help="whose labels to offer where a row does not say; default: the first dataset with the "
             "task")
    add("--json", action="store_true", help="print the JSON alone")
    add("--draw", type=Path, metavar="FILE",
        help="a picture (.png) of the image with its boxes, the text with its spans and the gates "
             "token by token; with --examples a folder for one picture each")


def parser() -> data.Parser:
    """All options, in groups; `misuse` says which go together."""
    result = data.Parser(
        description="Score a trained model on a split, compare several, draw them, or let one "
                    "answer examples.",
        epilog="The model is rebuilt from what its checkpoint stores; no training flag is "
               "repeated.  Under torchrun the processes share the decoding; the result is equal.",
        usage="%(prog)s [CKPT ...] [options]")
    add = result.add_argument_group("what to evaluate").add_argument
    add("checkpoint", type=Path, metavar="CKPT", nargs="*",
        help="run folder (its best checkpoint is used) or checkpoint folder; several are printed "
             "side by side, a row per system, which is the runs that differ in nothing but their "
             "seed")
    add = result.add_argument_group("scoring a split").add_argument
    add("--split", choices=("test", "dev", "train"), default="test", help="which records")
    add("--data", metavar="DIR", help="corpus folder; default: the one trained on")
    for part, name in (("t5", "T5"), ("vit", "ViT"), ("init", "full run below the experts")):
        add(f"--{part}", metavar="DIR", help=f"folder of the {name} that CKPT was trained on, "
            "where it is no longer at its place; sha256 must agree")
    add("--units", nargs="+", choices=UNITS, metavar="UNIT",
        help=f"only these columns ({' '.join(UNITS)}); default: all in the corpus")
    add("--missing-images", choices=("error", "mask"),
        help="mask: rows whose image file is missing are answered without it, and counted; "
             "default: as in training, for examples error")
    add("--out", type=Path, metavar="FILE",
        help="predictions, one JSON object a row; scores go beside them; default: "
             "CKPT/predictions-SPLIT.jsonl and CKPT/scores-SPLIT.json, for examples they are "
             "printed")
    add("--details", action="store_true", help="print P, R, F1 and counts of every type, too")
    add("--csv", type=Path, metavar="FILE",
        help="several CKPT: write the rows of the comparison there, too")
    add = result.add_argument_group("decoding").add_argument
    add("--beams", type=int, default=1, metavar="N",
        help="beam search over N beams; 1 is greedy")
    add("--batch-size", type=int, default=32, metavar="N", help="rows decoded together")
    add("--impl", choices=("auto", "reference", "cuda"),
        help="expert layers on PyTorch (reference) or on clorae.cu (cuda); default: auto, on "
             "clorae.cu where it can be built")
    add("--graphs", action=argparse.BooleanOptionalAction,
        help="on a GPU, launch all kernels of a token at once, as a CUDA graph; default: as the "
             "run that trained CKPT")
    add_examples(result)
    add_pictures(result)
    add = result.add_argument_group("export (instead of scoring)").add_argument
    add("--export", type=Path, metavar="DIR",
        help="what was trained, without the backbone: a CKPT for any machine that has it; with "
             "--task, the LoRA for T5, in PEFT's format, that the task's experts are under their "
             "mean gates")
    return result


MODES = ("--text", "--examples", "--costs", "--routing", "--aml-replay", "--export", "--plot")
GOES_WITH = {  # options that would do nothing with others
    "image": ("--text",), "objects": ("--text",), "head": ("--text",), "tail": ("--text",),
    "dataset": MODES[:2], "json": MODES[:2], "draw": MODES[:2], "task": (*MODES[:2], "--export"),
    "out": (*MODES[:2], "scoring"), "details": ("scoring",), "csv": ("scoring", "--plot"),
    "layers": ("--routing", "--plot"),
}


def modes(args: argparse.Namespace) -> list[str]:
    """What the command line asks for: one of MODES or, without any, scoring."""
    values = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in MODES}
    return [flag for flag, value in values.items() if value not in (None, False)] or ["scoring"]


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of options, if anything is."""
    mode, *others = modes(args)
    if others:
        return f"{mode} and {' and '.join(others)} exclude each other; give one at a time"
    for name, places in GOES_WITH.items():
        if getattr(args, name) and mode not in places:
            return f"--{name} would do nothing here; it goes with {' or '.join(places)}"
    several, draw = len(args.checkpoint) > 1, args.draw
    return next((message for wrong, message in (
        (not args.checkpoint and mode != "--costs",
         "give a run folder or a checkpoint folder; only --costs works without"),
        (several and (mode not in ("scoring", "--plot") or args.out or args.details),
         "several CKPT are compared, with --plot drawn; anything else is for a single CKPT"),
        (mode == "--text" and not args.task, "--text needs --task mner, mre, med or meae"),
        (args.objects and not args.image, "--objects are boxes in an image; name it with --image"),
        (mode == "--text" and draw and (draw.suffix != ".png" or draw.is_dir()),
         f"--draw {draw}: name a .png file"),
        (mode == "--examples" and draw and draw.is_file(),
         f"--draw {draw}: with --examples name a folder"),
        (min(args.beams, args.batch_size) < 1, "--beams and --batch-size must be at least 1"),
    ) if wrong), None)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    import train
    world, (mode,) = train.World(), modes(args)
    first = args.checkpoint[0] if args.checkpoint else None
    if mode in ("--text", "--examples"):
        answer_examples(args, world)
    elif mode == "--costs" and first:
        world.print(cost_report(Geometry.of_run(*Job.of(first, args).load(world)), {}))
    elif mode == "--costs":
        geometry = Geometry.of_size(args.size, train.SIZES[args.size].rank, args.lengths)
        world.print(cost_report(geometry, PAPER_COSTS.get(args.size, {})))
    elif mode == "--routing":
        made = route(Job.of(first, args), args.routing, args.layers, world)
        world.print("tokens given to the task expert:", *map(str, made))
    elif mode == "--aml-replay":
        made, report = replay(Job.of(first, args), args.aml_replay) if world.main else ([], [])
        world.print(*report, *map(str, made))
    elif mode == "--export":
        world.print(*export(args, world))
    elif len(args.checkpoint) > 1 or args.csv:
        compare(args, world)
    elif mode == "--plot":
        refresh([Job.of(first, args)], world)
    else:
        score_one(args, world)
    if mode == "--plot":
        world.print("pictures:", *pictures(args, world))
    world.leave()


def main(argv: Sequence[str] | None = None) -> None:
    command = parser()
    args = command.parse_args(argv)
    if wrong := misuse(args):
        command.error(wrong)
    import train
    with train.exit_codes():
        run(args)


if __name__ == "__main__":
    main()
