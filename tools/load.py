"""Extractor for a program in another folder, whose modules may be called as ours are.  One line:

    import runpy; Extractor = runpy.run_path("/path/to/this/folder/tools/load.py")["Extractor"]

Ours are called data, evaluate, tools and so on.  While they are loaded, modules of these names that
the program has imported step aside; afterwards they are back, its path is as it was, and an import
of such a name gives the program its own module, never ours.  So results cannot be pickled:
dataclasses.asdict(result) can."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOADED = f"{ROOT} tools.answer"  # no name that an import statement can have
OURS = {path.stem for path in ROOT.glob("*.py")} | {"engine", "fast", "tools"}


def take_out() -> dict:
    """The modules that have one of our names, which are no longer imported then."""
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}


if LOADED not in sys.modules:
    theirs, path = take_out(), list(sys.path)
    sys.path.insert(0, str(ROOT))
    try:
        import tools.answer
        sys.modules[LOADED] = tools.answer
    finally:
        take_out()
        sys.modules.update(theirs)
        sys.path[:] = path

Extractor = sys.modules[LOADED].Extractor
