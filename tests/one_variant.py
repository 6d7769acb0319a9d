"""Run one variant of tests/benchmark.py whenever the parent, tests/turns.py, asks for it.

    python tests/one_variant.py TREE WHAT NAME SIZE DEVICE THREADS

TREE is the checkout that is measured, this one or another back to commit f1199df; WHAT is step,
decode or memory.  It prints a line when it is ready.  Then each line on its standard input is
answered by one: a number of rows by the wall seconds of a run, "peak" by the process' peak memory
in MiB.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

TREE, WHAT, NAME, SIZE, DEVICE, THREADS = sys.argv[1:]
sys.path[:0] = [TREE, f"{TREE}/tests"]

import torch

torch.nn.init.kaiming_uniform_ = lambda tensor, *_, **__: tensor  # drawn anew anyway
# Logits of random weights lie so far apart that a softmax of them is full of denormal numbers, each
# of which takes a product a hundred times as long; those of trained weights do not.
torch.set_flush_denormal(True)

import benchmark  # the tree's


def variant() -> Callable[[int], Callable[[], object]]:
    """Number of rows -> the run."""
    if WHAT != "decode":
        steps = benchmark.peer_steps if "transformers" in NAME else benchmark.our_steps
        run = steps(SIZE, benchmark.types()[0])[NAME]
        return lambda rows: run
    if hasattr(benchmark, "decoding"):
        return benchmark.decoding(NAME, SIZE)
    adapted, new = NAME.startswith("C-LoRAE"), benchmark.NEW  # f1199df's
    model = benchmark.ours(SIZE) if adapted else benchmark.T5(benchmark.geometry(SIZE))
    model.eval()

    def runs(rows: int) -> Callable[[], object]:
        b = benchmark.batch(rows).to(torch.get_default_device())
        inputs = (b,) if adapted else (b.input_ids, b.attention_mask)
        return lambda: model.generate(*inputs, new, banned_ids=[1])

    return runs


def peak() -> float:
    """Peak memory in MiB, of the allocator on a GPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    # ru_maxrss would be the parent's, if that was larger before this process began
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 10


if __name__ == "__main__":
    torch.set_num_threads(int(THREADS))
    torch.manual_seed(0)
    # Set as torch's default, the device would slow every call of torch from Python, up to half of
    # a decoding, and that in torch's variants alone: it is so while the variant is made.
    torch.get_default_device = lambda: torch.device(DEVICE)
    with torch.device(DEVICE):
        runs = cache(variant())
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        print(peak() if word == "peak" else benchmark.timed(runs(int(word))), flush=True)
