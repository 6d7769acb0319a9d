"""Products with a few rows, as a decoding needs them: weights packed for a CPU, and joined.

Shapes: D_in and D_out widths of a linear layer; rows of a decoding, one token each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t5


def onednn_computes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply by this weight in this type: on a CPU that supports both."""
    if weight.device.type != "cpu":
        return False
    supported = {torch.float32: torch.backends.mkldnn.is_available,
                 torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return dtype in supported and supported[dtype]()


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,D_in], weight [D_out,D_in] as it is or packed -> x W^T [...,D_out]; no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class Packed:
    """x -> x [W_1; W_2; ...]^T, or x [W_1, W_2, ...]^T for dim 1, from a copy of the weights.

    For few rows F.linear reads a weight at less than half of a CPU's memory speed; the blocks in
    which oneDNN arranges the copy are read at most of it, and larger products at more of it.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> None:
        weights = [w.detach().to(dtype) for w in weights if w.numel()]
        copy = weights[0] if len(weights) == 1 else torch.cat(weights, dim)
        self.onednn = onednn_computes(copy, dtype)
        self.copy = torch.ops.mkldnn._reorder_linear_weight(copy, 32) if self.onednn else copy

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.copy.dtype)
        return onednn_product(x, self.copy) if self.onednn else F.linear(x, self.copy)


def remembered(owner: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, make: Callable) -> Any:
    """Cache make() on `owner`; build it again when the type or one of the weights has changed.

    A write through another view of the storage, such as an optimizer's flat vector, is not seen:
    T5.train() therefore calls `forget`. Weights made in inference mode do not count their writes,
    so nothing is cached for them.
    """
    if any(w.is_inference() for w in weights):
        return make()
    key = dtype, *((w.data_ptr(), w._version) for w in weights)
    if getattr(owner, "packed", (None,))[0] != key:
        owner.packed = key, make()
    return owner.packed[1]


def forget(model: nn.Module) -> None:
    """Drop all that `remembered` keeps with the parameters of a model."""
    for parameter in model.parameters():
        vars(parameter).pop("packed", None)


def parts_of(layer: nn.Module) -> tuple[list[Tensor], list[Tensor], Callable | None] | None:
    """A layer as JoinedProduct asks for it, or None if it must be called."""
    if type(layer) is t5.Linear:
        return [layer.weight], [], None
    return getattr(layer, "parts", lambda: None)()


class JoinedProduct:
    """The outputs of layers that read the same input, for the next token of each row.

    Each layer computes W_0 x + up between(down x) and describes itself by `parts()`: the matrices
    [W_0, *down], those of `up` (none: the layer is W_0 x), and the function between. All matrices
    that read x are stacked into one product. If a layer has no `parts`, or they are None, the
    layers are called one by one; so are plain linears on a GPU, where the copies would gain little
    for their memory.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.layers, self.down = layers, None
        parts = [parts_of(layer) for layer in layers]
        if None in parts:
            return
        weights = [w for down, up, _ in parts for w in (*down, *up) if w.numel()]
        pays = weights[0].device.type == "cpu" or any(up for _, up, _ in parts)
        if not pays:
            return
        self.between = [between for _, _, between in parts]
        self.heights = [height for (first, *down), up, _ in parts
                        for height in (len(first), sum(map(len, down)))[:1 + bool(up)]]
        self.down, self.up = remembered(weights[0], weights, dtype, lambda: (
            Packed([w for down, _, _ in parts for w in down], dtype),
            [Packed(up, dtype, dim=1) if up else None for _, up, _ in parts]))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [rows,1,D_in] -> [rows,1,D_out] of each layer."""
        if self.down is None:
            return [layer(x) for layer in self.layers]
        codes = self.down(x)
        if len(self.heights) == 1:
            return [codes]
        pieces = iter(codes.split_with_sizes(self.heights, -1))
        return [next(pieces) if up is None else next(pieces) + up(between(next(pieces)))
                for up, between in zip(self.up, self.between)]
