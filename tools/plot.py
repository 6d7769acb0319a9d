"""Draw runs.  Of one its losses, dev F1, AML weights (and under other assumptions), routing and
classes of errors; of several the systems side by side (Fig. 4), the setting in which they differ
(Fig. 5), and the pictures of each in a folder of its own.  Scores that still hold are kept.

    python -m tools.plot RUN [RUN2 ...] --out DIR"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy

from engine.command import Parser
from engine.compare import System, collect, compare, refresh, system_names
from engine.files import UsageError
from engine.processes import World, carry_out
from engine.schema import UNITS
from evaluate import Job, percent, run_options
from tools.figures import COLOURS, STYLES, canvas, write_figure
from tools.replay import replay
from tools.routing import route

ERRORS = ("wrong_type", "boundary", "missed", "spurious", "malformed")  # of evaluate.Counts
Results = Mapping[object, Mapping[str, Sequence[float]]]  # {system: {unit: F1 in %, one a seed}}


def plot_curves(run: Path, path: Path) -> Path:
    """Draw losses per step, dev F1 and AML weights per epoch, from metrics.csv and eval.jsonl; the
    latter does not exist before the first epoch has ended."""
    names, *rows = csv.reader(whole_lines(run / "metrics.csv") or [""])
    history = list(map(json.loads, whole_lines(run / "eval.jsonl")))
    if not rows:
        raise UsageError(f"{run}: expected a run folder with a metrics.csv that has a row, "
                         "got none; name a run that has taken a step")
    log = {name: list(map(float, column)) for name, column in zip(names, zip(*rows))}
    units = [unit for unit in UNITS if f"CE_{unit}" in log]
    steps, window = log["step"], max(1, len(rows) // 40)
    figure, (loss, unit_losses, dev, weights) = canvas(12, 8, 2, 2)
    loss.plot(steps, log["loss"], color="#BBBBBB", linewidth=0.6)
    loss.plot(steps, running_mean(log["loss"], window), color="black")
    loss.set(title=f"training loss, and mean of {window} steps", xlabel="step")
    for unit in units:
        unit_losses.plot(steps, running_mean(log[f"CE_{unit}"], window), label=unit,
                         markevery=max(1, len(rows) // 8), **STYLES[unit])
    unit_losses.set(title=f"cross-entropy per token, mean of {window} steps", xlabel="step",
                    yscale="log")
    used = [dict.fromkeys(units, 1.0), *(past["weights"] for past in history[:-1])]
    for ax, title, series in ((dev, "dev F1, %", [past["f1"] for past in history]),
                              (weights, "AML weight in the epoch", used[:len(history)])):
        for unit in units:
            ax.plot(range(1, len(series) + 1), [values[unit] for values in series], **STYLES[unit])
        ax.set(title=title, xlabel="epoch", xlim=(0.5, max(len(series), 1) + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
    if not history:
        dev.text(0.5, 0.5, "no epoch has ended yet", ha="center", transform=dev.transAxes)
    return write_figure(figure, path, unit_losses)


def whole_lines(log: Path) -> list[str]:
    """The lines of a file, without a last one that is still being written; [] without the file."""
    return log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, without those that are NaN (no such rows)."""
    sums, numbers = (numpy.convolve(each, numpy.ones(window))[:len(values)] for each in (
        numpy.nan_to_num(values), ~numpy.isnan(values)))
    with numpy.errstate(invalid="ignore"):
        return (sums / numbers).tolist()


def draw_run(job: Job, folder: Path, layers: Sequence[int] | None, world: World) -> list[str]:
    """Draw a run's routing, curves and AML weights; returns what was made, and what not and why."""
    run, lines = job.checkpoint.parent, []
    curves = folder / f"curves-{run.resolve().name}.png"
    for name, takes_part, make in (
            ("routing", True, lambda: route(job, folder, layers, world)),
            ("curves", world.main, lambda: [plot_curves(run, curves)]),
            ("AML weights", world.main and job.config.aml, lambda: replay(job, folder)[0])):
        try:
            lines += map(str, make()) if takes_part else []
        except UsageError as problem:
            lines.append(f"no {name}: {problem}")
    return lines + ["no AML weights: trained without them"] * (not job.config.aml)


def plot_systems(results: Results, path: Path) -> Path:
    """Fig. 4: F1 relative to each unit's best system; means and deviations over seeds."""
    units = [u for u in UNITS if any(u in scores for scores in results.values())]
    best = {u: max(fmean(s[u]) for s in results.values() if u in s) or 1.0 for u in units}
    figure, (ax,) = canvas(4 + 1.2 * len(units), 4)
    width, lowest = 0.8 / len(results), 1.0
    for i, (system, scores) in enumerate(results.items()):
        at = {j: [f1 / best[u] for f1 in scores[u]] for j, u in enumerate(units) if u in scores}
        ax.bar([j + (i + 0.5) * width - 0.4 for j in at], [fmean(r) for r in at.values()], width,
               yerr=[deviation(r) for r in at.values()], capsize=2, label=system, edgecolor="white",
               color=COLOURS[i % len(COLOURS)], hatch="//" * (i // len(COLOURS)))
        lowest = min([lowest, *(min(r) for r in at.values())])
    start = max(0, math.floor(10 * lowest - 0.5) / 10)
    ax.set_ylim(bottom=start)
    ax.set_xticks(range(len(units)), units)
    ax.set_ylabel(f"F1 / F1 of the best system (from {start:g})")
    return write_figure(figure, path, ax)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN, which draws no error bar, for a single one."""
    return stdev(values) if len(values) > 1 else math.nan


def plot_sweep(results: Results, name: str, path: Path) -> Path:
    """Fig. 5: F1 of each unit, and their mean, at each value of a setting (the results' keys)."""
    values = sorted(results)
    scores, at = [results[x] for x in values], range(len(values))
    units = [u for u in UNITS if all(u in f1 for f1 in scores)]
    figure, (ax,) = canvas(7, 4.5)
    for unit in units:
        ax.errorbar(at, [fmean(f1[unit]) for f1 in scores], [deviation(f1[unit]) for f1 in scores],
                    capsize=2, label=unit, **STYLES[unit])
    ax.errorbar(at, [fmean(fmean(f1[u]) for u in units) for f1 in scores], label="mean",
                color="#777777", linestyle="--", linewidth=2.5)
    ax.set_xticks(at, [f"{x:g}" for x in values])
    ax.set(xlabel=name, ylabel="F1, %")
    return write_figure(figure, path, ax)


def swept(systems: Sequence[System]) -> str | None:
    """The one setting, rank or dropout, in which systems differ, if there is one."""
    for name in ("rank", "dropout"):
        alike = dict.fromkeys((name, "seed", "out", "save_every"))
        others = [dataclasses.replace(system.config, **alike) for system in systems]
        values = {getattr(system.config, name) for system in systems}
        if len(values) == len(systems) > 1 and others.count(others[0]) == len(others):
            return name
    return None


def error_counts(systems: Sequence[System]) -> dict[str, Counter]:
    """{system, or of a single one its unit: {class of errors: number per seed}}."""
    bars = defaultdict(Counter)
    for system, unit, error in itertools.product(systems, UNITS, ERRORS):
        for report in system.reports:
            bars[unit if len(systems) == 1 else system.name][error] += report["scores"].get(
                unit, {}).get(error, 0) / len(system.reports)
    return {name: bar for name, bar in bars.items() if bar.total()}


def plot_errors(counts: Mapping[str, Counter], path: Path) -> Path:
    """Stacked bars of `error_counts`, in % of a bar's errors, whose number is named."""
    figure, (ax,) = canvas(9, 1.5 + 0.4 * len(counts))
    at, left = range(len(counts)), numpy.zeros(len(counts))
    for error, colour in zip(ERRORS, COLOURS):
        widths = [percent(bar[error], bar.total()) for bar in counts.values()]
        bars = ax.barh(at, widths, 0.7, left, label=error.replace("_", " "), edgecolor="white",
                       color=colour)
        ax.bar_label(bars, [f"{bar[error]:.0f}" if width > 4 else "" for bar, width
                            in zip(counts.values(), widths)], label_type="center", color="white")
        left = left + widths
    ax.set_yticks(at, [f"{name} ({bar.total():.0f})" for name, bar in counts.items()])
    ax.invert_yaxis()
    ax.set_xlabel("% of the errors (their number per seed)")
    return write_figure(figure, path, ax)


def draw_systems(systems: Sequence[System], folder: Path) -> list[Path]:
    """Draw systems side by side, over the setting in which they differ, and their errors."""
    results = {system.name: {unit: f1 for unit, f1 in system.columns().items() if unit in UNITS}
               for system in systems}
    paths = [plot_systems(results, folder / "systems.png")] if len(systems) > 1 else []
    if name := swept(systems):
        settings = [getattr(system.config, name) for system in systems]
        paths.append(plot_sweep(dict(zip(settings, results.values())), name,
                                folder / f"{name}.png"))
    if errors := error_counts(systems):
        paths.append(plot_errors(errors, folder / "errors.png"))
    return paths


def run(args: argparse.Namespace, world: World) -> None:
    """Score what has to be scored, draw what these runs allow, and say what was made.  Of several
    runs each gets a folder for what concerns it alone, numbered as they were named."""
    jobs, several = [Job(folder, args) for folder in args.checkpoint], len(args.checkpoint) > 1
    if several or args.csv:
        compare(jobs, args.csv, world)
    else:
        refresh(jobs, world)
    lines = ["pictures:"]
    for number, job in enumerate(jobs, 1):
        name = f"{number:02d}-{job.checkpoint.parent.resolve().name}" if several else ""
        lines += draw_run(job, args.folder / name, args.layers, world)
    if world.main:
        systems = collect(jobs, system_names([job.config for job in jobs]))
        lines += map(str, draw_systems(systems, args.folder))
    world.print(*lines)


def main(argv: Sequence[str] | None = None) -> None:
    command = Parser(prog="python -m tools.plot", description=__doc__.partition("\n\n")[0],
                     usage="%(prog)s CKPT [CKPT ...] --out DIR [options]")
    run_options(command, several=True)
    add = command.add_out("folder for the pictures")
    add("--layers", nargs="+", type=int, metavar="N",
        help="layers that the routing picture shows; default: all")
    add("--csv", type=Path, metavar="FILE",
        help="several CKPT: write the rows of the comparison there, too")
    carry_out(run, command.parse_args(argv))


if __name__ == "__main__":
    main()
