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

import dataclasses
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import clorae
import data
import demo
import evaluate
import losses
from engine.checkpoints import (CHECKPOINTS_KEPT, FAILED_SAVES, RUN_FILES, Progress, discard,
                                find_checkpoint, load_trainables, newest_checkpoint, read_state,
                                write_checkpoint, write_state)
from engine.corpus import (corpus_hash, corpus_of, hold_out, load_corpus, load_datasets,
                           read_splits, unit_rows)
from engine.features import Features
from engine.files import DiskFull, Stopped, UsageError, append, claim, file_hash, locked, whole
from engine.parameters import FlatParameters
from engine.processes import World, exit_codes
from engine.schema import SPLITS, UNITS
from engine.settings import SIZES, Config, Launch, parse_arguments
from engine.sources import Sources
from engine.weights import find_weights
from evaluate import build
from t5 import captured

REAL_PIECES = 4000  # vocabulary of a tiny backbone made from a real corpus


def prepare(config: Config) -> Sources:
    """Find, make or fetch the corpus and the backbone; the slow part of a first start."""
    with locked(Path("weights/.lock")):
        corpus = corpus_of(config)
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


def tiny_backbone(corpus: Path, config: Config) -> Path:
    """The tiny T5 and ViT made from a corpus' training inputs, cached by their hash."""
    datasets = load_datasets(corpus)
    records = load_corpus(corpus, "train")
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
        return evaluate.evaluate_split(self.setup, self.splits[split], self.features,
                                       evaluate.Decoding.of(self.config), self.world)

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
    files += sorted(path for kind in ("dataset.json", *(f"{split}.jsonl" for split in SPLITS))
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
    config, launch = parse_arguments(argv, __doc__.split("\n\n")[0], clorae.METHODS)
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
