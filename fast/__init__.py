"""The mathematics of the chapters, faster: no chapter needs these files to be understood.

`speed_up(model)` puts them in. Each replaces classes of t5.py, vision.py or clorae.py by subclasses
that hold the same parameters under the same names and compute the same, but for rounding:
padding.py   stacks and gate fusion that compute real tokens alone, in training on a CPU
products.py  linear layers, dropout and attention on a CPU
decoder.py   decoding with joined products, and by CUDA graphs
graphs.py    CUDA graphs, also of training steps
This folder imports t5, vision and clorae; of the chapters only evaluate and train import it.
"""

from torch import nn

from fast import decoder, padding, products


def forms() -> dict[type, type]:
    """Chapter class -> the class that replaces it."""
    return {**products.FORMS, **padding.FORMS, **decoder.FORMS}


def speed_up(model: nn.Module, impl: str = "auto") -> str:
    """Put the fast forms into a model, in place, after clorae.adapt; impl "plain": leave it alone.

    Returns the form taken: "plain" or "fast". The model keeps its parameters and their names.
    """
    if impl == "plain":
        return "plain"
    table = forms()
    for module in model.modules():
        module.__class__ = table.get(type(module), type(module))
    return "fast"
