"""Export what was trained, without the backbone: a CKPT for any machine that has it; with --task,
the LoRA for T5, in PEFT's format, that the task's experts are under their mean gates.

    python -m tools.export RUN --out DIR                a checkpoint for any machine
    python -m tools.export RUN --out DIR --task mner    one task's experts as a LoRA that PEFT loads

A gate, Eq. (6), depends on the token and cannot be merged: the second command fixes all gates at
their means over the task's dev tokens, and says what that costs in F1."""

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
from engine.adapters import replace
from engine.checkpoints import find_checkpoint, read_state, stored_config, write_state
from engine.command import Parser
from engine.corpus import corpus_of, load_datasets
from engine.files import UsageError, file_hash, whole, write_whole
from engine.processes import World, carry_out
from engine.schema import RECORD_TASKS, TASKS
from engine.settings import SIZES
from engine.weights import folder_hash
from evaluate import Job, evaluate_split, run_options, total, unit_f1
from t5 import hf_names
from tools.routing import gate_sums

Export = tuple[Callable[[Path], None], list[str]]  # what fills the folder, and the report


def adapter(args: argparse.Namespace) -> Export:
    """A checkpoint that needs nothing of this machine: no moments, no variance of L_MIM, no paths,
    but the labels of its datasets.  Of method full it is the whole model, all of it trained."""
    checkpoint = find_checkpoint(args.checkpoint[0])
    state, corpus = read_state(checkpoint), args.data or corpus_of(stored_config(checkpoint))
    tensors = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()
               if name.split(".")[-1] not in ("rho", "a_D", "c_D", "M_D")}
    config = {**state["config"], "mim": False,
              **dict.fromkeys(("data", "t5", "vit", "init", "aml_reference"))}

    def write(folder: Path) -> None:
        for name in load_datasets(corpus):
            (folder / "corpus" / name).mkdir(parents=True)
            shutil.copy(Path(corpus, name, "dataset.json"), folder / "corpus" / name)
        weights = folder / "model.safetensors"
        weights.write_bytes(save(tensors))
        write_state(folder, {**state, "t5": None, "vit": None, "init": None, "config": config},
                    {weights.name: file_hash(weights)})

    numbers = sum(tensor.numel() for tensor in tensors.values())
    needs = {name: digest[:12] for name in ("t5", "vit", "init")
             if (digest := state.get(f"{name}_sha256"))}
    return write, [
        f"{args.folder}: {numbers:,} trained parameters of {checkpoint}, method "
        f"{config['method']}, rank {config['rank']}, and the labels of its datasets",
        "it needs " + ", ".join(f"{name} of sha256 {digest}" for name, digest in needs.items()),
        f"elsewhere: python evaluate.py {args.folder.name} --data DIR (or python -m tools.answer "
        f"{args.folder.name} --text T --task mner); {' '.join(f'--{name} DIR' for name in needs)} "
        "where these are neither in weights/ nor in the hub's cache"]


def mean_gates(model: nn.Module, sums: Tensor) -> dict[str, tuple[float, ...]]:
    """{path: gates of a wrapped linear, averaged over the tokens of `gate_sums`}."""
    means = (sums[:, 0, 1:-3] / sums[:, 0, :1]).tolist()
    return dict(zip(clorae.expert_layers(model), map(tuple, means), strict=True))


def fix_gates(model: nn.Module, task: int, gates: Mapping[str, Sequence[float] | None]) -> None:
    """Put a plain LoRA in the place of each wrapped linear of T5, for one task."""
    replace(model, {layer: layer.as_lora(task, gates[path])
                    for path, layer in clorae.expert_layers(model).items()
                    if path.startswith("t5.")})


def write_peft(model: nn.Module, base: str, folder: Path) -> None:
    """The plain LoRAs of T5 as PEFT stores them, under the names of T5ForConditionalGeneration.
    base: the hub's name, or the folder, of the T5 that they belong to."""
    names, tensors = hf_names(model.t5.config), {}
    for path, layer in clorae.expert_layers(model.t5).items():
        key = f"base_model.model.{names[path + '.weight'].removesuffix('.weight')}"
        for letter, factor in (("A", layer.A_U), ("B", layer.B_U)):
            tensors[f"{key}.lora_{letter}.weight"] = factor.detach().cpu().contiguous()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    write_whole(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": base,
        "r": layer.config.rank, "lora_alpha": layer.config.alpha, "lora_dropout": 0.0,
        "target_modules": ["q", "v"], "bias": "none", "inference_mode": True},
        indent=1) + "\n")


def plain_lora(args: argparse.Namespace, world: World) -> Export:
    """One task's experts as a LoRA, and F1 before the gates were fixed, after, and after without
    images, which is what PEFT runs."""
    job = Job(args.checkpoint[0], args)
    setup, examples = job.load(world)
    model, config = setup.model, setup.config
    if config.method == "full" or setup.sources.init:
        got = "full" if config.method == "full" else "--init"
        raise UsageError(f"--task: expected a run whose experts sit on a hub's T5, got {got}: all "
                         "of its T5 was trained; export it without --task")
    task = TASKS.index("mee" if args.task in ("med", "meae") else args.task)
    dev, split = ([example for example in examples if example.task == task]
                  for examples in (job.examples(setup, "dev", world), examples))
    if not dev or not split:
        raise UsageError(f"--task {args.task}: expected rows of it in the dev and the {job.split} "
                         f"split of {setup.sources.corpus}, got {len(dev)} and {len(split)}; name "
                         "another task")
    features = job.features(setup, dev + split, world)
    world.join()

    def f1(title: str, examples: Sequence[Example]) -> str:
        rows = evaluate_split(setup, examples, features, job.decoding, world)
        units = ", ".join(f"{unit} {f1:.2f}" for unit, f1 in unit_f1(total(rows)).items())
        return f"F1 {title}: {units}"

    gates = dict.fromkeys(layers := clorae.expert_layers(model))
    if any(hasattr(layer, "W_g") for layer in layers.values()):
        sums = gate_sums(model, dev, [0] * len(dev), features, job.decoding, world)
        gates = mean_gates(model, sums)
    lines = [f1("before", split)]
    fix_gates(model, task, gates)
    texts = [dataclasses.replace(e, record=dataclasses.replace(e.record, image=None))
             for e in split]
    lines += [f1("after, gates fixed", split), f1("after, without images", texts)]
    rank, record = next(iter(clorae.expert_layers(model.t5).values())).config.rank, split[0].record
    hub = None if config.t5 else SIZES[config.size].t5  # --t5, then or now, may name another
    base = hub or str(setup.sources.t5.resolve())
    return partial(write_peft, model, base), [
        f"{args.folder}: LoRA of rank {rank} for {TASKS[task]} on the q and v of {base}, sha256 "
        f"{folder_hash(setup.sources.t5)[:12]}", *lines,
        "the visual adapter, with its experts, is not part of it: in PEFT the model reads text "
        "alone, as in the last line, such as",
        "".join(data.prompt(record, setup.datasets[record.dataset]))]


def run(args: argparse.Namespace, world: World) -> None:
    """Write the folder, which appears under its name once it is complete, and print the report."""
    if args.folder.is_file() or args.folder.is_dir() and any(args.folder.iterdir()):
        raise UsageError(f"--out {args.folder}: expected a new or empty folder, got one "
                         "that holds files; name another one, or delete them first")
    write, report = plain_lora(args, world) if args.task else adapter(args)
    if world.main:
        whole(args.folder, write)
    world.print(*report)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.export", description=__doc__.partition("\n\n")[0],
                    usage="%(prog)s CKPT --out DIR [--task TASK] [options]")
    run_options(parser)
    add = parser.add_out("a new or empty folder")
    add("--task", choices=RECORD_TASKS, help="whose experts become a plain LoRA")
    carry_out(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
