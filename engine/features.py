"""Image features of the records of a corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import ImageError, UsageError, locked
from engine.images import resolve_image
from engine.schema import Problems, Record
from engine.sources import Sources
from engine.weights import folder_hash
from vision import FeatureCache  # until it stands here


class Features:
    """Image features of records, which `data.collate` asks for by calling this object.

    features(record) -> (features [V,F], boxes [V,5]), or None for a record without an image.  A
    file that is not there is an error unless `missing_images` is "mask"; then its rows are counted
    and have no visual tokens.
    """

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
        self.missing = {self.path(record) for record in absent}
        self.missing_rows = len(absent)
        self.cache: FeatureCache | None = None
        self.width = tower.feature_width(sources.vit)
        if len(absent) < len(named) and device.type != "meta":  # there nothing is computed
            model = tower.from_pretrained(sources.vit).to(device).eval()
            folder = sources.corpus / ".features"
            with locked(folder / ".lock"):
                self.cache = FeatureCache(model, folder_hash(sources.vit), folder)
                self.compute([r for r in named if self.path(r) not in self.missing])

    def compute(self, records: Sequence[Record]) -> None:
        """Compute the features of all these records' images; if one cannot be used, DataError
        names all such."""
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
        """Where a record's image lies, or would lie; kept, since to look takes longer than to
        load its features.  ImageError if its name may not be used."""
        name = record.dataset, record.image
        if name not in self.paths:
            try:
                folder = self.corpus / record.dataset / "images"
                self.paths[name] = resolve_image(folder, record.image)
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
