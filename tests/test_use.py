"""Using the commands: their help, examples answered in words, JSON and pictures, pictures of a run.

The model is random and told what to write, where a test looks at what is made of an answer.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy
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
from engine.files import note
from engine.schema import DataError, Dataset, Record
from engine.processes import World
from engine.settings import Config
from evaluate import Answer, Counts, Row
from fast.experts import FastExpertLinear
from t5 import T5
from tools import (answer, check, convert, costs, export, extract, html, plot, replay, routing)
from tools.answer import Extractor, coloured, example_records
from tools.extract import Argument, Entity, Event, Relation, Span, Unplaced
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
    "Gegen\U0001f600\U0001f600 \U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea \xbfGegen? I\u2764Oslo":
        "Gegen \U0001f600 \U0001f600 \U0001f1eb\U0001f1f7 \U0001f1e9\U0001f1ea "
        "\xbf Gegen ? I \u2764 Oslo",
    "Oslo\u2013Gegen, home--Gegen; Lelin/Gegen and/or 7/27 \u6771\u4eac\u3001\u5927\u962a\u3002":
        "Oslo \u2013 Gegen , home -- Gegen ; Lelin / Gegen and/or 7/27 "
        "\u6771\u4eac \u3001 \u5927\u962a \u3002",
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
    ('{"text": "Kim", "task": "mner", "image": "b.png"}', "b.png: expected a picture, got no file"),
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
    (["--text", "hi", "--task", "med", "--image", "nowhere.png"], "png: expected a picture"),
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


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("size, tokens, items, boxes", [
    ((24, 20), TOKENS, FOUND, BOXES),
    ((20, 10), ("word", "x" * 300, "\u5b89" * 9, *TOKENS * 12), (), CROWD),
    ((20, 90), TOKENS, [Item("meet", "who", (i, i + 1), text="Bo") for i in range(9)] + [
        Item("attack", "target", box=CROWD[k - 1], text="O1", object=k) for k in (1, 2, 5, 9)],
     CROWD)])
def test_nothing_on_a_page_covers_another_text_or_leaves_the_page(folder, size, tokens, items,
                                                                  boxes):
    """Long texts and long words wrap, labels make room, bars stand in rows; pictures that are wide,
    tall, or neither."""
    Image.new("RGB", size, "red").save(folder / "images" / "a.png")
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
    assert strips[0].names[0] == f"prompt ({n})" and strips[0].names[-1] == "</s>"
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
    ("mtllora", True, "method mtllora, which has none"),
    ("loramoe", True, "whose gate knows no task expert"),
    ("hydralora", True, "whose gate knows no task expert"), ("clorae", True, None)])
def test_a_method_without_gate_says_so(small, method, egr, reason):
    """What the settings say is true of the model's layers."""
    told = no_gate_reason(Config(method=method, egr=egr))
    assert told == reason or reason in told
    model = clorae.adapt(UMIE(T5.from_pretrained(small["t5"]), 16), method, rank=6, egr=egr)
    layers = clorae.expert_layers(model).values()
    alive = [hasattr(layer, "W_g") and hasattr(layer, "A_T") for layer in layers]
    assert alive == [told is None] * len(layers)


# ------------------------------------------------------------------------------------ from Python

@pytest.fixture(scope="module")
def extractor(finished: Path) -> Extractor:
    return Extractor(finished)


def test_a_run_that_has_not_ended_is_used_and_said_to_be_unfinished(finished, tmp_path, capsys):
    """Once, with the checkpoint; of a finished run or a checkpoint folder nothing is said."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "table.txt").unlink()
    best, = run.glob("best-*")
    for folder in (finished, best):
        Extractor(folder)
        assert "has not ended" not in capsys.readouterr().err
    Extractor(run)
    said = capsys.readouterr().err
    assert said.count("has not ended") == 1 and f"those of {best.name};" in said


@pytest.mark.parametrize("tool, idle", (
    ("answer", "split units cache"), ("costs", "cache missing-images beams weights impl graphs"),
    ("replay", "split t5 vit init cache units missing-images beams batch-size weights impl")))
def test_help_lists_no_option_that_does_nothing(tool, idle, capsys):
    with pytest.raises(SystemExit):
        sys.modules[f"tools.{tool}"].main(["--help"])
    listed = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.M)
    assert "data" in listed and not set(listed) & set(idle.split())


def told(extractor: Extractor, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Let a model answer this from now on."""
    def split(setup: object, examples: list, *_: object) -> list[Row]:
        said = [Answer(text) for text in answers]
        return evaluate.score_rows([e.record for e in examples], said, setup.datasets)

    monkeypatch.setattr(extract, "evaluate_split", split)


GIVEN = [*TYPED, "  Kim\t\tmet \n Bo .", "Bo's\u00a0caf\u00e9!!  (don't)", "'s 's n't don't'll",
         "\U0001f468\u200d\U0001f469e\u0301  \u5b89\u500d", "'" * 5, " \n"]


@pytest.mark.parametrize("text", GIVEN)
def test_offsets_are_those_of_the_given_string(text):
    """text[start:end] is the token, however the text is split; between tokens lie blanks alone."""
    offsets = extract.word_offsets(text)
    assert [text[start:end] for start, end in offsets] == answer.split_words(text)
    ends = [0, *(end for _, end in offsets)]
    starts = [*(start for start, _ in offsets), len(text)]
    assert not "".join(text[end:start] for end, start in zip(ends, starts)).strip()
    assert all(end <= start for end, start in zip(ends, starts))


def test_entities_have_types_words_tokens_and_characters(extractor, monkeypatch):
    """What the text lacks is named, not placed; the words are those of the given string."""
    told(extractor, monkeypatch, "person, Kim Lee <spot> location, Bo <spot> person, Al <spot> x")
    text = "So: Kim\n  Lee's in #Bo."
    result = extractor.extract(text, dataset="demo_t17")
    assert result.entities == (Entity("Kim\n  Lee", 4, 13, (2, 4), "person"),
                               Entity("Bo", 20, 22, (7, 8), "location"))
    assert all(text[e.start:e.end] == e.text for e in result.entities)
    assert result.unplaced == (Unplaced("person", None, "Al"),) and result.malformed == 1
    assert (result.task, result.dataset, result.events, result.relation, result.cut) == (
        "mner", "demo_t17", (), None, False)
    assert result.tokens == ("So", ":", "Kim", "Lee", "'s", "in", "#", "Bo", ".")
    assert result.notes[0].startswith("unreadable in the output, 1 piece(s)")


def test_events_have_triggers_and_arguments_in_words_and_pixels(extractor, folder, monkeypatch):
    """med and meae, each by itself and joined: an event's arguments are with its trigger."""
    image, boxes = folder / "images" / "a.png", [(1, 2, 9, 9), (3, 1, 19, 10)]
    kim, attacked = Span("Kim", 0, 3, (0, 1)), Span("attacked", 4, 12, (1, 2))
    arguments = (Argument("attacker", kim, None, None), Argument("target", None, 2, boxes[1]))
    written = "attack, attacked <spot> meet, O0", ("attack <spot> attacker, Kim <spot> target, O2 "
                                                   "<spot> target, O7 <asoc> transport <spot> "
                                                   "vehicle, O1")
    events = (Event("attack", attacked, False, ()), Event("meet", None, True, ()))
    told(extractor, monkeypatch, written[0])
    assert extractor.extract("Kim attacked.", image, "med", boxes).events == events
    told(extractor, monkeypatch, written[1])
    ride = Event("transport", None, False, (Argument("vehicle", None, 1, boxes[0]),))
    result = extractor.extract("Kim attacked.", image, "meae", boxes)
    assert result.events == (Event("attack", None, False, arguments), ride)
    assert result.unplaced == (Unplaced("attack", "target", "O7"),)
    told(extractor, monkeypatch, *written)
    result = extractor.extract("Kim attacked.", image, "mee", boxes)
    assert result.events == (Event("attack", attacked, False, arguments), events[1], ride)
    assert result.answer == "\n".join(written) and result.task == "mee"


def test_a_relation_has_its_head_and_tail(extractor, monkeypatch):
    """Words that stand once, or the characters of words that stand twice."""
    told(extractor, monkeypatch, "Kim <spot> peer <spot> Bo")
    kim, text = Span("Kim", 0, 3, (0, 1)), "Kim met    Bo and Bo"
    assert extractor.extract(text[:13], task="mre", head="Kim", tail="Bo").relation == Relation(
        "peer", kim, Span("Bo", 11, 13, (2, 3)))
    assert extractor.extract(text, task="mre", head="Kim", tail=(18, 20)).relation == Relation(
        "peer", kim, Span("Bo", 18, 20, (4, 5)))
    with pytest.raises(DataError, match=r"tail: expected words that stand once in the text, got "
                       r"'Bo', which stands 2 times; .*\(start, end\): \(11, 13\), \(18, 20\)"):
        extractor.extract(text, task="mre", head="Kim", tail="Bo")


def test_the_command_says_that_an_ambiguous_word_stands_for_the_first(small, folder, capfd):
    note.cache_clear()
    record, = records_of(small, "--text", "Kim met Bo and Bo", "--task", "mre", "--head", "Kim",
                         "--tail", "Bo")
    assert record.tail == (2, 3)
    assert "tail 'Bo' stands 2 times in the text; the first is taken" in capfd.readouterr().err


def test_a_list_gets_the_answers_that_the_command_gives(finished, small, extractor, capsys):
    """In batches, as one by one; gates, too."""
    path = Path(small["data"]) / "demo_v1" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][:5]
    answer.main([str(finished), "--json", "--examples", str(path)])
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))[:5]
    words = {end: [" ".join(row["tokens"][slice(*row[end])]) for row in rows]
             for end in ("head", "tail")}
    given = {"text": [" ".join(row["tokens"]) for row in rows], **words,
             "image": [path.parent / "images" / row["image"] for row in rows],
             "objects": [row["objects"] for row in rows]}
    results = extractor.extract(**given, task="mre", dataset="demo_v1")
    assert [result.answer for result in results] == [line["answer"] for line in lines]
    alone = [extractor.extract(**dict(zip(given, values)), task="mre", dataset="demo_v1")
             for values in zip(*given.values())]
    assert alone == results and extractor.extract([]) == []
    answer.main([str(finished), "--text", "Kim", "--task", "mner", "--json"])
    line = json.loads(capsys.readouterr().out)
    assert extractor.extract("Kim", gates=True).gates == pytest.approx(line["gates"])


def test_a_picture_in_memory_is_that_of_its_file(extractor, tmp_path):
    """EXIF turns it, modes become RGB; nothing of the caller's picture changes."""
    draw = numpy.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=numpy.uint8)
    image, exif = Image.fromarray(draw), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("P").save(tmp_path / "palette.png", transparency=3)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(draw[..., 0].astype("<u2") * 200).save(tmp_path / "grey16.png")
    image.save(tmp_path / "plain.png")
    sizes = {}
    for path in sorted(tmp_path.glob("*.*")):
        pictures = [path, Image.open(path)] + [draw] * (path.name == "plain.png")
        with TemporaryDirectory() as folder:
            rows = extract.as_rows({"text": ["Kim"] * len(pictures), "image": pictures,
                                    "task": "med", "objects": [BOX] * len(pictures),
                                    "head": None, "tail": None, "dataset": None})
            records = extract.given_records(rows, extractor.setup.datasets, Path(folder))
            images = extract.GivenImages(extractor.setup.sources, extractor.tower, records, 16,
                                         folder)
            first, *others = map(images, records)
        sizes[path.name] = records[-1].size
        for tokens, boxes in others:
            assert torch.equal(tokens, first[0]) and torch.equal(boxes, first[1]), path.name
        assert pictures[1].size == (20, 12)
    assert sizes.pop("turned.jpg") == (12, 20) and set(sizes.values()) == {(20, 12)}


def test_a_file_that_has_changed_between_two_calls_is_read_again(extractor, tmp_path, monkeypatch):
    seen, read = [], extract.GivenImages.__call__
    monkeypatch.setattr(extract.GivenImages, "__call__", lambda self, record: seen.append(
        read(self, record)) or seen[-1])
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 10), colour).save(tmp_path / "a.png")
        extractor.extract("Kim", tmp_path / "a.png")
    assert not torch.equal(seen[0][0], seen[-1][0])


RED, BOX = Image.new("RGB", (20, 10), "red"), numpy.array([[0, 0, 9, 9]])
WRONG = [  # arguments of extract, what is said
    ({"text": 3}, "text: expected a string, or a list of them, got int"),
    ({"text": ["Kim", 3]}, r"text\[1\]: text: expected a string, .*, got int"),
    ({"text": ""}, "tokens: .* is no text"), ({"text": "a\0b"}, "is no non-empty string without"),
    ({"text": "Kim", "task": "ner"}, 'task: expected one of mner, .*, mee, got "ner"'),
    ({"text": "Kim", "task": ["mner"]}, r"task: expected one of .*, got \["),
    ({"text": "Kim", "dataset": "x"}, "dataset: expected one with the task mner, got 'x'; use"),
    ({"text": "Kim", "task": "mee", "dataset": "demo_v1"}, "with the task med and meae"),
    ({"text": "Kim", "image": "nowhere.png"}, "nowhere.png: expected a picture, got no file"),
    ({"text": "Kim", "image": [RED]}, "image: expected a path, a PIL image or .*, got list"),
    ({"text": "Kim", "image": numpy.zeros((4, 4, 3))}, r"got ndarray float64 \(4, 4, 3\)"),
    ({"text": "Kim", "image": numpy.zeros((4, 4), numpy.uint8)}, r"got ndarray uint8 \(4, 4\)"),
    ({"text": "Kim", "image": numpy.zeros((0, 4, 3), numpy.uint8)}, r"uint8 \(0, 4, 3\)"),
    ({"text": "Kim", "image": RED, "objects": [1, 2, 3, 4]}, "objects: expected a list of boxes"),
    ({"text": "Kim", "image": RED, "objects": [(0, 0, 30, 5)]}, "0 <= x1 < x2 <= 20"),
    ({"text": "Kim", "image": RED, "objects": [(0, 0, float("nan"), 5)]}, "is no box"),
    ({"text": "Kim", "image": RED, "objects": [(0, 0, True, 5)]}, "is no box"),
    ({"text": "Kim", "objects": [(0, 0, 3, 5)]}, "objects: .* needs an image: name it"),
    ({"text": "Kim", "head": "Kim"}, "head: expected words of the text with task mre and None"),
    ({"text": "Kim met Bo", "task": "mre", "head": "Kim"}, "tail: expected .*, got null with mre"),
    ({"text": "Kim met Bo", "task": "mre", "head": "Al", "tail": "Bo"}, "head: .*'Al', which is"),
    ({"text": "Kim met Bo", "task": "mre", "head": (0, 2), "tail": "Bo"},
     r"head: expected words of the text, or the characters \(start, end\) .*begin at \[0, 4, 8\]"),
    ({"text": ["a", "b"], "image": [None]}, "image: expected a list of 2, .*, got 1; give as many"),
    ({"text": ["a", "b"], "image": RED}, "image: expected a list of 2, .*, got one Image"),
    ({"text": ["a", "b"], "task": ["mner"]}, "task: expected a list of 2, one for each text")]


@pytest.mark.parametrize("arguments, problem", WRONG)
def test_what_cannot_be_read_is_refused_with_the_reason(extractor, arguments, problem):
    with pytest.raises(DataError, match=problem):
        extractor.extract(**arguments)


def test_every_wrong_example_of_a_list_is_named(extractor):
    with pytest.raises(DataError, match=r"(?s)2 problem.*text\[0\]: image: .*text\[2\]: tokens"):
        extractor.extract(["Kim", "Kim", ""], [3, RED, None], "mee")


def test_a_half_picture_that_pil_has_opened_is_refused(extractor, tmp_path):
    RED.resize((200, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-300])
    with pytest.raises(DataError, match="image: expected a whole picture, got OSError"):
        extractor.extract("Kim", Image.open(tmp_path / "a.jpg"))


def test_what_the_model_does_not_see_is_noted(extractor):
    """A text too long, characters without a piece, objects beyond the most."""
    boxes = [(0, 0, 9, 9)] * (extractor.setup.config.max_objects + 1)
    result = extractor.extract("Kim \u5b89 " + "x y z " * 400, RED, objects=boxes)
    assert re.match(r"the model read \d+ of 1202 tokens", result.notes[-3])
    assert result.notes[-2:] == ("the tokenizer lacks characters of it",
                                 "the model saw 16 of 17 objects")


@pytest.mark.parametrize("options, problem", [
    ({"impl": "quick"}, "impl: expected one of auto, plain, fast, cuda, got 'quick'; correct it"),
    ({"weights": "int4"}, "weights: expected stored or int8, got 'int4'"),
    ({"beams": 0}, "beams: expected a whole number from 1, got 0"),
    ({"batch_size": 2.0}, "batch_size: expected a whole number from 1, got 2.0"),
    ({"device": "meta"}, r"device: expected cpu, or .*, got 'meta' \(of another type\)"),
    ({"device": "tpu"}, "device: expected cpu, or cuda where there is a GPU, got 'tpu' .*; name"),
    ({"vit": "nowhere"}, "nowhere")])
def test_what_cannot_be_loaded_is_refused_with_the_reason(finished, options, problem):
    with pytest.raises(ValueError, match=problem):
        Extractor(finished, **options)


def test_an_exported_adapter_reads_as_its_run_does(finished, small, extractor, tmp_path, capsys,
                                                   monkeypatch):
    """It brings its labels, and is told where the backbone lies: by name, or below this code."""
    export.main([str(finished), "--out", str(tmp_path / "adapter")])
    wanted = extractor.extract("Kim met Bo", RED, "med", gates=True)
    adapter = Extractor(tmp_path / "adapter", t5=small["t5"], vit=Path(small["vit"]), beams=2,
                        weights="int8", device="cpu")
    assert adapter.decoding.beams == 2 and adapter.decoding.weights == "int8"
    adapter = Extractor(tmp_path / "adapter", t5=small["t5"], vit=Path(small["vit"]))
    assert adapter.extract("Kim met Bo", RED, "med", gates=True) == wanted
    monkeypatch.setattr(extract, "read_state", lambda path: {
        "t5": "weights/t5", "vit": "/nowhere", "config": {"data": None}})
    (tmp_path / "weights" / "t5").mkdir(parents=True)
    (tmp_path / "data" / "demo").mkdir(parents=True)
    monkeypatch.setattr(extract, "ROOT", tmp_path)
    monkeypatch.chdir(finished)
    assert extract.beside_the_code(finished) == {"t5": f"{tmp_path}/weights/t5",
                                                 "data": f"{tmp_path}/data/demo"}


def test_a_run_without_gates_says_so_where_they_are_asked_for(extractor, monkeypatch):
    monkeypatch.setattr(extractor, "no_gate", "method lora, which has none")
    with pytest.raises(ValueError, match="gates: expected a run with a gate .*, got method lora"):
        extractor.extract("Kim", gates=True)


LOAD = 'import runpy; Extractor = runpy.run_path("%s")["Extractor"]' % (ROOT / "tools" / "load.py")
THEIRS = 'import data, tools, evaluate; assert {m.NAME for m in (data, tools, evaluate)} == {1}'
USE = 'print(Extractor(RUN).extract("Kim").task); assert "engine" not in sys.modules'


@pytest.mark.parametrize("lines", [(THEIRS, LOAD, USE, THEIRS), (LOAD, LOAD, THEIRS)])
def test_another_folder_loads_it_beside_modules_of_the_same_names(finished, tmp_path, lines):
    """Whichever comes first: nobody gets the other's data, tools or evaluate."""
    for name in ("data", "tools", "evaluate"):
        (tmp_path / f"{name}.py").write_text("NAME = 1\n")
    (tmp_path / "program.py").write_text("\n".join([
        f"import sys; before, RUN = list(sys.path), {str(finished)!r}", *lines,
        "assert sys.path == before"]))
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mner\n" * (USE in lines)


@pytest.mark.parametrize("line", ["", "import data"])
def test_somebody_else_s_module_in_the_place_of_ours_is_named(tmp_path, line):
    """Before anything runs with it: already imported, or first on the path."""
    (tmp_path / "data.py").touch()
    program = (f"import sys; sys.path.append({str(ROOT)!r})\n{line}\n"
               "from tools.answer import Extractor")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert (f"ImportError: import data: expected the module {ROOT}/data.py, got "
            f"{tmp_path}/data.py; load this code as the head of {ROOT}/tools/load.py says"
            ) in done.stderr


# -------------------------------------------------------------------------------- the HTML page

class Outline(HTMLParser):
    """The tags of a page, which must close, and everything that leads out of it."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.texts, self.outside = [], [], [], []
        self.feed(page)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "image", "rect", "path"):
            self.open.append(tag)
        self.outside += [value for name, value in attributes if name.startswith("on")
                         or name in ("src", "href") and not value.startswith("data:image/")]

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts += [text.strip()] if text.strip() else []


HOSTILE = ("<script>alert(1)</script>", "&amp;", '"onload="x', "</section>", "'", "\u5b89")


def test_the_html_page_has_all_that_the_picture_has_and_nothing_from_outside(folder):
    """Boxes with their labels, spans with theirs, lines of the answer, a bar for each token."""
    row = row_of(*FOUND, image=str(folder / "images" / "a.png"))
    outline = Outline(html.page([(row, MEE, STRIPS)], None))
    assert not outline.outside and not {"script", "link", "iframe"} & set(outline.tags)
    for text in ("O1", "O2", "O3", "target", "attacker", *answer_lines(row), "$5", "prompt"):
        assert any(text in piece for piece in outline.texts), text
    assert outline.tags.count("mark") == 2 and outline.tags.count("b") == len(STRIPS[0].gates)
    written = [name for name, _ in texts_of(example_figure(row, MEE, STRIPS, None))]
    assert {".50", ".90"} <= set(outline.texts) & set(written)


def test_whatever_a_user_wrote_is_escaped(folder):
    items = [Item("attack", "target", (0, 2), text="x"), Item("attack", "target", text=HOSTILE[0])]
    row = row_of(*items, tokens=HOSTILE, image=str(folder / "images" / "a.png"), boxes=CROWD)
    strips = [Strip("memory", "reading", list(HOSTILE), [0.5] * len(HOSTILE))]
    page = html.page([(row, MEE, strips), (row, MEE, [])], "no <gate>")
    outline = Outline(page)
    assert page.count("<script") == 0 and not outline.outside
    assert outline.tags.count("section") == 2 and HOSTILE[0] in outline.texts
    assert "no gates to draw: no <gate>" in outline.texts


def test_spans_within_spans_and_whole_images_are_marked(folder):
    items = [Item("attack", "target", (0, 3)), Item("meet", "who", (1, 2)),
             Item("meet", "who", whole_image=True, object=0)]
    row = row_of(*items, image=str(folder / "images" / "a.png"))
    outline = Outline(html.page([(row, MEE, [])], None))
    assert outline.tags.count("mark") == 2 and "O0, the whole image: meet:who" in outline.texts


def test_the_command_draws_both_pages_and_one_html_file_for_many(finished, folder, capsys):
    answer.main([str(finished), "--text", "Kim & <b>", "--task", "mner", "--draw",
                 str(folder / "p.png"), str(folder / "p.html")])
    assert f"picture: {folder}/p.png\npage: {folder}/p.html\n" in capsys.readouterr().out
    assert size_of(folder / "p.png")[0] == WIDTH
    outline = Outline((folder / "p.html").read_text())
    assert "&" in " ".join(outline.texts) and "mean" in " ".join(outline.texts)
    answer.main([str(finished), "--examples", str(folder / "rows.jsonl"), "--json", "--draw",
                 str(folder / "all.html")])
    assert Outline((folder / "all.html").read_text()).tags.count("section") == 4
    with pytest.raises(SystemExit):
        answer.main([str(finished), "--text", "x", "--task", "mner", "--draw", "a.png", "b.pdf"])
    assert "--draw b.pdf: name a .png file (or a .html file)" in capsys.readouterr().err
