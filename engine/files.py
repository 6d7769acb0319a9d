"""Errors, locks, atomic writes, hashes and strict JSON: each stands once, here."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP)  # says flock where none are


class UsageError(ValueError):
    """A command cannot be carried out; the text says what was expected, found, and to be done."""


class DiskFull(UsageError):
    """No checkpoint can be written."""
    exit_code = 74  # EX_IOERR


class WeightsError(ValueError):
    """A model folder, its configuration or the requested type cannot be used."""


class ImageError(ValueError):
    """A picture, its name, its boxes or its stored features cannot be used."""


class Stopped(Exception):
    """A signal ended the run in good order; the argument is its number."""


@cache
def note(text: str) -> None:
    """Say something once, beside a command's output; of a node's processes the first one does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def locked(path: Path, risk: str, wait: bool = True) -> TextIO:
    """Lock a file against all other processes of this machine until what is returned is closed, as
    a `with` block does, or its holder ends.  BlockingIOError if it is taken and `wait` is False.
    Where a file system has no locks, none is taken, and a note names the risk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "a")
    except PermissionError:  # another user's, whom a lock for reading keeps out as well
        file = open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as cause:
        if cause.errno not in NO_LOCKS:
            raise
        note(f"{path}: expected a file system with locks, got {cause.strerror}; {risk}")
    return file


def claim(out: Path) -> TextIO:
    """Lock a run folder until the file returned is closed; UsageError: not writable, or in use."""
    try:
        return locked(out / ".lock", "a second run that writes to this --out would go unnoticed: "
                      "start one at a time", wait=False)
    except BlockingIOError:
        raise UsageError(f"--out {out}: expected a run folder that no other process writes to, got "
                         "one in use; wait for that run, end it, or use another --out") from None
    except OSError as cause:
        problem = "a file" if out.is_file() else cause.strerror
        raise UsageError(f"--out {out}: expected a writable folder, got {problem}; choose another "
                         "--out") from None


def regular(path: str | os.PathLike) -> str | os.PathLike:
    """The path itself, if a file lies there: a pipe or a device would never end (OSError)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("no regular file")
    return path


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that is never seen half written, and the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder that is never seen half filled: make(path) fills another, which is renamed."""
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(aside)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk its space is needed
        raise
    aside.rename(folder)
    sync(folder.parent)


def append(path: Path, text: str) -> None:
    """Append all of a text to a file or, where the disk is full, nothing (OSError)."""
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if file.write(content) != len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def save_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Write rows as CSV under the keys of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def file_hash(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON; ValueError says why it cannot be, also for a key twice in one object."""
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice in {json.dumps(dict(pairs)):.80}")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file of a model folder; WeightsError if there is none."""
    try:
        raw = parse_json(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError(type(raw))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise WeightsError(f"{path}: expected a JSON object, got: {reason}; give a Hugging Face "
                           "model directory, complete and unmodified") from None
    return raw
