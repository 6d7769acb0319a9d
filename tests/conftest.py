"""Shared ground of all tests: importable root, fixed seeds, a small world and a random backbone."""

import json
import os
import runpy
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits for the first

import torch

from side_by_side import pytest_runtestloop  # noqa: F401 - the hook by which pytest runs tests

ROOT = Path(__file__).resolve().parent.parent
REAL = os.environ.get("CLORAE_REALDATA")  # a folder of the published files, see test_convert.py
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a small demo world and of a random tiny T5 and ViT: {"data", "t5", "vit"}."""
    return make_small(tmp_path_factory.mktemp("small"))


def make_small(root: Path) -> dict[str, str]:
    """The same in a folder of one's choice."""
    import data
    import demo
    from engine.corpus import load_corpus, load_datasets
    from t5 import T5, T5Config
    from vision import ViT, ViTConfig
    world, t5, vit = root / "world", root / "t5", root / "vit"
    demo.make_world(world, seed=0, scale=0.04)
    datasets = load_datasets(world)
    texts = ["".join(data.prompt(record, datasets[record.dataset]))
             for record in load_corpus(world, "train")]
    t5.mkdir()
    demo.make_tokenizer(texts, t5 / "spiece.model", 300)
    torch.manual_seed(0)
    T5(T5Config(vocab_size=data.Tokenizer(t5).vocab_size + 100, d_model=32, d_kv=12, d_ff=48,
                num_layers=1, num_heads=2, dropout_rate=0.1, feed_forward_proj="gated-gelu",
                tie_head=False, scale_logits=False)).save_pretrained(t5)
    ViT(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                  image_size=16, patch_size=8)).save_pretrained(vit)
    return {"data": str(world), "t5": str(t5), "vit": str(vit)}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus made of every published file that is there."""
    from tools import convert
    root = tmp_path_factory.mktemp("published")
    for kind in convert.PUBLISHED:
        if (Path(REAL) / kind).is_dir() and kind != "m2e2":
            convert.convert(kind, Path(REAL) / kind, root)
    if all((Path(REAL) / name).is_dir() for name in ("m2e2", "extra")):
        convert.convert("m2e2_gold", linked_m2e2(tmp_path_factory.mktemp("gold")), root)
    return root if any(root.iterdir()) else pytest.skip("CLORAE_REALDATA holds no whole dataset")


def published_path(name: str) -> Path:
    """A file or folder below CLORAE_REALDATA, which need not hold every one; else a skip."""
    if not (path := Path(REAL) / name).exists():
        pytest.skip(f"CLORAE_REALDATA holds no {name}")
    return path


def linked_m2e2(folder: Path) -> Path:
    """M2E2's files, its detections and its text-only events, made of a copy without parses."""
    from tools import convert
    extra = published_path("extra")
    for path in (*published_path("m2e2").iterdir(), extra / convert.DETECTIONS):
        (folder / path.name).symlink_to(path)
    compact = extra / "m2e2_text_only_event_compact.json"
    (folder / "text_only_event.json").write_text(json.dumps([
        one | {"golden-event-mentions": [
            {"event_type": event["type"], "trigger": dict(zip(("start", "end"), event["trigger"])),
             "arguments": [dict(zip(("role", "start", "end"), argument))
                           for argument in event["arguments"]]} for event in one["events"]]}
        for one in json.loads(compact.read_text(encoding="utf-8"))]))
    return folder


@pytest.fixture(scope="session")
def lean(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A tokenizer that has % and >, as T5's, but neither < { } ~ nor letters with accents."""
    import data
    import demo
    path = tmp_path_factory.mktemp("lean") / "spiece.model"
    signs = string.ascii_letters + string.digits + "%>/,.&;:_?-"
    demo.make_tokenizer([f"person location attack phone write {' '.join(signs)}"], path, 300)
    return data.Tokenizer(path)


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clorae.cu with kernels and binding, compiled for the CPU."""
    from torch.utils import cpp_extension
    compiler, library = shutil.which("g++"), tmp_path_factory.mktemp("emulator") / "emulated.so"
    if compiler is None:
        pytest.skip("no g++ on this machine: the emulator cannot be compiled")
    line = [compiler, "-std=c++20", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared",
            "-DCLORAE_EMULATOR", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas",
            "-I", ROOT / "tests", *(f"-isystem{path}" for path in cpp_extension.include_paths()),
            "-x", "c++", ROOT / "fast" / "clorae.cu", "-o", library,
            *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="session")
def command(small: dict[str, str]) -> Callable[..., list[str]]:
    """command(out, *flags): the line that trains on the small world."""
    def line(out: Path, *flags: object, script: str = "train.py") -> list[str]:
        files = [word for name, folder in small.items() for word in (f"--{name}", folder)]
        return [sys.executable, str(ROOT / script), *files, "--max-target", "24",
                "--rank", "6", "--batch", "12", "--micro-batch", "4", "--out", str(out),
                *map(str, flags)]
    return line


# One thread per process: sums over threads would depend on how many there are.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def play(words: list[str]) -> None:
    """Run a script, or `-m` and a module, with its words as the interpreter would."""
    if words[0] == "-m":
        sys.modules.pop(words[1], None)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run(line: list[str], processes: int = 1,
        play: Callable[[list[str]], None] = play) -> subprocess.CompletedProcess:
    """Run a command to its end, in one process or in the world of several; its output is text.

    It is run in forks of this process, which has imported everything: half of the time of a short
    command is the importing of torch.
    """
    import torch._dynamo  # noqa: F401, a second's work that torch.optim would do in every fork
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    worlds = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(processes)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pids = []
        for world in worlds:
            pids.append(os.fork())
            if pids[-1] == 0:
                forked(partial(play, line[1:]), world, out.fileno(), err.fileno())
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        said = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(line, next(filter(None, codes), 0), *said)


def forked(play: Callable[[], None], world: dict[str, str], out: int, err: int) -> NoReturn:
    """The life of a forked process, with files for its output."""
    code = 1
    try:
        signal.alarm(300)
        os.chdir(ROOT)
        os.environ.update(ENVIRONMENT | world)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        play()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def sums(folder: Path) -> dict[str, bytes]:
    """Content of every file of every checkpoint of a run, and its logs without the clock."""
    found = {f"{path.parent.name}/{path.name}": path.read_bytes()
             for path in folder.glob("*-*/*")}
    rows = (folder / "metrics.csv").read_text().split("\n")
    found["metrics.csv"] = "\n".join(row.rpartition(",")[0] for row in rows).encode()
    return found | {name: (folder / name).read_bytes() for name in (
        "eval.jsonl", "table.txt", "predictions-test.jsonl", "scores-test.json")}


def descendants(pid: int) -> list[int]:
    """All processes below one: torchrun puts its workers into sessions of their own."""
    children = [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
                for word in (task / "children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]
