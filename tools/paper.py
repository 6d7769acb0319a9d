"""The paper's experiments as data, the runs that they lack, and one report of them.

    python -m tools.paper [--jobs 2]                  the study: run what is missing, report
    python -m tools.paper --report                    the report anew, from the CSV alone
    python -m tools.paper --size large --data corpus  the real thing, on all GPUs

Every finished run is a row of a CSV and is not run again; one that was killed goes on as train.py
does.  A seed draws another world and another training.  Rates are chosen on the dev splits of
worlds that no comparison uses; all worlds share demo_backbone/.  docs/study.md is the plan.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from safetensors import safe_open

import demo
from engine.checkpoints import find_checkpoint
from engine.command import Parser
from engine.files import claim, file_hash, whole, write_whole
from engine.processes import exit_codes
from engine.schema import UNITS
from engine.settings import SIZES, positive
from engine.weights import SHIPPED
from tools import report
from tools.report import Row

RANK, EPOCHS = 6, 4  # of the study: low enough that methods differ; as in the paper's 20 epochs the
RATES, FULL_RATES = (1e-3, 2e-3, 4e-3, 8e-3), (1e-4, 2e-4, 4e-4, 8e-4)  # rate is halved 3 times
CHOICE, EXTENSIONS = (100, 101), 2  # seeds of the rates' worlds; how often a grid's edge is passed
# Knobs of make_world as the real data have them: the ratio of Table 1, and no label but "none" in
# two tasks.  texts are what a run of two minutes allows.
WORLD = {"scale": 1.0, "texts": 0.5, "imbalance": 7.3, "conflict": "apart"}
# A system is a method and options of train.py; R is the rank of the backbone's size.
LORA_2R, HELD_OUT = "lora --rank 2R", "--hold-out paper"
MAIN = ("lora", LORA_2R, "clorae", "clorae --no-egr", "clorae --no-aml", "clorae --no-mim")
PEERS = ("tlora", "moslora", "loramoe", "full", "mtllora", "hydralora")

# F1 in the paper, in the order of UNITS: Tables 2 (clorae; full is UMIE), 3 and 4 (T17 and V2).
PUBLISHED = {
    "base": {"full": (76.1, 88.1, 87.7, 84.3, 74.8, 60.5, 22.5),
             "clorae": (74.4, 86.3, 85.8, 87.3, 81.4, 60.7, 28.4),
             f"full {HELD_OUT}": (None, 66.8, None, None, 67.3, None, None),
             f"clorae {HELD_OUT}": (None, 66.2, None, None, 76.5, None, None)},
    "large": {"full": (77.2, 90.7, 90.5, 85.0, 75.5, 61.0, 23.6),
              "clorae": (75.9, 88.9, 89.3, 89.2, 82.8, 64.0, 31.2),  # Table 2 has MED 64.5
              "lora": (74.5, 87.8, 88.1, 82.1, 74.9, 61.0, 25.3),
              "tlora": (72.9, 85.2, 82.3, 85.8, 81.2, 62.4, 29.5),
              "clorae --no-egr": (74.9, 87.8, 88.4, 86.4, 80.8, 61.8, 27.8),
              "clorae --no-aml": (74.3, 87.2, 86.8, 87.6, 81.7, 63.3, 29.8),
              "clorae --no-mim": (75.4, 88.2, 88.1, 87.1, 82.0, 63.8, 30.2),
              f"full {HELD_OUT}": (None, 68.5, None, None, 68.8, None, None),
              f"clorae {HELD_OUT}": (None, 67.8, None, None, 78.2, None, None)},
    "xl": {"full": (78.2, 91.4, 91.0, 86.4, 76.2, 62.1, 24.5),
           "clorae": (77.8, 89.8, 90.5, 89.6, 83.2, 63.5, 32.6)}}


@dataclass(frozen=True)
class Experiment:
    """Systems that are compared with a baseline in one or several worlds, over seeds."""
    name: str
    question: str
    systems: tuple[str, ...]
    seeds: range
    baseline: str = "lora"
    knob: str = ""  # of make_world
    settings: tuple = ()  # of the knob
    world: dict = field(default_factory=dict)  # other knobs than those of WORLD
    rate: float | None = None  # for all systems; None: each has its own, chosen on dev
    readings: bool = False  # with own rates; only those above the baseline on dev are tested
    measure: tuple[str, ...] = ("mean",)  # the columns of test F1 whose mean is compared

    def worlds(self) -> list[dict]:
        """The knobs of each of its worlds."""
        return [WORLD | self.world | {self.knob: value} for value in self.settings] or [
            WORLD | self.world]


def options(*words: str) -> tuple[str, ...]:
    """clorae alone, and with each of these options."""
    return ("clorae", *(f"clorae --{word}" for word in words))


EXPERIMENTS = (
    Experiment("pilot", "How far do seeds spread the difference of two systems?",
               ("lora", "clorae"), range(100, 103), rate=2e-3),
    Experiment("main", "Table 3: does C-LoRAE help, and each of its parts?", MAIN, range(10, 26)),
    Experiment("equal", "The same runs: C-LoRAE against LoRA of equal parameters",
               (LORA_2R, "clorae"), range(10, 26), LORA_2R),
    Experiment("parts", "The same runs, as Table 3 has them: what each part adds to C-LoRAE",
               ("clorae", *MAIN[3:], "lora"), range(10, 26), "clorae"),
    Experiment("peers", "Table 2, Fig. 4: the other methods, and C-LoRAE on the same seeds",
               ("lora", *PEERS, "clorae"), range(10, 18)),
    Experiment("conflict", "Sec. 1: does it help where tasks contradict each other?",
               (LORA_2R, "clorae"), range(10, 16), LORA_2R, "conflict", tuple(demo.CONFLICTS)),
    Experiment("imbalance", "Sec. 2.4: does it help where tasks differ in size?",
               (LORA_2R, "clorae"), range(10, 16), LORA_2R, "imbalance", (1.0, 3.0, 7.3, 30.0)),
    Experiment("texts", "Does it help where texts are few?",
               (LORA_2R, "clorae"), range(10, 16), LORA_2R, "texts", (0.0625, 0.125, 0.25, 0.5)),
    Experiment("aml", "Eq. (9), where the paper is silent: which reading, at 30:1?",
               options("no-aml", "aml-temperature 0.1", "aml-temperature 0.01",
                       "aml-reference 100"), range(200, 208), "clorae",
               world={"imbalance": 30.0}, readings=True),
    Experiment("mim", "Eq. (5) and (8), where the paper is silent: which reading?",
               options("beta 0.1", "beta 1", "beta 1.28", "mim-mean affine", "mim-mean map",
                       "alpha 4R"), range(300, 308), "clorae", readings=True),
    Experiment("table4", "Table 4: T17 and V2, never trained on",
               (f"full {HELD_OUT}", f"{LORA_2R} {HELD_OUT}", f"clorae {HELD_OUT}"), range(10, 16),
               f"{LORA_2R} {HELD_OUT}", measure=("T17", "V2")),
    Experiment("fig5", "Fig. 5: rank and dropout (the paper: rank saturates, dropout 0.1 to 0.4 is "
               "best, 0 and 0.8 are worst)",
               options("rank 0.5R", "rank 2R", "rank 4R", *(
                   f"dropout {p}" for p in (0.1, 0.2, 0.4, 0.8))), range(10, 13), "clorae"),
    Experiment("fig6", "Fig. 6: which expert is heard?  (The paper: MRE and MEE hear their own, so "
               "do lower layers; MNER and upper layers hear the universal one.)", ("clorae",),
               range(10, 11), "clorae"))

IDENTITY = ("size", "options", "rank", "lr", "seed", "data", *WORLD, "backbone")  # of a run
COLUMNS = ("experiment", "system", *IDENTITY, "commit", "processor", "seconds", "cpu_seconds",
           "parameters", *(f"{split}_{unit}" for split in ("dev", "test")
                           for unit in (*UNITS, "mean")), "error")


def key(row: Row) -> tuple[str, ...]:
    """What makes a run another run."""
    return tuple(row[column] for column in IDENTITY)


class Study:
    """What is to be run and what can be compared, given the rows that there are."""

    def __init__(self, size: str, data: str | None, rows: list[Row], seeds: int | None = None):
        """size: of the backbone.  data: a corpus; None: the study's worlds.  seeds: at most."""
        self.size, self.data, self.seeds = size, data, seeds
        self.rank = SIZES[size].rank if data else RANK
        self.backbone = SIZES[size].t5 or file_hash(SHIPPED / "t5" / "model.safetensors")
        self.rows = {key(row): row for row in rows}
        self.failed: set = set()  # keys of runs; they are not tried again
        self.experiments = tuple(  # a corpus has no knobs to turn, and the paper's rate
            e for e in EXPERIMENTS if not (data and (e.knob or e.rate or e.world)))

    def job(self, experiment: str, system: str, world: dict, lr: float, seed: int) -> Row:
        """A run: as much of its row as is known before it starts."""
        words = re.sub(r"([\d.]+)R", lambda x: str(round(float(x[1]) * self.rank)),
                       f"--method {system}")
        words, _, rank = words.partition(" --rank ")
        rank, _, more = (rank or str(self.rank)).partition(" ")
        words += f" {more}" * bool(more)
        if self.data is None:  # as many steps whatever the number of texts
            epochs = round(EPOCHS * WORLD["texts"] / world["texts"])
            words += f" --epochs {epochs} --lr-epochs {epochs // 4}"
        return {"experiment": experiment, "system": system, "size": self.size, "options": words,
                "rank": rank, "lr": f"{lr:g}", "seed": str(seed), "data": self.data or "",
                **{name: "" if self.data else str(value) for name, value in world.items()},
                "backbone": self.backbone}

    def grid(self, experiment: Experiment, system: str,
             world: dict) -> tuple[dict[float, float], list[Row]]:
        """({rate: mean F1 on dev} of a system in a world, []); or ({}, the runs it lacks)."""
        base = max((name for name in MAIN + PEERS if system.startswith(name)), key=len)
        rates = list(FULL_RATES if system == "full" else RATES)
        if system != base or world != WORLD:
            known, missing = self.grid(experiment, base, WORLD)
            if missing or not experiment.readings:  # the rate of the method in the study's world
                return known, missing
            middle = max(known, key=known.get)  # readings: three around it
            rates = [middle / 2, middle, middle * 2]
        for _ in range(1 + EXTENSIONS):
            jobs = {lr: [self.job(experiment.name, system, world, lr, seed) for seed in CHOICE]
                    for lr in rates}
            missing = [job for both in jobs.values() for job in both if key(job) not in self.rows]
            if missing:
                return {}, missing
            dev = {lr: fmean(float(self.rows[key(job)]["dev_mean"]) for job in both)
                   for lr, both in jobs.items()}
            best = max(dev, key=dev.get)
            if best not in (rates[0], rates[-1]):
                break
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
        return dev, []

    def rate(self, experiment: Experiment, system: str, world: dict) -> float | None:
        """The rate of a system in a world; None where it is not chosen yet."""
        if self.data or experiment.rate:
            return experiment.rate or SIZES[self.size].lr
        dev = self.grid(experiment, system, world)[0]
        return max(dev, key=dev.get) if dev else None

    def tested(self, experiment: Experiment, world: dict) -> list[str]:
        """The systems to be compared on test: all; of readings, those better on dev."""
        if not experiment.readings or self.data:
            return list(experiment.systems)
        best = {name: max(self.grid(experiment, name, world)[0].values(), default=0.0)
                for name in experiment.systems}
        return [name for name in experiment.systems
                if name == experiment.baseline or best[name] > best[experiment.baseline]]

    def queue(self, experiment: Experiment) -> Iterator[Row]:
        """The runs that an experiment lacks, seed after seed; first those that choose rates."""
        choosing = [] if self.data or experiment.rate else [
            job for world in experiment.worlds() for system in experiment.systems
            for job in self.grid(experiment, system, world)[1] if key(job) not in self.failed]
        if choosing:
            return iter(sorted(choosing, key=lambda job: int(job["seed"])))
        jobs = (self.job(experiment.name, system, world, lr, seed)
                for seed in experiment.seeds[:self.seeds] for world in experiment.worlds()
                for system in self.tested(experiment, world)
                if (lr := self.rate(experiment, system, world)))
        return (job for job in jobs if key(job) not in self.rows.keys() | self.failed)

    def results(self, experiment: Experiment, world: dict) -> dict[str, dict[int, Row]]:
        """{system: {seed: row}} of the runs that an experiment compares, as far as they exist."""
        results = {}
        for system in self.tested(experiment, world):
            if lr := self.rate(experiment, system, world):
                jobs = {seed: self.job("", system, world, lr, seed) for seed in experiment.seeds}
                results[system] = {seed: row for seed, job in jobs.items()
                                   if (row := self.rows.get(key(job))) and not row["error"]}
        return {system: rows for system, rows in results.items() if rows}


def folder_of(job: Row, out: Path) -> Path:
    """The run folder of a job."""
    words = [job[column] for column in IDENTITY[:-1]] + [job["backbone"][-6:]]
    return out / "runs" / re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")


def command(job: Row, out: Path) -> list[str]:
    """The command line of a run; what it needs besides, a world and references p_m, is made."""
    references, words = demo.P_M, job["options"].split()
    if "--aml-reference" in words:  # a reading: one number for all units
        place = words.index("--aml-reference")
        references = dict.fromkeys(UNITS, float(words[place + 1]))
        del words[place:place + 2]
    words += ["--out", str(folder_of(job, out)), *(
        word for name in ("size", "rank", "lr", "seed") for word in (f"--{name}", job[name]))]
    if job["data"]:
        gpus = torch.cuda.device_count()
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        return [sys.executable, *torchrun, "train.py", "--data",
                str(Path(job["data"]).resolve()), *words]
    write_whole(file := out / f"p_m-{references['T15']:g}.json", json.dumps(references))
    knobs = {name: job[name] if name == "conflict" else float(job[name]) for name in WORLD}
    world = out / "worlds" / "-".join([job["seed"], *map(str, knobs.values())])
    if not world.exists():
        whole(world, lambda aside: demo.make_world(aside, int(job["seed"]), **knobs))
    return [sys.executable, "train.py", "--data", str(world), "--t5", str(SHIPPED / "t5"), "--vit",
            str(SHIPPED / "vit"), "--aml-reference", str(file), *words]


def made_by() -> Row:
    """The commit, with "-dirty" if files outside docs/ differ from it, and what computes."""
    said = [subprocess.run(["git", *words.split()], cwd=SHIPPED.parent, capture_output=True,
                           text=True, check=False).stdout.strip()
            for words in ("rev-parse HEAD", "status --porcelain -- . :!docs")]
    chip = demo.processor().rpartition(", ")[0] + ", 1 thread"
    if torch.cuda.is_available():
        chip = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"commit": said[0] + "-dirty" * bool(said[1]), "processor": chip}


def measured(folder: Path) -> Row:
    """F1 of a finished run on dev, of its best epoch, and on test; how much it trained."""
    epochs = [json.loads(line)["f1"] for line in (folder / "eval.jsonl").open(encoding="utf-8")]
    scores = json.loads((folder / "scores-test.json").read_bytes())["scores"]
    dev = max(epochs, key=lambda f1: sum(f1.values()))  # the first of equals, as train.py
    test = {unit: scores[unit]["f1"] for unit in UNITS if unit in scores}
    with safe_open(find_checkpoint(folder) / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return {"parameters": str(sum(torch.Size(shape).numel() for shape in shapes)),
            **{f"{split}_{unit}": f"{value:.4f}" for split, f1 in (("dev", dev), ("test", test))
               for unit, value in (f1 | {"mean": fmean(f1.values())}).items()}}


def run(study: Study, names: list[str], out: Path, table: Path, jobs: int) -> None:
    """Run what the named experiments lack, `jobs` at a time; a row of `table` for each run."""
    running: dict[int, tuple[subprocess.Popen, Row, float]] = {}
    try:
        while True:
            queue = (job for experiment in study.experiments if experiment.name in names
                     for job in study.queue(experiment)
                     if key(job) not in [key(other) for _, other, _ in running.values()])
            while len(running) < jobs and (job := next(queue, None)):
                (folder := folder_of(job, out)).mkdir(parents=True, exist_ok=True)
                threads = {} if job["data"] else {"OMP_NUM_THREADS": "1"}
                with open(folder / "log.txt", "ab") as log:
                    process = subprocess.Popen(command(job, out), cwd=SHIPPED.parent, stdout=log,
                                               stderr=log, env=os.environ | threads)
                running[process.pid] = process, job | made_by(), time.time()
            if not running:
                return
            pid, code, used = next_to_end(running)
            process, job, started = running.pop(pid)
            process.returncode = code
            job |= {"seconds": f"{time.time() - started:.0f}", "cpu_seconds": f"{used:.0f}"}
            record(study, job, code, folder_of(job, out), table)
    finally:
        for process, *_ in running.values():  # it stops after its step; the same command goes on
            process.send_signal(signal.SIGTERM)
        for process, *_ in running.values():
            process.wait()


def next_to_end(pids: Iterable[int]) -> tuple[int, int, float]:
    """The pid, exit code and CPU seconds of the run that ends next; other children are left."""
    while True:
        for pid in pids:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.1)


def record(study: Study, row: Row, code: int, folder: Path, table: Path) -> None:
    """Append a run that ended to the CSV.  One that diverged has a dev F1 of 0, so that its rate is
    not chosen; one that failed otherwise gets no row and is not tried again by this command."""
    row, told = row | {"error": ""}, f"{row['experiment']}: {row['system']}, " + ", ".join(
        f"{name} {row[name]}" for name in ("lr", "seed", *WORLD, "cpu_seconds"))
    if code:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        error = next((line for line in lines[::-1] if line.strip()), "no output")[:300]
        if "finite loss" not in error:
            study.failed.add(key(row))
            return print(f"failed: {told}: {error}", file=sys.stderr, flush=True)
        row |= {"error": error, "dev_mean": "0"}
    else:
        row |= measured(folder)
        for checkpoint in folder.glob("step-*"):  # the best one is kept
            shutil.rmtree(checkpoint)
    report.append_row(table, COLUMNS, row)
    study.rows[key(row)] = row
    print(f"{told}: dev F1 {row['dev_mean']}", flush=True)


def draw_gates(study: Study, out: Path, picture: Path) -> None:
    """Fig. 6 of C-LoRAE's first run, by tools.routing, unless it is drawn already."""
    fig6 = study.experiments[-1]
    for row in study.results(fig6, fig6.worlds()[0]).get("clorae", {}).values():
        if not picture.exists():
            words = ["-m", "tools.routing", str(folder_of(row, out)), "--out", str(picture.parent)]
            subprocess.run([sys.executable, *words], check=False)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.paper", description="Run the paper's experiments, as far "
                    "as they have not been run, and report them.")
    names = [experiment.name for experiment in EXPERIMENTS]
    add = parser.add_argument_group("what").add_argument
    add("--experiments", nargs="+", choices=names, default=names, metavar="NAME",
        help=", ".join(names) + "; default: all, in this order")
    add("--size", choices=tuple(SIZES), default="tiny", help="backbone")
    add("--data", metavar="DIR", help="corpus; default: worlds of the study, drawn for each seed")
    add("--seeds", type=positive, metavar="N", help="at most so many seeds of each comparison")
    add("--report", action="store_true", help="only write the report")
    add = parser.add_argument_group("how").add_argument
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time, a thread each")
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="run folders, worlds")
    add("--csv", type=Path, default=Path("docs/study.csv"), metavar="FILE",
        help="a row a run; the report is written beside it")
    args = parser.parse_args(argv)
    if (args.size == "tiny") != (args.data is None):
        parser.error(f"expected --size base, large or xl with --data and tiny without, got --size "
                     f"{args.size}, --data {args.data}; correct one of them")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = args.out.resolve()

    def records(row: Row) -> dict | None:
        file = folder_of(row, out) / "scores-test.json"
        return json.loads(file.read_bytes())["records"] if file.exists() else None

    with exit_codes():
        study = Study(args.size, args.data, report.read_rows(args.csv, COLUMNS), args.seeds)
        if not args.report:
            with claim(out):
                run(study, args.experiments, out, args.csv, args.jobs)
                draw_gates(study, out, args.csv.with_name(f"{args.csv.stem}_fig6") / "routing.png")
        report.write(study, PUBLISHED, args.csv.with_name(f"{args.csv.stem}_report.md"), records)


if __name__ == "__main__":
    main()
