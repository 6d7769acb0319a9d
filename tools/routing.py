"""Where the gates send the tokens, Fig. 6: a table and a picture."""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import clorae
import data
from data import Example
from engine.command import Parser
from engine.features import Features
from engine.files import UsageError, save_csv
from engine.processes import World, carry_out
from engine.settings import Config
from evaluate import Decoding, Job, deal, run_options
from tools.figures import canvas, write_figure

# ------------------------------------------------------------------------------------------ routing
# Where the gates send the tokens, Fig. 6.

def lacks_gate(config: Config) -> str | None:
    """Why a run has no gate between a universal and a task expert; None if it has one."""
    if config.method == "clorae" and config.egr:
        return None
    why = "whose gate knows no task expert" if config.method == "loramoe" else "which has none"
    return f"method {config.method}{'' if config.egr else ' --no-egr'}, {why}"


def gates_on(model: nn.Module, batch: data.Batch, precision: str) -> dict[nn.Module, Tensor]:
    """{expert layer: its gates [B,S,E], Eq. (6), at the tokens that it meets}, teacher-forced.

    In eval mode.  Layers that meet nothing are absent: those of the visual stack without images.
    """
    found: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        found[layer] = layer.gates(inputs[0])

    hooks = [layer.register_forward_pre_hook(hook)
             for layer in clorae.expert_layers(model).values()]
    was_training = model.training
    model.eval()
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        model(batch)
    model.train(was_training)
    for handle in hooks:
        handle.remove()
    return found


@torch.inference_mode()
def gate_sums(model: nn.Module, examples: Sequence[Example], groups: Sequence[int],
              features: Features, device: torch.device, decoding: Decoding, rank: int = 0,
              world: int = 1) -> Tensor:
    """Sums over valid tokens [layers, groups, 6] float64, complete on every process.

    groups[i] is the group of example i.  Summed: 1, g1, g2, g2 > .5, g2^2, entropy.
    """
    layers = list(clorae.expert_layers(model).values())
    sums = torch.zeros(len(layers), max(groups) + 1, 6, dtype=torch.float64, device=device)
    group = {example.row: g for example, g in zip(examples, groups, strict=True)}
    batches = deal([len(e.input_ids) for e in examples], decoding.batch_size, rank, world)
    for chosen in tqdm(batches, desc="routing", unit="batch", disable=rank > 0, leave=False):
        batch = data.collate([examples[i] for i in chosen], features, features.width).to(device)
        rows = torch.tensor([group[row] for row in batch.rows.tolist()], device=device)
        for layer, gates in gates_on(model, batch, decoding.precision).items():
            g1, g2 = gates.double().unbind(dim=-1)
            entropy = -(g1.xlogy(g1) + g2.xlogy(g2))
            values = torch.stack([torch.ones_like(g2), g1, g2, g2 > 0.5, g2 * g2, entropy], dim=-1)
            valid = layer.routing.masks[layer.stream][..., None]
            sums[layers.index(layer)].index_add_(0, rows, (values * valid).sum(dim=1))
    if world > 1:
        dist.all_reduce(sums)
    return sums


def routing_rows(paths: Sequence[str], groups: Sequence[tuple[str, str]],
                 sums: Tensor) -> list[dict]:
    """One row per wrapped linear and (task, dataset) with tokens there, from `gate_sums`."""
    rows = []
    for path, layer in zip(paths, sums.tolist(), strict=True):
        parts = path.split(".")  # ..., stack, "blocks", layer, site, projection
        place = {"stack": next(s for s in ("vstack", "encoder", "decoder") if s in parts),
                 "layer": int(parts[-3]), "site": parts[-2].split("_")[0], "proj": parts[-1]}
        for (task, dataset), (n, *totals) in zip(groups, layer, strict=True):
            if n:
                g1, soft, hard, square, entropy = (value / n for value in totals)
                rows.append({**place, "task": task, "dataset": dataset, "n_tokens": int(n),
                             "soft_universal": g1, "soft": soft, "hard": hard,
                             "var": max(0.0, square - soft * soft), "entropy": entropy})
    return rows


def pooled(rows: Sequence[Mapping], stacks: Sequence[str]) -> dict[tuple[int, str], float]:
    """{(layer, "dataset task"): soft share of the task expert}, each token with equal weight."""
    tokens, heard = Counter(), Counter()
    for row in rows:
        if row["stack"] in stacks:
            key = row["layer"], f"{row['dataset']} {row['task']}"
            tokens[key] += row["n_tokens"]
            heard[key] += row["n_tokens"] * row["soft"]
    return {key: heard[key] / n for key, n in tokens.items()}


def route(job: Job, folder: Path, chosen: Sequence[int] | None, world: World) -> list[Path]:
    """Fig. 6: write routing.csv over all layers, routing.png over the `chosen` ones."""
    if why := lacks_gate(job.config):
        raise UsageError("expected a run with a live gate between a universal and a task "
                         f"expert, got {why}; name a run of clorae with --egr")
    setup, examples = job.load(world)
    paths = list(clorae.expert_layers(setup.model))
    deepest = max(int(path.split(".")[-3]) for path in paths)
    if chosen and not set(chosen) <= set(range(deepest + 1)):
        raise UsageError(f"--layers: expected numbers from 0 to {deepest}, got "
                         f"{' '.join(map(str, chosen))}; leave it out for all layers")
    pairs = [(e.unit, e.record.task, e.record.dataset) for e in examples]
    groups = sorted(set(pairs))  # in the order of the table
    features = job.features(setup, examples, world)
    world.join()
    sums = gate_sums(setup.model, examples, list(map(groups.index, pairs)), features, world.device,
                     job.decoding, world.rank, world.size)
    if world.main:
        rows = routing_rows(paths, [group[1:] for group in groups], sums.cpu())
        save_csv(folder / "routing.csv", rows)
        plot_routing(rows, chosen, folder / "routing.png")
    return [folder / "routing.csv", folder / "routing.png"]
PANELS = {"encoder": ("encoder",), "decoder": ("decoder",),
          "encoder + decoder": ("encoder", "decoder"), "visual stack": ("vstack",)}


def plot_routing(rows: Sequence[Mapping], layers: Sequence[int] | None, path: Path) -> Path:
    """Fig. 6: mean gate of the task expert, layers x datasets, values in the cells."""
    chosen = [row for row in rows if not layers or row["layer"] in layers]
    columns = list(dict.fromkeys(f"{row['dataset']} {row['task']}" for row in rows))
    panels = {name: cells for name, stacks in PANELS.items() if (cells := pooled(chosen, stacks))}
    depth = len({row["layer"] for row in chosen})
    figure, axes = canvas(1.5 + (0.8 + 0.45 * len(columns)) * len(panels), 3 + 0.35 * depth,
                          columns=len(panels))
    for ax, (name, cells) in zip(axes, panels.items()):
        found = sorted({layer for layer, _ in cells})
        grid = [[cells.get((layer, column), math.nan) for column in columns] for layer in found]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="PuOr_r", aspect="auto")
        ax.set_title(name)
        ax.set_yticks(range(len(found)), [f"layer {layer}" for layer in found])
        ax.set_xticks(range(len(columns)), columns, rotation=50, ha="right", rotation_mode="anchor")
        for (i, line), (j, _) in itertools.product(enumerate(grid), enumerate(columns)):
            ax.text(j, i, f"{line[j]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if abs(line[j] - 0.5) > 0.35 else "black")
    figure.colorbar(image, ax=axes, label="mean gate of the task expert")
    return write_figure(figure, path)


def parser() -> Parser:
    """The options of this command."""
    result = Parser(
        prog="python -m tools.routing", usage="%(prog)s CKPT --out DIR [options]",
        description="Share of tokens that the gates give the task experts, as Fig. 6.")
    result.add_argument("--out", dest="folder", type=Path, metavar="DIR", required=True,
                        help="folder for routing.csv and routing.png")
    result.add_argument("--layers", nargs="+", type=int, metavar="N",
                        help="layers that the routing picture shows; default: all")
    run_options(result)
    return result


def run(args: argparse.Namespace, world: World) -> None:
    made = route(Job(args.checkpoint[0], args), args.folder, args.layers, world)
    world.print("tokens given to the task expert:", *map(str, made))


def main(argv: Sequence[str] | None = None) -> None:
    carry_out(run, parser().parse_args(argv))



if __name__ == "__main__":
    main()
