"""Decode a split with trained models, score the answers, print the paper's table.

    python evaluate.py runs/demo-tiny-clorae                    the test split, all seven columns
    torchrun --nproc_per_node=4 evaluate.py RUN --data DIR      the same, shared by four processes
    python evaluate.py runs/a runs/b runs/c --csv FILE          systems side by side, with intervals

Scores are whole numbers per record; percentages are formed once, at the end, and never rounded
before they are printed.  Each batch of the split goes whole to one process, so no text and no count
depends on the number of processes.

References: C-LoRAE (arXiv 2505.06303), Table 2 for the columns and Eq. (9) for `unit_f1`; entities
as in UMT's ner_evaluate, relations as in HVPNeT's eval_result, events as in M2E2 (ACL 2020)."""

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

import torch

import clorae
import data
import fast
from data import Example, Item
from engine.checkpoints import (Sources, find_checkpoint, load_trainables, read_state,
                                stored_config, stored_sources)
from engine.command import Bar, Parser, moved
from engine.compare import compare, differences
from engine.corpus import corpus_of, load_corpus, load_datasets, split_digest
from engine.features import Features
from engine.files import UsageError, WeightsError, read_json, write_whole
from engine.processes import World, carry_out
from engine.schema import TASKS, UNIT_TASK, UNITS, Dataset, Record, iou
from engine.settings import SIZES, Config, computed_in, run_options
from engine.weights import open_weights
from fast import int8
from t5 import HEAD, T5, Stack, T5Config, embedding_key
from vision import UMIE, ViT

# --------------------------------------------------------------------- counting, matching, scoring
IOU_MATCH = 0.5  # M2E2: an object argument is right from this overlap on

COUNTED_ITEMS = {
    "mner": "entity (type, first token, last token), multiset per tweet",
    "mre": "relation label of the given pair; none counts neither as found nor as gold",
    "med": "event (type, trigger span), or (type, whole image)",
    "meae": f"argument (type, role, span), or (type, role, box) one-to-one at IoU >= {IOU_MATCH}"}
DEFINITIONS = {unit: COUNTED_ITEMS[task] for unit, task in UNIT_TASK.items()}
RULES = {
    "F1, P, R": "micro-averaged over records, in %, from whole counts, never rounded before they "
                "are printed; 0/0 = 0",
    "F1 UMIE": "UMIE's rule: strings instead of places, (type, string), (type, role, string) with "
               "O1, O2 ... for objects, relation labels with none; a gold string is found once it "
               "is predicted at all, an unreadable relation is no prediction, and P, R, F1 are "
               "rounded to 4 digits",
    "places": "the k-th item of one label and text is the text's k-th occurrence, words as the "
              "tokenizer writes them; an argument is the occurrence nearest to its trigger, and "
              "the k-th event of a type has the k-th trigger of that type",
    "accuracy": "relations answered right, none included, an unreadable answer read as none",
    "wrong type": "a gold and a predicted item at one place (equal spans, boxes at IoU >= "
                  f"{IOU_MATCH}, or the given pair) whose types or roles differ",
    "boundary": "a gold and a predicted item of one type and role whose spans or boxes overlap "
                "without being right; one to one, after the rows above, so that gold = tp + wrong "
                "type + boundary + missed and pred = tp + wrong type + boundary + spurious",
    "malformed": "unparsable pieces of output: not scored, no part of pred",
    "missing": "rows whose image file was not there"}
VARIANTS = {
    "once": "M2E2 with every (sentence, event) and every image counted once, in the first of its "
            "pairs",
    "accepted": "M2E2 with predictions that are right for the sentence's other events left out: "
                "neither right nor wrong"}


def percent(count: int, whole: int) -> float:
    """100 count / whole, and 0 when there is nothing to score."""
    return 100.0 * count / whole if whole else 0.0


@dataclass(frozen=True)
class Counts:
    """Whole numbers that add up over records; the rates in % follow from them."""
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

    precision = property(lambda self: percent(self.tp, self.pred))
    recall = property(lambda self: percent(self.tp, self.gold))
    f1 = property(lambda self: percent(2 * self.tp, self.pred + self.gold))
    accuracy = property(lambda self: percent(self.correct, self.rows))
    missed = property(lambda self: self.gold - self.tp - self.wrong_type - self.boundary)
    spurious = property(lambda self: self.pred - self.tp - self.wrong_type - self.boundary)

    @property
    def rounded_f1(self) -> float:
        """F1 as UMIE prints it: P, R and then F1 are fractions rounded to 4 digits."""
        p, r = (round(self.tp / whole, 4) if whole else 0.0 for whole in (self.pred, self.gold))
        return 100 * round(2 * p * r / (p + r), 4) if p + r else 0.0


# The counts of each unit, "MEAE", and of what it holds: of one dataset "MEAE@swig", of the items in
# the text "MEAE/text", of one type "MEAE:attack:target", by another rule "MEAE~umie".
Scores = dict[str, Counts]
Items = Sequence[Item]


def subscores(scores: Scores, unit: str, mark: str) -> Scores:
    """The scores within a unit that stand behind `mark`, sorted by their own names."""
    return {name.removeprefix(unit + mark): scores[name] for name in sorted(scores)
            if name.startswith(unit + mark)}


def unit_f1(scores: Scores) -> dict[str, float]:
    """F1 in % of each unit: the s of Eq. (9).  Where several datasets share a unit, as ACE2005 and
    SWiG share MED, it is the mean of their F1, so the larger one does not drown the other."""
    by_unit = {unit: [c.f1 for c in subscores(scores, unit, "@").values()] for unit in UNITS}
    return {unit: sum(f1) / len(f1) for unit, f1 in by_unit.items() if f1}


def type_of(item: Item) -> str:
    """Entity type, relation, event type, or of an argument "event type:role"."""
    return item.label if item.role is None else f"{item.label}:{item.role}"


def overlap(a: Item, b: Item) -> float:
    """IoU of two boxes or of two token spans; 1 if both are the whole image; else 0."""
    if a.box and b.box:
        return iou(a.box, b.box)
    if a.span and b.span:
        both = max(min(a.span[1], b.span[1]) - max(a.span[0], b.span[0]), 0)
        return both / (a.span[1] - a.span[0] + b.span[1] - b.span[0] - both)
    return float(a.whole_image and b.whole_image)


def pair_off(gold: list[Item], predicted: list[Item], same_type: bool = True,
             exact: bool = True) -> int:
    """Take the pairs that fit out of both lists and return their number.  A pair has one type and
    role, unless `same_type` is False, and one place: equal spans, the whole image or boxes of
    enough overlap; any overlap if not `exact`.  Pairs are one to one, those of the largest overlap
    first, whereas the official M2E2 scorer lets two predictions match one gold box."""
    pairs = []
    for (i, g), (j, p) in itertools.product(enumerate(gold), enumerate(predicted)):
        shared = overlap(g, p)
        enough = shared >= (IOU_MATCH if g.box else 1) if exact else shared > 0
        if enough and (type_of(g) == type_of(p) or not same_type):
            pairs.append((-shared, i, j))
    partner: dict[int, int] = {}  # index into gold: index into predicted
    for _, i, j in sorted(pairs):
        if j not in partner.values():
            partner.setdefault(i, j)
    gold[:] = [item for i, item in enumerate(gold) if i not in partner]
    predicted[:] = [item for j, item in enumerate(predicted) if j not in partner.values()]
    return len(partner)


def count(task: str, gold: Items, predicted: Items, malformed: int = 0, missing: int = 0) -> Counts:
    """Counts of one record.  An item falls into the first class that takes it: right, wrong type,
    wrong boundary (see RULES).  Gold items that remain are missed, predicted ones spurious."""
    gold, predicted = list(gold), list(predicted)
    if task == "mre":  # none is no relation; the others share one place, as if it were an image
        gold, predicted = ([replace(item, whole_image=True) for item in items
                            if item.label != "none"] for items in (gold, predicted))
    sizes = len(predicted), len(gold)
    tp = pair_off(gold, predicted)
    wrong_type = pair_off(gold, predicted, same_type=False)
    boundary = pair_off(gold, predicted, exact=False)
    return Counts(tp, *sizes, malformed, int(sizes == (tp, tp)), 1, missing, wrong_type, boundary)


def count_umie(task: str, gold: Items, predicted: Items, malformed: int = 0) -> Counts:
    """Counts of one record by UMIE's rule (see RULES): a predicted string is right as often as the
    gold has it, a gold one predicted nowhere is missed, and `gold` is tp + missed."""
    if task == "mre" and malformed:  # the parser reads it as "none"
        predicted = []
    wanted, given = (Counter((type_of(item), item.text and data.canon(item.text))
                             for item in items) for items in (gold, predicted))
    tp = (wanted & given).total()
    missed = sum(number for string, number in wanted.items() if string not in given)
    return Counts(tp, given.total(), tp + missed, rows=1)


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
    details: Scores = field(default_factory=dict)  # of the function `details`


def score_rows(records: Sequence[Record], answers: Sequence[Answer],
               datasets: Mapping[str, Dataset],
               written: Callable[[str], str] = data.canon) -> list[Row]:
    """Parse and score one answer per record -> one row each, in their order.  The string of an
    argument is mapped to its occurrence nearest to the trigger that the same run predicted for the
    same sentence-image pair, never to the gold trigger: triggers come first.  written: that of the
    tokenizer which decoded the answers, see data.predicted_items."""
    rows, triggers = {}, defaultdict(dict)  # pair: {event type: its triggers' starts}
    written = cache(written)  # most words come again
    given = enumerate(zip(records, answers, strict=True))
    for i, (record, answer) in sorted(given, key=lambda entry: entry[1][0].task == "meae"):
        dataset, task, gold = datasets[record.dataset], record.task, data.gold_items(record)
        starts = triggers[record.dataset, record.id.removesuffix(f"/{task}")]  # PAIR/med, PAIR/meae
        items, malformed = data.predicted_items(record, answer.text, dataset, starts, answer.cut,
                                                written)
        for item in items if task == "med" else ():
            if item.span:
                starts.setdefault(item.label, []).append(item.span[0])
        rows[i] = Row(record, dataset.units[task], answer, gold, items,
                      count(task, gold, items, malformed, int(answer.missing)),
                      details(task, gold, items, malformed))
    return [rows[i] for i in range(len(rows))]


def details(task: str, gold: list[Item], predicted: list[Item], malformed: int) -> Scores:
    """One record's counts by UMIE's rule, by type and, of arguments, apart for text and image."""
    def of(chosen: Callable[[Item], bool]) -> Counts:
        return count(task, list(filter(chosen, gold)), list(filter(chosen, predicted)))

    scores = {"~umie": count_umie(task, gold, predicted, malformed)}
    for name in sorted(set(map(type_of, [*gold, *predicted])) - {"none"}):
        scores[f":{name}"] = of(lambda item: type_of(item) == name)
    if task == "meae":
        scores |= {"/text": of(lambda item: not is_object(item)), "/object": of(is_object)}
    return scores


def is_object(item: Item) -> bool:
    """Whether an argument is a box, or names an object by number, existing or not."""
    return item.box is not None or item.object is not None


def total(rows: Sequence[Row]) -> Scores:
    """Sum the rows of each unit, and of what it holds."""
    scores: Scores = defaultdict(Counts)
    for row in rows:
        marked = {"": row.counts, f"@{row.record.dataset}": row.counts, **row.details}
        for mark, counts in marked.items():
            scores[row.unit + mark] += counts
    for unit in ("MEAE", "MED"):  # by the rules of VARIANTS, where a row is concerned
        events = [row for row in rows if row.unit == unit]
        if any(row.record.accepted for row in events):
            scores[f"{unit}~accepted"] = sum(map(count_accepted, events), Counts())
        if any(m2e2_sentence(row.record) for row in events):
            scores[f"{unit}~once"] = count_once(events)
    return dict(scores)


def m2e2_sentence(record: Record) -> str | None:
    """The sentence of a record whose id is SENTENCE+IMAGE/TASK, as those of M2E2 are."""
    end = f"+{record.image}/{record.task}"
    return record.id.removesuffix(end) if record.id.endswith(end) else None


def count_once(rows: Sequence[Row]) -> Counts:
    """Counts of one unit, where a text, with its gold events, and an image count the first time."""
    counts, seen = Counts(), set()
    for row in rows:
        record, sentence = row.record, m2e2_sentence(row.record)
        events = repr([(event["type"], event["trigger"]) for event in record.events])
        text = record.dataset, sentence or record.id, events
        image = record.dataset, record.image if sentence else record.id
        gold, predicted = ([item for item in items if (image if is_object(item) else text)
                            not in seen] for items in (row.gold, row.predicted))
        counts += count(record.task, gold, predicted)
        seen |= {text, image}
    return counts


def count_accepted(row: Row) -> Counts:
    """Counts of a row without the predictions that only `record.accepted` makes right."""
    wrong = list(row.predicted)
    pair_off(list(row.gold), wrong)  # takes out what is right
    accepted = data.gold_items(replace(row.record, events=row.record.accepted))
    return Counts(row.counts.tp, row.counts.pred - pair_off(accepted, wrong), row.counts.gold)


# ------------------------------------------------------------------------------------- the table
RATES = {"F1": ("", "f1"), "P": ("", "precision"), "R": ("", "recall"),
         "F1 UMIE": ("~umie", "rounded_f1"), "accuracy": ("", "accuracy")}  # (mark, rate)
COUNTED = ("tp", "pred", "gold", "wrong_type", "boundary", "missed", "spurious", "malformed",
           "rows", "missing")


def table(scores: Scores, datasets: Mapping[str, Dataset] = {}) -> str:
    """The paper's seven columns, their sum and mean; below, what they count and what to know."""
    def line(name: str, cells: Mapping[str, object], form: str) -> str:
        return f"{name:10}" + "".join(f"{cells.get(unit, '-'):{form if unit in cells else '>8'}}"
                                      for unit in UNITS)

    units = [unit for unit in UNITS if unit in scores]
    lines = [line("", dict(zip(UNITS, UNITS)), ">8") + f"{'All':>9}{'mean':>8}"]
    for name, (mark, rate) in RATES.items():
        cells = {unit: getattr(scores[unit + mark], rate) for unit in units
                 if rate != "accuracy" or UNIT_TASK[unit] == "mre"}
        if cells:
            ends = f"{sum(cells.values()):9.2f}{fmean(cells.values()):8.2f}"
            lines.append(line(name, cells, "8.2f") + ends * name.startswith("F1"))
    for name in COUNTED:
        cells = {unit: getattr(scores[unit], name) for unit in units}
        lines.append(line(name.replace("_", " "), cells, "8d") + f"{sum(cells.values()):9d}")
    return "\n".join([*lines, "", *legend(scores), *notes(scores, datasets)])


def legend(scores: Scores) -> list[str]:
    """What each column counts and holds, and by which rule each row is computed."""
    units, variants = [], []
    for unit in filter(scores.get, UNITS):
        inner, datasets = subscores(scores, unit, "/"), subscores(scores, unit, "@")
        shown = [f"{name} only F1 {c.f1:.2f}" for name, c in inner.items()]
        shown += [f"{name} F1 {c.f1:.2f}" for name, c in datasets.items() if len(datasets) > 1]
        units.append(f"{unit:5}{DEFINITIONS[unit]}" + f" ({', '.join(shown)})" * bool(shown))
        variants += [f"{unit} {name}: F1 {c.f1:.2f}, P {c.precision:.2f}, R {c.recall:.2f} (tp "
                     f"{c.tp}, pred {c.pred}, gold {c.gold}): {VARIANTS[name]}"
                     for name, c in subscores(scores, unit, "~").items() if name in VARIANTS]
    return [*units, f"All  sum of the F1 of {len(units)} of {len(UNITS)} columns, as in the paper",
            *(f"{name}: {rule}" for name, rule in RULES.items()), *variants]


def notes(scores: Scores, datasets: Mapping[str, Dataset]) -> list[str]:
    """What a reader of these scores must know of their data."""
    lines = [f"note on {name}: {dataset.note}" for name, dataset in datasets.items() if dataset.note
             and any(f"{unit}@{name}" in scores for unit in dataset.units.values())]
    counts = sum((scores[unit] for unit in UNITS if unit in scores), Counts())
    return lines + [f"note on images: {counts.missing} of {counts.rows} rows were answered "
                    "without their image, whose file was not there"] * bool(counts.missing)


def type_table(scores: Scores) -> str:
    """P, R, F1 and counts of every type: entity type, relation, event type, event type:role."""
    lines = [f"{'':5}{'type':40}{'F1':>8}{'P':>8}{'R':>8}{'tp':>7}{'pred':>7}{'gold':>7}"]
    lines += [f"{unit:5}{name:40}{c.f1:8.2f}{c.precision:8.2f}{c.recall:8.2f}{c.tp:7}{c.pred:7}"
              f"{c.gold:7}" for unit in UNITS for name, c in subscores(scores, unit, ":").items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------- the model and its answers
@dataclass
class Setup:
    """A model with everything that turns records into its input and its output into records."""
    config: Config
    sources: Sources
    datasets: dict[str, Dataset]
    tokenizer: data.Tokenizer
    model: UMIE


def build(config: Config, sources: Sources, device: torch.device) -> Setup:
    """The adapted model as its seed makes it: what is trained in fp32, a frozen backbone in the
    run's precision.  On the device "meta" it has names, shapes and types, and no weight is read."""
    meta, half = device.type == "meta", config.precision == "bf16" and config.method != "full"
    dtype = torch.bfloat16 if half else torch.float32
    if meta:  # a head that is stored beside the embedding counts as untied
        raw, stored = read_json(sources.t5 / "config.json"), open_weights(sources.t5)
        tied = HEAD not in stored or embedding_key(stored, raw) == HEAD
        with device:
            t5 = T5(T5Config.from_hf(raw, sources.t5, tied)).to(dtype)
    else:
        t5 = T5.from_pretrained(sources.t5, dtype=dtype)
        if half and computed_in("bf16") == "fp32":
            t5 = t5.float()  # the numbers that were trained on, in a type that this CPU computes
    tokenizer, ids = data.Tokenizer(sources.t5), t5.config.vocab_size
    if tokenizer.spot_id >= ids:
        raise WeightsError(f"{sources.t5}: expected a tokenizer of at most {ids - 100} pieces "
                           f"for a T5 of {ids} ids, got {tokenizer.vocab_size} pieces; use the "
                           "files of one checkpoint")
    torch.manual_seed(config.seed)
    with device if meta else torch.device("cpu"):
        model = UMIE(t5, ViT.feature_width(sources.vit), config.max_objects, config.fusion)
    if sources.init is not None and not meta:
        method = read_state(sources.init)["config"]["method"]
        if method != "full":  # the paper's experts sit on UMIE with a trained visual adapter
            raise UsageError(f"--init {sources.init}: expected a run of method full, whose "
                             f"checkpoint holds every weight, got method {method}; name one")
        load_trainables(model, sources.init)
    options = {option.name: getattr(config, option.name) for option in fields(clorae.ExpertConfig)
               if hasattr(config, option.name)}
    clorae.adapt(model, tasks=TASKS, **options | {"mim": config.uses_mim})
    model.free_adapter(config.visual_policy)
    fast.speed_up(model.to(device), config.impl)
    model.t5.graphs = config.graphs
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and config.backbone_dropout is not None:
            module.p = config.backbone_dropout
        if isinstance(module, Stack):
            module.recompute = config.checkpoint_activations
    return Setup(config, sources, load_datasets(sources.corpus), tokenizer, model)


def load_model(checkpoint: Path, device: torch.device, **changes: object) -> Setup:
    """Rebuild a checkpoint's model with `changes` of its settings; UsageError if weights differ."""
    config = stored_config(checkpoint, **changes)
    setup = build(config, stored_sources(checkpoint, config, changes), device)
    load_trainables(setup.model, checkpoint)
    return setup


@dataclass(frozen=True)
class Decoding:
    """How answers are generated; greedy unless beams > 1."""
    batch_size: int = 32
    beams: int = 1
    max_new_tokens: int = 192
    precision: str = "fp32"  # "bf16": under autocast
    weights: str = "stored"  # "int8": see fast/int8.py

    @classmethod
    def of(cls, config: Config, batch_size: int | None = None, beams: int = 1,
           weights: str = "stored") -> "Decoding":
        """By a run's settings.  batch_size: None means that of the run's size."""
        return cls(batch_size or SIZES[config.size].decoded, beams, config.max_target,
                   computed_in(config.precision), weights)

    def __str__(self) -> str:
        search = "greedy" if self.beams == 1 else f"{self.beams} beams"
        return search + ", weights rounded to 8 bits" * (self.weights == "int8")


def deal(lengths: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of process `rank` of `world`, positions into `lengths`, longest rows first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::world]


@torch.inference_mode()
def evaluate_split(setup: Setup, examples: Sequence[Example], features: Features,
                   decoding: Decoding, world: World) -> list[Row]:
    """Decode and score a split; every process returns the same rows.  Each fills in the answers of
    its own batches and leaves the others at zero: a sum over the processes completes them."""
    model, tokenizer, device = setup.model, setup.tokenizer, world.device
    banned = tokenizer.undecodable(model.t5.config.vocab_size)
    position = {example.row: i for i, example in enumerate(examples)}
    # the ids of each answer, and in the last column 1 where an image was named but not shown
    answers = torch.zeros(len(examples), decoding.max_new_tokens + 1, dtype=torch.long)
    lengths = [len(example.input_ids) for example in examples]
    batches = deal(lengths, decoding.batch_size, world.rank, world.size)
    was_training, quiet = model.training, not world.main or len(batches) < 2
    model.eval()
    for chosen in Bar(batches, desc="decoding", unit="batch", disable=quiet, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=decoding.precision == "bf16"):
            ids = model.generate(batch, decoding.max_new_tokens, num_beams=decoding.beams,
                                 banned_ids=banned)  # [B,T]
        places = [position[row] for row in batch.rows.tolist()]
        answers[places, :ids.shape[1]] = ids.cpu()
        named = torch.tensor([examples[i].record.image is not None for i in places])
        answers[places, -1] = (named & ~batch.visual_mask.any(dim=1).cpu()).long()
    model.train(was_training)
    texts = []
    for *ids, missing in world.sum(answers.to(device)).tolist():  # where its backend expects them
        cut = tokenizer.eos_id not in ids
        ids = ids if cut else ids[:ids.index(tokenizer.eos_id) + 1]
        texts.append(Answer(tokenizer.decode(ids), cut, bool(missing), tuple(ids)))
    return score_rows([example.record for example in examples], texts, setup.datasets,
                      tokenizer.written)


def save_predictions(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per row."""
    lines = [{"id": row.record.id, "dataset": row.record.dataset, "task": row.record.task,
              "unit": row.unit, "gold": data.target(row.record), "text": row.answer.text,
              "cut": row.answer.cut, "predicted_items": items_json(row.predicted),
              "gold_items": items_json(row.gold), "malformed": row.counts.malformed,
              "missing_image": bool(row.counts.missing), "tp": row.counts.tp,
              "pred": row.counts.pred, "n_gold": row.counts.gold} for row in rows]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def items_json(items: Items) -> list[dict]:
    """Items as JSON objects without their empty fields; only arguments belong to an event."""
    return [{name: value for name, value in asdict(item).items()
             if value is not None and value is not False and (name != "event" or item.role)}
            for item in items]


def save_scores(path: Path, rows: Sequence[Row], checkpoint: Path, config: Config,
                split: str, decoding: Decoding | None = None) -> None:
    """Write what was scored, by which rules and with which result, as one JSON object: "scores" by
    the keys of `Scores`, and "records", [tp, pred, gold] of each, to compare systems on them."""
    corpus, scores, records = corpus_of(config), total(rows), defaultdict(dict)
    for row in rows:
        name, counts = f"{row.record.dataset}/{row.record.id}", row.counts
        records[row.unit][name] = [counts.tp, counts.pred, counts.gold]
    report = {"made_from": made_from(checkpoint, config, split, decoding or Decoding.of(config)),
              "data": str(corpus), "notes": notes(scores, load_datasets(corpus)),
              "scores": {name: counts_json(name, counts) for name, counts in scores.items()},
              "records": records}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                       for key, value in report.items())
    write_whole(path, f"{{{lines}}}\n")


def counts_json(name: str, counts: Counts) -> dict[str, float]:
    """One entry of `Scores` as JSON; only whole units have classes of errors."""
    if name.endswith("~umie"):
        return {"tp": counts.tp, "pred": counts.pred, "gold": counts.gold, "f1": counts.rounded_f1}
    shown = [*COUNTED[:3], "f1", "precision", "recall", *(COUNTED[3:] if name in UNITS else ())]
    shown += ["accuracy"] if UNIT_TASK.get(name) == "mre" else ()
    return {value: getattr(counts, value) for value in shown}


def made_from(checkpoint: Path, config: Config, split: str, decoding: Decoding) -> dict:
    """Everything that scores depend on, as JSON; equal for two that need not be made twice."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    return {"checkpoint": state["sha256"]["model.safetensors"], "split": split,
            "data": split_digest(corpus_of(config), split),
            "units": list(config.units) if config.units else None,
            "missing_images": config.missing_images, "decoding": asdict(decoding),
            "definitions": {**DEFINITIONS, **RULES, **VARIANTS}}


class Job:
    """A checkpoint to be scored on a split, from a folder and the options of `run_options`."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.split, self.checkpoint = folder, args.split, find_checkpoint(folder)
        names = ("data", "missing_images", "impl", "graphs", "t5", "vit", "init")
        self.changes = {name: value for name in names if (value := getattr(args, name)) is not None}
        self.changes["units"] = args.units  # None: all of them, whatever was trained on
        self.config = stored_config(self.checkpoint, **self.changes)
        self.decoding = Decoding.of(self.config, args.batch_size, args.beams, args.weights)
        self.cache = args.cache
        self.out = getattr(args, "out", None)
        if self.out and self.out.is_dir():
            raise UsageError(f"--out {self.out}: expected a file, got a folder; name a file in it")

    @cached_property
    def predictions(self) -> Path:
        """The file of the answers; only the run's own test has a name without further words."""
        own = stored_config(self.checkpoint)
        words = [f"predictions-{self.split}", *differences(self, own, Decoding.of(own))]
        return self.out or self.folder / f"{'.'.join(words)}.jsonl"

    scores = property(lambda self: self.predictions.with_name(
        f"scores-{self.predictions.stem.removeprefix('predictions-')}.json"))

    made_from = cached_property(lambda self: made_from(self.checkpoint, self.config, self.split,
                                                       self.decoding))

    def load_model(self, world: World) -> Setup:
        """The model, as it decodes."""
        setup = load_model(self.checkpoint, world.device, **self.changes)
        try:
            if self.decoding.weights == "int8":
                int8.quantize(setup.model)
        except ValueError as cause:
            raise UsageError(str(cause)) from None
        return setup

    def load(self, world: World) -> tuple[Setup, list[Example]]:
        """The model and the examples of the split."""
        setup = self.load_model(world)
        return setup, self.examples(setup, self.split, world)

    def examples(self, setup: Setup, split: str, world: World) -> list[Example]:
        records = load_corpus(setup.sources.corpus, split, self.config.units)
        return data.encode_records(records, setup.datasets, setup.tokenizer,
                                   self.config.max_source, self.config.max_target, world.print)

    def features(self, setup: Setup, examples: Sequence[Example], world: World) -> Features:
        return Features(setup.sources, [example.record for example in examples],
                        self.config.missing_images, self.config.max_objects, world.device, ViT,
                        self.cache)

    def score(self, world: World) -> tuple[Scores, dict[str, Dataset]]:
        """Decode, score and write both files; returns the scores and {name: dataset}."""
        setup, examples = self.load(world)
        features = self.features(setup, examples, world)
        world.join()
        rows = evaluate_split(setup, examples, features, self.decoding, world)
        if world.main:
            save_predictions(self.predictions, rows)
            save_scores(self.scores, rows, self.checkpoint, self.config, self.split, self.decoding)
        return total(rows), setup.datasets


# ----------------------------------------------------------------------------------- the command
def run(args: argparse.Namespace, world: World) -> None:
    """Score one checkpoint and print its table, or compare several."""
    jobs = world.together(lambda: [Job(folder, args) for folder in args.checkpoint])
    if world.size > 1:  # nodes may have folders of their own
        world.agree({f"{job.folder}, {name}": job.made_from[name] for job in jobs
                     for name in ("checkpoint", "data")})
    if len(jobs) > 1 or args.csv:
        return compare(jobs, args.csv, world)
    job, = jobs
    scores, datasets = job.score(world)
    world.print(f"{job.folder}, {job.split} split of {corpus_of(job.config)}, "
                f"{job.decoding}; predictions: {job.predictions}, scores: {job.scores}",
                table(scores, datasets))
    if args.details:
        world.print("", type_table(scores))


# What evaluate.py did until its analyses became commands of their own.
MOVED = {"--text": "answer", "--examples": "answer", "--costs": "costs", "--routing": "routing",
         "--aml-replay": "replay", "--export": "export", "--plot": "plot"}


def main(argv: Sequence[str] | None = None) -> None:
    for word in sys.argv[1:] if argv is None else argv:
        if (flag := word.partition("=")[0]) in MOVED:
            moved(f"evaluate.py {flag}", f"python -m tools.{MOVED[flag]}")
    command = Parser(
        description="Score a trained model on a split, or compare several.",
        epilog="The model is rebuilt from what its checkpoint stores; no training flag is "
               "repeated.  Under torchrun the processes share the decoding; the result is equal.",
        usage="%(prog)s CKPT [CKPT ...] [options]")
    run_options(command, several=True)
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FILE",
        help="predictions, one JSON object a row, with scores beside them; default: in CKPT, "
             "under names that say the split and what is unlike the run's own test")
    add("--details", action="store_true", help="print P, R, F1 and counts of every type, too")
    add("--csv", type=Path, metavar="FILE", help="write the rows of the comparison there, too")
    args = command.parse_args(argv)
    if len(args.checkpoint) > 1 and (args.out or args.details):
        command.error("--out and --details are for a single CKPT; several are compared")
    carry_out(run, args)


if __name__ == "__main__":
    main()
