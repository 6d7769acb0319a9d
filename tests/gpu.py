"""Everything about clorae.cu that needs a GPU, in one command: python tests/gpu.py

Builds the extension, runs tests/test_cuda.py and tests/test_experts.py on the GPU, then
compute-sanitizer (memcheck and racecheck) where it is installed, then training steps with CUDA
graphs beside the same without, then times one layer: the frozen linear, peft's LoRA where it is
installed, and C-LoRAE's layer in two forms, in bf16, forward and backward, eagerly and inside a
CUDA graph; last tests/benchmark.py's step, decoding and memory. Prints markdown; takes a few
minutes. Exit code 1 if anything was wrong.

    reference   PyTorch in rank space, segment by segment, under autograd
    fused       clorae.cu's shrink and expand (fast.cuda.expert_linear)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch import Tensor, nn

import conftest
import fast.cuda
import test_cuda

SIZES = {"base": (768, 128, 42), "large": (1024, 64, 21), "xl": (2048, 64, 21)}  # D, R, r
SCALE, N = 2.0, 3


class Problem:
    """One layer of a size with T tokens, sorted by task, and everything that the forms read."""

    def __init__(self, size: str, T: int, tasks: int = N, device: str = "cuda"):
        (D, R, r), dev = SIZES[size], torch.device(device)
        r = min(r, R // tasks)
        self.T, self.D, self.ranks = T, D, [R, r, tasks]
        self.base = nn.Linear(D, D, bias=False).requires_grad_(False).to(dev, torch.bfloat16)
        self.x = torch.randn(T, D, device=dev).bfloat16().requires_grad_()
        self.dy = torch.randn(T, D, device=dev).bfloat16()
        shapes = ((R, D), (tasks, r, D), (D, R), (tasks, D, r), (2, D))
        self.parameters = [(torch.randn(*s, device=dev) * D ** -.5).requires_grad_()
                           for s in shapes]
        edges = [T * i // tasks for i in range(tasks + 1)]
        self.runs = [(i, b - a) for i, (a, b) in enumerate(zip(edges, edges[1:]))]
        self.table = fast.cuda.table_of(self.runs, dev)

    def layer(self, function: Callable, tokens: object) -> Tensor:
        """expert_linear with the table of the tokens, or its reference with their runs."""
        return function(self.x, self.base, self.parameters, tokens, SCALE)[0]


def peft_layer(p: Problem) -> nn.Module | None:
    """peft's LoRA of rank R around the same linear, adapters in bf16; None where it is missing."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    base = nn.Linear(p.D, p.D, bias=False, device=p.x.device, dtype=torch.bfloat16)
    config = LoraConfig(r=p.ranks[0], lora_alpha=2 * p.ranks[0], target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    return model.to(torch.bfloat16).base_model.model[0]


def forms(p: Problem) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """name -> (a call that gives y, the tensors that it is differentiated by)."""
    ours = [p.x, *p.parameters]
    calls = {"frozen": (lambda: p.base(p.x), [p.x])}
    if (lora := peft_layer(p)) is not None:
        calls["peft LoRA"] = (lambda: lora(p.x),
                              [p.x, *(q for q in lora.parameters() if q.requires_grad)])
    return calls | {"reference": (lambda: p.layer(test_cuda.pytorch, p.runs), ours),
                    "fused": (lambda: p.layer(fast.cuda.expert_linear, p.table), ours)}


def forms_agree(p: Problem) -> bool:
    """No form may be timed that computes something else: results within 2 % of the reference's."""
    results = {}
    for name, (call, wanted) in forms(p).items():
        y = call()
        results[name] = [y.detach(), *torch.autograd.grad(y, wanted, p.dy)]
    worst = max(test_cuda.error(a.double(), b.double())
                for a, b in zip(results["fused"], results["reference"]))
    print(f"- fused against reference, T = {p.T}, D = {p.D}: largest relative difference "
          f"{worst:.1e} {'' if worst < 0.02 else '**WRONG**'}")
    return worst < 0.02


def quantiles(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Microseconds of `work` at the 20th, 50th and 80th percentile, with the L2 cache flushed."""
    flush = torch.empty(64 * 2 ** 20, device="cuda")  # 256 MB
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
             for _ in range(repeats)]
    for start, stop in marks:
        flush.zero_()
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(1000 * start.elapsed_time(stop) for start, stop in marks)
    return tuple(times[int(q * (repeats - 1))] for q in (0.2, 0.5, 0.8))


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def eager(work: Callable[[], object], repeats: int) -> float:
    """Microseconds per call when the host queues one call after another."""
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeats


def row(p: Problem, label: str, gradients: bool) -> None:
    """One line of a table: per form the median in a graph, its quantiles, and the eager time."""
    cells, frozen = [], None
    for call, wanted in forms(p).values():
        def work() -> object:
            if not gradients:
                with torch.no_grad():
                    return call()
            return torch.autograd.grad(call(), wanted, p.dy)
        replay = captured(work)
        for _ in range(20):
            replay()
        low, median, high = quantiles(replay, 100)
        frozen = frozen or median
        cells.append(f"{median:.1f} ({low:.1f}-{high:.1f}) {median / frozen:.2f}x, "
                     f"eager {eager(work, 30):.0f}")
    print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def table(title: str, problems: list[tuple[str, Problem]], gradients: bool) -> None:
    """A markdown table of `row`s."""
    print(f"\n### {title}\n\nMicroseconds in a CUDA graph, L2 flushed: median (20 %-80 %), ratio "
          "to the frozen linear; then eager, host included.\n")
    names = list(forms(problems[0][1]))
    print("| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for label, problem in problems:
        row(problem, label, gradients)


def sanitize() -> bool:
    """compute-sanitizer on a few small layers: memcheck, then racecheck."""
    tool, fine = shutil.which("compute-sanitizer"), True
    if tool is None:
        print("- compute-sanitizer: not installed here, **not run**")
        return True
    for check in ("memcheck", "racecheck"):
        line = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=100)
            verdict, ok = done.stdout.strip().splitlines()[-1:], done.returncode == 0
        except subprocess.TimeoutExpired:
            verdict, ok = ["did not finish within 100 s"], False
        print(f"- compute-sanitizer {check}: {'clean' if ok else '**NOT CLEAN**'} {verdict}")
        fine = fine and ok
    return fine


def small() -> None:
    """What runs under compute-sanitizer: every kernel once or more, in both types."""
    for dtype in (torch.bfloat16, torch.float32):
        for case in ("large: 64 and 21", "one task, ranks of two column blocks", "one token"):
            given = test_cuda.problem(case, "live gate", dtype, torch.device("cuda"))
            test_cuda.run(test_cuda.fused, given, dtype)


def tests() -> bool:
    """What of tests/test_cuda.py and tests/test_experts.py runs on the GPU."""
    files = ["tests/test_cuda.py", "tests/test_experts.py"]
    line = [sys.executable, "-m", "pytest", "-q", *files, "-k", "[cuda"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=200)
    print("- tests on the GPU:", done.stdout.strip().splitlines()[-1])
    if done.returncode:
        print("```\n" + done.stdout[-6000:] + "\n```")
    return done.returncode == 0


def graphs_agree() -> bool:
    """Training steps of a small model, with graphs and without: losses and gradient norms."""
    with tempfile.TemporaryDirectory() as folder:
        small = conftest.make_small(Path(folder))
        flags = [word for name, place in small.items() for word in (f"--{name}", place)]
        line = [sys.executable, str(ROOT / "tests/gpu_steps.py"), *flags, "--graphs", "--rank", "6",
                "--batch", "12", "--micro-batch", "4", "--max-objects", "5", "--max-target", "16",
                "--dropout", "0.1", "--steps", "8", "--out", folder]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=200)
    if done.returncode:
        print(f"- CUDA graphs: **FAILED**\n```\n{done.stderr[-3000:]}\n```")
        return False
    captured, plain = (json.loads(line) for line in done.stdout.splitlines() if line[0] == "[")
    worst = max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(captured, plain)
                for name in ("loss", "grad_norm"))
    print(f"- CUDA graphs: losses and norms of 8 training steps within {worst:.1e} of those without"
          f"{'' if worst < 0.01 else ' **WRONG**'}")
    return worst < 0.01


def fresh_build() -> bool:
    """Seconds of a build from nothing, in a cache of its own."""
    line = [sys.executable, "-c", "import torch, fast.cuda, warnings; "
            "warnings.simplefilter('error'); fast.cuda.kernels(torch.device('cuda'))"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "TORCH_EXTENSIONS_DIR": folder})
    print(f"- built from nothing in {time.monotonic() - start:.0f} s, with the start of Python"
          if done.returncode == 0 else f"- **NOT BUILT**\n```\n{done.stderr[-3000:]}\n```")
    return done.returncode == 0


def main() -> int:
    """The whole report; 1 if a part of it failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few small layers, for a checker")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; tests/test_cuda.py has what runs without one")
        return 2
    torch.manual_seed(0)
    start = time.monotonic()
    if not options.small:
        print(f"## clorae.cu on {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA "
              f"{torch.version.cuda}\n")
        if not fresh_build():
            return 1
    if fast.cuda.kernels(torch.device("cuda")) is None:
        return 1
    if options.small:
        small()
        torch.cuda.synchronize()
        return 0
    fine = all([tests(), sanitize(), graphs_agree(),
                *(forms_agree(Problem(size, 512)) for size in SIZES)])
    for size in SIZES:
        rows = [(f"T = {T}", Problem(size, T)) for T in (512, 2048, 4096, 16384)]
        table(f"{size}: forward and backward", rows, True)
        del rows
        torch.cuda.empty_cache()
    for tasks in (3, 16):
        rows = [(f"T = {T}", Problem("base", T, tasks)) for T in (16, 64, 256, 2048)]
        table(f"base, {tasks} tasks in one batch: forward alone", rows, False)
    print("\n## Training step, decoding, memory", flush=True)
    for size in ("base", "large"):
        subprocess.run([sys.executable, str(ROOT / "tests/benchmark.py"), "step", "decode",
                        "memory", "--size", size, "--repeats", "5"], check=True)
    print(f"\n{'Everything was right' if fine else '**Something was wrong**'}; "
          f"{time.monotonic() - start:.0f} s in all.")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
