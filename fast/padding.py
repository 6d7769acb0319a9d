"""T5 stacks without padding, in training on a CPU.

Attention alone looks at more than one token, so everything else can leave padding out: in the
demo's batches a quarter of the source tokens and three fifths of the target's. Elsewhere tokens
stay in rows: texts to be answered come sorted by length, and a GPU's host would have to wait for
the number of real tokens.
Shapes: B batch, S and M tokens of a row, t real tokens of a batch, D model width, H heads, K head
width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import t5


class Padding:
    """Takes the padding of a mask [B,S] out of a batch and puts it in again.

    Packed tokens are [t,D]. Where nothing is to be taken out (the mask is None or has no padding,
    or lies on a GPU) they are rows, [B,S,D], and only heads are split and joined."""

    def __init__(self, mask: Tensor | None) -> None:
        """mask [B,S], True at real tokens; None: all are real."""
        packs = mask is not None and mask.device.type == "cpu" and not mask.all()
        self.shape = mask.shape if packs else None
        self.real = mask.flatten().nonzero()[:, 0] if packs else None  # [t], places in the B S

    def unpad(self, x: Tensor) -> Tensor:
        """[B,S,D] -> [t,D], or x itself."""
        return x if self.shape is None else x.flatten(0, 1).index_select(0, self.real)

    def pad(self, x: Tensor) -> Tensor:
        """[t,D], or [B,S,D] -> [B,S,D], with 0 at padding."""
        if self.shape is None:
            return x
        rows = x.new_zeros(self.shape.numel(), x.shape[1])
        return rows.index_copy(0, self.real, x).unflatten(0, self.shape)

    def split(self, x: Tensor, H: int) -> Tensor:
        """Tokens [t,H K], or [B,S,H K] -> their heads [B,H,S,K]."""
        return t5.split_heads(self.pad(x), H)

    def merge(self, x: Tensor) -> Tensor:
        """Heads [B,H,S,K] -> tokens as `split` takes them."""
        return self.unpad(t5.join_heads(x))


class Source(NamedTuple):
    """What an attention reads: packed tokens, the padding that they lack, and the bias on the
    scores, broadcastable to [B,H,Q,M]; None: 0."""
    tokens: Tensor
    bias: Tensor | None
    padding: Padding


def attention(layer: t5.Attention, x: Tensor, padding: Padding, source: Source) -> Tensor:
    """t5.Attention of packed tokens x, [t,D] -> [t,D]."""
    q = padding.split(layer.q(x), layer.heads)
    k, v = (source.padding.split(project(source.tokens), layer.heads)
            for project in (layer.k, layer.v))
    return layer.o(padding.merge(layer.attend(q, k, v, source.bias)))


def block(layer: t5.Block, x: Tensor, bias: Tensor, padding: Padding,
          memory: Source | None) -> Tensor:
    """t5.Block of packed tokens x, [t,D] -> [t,D]."""
    source = Source(layer.self_attention_norm(x), bias, padding)
    x = x + layer.dropout(attention(layer.self_attention, source.tokens, padding, source))
    if layer.cross_attention is not None:
        normed = layer.cross_attention_norm(x)
        x = x + layer.dropout(attention(layer.cross_attention, normed, padding, memory))
    return x + layer.dropout(layer.feed_forward(layer.feed_forward_norm(x)))


class PackedStack(t5.Stack):
    """t5.Stack whose blocks compute real tokens alone, in training on a CPU."""

    def forward(self, hidden: Tensor, mask: Tensor | None, memory: Tensor | None = None,
                memory_mask: Tensor | None = None) -> Tensor:
        """As t5.Stack.forward; a decoder's mask [B,S] says which tokens need not be computed."""
        if not self.training or hidden.device.type != "cpu":
            return super().forward(hidden, mask, memory, memory_mask)
        dtype, padding, source = t5.compute_dtype(hidden), Padding(mask), None
        if self.decoder:
            memory, memory_bias = t5.prepare_memory(memory, memory_mask, dtype)
            read = Padding(memory_mask)
            source = Source(read.unpad(memory), memory_bias, read)
        bias = self.self_bias(hidden.shape[1], None if self.decoder else mask, dtype)
        x = self.dropout(padding.unpad(hidden))
        for layer in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, layer, x, bias, padding, source, use_reentrant=False)
            else:
                x = block(layer, x, bias, padding, source)
        return padding.pad(self.dropout(self.final_norm(x)))


FORMS = {t5.Stack: PackedStack}
