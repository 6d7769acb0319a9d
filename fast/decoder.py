"""Decoding with joined products, and on a GPU by CUDA graphs.

A decoder multiplies a few tokens by all weights, step after step: what counts is how fast weights
are read and how little is done besides. So layers that read the same input become one product,
packed for few rows, and keys and values stand in memory that is reserved once.
Shapes: B requests, rows = B beams, M tokens of the memory, D model width, H heads, K head width, C
vocabulary, D_in and D_out widths of a linear layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t5
from fast.graphs import captured


def onednn_computes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply by this weight in this type: on a CPU that supports both."""
    if weight.device.type != "cpu":
        return False
    supported = {torch.float32: torch.backends.mkldnn.is_available,
                 torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return dtype in supported and supported[dtype]()


class Packed:
    """x -> x [W_1; W_2; ...]^T, or x [W_1, W_2, ...]^T for dim 1, from a copy of the weights.

    For few rows F.linear reads a weight at less than half of a CPU's memory speed; the blocks in
    which oneDNN arranges the copy are read at most of it, and larger products at more of it."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> None:
        weights = [w.detach().to(dtype) for w in weights if w.numel()]
        copy = weights[0] if len(weights) == 1 else torch.cat(weights, dim)
        self.onednn = onednn_computes(copy, dtype)
        self.copy = torch.ops.mkldnn._reorder_linear_weight(copy, 32) if self.onednn else copy

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.copy.dtype)
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.copy, None, "none", [], "")
        return F.linear(x, self.copy)


def remembered(owner: Tensor, weights: Sequence[Tensor], how: Any, make: Callable) -> Any:
    """Cache make() on `owner`; build it again when one of the weights or `how` it is made changed.

    A write through another view of the storage, such as an optimizer's flat vector, is not seen:
    where weights learn, train() therefore calls `forget`. Weights made in inference mode do not
    count their writes, so nothing is cached for them."""
    if any(w.is_inference() for w in weights):
        return make()
    key = how, *((w.data_ptr(), w._version) for w in weights)
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
    layers are called one by one; so are plain linears on a GPU, where copies would gain little."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype,
                 pack: type[Packed] = Packed) -> None:
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
        self.down, self.up = remembered(weights[0], weights, (dtype, pack), lambda: (
            pack([w for down, _, _ in parts for w in down], dtype),
            [pack(up, dtype, dim=1) if up else None for _, up, _ in parts]))

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


class JoinedDecoder(t5.CachedDecoder):
    """t5.CachedDecoder by joined products.

    On a GPU a step may be captured as a CUDA graph. A graph knows no numbers of its own, so the
    token's place is a tensor and attention reads a fixed width, which doubles when the tokens have
    filled it; then, and when rows have left, another graph is captured."""
    WIDTH = 32  # of the first graph

    def __init__(self, model: "FastT5", memory: Tensor, mask: Tensor, beams: int,
                 steps: int) -> None:
        """memory [B,M,D], mask [B,M]; rows = B beams, of at most `steps` tokens each."""
        super().__init__(model, memory, mask, beams, steps)
        self.mask, dtype, weight = mask, t5.compute_dtype(memory), model.head_weight
        self.products = [joined(block, dtype, model.pack) for block in model.decoder.blocks]
        self.head = remembered(weight, [weight], (dtype, model.pack),
                               lambda: model.pack([weight], dtype))
        if memory.device.type == "cpu":  # as the products of `attend` read them best
            self.memory_cache = [[k.mT.contiguous().mT, v.contiguous()]
                                 for k, v in self.memory_cache]
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
        far, and the given one is the last. Otherwise the bias hides those to come."""
        x = self.model.shared(token)
        for i in range(len(self.products)):
            x = self.block(i, x, bias, place)
        return self.head(self.model.scaled(self.model.decoder.final_norm(x)))[:, 0]

    def block(self, i: int, x: Tensor, bias: Tensor, place: Tensor | None) -> Tensor:
        """x [rows,1,D] through block i -> [rows,1,D]."""
        block, products, width = self.model.decoder.blocks[i], self.products[i], bias.shape[-1]
        layer = block.self_attention
        q, *new = products["qkv"](block.self_attention_norm(x))
        for cache, token in zip(self.cache[i].unbind(), new):
            token = token.view(len(token), layer.heads, 1, -1)
            if place is None:
                cache.narrow(2, width - 1, 1).copy_(token)
            else:
                cache.index_copy_(2, place, token.to(cache.dtype))
        x = x + products["o"](self.attend(layer, q, self.cache[i].narrow(3, 0, width), bias))[0]
        layer, (q,) = block.cross_attention, products["cross q"](block.cross_attention_norm(x))
        out = self.attend(layer, q, self.memory_cache[i], self.memory_bias)
        x = x + products["cross o"](out)[0]
        *gate, up = products["up"](block.feed_forward_norm(x))
        hidden = F.gelu(gate[0], approximate="tanh").mul_(up) if gate else F.relu(up)
        return x + products["down"](hidden)[0]

    def attend(self, layer: t5.Attention, q: Tensor, cache: Sequence[Tensor],
               bias: Tensor) -> Tensor:
        """As t5.CachedDecoder; on a CPU by two products, since SDPA is made for many queries."""
        if q.is_cuda or torch.is_autocast_enabled("cpu"):
            return super().attend(layer, q, cache, bias)
        (B, H, M, K), (k, v) = cache[0].shape, cache
        queries = q.view(B, -1, H, K).transpose(1, 2).reshape(B * H, -1, K).to(k.dtype)
        scores = torch.bmm(queries, k.view(B * H, M, K).mT)
        scores.view(B, H, -1, M).add_(bias)
        out = torch.bmm(scores.softmax(-1), v.view(B * H, M, K))
        return out.view(B, H, -1, K).transpose(1, 2).reshape(q.shape).to(q.dtype)

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


def joined(block: t5.Block, dtype: torch.dtype, pack: type[Packed]) -> dict[str, JoinedProduct]:
    """The products of a decoder block, in the order in which it computes them."""
    tokens, memory, feed = block.self_attention, block.cross_attention, block.feed_forward
    gate = [] if feed.gate is None else [feed.gate]
    groups = {"qkv": [tokens.q, tokens.k, tokens.v], "o": [tokens.o], "cross q": [memory.q],
              "cross o": [memory.o], "up": [*gate, feed.up], "down": [feed.down]}
    return {name: JoinedProduct(layers, dtype, pack) for name, layers in groups.items()}


class FastRMSNorm(t5.RMSNorm):
    """t5.RMSNorm in fp32 without gradients on a CPU by few operations, as weight sqrt(n) x over
    sqrt(|x|^2 + n eps) for width n: F.rms_norm does each of its eight steps to all of x."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or x.is_cuda:
            return super().forward(x)
        n = x.shape[-1]
        weight, root = remembered(self.weight, [self.weight], n, lambda: (
            self.weight.float() * n ** 0.5, x.new_tensor((n * self.eps) ** 0.5)))
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(norm, root)).mul_(weight)

    def train(self, mode: bool = True) -> "FastRMSNorm":
        """As FastT5: norms of the visual adapter learn, too."""
        forget(self)
        return super().train(mode)


class FastT5(t5.T5):
    """t5.T5 that decodes with joined products."""
    decoder_class = JoinedDecoder
    pack = Packed  # how weights are held; see fast/int8.py
    graphs = False  # whether CUDA graphs decode
    graph: Any = None  # the last of them

    def train(self, mode: bool = True) -> "FastT5":
        """Training drops the packed copies of weights, which it would make outdated."""
        if mode:
            self.graph = None
            forget(self)
        return super().train(mode)


FORMS = {t5.T5: FastT5, t5.RMSNorm: FastRMSNorm}
