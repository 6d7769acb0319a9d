"""clorae.cu as a specification: the kernels against the paper's equations in float64.

One body for three implementations: "reference" (rank-space lines in PyTorch, here), "emulator"
(clorae.cu compiled by g++, tests/emulator.h playing the GPU) and "cuda" (a GPU, if there is one).
The bound is PyTorch's own error in the same type, times two.

Letters: B rows, S tokens a row, T = B S tokens, R universal rank, r task rank, N tasks.
"""

import ctypes
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fast.cuda
from clorae import ExpertConfig, ExpertLinear, Routing
from fast.cuda import CudaExpertLinear
from fast.experts import FastExpertLinear

ROOT = Path(__file__).resolve().parent.parent
SCALE = 2.0
NAMES = ("y", "z", "dx", "dA_U", "dA_T", "dB_U", "dB_T", "dW_g", "ddropped", "dgates")

# name: (R, r, N, D_in, D_out, S, task of each row)
CASES = {
    "the demo's ranks": (24, 8, 3, 64, 48, 7, [0, 0, 1, 2, 2]),
    "large: 64 and 21": (64, 21, 3, 72, 136, 9, [0, 1, 1, 1, 2]),
    "base: 128 and 42": (128, 42, 3, 104, 64, 11, [0, 0, 1, 2]),
    "tasks out of order": (21, 7, 3, 40, 24, 5, [2, 0, 1, 0, 0, 2]),
    "an absent task": (12, 4, 3, 16, 16, 6, [0, 0, 2]),
    "one token": (21, 21, 3, 64, 64, 1, [1]),
    "one task, ranks of two column blocks": (128, 128, 1, 40, 48, 10, [0, 0]),
    "one task": (64, 64, 1, 136, 8, 3, [0, 0, 0]),
    "sixteen tasks": (128, 8, 16, 48, 40, 3, list(range(16))),
    "many runs": (8, 8, 3, 8, 8, 1, [i % 3 for i in range(150)]),
    "tiles of 32 tokens": (8, 2, 3, 8, 8, 700, [0, 1, 2]),
    "tiles of 64 tokens": (8, 2, 3, 8, 16, 2800, [0, 1, 2]),
}
VARIANTS = ("live gate", "gates given", "dropout", "dropout, gates given", "universal only",
            "task only")


@pytest.fixture(scope="session")
def emulator(emulator_library: Path) -> ctypes.CDLL:
    """The emulated library, registered as the kernels of CPU tensors while a test asks for it."""
    torch.ops.load_library(str(emulator_library))
    return ctypes.CDLL(str(emulator_library))


@pytest.fixture(params=["reference", "emulator", "cuda"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """(expert_linear for runs, the device to call it on)."""
    if request.param == "reference":
        return pytorch, torch.device("cpu")
    return fused, device_of(request, monkeypatch)


@pytest.fixture(params=["emulator", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose kernels are clorae.cu."""
    return device_of(request, monkeypatch)


def device_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "emulator":
        request.getfixturevalue("emulator")
        monkeypatch.setitem(fast.cuda.KERNELS, "cpu", torch.ops.clorae_emulator)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the extension must build where there is a GPU
        fast.cuda.kernels(torch.device("cuda"))
    return torch.device("cuda")


def pytorch(x: Tensor, base: nn.Linear, parameters: list[Tensor],
            runs: list[tuple[int, int]], scale: float, dropped: Tensor | None = None,
            gates: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`fused` in PyTorch: in x's type with fp32 parameters cast to it, fp32 sigmoid."""
    A_U, A_T, B_U, B_T, W_g = (p.to(x.dtype) for p in parameters)
    if gates is None:
        gates = F.linear(x, W_g).float().softmax(dim=-1) if x.dtype != torch.float64 else \
            F.linear(x, W_g).softmax(dim=-1)
    source, weights, h, codes = x if dropped is None else dropped, gates.to(x.dtype), [], []
    sizes = [size for _, size in runs]
    for (task, _), some, g in zip(runs, source.split(sizes), (scale * weights).split(sizes)):
        z_U = F.linear(some, A_U)
        z_T = F.linear(some, A_T[task]) if len(A_T) else z_U[..., :0]
        B = torch.cat([B_U, B_T[task]], dim=1) if len(B_T) else B_U
        h.append(F.linear(torch.cat([g[..., :1] * z_U, g[..., 1:] * z_T], dim=-1), B))
        codes.append(torch.cat([z_U, z_T], dim=-1))
    return base(x) + torch.cat(h), torch.cat(codes), gates


def fused(x: Tensor, base: nn.Linear, parameters: list[Tensor], runs: list[tuple[int, int]],
          scale: float, expert_linear=fast.cuda.expert_linear, **more: object) -> tuple:
    """expert_linear for runs that the host knows."""
    return expert_linear(x, base, parameters, fast.cuda.table_of(runs, x.device), scale, **more)


def problem(case: str, variant: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Arguments of `fused`, with upstream gradients of y and z."""
    R, r, N, d_in, d_out, S, tasks = CASES[case]
    R, r, N = (R, 0, 0) if variant == "universal only" else \
        (0, r, N) if variant == "task only" else (R, r, N)
    torch.manual_seed(3)
    B, gate = len(tasks), 2 if variant in ("live gate", "dropout") else 0
    T = B * S

    def draw(*shape: int, size: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * size).to(kind).to(device)

    base = nn.Linear(d_in, d_out, bias=case == "one token").requires_grad_(False)
    runs, start = [], 0
    for stop in range(1, B + 1):
        if stop == B or tasks[stop] != tasks[start]:
            runs.append((tasks[start] if N else 0, (stop - start) * S))
            start = stop
    return {
        "x": draw(T, d_in, kind=dtype), "base": base.to(device, dtype),
        "parameters": [draw(R, d_in, size=d_in ** -.5), draw(N, r, d_in, size=d_in ** -.5),
                       draw(d_out, R, size=.1), draw(N, d_out, r, size=.1),
                       draw(gate, d_in, size=.3)],
        "runs": runs,
        "dropped": draw(T, d_in, kind=dtype) if variant.startswith("dropout") else None,
        "gates": None if gate else torch.rand(T, 2, device=device),
        "dy": draw(T, d_out, kind=dtype), "dz": draw(T, R + r, size=.1, kind=dtype)}


def run(layer, problem: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, z and every gradient of <dy, y> + <dz, z>, by name, all in float64."""
    def own(t: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if t is None else t.detach().to(kind).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    x, dropped = own(problem["x"], dtype), own(problem["dropped"], dtype)
    parameters, gates = [own(p, wide) for p in problem["parameters"]], own(problem["gates"], wide)
    base = nn.Linear(*problem["base"].weight.T.shape, bias=problem["base"].bias is not None)
    base.load_state_dict(problem["base"].state_dict())
    base = base.to(x.device, dtype).requires_grad_(False)
    y, z, _ = layer(x, base, parameters, problem["runs"], SCALE, dropped=dropped, gates=gates)
    total = (y * problem["dy"].to(dtype)).sum() + (z * problem["dz"].to(dtype)).sum()
    inputs = [x, *parameters, dropped, gates]
    wanted = [t for t in inputs if t is not None]
    found = dict(zip(map(id, wanted), torch.autograd.grad(total, wanted, allow_unused=True)))
    values = [y.detach(), z.detach(), *(found.get(id(t)) for t in inputs)]
    return {name: v.double() for name, v in zip(NAMES, values) if v is not None and v.numel()}


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN if anything was left unwritten."""
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_close(layer, arguments: dict, dtype: torch.dtype) -> None:
    """Every result within twice PyTorch's own error in this type, and four units of fp32: sums of
    thousands of numbers in another order."""
    truth = run(pytorch, arguments, torch.float64)
    own, found = run(pytorch, arguments, dtype), run(layer, arguments, dtype)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        bound = 2 * error(own[name], truth[name]) + 4 * torch.finfo(torch.float32).eps
        assert error(value, truth[name]) <= bound, (name, error(value, truth[name]), bound)


def test_the_reference_in_float64_is_the_papers_equation_word_for_word():
    """y_t = W_0 x_t + s (g1 B_U A_U x_t + g2 B_n A_n x_t), one token at a time."""
    given = problem("tasks out of order", "live gate", torch.float64, torch.device("cpu"))
    A_U, A_T, B_U, B_T, W_g = (p.double() for p in given["parameters"])
    y, _, _ = pytorch(given["x"], given["base"], given["parameters"], given["runs"], SCALE)
    tasks = CASES["tasks out of order"][-1]
    for t, x in enumerate(given["x"]):
        task = tasks[t * len(tasks) // len(y)]
        g1, g2 = torch.softmax(W_g @ x, dim=0)
        h = g1 * B_U @ (A_U @ x) + g2 * B_T[task] @ (A_T[task] @ x)
        assert torch.allclose(y[t], given["base"].weight @ x + SCALE * h, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_fused_layer_equals_the_equations_with_every_gradient(layer, case, dtype):
    """Eq. (3), (4), (6)-(8) and their gradients, for every rank, task count and segmentation."""
    function, device = layer
    assert_close(function, problem(case, "live gate", dtype, device), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_layer_equals_the_equations(layer, variant, dtype):
    """Gates from outside, dropout on the experts' input alone, one expert alone."""
    function, device = layer
    assert_close(function, problem("large: 64 and 21", variant, dtype, device), dtype)


def test_a_layer_without_experts_of_its_own_is_the_frozen_linear_bit_for_bit(device):
    """B = 0: y = W_0 x exactly, whatever the gate."""
    given = problem("the demo's ranks", "live gate", torch.bfloat16, device)
    given["parameters"][2].zero_(), given["parameters"][3].zero_()
    y, _, gates = fused(given["x"], given["base"], given["parameters"],
                                       given["runs"], SCALE)
    assert torch.equal(y, given["base"](given["x"]))
    assert torch.allclose(gates.sum(-1), torch.ones_like(gates[..., 0]))


def test_gates_from_outside_silence_the_router_and_no_router_means_a_plain_sum(device):
    """Fixed gates beside a W_g: no gradient for W_g; without W_g: h = U + D, as with g = (1, 1).
    Packs made beforehand give the same."""
    given = problem("the demo's ranks", "live gate", torch.float32, device)
    x, base, parameters, runs = (given[k] for k in ("x", "base", "parameters", "runs"))
    W_g, ones = parameters[4].requires_grad_(), torch.ones(len(x), 2, device=device)
    y, _, gates = fused(x, base, parameters, runs, SCALE, gates=ones)
    assert torch.equal(gates, ones)
    y.sum().backward()
    assert not W_g.grad.any()
    packs = fast.cuda.pack(parameters, torch.float32)
    packed = fused(x, base, parameters, runs, SCALE, gates=ones, packs=packs)
    plain = fused(x, base, [*parameters[:4], W_g[:0]], runs, SCALE)
    assert torch.equal(packed[0], y) and torch.equal(plain[0], y)


def test_the_same_call_gives_the_same_bits(device):
    """No atomics: two runs are equal bit for bit."""
    given = problem("base: 128 and 42", "live gate", torch.bfloat16, device)
    first, second = (run(fused, given, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", ["large: 64 and 21", "base: 128 and 42", "sixteen tasks"])
def test_threads_may_run_in_any_order_between_barriers(emulator, monkeypatch, case):
    """A race shows as a difference between threads taken upwards and downwards."""
    monkeypatch.setitem(fast.cuda.KERNELS, "cpu", torch.ops.clorae_emulator)
    given = problem(case, "live gate", torch.bfloat16, torch.device("cpu"))
    upwards = run(fused, given, torch.bfloat16)
    emulator.emulator_reverse(1)
    try:
        downwards = run(fused, given, torch.bfloat16)
    finally:
        emulator.emulator_reverse(0)
    assert all(torch.equal(upwards[name], downwards[name]) for name in upwards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_transposes_and_subtracts_exactly(device, dtype):
    """A = [A_U; A_T; W_g[0] - W_g[1]], Bt = [B_U^T; B_T^T], rounded once to the element type."""
    given = problem("large: 64 and 21", "live gate", dtype, device)["parameters"]
    A_U, A_T, B_U, B_T, W_g = given
    A, Bt = fast.cuda.pack(given, dtype)
    assert torch.equal(A, torch.cat([A_U, *A_T, W_g[:1] - W_g[1:]]).to(dtype))
    assert torch.equal(Bt, torch.cat([B_U.T, *B_T.transpose(1, 2)]).to(dtype))


def test_the_table_of_rows_that_only_the_gpu_knows_has_a_run_for_every_task(device):
    """Three rows of 5 tokens of the tasks 0, 0 and 2: a run without tokens changes no bit."""
    given = problem("the demo's ranks", "live gate", torch.float32, device)
    given["runs"] = [(0, 10), (2, 5)]
    given |= {name: given[name][:15] for name in ("x", "dy", "dz")}
    tasks = torch.tensor([0, 0, 2], device=device)
    rows, runs = fast.cuda.table_of_rows(tasks, 5, 3), fast.cuda.table_of(given["runs"], device)
    assert rows.segments.tolist() == [[0, 0, 10], [1, 10, 10], [2, 10, 15]]
    assert torch.equal(rows.tasks, runs.tasks) and rows.tasks.dtype == runs.tasks.dtype
    expected = run(fused, given, torch.float32)
    found = run(lambda x, base, p, _, *rest, **more: fast.cuda.expert_linear(
        x, base, p, rows, *rest, **more), given, torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_linear_that_learns_beside_its_experts_has_its_gradient(device):
    """VStack's own weights are trained: y and all else as with a frozen W_0, and dW_0 = dy^T x."""
    for variant in ("live gate", "dropout"):
        given = problem("large: 64 and 21", variant, torch.float32, device)
        frozen = run(fused, given, torch.float32)

        def learning(x: Tensor, base: nn.Linear, *rest: object, **more: object) -> tuple:
            base.requires_grad_(True)
            found = fused(x, base, *rest, **more)
            weight.extend(torch.autograd.grad((found[0] * given["dy"]).sum(), base.weight,
                                              retain_graph=True))
            return found
        weight: list[Tensor] = []
        found = run(learning, given, torch.float32)
        assert all(torch.allclose(found[name], frozen[name], atol=1e-5) for name in frozen)
        assert torch.allclose(weight[0], given["dy"].T @ given["x"], atol=1e-4)


def test_a_table_of_other_tokens_is_refused(device):
    given = problem("the demo's ranks", "live gate", torch.float32, device)
    with pytest.raises(ValueError, match="expected a table of 35 tokens, got one of 20"):
        fused(given["x"], given["base"], given["parameters"], [(0, 20)], SCALE)


@pytest.mark.parametrize("variant", ["live gate", "dropout", "gates given"])
def test_the_operator_passes_torchs_own_checks(device, variant):
    """opcheck: schema, fake tensors, autograd registration, tracing with autograd."""
    arguments = operator_arguments(problem("the demo's ranks", variant, torch.float32, device))
    torch.library.opcheck(torch.ops.clorae.experts.default, arguments)


def operator_arguments(given: dict) -> tuple:
    """Arguments of clorae::experts, requiring gradients."""
    x, dropped, gates = (None if given[name] is None else given[name].requires_grad_()
                         for name in ("x", "dropped", "gates"))
    parameters = [p.requires_grad_() for p in given["parameters"]]
    packs = fast.cuda.pack([p.detach() for p in parameters], x.dtype)
    table = fast.cuda.table_of(given["runs"], x.device)
    return x, dropped, given["base"].weight, gates, packs, parameters, *table, SCALE


def test_compiling_the_layer_changes_nothing(device):
    """torch.compile sees one operator: no graph break, the same bits."""
    given = problem("the demo's ranks", "live gate", torch.float32, device)
    compiled = torch.compile(fast.cuda.expert_linear, backend="aot_eager", fullgraph=True)
    plain, traced = (run(f, given, torch.float32)
                     for f in (fused, functools.partial(fused, expert_linear=compiled)))
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


WRONG = {
    "a multiple of 8": lambda a: {"x": a["x"][..., :60].contiguous(), "A": a["A"][:, :60].clone()},
    "bfloat16 or float32": lambda a: {"x": a["x"].half()},
    r"x of shape \[any, any\]": lambda a: {"x": a["x"][0]},
    "contiguous": lambda a: {"x": a["x"].T.contiguous().T},
    r"A of shape \[48, 64\]": lambda a: {"A": a["A"][:-2]},
    "in Float, got BFloat16": lambda a: {"A": a["A"].bfloat16()},
    r"segments of shape \[any, 3\]": lambda a: {"segments": a["segments"][:, :2].clone()},
    "segments in Int": lambda a: {"segments": a["segments"].long()},
    r"ranks \(R, r, N\)": lambda a: {"ranks": [24, 8]},
    "multiple of 16 bytes": lambda a: {"z": torch.empty(35 * 40 + 1)[1:].view(35, 40)},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_argument_is_refused_with_a_sentence(emulator, monkeypatch, sentence):
    """The binding says what it expected, what came, and for which kernel."""
    monkeypatch.setitem(fast.cuda.KERNELS, "cpu", torch.ops.clorae_emulator)
    given = problem("the demo's ranks", "live gate", torch.float32, torch.device("cpu"))
    A, _ = fast.cuda.pack(given["parameters"], torch.float32)
    segments, _ = fast.cuda.table_of(given["runs"], given["x"].device)
    right = {"x": given["x"], "A": A, "segments": segments, "ranks": [24, 8, 3], "live": True,
             "z": torch.empty(35, 40),
             "gates": torch.empty(35, 2), "stream": 0}
    torch.ops.clorae_emulator.shrink(*right.values())
    with pytest.raises(RuntimeError, match=f"shrink: expected .*{sentence}"):
        torch.ops.clorae_emulator.shrink(*{**right, **WRONG[sentence](right)}.values())


def test_nvcc_compiles_for_two_architectures_without_spilling(tmp_path):
    """sm_80 and sm_90: every kernel keeps its numbers in registers (the compiler's own report)."""
    home = os.environ.get("CUDA_HOME", "") + "/bin"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=home)
    if nvcc is None:
        pytest.skip("no nvcc on this machine (pip install nvidia-cuda-nvcc has one)")
    line = [nvcc, "-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-v", "-Werror", "all-warnings",
            "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
            "-c", ROOT / "fast" / "clorae.cu", "-o", tmp_path / "kernels.o"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arch in ("sm_80", "sm_90"):
        assert len(re.findall(rf"Compiling entry function \S+ for '{arch}'", done.stderr)) == 16
    number = r"(\d+) bytes"
    spills = re.findall(f"{number} stack frame, {number} spill stores, {number} spill loads",
                        done.stderr)
    assert len(spills) >= 32 and set(spills) == {("0", "0", "0")}
    print("registers:", sorted(map(int, re.findall(r"Used (\d+) registers", done.stderr))))


# ------------------------------------------------------------------------------- building, or not

GOOD = "import pathlib, sys, time; time.sleep(0.5); folder = pathlib.Path(sys.argv[2])\n" \
       "(folder / 'clorae_kernels.so').write_text('library')\n" \
       "open(folder.parent / 'builds', 'a').write('x')\n"
BAD = "print('\\n'.join(f'line {i}' for i in range(99))); print('clorae.cu(7): error: oh'); exit(1)"
HANGING = "import os, time; os.fork(); time.sleep(60)"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that seems to have a GPU: load_extension() goes as far as the compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delitem(fast.cuda.KERNELS, "cuda", raising=False)
    return tmp_path


def with_compiler(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(fast.cuda, "COMPILER", (sys.executable, "-c", program))


def warning_of_a_failed_load() -> str:
    """The one warning of a load that fails; the answer is None, the time bounded."""
    start = time.monotonic()
    with pytest.warns(UserWarning, match="the PyTorch path is used") as caught:
        assert fast.cuda.kernels(torch.device("cuda")) is None
        assert fast.cuda.kernels(torch.device("cuda")) is None  # asked again: no second attempt
    assert len(caught) == 1 and time.monotonic() - start < 30
    return str(caught[0].message)


def test_a_machine_without_a_compiler_warns_once_and_goes_on(machine, monkeypatch):
    """The true compiler script, with no CUDA toolkit to be found."""
    monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
    assert warning_of_a_failed_load()
    assert not list(machine.glob("clorae-*[!k]")), "a failed build leaves nothing but the lock file"


def test_a_broken_source_gives_the_compilers_last_lines(machine, monkeypatch):
    """... and only those: twelve of a hundred."""
    with_compiler(monkeypatch, BAD)
    message = warning_of_a_failed_load()
    assert "clorae.cu(7): error: oh" in message and "line 98" in message
    assert "line 80" not in message


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(machine, monkeypatch):
    """BUILD_SECONDS bound the build."""
    with_compiler(monkeypatch, HANGING)
    monkeypatch.setattr(fast.cuda, "BUILD_SECONDS", 1)
    assert "not finished within 1 s" in warning_of_a_failed_load()


def test_a_library_that_does_not_load_is_a_warning_too(machine, monkeypatch):
    """The library of another machine, or half a disk."""
    with_compiler(monkeypatch, GOOD)
    assert warning_of_a_failed_load()


def test_an_old_gpu_takes_the_pytorch_path(machine, monkeypatch):
    """bf16 tensor cores and asynchronous copies came with 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "compute capability 8.0, this GPU has 7.5" in warning_of_a_failed_load()


def hold(path: Path, ready: object) -> None:
    lock = open(path, "w")
    fast.cuda.acquire(lock)
    ready.set()
    time.sleep(60)


def test_a_lock_whose_holder_was_killed_does_not_stop_a_build(tmp_path, monkeypatch):
    """The system releases it; neither its file nor a half-built folder matters."""
    with_compiler(monkeypatch, GOOD)
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "clorae-key"
    (folder / "rubbish").mkdir(parents=True)
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(folder.with_suffix(".lock"), ready))
    holder.start()
    assert ready.wait(20)
    monkeypatch.setattr(fast.cuda, "BUILD_SECONDS", 1)
    with pytest.raises(TimeoutError, match="another process has held"):
        fast.cuda.build(folder, {})
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    monkeypatch.setattr(fast.cuda, "BUILD_SECONDS", 30)
    assert fast.cuda.build(folder, {}).read_text() == "library"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["builds", "clorae-key", "clorae-key.lock"]


def test_of_several_processes_one_builds_and_all_get_the_library(tmp_path, monkeypatch):
    """Four at once, fifty times for the ones that come later: one build, no hang."""
    with_compiler(monkeypatch, GOOD)
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "clorae-key"
    with fork.Pool(4) as pool:
        results = [pool.apply_async(fast.cuda.build, (folder, {})) for _ in range(50)]
        assert {result.get(30) for result in results} == {folder / "clorae_kernels.so"}
    assert (tmp_path / "builds").read_text() == "x"


def test_nothing_is_compiled_at_import_and_the_cpu_never_asks():
    """KERNELS knows the CPU alone until a CUDA tensor comes; --impl cuda refuses there.  Nor does
    an answer in words load torch's compiler, to fill weights that are read, or matplotlib."""
    line = "import fast.cuda, sys, tools.answer, torch; from t5 import T5; " \
           "T5.from_pretrained('tests/golden/t5_v1'); " \
           "assert fast.cuda.KERNELS == {'cpu': None}; " \
           "assert fast.form_on(torch.device('cpu')) == 'fast'; " \
           "assert not {'torch._dynamo', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", line], check=True, cwd=ROOT)
    with pytest.raises(ValueError, match="--impl cuda: expected a CUDA device"):
        fast.form_on(torch.device("cpu"), "cuda")


# --------------------------------------------------------------------------- a layer of the model

def module_on(device: torch.device) -> CudaExpertLinear:
    """A layer of ranks 9 and 3, in evaluation, whose task experts have learned."""
    base = nn.Linear(24, 16, bias=False).requires_grad_(False)
    module = ExpertLinear(base, ExpertConfig(rank=9), Routing(("a", "b", "c")), "memory")
    nn.init.normal_(module.B_T)
    module.__class__ = CudaExpertLinear
    return module.to(device).eval()


def test_decoding_packs_the_factors_once_for_all_tokens_of_a_batch(device, monkeypatch):
    """The next tokens of a batch read one pack; `set` announces the next batch, with its own; and a
    factor that learns between tokens of one batch is packed anew."""
    module, packed, pack = module_on(device), [], fast.cuda.pack
    monkeypatch.setattr(fast.cuda, "pack", lambda *given: packed.append(given) or pack(*given))
    with torch.no_grad():
        for tasks in ([0, 2, 2], [1, 1, 2]):
            module.routing.set(torch.tensor(tasks))
            for x in torch.randn(3, 3, 1, 24, device=device):
                y = module(x)
                expected = FastExpertLinear.forward(module, x)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert len(packed) == 2
        module.B_T.add_(1.0)
        torch.testing.assert_close(module(x), FastExpertLinear.forward(module, x), rtol=1e-5,
                                   atol=1e-5)
    assert len(packed) == 3


def test_a_batch_makes_one_table_for_all_its_layers(device, monkeypatch):
    """... and none where no kernel asks for it; fixed gates come to the kernels from outside."""
    module, tables, table_of = module_on(device), [], fast.cuda.table_of
    monkeypatch.setattr(fast.cuda, "table_of", lambda *runs: tables.append(runs) or table_of(*runs))
    x = torch.randn(3, 5, 24, device=device)
    module.routing.set(torch.tensor([0, 2, 2]))
    for module.fixed_gates in (None, (0.3, 0.7)):
        torch.testing.assert_close(module(x), FastExpertLinear.forward(module, x), rtol=1e-5,
                                   atol=1e-5)
    assert len(tables) == 1


def test_tasks_that_stay_on_a_gpu_are_not_asked_for(device, monkeypatch):
    """keep_tasks_on_gpu: the table comes from the tasks on the GPU, a layer that no kernel fits
    refuses.  (A CPU plays the GPU where there is none.)"""
    module, tasks = module_on(device), torch.tensor([0, 2, 2], device=device)
    monkeypatch.setattr(CudaExpertLinear, "on_gpu", lambda self: self.tasks_stay)
    x = torch.randn(3, 5, 24, device=device)
    module.routing.set(tasks)
    expected = module(x)
    fast.cuda.keep_tasks_on_gpu(module)
    module.routing.set(tasks)
    assert torch.equal(module(x), expected)
    assert [key for key in module.routing.derived if key[0] == "table"] == [("table", 5)]
    with pytest.raises(ValueError, match="expected layers that run on clorae.cu"):
        module.double()(x.double())
