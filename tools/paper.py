"""The paper's experiments as data, the runs that they lack, and one report of them.

    python -m tools.paper [--jobs 2]                       the study: runs what is missing, reports
    python -m tools.paper --report                         the report anew, from the CSV alone
    python -m tools.paper --plan                           what would run, in order
    python -m tools.paper --size large --data corpus       the real thing, on all GPUs

Every finished run is one row of a CSV; what has a row is not run again, and a run that was killed
goes on as train.py does.  docs/study.md tells how the study was planned and why.

A seed draws another world and another training.  Learning rates are chosen on the dev splits of
worlds (seeds CHOICE) that no comparison uses; a comparison reads the test splits of others.  All
worlds of the study share demo_backbone/.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import fmean

import torch
from safetensors import safe_open

import clorae
import demo
from engine.checkpoints import find_checkpoint
from engine.command import Parser
from engine.files import UsageError, file_hash, locked, whole, write_whole
from engine.processes import exit_codes
from engine.schema import UNITS
from engine.settings import SIZES, parse_arguments, positive
from engine.weights import SHIPPED
from tools import report

ROOT = SHIPPED.parent
RANK, EPOCHS = 6, 4  # of the study: low enough that methods differ; the rate is halved half-way
RATES, FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3), (1e-4, 2e-4, 4e-4, 8e-4)
CHOICE, EXTENSIONS = (100, 101), 2  # seeds of the rates' worlds; how often a grid's edge is passed
# The knobs of make_world as the real data have them: the ratio of Table 1, and no label but "none"
# in two tasks (docs/study.md).  scale and texts are what a run of a minute allows.
WORLD = {"scale": 0.6, "texts": 0.4, "imbalance": 7.3, "conflict": "apart"}

# What is compared: options of train.py, and the rank as a multiple of R.  4R is a number there.
SYSTEMS = {
    "lora": ("--method lora", 1), "lora, rank 2 R": ("--method lora", 2),
    "tlora": ("--method tlora", 1), "moslora": ("--method moslora", 1),
    "loramoe": ("--method loramoe", 1), "clorae": ("--method clorae", 1),
    "clorae w/o EGR": ("--method clorae --no-egr", 1),
    "clorae w/o AML": ("--method clorae --no-aml", 1),
    "clorae w/o MIM": ("--method clorae --no-mim", 1),
    "full": ("--method full", 1),
    "mtllora": ("--method mtllora", 1), "hydralora": ("--method hydralora", 1),
    "AML temperature 0.1": ("--method clorae --aml-temperature 0.1", 1),
    "AML temperature 0.01": ("--method clorae --aml-temperature 0.01", 1),
    "AML references 100": ("--method clorae --aml-reference 100", 1),
    "beta 0.1": ("--method clorae --beta 0.1", 1), "beta 1": ("--method clorae --beta 1", 1),
    "beta 1.28": ("--method clorae --beta 1.28", 1),
    "MIM mean affine": ("--method clorae --mim-mean affine", 1),
    "MIM mean map": ("--method clorae --mim-mean map", 1),
    "scale 4": ("--method clorae --alpha 4R", 1),
    **{f"{name}, held out": (f"--method {name} --hold-out paper", rank)
       for name, rank in (("full", 1), ("lora", 2), ("clorae", 1))},
    **{f"rank {x} R": ("--method clorae", x) for x in (0.5, 2, 4)},
    **{f"dropout {p}": (f"--method clorae --dropout {p}", 1) for p in (0.1, 0.2, 0.4, 0.8)}}
# Whose rate a system takes, where it has no grid of its own.
RATE_OF = {"full, held out": "full", "lora, held out": "lora, rank 2 R", **{
    name: "clorae" for name in SYSTEMS if re.match("rank|dropout|clorae, held", name)}}

# F1 in the paper: Table 2 (clorae; full is UMIE), Table 3, in the order of UNITS.
PUBLISHED = {
    "base": {"full": (76.1, 88.1, 87.7, 84.3, 74.8, 60.5, 22.5),
             "clorae": (74.4, 86.3, 85.8, 87.3, 81.4, 60.7, 28.4),
             "full, held out": (None, 66.8, None, None, 67.3, None, None),
             "clorae, held out": (None, 66.2, None, None, 76.5, None, None)},
    "large": {"full": (77.2, 90.7, 90.5, 85.0, 75.5, 61.0, 23.6),
              "clorae": (75.9, 88.9, 89.3, 89.2, 82.8, 64.0, 31.2),  # Table 2 has MED 64.5
              "lora": (74.5, 87.8, 88.1, 82.1, 74.9, 61.0, 25.3),
              "tlora": (72.9, 85.2, 82.3, 85.8, 81.2, 62.4, 29.5),
              "clorae w/o EGR": (74.9, 87.8, 88.4, 86.4, 80.8, 61.8, 27.8),
              "clorae w/o AML": (74.3, 87.2, 86.8, 87.6, 81.7, 63.3, 29.8),
              "clorae w/o MIM": (75.4, 88.2, 88.1, 87.1, 82.0, 63.8, 30.2),
              "full, held out": (None, 68.5, None, None, 68.8, None, None),
              "clorae, held out": (None, 67.8, None, None, 78.2, None, None)},
    "xl": {"full": (78.2, 91.4, 91.0, 86.4, 76.2, 62.1, 24.5),
           "clorae": (77.8, 89.8, 90.5, 89.6, 83.2, 63.5, 32.6)}}


@dataclass(frozen=True)
class Experiment:
    """Systems that are compared in one or several worlds, over seeds."""
    name: str
    source: str  # its place in the paper
    question: str
    systems: tuple[str, ...]
    seeds: range
    baseline: str = "lora"
    knob: str = ""  # of make_world
    settings: tuple = ()  # of the knob
    world: dict = field(default_factory=dict)  # other knobs than those of WORLD
    rate: float | None = None  # for all systems; None: each has its own, chosen on dev
    confirm: bool = False  # test those alone that are above the baseline on dev

    def worlds(self) -> list[dict]:
        return [WORLD | self.world | {self.knob: value} for value in self.settings] or [
            WORLD | self.world]


PAIR = ("lora, rank 2 R", "clorae")  # of about equal parameters
EXPERIMENTS = (
    Experiment("pilot", "", "How far do seeds spread the difference of two systems?",
               ("lora", "clorae"), range(100, 103), rate=2e-3),
    Experiment("main", "Tables 2 and 3, Fig. 4", "Does C-LoRAE help, and each of its parts?",
               tuple(SYSTEMS)[:12], range(8)),
    Experiment("conflict", "the claim of Sec. 1", "Does it help where tasks contradict each other?",
               PAIR, range(6), PAIR[0], "conflict", tuple(demo.CONFLICTS)),
    Experiment("imbalance", "the claim of Sec. 2.4", "Does it help where tasks differ in size?",
               PAIR, range(6), PAIR[0], "imbalance", (1.0, 3.0, 7.3, 30.0)),
    Experiment("texts", "", "Does it help where texts are few?",
               PAIR, range(6), PAIR[0], "texts", (0.1, 0.2, 0.4, 0.8)),
    Experiment("aml", "Eq. (9), where the paper is silent", "Which reading of AML, where tasks "
               "differ in size 30:1?", ("clorae", "clorae w/o AML", *tuple(SYSTEMS)[12:15]),
               range(200, 208), "clorae", world={"imbalance": 30.0}, confirm=True),
    Experiment("mim", "Eq. (5) and (8), where the paper is silent", "Which reading of MIM and of "
               "the scale?", ("clorae", *tuple(SYSTEMS)[15:21]), range(300, 308), "clorae",
               confirm=True),
    Experiment("table4", "Table 4", "T17 and V2, never trained on: which generalises?",
               ("full, held out", "lora, held out", "clorae, held out"), range(6),
               "lora, held out"),
    Experiment("fig5", "Fig. 5", "How do rank and dropout matter?  (The paper: more rank helps, "
               "with saturation; dropout 0 and 0.8 are worst, 0.1 to 0.4 best.)",
               ("clorae", *tuple(SYSTEMS)[24:]), range(3), "clorae"))

IDENTITY = ("size", "options", "rank", "lr", "seed", "data", *WORLD, "backbone")
COLUMNS = ("experiment", "system", *IDENTITY, "commit", "processor", "seconds", "cpu_seconds",
           "parameters", *(f"{split}_{unit}" for split in ("dev", "test")
                           for unit in (*UNITS, "mean")), "error")
Row = dict[str, str]  # a run: COLUMNS of the CSV, at first as far as they are known


def key(row: Row) -> tuple[str, ...]:
    """What makes a run another run."""
    return tuple(row[column] for column in IDENTITY)


class Study:
    """What is to be run and compared, given the rows that there are."""

    def __init__(self, size: str, data: str | None, rows: list[Row], seeds: int | None = None):
        """size: of the backbone.  data: a corpus; None: the study's worlds.  seeds: at most."""
        self.size, self.data, self.seeds = size, data, seeds
        self.rank = RANK if data is None else SIZES[size].rank
        weights = SHIPPED / "t5" / "model.safetensors"
        self.backbone = file_hash(weights) if data is None else SIZES[size].t5
        self.rows = {key(row): row for row in rows}
        self.refused: set[str] = set()  # systems that train.py does not know, and keys that failed
        if data is None:
            self.experiments = EXPERIMENTS
        else:  # no worlds to turn knobs on, and the paper's rate
            self.experiments = tuple(e for e in EXPERIMENTS if not (e.knob or e.rate or e.world))

    def job(self, experiment: str, system: str, world: dict, lr: float, seed: int) -> Row:
        """A run that may have been made: its row as far as it is known before."""
        options, factor = SYSTEMS[system]
        options = options.replace("4R", str(4 * self.rank))
        if self.data is None:  # as many steps whatever the number of texts
            epochs = round(EPOCHS * WORLD["texts"] / world["texts"])
            options += f" --epochs {epochs} --lr-epochs {max(1, epochs // 2)}"
        else:
            world = dict.fromkeys(WORLD, "")
        return {"experiment": experiment, "system": system, "size": self.size, "options": options,
                "rank": str(max(3, round(self.rank * factor))), "lr": f"{lr:g}", "seed": str(seed),
                "data": self.data or "", **{name: str(value) for name, value in world.items()},
                "backbone": self.backbone}

    def grid(self, experiment: str, system: str, world: dict) -> tuple[dict[float, float], list]:
        """({rate: mean of dev means} of a system in a world, [] or runs that it still lacks)."""
        rates = list(FULL_RATES if system == "full" else RATES)
        if world != WORLD or system not in EXPERIMENTS[1].systems:  # around what was good before
            main = system if system in EXPERIMENTS[1].systems else "clorae"
            middle, missing = self.rate(experiment, main, WORLD)
            if middle is None:
                return {}, missing
            rates = [middle / 2, middle, middle * 2]
        for _ in range(1 + EXTENSIONS):
            jobs = {lr: [self.job(experiment, system, world, lr, s) for s in CHOICE]
                    for lr in rates}
            missing = [job for seed in zip(*jobs.values()) for job in seed
                       if key(job) not in self.rows]
            if missing:
                return {}, missing
            dev = {lr: fmean([float(self.rows[key(job)]["dev_mean"]) for job in tried])
                   for lr, tried in jobs.items()}
            best = max(dev, key=dev.get)
            if best not in (rates[0], rates[-1]):
                break
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
        return dev, []

    def rate(self, experiment: str, system: str, world: dict) -> tuple[float | None, list[Row]]:
        """(the rate of a system in a world, []), or (None, the runs that must choose it first)."""
        if self.data is not None:
            return SIZES[self.size].lr, []
        dev, missing = self.grid(experiment, RATE_OF.get(system, system), world)
        return (None, missing) if missing else (max(dev, key=dev.get), [])

    def tested(self, experiment: Experiment, world: dict) -> tuple[str, ...]:
        """The systems to be compared on test: all, or those above the baseline on dev."""
        systems = tuple(name for name in experiment.systems if name not in self.refused)
        if not experiment.confirm or self.data is not None:
            return systems
        best = {name: max(self.grid(experiment.name, name, world)[0].values(), default=0.0)
                for name in systems}
        return tuple(name for name in systems
                     if name == experiment.baseline or best[name] > best[experiment.baseline])

    def queue(self, experiment: Experiment) -> Iterator[Row]:
        """The runs that an experiment lacks, seed after seed; first those that choose rates."""
        rates, choosing = {}, []
        for world in experiment.worlds():
            for system in experiment.systems:
                if system not in self.refused and not experiment.rate:
                    rate, missing = self.rate(experiment.name, system, world)
                    rates[system, str(world)] = rate
                    choosing += missing
        choosing = [job for job in choosing if str(key(job)) not in self.refused]
        yield from sorted(choosing, key=lambda job: job["seed"])
        if choosing:
            return
        for seed in experiment.seeds[:self.seeds]:
            for world in experiment.worlds():
                for system in self.tested(experiment, world):
                    lr = experiment.rate or rates.get((system, str(world)))
                    if lr and key(job := self.job(experiment.name, system, world, lr, seed)
                                  ) not in self.rows and str(key(job)) not in self.refused:
                        yield job

    def results(self, experiment: Experiment, world: dict) -> dict[str, dict[int, Row]]:
        """{system: {seed: row}} of the runs that an experiment compares, as far as they exist."""
        results = {}
        for system in self.tested(experiment, world):
            lr = experiment.rate or self.rate(experiment.name, system, world)[0]
            if lr:
                jobs = {s: self.job("", system, world, lr, s) for s in experiment.seeds}
                results[system] = {s: row for s, job in jobs.items()
                                   if (row := self.rows.get(key(job))) and not row["error"]}
        return {system: rows for system, rows in results.items() if rows}


def command(job: Row, out: Path) -> list[str]:
    """The command line of a run; what it needs besides, a world and references, is made."""
    reference, words = out / "p_m.json", job["options"].split()
    if "--aml-reference" in words:  # of a reading: one number for all units
        place = words.index("--aml-reference") + 1
        reference = out / f"p_m-{words[place]}.json"
        write_whole(reference, json.dumps(dict.fromkeys(UNITS, float(words[place]))))
        del words[place - 1:place + 1]
    words += ["--size", job["size"], "--rank", job["rank"], "--lr", job["lr"], "--seed",
              job["seed"], "--out", str(folder_of(job, out))]
    if job["data"]:
        gpus = torch.cuda.device_count()
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        return [sys.executable, *torchrun, "train.py", "--data", job["data"], *words]
    if not reference.exists():
        write_whole(reference, json.dumps(demo.P_M))
    knobs = {name: job[name] if name == "conflict" else float(job[name]) for name in WORLD}
    world = out / "worlds" / "-".join([job["seed"], *map(str, knobs.values())])
    if not world.exists():
        whole(world, lambda aside: demo.make_world(aside, int(job["seed"]), **knobs))
    return [sys.executable, "train.py", "--data", str(world), "--t5", str(SHIPPED / "t5"), "--vit",
            str(SHIPPED / "vit"), "--aml-reference", str(reference), *words]


def folder_of(job: Row, out: Path) -> Path:
    """The run folder of a job."""
    words = [job[column] for column in IDENTITY if column != "backbone"]
    name = re.sub(r"[^\w.]+", "-", " ".join([*words, job["backbone"][-6:]]))
    return out / "runs" / name.strip("-")


def accepts(system: str) -> bool:
    """Whether train.py of this version knows a system's options."""
    words = SYSTEMS[system][0].replace("4R", "24").split()
    try:
        with redirect_stderr(StringIO()):
            parse_arguments(words, methods=clorae.METHODS)
    except (SystemExit, UsageError):
        return False
    return True


def commit() -> str:
    """The commit of the code that runs, with "-dirty" if a file outside docs/ differs from it."""
    said = [subprocess.run(["git", *words.split()], cwd=ROOT, capture_output=True, text=True,
                           check=False).stdout.strip()
            for words in ("rev-parse HEAD", "status --porcelain -- . :!docs")]
    return said[0] + "-dirty" * bool(said[1])


def processor() -> str:
    """What computes: the GPUs, or the CPU, on one thread for each run."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return demo.processor().rpartition(", ")[0] + ", 1 thread"


def measured(folder: Path) -> Row:
    """What a finished run found: F1 on dev, of its best epoch, and on test; its parameters."""
    epochs = [json.loads(line)["f1"] for line in (folder / "eval.jsonl").open(encoding="utf-8")]
    scores = json.loads((folder / "scores-test.json").read_bytes())["scores"]
    dev = max(epochs, key=lambda f1: sum(f1.values()))  # the first of equals, as train.py
    test = {unit: scores[unit]["f1"] for unit in UNITS if unit in scores}
    row = {f"{split}_{unit}": f"{value:.4f}" for split, f1 in (("dev", dev), ("test", test))
           for unit, value in (f1 | {"mean": fmean(list(f1.values()))}).items()}
    with safe_open(find_checkpoint(folder) / "model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]
    return row | {"parameters": str(sum(torch.Size(size).numel() for size in sizes))}


def records(row: Row, out: Path) -> dict | None:
    """{unit: {record: [tp, pred, gold]}} on test, of a run whose folder is still at hand."""
    try:
        return json.loads((folder_of(row, out) / "scores-test.json").read_bytes())["records"]
    except OSError:
        return None


@dataclass
class Running:
    """A run in progress."""
    job: Row
    process: subprocess.Popen
    folder: Path
    started: float

    def finished(self) -> Row | None:
        """Its row, once it has ended: with F1, or with the error that ended it; None before."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        row = self.job | {"error": "", "seconds": f"{time.time() - self.started:.0f}",
                          "cpu_seconds": f"{usage.ru_utime + usage.ru_stime:.0f}"}
        if self.process.returncode:
            lines = (self.folder / "log.txt").read_text(errors="replace").split("\n")
            return row | {"error": next((x for x in lines[::-1] if x.strip()), "no output")[:300]}
        for leftover in self.folder.glob("step-*"):  # the best checkpoint is kept
            shutil.rmtree(leftover)
        return row | measured(self.folder)


def start(job: Row, out: Path) -> Running:
    """Start a run, or go on with it, as a process of its own on one thread."""
    words, folder = command(job, out), folder_of(job, out)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if job["data"] else {"OMP_NUM_THREADS": "1"})
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    return Running(job | {"commit": commit(), "processor": processor()}, process, folder,
                   time.time())


def run(study: Study, names: list[str], out: Path, table: Path, jobs: int) -> None:
    """Run what the named experiments lack, `jobs` at a time; a row of `table` for each run."""
    running: list[Running] = []
    try:
        while True:
            busy = {key(one.job) for one in running}
            queue = (job for experiment in study.experiments if experiment.name in names
                     for job in study.queue(experiment) if key(job) not in busy)
            while len(running) < jobs and (job := next(queue, None)):
                if key(job) not in busy:
                    running.append(start(job, out))
                    busy.add(key(job))
            if not running:
                return
            time.sleep(0.2)
            for one in list(running):
                if row := one.finished():
                    running.remove(one)
                    record(study, row, table)
    finally:
        for one in running:  # they stop after their step; the same command goes on with them
            one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait()


def record(study: Study, row: Row, table: Path) -> None:
    """Append a run to the CSV.  One that diverged counts as a dev F1 of 0, so that its rate is not
    chosen; one that failed otherwise gets no row and is not tried again by this command."""
    words = " ".join([row["system"], f"lr {row['lr']}", f"seed {row['seed']}",
                      *(row[name] for name in WORLD)])
    if row["error"] and "finite loss" not in row["error"]:
        study.refused.add(str(key(row)))
        return print(f"failed: {words}: {row['error']}", file=sys.stderr, flush=True)
    row = {"dev_mean": "0"} | row
    report.append_row(table, COLUMNS, row)
    study.rows[key(row)] = row
    print(f"{row['experiment']}: {words}: dev {row['dev_mean']} in {row['cpu_seconds']} s",
          flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.paper", description="Run the paper's experiments, as far "
                    "as they have not been run, and report them.")
    names = [experiment.name for experiment in EXPERIMENTS]
    add = parser.add_argument_group("what").add_argument
    add("--experiments", nargs="+", choices=names, default=names, metavar="NAME",
        help=", ".join(names) + "; default: all, in this order")
    add("--size", choices=tuple(SIZES), default="tiny", help="backbone")
    add("--data", metavar="DIR", help="corpus; default: study worlds, drawn for each seed")
    add("--seeds", type=positive, metavar="N", help="at most so many seeds of each experiment")
    add("--plan", action="store_true", help="print the runs that are known to be missing, and stop")
    add("--report", action="store_true", help="only write the report")
    add = parser.add_argument_group("how").add_argument
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time, a thread each")
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="run folders, worlds")
    add("--csv", type=Path, default=Path("docs/study.csv"), metavar="FILE", help="a row a run")
    add("--markdown", type=Path, default=Path("docs/study_report.md"), metavar="FILE",
        help="the report")
    args = parser.parse_args(argv)
    if (args.size == "tiny") != (args.data is None):
        parser.error(f"expected --size base, large or xl with --data and tiny without, got --size "
                     f"{args.size}, --data {args.data}; correct one of them")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with exit_codes():
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """Run, plan or report, as the command line says."""
    study = Study(args.size, args.data and str(Path(args.data).resolve()),
                  report.read_rows(args.csv, COLUMNS), args.seeds)
    for system in SYSTEMS:
        if not accepts(system):
            study.refused.add(system)
            print(f"skipped: {system}: this train.py has no {SYSTEMS[system][0]}")
    if args.plan:
        jobs = {key(job): " ".join(job[c] for c in ("experiment", "system", "lr", "seed", *WORLD))
                for experiment in study.experiments if experiment.name in args.experiments
                for job in study.queue(experiment)}
        print(*jobs.values(), sep="\n")
    elif not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        with locked(args.out / ".lock", "two of this command would run the same twice", wait=False):
            run(study, args.experiments, args.out.resolve(), args.csv, args.jobs)
    if not args.plan:
        report.write(study, PUBLISHED, args.markdown, lambda row: records(row, args.out))


if __name__ == "__main__":
    main()
