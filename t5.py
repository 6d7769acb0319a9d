"""T5 encoder-decoder (v1.0, v1.1, flan): layers, decoding, and weights in Hugging Face's layout.

A pre-norm transformer without linear biases. Positions enter as a learned bias on the attention
scores, chosen by the distance between key and query and shared by all layers of a stack. Scores
are not divided by sqrt(K): the initialisation of q makes up for it. Whatever calls like nn.Linear
may stand in for the q, k, v, o of an attention, and may tell the decoder of a faster form
(`Product`); this file knows nothing of who does so.

References: Raffel et al. 2020, arXiv 1910.10683; gated feed-forward: Shazeer 2020, arXiv
2002.05202; weight names and decoding rules: Hugging Face transformers, models/t5 and generation.
Shapes: B batch, S source tokens, T target tokens, t real tokens of a batch, D model width, H heads,
K head width, C vocabulary; in attention Q queries and M keys. Masks are bool, True = real token.
Check:  python -m pytest tests/test_t5.py
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from engine.files import WeightsError, read_json
from engine.weights import odd_fields, open_weights, read_weights

FIRST_UNUSED_ID = 32100  # where T5's vocabulary ends; hub files add untrained rows behind it
POLL = {"cpu": 1, "cuda": 8}  # steps between two looks at which rows ended: a look stalls a GPU
ONEDNN_PAYS = 1 << 18  # elements of a frozen weight from which on; see FrozenProduct
NEVER = -1e9  # score that loses against any real one


@dataclass
class T5Config:
    """Geometry under Hugging Face's field names, and two facts about the output head."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_decoder_layers: int | None = None  # None: as many as the encoder has
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # all distances beyond share a bucket
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # "relu" (v1.0) or "gated-gelu" (v1.1, flan)
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    tie_head: bool = True  # the head is the embedding matrix
    scale_logits: bool = True  # hidden states are multiplied by D^-0.5 before the head

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        self.gated = self.feed_forward_proj == "gated-gelu"
        ids = "pad_token_id", "eos_token_id", "decoder_start_token_id"
        odd = odd_fields(self, relative_attention_num_buckets=(4, 1 << 18),
                         **dict.fromkeys(ids, (0, 1 << 18)))
        odd = odd or [f"{name} = {getattr(self, name)}" for name in ids
                      if getattr(self, name) >= self.vocab_size]
        buckets, furthest = (self.relative_attention_num_buckets,
                             self.relative_attention_max_distance)
        if not odd and furthest <= buckets // 2:  # these have a bucket each, see relative_buckets
            odd.append(f"relative_attention_max_distance = {furthest} beside {buckets} buckets")
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            odd.append(f"feed_forward_proj = {self.feed_forward_proj!r}")
        if odd:
            raise WeightsError("expected the numbers of a T5, ids below vocab_size and 'relu' or "
                               f"'gated-gelu', got {', '.join(odd)}; use a T5's or flan-T5's own")

    @classmethod
    def from_hf(cls, raw: dict, path: Path, tie_head: bool) -> "T5Config":
        """Read a hub config.json. Whether the head is tied is a fact about the weights, since
        transformers 5 writes tie_word_embeddings = true beside a separate lm_head; that key
        decides the scaling, and only where scale_decoder_outputs is absent."""
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        scale = raw.get("scale_decoder_outputs")
        scale = raw.get("tie_word_embeddings", True) if scale is None else scale
        missing = [f for f in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
                   if f not in fields]
        if missing or raw.get("model_type", "t5") != "t5":
            raise WeightsError(f"{path}: expected the config of a T5; model_type is "
                               f"{raw.get('model_type')!r}, missing are {missing}; give a T5")
        try:
            return cls(**fields | {"tie_head": tie_head, "scale_logits": scale})
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None


# ------------------------------------------------------------ positions, masks, types
def relative_buckets(distance: Tensor, bidirectional: bool, buckets: int, furthest: int) -> Tensor:
    """Signed distances (key minus query position) -> their buckets, same shape, int64.

    Near distances have a bucket each; further ones share buckets that widen logarithmically up to
    `furthest`. Bidirectional: the upper half of the buckets is for keys to the right. Causal: keys
    to the right, masked anyway, count as distance 0.
    """
    right = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        right, distance = (distance > 0) * buckets, -distance.abs()
    distance = (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return right + torch.where(distance < exact, distance, far)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which attention will run on x; float16 is refused."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype == torch.float16:
        raise WeightsError("T5 computes in float32 or bfloat16; got float16, in which its hidden "
                           "states overflow to inf; use torch.bfloat16")
    return dtype


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask [B,M] -> [B,1,1,M]: 0 at real keys, the lowest finite value at padding.

    Finite, so that a row without any real key gives numbers. The storage is padded because the
    memory-efficient SDPA kernel copies a bias whose strides are not multiples of 8.
    """
    M = mask.shape[1]
    mask = F.pad(mask, (0, -M % 8))
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :M]


class Padding:
    """Takes the padding out of a batch, [B,S,D] -> [t,D], and puts it in again.

    Attention alone looks at more than one token, so all else may go without padding: in the demo's
    batches a quarter of the source tokens, three fifths of the target's. So it is in training on a
    CPU. Elsewhere, and where all tokens are real, tokens stay in rows: texts to be answered come
    sorted by length, and a GPU's host would have to wait for t.
    """

    def __init__(self, mask: Tensor | None, training: bool) -> None:
        """mask [B,S], None: all real."""
        wanted = training and mask is not None and mask.device.type == "cpu" and not mask.all()
        self.mask = mask if wanted else None
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def split(self, x: Tensor, H: int) -> Tensor:
        """Tokens [t,H K], or [B,S,H K] -> their heads [B,H,S,K], 0 at the padding taken out."""
        if self.mask is None:
            return x.unflatten(-1, (H, -1)).transpose(1, 2)
        (B, S), K = self.mask.shape, x.shape[1] // H
        real, row = self.order(H)
        return Reordered.apply(x, (B, H, S, K), row, real)

    def merge(self, x: Tensor) -> Tensor:
        """Heads [B,H,S,K] -> tokens as `split` takes them."""
        if self.mask is None:
            return x.transpose(1, 2).flatten(2)
        (_, H, _, K), (real, row) = x.shape, self.order(x.shape[1])
        return Reordered.apply(x, (len(real) // H, H * K), real, row)

    def unpad(self, x: Tensor) -> Tensor:
        """[B,S,D] -> [t,D], or x itself."""
        return self.merge(x[:, None])

    def pad(self, x: Tensor) -> Tensor:
        """[t,D], or [B,S,D] -> [B,S,D]."""
        return self.split(x, 1)[:, 0]

    def order(self, H: int) -> tuple[Tensor, Tensor]:
        """Which of the B H S heads in rows each of the t H heads of real tokens is; and which of
        these each head in rows is, t H where it is none."""
        if H not in self.known:
            (B, S), (i, j) = self.mask.shape, self.mask.nonzero().T[..., None]
            real = ((i * H + torch.arange(H)) * S + j).flatten()
            row = torch.full((B * H * S,), len(real))
            row[real] = torch.arange(len(real))
            self.known[H] = real, row
        return self.known[H]


class Reordered(torch.autograd.Function):
    """x cut into vectors, these in another order, as a tensor of `shape`: the i-th is the one with
    the number order[i], or 0 where x has none of that number. `back` is the order that undoes it.
    Autograd does not know that no vector is taken twice, and would sum up."""

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
        vectors = x.reshape(-1, min(x.shape[-1], shape[-1]))
        if len(order) > len(vectors):
            vectors = torch.cat((vectors, vectors.new_zeros(1, vectors.shape[1])))
        return vectors.index_select(0, order).view(shape)


class Source(NamedTuple):
    """What an attention reads: tokens [B,M,D] as their padding leaves them, and the bias on the
    scores, broadcastable to [B,H,Q,M]; None: 0."""

    tokens: Tensor
    bias: Tensor | None
    padding: Padding


def prepare_memory(memory: Tensor, mask: Tensor | None, dtype: torch.dtype,
                   training: bool = False) -> Source:
    """memory [B,M,D] with zeros at padding, and a bias [B,1,1,M] that shuts it out; mask [B,M].

    Zero memory has zero values in every layer: attention over a fully masked row is exactly 0.
    """
    padding = Padding(mask, training)
    if mask is None:
        return Source(memory, None, padding)
    memory = padding.unpad(memory.masked_fill(~mask[..., None], 0.0))
    return Source(memory, mask_bias(mask, dtype), padding)


# ------------------------------------------------------------ layers
def onednn_computes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply by this weight in this type: on a CPU that has it."""
    if weight.device.type != "cpu":
        return False
    known = {torch.float32: torch.backends.mkldnn.is_available,
             torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return dtype in known and known[dtype]()


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,in], weight [out,in] as it is or packed -> x W^T [...,out], without gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class FrozenProduct(torch.autograd.Function):
    """x W^T for a W that does not learn, in float32 on a CPU: oneDNN needs two thirds to nine
    tenths of the time of the library behind F.linear. But it prepares each new shape for about a
    millisecond, which small products do not earn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        y = onednn_product(x.flatten(0, -2), weight)
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], -1])  # a caller may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        weight, = ctx.saved_tensors
        return onednn_product(dy.contiguous(), weight.T), None


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,in] -> x W^T [...,out], for a large frozen fp32 weight on a CPU by oneDNN."""
    frozen = not (weight.requires_grad and torch.is_grad_enabled())
    large = weight.numel() >= ONEDNN_PAYS
    single = x.dtype == weight.dtype == compute_dtype(x) == torch.float32
    if frozen and large and single and x.numel() > 0 and onednn_computes(weight, torch.float32):
        return FrozenProduct.apply(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear without bias, drawn from N(0, std^2)."""

    def __init__(self, width_in: int, width_out: int, std: float) -> None:
        super().__init__(width_in, width_out, bias=False)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)

    def parts(self) -> tuple[list[Tensor], list[Tensor], None]:
        """As Product asks."""
        return [self.weight], [], None


def dropout_factors(like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape, type and place of `like`.

    p is rounded to a multiple of 2^-16: on a CPU one random 64-bit word serves four elements, which
    takes a third of the time of the Bernoulli draws of F.dropout.
    """
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None)
    draws = words.view(torch.int16)[:like.numel()].view(like.shape)  # uniform in -2^15 .. 2^15 - 1
    least = min(round(p * 2 ** 16), 2 ** 16 - 1) - 2 ** 15  # of the draws that keep an element
    return (draws >= least).to(like.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """x with each element dropped with probability p, or scaled by 1 / (1 - p), in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if x.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(x)
        return x * dropout_factors(x, self.p)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention of x over a source: x itself, or a memory."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        D, H, K = config.d_model, config.num_heads, config.d_kv
        self.heads = H
        self.q = Linear(D, H * K, (D * K) ** -0.5)  # K^-0.5: the scaling that the scores lack
        self.k = Linear(D, H * K, D ** -0.5)
        self.v = Linear(D, H * K, D ** -0.5)
        self.o = Linear(H * K, D, (H * K) ** -0.5)
        self.dropout = Dropout(config.dropout_rate)

    def keys_values(self, source: Source) -> list[Tensor]:
        """-> keys, values [B,H,M,K]."""
        return [source.padding.split(layer(source.tokens), self.heads)
                for layer in (self.k, self.v)]

    def forward(self, x: Tensor, padding: Padding, source: Source) -> Tensor:
        """x [B,Q,D] as its padding leaves it -> in that shape."""
        q = padding.split(self.q(x), self.heads)
        return self.o(padding.merge(self.attend(q, *self.keys_values(source), source.bias)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q [B,H,Q,K], k and v [B,H,M,K], bias broadcastable to [B,H,Q,M] -> [B,H,Q,K]."""
        if q.device.type == "cpu" and self.training:
            # SDPA has no fused kernel for dropout there, and a slow backward pass without.
            scores = q @ k.mT
            scores = scores if bias is None else scores.add_(bias)
            return self.dropout(scores.softmax(-1)) @ v
        drop = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=1.0)


class FeedForward(nn.Module):
    """v1.0: down(relu(up x)); v1.1: down(gelu(gate x) * up x), gelu in its tanh form."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        D, width = config.d_model, config.d_ff
        self.gate = Linear(D, width, D ** -0.5) if config.gated else None
        self.up = Linear(D, width, D ** -0.5)
        self.down = Linear(width, D, width ** -0.5)
        self.dropout = Dropout(config.dropout_rate)

    @property
    def entrances(self) -> list[nn.Module]:
        """What reads the input."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    def activate(self, *read: Tensor) -> Tensor:
        """What the entrances read -> what `down` reads."""
        *gate, up = read
        return F.gelu(gate[0], approximate="tanh") * up if gate else F.relu(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activate(*(part(x) for part in self.entrances))))


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward: normed before, added after."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        D, eps = config.d_model, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(D, eps)
        self.self_attention = Attention(config)
        self.cross_attention_norm = RMSNorm(D, eps) if decoder else None
        self.cross_attention = Attention(config) if decoder else None
        self.feed_forward_norm = RMSNorm(D, eps)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor, padding: Padding,
                memory: Source | None = None) -> Tensor:
        """x [B,S,D] as its padding leaves it -> in that shape."""
        source = Source(self.self_attention_norm(x), bias, padding)
        x = x + self.dropout(self.self_attention(source.tokens, padding, source))
        if self.cross_attention is not None:
            normed = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(normed, padding, memory))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """Blocks between an input dropout and a final norm: an encoder, or a decoder."""

    def __init__(self, config: T5Config, num_layers: int, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.furthest = decoder, config.relative_attention_max_distance
        self.recompute = False  # in training, keep only what enters a block; the rest is made again
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.relative_bias.weight, std=config.d_model ** -0.5)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(num_layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def self_bias(self, S: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Relative bias with causal and padding mask folded in, [B or 1,H,S,S], for all layers.
        It carries a gradient only where the bias weight does; without, SDPA's fused kernels run."""
        weight, M = self.relative_bias.weight, S + -S % 8  # padded storage: see mask_bias
        distance = torch.arange(1 - S, M, device=weight.device)
        bucket = relative_buckets(distance, not self.decoder, weight.shape[0], self.furthest)
        values = F.embedding(bucket, weight).to(dtype).T  # [H, S-1+M], one per distance
        # Query i reads M distances from -i on: the window that starts at place S-1-i of `values`.
        bias = values.unfold(1, M, 1).flip(1)[None].contiguous()
        if self.decoder:
            later = torch.ones(S, M, dtype=torch.bool, device=weight.device).triu(1)
            bias = bias.masked_fill(later, torch.finfo(dtype).min)
        if mask is not None:
            padding = ~F.pad(mask, (0, M - S))[:, None, None]
            bias = bias.masked_fill(padding, torch.finfo(dtype).min)
        return bias[..., :S]

    def forward(self, hidden: Tensor, mask: Tensor | None, memory: Tensor | None = None,
                memory_mask: Tensor | None = None) -> Tensor:
        """hidden [B,S,D], mask [B,S], memory [B,M,D] and its mask -> [B,S,D], of no meaning at
        padding; mask None: all real. A decoder's padding must come last: no real token sees it
        there."""
        dtype, padding = compute_dtype(hidden), Padding(mask, self.training)
        source = prepare_memory(memory, memory_mask, dtype, self.training) if self.decoder else None
        bias = self.self_bias(hidden.shape[1], None if self.decoder else mask, dtype)
        x = self.dropout(padding.unpad(hidden))
        for block in self.blocks:
            arguments = (x, bias, padding, source)
            again = self.recompute and self.training and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return padding.pad(self.dropout(self.final_norm(x)))


# ------------------------------------------------------------ decoding
#
# Whoever decodes multiplies a few tokens by all weights, step after step: what counts is how fast
# weights are read and how little is done besides.  So the decoder has a second form here, for one
# token of each row: products that read one input are one, packed for few rows; keys and values are
# kept; nothing is asked twice that cannot change meanwhile.
class Packed:
    """x -> x [W_1; W_2; ...]^T, or x [W_1, W_2, ...]^T for dim 1: a copy of the weights for few
    rows.

    F.linear reads a weight at less than half of a CPU's memory speed there, the blocks in which
    oneDNN lays the copy out at most of it, and more of it the larger the product is.
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
    """What `make` makes of the weights in a type, kept with `owner` until one is written to.

    A write through another view of the storage, such as an optimizer's flat vector, goes unseen:
    T5.train() therefore drops what is kept.  Weights of inference mode count no writes: nothing is
    kept for them.
    """
    if any(w.is_inference() for w in weights):
        return make()
    key = dtype, *((w.data_ptr(), w._version) for w in weights)
    if getattr(owner, "packed", (None,))[0] != key:
        owner.packed = key, make()
    return owner.packed[1]


class Product:
    """What layers that read one input make of the next token of each row, in one product.

    Each layer computes W_0 x + up between(down x) and says so by `parts()`: the matrices [W_0,
    *down], one below the other, those of `up`, side by side (none: the layer is W_0 x), and the
    function between.  Layers that have no such form, or do not want it, are called instead; so are
    plain linears on a GPU, where copies of them would gain little for their memory.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.layers, self.down = layers, None
        parts = [getattr(layer, "parts", lambda: None)() for layer in layers]
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
        """x [rows,1,in] -> [rows,1,out] of each layer."""
        if self.down is None:
            return [layer(x) for layer in self.layers]
        read = self.down(x)
        if len(self.heights) == 1:
            return [read]
        pieces = iter(read.split_with_sizes(self.heights, -1))
        return [next(pieces) if up is None else next(pieces) + up(between(next(pieces)))
                for up, between in zip(self.up, self.between)]


def captured(work: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
    """A CUDA graph of what `work` does, and the tensor that it answers with each time the graph is
    replayed; nothing is computed yet.  pool: the memory that other graphs have used, or None."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: another one may be NCCL's.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        answer = work()
    return graph, answer


class IncrementalBlock:
    """A decoder block for the next token of each row: its products, its keys and values so far, and
    those of the memory, which are made once per request and shared by its rows (beams).  Products
    compute in `dtype`, attention in the type of the biases."""

    def __init__(self, block: Block, memory: Source, rows: int, steps: int,
                 dtype: torch.dtype) -> None:
        self.block, self.heads = block, block.self_attention.heads
        self.rows = Padding(None, training=False)
        own, cross, feed = block.self_attention, block.cross_attention, block.feed_forward
        self.own = [Product(layers, dtype) for layers in ((own.q, own.k, own.v), (own.o,))]
        self.cross = [Product(layers, dtype) for layers in ((cross.q,), (cross.o,))]
        self.feed = [Product(layers, dtype) for layers in (feed.entrances, (feed.down,))]
        self.memory_keys, self.memory_values = (
            t.to(memory.bias.dtype) for t in cross.keys_values(memory))  # [B,H,M,K]
        _, H, _, K = self.memory_keys.shape
        self.keys, self.values = self.memory_keys.new_empty(2, rows, H, steps, K)

    def __call__(self, x: Tensor, bias: Tensor, memory_bias: Tensor,
                 place: Tensor | None) -> Tensor:
        """x [rows,1,D], the tokens number `place` [1] -> [rows,1,D].  bias [1,H,1,width] over the
        first tokens: up to `place`, if that is None, or with those to come shut out."""
        x = self.self_attention(x, bias, place)
        return self.feed_forward(self.cross_attention(x, memory_bias))

    def self_attention(self, x: Tensor, bias: Tensor, place: Tensor | None) -> Tensor:
        block, (read, write), width = self.block, self.own, bias.shape[-1]
        q, *new = (self.rows.split(y, self.heads) for y in read(block.self_attention_norm(x)))
        for kept, one in zip((self.keys, self.values), new):
            if place is None:
                kept[:, :, width - 1:width] = one
            else:
                kept.index_copy_(2, place, one.to(kept.dtype))
        so_far = self.keys[:, :, :width], self.values[:, :, :width]
        return x + write(self.attend(q, *so_far, bias))[0]

    def cross_attention(self, x: Tensor, bias: Tensor) -> Tensor:
        """The beams of a request are further queries on the same keys."""
        block, (read, write) = self.block, self.cross
        q, = read(block.cross_attention_norm(x))
        q = self.rows.split(q.reshape(len(self.memory_keys), -1, q.shape[-1]), self.heads)
        out = self.attend(q, self.memory_keys, self.memory_values, bias)
        return x + write(out.reshape(len(x), 1, -1))[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        block, (read, write) = self.block, self.feed
        return x + write(block.feed_forward.activate(*read(block.feed_forward_norm(x))))[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out = self.block.self_attention.attend(q.to(k.dtype), k, v, bias)
        return self.rows.merge(out)

    def select(self, rows: Tensor, requests: Tensor | None, length: int) -> None:
        """See IncrementalDecoder.select; of the keys and values, `length` are there."""
        for old in (self.keys, self.values):
            old[:len(rows), :, :length] = old[:, :, :length].index_select(0, rows)
        self.keys, self.values = self.keys[:len(rows)], self.values[:len(rows)]
        if requests is not None:
            self.memory_keys = self.memory_keys.index_select(0, requests)
            self.memory_values = self.memory_values.index_select(0, requests)


class IncrementalDecoder:
    """Decoder and head, a token of each row at a time, at most `steps`; as many rows as requests,
    or `beams` times as many.

    On a GPU a step may be captured as a CUDA graph, which launches its kernels at once: the host
    would take longer to launch them one by one than the GPU to run them.  A graph knows no numbers
    of its own, so the token's place is a tensor and attention reads a fixed width, which doubles
    when the tokens have filled it; then, and when rows have left, another graph is captured.
    """

    WIDTH = 32  # of the first graph

    def __init__(self, model: "T5", memory: Tensor, mask: Tensor, beams: int, steps: int) -> None:
        self.model, self.mask, self.length, dtype = model, mask, 0, compute_dtype(memory)
        # On a CPU SDPA for few queries takes a quarter of the time in fp32 that it takes in bf16.
        attends = torch.promote_types(dtype, torch.float32) if mask.device.type == "cpu" else dtype
        source = prepare_memory(memory, mask, attends)
        self.memory_bias = source.bias
        self.blocks = [IncrementalBlock(block, source, len(memory) * beams, steps, dtype)
                       for block in model.decoder.blocks]
        self.bias = model.decoder.self_bias(steps, None, attends)  # [1,H,steps,steps]
        weight = model.head_weight
        self.head = remembered(weight, [weight], dtype, lambda: Packed([weight], dtype))
        self.captures, self.width = model.graphs and memory.is_cuda, 0
        self.place = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.graph, self.token, self.logits = None, None, None
        for block in self.blocks if self.captures else ():
            # What is shut out counts for nothing, unless it is NaN.
            block.keys.zero_(), block.values.zero_()

    def __call__(self, token: Tensor) -> Tensor:
        """The next token of each row [rows,1] -> logits of the one after it [rows,C]."""
        self.length += 1
        if self.captures:
            return self.replay(token)
        return self.step(token, self.bias[:, :, self.length - 1:self.length, :self.length])

    def step(self, token: Tensor, bias: Tensor, place: Tensor | None = None) -> Tensor:
        """tokens [rows,1] -> logits [rows,C]; bias and place: see IncrementalBlock."""
        x = self.model.embed(token)
        for block in self.blocks:
            x = block(x, bias, self.memory_bias, place)
        return self.head(self.model.scaled(self.model.decoder.final_norm(x)))[:, 0]

    def step_at_place(self) -> Tensor:
        """`step` from tensors alone."""
        bias = self.bias[..., :self.width].index_select(2, self.place)  # or fewer, if steps are
        return self.step(self.token, bias, self.place)

    def replay(self, token: Tensor) -> Tensor:
        """A step by the graph, or, where that is missing, as ever: what torch prepares at first
        use, a capture must find prepared.  Graphs share their memory: a model keeps the last."""
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
        """Go on with these rows in this order, and with these requests (None: with all)."""
        for block in self.blocks:
            block.select(rows, requests, self.length)
        if requests is not None:
            self.graph = None
            self.mask = self.mask[requests]
            self.memory_bias = mask_bias(self.mask, self.bias.dtype)


class Search:
    """Running beams and best finished ones of each open request; greedy search is one beam.

    As transformers 5 does with length_penalty 1 and early_stopping false: of the 2 * beams best
    continuations, those that do not end run on; those that end and are among the first `beams`
    are kept by their mean log-probability. A request is done when it keeps `beams` of them and its
    best running beam, were it to end now, is no better. Greedy search is done at its first end.
    """

    def __init__(self, B: int, beams: int, steps: int, config: T5Config,
                 device: torch.device) -> None:
        self.eos, self.pad = config.eos_token_id, config.pad_token_id
        self.tokens = torch.full((B, beams, steps), config.pad_token_id, device=device)
        self.score = torch.full((B, beams), NEVER, device=device)
        self.best, self.best_score = self.tokens.clone(), self.score.clone()
        self.score[:, 0] = 0.0  # beams start equal, so only the first may be continued
        self.done = torch.zeros(B, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor, banned: Tensor, n: int) -> Tensor:
        """Take the n-th token from logits [B*beams,C] -> the row that each row continues."""
        (B, beams, steps), C = self.tokens.shape, logits.shape[-1]
        if beams == 1:  # greedy: one beam competes with nobody, so its logits need no sorting
            token = logits.masked_fill(banned, -math.inf).argmax(-1)
            self.tokens[:, 0, n - 1] = token.masked_fill(self.done, self.pad)
            self.best = self.tokens
            self.done |= token == self.eos
            return torch.arange(B, device=token.device)
        # Banned after the softmax, as in transformers: scores stay the model's probabilities.
        gain = logits.log_softmax(-1).masked_fill(banned, -math.inf)
        score, flat = (gain.view(B, beams, C) + self.score[..., None]).flatten(1).topk(2 * beams)
        tokens = self.tokens.take_along_dim((flat // C)[..., None], 1)
        tokens[..., n - 1] = flat % C
        ended = (flat % C == self.eos) | (n == steps)
        ending = torch.where(ended & ~self.done[:, None], score / n, NEVER)[:, :beams]
        self.best_score, keep = torch.cat((self.best_score, ending), 1).topk(beams)
        self.best = torch.cat((self.best, tokens[:, :beams]), 1).take_along_dim(keep[..., None], 1)
        self.score, keep = torch.where(ended, score + NEVER, score).topk(beams)
        self.tokens = tokens.take_along_dim(keep[..., None], 1)
        hopeless = self.score[:, 0] / n <= self.best_score.amin(1)
        self.done |= (self.best_score > NEVER / 2).all(1) & hopeless
        first_row = torch.arange(0, B * beams, beams, device=flat.device)[:, None]
        return ((flat // C).gather(1, keep) + first_row).flatten()

    def keep(self, requests: Tensor) -> None:
        """Drop all requests but these."""
        for name in ("tokens", "score", "best", "best_score", "done"):
            setattr(self, name, getattr(self, name)[requests])


# ------------------------------------------------------------ model
class T5(nn.Module):
    """Shared embedding, encoder, decoder, head; T5(config) draws Mesh TensorFlow's init."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.graphs, self.graph = False, None  # whether CUDA graphs decode, and the last of them
        self.shared = nn.Embedding(config.vocab_size, config.d_model)  # drawn from N(0, 1)
        self.encoder = Stack(config, config.num_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, decoder=True)
        self.lm_head = None if config.tie_head else Linear(config.d_model, config.vocab_size, 1.0)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B,S] -> [B,S,D]."""
        return self.shared(ids)

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None = None,
               inputs_embeds: Tensor | None = None) -> Tensor:
        """ids [B,S] or embeddings [B,S,D], mask [B,S] (None: all real) -> [B,S,D]."""
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.encoder(hidden, None if attention_mask is None else attention_mask.bool())

    @property
    def head_weight(self) -> Tensor:
        return (self.lm_head or self.shared).weight

    def head(self, hidden: Tensor) -> Tensor:
        """[...,D] -> logits [...,C]."""
        return project(self.scaled(hidden), self.head_weight)

    def scaled(self, hidden: Tensor) -> Tensor:
        """hidden as the head's matrix wants it."""
        return hidden * self.config.d_model ** -0.5 if self.config.scale_logits else hidden

    def decode_hidden(self, decoder_input_ids: Tensor, memory: Tensor,
                      memory_mask: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """ids [B,T], memory [B,M,D], its mask [B,M] (None: all real) -> [B,T,D] before the head.
        mask [B,T] saves work and changes no real token; the target's padding comes last."""
        memory_mask = None if memory_mask is None else memory_mask.bool()
        return self.decoder(self.embed(decoder_input_ids), mask, memory, memory_mask)

    def decode(self, decoder_input_ids: Tensor, memory: Tensor,
               memory_mask: Tensor | None = None) -> Tensor:
        """The same -> logits [B,T,C]."""
        return self.head(self.decode_hidden(decoder_input_ids, memory, memory_mask))

    def train(self, mode: bool = True) -> "T5":
        """Training does without the copies of `remembered`, which it would make outdated."""
        if mode:
            self.graph = None
            for parameter in self.parameters():
                vars(parameter).pop("packed", None)
        return super().train(mode)

    def shift_right(self, labels: Tensor) -> Tensor:
        """labels [B,T] -> decoder inputs [B,T]: start token first, -100 becomes padding."""
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None,
                labels: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B,S], mask [B,S], labels [B,T] -> logits [B,T,C], mean loss over labels not -100."""
        memory = self.encode(input_ids, attention_mask)
        mask = (labels != -100).flip(1).cumsum(1).flip(1) > 0  # up to the last label of a row
        logits = self.head(self.decode_hidden(self.shift_right(labels), memory, attention_mask,
                                              mask))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                 max_new_tokens: int = 64, num_beams: int = 1, memory: Tensor | None = None,
                 banned_ids: list[int] | None = None,
                 on_rows: Callable[[Tensor], None] | None = None) -> Tensor:
        """ids and mask [B,S], or memory [B,M,D] and its mask -> ids [B,<=max_new_tokens].

        The ids have no start token, and padding after the end token. `banned_ids`, and ids past
        T5's vocabulary, are never produced. Requests that are done leave the batch; `on_rows` is
        told the request of each computed row, [rows], whenever the rows change.
        """
        if self.training or max_new_tokens < 1 or num_beams < 1:
            raise ValueError("generate needs model.eval(), at least one token and one beam; got "
                             f"training={self.training}, {max_new_tokens=}, {num_beams=}")
        tell = on_rows or (lambda rows: None)
        if (input_ids if memory is None else memory).shape[:2].numel() == 0:
            raise ValueError("generate: expected at least one row and one source token, got none")
        memory = self.encode(input_ids, attention_mask) if memory is None else memory
        mask = memory.new_ones(memory.shape[:2]) if attention_mask is None else attention_mask
        decoder = IncrementalDecoder(self, memory, mask.bool(), num_beams, max_new_tokens)
        search = Search(len(memory), num_beams, max_new_tokens, self.config, memory.device)
        banned = torch.arange(self.config.vocab_size, device=memory.device) >= FIRST_UNUSED_ID
        banned[banned_ids or []] = True
        requests = torch.arange(len(memory), device=memory.device)
        out, start = search.best[:, 0].clone(), self.config.decoder_start_token_id
        token = requests.new_full((len(memory) * num_beams, 1), start)
        if num_beams > 1:
            tell(requests.repeat_interleave(num_beams))
        for n in range(1, max_new_tokens + 1):
            parents, kept = search.advance(decoder(token).float(), banned, n), None
            out[requests] = search.best[:, 0]
            if n % POLL.get(memory.device.type, 8) == 0 and search.done.any():
                kept = (~search.done).nonzero()[:, 0]
                if len(kept) == 0:
                    break
                if decoder.captures and 2 * len(kept) > len(requests):
                    kept = None  # a new graph costs more than some rows too many
                else:
                    requests, parents = requests[kept], parents.view(-1, num_beams)[kept].flatten()
                    search.keep(kept)
                    tell(requests.repeat_interleave(num_beams))
            if num_beams > 1 or kept is not None:
                decoder.select(parents, kept)
            token = search.tokens[..., n - 1].reshape(-1, 1)
        ended = out == self.config.eos_token_id
        length = torch.where(ended.any(1), ended.int().argmax(1) + 1, max_new_tokens)
        return out[:, :length.max()]

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "T5":
        """Load a Hugging Face directory: config.json, and one or many .safetensors files."""
        folder = Path(folder)
        if dtype not in (torch.float32, torch.bfloat16):
            raise WeightsError(f"{folder}: T5 computes in float32 or bfloat16; got {dtype}; in "
                               "float16 its feed-forward overflows: pass torch.bfloat16")
        raw, stored = read_json(folder / "config.json"), open_weights(folder)
        only_copy = "shared.weight" not in stored and COPIES[0] in stored
        shared = COPIES[0] if only_copy else "shared.weight"
        same = {key for key in stored.keys() & {*COPIES, "lm_head.weight"} if shared in stored
                and torch.equal(*(stored[k].get_tensor(k).float() for k in (key, shared)))}
        tied = "lm_head.weight" in same or "lm_head.weight" not in stored
        config = T5Config.from_hf(raw, folder / "config.json", tied)
        with torch.device("meta"):
            model = cls(config)
        names = hf_names(config) | {"shared.weight": shared}
        state = read_weights(folder, stored, model, names, {*same, UNUSED}, dtype)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what from_pretrained reads; both files are renamed into place when whole."""
        folder, state, names = Path(folder), self.state_dict(), hf_names(self.config)
        if state.keys() != names.keys():
            odd = sorted(state.keys() ^ names.keys())[:4]
            raise WeightsError(f"{folder}: expected a plain T5, as Hugging Face knows it; "
                               f"this one differs in {odd}; save it before adapting it")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {names[ours]: tensor.contiguous() for ours, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        raw = asdict(self.config) | {"model_type": "t5", "is_encoder_decoder": True,
                                     "architectures": ["T5ForConditionalGeneration"]}
        raw["tie_word_embeddings"] = raw.pop("tie_head")
        raw["scale_decoder_outputs"] = raw.pop("scale_logits")
        (folder / "config.json.tmp").write_text(json.dumps(raw, indent=2) + "\n")
        # That library lets only the owner read its files.
        shutil.copymode(folder / "config.json.tmp", folder / "model.safetensors.tmp")
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / f"{name}.tmp", folder / name)


# ------------------------------------------------------------ weights
# Our parameters -> Hugging Face's keys, all ending in .weight. {s} encoder or decoder, {i} layer,
# {p} q k v o; {f} is 1 in the encoder and 2 in the decoder; {up} is wi in v1.0 and wi_1 in v1.1.
WEIGHT_MAP = {
    "shared": "shared",
    "lm_head": "lm_head",
    "{s}.final_norm": "{s}.final_layer_norm",
    "{s}.relative_bias": "{s}.block.0.layer.0.SelfAttention.relative_attention_bias",
    "{s}.blocks.{i}.self_attention.{p}": "{s}.block.{i}.layer.0.SelfAttention.{p}",
    "{s}.blocks.{i}.self_attention_norm": "{s}.block.{i}.layer.0.layer_norm",
    "decoder.blocks.{i}.cross_attention.{p}": "decoder.block.{i}.layer.1.EncDecAttention.{p}",
    "decoder.blocks.{i}.cross_attention_norm": "decoder.block.{i}.layer.1.layer_norm",
    "{s}.blocks.{i}.feed_forward.gate": "{s}.block.{i}.layer.{f}.DenseReluDense.wi_0",
    "{s}.blocks.{i}.feed_forward.up": "{s}.block.{i}.layer.{f}.DenseReluDense.{up}",
    "{s}.blocks.{i}.feed_forward.down": "{s}.block.{i}.layer.{f}.DenseReluDense.wo",
    "{s}.blocks.{i}.feed_forward_norm": "{s}.block.{i}.layer.{f}.layer_norm",
}
# Never loaded: copies, if they equal shared; a bias in v1.0's files that no T5 ever used.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def hf_names(config: T5Config) -> dict[str, str]:
    """Name of every parameter of T5(config) -> its key in Hugging Face's files."""
    names, up = {}, "wi_1" if config.gated else "wi"
    stacks = ("encoder", config.num_layers, 1), ("decoder", config.num_decoder_layers, 2)
    for s, layers, f in stacks:
        for (ours, theirs), i, p in itertools.product(WEIGHT_MAP.items(), range(layers), "qkvo"):
            if not (s == "encoder" and ours.startswith("decoder")
                    or ours == "lm_head" and config.tie_head
                    or ours.endswith("gate") and not config.gated):
                names[ours.format(s=s, i=i, p=p) + ".weight"] = theirs.format(
                    s=s, i=i, p=p, f=f, up=up) + ".weight"
    return names
