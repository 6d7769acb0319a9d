"""What a run keeps in its folder: logs, metrics.csv by step and eval.jsonl by epoch, and
checkpoints, folders of model.safetensors (what is trained), optimizer.safetensors (Adam's moments)
and state.json (settings, progress, sha256 of all and of sources), written whole or not at all."""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.adapters import check_names
from engine.corpus import corpus_of
from engine.files import DiskFull, UsageError, append, file_hash, note, sync, whole, write_whole
from engine.parameters import FlatParameters
from engine.pieces import tokenizer_file
from engine.processes import World
from engine.settings import SIZES, Config, Launch, old_spelling
from engine.weights import SHIPPED, find_weights, folder_hash, pickles

KEPT = {"step": 2, "best": 1}  # checkpoints of each sort that a run folder keeps
RUN_FILES = ("step-*", "best-*", "metrics.csv", "eval.jsonl", "table.txt", "predictions-*.jsonl",
             "scores-*.json")  # what a run writes into its folder
LEFT_BY_KILLS = (".step-*", ".best-*", "step-*/*.tmp", "best-*/*.tmp")


@dataclass
class Progress:
    """Where a run stands.  It is stored in state.json and holds no clock time."""
    step: int = 0
    epoch: int = 0  # the current one, from 0
    cursor: int = 0  # global batches of this epoch that are done
    weights: dict[str, float] = field(default_factory=dict)  # w_t^m of Eq. (9) in this epoch
    history: list[dict] = field(default_factory=list)  # per epoch: dev F1 and the weights it gave
    best_sum: float = -1.0  # highest sum of dev F1
    best_step: int = 0


def write_checkpoint(folder: Path, flat: FlatParameters, state: dict) -> None:
    """Write a checkpoint, whole or not at all, over a broken or an abandoned one."""
    def make(aside: Path) -> None:
        aside.mkdir()
        flat.save(aside)
        tensors = sorted(aside.iterdir())
        write_state(aside, state, {file.name: file_hash(file) for file in tensors})
        for file in tensors:
            shutil.copymode(aside / "state.json", file)  # safetensors lets only the owner read it
            sync(file)
        if folder.exists():
            discard(folder)
    whole(folder, make)


def discard(folder: Path) -> None:
    """Remove a checkpoint.  It is renamed first, so that its name never stands for half of it."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder.rename(aside), ignore_errors=True)


def write_state(folder: Path, state: dict, digests: Mapping[str, str]) -> None:
    """Write or replace state.json.  digests: {name: sha256} of the other files of the folder."""
    digests = {**digests, "state.json": state_hash({**state, "sha256": digests})}
    write_whole(folder / "state.json", json.dumps({**state, "sha256": digests}, indent=1) + "\n")
    sync(folder)


def state_hash(state: dict) -> str:
    """sha256 in hex of a state, without the one that it holds of itself."""
    others = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    return hashlib.sha256(json.dumps({**state, "sha256": others}).encode()).hexdigest()


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint whose files are all as they were written; else UsageError."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        broken = [name for name, digest in state["sha256"].items() if digest != (
            state_hash(state) if name == "state.json" else file_hash(folder / name))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise UsageError(f"{folder}: expected a checkpoint folder with state.json and the files it "
                         f"lists, got {type(cause).__name__}: {cause}; name another one") from cause
    if broken:
        raise UsageError(f"{folder}/{broken[0]}: expected the content whose sha256 state.json "
                         "records, got another; name another checkpoint, or none for an older one")
    return state


def newest_checkpoint(run: Path, prefix: str = "step") -> Path | None:
    """The last whole checkpoint of a run folder; broken ones are named and passed over."""
    for folder in sorted(run.glob(f"{prefix}-*"), reverse=True):
        try:
            read_state(folder)
            return folder
        except UsageError as problem:
            note(f"passed over: {problem}")
    return None


def find_checkpoint(path: Path) -> Path:
    """The path itself if it is a checkpoint folder, else the best checkpoint of that run folder."""
    if (path / "state.json").exists():
        return path
    best = newest_checkpoint(path, "best") or newest_checkpoint(path)
    if best is None:
        got = "no checkpoint in it" if path.exists() else "nothing there"
        pickled = pickles(path.parent if path.is_file() else path)
        raise UsageError(f"{path}: expected a run folder or a checkpoint folder, found {got}; "
                         f"{pickled}train first, name a folder below runs/, or copy it from the "
                         "node that has it")
    return best


def standing(out: Path, resume: str) -> list[int]:
    """How far the checkpoint is that this node could go on from; [] or [0]: it has none."""
    if resume not in ("auto", "none"):
        return [int((Path(resume) / "state.json").exists())]
    state = (newest := newest_checkpoint(out)) and read_state(newest)
    return [state["step"], state["epoch"]] if state else []


def load_trainables(model: torch.nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's tensors into the trainable parameters; names and shapes must agree."""
    saved = load_file(checkpoint / "model.safetensors")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_names(checkpoint / "model.safetensors",
                *({name: list(t.shape) for name, t in side.items()} for side in (wanted, saved)),
                "use the rank, tasks, method and backbone that the checkpoint was made with")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


@dataclass
class Sources:
    """The folders that a run reads: corpus, models and, with --init, a checkpoint."""
    corpus: Path
    t5: Path
    vit: Path
    init: Path | None = None  # checkpoint of a full run to begin with

    def fingerprints(self) -> dict[str, str | None]:
        """sha256 of what a checkpoint needs besides itself: it holds only what was trained."""
        return {"t5_sha256": folder_hash(self.t5), "vit_sha256": folder_hash(self.vit),
                "init_sha256": self.init and file_hash(self.init / "model.safetensors"),
                "t5_tokenizer_sha256": file_hash(tokenizer_file(self.t5))}


def stored_config(checkpoint: Path, **changes: object) -> Config:
    """The settings of a checkpoint; an exported adapter brings its datasets' labels along."""
    config = Config(**{**read_state(checkpoint)["config"], **changes})
    config.impl = old_spelling(config.impl)
    if config.data is None and (checkpoint / "corpus").is_dir():
        config.data = str(checkpoint / "corpus")
    return config


def stored_sources(checkpoint: Path, config: Config, given: Mapping[str, object]) -> Sources:
    """A checkpoint's folders: those given ("t5", "vit", "init"), else where they lay then, else by
    hash (tiny) or by name from the hub.  UsageError if their content has changed."""
    state, folders = read_state(checkpoint), {}
    for model in ("t5", "vit", "init"):
        digest, then = state.get(f"{model}_sha256"), state.get(model)
        if digest is None:  # a run without --init
            continue
        folder = given.get(model) or (then if then and Path(then).is_dir() else None)
        name = getattr(SIZES[config.size], model, None)
        if not folder and not name:
            made = [SHIPPED / model, *sorted(Path("weights").glob(f"*/{model}"))]
            folder = next((each for each in made if folder_hash(each) == digest), None)
            if not folder:
                raise UsageError(f"{checkpoint}: expected the folder of its {model} (sha256 "
                                 f"{digest[:12]}), got {then or 'none'}; name it by --{model} DIR")
        folders[model] = (find_checkpoint(Path(folder)) if model == "init"
                          else find_weights(model, folder, name))
    sources = Sources(corpus_of(config), **folders)
    for name, digest in sources.fingerprints().items():
        if state.get(name, digest) != digest:
            model, _, what = name.removesuffix("_sha256").partition("_")
            raise UsageError(f"{getattr(sources, model)}: expected the {what or 'weights'} that "
                             f"{checkpoint} was trained on (sha256 {state[name][:12]}), got others "
                             f"({digest[:12]}); restore that folder, or name it with --{model} DIR")
    return sources


class Logs:
    """Both logs, written by rank 0.  A kill loses no row; on a full disk rows wait in memory."""

    def __init__(self, out: Path):
        self.metrics, self.history = out / "metrics.csv", out / "eval.jsonl"
        self.waiting = ""  # rows for which the disk had no room

    def add(self, row: Mapping[str, float]) -> None:
        """Append the row of a step to metrics.csv, under a header where it is the first."""
        had_room = not self.waiting
        if had_room and not (self.metrics.exists() and self.metrics.stat().st_size):
            self.waiting = ",".join(row) + "\n"
        self.waiting += ",".join(map(str, row.values())) + "\n"
        try:
            append(self.metrics, self.waiting)
            self.waiting = ""
        except OSError as cause:
            if had_room:
                print(f"error: {self.metrics}: expected to append a row, got {cause}; training "
                      "goes on and the rows are kept in memory: make room", file=sys.stderr)

    def write_history(self, history: Sequence[dict]) -> None:
        """Replace eval.jsonl by the dev scores and weights of all epochs so far."""
        if history or self.history.exists():
            write_whole(self.history, "".join(json.dumps(epoch) + "\n" for epoch in history))

    def restore(self, step: int, history: Sequence[dict]) -> None:
        """Cut both logs back to a checkpoint of this step, so that no step appears twice."""
        if self.metrics.exists():
            *lines, _ = self.metrics.read_text(encoding="utf-8").split("\n")  # _ may be torn
            write_whole(self.metrics, "".join(
                line + "\n" for line in lines
                if line.startswith("step,") or int(line.split(",")[0]) <= step))
        self.write_history(history)


class Checkpoints:
    """The checkpoints of one run.  All processes save and resume together; the main one alone reads
    and writes, so that its node alone needs the run folder."""

    def __init__(self, out: Path, world: World, model: torch.nn.Module,
                 flat: FlatParameters | None, progress: Progress, config: Mapping, fixed: Mapping):
        """progress: changed by `resume`.  config: the mathematics; fixed: references, sources."""
        self.out, self.world, self.model, self.flat = out, world, model, flat
        self.progress, self.config, self.fixed = progress, config, fixed
        self.failed: set[int] = set()  # steps since the last save that could not be written
        self.newest: Path | None = None  # the last whole checkpoint of this run

    def state(self) -> dict:
        """What state.json holds.  Dropout needs no more than the seed and the step to go on."""
        rng = {"seed": self.config["seed"], "next_step": self.progress.step}
        return {"config": self.config, **vars(self.progress), "world": self.world.size, "rng": rng,
                **self.fixed}

    def save(self, prefix: str = "step") -> bool:
        """Write a checkpoint of this moment; all processes learn whether that worked.  A full disk
        costs this checkpoint and not the run, unless it stays full: DiskFull."""
        failures = torch.zeros(1).to(self.world.device)
        folder = self.out / f"{prefix}-{self.progress.step:08d}"
        if self.world.main:
            try:
                self.write(folder, KEPT[prefix])
            except (OSError, SafetensorError) as cause:
                failures += 1
                print(f"error: {folder}: expected to write a checkpoint, got {cause}; the ones "
                      "before it are whole and training goes on: make room", file=sys.stderr)
        if not self.world.sum(failures).item():
            self.failed.clear()
            self.newest = folder if prefix == "step" else self.newest
            return True
        self.failed.add(self.progress.step)
        if len(self.failed) == 3:  # in a row
            raise DiskFull(f"{self.out}: expected room for a checkpoint, got none at steps "
                           f"{', '.join(map(str, sorted(self.failed)))}; make room, then the same "
                           "command goes on from the last checkpoint")
        return False

    def write(self, folder: Path, kept: int) -> None:
        """Write `folder`, or its state alone if the weights are in it; keep `kept` of its sort."""
        if folder == self.newest:
            digests = json.loads((folder / "state.json").read_bytes())["sha256"]
            write_state(folder, self.state(), digests)
        else:
            write_checkpoint(folder, self.flat, self.state())
        alike = sorted(self.out.glob(f"{folder.name.split('-')[0]}-*"))
        end = alike.index(folder) + 1
        for old in alike[:max(end - kept, 0)] + alike[end:]:  # later ones are broken or abandoned
            discard(old)

    def check_room(self) -> None:
        """Refuse a disk that could not hold the checkpoints, before anything is computed."""
        size = 3 * self.flat.values.nbytes  # with Adam's two moments
        present = len([*self.out.glob("step-*"), *self.out.glob("best-*")])
        needed = size * max(sum(KEPT.values()) + 1 - present, 1)  # one is being written
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise DiskFull(f"{self.out}: expected {needed / 1e6:,.1f} MB of free disk for "
                           f"checkpoints of {size / 1e6:,.1f} MB, got {free / 1e6:,.1f} MB; make "
                           "room, or choose an --out on another disk")

    def resume(self, launch: Launch) -> str:
        """Load the checkpoint that --resume asks for, if any, on every process; returns a line
        on it.  "none" first empties the run folder, on every node, unless torchrun restarts."""
        world, anew = self.world, launch.resume == "none" and not self.world.restarts
        for name in RUN_FILES + LEFT_BY_KILLS[:2] if anew else LEFT_BY_KILLS * world.main:
            for old in self.out.glob(name):  # another process may be deleting the same
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(True)
        world.share(None)  # all have deleted what they found
        if anew:
            return "start: from the beginning (--resume none)"
        folder, state = world.share(world.together(lambda: self.to_resume(launch)))[world.leader]
        if folder is None:
            return f"start: from the beginning, no checkpoint in {self.out}"
        self.check_same(state, folder, launch.allow_world_change)
        world.hand_out(self.flat.values, *world.together(lambda: self.load(Path(folder), state)))
        vars(self.progress).update(world.share(vars(self.progress))[world.leader])
        return f"start: resumed {folder} at step {state['step']}, epoch {state['epoch'] + 1}"

    def to_resume(self, launch: Launch) -> tuple[str | None, dict | None]:
        """Path and state of the checkpoint to go on from, on the main process, else None."""
        auto = launch.resume in ("auto", "none")
        folder = self.world.main and (newest_checkpoint(self.out) if auto else Path(launch.resume))
        return (str(folder), read_state(folder)) if folder else (None, None)

    def load(self, folder: Path, state: dict) -> list[torch.Tensor]:
        """The main process reads a checkpoint, the others prepare for it -> Adam's moments."""
        vars(self.progress).update({name: state[name] for name in vars(self.progress)})
        if self.world.main:
            load_trainables(self.model, folder)
            if folder.resolve().parent == self.out.resolve():
                self.newest = self.out / folder.name
            else:
                self.bring_best(folder.resolve().parent)
        return self.flat.load_moments(folder if self.world.main else None, state["step"])

    def bring_best(self, run: Path) -> None:
        """Copy the best checkpoint from the run folder that is resumed; without one, forget it."""
        best = run / f"best-{self.progress.best_step:08d}"
        if not best.is_dir():
            self.progress.best_sum, self.progress.best_step = -1.0, 0
        elif not (self.out / best.name).exists():
            whole(self.out / best.name, lambda aside: shutil.copytree(best, aside))

    def load_best(self) -> Path | None:
        """Load the best checkpoint on every process; returns its folder, on the main one alone."""
        best = self.world.together(lambda: find_checkpoint(self.out) if self.world.main else None)
        if best:
            load_trainables(self.model, best)
        self.world.hand_out(self.flat.values)
        self.model.train()  # drops copies of the weights before, which decoding has packed
        return best

    def check_same(self, state: dict, folder: str, any_world: bool) -> None:
        """UsageError unless settings (those it lacks: defaults), references and weights agree."""
        mine = json.loads(json.dumps(self.state()))
        fixed = [*mine["config"], "reference", *(name for name in mine if name.endswith("_sha256"))]
        was, now = ({**vars(Config()), **side, **side["config"]} for side in (state, mine))
        changed = [f"{name} {was.get(name)} -> {now[name]}" for name in fixed
                   if was.get(name) != now[name]]
        if changed:
            raise UsageError(f"{folder}: expected the settings it was started with, got changes: "
                             f"{', '.join(changed)}; repeat the old command, use another --out, or "
                             "start over by --resume none")
        world = state["world"]
        if world != self.world.size and not any_world:
            raise UsageError(f"{folder}: expected {world} process(es), as it was started with, got "
                             f"{self.world.size}; use torchrun --nproc_per_node={world}, or pass "
                             "--allow-world-change: the same batches, equal but for rounding")
