"""README as a program: its command lines are taken word for word and run in short form.

Every block of commands goes through a real shell in which python, torchrun and pip only write down
how they were called.  Those calls are then made in this process: a training with the small world
and few steps behind its own flags, everything else as it stands, with RUN, SRC and DIR at hand.
"""

import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import clorae
import evaluate
import losses
import train
from conftest import ROOT
from engine.command import Parser
from engine.settings import Config, Launch, parse_arguments
from tools import answer, check, convert, costs, export, plot, replay, routing

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEXT = "\n".join(PAGES.values())
BLOCKS = [block for block in re.findall(r"^```\n(.*?)^```", TEXT, re.S | re.M)
          if re.match(r"(python|torchrun|pip|for) ", block)]
INLINE = [" ".join(line.split()) for line in
          re.findall(r"`((?:python|torchrun|train\.py|evaluate\.py)\s[^`]*)`", TEXT)]
COMMANDS = {"evaluate.py": evaluate, **{tool.__name__: tool for tool in (
    answer, check, convert, costs, export, plot, replay, routing)}}
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


class Understood(Exception):
    """A command line has been parsed."""


def understood(script: str, flags: list[str]) -> None:
    """The command line is one that the command accepts; it is not run."""
    if script == "train.py":
        parse_arguments(flags, "", clorae.METHODS)
    elif script in COMMANDS:
        parse = Parser.parse_args

        def only_parse(self: Parser, argv: list[str]) -> None:
            parse(self, argv)
            raise Understood

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Understood):
            patch.setattr(Parser, "parse_args", only_parse)
            COMMANDS[script].main(flags)
    else:
        assert script == "pytest" or (ROOT / script).is_file(), script


def test_readme_has_blocks_of_commands():
    assert len(BLOCKS) >= 8 and len(INLINE) >= 10


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:50])
def test_every_command_block_runs_word_for_word_in_short_form(block, place, small, capsys):
    """The comparison of thirty runs and the run on the real files are only parsed."""
    for words in calls(block, place):
        if words[0] == "pip":
            assert words[1:] == ["install", "-r", "requirements.txt"]
            continue
        script, flags = script_of(words)
        if block.startswith("for ") or "data/real" in block:
            understood(script, flags)
        else:
            perform(script, flags, small)
            assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", INLINE)
def test_every_command_in_the_text_is_one_that_its_program_accepts(line):
    """Of a choice written `a|b` or `a\\|b` every alternative; of a bare flag, that it exists."""
    words = shlex.split(line.replace("\\|", "|"))
    words = words[1:] if words[0] in ("python", "torchrun") else words
    script, flags = script_of(words)
    for i in range(max(word.count("|") + 1 for word in words)):
        chosen = [word.split("|")[min(i, word.count("|"))] for word in flags]
        understood(script, chosen)


def test_every_flag_that_readme_names_exists():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py"),
                ROOT / "tests/benchmark.py", ROOT / "tests/reliability.py"]
    known = {"--help", "--nproc", "--nnodes", "--rdzv", "--max-restarts"}  # not our own
    known |= {flag for path in programs for flag in re.findall(r'"(--[a-z-]+)"', path.read_text())}
    fields = {f"--{name.replace('_', '-')}" for kind in (Config, Launch)
              for name in kind.__dataclass_fields__}
    known |= fields | {f"--no-{name.removeprefix('--')}" for name in fields}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= known


def test_every_name_in_the_table_of_equations_exists():
    """The table of the method: each function beside an equation exists."""
    table = PAGES["docs/method.md"]
    modules = {"clorae.py": clorae, "losses.py": losses, "train.py": train}
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in table.split("\n"):
        for file, rest in re.findall(r"(clorae|losses|train)\.py ((?:`\w+`(?:, )?)+)", row):
            for name in re.findall(r"`(\w+)`", rest):
                module = modules[f"{file}.py"]
                owners = [module, *(v for v in vars(module).values() if isinstance(v, type))]
                method = name in clorae.METHODS
                assert method or any(hasattr(owner, name) for owner in owners), (file, name)
        for name in re.findall(r"`(test_\w+?)_?\.\.\.`", row):
            assert f"def {name}" in tests, name


def test_every_file_of_readmes_tree_exists_and_every_file_is_in_it():
    """The chapters and the folders of code, and every tool by its name."""
    tree = README[README.index("## Files"):README.index("How a row flows")]
    assert set(re.findall(r"^(\w+\.py)", tree, re.M)) == {path.name for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders <= set(re.findall(r"^(\w+)/", tree, re.M))
    commands = {name.removeprefix("tools.") for name in COMMANDS if name.startswith("tools.")}
    assert commands <= set(re.findall(r"\w+", tree[tree.index("tools/"):tree.index("tests/")]))
