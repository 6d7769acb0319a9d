"""The report of a study, made from its CSV: means, intervals, paired differences, curves.

tools/paper.py says what was to be run; here is what can be said of it.  A comparison is paired: a
seed is one world and one training for all systems, and only the differences within a seed count.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy

from engine.files import UsageError, append, write_whole
from engine.schema import UNITS
from tools.figures import COLOURS, canvas, write_figure

ALPHA, POWER, DRAWS = 0.05, 0.8, 2000
Row = dict[str, str]


# ------------------------------------------------------------------------------------ statistics
def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t, by the substitution T = tan(angle) sqrt(freedom), in which its
    density is a power of the cosine."""
    angles = numpy.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 20001)
    constant = 2 * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
                            ) / math.sqrt(math.pi)
    return min(1.0, constant * float(numpy.trapezoid(numpy.cos(angles) ** (freedom - 1), angles)))


def t_quantile(two_sided: float, freedom: int) -> float:
    """The t that |T| exceeds with this probability, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = ((middle, high) if t_two_sided(middle, freedom) > two_sided else (low, middle))
    return low


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of a mean; infinite for a single value."""
    n = len(values)
    return t_quantile(ALPHA, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.inf


def p_value(differences: Sequence[float]) -> float:
    """Of the paired t test, two-sided, that the mean is 0; 1 for a single difference."""
    n = len(differences)
    if n < 2 or not (spread := stdev(differences)):
        return 1.0
    return t_two_sided(fmean(differences) / spread * math.sqrt(n), n - 1)


def least_difference(spread: float, n: int) -> float:
    """The smallest true mean of n paired differences with this standard deviation that a two-sided
    t test at 5 % finds with a probability of 80 %, by (t_0.975 + t_0.8) spread / sqrt(n)."""
    quantiles = t_quantile(ALPHA, n - 1) + t_quantile(2 * (1 - POWER), n - 1)
    return quantiles * spread / math.sqrt(n) if n > 1 else math.inf


def holm(p_values: Sequence[float], tried: int | None = None) -> list[float]:
    """Holm's corrected p, in the order given.  tried: how many there were, the unseen counted."""
    corrected, highest, tried = [0.0] * len(p_values), 0.0, max(tried or 0, len(p_values))
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (tried - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def bootstrap(pairs: Sequence[tuple[dict, dict]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over seeds of F1 of the second less F1 of the first, in points.

    pairs: of each seed, {unit: {record: [tp, pred, gold]}} of two systems on one world.  Drawn anew
    are the seeds and, in each, the records of each unit, the same for both systems."""
    random, deltas = numpy.random.default_rng(seed), []
    for first, second in pairs:
        units = []
        for unit in first:
            n, f1 = len(first[unit]), []
            draws = random.multinomial(n, numpy.full(n, 1 / n), DRAWS)  # [DRAWS, n]
            for records in (first[unit], second[unit]):
                tp, pred, gold = (draws @ numpy.array([records[i] for i in first[unit]])).T
                f1.append(200 * tp / numpy.maximum(pred + gold, 1))
            units.append(f1[1] - f1[0])
        deltas.append(numpy.mean(units, axis=0))  # [DRAWS]
    seeds = random.multinomial(len(pairs), numpy.full(len(pairs), 1 / len(pairs)), DRAWS)
    low, high = numpy.percentile((seeds * numpy.array(deltas).T).sum(axis=1) / len(pairs),
                                 (100 * ALPHA / 2, 100 - 100 * ALPHA / 2))
    return float(low), float(high)


# ---------------------------------------------------------------------------------------- the CSV
def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a study's CSV, none if there is no file yet; UsageError if it is not one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text))
    rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise UsageError(f"{path}:1: expected the columns {','.join(columns)}, got "
                         f"{reader.fieldnames}; name another file with --csv")
    if not text.endswith("\n") or any(None in row.values() or None in row for row in rows):
        raise UsageError(f"{path}:{text.count(chr(10)) + 1}: expected whole lines of {len(columns)}"
                         " cells, got one that is cut or torn; delete it: its run is made again")
    return rows


def append_row(path: Path, columns: Sequence[str], row: Row) -> None:
    """Append a row, and before the first one the header: all of it or, on a full disk, nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    writer.writerow(row)
    append(path, text.getvalue())


# ------------------------------------------------------------------------------------- the report
def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)),
            ""]


def number(value: float | None, form: str = ".1f") -> str:
    """A number, or a dash for what is not known."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def score(row: Row, unit: str = "mean") -> float:
    """F1 on test, in %."""
    return float(row[f"test_{unit}"])


def differences(first: dict[int, Row], second: dict[int, Row]) -> dict[int, float]:
    """{seed: second less first} in the mean F1 on test, of the seeds that both have."""
    return {seed: score(second[seed]) - score(first[seed]) for seed in first if seed in second}


def rate_lines(study: Any, experiment: Any, world: dict) -> list[str]:
    """The dev F1 by which each system's rate was chosen."""
    lines = []
    for system in experiment.systems:
        dev, _ = study.grid(experiment.name, system, world) if not experiment.rate else ({}, [])
        if dev:
            best = max(dev, key=dev.get)
            lines.append([system, ", ".join(f"**{f1:.1f} at {lr:g}**" if lr == best else
                                            f"{f1:.1f} at {lr:g}" for lr, f1 in dev.items())])
    return ["Rates, by the mean F1 on dev over two seeds that no comparison uses:",
            *table(("system", "dev F1 at rate, chosen in bold"), lines)] if lines else []


def f1_table(results: dict[str, dict[int, Row]], published: dict) -> list[str]:
    """F1 of each unit, the paper's figure beside ours, and the mean with its interval."""
    lines = []
    for system, rows in results.items():
        paper = published.get(system, (None,) * len(UNITS))
        cells = [f"{number(fmean([score(row, unit) for row in rows.values()]))} ({number(p)})"
                 for unit, p in zip(UNITS, paper) if next(iter(rows.values()))[f"test_{unit}"]]
        means, every = [score(row) for row in rows.values()], None not in paper
        one = next(iter(rows.values()))
        lines.append([system, one["lr"], f"{int(one['parameters']):,}", len(rows), *cells,
                      f"{fmean(means):.2f} ± {number(half_width(means), '.2f')}",
                      number(sum(paper) if every else None)])
    head = ("system", "rate", "trained", "seeds", *(f"{unit} (paper)" for unit in UNITS),
            "mean, 95 % over seeds", "All in the paper")
    return table(head, lines)


def comparison(cases: Sequence[tuple[str, dict[int, Row], dict[int, Row]]], baseline: str,
               tried: int, records: Callable[[Row], dict | None]) -> list[str]:
    """Paired differences to a baseline: what could be told, what is, and what it means.
    cases: a name, the baseline's rows by seed and another system's.  tried: how many there are."""
    cases = [(name, paired, [(records(first[seed]), records(second[seed])) for seed in paired])
             for name, first, second in cases
             if (paired := differences(first, second))]
    corrected, lines = holm([p_value(list(paired.values())) for _, paired, _ in cases], tried), []
    for (name, paired, pairs), p in zip(cases, corrected):
        values, n = list(paired.values()), len(paired)
        mean, width, spread = fmean(values), half_width(values), stdev(values) if n > 1 else None
        low, high = bootstrap(pairs) if all(a and b for a, b in pairs) else (None, None)
        told = "cannot tell" if p >= ALPHA else "higher" if mean > 0 else "lower"
        lines.append([name, n, number(spread, ".2f"),
                      number(spread and least_difference(spread, n), ".2f"), f"{mean:+.2f}",
                      f"[{number(mean - width, '+.2f')}, {number(mean + width, '+.2f')}]",
                      f"[{number(low, '+.2f')}, {number(high, '+.2f')}]", f"{p:.3f}", told])
    return table(("", "seeds", "paired spread", "least difference these seeds can tell",
                  f"mean F1 less that of {baseline}", "95 %, t over seeds",
                  "95 %, bootstrap over seeds and records (-: records not at hand)",
                  f"p, Holm of {tried}", "reading"), lines) if lines else ["Not run yet.", ""]


def curve(experiment: Any, points: list[tuple[dict, dict[str, dict[int, Row]]]],
          path: Path) -> list[str]:
    """Draw F1 of both systems over a knob, and their paired difference, with 95 % t intervals."""
    figure, (left, right) = canvas(9, 3.4, 1, 2)
    names = [str(world[experiment.knob]) for world, _ in points]
    first, second = experiment.systems
    for k, system in enumerate((first, second, None)):
        series = {name: [score(row) for row in results.get(system, {}).values()] if system else
                  list(differences(results.get(first, {}), results.get(second, {})).values())
                  for name, (_, results) in zip(names, points)}
        places = [i for i, name in enumerate(names) if len(series[name]) > 1]
        kept = [series[names[i]] for i in places]
        (left if system else right).errorbar(
            places, [fmean(values) for values in kept], [half_width(values) for values in kept],
            color=COLOURS[k], marker="o", capsize=3, label=system)
    for axes, title in ((left, "mean F1 on test"), (right, f"{second} less {first}")):
        axes.set(title=title, xlabel=experiment.knob, xticks=range(len(names)), xticklabels=names)
    left.legend()
    right.axhline(0, color="#888888", linewidth=0.8)
    write_figure(figure, path)
    return [f"![{experiment.name}]({path.name})", ""]


def spread_lines(study: Any) -> list[str]:
    """What the pilot's paired spread lets the planned numbers of seeds tell."""
    pilot = study.experiments[0]
    results = study.results(pilot, pilot.worlds()[0])
    values = list(differences(*(results.get(name, {}) for name in pilot.systems)).values())
    if len(values) < 2:
        return ["The pilot is not finished: nothing is known of the spread.", ""]
    spread = stdev(values)
    told = ", ".join(f"{n} seeds {least_difference(spread, n):.2f}" for n in (3, 6, 8, 16))
    return [f"Pilot: the differences of {len(values)} seeds spread by {spread:.2f} points (sample "
            f"standard deviation). With power {POWER:.0%} at {ALPHA:.0%} the smallest difference "
            f"that can be told is, in points: {told}.", ""]


def write(study: Any, published: dict, markdown: Path,
          records: Callable[[Row], dict | None] = lambda row: None) -> None:
    """Write the report and its pictures.  study: tools.paper.Study.  records: {unit: {record: [tp,
    pred, gold]}} of a run on test, None where it is no longer at hand."""
    rows, size = list(study.rows.values()), "large" if study.size == "tiny" else study.size
    hours = sum(float(row["cpu_seconds"] or 0) for row in rows) / 3600
    told = {name: ", ".join(sorted({row[name][:60] for row in rows}))
            for name in ("commit", "processor", "backbone")}
    lines = ["# The study", "", f"Made by `python -m tools.paper --report` from {len(rows)} runs, "
             f"{hours:.1f} CPU hours. Processor: {told['processor']}. Commits: {told['commit']}. "
             f"Backbone, sha256: {told['backbone']}. docs/study.md tells what was planned. F1 in "
             f"%, on test; the paper's figures are those of its size {size}.", "",
             *(spread_lines(study) if study.data is None else [])]
    for experiment in study.experiments:
        lines += [f"## {experiment.name}: {experiment.question}", "", experiment.source, ""]
        points = [(world, study.results(experiment, world)) for world in experiment.worlds()]
        if experiment.knob and any(len(results) == 2 for _, results in points):
            lines += curve(experiment, points, markdown.with_name(f"study_{experiment.name}.png"))
        cases = [(f"{experiment.knob} {world[experiment.knob]}" if experiment.knob else system,
                  results.get(experiment.baseline, {}), rows) for world, results in points
                 for system, rows in results.items() if system != experiment.baseline]
        tried = max(len(cases), experiment.confirm * (len(experiment.systems) - 1))
        lines += comparison(cases, experiment.baseline, tried, records)
        for world, results in points:
            lines += [f"{experiment.knob} {world[experiment.knob]}:"] if experiment.knob else []
            lines += rate_lines(study, experiment, world) if study.data is None else []
            lines += f1_table(results, published.get(size, {})) if results else []
    write_whole(markdown, "\n".join(lines))
