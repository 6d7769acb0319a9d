"""Image features from a frozen vision tower, computed once and kept on disk; those of a corpus."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from engine.checkpoints import Sources
from engine.files import ImageError, UsageError, file_hash, locked, regular, write_whole
from engine.images import PathLike, load_image, resolve_image
from engine.schema import Box, Problems, Record
from engine.weights import folder_hash

Extent = Sequence[int] | None  # width and height of the upright picture, if the record has them
Request = tuple[str, tuple, tuple[int, int] | None]  # path, boxes, size as (w, h) if known


class FeatureCache:
    """Features [V,F] of pictures and their boxes, computed once by a frozen tower and kept on disk.

    `folder`/<tower_hash>/<shard>.safetensors holds, for each picture and its boxes, their features
    under the sha256 of the file's bytes, boxes, size and preprocessing, and beside them, as
    NAME.boxes, the places [V,5] of the boxes in the picture; `tower_hash` names the tower's
    weights. Shards are only added, each renamed when whole, so processes may share a folder.
    Token 0 is the picture, token k its box k: the tower's first token of `last_hidden_state`."""
    SHARD, AHEAD, CROPS = 256, 16, 64  # pictures per file and read ahead, crops per tower call

    def __init__(self, tower: nn.Module, tower_hash: str, folder: PathLike) -> None:
        """tower: as vision.ViT, called on pixels, with `views` and `preprocessing`; ready to
        compute, on its device."""
        self.tower, self.folder = tower, Path(folder) / tower_hash
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: set[Path] = set()  # that are in the index
        self.index: dict[str, safe_open] = {}  # tensor name -> its shard, a memory-mapped file
        self.names: dict[Request, str] = {}  # a picture's bytes are hashed once a run

    def get(self, path: PathLike, boxes: Sequence[Box], size: Extent) -> tuple[Tensor, Tensor]:
        """One picture -> (features [V,F], boxes [V,5])."""
        (name,) = self.prepare([(path, boxes, size)])
        shard = self.index[name]
        return shard.get_tensor(name), shard.get_tensor(f"{name}.boxes")

    def prepare(self, requests: Iterable[tuple[PathLike, Sequence[Box], Extent]]) -> list[str]:
        """Compute what is not yet stored of these (path, boxes, size) -> their tensors' names."""
        requests = [(os.fspath(path), tuple(map(tuple, boxes)), size and tuple(size))
                    for path, boxes, size in requests]
        wanted = {self.name(request): request for request in requests}
        if not wanted.keys() <= self.index.keys():
            self.scan()  # on disk from an earlier run or another process
        missing = [item for item in wanted.items() if item[0] not in self.index]
        if missing:
            with tqdm(total=len(missing), desc="image features", unit="image",
                      disable=len(missing) < 2) as bar, ThreadPoolExecutor() as pool:
                for start in range(0, len(missing), self.SHARD):
                    self.store(missing[start:start + self.SHARD], pool, bar)
        return [self.names[request] for request in requests]

    def name(self, request: Request) -> str:
        """The name of a request's tensor: the hash of all that its features depend on."""
        if request not in self.names:
            path, boxes, size = request
            try:
                content = file_hash(regular(path))
            except OSError as error:
                raise ImageError(f"{path}: expected a picture, got: {error}; add the file or "
                                 "correct the record") from error
            layout = "and boxes"  # names what a shard holds; another layout needs another name
            key = json.dumps([content, boxes, size, *self.tower.preprocessing, layout])
            self.names[request] = hashlib.sha256(key.encode()).hexdigest()
        return self.names[request]

    def scan(self) -> None:
        """Map the shards that are new in the folder; only their headers are read."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.shards):
            try:
                shard = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ImageError(f"{path}: expected a whole file of image features, got: {error}; "
                                 "delete it, and its features are computed again") from error
            self.index |= dict.fromkeys(shard.keys(), shard)
            self.shards.add(path)

    def pixels(self, request: Request) -> tuple[Tensor, Tensor]:
        """Read a picture -> it and its crops as pixels [V,3,size,size], their places [V,5]."""
        path, boxes, size = request
        image = load_image(path)
        if size and image.size != size:
            raise ImageError(f"{path}: expected {size[0]} x {size[1]} pixels as in the record, got "
                             f"{image.width} x {image.height} (upright); correct the record")
        try:
            return self.tower.views(image, boxes)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None

    @torch.no_grad()
    def store(self, items: list[tuple[str, Request]], pool: ThreadPoolExecutor, bar: tqdm) -> None:
        """Compute one shard and add it to the folder."""
        features, device = {}, next(self.tower.parameters()).device
        for start in range(0, len(items), self.AHEAD):
            names, requests = zip(*items[start:start + self.AHEAD])
            pixels, boxes = zip(*pool.map(self.pixels, requests))
            # In full float32: features of a GPU and of a CPU may share a folder.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                tokens = torch.cat([self.tower(crops.to(device))[:, 0].float().cpu()
                                    for crops in torch.cat(pixels).split(self.CROPS)])
            for name, row, places in zip(names, tokens.split(list(map(len, pixels))), boxes):
                features |= {name: row.clone(), f"{name}.boxes": places}
            bar.update(len(names))
        shard = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:32]
        write_whole(self.folder / f"{shard}.safetensors", save(features))
        self.scan()


class Features:
    """Image features of records: called on one, (features [V,F], boxes [V,5]), or None for one
    without an image.  A file that is not there is an error unless `missing_images` is "mask"; then
    its rows are counted and have no visual tokens."""

    def __init__(self, sources: Sources, records: Sequence[Record], missing_images: str,
                 max_objects: int, device: torch.device, tower: Any):
        """Compute what is not on disk yet, of at most `max_objects` objects an image.  tower: the
        class of image towers (vision.ViT), whose weights lie in sources.vit."""
        self.corpus, self.max_objects = sources.corpus, max_objects
        self.paths: dict[tuple[str, str], Path] = {}
        named = [record for record in records if record.image is not None]
        absent = [record for record in named if not self.path(record).exists()]
        if absent and missing_images == "error":
            raise UsageError(
                f"images: expected a file for each of {len(named)} records, {len(absent)} are "
                f"missing, first {self.path(absent[0])} ({absent[0].source}); put the images "
                "there, or pass --missing-images mask to go on without them")
        self.missing, self.missing_rows = set(map(self.path, absent)), len(absent)
        self.width = tower.feature_width(sources.vit)
        if len(absent) < len(named) and device.type != "meta":  # there nothing is computed
            model, folder = tower.from_pretrained(sources.vit), sources.corpus / ".features"
            with locked(folder / ".lock"):
                self.cache = FeatureCache(model.to(device).eval(), folder_hash(sources.vit), folder)
                self.compute([r for r in named if self.path(r) not in self.missing])

    def compute(self, records: Sequence[Record]) -> None:
        """Compute the features of these records' images; DataError names all that cannot be."""
        try:
            self.cache.prepare(map(self.key, records))
        except ImageError:
            problems = Problems()
            for record in records:
                try:
                    self.cache.pixels(self.key(record))
                except ImageError as problem:
                    problems.add(record.source, "image", str(problem))
            problems.raise_if_any()
            raise

    def path(self, record: Record) -> Path:
        """Where a record's image would lie, looked up once; ImageError if its name is forbidden."""
        name = record.dataset, record.image
        if name not in self.paths:
            try:
                self.paths[name] = resolve_image(self.corpus / name[0] / "images", name[1])
            except ImageError as problem:
                raise ImageError(f"{record.source}: {problem}") from None
        return self.paths[name]

    def key(self, record: Record) -> tuple:
        """What the cache is asked for: path, boxes and size in pixels."""
        return self.path(record), record.objects[:self.max_objects], record.size

    def __call__(self, record: Record) -> tuple[Tensor, Tensor] | None:
        if record.image is None or self.path(record) in self.missing:
            return None
        return self.cache.get(*self.key(record))
