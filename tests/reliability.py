"""Kill, damage, starve, interrupt and stall training runs, and compare what comes out; a command.

    python tests/reliability.py [R1 R4 ...] [--quick]

Prints one line per promise: its name, PASS or FAIL, the figure, the seconds; exits 1 if any failed.
--quick is the short form, which tests/test_reliability.py runs with every test run.  A promise is
a function in CHECKS: (Lab, quick) -> (held, figure).

To start a run in well under a second, its processes are forked from this one, which has imported
everything and never trains itself.  A `fault` is a function that changes train.py in such a child
before it starts: so that it tells where it is, or fails there.  Runs end with made-up dev scores,
drawn from the weights: real ones would be zero for so small a model, and hide differences.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # a second's work that torch.optim would do in every child
import torch._inductor.config
import hostile
from safetensors.torch import load_file, save_file
from conftest import ENVIRONMENT, ROOT, descendants, make_small, sums

from engine.processes import exit_codes
from engine.checkpoints import Checkpoints, read_state, write_state
from engine.parameters import FlatParameters
from engine.files import UsageError, file_hash
from engine.schema import DataError, UNITS
import data
import engine.checkpoints
import evaluate
import train

Mark = Callable[[str], None]
Fault = Callable[[int, Mark], None]  # (rank, tell the parent one letter)
TORCHRUN_GRACE = 30.0


# ------------------------------------------------------------------------------- runs and their end

@dataclass
class Job:
    """The processes of one started command."""

    pids: list[int]
    marks: int  # pipes that the processes write to
    output: int
    codes: dict[int, int] = field(default_factory=dict)  # by rank: exit code, or minus the signal
    told: str = ""
    text: str = ""

    def listen(self, seconds: float = 0.0) -> str:
        """All marks so far, after waiting for at most so long for another one."""
        if select.select([self.marks], [], [], seconds)[0]:
            self.told += os.read(self.marks, 65536).decode()
        return self.told

    def until(self, mark: str, times: int = 1, limit: float = 120.0) -> bool:
        """Whether the mark came so many times before the processes ended."""
        deadline = time.monotonic() + limit
        while self.listen(0.02).count(mark) < times and time.monotonic() < deadline:
            self.reap()
            if len(self.codes) == len(self.pids):
                break
        return self.listen().count(mark) >= times

    def reap(self) -> None:
        """Collect who has ended and what was printed."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
        while select.select([self.output], [], [], 0)[0]:
            chunk = os.read(self.output, 65536)
            if not chunk:
                break
            self.text += chunk.decode(errors="replace")

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        self.reap()
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ranks is None or rank in ranks):
                os.kill(pid, number)

    def wait(self, limit: float = 300.0) -> list[int]:
        """Exit codes in order of rank; like torchrun, end the others when one has failed."""
        deadline, grace = time.monotonic() + limit, None
        while len(self.codes) < len(self.pids):
            self.reap()
            if any(self.codes.values()) and grace is None:
                self.send(signal.SIGTERM)
                grace = time.monotonic() + TORCHRUN_GRACE
            if time.monotonic() > min(deadline, grace or deadline):
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        self.listen()
        self.reap()
        os.close(self.marks)
        os.close(self.output)
        return [self.codes[rank] for rank in range(len(self.pids))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(command: Callable[[], None], fault: Fault, environment: dict[str, object],
          marks: int, output: int) -> None:
    """The life of a forked process; never returns."""
    code = 1
    try:
        for number in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDONLY) if number == 0 else output, number)
        os.environ.update({name: str(value) for name, value in environment.items()})
        fault(int(environment.get("RANK", 0)), lambda letter: os.write(marks, letter.encode()))
        with exit_codes():
            command()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def fork(command: Callable[[], None], processes: int = 1, fault: Fault = lambda rank, mark: None,
         **more: object) -> Job:
    """Start a command in `processes` processes of one world."""
    marks, told = os.pipe()
    output, printed = os.pipe()
    fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 2 ** 20)
    sys.stdout.flush()
    port, pids = free_port(), []
    for rank in range(processes):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        pid = os.fork()
        if pid == 0:
            child(command, fault, {**world, **more}, told, printed)
        pids.append(pid)
    os.close(told)
    os.close(printed)
    return Job(pids, marks, output)


# ------------------------------------------------------------------------------------------- faults

def before(owner: object, name: str, act: Callable[[], None]) -> None:
    """Call `act` before every call of owner.name."""
    original = getattr(owner, name)

    def wrapped(*args: object, **more: object) -> object:
        act()
        return original(*args, **more)
    setattr(owner, name, wrapped)


def made_up_scores(run: train.Run) -> dict[str, float]:
    """Evaluate, but return scores that differ whenever a bit of the weights does."""
    run.evaluate("dev")
    digest = hashlib.sha256(run.flat.values.numpy().tobytes()).digest()
    return {unit: digest[i] / 2.6 for i, unit in enumerate(run.rows.units)}


def telling(rank: int, mark: Mark) -> None:
    """Tell of training begun (t), each step (s), evaluation (e), a checkpoint: w, when whole W."""
    train.Run.dev_f1 = made_up_scores
    if rank:
        return
    write = engine.checkpoints.write_checkpoint

    def told(folder: Path, flat: object, state: dict) -> None:
        mark("w")
        write(folder, flat, state)
        mark("W")
    engine.checkpoints.write_checkpoint = told
    before(train.Run, "train", lambda: mark("t"))
    before(train.Trainer, "train_step", lambda: mark("s"))
    before(train.Run, "evaluate", lambda: mark("e"))


def in_place(rank: int, mark: Mark) -> None:
    """The control: checkpoints written where they are read, as many programs do; tells of a folder
    begun (b)."""
    def write(folder: Path, flat: FlatParameters, state: dict) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        mark("b")
        flat.save(folder)
        write_state(folder, state, {f.name: file_hash(f) for f in folder.iterdir()})
    engine.checkpoints.write_checkpoint = write
    telling(rank, mark)


# ---------------------------------------------------------------------------------------------- lab

class Lab:
    """A folder with a small world, and runs on it."""

    STEPS = 12  # three epochs of four

    def __init__(self, folder: Path):
        self.folder, self.small, self.count = folder, make_small(folder), 0
        self.straight: dict[int, dict[str, bytes]] = {}
        self.random = random.Random(0)
        self.seconds = self.window = 1.0

    def out(self) -> Path:
        """A new run folder."""
        self.count += 1
        return self.folder / f"run-{self.count}"

    def flags(self, out: Path, *more: object) -> list[str]:
        files = [word for name, folder in self.small.items() for word in (f"--{name}", folder)]
        return [*files, "--units", "T17", "V1", "--max-target", "24", "--rank", "6", "--batch",
                "10", "--micro-batch", "4", "--lr", "0.003", "--save-every", "2", "--out", str(out),
                *map(str, more)]

    def start(self, out: Path, *more: object, processes: int = 1, fault: Fault = telling,
              **environment: object) -> Job:
        flags = self.flags(out, *more)
        return fork(lambda: train.main(flags), processes, fault, **environment)

    def reference(self, processes: int) -> dict[str, bytes]:
        """What a run that nothing happens to leaves behind; how long it and its saves take."""
        if processes not in self.straight:
            out = self.out()
            job, times = self.start(out, processes=processes), {}
            for letter in "twW":
                assert job.until(letter), job.text
                times[letter] = time.monotonic()
            assert not any(job.wait()), job.text
            self.seconds = time.monotonic() - times["t"]
            self.window = times["W"] - times["w"]
            self.straight[processes] = sums(out)
        return self.straight[processes]

    def finish(self, out: Path, processes: int = 1, *more: object) -> bool:
        """Run to the end whatever is left; whether it ends as if nothing had happened."""
        codes = (job := self.start(out, *more, processes=processes)).wait()
        ours, want = sums(out), self.reference(processes)
        odd = sorted(name for name in {**ours, **want} if ours.get(name) != want.get(name))
        if any(codes) or odd:
            print(f"  {out}: exit codes {codes}, differs in {odd}\n{job.text}", file=sys.stderr)
        return not any(codes) and not odd


def broken(out: Path) -> list[Path]:
    """Checkpoint folders that are not whole."""
    found = []
    for folder in sorted(path for path in out.glob("[!.]*-*") if path.is_dir()):
        try:
            read_state(folder)
        except UsageError:
            found.append(folder)
    return found


# --------------------------------------------------------------------------------------- R1: kills

def kill_once(lab: Lab, job: Job, aimed: bool) -> bool | None:
    """SIGKILL all processes at a random moment of training, or of writing a checkpoint.

    None: the run was over first.  Else whether a checkpoint was being written.
    """
    if aimed:
        write = lab.random.randint(1, 3)
        if not job.until("w", write):
            return None
        time.sleep(lab.random.uniform(0, 0.8 * lab.window))
    else:
        if not job.until("t"):
            return None
        time.sleep(lab.random.uniform(0, lab.seconds))
    job.reap()
    if job.codes:
        return None
    job.send(signal.SIGKILL)
    job.wait()
    return job.told.count("w") > job.told.count("W")


def kill_and_compare(lab: Lab, processes: int, at_random: int, aimed: int) -> tuple[int, int, int]:
    """(kills survived, checkpoints found broken, kills while one was written)."""
    lab.reference(processes)
    wanted, survived, torn, inside = {False: at_random, True: aimed}, 0, 0, 0
    while any(wanted.values()):
        out, kills = lab.out(), 0
        while any(wanted.values()):
            aim = wanted[True] > 0 and (not wanted[False] or lab.random.random() < 0.5)
            job = lab.start(out, processes=processes)
            hit = kill_once(lab, job, aim)
            if hit is None:
                break
            torn += len(broken(out))
            if aim and not hit:
                continue  # a kill, but not one in the window: does not count
            inside += hit
            wanted[aim] -= 1
            kills += 1
        if len(job.codes) < processes:
            job.wait()
        survived += kills * lab.finish(out, processes)
        shutil.rmtree(out)
    return survived, torn, inside


def control(lab: Lab, kills: int) -> int:
    """Of so many kills inside the write window, how many leave the in-place newest broken."""
    torn = done = 0
    lab.reference(1)
    while done < kills:
        out = lab.out()
        job = lab.start(out, fault=in_place)
        job.until("b", lab.random.randint(1, 4))
        time.sleep(lab.random.uniform(0, lab.window / 2))
        job.send(signal.SIGKILL)
        job.wait()
        if job.told.count("w") > job.told.count("W"):
            done += 1
            torn += bool(broken(out))
        shutil.rmtree(out)
    return torn


def exact_resume(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R1: killed at any moment, a run ends with the bytes of one that was not."""
    plan = {1: (2, 2), 2: (1, 1)} if quick else {1: (50, 50), 2: (30, 30), 4: (20, 20)}
    total = sum(map(sum, plan.values()))
    found = [kill_and_compare(lab, processes, *kills) for processes, kills in plan.items()]
    survived, torn, inside = map(sum, zip(*found))
    tries = 4 if quick else 25
    bad = control(lab, tries)  # half tells that kills break what can be broken; more is chance
    return (survived == total and torn == 0 and bad >= tries / 2,
            f"{survived} of {total} kills ({inside} inside a write) over "
            f"{', '.join(map(str, plan))} processes end equal; broken checkpoints {torn}, by the "
            f"in-place control {bad} of {tries}")


# ----------------------------------------------------------------------------- R3: another world

def other_world(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R3: another number of processes is refused, or allowed and then equal but for rounding."""
    def real(rank: int, mark: Mark) -> None:
        if not rank:
            before(train.Trainer, "train_step", lambda: mark("s"))

    def losses(out: Path) -> list[float]:
        return [float(line.split(",")[2]) for line in
                (out / "metrics.csv").read_text().split("\n")[1:-1]]

    straight, out, refused = lab.out(), lab.out(), 0
    common = ("--dropout", 0, "--backbone-dropout", 0)
    lab.start(straight, *common, processes=2, fault=real).wait()
    sizes = (2, 1) if quick else (2, 1, 4, 3, 2)
    for i, size in enumerate(sizes):
        if i:
            job = lab.start(out, *common, processes=size, fault=real)
            codes = job.wait()
            refused += 2 in codes and 0 not in codes and "--allow-world-change" in job.text
        allow = ("--allow-world-change",) if i else ()
        job = lab.start(out, *common, *allow, processes=size, fault=real)
        if size != sizes[-1] or i == 0:
            job.until("s", 3)
            job.send(signal.SIGTERM)
        job.wait()
    pairs = list(zip(losses(out), losses(straight), strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return (refused == len(sizes) - 1 and worst <= 1e-5,
            f"refused {refused} of {len(sizes) - 1}; allowed over {sizes}: losses of {len(pairs)} "
            f"steps differ by at most {worst:.1e}")


# ------------------------------------------------------------------- R4: damaged newest checkpoint

def damages() -> dict[str, Callable[[Path], object]]:
    """15 ways in which a checkpoint folder can be broken."""
    def cut(name: str, keep: float) -> Callable[[Path], object]:
        return lambda folder: os.truncate(
            folder / name, int((folder / name).stat().st_size * keep))

    def flip(name: str, where: float) -> Callable[[Path], object]:
        return lambda folder: flip_bit(folder / name, where)

    def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
        def edited(folder: Path) -> None:
            state = json.loads((folder / "state.json").read_text())
            change(state)
            (folder / "state.json").write_text(json.dumps(state, indent=1))
        return edited

    model, moments = "model.safetensors", "optimizer.safetensors"
    return {
        "weights cut by half": cut(model, 0.5), "weights empty": cut(model, 0),
        "moments short of one byte": cut(moments, 1 - 1e-6), "state cut by half":
        cut("state.json", 0.5), "state empty": cut("state.json", 0),
        "bit flipped in the header": flip(model, 1e-4), "in the weights": flip(model, 0.6),
        "in the moments": flip(moments, 0.9), "in the state": flip("state.json", 0.5),
        "weights missing": lambda folder: (folder / model).unlink(),
        "moments missing": lambda folder: (folder / moments).unlink(),
        "state missing": lambda folder: (folder / "state.json").unlink(),
        "state is a list": lambda folder: (folder / "state.json").write_text("[]"),
        "weights of another shape": lambda folder: save_file(
            {"x": torch.zeros(3)}, folder / model),
        "state without a digest": edit(lambda state: state["sha256"].pop("model.safetensors"))}


def flip_bit(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)


def damaged(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R4: a broken newest checkpoint is named and passed over, and the run ends as it should."""
    good = lab.out()
    job = lab.start(good)
    job.until("s", 8)  # two checkpoints are there, another is on its way
    job.send(signal.SIGKILL)
    job.wait()
    newest = max(good.glob("step-*"))
    named = equal = flips = 0
    kinds = damages()
    tried = list(kinds)[3::5] if quick else list(kinds)
    for name, damage in kinds.items():
        out = lab.out()
        shutil.copytree(good, out)
        damage(out / newest.name)
        (out / ".step-00000099.writing").mkdir()  # what a kill leaves behind
        if name not in tried:
            named += broken(out) == [out / newest.name]
            continue
        job = lab.start(out)
        codes, text = job.wait(), job.text
        named += f"passed over: {out / newest.name}" in text
        equal += codes == [0] and sums(out) == lab.reference(1)
        shutil.rmtree(out)
    tries = 50 if quick else 1000
    files = sorted(newest.iterdir())
    for _ in range(tries):
        path = lab.random.choice(files)
        content = path.read_bytes()
        flip_bit(path, lab.random.random())
        flips += broken(good) == [newest]
        path.write_bytes(content)
    return (named == len(kinds) and equal == len(tried) and flips == tries,
            f"{named} of {len(kinds)} damages named and passed over, {equal} of {len(tried)} runs "
            f"end equal; {flips} of {tries} single flipped bits found")


# ------------------------------------------------------------------------------------ R5: full disk

def disk_full_between(first: int, last: int) -> Fault:
    """No file may grow beyond 300 bytes from step `first` to step `last`."""
    def fault(rank: int, mark: Mark) -> None:
        telling(rank, mark)
        steps = []

        def act() -> None:
            steps.append(1)
            limit = 300 if first <= len(steps) <= last else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        before(train.Trainer, "train_step", act)
    return fault


def full_disk(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R5: a disk that is full for a while costs nothing; one that stays full ends with code 74."""
    held = {}
    lab.reference(1)
    for processes in (1,) if quick else (1, 2):
        out = lab.out()
        job = lab.start(out, processes=processes, fault=disk_full_between(2, 3))
        codes = job.wait()
        held[f"full for 2 steps ({processes})"] = (
            not any(codes) and sums(out) == lab.reference(processes)
            and job.text.count("error: /") == 2 and not broken(out))  # one checkpoint, metrics.csv
        out = lab.out()
        job = lab.start(out, processes=processes, fault=disk_full_between(3, 99))
        codes = job.wait()
        held[f"stays full ({processes})"] = (
            74 in codes and 0 not in codes and "Traceback" not in job.text and not broken(out)
            and [path.name for path in out.glob("step-*")] == ["step-00000002"]
            and lab.finish(out, processes))

    def no_room(rank: int, mark: Mark) -> None:
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    job = lab.start(lab.out(), fault=no_room)
    held["full at the start"] = job.wait() == [74] and "MB of free disk" in job.text
    mount = lab.folder / "tmpfs"
    mount.mkdir()
    room = 5 * sum(len(content) for name, content in lab.reference(1).items()
                   if name.startswith("step-00000012/")) // 2
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(mount)]
    if not quick and subprocess.run(command, capture_output=True).returncode == 0:
        def generous(rank: int, mark: Mark) -> None:  # pass the check, to meet the full disk later
            telling(rank, mark)
            Checkpoints.check_room = lambda checkpoints: None
        job = lab.start(mount / "run", fault=generous)
        held["tmpfs"] = (job.wait() == [74] and not broken(mount / "run")
                         and "No space left" in job.text and "Traceback" not in job.text)
        subprocess.run(["umount", str(mount)], check=True)
    bad = [name for name, good in held.items() if not good]
    return not bad, f"{len(held) - len(bad)} of {len(held)} ({', '.join(bad or held)})"


# -------------------------------------------------------------------------------------- R6: signals

def signals(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R6: SIGTERM and Ctrl-C save and leave; nothing is repeated but an evaluation."""
    plan = [(2, "s", signal.SIGTERM, None), (1, "e", signal.SIGINT, None),
            (2, "s", signal.SIGINT, [1])]
    if not quick:
        plan = [(processes, "e" if i % 3 == 2 else "s", number, [0] if i % 5 == 4 else None)
                for i in range(10) for processes, number in
                ((1 + i % 2, signal.SIGTERM), (2 - i % 2, signal.SIGINT))]
    good, slowest = 0, 0.0
    for processes, letter, number, ranks in plan:
        lab.reference(processes)
        out = lab.out()
        job = lab.start(out, processes=processes)
        times = lab.random.randint(1, 3) if letter == "e" else lab.random.randint(2, 9)
        job.until(letter, times)
        sent = time.monotonic()
        job.send(number, ranks)
        codes = job.wait()
        slowest = max(slowest, time.monotonic() - sent)
        logged = (out / "metrics.csv").read_text().count("\n") - 1
        saved = json.loads((max(out.glob("step-*")) / "state.json").read_text())["step"]
        ok = (128 + number in codes and 0 not in codes and logged == saved
              and "the same command goes on" in job.text and "Traceback" not in job.text)
        if not ok:
            print(codes, logged, saved, job.text, file=sys.stderr)
        good += ok and lab.finish(out, processes)
    twice = second_signal(lab)
    return (good == len(plan) and slowest <= 20 and twice,
            f"{good} of {len(plan)} signals saved every step and ended equal, "
            f"{sum(p[1] == 'e' for p in plan)} during evaluation; gone in at most {slowest:.1f} s; "
            f"a second Ctrl-C {'leaves at once' if twice else 'DOES NOT LEAVE'}")


def second_signal(lab: Lab) -> bool:
    """Ctrl-C twice, in a step that takes a minute."""
    def slow(rank: int, mark: Mark) -> None:
        telling(rank, mark)
        before(train.Trainer, "backward", lambda: time.sleep(60))
    job = lab.start(lab.out(), fault=slow)
    job.until("s")
    time.sleep(0.2)
    job.send(signal.SIGINT)
    time.sleep(0.2)
    sent = time.monotonic()
    job.send(signal.SIGINT)
    return job.wait() == [130] and time.monotonic() - sent < 2


# --------------------------------------------------------------- R7, R8: processes that fail or die

FAILURES = ("raise", "kill", "exit 0", "data error", "hang")


def failing(kind: str, victim: int, told: Path) -> Fault:
    """Rank `victim` fails before its third step, and writes down when."""
    def fail() -> None:
        told.write_text(str(time.time()))
        if kind == "raise":
            raise RuntimeError("injected failure")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit 0":
            sys.exit(0)
        if kind == "data error":
            raise DataError("injected.jsonl:7: gold: expected a list, got 3; correct it")
        time.sleep(600)

    def fault(rank: int, mark: Mark) -> None:
        telling(rank, mark)
        steps = []

        def act() -> None:
            steps.append(1)
            if len(steps) == 3 and rank == victim:
                fail()
        before(train.Trainer, "train_step", act)
    return fault


SAID = {"raise": "RuntimeError: injected failure", "data error": "error: injected.jsonl:7",
        "kill": "SIGKILL|another process has ended", "exit 0": "SystemExit: 0",
        "hang": "another process has ended or does not answer"}


def torchrun(lab: Lab, out: Path, processes: int, *more: object, restarts: int = 0,
             child: Sequence[str] = ()) -> subprocess.Popen:
    """A real torchrun of this file, whose main passes on to train.main with a fault."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", f"--max-restarts={restarts}", __file__, "child",
         *child, "--", *lab.flags(out, *more)],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHONHASHSEED": "7"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)


def rank_failures(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R7: one process fails, the whole job is gone within 10 s and says why, once."""
    timeout, good, worst, hung = 2 if quick else 5, 0, 0.0, 0.0
    plan = [(kind, 1) for kind in FAILURES] if quick else [
        (kind, victim) for kind in FAILURES for victim in (0, 3)]
    for kind, victim in plan:
        out, told = lab.out(), lab.folder / f"failed-{lab.count}"
        if quick:
            job = lab.start(out, "--timeout", timeout, processes=2,
                            fault=failing(kind, victim, told))
            codes, text = job.wait(), job.text
            failed = any(codes)
        else:
            process = torchrun(lab, out, 4, "--timeout", timeout,
                               child=(kind, str(victim), str(told)))
            text, failed = process.communicate(timeout=300)[0], process.returncode != 0
        seconds = time.time() - float(told.read_text())
        worst, hung = (worst, max(hung, seconds)) if kind == "hang" else (
            max(worst, seconds), hung)
        said = re.search(SAID[kind], text)
        own = text.count("Traceback") - text.count("_run_module_as_main")  # torchrun's
        ok = (failed and said and not 0 <= text.find("another process") < said.start()
              and own == (kind in ("raise", "exit 0")) and not broken(out))
        if not ok:
            print(f"  {kind}: {text}", file=sys.stderr)
        good += bool(ok)
    return (good == len(plan) and worst <= 10 and hung <= timeout + 5,
            f"{good} of {len(plan)} failures of one rank end the job with one message, in at most "
            f"{worst:.1f} s; a hang in {hung:.1f} s at a timeout of {timeout} s")


def elastic_restart(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R8: under torchrun --max-restarts=3 a killed worker costs time and nothing else."""
    want = lab.reference(2)
    good, kills = 0, 1 if quick else 10
    for _ in range(kills):
        out = lab.out()
        job = torchrun(lab, out, 2, "--resume", "none", restarts=3, child=("none", "0", "-"))
        log, step = out / "metrics.csv", lab.random.randint(3, 9)
        while job.poll() is None and not (log.exists() and log.read_text().count("\n") > step):
            time.sleep(0.01)
        os.kill(lab.random.choice(descendants(job.pid)), signal.SIGKILL)
        text = job.communicate(timeout=300)[0]
        ok = job.returncode == 0 and "start: resumed" in text and sums(out) == want
        if not ok:
            print(text, file=sys.stderr)
        good += ok
    return good == kills, f"{good} of {kills} runs with a killed worker end equal"


# ---------------------------------------------------------------------------- R9: uneven processes

def even_steps(rng: random.Random) -> bool:
    """One random epoch, played by every rank: equal step counts, each row exactly once."""
    rows, world, batch, micro = (rng.randint(1, most) for most in (60, 6, 20, 8))
    examples = [SimpleNamespace(input_ids=[0] * rng.randint(1, 9), labels=[0] * rng.randint(1, 5),
                                task=rng.randint(0, 2)) for _ in range(rows)]
    batches = data.global_batches(examples, rng.randint(0, 9), rng.randint(0, 9), batch)
    seen: list[int] = []
    meetings = []
    for rank in range(world):
        trainer = train.Trainer.__new__(train.Trainer)
        met: list[int] = []
        trainer.world = SimpleNamespace(rank=rank, size=world, signal=0, device="cpu",
                                    sum=lambda tensor: met.append(len(tensor)) or tensor)
        trainer.config = SimpleNamespace(micro_batch=micro)
        trainer.rows = SimpleNamespace(examples=examples)
        trainer.model = SimpleNamespace(training=True)
        trainer.flat = SimpleNamespace(grads=torch.zeros(1))
        trainer.backward = lambda rows, number, indices: seen.extend(rows) or torch.zeros(
            3 + 2 * len(UNITS))
        trainer.update = lambda *_: {}
        for indices in batches:
            trainer.train_step(indices)
        meetings.append(met)
    return sorted(seen) == list(range(rows)) and all(met == meetings[0] for met in meetings)


def uneven(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R9: any number of rows, processes, batches: equal steps, each row once; equal metrics."""
    tries = 200 if quick else 1000
    even = sum(even_steps(lab.random) for _ in range(tries))
    out, found = lab.out(), {}
    lab.start(out).wait()
    for processes in (1, 2, 3, 4):
        target = lab.folder / f"predictions-{processes}.jsonl"
        job = fork(lambda: evaluate.main([str(out), "--units", "T17", "V1", "--batch-size", "5",
                                            "--out", str(target)]),
                   processes)
        assert not any(job.wait()), job.text
        found[processes] = target.read_bytes(), job.text[job.text.index("\nF1 "):]
    same = sum(one == found[1] for one in found.values())
    job = lab.start(lab.out(), "--steps", 1, "--micro-batch", 10, processes=3)
    idle = not any(job.wait()) and "2 only wait" in job.text
    return (even == tries and same == 4 and idle,
            f"{even} of {tries} random epochs even on all ranks; predictions and table equal for "
            f"{same} of 4 numbers of processes; more processes than micro-batches "
            f"{'works and says so' if idle else 'FAILS'}")


# ------------------------------------------------------------------------------- R10: not a number

def poison(where: str, row: int) -> Fault:
    """From the fifth step on, row `row` has a NaN in its image feature, loss or gradient."""
    def fault(rank: int, mark: Mark) -> None:
        telling(rank, mark)
        steps, present = [], []
        before(train.Trainer, "train_step", lambda: steps.append(1))
        collate, ce = train.Rows.collate, train.losses.token_cross_entropy

        def collated(rows: train.Rows, indices: list[int]) -> data.Batch:
            batch = collate(rows, indices)
            poisoned_rows = (batch.rows == row) & (len(steps) >= 5)
            present[:] = [poisoned_rows]
            if where == "image":
                batch.features[poisoned_rows] = torch.nan
            return batch

        def poisoned(*given: object, **more: object) -> torch.Tensor:
            value = ce(*given, **more)
            factor = torch.where(present[0], torch.nan, 1.0)
            if where == "gradient":
                value.register_hook(lambda grad: grad * factor)
            return value * factor if where == "loss" else value
        train.Rows.collate, train.losses.token_cross_entropy = collated, poisoned
    return fault


def not_finite(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R10: NaN is caught before the step, on all ranks, its row named; never in a checkpoint."""
    good, plan = 0, [("image", 2, 3), ("gradient", 1, 11)]
    if not quick:
        plan += [("image", 1, 8), ("gradient", 2, 21), ("loss", 1, 5), ("loss", 2, 33)]
    for where, size, row in plan:
        out = lab.out()
        job = lab.start(out, processes=size, fault=poison(where, row))
        codes = job.wait()
        logged = (out / "metrics.csv").read_text().count("\n") - 1
        named = re.search(rf"step {logged + 1}: expected a finite loss.* 1 of the batch's \d+ "
                          r"rows: \S+ \(\S+\.jsonl:\d+\)", job.text)
        finite = all(value.isfinite().all() for path in out.glob("*-*/*.safetensors")
                     for value in load_file(path).values())
        ok = codes[0] == 2 and 0 not in codes and logged >= 4 and named and finite
        if not ok:
            print(where, size, codes, logged, job.text, file=sys.stderr)
        good += bool(ok)
    return good == len(plan), f"{good} of {len(plan)} NaNs named by row, none in a checkpoint"


# -------------------------------------------------------------------------------- R19: determinism

def determinism(lab: Lab, quick: bool) -> tuple[bool, str]:
    """R19: the same seed gives the same bytes, whatever PYTHONHASHSEED."""
    want, found = lab.reference(1), []  # under a random one
    for seed in ("7",) if quick else ("0", "7", "random"):
        out = lab.out()
        done = subprocess.run(
            [sys.executable, __file__, "child", "none", "0", "-", "--", *lab.flags(out)], cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(sums(out))
    return (all(one == want for one in found),
            f"{found.count(want)} of {len(found)} other hash seeds give equal files")


# -------------------------------------------------------------------------------------- the command

CHECKS: dict[str, Callable[[Lab, bool], tuple[bool, str]]] = {
    "R1": exact_resume, "R3": other_world, "R4": damaged, "R5": full_disk, "R6": signals,
    "R7": rank_failures, "R8": elastic_restart, "R9": uneven, "R10": not_finite,
    **{name: lambda lab, quick, measure=measure: (True, measure())
       for name, measure in hostile.LONG.items()},
    "R19": determinism}


def check(lab: Lab, name: str, quick: bool) -> bool:
    """Run one check and print its line."""
    started = time.monotonic()
    try:
        held, figure = CHECKS[name](lab, quick)
    except AssertionError as cause:
        held, figure = False, f"stopped: {cause}"
    print(f"{name:4}{'PASS' if held else 'FAIL'}  {figure}  [{time.monotonic() - started:.0f} s]",
          flush=True)
    return held


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        kind, victim, told, _, *flags = sys.argv[2:]
        fault = failing(kind, int(victim), Path(told)) if kind != "none" else telling
        fault(int(os.environ.get("RANK", 0)), lambda letter: None)
        with exit_codes():
            train.main(flags)
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="R", help=f"of {' '.join(CHECKS)}; '-' reads "
                        "names from standard input")
    parser.add_argument("--quick", action="store_true", help="the short form")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        names = (line.strip() for line in sys.stdin) if args.names == ["-"] else (
            args.names or list(CHECKS))
        held = [check(lab, name, args.quick) for name in names]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
