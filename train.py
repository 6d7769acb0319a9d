"""Train C-LoRAE, or one of the methods it is compared with, on one process or under torchrun.

    python train.py                                                 the demo, from nothing to table
    torchrun --nproc_per_node=4 train.py --size large --data DIR    the real run
    (the same line again)                                           resumes, or reprints the table

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303; `train_step` is Eq. (10), `finish_epoch` is Eq. (9).
The order of this file is the order of a run: what to run (Config), who runs (World), what is
needed (prepare), the model (build) and its trainable vector (FlatParameters), checkpoints and the
models they hold, the run itself (Run), what is said of it before it begins (describe, plan).

Exactness: the batches of an epoch are a function of (seed, epoch), the dropout masks of (seed,
step, micro-batch), and every normaliser counts the global batch.  So neither the number of
processes nor accumulation changes the loss, and a run that was killed ends as if it had not been,
bit for bit if it goes on with as many processes and threads (OMP_NUM_THREADS) as before.

Exit codes: 0 done; 2 a command, input or machine that cannot work, said in one `error:` sentence;
74 no checkpoint could be written, the disk is full; 130 and 143 stopped by Ctrl-C and SIGTERM, to
be resumed; 1 a crash, with its traceback.

Shapes: B rows, S source, T target and V visual tokens, D model width, H heads, K head width,
F image-feature width.
"""

import argparse
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import clorae
import data
import demo
import evaluate
import losses
from clorae import METHODS
from data import TASKS, UNITS
from t5 import T5, Stack, T5Config, WeightsError, captured, open_weights, pickles, read_json
from vision import UMIE, FeatureCache, ImageError, ViT, resolve_image

VIT = "google/vit-base-patch16-224-in21k"
HUB_FILES = ["model*.safetensors*", "*config.json", "spiece.model"]  # never pickled weights
HUB_GB = {"google/flan-t5-base": 1.0, "google/flan-t5-large": 3.1, "google/flan-t5-xl": 11.4,
          VIT: 0.35}  # 4 bytes a parameter
CHECKPOINTS_KEPT = 2
FAILED_SAVES = 3  # in a row, then the run ends
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REAL_PIECES = 4000  # vocabulary of a tiny backbone made from a real corpus
RUN_FILES = ("step-*", "best-*", "metrics.csv", "eval.jsonl", "table.txt", "predictions-*.jsonl",
             "scores-*.json")  # what a run writes into its folder


class UsageError(ValueError):
    """A command that cannot be carried out, with what to do instead."""


class DiskFull(UsageError):
    """No room for checkpoints."""

    exit_code = 74  # EX_IOERR


class Stopped(Exception):
    """A signal ended the run in good order; its number is the argument."""


# ---------------------------------------------------------------------------------------- Config

@dataclass(frozen=True)
class Size:
    """Defaults that come with a backbone; batch is global (paper: 10, 4, 2 a GPU on 4 GPUs)."""

    t5: str | None  # hub name; None: made locally by demo.py
    vit: str | None
    rank: int
    batch: int
    micro_batch: int
    epochs: int
    lr: float
    lr_epochs: int
    dropout: float
    max_target: int


SIZES = {"tiny": Size(None, None, 24, 32, 32, 3, 1e-3, 2, 0.0, 40),
         "base": Size("google/flan-t5-base", VIT, 128, 40, 10, 20, 1e-4, 5, 0.1, 192),
         "large": Size("google/flan-t5-large", VIT, 64, 16, 4, 20, 1e-4, 5, 0.1, 192),
         "xl": Size("google/flan-t5-xl", VIT, 64, 8, 2, 20, 1e-4, 5, 0.1, 192)}


def option(default: object, text: str, kind: type = str, **more: object) -> object:
    """A field that is also a command-line option: `kind` converts its argument, and a bool has
    none but a --no- form; `more` goes to argparse."""
    reads = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
    return field(default=default, metadata={"help": text, **reads, **more})


# What a number must be: in words, as a test, and the fields of Config that it holds for.
BOUNDS = (
    (f"at least {len(TASKS)}", lambda value: value >= len(TASKS), ("rank",)),
    ("at least 2", lambda value: value >= 2, ("max_source", "max_target")),
    ("at least 1", lambda value: value >= 1,
     ("epochs", "steps", "batch", "micro_batch", "lr_epochs", "save_every")),
    ("at least 0", lambda value: value >= 0,
     ("max_objects", "backbone_steps", "beta", "aml_gamma")),
    ("above 0", lambda value: value > 0, ("lr", "clip", "aml_margin")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("dropout", "backbone_dropout")))


@dataclass
class Config:
    """Everything that decides what a run computes; stored in its checkpoints."""

    size: str = option("tiny", "backbone size", choices=tuple(SIZES))
    method: str = option("clorae", "what is trained", choices=METHODS)
    egr: bool = option(True, "gate router between the experts, Eq. (6)", bool)
    mim: bool = option(True, "mutual-information loss, Eq. (5)", bool)
    data: str | None = option(None, "corpus folder (see data.py convert); default: the demo world",
                             metavar="DIR")
    units: list[str] | None = option(None, "train on these units only (" + ", ".join(UNITS)
                                     + "); default: all", nargs="+", choices=UNITS, metavar="UNIT")
    hold_out: str = option("none", "Table 4: never train on T17 and V2; 'clean' leaves out SNAP "
                           "and every training text of their test splits as well",
                           choices=("none", "paper", "clean"))
    missing_images: str = option("error", "'mask': rows whose image is missing train without one",
                                 choices=("error", "mask"))
    max_source: int = option(256, "source tokens; only the text part is cut", int)
    max_target: int | None = option(None, "target tokens; default: by size", int)
    max_objects: int = option(16, "object crops used per image", int)
    t5: str | None = option(None, "T5 folder; default: the size's own", metavar="DIR")
    vit: str | None = option(None, "ViT or CLIP folder; default: the size's own", metavar="DIR")
    backbone_steps: int | None = option(None, "steps to make the tiny T5 with; default: enough",
                                        int)
    rank: int | None = option(None, "universal rank R; default: by size", int)
    alpha: float | None = option(None, "numerator of the expert scale, Eq. (8); default: 2 R",
                                 float)
    dropout: float | None = option(None, "dropout on the experts' input; default: by size", float)
    visual_policy: str = option("train", "'train' the visual adapter in full; 'paper': of it only "
                                "the visual embedding; 'frozen': nothing of it (both need --init)",
                                choices=("train", "paper", "frozen"))
    init: str | None = option(None, "begin with the weights of this run of method full, which "
                              "holds a trained visual adapter; default: fresh ones", metavar="RUN")
    backbone_dropout: float | None = option(None, "dropout of T5 and the visual adapter; "
                                            "default: T5's own", float)
    fusion: str = option("gate", "how visual tokens meet the text", choices=("gate", "concat"))
    epochs: int | None = option(None, "epochs; default: by size", int)
    steps: int | None = option(None, "optimizer steps to stop after; default: by --epochs", int)
    batch: int | None = option(None, "global batch size; default: by size", int)
    micro_batch: int | None = option(None, "mean rows per forward pass; default: by size", int)
    lr: float | None = option(None, "Adam's learning rate; default: by size", float)
    lr_epochs: int | None = option(None, "halve the rate every so many epochs; default: by size",
                                   int)
    clip: float = option(1.0, "largest gradient norm", float)
    aml: bool | None = option(None, "achievement weights, Eq. (9); default: clorae only", bool)
    beta: float = option(0.01, "weight of the mutual-information loss, Eq. (10)", float)
    aml_margin: float = option(1.05, "margin above the reference F1, Eq. (9)", float)
    aml_gamma: float = option(2.0, "exponent, Eq. (9)", float)
    aml_reference: str | None = option(None, "JSON file {unit: reference F1}, p_m of Eq. (9); "
                                       "default: the demo's own, or the paper's", metavar="FILE")
    out: str | None = option(None, "run folder; default: runs/DATA-SIZE-METHOD", metavar="DIR")
    save_every: int = option(200, "optimizer steps between checkpoints", int)
    seed: int = option(0, "seed of initialisation, order and dropout", int)
    precision: str | None = option(None, "computation; default: bf16 on CUDA, fp32 elsewhere",
                                   choices=("fp32", "bf16"))
    impl: str = option("auto", "expert layers on PyTorch ('reference') or on clorae.cu ('cuda'); "
                       "'auto': on clorae.cu where it can be built",
                       choices=("auto", "reference", "cuda"))
    graphs: bool = option(False, "on a GPU, launch all kernels of a micro-batch at once, as a CUDA "
                          "graph for each of its shapes: for GPUs that wait for their host; takes "
                          "up to twice the memory of activations", bool)
    checkpoint_activations: bool = option(False, "keep only each block's input and compute the "
                                          "rest again: less memory, about a third more time", bool)

    def resolved(self) -> "Config":
        """The same with every default that depends on another field filled in."""
        size = SIZES[self.size]
        filled = {name: value for name, value in vars(size).items()
                  if name not in ("t5", "vit") and getattr(self, name) is None}
        if self.aml is None:
            filled["aml"] = self.method == "clorae"
        if self.precision is None:
            filled["precision"] = "bf16" if torch.cuda.is_available() else "fp32"
        if self.out is None:
            name = Path(self.data).resolve().name if self.data else "demo"
            filled["out"] = f"runs/{name}-{self.size}-{self.method}"
        return dataclasses.replace(self, **filled)

    def check(self) -> None:
        """Refuse numbers that cannot work, before anything slow has begun."""
        bad = [f"--{name.replace('_', '-')} {words}, got {value}"
               for words, holds, names in BOUNDS for name in names
               if (value := getattr(self, name)) is not None and not holds(value)]
        if self.visual_policy != "train" and (self.init is None or self.method == "full"):
            bad.append("--visual-policy other than train with --init RUN (a run of method full) "
                       f"and a method with experts, got --init {self.init}, --method "
                       f"{self.method}: a fresh adapter that is not trained shows nothing")
        if bad:
            raise UsageError(f"expected {'; '.join(bad)}; correct the command line")

    @property
    def uses_mim(self) -> bool:
        return self.method == "clorae" and self.mim and self.beta > 0


# The option groups of --help: each begins with the field named here.
GROUPS = {"size": "what to train", "data": "data", "t5": "model", "epochs": "optimisation",
          "aml": "losses", "out": "run"}


@dataclass(frozen=True)
class Launch:
    """What one start of a run needs besides its Config; nothing here changes what is computed."""

    resume: str = option("auto", "'auto' goes on with the newest checkpoint of --out, 'none' "
                         "starts over, a path names a checkpoint")
    allow_world_change: bool = option(False, "resume with another number of processes: the same "
                                      "batches, equal but for rounding", bool, action="store_true")
    timeout: float = option(300.0, "seconds that the processes wait for one that does not answer",
                            float)
    dry_run: bool = option(False, "find, make or fetch corpus and backbone, print files, "
                           "parameters, rows, steps and memory, and stop: no weight is loaded, "
                           "nothing is written to --out", bool, action="store_true")


def parse_arguments(argv: Sequence[str] | None) -> tuple[Config, Launch]:
    """The command line: one option per field of Config and of Launch."""
    parser = data.Parser(description=__doc__.split("\n\n")[0], usage="%(prog)s [options]")
    for spec in dataclasses.fields(Config) + dataclasses.fields(Launch):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        group.add_argument("--" + spec.name.replace("_", "-"), default=spec.default,
                           **spec.metadata)
    values = vars(parser.parse_args(argv))
    launch = Launch(**{spec.name: values.pop(spec.name) for spec in dataclasses.fields(Launch)})
    config = Config(**values).resolved()
    config.check()
    if not launch.timeout > 0:
        raise UsageError(f"expected --timeout above 0, got {launch.timeout}; correct it")
    return config, launch


# ----------------------------------------------------------------------------------------- World

class World:
    """The processes of this run: the one place that knows about ranks and signals."""

    def __init__(self, timeout: float = Launch.timeout) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun
        self.timeout = timeout
        self.signal = 0  # the one that asked this process to stop
        self.resting = False  # nothing would be lost if the process ended now
        self.heard = time.monotonic()  # when the processes last met
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise UsageError(f"--nproc_per_node: expected at most {count}, the number of GPUs, "
                                 f"got a process {local + 1}; start fewer")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)

    def join(self) -> None:
        """Meet the other processes; called once everything slow is prepared.

        torchrun (torch 2.13) keeps one store for all its restarts, and in it the addresses of
        processes that are gone: each restart gets a corner of its own.
        """
        if self.size > 1 and not dist.is_initialized():
            wait = timedelta(seconds=self.timeout)
            store, _, _ = next(dist.rendezvous("env://", timeout=wait))
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=wait,
                                    store=dist.PrefixStore(f"start {self.restarts}", store),
                                    rank=self.rank, world_size=self.size)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        self.heard = time.monotonic()
        return tensor

    def print(self, *lines: str) -> None:
        if self.main:
            print(*lines, sep="\n", flush=True)

    def listen(self) -> None:
        """From now on Ctrl-C and SIGTERM ask for a stop, which comes after the current step."""
        self.heard = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number: int, _: object) -> None:
        """A second signal ends the process at once, and so does one that comes because the others
        have waited for this process in vain."""
        hung = not self.resting and time.monotonic() - self.heard > self.timeout
        if self.signal or hung:
            os._exit(128 + number)
        self.signal = number
        if self.resting:
            raise Stopped(number)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Long work that can be begun again from what is on disk: a signal ends it at any line."""
        self.resting = True
        if self.signal:
            raise Stopped(self.signal)
        yield
        self.resting, self.heard = False, time.monotonic()


def verdict(problem: BaseException) -> tuple[int, str]:
    """Exit code and message of a command that ends with this exception."""
    match problem:
        case UsageError() | data.DataError() | ImageError() | WeightsError():
            return getattr(problem, "exit_code", 2), f"error: {problem}"
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
        case Stopped():
            return 128 + problem.args[0], ""
        case OSError() if problem.errno in NO_SPACE:
            return DiskFull.exit_code, f"error: {problem}; make room, run it again"
        case PermissionError() | IsADirectoryError() | NotADirectoryError():
            return 2, (f"error: {problem.filename}: expected a place that can be written to, got "
                       f"{problem.strerror}; name another one")
    return 1, "".join(traceback.format_exception(problem))


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with the exit code that this file's docstring promises, and its message.

    One of several processes ends by os._exit: a destructor might wait for the others.  Often all
    fail together, and the cause should be read once: whoever is not rank 0, or only has to say that
    another process is gone, waits a second, in which torchrun ends it before it speaks.
    """
    rank, alone = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1)) == 1
    lost = None  # the words that say that another process is gone
    try:
        yield
        return
    except BaseException as problem:
        if isinstance(problem, SystemExit) and not dist.is_initialized():
            raise  # argparse has spoken
        code, message = verdict(problem)
        if isinstance(problem, RuntimeError) and not alone:
            lost = re.search(r".*(gloo|NCCL|by peer|[Tt]imed out).*", str(problem))
        if lost:
            message = f"rank {rank}: another process has ended or does not answer: {lost[0]}"
    if not alone and message and (rank != "0" or lost):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(1)
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    if alone:
        sys.exit(code)
    os._exit(code)


# --------------------------------------------------------------------------------------- prepare

@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time do what the others then find done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel even if the holder is killed
        yield


def file_hash(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in hex."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()


def corpus_hash(corpus: Path) -> str:
    """sha256 over the rows and label sets of a corpus, in hex; images count by their names."""
    files = sorted(file for file in corpus.glob("*/*") if file.suffix in (".json", ".jsonl"))
    named = (f"{file.parent.name}/{file.name} {file_hash(file)}\n" for file in files)
    return hashlib.sha256("".join(named).encode()).hexdigest()


def hub_snapshots(name: str) -> list[Path]:
    """Folders of a hub model in the hub's cache on this machine, that of its main branch first."""
    from huggingface_hub import constants  # imported only when it is needed; knows HF_HOME
    repo = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
    main = repo / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return sorted(repo.glob("snapshots/*"), key=lambda folder: folder.name != commit)


def fault(folder: Path, part: str) -> str | None:
    """Why a model folder cannot be used, found without loading it; None if it can."""
    names = ["config.json"] + ["spiece.model"] * (part == "t5")
    lost = [name for name in names if not (folder / name).is_file()]
    if lost and folder.is_dir():
        return (f"{folder}: expected a whole model folder in Hugging Face's layout, it lacks "
                f"{', '.join(lost)}; fetch what is missing, or name another folder")
    try:
        open_weights(folder)  # headers only
    except WeightsError as problem:
        return str(problem)
    return None


def find_weights(part: str, given: str | Path | None, name: str | None) -> Path:
    """A whole model folder for "t5" or "vit": the one given; without it that of the hub's `name`
    in weights/, in the hub cache, or downloaded."""
    if given:
        if problem := fault(Path(given), part):
            raise UsageError(f"--{part}: {problem}")
        return Path(given)
    local = Path("weights", name.split("/")[-1])
    for folder in filter(Path.is_dir, (local, *hub_snapshots(name))):
        problem = fault(folder, part)
        if problem is None:
            return folder
        print(f"passed over: {problem}", file=sys.stderr)
    return download(part, name, local)


def download(part: str, name: str, local: Path) -> Path:
    """Fetch a hub model into the hub cache; where that fails, UsageError says what to fetch
    elsewhere and that `local` is a place for it."""
    from huggingface_hub import constants, snapshot_download
    patterns = HUB_FILES if part == "t5" else HUB_FILES[:-1]  # a ViT has no tokenizer
    size = f"about {HUB_GB[name]} GB"
    print(f"{name}: not on this machine, asking the hub ({size})", file=sys.stderr)
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        problem = fault(folder, part)
        if problem is None:
            return folder
    except Exception as cause:  # whatever the reason: the same remedy
        first = cause.__cause__ or cause
        problem = f"{type(first).__name__}: " + str(first).partition("\n")[0]
    raise UsageError(
        f"{name}: expected config.json, model.safetensors (or all its shards and their index)"
        f"{' and spiece.model' * (part == 't5')} in {local}/ or in the hub cache "
        f"({constants.HF_HUB_CACHE}), found no whole copy, and the download failed ({problem}); "
        f"name its folder with --{part} DIR, or fetch it ({size}) where there is a network, and "
        f"bring the folder here:\n    hf download {name} --local-dir {local} "
        + " ".join(f"--include '{pattern}'" for pattern in patterns))


@dataclass
class Sources:
    """Folders that a run reads."""

    corpus: Path
    t5: Path
    vit: Path
    init: Path | None = None  # checkpoint of a full run to begin with

    def fingerprints(self) -> dict[str, str | None]:
        """sha256 of what a checkpoint needs besides itself: it holds only what was trained."""
        return {"t5_sha256": folder_hash(self.t5), "vit_sha256": folder_hash(self.vit),
                "init_sha256": self.init and file_hash(self.init / "model.safetensors"),
                "t5_tokenizer_sha256": file_hash(self.t5 / "spiece.model")}


def prepare(config: Config) -> Sources:
    """Find, make or fetch the corpus and the backbone; the slow part of a first start."""
    with locked(Path("weights/.lock")):
        corpus = evaluate.corpus_of(config)
        if config.data is None and not corpus.exists():
            whole(corpus, demo.make_world)
        made, found, absent = None, [], []
        if config.size == "tiny" and not (config.t5 and config.vit):
            made = tiny_backbone(corpus, config)
        for part in ("t5", "vit"):
            try:
                found.append(find_weights(part, getattr(config, part) or made and made / part,
                                          getattr(SIZES[config.size], part)))
            except UsageError as problem:
                absent.append(str(problem))
    if absent:
        raise UsageError("\n".join(absent))
    return Sources(corpus, *found, find_checkpoint(Path(config.init)) if config.init else None)


def whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Let `make` fill a folder that appears under its name only once it is complete."""
    aside = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    make(aside)
    aside.rename(folder)


def tiny_backbone(corpus: Path, config: Config) -> Path:
    """The tiny T5 and ViT made from a corpus' training inputs, cached by their hash."""
    datasets = data.load_datasets(corpus)
    records = data.load_corpus(corpus, "train")
    texts = ["".join(data.prompt(record, datasets[record.dataset])) for record in records]
    tiny, steps = demo.Tiny(), config.backbone_steps
    if steps is not None:
        tiny = dataclasses.replace(tiny, steps=steps, vit_steps=min(steps, tiny.vit_steps))
    if config.data is not None:  # real text needs a larger vocabulary than the demo's
        tiny = dataclasses.replace(tiny, pieces=REAL_PIECES)
    digest = hashlib.sha256("\n".join([repr(tiny), *texts]).encode()).hexdigest()
    folder = Path("weights") / f"tiny-{digest[:8]}"
    if not folder.exists():
        labels = json.dumps([dataset.labels for dataset in datasets.values()])
        avoid = set(re.findall(r"\w+", labels))  # lessons never use a label as an answer
        whole(folder, lambda aside: demo.make_backbone(aside, texts, tiny=tiny, avoid=avoid))
    return folder


def read_splits(corpus: Path, datasets: dict[str, data.Dataset],
                units: Sequence[str] | None) -> dict[str, list[data.Record]]:
    """{split: its records of these units}, None for all; empty if no dataset of theirs has it."""
    wanted = set(units or UNITS)
    folders = [corpus / name for name, dataset in datasets.items()
               if wanted & set(dataset.units.values())]
    return {split: data.load_corpus(corpus, split, units)
            if any((folder / f"{split}.jsonl").exists() for folder in folders) else []
            for split in data.SPLITS}


def hold_out(records: dict[str, list[data.Record]], datasets: dict[str, data.Dataset],
             how: str) -> str | None:
    """Take Table 4's units out of the train and dev records, in place; what was done, in words.

    paper: T17 and V2.  clean: also SNAP, drawn from the same pool of tweets as T17, and every text
    of another dataset that stands in the test split of T17 or V2 (V1 holds 183 of T17's).
    """
    if how == "none":
        return None
    away = {"T17", "V2"} | ({"SNAP"} if how == "clean" else set())

    def unit(record: data.Record) -> str:
        return datasets[record.dataset].units[record.task]

    seen = data.texts_of(r for r in records["test"] if unit(r) in ("T17", "V2"))
    dropped = 0
    for split in ("train", "dev"):
        kept = [record for record in records[split] if unit(record) not in away]
        records[split] = [record for record in kept
                          if how == "paper" or data.normalised(record) not in seen]
        dropped += len(kept) - len(records[split])
    return (f"hold-out ({how}): {', '.join(u for u in UNITS if u in away)} neither in train nor in "
            f"dev; {dropped} more records left out, whose text is in the test split of T17 or V2")


def unit_rows(records: Sequence[data.Record], datasets: dict[str, data.Dataset]) -> dict[str, int]:
    """Rows per unit, in the order of the table."""
    names = [datasets[record.dataset].units[record.task] for record in records]
    return {unit: names.count(unit) for unit in UNITS if unit in names}


class Features:
    """Image features of records: what `data.collate` asks for.

    Returns (features [V,F], boxes [V,5]), or None for a record without an image.  A missing file is
    an error unless `missing_images` is "mask"; then its rows are counted and have no visual tokens.
    """

    def __init__(self, sources: Sources, records: Sequence[data.Record], missing_images: str,
                 max_objects: int, device: torch.device):
        self.corpus, self.max_objects = sources.corpus, max_objects
        self.paths: dict[tuple[str, str], Path] = {}
        named = [record for record in records if record.image is not None]
        absent = [record for record in named if not self.path(record).exists()]
        if absent and missing_images == "error":
            raise UsageError(
                f"images: expected a file for each of {len(named)} records, {len(absent)} are "
                f"missing, first {self.path(absent[0])} ({absent[0].source}); put the images "
                "there, or pass --missing-images mask to go on without them")
        self.missing = {self.path(record) for record in absent}
        self.missing_rows = len(absent)
        self.cache: FeatureCache | None = None
        self.width = ViT.feature_width(sources.vit)
        if len(absent) < len(named) and device.type != "meta":  # there nothing is computed
            vit = ViT.from_pretrained(sources.vit).to(device).eval()
            folder = sources.corpus / ".features"
            with locked(folder / ".lock"):
                self.cache = FeatureCache(vit, folder_hash(sources.vit), folder)
                self.compute([r for r in named if self.path(r) not in self.missing])

    def compute(self, records: Sequence[data.Record]) -> None:
        """Features of all these records' images; if one cannot be used, all such are named."""
        try:
            self.cache.prepare(map(self.key, records))
        except ImageError:
            problems = data.Problems()
            for record in records:
                try:
                    self.cache.pixels(self.key(record))
                except ImageError as problem:
                    problems.add(record.source, "image", str(problem))
            problems.raise_if_any()
            raise

    def path(self, record: data.Record) -> Path:
        """Where a record's image lies; looked up once, since that takes longer than to load its
        features."""
        name = record.dataset, record.image
        if name not in self.paths:
            try:
                folder = self.corpus / record.dataset / "images"
                self.paths[name] = resolve_image(folder, record.image)
            except ImageError as problem:
                raise ImageError(f"{record.source}: {problem}") from None
        return self.paths[name]

    def key(self, record: data.Record) -> tuple:
        return self.path(record), record.objects[:self.max_objects], record.size

    def __call__(self, record: data.Record) -> tuple[Tensor, Tensor] | None:
        if record.image is None or self.path(record) in self.missing:
            return None
        return self.cache.get(*self.key(record))


# ----------------------------------------------------------------------------------------- build

@dataclass
class Setup:
    """A model with everything that turns records into its input and its output into records."""

    config: Config
    sources: Sources
    datasets: dict[str, data.Dataset]
    tokenizer: data.Tokenizer
    model: UMIE


def build(config: Config, sources: Sources, device: torch.device) -> Setup:
    """The adapted model as its seed makes it: what is trained in fp32, a frozen backbone in the
    run's precision.  On the device "meta" it has names, shapes and types, and no weight is read.
    """
    meta, half = device.type == "meta", config.precision == "bf16" and config.method != "full"
    dtype = torch.bfloat16 if half else torch.float32
    t5 = outline(sources.t5, dtype) if meta else T5.from_pretrained(sources.t5, dtype=dtype)
    tokenizer, ids = data.Tokenizer(sources.t5), t5.config.vocab_size
    if tokenizer.spot_id >= ids:
        raise WeightsError(f"{sources.t5}: expected a spiece.model of at most {ids - 100} pieces "
                           f"for a T5 of {ids} ids, got {tokenizer.vocab_size} pieces; use the "
                           "files of one checkpoint")
    t5.graphs = config.graphs
    torch.manual_seed(config.seed)
    with device if meta else nullcontext():
        model = UMIE(t5, ViT.feature_width(sources.vit), config.max_objects, config.fusion)
    if sources.init is not None and not meta:
        start_from(model, sources.init)
    clorae.adapt(model, config.method, config.rank, TASKS, alpha=config.alpha,
                 dropout=config.dropout, egr=config.egr, mim=config.uses_mim)
    free_visual_adapter(model, config.visual_policy)
    if model.routing is not None and not meta:
        model.routing.impl = config.impl
        clorae.kernels(device, config.impl)  # built now, or refused now
    for module in model.modules():
        if isinstance(module, nn.Dropout) and config.backbone_dropout is not None:
            module.p = config.backbone_dropout
        if isinstance(module, Stack):
            module.recompute = config.checkpoint_activations
    return Setup(config, sources, data.load_datasets(sources.corpus), tokenizer, model.to(device))


def outline(folder: Path, dtype: torch.dtype) -> T5:
    """The T5 of a folder on the meta device; a head that is stored counts as untied."""
    raw, stored = read_json(folder / "config.json"), open_weights(folder)
    with torch.device("meta"):
        return T5(T5Config.from_hf(raw, folder, "lm_head.weight" not in stored)).to(dtype)


def start_from(model: UMIE, checkpoint: Path) -> None:
    """Give a model without experts the weights of a `full` run: the paper's experts sit on UMIE,
    whose visual adapter has been trained."""
    method = read_state(checkpoint)["config"]["method"]
    if method != "full":
        raise UsageError(f"--init {checkpoint}: expected a run of method full, whose checkpoint "
                         f"holds every weight, got method {method}; train one with --method full")
    load_trainables(model, checkpoint)


def free_visual_adapter(model: UMIE, policy: str) -> None:
    """Choose what learns besides the experts.

    train: everything but T5, in full, the linears below VStack's experts included; hub checkpoints
    have no visual adapter, and random frozen weights would be noise.  paper: the visual embedding
    alone, which fits the paper's counts.  frozen: nothing.
    """
    parts = {"train": ("visual_embedding.", "vstack.", "fusion."), "paper": ("visual_embedding.",),
             "frozen": ()}[policy]
    for name, parameter in model.named_parameters():
        if name.startswith(parts):
            parameter.requires_grad_(True)


class FlatParameters:
    """All trainable parameters as views of one vector, and their gradients of another.

    Optimizer, clipping and all-reduce are then one call each.  The vector has two slices: the
    variance vectors of L_MIM (`rho`) come last and learn at ten times the rate.
    """

    def __init__(self, model: nn.Module, lr: float):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        named.sort(key=lambda pair: pair[0].endswith(".rho"))  # stable: rho last
        self.values = torch.cat([p.detach().flatten() for _, p in named])
        self.grads = torch.zeros_like(self.values)
        self.shapes = {name: parameter.shape for name, parameter in named}
        for (_, parameter), value, grad in zip(named, self.views(self.values).values(),
                                               self.views(self.grads).values()):
            parameter.data, parameter.grad = value, grad
        experts = sum(p.numel() for n, p in named if not n.endswith(".rho"))
        groups = []
        for part, rate in ((slice(0, experts), 1.0), (slice(experts, None), 10.0)):
            vector = nn.Parameter(self.values[part])
            vector.grad = self.grads[part]
            if len(vector):
                groups.append({"params": [vector], "lr": lr * rate, "rate": rate})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector over all parameters as {name: tensor of that parameter's shape}."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]

    def save(self, folder: Path) -> None:
        """Write model.safetensors and optimizer.safetensors, every tensor under its own name."""
        def owned(flat: Tensor) -> dict[str, Tensor]:
            return {name: view.clone() for name, view in self.views(flat.cpu()).items()}
        save_file(owned(self.values), folder / "model.safetensors")
        states = [self.optimizer.state[g["params"][0]] for g in self.optimizer.param_groups]
        save_file({f"{moment}.{name}": value for moment in ("exp_avg", "exp_avg_sq")
                   for name, value in owned(torch.cat([s[moment] for s in states])).items()},
                  folder / "optimizer.safetensors")

    def load_moments(self, folder: Path, step: int) -> None:
        """Restore Adam's moments after `step` steps."""
        saved = load_file(folder / "optimizer.safetensors", device=str(self.values.device))
        flat = {moment: torch.cat([saved[f"{moment}.{name}"].flatten() for name in self.shapes])
                for moment in ("exp_avg", "exp_avg_sq")}
        start = 0
        for group in self.optimizer.param_groups:
            vector, = group["params"]
            part = slice(start, start + len(vector))
            self.optimizer.state[vector] = {
                "step": torch.tensor(float(step), device=vector.device),
                **{moment: values[part].clone() for moment, values in flat.items()}}
            start = part.stop


class Graphs:
    """Micro-batches as CUDA graphs: one for each shape that comes a second time, up to MOST.

    A graph launches thousands of kernels at once, where the host takes longer to launch them one by
    one than a GPU takes to run small ones.  It reads and writes where it did when it was captured:
    a batch is copied there before.
    """

    MOST = 64

    def __init__(self, compute: Callable[[data.Batch, Tensor], Tensor],
                 device: torch.device) -> None:
        self.compute, self.device = compute, device
        self.seen: set[tuple] = set()  # shapes
        self.graphs: dict[tuple, tuple] = {}  # shape -> where it reads, graph, answer
        self.pool = torch.cuda.graph_pool_handle()  # memory of all: no two run at once

    def __call__(self, batch: data.Batch, numbers: Tensor) -> Tensor:
        """What `compute` makes of a batch, which is on the CPU; valid until the next call."""
        inputs = [*vars(batch).values(), numbers]
        shape = tuple(some.shape for some in inputs)
        if shape in self.seen and shape not in self.graphs and len(self.graphs) < self.MOST:
            held = self.there(inputs)
            self.graphs[shape] = held, *captured(lambda: self.of(held), self.pool)
        if shape not in self.graphs:  # what torch prepares at first use, a graph must find prepared
            self.seen.add(shape)
            return self.of(self.there(inputs))
        held, graph, sums = self.graphs[shape]
        for place, now in zip(held, inputs):
            place.copy_(now, non_blocking=True)
        graph.replay()
        return sums

    def there(self, inputs: list[Tensor]) -> list[Tensor]:
        """Copies on the GPU, of the tasks as well."""
        return [some.to(self.device, non_blocking=True) for some in inputs]

    def of(self, inputs: list[Tensor]) -> Tensor:
        """`compute` from the fields of a batch and its numbers."""
        *fields, numbers = inputs
        return self.compute(data.Batch(*fields), numbers)


# ------------------------------------------------------------------------------------ checkpoints

@dataclass
class Progress:
    """Where a run stands: stored as state.json in every checkpoint, without any clock time."""

    step: int = 0
    epoch: int = 0  # current epoch, from 0
    cursor: int = 0  # global batches of this epoch that are done
    weights: dict[str, float] = field(default_factory=dict)  # AML weights of this epoch
    history: list[dict] = field(default_factory=list)  # per epoch: dev F1 and the weights it gave
    best_sum: float = -1.0  # highest sum of dev F1
    best_step: int = 0


def write_checkpoint(folder: Path, flat: FlatParameters, state: dict) -> None:
    """Write a checkpoint aside, force it to disk, then rename: whole or not there at all."""
    aside = folder.with_name("." + folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        flat.save(aside)
        digests = {file.name: file_hash(file) for file in sorted(aside.iterdir())}
        for file in aside.iterdir():
            sync(file)
        write_state(aside, state, digests)
        for file in aside.glob("*.safetensors"):  # which that library lets only its owner read
            shutil.copymode(aside / "state.json", file)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk, its space is needed
        raise
    if folder.exists():
        discard(folder)  # broken, or made again after a kill
    aside.rename(folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint, whole or not at all: under its own name it is never half there."""
    aside = folder.with_name("." + folder.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_state(folder: Path, state: dict, digests: dict[str, str]) -> None:
    """Put state.json, or a newer one, into a checkpoint folder; one rename, so never half of it."""
    aside = folder / ".state.json.writing"
    digests = {**digests, "state.json": state_hash({**state, "sha256": digests})}
    text = json.dumps({**state, "sha256": digests}, indent=1) + "\n"
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.rename(folder / "state.json")
    sync(folder)


def state_hash(state: dict) -> str:
    """sha256 of a state without the digest of itself, in hex."""
    files = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    return hashlib.sha256(json.dumps({**state, "sha256": files}).encode()).hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint whose files are all whole; UsageError otherwise."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        broken = [name for name, digest in state["sha256"].items() if digest != (
            state_hash(state) if name == "state.json" else file_hash(folder / name))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise UsageError(f"{folder}: expected a checkpoint folder with state.json and the files it "
                         f"lists, got {type(cause).__name__}: {cause}; name another one") from cause
    if broken:
        raise UsageError(f"{folder}/{broken[0]}: expected the content whose sha256 state.json "
                         "records, got another; name another checkpoint, or none to let an older "
                         "one be used")
    return state


def newest_checkpoint(run: Path, prefix: str = "step") -> Path | None:
    """The last whole checkpoint of a run folder; broken ones are named and passed over."""
    for folder in sorted(run.glob(f"{prefix}-*"), reverse=True):
        try:
            read_state(folder)
            return folder
        except UsageError as problem:
            print(f"passed over: {problem}", file=sys.stderr)
    return None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is, or the best one of a run folder."""
    if (path / "state.json").exists():
        return path
    best = newest_checkpoint(path, "best") or newest_checkpoint(path)
    if best is None:
        other = pickles(path.parent if path.is_file() else path)
        found = "no checkpoint in it" if path.exists() else "nothing there"
        raise UsageError(f"{path}: expected a run folder or a checkpoint folder, found {found}; "
                         f"{other}train first, or name a folder below runs/")
    return best


def stored_config(checkpoint: Path, **changes: object) -> Config:
    """The settings of a checkpoint; an exported adapter brings its datasets' labels along."""
    config = dataclasses.replace(Config(**read_state(checkpoint)["config"]), **changes)
    if config.data is None and (checkpoint / "corpus").is_dir():
        config.data = str(checkpoint / "corpus")
    return config


def stored_sources(checkpoint: Path, config: Config, given: Mapping[str, object]) -> Sources:
    """The folders that a checkpoint was trained on: those given now ("t5", "vit", "init"), else
    where they lay then, else by hash in weights/ (tiny) or by name from the hub (other sizes).
    UsageError unless each has the very content it had then."""
    state, folders = read_state(checkpoint), {}
    for part in ("t5", "vit", "init"):
        digest, then = state.get(f"{part}_sha256"), state.get(part)
        if digest is None:  # a run without --init
            continue
        folder = given.get(part) or (then if then and Path(then).is_dir() else None)
        name = getattr(SIZES[config.size], part, None)
        if not folder and not name:
            folder = next((made for made in sorted(Path("weights").glob(f"*/{part}"))
                           if folder_hash(made) == digest), None)
            if not folder:
                raise UsageError(f"{checkpoint}: expected the folder of its {part} (sha256 "
                                 f"{digest[:12]}), got {then or 'none'}; name it with --{part} DIR")
        folders[part] = (find_checkpoint(Path(folder)) if part == "init"
                         else find_weights(part, folder, name))
    sources = Sources(evaluate.corpus_of(config), **folders)
    for name, digest in sources.fingerprints().items():
        if state.get(name, digest) != digest:
            part, _, what = name.removesuffix("_sha256").partition("_")
            raise UsageError(f"{getattr(sources, part)}: expected the {what or 'weights'} that "
                             f"{checkpoint} was trained on (sha256 {state[name][:12]}), got others "
                             f"({digest[:12]}); restore that folder, or name it with --{part} DIR")
    return sources


def load_model(checkpoint: Path, device: torch.device, **changes: object) -> Setup:
    """Rebuild the model of a checkpoint folder from what the checkpoint itself says.

    changes: Config fields that may differ in evaluation (data, missing_images, and where the
    backbone lies: t5, vit, init).  Raises UsageError if the backbone is not the one trained on, or
    a tensor does not fit.
    """
    config = stored_config(checkpoint, **changes)
    setup = build(config, stored_sources(checkpoint, config, changes), device)
    load_trainables(setup.model, checkpoint)
    return setup


def load_trainables(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's tensors into the trainable parameters; names and shapes must agree."""
    saved = load_file(checkpoint / "model.safetensors")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    both = sorted(saved.keys() & wanted.keys())
    odd = [name for name in both if saved[name].shape != wanted[name].shape]
    odd += sorted(saved.keys() ^ wanted.keys())
    if odd:
        name = odd[0]
        shapes = [list(side[name].shape) if name in side else "nothing" for side in (wanted, saved)]
        raise UsageError(f"{checkpoint}/model.safetensors: {name}: expected {shapes[0]}, got "
                         f"{shapes[1]} ({len(odd)} tensors differ); use the rank, tasks, method "
                         "and backbone that the checkpoint was made with")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def claim(out: Path) -> TextIO:
    """Hold a run folder until this process ends, however it ends, or until the file is closed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as cause:
        raise UsageError(f"--out {out}: expected a folder that can be written to, got "
                         f"{'a file' if out.is_file() else cause.strerror}; choose another --out"
                         ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"--out {out}: expected a run folder that no other process writes to, got "
                         "one in use; wait for that run, end it, or use another --out") from None
    return lock


def append(path: Path, text: str) -> None:
    """Append to a file, all of it or, where the disk is full, nothing."""
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if file.write(content) != len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# ------------------------------------------------------------------------------------------ a run

class Run:
    """One training run: its model, data, progress and files."""

    def __init__(self, config: Config, sources: Sources, world: World, dry: bool = False):
        self.config, self.world, self.out = config, world, Path(config.out)
        device = torch.device("meta") if dry else world.device
        self.setup = build(config, sources, device)
        self.model, self.routing = self.setup.model, self.setup.model.routing
        self.flat = None if dry else FlatParameters(self.model, config.lr)
        self.layers = len(clorae.expert_layers(self.model))
        self.records = read_splits(sources.corpus, self.setup.datasets, config.units)
        self.held_out = hold_out(self.records, self.setup.datasets, config.hold_out)
        self.features = Features(sources, sum(self.records.values(), []), config.missing_images,
                                 config.max_objects, device)
        self.splits = {split: data.encode_records(records, self.setup.datasets,
                                                  self.setup.tokenizer, config.max_source,
                                                  config.max_target, world.print)
                       for split, records in self.records.items()}
        self.examples = self.splits["train"]
        if not self.examples:
            raise UsageError(f"{sources.corpus}: expected training records, found no train.jsonl "
                             "with any; convert a dataset that has a train split, or choose other "
                             "--units or --hold-out")
        self.units = list(unit_rows(self.records["train"], self.setup.datasets))
        self.reference = self.references()
        self.progress = Progress(weights=dict.fromkeys(self.units, 1.0))
        self.graphs = Graphs(self.gradients, world.device) if self.captures() else None
        if self.graphs is not None:
            self.routing.stay = True
        self.stopping = False  # some process was asked to stop
        self.unsaved: set[int] = set()  # steps since the last checkpoint that could not be written
        self.unlogged = ""  # rows for which metrics.csv had no room
        self.on_disk: Path | None = None  # the newest checkpoint of this run that is whole
        if config.fusion == "gate" and sources.init is None and not dry:
            self.open_gate()
        self.origin = {"t5": str(sources.t5), "vit": str(sources.vit),
                       "init": sources.init and str(sources.init), **sources.fingerprints(),
                       "corpus_sha256": corpus_hash(sources.corpus)}

    def captures(self) -> bool:
        """Whether micro-batches become CUDA graphs; UsageError where they cannot."""
        config, device = self.config, self.world.device
        if not config.graphs:
            return False
        kernels = config.method in clorae.FUSED and clorae.kernels(device, config.impl) is not None
        if not (device.type == "cuda" and kernels):
            raise UsageError(f"--graphs: expected a GPU, clorae.cu compiled for it and a method of "
                             f"{', '.join(clorae.FUSED)}, got device {device}, method "
                             f"{config.method} on {'clorae.cu' if kernels else 'PyTorch'}; leave "
                             "--graphs away")
        if config.checkpoint_activations:
            raise UsageError("--graphs: expected no --checkpoint-activations beside it, whose "
                             "second pass cannot be captured; leave one of them away")
        return True

    def collate(self, indices: list[int]) -> data.Batch:
        return data.collate([self.examples[i] for i in indices], self.features, self.features.width)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16,
                              enabled=self.config.precision == "bf16")

    @torch.no_grad()
    def open_gate(self) -> None:
        """Turn the fusion gate's fresh projections to the side that lets gradients through.

        Judged by the first rows of the first epoch that have an image.
        """
        shown = (i for i in itertools.chain(*self.batches(0))
                 if self.features(self.examples[i].record) is not None)
        if rows := list(itertools.islice(shown, self.config.micro_batch)):
            self.model.eval()
            with self.autocast():
                self.model.open_gate(self.collate(rows).to(self.world.device))

    def references(self) -> dict[str, float]:
        """p_m of Eq. (9) for every unit; UsageError if a trained unit has none."""
        given = self.config.aml_reference
        if given is None:
            return demo.P_M if self.config.data is None else losses.SINGLE_TASK_F1
        try:
            stored = json.loads(Path(given).read_text(encoding="utf-8"))
            found = {unit: float(stored.get(unit, 0)) for unit in self.units}
            lost = [unit for unit in self.units if not found[unit] > 0]
        except (OSError, ValueError, TypeError, AttributeError) as cause:
            found, lost = {}, [f"(unreadable: {cause})"]
        if lost:
            raise UsageError(f"{given}: expected a JSON object with a positive F1 for each of "
                             f"{', '.join(self.units)}, got none for {', '.join(lost)}; add them")
        return found

    def batches(self, epoch: int) -> list[list[int]]:
        return data.global_batches(self.examples, self.config.seed, epoch, self.config.batch)

    # ---------------------------------------------------------------- checkpoints and resume

    def state(self) -> dict:
        """What state.json holds; dropout needs no more than the seed and the step to go on."""
        config = {name: value for name, value in dataclasses.asdict(self.config).items()
                  if name not in ("out", "save_every", "impl")}  # they change no mathematics
        return {"config": config, **dataclasses.asdict(self.progress), "world": self.world.size,
                "rng": {"seed": self.config.seed, "next_step": self.progress.step},
                "reference": {unit: self.reference[unit] for unit in self.units}, **self.origin}

    def save(self, prefix: str = "step") -> bool:
        """Write a checkpoint of this moment; all processes learn whether that worked.

        A full disk costs this checkpoint, not the run, unless it stays full.
        """
        folder = self.out / f"{prefix}-{self.progress.step:08d}"
        failed = torch.zeros(1, device=self.world.device)
        if self.world.main:
            try:
                self.write(folder)
            except (OSError, SafetensorError) as cause:
                failed += 1
                print(f"error: {folder}: expected to write a checkpoint, got {cause}; the ones "
                      "before it are whole and training goes on: make room", file=sys.stderr,
                      flush=True)
        if not self.world.sum(failed).item():
            self.unsaved.clear()
            if prefix == "step":
                self.on_disk = folder
            return True
        self.unsaved.add(self.progress.step)
        if len(self.unsaved) == FAILED_SAVES:
            raise DiskFull(f"{self.out}: expected room for a checkpoint, got none at steps "
                           f"{', '.join(map(str, sorted(self.unsaved)))}; make room, then the same "
                           "command goes on from the last checkpoint")
        return False

    def write(self, folder: Path) -> None:
        """Write `folder`, or its state alone if the weights are in it already; drop older ones."""
        if folder == self.on_disk:
            digests = json.loads((folder / "state.json").read_text(encoding="utf-8"))["sha256"]
            write_state(folder, self.state(), digests)
        else:
            write_checkpoint(folder, self.flat, self.state())
        prefix = folder.name.split("-")[0]
        kept = CHECKPOINTS_KEPT if prefix == "step" else 1
        alike = sorted(self.out.glob(f"{prefix}-*"))
        end = alike.index(folder) + 1
        for old in alike[:max(end - kept, 0)] + alike[end:]:  # later ones are broken or abandoned
            discard(old)

    def check_room(self) -> None:
        """Refuse a disk that could not hold the checkpoints, before anything was computed."""
        size = 3 * self.flat.values.nbytes  # with Adam's two moments
        there = len([*self.out.glob("step-*"), *self.out.glob("best-*")])
        needed = size * max(CHECKPOINTS_KEPT + 2 - there, 1)  # the best one, one being written
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise DiskFull(f"{self.out}: expected {needed / 1e6:,.1f} MB of free disk for "
                           f"checkpoints of {size / 1e6:,.1f} MB, got {free / 1e6:,.1f} MB; make "
                           "room, or choose an --out on another disk")

    def resume(self, launch: Launch) -> str:
        """Go on from a checkpoint; returns the line that says what was found."""
        anew = launch.resume == "none" and not self.world.restarts
        if self.world.main:
            names = (".step-*", ".best-*", *RUN_FILES * anew)  # the hidden ones are left by kills
            for old in (path for name in names for path in self.out.glob(name)):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        if anew:
            return "start: from the beginning (--resume none)"
        found = (newest_checkpoint(self.out) if launch.resume in ("auto", "none")
                 else Path(launch.resume))
        if found is None:
            self.restore_logs()
            return f"start: from the beginning, no checkpoint in {self.out}"
        state = read_state(found)
        self.check_same(state, found, launch.allow_world_change)
        load_trainables(self.model, found)
        self.flat.load_moments(found, state["step"])
        self.progress = Progress(**{f.name: state[f.name] for f in dataclasses.fields(Progress)})
        if found.resolve().parent == self.out.resolve():
            self.on_disk = self.out / found.name
        else:
            self.bring_best(found.resolve().parent)
        self.restore_logs()
        return f"start: resumed {found} at step {state['step']}, epoch {state['epoch'] + 1}"

    def bring_best(self, run: Path) -> None:
        """A run that goes on in another folder takes its best checkpoint along; if that is gone,
        the best is sought anew."""
        best = run / f"best-{self.progress.best_step:08d}"
        if not best.is_dir():
            self.progress.best_sum, self.progress.best_step = -1.0, 0
        elif self.world.main and not (self.out / best.name).exists():
            whole(self.out / best.name, lambda aside: shutil.copytree(best, aside))
        self.world.sum(torch.zeros(1, device=self.world.device))  # nobody looks before it is there

    def check_same(self, state: dict, found: Path, any_world: bool) -> None:
        """A run may only go on with the settings, references and weights that it began with; an
        option that did not exist then had its default."""
        mine = json.loads(json.dumps(self.state()))
        fixed = [*mine["config"], "reference", *(name for name in mine if name.endswith("_sha256"))]
        was, now = ({**dataclasses.asdict(Config()), **some, **some["config"]}
                    for some in (state, mine))
        changed = [f"{name} {was.get(name)} -> {now[name]}" for name in fixed
                   if was.get(name) != now[name]]
        if changed:
            raise UsageError(f"{found}: expected the settings it was started with, got changes: "
                             f"{', '.join(changed)}; repeat the old command, or use another --out, "
                             "or --resume none to start over")
        world = state["world"]
        if world != self.world.size and not any_world:
            raise UsageError(f"{found}: expected {world} process(es), as it was started with, got "
                             f"{self.world.size}; use torchrun --nproc_per_node={world}, or pass "
                             "--allow-world-change to go on with the same batches but another "
                             "order of sums, no longer bit for bit")

    def restore_logs(self) -> None:
        """Let the logs say what the checkpoint knows, so that no step appears twice."""
        if not self.world.main:
            return
        path = self.out / "metrics.csv"
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be torn
            kept = [line + "\n" for line in lines if line.startswith("step,")
                    or int(line.split(",")[0]) <= self.progress.step]
            evaluate.write_whole(path, "".join(kept))
        self.write_history()

    def write_history(self) -> None:
        path = self.out / "eval.jsonl"
        lines = [json.dumps(entry) + "\n" for entry in self.progress.history]
        if lines or path.exists():
            evaluate.write_whole(path, "".join(lines))

    # ---------------------------------------------------------------- training

    def train_step(self, indices: list[int]) -> dict[str, float]:
        """One optimizer step on one global batch of examples; the heart of the method."""
        sums = torch.zeros(4 + 2 * len(UNITS), dtype=torch.float64, device=self.world.device)
        self.flat.grads.zero_()
        if not self.model.training:  # an evaluation was before this step
            self.model.train()
        parts = data.micro_batches(indices, self.examples, self.config.micro_batch)
        for part, rows in enumerate(parts):
            if part % self.world.size == self.world.rank:
                sums[:-1] += self.backward(rows, part, indices)
        sums[-1:] = self.world.signal
        norm = self.world.sum(self.flat.grads).norm()[None]
        numbers = torch.cat([self.world.sum(sums), norm]).tolist()  # the only wait for a GPU
        *sums, stop, length = numbers
        self.stopping = stop > 0  # for all processes at the same step
        return self.update(sums, norm, length, indices)

    def backward(self, rows: list[int], part: int, indices: list[int]) -> Tensor:
        """Add the gradients of one micro-batch of the global batch `indices`; its `unit_sums`."""
        config, progress, device = self.config, self.progress, self.world.device
        tokens = sum(len(self.examples[i].labels) for i in indices)
        numbers = torch.tensor([*(progress.weights.get(unit, 0.0) for unit in UNITS), tokens,
                                len(indices)])
        torch.manual_seed(hash((config.seed, progress.step, part)))  # of integers: always equal
        batch = self.collate(rows)
        if self.graphs is not None:
            return self.graphs(batch.widened(1 + config.max_objects), numbers)
        return self.gradients(batch.to(device), numbers.to(device, non_blocking=True))

    def gradients(self, batch: data.Batch, numbers: Tensor) -> Tensor:
        """The same from its tensors: what a CUDA graph repeats for other batches of such shapes.
        numbers: each unit's weight, then target tokens and rows of the global batch."""
        config = self.config
        w, tokens, B = numbers[:-2], numbers[-2], numbers[-1]
        if self.routing is not None:
            self.routing.mim_batch = B if config.uses_mim else None
        with self.autocast():
            hidden = self.model.hidden(batch)
            ce = losses.token_cross_entropy(hidden, batch.labels, self.model.t5.head,
                                            real=batch.real)  # [B]
        L_MT = (w[batch.units] * ce).sum() / tokens  # each row weighs as much as its unit
        L_MIM = (losses.mutual_information(self.routing.moments(), self.layers) if config.uses_mim
                 else torch.zeros_like(L_MT))
        loss = L_MT + config.beta * L_MIM  # Eq. (10)
        loss.backward()
        return unit_sums(torch.stack([loss, L_MT, L_MIM]), ce, batch)

    def not_finite(self, loss: float, norm: float, indices: list[int]) -> UsageError:
        """What to say of a batch that cannot be learnt from: which of its rows, each tried alone,
        have a loss or a gradient that is not finite."""
        guilty = []
        for i in indices:
            self.flat.grads.zero_()
            sums = self.backward([i], 0, indices)
            if not (sums[0].isfinite() and self.flat.grads.norm().isfinite()):
                record = self.examples[i].record
                guilty.append(f"{record.id} ({record.source})")
        which = ", ".join(guilty[:5]) + ", ..." * (len(guilty) > 5) or "none of its rows alone"
        advice = "look at these rows" if 0 < len(guilty) < len(indices) else "lower --lr"
        return UsageError(
            f"step {self.progress.step + 1}: expected a finite loss and gradient, got loss {loss} "
            f"and gradient norm {norm} from {len(guilty)} of the batch's {len(indices)} rows: "
            f"{which}; no weight was changed and the last checkpoint is whole: {advice}, then the "
            "same command goes on")

    def update(self, sums: list[float], norm: Tensor, length: float,
               indices: list[int]) -> dict[str, float]:
        """Clip, step and report; what is not finite stops the run before the step.  The gradient's
        norm comes on the device and as a number."""
        if not (math.isfinite(length) and math.isfinite(sums[0])):
            raise self.not_finite(sums[0], length, indices)
        self.flat.grads.mul_((self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        lr = self.config.lr * 0.5 ** (self.progress.epoch // self.config.lr_epochs)
        self.flat.set_lr(lr)
        self.flat.optimizer.step()
        self.progress.step += 1
        self.progress.cursor += 1
        ce, count = sums[3:3 + len(UNITS)], sums[3 + len(UNITS):]
        row = {"step": self.progress.step, "epoch": self.progress.epoch + 1, "loss": sums[0],
               "L_MT": sums[1], "L_MIM": sums[2], "lr": lr, "grad_norm": length}
        return row | {f"CE_{u}": ce[i] / count[i] if count[i] else math.nan
                      for i, u in enumerate(UNITS) if u in self.units}

    def train(self) -> None:
        """All epochs from where the run stands to its end, best checkpoint kept apart."""
        config, progress = self.config, self.progress
        limit = config.steps or math.inf
        while progress.epoch < config.epochs and progress.step < limit:
            batches = self.batches(progress.epoch)
            with tqdm(total=len(batches), initial=progress.cursor, disable=not self.world.main,
                      desc=f"epoch {progress.epoch + 1}/{config.epochs}", mininterval=1.0) as bar:
                while progress.cursor < len(batches) and progress.step < limit:
                    self.step(batches[progress.cursor], bar)
            self.finish_epoch()

    def step(self, indices: list[int], bar: tqdm) -> None:
        """One step, logged and shown, saved when it is time or when someone wants to stop."""
        started = time.perf_counter()
        row = self.train_step(indices)
        self.log(row | {"seconds": time.perf_counter() - started})
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}", refresh=False)
        if self.stopping or self.progress.step % self.config.save_every == 0:
            self.save()
        if self.stopping:
            raise Stopped(self.world.signal or signal.SIGTERM)

    def finish_epoch(self) -> None:
        """Dev F1, the weights of the next epoch by Eq. (9), the best checkpoint, the next epoch."""
        progress = self.progress
        self.save()  # a run that ends while it evaluates has only that to repeat
        with self.world.rest():
            f1 = self.dev_f1()
        if self.config.aml:
            progress.weights = losses.achievement_weights(  # w_t^m of Eq. (9), for the next epoch
                f1, self.reference, self.config.aml_margin, self.config.aml_gamma)
        progress.history.append({"epoch": progress.epoch + 1, "step": progress.step, "f1": f1,
                                 "weights": progress.weights})
        before = progress.best_sum, progress.best_step
        better = sum(f1.values()) > progress.best_sum
        better |= not self.splits["dev"]  # nothing tells the epochs apart: the last one is taken
        if better:
            progress.best_sum, progress.best_step = sum(f1.values()), progress.step
        progress.epoch, progress.cursor = progress.epoch + 1, 0
        if better and not self.save("best"):
            progress.best_sum, progress.best_step = before
        if self.save() and self.world.main:
            self.write_history()
        self.world.print("  dev F1  " + "  ".join(f"{u} {v:.1f}" for u, v in f1.items())
                         + f"  mean {sum(f1.values()) / len(f1):.1f}")
        if self.config.aml:
            self.world.print("  weights " + "  ".join(f"{u} {v:.2f}" for u, v
                                                      in progress.weights.items()))

    def evaluate(self, split: str) -> list[evaluate.Row]:
        """Decode and score a split, shared among the processes; every one returns all rows."""
        return evaluate.evaluate_split(
            self.model, self.splits[split], self.setup.datasets, self.features,
            self.setup.tokenizer, self.world.device, evaluate.Decoding.of(self.config),
            self.world.rank, self.world.size)

    def dev_f1(self) -> dict[str, float]:
        """F1 in % on the dev split of every trained unit: s_t^m of Eq. (9).

        A unit without dev rows stays at 0 and says so at the start.
        """
        f1 = evaluate.unit_f1(evaluate.total(self.evaluate("dev")))
        return {unit: f1.get(unit, 0.0) for unit in self.units}

    def test(self) -> str:
        """The table of the test split with the best checkpoint; also written to the run folder."""
        best = find_checkpoint(self.out)
        load_trainables(self.model, best)
        with self.world.rest():
            rows = self.evaluate("test")
        text = evaluate.table(evaluate.total(rows), self.setup.datasets)
        if self.world.main:
            evaluate.save_predictions(self.out / "predictions-test.jsonl", rows)
            evaluate.save_scores(self.out / "scores-test.json", rows, best, self.config, "test")
            evaluate.write_whole(self.out / "table.txt", text + "\n")
        return text

    def log(self, row: dict[str, float]) -> None:
        """Append one row to metrics.csv at once, so that a kill loses none.

        Where the disk is full, rows wait in memory until it has room again.
        """
        if not self.world.main:
            return
        path, waiting = self.out / "metrics.csv", bool(self.unlogged)
        if not waiting and not (path.exists() and path.stat().st_size):
            self.unlogged = ",".join(row) + "\n"
        self.unlogged += ",".join(map(str, row.values())) + "\n"
        try:
            append(path, self.unlogged)
            self.unlogged = ""
        except OSError as cause:
            if not waiting:
                print(f"error: {path}: expected to append a row, got {cause}; training goes on and "
                      "the rows are kept in memory: make room", file=sys.stderr, flush=True)


def unit_sums(totals: Tensor, ce: Tensor, batch: data.Batch) -> Tensor:
    """[3 + 2 * units] float64: the three losses, then per unit the summed CE and its tokens."""
    units = len(UNITS)
    tokens = (batch.labels != losses.IGNORE).sum(dim=1)
    per_unit = [torch.zeros(units, dtype=torch.float64, device=ce.device).index_add_(
        0, batch.units, value.detach().double()) for value in (ce, tokens)]
    return torch.cat([totals.detach().double(), *per_unit])


# ------------------------------------------------------------------------------- plan and main

def describe(run: Run, start: str) -> list[str]:
    """What will run, before it runs."""
    config, world, split = run.config, run.world, clorae.parameter_split(run.model)
    total = sum(p.numel() for p in run.model.parameters())
    rows = "; ".join(f"{name} " + ", ".join(
        f"{unit} {count}" for unit, count in unit_rows(records, run.setup.datasets).items())
        for name, records in run.records.items() if records)
    most = len(run.batches(0)) * config.epochs
    steps = min(config.steps or most, most)
    fused = clorae.kernels(world.device, config.impl) and config.method in clorae.FUSED
    lines = [
        f"device: {world.device}, torch {torch.__version__}, {world.size} process(es), "
        f"{config.precision}, experts on {'clorae.cu' if fused else 'PyTorch'}"
        f"{', CUDA graphs' * config.graphs}, seed {config.seed}",
        f"method: {config.method}, rank {config.rank}, {run.layers} wrapped linears, visual "
        f"adapter: {config.visual_policy}, AML "
        f"{'on' if config.aml else 'off'}, MIM {'on' if config.uses_mim else 'off'}",
        f"trainable: {sum(split.values()):,} of {total:,} parameters ("
        + ", ".join(f"{kind} {count:,}" for kind, count in split.items() if count) + ")",
        f"rows: {rows}",
        f"images: {run.features.missing_rows} rows without their image",
        f"steps: {steps} of batch {config.batch} (micro-batches of "
        f"{config.micro_batch}), {config.epochs} epochs, lr {config.lr:g} halved every "
        f"{config.lr_epochs}",
        f"backbone: {run.origin['t5']} sha256 {run.origin['t5_sha256'][:12]}, "
        f"{run.origin['vit']} sha256 {run.origin['vit_sha256'][:12]}",
        *([run.held_out] if run.held_out else []), f"output: {run.out}", start]
    missing = [unit for unit in run.units if unit not in
               unit_rows(run.records["dev"], run.setup.datasets)]
    if missing and config.aml:
        lines.append(f"note: no dev rows for {', '.join(missing)}: their achievement stays 0")
    if config.aml and run.reference is losses.SINGLE_TASK_F1 and {"MED", "MEAE"} & set(run.units):
        lines.append("note: the references of MED and MEAE are M2E2 test figures, which dev scores "
                     "on other data do not match; give your own with --aml-reference")
    parts = math.ceil(min(config.batch, len(run.examples)) / config.micro_batch)
    if parts < world.size:
        lines.append(f"note: a batch makes {parts} micro-batches for {world.size} processes, so "
                     f"{world.size - parts} only wait; start fewer, or lower --micro-batch")
    return lines


def memory(run: Run) -> dict[str, float]:
    """Bytes that training takes, term by term, for a micro-batch of the longest rows there are.

    Activations are what autograd keeps; a frozen weight adds nothing.  Numbers kept per token:
      attention     3 D (5 D with T5's dropout) + 5 H K + 16 per column of the experts, and 4 D with
                    the experts' dropout; on a CPU T5's dropout keeps 3 H scores per key as well
      feed-forward  3 times its width (4 times with dropout)
    Under --graphs all of it twice, since graphs share their memory with nothing else.
    Then three copies of the logits, as far as they are held at once, and two of the experts: joined
    per task, and for L_MIM.  Within about 10 % of what was measured.
    """
    config, t5 = run.config, run.model.t5.config
    frozen, trained = (sum(p.numel() * p.element_size() for p in run.model.parameters()
                           if p.requires_grad == learns) for learns in (False, True))
    S, T = (max(len(getattr(e, side)) for e in run.examples) for side in ("input_ids", "labels"))
    V = 1 + max(min(len(e.record.objects), config.max_objects) for e in run.examples)
    drop = (t5.dropout_rate if config.backbone_dropout is None else config.backbone_dropout) > 0
    scores = 3 * t5.num_heads * (drop and run.world.device.type == "cpu")
    experts = clorae.parameter_split(run.model)["experts"]
    columns = sum(next(iter(clorae.expert_layers(run.model).values())).widths) if experts else 0
    attention = ((3 + 2 * drop + 4 * (config.dropout > 0 and experts > 0)) * t5.d_model
                 + 5 * t5.num_heads * t5.d_kv + 16 * columns)

    def block(attentions: int, tokens: int, keys: int) -> int:
        return tokens * (attentions * attention + (3 + drop) * t5.d_ff + scores * keys)

    layers, rows = t5.num_decoder_layers, min(config.micro_batch, config.batch)
    blocks = [block(1, S, S)] * t5.num_layers + [block(2, T, S + T)] * layers + 2 * [block(1, V, V)]
    numbers = sum(blocks)
    if config.checkpoint_activations:  # what enters each block, and all of one of them
        numbers = max(blocks) + (t5.num_layers * S + layers * T + 2 * V) * t5.d_model
    kept = rows * numbers * (2 if config.precision == "bf16" else 4) * (1 + config.graphs)
    return {"frozen weights": frozen, "trained": trained, "gradients": trained,
            "moments": 2 * trained, f"activations of {rows} rows of {S} + {T} + {V} tokens":
                kept + 12 * min(rows * T, losses.PIECE) * t5.vocab_size + 8 * experts,
            "the process itself": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def finished(config: Config, launch: Launch) -> str | None:
    """The table of a run that is complete already, if the same command is given again."""
    table = Path(config.out) / "table.txt"
    if launch.resume != "auto" or not table.exists():
        return None
    newest = newest_checkpoint(table.parent)
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    if newest is None or not read_state(newest)["config"].items() <= mine.items():
        return None
    return table.read_text(encoding="utf-8")


def plan(config: Config, sources: Sources, world: World, launch: Launch) -> list[str]:
    """What a run would use, from configurations, headers and the corpus alone (--dry-run)."""
    run = Run(config, sources, world, dry=True)
    found = newest_checkpoint(run.out) if launch.resume == "auto" else launch.resume
    start = f"start: {'from the beginning' if found in (None, 'none') else f'would resume {found}'}"
    if finished(config, launch):
        start = "start: this run is finished, its table would be printed again"
    files = [path for folder in (sources.t5, sources.vit, *filter(None, [sources.init]))
             for path in sorted(folder.iterdir())
             if path.suffix in (".json", ".safetensors", ".model")]
    files += sorted(path for kind in ("dataset.json", *(f"{split}.jsonl" for split in data.SPLITS))
                    for path in sources.corpus.glob(f"*/{kind}"))
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    terms = memory(run)
    return ["dry run: nothing is trained, nothing is written to " + str(run.out),
            *(f"file: {path}, {path.stat().st_size:,} bytes, sha256 {file_hash(path)[:12]}"
              for path in files),
            *describe(run, start), f"frozen: {frozen:,} parameters",
            f"memory per process: about {sum(terms.values()) / 1e9:.2f} GB = "
            + " + ".join(f"{name} {value / 1e9:.2f}" for name, value in terms.items())]


def main(argv: Sequence[str] | None = None) -> None:
    config, launch = parse_arguments(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums may vary
    world = World(launch.timeout)
    # As use_deterministic_algorithms, which would import a compiler first: over a second.  Filling
    # fresh memory with NaN is for finding bugs (tests/test_clorae.py) and costs 2 to 5 % of a step.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False
    if launch.dry_run:
        world.print(*(plan(config, prepare(config), world, launch) if world.main else ()))
        return
    done = finished(config, launch)
    if done is not None:
        world.print(f"{config.out} is finished; its table again (--resume none starts over):", done)
        return
    lock = claim(Path(config.out)) if world.main else None
    sources = prepare(config)
    world.join()
    run = Run(config, sources, world)
    if world.main:
        run.check_room()
    world.print(*describe(run, run.resume(launch)))
    world.listen()
    started = time.perf_counter()
    try:
        run.train()
        world.print(f"trained to step {run.progress.step} in {time.perf_counter() - started:.0f} s;"
                    f" best dev epoch ended at step {run.progress.best_step}")
        if run.records["test"]:
            world.print("test split, best checkpoint:", run.test())
    except Stopped as stop:
        world.print(f"stopped by {signal.Signals(stop.args[0]).name} after step "
                    f"{run.progress.step}; last checkpoint: {run.on_disk}; the same command goes "
                    "on from there" + " without --resume none" * (launch.resume == "none"))
        raise
    world.leave()
    if lock:
        lock.close()


if __name__ == "__main__":
    with exit_codes():
        main()
