"""data.py as a specification: prompts, the target grammar, tokens, batches."""

import base64
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from samples import (BOXES, KOBANI, NEWS, PAIRS, ROLES, STRIKE, TWEETS, assert_reads_back, event,
                     facts, news, pair, tokenizer_json, tweet)

import data
from data import Item
from engine.corpus import load_datasets
from engine.files import WeightsError, note
from engine.schema import DataError, Dataset, Record
from tools import convert

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(GOLDEN)



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


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict]:
    """A folder as transformers 5 saves a T5's tokenizer, without spiece.model, and its content."""
    raw = tokenizer_json(GOLDEN / "spiece.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    return tmp_path, raw


def test_a_tokenizer_json_gives_the_ids_and_texts_of_its_spiece_model(
        saved: tuple[Path, dict], tokenizer: data.Tokenizer) -> None:
    """Pieces, scores, types and normaliser are the same, so every text has the same ids."""
    rebuilt = data.Tokenizer(saved[0])
    for case in CASES:
        assert rebuilt.encode(case["text"]) == case["ids"] == case["hf_ids"]
        assert rebuilt.decode(case["ids"]) == tokenizer.decode(case["ids"])
    for start in range(32, 0x3000, 16):              # what the normaliser maps, joins and drops
        text = "".join(map(chr, range(start, start + 16)))
        assert rebuilt.encode(text) == tokenizer.encode(text), text
    assert rebuilt.undecodable(2128) == tokenizer.undecodable(2128)
    for i in range(tokenizer.vocab_size):
        assert rebuilt.pieces.get_score(i) == tokenizer.pieces.get_score(i)
        assert rebuilt.pieces.id_to_piece(i) == tokenizer.pieces.id_to_piece(i)
    assert (rebuilt.pad_id, rebuilt.eos_id, rebuilt.spot_id) == (0, 1, 2099)


def test_other_layouts_of_a_tokenizer_json_are_read_too(saved: tuple[Path, dict],
                                                        tokenizer: data.Tokenizer) -> None:
    """Of transformers 4: sentinels that are only added, steps that sentencepiece takes anyway."""
    folder, raw = saved
    raw["model"]["vocab"] = raw["model"]["vocab"][:2000]
    raw["normalizer"] = {"type": "Sequence", "normalizers": [
        raw["normalizer"], {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}]}
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    raw["added_tokens"].append({"id": 2100, "content": "<event>"})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for case in CASES:
        assert data.Tokenizer(folder).encode(case["text"]) == case["ids"]


def test_a_spiece_model_is_read_before_a_tokenizer_json(saved: tuple[Path, dict]) -> None:
    (saved[0] / "spiece.model").write_bytes((GOLDEN / "spiece.model").read_bytes())
    (saved[0] / "tokenizer.json").write_text("{")
    assert data.Tokenizer(saved[0]).vocab_size == 2000


def test_a_tokenizer_json_without_normaliser_is_read_as_it_stands_and_said(
        saved: tuple[Path, dict], tokenizer: data.Tokenizer, capsys) -> None:
    """What transformers 5.0.0 wrote: its ids are those of a tokenizer that normalises nothing."""
    folder, raw = saved
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": None}))
    note.cache_clear()
    plain = data.Tokenizer(folder)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {folder}/tokenizer.json") and "copy it here" in said
    assert plain.encode("a text") == tokenizer.encode("a text")
    wide = "\uff41"                                   # a full-width a
    assert tokenizer.encode(wide) == tokenizer.encode("a") != plain.encode(wide)
    assert plain.pieces.unk_id() in plain.encode(wide)


def swapped(raw: dict) -> dict:
    tokens = [token | {"id": 4099 - token["id"]} if token["id"] >= 2000 else token
              for token in raw["added_tokens"]]
    return raw | {"added_tokens": tokens}


WRONG = {                                            # what is no T5's: {name: change of the file}
    "BPE": lambda raw: raw | {"model": raw["model"] | {"type": "BPE"}},
    "bytes": lambda raw: raw | {"model": raw["model"] | {"byte_fallback": True}},
    "no model": lambda raw: {name: value for name, value in raw.items() if name != "model"},
    "no pieces": lambda raw: raw | {"model": raw["model"] | {"vocab": []}},
    "scores": lambda raw: raw | {"model": raw["model"] | {"vocab": [
        [piece, math.nan] for piece, _ in raw["model"]["vocab"]]}},
    "a huge score": lambda raw: raw | {"model": raw["model"] | {"vocab": [
        [piece, 10 ** 400] for piece, _ in raw["model"]["vocab"]]}},
    "words for pieces": lambda raw: raw | {"model": raw["model"] | {"vocab": "abc"}},
    "half a surrogate": lambda raw: raw | {"model": raw["model"] | {"vocab": [
        ["\ud800" + piece, score] for piece, score in raw["model"]["vocab"]]}},
    "few sentinels": lambda raw: raw | {"added_tokens": raw["added_tokens"][:50]},
    "sentinels upwards": swapped,
    "a piece that is added": lambda raw: raw | {"added_tokens": [
        *raw["added_tokens"], {"id": 77, "content": raw["model"]["vocab"][77][0]}]},
    "lower case": lambda raw: raw | {"normalizer": {"type": "Sequence", "normalizers": [
        raw["normalizer"], {"type": "Lowercase"}]}},
    "another normaliser": lambda raw: raw | {"normalizer": {"type": "NFKC"}},
    "no base64": lambda raw: raw | {"normalizer": {"type": "Precompiled",
                                                   "precompiled_charsmap": "!"}},
    "no first blank": lambda raw: raw | {"pre_tokenizer": {"type": "Metaspace",
                                                           "prepend_scheme": "never"}},
    "no splitter": lambda raw: raw | {"pre_tokenizer": None}}


@pytest.mark.parametrize("case", WRONG)
def test_a_tokenizer_json_of_anything_else_is_refused_in_four_parts(saved: tuple[Path, dict],
                                                                    case: str) -> None:
    folder, raw = saved
    (folder / "tokenizer.json").write_text(json.dumps(WRONG[case](raw)))
    with pytest.raises(WeightsError, match="tokenizer.json: expected a T5's tokenizer.*"
                                           "got .*; copy spiece.model here"):
        data.Tokenizer(folder)


def test_a_damaged_tokenizer_json_is_refused_or_still_a_tokenizer(saved: tuple[Path, dict]) -> None:
    """Pieces twice or empty, a table of noise: sentencepiece itself refuses them or copes."""
    folder, raw = saved
    refused, rng = 0, random.Random(0)
    for case in range(40):
        vocab, table = list(raw["model"]["vocab"]), bytearray(base64.b64decode(
            raw["normalizer"]["precompiled_charsmap"]))
        vocab[rng.randrange(3, 2000)] = [rng.choice(["", "a", "\0", "\u2581the"]), rng.random()]
        if case % 2:
            table[rng.randrange(8 if case % 4 == 1 else len(table))] ^= 1 << rng.randrange(8)
            table = table[:rng.choice([len(table), 5, len(table) // 2])]
        text = base64.b64encode(table).decode()
        broken = raw | {"model": raw["model"] | {"vocab": vocab},
                        "normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}
        (folder / "tokenizer.json").write_text(json.dumps(broken))
        try:
            data.Tokenizer(folder).encode("a b")
        except (DataError, WeightsError) as error:
            assert "tokenizer.json" in str(error)
            refused += 1
    assert refused > 10


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


@pytest.mark.parametrize("raw, escaped", [
    ("O\u2082", "%4F2"), ("\uff2f\uff11", "%4F1"), ("\u200bO2\ufeff", "%4F2"),    # O2 to T5
    ("O\u200b2", "O\u200b2"), ("CO\u2082", "CO\u2082"),                          # O 2, CO2
    ("\uff053C", "%253C"), ("\uff1cspot>", "%3Cspot>"), ("<spot\ufe65", "%3Cspot>"),
    ("5\uff05 \u2026 \uff1c3", "5\uff05 \u2026 \uff1c3")])                       # nothing to escape
def test_a_text_is_escaped_as_the_tokenizer_will_have_it(
        raw: str, escaped: str, lean: data.Tokenizer) -> None:
    """Structure that only the tokenizer's normaliser makes; other texts stay as they are."""
    assert data.escape(raw, filler=True) == escaped
    said = lean.decode(lean.encode(f"attack, {escaped}"))
    [item], malformed = data.predicted_items(news("med", raw), said, NEWS, written=lean.written)
    assert (item.text, item.span, item.object, malformed) == (raw, (0, len(raw.split())), None, 0)


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
         "Bob", "%2", "5%20", "&amp;", "attacker,x", "\x1c", "\uff05\uff12\uff15", "O\u2082",
         "\uff1cspot\uff1e", "\uff053C", "\ufeff", "\ufffd", "\u2581", "\u2047", "{", "~"]


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



@pytest.mark.parametrize("task, dataset", [("mner", TWEETS), ("mre", PAIRS), ("med", NEWS),
                                           ("meae", NEWS)])
def test_reading_what_was_written_is_the_identity(task: str, dataset: Dataset) -> None:
    """On words made of `<spot>`, `none`, `O1`, `%3C`, commas, `</s>` and the like."""
    rng = random.Random(7)
    for _ in range(1500):
        assert_reads_back(random_record(task, rng), dataset)


@pytest.mark.parametrize("task, dataset", [("mner", TWEETS), ("med", NEWS), ("meae", NEWS)])
def test_a_target_that_went_through_the_tokenizer_is_read_back_and_has_its_places(
        task: str, dataset: Dataset, lean: data.Tokenizer) -> None:
    """On the same words, some of which have no piece, or are blanks to T5 and then no item. The
    first of items that are alike always has a place."""
    rng = random.Random(8)
    for _ in range(400):
        record = random_record(task, rng)
        said = lean.decode(lean.encode(data.target(record)))
        found, malformed = data.predicted_items(record, said, dataset, written=lean.written)
        gold = [item for item in data.gold_items(record) if item.text is not None]
        empty = [item for item in gold if not lean.written(item.text)]
        kept = [item for item in gold if item not in empty]
        assert malformed == len(empty), said
        read, _ = data.parse(task, said, dataset.labels[task])
        assert facts(read, str) == facts(kept, lean.written), said
        first = dict(reversed(list(zip(facts(read, str), found))))
        assert all(item.span or item.object is not None for item in first.values()), said


def test_targets_survive_the_tokenizer_where_it_knows_every_character(
        tokenizer: data.Tokenizer) -> None:
    for record in (news("meae", STRIKE, KOBANI), tweet("Bob", ("person", 0, 1))):
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
    """Worked examples N5 and N11, and what a second type does."""
    record = tweet("Bob saw Bob and Ann")
    assert spans(record, "person, Bob <spot> person, Bob <spot> person, Bob", TWEETS) == [
        (0, 1), (2, 3), None]
    assert spans(record, "person, Bob <spot> location, Bob <spot> person, Bob", TWEETS) == [
        (0, 1), (2, 3), (2, 3)]
    assert spans(record, "person, Ann <spot> person, Bob", TWEETS) == [(4, 5), (0, 1)]
    triggers = "attack, Bob <spot> phone write, Bob <spot> attack, Bob <spot> attack, Bob"
    assert spans(news("med", "Bob saw Bob"), triggers, NEWS) == [(0, 1), (0, 1), (2, 3), None]


def test_a_text_that_is_not_there_is_an_item_without_place() -> None:
    """It can never match and yet counts as predicted (N12, E2): case matters, tokens are whole."""
    for text in ("bob", "Bo", "Bob saw Ann", "\u200b"):
        [item], malformed = data.predicted_items(tweet("Bob saw Bobby"), f"person, {text}", TWEETS)
        assert (item.span, item.text, malformed) == (None, text, 0)


def test_texts_are_compared_in_canonical_form(lean: data.Tokenizer) -> None:
    """NFKC, single spaces: what sentencepiece does to a text; items have the words of the text."""
    record = tweet("wow \u2026 ca\ufb00e \u200b \uff21\u200bB end")
    for written in (data.canon, lean.written):
        assert spans(record, "person, wow ...", TWEETS, written=written) == [(0, 2)]
        [item], _ = data.predicted_items(record, "person, caffe A B", TWEETS, written=written)
        assert (item.span, item.text) == ((2, 5), "ca\ufb00e \u200b \uff21\u200bB")
    assert data.canon(" a\u00a0\u00a0b e\u0301\ufeff ") == "a b \u00e9"


def test_without_a_tokenizer_texts_are_normalised_as_sentencepiece_does(
        tokenizer: data.Tokenizer) -> None:
    """On every character of the basic plane above ASCII, but for four (one is newer than some
    Unicode tables; T5 itself makes a blank of U+200D and keeps U+061C)."""
    pieces, others = tokenizer.pieces, []
    for ch in map(chr, (*range(0xa0, 0xd800), *range(0xe000, 0x10000))):
        text = f"a{ch}b"
        if data.canon(text) != pieces.normalize(text).replace("\u2581", " ").strip(" "):
            others.append(ch)
    assert "".join(others) in ("\u0344\u200d\ua7f1\uff5e", "\u0344\u200d\uff5e")


@pytest.mark.parametrize("text, written", [
    ("Bob", "Bob"), ("A~n", "A \u2047 n"), ("{}Ann{}", "\u2047 Ann \u2047"),
    ("\u0410\u043d", "\u2047"), ("New\u200bYork\ufeff", "New York"), ("\u200b", ""),
    ("O\u2082", "O2"), ("What\u2047", "What??"),
    ("<spot>", "<spot>"), ("a<b", "a \u2047 b"), ("</s>", "</s>"), ("%3C", "%3C")])
def test_words_as_the_tokenizer_writes_them(text: str, written: str, lean: data.Tokenizer) -> None:
    """What decoding gives back of a text: blanks, compatible characters, a mark for unknown ones;
    what is escaped on the way in is not lost."""
    assert lean.written(text) == written


@pytest.mark.parametrize("text, said, places", [
    ("Luis Bu\u00f1uel met A\u00f1a", "person, Luis Bu \u2047 uel", [(0, 2)]),
    ("A\u03b1 A\u03b2", "person, A \u2047 <spot> person, A \u2047", [(0, 1), (1, 2)]),
    ("A ~ n A~n", "person, A \u2047 n <spot> person, A \u2047 n", [(0, 3), (3, 4)]),
    ("Ann A~n", "person, A \u2047 n", [(1, 2)]), ("Ann", "person, A \u2047 n", [None])])
def test_unknown_characters_stand_for_themselves_alone(
        text: str, said: str, places: list, lean: data.Tokenizer) -> None:
    """Texts that become equal are taken in their order; a known character is no unknown one."""
    assert spans(tweet(text), said, TWEETS, written=lean.written) == places


def test_an_argument_is_the_occurrence_nearest_to_its_trigger() -> None:
    record = news("meae", "police met police before police fired")
    text = "attack <spot> attacker, police"
    assert spans(record, text, NEWS, triggers={"attack": [5]}) == [(4, 5)]
    assert spans(record, text, NEWS, triggers={"attack": [1]}) == [(0, 1)]
    assert spans(record, text, NEWS, triggers={"phone write": [5]}) == [(0, 1)]
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


@pytest.mark.parametrize("label, comes_back", [
    ("stra\u00dfe", "stra \u2047 e"), ("{brand}", "\u2047 brand \u2047"), ("a\u2581b", "a b")])
def test_every_label_that_the_tokenizer_cannot_write_is_named(
        label: str, comes_back: str, lean: data.Tokenizer) -> None:
    """A label of an answer is compared as it stands, so each item with it would be wrong."""
    tweets = replace(TWEETS, labels={"mner": ["person", label]})
    roles = {"attack": ["target", label]}
    events = replace(NEWS, labels={"med": ["attack"], "meae": roles})
    datasets = {"tweets": tweets, "news": events}
    with pytest.raises(DataError, match="expected labels that the tokenizer can write") as caught:
        data.check_labels({("tweets", "mner"), ("news", "meae")}, datasets, lean)
    _, *lines, advice = str(caught.value).split("\n")
    assert lines == [f'  {place}: "{label}" comes back as "{comes_back}"'
                     for place in ("news: meae", "tweets: mner")]
    assert advice.startswith("rename them in dataset.json and records, or take a T5")
    data.check_labels({("news", "med")}, datasets, lean)            # whose labels are right


def test_published_labels_and_those_of_the_demo_can_be_written(
        tokenizer: data.Tokenizer, small: dict[str, str]) -> None:
    """By the reference tokenizer and by the demo's own; T5's is no part of this repository."""
    published = {name: Dataset(name, one.units, one.labels)
                 for name, one in convert.PUBLISHED.items()}
    ours = data.Tokenizer(ROOT / "demo_backbone" / "t5")
    for datasets, writer in ((published, tokenizer), (load_datasets(small["data"]), ours)):
        used = {(name, task) for name, one in datasets.items() for task in one.labels}
        assert len(used) >= 7
        data.check_labels(used, datasets, writer)


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


def test_texts_and_targets_with_unknown_characters_are_counted_by_dataset_and_split(
        lean: data.Tokenizer) -> None:
    """As they stand in the ids; nothing is said where there are none."""
    def of(file: str, *texts: str) -> list[Record]:
        return [replace(tweet(text, ("person", 0, 1)), source=f"corpus/tweets/{file}:{number}")
                for number, text in enumerate(texts, 1)]

    said: list[str] = []
    encode(of("dev.jsonl", "Ann met Bo") + of("train.jsonl", "Ann", "A~n met Bo", "Ann met {Bo}")
           + of("test.jsonl", "Ann", "An\u00f1"), lean, announce=said.append)
    assert said == ["unknown characters, which the tokenizer lacks, are in tweets train 2 of 3 "
                    "texts and 1 targets, tweets test 1 of 2 texts and 1 targets"]
    encode(of("train.jsonl", "Ann met O\u2082 \u2026"), lean, announce=said.append)
    assert len(said) == 1
    encode(of("one.jsonl", "An\u00f1"), lean, announce=said.append)     # a file of a single row
    assert said[1].endswith("tweets one 1 of 1 texts and 1 targets")


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
    fifty = [None] * 50  # their number alone counts
    orders = {(seed, epoch): tuple(data.global_batches(fifty, seed, epoch, 50)[0])
              for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    state = torch.get_rng_state()
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(data.global_batches(fifty, 1, 2, 50)[0]) == orders[1, 2]
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
