"""What demo.py promises: a world in which pictures, names, tasks and sizes matter."""

import collections
import dataclasses
import filecmp
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import data
import demo
from engine.corpus import load_corpus, load_datasets
from engine.files import file_hash
from engine.images import load_image
from engine.schema import UNITS, Record
from engine.weights import SHIPPED
from t5 import T5
from vision import ViT, preprocess

SCALE = 0.15


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world of a seventh of the size."""
    folder = tmp_path_factory.mktemp("demo") / "world"
    demo.make_world(folder, seed=0, scale=SCALE)
    return folder


@pytest.fixture(scope="module")
def records(world: Path) -> dict[str, list[Record]]:
    return {split: load_corpus(world, split) for split in demo.SPLITS}


@pytest.fixture(scope="module")
def texts(world: Path, records: dict) -> list[str]:
    """The training inputs, from which the tiny backbone is made."""
    datasets = load_datasets(world)
    return ["".join(data.prompt(r, datasets[r.dataset])) for r in records["train"]]


def labels_of(world: Path) -> set[str]:
    """Every word of every label of the world."""
    found = str([d.labels for d in load_datasets(world).values()])
    return set(re.findall(r"\w+", found)) - {"mner", "mre", "med", "meae"}


def is_name(word: str) -> bool:
    return word[0].isupper()


def masked(record: Record) -> str:
    """The task and the text with every name hidden: all a reader can go by without a picture."""
    return f"{record.task} " + " ".join("*" if is_name(w) else w for w in record.tokens)


def answers(record: Record) -> list[str]:
    """The labels a record asks for, in the order of its target."""
    if record.task == "mner":
        return [e["type"] for e in record.entities]
    if record.task == "mre":
        return [record.relation]
    return [e["type"] for e in record.events] or ["none"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo.make_world(tmp_path / name, seed=seed, scale=0.02)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 100
    _, different, broken = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert not different and not broken
    lines = [(tmp_path / name / "demo_t15" / "train.jsonl").read_text() for name in "ac"]
    assert lines[0] != lines[1]


def test_every_unit_is_there_and_every_record_is_valid(world: Path, records: dict) -> None:
    """load_corpus raises on any record that breaks the rules of engine/schema.py."""
    datasets = load_datasets(world)
    for split in demo.SPLITS:
        units = {datasets[r.dataset].units[r.task] for r in records[split]}
        assert units == set(UNITS), split


def test_sizes_are_unbalanced(records: dict) -> None:
    """Training sizes differ by a factor of three, so that the weights of Eq. (9) have work."""
    assert max(demo.SIZES.values()) >= 3 * min(demo.SIZES.values())
    counts = collections.Counter((r.dataset, r.task) for r in records["train"])
    assert max(counts.values()) > 2.5 * min(counts.values())


def test_med_and_meae_are_records_of_the_same_pairs(records: dict) -> None:
    by_task = {task: [r for r in records["test"] if r.task == task] for task in ("med", "meae")}
    assert len(by_task["med"]) == len(by_task["meae"]) > 0
    for med, meae in zip(by_task["med"], by_task["meae"]):
        assert med.id.removesuffix("/med") == meae.id.removesuffix("/meae")
        assert (med.tokens, med.image, med.events) == (meae.tokens, meae.image, meae.events)


def test_test_names_are_unseen_in_training(records: dict) -> None:
    names = {split: {w for r in records[split] for w in r.tokens if is_name(w)}
             for split in demo.SPLITS}
    assert min(len(found) for found in names.values()) > 50
    assert not names["train"] & names["test"] and not names["train"] & names["dev"]


def test_some_records_have_nothing_to_find(records: dict) -> None:
    nothing = collections.Counter(r.task for r in records["train"] if data.target(r) == "none")
    assert nothing["mner"] > 5 and nothing["med"] > 5
    assert sum(r.task == "mre" and r.relation == "none" for r in records["train"]) > 20


def test_the_same_text_has_different_answers_under_different_pictures(records: dict) -> None:
    by_text = collections.defaultdict(set)
    for record in records["train"]:
        by_text[masked(record)].add(tuple(answers(record)))
    for task in ("mner", "mre", "med"):
        undecided = [t for t, found in by_text.items() if t.startswith(task) and len(found) >= 3]
        assert len(undecided) >= 3, task


def test_no_reader_of_the_text_alone_can_score_well(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that knows each masked text's most frequent answer gets at most 70 % of the labels.

    It is given the very records it is scored on, so that any real reader does worse.
    """
    monkeypatch.setattr(demo.Image.Image, "save", lambda *_, **__: None)  # nobody looks at them
    demo.make_world(tmp_path, seed=1, scale=1.0)
    right, total = collections.Counter(), collections.Counter()
    groups = collections.defaultdict(collections.Counter)
    for record in load_corpus(tmp_path, "train"):
        for k, answer in enumerate(answers(record)):
            # Phrase by phrase: whole texts are too many to count, and phrases are independent.
            phrase = masked(record).partition(" ")[2].split(" and ")
            here = phrase[k] if record.task == "mner" and len(phrase) > k else " and ".join(phrase)
            groups[record.task, record.dataset, here][answer] += 1
    for (task, _, _), found in groups.items():
        right[task] += max(found.values())
        total[task] += sum(found.values())
    for task in ("mre", "med"):
        assert right[task] / total[task] < 0.62, task
    assert right["mner"] / total["mner"] < 0.75


def test_roles_of_objects_are_decided_by_what_is_drawn(records: dict, world: Path) -> None:
    """A box of one role shows the role's colour and shape; its number says nothing."""
    numbers, shades = collections.Counter(), collections.defaultdict(list)
    for record in records["train"]:
        for event in record.events if record.task == "meae" else ():
            for argument in event["arguments"]:
                if "box" not in argument:
                    continue
                numbers[argument["object"]] += 1
                assert list(argument["box"]) == list(record.objects[argument["object"] - 1])
                if event["type"] == "attack":
                    image = load_image(world / record.dataset / "images" / record.image)
                    x1, y1, x2, y2 = argument["box"]
                    middle = (x1 + x2) // 2, (y1 + y2) // 2
                    shades[argument["role"]].append(image.getpixel(middle))
    assert all(numbers[k] > 15 for k in (1, 2, 3))
    assert all(red > blue for red, _, blue in shades["attacker"])
    assert all(blue > red for red, _, blue in shades["target"])


def test_objects_without_a_role_distract(records: dict) -> None:
    boxes = roles = 0
    for record in records["train"]:
        if record.task == "meae" and record.events:
            boxes += len(record.objects)
            roles += sum("box" in a for a in record.events[0]["arguments"])
    assert roles < 0.7 * boxes and boxes > 100


def test_tasks_disagree_about_the_same_cue() -> None:
    """One drawing or word means different things to different tasks: experts have work to do."""
    for glyph in ("house", "flag"):
        said = [label for meaning in (demo.TYPES, demo.MET, demo.CUES)
                for label, sign in meaning.items() if sign == glyph]
        assert len(said) == len(set(said)) == 3
    mre_words = {w for phrases in demo.PAIR_CLEAR.values() for p in phrases for w in p.split()}
    mee_words = {w for verbs in demo.TRIGGERS.values() for w in verbs} | set(demo.VAGUE_TRIGGERS)
    assert {"met", "joined", "faced"} <= mre_words & mee_words
    for event, differs in (("attack", True), ("meet", False)):
        red, blue = (demo.object_role(event, "figure", colour) for colour in ("red", "blue"))
        assert (red != blue) == differs


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, world: Path, texts: list[str]) -> Path:
    """A backbone made in seconds, good for nothing but its layout."""
    folder = tmp_path_factory.mktemp("weights")
    tiny = dataclasses.replace(demo.Tiny(), width=32, layers=1, inner=32, steps=12, batch=8,
                               vit_steps=4, vit_batch=8, vit_width=16)
    demo.make_backbone(folder, texts, seed=0, tiny=tiny, avoid=labels_of(world))
    return folder


def test_prompts_fit_in_48_pieces(backbone: Path, world: Path, records: dict) -> None:
    tokenizer, datasets = data.Tokenizer(backbone / "t5"), load_datasets(world)
    lengths = [len(tokenizer.encode("".join(data.prompt(r, datasets[r.dataset]))))
               for split in records for r in records[split]]
    assert max(lengths) <= 48


def test_the_tokenizer_has_t5s_special_ids_and_spells_any_answer(backbone: Path,
                                                               records: dict) -> None:
    tokenizer = data.Tokenizer(backbone / "t5")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.pieces.unk_id()) == (0, 1, 2)
    assert tokenizer.pieces.bos_id() == -1
    for record in records["test"]:
        assert tokenizer.decode(tokenizer.encode(data.target(record))) == data.target(record)


def test_the_backbone_loads_as_any_other(backbone: Path) -> None:
    model, tokenizer = T5.from_pretrained(backbone / "t5").eval(), data.Tokenizer(backbone / "t5")
    ids = torch.tensor([tokenizer.encode("Copy. Text: good morning")])
    assert model.config.vocab_size == tokenizer.vocab_size + 100
    assert model.generate(ids, ids != 0, max_new_tokens=3).shape[0] == 1
    vit = ViT.from_pretrained(backbone / "vit")
    image, _ = demo.draw_scene([("house", "red")], random.Random(0))
    assert vit(preprocess(image, vit.size)[None]).shape == (1, 17, 16)


def test_the_same_seed_makes_the_same_backbone(tmp_path: Path, texts: list[str]) -> None:
    tiny = dataclasses.replace(demo.Tiny(), pieces=400, width=32, layers=1, inner=32, steps=3,
                               batch=4, vit_steps=2, vit_batch=4, vit_width=16)
    for name in "ab":
        demo.make_backbone(tmp_path / name, texts, seed=5, tiny=tiny)
    for file in ("t5/model.safetensors", "t5/spiece.model", "vit/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_no_lesson_answers_with_a_label(backbone: Path, world: Path, texts: list[str]) -> None:
    """Labels are read in prompts, and restored where span corruption hid them, but never a key."""
    labels = labels_of(world) - {"none"}
    lessons = demo.Lessons(texts, labels_of(world), data.Tokenizer(backbone / "t5"),
                           random.Random(0))
    lessons.level = 1.0
    for make in set(lessons.lessons) - {lessons.corrupt}:
        for _ in range(150):
            _, answer = make()
            assert not labels & set(re.findall(r"\w+", answer)), (make.__name__, answer)


def test_lessons_are_solved_by_their_own_input(backbone: Path, texts: list[str]) -> None:
    """Every word of an answer, but for O1, O2, ... and none, stands in the question."""
    lessons = demo.Lessons(texts, set(), data.Tokenizer(backbone / "t5"), random.Random(1))
    lessons.level = 1.0
    for make in set(lessons.lessons) - {lessons.corrupt}:
        for _ in range(50):
            question, answer = make()
            known = set(re.findall(r"\w+", question)) | {"spot", "asoc", "none"}
            extra = [w for w in re.findall(r"\w+", answer) if w not in known]
            assert all(re.fullmatch("O[0-9]", w) for w in extra), (question, answer)


def test_span_corruption_loses_nothing(backbone: Path) -> None:
    """Input and target together give the text back: sentinels name what was taken from where."""
    text = " ".join(f"w{k}" for k in range(60))
    lessons = demo.Lessons([text], set(), data.Tokenizer(backbone / "t5"), random.Random(2))
    for _ in range(20):
        source, target = lessons.corrupt()
        hidden = re.split(r"<extra_id_\d+>", target)[1:]
        for k, span in enumerate(hidden[:-1]):
            source = source.replace(f"<extra_id_{k}>", span.strip())
        assert source == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture) -> None:
    """Exit code 2, one line, no traceback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/file") and "cannot be written (Not a dir" in told


def test_the_backbone_that_comes_along_is_the_one_that_its_manifest_describes() -> None:
    """Nobody has touched a file since the command made them, and all fit a small repository."""
    told = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    files = {path.relative_to(SHIPPED).as_posix(): path for path in SHIPPED.glob("*/*")}
    assert told["sha256"] == {name: file_hash(path) for name, path in files.items()}
    assert told["command"].startswith("python demo.py --backbone") and "--seed 0" in told["command"]
    assert "dirty" not in told["commit"]
    assert sum(path.stat().st_size for path in files.values()) < 4e6
    assert T5.from_pretrained(SHIPPED / "t5").config.vocab_size == data.Tokenizer(
        SHIPPED / "t5").vocab_size + 100


def test_the_command_makes_a_backbone_in_half_precision_beside_its_manifest(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of it; what is trained on is as exact as the files, so both tell the same."""
    monkeypatch.setattr("sys.argv", ["demo.py", "--backbone", str(tmp_path / "b"), "--steps", "2",
                                     "--scale", "0.02", "--conflict", "full"])
    demo.main()
    told = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    assert told["command"] == ("python demo.py --backbone b --seed 0 --steps 2 --scale 0.02 "
                               "--conflict full")
    assert set(told["sha256"]) == {"t5/config.json", "t5/model.safetensors", "t5/spiece.model",
                                   "vit/config.json", "vit/model.safetensors",
                                   "vit/preprocessor_config.json"}
    for name, digest in told["sha256"].items():
        assert file_hash(tmp_path / "b" / name) == digest
    with safe_open(tmp_path / "b" / "t5" / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}
    ViT.from_pretrained(tmp_path / "b" / "vit")
