"""engine/schema.py and engine/corpus.py as a specification: what is right, what is refused, how."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT
from samples import (MEAE, MNER, MRE, NEWS, PAIRS, SAMPLES, TWEETS, changed, news, rows, tweet,
                     write_corpus)

import data
from engine.corpus import (load_corpus, load_datasets, normalised, read_dataset, texts_of,
                           write_dataset)
from engine.schema import RECORD_TASKS, DataError, iou

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Datasets in the order of their names; `source` says where a record stands."""
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    meae, mre, mner = load_corpus(corpus, "train")
    assert mner.entities == ({"type": "person", "start": 0, "end": 1},)
    assert (mner.size, mner.objects, mner.tokens[0]) == ((100, 50), ((1, 2, 30, 40),), "Bob")
    assert (mre.head, mre.tail, mre.relation, mre.image) == ((0, 1), (1, 2), "none", None)
    assert meae.source == f"{tmp_path}/news/train.jsonl:1"
    assert [item.text for item in data.gold_items(meae)] == ["b", "O1", None]
    assert load_datasets(corpus) == {"news": NEWS, "pairs": PAIRS, "tweets": TWEETS}


def test_units_select_records(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    assert [r.task for r in load_corpus(corpus, "train", ["T17", "MEAE"])] == ["meae", "mner"]
    with pytest.raises(DataError, match='"T71" is no split or unit: did you mean "T17"'):
        load_corpus(corpus, "train", ["T71"])
    with pytest.raises(DataError, match='"tain" is no split or unit: did you mean "train"'):
        load_corpus(corpus, "tain")
    with pytest.raises(DataError, match="no dev.jsonl for the units"):
        load_corpus(corpus, "dev")
    with pytest.raises(DataError, match="found a single dataset: give the folder above"):
        load_corpus(corpus / "tweets", "train")
    for folder, found in ((corpus / "nowhere", "no folder"), (GOLDEN, "none")):
        with pytest.raises(DataError, match=f"with a dataset.json, found {found}; "):
            load_datasets(folder)


def test_no_file_of_records_is_passed_over(tmp_path: Path) -> None:
    """A split under another name and a folder without dataset.json would vanish in silence."""
    corpus = write_corpus(tmp_path, {name: [row] for name, row in SAMPLES.items()})
    (corpus / "pairs" / "train.jsonl").rename(corpus / "pairs" / "valid.jsonl")
    with pytest.raises(DataError, match='valid.jsonl: "valid.jsonl" is no split: exp'):
        load_corpus(corpus, "train")
    (corpus / "pairs" / "valid.jsonl").rename(corpus / "pairs" / "dev.jsonl")
    (corpus / "pairs" / "dataset.json").unlink()
    with pytest.raises(DataError, match="pairs/dataset.json: cannot be read"):
        load_corpus(corpus, "train")


@pytest.mark.parametrize("name", ["train.json", "train.txt", "train.jsonl.gz", "Train.JSONL"])
def test_a_split_in_another_form_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """It would vanish in silence; beside the split itself, as the source of it, it may lie."""
    folder = write_corpus(tmp_path, {"tweets": [MNER]}) / "tweets"
    (folder / name).write_text("x")
    assert len(load_corpus(tmp_path, "train")) == 1
    (folder / "train.jsonl").rename(folder / "dev.jsonl")
    with pytest.raises(DataError, match=f'tweets/{name}: "{name}" is no split: .* move it away'):
        load_corpus(tmp_path, "dev")


@pytest.mark.parametrize("name", ["dataset.json", "train.jsonl"])
@pytest.mark.parametrize("begins, says", [
    ("", "expected text, got an empty file: fill it"),
    (" \n\n", "expected text, got an empty file: fill it"),
    ("\ufeff{}\n", "expected UTF-8 without BOM, got one: save it without BOM")])
def test_an_empty_file_and_a_byte_order_mark_are_named(tmp_path: Path, name: str, begins: str,
                                                       says: str) -> None:
    """As editors leave them: the file is named, and what to do with it."""
    path = write_corpus(tmp_path, {"tweets": [MNER]}) / "tweets" / name
    path.write_text(begins, encoding="utf-8")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}(:1)?: {says}"):
        load_corpus(tmp_path, "train")


def test_an_entity_stands_once_and_may_have_a_second_type(tmp_path: Path) -> None:
    """Two of the same would be two gold items, of which an answer can match one."""
    row = changed(MNER, "entities", [{"start": 0, "type": "person", "end": 1},
                                     {"type": "location", "start": 0, "end": 1}])
    assert len(load_corpus(write_corpus(tmp_path, {"tweets": [row]}), "train")) == 1
    row["entities"] += MNER["entities"]
    with pytest.raises(DataError, match='jsonl:1: entities: .*"type": "person"} stands twice: wri'):
        load_corpus(write_corpus(tmp_path, {"tweets": [row]}), "train")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(write_corpus(tmp_path, {}) / "tweets" / "train.jsonl")
    with pytest.raises(DataError, match="train.jsonl: cannot be read .no regular file"):
        load_corpus(tmp_path, "train")


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    """A tweet may hold U+2028, U+0085, U+00A0 or a zero-width character as a token."""
    tokens = ["\u2028", "\x85", "\u00a0", "\u200b", "\ufe0f", "\U0001f602"]
    line = json.dumps(changed(MNER, "tokens", tokens), ensure_ascii=False).encode()
    [record] = load_corpus(write_corpus(tmp_path, {"tweets": [line]}), "train")
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
        load_corpus(corpus, "train")
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
        load_corpus(corpus, "train")
    [problem] = str(caught.value).split("\n")[1:]
    assert "train.jsonl:2: line: " in problem and says in problem


ACCEPTED = {"type": "attack", "trigger": [1, 2], "arguments": [{"role": "place", "span": [0, 1]}]}


def test_accepted_events_are_optional_and_no_gold(tmp_path: Path) -> None:
    """What is right in the sentence beyond the gold of the sample; never in target or gold."""
    rows = [MEAE | {"accepted": [ACCEPTED]}, MEAE | {"id": "2"},
            MEAE | {"id": "3", "task": "med", "accepted": []}]
    first, second, third = load_corpus(write_corpus(tmp_path, {"news": rows}), "train")
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
        load_corpus(write_corpus(tmp_path, {row["dataset"]: [row]}), "train")


def test_the_dataset_of_the_docs_is_read_as_it_is_printed(tmp_path: Path) -> None:
    """docs/data.md, "Train on your own data": a reader copies it word for word."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    descriptor, records = re.findall("^```json\n(.*?)^```", text, re.S | re.M)
    (folder := tmp_path / "shop").mkdir()
    (folder / "dataset.json").write_text(descriptor)
    lines = records.replace("\n ", " ")
    (folder / "train.jsonl").write_text(lines)
    assert [record.task for record in load_corpus(tmp_path, "train")] == list(RECORD_TASKS)


def test_the_note_of_a_dataset_is_kept(tmp_path: Path) -> None:
    """What a result on the dataset must name; without one it is empty."""
    descriptor = {"name": "tweets", "units": TWEETS.units, "labels": TWEETS.labels}
    write_dataset(tmp_path / "tweets", descriptor | {"note": "a part only"},
                       {"train": rows(MNER)})
    assert read_dataset(tmp_path / "tweets").note == "a part only"
    write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER)})
    assert read_dataset(tmp_path / "tweets") == TWEETS and TWEETS.note == ""


def test_an_image_is_needed_for_boxes_and_for_the_whole_image(tmp_path: Path) -> None:
    row = changed(changed(changed(MEAE, "image", None), "objects", []), "events.0.trigger", None)
    with pytest.raises(DataError) as caught:
        load_corpus(write_corpus(tmp_path, {"news": [row]}), "train")
    assert "events[0].trigger: null needs an image" in str(caught.value)
    assert "events[0].arguments[0].box: [1, 2, 30, 41] needs an image" in str(caught.value)


def test_an_unknown_image_size_leaves_boxes_unbounded(tmp_path: Path) -> None:
    """The size of a tweet's picture is known when somebody has it; it is checked when opened."""
    row = changed(changed(MNER, "size", None), "objects.0", [1, 2, 3000.5, 4000])
    [record] = load_corpus(write_corpus(tmp_path, {"tweets": [row]}), "train")
    assert record.objects == ((1, 2, 3000.5, 4000),)


def test_ids_are_unique_within_a_file(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"tweets": [MNER, MNER]})
    with pytest.raises(DataError, match='train.jsonl:2: id: "1" is the id of .*train.jsonl:1 too'):
        load_corpus(corpus, "train")


def test_twenty_problems_are_shown_at_once_and_all_are_counted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"pairs": [changed(MRE, "relation", 1)] * 5,
                                     "tweets": [changed(MNER, "entities.0.end", 9)] * 30})
    with pytest.raises(DataError) as caught:
        load_corpus(corpus, "train")
    first, *lines = str(caught.value).split("\n")
    assert first == "35 problem(s) in the data, the first 20:"
    assert [("pairs" in line) for line in lines] == [True] * 5 + [False] * 15


@pytest.mark.parametrize("path, value, says", [
    ("nme", "x", 'key "nme" is unknown'), ("name", "other", 'is not "tweets", the name of its fol'),
    ("units.mner", "T18", '"T18" is unknown: did you mean "T1'), ("units.mner", "V1", "use one of"),
    ("units.mer", "T17", 'key "mer" is unknown: did you mean "mner"'),
    ("units", [], "no JSON object"),
    ("labels.mre", ["none"], 'key "mre" is unknown'), ("labels.mner", ..., 'key "mner" is missing'),
    ("labels.mner.1", "location", 'has "location" twice: write it once'),
    ("labels.mner.0", "o\ufb03ce", "NFKC"), ("labels.mner.0", "m\u00b2", "NFKC"),
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
        read_dataset(folder)
    assert f"{folder}/dataset.json: " in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"name": 1, "units": 2, "labels": 3}'])
def test_a_broken_descriptor_is_an_error_not_a_crash(tmp_path: Path, text: str) -> None:
    folder = write_corpus(tmp_path, {}) / "tweets"
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="dataset.json: "):
        load_datasets(tmp_path)


def test_relations_need_none_and_roles_a_type(tmp_path: Path) -> None:
    """An unreadable answer counts as "none", so that label must exist."""
    for name, labels, says in (("pairs", {"mre": ["couple"]}, "mre: .*none"),
                               ("news", {"med": ["attack"], "meae": ["attacker"]}, "event type"),
                               ("news", {"med": ["attack"], "meae": {"Attack": []}}, "event type"),
                               ("news", {"med": ["attack"], "meae": {}}, "event type"),
                               ("news", {"med": ["attack"], "meae": {"attack": ["a", "a"]}},
                                'meae.attack: .*has "a" twice')):
        folder = write_corpus(tmp_path, {}) / name
        raw = json.loads((folder / "dataset.json").read_text()) | {"labels": labels}
        (folder / "dataset.json").write_text(json.dumps(raw))
        with pytest.raises(DataError, match=says):
            read_dataset(folder)


def test_a_dataset_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    descriptor = {"name": "tweets", "units": TWEETS.units, "labels": TWEETS.labels}
    with pytest.raises(DataError, match="source:2: tokens"):
        write_dataset(tmp_path / "tweets", descriptor,
                           {"train": rows(MNER, changed(MNER, "tokens", []))})
    with pytest.raises(DataError, match='source:2: id: "1" is the id of source:1 too'):
        write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER, MNER),
                                                             "dev": rows(MNER)})
    with pytest.raises(DataError, match="tweets: dev: has no record"):
        write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER), "dev": []})
    assert not (tmp_path / "tweets").exists()
    write_dataset(tmp_path / "tweets", descriptor, {"train": rows(MNER)})
    assert [r.id for r in load_corpus(tmp_path, "train")] == ["1"]
    assert sorted(os.listdir(tmp_path / "tweets")) == ["dataset.json", "images", "train.jsonl"]


def test_texts_of_records_are_normalised_and_pictures_have_none() -> None:
    """For dropping training records whose text stands in a test split."""
    records = [tweet("See http://t.co/x NOW !"), tweet("see now"), news("med", "")]
    assert texts_of(records) == {"seenow"}
    known = texts_of(records[:1])
    assert [normalised(record) in known for record in records] == [True, True, False]


def test_iou_of_boxes() -> None:
    """Worked examples A4 and A7: 0.5 and 0.488."""
    assert iou((10, 10, 50, 50), (10, 10, 50, 90)) == 0.5
    assert round(iou((10, 10, 50, 50), (10, 10, 50, 92)), 3) == 0.488
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
