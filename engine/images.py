"""Reading pictures that nobody vouches for."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.files import ImageError, regular
from engine.schema import IMAGE_NAME

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # Pillow's many other readers are attack surface
MAX_PIXELS = 32_000_000
PathLike = str | os.PathLike


def resolve_image(root: PathLike, name: str) -> Path:
    """Path of the picture with a record's name inside the folder `root`; it need not exist.
    ImageError if it may lie elsewhere: links are followed before the check."""
    try:
        inside = os.path.realpath(root)
        path = os.path.realpath(os.path.join(inside, name))
        bad = not IMAGE_NAME.holds(name) or os.path.commonpath([inside, path]) != inside
    except (TypeError, OSError, ValueError):  # no text, too long, not encodable
        bad = True
    if bad:
        raise ImageError(f"image name {name!r}: expected a relative path, parts joined by /, that "
                         f"stays inside {root}, got one that may not; correct the record")
    return Path(path)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB, without transparency, as the hub's processors do it.
    16-bit grey keeps its high byte, where Pillow alone would turn all above 255 white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same pixels as without this step, but no warning
    return image.convert("RGB")


def load_image(path: PathLike) -> Image.Image:
    """Read a file as an upright RGB picture; ImageError if it is not a whole one of FORMATS."""
    try:
        with Image.open(regular(path), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.size}, more than {MAX_PIXELS} pixels")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # damaged files raise nearly every built-in exception in Pillow
        got = ("a file that begins like none of them" if isinstance(error, UnidentifiedImageError)
               else f"{type(error).__name__}: {error}")
        raise ImageError(f"{path}: expected a whole {', '.join(FORMATS)} picture, got {got}; "
                         "replace the file") from error
