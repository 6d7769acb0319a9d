"""Fig. 6: how much each layer listens to the task experts and how much to the universal expert.

    python -m tools.routing RUN --out DIR [--layers 0 1 2]

DIR/routing.csv has a row for every wrapped linear and (task, dataset), DIR/routing.png the means
by layer.  The gates, Eq. (6), are those of valid tokens while the right answer is forced."""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import clorae
import data
from data import Example
from engine.command import Bar, Parser
from engine.features import Features
from engine.files import UsageError, save_csv
from engine.processes import World, carry_out
from engine.settings import Config
from evaluate import Decoding, Job, deal, run_options
from tools.figures import canvas, write_figure


def no_gate_reason(config: Config) -> str | None:
    """Why a run has no gate between a universal and a task expert; None if it has one."""
    if config.method != "clorae" or not config.egr:
        blind = config.method in ("loramoe", "hydralora")
        why = "whose gate knows no task expert" if blind else "which has none"
        return f"method {config.method}{'' if config.egr else ' --no-egr'}, {why}"


def gates_on(model: nn.Module, batch: data.Batch, precision: str) -> dict[nn.Module, Tensor]:
    """{expert layer: its gates [B,S,2] at the tokens of its stream} of one pass in eval mode.
    A layer that meets no token, in the visual stack of a batch without images, is absent."""
    enabled = precision == "bf16"
    with (clorae.read_gates(model) as gates,
          torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=enabled)):
        model.eval()(batch)
    layers = clorae.expert_layers(model)
    return {layers[path]: passes[-1] for path, passes in gates.items() if passes}


@torch.inference_mode()
def gate_sums(model: nn.Module, examples: Sequence[Example], groups: Sequence[int],
              features: Features, decoding: Decoding, world: World) -> Tensor:
    """Sums over valid tokens [layers, groups, 4 + E] in float64, the same on every process, of 1,
    each of the E gates, g > .5 and g^2 of the last, which is C-LoRAE's task expert, and the
    entropy.  groups[i] is the group of example i."""
    layers = list(clorae.expert_layers(model).values())
    sums = torch.zeros(len(layers), max(groups) + 1, 4 + len(layers[0].W_g), dtype=torch.float64,
                       device=world.device)
    group_of = {example.row: group for example, group in zip(examples, groups, strict=True)}
    lengths = [len(example.input_ids) for example in examples]
    for chosen in Bar(deal(lengths, decoding.batch_size, world.rank, world.size), desc="routing",
                      unit="batch", disable=not world.main, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width)
        rows = torch.tensor([group_of[row] for row in batch.rows.tolist()], device=world.device)
        for layer, gates in gates_on(model, batch.to(world.device), decoding.precision).items():
            *_, g = each = gates.double().unbind(dim=-1)
            entropy = -sum(gate.xlogy(gate) for gate in each)
            values = torch.stack([torch.ones_like(g), *each, g > 0.5, g * g, entropy], dim=-1)
            valid = layer.routing.masks[layer.stream][..., None]
            sums[layers.index(layer)].index_add_(0, rows, (values * valid).sum(dim=1))
    return world.sum(sums)


def routing_rows(paths: Sequence[str], groups: Sequence[tuple[str, str]],
                 sums: Tensor) -> list[dict]:
    """`gate_sums` as means: a row for each wrapped linear and (task, dataset) with tokens there."""
    rows = []
    for path, layer in zip(paths, sums.tolist(), strict=True):
        *_, stack, _, depth, site, projection = path.split(".")  # _ is "blocks"
        for (task, dataset), (n, *totals) in zip(groups, layer, strict=True):
            if n:
                g1, soft, hard, square, entropy = (value / n for value in totals)
                rows.append({"stack": stack, "layer": int(depth), "site": site.split("_")[0],
                             "proj": projection, "task": task, "dataset": dataset,
                             "n_tokens": int(n), "soft_universal": g1, "soft": soft, "hard": hard,
                             "var": max(0.0, square - soft * soft), "entropy": entropy})
    return rows


def layer_means(rows: Sequence[Mapping], stacks: Sequence[str]) -> dict[tuple[int, str], float]:
    """{(layer, "dataset task"): mean gate of the task expert}, each token with equal weight."""
    gates = defaultdict(list)
    for row in (row for row in rows if row["stack"] in stacks):
        gates[row["layer"], f"{row['dataset']} {row['task']}"] += [(row["soft"], row["n_tokens"])]
    return {key: fmean(*zip(*pairs)) for key, pairs in gates.items()}


def plot_routing(rows: Sequence[Mapping], layers: Sequence[int] | None, path: Path) -> Path:
    """Draw the mean gate of the task expert, layers x datasets, with its value in every cell."""
    shown = [row for row in rows if not layers or row["layer"] in layers]
    columns = list(dict.fromkeys(f"{row['dataset']} {row['task']}" for row in rows))
    names = {"encoder": "encoder", "decoder": "decoder", "encoder + decoder": "encoder decoder",
             "visual stack": "vstack"}
    panels = {name: means for name, stacks in names.items()
              if (means := layer_means(shown, stacks.split()))}
    depth = len({row["layer"] for row in shown})
    beside = 2 if len(panels) == 4 else len(panels)  # panels in a row
    figure, axes = canvas(1 + (0.7 + 0.42 * len(columns)) * beside,
                          1.3 + (0.5 + 0.35 * depth) * len(panels) / beside,
                          len(panels) // beside, beside)
    for ax, (name, means) in zip(axes, panels.items()):
        depths = sorted({layer for layer, _ in means})
        grid = [[means.get((layer, column), math.nan) for column in columns] for layer in depths]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="PuOr_r", aspect="auto")
        ax.set(title=name, yticks=range(len(depths)), yticklabels=[f"layer {i}" for i in depths])
        names = columns if ax in axes[-beside:] else [""] * len(columns)
        ax.set_xticks(range(len(columns)), names, rotation=50, ha="right", rotation_mode="anchor")
        for i, values in enumerate(grid):
            for j, gate in enumerate(values):
                ax.text(j, i, f"{gate:.2f}", ha="center", va="center", fontsize=8,
                        color="white" if abs(gate - 0.5) > 0.35 else "black")
    figure.colorbar(image, ax=axes, label="mean gate of the task expert")
    return write_figure(figure, path)


def route(job: Job, folder: Path, layers: Sequence[int] | None, world: World) -> list[Path]:
    """Write routing.csv, over all layers, and routing.png, over those asked for; return both."""
    if reason := no_gate_reason(job.config):
        raise UsageError("expected a run with a live gate between a universal and a task "
                         f"expert, got {reason}; name a run of clorae with --egr")
    setup, examples = job.load(world)
    paths = list(clorae.expert_layers(setup.model))  # ... ".blocks.LAYER.SITE.PROJECTION"
    deepest = max(int(path.split(".")[-3]) for path in paths)
    if not set(layers or ()) <= set(range(deepest + 1)):
        raise UsageError(f"--layers: expected numbers from 0 to {deepest}, got "
                         f"{' '.join(map(str, layers))}; leave it out for all layers")
    names = [(e.unit, e.record.task, e.record.dataset) for e in examples]
    groups = sorted(set(names))  # in the order of the table
    features = job.features(setup, examples, world)
    world.join()
    sums = gate_sums(setup.model, examples, list(map(groups.index, names)), features, job.decoding,
                     world)
    files = [folder / "routing.csv", folder / "routing.png"]
    if world.main:
        rows = routing_rows(paths, [group[1:] for group in groups], sums.cpu())
        save_csv(files[0], rows)
        plot_routing(rows, layers, files[1])
    return files


def run(args: argparse.Namespace, world: World) -> None:
    job = Job(args.checkpoint[0], args)
    world.print("tokens given to the task expert:",
                *map(str, route(job, args.folder, args.layers, world)))


def main(argv: Sequence[str] | None = None) -> None:
    command = Parser(prog="python -m tools.routing", description=__doc__.partition("\n\n")[0],
                     usage="%(prog)s CKPT --out DIR [options]")
    run_options(command)
    add = command.add_out("folder for routing.csv and routing.png")
    add("--layers", nargs="+", type=int, metavar="N",
        help="layers that the picture shows; default: all")
    carry_out(run, command.parse_args(argv))


if __name__ == "__main__":
    main()
