"""How every command declares its options, answers mistakes, and says where it has moved."""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags; an unknown flag is answered with the nearest known one,
    and the help names each default that is not None or False."""

    def __init__(self, **options: object):
        self.flags: list[str] = []                   # all that are declared
        super().__init__(**{"allow_abbrev": False, **options})

    def add_argument_group(self, *words: object, **options: object) -> Any:
        group = super().add_argument_group(*words, **options)
        group.add_argument = self.noted(group.add_argument)
        return group

    def add_argument(self, *names: object, **options: object) -> argparse.Action:
        return self.noted(super().add_argument)(*names, **options)

    def noted(self, add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
        """`add`, which declares an argument, with its flags noted and its default in its help."""
        def add_and_note(*names: object, **options: object) -> argparse.Action:
            action = add(*names, **options)
            self.flags += action.option_strings
            silent = action.default in (None, argparse.SUPPRESS) or action.default is False
            if action.help and not silent and "default" not in action.help:
                action.help += " (default: %(default)s)"
            return action
        return add_and_note

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line, which names flags close to the unknown ones."""
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], self.flags, n=1)
            if word.startswith("--") and near and word not in self.flags:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def moved(old: str, new: str) -> NoReturn:
    """End with exit code 2 and the new spelling of a command."""
    print(f"error: {old} is now {new}; see `{new} --help`", file=sys.stderr)
    sys.exit(2)
