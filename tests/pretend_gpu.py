"""Run a script on a GPU that is none: python tests/pretend_gpu.py train.py --steps 2 ...
(clorae.cu takes part if PRETEND_EMULATOR names it as conftest.emulator_library compiles it.)
For `-` as the script, lines of [[script, words ...], emulator or null] are read from standard input
and each is answered with [exit code, output, errors].

Tensors that the script puts on "cuda" say that they are there, and the CPU computes with them.  So
what is written for GPUs runs on any machine: the branches that a CPU does not take, types under
autocast, clorae.cu (played by tests/emulator.h), and two things that only a GPU minds: tensors of
two devices in one operation are an error here as well, and each time that the host would have to
wait for the GPU is counted, with the line that made it wait.

Not seen here: the kernels of torch for GPUs, memory, streams, speed.
"""

import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
# What torch's C++ asks of a device that it was not built for: nothing happens, device 0 is there.
# A torch that was built for GPUs brings hooks and a guard, too: of hooks those of higher priority
# count, of guards those that came last, after torch.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
namespace {
const c10::Device here(c10::DeviceType::CUDA, 0);
const c10::Stream stream(c10::Stream::DEFAULT, here);
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device exchangeDevice(c10::Device) const override { return here; }
    c10::Device getDevice() const override { return here; }
    c10::Stream getStream(c10::Device) const noexcept override { return stream; }
    c10::Stream getDefaultStream(c10::Device) const override { return stream; }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
};
struct CUDAHooks : at::CUDAHooksInterface {  // torch looks for this name
    CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
    int getNumGPUs() const override { return 1; }
    at::DeviceIndex deviceCount() const override { return 1; }
    at::DeviceIndex current_device() const override { return 0; }
    at::DeviceIndex getCurrentDevice() const override { return 0; }
    long versionCuDNN() const override { return 0; }
    long versionRuntimeCuDNN() const override { return 0; }
};
using at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)
}
extern "C" void put_guard() {
    c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
"""


def build_guard(folder: Path) -> Path:
    """GUARD as a library; RuntimeError where there is no g++."""
    compiler, library = shutil.which("g++"), folder / "guard.so"
    if compiler is None:
        raise RuntimeError("no g++ on this machine: a GPU cannot be pretended")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # without importing it
    (folder / "guard.cpp").write_text(GUARD)
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include",
                    folder / "guard.cpp", "-o", library, f"-L{torch_folder}/lib", "-lc10",
                    "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"], check=True)
    return library


if __name__ == "__main__":  # torch asks for its hooks once, while it is imported
    with tempfile.TemporaryDirectory() as folder:
        guard = ctypes.CDLL(os.environ.get("PRETEND_GUARD") or build_guard(Path(folder)))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# For these the host needs a number that a GPU has yet to compute.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
         aten.repeat_interleave, aten._unique2, aten.bincount}
INDEXING = {aten.index, aten.index_put_, aten.index_put}
ANYWHERE = {aten.copy_, aten._to_copy, *INDEXING}  # these take tensors of two devices
OPERATORS = torch.library.Library("aten", "IMPL")  # lives as long as what it registers
waits: Counter[str] = Counter()  # "operator at file:line" -> times


def leaves(x: object) -> list:
    """What lists, tuples and dicts within each other hold, from left to right: as torch's pytree,
    which knows more containers and takes three times as long."""
    if isinstance(x, dict):
        x = tuple(x.values())
    return [leaf for y in x for leaf in leaves(y)] if isinstance(x, (list, tuple)) else [x]


def mapped(function: Callable, x: object) -> object:
    """x with function(leaf) in the place of each of its leaves."""
    if isinstance(x, dict):
        return {key: mapped(function, value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        made = [mapped(function, y) for y in x]
        return made if isinstance(x, list) else tuple(made)
    return function(x)


class OnGPU(Tensor):
    """A tensor on the pretended GPU; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=GPU)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "OnGPU") -> None:
        assert other.shape == self.shape and other.dtype == self.dtype
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"


def caller() -> str:
    """The line of ours that is being run, and whether it is part of a training step."""
    stack = [frame for frame in traceback.extract_stack() if ROOT in Path(
        frame.filename).resolve().parents and Path(frame.filename).resolve() != HERE]
    training = any(frame.name == "train_step" for frame in stack)
    return f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" + " in train_step" * training


def host_waits(packet, args, kwargs, target: torch.device) -> bool:
    """Whether the host waits here until the GPU has done all that was asked of it."""
    if packet not in ANYWHERE:
        return packet in WAITS
    first, *others = leaves(args) or [None]
    if packet is aten._to_copy:
        source, to_gpu, free = first, target.type == "cuda", kwargs.get("non_blocking", False)
    elif packet is aten.copy_:
        source, to_gpu, free = others[0], isinstance(first, OnGPU), others[1:] == [True]
    else:  # indexing by masks, or with numbers that the host has yet to send
        return any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGPU)
                   for x in others if isinstance(x, Tensor))
    return isinstance(source, OnGPU) != to_gpu and not (to_gpu and free)


def compute(func, args, kwargs):
    """An operator on tensors of which some are on the GPU, or which shall come to be there."""
    flat = leaves((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    packet, wanted = func.overloadpacket, kwargs.get("device")
    target = torch.device(wanted) if wanted is not None else GPU if ours else None
    if not ours and (target is None or target.type == "cpu"):
        return func(*args, **kwargs)
    strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if ours and strangers and packet not in ANYWHERE:
        raise RuntimeError(f"{func}: tensors on the GPU and on the CPU in one operation")
    waiting = host_waits(packet, args, kwargs, target)
    if waiting and Graph.capturing is None:
        waits[f"{packet.__name__} at {caller()}"] += 1
    elif waiting or Graph.capturing is not None and ours and packet in (
            aten.copy_, aten._to_copy) and any(not isinstance(x, OnGPU) for x in tensors):
        raise RuntimeError(f"{func}: not permitted while a graph is captured")
    if wanted is not None and not any(isinstance(x, torch.device) for x in flat):
        raise RuntimeError(f"{func}: a device that is none: {wanted!r}")
    known = {id(x.inner): x for x in ours}  # operators that write into a tensor return it
    args, kwargs = mapped(lambda x: x.inner if isinstance(x, OnGPU) else torch.device("cpu")
                          if isinstance(x, torch.device) else x, (args, kwargs))
    on_gpu = target.type == "cuda" and not (packet is aten.copy_ and not isinstance(flat[0], OnGPU))

    def wrap(x):
        if not isinstance(x, Tensor) or isinstance(x, OnGPU) or not on_gpu:
            return x
        return known.get(id(x)) if id(x) in known else OnGPU(x)

    return mapped(wrap, (Graph.capturing or Graph).run(func, args, kwargs))


class Graph:
    """torch.cuda.CUDAGraph: what was done to tensors while it was captured, to be done again where
    it was done then.  Capturing itself changes nothing that was there before."""

    capturing: "Graph | None" = None
    captured = replayed = 0

    def __init__(self) -> None:
        self.tape: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was written over, and its copy

    @staticmethod
    def run(func, args, kwargs):
        return func(*args, **kwargs)

    def record(self, func, args, kwargs):
        """`run` while this graph is captured."""
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in leaves(given.get(argument.name)):
                    if isinstance(written, Tensor):
                        self.before.append((written, written.clone()))
        out = func(*args, **kwargs)
        self.tape.append((func, args, kwargs, out))
        return out

    def pool(self) -> tuple:
        return 0, 0

    def replay(self) -> None:
        Graph.replayed += 1
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, out in self.tape:
                again = func(*args, **kwargs)
                for there, now in zip(leaves(out), leaves(again)):
                    if isinstance(there, Tensor) and there.data_ptr() != now.data_ptr():
                        there.copy_(now)


@contextmanager
def capture(graph: Graph, pool: object = None, capture_error_mode: str = "global") -> Iterator:
    """torch.cuda.graph."""
    Graph.capturing, graph.run = graph, graph.record
    draws = torch.get_rng_state()
    try:
        yield
    finally:
        Graph.capturing = None
        Graph.captured += 1
        torch.set_rng_state(draws)
        for written, copy in reversed(graph.before):
            written.copy_(copy)


class PretendedGPU(TorchDispatchMode):
    """Where tensors come to be on the GPU: factories and copies name the device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which would import a compiler
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def unseen(function: Callable) -> Callable:
    """A function of torch that no mode watches."""
    def called(*args: object, **kwargs: object) -> object:
        with _disable_current_modes():
            return function(*args, **kwargs)
    return called


def device_states(*_: object) -> tuple[list, list]:
    """Of a GPU's generator; but draws are the CPU's here."""
    if Graph.capturing is not None:
        raise RuntimeError("generator: not permitted while a graph is captured")
    return [], []


def rms_norm_backward(dy: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None,
                      needed: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y = x rstd weight: torch has this operator for GPUs alone, and calls it where it
    was built for them."""
    normed, g = x.float() * rstd, dy.float() if weight is None else dy.float() * weight.float()
    dx = rstd * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
    dw = (dy.float() * normed).flatten(0, -2).sum(dim=0)
    return (dx.to(x.dtype) if needed[0] else None,
            dw.to(weight.dtype) if weight is not None and needed[1] else None)


def pretend(emulator: str | None = None) -> PretendedGPU:
    """Let torch.cuda speak of one GPU; the mode to be entered.  emulator: library of clorae.cu."""
    from fast import cuda
    import torch.utils.checkpoint
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1,
               "current_device": 0, "get_device_capability": (9, 0), "_lazy_init": None,
               "set_device": None, "synchronize": None, "manual_seed_all": None,
               "graph_pool_handle": (0, 0), "get_device_name": "a pretended GPU",
               "reset_peak_memory_stats": None, "max_memory_allocated": 0}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    OPERATORS.impl("_fused_rms_norm_backward", rms_norm_backward, "CPU")
    torch.cuda.is_current_stream_capturing = lambda: Graph.capturing is not None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) is a copy to it
    torch.autograd.grad_mode.set_multithreading_enabled(False)  # modes belong to a thread
    torch.inference_mode = torch.no_grad  # in which views of such tensors are not allowed
    torch.asarray = unseen(torch.asarray)  # safetensors gives it memory, which no mode knows
    torch.cuda._initialized = True
    torch.utils.checkpoint.get_device_states = device_states
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else numbers stay behind
    if emulator:
        torch.ops.load_library(emulator)
        cuda.KERNELS["cuda"] = cuda.KERNELS["cpu"] = torch.ops.clorae_emulator
    else:
        cuda.KERNELS["cuda"] = None
    return PretendedGPU()


def perform(words: list[str], emulator: str | None) -> None:
    """Run a script with its words on the pretended GPU; tell what the host waited for."""
    try:
        with pretend(emulator):
            conftest.play(words)
    finally:
        for place, times in waits.most_common():
            print(f"the host waited {times} times: {place}", file=sys.stderr)
        print(f"{Graph.captured} graphs, {Graph.replayed} replays", file=sys.stderr)


if __name__ == "__main__":
    guard.put_guard()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest
    if sys.argv[1:] != ["-"]:
        perform(sys.argv[1:], os.environ.get("PRETEND_EMULATOR"))
        sys.exit()
    for line in sys.stdin:
        words, emulator = json.loads(line)
        done = conftest.run(["", *words], play=functools.partial(perform, emulator=emulator))
        print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
