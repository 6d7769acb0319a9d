"""What adapters need of a model that somebody else wrote: its linears by their names, a module put
in another's place, and one safetensors file for tensors with their config and a sha256."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from engine.files import UsageError, parse_json, regular, write_whole

MOST = {"rank": 1 << 16, "experts": 1 << 10, "tasks": 1 << 10}  # nobody means more
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # compute with weights of linears


def wrapped_paths(model: nn.Module, config: Any) -> list[str]:
    """Paths of the linears to wrap, in the model's order: whose path ends in one of config.targets,
    inside one of config.modules unless there are none.

    ValueError for a target that matches nothing, or something that is no linear of floats, or one
    that its parent does not call."""
    matches = {target: [] for target in config.targets}
    for path, module in model.named_modules():
        inside = not config.modules or set(path.split(".")[:-1]) & set(config.modules)
        for target in config.targets:
            if inside and f".{path}".endswith(f".{target}"):
                check_linear(path, module, model.get_submodule(path.rpartition(".")[0]))
                matches[target].append(path)
    if missed := [target for target, paths in matches.items() if not paths]:
        linears = {path.split(".")[-1]: None for path, module in model.named_modules()
                   if isinstance(module, nn.Linear)}
        raise ValueError(f"adapt: expected linears named {', '.join(missed)} below "
                         f"{', '.join(config.modules) or 'the model'}, got none; choose targets "
                         f"among the names of its linears: {', '.join(linears) or 'it has none'}")
    chosen = {path for paths in matches.values() for path in paths}
    return [path for path, _ in model.named_modules() if path in chosen]


def check_linear(path: str, module: nn.Module, parent: nn.Module) -> None:
    """ValueError unless a module is a linear of floats that its parent calls."""
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        got = (f"{type(module).__name__} of {module.weight.dtype}" if isinstance(module, nn.Linear)
               else type(module).__name__)
        raise ValueError(f"adapt: expected an nn.Linear of floats at {path}, got {got}; leave it "
                         "out by longer targets, such as 'self_attn.q_proj', or by modules")
    if isinstance(parent, READERS):
        raise ValueError(f"adapt: expected a linear that is called at {path}, got one whose weight "
                         f"{type(parent).__name__} reads itself; choose other targets")


def replace(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules[m] in the place of each module m, at every path that leads to it."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in modules:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, modules[module])


def digest(config: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 in hex of a config and of tensors with their names, types and shapes."""
    sha = hashlib.sha256(config.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def write_adapter(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Write tensors and a config that JSON can hold, whole or not at all."""
    tensors = {name: t.detach().cpu().clone() for name, t in tensors.items()}
    text = json.dumps(config)
    write_whole(path, save(tensors, {"clorae": text, "sha256": digest(text, tensors)}))


def read_adapter(path: Path, shapes_of: Callable[..., dict[str, list[int]]],
                 ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors that write_adapter wrote.

    shapes_of(**config): {name: shape} of the tensors that the model to be filled expects, or
    ValueError; asked before a tensor is read.  UsageError unless the file is whole and has them."""
    try:
        with safe_open(regular(path), "pt") as file:
            meta = file.metadata() or {}
            config = checked(parse_json(meta["clorae"].encode()))
            expected = shapes_of(**config)
            got = {name: file.get_slice(name).get_shape() for name in file.keys()}
            check_names(path, expected, got, "load it into the model that it was saved from")
            tensors = {name: file.get_tensor(name).clone() for name in got}
            if integers := [name for name, t in tensors.items() if not t.is_floating_point()]:
                raise ValueError(f"{integers[0]} is no tensor of floats")
    except UsageError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as cause:
        raise UsageError(f"{path}: expected experts that clorae.save wrote for such a model, got "
                         f"{type(cause).__name__}: {cause}; name another file") from cause
    if digest(meta["clorae"], tensors) != meta.get("sha256"):
        raise UsageError(f"{path}: expected the content whose sha256 it records, got another; copy "
                         "it anew from where it was saved")
    return config, tensors


def checked(config: Any) -> dict[str, Any]:
    """A config as it was before it was JSON; ValueError where numbers are not whole or absurd,
    since layers are built by them."""
    config = {name: tuple(value) if isinstance(value, list) else value
              for name, value in config.items()}
    for name, most in MOST.items():
        count = len(config[name]) if name == "tasks" else config[name]
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {count!r}")
    if not all(isinstance(task, str) for task in config["tasks"]):
        raise ValueError(f"tasks: expected names, got {config['tasks']}")
    return config


def check_names(where: object, expected: Mapping[str, list[int]], got: Mapping[str, list[int]],
                advice: str) -> None:
    """UsageError unless two sets of tensors, {name: shape}, have the same names and shapes."""
    odd = [name for name in sorted({*expected, *got}) if expected.get(name) != got.get(name)]
    if odd:
        shape, other = (side.get(odd[0], "nothing") for side in (expected, got))
        raise UsageError(f"{where}: {odd[0]}: expected {shape}, got {other} ({len(odd)} tensors "
                         f"differ); {advice}")
