"""Decode a split with a trained model, score it, print the paper's table; or answer one example.

    python evaluate.py runs/demo-tiny-clorae                    the test split, all seven columns
    torchrun --nproc_per_node=4 evaluate.py RUN --data DIR      the same, shared by four processes
    python evaluate.py RUN --text "..." --image I --task mner   one example, as JSON

References: C-LoRAE (arXiv 2505.06303), Table 2 for the columns and Eq. (9) for `unit_f1`; entities
as in UMT's ner_evaluate, relations as in HVPNeT's eval_result, events as in M2E2 (ACL 2020).
DEFINITIONS below says in one line each what a column counts.

Scoring is integer counting per record; percentages are formed once, at the end, without rounding.
Batches are built from the whole split and dealt to the processes whole, so the texts, and with them
the counts, do not depend on how many processes there are.

Shapes: T target tokens, V visual tokens, F image-feature width.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import UNITS, DataError, Dataset, Example, Item, Record, Tokenizer
from t5 import WeightsError
from vision import FeatureCache, ImageError, ViT

if TYPE_CHECKING:
    import train  # imports this file; at run time only the functions that need it do the same

IOU_MATCH = 0.5  # M2E2: an object argument is right from this overlap on

DEFINITIONS = {
    "T15": "entity (type, first token, last token), multiset per tweet",
    "T17": "entity (type, first token, last token), multiset per tweet",
    "SNAP": "entity (type, first token, last token), multiset per tweet",
    "V1": "relation label of the given pair; none counts neither as found nor as gold",
    "V2": "relation label of the given pair; none counts neither as found nor as gold",
    "MED": "event (type, trigger span), or (type, whole image)",
    "MEAE": f"argument (type, role, span), or (type, role, box) one-to-one at IoU >= {IOU_MATCH}",
}


# ---------------------------------------------------------------------------------------- counts

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

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self),
                                              dataclasses.astuple(other))))

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


Scores = dict[str, Counts]  # by "MEAE", its part "MEAE/object", or its dataset "MEAE@swig"


def percent(part: int, whole: int) -> float:
    """100 part / whole, and 0 when there is nothing to score."""
    return 100.0 * part / whole if whole else 0.0


def unit_f1(scores: Scores) -> dict[str, float]:
    """F1 in % of each unit: the s of Eq. (9).

    Where several datasets share a unit (ACE2005 and SWiG both train MED), it is the mean of their
    F1, so that the larger one does not speak for both.
    """
    each: dict[str, list[float]] = {}
    for name, counts in scores.items():
        if "@" in name:
            each.setdefault(name.split("@")[0], []).append(counts.f1)
    return {unit: sum(each[unit]) / len(each[unit]) for unit in UNITS if unit in each}


# -------------------------------------------------------------------------------------- matching

def place(item: Item) -> tuple | None:
    """What an item without a box says and where; None if its text was not found in the record."""
    if item.whole_image:
        return item.label, item.role, "image"
    return None if item.span is None else (item.label, item.role, tuple(item.span))


def span_matches(gold: Sequence[Item], predicted: Sequence[Item]) -> int:
    """Size of the multiset intersection: a second equal prediction needs a second equal gold."""
    places = [Counter(map(place, items)) for items in (gold, predicted)]
    common = places[0] & places[1]
    del common[None]  # not found is never right
    return common.total()


def box_matches(gold: Sequence[Item], predicted: Sequence[Item]) -> int:
    """Pairs of boxes with equal (type, role), one to one, taken greedily by falling IoU.

    The official M2E2 scorer lets two predictions match one gold box; here a box matches once.
    """
    pairs = [(-data.iou(g.box, p.box), i, j)
             for i, g in enumerate(gold) for j, p in enumerate(predicted)
             if g.box and p.box and (g.label, g.role) == (p.label, p.role)]
    used_gold, used_predicted = set(), set()
    for overlap, i, j in sorted(pairs):
        if -overlap >= IOU_MATCH and i not in used_gold and j not in used_predicted:
            used_gold.add(i)
            used_predicted.add(j)
    return len(used_gold)


def is_object(item: Item) -> bool:
    """Whether an argument is a box, or names an object by number, existing or not."""
    return item.box is not None or item.object is not None


def count(task: str, gold: Sequence[Item], predicted: Sequence[Item], malformed: int = 0) -> Counts:
    """Counts of one record; `malformed` is what the parser could not use of its output."""
    if task == "mre":
        gold = [item for item in gold if item.label != "none"]
        predicted = [item for item in predicted if item.label != "none"]
        tp = len({item.label for item in gold} & {item.label for item in predicted})
    else:
        tp = span_matches(gold, predicted) + box_matches(gold, predicted)
    exact = tp == len(predicted) == len(gold)
    return Counts(tp, len(predicted), len(gold), malformed, int(exact), rows=1)


# --------------------------------------------------------------------------------------- scoring

@dataclass(frozen=True)
class Answer:
    """What the model wrote for one record, before it is read."""

    text: str
    cut: bool = False  # it reached the length limit, so its last item may be incomplete
    missing: bool = False  # the record names an image, and the model was shown none


@dataclass(frozen=True)
class Row:
    """One scored record."""

    record: Record
    unit: str
    answer: Answer
    gold: list[Item]
    predicted: list[Item]
    counts: Counts
    parts: Scores = field(default_factory=dict)  # MEAE: "text" and "object"


def pair_of(record: Record) -> tuple[str, str]:
    """What the trigger and the argument record of one sentence-image pair have in common."""
    return record.dataset, record.id.rsplit("/", 1)[0]


def predicted_triggers(records: Sequence[Record], answers: Sequence[Answer],
                       datasets: Mapping[str, Dataset]) -> dict[tuple[str, str], dict[str, int]]:
    """{pair: {event type: first token of its first predicted trigger}} of all MED predictions."""
    triggers: dict[tuple[str, str], dict[str, int]] = {}
    for record, answer in zip(records, answers, strict=True):
        if record.task == "med":
            items, _ = data.predicted_items(record, answer.text, datasets[record.dataset],
                                            cut=answer.cut)
            found = triggers.setdefault(pair_of(record), {})
            for item in items:
                if item.span is not None:
                    found.setdefault(item.label, item.span[0])
    return triggers


def score_row(record: Record, answer: Answer, dataset: Dataset,
              triggers: Mapping[str, int] | None = None) -> Row:
    """Parse and score one answer; `triggers` as `predicted_triggers` gives them for its pair."""
    predicted, malformed = data.predicted_items(record, answer.text, dataset, triggers, answer.cut)
    gold = data.gold_items(record)
    counts = count(record.task, gold, predicted, malformed) + Counts(missing=int(answer.missing))
    parts = {}
    if record.task == "meae":
        parts = {name: count("meae", [item for item in gold if is_object(item) == objects],
                             [item for item in predicted if is_object(item) == objects])
                 for name, objects in (("text", False), ("object", True))}
    return Row(record, dataset.units[record.task], answer, gold, predicted, counts, parts)


def score_rows(records: Sequence[Record], answers: Sequence[Answer],
               datasets: Mapping[str, Dataset]) -> list[Row]:
    """Parse and score one answer per record.

    Argument strings are mapped to the occurrence nearest to the trigger that the same run predicted
    for the same pair; the gold trigger is never looked at.
    """
    triggers = predicted_triggers(records, answers, datasets)
    return [score_row(record, answer, datasets[record.dataset],
                      triggers.get(pair_of(record)) if record.task == "meae" else None)
            for record, answer in zip(records, answers, strict=True)]


def total(rows: Sequence[Row]) -> Scores:
    """Sum the rows per unit, per part of a unit and per dataset of a unit."""
    scores: Scores = {}
    for row in rows:
        named = {row.unit: row.counts, f"{row.unit}@{row.record.dataset}": row.counts}
        named.update({f"{row.unit}/{part}": counts for part, counts in row.parts.items()})
        for name, counts in named.items():
            scores[name] = scores.get(name, Counts()) + counts
    return scores


def score_predictions(records: Sequence[Record], texts: Sequence[str],
                      datasets: Mapping[str, Dataset]) -> Scores:
    """Counts per unit of one raw output text per record; see `Scores` for the keys."""
    return total(score_rows(records, [Answer(text) for text in texts], datasets))


# ----------------------------------------------------------------------------------------- table

def table(scores: Scores) -> str:
    """The paper's seven columns, their sum, and below what each of them counts."""
    present = [unit for unit in UNITS if unit in scores]
    lines = ["".join([f"{'':10}"] + [f"{unit:>8}" for unit in UNITS] + [f"{'All':>9}{'mean':>8}"])]
    for name, value in (("F1", "f1"), ("P", "precision"), ("R", "recall")):
        cells = {unit: getattr(scores[unit], value) for unit in present}
        lines.append(table_row(name, cells, ".2f"))
        if name == "F1" and present:
            summed = sum(cells.values())
            lines[-1] += f"{summed:9.2f}{summed / len(present):8.2f}"
    for name in ("tp", "pred", "gold", "rows", "malformed", "missing"):
        cells = {unit: getattr(scores[unit], name) for unit in present}
        lines.append(table_row(name, cells, "d") + f"{sum(cells.values()):9d}")
    lines.append("")
    lines += [f"{unit:5}{DEFINITIONS[unit]}{details(unit, scores)}" for unit in present]
    lines += [f"All  sum of the F1 of {len(present)} of {len(UNITS)} columns, as in the paper; "
              "micro-averaged F1, P, R in %, 0/0 = 0",
              "malformed: unusable pieces of output, never scored; missing: rows whose image file "
              "was not there"]
    return "\n".join(lines)


def table_row(name: str, cells: Mapping[str, float], form: str) -> str:
    """One line of the table, with "-" in the columns that have no rows."""
    return f"{name:10}" + "".join(f"{cells[u]:8{form}}" if u in cells else f"{'-':>8}"
                                  for u in UNITS)


def details(unit: str, scores: Scores) -> str:
    """What stands beside a unit's F1: accuracy, parts, and its datasets if there are several."""
    notes = []
    if unit in ("V1", "V2"):
        notes.append(f"accuracy {scores[unit].accuracy:.2f}")
    notes += [f"{name.split('/')[1]} only F1 {counts.f1:.2f}"
              for name, counts in sorted(scores.items()) if name.startswith(unit + "/")]
    each = sorted(name for name in scores if name.startswith(unit + "@"))
    if len(each) > 1:
        notes += [f"{name.split('@')[1]} F1 {scores[name].f1:.2f}" for name in each]
    return f" ({', '.join(notes)})" if notes else ""


def save_predictions(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per row, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(aside, "w", encoding="utf-8") as file:
        for row in rows:
            counts = row.counts
            line = {"id": row.record.id, "dataset": row.record.dataset, "task": row.record.task,
                    "unit": row.unit, "gold": data.target(row.record),
                    "text": row.answer.text, "cut": row.answer.cut,
                    "predicted_items": items_json(row.predicted),
                    "gold_items": items_json(row.gold),
                    "malformed": counts.malformed, "missing_image": bool(counts.missing),
                    "tp": counts.tp, "pred": counts.pred, "n_gold": counts.gold}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def items_json(items: Sequence[Item]) -> list[dict]:
    """Items as JSON objects without their empty fields; only arguments belong to an event."""
    return [{name: value for name, value in dataclasses.asdict(item).items()
             if value is not None and value is not False and (name != "event" or item.role)}
            for item in items]


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


def deal(lengths: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This process' batches, as positions into `lengths`.

    The batches are those of the whole split, longest rows first, whatever the number of processes;
    process r takes batches r, r + world, ...
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::world]


@torch.inference_mode()
def generate_ids(model: nn.Module, examples: Sequence[Example],
                 features: Features, tokenizer: Tokenizer,
                 device: torch.device, decoding: Decoding, rank: int = 0,
                 world: int = 1) -> Tensor:
    """Answers to this process' share of the examples -> ids [len(examples), T + 1], int64.

    Rows of other processes stay zero, so that adding up all processes' tensors completes it.  The
    last column is 1 where a row names an image but got no visual tokens.
    """
    banned = tokenizer.undecodable(model.t5.config.vocab_size)
    answers = torch.zeros(len(examples), decoding.max_new_tokens + 1, dtype=torch.long)
    position = {example.row: i for i, example in enumerate(examples)}
    batches = deal([len(e.input_ids) for e in examples], decoding.batch_size, rank, world)
    was_training = model.training
    model.eval()
    quiet = rank > 0 or len(batches) < 2
    for chosen in tqdm(batches, desc="decoding", unit="batch", disable=quiet, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=decoding.precision == "bf16"):
            ids = model.generate(batch, decoding.max_new_tokens, num_beams=decoding.beams,
                                 banned_ids=banned)
        places = [position[int(row)] for row in batch.rows]
        answers[places, :ids.shape[1]] = ids.cpu()
        named = torch.tensor([examples[i].record.image is not None for i in places])
        answers[places, -1] = (named & ~batch.visual_mask.any(dim=1).cpu()).long()
    model.train(was_training)
    return answers


def generate_answers(model: nn.Module, examples: Sequence[Example],
                   features: Features,
                   tokenizer: Tokenizer, device: torch.device, decoding: Decoding = Decoding(),
                   rank: int = 0, world: int = 1) -> list[Answer]:
    """Answers, one per example and all of them on every process.

    The processes meet once, after all of them have generated.
    """
    answers = generate_ids(model, examples, features, tokenizer, device, decoding, rank, world)
    if world > 1:
        answers = answers.to(device)  # where the process group's backend expects it
        dist.all_reduce(answers)
    return [Answer(tokenizer.decode(ids), cut=tokenizer.eos_id not in ids, missing=bool(missing))
            for *ids, missing in answers.tolist()]


def evaluate_split(model: nn.Module, examples: Sequence[Example], datasets: Mapping[str, Dataset],
                   features: Features,
                   tokenizer: Tokenizer, device: torch.device, decoding: Decoding = Decoding(),
                   rank: int = 0, world: int = 1) -> list[Row]:
    """Decode and score a split; every process returns the same rows.  `total` sums them."""
    answers = generate_answers(model, examples, features, tokenizer, device, decoding, rank, world)
    return score_rows([example.record for example in examples], answers, datasets)


# ------------------------------------------------------------------------------------ the command

def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description="Score a trained model on a split, or let it answer one example.",
        epilog="The model is rebuilt from what its checkpoint stores; no training flag is "
               "repeated.  Under torchrun the processes share the decoding; the result is equal.",
        allow_abbrev=False)
    result.add_argument("checkpoint", type=Path, metavar="CKPT",
                        help="run folder (its best checkpoint is used) or checkpoint folder")
    split = result.add_argument_group("scoring a split")
    split.add_argument("--split", choices=("test", "dev", "train"), default="test",
                       help="default: test")
    split.add_argument("--data", metavar="DIR", help="corpus folder; default: the one trained on")
    split.add_argument("--units", nargs="+", choices=UNITS, metavar="UNIT",
                       help=f"only these columns ({' '.join(UNITS)}); default: all in the corpus")
    split.add_argument("--missing-images", choices=("error", "mask"),
                       help="mask: rows whose image file is missing are answered without it, and "
                            "counted; default: as in training")
    split.add_argument("--out", type=Path, metavar="FILE",
                       help="predictions, one JSON object a row; default: "
                            "CKPT/predictions-SPLIT.jsonl")
    decoding = result.add_argument_group("decoding")
    decoding.add_argument("--beams", type=int, default=1, metavar="N",
                          help="beam search over N beams; default: 1, greedy")
    decoding.add_argument("--batch-size", type=int, default=32, metavar="N",
                          help="rows decoded together; default: 32")
    example = result.add_argument_group("answering one example (instead of scoring)")
    example.add_argument("--text", metavar="T", help="the sentence, tokens separated by spaces")
    example.add_argument("--image", type=Path, metavar="FILE", help="its image, if it has one")
    example.add_argument("--task", choices=("mner", "mre", "med", "meae"), help="what to extract")
    example.add_argument("--dataset", metavar="NAME",
                         help="whose labels to offer; default: the first dataset with the task")
    example.add_argument("--head", metavar="WORDS", help="mre: the head entity, as in the text")
    example.add_argument("--tail", metavar="WORDS", help="mre: the tail entity, as in the text")
    return result


@dataclass
class OneImage:
    """Features of a single example: the whole image, or nothing."""

    width: int
    visual: tuple[Tensor, Tensor] | None = None

    @classmethod
    def load(cls, tower: Path, image: Path | None) -> "OneImage":
        """The image through the ViT in the folder `tower`."""
        if image is None:
            return cls(ViT.feature_width(tower))
        with TemporaryDirectory() as folder:
            cache = FeatureCache(ViT.from_pretrained(tower).eval(), "once", folder)
            return cls(ViT.feature_width(tower), cache.get(image, [], None))

    def __call__(self, record: Record) -> tuple[Tensor, Tensor] | None:
        return self.visual


def find_words(tokens: Sequence[str], words: str | None, flag: str) -> tuple[int, int]:
    """The first span of `tokens` that reads `words`; DataError if there is none."""
    spans = data.occurrences([data.canon(token) for token in tokens], data.canon(words or ""))
    if not spans:
        raise DataError(f"{flag}: expected words of the text, got {words!r}, which is not in "
                        f"{' '.join(tokens)!r}; give whole tokens as they stand there")
    return spans[0]


def example_record(args: argparse.Namespace, datasets: Mapping[str, Dataset]) -> Record:
    """The record that --text, --image, --task, --dataset, --head and --tail describe."""
    able = [name for name, dataset in datasets.items() if args.task in dataset.units]
    name = args.dataset or (able[0] if able else None)
    if name not in able:
        raise DataError(f"--dataset: expected one with the task {args.task}, got {name!r}; "
                        f"use one of: {', '.join(able) or 'none in this corpus'}")
    tokens = tuple(args.text.split())
    pair = {}
    if args.task == "mre":
        pair = {"head": find_words(tokens, args.head, "--head"), "relation": "none",
                "tail": find_words(tokens, args.tail, "--tail")}
    image = None if args.image is None else str(args.image)
    return Record("example", name, args.task, tokens, image, source="--text", **pair)


def answer_example(args: argparse.Namespace, setup: "train.Setup", device: torch.device) -> dict:
    """The model's raw answer to one example and the items read from it, as JSON values."""
    record, config = example_record(args, setup.datasets), setup.config
    examples = data.encode_records([record], setup.datasets, setup.tokenizer, config.max_source,
                                   config.max_target)
    features = OneImage.load(setup.sources.vit, args.image)
    decoding = Decoding(1, args.beams, config.max_target, config.precision)
    row = evaluate_split(setup.model, examples, setup.datasets, features, setup.tokenizer, device,
                         decoding)[0]
    return {"text": row.answer.text, "items": items_json(row.predicted),
            "malformed": row.counts.malformed}


def run(args: argparse.Namespace) -> None:
    """Load the checkpoint and do what the command line asks."""
    import train
    world = train.World()
    changes = {name: value for name, value in (("data", args.data),
                                               ("missing_images", args.missing_images)) if value}
    setup = train.load_model(train.find_checkpoint(args.checkpoint), world.device, **changes)
    config, datasets = setup.config, setup.datasets
    if args.text is not None:
        world.print(json.dumps(answer_example(args, setup, world.device), ensure_ascii=False))
        return
    records = data.load_corpus(setup.sources.corpus, args.split, args.units)
    examples = data.encode_records(records, datasets, setup.tokenizer, config.max_source,
                                   config.max_target, world.print)
    features = train.Features(setup.sources, records, config.missing_images, config.max_objects,
                              world.device)
    decoding = Decoding(args.batch_size, args.beams, config.max_target, config.precision)
    world.join()
    rows = evaluate_split(setup.model, examples, datasets, features, setup.tokenizer, world.device,
                          decoding, world.rank, world.size)
    out = args.out or args.checkpoint / f"predictions-{args.split}.jsonl"
    if world.main:
        save_predictions(out, rows)
    world.print(f"{args.checkpoint}, {args.split} split of {setup.sources.corpus}, "
                f"{'greedy' if args.beams == 1 else f'{args.beams} beams'}; predictions: {out}",
                table(total(rows)))
    world.leave()


def main(argv: Sequence[str] | None = None) -> None:
    command = parser()
    args = command.parse_args(argv)
    if args.text is not None and (args.task is None or not args.text.split()):
        command.error("--text needs some words and --task mner, mre, med or meae")
    if args.text is None and (args.task or args.image):
        command.error("--task and --image describe a single example; give its --text too")
    if args.beams < 1 or args.batch_size < 1:
        command.error("--beams and --batch-size must be at least 1")
    import train
    try:
        run(args)
    except (train.UsageError, DataError, ImageError, WeightsError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
