"""Draw which file imports which, from the source alone: python tests/imports.py docs/imports.svg

A box is a file and an arrow an import, drawn faintly where other arrows lead there as well; nothing
imports what stands above it.  tests/test_project.py holds docs/imports.svg and the arrows' rules.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"": "#0072B2", "fast/": "#D55E00", "engine/": "#009E73", "tools/": "#AA4499"}
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 %d" \
style="background:#fff"><style>text{font:11px sans-serif;text-anchor:middle;fill:#fff}\
path{fill:none;stroke:#222;marker-end:url(#tip)}.implied{opacity:.12;marker-end:none}</style>
<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" \
orient="auto"><path d="M0 0L6 3L0 6z" style="fill:#222;stroke:none;marker-end:none"/></marker>"""


def graph(root: Path) -> dict[str, set[str]]:
    """{file: the files of the project that it imports}, by their paths below `root`."""
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
               for folder in COLOURS for path in sorted((root / folder).glob("*.py"))}
    imports = {}
    for file, source in sources.items():
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = [node.module] if isinstance(node, ast.ImportFrom) else []
                names |= {*module, *(".".join([*module, alias.name]) for alias in node.names)}
        imports[file] = {other for other in sources if other != file and other.removesuffix(
            ".py").removesuffix("/__init__").replace("/", ".") in names}
    return imports


def picture(imports: Mapping[str, set[str]]) -> str:
    """The SVG: a row of boxes for each layer, coloured by folder, and the arrows behind them."""
    level, place, below, arrows, boxes = dict.fromkeys(imports, 0), {}, {}, [], []
    for _ in imports:  # as many rounds as a chain of imports can be long
        for file in imports:  # a file stands one above the highest that it imports
            level[file] = max((level[other] + 1 for other in imports[file]), default=0)
    for i, (folder, colour) in enumerate(COLOURS.items()):
        boxes.append(f'<text x="{60 + 80 * i}" y="20" style="fill:{colour}">'
                     f'{folder or "chapters"}</text>')
    for file in sorted(imports, key=level.get):  # what it imports has its place already
        row = [other for other in imports if level[other] == level[file]]
        x = round((row.index(file) + 0.5) * 1000 / len(row))
        y = 40 + 74 * (max(level.values()) - level[file])  # pixels, on a page 1000 wide
        place[file], folder = (x, y), file[:file.find("/") + 1]
        boxes.append(f'<rect x="{x - 40}" y="{y}" width="80" height="22" rx="4" fill="'
                     f'{COLOURS[folder]}"/><text x="{x}" y="{y + 15}">{Path(file).stem}</text>')
        below[file] = imports[file].union(*(below[other] for other in imports[file]))
        for other in sorted(imports[file]):
            faint = ' class="implied"' * any(other in below[third] for third in imports[file])
            u, v = place[other]
            arrows.append(f'<path{faint} d="M{x} {y + 22}C{x} {y + 50} {u} {v - 28} {u} {v}"/>')
    return "\n".join([HEAD % (114 + 74 * max(level.values())), *arrows, *boxes, "</svg>"])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(graph(ROOT)) + "\n", encoding="utf-8")
