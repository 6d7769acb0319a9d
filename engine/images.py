"""Reading pictures that nobody vouches for."""

import hashlib
import os
import re
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.files import ImageError, regular
from engine.schema import IMAGE_NAME, Box

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # Pillow's many other readers are attack surface
MAX_PIXELS = Image.MAX_IMAGE_PIXELS = 128_000_000  # cameras make 100; Pillow itself would only warn
LARGE = 16_000_000  # pixels of a picture that is decoded while no other large one is in memory
ONE_LARGE = threading.Lock()
MENDABLE = 128_000_000  # bytes of a file that is tried a second time
# A whole file has more bytes than its pixels over this: a JPEG spends a bit on each block of 8 x 8,
# and deflate makes at most 1,032 bytes of one.  So a small file that claims much costs no memory.
PIXELS_A_BYTE = {"JPEG": 8 * 64, "MPO": 8 * 64, "PNG": 8 * 1032}
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # EXIF's orientation -> what undoes it
PathLike = str | os.PathLike
Extent = Sequence[int] | None  # width and height of the upright picture, if the record has them
Views = TypeVar("Views")


def resolve_image(root: PathLike, name: str) -> Path:
    """Path of the picture with a record's name inside the folder `root`; it need not exist.
    ImageError if the name itself may lead elsewhere.  Links below `root`, which only the keeper of
    the corpus can have put there, are followed when the picture is opened."""
    try:
        bad = not name or not IMAGE_NAME.holds(name)
    except (TypeError, ValueError):  # no text, not encodable
        bad = True
    if bad:
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
    """The upright RGB picture in an open file; nearly any exception if it holds no whole one."""
    length = file.seek(0, os.SEEK_END)
    with Image.open(file, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ImageError(f"{image.size}, more than {MAX_PIXELS} pixels")
        if pixels > length * PIXELS_A_BYTE.get(image.format, pixels):
            raise ImageError(f"{image.size} in {length} bytes, which cannot hold so many pixels")
        image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # malformed metadata, which says nothing about the pixels
        turn = None
    image = to_rgb(image)
    return image.transpose(turn) if turn is not None else image


def load_image(path: PathLike) -> Image.Image:
    """Read a file as an upright RGB picture; ImageError if it is not a whole one of FORMATS."""
    try:
        with open(regular(path), "rb") as file:
            return decoded(file)
    except Exception as error:  # damaged files raise nearly every built-in exception in Pillow
        problem = error.with_traceback(None)  # which would hold on to the picture
    try:
        if content := not isinstance(problem, ImageError) and mended(path):
            return decoded(BytesIO(content))
    except Exception:
        pass  # what was wrong at first is reported
    got = ("a file that begins like none of them" if isinstance(problem, UnidentifiedImageError)
           else f"{type(problem).__name__}: {problem}")
    raise ImageError(f"{path}: expected a whole {', '.join(FORMATS)} picture, got {got}; "
                     "replace the file") from problem


def look(path: PathLike, boxes: Sequence[Box], size: Extent,
         views: Callable[[Image.Image, Sequence[Box]], Views]) -> Views:
    """What `views` makes of the picture of a record and its boxes, as training and the check of a
    corpus both open it.  ImageError for a picture, a size or a box that does not fit."""
    try:
        with Image.open(regular(path), formats=FORMATS) as image:  # its header alone
            large = LARGE < image.width * image.height
    except Exception:
        large = False  # load_image says why
    with ONE_LARGE if large else nullcontext():
        image = load_image(path)
        if size and image.size != tuple(size):
            raise ImageError(f"{path}: expected {size[0]} x {size[1]} pixels as in the record, got "
                             f"{image.width} x {image.height} (upright); correct the record")
        try:
            return views(image, boxes)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None


# ------------------------------------------------------------------- files with intact pixels only
def mended(path: PathLike) -> bytes | None:
    """The content of a file that Pillow refused, mended where its pixels are whole: a PNG without
    text, profiles and the like, a JPEG with the end mark that it lacks.  None for any other."""
    if os.path.getsize(regular(path)) > MENDABLE:
        return None
    content = Path(path).read_bytes()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return bare_png(content)
    content = content.removesuffix(END[:1])
    # The last byte must be needed: else the file was filled up, and filler was read as pixels.
    shorter = content[:-2 if content.endswith(b"\xff\0") else -1]
    if (content.startswith(b"\xff\xd8") and scans_are_complete(content) and is_whole(content)
            and not is_whole(shorter)):
        return content + END
    return None


def bare_png(content: bytes) -> bytes:
    """A PNG without its chunks that hold no pixels, but for EXIF, which may hold an orientation."""
    kept, at = [content[:8]], 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4])
        body = content[at + 4:end - 4]
        intact = zlib.crc32(body) == int.from_bytes(content[end - 4:end])
        if body[:4] in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or body[:4] == b"eXIf" and intact:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


END = b"\xff\xd9"  # of a JPEG
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # neither a byte 255 nor a restart
RESTART = re.compile(rb"\xff[\xd0-\xd7]")


def scans_are_complete(content: bytes) -> bool:
    """Whether the scans of a JPEG send every coefficient of every component to its last bit."""
    at, components, lowest = 2, 0, {}
    while marker := MARKER.search(content, at):
        at = marker.end() + int.from_bytes(content[marker.end():marker.end() + 2])
        body = content[marker.end() + 2:at]
        if marker[1][0] in range(0xc0, 0xd0) and marker[1] not in b"\xc4\xc8\xcc":
            components = body[5]  # of a frame
        elif marker[1] == b"\xda":  # a scan: components, first and last coefficient, lowest bit
            lowest |= {(one, k): body[-1] & 15 for one in body[1:2 * body[0]:2]
                       for k in range(body[-3], body[-2] + 1)}
    return len(lowest) == 64 * components and not any(lowest.values())


def is_whole(content: bytes) -> bool:
    """Whether a JPEG without end mark holds all bits of its last scan: what follows, zeros (what
    libjpeg takes at an end mark) or bits that begin with a one, then changes no pixel."""
    marks = RESTART.findall(content)
    first = marks[-1][1] + 1 if marks else 0  # the restart mark that would come next
    noise = b"".join(b"\xa5\x5a" * 8 + bytes([255, 0xd0 + (first + k) % 8]) for k in range(9))
    digests = set()
    for filler in (b"", noise):
        with Image.open(BytesIO(content + filler + END), formats=("JPEG",)) as image:
            digests.add(hashlib.sha256(image.tobytes()).digest())
    return len(digests) == 1
