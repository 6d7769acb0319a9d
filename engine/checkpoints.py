"""Checkpoints: written whole or not at all, checked before they are read."""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from engine.files import UsageError, file_hash, sync
from engine.parameters import FlatParameters
from engine.weights import pickles

CHECKPOINTS_KEPT = 2
FAILED_SAVES = 3  # in a row, then the run ends
RUN_FILES = ("step-*", "best-*", "metrics.csv", "eval.jsonl", "table.txt", "predictions-*.jsonl",
             "scores-*.json")  # what a run writes into its folder


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
