"""The processes of a run, their signals and exit codes."""

import argparse
import errno
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.files import DiskFull, ImageError, Stopped, UsageError, WeightsError
from engine.schema import DataError


class World:
    """The processes of this run: the one place that knows about ranks and signals."""

    def __init__(self, timeout: float = 300.0) -> None:
        """timeout: seconds that the processes wait for one that does not answer."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.leader, self.main, self.timeout = 0, self.rank == 0, timeout  # see `lead`
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun
        self.node = f"node {os.environ.get('GROUP_RANK', 0)} ({socket.gethostname()})"
        self.shared = 0  # how often the processes have shared something
        self.signal = 0  # the one that asked this process to stop
        self.repeatable = False  # an interruptible block runs: nothing is lost if it ends now
        self.last_met = time.monotonic()  # when all processes last took part in something
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise UsageError(f"--nproc_per_node: expected at most {count}, the number of GPUs, "
                                 f"got a process {local + 1}; start fewer")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
            # A store that torchrun (2.13) shares holds what was said before a restart, too.
            kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self.store = dist.PrefixStore(f"start {self.restarts * kept}", store)
            self.restarts = max(self.share(self.restarts))  # each node counts only its own

    def join(self) -> None:
        """Connect the processes for sums and copies, once everything slow is prepared."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=timedelta(seconds=self.timeout), store=self.store,
                                    rank=self.rank, world_size=self.size)

    def share(self, value: Any, last: bool = False) -> list[Any]:
        """All processes' values by rank, in JSON.  last: this one ends, and waits for none, but for
        rank 0, which may hold the store: 3 s, so that the others can read why."""
        if self.size == 1:
            return [value]
        self.shared += 1
        given, read = ([f"{word} {self.shared} {rank}" for rank in range(self.size)]
                       for word in ("given", "read"))
        self.store.set(given[self.rank], json.dumps(value))
        values = [] if last else list(map(json.loads, self.store.multi_get(given)))
        self.store.set(read[self.rank], "")
        if self.rank == 0:  # this process may hold the store, and end now
            with suppress(dist.DistError) if last else nullcontext():
                self.store.wait(read, timedelta(seconds=3 if last else self.timeout))
        return values

    def lead(self, standing: list[int]) -> None:
        """Let the first process of the highest standing be the main one, which alone reads and
        writes the run folder and prints, instead of rank 0."""
        standings = self.share(standing)
        self.leader = standings.index(max(standings))
        self.main = self.rank == self.leader

    def together(self, work: Callable[[], Any]) -> Any:
        """work(); where it fails on one node, as a file is missing, all end and name the node."""
        try:
            result = work()
        except Exception as problem:
            self.share(f"{self.node}: {problem}", last=True)
            raise
        for problem in filter(None, self.share(None)):
            raise UsageError(problem)
        return result

    def agree(self, values: dict[str, Any]) -> None:
        """UsageError unless all processes have the same {what it is: its value}."""
        (node, ours), *others = self.share([self.node, values])
        for other, theirs in others:
            for name in (name for name in ours if ours[name] != theirs[name]):
                raise UsageError(f"{name}: expected the same on every node, got {ours[name]} on "
                                 f"{node} and {theirs[name]} on {other}; start all nodes by one "
                                 "line, with equal files")

    def leave(self) -> None:
        """Part from the other processes at the end of a command."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        self.last_met = time.monotonic()
        return tensor

    def hand_out(self, *tensors: torch.Tensor) -> None:
        """Fill tensors with those of the main process, in place and to the bit."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, self.leader)
        self.last_met = time.monotonic()

    def print(self, *lines: str) -> None:
        """Print lines, on the main process alone."""
        if self.main:
            print(*lines, sep="\n", flush=True)

    def listen(self) -> None:
        """From now on Ctrl-C and SIGTERM ask for a stop, which comes after the current step."""
        self.last_met = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _: object) -> None:
        """Remember the signal.  A second one ends the process at once, and so does one that comes
        after this process has hung for longer than the timeout."""
        hung = not self.repeatable and time.monotonic() - self.last_met > self.timeout
        if self.signal or hung:
            os._exit(128 + number)
        self.signal = number
        if self.repeatable:
            raise Stopped(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal may end this block at once (Stopped); the block is repeated on resume."""
        self.repeatable = True
        if self.signal:
            raise Stopped(self.signal)
        yield
        self.repeatable, self.last_met = False, time.monotonic()


def carry_out(run: Callable[[argparse.Namespace, World], None], args: argparse.Namespace) -> None:
    """Run a parsed command line, run(args, world), and end with the promised exit codes."""
    with exit_codes():
        world = World()
        run(args, world)
        world.leave()


def verdict(problem: BaseException) -> tuple[int, str]:
    """Exit code and message of a command that ends with this exception."""
    match problem:
        case UsageError() | DataError() | ImageError() | WeightsError():
            return getattr(problem, "exit_code", 2), f"error: {problem}"
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
        case Stopped():
            return 128 + problem.args[0], ""
        case BrokenPipeError():  # who read the output, as `head`, has read enough
            return 128 + signal.SIGPIPE, ""
        case OSError() if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFull.exit_code, f"error: {problem}; make room, run it again"
        case OSError() if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR,
                                            errno.ENOTDIR):
            return 2, (f"error: {problem.filename}: expected a place that this user may read and "
                       f"write, got {problem.strerror}; name another one, or change its rights")
    return 1, "".join(traceback.format_exception(problem))


@contextmanager
def exit_codes() -> Iterator[None]:
    """Let an exception in this block end the process with its message and the promised exit code;
    one of several ends by os._exit, since a destructor might wait for the others.  If all fail, the
    cause should be read once: a process that is not rank 0, or only knows that another is gone,
    waits a second, in which torchrun ends it before it speaks."""
    try:
        yield
        sys.stdout.flush()
    except BaseException as problem:
        if isinstance(problem, SystemExit) and not dist.is_initialized():
            raise  # argparse has printed its message
        code, message = verdict(problem)
        rank, alone = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1)) == 1
        gone = not alone and isinstance(problem, RuntimeError) and re.search(
            r".*(gloo|NCCL|by peer|[Tt]ime(d |)out|recv|Broken pipe).*", str(problem))
        if gone:
            message = f"rank {rank}: another process has ended or does not answer: {gone[0]}"
        if not alone and message and (rank != "0" or gone):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(1)
        if isinstance(problem, BrokenPipeError):  # what is left to print goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()
        if message:
            print(message, file=sys.stderr, flush=True)
        if alone:
            sys.exit(code)
        os._exit(code)
