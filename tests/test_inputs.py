"""What is promised about input (tests/hostile.py makes it), in forms that take seconds.

The long forms are part of `python tests/reliability.py`.
"""

import json
from pathlib import Path

import pytest

import evaluate
import hostile
import tools.check
import train
from engine.checkpoints import Sources
from engine.files import UsageError, WeightsError
from engine.schema import DataError, nearest
from engine.settings import Config
from evaluate import build


def test_a_mutated_row_is_refused_with_file_line_and_field_and_its_neighbours_are_read() -> None:
    """R11: 1,500 rows of 40 kinds of mutations, judged by a second reading of the format."""
    print(hostile.r11(1500))


def test_a_mistake_of_each_kind_is_counted_and_ends_the_command_with_2(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Twenty problems are shown, all are counted, and nothing of Python is seen."""
    rng, lines = hostile.random.Random(1), []
    for mutate in hostile.MUTATIONS.values():
        mutants = (mutate(rng, row) for row in hostile.ROWS * 20 if row["dataset"] == "news")
        lines += [next(m for m in mutants if m is not None and not hostile.valid(m, "news"))]
    folder = tmp_path / "news"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(hostile.DATASETS["news"]))
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(SystemExit) as end:
        tools.check.main([str(tmp_path)])
    assert end.value.code == 2
    first, *shown = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and first.endswith("in the data, the first 20:")
    assert int(first.split()[1]) >= len(lines) > 20 == len(shown)
    assert all(line.startswith(f"  {folder}/train.jsonl:") for line in shown)


def test_a_typing_mistake_is_answered_with_the_likely_intention(tmp_path: Path) -> None:
    """Letters exchanged, lost, doubled or capitalised; and one mistake is one problem."""
    rng = hostile.random.Random(2)
    for word in ("tokens", "image", "objects", "entities", "person", "held on", "attacker"):
        known = {"id", "dataset", "task", "size", "relation", "couple", "none", "place", word}
        for _ in range(30):
            assert nearest(hostile.typo(rng, word), known) == f'did you mean "{word}"?'
    for path in (("events", 0, "type"), ("image",)):
        row = hostile.put(hostile.ROWS[4], path, ...)
        row = hostile.put(row, (*path[:-1], "wrong"), "x")
        assert len(hostile.read(tmp_path, "news", [hostile.line(row)])[1]) == 2  # unknown, missing
    row = hostile.put(hostile.ROWS[4], ("events", 0, "type"), "attak")
    [problem] = hostile.read(tmp_path, "news", [hostile.line(row)])[1]
    assert 'events[0].type: "attak" is unknown: did you mean "attack"?' in problem


def test_hostile_files_are_refused_quickly_in_little_memory() -> None:
    """R12: more than 60 files, by load_image and by the feature cache."""
    print(hostile.r12())


def test_missing_images_are_refused_or_masked_and_counted() -> None:
    """Never substituted; where it is asked for, counted with the metrics."""
    print(hostile.r13())


def test_no_name_leads_out_of_the_folder_of_images() -> None:
    """R14: traversal, absolute and their like, with file and line; links as their keeper set them,
    and only to pictures."""
    print(hostile.r14())


def test_a_pickle_is_never_read() -> None:
    """R15: a canary that unpickling would leave behind; the message says to convert."""
    print(hostile.r15())


def test_damaged_weights_are_refused_or_right() -> None:
    """R16: headers, tensors, settings, shards and tokenizers; the long form has 2,000 headers."""
    print(hostile.r16(200))


def test_an_unusable_image_is_named_with_its_record_and_all_are_listed(tmp_path: Path) -> None:
    """A crawl leaves dozens behind; nobody wants to meet them one by one."""
    names = ["a.jpg", "text.jpg", "b.jpg", "half.jpg"]
    corpus = hostile.make_corpus(tmp_path, names)
    images = corpus / "tweets" / "images"
    (images / "text.jpg").write_text("<html>404</html>")
    (images / "half.jpg").write_bytes((images / "a.jpg").read_bytes()[:700])
    said = hostile.complaint(lambda: hostile.features(corpus, "mask"), DataError)
    first, *lines = said.split("\n  ")
    assert first == "2 problem(s) in the data:"
    for line, number, name in zip(lines, (2, 4), ("text.jpg", "half.jpg"), strict=True):
        assert line.startswith(f"{corpus}/tweets/train.jsonl:{number}: image: {images}/{name}: exp")
    assert "begins like none of them; replace the file" in lines[0]


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], ["nowhere: expected folders with a dataset.json", "found no folder"]),
    (["--t5", "empty", "--vit", "empty"], ["--t5: empty: expected a whole model folder",
                                           "--vit: empty:", "config.json, spiece.model; fetch"])])
def test_a_wrong_folder_is_named_before_anything_slow(
        arguments: list[str], words: list[str], small: dict[str, str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """train.main ends with the product's own errors only; the command prints them, exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    files = {name: folder for name, folder in small.items() if f"--{name}" not in arguments}
    rest = [word for name, folder in files.items() for word in (f"--{name}", folder)]
    said = hostile.complaint(lambda: train.main([*arguments, *rest, "--out", "out"]),
                             DataError, WeightsError, UsageError)
    assert all(word in said for word in words), said


def test_a_tokenizer_of_another_checkpoint_is_refused(small: dict[str, str],
                                                      tmp_path: Path) -> None:
    """Its ids would lie outside the embedding."""
    hostile.T5(hostile.SMALL_T5).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes((Path(small["t5"]) / "spiece.model").read_bytes())
    config = Config(data=small["data"], t5=str(tmp_path), vit=small["vit"]).resolved()
    sources = Sources(Path(small["data"]), tmp_path, Path(small["vit"]))
    said = hostile.complaint(lambda: build(config, sources, hostile.torch.device("cpu")),
                             WeightsError)
    assert "pieces for a T5 of 29 ids, got 300 pieces; use the files of one checkpoint" in said


def test_evaluate_refuses_a_pickled_checkpoint_by_name(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command itself: exit code 2, one line, what to do."""
    (tmp_path / "best.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "best.pt")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and "converted to safetensors" in said
