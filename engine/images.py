"""Reading pictures that nobody vouches for."""

import os
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.files import ImageError, regular
from engine.schema import IMAGE_NAME, Box

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # Pillow's many other readers are attack surface
MAX_PIXELS = Image.MAX_IMAGE_PIXELS = 128_000_000  # cameras make 100; Pillow itself would only warn
# A whole file has more bytes than its pixels over this: a JPEG spends a bit on each block of 8 x 8,
# and deflate makes at most 1,032 bytes of one.  So a small file that claims much costs no memory.
PIXELS_A_BYTE = {"JPEG": 8 * 64, "MPO": 8 * 64, "PNG": 8 * 1032}
PathLike = str | os.PathLike
Extent = Sequence[int] | None  # width and height of the upright picture, if the record has them


def resolve_image(root: PathLike, name: str) -> Path:
    """Path of the picture with a record's name inside the folder `root`; it need not exist.
    ImageError if the name may lead elsewhere; where links lead is their keeper's business."""
    if name is None or not IMAGE_NAME.holds(name):
        raise ImageError(f"image name {name!r}: expected a relative path, parts joined by /, that "
                         f"stays inside {root}, got one that may not; correct the record")
    return Path(root, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB, without transparency, as the hub's processors do it.
    16-bit grey keeps its high byte, where Pillow alone would turn all above 255 white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.asarray(image).astype("<u2").view(np.uint8)[:, 1::2])
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same pixels as without this step, but no warning
    return image if image.mode == "RGB" else image.convert("RGB")


def decoded(file: BinaryIO) -> Image.Image:
    """The upright RGB picture in a file; nearly any exception if it holds no whole one."""
    length = file.seek(0, os.SEEK_END)
    with Image.open(file, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > (most := min(MAX_PIXELS, length * PIXELS_A_BYTE.get(image.format, pixels))):
            raise ImageError(f"{image.size} in {length} bytes, more than {most} pixels")
        image.load()
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture, turned in place as its EXIF says, in RGB."""
    with suppress(Exception):  # of malformed metadata; what can be read has turned the picture
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def load_image(path: PathLike) -> Image.Image:
    """Read a file as an upright RGB picture; ImageError if it is not a whole one of FORMATS."""
    try:
        with open(regular(path), "rb") as file:
            return decoded(file)
    except Exception as error:  # damaged files raise nearly every built-in exception in Pillow
        problem = error.with_traceback(None)  # which would hold on to the picture
    with suppress(Exception):  # what was wrong at first is reported
        if not isinstance(problem, ImageError):
            return decoded(BytesIO(mended(path)))
    if isinstance(problem, FileNotFoundError):
        raise ImageError(f"{path}: expected a picture, got no file; correct the path") from problem
    got = ("a file that begins like none of them" if isinstance(problem, UnidentifiedImageError)
           else f"{type(problem).__name__}: {problem}")
    raise ImageError(f"{path}: expected a whole {', '.join(FORMATS)} picture, got {got}; "
                     "replace the file") from problem


def look(path: PathLike, boxes: Sequence[Box], size: Extent, views: Callable) -> Any:
    """What views(image, boxes) makes of a record's picture; training and the check of a corpus both
    open it here.  ImageError for a picture, a size or a box that does not fit."""
    image = load_image(path)
    if size and image.size != tuple(size):
        raise ImageError(f"{path}: expected {size[0]} x {size[1]} pixels as in the record, got "
                         f"{image.width} x {image.height} (upright); correct the record")
    try:
        return views(image, boxes)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None


# ------------------------------------------- files that Pillow refuses though no pixel is missing
def mended(path: PathLike) -> bytes | bytearray | None:
    """A PNG without text, profiles and the like, or a JPEG with the end mark that it lacks; None
    if pixels are missing, too, or the file is so large that this might fill the memory."""
    if os.path.getsize(regular(path)) > MAX_PIXELS:
        return None
    content = Path(path).read_bytes()
    if content.startswith(b"\x89PNG"):
        return bare_png(content)
    content = content.removesuffix(b"\xff")  # half an end mark
    # Its last byte must be needed: else the file was filled up, and filler was read as pixels.
    shorter = content[:-2 if content.endswith(b"\xff\0") else -1]
    whole = scans_are_complete(content) and is_whole(content) and not is_whole(shorter)
    return content + b"\xff\xd9" if whole else None


def bare_png(content: bytes) -> bytearray:
    """A PNG without chunks that hold no pixels, but for EXIF, which may hold an orientation."""
    kept, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4])
        body, check = content[at + 4:end - 4], int.from_bytes(content[end - 4:end])
        if body[:4] in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf") and zlib.crc32(body) == check:
            kept += content[at:end]
        at = end
    return kept


def scans_are_complete(content: bytes) -> bool:
    """Whether the scans of a JPEG send every coefficient of every component to its last bit."""
    at, components, lowest = 2, 0, {}
    marker = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither a byte of 255 nor a restart
    while mark := marker.search(content, at):
        at = mark.end() + int.from_bytes(content[mark.end():mark.end() + 2])
        body = content[mark.end() + 2:at]
        if mark[1] in b"\xc0\xc1\xc2":  # a frame
            components = body[5]
        if mark[1] == b"\xda":  # a scan: components, first and last coefficient, lowest bit
            lowest |= {(one, k): body[-1] & 15 for one in body[1:2 * body[0]:2]
                       for k in range(body[-3], body[-2] + 1)}
    return len(lowest) == 64 * components and not any(lowest.values())


def is_whole(content: bytes) -> bool:
    """Whether a JPEG without end mark holds all bits of its last scan: then no pixel depends on
    what follows, zeros (which libjpeg takes at an end mark) or noise that begins with a one."""
    marks = re.findall(rb"\xff[\xd0-\xd7]", content)
    first = marks[-1][1] + 1 if marks else 0  # of the restart marks that would come next
    noise = b"".join(b"\xa5\x5a" * 8 + bytes([255, 0xd0 + (first + k) % 8]) for k in range(9))
    ended = (Image.open(BytesIO(content + end), formats=("JPEG",))
             for end in (b"\xff\xd9", noise + b"\xff\xd9"))
    return len({sha256(image.tobytes()).digest() for image in ended}) == 1
