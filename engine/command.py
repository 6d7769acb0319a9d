"""The command line of all commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """The argparse of all four commands: no abbreviated flags, an unknown flag is answered with
    the nearest known one, and the help names each default that is not "nothing" or "no"."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            silent = action.default is None or action.default is False or "default" in action.help
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, **options: object):
        super().__init__(**{"allow_abbrev": False, "formatter_class": self.Help, **options})

    def flags(self) -> list[str]:
        """All flags, those of subcommands included."""
        inner = [parser for action in self._actions if isinstance(action.choices, dict)
                 for parser in action.choices.values() if isinstance(parser, Parser)]
        own = [flag for action in self._actions for flag in action.option_strings]
        return sum((parser.flags() for parser in inner), own)

    def error(self, message: str) -> None:
        flags = self.flags()
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            if word.startswith("--") and near and word not in flags:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def moved(old: str, new: str) -> NoReturn:
    """End a command that was spelt otherwise before: say how it is spelt now, exit with 2."""
    print(f"error: {old} is now {new}; see `{new} --help`", file=sys.stderr)
    sys.exit(2)
