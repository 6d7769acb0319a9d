"""What is counted as right, and that decoding does not depend on who does it.

The cases N*, R*, E* and A* are worked examples: gold, prediction, and P / R / F in %.  N1-N13 agree
with UMT's ner_evaluate and seqeval, R1-R9 with HVPNeT's eval_result; what UMIE's own scorer says of
them is tested beside, where that is not one of its defects.
"""

import csv
import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import data
import evaluate
from data import Item
from engine.checkpoints import find_checkpoint, read_state
from engine.compare import System, difference, system_names
from engine.corpus import load_corpus, load_datasets, read_splits, write_dataset
from engine.files import file_hash
from engine.processes import World
from engine.schema import RECORD_TASKS, UNITS, DataError, Dataset, Record
from engine.settings import Config
from evaluate import Answer, Counts, Decoding
from tools import answer, extract

SPIECE = Path(__file__).parent / "golden" / "tokenizer"
ENTITY_TYPES = ["location", "miscellaneous", "organization", "person"]
RELATIONS = ["couple", "member of", "none", "peer"]
ROLES = {"arrest jail": ["agent", "person"], "attack": ["attacker", "place", "target"],
         "die": ["victim"], "meet": ["entity"]}
TWEETS = Dataset("tweets", {"mner": "T15"}, {"mner": ENTITY_TYPES})
PAIRS = Dataset("pairs", {"mre": "V1"}, {"mre": RELATIONS})
NEWS = Dataset("news", {"med": "MED", "meae": "MEAE"}, {"med": sorted(ROLES), "meae": ROLES})
DATASETS = {dataset.name: dataset for dataset in (TWEETS, PAIRS, NEWS)}


def entity(kind: str, start: int, end: int) -> dict:
    return {"type": kind, "start": start, "end": end}


def argument(role: str, **where: object) -> dict:
    return {"role": role, **where}


def event(kind: str, trigger: tuple[int, int] | None, arguments: Sequence[dict] = ()) -> dict:
    return {"type": kind, "trigger": trigger, "arguments": list(arguments)}


def prf(counts: Counts) -> tuple[float, float, float]:
    return tuple(round(x, 2) for x in (counts.precision, counts.recall, counts.f1))


def score_predictions(records: Sequence[Record], texts: Sequence[str],
                      datasets: dict[str, Dataset]) -> evaluate.Scores:
    """The counts of one raw output text per record."""
    rows = evaluate.score_rows(records, [Answer(text) for text in texts], datasets)
    return evaluate.total(rows)


def score(records: list[Record], texts: list[str], unit: str) -> Counts:
    return score_predictions(records, texts, DATASETS)[unit]


def umie(records: list[Record], texts: list[str], unit: str) -> tuple[float, float, float]:
    """P / R / F by UMIE's rule."""
    counts = score(records, texts, f"{unit}~umie")
    return round(counts.precision, 2), round(counts.recall, 2), round(counts.rounded_f1, 2)


# ------------------------------------------------------------------------------- MNER, N1 - N13

def chunks(tags: str) -> list[dict]:
    """Lenient BIO: a chunk starts at B-X, and at an I-X that does not continue an X."""
    names = {"PER": "person", "LOC": "location", "ORG": "organization", "MISC": "miscellaneous"}
    found, open_type = [], None
    for i, tag in enumerate(tags.split()):
        kind = tag[2:] or None
        if kind and (tag[0] == "B" or kind != open_type):
            found.append([kind, i, i + 1])
        elif kind:
            found[-1][2] = i + 1
        open_type = kind
    return [entity(names[kind], start, end) for kind, start, end in found]


def tweet(tokens: str, entities: list[dict], name: str = "t") -> Record:
    return Record(name, "tweets", "mner", tuple(tokens.split()), entities=tuple(entities))


NER_CASES = {
    "N1": (["B-PER I-PER O B-LOC"], ["B-PER I-PER O B-LOC"], (100, 100, 100)),
    "N2": (["B-PER I-PER O B-LOC"], ["B-PER I-PER O O"], (100, 50, 66.67)),
    "N3": (["B-PER I-PER O B-LOC"], ["B-ORG I-ORG O B-LOC"], (50, 50, 50)),
    "N4": (["B-PER I-PER O B-LOC"], ["B-PER O O B-LOC"], (50, 50, 50)),
    "N6": (["B-PER O O"], ["B-PER O B-MISC"], (50, 100, 66.67)),
    "N7": (["O O"], ["O O"], (0, 0, 0)),
    "N8": (["O I-PER I-PER"], ["O B-PER I-PER"], (100, 100, 100)),
    "N9": (["B-PER I-LOC O"], ["B-PER B-LOC O"], (100, 100, 100)),
    "N10": (["B-PER O", "B-LOC B-ORG"], ["B-PER B-MISC", "B-LOC O"], (66.67, 66.67, 66.67)),
}


@pytest.mark.parametrize("case", NER_CASES)
def test_an_entity_is_right_when_type_start_and_end_are(case: str) -> None:
    """Multiset of (type, start, end) per tweet; the prediction goes through text and back."""
    gold, predicted, expected = NER_CASES[case]
    records, texts = [], []
    for i, (ours, theirs) in enumerate(zip(gold, predicted)):
        tokens = " ".join(f"word{j}" for j in range(len(ours.split())))
        records.append(tweet(tokens, chunks(ours), f"t{i}"))
        texts.append(data.target(tweet(tokens, chunks(theirs))))
    assert prf(score(records, texts, "T15")) == expected


def test_two_gold_entities_with_one_surface_need_two_predictions() -> None:
    """N5: "Bob and Bob", one Bob predicted: 100 / 50 / 66.67 (UMIE's scorer says 100)."""
    record = tweet("Bob and Bob", [entity("person", 0, 1), entity("person", 2, 3)])
    assert prf(score([record], ["person, Bob"], "T15")) == (100, 50, 66.67)
    assert umie([record], ["person, Bob"], "T15") == (100, 100, 100)
    assert prf(score([record], ["person, Bob <spot> person, Bob"], "T15")) == (100, 100, 100)


def test_a_repeated_prediction_without_a_second_occurrence_costs_precision() -> None:
    """N11: gold {Bob}, predicted Bob twice: 50 / 100 / 66.67."""
    record = tweet("hi Bob", [entity("person", 1, 2)])
    texts = ["person, Bob <spot> person, Bob"]
    assert prf(score([record], texts, "T15")) == umie([record], texts, "T15") == (50, 100, 66.67)


def test_matching_is_case_sensitive() -> None:
    """N12: Bob is not bob; the item counts as predicted and cannot be right."""
    record = tweet("hi Bob", [entity("person", 1, 2)])
    for unit in ("T15", "T15~umie"):
        counts = score([record], ["person, bob"], unit)
        assert (counts.tp, counts.pred, counts.gold) == (0, 1, 1)


def test_percentages_are_formed_without_intermediate_rounding() -> None:
    """N13: 1 right of 6 predicted and 7 gold: F = 2/13 = 15.3846 (15.39 if P, R are rounded)."""
    counts = Counts(tp=1, pred=6, gold=7)
    assert prf(counts) == (16.67, 14.29, 15.38)
    assert counts.f1 == 100 * 2 / 13
    assert counts.rounded_f1 == 15.39


# ------------------------------------------------------------------------ the gold answer itself

def of_events(text: str, *events: dict) -> list[Record]:
    """A sentence as a med and a meae record."""
    return [Record(f"s/{task}", "news", task, tuple(text.split()), events=events)
            for task in ("med", "meae")]


GUNMAN = "A gunman killed two guards on Monday"
PERFECT = {
    "one word, two event types": of_events(
        GUNMAN, event("attack", (2, 3), [argument("attacker", span=(0, 2))]),
        event("die", (2, 3), [argument("victim", span=(3, 5))])),
    "one argument of both": of_events(
        GUNMAN, event("attack", (2, 3), [argument("target", span=(3, 5))]),
        event("die", (2, 3), [argument("victim", span=(3, 5))])),
    "one word, three event types": of_events("The bombing of the market", *(
        event(name, (1, 2)) for name in ("attack", "die", "meet"))),
    "the word comes again, with an event": of_events(
        "Gunmen killed two and killed again", event("attack", (1, 2)), event("die", (1, 2)),
        event("die", (4, 5))),
    "the word comes again, without event": of_events(
        "He killed two ; killed is a word", event("attack", (1, 2)), event("die", (1, 2))),
    "the word comes again, both types both times": of_events("killed , killed", *(
        event(name, (i, i + 1)) for i in (0, 2) for name in ("attack", "die"))),
    "the arguments of the second event are nearest to its trigger": of_events(
        "guards saw how gunmen killed guards", event("attack", (4, 5)),
        event("die", (4, 5), [argument("victim", span=(5, 6))])),
    "one argument, two events of one type and role": of_events(
        "Rebels shot and bombed the town", *(
            event("attack", (i, i + 1), [argument("target", span=(4, 6))]) for i in (1, 3))),
    "two events of one type, each with its own argument of one word": of_events(
        "he killed him and she killed him", *(event("attack", (i, i + 1), [
            argument("target", span=(i + 1, i + 2))]) for i in (1, 5))),
    "the first of two events of one type has no arguments": of_events(
        "he killed and saw him when she killed him", event("attack", (1, 2)),
        event("attack", (7, 8), [argument("target", span=(8, 9))])),
    "one entity of two types": [
        tweet("I love Liverpool !", [entity("location", 2, 3), entity("organization", 2, 3)])],
    "two entities of two types": [
        tweet("Bob in Bob", [entity("person", 0, 1), entity("location", 2, 3)])],
    "head and tail are one word": [Record("p", "pairs", "mre", ("Bob", "and", "Bob"), head=(0, 1),
                                          tail=(0, 1), relation="couple")]}


@pytest.mark.parametrize("records", PERFECT.values(), ids=PERFECT)
def test_the_gold_answer_scores_100(records: list[Record]) -> None:
    """A place may be used again under another label, and not under the same."""
    scores = score_predictions(records, list(map(data.target, records)), DATASETS)
    assert {c.f1 for unit, c in scores.items() if unit in UNITS and c.gold} == {100}
    assert {c.rounded_f1 for unit, c in scores.items() if "~umie" in unit and c.gold} == {100}


def test_triggers_of_one_sentence_are_not_those_of_another() -> None:
    """Ids with slashes: only NAME/med and NAME/meae belong together."""
    gold = event("attack", (0, 1), [argument("target", span=(1, 2))])
    records = [Record("doc/1", "news", "med", tuple("and then they bombed".split())),
               Record("doc/2", "news", "meae", tuple("hit me before me".split()), events=(gold,))]
    answers = ["attack, bombed", "attack <spot> target, me"]
    assert score_predictions(records, answers, DATASETS)["MEAE"].f1 == 100


BLANK = {"zero width space": "\u200b", "zero width non-joiner": "\u200c", "left-to-right": "\u200e",
         "right-to-left mark": "\u200f", "byte order mark": "\ufeff", "replacement": "\ufffd",
         "lower one eighth block": "\u2581", "arabic letter mark": "\u061c"}
UNKNOWN = ("An{n}", "A~n", "A<n", "\u0410\u043d\u043d\u0430", "Ann\U0001f600", "Bu\u00f1uel",
           "\\", "^^", "\ufe0f", "\u2764\ufe0f", "\u6771\u4eac", "\u2047", "a\u2060b", "\u2026",
           "<spot>", "</s>", "<unk>")


@pytest.mark.parametrize("word", [*(word for ch in BLANK.values() for word in (
    f"New{ch}York", f"{ch}York", f"York{ch}")), *UNKNOWN, "O\u2082", "O2"])
@pytest.mark.parametrize("form", ["med", "mner"])
def test_a_perfect_answer_scores_100_as_the_tokenizer_writes_it(
        word: str, form: str, lean: data.Tokenizer) -> None:
    """Blanks of T5's normaliser, characters without a piece, words that look like structure: what
    the tokenizer makes of the target is compared with what it makes of the text."""
    record = tweet(f"He is in {word} now", [entity("location", 3, 4)])
    if form == "med":
        record = of_events(f"He is in {word} now", event("attack", (3, 4)))[0]
    said = lean.decode(lean.encode(data.target(record)))
    [row] = evaluate.score_rows([record], [Answer(said)], DATASETS, lean.written)
    assert (row.counts.f1, row.predicted) == (100, data.gold_items(record))


# --------------------------------------------------------------------------------- MRE, R1 - R9

def pair(relation: str, name: str = "p") -> Record:
    return Record(name, "pairs", "mre", ("Kim", "Lee", "met", "Bo"), head=(0, 2), tail=(3, 4),
                  relation=relation)


R6 = ("couple none peer member_of none", "couple peer none member_of none")
# name: (gold, predicted, P / R / F, accuracy, UMIE's F)
MRE_CASES = {
    "R1": ("couple none", "couple none", (100, 100, 100), 100, 100),
    "R2": ("none couple", "couple couple", (50, 100, 66.67), 50, 50),
    "R3": ("couple couple", "none couple", (100, 50, 66.67), 50, 50),
    "R4": ("couple peer", "peer peer", (50, 50, 50), 50, 50),
    "R5": ("none none", "none none", (0, 0, 0), 100, 100),
    "R6": (*R6, (66.67, 66.67, 66.67), 60, 60),
    "R7": ("none " * 6 + "peer " * 4, "none " * 10, (0, 0, 0), 60, 60),
    "R8": ("peer peer none", "?? peer none", (100, 50, 66.67), 66.67, 80),
    # The head "Kim Lee" has two tokens here, in which case UMIE's scorer loses the row; not we.
    "R9": (*R6, (66.67, 66.67, 66.67), 60, 60),
}


@pytest.mark.parametrize("case", MRE_CASES)
def test_none_is_no_relation_and_accuracy_stands_beside(case: str) -> None:
    """none is excluded from tp, predicted and gold; an output that cannot be read means none.

    UMIE counts none like any relation, and an output that cannot be read as no prediction.
    """
    gold, predicted, expected, accuracy, umie_f1 = MRE_CASES[case]
    records = [pair(label.replace("_", " "), f"p{i}") for i, label in enumerate(gold.split())]
    texts = ["no relation here" if label == "??" else data.target(pair(label.replace("_", " ")))
             for label in predicted.split()]
    counts = score(records, texts, "V1")
    assert prf(counts) == expected
    assert round(counts.accuracy, 2) == accuracy
    assert counts.malformed == predicted.count("??")
    assert umie(records, texts, "V1")[2] == umie_f1


# --------------------------------------------------------------------------------- MED, E1 - E8

STRIKE = "the strike before the second airstrike and strike killed many"


def sentence(task: str, events: list[dict], text: str = STRIKE, name: str = "s",
             objects: tuple = (), image: str | None = None) -> Record:
    return Record(f"{name}/{task}", "news", task, tuple(text.split()), image, None, objects,
                  events=tuple(events))


AIRSTRIKE, SECOND_STRIKE, KILLED = (5, 6), (7, 8), (8, 9)
MED_CASES = {
    "E1": ([[event("attack", AIRSTRIKE)]], ["attack, airstrike"], (100, 100, 100)),
    "E2": ([[event("attack", AIRSTRIKE)]], ["attack, bombing"], (0, 0, 0)),
    "E3": ([[event("attack", AIRSTRIKE)]], ["die, airstrike"], (0, 0, 0)),
    "E4": ([[event("attack", AIRSTRIKE)], [event("die", KILLED)]], ["attack, airstrike", "none"],
           (100, 50, 66.67)),
    "E5": ([[event("attack", AIRSTRIKE)]], ["attack, airstrike <spot> die, killed"],
           (50, 100, 66.67)),
    "E6": ([[event("attack", SECOND_STRIKE)]], ["attack, strike"], (0, 0, 0)),
    "E8": ([[event("attack", (5, 6))], [event("meet", (1, 2))], [event("die", KILLED)]],
           ["attack, airstrike", "die, strike", "die, killed"], (66.67, 66.67, 66.67)),
}


@pytest.mark.parametrize("case", MED_CASES)
def test_an_event_is_right_when_type_and_trigger_span_are(case: str) -> None:
    """(type, start, end) per pair; a trigger that is not in the text counts as predicted."""
    gold, texts, expected = MED_CASES[case]
    records = [sentence("med", events, name=f"s{i}") for i, events in enumerate(gold)]
    assert prf(score(records, texts, "MED")) == expected
    assert umie(records, texts, "MED") == ((100, 100, 100) if case == "E6" else expected)


@pytest.mark.parametrize("text, expected", [("attack, O0", 100), ("meet, O0", 0)])
def test_the_trigger_of_an_image_only_sample_is_the_whole_image(text: str, expected: int) -> None:
    """E7: gold (attack, O0)."""
    record = sentence("med", [event("attack", None)], text="", image="a.jpg")
    assert score([record], [text], "MED").f1 == umie([record], [text], "MED")[2] == expected


# -------------------------------------------------------------------------------- MEAE, A1 - A10

WORDS = " ".join(f"w{i}" for i in range(15)) + " coalition struck"
GOLD_BOX = (1, 190, 508, 353)
TEN = (10, 10, 50, 50)
BOTH = [argument("attacker", span=(15, 16)), argument("target", box=GOLD_BOX, object=1)]


def boxes(*corners: tuple) -> list[dict]:
    return [argument("target", box=box, object=None) for box in corners]


# name: (gold arguments, the objects the model saw, what it wrote, P / R / F)
MEAE_CASES = {
    "A1": (BOTH, [GOLD_BOX], "attack <spot> attacker, coalition <spot> target, O1",
           (100, 100, 100)),
    "A2": (BOTH, [GOLD_BOX], "attack <spot> place, coalition <spot> target, O1", (50, 50, 50)),
    "A4": (boxes(TEN), [(10, 10, 50, 90)], "attack <spot> target, O1", (100, 100, 100)),
    "A5": (boxes(TEN), [TEN, (11, 11, 50, 50)], "attack <spot> target, O1 <spot> target, O2",
           (50, 100, 66.67)),
    "A6": (BOTH, [GOLD_BOX], "attack <spot> attacker, coalition", (100, 50, 66.67)),
    "A7": (boxes(TEN), [(10, 10, 50, 92)], "attack <spot> target, O1", (0, 0, 0)),
    "A8": (BOTH[:1], [], "attack <spot> attacker, coalition <spot> attacker, coalition",
           (50, 100, 66.67)),
    "A8b": ([argument("attacker", span=(0, 1)), argument("attacker", span=(2, 3))], [],
            "attack <spot> attacker, w0", (100, 50, 66.67)),
    "A9": (boxes(TEN), [(10, 10, 20, 20)], "attack <spot> target, O1", (0, 0, 0)),
    "A10": (boxes((0, 0, 10, 10), (0, 0, 10, 9)), [(0, 0, 10, 10)], "attack <spot> target, O1",
            (100, 50, 66.67)),
    "beyond the list": (boxes(TEN), [TEN], "attack <spot> target, O2", (0, 0, 0)),
}


def argument_record(arguments: list[dict], objects: list[tuple], text: str = WORDS) -> Record:
    return sentence("meae", [event("attack", (16, 17), arguments)], text,
                    objects=tuple(objects), image="a.jpg")


@pytest.mark.parametrize("case", MEAE_CASES)
def test_an_argument_needs_type_role_and_its_span_or_box(case: str) -> None:
    """Boxes match one to one at IoU >= 0.5, being inside the gold box is not enough."""
    arguments, objects, text, expected = MEAE_CASES[case]
    assert prf(score([argument_record(arguments, objects)], [text], "MEAE")) == expected


UMIE_MEAE_CASES = {
    "A1": (BOTH, "attack <spot> attacker, coalition <spot> target, O1", (100, 100, 100)),
    "A2": (BOTH, "attack <spot> place, coalition <spot> target, O1", (50, 50, 50)),
    "A3": (BOTH, "die <spot> victim, coalition <spot> victim, O1", (0, 0, 0)),
    "A5": (BOTH[1:], "attack <spot> target, O1 <spot> target, O2", (50, 100, 66.67)),
    "A6": (BOTH, "attack <spot> attacker, coalition", (100, 50, 66.67)),
    "A8": (BOTH[:1], "attack <spot> attacker, coalition <spot> attacker, coalition",
           (50, 100, 66.67)),
    "A8b": ([argument("attacker", span=(15, 16)), argument("attacker", span=(17, 18))],
            "attack <spot> attacker, coalition", (100, 100, 100)),
    "a box that no object shows": ([*BOTH, *boxes(TEN)],
                                   "attack <spot> attacker, coalition <spot> target, O1",
                                   (100, 66.67, 80)),
}


@pytest.mark.parametrize("case", UMIE_MEAE_CASES)
def test_umie_counts_arguments_as_strings_and_objects_as_their_names(case: str) -> None:
    """UMIE's column of A1-A8b, for one-word event types too, which its own scorer loses."""
    arguments, text, expected = UMIE_MEAE_CASES[case]
    record = argument_record(arguments, [GOLD_BOX, TEN], f"{WORDS} coalition")
    assert umie([record], [text], "MEAE") == expected


def test_arguments_of_a_wrong_event_type_are_wrong() -> None:
    """A3: the roles and places are right, the event type is not: 0 / 0 / 0."""
    gold = [Item("attack", "attacker", (15, 16)), Item("attack", "target", box=GOLD_BOX)]
    wrong = [Item("die", item.role, item.span, item.box) for item in gold]
    assert prf(evaluate.count("meae", gold, wrong)) == (0, 0, 0)


def test_boxes_are_matched_by_falling_overlap() -> None:
    """The better pair is taken first, and neither of its boxes again.

    IoU: gold 1 with the first .80, with the second 1; gold 2 with the first .56, the second .45.
    Taken in the order of the lists, gold 1 would leave gold 2 without a partner.
    """
    gold = [Item("a", "r", box=(0, 0, 10, 100)), Item("a", "r", box=(0, 0, 10, 45))]
    predicted = [Item("a", "r", box=(0, 0, 10, 80)), Item("a", "r", box=(0, 0, 10, 100))]
    assert evaluate.count("meae", gold, predicted).tp == 2


def test_meae_reports_text_and_objects_apart_and_they_add_up() -> None:
    """One F1 over both; every item, found or not, is in exactly one of the two sub-scores."""
    text = ("attack <spot> attacker, coalition <spot> place, nowhere <spot> target, O1 "
            "<spot> target, O7")
    scores = score_predictions([argument_record(BOTH, [GOLD_BOX])], [text], DATASETS)
    part = {name: (c.tp, c.pred, c.gold) for name, c in scores.items()}
    assert part["MEAE/text"] == (1, 2, 1) and part["MEAE/object"] == (1, 2, 1)
    assert part["MEAE"] == (2, 4, 2)


def test_argument_strings_are_looked_up_near_the_predicted_trigger() -> None:
    """"militia" stands at 0 and 8; the run's own MED prediction for the pair decides, not gold."""
    words = "militia a b c d e f struck militia"
    events = [event("attack", (7, 8), [argument("attacker", span=(8, 9))])]
    records = [sentence("med", events, words), sentence("meae", events, words)]
    answer = "attack <spot> attacker, militia"
    near = score_predictions(records, ["attack, struck", answer], DATASETS)
    far = score_predictions(records, ["attack, a", answer], DATASETS)
    alone = score_predictions(records[1:], [answer], DATASETS)
    assert [s["MEAE"].tp for s in (near, far, alone)] == [1, 0, 0]
    other = [sentence("med", events, words, name="other"), records[1]]
    assert score_predictions(other, ["attack, struck", answer], DATASETS)["MEAE"].tp == 0


# -------------------------------------------------------------- every scorer, the slow obvious way

def slow_match(gold: list[Item], predicted: list[Item], fits: Callable[[Item, Item], object]
               ) -> tuple[int, list[Item], list[Item]]:
    """As long as a pair fits: take the one with the largest value, the first such; what is left."""
    gold, predicted, found = list(gold), list(predicted), 0
    while True:
        best, where = 0, None
        for i, g in enumerate(gold):
            for j, p in enumerate(predicted):
                if fits(g, p) > best:
                    best, where = fits(g, p), (i, j)
        if where is None:
            return found, gold, predicted
        del gold[where[0]], predicted[where[1]]
        found += 1


def slow_overlap(g: Item, p: Item) -> Fraction:
    """Of sets: token positions, pixels, or the one whole image."""
    def cells(item: Item) -> set:
        if item.box:
            x1, y1, x2, y2 = item.box
            return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}
        return set(range(*item.span)) if item.span else {"image"} if item.whole_image else set()

    a, b = cells(g), cells(p)
    return Fraction(len(a & b), len(a | b)) if a | b else Fraction(0)


def slow_counts(task: str, gold: list[Item], predicted: list[Item]) -> dict[str, int]:
    """tp, pred, gold and the classes of errors, definition by definition."""
    if task == "mre":
        g, p = gold[0].label, predicted[0].label
        return {"tp": int(g == p != "none"), "pred": int(p != "none"), "gold": int(g != "none"),
                "wrong_type": int(g != p and "none" not in (g, p)), "boundary": 0,
                "missed": int(g != "none" == p), "spurious": int(p != "none" == g)}

    def alike(g: Item, p: Item) -> bool:
        return (g.label, g.role) == (p.label, p.role)

    def near(g: Item, p: Item) -> Fraction:
        enough = Fraction(1, 2) if g.box else 1
        return slow_overlap(g, p) if slow_overlap(g, p) >= enough else Fraction(0)

    tp, g, p = slow_match(gold, predicted, lambda g, p: alike(g, p) * near(g, p))
    wrong_type, g, p = slow_match(g, p, lambda g, p: (not alike(g, p)) * near(g, p))
    boundary, g, p = slow_match(g, p, lambda g, p: alike(g, p) * slow_overlap(g, p))
    return {"tp": tp, "pred": len(predicted), "gold": len(gold), "wrong_type": wrong_type,
            "boundary": boundary, "missed": len(g), "spurious": len(p)}


def slow_umie(task: str, gold: list[Item], predicted: list[Item], malformed: int
              ) -> tuple[int, int, int]:
    """(true positives, false positives, false negatives) as UMIE counts them."""
    if task == "mre" and malformed:
        predicted = []
    gold, predicted = ([(i.label, i.role, i.text) for i in items] for items in (gold, predicted))
    left, tp = list(gold), 0
    for value in predicted:
        if value in left:
            left.remove(value)
            tp += 1
    return tp, len(predicted) - tp, sum(value not in predicted for value in gold)


def some_items(task: str, draw: random.Random, gold: bool) -> list[Item]:
    """A few items from so small a world that every kind of coincidence happens often."""
    if task == "mre":
        return [Item(draw.choice(["none", "peer", "couple"]))]
    items = []
    for _ in range(draw.randrange(6)):
        role = draw.choice(["agent", "place"]) if task == "meae" else None
        start, x, y = (draw.randrange(5) for _ in range(3))
        word = draw.choice(["Bob", "Kim"])
        span = Item(draw.choice("ab"), role, (start, start + draw.randint(1, 3)), text=word)
        box = (x, y, x + draw.randint(1, 4), y + draw.randint(1, 4))
        k = draw.randint(1, 3)
        others = {"mner": [], "mre": [], "med": [Item("a", whole_image=True, text="O0", object=0)],
                  "meae": [Item("a", role, box=box, text=f"O{k}", object=k)] * 2}[task]
        lost = [dataclasses.replace(span, span=None)] if not gold else []
        items.append(draw.choice([span, *others, *lost]))
    return items


def slow_percent(tp: int, pred: int, gold: int) -> tuple[float, float, float]:
    p, r = (tp / whole if whole else 0 for whole in (pred, gold))
    return 100 * p, 100 * r, 100 * (2 * p * r / (p + r) if p + r else 0)


@pytest.mark.parametrize("task", RECORD_TASKS)
def test_every_scorer_agrees_with_the_slow_obvious_one(task: str) -> None:
    """1,500 random pairs a task, each by itself; P, R, F of 100 corpora of 15 of them."""
    draw = random.Random(task)
    for _ in range(100):
        sums, slow, umie_sums, umie_slow = Counts(), Counter(), Counts(), numpy.zeros(3, int)
        for _ in range(15):
            gold, predicted = (some_items(task, draw, gold) for gold in (True, False))
            malformed = draw.randrange(2)
            counts = evaluate.count(task, gold, predicted, malformed)
            expected = slow_counts(task, gold, predicted)
            assert {name: getattr(counts, name) for name in expected} == expected
            assert counts.malformed == malformed
            sums, slow = sums + counts, slow + Counter(expected)
            umie_sums += evaluate.count_umie(task, gold, predicted, malformed)
            umie_slow += slow_umie(task, gold, predicted, malformed)
        assert (sums.precision, sums.recall, sums.f1) == pytest.approx(
            slow_percent(slow["tp"], slow["pred"], slow["gold"]))
        tp, fp, fn = map(int, umie_slow)
        p, r = (round(tp / whole, 4) if whole else 0 for whole in (tp + fp, tp + fn))
        f1 = round(2 * p * r / (p + r), 4) if p + r else 0
        assert umie_sums.rounded_f1 == pytest.approx(100 * f1, abs=1e-9)


@pytest.mark.parametrize("task", RECORD_TASKS)
def test_every_item_falls_into_exactly_one_class_and_types_add_up(task: str) -> None:
    """gold = tp + wrong type + boundary + missed, pred the same with spurious, none negative."""
    draw = random.Random(task)
    for _ in range(500):
        gold, predicted = (some_items(task, draw, gold) for gold in (True, False))
        counts = evaluate.count(task, gold, predicted)
        paired = counts.tp + counts.wrong_type + counts.boundary
        assert counts.gold == paired + counts.missed and counts.missed >= 0
        assert counts.pred == paired + counts.spurious and counts.spurious >= 0
        details = evaluate.details(task, gold, predicted, 0)
        for mark in (":", "/") if task == "meae" else (":",):
            within = evaluate.subscores(details, "", mark).values()
            for name in ("tp", "pred", "gold"):
                assert sum(getattr(c, name) for c in within) == getattr(counts, name)


@pytest.mark.parametrize("gold, predicted, expected", [
    ([Item("per", span=(0, 2))], [Item("org", span=(0, 2))], "wrong_type"),
    ([Item("per", span=(0, 2))], [Item("per", span=(1, 3))], "boundary"),
    ([Item("per", span=(0, 2))], [Item("per", span=(2, 3))], "missed spurious"),
    ([Item("per", span=(0, 2))], [Item("org", span=(0, 1))], "missed spurious"),
    ([Item("per", span=(0, 2))], [Item("per", text="Bob")], "missed spurious"),
    ([Item("a", "r", box=TEN)], [Item("a", "s", box=(10, 10, 50, 90))], "wrong_type"),
    ([Item("a", "r", box=TEN)], [Item("b", "r", box=TEN)], "wrong_type"),
    ([Item("a", "r", box=TEN)], [Item("a", "r", box=(10, 10, 50, 92))], "boundary"),
    ([Item("a", "r", box=TEN)], [Item("a", "s", box=(10, 10, 50, 92))], "missed spurious"),
    ([Item("a", "r", box=TEN)], [Item("a", "r", span=(0, 1))], "missed spurious"),
    ([], [Item("a", "r", box=TEN)], "spurious"),
])
def test_an_error_is_of_the_first_class_that_takes_it(
        gold: list[Item], predicted: list[Item], expected: str) -> None:
    """Wrong type: the right place. Wrong boundary: the right type and role, some overlap."""
    counts = evaluate.count("meae", gold, predicted)
    errors = ("wrong_type", "boundary", "missed", "spurious")
    assert [name for name in errors if getattr(counts, name)] == expected.split()


# ------------------------------------------------------------------------------------------- M2E2

def m2e2_pair(task: str, sentence_id: str, image: str, **more: object) -> Record:
    """A record of M2E2: "w0 .. w14 coalition struck", with the arguments in text and image."""
    record = argument_record(BOTH, [GOLD_BOX])
    return dataclasses.replace(record, id=f"{sentence_id}+{image}/{task}", task=task, image=image,
                               **more)


def test_m2e2_counts_a_sentence_and_an_image_once_beside_the_primary_score() -> None:
    """Sentence A is in two pairs, image x in two: text of pairs 1 and 3, objects of 1 and 2."""
    pairs = [("A", "x.jpg"), ("A", "y.jpg"), ("B", "x.jpg")]
    both, none = "attack <spot> attacker, coalition <spot> target, O1", "none"
    records = [m2e2_pair("meae", *pair) for pair in pairs]
    records += [m2e2_pair("med", *pair) for pair in pairs]
    texts = [both, both, none, "attack, struck", "none", "none"]
    scores = score_predictions(records, texts, DATASETS)
    count = {name: (c.tp, c.pred, c.gold) for name, c in scores.items()}
    assert count["MEAE"] == (4, 4, 6) and count["MEAE~once"] == (3, 3, 4)
    assert count["MED"] == (1, 1, 3) and count["MED~once"] == (1, 1, 2)
    assert "MED~accepted" not in scores
    line = next(x for x in evaluate.table(scores).splitlines() if x.startswith("MEAE once"))
    assert "F1 85.71" in line and evaluate.VARIANTS["once"] in line


def test_an_accepted_event_is_neither_right_nor_wrong_in_the_variant() -> None:
    """A second event of the sentence is no gold of the pair; the primary score punishes it."""
    extra = (event("die", (14, 15), [argument("victim", span=(13, 14))]),
             event("attack", (11, 12), BOTH[:1]))  # shares an argument with the gold: still right
    records = [m2e2_pair(task, "A", "x.jpg", accepted=extra) for task in ("med", "meae")]
    texts = ["attack, struck <spot> die, w14 <spot> die, w2", "attack <spot> attacker, coalition "
             "<spot> target, O1 <asoc> die <spot> victim, w13 <spot> victim, w12"]
    scores = score_predictions(records, texts, DATASETS)
    count = {name: (c.tp, c.pred, c.gold) for name, c in scores.items()}
    assert count["MED"] == (1, 3, 1) and count["MED~accepted"] == (1, 2, 1)
    assert count["MEAE"] == (2, 4, 2) and count["MEAE~accepted"] == (2, 3, 2)


def test_other_records_have_no_variants() -> None:
    """Only ids of the form SENTENCE+IMAGE/TASK are M2E2's."""
    record = sentence("med", [event("attack", AIRSTRIKE)], image="a.jpg")
    assert set(score_predictions([record], ["none"], DATASETS)) == {
        "MED", "MED@news", "MED:attack", "MED~umie"}


# ------------------------------------------------------------------------------ counts and tables

def test_unreadable_pieces_are_counted_and_never_scored() -> None:
    """There is no type "animal" and the last item is empty: two malformed, one predicted."""
    record = tweet("hi Bob", [entity("person", 1, 2)])
    counts = score([record], ["animal, Bob <spot> person, Bob <spot> person,"], "T15")
    assert (counts.tp, counts.pred, counts.malformed) == (1, 1, 2)


def test_the_last_item_of_an_answer_cut_by_the_length_limit_is_dropped() -> None:
    """"person, Kim" may have been going to be "person, Kim Lee"."""
    record = tweet("Bo and Kim Lee", [entity("person", 0, 1), entity("person", 2, 4)])
    row = evaluate.score_rows([record], [Answer("person, Bo <spot> person, Kim", cut=True)],
                              DATASETS)[0]
    assert (row.counts.tp, row.counts.pred, row.counts.malformed) == (1, 1, 1)


def test_the_dev_score_of_a_unit_is_the_mean_over_its_datasets() -> None:
    """Two datasets share MED, 100 % of 1 event and 0 % of 3: s = 50, though micro-F1 is 25."""
    datasets = DATASETS | {"photos": Dataset("photos", NEWS.units, NEWS.labels)}
    first = sentence("med", [event("attack", AIRSTRIKE)])
    rest = [Record(f"{i}/med", "photos", "med", ("x",), "a.jpg", events=(event("meet", None),))
            for i in range(3)]
    texts = ["attack, airstrike"] + ["attack, O0"] * 3
    scores = score_predictions([first, *rest], texts, datasets)
    assert scores["MED"].f1 == 25
    assert evaluate.unit_f1(scores) == {"MED": 50}


def test_the_table_sums_the_columns_that_are_there() -> None:
    """Absent units print "-"; All is the sum of the F1 columns, as the paper prints it."""
    scores = {"T15": Counts(1, 1, 1, rows=3, malformed=4), "V1": Counts(1, 1, 3, correct=2, rows=4),
              "T15@tweets": Counts(1, 1, 1), "V1@pairs": Counts(1, 1, 3),
              "T15~umie": Counts(1, 6, 7), "V1~umie": Counts(1, 1, 1)}
    lines = evaluate.table(scores).splitlines()
    cells = {line[:10].strip(): line[10:].split() for line in lines[1:lines.index("")]}
    assert lines[0].split() == [*UNITS, "All", "mean"]
    assert cells["F1"] == ["100.00", "-", "-", "50.00", "-", "-", "-", "150.00", "75.00"]
    assert cells["F1 UMIE"] == ["15.39", "-", "-", "100.00", "-", "-", "-", "115.39", "57.70"]
    assert cells["R"][3] == "33.33" and cells["rows"][-1] == "7" and cells["malformed"][0] == "4"
    assert cells["accuracy"] == ["-", "-", "-", "50.00", "-", "-", "-"]
    assert cells["missed"] == ["0", "-", "-", "2", "-", "-", "-", "2"]
    assert any("sum of the F1 of 2 of 7 columns" in line for line in lines)


def test_every_row_of_the_table_has_its_rule_below() -> None:
    """tp, pred, gold, missed and spurious are in the identity; rows need no rule."""
    scores = score_predictions(some_records(), ["none"] * len(some_records()), DATASETS)
    above, below = evaluate.table(scores).split("\n\n")
    for line in above.splitlines()[1:]:
        name = line[:10].strip()
        assert name in below.replace("rows whose", "rows"), name


def test_notes_of_the_datasets_and_missing_images_stand_below_the_table() -> None:
    """A dataset's note is about its rows; without rows it is not printed."""
    noted = {"news": dataclasses.replace(NEWS, note="gold boxes"),
             "pairs": dataclasses.replace(PAIRS, note="unused")}
    record = sentence("med", [event("attack", AIRSTRIKE)], image="a.jpg")
    rows = evaluate.score_rows([record], [Answer("none", missing=True)], noted)
    lines = evaluate.table(evaluate.total(rows), noted).splitlines()
    assert "note on news: gold boxes" in lines and not any("unused" in line for line in lines)
    assert any("1 of 1 rows were answered without their image" in line for line in lines)


def test_the_type_table_has_a_line_for_every_type_that_occurs() -> None:
    """Arguments by event type and role; none is no relation."""
    records = [argument_record(BOTH, [GOLD_BOX]), pair("peer"), pair("none", "q")]
    texts = ["attack <spot> attacker, coalition <spot> place, w2", data.target(pair("couple")), "?"]
    lines = evaluate.type_table(score_predictions(records, texts, DATASETS)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["V1", "couple", "0.00", "0.00", "0.00", "0", "1", "0"],
        ["V1", "peer", "0.00", "0.00", "0.00", "0", "0", "1"],
        ["MEAE", "attack:attacker", "100.00", "100.00", "100.00", "1", "1", "1"],
        ["MEAE", "attack:place", "0.00", "0.00", "0.00", "0", "1", "0"],
        ["MEAE", "attack:target", "0.00", "0.00", "0.00", "0", "0", "1"]]


def test_predictions_are_one_json_object_a_row(tmp_path: Path) -> None:
    """Each row says what was asked, what came raw, how it was read, and what that counts."""
    record = tweet("hi Bob", [entity("person", 1, 2)], "x1")
    rows = evaluate.score_rows([record], [Answer("person, Bob <spot> person, ☃")], DATASETS)
    evaluate.save_predictions(tmp_path / "new" / "p.jsonl", rows)
    line = json.loads((tmp_path / "new" / "p.jsonl").read_text(encoding="utf-8"))
    assert line == {"id": "x1", "dataset": "tweets", "task": "mner", "unit": "T15",
                    "gold": "person, Bob", "text": "person, Bob <spot> person, ☃", "cut": False,
                    "predicted_items": [{"label": "person", "span": [1, 2], "text": "Bob"},
                                        {"label": "person", "text": "☃"}],
                    "gold_items": [{"label": "person", "span": [1, 2], "text": "Bob"}],
                    "malformed": 0, "missing_image": False, "tp": 1, "pred": 2, "n_gold": 1}
    assert os.listdir(tmp_path / "new") == ["p.jsonl"]


# -------------------------------------------------------------------------------------- decoding

class Parrot(nn.Module):
    """A stand-in for UMIE that writes the target it is shown, so that every score is 100."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.t5 = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
        self.batches: list[list[int]] = []

    def generate(self, batch: data.Batch, max_new_tokens: int, num_beams: int,
                 banned_ids: list[int]) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append(batch.rows.tolist())
        return batch.labels.clamp(min=0)[:, :max_new_tokens]


class NoImages:
    width = 8

    def __call__(self, record: Record) -> None:
        return None


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(SPIECE)


def some_records() -> list[Record]:
    """Eleven records of all four tasks, with lengths that differ."""
    events = [event("attack", (16, 17), BOTH)]
    records = [tweet("hi Bob " + "and so on " * i, [entity("person", 1, 2)], f"t{i}")
               for i in range(5)]
    records += [pair(label, f"p{i}") for i, label in enumerate(RELATIONS)]
    return records + [sentence(task, events, WORDS, objects=(GOLD_BOX,), image="a.jpg")
                      for task in ("med", "meae")]


def decode(model: nn.Module, tokenizer: data.Tokenizer, decoding: Decoding = Decoding(),
           rank: int = 0, world: int = 1) -> list[evaluate.Row]:
    """What a model makes of some_records(), without images."""
    examples = data.encode_records(some_records(), DATASETS, tokenizer)
    setup = evaluate.Setup(None, None, DATASETS, tokenizer, model)
    processes = World()
    processes.rank, processes.size, processes.device = rank, world, torch.device("cpu")
    return evaluate.evaluate_split(setup, examples, NoImages(), decoding, processes)


def test_a_model_that_writes_its_targets_scores_100(tokenizer: data.Tokenizer) -> None:
    """Encoding, batching, decoding, parsing and matching lose nothing and mix up no rows."""
    model = Parrot(tokenizer.vocab_size + 128).train()
    rows = decode(model, tokenizer, Decoding(batch_size=3))
    assert {unit: c.f1 for unit, c in evaluate.total(rows).items() if unit in UNITS} == {
        "T15": 100, "V1": 100, "MED": 100, "MEAE": 100}
    assert [row.record.id for row in rows] == [record.id for record in some_records()]
    assert model.training


def test_rows_that_miss_their_image_are_counted(tokenizer: data.Tokenizer) -> None:
    """A record that names an image but got no visual tokens; records without image do not count."""
    rows = decode(Parrot(tokenizer.vocab_size + 128), tokenizer)
    assert {unit: c.missing for unit, c in evaluate.total(rows).items() if unit in UNITS} == {
        "T15": 0, "V1": 0, "MED": 1, "MEAE": 1}


def test_an_answer_without_eos_is_marked_as_cut(tokenizer: data.Tokenizer) -> None:
    """Two new tokens cannot finish any answer here but "none"."""
    rows = decode(Parrot(tokenizer.vocab_size + 128), tokenizer, Decoding(max_new_tokens=2))
    assert all(row.answer.cut for row in rows)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_processes_share_the_batches_of_one_process(world: int) -> None:
    """Every batch goes whole to exactly one process, and the batches are the same for any W."""
    lengths = [7, 3, 3, 9, 1, 4, 4, 4, 8, 2, 6]
    alone = evaluate.deal(lengths, 3, 0, 1)
    shared = [evaluate.deal(lengths, 3, rank, world) for rank in range(world)]
    assert sorted(sum(shared, [])) == sorted(alone)
    assert sorted(sum(alone, [])) == list(range(len(lengths)))
    assert alone[0] == [3, 8, 0]  # longest first


def tiny_model(vocab_size: int) -> nn.Module:
    """A random UMIE, the same in every process."""
    from t5 import T5, T5Config
    from vision import UMIE
    torch.manual_seed(1)
    t5 = T5(T5Config(vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=3))
    return UMIE(t5, NoImages.width, max_objects=2).eval()


def decode_in_process(rank: int, world: int, folder: str) -> None:
    """What one of several processes does; it leaves its view of the whole split in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world)
    tokenizer = data.Tokenizer(SPIECE)
    rows = decode(tiny_model(tokenizer.vocab_size + 128), tokenizer, Decoding(2, max_new_tokens=9),
                  rank, world)
    evaluate.save_predictions(Path(folder) / f"{rank}.jsonl", rows)
    dist.destroy_process_group()


def test_texts_and_counts_are_the_same_for_two_processes_as_for_one(
        tmp_path: Path, tokenizer: data.Tokenizer) -> None:
    """A real model and a real process group: byte-equal predictions on both ranks and alone."""
    rows = decode(tiny_model(tokenizer.vocab_size + 128), tokenizer, Decoding(2, max_new_tokens=9))
    evaluate.save_predictions(tmp_path / "alone.jsonl", rows)
    mp.start_processes(decode_in_process, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    alone, *shared = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("alone", 0, 1)]
    assert alone == shared[0] == shared[1]
    assert any(row.answer.text for row in rows)


# ------------------------------------------------------------------------------------ the command

class Stammerer(Parrot):
    """Writes nothing for the first `silent` rows and the target of the others."""

    def __init__(self, vocab_size: int, silent: int):
        super().__init__(vocab_size)
        self.silent = silent

    def generate(self, batch: data.Batch, *args: object, **kwargs: object) -> torch.Tensor:
        ids = super().generate(batch, *args, **kwargs)
        return torch.where((batch.rows < self.silent)[:, None], torch.ones_like(ids), ids)  # eos


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six tweets, "hi Bob"."""
    raw = [{"id": f"t{i}", "dataset": "tweets", "task": "mner", "tokens": ["hi", "Bob"],
            "image": None, "size": None, "objects": [],
            "entities": [{"type": "person", "start": 1, "end": 2}]} for i in range(6)]
    descriptor = {"name": "tweets", "units": TWEETS.units, "labels": TWEETS.labels,
                  "note": "made up"}
    write_dataset(tmp_path / "corpus" / "tweets", descriptor,
                       {"test": [(f"row {i}", row) for i, row in enumerate(raw)]})
    return tmp_path / "corpus"


@pytest.fixture
def make_run(tmp_path: Path, corpus: Path, tokenizer: data.Tokenizer,
             monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make_run(name, silent, **config): a run folder whose model is silent on so many tweets.

    The folder counts in make_run.decoded how often its model was asked for.
    """
    def make(name: str, silent: int = 0, **config: object) -> Path:
        checkpoint = tmp_path / name / "best-00000001"
        checkpoint.mkdir(parents=True)
        save_file({"x": torch.full((silent + 1, 1000), 0.1)}, checkpoint / "model.safetensors")
        config = {"data": str(corpus), "max_source": 128, "max_target": 32, **config}
        stored = dataclasses.asdict(Config(**config).resolved())
        del stored["out"], stored["save_every"]
        (checkpoint / "state.json").write_text(json.dumps({"config": stored, "sha256": {
            "model.safetensors": file_hash(checkpoint / "model.safetensors")}}))
        return tmp_path / name

    def load(path: Path, device: torch.device, **changes: object) -> SimpleNamespace:
        make.decoded.append(path.parent.name)
        stored = json.loads((path / "state.json").read_text())["config"]
        config = dataclasses.replace(Config(**stored), **changes)
        with safe_open(path / "model.safetensors", "pt") as file:
            silent = file.get_slice("x").get_shape()[0] - 1
        model = Stammerer(tokenizer.vocab_size + 128, silent)
        return SimpleNamespace(config=config, sources=SimpleNamespace(corpus=corpus, vit=None),
                               tokenizer=tokenizer, datasets=load_datasets(corpus),
                               model=model)

    make.decoded = []
    monkeypatch.setattr(evaluate, "load_model", load)
    monkeypatch.setattr(evaluate, "Features", lambda *given: NoImages())
    monkeypatch.setattr(extract, "GivenImages", lambda *given: NoImages())
    return make


@pytest.fixture
def run_folder(make_run: Callable[..., Path]) -> Path:
    return make_run("run")


def test_the_command_prints_the_table_and_writes_predictions_and_scores(
        run_folder: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """All six tweets are right, and the line under the table says what right means."""
    evaluate.main([str(run_folder), "--details"])
    printed = capsys.readouterr().out
    assert evaluate.DEFINITIONS["T15"] in printed and " 100.00 " in printed
    assert "note on tweets: made up" in printed and "T15  person  " in printed
    assert len((run_folder / "predictions-test.jsonl").read_text().splitlines()) == 6
    report = json.loads((run_folder / "scores-test.json").read_text())
    state = json.loads((run_folder / "best-00000001" / "state.json").read_text())
    assert report["made_from"]["checkpoint"] == state["sha256"]["model.safetensors"]
    assert report["made_from"]["decoding"]["max_new_tokens"] == 32
    assert report["made_from"]["definitions"]["T15"] == evaluate.DEFINITIONS["T15"]
    assert report["data"] == str(corpus) and report["notes"] == ["note on tweets: made up"]
    assert report["scores"]["T15"]["f1"] == report["scores"]["T15~umie"]["f1"] == 100
    assert report["scores"]["T15"]["missed"] == 0 and report["scores"]["T15:person"]["tp"] == 6
    assert report["records"]["T15"]["tweets/t3"] == [1, 1, 1]


def test_out_moves_the_scores_too(run_folder: Path, tmp_path: Path) -> None:
    evaluate.main([str(run_folder), "--out", str(tmp_path / "new" / "a.jsonl")])
    assert sorted(os.listdir(tmp_path / "new")) == ["a.jsonl", "scores-a.json"]
    assert os.listdir(run_folder) == ["best-00000001"]


def test_out_that_is_a_folder_is_refused_before_anything_is_decoded(
        make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(make_run("a")), "--out", str(tmp_path)])
    assert "got a folder; name a file in it" in capsys.readouterr().err
    assert make_run.decoded == []


def test_a_table_of_one_system_obeys_out_as_well(run_folder: Path, tmp_path: Path) -> None:
    """--csv with one run is a comparison of one line; its scores are stored where --out says."""
    out = tmp_path / "new" / "a.jsonl"
    evaluate.main([str(run_folder), "--csv", str(tmp_path / "t.csv"), "--out", str(out)])
    assert sorted(os.listdir(out.parent)) == ["a.jsonl", "scores-a.json"]
    assert os.listdir(run_folder) == ["best-00000001"]
    assert (tmp_path / "t.csv").read_text().startswith("system,T15,")


# ------------------------------------------------------------------------- systems side by side

def test_systems_are_runs_that_differ_in_more_than_their_seed(
        make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Named by method and differing options; mean and sample deviation over the seeds; CSV."""
    runs = [make_run("a", 0), make_run("b", 2, seed=1), make_run("c", 3, egr=False),
            make_run("d", 1, method="lora", rank=48)]
    evaluate.main([*map(str, runs), "--csv", str(tmp_path / "t.csv")])
    lines = capsys.readouterr().out.splitlines()
    at = {line[:18].strip(): line[18:].split() for line in lines}
    f1 = {silent: 200 * (6 - silent) / (12 - silent) for silent in range(4)}
    mean = (f1[0] + f1[2]) / 2
    assert at["clorae"][0] == at["clorae"][7] == at["clorae"][8] == f"{mean:.2f}"
    assert at["clorae"][9:] == ["0.00M", "2"]
    assert at["+-"][0] == f"{abs(f1[0] - f1[2]) / 2 ** 0.5:.2f}"
    assert at["clorae --no-egr"][0] == f"{f1[3]:.2f}"
    assert at["lora --rank 48"][0] == f"{f1[1]:.2f}" and at["lora --rank 48"][10] == "1"
    assert "note on tweets: made up" in lines
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["clorae", "clorae --no-egr", "lora --rank 48"]
    assert float(rows[0]["All"]) == mean and rows[0]["difference"] == rows[0]["SNAP"] == ""
    assert float(rows[1]["difference"]) == pytest.approx(f1[3] - mean)
    assert float(rows[1]["low"]) < f1[3] - mean < float(rows[1]["high"])
    assert float(rows[2]["TP"]) == 0.002


def test_stored_scores_are_used_as_long_as_nothing_they_depend_on_changes(
        make_run: Callable[..., Path], corpus: Path) -> None:
    """Same checkpoint, split, data, images and decoding: no decoding; else all is done again."""
    first, second = make_run("a"), make_run("b", 1, seed=1)

    def decoded(*flags: str) -> list[str]:
        make_run.decoded.clear()
        evaluate.main([str(first), str(second), *flags])
        return list(make_run.decoded)

    assert decoded() == ["a", "b"] and decoded() == []
    (first / "scores-test.json").write_text("half a fi")
    assert decoded() == ["a"]
    for flags in (["--beams", "2"], ["--missing-images", "mask"]):
        assert decoded(*flags) == ["a", "b"]
        assert decoded(*flags) == decoded() == []  # both are stored, each in a file of its own
    (corpus / "tweets" / "images" / "new.jpg").touch()
    assert decoded() == ["a", "b"]
    lines = (corpus / "tweets" / "test.jsonl").read_text().splitlines()
    (corpus / "tweets" / "test.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert decoded() == ["a", "b"] and decoded() == []


def test_nothing_is_written_over_the_scores_of_the_runs_own_test(
        make_run: Callable[..., Path], corpus: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture) -> None:
    """Other data, units, images or decoding have files of their own, whose names say which."""
    folder = make_run("a", units=["T15"])
    own = {folder / name: "own" for name in ("scores-test.json", "predictions-test.jsonl")}
    for path, text in own.items():
        path.write_text(text)
    other = shutil.copytree(corpus, tmp_path / "other")
    mine = ["--units", "T15"]
    for flags, name in ((["--data", str(other), *mine], "data-other-*"), ([], "units-all"),
                        (["--missing-images", "mask", *mine], "images-mask"),
                        (["--beams", "2", *mine], "beams-2"),
                        (["--batch-size", "3", *mine], "batch-3"),
                        (["--beams", "2", "--batch-size", "3", *mine], "batch-3.beams-2")):
        evaluate.main([str(folder), *flags])
        scores, = folder.glob(f"scores-test.{name}.json")
        predictions, = folder.glob(f"predictions-test.{name}.jsonl")
        printed = capsys.readouterr().out
        assert str(scores) in printed and str(predictions) in printed
        assert {path: path.read_text() for path in own} == own
    evaluate.main([str(folder), *mine])
    assert json.loads((folder / "scores-test.json").read_text())["made_from"]["units"] == ["T15"]


def test_training_stores_scores_that_a_comparison_takes(
        make_run: Callable[..., Path], corpus: Path) -> None:
    """The one line in train.py: save_scores without a decoding means the run's own settings."""
    folder = make_run("a")
    checkpoint = find_checkpoint(folder)
    config = Config(**read_state(checkpoint)["config"])
    records = load_corpus(corpus, "test")
    rows = evaluate.score_rows(records, [Answer("none")] * 6, load_datasets(corpus))
    evaluate.save_scores(folder / "scores-test.json", rows, checkpoint, config, "test")
    evaluate.main([str(folder), str(make_run("b", seed=1))])
    assert make_run.decoded == ["b"]


def test_one_run_given_twice_is_refused(make_run: Callable[..., Path],
                                        capsys: pytest.CaptureFixture) -> None:
    """Two runs of one system with one seed are the same numbers twice, not two seeds."""
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(make_run("a")), str(make_run("b"))])
    assert exit.value.code == 2 and "two of clorae with seed 0" in capsys.readouterr().err


def test_runs_on_different_test_data_are_refused(make_run: Callable[..., Path], corpus: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    """A table whose lines are about different records would mislead; --data names one for all."""
    other = corpus.with_name("other")
    shutil.copytree(corpus, other)
    runs = [make_run("a"), make_run("b", egr=False, data=str(other))]
    evaluate.main([*map(str, runs), "--data", str(corpus)])
    (other / "tweets" / "test.jsonl").write_text("")
    with pytest.raises(SystemExit):
        evaluate.main(list(map(str, runs)))
    assert "name one for all with --data" in capsys.readouterr().err


def test_options_at_the_default_of_their_method_are_not_named() -> None:
    """lora has no AML by default, so only clorae without it says so; the size is always named."""
    runs = [dict(), dict(aml=False), dict(method="lora"), dict(method="lora", aml=True),
            dict(size="base"), dict(units=("T15", "V1")), dict(dropout=0.3, seed=4, out="x")]
    names = system_names([Config(**run).resolved() for run in runs])
    assert names == ["clorae --size tiny", "clorae --size tiny --no-aml", "lora --size tiny",
                     "lora --size tiny --aml", "clorae --size base",
                     "clorae --size tiny --units T15 V1", "clorae --size tiny --dropout 0.3"]


def system(*outcomes: list[int]) -> System:
    """One report per list: whether each of the records, one gold item each, was answered right."""
    return System("s", Config(), 0, [{"records": {"T15": {
        str(i): [right, 1, 1] for i, right in enumerate(seed)}}} for seed in outcomes])


def test_a_difference_is_paired_by_record() -> None:
    """Equal answers differ by exactly 0; always being right beats the other surely."""
    some = [i % 2 for i in range(40)]
    assert difference(system(some), system(some)) == (0, 0, 0)
    delta, low, high = difference(system(some), system([1] * 40))
    assert delta == 50 and 20 < low < 50 < high < 80
    mixed = difference(system(some), system(some[1:] + some[:1]))
    assert mixed[0] == 0 and mixed[1] < 0 < mixed[2]
    assert difference(system(some), system([1] * 40, some))[0] == 25


def test_seeds_that_disagree_widen_the_interval() -> None:
    """60 % against 40 % and 100 %: what single seeds would call a difference is none any more."""
    first, low, high = ([int(i < right) for i in range(200)] for right in (120, 80, 200))
    alone = difference(system(first), system(high))
    both = difference(system(first), system(low, high))
    assert alone[1] > 0 and both[0] == pytest.approx(10) and both[1] < 0 < both[2]


def test_records_that_one_system_lacks_are_left_out_of_the_difference() -> None:
    """Two records of three are shared; without any there is no difference to speak of."""
    assert difference(system([1, 0, 0]), system([1, 1]))[0] == 50
    nothing = System("s", Config(), 0, [{"records": {}}])
    assert difference(system([1]), nothing) is None


def test_the_interval_covers_what_a_slow_bootstrap_covers() -> None:
    """Resampling record by record with Python's own generator gives the same interval, +- 2."""
    draw = random.Random(1)
    first, other = ([int(draw.random() < p) for _ in range(60)] for p in (0.4, 0.7))
    _, low, high = difference(system(first), system(other))
    deltas = []
    for _ in range(2000):
        chosen = [draw.randrange(60) for _ in range(60)]
        deltas.append(100 * sum(other[i] - first[i] for i in chosen) / 60)
    deltas.sort()
    assert abs(low - deltas[50]) < 2 and abs(high - deltas[1949]) < 2


# --------------------------------------------------------------------------- one example, misuse

def test_the_command_answers_one_example_as_json(make_run: Callable[..., Path],
                                                 capsys: pytest.CaptureFixture) -> None:
    """The parrot repeats the target of a record without gold, which is "none"."""
    run = make_run("run", egr=False)  # a parrot has no gates
    answer.main([str(run), "--text", "hi Bob", "--task", "mner", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens"], told["answer"], told["items"]) == (["hi", "Bob"], "none", [])


@pytest.mark.parametrize("command, words, reason", [
    (answer.main, ["--text", "hi"], "--task"),
    (answer.main, ["--task", "mner"], "--text"),
    (evaluate.main, ["--beam", "2"], "unrecognized"),
    (evaluate.main, ["other", "--out", "x"], "single CKPT"),
    (evaluate.main, ["--beams", "0"], "expected a whole number of at least 1"),
    (evaluate.main, ["--text", "hi", "--task", "mner"], "is now python -m tools.answer"),
    (evaluate.main, ["--plot=x"], "evaluate.py --plot is now python -m tools.plot"),
    (answer.main, ["other", "--text", "hi", "--task", "mner"], "unrecognized arguments: other"),
    (answer.main, ["--text", "hi Bob", "--task", "mre"], "none in this corpus"),
    (answer.main, ["--text", "hi Bob", "--task", "mner", "--dataset", "tweet"],
     "use one of: tweets"),
])
def test_a_command_that_cannot_be_carried_out_says_why(
        run_folder: Path, capsys: pytest.CaptureFixture, command: Callable[[list[str]], None],
        words: list[str], reason: str) -> None:
    """Exit status 2, one message, no traceback; abbreviated flags are unknown flags."""
    with pytest.raises(SystemExit) as exit:
        command([str(run_folder), *words])
    assert exit.value.code == 2 and reason in capsys.readouterr().err


def test_head_and_tail_are_found_in_the_text() -> None:
    """Whole tokens, compared as answers are; words that are not there are named."""
    tokens = ("Kim", "Lee", "met", "Bo")
    assert answer.find_words(tokens, "Kim Lee", "--head") == [(0, 2)]
    with pytest.raises(DataError, match="--tail.*'Ki'"):
        answer.find_words(tokens, "Ki", "--tail")
    assert answer.find_words(("#Bears", "win"), "#Bears", "--head") == [(0, 1)]
    assert answer.find_words(("#", "Bears", "win"), "#Bears", "--head") == [(0, 2)]
    assert answer.find_words(("Kim", "'s", "win"), "Kim's", "--head") == [(0, 2)]


def test_scoring_asks_the_tokenizer_for_each_word_once(lean):
    """Words of a corpus come again and again, and the tokenizer takes most of the time."""
    asked = Counter()

    def written(word: str) -> str:
        asked[word] += 1
        return lean.written(word)

    records = [tweet("Bob and Bob", []) for _ in range(3)]
    evaluate.score_rows(records, [Answer("person, Bob")] * 3, DATASETS, written)
    assert asked == {"Bob": 1, "and": 1}


@pytest.mark.skipif("CLORAE_REALDATA" not in os.environ, reason="CLORAE_REALDATA names no folder "
                    "with the published files")
def test_gold_scored_against_itself_reaches_the_ceilings_on_the_published_files(published):
    """100 in each column except where a string cannot be mapped back to its span; the targets are
    such as a tokenizer writes them (T5's own gives the same, see docs/data.md)."""
    ceilings = {("twitter2015", "train"): 99.67, ("twitter2015", "dev"): 99.75,
                ("twitter2015", "test"): 99.65, ("twitter2017", "train"): 99.79,
                ("twitter2017", "dev"): 99.77, ("twitter2017", "test"): 99.56}
    datasets, found, tokenizer = load_datasets(published), {}, data.Tokenizer(SPIECE)
    for split, records in read_splits(published, None).items():
        said = [Answer(tokenizer.decode(tokenizer.encode(data.target(r)))) for r in records]
        scores = evaluate.total(evaluate.score_rows(records, said, datasets, tokenizer.written))
        found |= {(name, split): counts for name, counts in scores.items()}
    for (name, split), counts in found.items():
        dataset = name.partition("@")[2]
        if (dataset, split) in ceilings:
            assert round(counts.f1, 2) == ceilings[dataset, split], (name, split)
        elif name.startswith(("V1", "V2", "MED", "MEAE/object")):
            assert counts.f1 == 100.0, (name, split)
    if "m2e2_gold" in datasets:
        assert found["MEAE/text", "test"].f1 > 98
        assert found["MED~once", "test"].gold == 192  # sentences, each with one event
        assert found["MEAE~once", "test"].gold == 307 + 741 - 7  # two images disagree with theirs
