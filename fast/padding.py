"""Stacks and gate fusion without padding, in training on a CPU.

Attention alone looks at more than one token, so everything else can leave padding out: in the
demo's batches a quarter of the source tokens and three fifths of the target's. Elsewhere tokens
stay in rows: texts to be answered come sorted by length, and a GPU's host would have to wait for
the number of real tokens.
Shapes: B batch, S and M tokens of a row, t real tokens of a batch, D model width, H heads, K head
width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import t5
import vision


class Padding:
    """Takes the padding of a mask [B,S] out of a batch and puts it in again.

    Packed tokens are [t,D]. Where nothing is to be taken out (the mask is None or has no padding,
    or lies on a GPU) they are rows, [B,S,D], and only heads are split and joined.
    """

    def __init__(self, mask: Tensor | None) -> None:
        """mask [B,S], True at real tokens; None: all are real."""
        packs = mask is not None and mask.device.type == "cpu" and not mask.all()
        self.mask = mask if packs else None
        self.orders: dict[int, tuple[Tensor, Tensor]] = {}

    def split(self, x: Tensor, H: int) -> Tensor:
        """Tokens [t,H K], or [B,S,H K] -> their heads [B,H,S,K], with 0 at padding."""
        if self.mask is None:
            return t5.split_heads(x, H)
        (B, S), K = self.mask.shape, x.shape[1] // H
        real, row = self.order(H)
        return Reordered.apply(x, (B, H, S, K), row, real)

    def merge(self, x: Tensor) -> Tensor:
        """Heads [B,H,S,K] -> tokens as `split` takes them."""
        if self.mask is None:
            return t5.join_heads(x)
        (_, H, _, K), (real, row) = x.shape, self.order(x.shape[1])
        return Reordered.apply(x, (len(real) // H, H * K), real, row)

    def unpad(self, x: Tensor) -> Tensor:
        """[B,S,D] -> [t,D], or x itself."""
        return self.merge(x[:, None])

    def pad(self, x: Tensor) -> Tensor:
        """[t,D], or [B,S,D] -> [B,S,D]."""
        return self.split(x, 1)[:, 0]

    def order(self, H: int) -> tuple[Tensor, Tensor]:
        """For each of the t H heads of real tokens its number among the B H S heads in rows; and
        the reverse, which is t H for heads of padding."""
        if H not in self.orders:
            (B, S), (i, j) = self.mask.shape, self.mask.nonzero().T[..., None]
            real = ((i * H + torch.arange(H)) * S + j).flatten()
            row = torch.full((B * H * S,), len(real))
            row[real] = torch.arange(len(real))
            self.orders[H] = real, row
        return self.orders[H]


class Reordered(torch.autograd.Function):
    """x cut into vectors, in another order, as a tensor of `shape`.

    The i-th is x's vector number order[i], or 0 where x has none of that number; `back` is the
    order that undoes it. Autograd does not know that no vector is taken twice, and would sum up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = x.shape
        return Reordered.take(x, shape, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        back, = ctx.saved_tensors
        return Reordered.take(dy, ctx.shape, back), None, None, None

    @staticmethod
    def take(x: Tensor, shape: Sequence[int], order: Tensor) -> Tensor:
        """The vectors order[i] of x, which are as long as the shorter of both last dimensions."""
        vectors = x.reshape(-1, min(x.shape[-1], shape[-1]))
        if len(order) > len(vectors):
            vectors = torch.cat((vectors, vectors.new_zeros(1, vectors.shape[1])))
        return vectors.index_select(0, order).view(shape)


class Source(NamedTuple):
    """What an attention reads: packed tokens, the padding that they lack, and the bias on the
    scores, broadcastable to [B,H,Q,M]; None: 0."""

    tokens: Tensor
    bias: Tensor | None
    padding: Padding


def packed_memory(memory: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Source:
    """memory [B,M,D] and its mask [B,M] as a source of attention; see t5.prepare_memory."""
    memory, bias = t5.prepare_memory(memory, mask, dtype)
    padding = Padding(mask)
    return Source(padding.unpad(memory), bias, padding)


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
        dtype, padding = t5.compute_dtype(hidden), Padding(mask)
        source = packed_memory(memory, memory_mask, dtype) if self.decoder else None
        bias = self.self_bias(hidden.shape[1], None if self.decoder else mask, dtype)
        x = self.dropout(padding.unpad(hidden))
        for layer in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, layer, x, bias, padding, source, use_reentrant=False)
            else:
                x = block(layer, x, bias, padding, source)
        return padding.pad(self.dropout(self.final_norm(x)))

    def relative_values(self, S: int, M: int, dtype: torch.dtype) -> Tensor:
        """As t5.Stack's, from one value for each distance instead of one for each pair."""
        weight = self.relative_bias.weight
        distance = torch.arange(1 - S, M, device=weight.device)
        bucket = t5.relative_buckets(distance, not self.decoder, len(weight), self.furthest)
        values = F.embedding(bucket, weight).to(dtype).T  # [H,S-1+M]
        # Query i reads M distances from -i on: the window that starts at place S-1-i of `values`.
        return values.unfold(1, M, 1).flip(1)[None].contiguous()


class PackedGateFusion(vision.GateFusion):
    """vision.GateFusion whose attention and feed-forward compute real tokens alone."""

    def mix(self, h: Tensor, mask: Tensor, visual: Tensor, visual_mask: Tensor) -> Tensor:
        """As vision.GateFusion.mix: [B,S,D] -> [B,S,D]."""
        if not self.training or h.device.type != "cpu":
            return super().mix(h, mask, visual, visual_mask)
        padding, source = Padding(mask), packed_memory(visual, visual_mask, t5.compute_dtype(h))
        x = padding.unpad(h)
        x = x + attention(self.attention, self.attention_norm(x), padding, source)
        return padding.pad(self.feed_forward(self.feed_forward_norm(x)))


FORMS = {t5.Stack: PackedStack, vision.GateFusion: PackedGateFusion}
