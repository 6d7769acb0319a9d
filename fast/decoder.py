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
from fast.products import JoinedProduct, Packed, forget, project, remembered


class JoinedBlock:
    """A decoder block for the next token of each row: its products, the keys and values of its
    tokens so far, and those of the memory, computed once per request and shared by its rows.

    Products compute in `dtype`, attention in the type of the biases.
    """

    def __init__(self, block: t5.Block, memory: Tensor, memory_bias: Tensor, rows: int, steps: int,
                 dtype: torch.dtype) -> None:
        self.block, self.heads = block, block.self_attention.heads
        tokens, cross, feed = block.self_attention, block.cross_attention, block.feed_forward
        gates = [] if feed.gate is None else [feed.gate]
        self.token_products = join(dtype, [tokens.q, tokens.k, tokens.v], [tokens.o])
        self.memory_products = join(dtype, [cross.q], [cross.o])
        self.feed_products = join(dtype, [*gates, feed.up], [feed.down])
        self.memory_keys, self.memory_values = (
            t.to(memory_bias.dtype) for t in cross.keys_values(memory))  # [B,H,M,K]
        _, H, _, K = self.memory_keys.shape
        self.keys, self.values = self.memory_keys.new_empty(2, rows, H, steps, K)

    def __call__(self, x: Tensor, bias: Tensor, memory_bias: Tensor,
                 place: Tensor | None) -> Tensor:
        """x [rows,1,D], the tokens number `place` [1] -> [rows,1,D].

        bias [1,H,1,width] over the first tokens; where `place` is None, these are the tokens so
        far, and the last of them is x. Otherwise the bias hides those to come.
        """
        x = self.self_attention(x, bias, place)
        return self.feed_forward(self.cross_attention(x, memory_bias))

    def self_attention(self, x: Tensor, bias: Tensor, place: Tensor | None) -> Tensor:
        """Append to the cache, attend, and add to x."""
        block, (read, write), width = self.block, self.token_products, bias.shape[-1]
        q, *new = (t5.split_heads(y, self.heads) for y in read(block.self_attention_norm(x)))
        for cache, token in zip((self.keys, self.values), new):
            if place is None:
                cache[:, :, width - 1:width] = token
            else:
                cache.index_copy_(2, place, token.to(cache.dtype))
        so_far = self.keys[:, :, :width], self.values[:, :, :width]
        return x + write(self.attend(q, *so_far, bias))[0]

    def cross_attention(self, x: Tensor, bias: Tensor) -> Tensor:
        """The beams of a request are further queries on the same keys."""
        block, (read, write) = self.block, self.memory_products
        q, = read(block.cross_attention_norm(x))
        q = t5.split_heads(q.reshape(len(self.memory_keys), -1, q.shape[-1]), self.heads)
        out = self.attend(q, self.memory_keys, self.memory_values, bias)
        return x + write(out.reshape(len(x), 1, -1))[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        """t5.FeedForward, added to x."""
        read, write = self.feed_products
        *gate, up = read(self.block.feed_forward_norm(x))
        hidden = F.gelu(gate[0], approximate="tanh") * up if gate else F.relu(up)
        return x + write(hidden)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q [..,H,Q,K], k and v [..,H,M,K] -> [..,Q,H K], in the type of the keys."""
        with torch.autocast(q.device.type, enabled=False):
            return t5.join_heads(self.block.self_attention.attend(q.to(k.dtype), k, v, bias))

    def select(self, rows: Tensor, requests: Tensor | None, length: int) -> None:
        """As JoinedDecoder.select; `length` keys and values of each row exist."""
        for cache in (self.keys, self.values):
            cache[:len(rows), :, :length] = cache[:, :, :length].index_select(0, rows)
        self.keys, self.values = self.keys[:len(rows)], self.values[:len(rows)]
        if requests is not None:
            self.memory_keys = self.memory_keys.index_select(0, requests)
            self.memory_values = self.memory_values.index_select(0, requests)


def join(dtype: torch.dtype, *groups: list) -> list[JoinedProduct]:
    """A joined product for each group of layers."""
    return [JoinedProduct(layers, dtype) for layers in groups]


class JoinedDecoder:
    """t5.CachedDecoder, with the same methods, made of JoinedBlocks.

    On a GPU a step may be captured as a CUDA graph. A graph knows no numbers of its own, so the
    token's place is a tensor and attention reads a fixed width, which doubles when the tokens have
    filled it; then, and when rows have left, another graph is captured.
    """

    WIDTH = 32  # of the first graph

    def __init__(self, model: "FastT5", memory: Tensor, mask: Tensor, beams: int,
                 steps: int) -> None:
        """memory [B,M,D], mask [B,M]; rows = B beams, of at most `steps` tokens each."""
        self.model, self.mask, self.length, dtype = model, mask, 0, t5.compute_dtype(memory)
        # On a CPU SDPA for few queries takes a quarter of the time in fp32 that it takes in bf16.
        attends = torch.promote_types(dtype, torch.float32) if mask.device.type == "cpu" else dtype
        memory, self.memory_bias = t5.prepare_memory(memory, mask, attends)
        self.blocks = [JoinedBlock(block, memory, self.memory_bias, len(memory) * beams, steps,
                                   dtype) for block in model.decoder.blocks]
        self.bias = model.decoder.self_bias(steps, None, attends)  # [1,H,steps,steps]
        weight = model.head_weight
        self.head = remembered(weight, [weight], dtype, lambda: Packed([weight], dtype))
        self.captures, self.width = model.graphs and memory.is_cuda, 0
        self.shrinks_at = 0.5 if self.captures else 1.0  # a new graph costs more than few rows
        self.place = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.graph, self.token, self.logits = None, None, None
        for block in self.blocks if self.captures else ():
            # What is hidden counts for nothing, unless it is NaN.
            block.keys.zero_(), block.values.zero_()

    def __call__(self, token: Tensor) -> Tensor:
        """The next token of each row, [rows,1] -> logits of the one after it, [rows,C]."""
        self.length += 1
        if self.captures:
            return self.replay(token)
        return self.step(token, self.bias[:, :, self.length - 1:self.length, :self.length])

    def step(self, token: Tensor, bias: Tensor, place: Tensor | None = None) -> Tensor:
        """tokens [rows,1] -> logits [rows,C]; bias and place: see JoinedBlock."""
        x = self.model.embed(token)
        for block in self.blocks:
            x = block(x, bias, self.memory_bias, place)
        return self.head(self.model.scaled(self.model.decoder.final_norm(x)))[:, 0]

    def step_at_place(self) -> Tensor:
        """`step` from tensors alone."""
        bias = self.bias[..., :self.width].index_select(2, self.place)  # or fewer, if steps are
        return self.step(self.token, bias, self.place)

    def replay(self, token: Tensor) -> Tensor:
        """A step by the graph; where there is none, an ordinary step, before which torch may not
        have prepared what a capture needs, and then the capture. Graphs share their memory: the
        model keeps the last."""
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
        """Continue these rows, in this order; and these requests alone (None: all of them)."""
        for block in self.blocks:
            block.select(rows, requests, self.length)
        if requests is not None:
            self.graph = None
            self.mask = self.mask[requests]
            self.memory_bias = t5.mask_bias(self.mask, self.bias.dtype)


class FastT5(t5.T5):
    """t5.T5 that decodes with joined products; its head is a product as in fast.products."""

    decoder_class = JoinedDecoder
    graphs = False  # whether CUDA graphs decode
    graph: Any = None  # the last of them

    def head(self, hidden: Tensor) -> Tensor:
        """[...,D] -> logits [...,C]."""
        return project(self.scaled(hidden), self.head_weight)

    def train(self, mode: bool = True) -> "FastT5":
        """Training drops the packed copies of weights, which it would make outdated."""
        if mode:
            self.graph = None
            forget(self)
        return super().train(mode)


FORMS = {t5.T5: FastT5}
