"""Export what was trained: as a checkpoint for any machine, or as a LoRA in PEFT's format."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

import clorae
import data
from data import Example
from engine.checkpoints import find_checkpoint, read_state, write_state
from engine.command import Parser
from engine.corpus import corpus_of, load_datasets
from engine.files import UsageError, file_hash, whole, write_whole
from engine.processes import World, carry_out
from engine.schema import RECORD_TASKS, TASKS
from engine.settings import SIZES
from engine.sources import stored_config
from engine.weights import folder_hash
from evaluate import Job, evaluate_split, run_options, total, unit_f1
from t5 import hf_names
from tools.routing import gate_sums

# ---------------------------------------------------------------------------------------- export
# Adapters travel: without the backbone, whose sha256 they remember; or as one plain LoRA per task.

def export(args: argparse.Namespace, world: World) -> list[str]:
    """Write what --export asks for into a folder that holds nothing yet; returns the report."""
    if args.folder.is_file() or args.folder.is_dir() and any(args.folder.iterdir()):
        raise UsageError(f"--out {args.folder}: expected a new or empty folder, got one "
                         "that holds files; name another one, or delete them first")
    make, report = (plain_lora if args.task else adapter)(args, world)
    if world.main:
        whole(args.folder, make)
    return report


def adapter(args: argparse.Namespace, world: World) -> tuple[Callable, list[str]]:
    """How to write the checkpoint as one that needs nothing of this machine (no moments, no
    variance of L_MIM, no paths, its datasets' labels beside it), and the report.

    Of method full it is the whole model, since all of it was trained.
    """
    checkpoint = find_checkpoint(args.checkpoint[0])
    state = read_state(checkpoint)
    corpus = Path(args.data or corpus_of(stored_config(checkpoint)))
    tensors = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()
               if not name.endswith(".rho")}
    config = {**state["config"], "mim": False,
              **dict.fromkeys(("data", "t5", "vit", "init", "aml_reference"))}

    def make(folder: Path) -> None:
        for name in load_datasets(corpus):
            (folder / "corpus" / name).mkdir(parents=True)
            shutil.copy(corpus / name / "dataset.json", folder / "corpus" / name)
        (folder / "model.safetensors").write_bytes(save(tensors))
        digest = {"model.safetensors": file_hash(folder / "model.safetensors")}
        write_state(folder, {**state, **dict.fromkeys(("t5", "vit", "init")),
                                   "config": config}, digest)

    numbers = sum(tensor.numel() for tensor in tensors.values())
    needs = {part: state[f"{part}_sha256"] for part in ("t5", "vit", "init")
             if state.get(f"{part}_sha256")}
    return make, [
        f"{args.folder}: {numbers:,} trained parameters of {checkpoint}, method "
        f"{config['method']}, rank {config['rank']}, and the labels of its datasets",
        "it needs " + ", ".join(f"{part} of sha256 {needs[part][:12]}" for part in needs),
        f"elsewhere: python evaluate.py {args.folder.name} --data DIR (or --text T --task mner); "
        + " ".join(f"--{part} DIR" for part in needs) + " where these are neither in weights/ nor "
        "in the hub's cache"]


def mean_gates(model: nn.Module, sums: Tensor) -> dict[str, tuple[float, ...]]:
    """{path: gates of a wrapped linear, averaged over the tokens of `gate_sums`}."""
    return {path: tuple((total[1:3] / total[0]).tolist()) for path, total in
            zip(clorae.expert_layers(model), sums[:, 0].cpu(), strict=True)}


def fix_gates(model: nn.Module, task: int, gates: Mapping[str, Sequence[float] | None]) -> None:
    """Put a plain LoRA in the place of each wrapped linear of T5, for one task."""
    for path, layer in clorae.expert_layers(model).items():
        if path.startswith("t5."):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.as_lora(task, gates[path]))


def write_peft(model: nn.Module, base: str | None, folder: Path) -> None:
    """The plain LoRAs of T5 as PEFT stores them, under the names of T5ForConditionalGeneration."""
    names, tensors = hf_names(model.t5.config), {}
    for path, layer in clorae.expert_layers(model.t5).items():
        key = f"base_model.model.{names[path + '.weight'].removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": layer.A_U.detach().cpu().contiguous(),
                    f"{key}.lora_B.weight": layer.B_U.detach().cpu().contiguous()}
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    write_whole(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": base,
        "r": layer.config.rank, "lora_alpha": layer.config.alpha, "lora_dropout": 0.0,
        "target_modules": list(layer.config.targets), "bias": "none", "inference_mode": True},
        indent=1) + "\n")


def plain_lora(args: argparse.Namespace, world: World) -> tuple[Callable, list[str]]:
    """How to write one task's experts as a LoRA, and the report of what fixing the gates costs.

    A gate that depends on the token cannot be merged; its mean over the task's dev tokens can.
    F1 is that of our model before, after, and after without images, which is what PEFT runs.
    """
    job = Job(args.checkpoint[0], args)
    setup, examples = job.load(world)
    model, config = setup.model, setup.config
    if config.method == "full" or setup.sources.init:
        raise UsageError("--export with --task: expected a run whose experts sit on a hub's "
                         f"T5, got {config.method if config.method == 'full' else '--init'}: "
                         "all of its T5 was trained; export it without --task")
    task = TASKS.index("mee" if args.task in ("med", "meae") else args.task)
    dev, split = ([e for e in some if e.task == task]
                  for some in (job.examples(setup, "dev", world), examples))
    if not dev or not split:
        raise UsageError(f"--export with --task {args.task}: expected rows of it in the dev "
                         f"and the {job.split} split of {setup.sources.corpus}, got "
                         f"{len(dev)} and {len(split)}; name another task")
    features = job.features(setup, dev + split, world)
    world.join()
    here = {"device": world.device, "decoding": job.decoding, "rank": world.rank,
            "world": world.size}
    score = partial(evaluate_split, setup, features=features, decoding=job.decoding, world=world)
    gates = dict.fromkeys(clorae.expert_layers(model))
    if any(hasattr(layer, "W_g") for layer in clorae.expert_layers(model).values()):
        gates = mean_gates(model, gate_sums(model, dev, [0] * len(dev), features, **here))
    before = score(split)
    fix_gates(model, task, gates)
    scores = {"before": before, "after, gates fixed": score(split),
              "after, without images": score(list(map(without_image, split)))}
    rank = next(iter(clorae.expert_layers(model.t5).values())).config.rank
    record = split[0].record
    return partial(write_peft, model, SIZES[config.size].t5), [
        f"{args.folder}: LoRA of rank {rank} for {TASKS[task]} on the q and v of T5, sha256 "
        f"{folder_hash(setup.sources.t5)[:12]}",
        *(f"F1 {name}: " + ", ".join(f"{u} {f1:.2f}" for u, f1 in unit_f1(total(some)).items())
          for name, some in scores.items()),
        "the visual adapter, with its experts, is not part of it: in PEFT the model reads text "
        "alone, as in the last line, such as",
        "".join(data.prompt(record, setup.datasets[record.dataset]))]


def without_image(example: Example) -> Example:
    """The same row for a model that is given its text alone."""
    return dataclasses.replace(example, record=dataclasses.replace(example.record, image=None))


def parser() -> Parser:
    """The options of this command."""
    result = Parser(
        prog="python -m tools.export", usage="%(prog)s CKPT --out DIR [--task TASK] [options]",
        description="Export what was trained, without the backbone: a CKPT for any machine that has "
                    "it; with --task, the LoRA for T5, in PEFT's format, that the task's experts "
                    "are under their mean gates.")
    result.add_argument("--out", dest="folder", type=Path, metavar="DIR", required=True,
                        help="a new or empty folder")
    result.add_argument("--task", choices=RECORD_TASKS, help="whose experts become a plain LoRA")
    run_options(result)
    return result


def run(args: argparse.Namespace, world: World) -> None:
    world.print(*export(args, world))


def main(argv: Sequence[str] | None = None) -> None:
    carry_out(run, parser().parse_args(argv))



if __name__ == "__main__":
    main()
