"""Decoding with joined products, and on a GPU by CUDA graphs.

A decoder multiplies a few tokens by all weights, step after step: what counts is how fast weights
are read and how little is done besides. So layers that read the same input become one product,
packed for few rows, and keys and values stand in memory that is reserved once.
Shapes: B requests, rows = B beams, M tokens of the memory, D model width, H heads, K head width, C
vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import t5
from fast.graphs import captured
from fast.products import JoinedProduct, Packed, forget, remembered


class JoinedDecoder(t5.CachedDecoder):
    """t5.CachedDecoder by joined products.

    On a GPU a step may be captured as a CUDA graph. A graph knows no numbers of its own, so the
    token's place is a tensor and attention reads a fixed width, which doubles when the tokens have
    filled it; then, and when rows have left, another graph is captured.
    """

    WIDTH = 32  # of the first graph

    def __init__(self, model: "FastT5", memory: Tensor, mask: Tensor, beams: int,
                 steps: int) -> None:
        """memory [B,M,D], mask [B,M]; rows = B beams, of at most `steps` tokens each."""
        super().__init__(model, memory, mask, beams, steps)
        self.mask, dtype, weight = mask, t5.compute_dtype(memory), model.head_weight
        self.products = [joined(block, dtype) for block in model.decoder.blocks]
        self.head = remembered(weight, [weight], dtype, lambda: Packed([weight], dtype))
        rows, H, _, K = self.cache[0][0].shape
        self.cache = [keys.new_empty(2, rows, H, steps, K) for keys, _ in self.cache]
        self.captures, self.width = model.graphs and memory.is_cuda, 0
        self.shrinks_at = 0.5 if self.captures else 1.0  # a new graph costs more than few rows
        self.place = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.graph, self.token, self.logits = None, None, None
        for cache in self.cache if self.captures else ():
            cache.zero_()  # what is hidden counts for nothing, unless it is NaN

    def __call__(self, token: Tensor) -> Tensor:
        """The next token of each row, [rows,1] -> logits of the one after it, [rows,C]."""
        self.length += 1
        if self.captures:
            return self.replay(token)
        return self.step(token, self.bias[:, :, self.length - 1:self.length, :self.length])

    def step(self, token: Tensor, bias: Tensor, place: Tensor | None = None) -> Tensor:
        """tokens [rows,1], number `place` [1] of their rows -> logits [rows,C].

        bias [1,H,1,width] over the first tokens; where `place` is None, these are the tokens so
        far, and the given one is the last. Otherwise the bias hides those to come.
        """
        x = self.model.shared(token)
        for i in range(len(self.products)):
            x = self.block(i, x, bias, place)
        return self.head(self.model.scaled(self.model.decoder.final_norm(x)))[:, 0]

    def block(self, i: int, x: Tensor, bias: Tensor, place: Tensor | None) -> Tensor:
        """x [rows,1,D] through block i -> [rows,1,D]."""
        block, products, width = self.model.decoder.blocks[i], self.products[i], bias.shape[-1]
        layer = block.self_attention
        q, *new = products["qkv"](block.self_attention_norm(x))
        for cache, token in zip(self.cache[i], new):
            token = t5.split_heads(token, layer.heads)
            if place is None:
                cache[:, :, width - 1:width] = token
            else:
                cache.index_copy_(2, place, token.to(cache.dtype))
        x = x + products["o"](self.attend(layer, q, self.cache[i][:, :, :, :width], bias))[0]
        layer, (q,) = block.cross_attention, products["cross q"](block.cross_attention_norm(x))
        out = self.attend(layer, q, self.memory_cache[i], self.memory_bias)
        x = x + products["cross o"](out)[0]
        *gate, up = products["up"](block.feed_forward_norm(x))
        hidden = F.gelu(gate[0], approximate="tanh") * up if gate else F.relu(up)
        return x + products["down"](hidden)[0]

    def step_at_place(self) -> Tensor:
        """`step` from tensors alone."""
        bias = self.bias[..., :self.width].index_select(2, self.place)  # or fewer, if steps are
        return self.step(self.token, bias, self.place)

    def replay(self, token: Tensor) -> Tensor:
        """A step by the graph. Where there is none, the step is taken without, since a capture must
        find prepared what torch prepares at first use, and then captured for the next. Graphs share
        their memory: the model keeps the last."""
        self.place.fill_(self.length - 1)
        if self.length > self.width:
            self.width, self.graph = max(2 * self.width, self.WIDTH), None
        if self.graph is not None:
            self.token.copy_(token)
            self.graph.replay()
            return self.logits
        self.token, last = token.clone(), self.model.graph
        logits = self.step_at_place()
        self.graph, self.logits = captured(self.step_at_place, last and last.pool())
        self.model.graph = self.graph
        return logits

    def select(self, rows: Tensor, requests: Tensor | None) -> None:
        """As t5.CachedDecoder; a graph goes on with the same memory."""
        for i, cache in enumerate(self.cache):
            so_far = cache[:, :, :, :self.length]
            cache[:, :len(rows), :, :self.length] = so_far.index_select(1, rows)
            self.cache[i] = cache[:, :len(rows)]
        if requests is not None:
            self.graph, self.mask = None, self.mask[requests]
            self.memory_cache = [[t.index_select(0, requests) for t in cache]
                                 for cache in self.memory_cache]
            self.memory_bias = t5.mask_bias(self.mask, self.bias.dtype)


def joined(block: t5.Block, dtype: torch.dtype) -> dict[str, JoinedProduct]:
    """The products of a decoder block, in the order in which it computes them."""
    tokens, memory, feed = block.self_attention, block.cross_attention, block.feed_forward
    gate = [] if feed.gate is None else [feed.gate]
    groups = {"qkv": [tokens.q, tokens.k, tokens.v], "o": [tokens.o], "cross q": [memory.q],
              "cross o": [memory.o], "up": [*gate, feed.up], "down": [feed.down]}
    return {name: JoinedProduct(layers, dtype) for name, layers in groups.items()}


class FastT5(t5.T5):
    """t5.T5 that decodes with joined products."""

    decoder_class = JoinedDecoder
    graphs = False  # whether CUDA graphs decode
    graph: Any = None  # the last of them

    def train(self, mode: bool = True) -> "FastT5":
        """Training drops the packed copies of weights, which it would make outdated."""
        if mode:
            self.graph = None
            forget(self)
        return super().train(mode)


FORMS = {t5.T5: FastT5}
