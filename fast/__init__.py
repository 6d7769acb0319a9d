"""The mathematics of the chapters, faster: no chapter needs these files to be understood.

`speed_up(model)` puts them in. They replace classes of t5.py and clorae.py by subclasses
that hold the same parameters under the same names and compute the same, but for rounding:
padding.py   stacks of T5 that compute real tokens alone, in training on a CPU
dropout.py   dropout by random words on a CPU
decoder.py   decoding with weights packed and joined, on a GPU also by CUDA graphs
experts.py   expert layers in rank space, and L_MIM from their codes
cuda.py      expert layers on the kernels of clorae.cu, compiled on first use
graphs.py    CUDA graphs of any computation, such as a training step
A leaf that replaces classes says so in FORMS, {chapter class: its class}. This folder imports t5
and clorae; only evaluate, train and tools import it.
"""

import torch
from torch import nn

from fast import cuda, decoder, dropout, experts, padding


def form_on(device: torch.device, impl: str = "auto") -> str:
    """The form that --impl means on a device: "plain", "fast", or "cuda" for expert layers on the
    kernels of clorae.cu, which "auto" takes wherever they can be built. ValueError where "cuda" is
    demanded and cannot be had."""
    if impl in ("plain", "fast"):
        return impl
    built = cuda.kernels(device) is not None
    if impl == "cuda" and not built:
        raise ValueError("--impl cuda: expected a CUDA device and a compiled extension, got "
                         f"'{device.type}' without one; use --impl auto for the PyTorch path")
    return "cuda" if built else "fast"


def speed_up(model: nn.Module, impl: str = "auto") -> str:
    """Put the fast forms into a model, in place, after clorae.adapt and on its device; returns
    the form, see form_on. Parameters, their names and all settings stay as they are."""
    form = form_on(next(model.parameters()).device, impl)
    if form != "plain":
        layers = cuda.FORMS if form == "cuda" else experts.FORMS
        table = {**dropout.FORMS, **padding.FORMS, **decoder.FORMS, **layers}
        for module in model.modules():
            module.__class__ = table.get(type(module), type(module))
    return form
