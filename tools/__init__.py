"""One command each, run as `python -m tools.NAME`: what is done before a training and after it.

A tool may import everything, and nothing imports a tool but the tests and other tools.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Names such as data and evaluate are anybody's.  Modules of another project in the place of ours
# would fail far from here, or not at all.
for file in sorted([*ROOT.glob("*.py"), ROOT / "engine/__init__.py", ROOT / "fast/__init__.py"]):
    name = file.parent.name if file.stem == "__init__" else file.stem
    module = sys.modules.get(name) or find_spec(name)
    got = getattr(module, "__file__", None) or getattr(module, "origin", None)
    if got is None or Path(got).resolve() != file.resolve():
        raise ImportError(f"import {name}: expected the module {file}, got {got}; load this code "
                          f"as the head of {ROOT / 'tools' / 'load.py'} says, beside any others")
