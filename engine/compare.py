"""Systems side by side, from the files of their scores (see evaluate.save_scores)."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy
from safetensors import safe_open

from engine.corpus import corpus_hash, corpus_of
from engine.files import UsageError, save_csv
from engine.processes import World
from engine.schema import UNITS
from engine.settings import Config

RESAMPLES = 1000  # of the test records, for the interval of a difference
COLUMNS = (*UNITS, "All", "mean")
COMPARISON = (
    "All, mean: sum and mean of a system's columns; +-: sample standard deviation over its seeds, "
    "below the mean over them",
    "TP: trainable parameters, those of the visual adapter and of L_MIM included",
    "vs first: difference to the first system in the mean of the columns that both have, and its "
    f"95 % bootstrap interval: {RESAMPLES:,} times the records of each column are drawn anew, the "
    "same for both, and the seeds of each system; where a system has one seed, the interval leaves "
    "out what another seed would change, and is too narrow")


def compare(jobs: Sequence[Any], csv: Path | None, world: World) -> None:
    """Print the systems of several jobs (evaluate.Job) side by side; `csv` gets the table, too."""
    names = system_names([job.config for job in jobs])
    seeds = Counter((name, job.config.seed) for name, job in zip(names, jobs))
    (name, seed), times = seeds.most_common(1)[0]
    if times > 1:
        raise UsageError("checkpoints: expected runs that differ in a setting or the seed, "
                         f"got two of {name} with seed {seed}; name one of them")
    if len({job.made_from["data"] for job in jobs}) > 1:
        raise UsageError("checkpoints: expected runs on one corpus, got "
                         f"{', '.join(str(corpus_of(job.config)) for job in jobs)}, which "
                         "differ; name one for all with --data DIR")
    refresh(jobs, world)
    if world.main:
        systems = collect(jobs, names)
        reports = [report for system in systems for report in system.reports]
        lines = [comparison_line(system, systems[0]) for system in systems]
        defined = jobs[0].made_from["definitions"]
        world.print(f"{jobs[0].split} split, {jobs[0].decoding}", comparison_table(lines), "",
                    *(f"{unit:5}{defined[unit]}" for unit in UNITS if unit in reports[0]["scores"]),
                    f"F1: {defined['F1, P, R']}", *COMPARISON,
                    *sorted({note for report in reports for note in report["notes"]}))
        if csv:
            save_csv(csv, lines)


def refresh(jobs: Sequence[Any], world: World) -> None:
    """Score the jobs whose stored scores, if the main process has any, are not of this very
    checkpoint, split, data and decoding."""
    known = world.share([still_true(job.scores, job.made_from) for job in jobs])[world.leader]
    for job, fresh in zip(jobs, known):
        world.print(f"{job.checkpoint}: " + (f"scores of {job.scores}" if fresh else "decoding"))
        if not fresh:
            job.score(world)


def differences(job: Any, own: Config, usual: Any) -> list[str]:
    """What decides a job's scores and is not as in its run's own test, as words for file names.

    own, usual: the settings of the run and how it decodes.  A corpus counts by the hash in the
    checkpoint, so that it may move, and by its path where a checkpoint has none."""
    config, decoding = job.config, job.decoding
    corpus, units = corpus_of(config), config.units or UNITS
    digest = corpus_hash(corpus)
    trained_on = json.loads((job.checkpoint / "state.json").read_bytes()).get("corpus_sha256")
    same = (digest == trained_on if trained_on
            else corpus.resolve() == corpus_of(own).resolve())
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", corpus.resolve().name)[:40]
    chosen = "all" if set(units) == set(UNITS) else "-".join(u for u in UNITS if u in units)
    words = ((not same, f"data-{name}-{digest[:8]}"),
             (set(units) != set(own.units or UNITS), f"units-{chosen}"),
             (config.missing_images != own.missing_images, f"images-{config.missing_images}"),
             (decoding.batch_size != usual.batch_size, f"batch-{decoding.batch_size}"),
             (decoding.beams != usual.beams, f"beams-{decoding.beams}"),
             (decoding.precision != own.precision, decoding.precision),
             (decoding.weights != usual.weights, decoding.weights))
    return [word for holds, word in words if holds]


def still_true(path: Path, wanted: dict) -> bool:
    """Whether the scores in a file were made from exactly what is wanted."""
    try:
        return json.loads(path.read_bytes())["made_from"] == wanted
    except (OSError, ValueError, TypeError, KeyError):
        return False  # no file, or half of one: the scores will be made


def system_names(configs: Sequence[Config]) -> list[str]:
    """Method and options of each run, as far as the runs differ in them, seed and folder apart.  An
    option at its default for the method and size is not named, but always the size."""
    differing = [name for name in vars(configs[0])
                 if name not in ("method", "seed", "out", "save_every")
                 and len({repr(getattr(config, name)) for config in configs}) > 1]
    names = []
    for config in configs:
        usual, words = Config(size=config.size, method=config.method).resolved(), [config.method]
        for name in differing:
            value, flag = getattr(config, name), name.replace("_", "-")
            if value is None or value == getattr(usual, name) and name != "size":
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if name == "units" else [value])]
        names.append(" ".join(words))
    return names


@dataclass
class System:
    """Runs that differ only in their seed, so they are scored on the same units."""
    name: str
    config: Config  # of the first seed
    trainable: int  # parameters
    reports: list[dict] = field(default_factory=list)  # scores-SPLIT.json of each seed

    def columns(self) -> dict[str, list[float]]:
        """F1 of every unit, their sum and their mean: one value per seed."""
        f1 = {unit: [report["scores"][unit]["f1"] for report in self.reports]
              for unit in UNITS if unit in self.reports[0]["scores"]}
        sums = list(map(sum, zip(*f1.values())))
        return {**f1, "All": sums, "mean": [value / len(f1) for value in sums]}


def collect(jobs: Sequence[Any], names: Sequence[str]) -> list[System]:
    """The systems of jobs with these names, in the order given, with their stored scores."""
    systems: dict[str, System] = {}
    for job, name in zip(jobs, names):
        with safe_open(job.checkpoint / "model.safetensors", "pt") as file:
            trainable = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
        system = systems.setdefault(name, System(name, job.config, trainable))
        system.reports.append(json.loads(job.scores.read_bytes()))
    return list(systems.values())


def difference(first: System, other: System) -> tuple[float, float, float] | None:
    """other - first in the mean of the columns they share, and its bootstrap 95 % interval; None
    if none is shared.  Drawn anew are the records that both have, alike for both, and each system's
    seeds, alike for all columns, without which two runs of it would differ "significantly"."""
    random, deltas = numpy.random.default_rng(0), []

    def draws(n: int) -> numpy.ndarray:  # how often each of n is drawn; in the first row once each
        drawn = random.multinomial(n, numpy.full(n, 1 / n), RESAMPLES)
        return numpy.vstack([numpy.ones_like(drawn[:1]), drawn])  # [1 + RESAMPLES, n]

    sides = [(system.reports, draws(len(system.reports)).T) for system in (first, other)]
    for unit in UNITS:
        ids = sorted(set.intersection(*(set(report["records"].get(unit, {}))
                                        for reports, _ in sides for report in reports)))
        if ids:
            records, means = draws(len(ids)), []
            for reports, seeds in sides:
                counts = numpy.array([[report["records"][unit][i] for i in ids]
                                      for report in reports])
                tp, pred, gold = numpy.moveaxis(records @ counts, -1, 0)  # [seeds, 1 + RESAMPLES]
                f1 = 200 * tp / numpy.maximum(pred + gold, 1)
                means.append((seeds * f1).sum(axis=0) / len(f1))  # [1 + RESAMPLES], in %
            deltas.append(means[1] - means[0])
    if not deltas:
        return None
    delta = numpy.mean(deltas, axis=0)
    return float(delta[0]), *map(float, numpy.percentile(delta[1:], (2.5, 97.5)))


def comparison_line(system: System, first: System) -> dict:
    """What the table and the CSV file say about a system; None where there is nothing to say."""
    line, columns = {"system": system.name}, system.columns()
    for name in COLUMNS:
        seeds = columns.get(name, [])
        line[name] = fmean(seeds) if seeds else None
        line[f"{name} sd"] = stdev(seeds) if len(seeds) > 1 else None
    interval = None if system is first else difference(first, system)
    return {**line, "TP": system.trainable / 1e6, "seeds": len(system.reports),
            **dict(zip(("difference", "low", "high"), interval or (None,) * 3))}


def comparison_table(lines: Sequence[Mapping]) -> str:
    """The systems as text, standard deviations below their means."""
    def cells(line: Mapping, end: str, empty: str) -> str:
        return "".join(f"{empty:>8}" if line[name + end] is None else f"{line[name + end]:8.2f}"
                       for name in COLUMNS)

    width = max(len(line["system"]) for line in lines) + 2
    text = [f"{'':{width}}{''.join(f'{name:>8}' for name in COLUMNS)}{'TP':>9}  seeds  vs first"]
    for line in lines:
        text.append(f"{line['system']:{width}}{cells(line, '', '-')}{line['TP']:8.2f}M"
                    f"{line['seeds']:7}")
        if line["difference"] is not None:
            text[-1] += "  {difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**line)
        if line["seeds"] > 1:
            text.append(f"{'+-':>{width}}{cells(line, ' sd', '')}")
    return "\n".join(text)
