"""The report of a study, made from its CSV: means, intervals, paired differences, curves.

tools/paper.py says what was to be run; here is what can be said of it.  A comparison is paired: a
seed is one world and one training for all systems, and only the differences within a seed count.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
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
    density = numpy.cos(angles) ** (freedom - 1)
    area = (density[1:] + density[:-1]).sum() / 2 * (angles[1] - angles[0])
    return min(1.0, constant * float(area))


@cache
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
    """Of the paired t test, two-sided, that the mean is 0; 1 where no spread is known."""
    n = len(differences)
    if n < 2 or not (spread := stdev(differences)):
        return 1.0
    return t_two_sided(fmean(differences) / spread * math.sqrt(n), n - 1)


def least_difference(spread: float, n: int, alpha: float = ALPHA) -> float:
    """The smallest true mean of n paired differences with this standard deviation that a two-sided
    t test at alpha finds with a probability of 80 %: (t_0.975 + t_0.8) spread / sqrt(n) at 5 %."""
    if n < 2:
        return math.inf
    quantiles = t_quantile(alpha, n - 1) + t_quantile(2 * (1 - POWER), n - 1)
    return quantiles * spread / math.sqrt(n)


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
    lines = list(csv.reader(io.StringIO(text := path.read_text(encoding="utf-8")))) or [[]]
    if lines[0] != list(columns):
        raise UsageError(f"{path}:1: expected the columns {','.join(columns)}, got "
                         f"{','.join(lines[0])}; name another file with --csv")
    for number, line in enumerate(lines, 1):
        if len(line) != len(columns) or number == len(lines) and not text.endswith("\n"):
            raise UsageError(f"{path}:{number}: expected a whole line of {len(columns)} cells, got "
                             f"one that is cut, of {len(line)}; delete it: its run is made again")
    return [dict(zip(columns, line)) for line in lines[1:]]


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
def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown, empty without rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return ["", *lines, ""] if rows else []


def number(value: float | None, form: str = ".1f") -> str:
    """A number, or a dash for what is not known."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def score(rows: dict[int, Row], units: Sequence[str] = ("mean",)) -> dict[int, float]:
    """{seed: F1 on test, in %}, the mean over these columns."""
    return {seed: fmean(float(row[f"test_{unit}"]) for unit in units)
            for seed, row in rows.items()}


def differences(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    """{seed: second less first} of the seeds that both have."""
    return {seed: second[seed] - value for seed, value in first.items() if seed in second}


def f1_table(study: Any, experiment: Any, world: dict, published: dict) -> list[str]:
    """F1 of each unit, the paper's figure beside ours, the mean with its interval, and the dev F1
    by which a system's rate was chosen."""
    lines, results = [], study.results(experiment, world)
    for system in experiment.systems:
        rows, paper = results.get(system, {}), published.get(system, (None,) * len(UNITS))
        dev = {} if study.data or experiment.rate else study.grid(experiment, system, world)[0]
        rates = [f"**{lr:g}: {f1:.1f}**" if f1 == max(dev.values()) else f"{lr:g}: {f1:.1f}"
                 for lr, f1 in dev.items()]
        one, means = next(iter(rows.values()), {}), list(score(rows, experiment.measure).values())
        f1 = [fmean(score(rows, (unit,)).values()) if one.get(f"test_{unit}") else None
              for unit in UNITS]
        cells = [f"{number(ours)} ({number(theirs)})" for ours, theirs in zip(f1, paper)]
        mean = f"{fmean(means):.2f} ± {number(half_width(means), '.2f')}" if means else "-"
        lines += [[system, one.get("parameters", "-"), len(rows), *cells, mean,
                   number(None if None in paper else sum(paper)), ", ".join(rates) or one["lr"]]
                  ] if rows or rates else []
    return table(("", "trained", "seeds", *(f"{unit} (paper)" for unit in UNITS),
                  f"{' and '.join(experiment.measure)}, 95 % by t over seeds", "All in the paper",
                  "rate: mean F1 on dev of two seeds that no comparison uses; bold: chosen"), lines)


def comparison(cases: Sequence[tuple[str, Sequence[float], Sequence[tuple]]], experiment: Any,
               tried: int) -> list[str]:
    """Paired differences to a baseline.  cases: a name, the differences over seeds, the records of
    each seed or None, see bootstrap.  tried: how many there are, those not tested counted."""
    corrected, lines = holm([p_value(values) for _, values, _ in cases], tried), []
    for (name, values, pairs), p in zip(cases, corrected):
        n, mean, width = len(values), fmean(values), half_width(values)
        spread = stdev(values) if n > 1 else math.nan
        low, high = bootstrap(pairs) if pairs and all(map(all, pairs)) else (None, None)
        least = (number(least_difference(spread, n, ALPHA / m), ".2f") for m in (1, tried))
        intervals = (f"[{number(a, '+.2f')}, {number(b, '+.2f')}]"
                     for a, b in ((mean - width, mean + width), (low, high)))
        lines.append([name, n, number(spread, ".2f"), "{} ({})".format(*least), f"{mean:+.2f}",
                      *intervals, f"{p:.3f}",
                      "cannot tell" if p >= ALPHA else "higher" if mean > 0 else "lower"])
    return table(("", "seeds", "paired spread", "least difference these seeds can tell (by Holm's "
                  "first step)", f"{' and '.join(experiment.measure)} F1 less that of "
                  f"{experiment.baseline}", "95 %, t over seeds", "95 %, "
                  "bootstrap over seeds and records (-: records not at hand, seeds alone)",
                  f"p, Holm of {tried}", "reading"), lines) or ["Not run yet.", ""]


def curve(experiment: Any, points: list[tuple[dict, dict[str, dict[int, Row]]]],
          path: Path) -> list[str]:
    """Draw F1 of both systems over a knob, and their paired difference, with 95 % t intervals."""
    figure, (left, right) = canvas(9, 3.4, 1, 2)
    series = {name: {} for name in (*experiment.systems, " less ".join(experiment.systems[::-1]))}
    for world, results in points:
        f1 = [score(results.get(name, {})) for name in experiment.systems]
        for name, values in zip(series, (*f1, differences(*f1))):
            if len(values) > 1:
                series[name][str(world[experiment.knob])] = list(values.values())
    for colour, (name, seeds), axes in zip(COLOURS, series.items(), (left, left, right)):
        axes.errorbar(list(seeds), list(map(fmean, seeds.values())), label=name, marker="o",
                      yerr=list(map(half_width, seeds.values())), capsize=3, color=colour)
        axes.set(xlabel=experiment.knob, ylabel="mean F1 on test")
        axes.legend()
    right.axhline(0, color="#888888", linewidth=0.8)
    write_figure(figure, path)
    return [f"![{experiment.name}]({path.name})", ""]


def head(study: Any, published: str) -> list[str]:
    """What the report is made of, and what the pilot's spread lets the planned seeds tell."""
    rows, pilot = list(study.rows.values()), study.experiments[0]
    hours = sum(float(row["cpu_seconds"]) for row in rows) / 3600
    lines = ["# The study", "", f"Made by `python -m tools.paper --report` from {len(rows)} runs, "
             f"of which {sum(row['error'] > '' for row in rows)} diverged and are left out; "
             f"{hours:.1f} CPU hours. F1 in %, on test; the paper's figures are those of its size "
             f"{published}. docs/study.md tells what was planned.", "",
             *(f"- {name}: {', '.join(sorted({row[name] for row in rows}))}"
               for name in ("processor", "commit", "backbone")), ""]
    results = study.results(pilot, pilot.worlds()[0]) if pilot.rate else {}
    values = differences(*map(score, results.values())).values() if len(results) == 2 else []
    told = [f"{n} seeds {least_difference(stdev(values), n):.2f}"
            for n in (3, 6, 8, 16) if len(values) > 1]
    return lines + [f"The pilot's {len(values)} paired differences have a standard deviation of "
                    f"{stdev(values):.2f} points. With a power of {POWER:.0%} at {ALPHA:.0%} the "
                    f"smallest difference that can be told is, in points: {', '.join(told)}.", ""
                    ] if told else lines


def paired(experiment: Any, points: list[tuple[dict, dict[str, dict[int, Row]]]],
           records: Callable[[Row], dict | None]) -> list[tuple[str, list[float], list]]:
    """The cases of `comparison`; where a knob is turned, the last is what turning it changes."""
    cases, by_seed, knob = [], [], experiment.knob

    def counts(row: Row) -> dict | None:  # of the units that are compared
        return (units := records(row)) and {unit: units[unit] for unit in units
                                            if {unit, "mean"} & set(experiment.measure)}

    for world, results in points:
        first = results.get(experiment.baseline, {})
        for system, rows in results.items():
            values = differences(*(score(some, experiment.measure) for some in (first, rows)))
            if system != experiment.baseline and values:
                cases.append((f"{knob} {world[knob]}" if knob else system, list(values.values()),
                              [(counts(first[seed]), counts(rows[seed])) for seed in values]))
                by_seed.append(values)
    if len(cases) == len(experiment.settings) > 1:
        turned = differences(by_seed[0], by_seed[-1])
        cases.append((f"{cases[-1][0]} less {cases[0][0]}", list(turned.values()), []))
    return cases


def write(study: Any, published: dict, path: Path,
          records: Callable[[Row], dict | None] = lambda row: None) -> None:
    """Write the report, and its pictures beside it.  study: tools.paper.Study.  records: {unit:
    {record: [tp, pred, gold]}} of a run on test, None where it is no longer at hand."""
    size = "large" if study.size == "tiny" else study.size
    lines, stem = head(study, size), path.stem.removesuffix("_report")
    for experiment in study.experiments:
        knob = experiment.knob
        points = [(world, study.results(experiment, world)) for world in experiment.worlds()]
        lines += [f"## {experiment.name}", "", experiment.question, ""]
        if knob and sum(len(results) == 2 for _, results in points) > 1:
            lines += curve(experiment, points, path.with_name(f"{stem}_{knob}.png"))
        cases = paired(experiment, points, records)
        tried = len(experiment.settings) + 1 if knob else len(experiment.systems) - 1  # planned
        gates = path.with_name(f"{stem}_{experiment.name}") / "routing.png"
        lines += [f"![gates]({gates.parent.name}/{gates.name})", ""] if gates.exists() else []
        lines += comparison(cases, experiment, tried) if len(experiment.systems) > 1 else []
        for world, results in points:
            lines += [f"{knob} {world[knob]}:"] if knob and results else []
            papers = not (knob or experiment.rate or experiment.readings)  # that the paper has, too
            lines += f1_table(study, experiment, world, published.get(size, {}) if papers else {})
    write_whole(path, "\n".join(lines))
