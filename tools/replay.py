"""AML weights of a run's history under other assumptions; nothing is trained."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.checkpoints import newest_checkpoint, read_state
from engine.command import Parser
from engine.corpus import corpus_of, load_corpus, load_datasets, unit_rows
from engine.files import UsageError, save_csv
from engine.processes import World, carry_out
from evaluate import Job, aligned, run_options
from losses import SINGLE_TASK_F1, SOTA_F1, achievement_weights
from tools.figures import STYLES, canvas, write_figure

# ------------------------------------------------------------------------------------------- replay
# How much the AML weights, Eq. (9), depend on p_m and its other settings.

def replay_table(rows: Sequence[Mapping]) -> list[str]:
    """Per setting: largest shift of a weight and where, of a share, and the achieved units."""
    own = {(r["after_epoch"], r["unit"]): r["share"] for r in rows if r["setting"] == "run"}
    table = [["setting", "shift", "unit", "after epoch", "share by", "units at or above margin p"]]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row for row in rows if row["setting"] == setting]
        worst = max(some, key=lambda row: abs(row["shift"]))
        share = max(abs(r["share"] - own[r["after_epoch"], r["unit"]]) for r in some)
        units = dict.fromkeys(row["unit"] for row in some if row["achieved"])
        table.append([setting, f"{worst['shift']:+.3f}", worst["unit"], str(worst["after_epoch"]),
                      f"{100 * share:.1f} %", " ".join(units) or "-"])
    return aligned(table)


def replay(job: Job, folder: Path) -> tuple[list[Path], list[str]]:
    """Write aml.csv and aml.png; how much the weights of a run depend on what was assumed."""
    newest = newest_checkpoint(job.folder) or job.checkpoint
    state, config, corpus = read_state(newest), job.config, corpus_of(job.config)
    history = state["history"]
    if not history:
        raise UsageError(f"{newest}: expected a run that has finished an epoch, got none; "
                         "let it train on: its dev F1 is what is replayed")
    units = list(history[0]["f1"])
    own = {"reference": state["reference"], "margin": config.aml_margin,
           "gamma": config.aml_gamma, "temperature": 1.0}
    counts = unit_rows(load_corpus(corpus, "train", units), load_datasets(corpus))
    rows = replayed_weights(history, variants(own), counts)
    save_csv(folder / "aml.csv", rows)
    plot_replay(rows, folder / "aml.png")
    steepest = max(abs(slope) for past in history
                   for slope in weight_slopes(past["f1"], **own).values())
    trained = {(past["epoch"], m): past["weights"][m] for past in history for m in units}
    off = max(abs(row["weight"] - trained[row["after_epoch"], row["unit"]]) for row in rows
              if row["setting"] == "run")
    lines = [*replay_table(rows), f"first order: a p_m wrong by 10 % moves a weight by at most "
             f"{steepest / 10:.3f}"]
    if off > 1e-9:
        lines.append(f"note: the run trained with other weights, up to {off:.3f} away: without AML")
    return [folder / "aml.csv", folder / "aml.png"], lines


def plot_replay(rows: Sequence[Mapping], path: Path) -> Path:
    """A panel per unit: the run's weight, before the range over all settings and over the p_m."""
    units = list(dict.fromkeys(row["unit"] for row in rows))
    epochs = sorted({row["after_epoch"] for row in rows})
    figure, axes = canvas(2.5 + 1.6 * len(units), 3.6, columns=len(units), sharey=True)
    for ax, unit in zip(axes, units):
        weights = {(row["setting"], row["after_epoch"]): row["weight"] for row in rows
                   if row["unit"] == unit}
        for start, alpha, label in (("", 0.2, "all settings"), ("p ", 0.45, "other p_m")):
            range_of = [[w for (name, t), w in weights.items() if t == epoch
                         and name.startswith((start, "run"))] for epoch in epochs]
            ax.fill_between(epochs, list(map(min, range_of)), list(map(max, range_of)),
                            color=STYLES[unit]["color"], alpha=alpha, linewidth=0, label=label)
        ax.plot(epochs, [weights["run", t] for t in epochs], **STYLES[unit], label="run")
        ax.set_title(unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("after epoch")
    figure.supylabel("weight of the unit's loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return write_figure(figure, path)


Setting = Mapping[str, object]  # reference, margin, gamma, temperature of achievement_weights


def variants(own: Setting) -> dict[str, Setting]:
    """The run's setting of Eq. (9) and, one change at a time, others: each p_m, where the p_m come
    from, margin, gamma, temperature."""
    p: Mapping[str, float] = own["reference"]
    found = {"run": own}
    for x in (0.9, 0.95, 1.05, 1.1):
        found |= {f"p {m} x {x}": {**own, "reference": {**p, m: p[m] * x}} for m in p}
        found[f"p all x {x}"] = {**own, "reference": {m: p[m] * x for m in p}}
    found["p single"] = {**own, "reference": SINGLE_TASK_F1}
    found["p sota"] = {**own, "reference": SOTA_F1}
    for name, values in (("margin", (1.0, 1.05, 1.1)), ("gamma", (1.0, 2.0, 3.0)),
                         ("temperature", (0.1, 0.3, 1.0))):
        found |= {f"{name} {value:g}": {**own, name: value} for value in values}
    return found


def replayed_weights(history: Sequence[Mapping], settings: Mapping[str, Setting],
           rows: Mapping[str, int]) -> list[dict]:
    """The weights that each setting gives after each epoch; one dict per setting, epoch, unit.

    shift: against settings["run"].  share: of the loss' weight, with `rows` training rows per unit.
    """
    found = []
    for past, (name, setting) in itertools.product(history, settings.items()):
        f1 = past["f1"]
        own, w = (achievement_weights(f1, **s) for s in (settings["run"], setting))
        for m in f1:
            level = f1[m] / (setting["margin"] * setting["reference"][m])
            found.append({"setting": name, "after_epoch": past["epoch"], "unit": m, "f1": f1[m],
                          "achievement": level, "achieved": int(level >= 1), "weight": w[m],
                          "shift": w[m] - own[m],
                          "share": rows[m] * w[m] / sum(rows[k] * w[k] for k in f1)})
    return found


def weight_slopes(f1: Mapping[str, float], reference: Mapping[str, float], margin: float = 1.05,
                  gamma: float = 2.0, temperature: float = 1.0) -> dict[tuple[str, str], float]:
    """{(m, k): d weight_m / d ln p_k} of `achievement_weights`, 0 for an achieved k: a p_k
    that is wrong by 1 % moves weight m by a hundredth of it."""
    weights = achievement_weights(f1, reference, margin, gamma, temperature)
    slopes = {}
    for k in f1:
        a = f1[k] / (margin * reference[k])
        inner = 0.0 if a >= 1 else gamma * (1 - a) ** (gamma - 1) * a / temperature
        slopes |= {(m, k): weights[m] * ((m == k) - weights[k] / len(f1)) * inner for m in f1}
    return slopes


def parser() -> Parser:
    """The options of this command."""
    result = Parser(
        prog="python -m tools.replay", usage="%(prog)s CKPT --out DIR [options]",
        description="AML weights of the run's history under other references p_m, margins, "
                    "exponents and temperatures; nothing is trained.")
    result.add_argument("--out", dest="folder", type=Path, metavar="DIR", required=True,
                        help="folder for aml.csv and aml.png")
    run_options(result)
    return result


def run(args: argparse.Namespace, world: World) -> None:
    job = Job(args.checkpoint[0], args)
    made, report = replay(job, args.folder) if world.main else ([], [])
    world.print(*report, *map(str, made))


def main(argv: Sequence[str] | None = None) -> None:
    carry_out(run, parser().parse_args(argv))



if __name__ == "__main__":
    main()
