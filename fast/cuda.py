"""clorae.cu: its building, its binding as operators, and the expert layer on its kernels.

The kernels are compiled on first use on a CUDA machine, into a cache; whatever goes wrong there is
one warning, and the PyTorch lines of fast/experts.py do the work.  Nothing is compiled at import.
`expert_linear` is one layer on the kernels, CudaExpertLinear the module that uses it.

Letters as in clorae.cu: T tokens of the whole batch, R, r, N, k = R + r as in clorae.py.
"""

import hashlib
import itertools
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clorae import ExpertLinear, expert_layers
from fast.experts import RANK_SPACE, FastExpertLinear, Runs, spread, token_runs

# ---------------------------------------------------------------------------------------- building
SOURCE = Path(__file__).with_name("clorae.cu")
COMPILER = (sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[3]); "
            "from fast.cuda import compile_extension; compile_extension(*sys.argv[1:3])")
BUILD_SECONDS = 300  # for a build, and for waiting until another process has built
KERNELS: dict[str, object] = {"cpu": None}  # device type -> library; tests put the emulator here


def kernels(device: torch.device) -> object | None:
    """The operators of clorae.cu for a device, built now, if need be; None: there are none."""
    if device.type not in KERNELS:
        KERNELS[device.type] = load_extension() if device.type == "cuda" else None
    return KERNELS[device.type]


def load_extension() -> object | None:
    """torch.ops.clorae_kernels; None after one warning if it cannot be had."""
    try:
        arch = "{}.{}".format(*torch.cuda.get_device_capability())
        if float(arch) < 8:
            raise RuntimeError(f"the kernels need compute capability 8.0, this GPU has {arch}")
        version = f"{torch.__version__} {arch} {platform.machine()}".encode()
        key = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
        cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"))
        folder = cache.expanduser() / f"clorae-{key}"
        torch.ops.load_library(str(build(folder, {"TORCH_CUDA_ARCH_LIST": arch})))
        return torch.ops.clorae_kernels
    except Exception as problem:  # of any kind: the PyTorch path needs no extension
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(f"clorae.cu: not compiled, the PyTorch path is used:\n{problem}",
                          stacklevel=2)
        return None


def build(folder: Path, environment: dict[str, str]) -> Path:
    """The library in `folder`, compiled first where it is missing: whole or not at all.

    One process builds, in a fresh folder that it renames; the others wait for its lock, which
    the system releases when its holder ends, however it ends.  Raises RuntimeError with the last
    lines of the compiler, or TimeoutError after BUILD_SECONDS."""
    library = folder / "clorae_kernels.so"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        acquire(lock)
        if library.exists():
            return library
        fresh = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            compile_in(fresh, environment)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return library


def acquire(lock: IO[str]) -> None:
    """Take an exclusive lock on an open file within BUILD_SECONDS; TimeoutError otherwise."""
    import fcntl  # not on every system: there the extension is not built
    deadline = time.monotonic() + BUILD_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {lock.name} for {BUILD_SECONDS} s"
                                   ) from None
            time.sleep(0.1)


def compile_in(folder: Path, environment: dict[str, str]) -> None:
    """Run COMPILER in a process of its own, since a compiler may hang or take all with it."""
    line, env = [*COMPILER, SOURCE, folder, SOURCE.parents[1]], {**os.environ, **environment}
    child = subprocess.Popen(line, env=env, text=True, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = child.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the compilers that it has started, too
        child.communicate()
        raise TimeoutError(f"the compiler has not finished within {BUILD_SECONDS} s") from None
    if child.returncode:
        raise RuntimeError("\n".join(output.strip().splitlines()[-12:]))


def compile_extension(source: str, folder: str) -> None:
    """clorae.cu twice, by nvcc (kernels) and by the C++ compiler (binding), into folder."""
    from torch.utils import cpp_extension
    copies = [shutil.copy(source, Path(folder, name)) for name in ("kernels.cu", "binding.cpp")]
    cpp_extension.load("clorae_kernels", [str(copy) for copy in copies],
                       extra_cflags=["-O2"], extra_cuda_cflags=["-O3"],
                       build_directory=folder, is_python_module=False)


# -------------------------------------------------------------------- which task a token belongs to
class Table(NamedTuple):
    """The runs of T tokens as kernels read them, in int32 and on their device."""
    segments: Tensor  # [n,3]: task, first token and the one after the last, of runs 1 .. n
    tasks: Tensor  # [T]: of each token


def table_of(runs: Runs, device: torch.device) -> Table:
    """Runs known to the host -> their table."""
    stops = list(itertools.accumulate(size for _, size in runs))
    rows = [(task, stop - size, stop) for (task, size), stop in zip(runs, stops)]
    segments, tasks = (torch.tensor(numbers, dtype=torch.int32, device="cpu")
                       for numbers in (rows, list(zip(*runs))))
    tasks = tasks[0].repeat_interleave(tasks[1])
    return Table(*(t.to(device, non_blocking=True) for t in (segments, tasks)))


def table_of_rows(tasks: Tensor, S: int, N: int) -> Table:
    """The tasks [B] of rows of S tokens, sorted, which the host need not know -> their table, with
    a run for each of N tasks."""
    every = torch.arange(N, device=tasks.device)
    sizes = S * (tasks[:, None] == every).sum(dim=0)
    stops = sizes.cumsum(dim=0)
    return Table(torch.stack([every, stops - sizes, stops], dim=1).int(),
                 tasks.int()[:, None].expand(-1, S).flatten())


# --------------------------------------------------------------------------------------- operators
def cuda_queue(x: Tensor) -> int:
    """Handle of the CUDA stream on which work for x is queued."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def new_packs(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Room for A [R + N r (+ 1),D_in] and Bt [R + N r,D_out] of clorae.cu."""
    A_U, A_T, B_U, _, W_g = parameters
    rows, gate = A_U.shape[0] + A_T.shape[0] * A_T.shape[1], W_g.shape[0] // 2
    return [A_U.new_empty(rows + gate, A_U.shape[1], dtype=dtype),
            A_U.new_empty(rows, B_U.shape[0], dtype=dtype)]


@torch.library.custom_op("clorae::pack", mutates_args=())
def pack(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The fp32 parameters (see `expert_linear`) as the two packs that the kernels read."""
    packs = new_packs(parameters, dtype)
    KERNELS[packs[0].device.type].pack(*parameters, *packs, cuda_queue(packs[0]))
    return packs


def new_outputs(x: Tensor, dropped: Tensor | None, weight: Tensor | None, gates: Tensor | None,
                packs: Sequence[Tensor], parameters: Sequence[Tensor], segments: Tensor,
                tasks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `experts` answers, with its arguments."""
    T, live = x.shape[0], gates is None
    width = (parameters[0].shape[0] + parameters[1].shape[1] + live + 7) // 8 * 8
    return (x.new_empty(T, packs[1].shape[1]), x.new_empty(T, width),
            x.new_empty(T if live else 0, 2, dtype=torch.float32))


@torch.library.custom_op("clorae::experts", mutates_args=())
def experts(x: Tensor, dropped: Tensor | None, weight: Tensor | None, gates: Tensor | None,
            packs: Sequence[Tensor], parameters: Sequence[Tensor], segments: Tensor,
            tasks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [T,D_out] = W_0 x + s [B_U B_n] [g1 z_U ; g2 z_n], codes z [T,W], gates g [T,2].

    T: all tokens of the batch; W: k rounded up (clorae.cu).  Arguments: see `expert_linear`; x
    [T,D_in]; weight: W_0, or None for the experts' part of y alone; gates [T,2], then g is empty;
    the parameters are here for their gradients alone; segments and tasks: see `Table`."""
    arguments = (x, dropped, weight, gates, packs, parameters, segments, tasks, scale)
    (y, z, g), (A, Bt), (A_U, A_T) = new_outputs(*arguments), packs, parameters[:2]
    library, queue, live = KERNELS[x.device.type], cuda_queue(x), gates is None
    y, weights = y if weight is None else F.linear(x, weight), g if live else gates
    ranks = [A_U.shape[0], A_T.shape[1], A_T.shape[0]]  # R, r, N
    if dropped is None:
        library.shrink(x, A, segments, ranks, live, z, weights, queue)
    else:  # the experts read dropped x, the gate x itself
        library.shrink(dropped, A[:len(Bt)], segments, ranks, live, z, weights, queue)
        if live:
            library.shrink(x, A[len(Bt):], segments, [0, 0, 0], True, z.new_empty(len(x), 8),
                           weights, queue)
    library.expand(z, weights, Bt, segments, ranks, live, scale, weight is not None, y, queue)
    return y, z, g


@torch.library.custom_op("clorae::experts_backward", mutates_args=())
def experts_backward(dy: Tensor, dz: Tensor | None, x: Tensor, dropped: Tensor | None,
                     weight: Tensor | None, gates: Tensor, A: Tensor, Bt: Tensor, z: Tensor,
                     segments: Tensor, tasks: Tensor, ranks: Sequence[int], scale: float,
                     live: bool) -> list[Tensor]:
    """Gradients of x, of dropped (empty without it) and of gates, and in fp32 of A and Bt.

    dy [T,D_out]; dz [T,W]: what has come in for z, from L_MIM."""
    library, queue, dy = KERNELS[x.device.type], cuda_queue(x), dy.contiguous()
    codes, weighted, dgates = torch.empty_like(z), torch.empty_like(z), torch.empty_like(gates)
    dz = None if dz is None else dz.contiguous()
    library.shrink_backward(dy, Bt, segments, ranks, live, scale, z, gates, dz, codes, weighted,
                            dgates, queue)
    source, ddropped = x, x.new_empty(0)
    dx = torch.zeros_like(x) if weight is None else dy @ weight
    if dropped is None:
        library.expand(codes, None, A, segments, ranks, live, 1.0, True, dx, queue)
    else:
        source, ddropped, k = dropped, torch.empty_like(dropped), ranks[0] + ranks[1]
        library.expand(codes, None, A[:len(Bt)], segments, ranks, live, 1.0, False, ddropped, queue)
        if live:
            dx.addmm_(codes[:, k:k + 1], A[len(Bt):])
    dA = rank_gradient(codes, source, tasks, ranks, x if live else None)
    return [dx, ddropped, dgates, dA, rank_gradient(weighted, dy, tasks, ranks)]


def rank_gradient(codes: Tensor, x: Tensor, tasks: Tensor, ranks: Sequence[int],
                  gate_x: Tensor | None = None) -> Tensor:
    """sum_t codes_t x_t^T in the order of a pack, [R + N r (+ 1 with gate_x),d], summed in fp32.

    One product for all tasks does more arithmetic than one for each, but nobody has to know where
    their tokens lie."""
    (R, r, N), fast = ranks, x.is_cuda and x.dtype == torch.bfloat16
    z, gate = codes[:, :R + r], codes[:, R + r:R + r + (gate_x is not None)]
    columns = [z[:, :R], spread(z[:, R:], tasks, N)] if r else [z]
    with torch.autocast(x.device.type, enabled=False):
        parts = [(torch.cat([*columns, gate], dim=1), x)]
        if gate_x is not None and gate_x is not x:  # the gate read x undropped
            parts = [(torch.cat(columns, dim=1), x), (gate, gate_x)]
        sums = [torch.mm(left.T, right, out_dtype=torch.float32) if fast
                else left.T.float() @ right.float() for left, right in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def keep_for_backward(ctx: object, inputs: tuple, output: tuple) -> None:
    """Keep x, the packs, z and g for the backward pass: nothing of width D_out."""
    x, dropped, weight, gates, (A, Bt), parameters, segments, tasks, ctx.scale = inputs
    _, z, g = output
    ctx.live, ctx.shapes = gates is None, [p.shape for p in parameters]
    ctx.save_for_backward(x, dropped, weight, g if ctx.live else gates, A, Bt, z, segments, tasks)
    ctx.mark_non_differentiable(g)
    ctx.set_materialize_grads(False)


def gradients(ctx: object, dy: Tensor | None, dz: Tensor | None, _: None) -> tuple:
    """Gradients of `experts` in the order of its arguments."""
    x, dropped, weight, g, A, Bt, z, segments, tasks = ctx.saved_tensors
    (R, d_in), (N, r, _), (d_out, _) = ctx.shapes[:3]
    dy = x.new_zeros(x.shape[0], d_out) if dy is None else dy
    dx, ddropped, dgates, dA, dBt = experts_backward(
        dy, dz, x, dropped, weight, g, A, Bt, z, segments, tasks, [R, r, N], ctx.scale, ctx.live)
    d_U, d_T, d_gate = dA.split([R, N * r, dA.shape[0] - R - N * r])
    dW_g = torch.cat([d_gate, -d_gate])  # the gate row is W_g[0] - W_g[1]
    parameters = [d_U, d_T.view(N, r, d_in), dBt[:R].T,
                  dBt[R:].view(N, r, d_out).transpose(1, 2), dW_g]
    return (dx, None if dropped is None else ddropped, None, None if ctx.live else dgates,
            [None, None], parameters, None, None, None)


pack.register_fake(new_packs)
experts.register_fake(new_outputs)
experts_backward.register_fake(lambda dy, dz, x, dropped, weight, gates, A, Bt, *rest: [
    torch.empty_like(x), x.new_empty(0) if dropped is None else torch.empty_like(dropped),
    torch.empty_like(gates), *(torch.empty_like(t, dtype=torch.float32) for t in (A, Bt))])
experts.register_autograd(gradients, setup_context=keep_for_backward)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which products with x are computed: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def expert_linear(x: Tensor, base: nn.Linear, parameters: Sequence[Tensor], table: Table,
                  scale: float, dropped: Tensor | None = None, gates: Tensor | None = None,
                  packs: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One ExpertLinear on the kernels, for T tokens: y [T,D_out], z [T,R + r], gates [T,2] (fp32).

    x [T,D_in]; parameters in fp32: A_U, A_T, B_U, B_T, W_g, absent ones without rows ([0,D_in],
    [1,0,D_in], [D_out,0], [1,D_out,0], [0,D_in]); table of the T tokens; dropped: x under dropout,
    for the experts alone; gates [T,2]: weights in place of the router's (without either h = U + D);
    packs: `pack`'s answer, where the parameters do not change between calls."""
    if len(table.tasks) != len(x):
        raise ValueError(f"expert_linear: expected a table of {len(x)} tokens, got one of "
                         f"{len(table.tasks)}; make it from the runs of these tokens")
    dtype = product_dtype(x)
    inputs = [None if t is None else t.to(dtype).contiguous() for t in (x, dropped)]
    given, (*factors, W_g) = gates, parameters
    if gates is None and len(W_g) == 0:
        given = x.new_ones(1, 2).expand(len(x), 2)
    if given is not None:
        given, W_g = given.float().contiguous(), W_g[:0]
    parameters = [*factors, W_g]
    A, Bt = pack([p.detach() for p in parameters], dtype) if packs is None else packs
    A = A[:len(Bt) + len(W_g) // 2]
    weight, learns = base.weight.to(dtype), base.weight.requires_grad
    y, z, g = experts(*inputs, None if learns else weight, given, [A, Bt], parameters, *table,
                      scale)
    if learns:  # no kernel forms a gradient of W_0
        y = y + F.linear(inputs[0], weight)
    y = y if base.bias is None else y + base.bias.to(dtype)
    return y, z[:, :parameters[0].shape[0] + parameters[1].shape[1]], g if given is None else given


# --------------------------------------------------------------------------------------- the layer
class CudaExpertLinear(FastExpertLinear):
    """FastExpertLinear on the kernels of clorae.cu, where they can do this layer's work.

    For L_MIM it keeps the tasks [T] of the tokens in place of their runs: see fast/experts.py."""

    tasks_stay = False  # see keep_tasks_on_gpu

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in], or real tokens [T,D_in] -> y in that shape."""
        if not self.fits(x):
            if self.on_gpu():
                raise ValueError("routing: expected layers that run on clorae.cu, since the tasks "
                                 "of rows stay on the GPU, got one that does not; leave --graphs "
                                 "away")
            return super().forward(x)
        dropping = self.training and self.config.dropout > 0
        packs, table, tokens = self.packs(x), self.table(x), x.flatten(0, -2)
        gates = None if self.fixed_gates is None else self.gates(tokens)
        y, z, _ = expert_linear(tokens, self.base, self.factors(), table, self.scale,
                                dropped=self.dropped(tokens) if dropping else None,
                                gates=gates, packs=packs)
        z_U, z_D = z.split_with_sizes(self.widths, dim=1)
        self.remember(table.tasks, z_U.detach(), z_D)
        return y.view(*x.shape[:-1], y.shape[-1])

    def fits(self, x: Tensor) -> bool:
        """Whether clorae.cu can do it: LoRA experts in bf16 or fp32, widths that are multiples of
        8, where it is built."""
        fits = self.config.method in RANK_SPACE and x.dtype != torch.float64
        return (fits and not any(width % 8 for width in self.base.weight.shape)
                and kernels(x.device) is not None)

    def parts(self) -> None:
        """No joined product with other layers: forward is to be called."""

    def runs(self, x: Tensor) -> Runs:
        """The runs of x; all tokens are one where no expert belongs to a task."""
        if self.config.has_tasks:
            return token_runs(self.routing, x, self.stream)
        return [(0, x.shape[:-1].numel())]

    def on_gpu(self) -> bool:
        """Whether the host may not ask for the tasks of the rows."""
        return self.tasks_stay and self.routing.tasks is not None and self.routing.tasks.is_cuda

    def table(self, x: Tensor) -> Table:
        """The table of x [B,S,D_in] or [T,D_in], made once for all layers that see such a batch."""
        runs, derived = None if self.on_gpu() else self.runs(x), self.routing.derived
        key = ("table", x.shape[-2]) if runs is None else ("table", *runs, x.device)
        if key not in derived:
            N = len(self.routing.names)
            derived[key] = (table_of_rows(self.routing.tasks, x.shape[-2], N) if runs is None else
                            table_of(runs, x.device))
        return derived[key]

    def packs(self, x: Tensor) -> list[Tensor] | None:
        """`pack`, done once for the tokens with which a batch is answered, and again if a factor
        has learned meanwhile; else None."""
        if x.shape[-2] > 1 or self.training or torch.is_grad_enabled():
            return None
        key, factors = ("packs", self, product_dtype(x)), [f.detach() for f in self.factors()]
        kept = self.routing.derived if self.routing.tasks is not None else {}
        versions = [factor._version for factor in factors]
        if kept.get(key, (None,))[0] != versions:
            kept[key] = versions, pack(factors, key[-1])
        return kept[key][1]


def keep_tasks_on_gpu(model: nn.Module) -> None:
    """Tasks that come on a GPU stay there, as a CUDA graph needs: they are then sorted, nobody
    checks them, and a layer that no kernel fits is a ValueError."""
    for layer in expert_layers(model).values():
        layer.tasks_stay = True


FORMS = {ExpertLinear: CudaExpertLinear}
