"""The mathematics of the chapters, faster: no chapter needs these files to be understood.

`speed_up(model)` puts them in. They replace classes of t5.py, vision.py and clorae.py by subclasses
that hold the same parameters under the same names and compute the same, but for rounding:
padding.py   stacks and gate fusion that compute real tokens alone, in training on a CPU
products.py  linear layers, dropout and attention on a CPU; packed and joined weights
decoder.py   decoding with joined products, on a GPU also by CUDA graphs
graphs.py    CUDA graphs of any computation, such as a training step
A leaf that replaces classes says so in FORMS, {chapter class: its class}. This folder imports t5,
vision and clorae; only evaluate, train and tools import it.
"""

from torch import nn

from fast import decoder, padding, products


def expert_forms(model: nn.Module, impl: str) -> tuple[str, dict[type, type]]:
    """The form that speed_up returns, and what replaces the expert layers in it."""
    return "fast", {}


def speed_up(model: nn.Module, impl: str = "auto") -> str:
    """Put the fast forms into a model, in place, after clorae.adapt and on its device.

    impl: "plain" changes nothing. Returns the form taken. Parameters, their names and all settings
    stay as they are.
    """
    if impl == "plain":
        return "plain"
    form, layers = expert_forms(model, impl)
    table = {**products.FORMS, **padding.FORMS, **decoder.FORMS, **layers}
    for module in model.modules():
        module.__class__ = table.get(type(module), type(module))
    return form
