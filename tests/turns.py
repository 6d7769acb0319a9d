"""Variants of a computation, each in a process of its own, that take turns within a time limit.

The parent's side of tests/one_variant.py, for tests/benchmark.py.
"""

import argparse
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = argparse.Namespace()  # benchmark.py's command line; deadline: in time.monotonic()
GONE = (ChildProcessError, BrokenPipeError)


class Variant:
    """A variant in a process that starts now, of this tree or another checkout of the project."""
    running: list["Variant"] = []

    def __init__(self, what: str, name: str, tree: Path = ROOT) -> None:
        line = [sys.executable, str(ROOT / "tests/one_variant.py"), str(tree.resolve()), what,
                name, SETTINGS.size, SETTINGS.device, str(SETTINGS.threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe)
        self.ready = False
        self.running.append(self)

    def answer(self) -> str:
        """Its next line.  TimeoutError at the deadline, ChildProcessError if it has ended."""
        left = max(0.0, SETTINGS.deadline - time.monotonic())
        if not select.select([self.process.stdout], [], [], left)[0]:
            raise TimeoutError("the time is up")
        line = self.process.stdout.readline().decode().strip()
        if not line:
            raise ChildProcessError(self.process.stderr.read().decode().strip()[-500:])
        return line

    def ask(self, word: str | int) -> float:
        """Seconds of a run with so many rows, or after "peak" the peak memory in MiB."""
        if not self.ready:
            self.ready = bool(self.answer())
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.running.remove(self)


def take_turns(title: str, runs: dict[str, Callable[[], float]], groups: int, tokens: int = 0,
               references: tuple[str, ...] = (), ideal: dict[str, float] | None = None) -> None:
    """Print the median seconds of every variant and its ratios to the `references`, or to the
    first.  `runs` run a variant once and return its seconds; all warm up before any is measured.
    `groups`: how many calls the time that is left must do for, this one among them.  The tokens of
    a run add its rate, and ideal, the seconds of its arithmetic at the device's peak, the share."""
    print(f"\n{title}", flush=True)
    times: dict[str, list[float]] = {}
    try:
        for name, run in runs.items():
            try:
                run()
                times[name] = []
            except GONE as problem:
                print(f"  {name:28} left out: {problem}", flush=True)
        until = (now := time.monotonic()) + (SETTINGS.deadline - now) / groups  # all have begun
        for _ in range(SETTINGS.repeats):
            started = time.monotonic()
            for name, each in times.items():
                each.append(runs[name]())
            if 2 * time.monotonic() - started > until:  # another turn would end after it
                break
    except TimeoutError:
        out = [name for name in runs if not times.get(name)]
        print(f"  the time is up; left out: {'; '.join(out) or 'more turns'}", flush=True)
    report({name: each for name, each in times.items() if each}, tokens, references, ideal or {})


def report(times: dict[str, list[float]], tokens: int, references: tuple[str, ...],
           ideal: dict[str, float]) -> None:
    """The table of take_turns."""
    medians = {name: statistics.median(each) for name, each in times.items()}
    beside = [name for name in references if name in times] or list(times)[:1]
    if times:
        print(f"  medians of {min(map(len, times.values()))} turns, (least .. largest), times over "
              f"those of {'; '.join(beside)}")
    for name, middle in medians.items():
        ratios = "".join(f"{middle / medians[other]:7.2f}x" for other in beside)
        rate = f"{tokens / middle:8.0f} tokens/s" if tokens else ""
        rate += f"{100 * ideal[name] / middle:4.0f} % of peak" if name in ideal else ""
        print(f"  {name:28}{1e3 * middle:9.1f} ms ({1e3 * min(times[name]):.1f} .. "
              f"{1e3 * max(times[name]):.1f}){ratios}{rate}", flush=True)
