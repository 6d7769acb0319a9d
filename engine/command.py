"""How every command declares its options, answers mistakes, and says where it has moved."""

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags; an unknown flag is answered with the nearest known one,
    and the help names each default that is not None or False."""

    def __init__(self, **options: object):
        super().__init__(**{"allow_abbrev": False, **options})

    def add_argument_group(self, *words: object, **options: object) -> Any:
        """A group as argparse makes it, whose add_argument puts the default into the help."""
        group = super().add_argument_group(*words, **options)
        declare = group.add_argument

        def add_argument(*names: object, **settings: object) -> argparse.Action:
            action = declare(*names, **settings)
            silent = action.default is None or action.default is False or "default" in action.help
            action.help += "" if silent else " (default: %(default)s)"
            return action

        group.add_argument = add_argument
        return group

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line, which names flags close to the unknown ones."""
        flags = re.findall(r"--[\w-]+", self.format_help())
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            if word.startswith("--") and near and word not in flags:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def moved(old: str, new: str) -> NoReturn:
    """End with exit code 2 and the new spelling of a command."""
    print(f"error: {old} is now {new}; see `{new} --help`", file=sys.stderr)
    sys.exit(2)
