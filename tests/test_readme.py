"""README and docs/ as a program: their command lines are taken word for word and run in short form.

Every block of commands goes through a real shell in which python, torchrun and pip only write down
how they were called.  Those calls are then made in this process: a training with the small world
and few steps behind its own flags, everything else as it stands, with RUN, SRC and DIR at hand.
Examples in Python are run as they stand.  Links, files, options and tests that a text names exist.
"""

import importlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clorae
import data
import demo
import evaluate
import train
from conftest import ROOT
from engine.command import Parser
from engine.corpus import load_corpus, load_datasets
from engine.schema import RECORD_TASKS
from engine.settings import Config, Launch, parse_arguments
from tools import answer, convert

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
PROGRAM = re.compile(r"(?:nice -n \d+ )?(?:python|torchrun|pip|for) ")
BLOCKS = [pytest.param(block, id=f"{page}: {block.splitlines()[0][:40]}")
          for page, text in PAGES.items() for language, block in FENCED.findall(text)
          if language in ("", "bash", "sh") and re.search(f"^{PROGRAM.pattern}", block, re.M)]
EXAMPLES = [pytest.param(block, id=page) for page, text in PAGES.items()
            for language, block in FENCED.findall(text) if language == "python"]
PROSE = {page: FENCED.sub("", text) for page, text in PAGES.items()}
INLINE = [" ".join(line.split()) for text in PROSE.values() for line in
          re.findall(r"`((?:python|torchrun|train\.py|evaluate\.py)\s[^`]*)`", text)]
TOOLS = {f"tools.{path.stem}": importlib.import_module(f"tools.{path.stem}")
         for path in ROOT.glob("tools/*.py") if "\ndef main(" in path.read_text()}
COMMANDS = {"evaluate.py": evaluate, **TOOLS}
LONG = ("tools.costs", "tools.paper")
CONLL = "IMGID:1\nBob\tB-PER\nLee\tI-PER\nin\tO\nRome\tB-LOC\n\n"


def calls(text: str, folder: Path) -> list[list[str]]:
    """What a shell would run: the words of each call of python, torchrun and pip, in order."""
    log = folder / "calls"
    for name in ("python", "torchrun", "pip"):
        shim = folder / name
        shim.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "--end--" >> "{log}"\n')
        shim.chmod(0o755)
    subprocess.run(["bash", "-euc", text], env={"PATH": f"{folder}:/usr/bin:/bin"}, check=True,
                   cwd=folder)
    found = log.read_text().split("\n--end--\n")[:-1]
    log.unlink()
    return [call.split("\n") for call in found]


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """train.py and its flags, of `torchrun --nproc_per_node=4 train.py ...`; tools.plot and its
    flags, of `python -m tools.plot ...`."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    at += words[at] == "-m"
    return words[at], words[at + 1:]


@pytest.fixture(scope="module")
def place(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small run under every name that README uses, a corpus, and raw files."""
    root, handlers = tmp_path_factory.mktemp("reader"), {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    Path("data").mkdir()
    for name in ("DIR", "data/demo"):
        Path(name).symlink_to(small["data"])
    Path("SRC").mkdir()
    for split in ("train", "valid", "test"):
        Path("SRC", f"{split}.txt").write_text(CONLL)
    convert.main(["twitter2015", "SRC", "corpus"])
    Path("T5").symlink_to(small["t5"])
    Path("demo_backbone").symlink_to(ROOT / "demo_backbone")
    train.main(short(["--out", "runs/demo-tiny-clorae"], small))
    train.main(short(["--out", "RUN2", "--seed", "1"], small))
    for name in ("RUN", "runs/corpus-large-clorae"):
        Path(name).symlink_to(root / "runs/demo-tiny-clorae")
    yield root
    patch.undo()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def short(flags: list[str], small: dict[str, str]) -> list[str]:
    """The flags of a training, then those that make it small; the last of a kind counts."""
    own = [word for name, folder in small.items() for word in (f"--{name}", folder)]
    return [*flags, *own, "--size", "tiny", "--max-target", "16", "--rank", "6", "--batch", "12",
            "--micro-batch", "12", "--epochs", "1", "--steps", "1"]


def perform(script: str, flags: list[str], small: dict[str, str]) -> None:
    """Run a command of README in this process; it must end without an error."""
    if script == "train.py":
        return train.main(short(flags, small))
    COMMANDS[script].main(flags)


def exists(script: str) -> bool:
    """A file of the repository, a module of it, or pytest."""
    module = ROOT / (script.replace(".", "/") + ".py")
    return script == "pytest" or (ROOT / script).is_file() or module.is_file()


class Understood(Exception):
    """A command line has been parsed."""


def understood(script: str, flags: list[str]) -> None:
    """The command line is one that the command accepts; it is not run."""
    if script == "train.py":
        parse_arguments(flags, "", clorae.METHODS)
    elif script in COMMANDS or script == "demo.py":
        parse, command = Parser.parse_args, COMMANDS.get(script, demo)

        def only_parse(self: Parser, argv: list[str] | None = None) -> None:
            parse(self, argv)
            raise Understood

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Understood):
            patch.setattr(Parser, "parse_args", only_parse)
            patch.setattr(sys, "argv", [script, *flags])
            command.main()
    else:
        assert exists(script), script


def test_no_block_of_commands_is_overlooked():
    assert len(BLOCKS) >= 8 and len(INLINE) >= 10 and EXAMPLES
    for block in BLOCKS:
        assert PROGRAM.match(block.values[0]), f"begin with a command: {block.values[0]}"


@pytest.mark.parametrize("block", BLOCKS)
def test_every_command_block_runs_word_for_word_in_short_form(block, place, small, capsys):
    """What takes long however short it is made is only parsed: the comparison of thirty runs, the
    run on the real files, measurements, and what LONG names."""
    for words in calls(block, place):
        if words[0] == "pip":
            assert words[1] == "install"
            continue
        script, flags = script_of(words)
        long = script in LONG or block.startswith("for ") or "data/real" in block
        if not long and script in (*COMMANDS, "train.py"):
            perform(script, flags, small)
            assert capsys.readouterr().out.strip()
        else:
            understood(script, flags)


@pytest.mark.parametrize("block", EXAMPLES)
def test_every_example_in_python_runs_as_it_stands(block, place, tmp_path, monkeypatch, capsys):
    """The small model has learned nothing, so it is told what to answer."""
    for name in re.findall(r"^(?:from|import) (\w+)", block, re.M):
        pytest.importorskip(name)
    if "Extractor" in block and not hasattr(answer, "Extractor"):
        pytest.skip("tools.answer has no Extractor yet")
    told = evaluate.Answer
    monkeypatch.setattr(evaluate, "Answer", lambda text, cut, *others: told(
        "person, Virur", False, *others))
    (tmp_path / "example.py").write_text(block)
    runpy.run_path(str(tmp_path / "example.py"))
    assert "Extractor" not in block or "Virur 12 17 person" in capsys.readouterr().out


@pytest.mark.parametrize("line", INLINE)
def test_every_command_in_the_text_is_one_that_its_program_accepts(line):
    """Of a choice written `a|b` or `a\\|b` every alternative; of a bare name, that it exists."""
    words = shlex.split(line.replace("\\|", "|").replace("--seed S", "--seed 0"))
    words = words[1:] if words[0] in ("python", "torchrun") else words
    script, flags = script_of(words)
    if flags in ([], ["--help"]):
        assert exists(script), script
        return
    for i in range(max(word.count("|") + 1 for word in words)):
        chosen = [word.split("|")[min(i, word.count("|"))] for word in flags]
        understood(script, chosen)


def test_every_flag_that_a_text_names_exists():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py"),
                ROOT / "tests/benchmark.py", ROOT / "tests/reliability.py"]
    known = {"--help", "--nproc", "--nnodes", "--rdzv", "--max-restarts"}  # not our own
    known |= {flag for path in programs for flag in re.findall(r'"(--[a-z-]+)"', path.read_text())}
    fields = {f"--{name.replace('_', '-')}" for kind in (Config, Launch)
              for name in kind.__dataclass_fields__}
    known |= fields | {f"--no-{name.removeprefix('--')}" for name in fields}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= known


# ------------------------------------------------------------------------------ what texts name
def test_readme_can_be_read_at_once():
    assert README.count("\n") <= 220 and len(README.encode()) <= 13_000


def anchors(text: str) -> set[str]:
    """The addresses that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE)
def test_every_relative_link_leads_somewhere(page):
    """To a file of the repository and, behind a #, to one of its headings."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        path = Path(os.path.normpath(ROOT / page / ".." / file)) if file else ROOT / page
        assert path.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {link}"


def test_readme_leads_to_every_page():
    links = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert set(PAGES) - {"README.md"} <= links


@pytest.mark.parametrize("page", PROSE)
def test_every_file_and_test_that_a_text_names_exists(page):
    """Files by a path from the top, or by a name that some folder holds; tests by their names, of
    which ... stands for the end."""
    files = {path.relative_to(ROOT).as_posix() for folder in ("", "*/", "*/*/")
             for path in ROOT.glob(f"{folder}*") if path.suffix != ".pyc"}
    names = files | {Path(file).name for file in files}
    text = re.sub(r"\]\([^)]*\)|github\.com/\S+", "", PAGES[page])
    folders = "engine|fast|tools|tests|docs|findings|demo_backbone"
    ours = rf"(?:{folders})/[\w./]*\w|\w+\.(?:py|cu|md|svg)"
    for name in re.findall(rf"(?<![\w./-])(?:{ours})\b", text):
        assert name in names, f"{page}: {name}"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name, dots in re.findall(r"\b(test_\w+?)(_?\.\.\.|\b)(?!\.)", text):
        if not re.match(r"\d+$", name.removeprefix("test_")):  # the pictures of the demo
            assert re.search(f"def {name}" + r"\b" * (not dots), tests), f"{page}: {name}"


def test_every_name_beside_a_chapter_exists():
    """`name` or `Class.name` behind a chapter's name, as in the table of the method and in the
    order of reading: a function, class or constant there, or one of the methods."""
    text = README + PAGES["docs/method.md"]
    named = re.findall(r"\b(\w+\.py)\)?,? ((?:`[\w.]+`(?:, | and |))+)", text)
    assert len(named) >= 8
    for file, words in named:
        code = (ROOT / file).read_text()
        for name in re.findall(r"\w+", words.replace(" and ", " ")):
            assert name in clorae.METHODS or re.search(
                rf"^ *(?:def|class) {name}\b|^{name} =", code, re.M), (file, name)


def test_prompts_and_answers_that_a_text_shows_are_the_demos_own(small):
    datasets = load_datasets(small["data"])
    own = {(record.task, "".join(data.prompt(record, datasets[record.dataset])),
            data.target(record)) for record in load_corpus(small["data"], "test")}
    shown = re.findall(r"^\| (\w+) \| (Please .*?) \| (.*) \|$", PAGES["docs/data.md"], re.M)
    assert {task for task, *_ in shown} == set(RECORD_TASKS)
    assert {(*cells, answer.replace("`", "")) for *cells, answer in shown} <= own


def test_every_file_of_readmes_tree_exists_and_every_file_is_in_it():
    """The chapters and the folders of code, every tool by its name, and each file of tests that is
    not called like the file or folder whose tests it holds."""
    tree = README[README.index("## Files"):README.index("How a row")]
    assert set(re.findall(r"^(\w+\.py)", tree, re.M)) == {p.name for p in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders <= set(re.findall(r"^(\w+)/", tree, re.M))
    tools = re.findall(r"\w+", tree[tree.index("tools/"):tree.index("docs/")])
    assert {name.removeprefix("tools.") for name in TOOLS} <= set(tools)
    sources = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))} | folders
    for path in ROOT.glob("tests/test_*.py"):
        assert path.stem.removeprefix("test_") in sources or path.name in tree, path.name
