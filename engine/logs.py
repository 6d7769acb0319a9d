"""The logs of a run: metrics.csv, one row a step, and eval.jsonl, one line an epoch."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.files import append, write_whole


class Logs:
    """Writes both logs into a run folder; rank 0 alone has one.  A kill loses no row, and on a
    full disk rows wait in memory until there is room again."""

    def __init__(self, out: Path):
        self.metrics, self.history = out / "metrics.csv", out / "eval.jsonl"
        self.waiting = ""  # rows for which the disk had no room

    def add(self, row: Mapping[str, float]) -> None:
        """Append the row of a step to metrics.csv, under a header where it is the first."""
        had_room = not self.waiting
        if had_room and not (self.metrics.exists() and self.metrics.stat().st_size):
            self.waiting = ",".join(row) + "\n"
        self.waiting += ",".join(map(str, row.values())) + "\n"
        try:
            append(self.metrics, self.waiting)
            self.waiting = ""
        except OSError as cause:
            if had_room:
                print(f"error: {self.metrics}: expected to append a row, got {cause}; training "
                      "goes on and the rows are kept in memory: make room", file=sys.stderr)

    def write_history(self, history: Sequence[dict]) -> None:
        """Replace eval.jsonl by the dev scores and weights of all epochs so far."""
        if history or self.history.exists():
            write_whole(self.history, "".join(json.dumps(epoch) + "\n" for epoch in history))

    def restore(self, step: int, history: Sequence[dict]) -> None:
        """Cut both logs back to a checkpoint of this step, so that no step appears twice."""
        if self.metrics.exists():
            *lines, _ = self.metrics.read_text(encoding="utf-8").split("\n")  # _ may be torn
            write_whole(self.metrics, "".join(
                line + "\n" for line in lines
                if line.startswith("step,") or int(line.split(",")[0]) <= step))
        self.write_history(history)
