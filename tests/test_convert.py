"""tools/convert.py and tools/check.py as a specification, on small files and on published ones.

Tests on the published files run where CLORAE_REALDATA names a folder that holds them as
{twitter2015,twitter2017,mnre_v1,mnre_v2,m2e2}/<published files>, the text-only events (a copy
that leaves the parses out) and the detections of M2E2 as extra/m2e2_*.json and the role mapping as
ace_sr_mapping.txt.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REAL, ROOT, linked_m2e2, published_path, run
from samples import MEAE, MNER, MRE, STRIKE, assert_reads_back, changed, write_corpus

import data
from engine.corpus import load_corpus, load_datasets
from engine.schema import SPLITS, DataError, Dataset, Record, iou
from tools import check, convert

CONLL = ("IMGID:17_06_12483\nNew\tO\nYork\tB-LOC\nCity\tI-LOC\n\n"
         "IMGID:O_1926\nBob\tI-PER\nLee\tI-PER\nX\tB-OTHER\n\u00a0\tI-MISC\n.\tI-LOC\n")


def run_convert(kind: str, files: dict[str, str], root: Path, **options: object) -> Path:
    """Writes the published files of a dataset and converts them; returns the corpus."""
    source = root / "source"
    source.mkdir(exist_ok=True)
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8", newline="\n")
    convert.convert(kind, source, root / "corpus", **options)
    return root / "corpus"


@pytest.mark.parametrize("kind, unit", [("twitter2015", "T15"), ("twitter2017", "T17"),
                                        ("snap", "SNAP")])
def test_tweets_are_chunked_leniently(kind: str, unit: str, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    """A stray I- starts a chunk (N8), as a change of type does (N9); OTHER is MISC."""
    corpus = run_convert(kind, {"valid.txt": CONLL}, tmp_path)
    first, second = load_corpus(corpus, "dev", [unit])
    assert first.tokens == ("New", "York", "City") and first.image == "17_06_12483.jpg"
    assert [(e["type"], e["start"], e["end"]) for e in first.entities] == [("location", 1, 3)]
    assert second.tokens[3] == "\u00a0" and second.id == "O_1926" and second.size is None
    assert [(e["type"], e["start"], e["end"]) for e in second.entities] == [
        ("person", 0, 2), ("miscellaneous", 2, 4), ("location", 4, 5)]
    out = capsys.readouterr().out
    assert f"{kind} dev: 2 records found" in out and "differs" in out
    assert f"{kind} train: FILE NOT FOUND" in out


def test_tweets_that_share_a_picture_are_numbered(tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    """From the second on, in the order of the file; a name that is another's id is passed over."""
    text = "".join(f"IMGID:{name}\n{word}\tB-PER\n\n" for name, word in zip(
        "7 7 8 7 7-2 9".split(), "Ada Bob Kim Bo Lee Al".split()))
    corpus = run_convert("twitter2015", {"train.txt": text, "test.txt": text[:19]}, tmp_path)
    records = load_corpus(corpus, "train")
    assert [(r.id, r.image, r.tokens[0]) for r in records] == [
        ("7", "7.jpg", "Ada"), ("7-2", "7.jpg", "Bob"), ("8", "8.jpg", "Kim"),
        ("7-3", "7.jpg", "Bo"), ("7-2-2", "7-2.jpg", "Lee"), ("9", "9.jpg", "Al")]
    assert [r.id for r in load_corpus(corpus, "test")] == ["7"]
    assert re.findall(".*(?:train|test).txt: .*", capsys.readouterr().out)[0].endswith(
        "train.txt: 2 tweets show the picture of one before; their ids are numbered")


@pytest.mark.parametrize("tags, chunks", [
    ("B-PER I-PER O B-LOC", [(0, 2), (3, 4)]), ("O I-PER I-PER", [(1, 3)]),
    ("B-PER I-LOC O", [(0, 1), (1, 2)]), ("B-PER B-PER", [(0, 1), (1, 2)]),
    ("I-PER O I-PER", [(0, 1), (2, 3)]), ("B-OTHER I-MISC", [(0, 2)]), ("O O", [])])
def test_chunks_of_tag_sequences(tags: str, chunks: list, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("IMGID:1\n" + "".join(f"w\t{tag}\n" for tag in tags.split()))
    [(_, record)] = convert.read_conll(tmp_path / "x", "twitter2015")
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


def test_a_name_of_a_picture_is_taken_as_it_is_meant(tmp_path: Path) -> None:
    """With an ending it is a file's own name; blanks around it belong to nobody."""
    names = "p.jpg", " q ", "r.PNG", "s.2", "t.jpeg"
    text = "".join(f"IMGID:{name}\nBob\tO\n\n" for name in names)
    records = load_corpus(run_convert("twitter2017", {"train.txt": text}, tmp_path), "train")
    assert [r.image for r in records] == ["p.jpg", "q.jpg", "r.PNG", "s.2.jpg", "t.jpeg"]
    assert [r.id for r in records] == ["p.jpg", "q", "r.PNG", "s.2", "t.jpeg"]


OWN = ("IMGID:2.png\nKrups\tB-BRAND_NAME\nXL\tI-BRAND_NAME\n\nnew\tO\ndark\tB-Colour\n"
       "red\tI-Colour\n\nIMGID:2.png\nx\tO\n")


def test_own_files_bring_their_own_labels_and_may_lack_pictures(tmp_path: Path) -> None:
    """The dataset has the name of its folder, here "source"; dev.txt is as good as valid.txt."""
    corpus = run_convert("bio", {"train.txt": OWN, "dev.txt": OWN}, tmp_path)
    assert load_datasets(corpus) == {"source": Dataset(
        "source", {"mner": "T15"}, {"mner": ["brand name", "colour"]})}
    first, second, third = load_corpus(corpus, "dev")
    assert (first.id, second.id, third.id) == ("2.png", "5", "2.png-2")
    assert (first.image, second.image, third.image) == ("2.png", None, "2.png")
    assert first.entities == ({"type": "brand name", "start": 0, "end": 2},)
    assert second.entities == ({"type": "colour", "start": 1, "end": 3},)
    assert check.check(corpus, require_images=False) is None


@pytest.mark.parametrize("text, says", [
    ("Bob B-PER\n", "train.txt:1: expected token<TAB>tag"), ("Bob\tB-\n", "train.txt:1: expected"),
    ("Bob\tPER\n", "KIND bio: any"), ("a\tO\n", "labels.mner: .* is empty"),
    ("a\tB-X:Y\n", "rename the label"), ("IMGID:1\n\nBob\tO\n", "train.txt:1: tokens: .* no text")])
def test_a_faulty_file_of_ones_own_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        run_convert("bio", {"train.txt": text}, tmp_path)


def test_tokens_of_tweets_are_kept_as_they_are(tmp_path: Path) -> None:
    """What str.split() and strip() would lose or split, @ and URLs, characters that
    T5 lacks, repeated strings, one string with two types, an entity with a comma."""
    tokens = ["\u00a0", "\ufe0f", "\u200b", "\u2028", "\x85", "\U0001f602", "@", "@Bob", "http://t",
              "https://t", "<", "{", "~", "`", "Bob", "Bob", "Paris", ",", "Texas"]
    tags = {7: "B-PER", 14: "B-PER", 15: "B-ORG", 16: "B-LOC", 17: "I-LOC", 18: "I-LOC"}
    text = "IMGID:16_05_24_704\r\n" + "".join(
        f"{token}\t{tags.get(i, 'O')}\r\n" for i, token in enumerate(tokens))
    corpus = run_convert("snap", {"test.txt": text}, tmp_path)
    [record] = load_corpus(corpus, "test")
    assert record.tokens == tuple(tokens) and record.id == "16_05_24_704"
    assert [(item.label, item.text) for item in data.gold_items(record)] == [
        ("person", "@Bob"), ("person", "Bob"), ("organization", "Bob"),
        ("location", "Paris , Texas")]
    found, malformed = data.predicted_items(record, data.target(record),
                                            load_datasets(corpus)["snap"])
    assert (found, malformed) == (data.gold_items(record), 0)


def test_files_that_are_not_utf8_or_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least one of train.txt, valid.txt, test.txt"):
        run_convert("twitter2017", {}, tmp_path)
    (tmp_path / "source" / "test.txt").write_bytes(b"IMGID:1\n\xff\tO\n")
    with pytest.raises(DataError, match="test.txt:2: not UTF-8"):
        run_convert("twitter2017", {}, tmp_path)
    (tmp_path / "source" / "test.txt").write_bytes(b"\xef\xbb\xbfIMGID:1\na\tO\n")
    with pytest.raises(DataError, match="test.txt:1: expected UTF-8 without BOM, got one: save it"):
        run_convert("twitter2017", {}, tmp_path)
    with pytest.raises(DataError, match="train.json: expected text, got an empty file: fill it or"):
        run_convert("swig", swig_files({}) | {"train.json": ""}, tmp_path)


V1_LINE = ("{'token': ['The', '#', 'Bears', \"don't\", 'win'], 'h': {'name': '#Bears', 'pos': "
           "[1, 3]}, 't': {'name': 'win', 'pos': [4, 5]}, 'img_id': 17, "
           "'relation': '/misc/misc/held_on'}\n")


def test_relations_are_python_literals_with_offsets(tmp_path: Path) -> None:
    """Numbers name pictures too; a mention is its tokens, whatever `name` says."""
    corpus = run_convert("mnre_v1", {"ours_train.txt": V1_LINE}, tmp_path)
    [record] = load_corpus(corpus, "train")
    assert record.image == "17.jpg" and record.relation == "held on (event)"
    assert data.target(record) == "# Bears <spot> held on (event) <spot> win"


def test_a_pair_may_overlap_and_come_in_any_order(tmp_path: Path) -> None:
    """Nor does the picture's name, which gives V1's label away: it never reaches the
    model."""
    line = V1_LINE.replace("[1, 3]", "[2, 5]").replace("[4, 5]", "[0, 3]").replace(
        "17", "'noRel_17.jpg'").replace("/misc/misc/held_on", "none")
    corpus = run_convert("mnre_v1", {"ours_test.txt": line}, tmp_path)
    [record] = load_corpus(corpus, "test")
    prompt = "".join(data.prompt(record, load_datasets(corpus)["mnre_v1"]))
    assert (record.head, record.tail, record.image) == ((2, 5), (0, 3), "noRel_17.jpg")
    assert "between Bears don't win and The # Bears: " in prompt
    assert data.target(record) == "Bears don't win <spot> none <spot> The # Bears"
    assert "noRel" not in prompt + data.target(record)


def test_the_dev_file_of_v2_has_a_space_in_its_name_and_none_a_capital(tmp_path: Path) -> None:
    line = V1_LINE.replace("17", "'a_0.jpg'").replace("/misc/misc/held_on", "None")
    corpus = run_convert("mnre_v2", {"mnre_val .txt": line}, tmp_path)
    [record] = load_corpus(corpus, "dev")
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
    paths = convert.RELATIONS[kind]
    words = {convert.relation_word(path) for path in paths}
    assert len(words) == len(set(paths)) == len(paths) == count
    assert convert.PUBLISHED[kind].labels["mre"] == sorted(words)
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
    records = load_corpus(corpus, "test")
    assert [r.id for r in records] == ["D_1+D_0.jpg/med", "D_1+D_0.jpg/meae", "D_1+D_1.jpg/med",
                                       "D_1+D_1.jpg/meae"]
    assert data.target(records[0]) == "attack, airstrike"
    assert data.target(records[1]) == (
        "attack <spot> attacker, coalition <spot> target, O1 <spot> instrument, O2")
    assert records[1].objects == ((1, 190, 508, 353), (5, 6, 7, 8))
    assert data.target(records[3]) == "attack <spot> attacker, coalition"   # the picture disagrees
    assert records[3].objects == ((1, 2, 3, 4),)
    assert "leaks their number" in load_datasets(corpus)["m2e2_gold"].note


def test_detector_mode_shows_the_most_confident_detections(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A gold box is the detection with the highest IoU >= 0.5; without one it stays as gold that
    cannot be reached. Corners are put in order and clipped at 0, what has no area is dropped."""
    corpus = run_convert("m2e2", m2e2_files(COREF, found=M2E2_FOUND), tmp_path)
    med, meae, _, other = load_corpus(corpus, "test", ["MED", "MEAE"])
    assert meae.objects == med.objects == ((0, 190.25, 508, 353.5), (1, 190, 508, 290),
                                           (7, 8, 30, 40))
    assert data.target(meae) == "attack <spot> attacker, coalition <spot> target, O1"
    assert [(i.role, i.box, i.object) for i in data.gold_items(meae)] == [
        ("attacker", None, None), ("target", (1, 190, 508, 353), 1),
        ("instrument", (5, 6, 7, 8), None)]
    assert other.objects == ()
    out, note = capsys.readouterr().out, load_datasets(corpus)["m2e2"].note
    assert "detections in 3 pictures; 1 without area dropped" in out
    assert "in detector mode: objects are the 16 most confident YOLOv8 detections" in note
    assert "they show 1 of 3 gold boxes (33.3 %)" in note and note in out


@pytest.mark.parametrize("limit, boxes, shown", [(1, 1, 1), (2, 2, 1), (3, 3, 1)])
def test_the_number_of_detections_is_a_choice(limit: int, boxes: int, shown: int,
                                              tmp_path: Path) -> None:
    run_convert("m2e2", m2e2_files(COREF, found=M2E2_FOUND), tmp_path, max_objects=limit)
    record = load_corpus(tmp_path / "corpus", "test")[1]
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
    assert "they show 0 of 0 gold boxes" in load_datasets(corpus)["m2e2"].note


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
    for record in load_corpus(corpus, "test"):
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
    assert not any(record.accepted for record in load_corpus(corpus, "test"))
    assert "0 of 2 samples have other events" in capsys.readouterr().out


def test_m2e2_labels_are_its_eight_types_and_their_roles() -> None:
    labels = convert.PUBLISHED["m2e2"].labels
    for kind in ("m2e2_gold", "ace2005", "swig"):
        assert convert.PUBLISHED[kind].labels is labels
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
    med, meae, quiet = load_corpus(corpus, "train", ["MED", "MEAE"])
    assert [r.id for r in (med, meae, quiet)] == ["CNN_1-3/med", "CNN_1-3/meae", "CNN_1-4/med"]
    assert data.target(med) == "attack, airstrike" and data.target(quiet) == "none"
    assert data.target(meae) == "attack <spot> attacker, coalition <spot> target, Kobani"
    assert med.image is None and med.objects == () and med.source.endswith("train.jsonl:1")
    assert load_datasets(corpus)["ace2005"].labels == convert.PUBLISHED["m2e2"].labels
    out = capsys.readouterr().out
    assert "no such event or role: 1 x injure, 1 x victim of attack" in out
    assert "ace2005 train: 3 records found, from" in out and "differs" not in out.split("\n")[1]


def test_a_sentence_of_foreign_events_only_has_none(tmp_path: Path) -> None:
    foreign = changed(ACE, "event_mentions", ACE["event_mentions"][1:])
    corpus = run_convert("ace2005", ace_files(foreign), tmp_path)
    [med] = load_corpus(corpus, "train")
    assert (med.task, data.target(med)) == ("med", "none")


def test_all_event_types_are_those_of_the_files(tmp_path: Path) -> None:
    """--event-types all: types and roles of every split, sorted, lower-case words."""
    files = ace_files(ACE) | ace_files(
        changed(ACE, "event_mentions.1.event_type", "Business:Start-Org"), name="dev.oneie.json")
    corpus = run_convert("ace2005", files, tmp_path, event_types="all")
    assert load_datasets(corpus)["ace2005"].labels == {
        "med": ["attack", "injure", "start org"],
        "meae": {"attack": ["attacker", "target", "victim"], "injure": [], "start org": []}}
    med, meae = load_corpus(corpus, "dev")
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
    return load_corpus(corpus, "train")


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
        assert all(iou(box, other) < 0.5 for box in grounded
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
    assert load_datasets(corpus)["swig"].labels["meae"] == {
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


@pytest.mark.parametrize("text", ["3", "[1]", "{", '{"a": 1, "a": 2}'])
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

def code_of(tool: ModuleType, *arguments: object) -> int:
    """The exit code of a command."""
    try:
        tool.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code
    return 0


def test_the_commands_convert_and_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def command(tool: ModuleType, *arguments: object) -> tuple[int, str, str]:
        return code_of(tool, *arguments), *capsys.readouterr()

    (tmp_path / "train.txt").write_text(CONLL + "\nIMGID:3\nnew\tO\nYORK-city!\tO\n")
    (tmp_path / "test.txt").write_text("IMGID:4\nNew\tO\nYork\tO\nCity\tO\nhttp://t.co/x\tO\n")
    code, out, _ = command(convert, "twitter2017", tmp_path, tmp_path / "c")
    assert code == 0 and "train: 3 records found, 3373 expected" in out
    code, out, err = command(check, tmp_path / "c")
    assert code == 0 and err == ""
    assert "twitter2017 train mner: 3 records, 4 gold items, 3 images (3 missing)" in out
    assert "twitter2017 test in twitter2017 train: 1 of 1 texts" in out
    code, out, err = command(check, tmp_path / "c", "--require-images")
    assert code == 2 and out != ""
    assert err.startswith("error: 4 problem(s)") and "train.jsonl:1: image" in err


def test_check_counts_what_evaluation_counts_and_names_what_is_not_there(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No relation is no gold item; heads that overlap tails, as in MNRE, are counted, no error."""
    pairs = [MRE, MRE | {"id": "2", "relation": "couple"}, MRE | {"id": "3", "tail": [0, 2]}]
    corpus = write_corpus(tmp_path, {"pairs": pairs, "tweets": [MNER], "news": [MEAE]})
    write_corpus(tmp_path, {"tweets": [MNER]}, "dev")
    check.check(corpus, require_images=False)
    out = capsys.readouterr().out
    [line] = re.findall("pairs train mre: 3 records, 1 gold items, .*", out)
    assert line.endswith(", 1 with a head and a tail that overlap")
    assert "tweets train mner: 1 records, 1 gold items" in out and out.count("overlap") == 1
    assert {line for line in out.split("\n") if "no " in line} == {
        "news: no dev.jsonl", "news: no test.jsonl", "pairs: no dev.jsonl", "pairs: no test.jsonl",
        "tweets: no test.jsonl"}


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
    check.check(corpus, require_images=False)
    lines = ["tweets test in tweets train: 2 of 3 texts", *(
        f"  {tmp_path}/tweets/test.jsonl:{n} = {tmp_path}/tweets/train.jsonl:{n}" for n in (1, 2))]
    assert capsys.readouterr().out.split("\n")[-4:] == [*lines, ""]
    write_corpus(tmp_path, {"pairs": [MRE | {"tokens": ["Hello", "world"]}]})
    check.check(corpus, require_images=False)
    assert capsys.readouterr().out.split("\n")[-6:-1] == [
        "tweets test in pairs train: 1 of 3 texts",
        f"  {tmp_path}/tweets/test.jsonl:1 = {tmp_path}/pairs/train.jsonl:1", *lines]


def test_of_shared_texts_twenty_are_shown_and_all_are_counted() -> None:
    texts = {f"t{i}": f"x:{i}" for i in range(23)}
    first, *shown, last = check.shared_texts({("a", "test"): texts, ("a", "train"): texts})
    assert first == "a test in a train: 23 of 23 texts" and last == "  and 3 more"
    assert shown == [f"  x:{i} = x:{i}" for i in range(20)]


def test_with_a_tokenizer_check_says_what_training_will_say(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Texts that are cut, characters that are unknown, and how far perfect answers get."""
    tweets = [changed(MNER, "id", str(i)) | {"tokens": tokens, "entities": [
        {"type": "person", "start": len(tokens) - 1, "end": len(tokens)}]}
              for i, tokens in enumerate((["hi", "Bob"], ["Bob", "met", "Bob"], ["hi", "B{}b"],
                                          ["so"] * 300 + ["Bob"]))]
    corpus = write_corpus(tmp_path, {"tweets": tweets, "news": [MEAE], "pairs": [MRE]}, "dev")
    check.check(corpus, require_images=False)
    assert "were not counted: give a T5 by --t5 DIR\n" in capsys.readouterr().out
    tokenizer = ROOT / "tests" / "golden" / "tokenizer"
    assert code_of(check, corpus, "--t5", tokenizer) == 0
    out = capsys.readouterr().out
    assert "truncation: 1 of 4 texts cut to 256 ids; targets lost 1 items with the text" in out
    assert "in tweets dev 1 of 4 texts and 1 targets\n" in out
    assert ("tweets dev: F1 of perfect answers, up to 40 ids each: T17 57.14\n"
            in out)  # 2 right of 3 said, 4 gold
    assert "news dev: F1 of perfect answers, up to 40 ids each: MEAE 80.00" in out  # a box unshown
    assert "--t5" not in out
    assert code_of(check, corpus, "--t5", tmp_path) == 2
    assert "spiece.model: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("lengths, says", [
    ((), "beyond 40 ids (raised by train.py --max-target)"), (("--max-target", 9), "beyond 9 ids"),
    (("--size", "base"), None), (("--max-source", 70), "texts cut to 70 ids")])
def test_the_ceiling_is_that_of_a_training_with_the_same_lengths(
        lengths: tuple, says: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By default of size tiny, as train.py; what 40 ids cannot hold no perfect answer has."""
    row = MNER | {"tokens": ["Bob"] * 21,
                  "entities": [{"type": "person", "start": i, "end": i + 1} for i in range(21)]}
    corpus = write_corpus(tmp_path, {"tweets": [row], "pairs": [MRE], "news": [MEAE]})
    t5 = ROOT / "tests" / "golden" / "tokenizer"
    assert code_of(check, corpus, "--t5", t5, *lengths) == 0
    out = capsys.readouterr().out
    assert says in out if says else "truncation" not in out
    assert ("T17 100.00" in out) == (says is None)
    assert code_of(check, corpus, "--max-target", 1) == 2
    assert "expected --max-target at least 2, got 1" in capsys.readouterr().err


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
            convert.convert("snap", tmp_path / "source", folder)


def test_the_commands_take_the_settings_of_events(tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    for name, text in swig_files({"attacking_1.jpg": SWIG}).items():
        (tmp_path / name).write_text(text)
    assert code_of(convert, "swig", tmp_path, tmp_path / "c", "--max-objects", 4,
                   "--event-types", "all") == 0
    out = capsys.readouterr().out
    assert "SWiG with event types all: pictures without text, 4 objects each" in out
    assert code_of(check, tmp_path / "c") == 0
    assert "no text stands in two splits" in capsys.readouterr().out


def test_a_faulty_corpus_and_a_wrong_call_end_with_2(tmp_path: Path) -> None:
    """The command as it is typed: exit code 2 and no traceback."""
    write_corpus(tmp_path, {"tweets": [changed(MNER, "entities.0.end", 9)]})
    done = typed("-m", "tools.check", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.jsonl:1: entities[0].end: 9 is no span" in done.stderr
    assert code_of(convert, "twitter2018", ".", ".") == code_of(check, ".", "--require-image") == 2


def typed(*words: object) -> subprocess.CompletedProcess:
    """Python with these words, as somebody types them."""
    return run([sys.executable, *map(str, words)])


@pytest.mark.parametrize("tool", ["convert", "check"])
def test_the_old_spelling_of_a_command_is_answered_with_the_new_one(tool: str) -> None:
    done = typed("data.py", tool, "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: data.py {tool} is now python -m tools.{tool}; see "
                           f"`python -m tools.{tool} --help`\n")


# ---------------------------------------------------------------------------- published files

real = pytest.mark.skipif(not REAL, reason="CLORAE_REALDATA names no folder of published files")
T15 = {"train": (4000, 6352, (2285, 2135, 957, 975), 104, 37),
       "dev": (1000, 1594, (567, 543, 251, 233), 31, 41),
       "test": (3257, 5207, (1873, 1720, 860, 754), 89, 36)}
T17 = {"train": (3373, 6049, (2943, 731, 1674, 701), 392, 50),
       "dev": (723, 1324, (626, 173, 375, 150), 76, 33),
       "test": (723, 1351, (621, 178, 395, 157), 86, 33)}


def published_records(root: Path, unit: str, split: str) -> list[Record]:
    try:
        return load_corpus(root, split, [unit])
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
    datasets = load_datasets(published)
    for split in SPLITS:
        for record in load_corpus(published, split):
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
    assert ceiling(records, load_datasets(published)[records[0].dataset]) == expected


@real
@pytest.mark.parametrize("known, expected", [(True, 98.4), (False, 97.7)])
def test_the_ceiling_of_text_arguments(published: Path, known: bool, expected: float) -> None:
    """The 307 arguments of 192 sentences, with the nearest-to-trigger rule and without trigger."""
    sentences = {r.id.split("+")[0]: r for r in published_records(published, "MEAE", "test")}
    dataset, found, total = load_datasets(published)["m2e2_gold"], 0, 0
    for record in sentences.values():
        [one] = record.events
        triggers = {one["type"]: [one["trigger"][0]]} if known else None
        back, _ = data.predicted_items(record, data.target(record), dataset, triggers)
        gold = Counter(item for item in data.gold_items(record) if item.span)
        found += (gold & Counter(back)).total()
        total += gold.total()
    assert (total, round(100 * found / total, 1)) == (307, expected)


@real
def test_duplicates_and_lengths_are_reported(
        published: Path, capsys: pytest.CaptureFixture) -> None:
    """Near-duplicate tweets between the splits of one corpus; lengths in words.  Of the published
    files any may be missing: a line is expected where both of its splits are there."""
    check.check(published, require_images=False)
    out = capsys.readouterr().out
    splits = set(re.findall(r"^(\w+ \w+) \w+: \d+ records", out, re.MULTILINE))
    of = {"twitter2015 dev": 1000, "twitter2015 test": 3254, "twitter2017 dev": 723,
          "mnre_v1 dev": 499, "mnre_v2 dev": 930, "mnre_v2 test": 914}  # different texts
    shared = {
        ("twitter2015 dev", "twitter2015 train"): 3, ("twitter2015 test", "twitter2015 train"): 5,
        ("twitter2015 test", "twitter2015 dev"): 3, ("twitter2017 dev", "twitter2017 train"): 1,
        ("mnre_v1 dev", "twitter2015 train"): 111, ("mnre_v1 dev", "twitter2017 train"): 107,
        ("twitter2015 test", "mnre_v1 dev"): 49, ("twitter2015 test", "mnre_v1 train"): 424,
        ("mnre_v2 dev", "mnre_v1 train"): 1, ("mnre_v2 test", "mnre_v1 train"): 3,
        ("mnre_v2 dev", "mnre_v2 train"): 6, ("mnre_v2 test", "mnre_v2 train"): 2,
        ("mnre_v2 test", "mnre_v2 dev"): 1}
    lines = {f"{a} in {b}: {n} of {of[a]} texts" for (a, b), n in shared.items()
             if {a, b} <= splits}
    printed = set(re.findall(r"^.* in .* texts$", out, re.MULTILINE))
    assert lines <= printed
    assert {line for line in printed if re.search("m2e2|mnre_v2", line)} <= lines
    for split, words in (("m2e2_gold test meae", 79), ("twitter2015 train mner", 27)):
        dataset = split.rpartition(" ")[0]
        assert dataset not in splits or re.search(f"{split}: .*longest target {words} words", out)


@real
@pytest.mark.parametrize("count, share", [(3, 36.6), (8, 56.0), (16, 63.3), (24, 65.0), (36, 66.1)])
def test_the_ceiling_of_detections(count: int, share: float, tmp_path: Path) -> None:
    """Of the 741 gold boxes on 203 pictures, the share that `count` detections show."""
    source = linked_m2e2(tmp_path)
    rows = convert.read_m2e2(source / "crossmedia_coref.txt", "m2e2")
    found = convert.detections(source / convert.DETECTIONS)
    shown, boxes = convert.reachable(rows, found, count)
    assert (boxes, round(100 * shown / boxes, 1)) == (741, share)
    assert len({row["image"] for _, row in rows if not found[row["image"]]}) == 5


@real
def test_the_events_of_38_sentences_are_accepted(tmp_path: Path) -> None:
    """In both text files with different events, 61 of the 309 pairs."""
    (tmp_path / "source").mkdir()
    convert.convert("m2e2", linked_m2e2(tmp_path / "source"), tmp_path / "corpus")
    records = load_corpus(tmp_path / "corpus", "test", ["MED", "MEAE"])
    some = [record for record in records if record.accepted]
    assert len(some) == 2 * 61 and len({r.id.split("+")[0] for r in some}) == 38
    sentences = {r.id.split("+")[0]: len(r.accepted) for r in some}
    assert sum(sentences.values()) == 45
    triggers = [(r, {(e["type"], e["trigger"]) for e in r.events}) for r in some]
    assert not any((e["type"], e["trigger"]) in gold for r, gold in triggers for e in r.accepted)
    assert "they show 469 of 741 gold boxes" in load_datasets(tmp_path / "corpus")["m2e2"].note


@real
def test_the_published_role_mapping(tmp_path: Path) -> None:
    """227 rows, 67 verbs by type; no row yields Police or Money."""
    path = published_path("ace_sr_mapping.txt")
    verbs = convert.read_mapping(path)
    assert len(verbs) == 67 and sum(len(roles) for _, roles in verbs.values()) == 227
    assert Counter(kind for kind, _ in verbs.values()) == {
        "attack": 18, "transport": 20, "arrest jail": 8, "meet": 7, "demonstrate": 5,
        "phone write": 4, "die": 3, "transfer money": 2}
    rows = [(kind, role) for kind, roles in verbs.values() for role in roles.values()]
    assert not {"police", "money"} & {role for _, role in rows}
    assert Counter(row for row in rows if row[1] not in convert.M2E2[row[0]]) == {
        ("transport", "place"): 20, ("transfer money", "place"): 2,
        ("transfer money", "instrument"): 1}
    assert verbs["carrying"][1]["item"] == "artifact" and verbs["steering"][1]["agent"] == "agent"
    (tmp_path / "crlf.txt").write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert convert.read_mapping(tmp_path / "crlf.txt") == verbs
