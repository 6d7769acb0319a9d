"""Image features from a frozen vision tower, computed once and kept on disk; those of a corpus."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from engine.checkpoints import Sources
from engine.command import Bar
from engine.files import ImageError, UsageError, file_hash, locked, note, regular, write_whole
from engine.images import Extent, PathLike, look, resolve_image
from engine.schema import Box, Problems, Record
from engine.weights import folder_hash

Request = tuple[str, tuple, tuple[int, int] | None]  # path, boxes, size as (w, h) if known


class FeatureCache:
    """Features [V,F] of pictures and their boxes, computed once by a frozen tower and kept on disk.

    FOLDER/<tower_hash>/<shard>.safetensors holds, for each picture and its boxes, their features
    under the sha256 of the file's bytes, boxes, size, preprocessing and Pillow's version, and
    beside them, as NAME.boxes, the places [V,5] of the boxes in the picture; `tower_hash` names the
    tower's weights. Shards are only added, each renamed when whole, so processes may share a
    folder. All `folders` are read; the first that can be is written to.
    Token 0 is the picture, token k its box k: the tower's first token of `last_hidden_state`."""
    SHARD, AHEAD, CROPS = 256, 16, 64  # pictures per file and read ahead, crops per tower call

    def __init__(self, tower: nn.Module, tower_hash: str, *folders: PathLike) -> None:
        """tower: as vision.ViT, called on pixels, with `views` and `preprocessing`; ready to
        compute, on its device."""
        self.tower, self.folders = tower, [Path(folder) / tower_hash for folder in folders]
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
            self.scan()  # on disk from an earlier run, for which nothing need be written
        if not wanted.keys() <= self.index.keys():
            folder, lock = self.open_folder()
            with lock:  # four pictures at most are in memory at once
                self.scan()  # computed meanwhile by the process that held the lock
                missing = [item for item in wanted.items() if item[0] not in self.index]
                with Bar(total=len(missing), desc="image features", unit="image",
                         disable=len(missing) < 2) as bar, ThreadPoolExecutor(4) as pool:
                    for start in range(0, len(missing), self.SHARD):
                        self.store(folder, missing[start:start + self.SHARD], pool, bar)
        return [self.names[request] for request in requests]

    def open_folder(self) -> tuple[Path, TextIO]:
        """The first folder that can be written to, and its lock; UsageError if there is none."""
        refusals = []
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                lock = locked(folder.parent / ".lock", "processes may compute the same features")
            except OSError as cause:
                refusals.append(f"{folder.parent} ({cause.strerror})")
                continue
            if refusals:
                note(f"image features are kept in {folder.parent}, not in {', '.join(refusals)}")
            return folder, lock
        raise UsageError("image features: expected a folder that can be written to, got "
                         f"{', '.join(refusals)}; name another one with --cache DIR")

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
            key = json.dumps([content, boxes, size, *self.tower.preprocessing, layout,
                              f"Pillow {PIL.__version__}"])  # 13 resizes tall pictures otherwise
            self.names[request] = hashlib.sha256(key.encode()).hexdigest()
        return self.names[request]

    def scan(self) -> None:
        """Map the shards that are new in the folders; only their headers are read."""
        shards = {path for folder in self.folders for path in folder.glob("*.safetensors")
                  if os.access(path, os.R_OK)}
        for path in sorted(shards - self.shards):
            try:
                shard = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ImageError(f"{path}: expected a whole file of image features, got: {error}; "
                                 "delete it, and its features are computed again") from error
            self.index |= dict.fromkeys(shard.keys(), shard)
            self.shards.add(path)

    @torch.no_grad()
    def store(self, folder: Path, items: list[tuple[str, Request]], pool: ThreadPoolExecutor,
              bar: Bar) -> None:
        """Compute one shard and add it to a folder."""
        features, device = {}, next(self.tower.parameters()).device
        for start in range(0, len(items), self.AHEAD):
            names, requests = zip(*items[start:start + self.AHEAD])
            pixels, boxes = zip(*pool.map(lambda r: look(*r, self.tower.views), requests))
            # In full float32: features of a GPU and of a CPU may share a folder.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                tokens = torch.cat([self.tower(crops.to(device))[:, 0].float().cpu()
                                    for crops in torch.cat(pixels).split(self.CROPS)])
            for name, row, places in zip(names, tokens.split(list(map(len, pixels))), boxes):
                features |= {name: row.clone(), f"{name}.boxes": places}
            bar.update(len(names))
        shard = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:32]
        write_whole(folder / f"{shard}.safetensors", save(features))
        self.scan()


def user_cache() -> list[Path]:
    """The folder for image features in this user's cache folder; [] without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored
    home = os.path.expanduser("~/.cache")
    return [Path(root, "clorae", "features") for root in (given, home) if os.path.isabs(root)][:1]


class Features:
    """Image features of records: called on one, (features [V,F], boxes [V,5]), or None for one
    without an image.  A file that is not there is an error unless `missing_images` is "mask"; then
    its rows are counted and have no visual tokens."""

    def __init__(self, sources: Sources, records: Sequence[Record], missing_images: str,
                 max_objects: int, device: torch.device, tower: Any, cache: PathLike | None = None):
        """Compute what is not on disk yet, of at most `max_objects` objects an image.  tower: the
        class of image towers (vision.ViT), whose weights lie in sources.vit.  cache: where new
        features go; default: .features in the corpus, else in the user's cache folder."""
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
            model, beside = tower.from_pretrained(sources.vit), sources.corpus / ".features"
            folders = [cache] * bool(cache) + [beside, *user_cache()]
            self.cache = FeatureCache(model.to(device).eval(), folder_hash(sources.vit), *folders)
            self.compute([r for r in named if self.path(r) not in self.missing])

    def compute(self, records: Sequence[Record]) -> None:
        """Compute the features of these records' images; DataError names all that cannot be."""
        try:
            self.cache.prepare(map(self.key, records))
        except ImageError:
            problems = Problems()
            for record in records:
                try:
                    look(*self.key(record), self.cache.tower.views)
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
