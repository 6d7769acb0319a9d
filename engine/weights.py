"""Model folders in Hugging Face's layout: finding them, fetching them, reading their weights."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.files import UsageError, WeightsError, file_hash, note, read_json
from engine.pieces import tokenizer_file
from engine.settings import VIT

HUB_FILES = ["model*.safetensors*", "*config.json", "spiece.model"]  # never pickled weights
HUB_GB = {"google/flan-t5-base": 1.0, "google/flan-t5-large": 3.1, "google/flan-t5-xl": 11.4,
          VIT: 0.35}  # 4 bytes a parameter
SHIPPED = Path(__file__).resolve().parent.parent / "demo_backbone"  # made by demo.py
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def folder_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in name order, in hex."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()


def hub_snapshots(name: str) -> list[Path]:
    """Folders of a hub model in this machine's cache, that of its main branch first."""
    from huggingface_hub import constants  # slow to import; it knows HF_HOME
    repo = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
    main = repo / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return sorted(repo.glob("snapshots/*"), key=lambda folder: folder.name != commit)


def fault(folder: Path, model: str) -> str | None:
    """Why a folder does not hold a model, "t5" or "vit", by names and headers; None if it does."""
    paths = [folder / "config.json"] + [tokenizer_file(folder)] * (model == "t5")
    lost = [path.name for path in paths if not path.is_file()]
    if lost and folder.is_dir():
        return (f"{folder}: expected a whole model folder in Hugging Face's layout, it lacks "
                f"{', '.join(lost)}; fetch what is missing, or name another folder")
    try:
        open_weights(folder)
    except WeightsError as problem:
        return str(problem)
    return None


def find_weights(model: str, given: str | Path | None, name: str | None) -> Path:
    """A whole folder for a model, "t5" or "vit": the one given, else the hub's `name` in weights/,
    in the hub cache, or downloaded.  UsageError if there is none."""
    if given:
        if problem := fault(Path(given), model):
            raise UsageError(f"--{model}: {problem}")
        return Path(given)
    local = Path("weights", name.split("/")[-1])
    for folder in filter(Path.is_dir, (local, *hub_snapshots(name))):
        if not (problem := fault(folder, model)):
            return folder
        note(f"passed over: {problem}")
    return download(model, name, local)


def download(model: str, name: str, local: Path) -> Path:
    """Fetch a hub model into the hub cache; UsageError says how to bring it here into `local`."""
    from huggingface_hub import constants, snapshot_download
    patterns = HUB_FILES if model == "t5" else HUB_FILES[:-1]  # a ViT has no tokenizer
    size = f"about {HUB_GB[name]} GB"
    print(f"{name}: not on this machine, asking the hub ({size})", file=sys.stderr)
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not (problem := fault(folder, model)):
            return folder
    except Exception as cause:  # whatever the reason: the same remedy
        first = cause.__cause__ or cause
        problem = f"{type(first).__name__}: " + str(first).partition("\n")[0]
    raise UsageError(
        f"{name}: expected config.json, model.safetensors (or all its shards and their index)"
        f"{' and spiece.model' * (model == 't5')} in {local}/ or in the hub cache "
        f"({constants.HF_HUB_CACHE}), found no whole copy, and the download failed ({problem}); "
        f"name its folder with --{model} DIR, or fetch it ({size}) where there is a network, and "
        f"bring the folder here:\n    hf download {name} --local-dir {local} "
        + " ".join(f"--include '{pattern}'" for pattern in patterns))


def odd_fields(config: Any, **bounds: tuple[int, int]) -> list[str]:
    """"name = value" of each field of a config dataclass that has another type or is out of bounds.
    Whole numbers lie in 1..2^18, in 1..1000 if they count layers, unless `bounds` says otherwise:
    nothing may be allocated for a size that nobody meant.  Floats are shares, in [0, 1)."""
    odd = []
    for name, field in config.__dataclass_fields__.items():
        value = getattr(config, name)
        low, high = bounds.get(name, (1, 1000 if "layers" in name else 1 << 18))
        whole = type(value) is int and low <= value <= high
        valid = {int: whole, int | None: whole, bool: type(value) is bool,
                 float: type(value) in (int, float) and 0 <= value < 1}
        odd += [] if valid.get(field.type, True) else [f"{name} = {value!r}"]
    return odd


def open_weights(folder: Path) -> dict[str, safe_open]:
    """{key: the open file that holds it}, of model.safetensors or all shards of its index.  Only
    headers are read; WeightsError if they do not fit together."""
    names, listed = ["model.safetensors"], None
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        listed = read_json(index).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    lost = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")
            or not (folder / n).is_file()]
    if lost or not names:
        raise WeightsError(f"{folder}: expected {lost or 'a weight_map in ' + index.name}, in this "
                           f"folder and as .safetensors; {pickles(folder)}fetch these files")
    stored, pairs = {}, []
    for path in (folder / name for name in names):
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: expected a whole safetensors file, got: {error}; fetch "
                               "it anew") from None
        stored |= dict.fromkeys(file.keys(), file)
        pairs += [(key, path.name) for key in file.keys()]
    if listed is not None and (wrong := set(pairs) ^ set(listed.items())):
        raise WeightsError(f"{index}: expected each key of the shards in the one that it names; "
                           f"they differ in {sorted(map(str, wrong))[:4]}; fetch all of them anew")
    return stored


def pickles(folder: Path) -> str:
    """What to say about pickled weights in a folder; "" without any."""
    names = ", ".join(sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES))
    return names and (f"{names} is never read, as a pickle can run code: have it converted to "
                      "safetensors where it comes from; ")


class Unfilled(TorchFunctionMode):
    """Models that are built in it, on the meta device, draw no normal numbers: torch would load its
    compiler to draw them for nothing, which takes a second."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def load_weights(folder: Path, stored: dict[str, safe_open], model: nn.Module,
                 names: dict[str, str], drop: set[str], dtype: torch.dtype) -> None:
    """Fill a model on the meta device, in `dtype`.  names: {our name: stored key}; every stored
    key must be used or be in `drop`.  WeightsError before anything is allocated."""
    shapes = {names[ours]: list(param.shape) for ours, param in model.state_dict().items()}
    missing, unknown = shapes.keys() - stored.keys(), stored.keys() - shapes.keys() - drop
    if missing or unknown:
        raise WeightsError(f"{folder}: the keys must be those of the model in config.json; missing "
                           f"{sorted(missing)[:4]} of {len(missing)}, unknown (or a copy that "
                           f"differs) {sorted(unknown)[:4]} of {len(unknown)}; use its own files")
    for key, shape in shapes.items():
        piece = stored[key].get_slice(key)
        if piece.get_shape() != shape or piece.get_dtype() not in ("F32", "BF16", "F16"):
            raise WeightsError(f"{folder}: expected {key} as {shape} in F32, BF16 or F16; it is "
                               f"{piece.get_shape()} in {piece.get_dtype()}; use its own config")
    # Copied, because a stored tensor is a view of a mapped file that may change or go away.
    model.load_state_dict({ours: stored[key].get_tensor(key).to(dtype, copy=True)
                           for ours, key in names.items()}, assign=True)
