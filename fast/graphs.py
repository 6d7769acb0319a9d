"""CUDA graphs: thousands of kernels launched at once.

A host takes longer to launch small kernels one by one than a GPU takes to run them. A graph reads
and writes memory where it did when it was captured, so inputs are copied there before each replay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def captured(work: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
    """A CUDA graph of what work() does, and the tensor that holds its result after each replay.

    Nothing is computed yet. pool: the memory that other graphs have used, or None."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: another one may be NCCL's.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        answer = work()
    return graph, answer


class Graphs:
    """Micro-batches as CUDA graphs: one for each shape that comes a second time, up to MOST."""
    MOST = 64

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], device: torch.device) -> None:
        """compute(batch, numbers) -> a tensor; a batch is a dataclass of tensors alone."""
        self.compute, self.device = compute, device
        self.seen: set[tuple] = set()  # shapes
        self.graphs: dict[tuple, tuple] = {}  # shape -> the inputs that it reads, graph, result
        self.pool = torch.cuda.graph_pool_handle()  # memory of all: no two run at once

    def __call__(self, batch: Any, numbers: Tensor) -> Tensor:
        """compute(batch, numbers) for a batch on the CPU; valid until the next call."""
        inputs, form = [*vars(batch).values(), numbers], type(batch)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape in self.seen and shape not in self.graphs and len(self.graphs) < self.MOST:
            held = self.on_device(inputs)
            self.graphs[shape] = held, *captured(lambda: self.result(form, held), self.pool)
        if shape not in self.graphs:  # what torch prepares at first use must be ready for a graph
            self.seen.add(shape)
            return self.result(form, self.on_device(inputs))
        held, graph, result = self.graphs[shape]
        for place, now in zip(held, inputs):
            place.copy_(now, non_blocking=True)
        graph.replay()
        return result

    def on_device(self, inputs: list[Tensor]) -> list[Tensor]:
        """Copies of a batch's fields and its numbers on the GPU."""
        return [tensor.to(self.device, non_blocking=True) for tensor in inputs]

    def result(self, form: type, inputs: list[Tensor]) -> Tensor:
        """`compute` of a batch of this class, given as its fields, and its numbers."""
        *fields, numbers = inputs
        return self.compute(form(*fields), numbers)
