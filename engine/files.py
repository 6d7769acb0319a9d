"""Exceptions, locks, whole writes, hashes and strict JSON: each stands once, here."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UsageError(ValueError):
    """A command that cannot be carried out, with what to do instead."""


class DiskFull(UsageError):
    """No room for checkpoints."""

    exit_code = 74  # EX_IOERR


class Stopped(Exception):
    """A signal ended the run in good order; its number is the argument."""


# --------------------------------------------------------------------------------------- prepare

@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time do what the others then find done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel even if the holder is killed
        yield


def file_hash(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Let `make` fill a folder that appears under its name only once it is complete."""
    aside = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    make(aside)
    aside.rename(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def claim(out: Path) -> TextIO:
    """Hold a run folder until this process ends, however it ends, or until the file is closed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as cause:
        raise UsageError(f"--out {out}: expected a folder that can be written to, got "
                         f"{'a file' if out.is_file() else cause.strerror}; choose another --out"
                         ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"--out {out}: expected a run folder that no other process writes to, got "
                         "one in use; wait for that run, end it, or use another --out") from None
    return lock


def append(path: Path, text: str) -> None:
    """Append to a file, all of it or, where the disk is full, nothing."""
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if file.write(content) != len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def save_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Write rows under the names of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


class WeightsError(ValueError):
    """A checkpoint, its configuration or the requested type cannot be used."""


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


class ImageError(ValueError):
    """A picture, its name, its boxes or its stored features cannot be used; the text says which."""


def write_whole(path: Path, content: bytes | str) -> None:
    """The file is complete under its name or absent: written aside, flushed to disk, renamed.
    Folders that lead to it are made."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
