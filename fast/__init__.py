"""The mathematics of the chapters, faster: no chapter needs these files to be understood.

`speed_up(model)` puts them in. They replace classes of t5.py, vision.py and clorae.py by subclasses
that hold the same parameters under the same names and compute the same, but for rounding:
padding.py   stacks and gate fusion that compute real tokens alone, in training on a CPU
products.py  linear layers, dropout and attention on a CPU; packed and joined weights
decoder.py   decoding with joined products, on a GPU also by CUDA graphs
experts.py   expert layers in rank space, and mim.py the loss L_MIM of these
cuda.py      expert layers on the kernels of clorae.cu, compiled on first use
graphs.py    CUDA graphs of any computation, such as a training step
A leaf that replaces classes says so in FORMS, {chapter class: its class}. This folder imports t5,
vision and clorae; only evaluate, train and tools import it.
"""

from torch import nn

from fast import cuda, decoder, experts, padding, products


def speed_up(model: nn.Module, impl: str = "auto") -> str:
    """Put the fast forms into a model, in place, after clorae.adapt and on its device.

    impl: "plain" changes nothing; "fast" leaves the kernels of clorae.cu out; "cuda" demands them
    (ValueError where they cannot be had); "auto" takes what there is. Returns the form of the
    expert layers: "plain", "fast" or "cuda". Parameters, their names and all settings stay.
    """
    if impl == "plain":
        return "plain"
    device = next(model.parameters()).device
    on_kernels = impl != "fast" and cuda.available(device, forced=impl == "cuda")
    layers = cuda.FORMS if on_kernels else experts.FORMS
    table = {**products.FORMS, **padding.FORMS, **decoder.FORMS, **layers}
    for module in model.modules():
        module.__class__ = table.get(type(module), type(module))
    return "cuda" if on_kernels else "fast"
