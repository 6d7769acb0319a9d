"""AML weights, Eq. (9), of a run's history under other references p_m, margins, exponents and
temperatures, one change at a time; nothing is trained.

    python -m tools.replay RUN --out DIR

DIR/aml.csv has the weight of each unit after each epoch, DIR/aml.png draws their ranges."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.checkpoints import newest_checkpoint, read_state
from engine.command import Parser, aligned
from engine.corpus import corpus_of, load_corpus, load_datasets, unit_rows
from engine.files import UsageError, save_csv
from engine.processes import World, carry_out
from engine.settings import DECODING, run_options
from evaluate import Job
from losses import SINGLE_TASK_F1, SOTA_F1, achievement_weights
from tools.figures import STYLES, canvas, write_figure


def variants(setting: Mapping) -> dict[str, Mapping]:
    """{name: arguments of achievement_weights}: "run", which are the given ones, and others."""
    p, changes = setting["reference"], {"run": {}}
    for x in (0.9, 0.95, 1.05, 1.1):
        changes |= {f"p {m} x {x}": {"reference": {**p, m: p[m] * x}} for m in p}
        changes[f"p all x {x}"] = {"reference": {m: p[m] * x for m in p}}
    changes |= {"p single": {"reference": SINGLE_TASK_F1}, "p sota": {"reference": SOTA_F1}}
    for name, values in (("margin", (1.0, 1.05, 1.1)), ("gamma", (1.0, 2.0, 3.0)),
                         ("temperature", (0.1, 0.3, 1.0))):
        changes |= {f"{name} {x:g}": {name: x} for x in values}
    return {name: {**setting, **change} for name, change in changes.items()}


def replayed_weights(history: Sequence[Mapping], settings: Mapping[str, Mapping],
                     rows: Mapping[str, int]) -> list[dict]:
    """The weights that each setting gives after each epoch; one dict per epoch, setting and unit.
    "shift" is the distance to the weight under settings["run"], "share" the unit's share of the
    whole loss if it has as many training rows as `rows` says."""
    table = []
    for past, (name, setting) in itertools.product(history, settings.items()):
        f1 = past["f1"]
        trained, w = (achievement_weights(f1, **s) for s in (settings["run"], setting))
        whole = sum(rows[k] * w[k] for k in f1)
        for m in f1:
            level = f1[m] / (setting["margin"] * setting["reference"][m])
            table.append({"setting": name, "after_epoch": past["epoch"], "unit": m, "f1": f1[m],
                          "achievement": level, "achieved": int(level >= 1), "weight": w[m],
                          "shift": w[m] - trained[m], "share": rows[m] * w[m] / whole})
    return table


def weight_slopes(f1: Mapping[str, float], reference: Mapping[str, float], margin: float = 1.05,
                  gamma: float = 2.0, temperature: float = 1.0) -> dict[tuple[str, str], float]:
    """{(m, k): d weight_m / d ln p_k} of Eq. (9), 0 for a unit k beyond margin * p_k: a p_k that
    is wrong by 1 % moves the weight of m by a hundredth of it."""
    weights = achievement_weights(f1, reference, margin, gamma, temperature)
    slopes = {}
    for k in f1:
        a = f1[k] / (margin * reference[k])
        inner = 0.0 if a >= 1 else gamma * (1 - a) ** (gamma - 1) * a / temperature
        slopes |= {(m, k): weights[m] * ((m == k) - weights[k] / len(f1)) * inner for m in f1}
    return slopes


def replay_table(rows: Sequence[Mapping]) -> list[str]:
    """Per setting the largest shift of a weight and where, that of a share, the achieved units."""
    table = [["setting", "shift", "unit", "after epoch", "share by", "units at or above margin p"]]
    groups = {setting: [r for r in rows if r["setting"] == setting]
              for setting in dict.fromkeys(r["setting"] for r in rows)}
    for setting, same in groups.items():
        worst = max(same, key=lambda r: abs(r["shift"]))
        share = max(abs(r["share"] - run["share"]) for r, run in zip(same, groups["run"]))
        units = dict.fromkeys(r["unit"] for r in same if r["achieved"])
        table.append([setting, f"{worst['shift']:+.3f}", worst["unit"], str(worst["after_epoch"]),
                      f"{100 * share:.1f} %", " ".join(units) or "-"])
    return aligned(table)


def plot_replay(rows: Sequence[Mapping], path: Path) -> Path:
    """A panel per unit: its weight in the run, before the range over all settings and all p_m."""
    units = list(dict.fromkeys(r["unit"] for r in rows))
    epochs = sorted({r["after_epoch"] for r in rows})
    figure, axes = canvas(2.5 + 1.6 * len(units), 3.6, columns=len(units), sharey=True)
    for ax, unit in zip(axes, units):
        weights = {(r["setting"], r["after_epoch"]): r["weight"] for r in rows if r["unit"] == unit}
        for start, alpha, label in (("", 0.2, "all settings"), ("p ", 0.45, "other p_m")):
            ranges = [[w for (name, t), w in weights.items() if t == epoch
                       and name.startswith((start, "run"))] for epoch in epochs]
            ax.fill_between(epochs, list(map(min, ranges)), list(map(max, ranges)),
                            color=STYLES[unit]["color"], alpha=alpha, linewidth=0, label=label)
        ax.plot(epochs, [weights["run", t] for t in epochs], **STYLES[unit], label="run")
        ax.set_title(unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("after epoch")
    figure.supylabel("weight of the unit's loss")
    return write_figure(figure, path, axes[0])


def replay(job: Job, folder: Path) -> tuple[list[Path], list[str]]:
    """Write aml.csv and aml.png; returns their paths and a report in lines."""
    newest, config = newest_checkpoint(job.folder) or job.checkpoint, job.config
    state, corpus = read_state(newest), corpus_of(config)
    if not (history := state["history"]):
        raise UsageError(f"{newest}: expected a run that has finished an epoch, got none; "
                         "let it train on: its dev F1 is what is replayed")
    setting = {"reference": state["reference"], "margin": config.aml_margin,
               "gamma": config.aml_gamma, "temperature": config.aml_temperature}
    sizes = unit_rows(load_corpus(corpus, "train", list(history[0]["f1"])), load_datasets(corpus))
    rows = replayed_weights(history, variants(setting), sizes)
    save_csv(folder / "aml.csv", rows)
    plot_replay(rows, folder / "aml.png")
    slopes = (weight_slopes(past["f1"], **setting).values() for past in history)
    trained = {(past["epoch"], m): w for past in history for m, w in past["weights"].items()}
    off = max(abs(r["weight"] - trained[r["after_epoch"], r["unit"]]) for r in rows
              if r["setting"] == "run")
    report = [*replay_table(rows), "first order: a p_m wrong by 10 % moves a weight by at most "
              f"{max(map(abs, itertools.chain(*slopes))) / 10:.3f}"]
    if off > 1e-9:
        report += [f"note: the run trained with other weights, up to {off:.3f} away: without AML"]
    return [folder / "aml.csv", folder / "aml.png"], report


def run(args: argparse.Namespace, world: World) -> None:
    if world.main:
        paths, report = replay(Job(args.checkpoint[0], args), args.folder)
        world.print(*report, *map(str, paths))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.replay", description=__doc__.partition("\n\n")[0],
                    usage="%(prog)s CKPT --out DIR [options]")
    run_options(parser, without=("split", "t5", "vit", "init", "cache", "units", "missing_images",
                                 *DECODING))
    parser.add_out("folder for aml.csv and aml.png")
    carry_out(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
