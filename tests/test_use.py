"""Using the commands: their help, examples answered in words, JSON and pictures, pictures of a run.

The model is random and told what to write, where a test looks at what is made of an answer.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import clorae
import data
import demo
import evaluate
import train
from conftest import ROOT, run
from data import Item
from engine.checkpoints import read_state, write_state
from engine.command import Parser
from engine.corpus import load_corpus, load_datasets
from engine.schema import DataError, Dataset, Record
from engine.processes import World
from engine.settings import Config
from evaluate import Answer, Counts, Row
from fast.experts import FastExpertLinear
from t5 import T5
from tools import answer, check, convert, costs, export, plot, replay, routing
from tools.answer import coloured, example_records
from tools.figures import DPI, write_figure
from tools.page import PAGE, Strip, answer_lines, example_figure, places, token_strips
from tools.plot import plot_curves, running_mean
from tools.routing import no_gate_reason
from vision import UMIE

CPU = torch.device("cpu")
WIDTH = round(PAGE * DPI)  # of a page, in pixels


# ------------------------------------------------------------------------------------------- help

class Seen(Exception):
    """Carries a parser out of the command that built it."""


TOOLS = (answer, check, convert, costs, export, plot, replay, routing)
COMMANDS = {"train.py": lambda: train.main([]), "evaluate.py": lambda: evaluate.main([]),
            "demo.py": demo.main, **{tool.__name__: lambda tool=tool: tool.main([])
                                     for tool in TOOLS}}


def options(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Parser, str, object]]:
    """(parser, title of the group, action) of all that a command and its subcommands accept."""
    def caught(self: Parser, argv: object = None) -> None:
        raise Seen(self)

    monkeypatch.setattr(Parser, "parse_args", caught)
    with pytest.raises(Seen) as seen:
        COMMANDS[name]()
    parsers = [seen.value.args[0]]
    parsers += [inner for action in parsers[0]._actions if isinstance(action.choices, dict)
                for inner in action.choices.values() if isinstance(inner, Parser)]
    return [(parser, group.title, action) for parser in parsers
            for group in parser._action_groups for action in group._group_actions]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_every_option_in_a_group_with_its_default(name, monkeypatch):
    """argparse's own groups, "options" and "positional arguments", hold nothing but -h."""
    for parser, title, action in options(name, monkeypatch):
        if action.dest == "help":
            continue
        assert title not in ("options", "positional arguments"), action.dest
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, action.dest
        told = parser._get_formatter()._expand_help(action)
        if action.option_strings and not isinstance(action.default, (bool, tuple)):
            assert action.default is None or f"default: {action.default}" in told, told
        assert " ".join(told.split()) in " ".join(parser.format_help().split())


def test_train_has_its_options_in_the_order_of_a_decision(monkeypatch):
    titles = [title for _, title, _ in options("train.py", monkeypatch)]
    assert list(dict.fromkeys(titles)) == ["options", "what to train", "data", "model",
                                           "optimisation", "losses", "run"]


@pytest.mark.parametrize("main, words, near", [
    (train.main, ["--epoch", "1"], "--epochs"),
    (evaluate.main, ["run", "--beam", "2"], "--beams"),
    (check.main, ["x", "--require-image"], "--require-images"),
    (convert.main, ["swig", "x", "y", "--max-object=3"], "--max-objects"),
    (answer.main, ["run", "--text", "x", "--tasks", "mner"], "--task"),
    (plot.main, ["run", "--out", "x", "--layer", "0"], "--layers"),
    (lambda words: demo.main(), ["x", "--sed", "1"], "--seed")])
def test_an_unknown_flag_is_answered_with_the_nearest_one(main, words, near, monkeypatch, capsys):
    """In every command; nothing is abbreviated, exit status 2, one line."""
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    with pytest.raises(SystemExit) as exit:
        main(words)
    told = capsys.readouterr().err
    assert exit.value.code == 2 and f"did you mean {near}?" in told and told.count("\n") == 1


OLD = {  # what the commands of f1199df were called -> how they are called now
    "evaluate.py RUN --text x --task mner": "answer", "evaluate.py RUN --examples=x": "answer",
    "evaluate.py --costs": "costs", "evaluate.py --costs --size large": "costs",
    "evaluate.py RUN --routing DIR --layers 0": "routing",
    "evaluate.py RUN --aml-replay DIR": "replay", "evaluate.py RUN --export=DIR": "export",
    "evaluate.py RUN RUN2 --plot DIR --csv F": "plot", "evaluate.py --plot DIR RUN": "plot",
    "evaluate.py RUN --export DIR --task mner": "export",
    "data.py convert swig SRC DST": "convert", "data.py check DIR --require-images": "check"}


@pytest.mark.parametrize("line", OLD)
def test_an_old_spelling_is_answered_with_the_new_one_and_exit_code_2(line):
    """One line, before anything is loaded or looked for."""
    script, *words = line.split()
    done = run([sys.executable, str(ROOT / script), *words])
    assert done.returncode == 2 and not done.stdout
    assert f"is now python -m tools.{OLD[line]}; see" in done.stderr
    assert done.stderr.startswith(f"error: {script} ") and done.stderr.count("\n") == 1


def test_every_analysis_that_evaluate_had_is_answered_with_its_tool(capsys):
    """evaluate.MOVED names each, and each is a command."""
    assert set(evaluate.MOVED) == {"--text", "--examples", "--costs", "--routing", "--aml-replay",
                                   "--export", "--plot"}
    for flag, tool in evaluate.MOVED.items():
        with pytest.raises(SystemExit) as exit:
            evaluate.main(["RUN", flag])
        assert exit.value.code == 2 and f"tools.{tool} --help" in capsys.readouterr().err
        assert f"tools.{tool}" in COMMANDS


# ------------------------------------------------------------------------------------------ a run

@pytest.fixture(scope="module")
def finished(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the small world."""
    out = tmp_path_factory.mktemp("use") / "run"
    files = [word for name, folder in small.items() for word in (f"--{name}", folder)]
    train.main([*files, "--max-target", "24", "--rank", "6", "--batch", "12", "--steps", "2",
                "--epochs", "1", "--out", str(out)])
    torch.set_deterministic_debug_mode("default")
    return out


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_one_command_makes_every_picture_of_a_run(finished, tmp_path, capsys):
    """Curves, errors, routing and AML from what the run wrote; nothing is decoded again."""
    before = (finished / "scores-test.json").stat().st_mtime_ns
    plot.main([str(finished), "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["aml.csv", "aml.png", "curves-run.png", "errors.png",
                                            "routing.csv", "routing.png"]
    for path in tmp_path.iterdir():
        assert str(path) in told
        assert path.suffix == ".csv" or 500 <= min(size_of(path)) <= max(size_of(path)) <= 4000
    assert (finished / "scores-test.json").stat().st_mtime_ns == before


def test_of_several_runs_each_has_a_folder_for_its_own_pictures(finished, tmp_path, capsys):
    """Whatever they are called; what concerns all of them lies above.  Here one has no curves."""
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    best = next(finished.glob("best-*"))
    shutil.copytree(best, other / best.name)
    state = read_state(other / best.name)
    digests = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    state["config"]["seed"] = 1
    write_state(other / best.name, state, digests)
    plot.main([str(finished), str(other), "--out", str(tmp_path / "drawn")])
    told = capsys.readouterr().out
    made = {str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.*")}
    assert made == {"errors.png", "01-run/curves-run.png", *(f"{run}/{name}.{kind}" for run in (
        "01-run", "02-run") for name in ("aml", "routing") for kind in ("csv", "png"))}
    assert f"no curves: {other}: expected a run folder with a metrics.csv" in told


def test_layers_that_are_not_there_are_named(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        routing.main([str(finished), "--out", str(tmp_path), "--layers", "0", "7"])
    assert "--layers: expected numbers from 0 to 1, got 0 7" in capsys.readouterr().err


def test_the_curves_of_a_run_are_drawn_before_its_first_epoch_has_ended(finished, tmp_path):
    """And while the last row is being written."""
    (tmp_path / "metrics.csv").write_text((finished / "metrics.csv").read_text() + "3,1,0.")
    plot_curves(tmp_path, tmp_path / "curves.png")
    assert size_of(tmp_path / "curves.png") == (1800, 1200)


def test_a_running_mean_leaves_out_steps_without_rows():
    nan = float("nan")
    assert running_mean([1, nan, 3, 5], 2) == [1, 1, 3, 4]
    assert running_mean([nan, 2], 1)[1] == 2


# ---------------------------------------------------------------------------- examples as records

ROWS = [{"text": "Kim met Bo", "task": "mner"},
        {"text": "Kim met Bo", "task": "mre", "head": "Kim", "tail": "Bo"},
        {"text": "Kim met Bo", "task": "med", "image": "a.png"},
        {"text": "", "task": "meae", "image": "a.png", "objects": [[1, 2, 9, 9]]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """rows.jsonl and images/a.png, 20 x 10 pixels."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def records_of(small: dict[str, str], *words: object) -> list[Record]:
    """The records that a command line makes of its examples."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, "carry_out", lambda run, args: lines.append(args))
        answer.main(["run", *map(str, words)])
    return example_records(lines[0], load_datasets(small["data"]))


def test_rows_of_a_file_become_records_without_gold(small, folder):
    """What a row leaves out is filled in: dataset, size, no objects; words are looked up."""
    records = records_of(small, "--examples", folder / "rows.jsonl")
    assert [r.task for r in records] == ["mner", "mre", "med", "meae"]
    assert (records[1].head, records[1].tail) == ((0, 1), (2, 3))
    assert records[2].dataset == "demo_mee" and records[2].size == (20, 10)
    assert records[2].image == str(folder / "images" / "a.png")
    assert records[3].tokens == () and records[3].objects == ((1, 2, 9, 9),)
    assert [data.gold_items(r) for r in records] == [[], [Item("none")], [], []]
    assert records[0].source == f"{folder}/rows.jsonl:1"
    assert records == records_of(small, "--examples", folder)  # the only .jsonl of a folder


def test_one_example_is_described_by_flags(small, folder):
    """Boxes come as words and from files; the image may lie anywhere."""
    (folder / "boxes.json").write_text("[[0, 0, 5, 5]]")
    record, = records_of(small, "--text", "Kim", "--task", "meae", "--image",
                         folder / "images" / "a.png", "--objects", "1,2,9,9.5",
                         folder / "boxes.json")
    assert record.objects == ((1, 2, 9, 9.5), (0, 0, 5, 5))
    (folder / "link.png").symlink_to(folder / "images" / "a.png")
    record, = records_of(small, "--text", "Kim", "--task", "med", "--image", folder / "link.png")
    assert record.size == (20, 10)
    record, = records_of(small, "--text", "Kim met Bo", "--task", "mre", "--head", "Kim",
                         "--tail", "Bo", "--dataset", "demo_v2")
    assert (record.dataset, record.tail) == ("demo_v2", (2, 3))


TYPED = {
    "Lelin lives in Gegen.": "Lelin lives in Gegen .",
    "Lelin's home isn't Gegen": "Lelin 's home is n't Gegen",
    "Lelin loves #Gegen; @bo_1: (no)!": "Lelin loves # Gegen ; @bo_1 : ( no ) !",
    "See https://t.co/aB?c=1. RT @cnn: \u201cHi\u201d 'Bo'":
        "See https://t.co/aB?c=1 . RT @cnn : \u201c Hi \u201d ' Bo '",
    "The U.S. army, Dr. A. Lee vs. O'Brien at 9:30 p.m.":
        "The U.S. army , Dr. A. Lee vs. O'Brien at 9:30 p.m.",
    "3.5% of $1,000, pro-Russia A&M w/o... :-) Rome,Oslo":
        "3.5 % of $ 1,000 , pro-Russia A&M w/o ... :-) Rome , Oslo",
    "cafe\u0301\u2019s \u0939\u093f \U0001f468\u200d\U0001f469 \u2764\ufe0f\u2026":
        "cafe\u0301 \u2019s \u0939\u093f \U0001f468\u200d\U0001f469 \u2764\ufe0f \u2026",
    "Lelin lives in Gegen .": "Lelin lives in Gegen .", "": ""}


@pytest.mark.parametrize("text", TYPED)
def test_typed_text_is_split_as_tweets_are(text):
    """Nothing is lost, and what is split already stays so, but for @user, #word and the like."""
    assert answer.split_words(text) == TYPED[text].split()
    assert "".join(answer.split_words(text)) == "".join(text.split())
    assert answer.split_words(TYPED[text]) == TYPED[text].split()


@pytest.mark.parametrize("share, source", [
    (98.5, "twitter2017/train.txt"), (95, "mnre_v2/mnre_test.txt"), (60, "twitter2015/valid.txt")])
@pytest.mark.skipif("CLORAE_REALDATA" not in os.environ, reason="CLORAE_REALDATA names no folder "
                    "with the published files")
def test_published_texts_remain_as_they_are_split(share, source):
    """Twitter-15 differs by its #word."""
    path = Path(os.environ["CLORAE_REALDATA"]) / source
    read = convert.read_mnre if "mnre" in source else convert.read_conll
    texts = [row["tokens"] for _, row in read(path, path.parent.name)]
    same = [answer.split_words(" ".join(tokens)) == tokens for tokens in texts]
    assert 100 * sum(same) / len(same) > share


def test_head_and_tail_are_found_in_typed_text(small, folder):
    """Glued to a full stop, a possessive, a hash; tokens that a row gives are taken as they are."""
    rows = [{"text": "Lelin lives in Gegen."}, {"text": "Lelin's home is Gegen"},
            {"text": "Lelin loves #Gegen"}, {"text": "Lelin lives in Gegen ."},
            {"tokens": ["#Gegen", "Gegen", "Lelin"]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(
        row | {"head": "Lelin", "tail": "Gegen", "task": "mre"}) + "\n" for row in rows))
    records = records_of(small, "--examples", folder / "rows.jsonl")
    assert [r.tail for r in records] == [(3, 4), (4, 5), (3, 4), (3, 4), (1, 2)]
    assert records[1].tokens == ("Lelin", "'s", "home", "is", "Gegen")
    with pytest.raises(DataError, match="tail: expected words of the text, got 'Geg', which is not "
                       "in 'Gegen .'; give whole tokens as they stand there"):
        records_of(small, "--text", "Gegen.", "--task", "mre", "--head", "Gegen", "--tail", "Geg")


def test_a_folder_of_texts_and_images_pairs_them_by_name(small, folder):
    """An image without text is an example of its own, where the task allows it."""
    (folder / "rows.jsonl").unlink()
    (folder / "images" / "b.txt").write_text("Kim met\nBo ")
    (folder / "images" / "a.txt").write_text("Bo")
    records = records_of(small, "--examples", folder / "images", "--task", "med")
    assert [(r.id, r.tokens, r.size) for r in records] == [
        ("a", ("Bo",), (20, 10)), ("b", ("Kim", "met", "Bo"), None)]
    (folder / "images" / "a.txt").unlink()
    assert records_of(small, "--examples", folder / "images", "--task", "med")[0].tokens == ()
    with pytest.raises(DataError, match="a.png: tokens: .*only med and meae"):
        records_of(small, "--examples", folder / "images", "--task", "mner")
    (folder / "images" / "b.txt").rename(folder / "images" / "b.TXT")
    assert records_of(small, "--examples", folder / "images", "--task", "med")[1].tokens[0] == "Kim"
    (folder / "images" / "a.webp").touch()
    with pytest.raises(DataError, match="a.webp: expected one .txt and at most one image"):
        records_of(small, "--examples", folder / "images", "--task", "med")


@pytest.mark.parametrize("line, problem", [
    ("{", "row: not JSON in UTF-8"), ("[1]", "row: .* is no JSON object"),
    ('{"text": "Kim"}', "task: expected one of mner, .*, got None"),
    ('{"text": "Kim", "task": ["mner"]}', "task: expected one of mner, .*, got .*mner"),
    ('{"text": "Kim", "task": "mner", "dataset": "x"}', "'x'; use one of: demo_snap, demo_t15"),
    ('{"text": "Kim", "task": "mre", "head": "Bo", "tail": "Kim"}', "head: .*'Bo'.* not in 'Kim'"),
    ('{"text": "Kim", "task": "mre", "head": "Kim"}', 'key "tail" is missing'),
    ('{"tokens": 5, "task": "mre", "head": "Kim", "tail": "Bo"}', "head: .*not in ''"),
    ('{"text": "Kim", "task": "mner", "imge": null}', 'key "imge" is unknown: .*"image"'),
    ('{"text": "Kim", "task": "mner", "image": "b.png"}', "b.png: expected a whole .* picture"),
    ('{"text": "Kim", "task": "mner", "image": "../b.png"}', "expected a relative path"),
    ('{"text": "Kim", "task": "mner", "image": "a.png", "size": [1, 1]}', "size: .*not that of"),
    ('{"text": "Kim", "task": "med", "image": "a.png", "objects": [[0, 0, 30, 5]]}',
     r"objects\[0\]: .*0 <= x1 < x2 <= 20"),
    ('{"text": "Kim", "task": "mner", "id": "1"}', 'id: "1" is the id of .*rows.jsonl:1 too')])
def test_a_bad_row_is_named_by_file_and_line_and_none_is_skipped(small, folder, line, problem):
    """All of them at once, as in a corpus."""
    (folder / "rows.jsonl").write_text(f'{json.dumps(ROWS[0])}\n{line}\n{{"text": 3}}\n')
    with pytest.raises(DataError, match=f"(?s)2 problem.*rows.jsonl:2: .*{problem}") as error:
        records_of(small, "--examples", folder / "rows.jsonl")
    assert f"{folder}/rows.jsonl:3: " in str(error.value)


def test_an_image_that_is_not_there_may_be_masked_and_is_then_named(small, folder):
    (folder / "images" / "a.png").unlink()
    record = records_of(small, "--examples", folder, "--missing-images", "mask")[2]
    row = Row(record, "MED", Answer("none", missing=True), [], [], Counts())
    assert answer_lines(row) == [
        "nothing found", f"note: answered without {folder}/a.png, which is not there"]


# ------------------------------------------------------------------------------ the whole command

def test_the_records_of_a_corpus_get_the_answers_that_scoring_gives_them(finished, small, tmp_path):
    """--examples reads the unified schema, gold or not, and finds the images beside it."""
    wanted = {line["id"]: line["text"] for line in map(json.loads, (
        finished / "predictions-test.jsonl").read_text().splitlines()) if line["unit"] == "V1"}
    answer.main([str(finished), "--json", "--out", str(tmp_path / "a.jsonl"), "--examples",
                 str(Path(small["data"]) / "demo_v1" / "test.jsonl")])
    answers = list(map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()))
    assert {line["id"]: line["answer"] for line in answers} == wanted


def test_examples_are_answered_in_words_as_json_and_as_pictures(finished, folder, capsys):
    """One picture per row in --draw; --json leaves only JSON, --out moves it to a file."""
    answer.main([str(finished), "--examples", str(folder), "--draw", str(folder / "drawn")])
    told = capsys.readouterr().out
    assert told.startswith("Kim met Bo\n  ") and "\n  Kim -- none -- Bo\n" in told
    assert len(list(map(json.loads, re.findall("(?m)^{.*", told)))) == 4
    pictures = sorted((folder / "drawn").iterdir())
    assert [path.name for path in pictures] == [f"000{i}-{i}.png" for i in range(1, 5)]
    assert all(size_of(path)[0] == WIDTH for path in pictures)
    answer.main([str(finished), "--text", "Kim", "--task", "mner", "--json"])
    line = json.loads(capsys.readouterr().out)
    assert line["tokens"] == ["Kim"] and list(line["gates"]) == ["memory", "target"]
    assert all(0 < gate < 1 for gate in line["gates"].values())


@pytest.mark.parametrize("words, reason", [
    ([], "give either --text or --examples"),
    (["--text", "hi"], "--text needs --task"),
    (["--text", "hi", "--examples", "x", "--task", "mner"], "give either --text or --examples"),
    (["--examples", "x", "--head", "Bo"], "--head would do nothing without --text"),
    (["--text", "hi", "--task", "med", "--objects", "1,2,3,4"], "add --image"),
    (["--text", "hi", "--task", "mner", "--draw", "a.jpg"], "name a .png file"),
    (["--draw", "a.png"], "give either --text or --examples"),
    (["--examples", "x", "--draw", "README.md"], "name a folder for --examples"),
    (["--examples", "tests/golden", "--task", "mner"], "expected one .txt and at most one image"),
    (["--text", "hi", "--task", "med", "--image", "nowhere.png"], "nowhere.png: expected a whole"),
    (["--text", "hi", "--task", "mre"], "head: expected words of the text"),
    (["--examples", "nowhere.jsonl"], "nowhere.jsonl: cannot be read")])
def test_what_cannot_be_answered_is_refused_with_the_reason(finished, capsys, words, reason):
    """And no other flag is suggested for one that is known."""
    with pytest.raises(SystemExit) as exit:
        answer.main([str(finished), *words])
    told = capsys.readouterr().err
    assert exit.value.code == 2 and reason in told and "did you mean" not in told


# ---------------------------------------------------------------------------------- words, colours

MEE = Dataset("mee", {"meae": "MEAE", "med": "MED"}, {
    "med": ["attack", "meet"], "meae": {"attack": ["attacker", "target"], "meet": ["who"]}})
TOKENS = ("Kim", "Lee", "paid", "$5", "to", "Bo", "for", "$6", "today")
BOXES = ((0, 0, 10, 5), (0, 0, 9, 5), (1, 1, 19, 9))


def row_of(*items: Item, task: str = "meae", image: str | None = None,
           tokens: tuple[str, ...] = TOKENS, boxes: tuple = BOXES, **more: object) -> Row:
    record = Record("x", "mee", task, tokens, image, (20, 10) if image else None,
                    boxes if image else ())
    return Row(record, "MEAE", Answer("...", **more), [], list(items), Counts())


FOUND = (Item("attack", "attacker", (0, 2), text="Kim Lee"),
         Item("attack", "target", (5, 6), text="Bo"),
         Item("attack", "target", box=BOXES[0], text="O1", object=1),
         Item("attack", "target", box=BOXES[1], text="O2", object=2),
         Item("attack", "target", text="Al"), Item("attack", "target", text="O7", object=7))


def test_an_answer_is_told_in_a_line_per_item():
    """With its place, or with the reason why it has none."""
    assert answer_lines(row_of(*FOUND, cut=True)) == [
        "attack, attacker: Kim Lee", "attack, target: Bo", "attack, target: O1 [0, 0, 10, 5]",
        "attack, target: O2 [0, 0, 9, 5]", "attack, target: Al (not in the text)",
        "attack, target: O7 (no such object)", "note: cut at the length limit"]
    whole = Item("meet", whole_image=True, text="O0", object=0)
    assert answer_lines(row_of(whole, task="med")) == ["meet: O0, the whole image"]


def test_spans_are_coloured_on_a_terminal_only(finished, monkeypatch, capsys):
    """And not there either, where NO_COLOR is set."""
    assert coloured(row_of(tokens=("a\033[2J",)), MEE) == "a?[2J"
    text = coloured(row_of(*FOUND), MEE)
    assert text.startswith("\033[1;34mKim Lee\033[0m paid") and "\033[1;33mBo\033[0m" in text
    monkeypatch.setattr(answer, "coloured", lambda row, dataset: "COLOURS")
    for tty, quiet, expected in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
        monkeypatch.setenv("NO_COLOR", quiet)
        answer.main([str(finished), "--text", "Kim", "--task", "mner"])
        assert ("COLOURS" in capsys.readouterr().out) == expected


# ------------------------------------------------------------------------------------- the picture

STRIPS = [Strip("memory", "reading", ["prompt", *(f" {word}" for word in TOKENS * 6)],
                [i / 60 for i in range(55)])]


def texts_of(figure: object) -> list[tuple[str, object]]:
    """(text, its extent in pixels) of everything written on a page, axis labels included."""
    from matplotlib.text import Text
    figure.canvas.draw()
    return [(text.get_text(), text.get_window_extent()) for text in figure.findobj(Text)
            if text.get_text() and text.get_visible()]


CROWD = tuple((x, y, x + 4, y + 2) for x in (2, 3, 8, 9) for y in (1, 2, 3))


@pytest.mark.parametrize("tokens, items, boxes", [
    (TOKENS, FOUND, BOXES), (("word", "x" * 300, *TOKENS * 12), (), CROWD),
    (TOKENS, [Item("meet", "who", (i, i + 1), text="Bo") for i in range(9)] + [
        Item("attack", "target", box=CROWD[k - 1], text="O1", object=k) for k in (1, 2, 5, 9)],
     CROWD)])
def test_nothing_on_a_page_covers_another_text_or_leaves_the_page(folder, tokens, items, boxes):
    """Long texts and long words wrap, labels make room, bars stand in rows."""
    row = row_of(*items, tokens=tokens, boxes=boxes, image=str(folder / "images" / "a.png"))
    figure = example_figure(row, MEE, STRIPS, None)
    written = texts_of(figure)
    for (name, a), (other, b) in itertools.combinations(written, 2):
        both = a.intersection(a, b)
        assert both is None or min(both.width, both.height) < 4, (name, other)
    page = figure.bbox.padded(1)
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
               for _, box in written)
    labels = {place.label for place in places(row, MEE)}
    assert "".join(tokens) in "".join(name for name, _ in written if name not in labels)


def test_a_page_shows_every_box_label_and_dollar(folder):
    """Boxes are numbered in the order of the record, named ones say their role; "$5 ... $6" is no
    formula."""
    row = row_of(*FOUND, image=str(folder / "images" / "a.png"))
    figure = example_figure(row, MEE, STRIPS, None)
    written = [name for name, _ in texts_of(figure)]
    assert {"O1\ntarget", "O2\ntarget", "O3", "attacker", "$5", "$6"} <= set(written)
    write_figure(figure, folder / "page.png")
    assert size_of(folder / "page.png")[0] == WIDTH
    whole = row_of(Item("meet", whole_image=True, text="O0", object=0), task="med",
                   image=row.record.image)
    written = [name for name, _ in texts_of(example_figure(whole, MEE, STRIPS, None))]
    assert "O0, the whole image: meet" in written


def test_without_image_there_is_no_image_and_without_gate_no_strip():
    figure = example_figure(row_of(*FOUND), MEE, [], "method lora, which has none")
    assert not any(ax.images or ax.containers for ax in figure.axes)
    assert "no gates to draw: method lora, which has none" in [n for n, _ in texts_of(figure)]
    figure = example_figure(row_of(*FOUND), MEE, STRIPS, None)
    assert sum(bool(ax.containers) for ax in figure.axes) == 3  # three rows of bars


@pytest.fixture(scope="module", params=["gate", "concat"])
def setup(request: pytest.FixtureRequest, small: dict[str, str]) -> SimpleNamespace:
    """A model whose gates and experts are not zero."""
    torch.manual_seed(1)
    model = clorae.adapt(UMIE(T5.from_pretrained(small["t5"]), 16, fusion=request.param), rank=6)
    for layer in clorae.expert_layers(model).values():
        for weight in (layer.W_g, layer.B_U, layer.B_T):
            nn.init.normal_(weight)
    return SimpleNamespace(model=model, tokenizer=data.Tokenizer(small["t5"]),
                           datasets=load_datasets(small["data"]), config=Config())


class Three:
    """Three visual tokens for every record."""

    width = 16

    def __call__(self, record: Record) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(3)
        return torch.randn(3, 16, generator=draw), torch.rand(3, 5, generator=draw)


def test_the_strips_are_the_gates_of_the_tokens_read_seen_and_written(setup, small, monkeypatch):
    """Eq. (6) once more, by hand from every layer's input while the answer is written greedily,
    token by token; layers are told apart by their paths, visual tokens of concat come first."""
    records = load_corpus(small["data"], "test", ["T15"])[:1]
    example, = data.encode_records(records, setup.datasets, setup.tokenizer, 256, 24)
    row, = evaluate.evaluate_split(setup, [example], Three(), evaluate.Decoding(1, 1, 9), World())
    monkeypatch.setattr(FastExpertLinear, "parts", lambda layer: None)  # the decoder calls it
    seen: dict[str, list[torch.Tensor]] = {}
    for path, layer in clorae.expert_layers(setup.model).items():
        layer.register_forward_pre_hook(lambda layer, inputs, path=path: seen.setdefault(
            path, []).append(F.linear(inputs[0], layer.W_g).softmax(-1)[0, :, 1]))
    strips = token_strips(setup, example, row, Three(), CPU, evaluate.Decoding())
    seen.clear()
    evaluate.evaluate_split(setup, [example], Three(), evaluate.Decoding(1, 1, 9), World())
    for layer in clorae.expert_layers(setup.model).values():
        layer._forward_pre_hooks.clear()

    def mean(*wanted: str, last: int) -> list[float]:
        some = [torch.cat(gates)[-last:] for path, gates in seen.items()
                if re.search("|".join(wanted), path)]
        return torch.stack(some).mean(dim=0).tolist()

    S, T = len(example.input_ids), len(row.answer.ids)
    read = mean(r"encoder\.blocks", r"cross_attention\.v", last=S)
    n = S - len(strips[0].gates) + 1
    assert strips[0].gates == pytest.approx([sum(read[:n]) / n, *read[n:]], abs=1e-5)
    assert strips[0].names[0] == f"prompt, {n} tokens" and strips[0].names[-1] == "</s>"
    assert "".join(strips[0].names[1:-1]).split() == list(records[0].tokens)
    assert strips[1].gates == pytest.approx(mean("vstack", last=3), abs=1e-5)
    assert strips[1].names == ["image", " O1", " O2"]
    wrote = mean(r"decoder\S*(self_attention|cross_attention\.q)", last=T)
    assert strips[2].gates == pytest.approx(wrote, abs=1e-5) and T == len(strips[2].names)
    figure = example_figure(row, setup.datasets["demo_t15"], strips, None)
    bars = [patch.get_height() for ax in figure.axes for patch in
            (ax.containers[0] if ax.containers else ())]
    assert bars == sum((strip.gates for strip in strips), [])


@pytest.mark.parametrize("method, egr, reason", [
    ("lora", True, "method lora, which has none"), ("full", True, "method full, which has none"),
    ("clorae", False, "method clorae --no-egr, which has none"),
    ("loramoe", True, "whose gate knows no task expert"), ("clorae", True, None)])
def test_a_method_without_gate_says_so(small, method, egr, reason):
    """What the settings say is true of the model's layers."""
    told = no_gate_reason(Config(method=method, egr=egr))
    assert told == reason or reason in told
    model = clorae.adapt(UMIE(T5.from_pretrained(small["t5"]), 16), method, rank=6, egr=egr)
    layers = clorae.expert_layers(model).values()
    alive = [hasattr(layer, "W_g") and hasattr(layer, "A_T") for layer in layers]
    assert alive == [told is None] * len(layers)
