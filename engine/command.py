"""How every command declares its options, answers mistakes, shows how far it is, and says where it
has moved."""

import argparse
import codecs
import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm


def escape(problem: UnicodeError) -> tuple[str, int]:
    """Characters that a stream cannot hold, as JSON escapes them: a line of it remains JSON."""
    return json.dumps(problem.object[problem.start:problem.end])[1:-1], problem.end


codecs.register_error("escape", escape)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags; an unknown flag is answered with the nearest known one,
    and the help names each default that is not None or False."""

    def __init__(self, **options: object):
        self.flags: list[str] = []  # all that are declared
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; from now on what the output cannot encode, a tweet, a path, is escaped, and
        words that are no text, which safetensors could not open, are refused."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError):  # not a file of this process
                stream.reconfigure(errors="escape")
        for word in sys.argv[1:] if args is None else args:
            if re.search("[\ud800-\udfff]", word):
                self.error(f"expected UTF-8, got {word!r}; rename the file, or set LC_ALL=C.UTF-8")
        return super().parse_args(args, namespace)

    def add_argument(self, *names: object, **settings: object) -> argparse.Action:
        return self.noted(super().add_argument(*names, **settings))

    def add_argument_group(self, *words: object, **options: object) -> Any:
        group = super().add_argument_group(*words, **options)
        declare = group.add_argument
        group.add_argument = lambda *names, **settings: self.noted(declare(*names, **settings))
        return group

    def add_out(self, what: str) -> Any:
        """Declare --out, as `folder`: the folder for `what` a command writes.  Returns the
        add_argument of its group."""
        add = self.add_argument_group("output").add_argument
        add("--out", dest="folder", type=Path, metavar="DIR", required=True, help=what)
        return add

    def noted(self, action: argparse.Action) -> argparse.Action:
        """A declared argument, with its default in its help."""
        self.flags += action.option_strings
        silent = action.default in (None, argparse.SUPPRESS) or action.default is False
        if not silent and "default" not in action.help:
            action.help += " (default: %(default)s)"
        return action

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line, which names flags close to the unknown ones."""
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], self.flags, n=1)
            if word.startswith("--") and near and word not in self.flags:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


class Bar(tqdm):
    """A progress bar of tqdm. In a log that is no terminal it writes a line every ten seconds, the
    first after ten."""

    def __init__(self, *args: object, **options: object):
        self.terminal = sys.stderr.isatty()
        pace = {} if self.terminal else {"mininterval": 10.0, "delay": 10.0, "miniters": 1}
        super().__init__(*args, **{"mininterval": 0.5, **options, **pace})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show how far it is (or msg)."""
        if self.terminal:
            super().display(msg, pos)
        else:
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is, or take it away; a log needs neither."""
        if not self.terminal:
            self.delay = math.inf  # until then tqdm has nothing to put in order
        super().close()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with straight columns, the first to the left, the others right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    return [row[0].ljust(first) + "".join(cell.rjust(width + 2) for cell, width
                                          in zip(row[1:], widths)) for row in rows]


def moved(old: str, new: str) -> NoReturn:
    """End with exit code 2 and the new spelling of a command."""
    print(f"error: {old} is now {new}; see `{new} --help`", file=sys.stderr)
    sys.exit(2)
