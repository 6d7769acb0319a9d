"""Files: the errors that name them, strict JSON, and writing that is whole or not done at all."""

import json
import os
from pathlib import Path
from typing import Any


class WeightsError(ValueError):
    """A checkpoint, its configuration or the requested type cannot be used."""


class ImageError(ValueError):
    """A picture, its name, its boxes or its stored features cannot be used; the text says which."""


def read_json(path: Path) -> dict:
    """The JSON object in a file; a key that stands twice is an error."""
    def once(pairs: list[tuple[str, Any]]) -> dict:
        if twice := [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]:
            raise ValueError(f"{twice[0]!r} stands twice")
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: expected JSON, got: {getattr(error, 'strerror', error)}; give "
                           "a Hugging Face model directory, complete and unmodified") from None
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(raw)}; fetch it anew")
    return raw


def write_whole(path: Path, data: bytes) -> None:
    """The file is complete under its name or absent: written aside, flushed to disk, renamed."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
