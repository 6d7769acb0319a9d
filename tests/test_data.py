"""data.py as a specification: records, prompts, the target grammar, tokens, batches, converters.

Tests on the published files run where CLORAE_REALDATA names a folder that holds them as
{twitter2015,twitter2017,mnre_v1,mnre_v2,m2e2}/<published files>, the text-only events (a copy
that leaves the parses out) and the detections of M2E2 as extra/m2e2_*.json and the role mapping as
ace_sr_mapping.txt.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
from data import DataError, Dataset, Item, Record

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["cases"]

TWEETS = Dataset("tweets", {"mner": "T17"}, {"mner": ["location", "person"]})
PAIRS = Dataset("pairs", {"mre": "V2"}, {"mre": ["couple", "held on", "held on (event)", "none"]})
ROLES = {"attack": ["attacker", "place", "target"], "phone write": ["entity"]}
NEWS = Dataset("news", {"med": "MED", "meae": "MEAE"}, {"med": sorted(ROLES), "meae": ROLES})
BOXES = ((1, 190, 508, 353), (10, 10, 50, 50))


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(GOLDEN)


def tweet(text: str, *spans: tuple[str, int, int]) -> Record:
    """An mner record from blank-separated words and (type, start, end)."""
    return Record("t", "tweets", "mner", tuple(text.split(" ")),
                  entities=tuple({"type": t, "start": s, "end": e} for t, s, e in spans))


def pair(text: str, head: tuple, relation: str, tail: tuple) -> Record:
    return Record("p", "pairs", "mre", tuple(text.split(" ")), head=head, relation=relation,
                  tail=tail)


def event(kind: str, trigger: tuple | None, *arguments: tuple) -> dict:
    """arguments: (role, span) for text, (role, box, object) for the image."""
    named = [{"role": a[0], "span": a[1]} if len(a) == 2 else
             {"role": a[0], "box": a[1], "object": a[2]} for a in arguments]
    return {"type": kind, "trigger": trigger, "arguments": tuple(named)}


def news(task: str, text: str, *events: dict) -> Record:
    return Record(f"n/{task}", "news", task, tuple(text.split(" ")) if text else (), "a.jpg",
                  (600, 400), BOXES, events=events)


STRIKE = "the coalition said an airstrike hit Kobani"
KOBANI = event("attack", (4, 5), ("target", BOXES[0], 1), ("attacker", (1, 2)))


# ---------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:20])
def test_ids_and_texts_equal_the_reference_tokenizer(case: dict, tokenizer: data.Tokenizer) -> None:
    """Ids on which sentencepiece and T5's published tokenizer agree; sentinels are split first."""
    assert tokenizer.encode(case["text"]) == case["ids"] == case["hf_ids"]
    if case["decoded"] is not None:
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_spot_and_asoc_are_the_first_two_sentinels(tokenizer: data.Tokenizer) -> None:
    """<extra_id_k> = pieces + 99 - k (32099 for k = 0 with 32,000 pieces)."""
    n = tokenizer.vocab_size
    assert (n, tokenizer.spot_id, tokenizer.asoc_id) == (2000, 2099, 2098)
    assert tokenizer.encode("a <spot> b") == tokenizer.encode("a <extra_id_0> b")
    assert tokenizer.encode("a <asoc> b") == tokenizer.encode("a <extra_id_1> b")
    assert tokenizer.encode("<extra_id_99>") == [n, tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode("a<spot>b <asoc> c<extra_id_7>")) == \
        "a <spot> b <asoc> c <extra_id_7>"


@pytest.mark.parametrize("text", ["<extra_id_100>", "<extra_id_07>", "<extra_id_>", "<Spot>",
                                  "</s>"])
def test_other_angle_brackets_are_ordinary_text(text: str, tokenizer: data.Tokenizer) -> None:
    assert tokenizer.encode(text) == tokenizer.pieces.encode(text) + [tokenizer.eos_id]


def test_decoding_stops_at_eos_and_drops_pad(tokenizer: data.Tokenizer) -> None:
    a = tokenizer.encode("a")
    assert tokenizer.decode([0, *a[:-1], 0, *a, *a]) == "a a"
    assert tokenizer.decode(torch.tensor(a)) == "a"
    assert tokenizer.decode([]) == tokenizer.decode([1]) == ""


def test_every_id_that_is_no_output_is_banned_and_every_other_decodes(
        tokenizer: data.Tokenizer) -> None:
    banned = tokenizer.undecodable(2128)
    assert banned == [*range(2000, 2098), *range(2100, 2128)]
    for i in set(range(2128)) - set(banned):
        tokenizer.decode([i])
    assert tokenizer.undecodable(2100) == banned[:98]
    with pytest.raises(DataError, match="id 2100 is neither"):
        tokenizer.decode([2100])
    with pytest.raises(DataError, match="id -100 is neither"):
        tokenizer.decode([-100])


def test_a_tokenizer_that_cannot_be_read_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="spiece.model: cannot be read"):
        data.Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="spiece.model: expected a sentencepiece model"):
        data.Tokenizer(tmp_path / "spiece.model")


# ---------------------------------------------------------------------------- prompts

def test_prompts_name_the_labels_first_and_the_text_last() -> None:
    """Labels sorted, the same in training and test, `none` among the relations."""
    assert data.prompt(tweet("I love Paris"), TWEETS) == (
        "Please extract the following entity type: location, person. Text: ", "I love Paris")
    assert data.prompt(pair("Ann Lee met Bob", (3, 4), "couple", (0, 2)), PAIRS) == (
        "Please extract the following relation between Bob and Ann Lee: "
        "couple, held on, held on (event), none. Text: ", "Ann Lee met Bob")
    assert data.prompt(news("med", STRIKE), NEWS) == (
        "Please extract event trigger: attack, phone write. Text: ", STRIKE)
    assert data.prompt(news("meae", STRIKE), NEWS) == (
        "Please extract event argument: attack: attacker, place, target; phone write: entity. "
        "Text: ", STRIKE)


def test_labels_are_sorted_whatever_the_file_says() -> None:
    backwards = Dataset("news", NEWS.units, {"med": ["phone write", "attack"], "meae": {
        "phone write": ["entity"], "attack": ["target", "place", "attacker"]}})
    for task in ("med", "meae"):
        assert data.prompt(news(task, "a"), backwards) == data.prompt(news(task, "a"), NEWS)


def test_a_sample_without_text_reads_none() -> None:
    assert data.prompt(news("med", ""), NEWS)[1] == "none"


def test_no_text_can_write_a_sentinel_into_a_prompt(tokenizer: data.Tokenizer) -> None:
    """Words of a tweet that look like structure are escaped, the pair's names too."""
    record = pair("<spot> met <extra_id_0> and <asoc>", (0, 1), "none", (4, 5))
    ids = tokenizer.encode("".join(data.prompt(record, PAIRS)))
    assert max(ids) < tokenizer.vocab_size


# ---------------------------------------------------------------------------- targets

@pytest.mark.parametrize("record, expected", [
    (tweet("Kyrie plays in Boston", ("location", 3, 4), ("person", 0, 1)),
     "person, Kyrie <spot> location, Boston"),
    (tweet("nothing here"), "none"),
    (tweet("Paris , Texas", ("location", 0, 3)), "location, Paris , Texas"),
    (tweet("O1", ("person", 0, 1)), "person, O1"),
    (pair("Ann Lee met Bob", (3, 4), "couple", (0, 2)), "Bob <spot> couple <spot> Ann Lee"),
    (pair("a b", (0, 1), "none", (1, 2)), "a <spot> none <spot> b"),
    (news("med", STRIKE, KOBANI), "attack, airstrike"),
    (news("med", ""), "none"),
    (news("med", "", event("attack", None)), "attack, O0"),
    (news("med", "O0 fired", event("phone write", None), event("attack", (0, 1))),
     "attack, %4F0 <spot> phone write, O0"),
    (news("meae", STRIKE, KOBANI), "attack <spot> attacker, coalition <spot> target, O1"),
    (news("meae", STRIKE, event("attack", (4, 5))), "attack"),
    (news("meae", STRIKE, event("attack", (4, 5), ("target", (0, 0, 9, 9), None))), "attack"),
    (news("meae", STRIKE, event("phone write", (5, 6), ("entity", (0, 1))), KOBANI),
     "attack <spot> attacker, coalition <spot> target, O1 <asoc> phone write <spot> entity, the"),
])
def test_targets_follow_the_grammar(record: Record, expected: str) -> None:
    """By offset, then by object; events by trigger; the whole image last; unreachable boxes not."""
    assert data.target(record) == expected


@pytest.mark.parametrize("raw, escaped", [
    ("50%20off", "50%2520off"), ("100% sure", None), ("%zz %3", None), ("%%25", "%%2525"),
    ("%3Cs>", "%253Cs>"), ("<spot>", "%3Cspot>"), ("<s></s>", "%3Cs>%3C/s>"),
    ("<asoc> <pad> <unk>", "%3Casoc> %3Cpad> %3Cunk>"),
    ("<extra_id_1000>", "%3Cextra_id_1000>"), ("<3 <Spot> <spot", None),
    ("&amp; a, b \U0001f602", None), ("O1", None), ("O1 x", None)])
def test_only_what_reads_as_structure_is_escaped(raw: str, escaped: str | None) -> None:
    assert data.escape(raw) == (raw if escaped is None else escaped)
    assert data.unescape(data.escape(raw)) == raw


@pytest.mark.parametrize("raw, escaped", [
    ("O1", "%4F1"), ("O0", "%4F0"), ("O", "O"), ("O1 x", "O1 x"), ("%4F1", "%254F1"), ("o1", "o1"),
    ("O\u0661", "O\u0661")])
def test_a_filler_that_reads_as_an_object_is_escaped(raw: str, escaped: str) -> None:
    assert data.escape(raw, filler=True) == escaped
    assert data.unescape(escaped) == raw


# ---------------------------------------------------------------------------- parsing

def items(task: str, text: str, dataset: Dataset, cut: bool = False) -> tuple[list, int]:
    """[(label, role, text)], malformed"""
    found, malformed = data.parse(task, text, dataset.labels[task], cut)
    return [(item.label, item.role, item.text) for item in found], malformed


def test_the_published_examples_are_sentences_of_the_grammar() -> None:
    """UMIE's README: an entity, a relation, a trigger, and arguments in text and image."""
    assert items("mner", "person, Kyrie", TWEETS) == ([("person", None, "Kyrie")], 0)
    assert items("mre", "A <spot> couple <spot> B", PAIRS) == ([("couple", None, None)], 0)
    assert items("med", "attack, airstrike", NEWS) == ([("attack", None, "airstrike")], 0)
    arguments = "attack <spot> attacker, coalition <spot> Target, O1"
    assert items("meae", arguments, NEWS) == (
        [("attack", "attacker", "coalition"), ("attack", "target", "O1")], 0)
    found, _ = data.parse("meae", arguments, ROLES)
    assert [item.object for item in found] == [None, 1]


@pytest.mark.parametrize("text, expected, malformed", [
    ("", [], 0), ("none", [], 0), (" <pad> none </s>", [], 0),
    ("<pad>person, Bob</s>", ["person Bob"], 0),
    ("  Person ,\t Bob  \n Lee ", ["person Bob Lee"], 0),
    ("person, Bob<spot>location, Rome", ["person Bob", "location Rome"], 0),
    ("person, Paris , Texas", ["person Paris , Texas"], 0),
    ("person Bob", ["person Bob"], 0),                       # no comma: label in front
    ("personBob", [], 1), ("person", [], 1), ("person,", [], 1), ("person, ", [], 1),
    ("animal, Rex <spot> person, Bob", ["person Bob"], 1),
    ("person Bob, Jr", [], 1),                               # split at the first comma
    ("<spot> person, Bob <spot>", ["person Bob"], 2),
    ("none <spot> person, none", ["person none"], 1),
    ("person, O1", ["person O1"], 0),
    ("person, %3Cspot> %25", ["person <spot> %"], 0),
    ("person, a <asoc> b", ["person a <asoc> b"], 0)])       # <asoc> means nothing here
def test_entities_are_read_leniently_and_rubbish_is_counted(
        text: str, expected: list[str], malformed: int) -> None:
    found, bad = items("mner", text, TWEETS)
    assert ([f"{label} {words}" for label, _, words in found], bad) == (expected, malformed)


def test_the_longest_label_in_front_wins_where_the_comma_is_missing() -> None:
    labels = ["phone", "phone write"]
    assert data.split_item("phone write letter", labels) == ("phone write", "letter")
    assert data.split_item("Phone call", labels) == ("phone", "call")


@pytest.mark.parametrize("text, label, malformed", [
    ("A <spot> couple <spot> B", "couple", 0), ("A <spot> COUPLE <spot> B", "couple", 0),
    ("A <spot> none <spot> B", "none", 0), ("couple", "couple", 0), ("none", "none", 0),
    ("A <spot> friends <spot> B", "none", 1), ("A <spot> couple", "none", 1), ("", "none", 1),
    ("A <spot> couple <spot> B <spot> C", "none", 1), ("A couple B", "none", 1)])
def test_a_relation_is_the_middle_field_or_the_only_one(
        text: str, label: str, malformed: int) -> None:
    """Anything else is the label none, never a random choice (worked example R8)."""
    assert items("mre", text, PAIRS) == ([(label, None, None)], malformed)


@pytest.mark.parametrize("text, expected, malformed", [
    ("none", [], 0), ("attack", [], 0), ("attack <asoc> phone write", [], 0),
    ("attack <spot> attacker, A<asoc>phone write <spot> entity, B",
     ["attack attacker A 0", "phone write entity B 1"], 0),
    ("attack <spot> attacker A", ["attack attacker A 0"], 0),
    ("attack <spot> entity, A <spot> target, B", ["attack target B 0"], 1),   # not its role
    ("war <spot> target, A <spot> target, B", [], 2), ("war", [], 1), ("war <asoc> attack", [], 1),
    ("<spot> target, A", [], 1), ("attack <spot> target", [], 1), ("attack <spot>", [], 1)])
def test_arguments_belong_to_the_event_before_them(
        text: str, expected: list[str], malformed: int) -> None:
    found, bad = data.parse("meae", text, ROLES)
    told = [f"{item.label} {item.role} {item.text} {item.event}" for item in found]
    assert (told, bad) == (expected, malformed)


def test_the_last_item_of_a_cut_output_is_dropped_and_counted() -> None:
    assert items("mner", "person, Bob <spot> person, An", TWEETS, cut=True) == (
        [("person", None, "Bob")], 1)
    assert items("meae", "attack <spot> target, B <asoc> phone wr", NEWS, cut=True) == (
        [("attack", "target", "B")], 1)
    assert items("meae", "attack <spot> target, B <spot> attacker, C", NEWS, cut=True) == (
        [("attack", "target", "B")], 1)
    assert items("mner", "none", TWEETS, cut=True) == ([], 0)
    assert items("mre", "A <spot> couple <spot> B", PAIRS, cut=True)[0] == [("couple", None, None)]


NASTY = ["<spot>", "<asoc>", "none", "O1", "O0", "O12x", "%3C", "%25", "%4F1", "%", ",", "</s>",
         "<pad>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_123>", "person,", "attack", "<", ">",
         "spot>", "\u00a0", "\u200b", "\ufe0f", "\u2028", "\U0001f602", "e\u0301", "\u2026", "a",
         "Bob", "%2", "5%20", "&amp;", "attacker,x", "\x1c", "\uff05\uff12\uff15"]


def random_record(task: str, rng: random.Random) -> Record:
    """A record whose words are made of the grammar's own parts."""
    def glued() -> str:
        return "".join(rng.choice(NASTY) for _ in range(rng.choice((1, 1, 1, 2, 3))))

    def span() -> tuple[int, int]:
        start = rng.randrange(len(tokens))
        return start, min(start + rng.choice((1, 1, 2, 3)), len(tokens))

    def argument(roles: list[str]) -> tuple:
        k = rng.randrange(2)
        return rng.choice([(rng.choice(roles), span()), (rng.choice(roles), BOXES[k], k + 1)])

    tokens = [glued() for _ in range(rng.randint(1, 12))]
    text = " ".join(tokens)
    if task == "mner":
        return tweet(text, *((rng.choice(TWEETS.labels["mner"]), *span())
                             for _ in range(rng.randrange(5))))
    if task == "mre":
        return pair(text, span(), rng.choice(PAIRS.labels["mre"]), span())
    kinds = [rng.choice(sorted(ROLES)) for _ in range(rng.randrange(4))]
    return news(task, text, *(event(kind, rng.choice([None, span()]), *(
        argument(ROLES[kind]) for _ in range(rng.randrange(4)))) for kind in kinds))


def facts(found: list[Item]) -> list[tuple]:
    """What an item says, without where it is."""
    return [(item.label, item.role, item.text, item.object, item.event) for item in found]


def assert_reads_back(record: Record, dataset: Dataset) -> None:
    written = data.target(record)
    found, malformed = data.parse(record.task, written, dataset.labels[record.task])
    assert malformed == 0, written
    assert facts(found) == facts([item for item in data.gold_items(record)
                                         if item.text is not None or record.task == "mre"]), written


@pytest.mark.parametrize("task, dataset", [("mner", TWEETS), ("mre", PAIRS), ("med", NEWS),
                                           ("meae", NEWS)])
def test_reading_what_was_written_is_the_identity(task: str, dataset: Dataset) -> None:
    """On words made of `<spot>`, `none`, `O1`, `%3C`, commas, `</s>` and the like."""
    rng = random.Random(7)
    for _ in range(1500):
        assert_reads_back(random_record(task, rng), dataset)


def test_targets_survive_the_tokenizer_where_it_knows_every_character(
        tokenizer: data.Tokenizer) -> None:
    for record, dataset in ((news("meae", STRIKE, KOBANI), NEWS), (tweet("Bob", ("person", 0, 1)),
                                                                   TWEETS)):
        assert tokenizer.decode(tokenizer.encode(data.target(record))) == data.target(record)


def test_parsing_never_fails_whatever_the_model_writes() -> None:
    rng = random.Random(11)
    for _ in range(3000):
        text = " ".join(rng.choice(NASTY + ["attack, ", "target, O2", "O" + "9" * 5000, "  "])
                        for _ in range(rng.randrange(9)))
        for record, dataset in ((tweet("a b"), TWEETS), (news("med", "a b"), NEWS),
                                (news("meae", "a b"), NEWS),
                                (pair("a b", (0, 1), "none", (1, 2)), PAIRS)):
            found, malformed = data.predicted_items(record, text, dataset, cut=rng.random() < 0.3)
            assert malformed >= 0 and all(item.label for item in found)


# ---------------------------------------------------------------------------- back to the text

def spans(record: Record, text: str, dataset: Dataset, **more: object) -> list:
    return [item.span for item in data.predicted_items(record, text, dataset, **more)[0]]


def test_the_kth_item_with_one_text_is_its_kth_occurrence() -> None:
    """Worked examples N5 and N11; the type plays no part in it."""
    record = tweet("Bob saw Bob and Ann")
    assert spans(record, "person, Bob <spot> location, Bob <spot> person, Bob", TWEETS) == [
        (0, 1), (2, 3), None]
    assert spans(record, "person, Ann <spot> person, Bob", TWEETS) == [(4, 5), (0, 1)]


def test_a_text_that_is_not_there_is_an_item_without_place() -> None:
    """It can never match and yet counts as predicted (N12, E2): case matters, tokens are whole."""
    for text in ("bob", "Bo", "Bob saw Ann", "\u200b"):
        [item], malformed = data.predicted_items(tweet("Bob saw Bobby"), f"person, {text}", TWEETS)
        assert (item.span, item.text, malformed) == (None, text, 0)


def test_texts_are_compared_in_canonical_form() -> None:
    """NFKC, no zero-width characters, single spaces: what sentencepiece does to a text."""
    record = tweet("wow \u2026 caf\u0065\u0301 \ufe0f \uff21\u200bB end")
    assert spans(record, "person, wow ...", TWEETS) == [(0, 2)]
    assert spans(record, "person, caf\u00e9 AB", TWEETS) == [(2, 5)]
    assert data.canon(" a\u00a0\u00a0b\ufe0f ") == "a b"


def test_an_argument_is_the_occurrence_nearest_to_its_trigger() -> None:
    record = news("meae", "police met police before police fired")
    text = "attack <spot> attacker, police"
    assert spans(record, text, NEWS, triggers={"attack": 5}) == [(4, 5)]
    assert spans(record, text, NEWS, triggers={"attack": 1}) == [(0, 1)]
    assert spans(record, text, NEWS, triggers={"phone write": 5}) == [(0, 1)]
    assert spans(record, text, NEWS) == [(0, 1)]


def test_a_role_uses_an_occurrence_once_and_other_roles_and_events_may_use_it_too() -> None:
    record = news("meae", "police met police")
    twice = "attack <spot> attacker, police <spot> attacker, police <spot> attacker, police"
    assert spans(record, twice, NEWS) == [(0, 1), (2, 3), None]
    assert spans(record, "attack <spot> attacker, met <spot> target, met <asoc> attack <spot> "
                 "attacker, met", NEWS) == [(1, 2)] * 3


def test_objects_are_boxes_of_the_list_and_beyond_it_there_is_none() -> None:
    found, _ = data.predicted_items(news("meae", STRIKE), "attack <spot> target, O2 <spot> target, "
                                    "O3 <spot> place, O0 <spot> place, O007", NEWS)
    assert [item.box for item in found] == [BOXES[1], None, None, None]
    assert [item.whole_image for item in found] == [False, False, True, False]
    assert [item.text for item in found] == ["O2", "O3", "O0", "O007"]


def test_a_trigger_may_be_the_whole_image_but_no_object() -> None:
    """Worked example E7."""
    found, _ = data.predicted_items(news("med", ""), "attack, O0 <spot> attack, O1", NEWS)
    assert found == [Item("attack", whole_image=True, text="O0"), Item("attack", text="O1")]
    assert data.gold_items(news("med", "", event("attack", None))) == found[:1]


def test_gold_items_keep_the_boxes_that_no_object_shows() -> None:
    """They stay in the denominator of recall."""
    record = news("meae", STRIKE, event("attack", None, ("place", (0, 0, 9, 9), None),
                                        ("target", BOXES[0], 1)))
    assert data.gold_items(record) == [Item("attack", "target", box=BOXES[0], text="O1"),
                                       Item("attack", "place", box=(0, 0, 9, 9))]


def test_a_relation_is_one_item() -> None:
    record = pair("a b", (0, 1), "couple", (1, 2))
    assert data.gold_items(record) == [Item("couple")]
    assert data.predicted_items(record, data.target(record), PAIRS) == ([Item("couple")], 0)


# ---------------------------------------------------------------------------- strict reading

MNER = {"id": "1", "dataset": "tweets", "task": "mner", "tokens": ["Bob", "is", "in", "Rome"],
        "image": "1.jpg", "size": [100, 50], "objects": [[1, 2, 30, 40]],
        "entities": [{"type": "person", "start": 0, "end": 1}]}
MRE = {"id": "1", "dataset": "pairs", "task": "mre", "tokens": ["a", "b"], "image": None,
       "size": None, "objects": [], "head": [0, 1], "tail": [1, 2], "relation": "none"}
MEAE = {"id": "1", "dataset": "news", "task": "meae", "tokens": ["a", "b"], "image": "x/1.png",
        "size": [100, 50], "objects": [[1, 2, 30, 40]],
        "events": [{"type": "attack", "trigger": [0, 1], "arguments": [
            {"role": "target", "box": [1, 2, 30, 41], "object": 1},
            {"role": "place", "box": [1, 2, 3, 4], "object": None},
            {"role": "attacker", "span": [1, 2]}]}]}
SAMPLES = {"tweets": MNER, "pairs": MRE, "news": MEAE}


def write_corpus(root: Path, lines: dict[str, list], split: str = "train") -> Path:
    """Writes {dataset: [JSON object or raw bytes, ...]} with the descriptors of this file."""
    for dataset in (TWEETS, PAIRS, NEWS):
        folder = root / dataset.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(
            {"name": dataset.name, "units": dataset.units, "labels": dataset.labels}))
        rows = [line if isinstance(line, bytes) else json.dumps(line).encode()
                for line in lines.get(dataset.name, ())]
        if rows:
            (folder / f"{split}.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    return root


def rows(*records: dict) -> list[tuple[str, dict]]:
    """Records beside the places that they come from."""
    return [(f"source:{number}", record) for number, record in enumerate(records, 1)]


def changed(row: dict, path: str, value: object) -> dict:
    """A deep copy with row[path] set (value) or deleted (...); path "events.0.type"."""
    copy = json.loads(json.dumps(row))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = copy
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Datasets in the order of their names; `source` says where a record stands."""
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    meae, mre, mner = data.load_corpus(corpus, "train")
    assert mner.entities == ({"type": "person", "start": 0, "end": 1},)
    assert (mner.size, mner.objects, mner.tokens[0]) == ((100, 50), ((1, 2, 30, 40),), "Bob")
    assert (mre.head, mre.tail, mre.relation, mre.image) == ((0, 1), (1, 2), "none", None)
    assert meae.source == f"{tmp_path}/news/train.jsonl:1"
    assert [item.text for item in data.gold_items(meae)] == ["b", "O1", None]
    assert data.load_datasets(corpus) == {"news": NEWS, "pairs": PAIRS, "tweets": TWEETS}


def test_units_select_records(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    assert [r.task for r in data.load_corpus(corpus, "train", ["T17", "MEAE"])] == ["meae", "mner"]
    with pytest.raises(DataError, match='"T71" is no split or unit: did you mean "T17"'):
        data.load_corpus(corpus, "train", ["T71"])
    with pytest.raises(DataError, match='"tain" is no split or unit: did you mean "train"'):
        data.load_corpus(corpus, "tain")
    with pytest.raises(DataError, match="no dev.jsonl for the units"):
        data.load_corpus(corpus, "dev")
    with pytest.raises(DataError, match="found a single dataset: give the folder above"):
        data.load_corpus(corpus / "tweets", "train")
    for folder, found in ((corpus / "nowhere", "no folder"), (GOLDEN, "none")):
        with pytest.raises(DataError, match=f"with a dataset.json, found {found}; "):
            data.load_datasets(folder)


def test_no_file_of_records_is_passed_over(tmp_path: Path) -> None:
    """A split under another name and a folder without dataset.json would vanish in silence."""
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    (corpus / "pairs" / "train.jsonl").rename(corpus / "pairs" / "valid.jsonl")
    with pytest.raises(DataError, match='valid.jsonl: "valid" is no split: rename it'):
        data.load_corpus(corpus, "train")
    (corpus / "pairs" / "valid.jsonl").rename(corpus / "pairs" / "dev.jsonl")
    (corpus / "pairs" / "dataset.json").unlink()
    with pytest.raises(DataError, match="pairs/dataset.json: cannot be read"):
        data.load_corpus(corpus, "train")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(write_corpus(tmp_path, {}) / "tweets" / "train.jsonl")
    with pytest.raises(DataError, match="train.jsonl: cannot be read .no regular file"):
        data.load_corpus(tmp_path, "train")


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    """A tweet may hold U+2028, U+0085, U+00A0 or a zero-width character as a token."""
    tokens = ["\u2028", "\x85", "\u00a0", "\u200b", "\ufe0f", "\U0001f602"]
    line = json.dumps(changed(MNER, "tokens", tokens), ensure_ascii=False).encode()
    [record] = data.load_corpus(write_corpus(tmp_path, {"tweets": [line]}), "train")
    assert record.tokens == tuple(tokens)


WRONG = [  # sample, path, value, field that is reported, what the message must say
    (MNER, "entites", [], "record", 'key "entites" is unknown: did you mean "entities"?'),
    (MNER, "entities", ..., "record", 'key "entities" is missing: add it'),
    (MNER, "size", ..., "record", 'key "size" is missing'),
    (MNER, "id", "", "id", '"" is no non-empty printable string'),
    (MNER, "id", 7, "id", "7 is no non-empty printable string"),
    (MNER, "dataset", "tweet", "dataset", '"tweet" is unknown: did you mean "tweets"?'),
    (MNER, "task", "mre", "task", '"mre" is unknown: use one of: mner'),
    (MNER, "task", ["mner"], "task", "is unknown"),
    (MNER, "tokens", "Bob", "tokens", '"Bob" is no JSON list'),
    (MNER, "tokens", [], "tokens", "only med and meae records with an image may lack it"),
    (MNER, "tokens.1", "is it", "tokens[1]", "without blanks"),
    (MNER, "tokens.1", "", "tokens[1]", "non-empty"),
    (MNER, "tokens.1", "\ud800", "tokens[1]", "half surrogates"),
    (MNER, "tokens.1", None, "tokens[1]", "null is no non-empty string"),
    (MNER, "image", "/etc/passwd", "image", "plain relative path"),
    (MNER, "image", "../1.jpg", "image", "plain relative path"),
    (MNER, "image", "a\\b.jpg", "image", "plain relative path"),
    (MNER, "image", "C:1.jpg", "image", "plain relative path"),
    (MNER, "image", "a\0.jpg", "image", "plain relative path"),
    (MNER, "image", "a//b.jpg", "image", "plain relative path"),
    (MNER, "image", None, "objects", "needs an image: name it"),
    (MNER, "size", [100], "size", "[width, height] in pixels"),
    (MNER, "size", [0, 50], "size", "[width, height] in pixels"),
    (MNER, "objects", None, "objects", "null is no JSON list"),
    (MNER, "objects.0", [1, 2, 3], "objects[0]", "is no box"),
    (MNER, "objects.0", [30, 2, 1, 40], "objects[0]", "0 <= x1 < x2 <= 100, 0 <= y1 < y2 <= 50"),
    (MNER, "objects.0", [1, 2, 101, 40], "objects[0]", "x2 <= 100"),
    (MNER, "objects.0", [-1, 2, 10, 40], "objects[0]", "is no box"),
    (MNER, "objects.0", [True, 2, 10, 40], "objects[0]", "is no box"),
    (MNER, "objects.0", [float("nan"), 2, 10, 40], "objects[0]", "is no box"),
    (MNER, "objects.0", [1, 2, 10 ** 400, 40], "objects[0]", "is no box"),
    (MNER, "entities.0.type", "persons", "entities[0].type", 'did you mean "person"?'),
    (MNER, "entities.0.type", "Person", "entities[0].type", "is unknown"),
    (MNER, "entities.0.end", 9, "entities[0].end", "end <= 4 (tokens): correct the offsets"),
    (MNER, "entities.0.end", 0, "entities[0].end", "start < end"),
    (MNER, "entities.0.start", "0", "entities[0].end", "is no span"),
    (MNER, "entities.0.text", "Bob", "entities[0]", 'key "text" is unknown'),
    (MNER, "entities.0", "Bob", "entities[0]", '"Bob" is no JSON object'),
    (MRE, "head", [0, 3], "head", "end <= 2"),
    (MRE, "tail", None, "tail", "null is no span"),
    (MRE, "head", [0.0, 1], "head", "is no span"),
    (MRE, "relation", "None", "relation", 'did you mean "none"?'),
    (MRE, "relation", None, "relation", "null is unknown"),
    (MEAE, "events.0.type", "attak", "events[0].type", 'did you mean "attack"?'),
    (MEAE, "events.0.trigger", [1, 1], "events[0].trigger", "is no span"),
    (MEAE, "events.0.arguments.0.role", "targt", "events[0].arguments[0].role", '"target"?'),
    (MEAE, "events.0.arguments.0.object", 2, "events[0].arguments[0].object", "neither null nor"),
    (MEAE, "events.0.arguments.0.object", 0, "events[0].arguments[0].object", "neither null nor"),
    (MEAE, "events.0.arguments.1.object", 1, "events[0].arguments[1].object", "IoU < 0.5"),
    (MEAE, "events.0.arguments.0.box", None, "events[0].arguments[0].box", "is no box"),
    (MEAE, "events.0.arguments.2.span", [0, 5], "events[0].arguments[2].span", "is no span"),
    (MEAE, "events.0.arguments.2.box", [1, 2, 3, 4], "events[0].arguments[2]", '"span" is unknown'),
    (MEAE, "events.0.arguments", ..., "events[0]", 'key "arguments" is missing'),
]


@pytest.mark.parametrize("row, path, value, place, says", WRONG,
                         ids=[f"{row['task']}-{path}-{str(v)[:12]}" for row, path, v, *_ in WRONG])
def test_each_mistake_is_named_with_file_line_field_and_remedy(
        tmp_path: Path, row: dict, path: str, value: object, place: str, says: str) -> None:
    corpus = write_corpus(tmp_path, {row["dataset"]: [row, changed(row, path, value)]})
    with pytest.raises(DataError) as caught:
        data.load_corpus(corpus, "train")
    where = re.escape(f"{tmp_path}/{row['dataset']}/train.jsonl:2: {place}: ")
    lines = [line for line in str(caught.value).split("\n")[1:] if re.search(where, line)]
    assert any(says in line for line in lines), str(caught.value)
    assert all(re.search(r":2: [^:]+: .+: .+", line) for line in lines)


@pytest.mark.parametrize("line, says", [
    (b"", '"" is no JSON object (Expecting value, column 1): write each record as one object'),
    (b'[{"id": "1"}]', "is no JSON object (a list)"), (b"null", "(a NoneType)"),
    (b'{"id": "1", "id": "2"}', "a key stands twice"), (b"{'id': 1}", "in double quotes, column 2"),
    (b'{"id": "\xff"}', "can't decode byte 0xff"), (b"\xef\xbb\xbf{}", "BOM"),
    (b"[" * 100000, "nested too deeply"), (b'{"id": ' + b"9" * 5000 + b"}", "5000 digits")])
def test_lines_that_are_no_json_object_are_named(tmp_path: Path, line: bytes, says: str) -> None:
    """One problem each, and the lines around are read."""
    corpus = write_corpus(tmp_path, {"tweets": [MNER, line, changed(MNER, "id", "2")]})
    with pytest.raises(DataError) as caught:
        data.load_corpus(corpus, "train")
    [problem] = str(caught.value).split("\n")[1:]
    assert "train.jsonl:2: line: " in problem and says in problem


ACCEPTED = {"type": "attack", "trigger": [1, 2], "arguments": [{"role": "place", "span": [0, 1]}]}


def test_accepted_events_are_optional_and_no_gold(tmp_path: Path) -> None:
    """What is right in the sentence beyond the gold of the sample; never in target or gold."""
    rows = [MEAE | {"accepted": [ACCEPTED]}, MEAE | {"id": "2"},
            MEAE | {"id": "3", "task": "med", "accepted": []}]
    first, second, third = data.load_corpus(write_corpus(tmp_path, {"news": rows}), "train")
    assert first.accepted == ({"type": "attack", "trigger": (1, 2),
                               "arguments": ({"role": "place", "span": (0, 1)},)},)
    assert second.accepted == third.accepted == ()
    assert data.gold_items(first) == data.gold_items(second)
    assert data.target(first) == data.target(second)


@pytest.mark.parametrize("row, path, value, says", [
    (MNER, "accepted", [], 'record: key "accepted" is unknown'),
    (MEAE, "accepted", None, "accepted: null is no JSON list"),
    (MEAE, "accepted.0.type", "attak", 'accepted[0].type: "attak" is unknown: did you mean'),
    (MEAE, "accepted.0.trigger", None, "accepted[0].trigger: null is no span"),
    (MEAE, "accepted.0.trigger", [1, 3], "accepted[0].trigger: [1, 3] is no span"),
    (MEAE, "accepted.0.arguments.0.role", "giver", "accepted[0].arguments[0].role"),
    (MEAE, "accepted.0.arguments.0", {"role": "place", "box": [1, 2, 3, 4], "object": None},
     'key "box" is unknown'),
    (MEAE, "accepted.0.arguments", ..., 'accepted[0]: key "arguments" is missing')])
def test_accepted_events_are_read_strictly(tmp_path: Path, row: dict, path: str, value: object,
                                           says: str) -> None:
    """Only event records have them, and they stand in the text."""
    row = changed(row | ({"accepted": [ACCEPTED]} if row is MEAE else {}), path, value)
    with pytest.raises(DataError, match=re.escape(says)):
        data.load_corpus(write_corpus(tmp_path, {row["dataset"]: [row]}), "train")


def test_the_note_of_a_dataset_is_kept(tmp_path: Path) -> None:
    """What a result on the dataset must name; without one it is empty."""
    descriptor = {"name": "tweets", "units": TWEETS.units, "labels": TWEETS.labels}
    data.write_dataset(tmp_path / "tweets", descriptor | {"note": "a part only"},
                       {"train": rows(MNER)})
    assert data.read_dataset(tmp_path / "tweets").note == "a part only"
    data.write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER)})
    assert data.read_dataset(tmp_path / "tweets") == TWEETS and TWEETS.note == ""


def test_an_image_is_needed_for_boxes_and_for_the_whole_image(tmp_path: Path) -> None:
    row = changed(changed(changed(MEAE, "image", None), "objects", []), "events.0.trigger", None)
    with pytest.raises(DataError) as caught:
        data.load_corpus(write_corpus(tmp_path, {"news": [row]}), "train")
    assert "events[0].trigger: null needs an image" in str(caught.value)
    assert "events[0].arguments[0].box: [1, 2, 30, 41] needs an image" in str(caught.value)


def test_an_unknown_image_size_leaves_boxes_unbounded(tmp_path: Path) -> None:
    """The size of a tweet's picture is known when somebody has it; it is checked when opened."""
    row = changed(changed(MNER, "size", None), "objects.0", [1, 2, 3000.5, 4000])
    [record] = data.load_corpus(write_corpus(tmp_path, {"tweets": [row]}), "train")
    assert record.objects == ((1, 2, 3000.5, 4000),)


def test_ids_are_unique_within_a_file(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"tweets": [MNER, MNER]})
    with pytest.raises(DataError, match='train.jsonl:2: id: "1" is the id of .*train.jsonl:1 too'):
        data.load_corpus(corpus, "train")


def test_twenty_problems_are_shown_at_once_and_all_are_counted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"pairs": [changed(MRE, "relation", 1)] * 5,
                                     "tweets": [changed(MNER, "entities.0.end", 9)] * 30})
    with pytest.raises(DataError) as caught:
        data.load_corpus(corpus, "train")
    first, *lines = str(caught.value).split("\n")
    assert first == "35 problem(s) in the data, the first 20:"
    assert [("pairs" in line) for line in lines] == [True] * 5 + [False] * 15


@pytest.mark.parametrize("path, value, says", [
    ("nme", "x", 'key "nme" is unknown'), ("name", "other", 'is not "tweets", the name of its fol'),
    ("units.mner", "T18", '"T18" is unknown: did you mean "T1'), ("units.mner", "V1", "use one of"),
    ("units.mer", "T17", 'key "mer" is unknown: did you mean "mner"'),
    ("units", [], "no JSON object"),
    ("labels.mre", ["none"], 'key "mre" is unknown'), ("labels.mner", ..., 'key "mner" is missing'),
    ("labels.mner.0", "Person", "lower-case word"), ("labels.mner.0", "a, b", "lower-case word"),
    ("labels.mner.0", "none", '"none" is a label of mre and of no other'),
    ("labels.mner", [], "is empty or breaks"), ("labels.mner.0", 3, "lower-case word"),
    ("labels.mner", {}, "is no JSON list"),
    ("note", 3, "printable"), ("note", "two\nlines", "printable"), ("note", "", "printable")])
def test_a_descriptor_is_read_strictly(tmp_path: Path, path: str, value: object, says: str) -> None:
    folder = write_corpus(tmp_path, {}) / "tweets"
    raw = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(changed(raw, path, value)))
    with pytest.raises(DataError, match=says) as caught:
        data.read_dataset(folder)
    assert f"{folder}/dataset.json: " in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"name": 1, "units": 2, "labels": 3}'])
def test_a_broken_descriptor_is_an_error_not_a_crash(tmp_path: Path, text: str) -> None:
    folder = write_corpus(tmp_path, {}) / "tweets"
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="dataset.json: "):
        data.load_datasets(tmp_path)


def test_relations_need_none_and_roles_a_type(tmp_path: Path) -> None:
    """An unreadable answer counts as "none", so that label must exist."""
    for name, labels, says in (("pairs", {"mre": ["couple"]}, "mre: .*none"),
                               ("news", {"med": ["attack"], "meae": ["attacker"]}, "event type"),
                               ("news", {"med": ["attack"], "meae": {"Attack": []}}, "event type"),
                               ("news", {"med": ["attack"], "meae": {}}, "event type")):
        folder = write_corpus(tmp_path, {}) / name
        raw = json.loads((folder / "dataset.json").read_text()) | {"labels": labels}
        (folder / "dataset.json").write_text(json.dumps(raw))
        with pytest.raises(DataError, match=says):
            data.read_dataset(folder)


def test_a_dataset_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    descriptor = {"name": "tweets", "units": TWEETS.units, "labels": TWEETS.labels}
    with pytest.raises(DataError, match="source:2: tokens"):
        data.write_dataset(tmp_path / "tweets", descriptor,
                           {"train": rows(MNER, changed(MNER, "tokens", []))})
    with pytest.raises(DataError, match='source:2: id: "1" is the id of source:1 too'):
        data.write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER, MNER),
                                                             "dev": rows(MNER)})
    with pytest.raises(DataError, match="tweets: dev: has no record"):
        data.write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER), "dev": []})
    assert not (tmp_path / "tweets").exists()
    data.write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER)})
    assert [r.id for r in data.load_corpus(tmp_path, "train")] == ["1"]
    assert sorted(os.listdir(tmp_path / "tweets")) == ["dataset.json", "images", "train.jsonl"]


def test_iou_of_boxes() -> None:
    """Worked examples A4 and A7: 0.5 and 0.488."""
    assert data.iou((10, 10, 50, 50), (10, 10, 50, 90)) == 0.5
    assert round(data.iou((10, 10, 50, 50), (10, 10, 50, 92)), 3) == 0.488
    assert data.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


# ---------------------------------------------------------------------------- encoding

DATASETS = {dataset.name: dataset for dataset in (TWEETS, PAIRS, NEWS)}


def encode(records: list[Record], tokenizer: data.Tokenizer, **limits: object) -> list:
    return data.encode_records(records, DATASETS, tokenizer, **limits)


def test_an_example_is_the_prompt_and_the_target_as_ids(tokenizer: data.Tokenizer) -> None:
    records = [news("meae", STRIKE, KOBANI), tweet("Bob", ("person", 0, 1)), news("med", STRIKE)]
    examples = encode(records, tokenizer)
    assert [(e.row, e.task, e.unit) for e in examples] == [(0, 2, 6), (1, 0, 1), (2, 2, 5)]
    for e, record in zip(examples, records):
        prompt = "".join(data.prompt(record, DATASETS[record.dataset]))
        assert e.input_ids == tokenizer.encode(prompt)
        assert e.labels == tokenizer.encode(data.target(record))
        assert e.record is record


def test_only_the_text_is_truncated_and_lost_gold_leaves_the_target_alone(
        tokenizer: data.Tokenizer, capsys: pytest.CaptureFixture) -> None:
    record = tweet("Bob and " + "word " * 40 + "Ann", ("person", 0, 1), ("person", 42, 43))
    whole, = encode([record], tokenizer)
    assert capsys.readouterr().out == ""
    prefix = tokenizer.encode(data.prompt(record, TWEETS)[0])[:-1]
    short, = encode([record], tokenizer, max_source=len(prefix) + 20)
    assert len(short.input_ids) == len(prefix) + 20
    assert short.input_ids[:-1] == whole.input_ids[:len(prefix) + 19]
    assert short.input_ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(short.labels) == "person, Bob"
    assert data.gold_items(short.record) == data.gold_items(record)      # the metric keeps both
    assert "1 of 1 texts cut" in (out := capsys.readouterr().out) and "lost 1 items" in out


def test_a_span_counts_as_seen_only_when_its_last_word_is_whole(tokenizer: data.Tokenizer) -> None:
    record = tweet("a Ann Lee", ("person", 1, 3))
    full = len(encode([record], tokenizer)[0].input_ids)
    seen = [tokenizer.decode(encode([record], tokenizer, max_source=full - cut)[0].labels)
            for cut in (0, 1)]
    assert seen == ["person, Ann Lee", "none"]


def test_a_relation_keeps_its_target_as_the_prompt_names_both_ends(
        tokenizer: data.Tokenizer) -> None:
    record = pair("a " + "b " * 60 + "c", (0, 1), "couple", (61, 62))
    prefix = len(tokenizer.encode(data.prompt(record, PAIRS)[0]))
    example, = encode([record], tokenizer, max_source=prefix + 5)
    assert tokenizer.decode(example.labels) == "a <spot> couple <spot> c"


def test_an_event_whose_trigger_is_lost_keeps_what_is_seen(tokenizer: data.Tokenizer) -> None:
    event_ = event("attack", (2, 3), ("attacker", (0, 1)), ("target", BOXES[0], 1))
    assert data.target_groups(news("meae", "a b c", event_), visible=1) == [
        ["attack", "attacker, a", "target, O1"]]
    assert data.target_groups(news("med", "a b c", event_), visible=2) == [[]]


def test_a_prompt_without_room_for_text_is_an_error(tokenizer: data.Tokenizer) -> None:
    with pytest.raises(DataError, match="<memory>: the mner instruction of tweets takes .* ids"):
        encode([tweet("Bob " * 30 + "x")], tokenizer, max_source=20)


def test_a_target_that_is_too_long_loses_whole_items_from_its_end(
        tokenizer: data.Tokenizer, capsys: pytest.CaptureFixture) -> None:
    record = tweet("Ann " * 9 + "x", *(("person", i, i + 1) for i in range(9)))
    full = data.target(record)
    limit = len(tokenizer.encode(full)) - 1
    example, = encode([record], tokenizer, max_target=limit)
    assert tokenizer.decode(example.labels) == full.rsplit(" <spot> ", 1)[0]
    assert "1 beyond" in capsys.readouterr().out
    example, = encode([record], tokenizer, max_target=4)
    assert tokenizer.decode(example.labels) == "none"


def test_a_shortened_argument_target_keeps_its_events_in_order(tokenizer: data.Tokenizer) -> None:
    record = news("meae", STRIKE, event("phone write", (5, 6), ("entity", (0, 1))), KOBANI)
    full = data.target(record)
    for limit in range(len(tokenizer.encode(full)), 6, -1):
        example, = encode([record], tokenizer, max_target=limit, announce=lambda line: None)
        kept = tokenizer.decode(example.labels)
        assert len(example.labels) <= limit
        assert kept in (full, "none") or full.startswith((kept + " <spot>", kept + " <asoc>"))


def test_a_relation_target_that_is_too_long_shrinks_to_its_label(tokenizer: data.Tokenizer) -> None:
    record = pair("word " * 30 + "x", (0, 30), "couple", (30, 31))
    example, = encode([record], tokenizer, max_target=12, announce=lambda line: None)
    assert tokenizer.decode(example.labels) == "couple"


# ---------------------------------------------------------------------------- batching

def mixed(tokenizer: data.Tokenizer, count: int = 23) -> list[data.Example]:
    """Examples of all tasks with lengths that differ."""
    records = []
    for i in range(count):
        text = "word " * (i * 7 % 11) + "x y"
        records.append([tweet(text), news("med", text), pair(text, (0, 1), "none", (1, 2)),
                        news("meae", text)][i % 4])
    return encode(records, tokenizer)


def features(record: Record) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Event records have an image of 2 or 3 visual tokens here."""
    v = 2 + len(record.tokens) % 2
    return None if record.image is None else (torch.full((v, 5), 2.0), torch.full((v, 5), 0.5))


def test_a_batch_pads_to_its_longest_row_and_sorts_by_task(tokenizer: data.Tokenizer) -> None:
    examples = mixed(tokenizer, 9)
    batch = data.collate(examples, features, feature_width=5)
    assert batch.tasks.tolist() == sorted(e.task for e in examples)
    for row, number in enumerate(batch.rows.tolist()):
        e = examples[number]
        n, t = len(e.input_ids), len(e.labels)
        assert batch.input_ids[row].tolist() == e.input_ids + [0] * (batch.input_ids.shape[1] - n)
        assert batch.attention_mask[row].sum() == n and batch.attention_mask[row, :n].all()
        assert batch.labels[row].tolist() == e.labels + [-100] * (batch.labels.shape[1] - t)
        assert (batch.tasks[row], batch.units[row]) == (e.task, e.unit)
        seen = features(e.record)
        v = 0 if seen is None else len(seen[0])
        assert batch.visual_mask[row].tolist() == [True] * v + [False] * (3 - v)
        assert batch.features[row].sum() == v * 5 * 2 and batch.boxes[row].sum() == v * 5 * 0.5
    assert batch.input_ids.shape[1] == max(len(e.input_ids) for e in examples)
    rows = [batch.rows[batch.tasks == task].tolist() for task in range(3)]
    assert rows == [sorted(some) for some in rows]                       # stable
    assert batch.attention_mask.dtype == batch.visual_mask.dtype == torch.bool


def test_a_batch_without_images_has_no_visual_tokens(tokenizer: data.Tokenizer) -> None:
    batch = data.collate(mixed(tokenizer, 4), lambda record: None, feature_width=7)
    assert batch.features.shape == (4, 0, 7) and batch.boxes.shape == (4, 0, 5)
    assert batch.visual_mask.shape == (4, 0) and batch.visual_mask.dtype == torch.bool
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.units.dtype == torch.int64


def test_a_widened_batch_is_the_batch_and_padding(tokenizer):
    """4 rows, 16 tokens and 6 visual tokens, or multiples of them; padding is of the last task, has
    no label and no token, and never exceeds the visual tokens that a model knows."""
    examples = mixed(tokenizer, 5)
    visual = {e.record.id: (torch.randn(1 + i % 4, 5), torch.rand(1 + i % 4, 5))
              for i, e in enumerate(examples)}
    batch = data.collate(examples, lambda record: visual[record.id], feature_width=5)
    wide = batch.widened(most_visual=5)
    (B, S), T, V = batch.input_ids.shape, batch.labels.shape[1], batch.features.shape[1]
    assert [n % m for n, m in zip((*wide.input_ids.shape, wide.labels.shape[1]), (4, 16, 16))] \
        == [0, 0, 0]
    assert V == 4 and wide.features.shape[1] == wide.visual_mask.shape[1] == 5
    sizes = {"input_ids": (B, S), "attention_mask": (B, S), "labels": (B, T), "tasks": (B,),
             "units": (B,), "features": (B, V), "boxes": (B, V), "visual_mask": (B, V),
             "rows": (B,)}
    for name, size in sizes.items():
        part = getattr(wide, name)[tuple(map(slice, size))]
        assert torch.equal(part, getattr(batch, name)), name
    for name, padding in (("attention_mask", False), ("labels", -100), ("visual_mask", False)):
        kept = getattr(batch, name) != padding
        assert (getattr(wide, name) != padding).sum() == kept.sum(), name
    assert wide.tasks.tolist() == sorted(wide.tasks.tolist())
    assert torch.equal(wide.labels.flatten()[wide.real], wide.labels.flatten())
    assert torch.equal(batch.labels.flatten()[batch.real], batch.labels[batch.labels != -100])


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    """Resuming needs no state; torch's global generator is neither read nor moved."""
    orders = {(seed, epoch): tuple(data.epoch_order(50, seed, epoch))
              for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    state = torch.get_rng_state()
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(data.epoch_order(50, 1, 2)) == orders[1, 2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size, rows", [(1, 1), (4, 3), (7, 2), (23, 5), (64, 100)])
def test_every_row_comes_once_per_epoch_whatever_the_micro_batch(
        batch_size: int, rows: int, tokenizer: data.Tokenizer) -> None:
    examples = mixed(tokenizer)
    batches = data.global_batches(examples, 5, 1, batch_size)
    assert sorted(sum(batches, [])) == list(range(23))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        parts = data.micro_batches(batch, examples, rows)
        assert sorted(sum(parts, [])) == sorted(batch) and len(parts) == -(-len(batch) // rows)
        assert 1 <= min(map(len, parts)) and max(map(len, parts)) <= 2 * rows
        lengths = [len(examples[i].input_ids) for part in parts for i in part]
        assert lengths == sorted(lengths)


def computed_tokens(part: list[int], examples: list) -> int:
    """Tokens that a micro-batch computes, padding included."""
    return len(part) * sum(max(len(getattr(examples[i], side)) for i in part)
                           for side in ("input_ids", "labels"))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_micro_batches_are_the_cut_of_the_sorted_order_that_computes_least(rows):
    """Against all cuts into as many slices of at most 2 * rows: least sum of squared tokens."""
    draw = random.Random(rows)
    examples = [SimpleNamespace(input_ids=[0] * draw.randint(3, 30),
                                labels=[0] * draw.randint(1, 9)) for _ in range(9)]
    parts = data.micro_batches(list(range(9)), examples, rows)
    order, slices = sum(parts, []), len(parts)
    sums = []
    for inner in itertools.combinations(range(1, 9), slices - 1):
        cuts = [0, *inner, 9]
        every = [order[a:b] for a, b in zip(cuts, cuts[1:])]
        if max(map(len, every)) <= 2 * rows:
            sums.append(sum(computed_tokens(part, examples) ** 2 for part in every))
    assert sum(computed_tokens(part, examples) ** 2 for part in parts) == min(sums)


# ---------------------------------------------------------------------------- converters

CONLL = ("IMGID:17_06_12483\nNew\tO\nYork\tB-LOC\nCity\tI-LOC\n\n"
         "IMGID:O_1926\nBob\tI-PER\nLee\tI-PER\nX\tB-OTHER\n\u00a0\tI-MISC\n.\tI-LOC\n")


def run_convert(kind: str, files: dict[str, str], root: Path, **options: object) -> Path:
    """Writes the published files of a dataset and converts them; returns the corpus."""
    source = root / "source"
    source.mkdir(exist_ok=True)
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8", newline="\n")
    data.convert(kind, source, root / "corpus", **options)
    return root / "corpus"


@pytest.mark.parametrize("kind, unit", [("twitter2015", "T15"), ("twitter2017", "T17"),
                                        ("snap", "SNAP")])
def test_tweets_are_chunked_leniently(kind: str, unit: str, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    """A stray I- starts a chunk (N8), as a change of type does (N9); OTHER is MISC."""
    corpus = run_convert(kind, {"valid.txt": CONLL}, tmp_path)
    first, second = data.load_corpus(corpus, "dev", [unit])
    assert first.tokens == ("New", "York", "City") and first.image == "17_06_12483.jpg"
    assert [(e["type"], e["start"], e["end"]) for e in first.entities] == [("location", 1, 3)]
    assert second.tokens[3] == "\u00a0" and second.id == "O_1926" and second.size is None
    assert [(e["type"], e["start"], e["end"]) for e in second.entities] == [
        ("person", 0, 2), ("miscellaneous", 2, 4), ("location", 4, 5)]
    out = capsys.readouterr().out
    assert f"{kind} dev: 2 records found" in out and "differs" in out
    assert f"{kind} train: FILE NOT FOUND" in out


@pytest.mark.parametrize("tags, chunks", [
    ("B-PER I-PER O B-LOC", [(0, 2), (3, 4)]), ("O I-PER I-PER", [(1, 3)]),
    ("B-PER I-LOC O", [(0, 1), (1, 2)]), ("B-PER B-PER", [(0, 1), (1, 2)]),
    ("I-PER O I-PER", [(0, 1), (2, 3)]), ("B-OTHER I-MISC", [(0, 2)]), ("O O", [])])
def test_chunks_of_tag_sequences(tags: str, chunks: list, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("IMGID:1\n" + "".join(f"w\t{tag}\n" for tag in tags.split()))
    [(_, record)] = data.read_conll(tmp_path / "x", "twitter2015")
    assert [(e["start"], e["end"]) for e in record["entities"]] == chunks


@pytest.mark.parametrize("text, line", [
    ("IMGID:1\nBob\tB-PER\nx\n", 3), ("IMGID:1\nBob B-PER\n", 2), ("Bob\tO\n", 1),
    ("IMGID:1\na\tO\n\nb\tO\n", 4), ("IMGID:1\na\tB-DOG\n", 2), ("IMGID:1\na\tE-PER\n", 2),
    ("IMGID:1\n\tO\n", 2), ("\ufeffIMGID:1\na\tO\n", 1), ("IMGID:1\n\nIMGID:2\na\tO\n", 1),
    ("IMGID:1\nb c\tO\n", 1)])
def test_a_malformed_tweet_is_named_by_file_and_line(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"train.txt:{line}: "):
        run_convert("twitter2017", {"train.txt": text}, tmp_path)
    assert not (tmp_path / "corpus").exists()


def test_tokens_of_tweets_are_kept_as_they_are(tmp_path: Path) -> None:
    """What str.split() and strip() would lose or split, @ and URLs, characters that
    T5 lacks, repeated strings, one string with two types, an entity with a comma."""
    tokens = ["\u00a0", "\ufe0f", "\u200b", "\u2028", "\x85", "\U0001f602", "@", "@Bob", "http://t",
              "https://t", "<", "{", "~", "`", "Bob", "Bob", "Paris", ",", "Texas"]
    tags = {7: "B-PER", 14: "B-PER", 15: "B-ORG", 16: "B-LOC", 17: "I-LOC", 18: "I-LOC"}
    text = "IMGID:16_05_24_704\r\n" + "".join(
        f"{token}\t{tags.get(i, 'O')}\r\n" for i, token in enumerate(tokens))
    corpus = run_convert("snap", {"test.txt": text}, tmp_path)
    [record] = data.load_corpus(corpus, "test")
    assert record.tokens == tuple(tokens) and record.id == "16_05_24_704"
    assert [(item.label, item.text) for item in data.gold_items(record)] == [
        ("person", "@Bob"), ("person", "Bob"), ("organization", "Bob"),
        ("location", "Paris , Texas")]
    found, malformed = data.predicted_items(record, data.target(record),
                                            data.load_datasets(corpus)["snap"])
    assert (found, malformed) == (data.gold_items(record), 0)


def test_files_that_are_not_utf8_or_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least one of train.txt, valid.txt, test.txt"):
        run_convert("twitter2017", {}, tmp_path)
    (tmp_path / "source" / "test.txt").write_bytes(b"IMGID:1\n\xff\tO\n")
    with pytest.raises(DataError, match="test.txt:2: not UTF-8"):
        run_convert("twitter2017", {}, tmp_path)


V1_LINE = ("{'token': ['The', '#', 'Bears', \"don't\", 'win'], 'h': {'name': '#Bears', 'pos': "
           "[1, 3]}, 't': {'name': 'win', 'pos': [4, 5]}, 'img_id': 17, "
           "'relation': '/misc/misc/held_on'}\n")


def test_relations_are_python_literals_with_offsets(tmp_path: Path) -> None:
    """Numbers name pictures too; a mention is its tokens, whatever `name` says."""
    corpus = run_convert("mnre_v1", {"ours_train.txt": V1_LINE}, tmp_path)
    [record] = data.load_corpus(corpus, "train")
    assert record.image == "17.jpg" and record.relation == "held on (event)"
    assert data.target(record) == "# Bears <spot> held on (event) <spot> win"


def test_a_pair_may_overlap_and_come_in_any_order(tmp_path: Path) -> None:
    """Nor does the picture's name, which gives V1's label away: it never reaches the
    model."""
    line = V1_LINE.replace("[1, 3]", "[2, 5]").replace("[4, 5]", "[0, 3]").replace(
        "17", "'noRel_17.jpg'").replace("/misc/misc/held_on", "none")
    corpus = run_convert("mnre_v1", {"ours_test.txt": line}, tmp_path)
    [record] = data.load_corpus(corpus, "test")
    prompt = "".join(data.prompt(record, data.load_datasets(corpus)["mnre_v1"]))
    assert (record.head, record.tail, record.image) == ((2, 5), (0, 3), "noRel_17.jpg")
    assert "between Bears don't win and The # Bears: " in prompt
    assert data.target(record) == "Bears don't win <spot> none <spot> The # Bears"
    assert "noRel" not in prompt + data.target(record)


def test_the_dev_file_of_v2_has_a_space_in_its_name_and_none_a_capital(tmp_path: Path) -> None:
    line = V1_LINE.replace("17", "'a_0.jpg'").replace("/misc/misc/held_on", "None")
    corpus = run_convert("mnre_v2", {"mnre_val .txt": line}, tmp_path)
    [record] = data.load_corpus(corpus, "dev")
    assert (record.relation, record.image) == ("none", "a_0.jpg")


@pytest.mark.parametrize("old, new", [
    ("'token'", "'tokens'"), ("{'token", "{token"), ("[1, 3]", "[3, 1]"), ("[4, 5]", "[4, 6]"),
    ("/misc/misc/held_on", "/misc/misc/hold"), ("/misc/misc/held_on", "None"), ("17", "None"),
    ("'pos': [1, 3]", "'pos': 1"), ("17", "__import__('os')"), ("'The'", "'The end'"),
    ("'The'", "3"), ("'The'", "b'The'"), ("'The'", "{'The'}"), ("{'token': ", "")])
def test_a_malformed_pair_is_named_by_file_and_line(old: str, new: str, tmp_path: Path) -> None:
    assert old in V1_LINE
    with pytest.raises(DataError, match="ours_test.txt:2: "):
        run_convert("mnre_v1", {"ours_test.txt": V1_LINE + V1_LINE.replace(old, new)}, tmp_path)


@pytest.mark.parametrize("kind, count", [("mnre_v1", 32), ("mnre_v2", 23)])
def test_the_words_of_relations_are_injective_and_complete(kind: str, count: int) -> None:
    """V2's alumi and charges, V1's two held_on and both alternate_names keep words of their own."""
    paths = data.RELATIONS[kind]
    words = {data.relation_word(path) for path in paths}
    assert len(words) == len(set(paths)) == len(paths) == count
    assert data.KINDS[kind].labels["mre"] == sorted(words)
    assert {"none", "neighbor", "alternate names (person)", "alternate names (organization)",
            "held on"} <= words
    assert ({"relative", "held on (event)"} <= words) == (kind == "mnre_v1")
    assert ("alumni" in words) == (kind == "mnre_v2")


M2E2_TEXT = {"sentence_id": "D_1", "words": STRIKE.split(), "image": ["D_0.jpg"],
             "golden-event-mentions": [{
                 "trigger": {"start": 4, "end": 5, "text": "airstrike"},
                 "event_type": "Conflict:Attack", "arguments": [
                     {"role": "Attacker", "start": 1, "end": 2, "text": "coalition"}]}]}
M2E2_IMAGES = {"D_0": {"event_type": "Conflict:Attack", "role": {
                   "Target": [["0", 1, 190, 508, 353]], "Instrument": [["1", 5, 6, 7, 8]]}},
               "D_1": {"event_type": "Justice:Arrest-Jail", "role": {"Agent": [["1", 1, 2, 3, 4]]}}}


# The detections of D_0: not sorted, O1 on the target (upside down), O2 too but less, O3 nowhere
# near, and one without area. D_1 has none.
M2E2_FOUND = {"D_0.jpg": [{"bbox": [7, 8, 30, 40], "class": "cup", "conf": 0.2},
                          {"bbox": [508, 353.5, -3, 190.25], "class": "person", "conf": 0.9},
                          {"bbox": [9, 9, 9, 20], "class": "dog", "conf": 0.8},
                          {"bbox": [1, 190, 508, 290], "class": "person", "conf": 0.5}],
              "D_1.jpg": [], "D_7.jpg": []}


def m2e2_files(coref: str, text: dict = M2E2_TEXT, **more: object) -> dict[str, str]:
    """The published files; more: other files by the first word of their names."""
    names = {"found": "m2e2_yolov8_objects.json", "only": "text_only_event.json"}
    return {"crossmedia_coref.txt": coref, "text_multimedia_event.json": json.dumps([text]),
            "image_multimedia_event.json": json.dumps(M2E2_IMAGES),
            **{names[name]: json.dumps(value) for name, value in more.items()}}


COREF = "D_1\tD_0.jpg\tConflict:Attack\nD_1\tD_1.jpg\tConflict:Attack"     # no line end


def test_gold_box_mode_shows_the_gold_boxes_in_file_order(tmp_path: Path) -> None:
    """A pair is a trigger and an argument record; group boxes count; the note names the leak."""
    corpus = run_convert("m2e2_gold", m2e2_files(COREF), tmp_path)
    records = data.load_corpus(corpus, "test")
    assert [r.id for r in records] == ["D_1+D_0.jpg/med", "D_1+D_0.jpg/meae", "D_1+D_1.jpg/med",
                                       "D_1+D_1.jpg/meae"]
    assert data.target(records[0]) == "attack, airstrike"
    assert data.target(records[1]) == (
        "attack <spot> attacker, coalition <spot> target, O1 <spot> instrument, O2")
    assert records[1].objects == ((1, 190, 508, 353), (5, 6, 7, 8))
    assert data.target(records[3]) == "attack <spot> attacker, coalition"   # the picture disagrees
    assert records[3].objects == ((1, 2, 3, 4),)
    assert "leaks their number" in data.load_datasets(corpus)["m2e2_gold"].note


def test_detector_mode_shows_the_most_confident_detections(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A gold box is the detection with the highest IoU >= 0.5; without one it stays as gold that
    cannot be reached. Corners are put in order and clipped at 0, what has no area is dropped."""
    corpus = run_convert("m2e2", m2e2_files(COREF, found=M2E2_FOUND), tmp_path)
    med, meae, _, other = data.load_corpus(corpus, "test", ["MED", "MEAE"])
    assert meae.objects == med.objects == ((0, 190.25, 508, 353.5), (1, 190, 508, 290),
                                           (7, 8, 30, 40))
    assert data.target(meae) == "attack <spot> attacker, coalition <spot> target, O1"
    assert [(i.role, i.box, i.object) for i in data.gold_items(meae)] == [
        ("attacker", None, None), ("target", (1, 190, 508, 353), 1),
        ("instrument", (5, 6, 7, 8), None)]
    assert other.objects == ()
    out, note = capsys.readouterr().out, data.load_datasets(corpus)["m2e2"].note
    assert "detections in 3 pictures; 1 without area dropped" in out
    assert "in detector mode: objects are the 16 most confident YOLOv8 detections" in note
    assert "they show 1 of 3 gold boxes (33.3 %)" in note and note in out


@pytest.mark.parametrize("limit, boxes, shown", [(1, 1, 1), (2, 2, 1), (3, 3, 1)])
def test_the_number_of_detections_is_a_choice(limit: int, boxes: int, shown: int,
                                              tmp_path: Path) -> None:
    run_convert("m2e2", m2e2_files(COREF, found=M2E2_FOUND), tmp_path, max_objects=limit)
    record = data.load_corpus(tmp_path / "corpus", "test")[1]
    assert len(record.objects) == boxes
    assert [i.object for i in data.gold_items(record) if i.box] == [shown, None]


@pytest.mark.parametrize("found, says", [
    (None, "m2e2_yolov8_objects.json: expected what YOLOv8 detects in M2E2's pictures"),
    ([], "m2e2_yolov8_objects.json: expected {image.jpg"),
    ({"D_0.jpg": [{"bbox": [1, 2, 3], "conf": 1}]}, "m2e2_yolov8_objects.json: expected {image"),
    ({"D_0.jpg": [{"bbox": [1, 2, "3", 4], "conf": 1}]}, "m2e2_yolov8_objects.json: expected {im"),
    ({"D_0.jpg": [{"bbox": [1, 2, 3, 4]}]}, "got KeyError('conf')"),
    ({"D_0.jpg": []}, "detections, if only [], for each picture of M2E2, got KeyError('D_1.jpg')")])
def test_detections_that_cannot_be_used_are_named(found: object, says: str,
                                                  tmp_path: Path) -> None:
    files = m2e2_files(COREF, **({} if found is None else {"found": found}))
    with pytest.raises(DataError, match=re.escape(says)):
        run_convert("m2e2", files, tmp_path)


def test_pictures_without_gold_boxes_are_converted(tmp_path: Path) -> None:
    """0 of 0 boxes are shown, which is no division by zero."""
    files = m2e2_files(COREF, found=M2E2_FOUND) | {"image_multimedia_event.json": json.dumps(
        {name: picture | {"role": {}} for name, picture in M2E2_IMAGES.items()})}
    corpus = run_convert("m2e2", files, tmp_path)
    assert "they show 0 of 0 gold boxes" in data.load_datasets(corpus)["m2e2"].note


def test_the_two_modes_do_not_share_a_corpus(tmp_path: Path) -> None:
    """Both have the units MED and MEAE, so their records would be scored as one."""
    files = m2e2_files(COREF, found=M2E2_FOUND)
    run_convert("m2e2", files, tmp_path)
    run_convert("m2e2", files, tmp_path)                     # again is fine
    with pytest.raises(DataError, match="holds m2e2, .* give another folder"):
        run_convert("m2e2_gold", files, tmp_path)


def test_other_events_of_a_sentence_are_accepted(tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    """38 sentences of M2E2 are in both of its text files with different events."""
    meeting = M2E2_TEXT["golden-event-mentions"][0] | {
        "event_type": "Contact:Meet", "arguments": [{"role": "Place", "start": 6, "end": 7}]}
    only = [M2E2_TEXT | {"golden-event-mentions": [meeting]},
            {"sentence_id": "D_2", "words": ["a"], "golden-event-mentions": []}]
    corpus = run_convert("m2e2_gold", m2e2_files(COREF, only=only), tmp_path)
    for record in data.load_corpus(corpus, "test"):
        assert record.accepted == ({"type": "meet", "trigger": (4, 5), "arguments": (
            {"role": "place", "span": (6, 7)},)},)
        assert [event["type"] for event in record.events] == ["attack"]
    assert "2 of 2 samples have other events in their sentence" in capsys.readouterr().out


def test_without_the_file_or_with_other_words_nothing_is_accepted(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Offsets into other words would mean nothing."""
    run_convert("m2e2_gold", m2e2_files(COREF), tmp_path)
    assert "so no other event is accepted" in capsys.readouterr().out
    other = M2E2_TEXT | {"words": ["other"]}
    corpus = run_convert("m2e2_gold", m2e2_files(COREF, only=[other]), tmp_path)
    assert not any(record.accepted for record in data.load_corpus(corpus, "test"))
    assert "0 of 2 samples have other events" in capsys.readouterr().out


def test_m2e2_labels_are_its_eight_types_and_their_roles() -> None:
    labels = data.KINDS["m2e2"].labels
    assert all(data.KINDS[kind].labels is labels for kind in ("m2e2_gold", "ace2005", "swig"))
    assert labels["med"] == sorted(labels["meae"]) and len(labels["med"]) == 8
    assert "phone write" in labels["med"] and "police" in labels["meae"]["demonstrate"]
    assert "money" in labels["meae"]["transfer money"]
    assert sum(map(len, labels["meae"].values())) == 29


@pytest.mark.parametrize("line", [
    "D_1\tD_0.jpg", "D_2\tD_0.jpg\tConflict:Attack", "D_1\tD_9.jpg\tConflict:Attack",
    "D_1 D_0.jpg Conflict:Attack", ""])
def test_a_malformed_m2e2_line_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="crossmedia_coref.txt:2: "):
        run_convert("m2e2_gold", m2e2_files(f"D_1\tD_0.jpg\tConflict:Attack\n{line}\nx"), tmp_path)


@pytest.mark.parametrize("path, value", [
    ("golden-event-mentions", []), ("golden-event-mentions.0.event_type", "Life:Marry"),
    ("golden-event-mentions.0.trigger.end", 99),
    ("golden-event-mentions.0.arguments.0.role", "Org"),
    ("words", "text"), ("golden-event-mentions.0.arguments", ...)])
def test_an_m2e2_sentence_that_does_not_fit_is_named(
        path: str, value: object, tmp_path: Path) -> None:
    files = m2e2_files("D_1\tD_0.jpg\tConflict:Attack", changed(M2E2_TEXT, path, value))
    with pytest.raises(DataError, match="crossmedia_coref.txt:1: "):
        run_convert("m2e2_gold", files, tmp_path)


@pytest.mark.parametrize("kind", ["m2e2", "m2e2_gold"])
@pytest.mark.parametrize("box", [[5, 6, 5, 8], ["5", 6, 7, 8], [5, 6, 7], [5, 6, 10 ** 400, 8],
                                 [7, 6, 5, 8]])
def test_an_m2e2_box_that_is_none_is_named(kind: str, box: list, tmp_path: Path) -> None:
    """Before its overlap with anything is computed: a box without area overlaps nothing."""
    pictures = changed(M2E2_IMAGES, "D_0.role.Instrument.0", ["1", *box])
    files = m2e2_files(COREF, found=M2E2_FOUND) | {
        "image_multimedia_event.json": json.dumps(pictures)}
    with pytest.raises(DataError, match="crossmedia_coref.txt:1: .* is no box 0 <= x1 < x2"):
        run_convert(kind, files, tmp_path)


# ---------------------------------------------------------------------------- ACE2005

ACE = {"doc_id": "CNN_1", "sent_id": "CNN_1-3", "tokens": STRIKE.split(), "sentence": "unused",
       "entity_mentions": [
           {"id": "E1", "entity_type": "ORG", "start": 1, "end": 2, "text": "coalition"},
           {"id": "E2", "entity_type": "GPE", "start": 6, "end": 7, "text": "Kobani"}],
       "relation_mentions": [],
       "event_mentions": [
           {"id": "V1", "event_type": "Conflict:Attack",
            "trigger": {"text": "airstrike", "start": 4, "end": 5},
            "arguments": [{"entity_id": "E2", "role": "Target", "text": "Kobani"},
                          {"entity_id": "E1", "role": "Attacker", "text": "coalition"},
                          {"entity_id": "E1", "role": "Victim", "text": "coalition"}]},
           {"id": "V2", "event_type": "Life:Injure", "trigger": {"text": "hit", "start": 5,
                                                                  "end": 6}, "arguments": []}]}
QUIET = ACE | {"sent_id": 4, "tokens": ["\u00a0", "Quiet", "."], "entity_mentions": [],
               "event_mentions": []}


def ace_files(*sentences: dict, name: str = "train.oneie.json") -> dict[str, str]:
    return {name: "".join(json.dumps(sentence) + "\n" for sentence in sentences)}


@pytest.mark.parametrize("name", ["train.oneie.json", "train.json"])
def test_every_ace_sentence_asks_for_triggers_and_those_with_events_for_arguments(
        name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Sentences without event teach MED to say none. Arguments stand where their
    entity mentions stand. By default types and roles are M2E2's, the rest counted."""
    corpus = run_convert("ace2005", ace_files(ACE, QUIET, name=name), tmp_path)
    med, meae, quiet = data.load_corpus(corpus, "train", ["MED", "MEAE"])
    assert [r.id for r in (med, meae, quiet)] == ["CNN_1-3/med", "CNN_1-3/meae", "CNN_1-4/med"]
    assert data.target(med) == "attack, airstrike" and data.target(quiet) == "none"
    assert data.target(meae) == "attack <spot> attacker, coalition <spot> target, Kobani"
    assert med.image is None and med.objects == () and med.source.endswith("train.jsonl:1")
    assert data.load_datasets(corpus)["ace2005"].labels == data.KINDS["m2e2"].labels
    out = capsys.readouterr().out
    assert "no such event or role: 1 x injure, 1 x victim of attack" in out
    assert "ace2005 train: 3 records found, from" in out and "differs" not in out.split("\n")[1]


def test_a_sentence_of_foreign_events_only_has_none(tmp_path: Path) -> None:
    foreign = changed(ACE, "event_mentions", ACE["event_mentions"][1:])
    corpus = run_convert("ace2005", ace_files(foreign), tmp_path)
    [med] = data.load_corpus(corpus, "train")
    assert (med.task, data.target(med)) == ("med", "none")


def test_all_event_types_are_those_of_the_files(tmp_path: Path) -> None:
    """--event-types all: types and roles of every split, sorted, lower-case words."""
    files = ace_files(ACE) | ace_files(
        changed(ACE, "event_mentions.1.event_type", "Business:Start-Org"), name="dev.oneie.json")
    corpus = run_convert("ace2005", files, tmp_path, event_types="all")
    assert data.load_datasets(corpus)["ace2005"].labels == {
        "med": ["attack", "injure", "start org"],
        "meae": {"attack": ["attacker", "target", "victim"], "injure": [], "start org": []}}
    med, meae = data.load_corpus(corpus, "dev")
    assert data.target(med) == "attack, airstrike <spot> start org, hit"
    assert data.target(meae).endswith("victim, coalition <spot> target, Kobani <asoc> start org")


@pytest.mark.parametrize("path, value, says", [
    ("event_mentions.0.arguments.0.entity_id", "E9", 'entity_id "E9" of an argument is none of'),
    ("event_mentions.0.arguments.0.entity_id", ["E1"], "expected a sentence as OneIE writes it"),
    ("event_mentions.0.event_type", "Conflict:Atack", "did you mean \"Conflict:Attack\""),
    ("event_mentions.0.event_type", "Conflict.Attack", "did you mean \"Conflict:Attack\""),
    ("event_mentions.0.event_type", 3, "event type 3 is unknown"),
    ("event_mentions.0.trigger.end", 99, "events[0].trigger: [4, 99] is no span"),
    ("entity_mentions.0.start", "1", "is no span"), ("entity_mentions", ..., "entity_mentions"),
    ("event_mentions.0.arguments.0.role", None, "expected a sentence as OneIE"),
    ("tokens", [], "tokens: [] is no text"), ("tokens.0", "a b", "tokens[0]"),
    ("sent_id", ..., "sent_id"), ("doc_id", 3, "expected a sentence as OneIE")])
def test_an_ace_sentence_that_does_not_fit_is_named(path: str, value: object, says: str,
                                                    tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.oneie.json:2: ") as caught:
        run_convert("ace2005", ace_files(QUIET, changed(ACE, path, value)), tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind, name", [("ace2005", "test.oneie.json"), ("ace2005", "test.json"),
                                        ("swig", "test.json")])
def test_the_test_files_of_ace_and_swig_are_left_alone(
        kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """M2E2 is the only test of events."""
    files = ace_files(ACE) if kind == "ace2005" else swig_files({"attacking_1.jpg": SWIG})
    corpus = run_convert(kind, files | {name: "not even read"}, tmp_path)
    assert sorted(os.listdir(corpus / kind)) == ["dataset.json", "images", "train.jsonl"]
    assert re.search(rf"{kind} test: .*{name} left out", capsys.readouterr().out)


# ---------------------------------------------------------------------------- SWiG

NONE = [-1, -1, -1, -1]
SWIG = {"verb": "attacking", "height": 200, "width": 300,
        "bb": {"agent": [10, 20, 110, 120], "victim": [150, 20, 250, 190],
               "weapon": [10, 20, 110, 120], "place": NONE, "coagent": [5, 150, 60, 320]},
        "frames": [{"agent": "n10287213", "victim": "", "weapon": "", "place": "n08613733"}] * 3}
MAPPING = ("attacking\tagent\tConflict||Attack\tAttacker\nattacking\tvictim\tConflict||Attack\t"
           "Target\nattacking\tplace\tConflict||Attack\tPlace\n"
           "attacking\tweapon\tConflict||Attack\tInstrument\n"
           "buying\tagent\tTransaction||Transfer|Money\tGiver\n"
           "buying\tpayment\tTransaction||Transfer|MONEY\tInstrument\n"
           "carrying\titem\tMovement||Transport\tAgent\n"
           "steering\tagent\tMovement||Transport\tVehicle\n"
           "steering\tplace\tMovement||Transport\tPlace\n")


def swig_files(pictures: dict, name: str = "train.json", mapping: str = MAPPING) -> dict[str, str]:
    return {name: json.dumps(pictures), "ace_sr_mapping.txt": mapping}


def swig_records(pictures: dict, root: Path, mapping: str = MAPPING, **options: object) -> list:
    corpus = run_convert("swig", swig_files(pictures, mapping=mapping), root, **options)
    return data.load_corpus(corpus, "train")


@pytest.mark.parametrize("mapping", [MAPPING, MAPPING.replace("\n", "\r\n"), MAPPING.rstrip("\n")])
def test_a_swig_picture_is_an_event_without_text(
        mapping: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole picture triggers (O0); roles by M2E2's mapping, LF or CRLF; two roles may share a
    box; what is not grounded or not mapped is no argument; other verbs are counted."""
    pictures = {"attacking_1.jpg": SWIG, "yawning_2.jpg": SWIG | {"verb": "yawning"}}
    med, meae = swig_records(pictures, tmp_path, mapping)
    assert (med.id, med.image, med.size, med.tokens) == (
        "attacking_1.jpg/med", "attacking_1.jpg", (300, 200), ())
    assert data.target(med) == "attack, O0"
    gold = {(i.role, i.box) for i in data.gold_items(meae)}
    assert gold == {("attacker", (10, 20, 110, 120)), ("instrument", (10, 20, 110, 120)),
                    ("target", (150, 20, 250, 190))}
    assert all(meae.objects[i.object - 1] == i.box for i in data.gold_items(meae))
    assert (5, 150, 60, 200) in meae.objects                 # grounded, not mapped, clipped
    out = capsys.readouterr().out
    assert "1 of 2 pictures left out (verb unmapped)" in out
    assert "swig train: 2 records found, from" in out and "swig dev: FILE NOT FOUND" in out


def test_distractors_overlap_no_grounded_box(tmp_path: Path) -> None:
    """They fill up the list to one length everywhere, so that it tells nothing about the gold."""
    for name, options, count in (("a", {}, 16), ("b", {"max_objects": 5}, 5)):
        (tmp_path / name).mkdir()
        _, meae = swig_records({"attacking_1.jpg": SWIG}, tmp_path / name, **options)
        grounded = {(10, 20, 110, 120), (150, 20, 250, 190), (5, 150, 60, 200)}
        assert len(meae.objects) == len(set(meae.objects)) == count
        assert all(data.iou(box, other) < 0.5 for box in grounded
                   for other in set(meae.objects) - grounded)
        assert grounded <= set(meae.objects)


def test_a_gold_box_beyond_the_limit_is_unreachable(tmp_path: Path) -> None:
    """One object for two boxes: the other one stays gold without object."""
    _, meae = swig_records({"attacking_1.jpg": SWIG}, tmp_path, max_objects=1)
    assert len(meae.objects) == 1 and len(data.gold_items(meae)) == 3
    assert {i.object for i in data.gold_items(meae)} <= {None, 1}


def test_the_number_of_an_object_carries_no_information(tmp_path: Path) -> None:
    """Over many pictures every place in the list is gold equally often (chi-square with
    15 degrees of freedom stays below its 99.9 % quantile), and the same picture is the same."""
    rng, pictures = random.Random(5), {}
    for k in range(400):
        x, y = rng.randrange(200), rng.randrange(100)
        bb = {"agent": [x, y, x + 90, y + 90], "victim": [0, 0, 40, 60]}
        pictures[f"attacking_{k}.jpg"] = SWIG | {"bb": bb}
    records = swig_records(pictures, tmp_path)
    for role in ("attacker", "target"):
        counts = Counter(i.object for r in records[1::2] for i in data.gold_items(r)
                         if i.role == role)
        assert sum((counts[k] - 25) ** 2 / 25 for k in range(1, 17)) < 37.7
    assert [r.objects for r in swig_records(pictures, tmp_path)] == [r.objects for r in records]


def test_the_quirks_of_the_role_mapping_are_corrected_or_left_out(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Carrying item is the artifact, steering agent the agent; Transfer|MONEY is
    Transfer|Money; roles that M2E2 does not have for the type are left out and counted."""
    box = [10, 20, 110, 120]
    pictures = {f"{verb}_1.jpg": SWIG | {"verb": verb, "bb": dict.fromkeys(roles, box)}
                for verb, roles in (("carrying", ["item"]), ("steering", ["agent", "place"]),
                                    ("buying", ["agent", "payment"]))}
    records = swig_records(pictures, tmp_path)
    assert [re.sub(r"\d+", "#", data.target(r)) for r in records if r.task == "meae"] == [
        "transport <spot> artifact, O#", "transport <spot> agent, O#",
        "transfer money <spot> giver, O#"]
    out = capsys.readouterr().out
    assert "1 x place of transport, 1 x instrument of transfer money" in out
    assert "two rows of the role mapping corrected" in out
    corpus = run_convert("swig", swig_files(pictures), tmp_path, event_types="all")
    assert data.load_datasets(corpus)["swig"].labels["meae"] == {
        "transfer money": ["giver", "instrument"], "transport": ["agent", "artifact", "place"]}


def test_roles_that_map_to_one_role_count_a_shared_box_once(tmp_path: Path) -> None:
    more = MAPPING + "attacking\tcoagent\tConflict||Attack\tAttacker\n"
    bb = dict.fromkeys(("agent", "coagent"), [10, 20, 110, 120])
    _, meae = swig_records({"attacking_1.jpg": SWIG | {"bb": bb}}, tmp_path, more)
    assert len(data.gold_items(meae)) == 1


@pytest.mark.parametrize("bb, gold", [
    ({"agent": NONE}, []), ({}, []), ({"agent": [10, 10, 10, 50]}, []),
    ({"agent": [50, 60, 10, 20]}, [(10, 20, 50, 60)]),
    ({"agent": [-1, 0, 400, 300]}, [(0, 0, 300, 200)]), ({"agent": [400, 0, 500, 10]}, [])])
def test_grounded_boxes_are_put_in_order_and_clipped(bb: dict, gold: list, tmp_path: Path) -> None:
    """An event without argument is still an event, and the objects are distractors then."""
    med, meae = swig_records({"attacking_1.jpg": SWIG | {"bb": bb}}, tmp_path)
    assert data.target(med) == "attack, O0" and len(meae.objects) == 16
    assert [i.box for i in data.gold_items(meae)] == gold
    assert data.target(meae).startswith("attack")


def test_a_tiny_picture_has_the_objects_that_fit(tmp_path: Path) -> None:
    tiny = SWIG | {"width": 1, "height": 1, "bb": {"agent": [0, 0, 1, 1]}}
    _, meae = swig_records({"attacking_1.jpg": tiny}, tmp_path)
    assert meae.objects == ((0, 0, 1, 1),) and data.target(meae) == "attack <spot> attacker, O1"


@pytest.mark.parametrize("path, value", [
    ("width", 0), ("width", "300"), ("width", 30.5), ("height", ...), ("verb", ...), ("bb", []),
    ("bb.agent", None), ("bb.agent", [1, 2, 3]), ("bb.agent.0", "x"), ("verb", ["attacking"])])
def test_a_swig_picture_that_does_not_fit_is_named(path: str, value: object,
                                                   tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.json: attacking_2.jpg: expected {verb, height, "):
        swig_records({"attacking_1.jpg": SWIG, "attacking_2.jpg": changed(SWIG, path, value)},
                     tmp_path)


@pytest.mark.parametrize("text", ["", "3", "[1]", "{", '{"a": 1, "a": 2}'])
def test_a_swig_file_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.json: expected SWiG's {image: "):
        run_convert("swig", swig_files({}) | {"train.json": text}, tmp_path)


@pytest.mark.parametrize("line", [
    "attacking agent", "attacking\tagent\tConflict\tAttacker", "",
    "attacking\tagent\tLife||Marry\tPerson", "attacking\tagent\tLife||Die\tAgent"])
def test_a_malformed_line_of_the_role_mapping_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ace_sr_mapping.txt:10: expected verb<TAB>role"):
        swig_records({}, tmp_path, MAPPING + line + "\n" + MAPPING)


def test_swig_needs_the_role_mapping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ace_sr_mapping.txt: cannot be read"):
        run_convert("swig", {"dev.json": "{}"}, tmp_path)


# ---------------------------------------------------------------------------- commands

def test_the_commands_convert_and_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        return data.main(list(arguments)), *capsys.readouterr()

    (tmp_path / "train.txt").write_text(CONLL + "\nIMGID:3\nnew\tO\nYORK-city!\tO\n")
    (tmp_path / "test.txt").write_text("IMGID:4\nNew\tO\nYork\tO\nCity\tO\nhttp://t.co/x\tO\n")
    code, out, _ = command("convert", "twitter2017", str(tmp_path), str(tmp_path / "c"))
    assert code == 0 and "train: 3 records found, 3373 expected" in out
    code, out, err = command("check", str(tmp_path / "c"))
    assert code == 0 and err == ""
    assert "twitter2017 train mner: 3 records, 4 gold items, 3 images (3 missing)" in out
    assert "twitter2017 test in twitter2017 train: 1 of 1 texts" in out
    code, out, err = command("check", str(tmp_path / "c"), "--require-images")
    assert code == 2 and out != ""
    assert err.startswith("error: 4 problem(s)") and "train.jsonl:1: image" in err


def test_texts_are_shared_across_datasets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A test tweet of one task in the training data of another is a leak: one line for each two
    splits, none for two training splits. Texts are compared without URLs, case and punctuation."""
    def tweets(*texts: str) -> list[dict]:
        return [changed(MNER, "id", text) | {"tokens": text.split(), "entities": []}
                for text in texts]
    corpus = write_corpus(tmp_path, {"tweets": tweets("Hello World !", "b", "x y", "X Y"),
                                     "news": [MEAE]}, "test")
    write_corpus(tmp_path, {"pairs": [MRE | {"tokens": text.split()[:2] + ["z"], "id": text}
                                      for text in ("x y", "hello world")]})
    write_corpus(tmp_path, {"tweets": tweets("hello , World http://t.co/x", "b", "x yz")})
    data.check(corpus, require_images=False)
    assert capsys.readouterr().out.split("\n")[-2:] == ["tweets test in tweets train: 2 of 3 texts",
                                                        ""]
    write_corpus(tmp_path, {"pairs": [MRE | {"tokens": ["Hello", "world"]}]})
    data.check(corpus, require_images=False)
    assert capsys.readouterr().out.split("\n")[-3:-1] == [
        "tweets test in pairs train: 1 of 3 texts", "tweets test in tweets train: 2 of 3 texts"]


def test_texts_of_records_are_normalised_and_pictures_have_none() -> None:
    """For dropping training records whose text stands in a test split."""
    records = [tweet("See http://t.co/x NOW !"), tweet("see now"), news("med", "")]
    assert data.texts_of(records) == {"seenow"}
    known = data.texts_of(records[:1])
    assert [data.normalised(record) in known for record in records] == [True, True, False]


@pytest.mark.parametrize("options, says", [
    ({"max_objects": 0}, "--max-objects: expected 1 or more, got 0"),
    ({"event_types": "all"}, "--event-types all: twitter2017 has one set of labels only")])
def test_settings_that_make_no_sense_are_refused(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        run_convert("twitter2017", {"train.txt": CONLL}, tmp_path, **options)


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    """A dataset inside a dataset would never be read; a file is no folder."""
    corpus = run_convert("twitter2017", {"train.txt": CONLL}, tmp_path)
    for folder, says in ((corpus / "twitter2017", "found a single dataset: give the folder above"),
                         (tmp_path / "source" / "train.txt", "snap: cannot be written .Not a dir")):
        with pytest.raises(DataError, match=says):
            data.convert("snap", tmp_path / "source", folder)


def test_the_commands_take_the_settings_of_events(tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    for name, text in swig_files({"attacking_1.jpg": SWIG}).items():
        (tmp_path / name).write_text(text)
    assert data.main(["convert", "swig", str(tmp_path), str(tmp_path / "c"), "--max-objects", "4",
                      "--event-types", "all"]) == 0
    out = capsys.readouterr().out
    assert "SWiG with event types all: pictures without text, 4 objects each" in out
    assert data.main(["check", str(tmp_path / "c")]) == 0
    assert "no text stands in two splits" in capsys.readouterr().out


def test_a_faulty_corpus_and_a_wrong_call_end_with_2(tmp_path: Path) -> None:
    """The command as it is typed: exit code 2 and no traceback."""
    write_corpus(tmp_path, {"tweets": [changed(MNER, "entities.0.end", 9)]})
    done = subprocess.run([sys.executable, data.__file__, "check", str(tmp_path)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.jsonl:1: entities[0].end: 9 is no span" in done.stderr
    for wrong in (["convert", "twitter2018", ".", "."], ["check", ".", "--require-image"]):
        with pytest.raises(SystemExit, match="2"):
            data.main(wrong)


# ---------------------------------------------------------------------------- published files

REAL = os.environ.get("CLORAE_REALDATA")
real = pytest.mark.skipif(not REAL, reason="CLORAE_REALDATA names no folder of published files")
T15 = {"train": (4000, 6352, (2285, 2135, 957, 975), 104, 37),
       "dev": (1000, 1594, (567, 543, 251, 233), 31, 41),
       "test": (3257, 5207, (1873, 1720, 860, 754), 89, 36)}
T17 = {"train": (3373, 6049, (2943, 731, 1674, 701), 392, 50),
       "dev": (723, 1324, (626, 173, 375, 150), 76, 33),
       "test": (723, 1351, (621, 178, 395, 157), 86, 33)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus made of every published file that is there."""
    root = tmp_path_factory.mktemp("published")
    for kind in data.KINDS:
        if (Path(REAL) / kind).is_dir() and kind != "m2e2":
            data.convert(kind, Path(REAL) / kind, root)
    if (Path(REAL) / "m2e2").is_dir():
        data.convert("m2e2_gold", linked_m2e2(tmp_path_factory.mktemp("gold")), root)
    return root


def linked_m2e2(folder: Path) -> Path:
    """M2E2's files, its detections and its text-only events, made of a copy without parses."""
    for path in (*Path(REAL).glob("m2e2/*"), Path(REAL) / "extra" / data.DETECTIONS):
        (folder / path.name).symlink_to(path)
    compact = Path(REAL) / "extra" / "m2e2_text_only_event_compact.json"
    (folder / "text_only_event.json").write_text(json.dumps([
        one | {"golden-event-mentions": [
            {"event_type": event["type"], "trigger": dict(zip(("start", "end"), event["trigger"])),
             "arguments": [dict(zip(("role", "start", "end"), argument))
                           for argument in event["arguments"]]} for event in one["events"]]}
        for one in json.loads(compact.read_text(encoding="utf-8"))]))
    return folder


def published_records(root: Path, unit: str, split: str) -> list[Record]:
    try:
        return data.load_corpus(root, split, [unit])
    except DataError as error:
        pytest.skip(str(error))


@real
@pytest.mark.parametrize("unit, split, counts", [
    (unit, split, counts) for unit, table in (("T15", T15), ("T17", T17))
    for split, counts in table.items()])
def test_tweet_counts(published: Path, unit: str, split: str, counts: tuple) -> None:
    """Tweets, entities, PER/LOC/ORG/OTHER, tweets without entity, longest tweet."""
    records = published_records(published, unit, split)
    kinds = Counter(e["type"] for record in records for e in record.entities)
    types = tuple(kinds[t] for t in ("person", "location", "organization", "miscellaneous"))
    assert (len(records), kinds.total(), types, sum(not r.entities for r in records),
            max(len(r.tokens) for r in records)) == counts
    assert len({record.image for record in records}) == len(records)


@real
@pytest.mark.parametrize("unit, split, instances, images, none", [
    ("V1", "train", 7824, 3996, 4751), ("V1", "dev", 975, 499, 580), ("V1", "test", 1282, 675, 749),
    ("V2", "train", 12247, 7356, 7744), ("V2", "dev", 1624, 931, 1000),
    ("V2", "test", 1614, 914, 974)])
def test_pair_counts(published: Path, unit: str, split: str, instances: int, images: int,
                     none: int) -> None:
    """Instances, pictures, instances without relation."""
    records = published_records(published, unit, split)
    assert len(records) == instances and len({record.image for record in records}) == images
    assert sum(record.relation == "none" for record in records) == none
    if unit == "V2":
        assert all(token.isascii() for record in records for token in record.tokens)


@real
def test_m2e2_counts(published: Path) -> None:
    """309 pairs of 192 sentences and 203 pictures, 465 arguments in text and 995
    in pictures (307 and 741 different ones), 7 of them in the two pictures that disagree."""
    med, meae = (published_records(published, unit, "test") for unit in ("MED", "MEAE"))
    assert len(med) == len(meae) == 309
    assert len({r.id.split("+")[0] for r in med}) == 192 and len({r.image for r in med}) == 203
    gold = [(r, item) for r in meae for item in data.gold_items(r)]
    assert sum(item.span is not None for _, item in gold) == 465
    assert sum(len(r.objects) for r in meae) == 995
    assert sum(item.box is not None for _, item in gold) == 988
    assert len({(r.id.split("+")[0], item) for r, item in gold if item.span}) == 307
    boxes = {r.image: len(r.objects) for r in meae}
    assert sum(boxes.values()) == 741 and max(boxes.values()) == 23
    types = Counter(r.events[0]["type"] for r in med)
    assert types == {"demonstrate": 84, "die": 68, "meet": 42, "arrest jail": 41, "attack": 41,
                     "transport": 24, "phone write": 8, "transfer money": 1}


@real
def test_every_published_record_reads_back(published: Path) -> None:
    """Reading what was written is the identity, and the gold survives as words."""
    datasets = data.load_datasets(published)
    for split in data.SPLITS:
        for record in data.load_corpus(published, split):
            assert_reads_back(record, datasets[record.dataset])


def ceiling(records: list[Record], dataset: Dataset) -> float:
    """F1 in % of the gold texts looked up again (as many predicted as gold items)."""
    found = total = 0
    for record in records:
        gold = Counter((i.label, i.role, i.span) for i in data.gold_items(record))
        back = data.predicted_items(record, data.target(record), dataset)[0]
        found += (gold & Counter((i.label, i.role, i.span) for i in back)).total()
        total += gold.total()
    return round(100 * found / total, 2)


@real
@pytest.mark.parametrize("unit, split, expected", [
    ("T15", "train", 99.67), ("T15", "dev", 99.75), ("T15", "test", 99.65), ("T17", "train", 99.79),
    ("T17", "dev", 99.77), ("T17", "test", 99.56), ("MED", "test", 100.0)])
def test_the_ceiling_of_mapping_texts_back_to_offsets(
        published: Path, unit: str, split: str, expected: float) -> None:
    """What is lost where a text stands in several places."""
    records = published_records(published, unit, split)
    assert ceiling(records, data.load_datasets(published)[records[0].dataset]) == expected


@real
@pytest.mark.parametrize("known, expected", [(True, 98.4), (False, 97.7)])
def test_the_ceiling_of_text_arguments(published: Path, known: bool, expected: float) -> None:
    """The 307 arguments of 192 sentences, with the nearest-to-trigger rule and without trigger."""
    dataset, found, total = data.load_datasets(published)["m2e2_gold"], 0, 0
    sentences = {r.id.split("+")[0]: r for r in published_records(published, "MEAE", "test")}
    for record in sentences.values():
        [one] = record.events
        triggers = {one["type"]: one["trigger"][0]} if known else None
        back, _ = data.predicted_items(record, data.target(record), dataset, triggers)
        gold = Counter(item for item in data.gold_items(record) if item.span)
        found += (gold & Counter(back)).total()
        total += gold.total()
    assert (total, round(100 * found / total, 1)) == (307, expected)


@real
def test_duplicates_and_lengths_are_reported(
        published: Path, capsys: pytest.CaptureFixture) -> None:
    """Near-duplicate tweets between the splits of one corpus; lengths in words."""
    data.check(published, require_images=False)
    out = capsys.readouterr().out
    for line in ("twitter2015 dev in twitter2015 train: 3 of 1000 texts",
                 "twitter2015 test in twitter2015 train: 5 of 3254 texts",
                 "twitter2015 test in twitter2015 dev: 3 of 3254 texts",
                 "twitter2017 dev in twitter2017 train: 1 of 723 texts",
                 "mnre_v1 dev in twitter2015 train: 111 of 499 texts",
                 "mnre_v1 dev in twitter2017 train: 107 of 499 texts",
                 "twitter2015 test in mnre_v1 dev: 49 of 3254 texts",
                 "mnre_v2 test in mnre_v2 train: 2 of 914 texts"):
        assert f"{line}\n" in out
    assert not re.search("m2e2.* in |mnre_v2 .* in (twitter|mnre_v1)", out)
    assert re.search("m2e2_gold test meae: .*longest target 79 words", out)
    assert re.search("twitter2015 train mner: .*longest target 27 words", out)


@real
@pytest.mark.parametrize("count, share", [(3, 36.6), (8, 56.0), (16, 63.3), (24, 65.0), (36, 66.1)])
def test_the_ceiling_of_detections(count: int, share: float, tmp_path: Path) -> None:
    """Of the 741 gold boxes on 203 pictures, the share that `count` detections show."""
    source = linked_m2e2(tmp_path)
    rows = data.read_m2e2(source / "crossmedia_coref.txt", "m2e2")
    found = data.detections(source / data.DETECTIONS)
    shown, boxes = data.reachable(rows, found, count)
    assert (boxes, round(100 * shown / boxes, 1)) == (741, share)
    assert len({row["image"] for _, row in rows if not found[row["image"]]}) == 5


@real
def test_the_events_of_38_sentences_are_accepted(tmp_path: Path) -> None:
    """In both text files with different events, 61 of the 309 pairs."""
    (tmp_path / "source").mkdir()
    data.convert("m2e2", linked_m2e2(tmp_path / "source"), tmp_path / "corpus")
    records = data.load_corpus(tmp_path / "corpus", "test", ["MED", "MEAE"])
    some = [record for record in records if record.accepted]
    assert len(some) == 2 * 61 and len({r.id.split("+")[0] for r in some}) == 38
    sentences = {r.id.split("+")[0]: len(r.accepted) for r in some}
    assert sum(sentences.values()) == 45
    triggers = [(r, {(e["type"], e["trigger"]) for e in r.events}) for r in some]
    assert not any((e["type"], e["trigger"]) in gold for r, gold in triggers for e in r.accepted)
    assert "they show 469 of 741 gold boxes" in data.load_datasets(tmp_path / "corpus")["m2e2"].note


@real
def test_the_published_role_mapping(tmp_path: Path) -> None:
    """227 rows, 67 verbs by type; no row yields Police or Money."""
    path = Path(REAL) / "ace_sr_mapping.txt"
    verbs = data.read_mapping(path)
    assert len(verbs) == 67 and sum(len(roles) for _, roles in verbs.values()) == 227
    assert Counter(kind for kind, _ in verbs.values()) == {
        "attack": 18, "transport": 20, "arrest jail": 8, "meet": 7, "demonstrate": 5,
        "phone write": 4, "die": 3, "transfer money": 2}
    rows = [(kind, role) for kind, roles in verbs.values() for role in roles.values()]
    assert not {"police", "money"} & {role for _, role in rows}
    assert Counter(row for row in rows if row[1] not in data.M2E2[row[0]]) == {
        ("transport", "place"): 20, ("transfer money", "place"): 2,
        ("transfer money", "instrument"): 1}
    assert verbs["carrying"][1]["item"] == "artifact" and verbs["steering"][1]["agent"] == "agent"
    (tmp_path / "crlf.txt").write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert data.read_mapping(tmp_path / "crlf.txt") == verbs
