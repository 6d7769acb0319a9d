"""Train C-LoRAE, or one of the methods it is compared with, on one process or under torchrun.

    python train.py                                                 the demo, from nothing to table
    torchrun --nproc_per_node=4 train.py --size large --data DIR    the real run
    (the same line again)                                           resumes, or reprints the table

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303.  Trainer: the step, Eq. (10); Run: the epoch, Eq. (9).

Exactness: the batches of an epoch are a function of (seed, epoch), the dropout masks of (seed,
step, micro-batch), and every normaliser counts the global batch.  So neither the number of
processes nor accumulation changes the loss, and a run that was killed ends as if it had not been,
bit for bit if it goes on with as many processes and threads (OMP_NUM_THREADS) as before.

Exit codes: 0 done; 2 a command, input or machine that cannot work, said in one `error:` sentence;
74 no checkpoint could be written, the disk is full; 130 and 143 stopped by Ctrl-C and SIGTERM, to
be resumed; 1 a crash, with its traceback."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import clorae
import data
import demo
import evaluate
import fast
import losses
from engine.checkpoints import Checkpoints, Logs, Progress, Sources, find_checkpoint, standing
from engine.command import Bar
from engine.corpus import corpus_hash, corpus_of, hold_out, read_splits, unit_rows
from engine.features import Features
from engine.files import Stopped, UsageError, claim, locked, note, whole, write_whole
from engine.parameters import FlatParameters
from engine.plan import describe, finished, plan
from engine.processes import World, exit_codes
from engine.schema import UNITS
from engine.settings import SIZES, Config, parse_arguments
from engine.weights import SHIPPED, find_weights
from fast import cuda
from fast.experts import RANK_SPACE, mutual_information
from fast.graphs import Graphs
from vision import UMIE, ViT


class Trainer:
    """Takes optimizer steps, each on one global batch that all processes share."""

    def __init__(self, config: Config, model: UMIE, form: str, flat: FlatParameters, world: World,
                 rows: "Rows", progress: Progress):
        """form: "plain", "fast" or "cuda", what fast.speed_up made of the model's modules."""
        self.config, self.model, self.form, self.flat = config, model, form, flat
        self.world, self.rows, self.progress = world, rows, progress
        self.stopping = False  # whether one of the processes was asked to stop
        self.graphs = Graphs(self.gradients, world.device) if config.graphs else None
        if config.graphs:
            cuda.keep_tasks_on_gpu(model)

    def train_step(self, indices: list[int]) -> dict[str, float]:
        """One optimizer step on the examples of a global batch -> its row of metrics.csv."""
        sums = torch.zeros(4 + 2 * len(UNITS), dtype=torch.float64, device=self.world.device)
        self.flat.grads.zero_()
        if not self.model.training:  # an evaluation was before this step
            self.model.train()
        micros = data.micro_batches(indices, self.rows.examples, self.config.micro_batch)
        for k, micro in enumerate(micros):
            if k % self.world.size == self.world.rank:  # the processes share the micro-batches
                sums[:-1] += self.backward(micro, k, indices)
        sums[-1:] = self.world.signal  # 0 unless this process was asked to stop
        norm = self.world.sum(self.flat.grads).norm()[None]
        *sums, stop, norm_value = torch.cat([self.world.sum(sums), norm]).tolist()  # waits for GPU
        self.stopping = stop > 0  # in all processes at the same step
        return self.update(sums, norm, norm_value, indices)

    def backward(self, micro: list[int], k: int, indices: list[int]) -> Tensor:
        """Add the gradients of `micro`, the k-th part of batch `indices`; returns `unit_sums`."""
        config, progress, device = self.config, self.progress, self.world.device
        tokens = sum(len(self.rows.examples[i].labels) for i in indices)
        weights = [progress.weights.get(unit, 0.0) for unit in UNITS]
        numbers = torch.tensor([*weights, tokens, len(indices)])
        torch.manual_seed(hash((config.seed, progress.step, k)))  # a hash of integers never varies
        batch = self.rows.collate(micro)
        if self.graphs is not None:
            return self.graphs(batch.widened(1 + config.max_objects), numbers)
        return self.gradients(batch.to(device), numbers.to(device, non_blocking=True))

    def gradients(self, batch: data.Batch, numbers: Tensor) -> Tensor:
        """Add the gradients of Eq. (10) for a micro-batch of B' rows; returns its `unit_sums`.
        numbers [units + 2]: w_t^m of Eq. (9), then target tokens and rows B of the global batch: as
        a tensor, so that one CUDA graph of this computation serves all batches of a shape."""
        config, half = self.config, self.config.precision == "bf16"
        w, tokens, B = numbers[:-2], numbers[-2], numbers[-1]
        if config.uses_mim:
            clorae.keep_outputs(self.model)
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=half):
            hidden = self.model.hidden(batch)
            ce = losses.token_cross_entropy(hidden, batch.labels, self.model.t5.head,
                                            real=batch.real)  # [B']
        L_MT = (w[batch.units] * ce).sum() / tokens  # a row has the weight of its unit
        L_MIM = self.mim_loss(B) if config.uses_mim else torch.zeros_like(L_MT)
        loss = L_MT + config.beta * L_MIM  # Eq. (10)
        loss.backward()
        return unit_sums(torch.stack([loss, L_MT, L_MIM]), ce, batch)

    def mim_loss(self, B: Tensor) -> Tensor:
        """L_MIM, Eq. (5), a scalar, of the last forward pass.  B: rows of the global batch."""
        if self.form != "plain":
            return mutual_information(self.model, B)
        outputs = clorae.expert_outputs(self.model)
        return losses.mutual_information(outputs, B, len(clorae.expert_layers(self.model)))

    def update(self, sums: list[float], norm: Tensor, norm_value: float,
               indices: list[int]) -> dict[str, float]:
        """Clip the gradient and step; returns the step's row of metrics.csv.  UsageError, and no
        step, if loss or gradient is not finite.  sums: see unit_sums; norm [1]: of the gradient."""
        if not (math.isfinite(norm_value) and math.isfinite(sums[0])):
            raise self.not_finite(sums[0], norm_value, indices)
        self.flat.grads.mul_((self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        lr = self.config.lr * 0.5 ** (self.progress.epoch // self.config.lr_epochs)
        self.flat.set_lr(lr)
        self.flat.optimizer.step()
        self.progress.step += 1
        self.progress.cursor += 1
        ce, count = sums[3:3 + len(UNITS)], sums[3 + len(UNITS):]
        row = {"step": self.progress.step, "epoch": self.progress.epoch + 1, "loss": sums[0],
               "L_MT": sums[1], "L_MIM": sums[2], "lr": lr, "grad_norm": norm_value}
        return row | {f"CE_{unit}": ce[i] / count[i] if count[i] else math.nan
                      for i, unit in enumerate(UNITS) if unit in self.rows.units}

    def not_finite(self, loss: float, norm: float, indices: list[int]) -> UsageError:
        """The error when loss or gradient is not finite; it names rows that cause it alone."""
        guilty = []
        for i in indices:
            self.flat.grads.zero_()
            sums, record = self.backward([i], 0, indices), self.rows.examples[i].record
            if not (sums[0].isfinite() and self.flat.grads.norm().isfinite()):
                guilty.append(f"{record.id} ({record.source})")
        which = ", ".join(guilty[:5]) + ", ..." * (len(guilty) > 5) or "none of its rows alone"
        advice = "look at these rows" if 0 < len(guilty) < len(indices) else "lower --lr"
        return UsageError(
            f"step {self.progress.step + 1}: expected a finite loss and gradient, got loss {loss} "
            f"and gradient norm {norm} from {len(guilty)} of the batch's {len(indices)} rows: "
            f"{which}; no weight was changed and the last checkpoint is whole: {advice}, then the "
            "same command goes on")


def unit_sums(totals: Tensor, ce: Tensor, batch: data.Batch) -> Tensor:
    """[3 + 2 * units] float64: `totals` [3]; the sum of ce [B'] of each unit; its target tokens."""
    tokens = (batch.labels != losses.IGNORE).sum(dim=1)
    per_unit = [torch.zeros(len(UNITS), dtype=torch.float64, device=ce.device).index_add_(
        0, batch.units, value.detach().double()) for value in (ce, tokens)]
    return torch.cat([totals.detach().double(), *per_unit])


class Run:
    """One training run: its model, data, progress and files."""

    def __init__(self, config: Config, sources: Sources, world: World, dry: bool = False,
                 cache: str | None = None):
        """dry: the model has names and shapes but no weights (--dry-run).  cache: see Features."""
        self.config, self.world, self.out = config, world, Path(config.out)
        device = torch.device("meta") if dry else world.device
        self.setup = evaluate.build(config, sources, device)
        self.model = self.setup.model
        self.flat = None if dry else FlatParameters(self.model, config.lr)
        self.experts = clorae.expert_layers(self.model)
        self.trained = clorae.parameter_split(self.model)
        self.form = fast.form_on(world.device, config.impl)
        self.rows = Rows(config, sources, self.setup, device, world, cache)
        self.reference = references(config, self.rows.units)
        self.progress = Progress(weights=dict.fromkeys(self.rows.units, 1.0))
        if config.graphs:
            check_graphs(config, world.device, self.form)
        if not dry:
            self.trainer = Trainer(config, self.model, self.form, self.flat, world, self.rows,
                                   self.progress)
            if config.fusion == "gate" and sources.init is None:
                self.open_gate()
        self.origin = {"t5": str(sources.t5), "vit": str(sources.vit),
                       "init": sources.init and str(sources.init), **sources.fingerprints(),
                       "corpus_sha256": corpus_hash(sources.corpus)}
        mathematics = {name: value for name, value in dataclasses.asdict(config).items()
                       if name not in ("out", "save_every", "impl")}  # must not change on resume
        self.checkpoints = Checkpoints(
            self.out, world, self.model, self.flat, self.progress, mathematics,
            {"reference": {u: self.reference[u] for u in self.rows.units}, **self.origin})
        self.logs = Logs(self.out) if world.main else None

    @torch.no_grad()
    def open_gate(self) -> None:
        """UMIE.open_gate, judged by the first 32 rows of epoch 0 that have an image."""
        pictured = (i for i in itertools.chain(*self.rows.batches(0))
                    if self.rows.features(self.rows.examples[i].record) is not None)
        if first := list(itertools.islice(pictured, 32)):
            device, half = self.world.device, self.config.precision == "bf16"
            self.model.eval()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                self.model.open_gate(self.rows.collate(first).to(device))

    def train(self) -> None:
        """Train from where the run stands to the end of its last epoch."""
        config, progress, started = self.config, self.progress, time.perf_counter()
        limit = config.steps or math.inf
        while progress.epoch < config.epochs and progress.step < limit:
            batches = self.rows.batches(progress.epoch)
            with Bar(total=len(batches), initial=progress.cursor, disable=not self.world.main,
                     desc=f"epoch {progress.epoch + 1}/{config.epochs}") as bar:
                while progress.cursor < len(batches) and progress.step < limit:
                    self.step(batches[progress.cursor], bar)
            self.finish_epoch()
        seconds = time.perf_counter() - started
        self.world.print(f"trained to step {progress.step} in {seconds:.0f} s; best dev epoch "
                         f"ended at step {progress.best_step}")

    def step(self, indices: list[int], bar: Bar) -> None:
        """One step, logged and shown, and a checkpoint if it is time; after a signal Stopped."""
        started = time.perf_counter()
        row = self.trainer.train_step(indices)
        if self.logs:
            self.logs.add(row | {"seconds": time.perf_counter() - started})
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}", refresh=False)
        if self.trainer.stopping or self.progress.step % self.config.save_every == 0:
            self.checkpoints.save()
        if self.trainer.stopping:
            raise Stopped(self.world.signal or signal.SIGTERM)

    def finish_epoch(self) -> None:
        """Dev F1, the weights of the next epoch by Eq. (9), the best checkpoint, the next epoch."""
        config, progress, checkpoints = self.config, self.progress, self.checkpoints
        checkpoints.save()  # a run that is stopped in the evaluation has only that to repeat
        with self.world.interruptible():
            f1 = self.dev_f1()
        if config.aml:
            progress.weights = losses.achievement_weights(  # w_t^m of Eq. (9), for the next epoch
                f1, self.reference, config.aml_margin, config.aml_gamma, config.aml_temperature)
        progress.history.append({"epoch": progress.epoch + 1, "step": progress.step, "f1": f1,
                                 "weights": progress.weights})
        before, total = (progress.best_sum, progress.best_step), sum(f1.values())
        better = total > progress.best_sum or total == progress.best_sum == 0  # nothing right: last
        if better:
            progress.best_sum, progress.best_step = total, progress.step
        progress.epoch, progress.cursor = progress.epoch + 1, 0
        if better and not checkpoints.save("best"):
            progress.best_sum, progress.best_step = before
        if checkpoints.save() and self.logs:
            self.logs.write_history(progress.history)
        counted = unit_rows(self.rows.records["dev"], self.setup.datasets)
        shown = (f"{u} {v:.1f}" if u in counted else f"{u} -" for u, v in f1.items())
        self.world.print("  dev F1  " + "  ".join(shown) + (
            f"  mean {total / len(counted):.1f}" if counted else ", no dev rows"))
        if config.aml:
            weights = (f"{unit} {weight:.2f}" for unit, weight in progress.weights.items())
            self.world.print("  weights " + "  ".join(weights))

    def evaluate(self, split: str) -> list[evaluate.Row]:
        """Decode and score a split, shared among the processes; every one returns all rows."""
        return evaluate.evaluate_split(self.setup, self.rows.splits[split], self.rows.features,
                                       evaluate.Decoding.of(self.config), self.world)

    def dev_f1(self) -> dict[str, float]:
        """F1 in % on the dev split, s_t^m of Eq. (9), of every trained unit; 0 without dev rows."""
        f1 = evaluate.unit_f1(evaluate.total(self.evaluate("dev")))
        return {unit: f1.get(unit, 0.0) for unit in self.rows.units}

    def test(self) -> str:
        """The table of the test split with the best checkpoint; also written to the run folder."""
        if not self.rows.splits["test"]:
            text = (f"no test rows in {self.config.data}: nothing is scored; `python evaluate.py "
                    f"{self.out} --split dev` scores dev, --data another corpus")
            if self.world.main:
                write_whole(self.out / "table.txt", text + "\n")
            return text
        best = self.checkpoints.load_best()
        with self.world.interruptible():
            rows = self.evaluate("test")
        text = evaluate.table(evaluate.total(rows), self.setup.datasets)
        if self.world.main:
            evaluate.save_predictions(self.out / "predictions-test.jsonl", rows)
            evaluate.save_scores(self.out / "scores-test.json", rows, best, self.config, "test")
            write_whole(self.out / "table.txt", text + "\n")
        return text


class Rows:
    """The data that a run is trained and scored on: records, examples, image features, batches."""

    def __init__(self, config: Config, sources: Sources, setup: evaluate.Setup,
                 device: torch.device, world: World, cache: str | None = None):
        """device: where features are computed; none are on "meta".  UsageError without rows."""
        self.config, datasets = config, setup.datasets
        self.records = read_splits(sources.corpus, config.units)
        self.held_out = hold_out(self.records, datasets, config.hold_out)  # to be printed
        self.features = Features(sources, sum(self.records.values(), []), config.missing_images,
                                 config.max_objects, device, ViT, cache)
        data.check_labels({(r.dataset, r.task) for r in sum(self.records.values(), [])}, datasets,
                          setup.tokenizer)
        self.splits = {split: data.encode_records(records, datasets, setup.tokenizer,
                                                  config.max_source, config.max_target, world.print)
                       for split, records in self.records.items()}
        self.examples = self.splits["train"]
        if not self.examples:
            raise UsageError(f"{sources.corpus}: expected training records, found no train.jsonl "
                             "with any; convert a dataset that has a train split, or choose other "
                             "--units or --hold-out")
        self.units = list(unit_rows(self.records["train"], datasets))

    def batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch, as positions in `examples`."""
        return data.global_batches(self.examples, self.config.seed, epoch, self.config.batch)

    def collate(self, indices: list[int]) -> data.Batch:
        """A batch of training examples."""
        return data.collate([self.examples[i] for i in indices], self.features, self.features.width)


def references(config: Config, units: Sequence[str]) -> dict[str, float]:
    """p_m of Eq. (9): F1 in % by unit; UsageError if a trained unit has none."""
    path, stored = config.aml_reference, losses.SINGLE_TASK_F1 if config.data else demo.P_M
    try:
        if path is not None:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        given = {unit: float(stored.get(unit, 0)) for unit in units}
        lacking = [unit for unit in units if not given[unit] > 0]
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        given, lacking = {}, [f"(unreadable: {cause})"]
    if lacking:
        raise UsageError(f"{path or '--aml-reference'}: expected a JSON object with a positive F1 "
                         f"for each of {', '.join(units)}, got none for {', '.join(lacking)}; add "
                         "them")
    return given


def check_graphs(config: Config, device: torch.device, form: str) -> None:
    """UsageError where --graphs cannot turn micro-batches into CUDA graphs."""
    twice = config.checkpoint_activations  # a second pass, which cannot be captured
    if twice or device.type != "cuda" or form != "cuda" or config.method not in RANK_SPACE:
        raise UsageError(f"--graphs: expected a GPU, clorae.cu compiled for it, a method of "
                         f"{', '.join(RANK_SPACE)} and no --checkpoint-activations, got device "
                         f"{device}, method {config.method}, modules in the form {form}"
                         f"{', --checkpoint-activations' * twice}; leave --graphs away")


def prepare(config: Config) -> Sources:
    """Find, make or download corpus and backbone.  UsageError names every model not to be had."""
    given = config.data and config.t5 and config.vit  # then nothing is made here
    with nullcontext() if given else locked(Path("weights/.lock"), "processes that start together "
                                            "may make the same: let `--dry-run` do it first"):
        corpus = corpus_of(config)
        if config.data is None and not corpus.exists():
            whole(corpus, demo.make_world)
        folders, models, problems = {"t5": config.t5, "vit": config.vit}, [], []
        if config.size == "tiny" and not all(folders.values()):
            made = tiny_backbone(corpus, config)
            folders = {model: folder or made / model for model, folder in folders.items()}
        for model, folder in folders.items():
            try:
                models.append(find_weights(model, folder, getattr(SIZES[config.size], model)))
            except UsageError as problem:
                problems.append(str(problem))
    if problems:
        raise UsageError("\n".join(problems))
    return Sources(corpus, *models, find_checkpoint(Path(config.init)) if config.init else None)


def tiny_backbone(corpus: Path, config: Config) -> Path:
    """The demo's own tiny T5 and ViT; for other data, or with --backbone-steps, those made from the
    corpus' training inputs, kept in weights/ by their hash."""
    tiny, steps = demo.Tiny(), config.backbone_steps
    if steps is None and config.data is None:
        return SHIPPED
    if steps is not None:
        tiny = dataclasses.replace(tiny, steps=steps, vit_steps=min(steps, tiny.vit_steps))
    if config.data is not None:  # real text needs a larger vocabulary than the demo's
        tiny = dataclasses.replace(tiny, pieces=4000)
    texts, avoid = demo.training_text(corpus)
    digest = hashlib.sha256("\n".join([repr(tiny), *texts]).encode()).hexdigest()
    folder = Path("weights") / f"tiny-{digest[:8]}"
    if not folder.exists():
        note(f"--size tiny without --t5 and --vit: a T5 and a ViT of {tiny.steps} and "
             f"{tiny.vit_steps} steps are made from the training texts of {corpus}, once; or name "
             "others, as --t5 demo_backbone/t5 --vit demo_backbone/vit")
        whole(folder, lambda aside: demo.make_backbone(aside, texts, tiny=tiny, avoid=avoid,
                                                      speed_up=fast.speed_up))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    config, launch = parse_arguments(argv, __doc__.split("\n\n")[0], clorae.METHODS)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums may vary
    world = World(launch.timeout)
    # As use_deterministic_algorithms, which would import a compiler first: over a second.  Filling
    # fresh memory with NaN is for finding bugs (tests/test_clorae.py) and costs 2 to 5 % of a step.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False
    if launch.dry_run:
        if world.main:
            sources = prepare(config)
            world.print(*plan(Run(config, sources, world, dry=True), sources, launch, losses.PIECE))
        return
    if world.size > 1:  # the node that holds this run's newest checkpoint goes on with it
        world.lead(world.together(lambda: standing(Path(config.out), launch.resume)))
    if table := max(world.share(world.together(lambda: finished(config, launch) or ""))):
        world.print(f"{config.out} is finished; its table again (--resume none starts "
                    "over):", table)
        return
    lock, sources = world.together(
        lambda: (claim(Path(config.out)) if world.main else None, prepare(config)))
    world.join()
    run = world.together(lambda: Run(config, sources, world, cache=launch.cache))
    places = dict.fromkeys(("out", "data", "t5", "vit", "init", "aml_reference"))  # may differ
    world.agree({**vars(config), **run.origin, **places, "p_m": run.reference,
                 "rows without their image": run.rows.features.missing_rows})
    world.together(lambda: world.main and run.checkpoints.check_room())
    start = run.checkpoints.resume(launch)
    if run.logs:
        run.logs.restore(run.progress.step, run.progress.history)
    world.print(*describe(run, start))
    world.listen()
    try:
        run.train()
        world.print("test split, best checkpoint:", run.test())
    except Stopped as stop:
        world.print(f"stopped by {signal.Signals(stop.args[0]).name} after step "
                    f"{run.progress.step}; last checkpoint: {run.checkpoints.newest}; the same "
                    "command goes on from there"
                    + " without --resume none" * (launch.resume == "none"))
        raise
    world.leave()
    if lock:
        lock.close()


if __name__ == "__main__":
    with exit_codes():
        main()
