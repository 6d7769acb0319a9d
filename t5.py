"""T5 encoder-decoder (v1.0, v1.1, flan): layers, decoding, and weights in Hugging Face's layout.

A transformer that normalises before each sublayer and has no biases in its linear layers. Positions
enter as a learned bias on the attention scores, which depends on the distance between key and query
and is shared by all layers of a stack. Scores are not divided by sqrt(K): the initialisation of q
makes up for it. Any module that can be called like nn.Linear may replace the q, k, v or o of an
attention. fast/ holds faster forms of these layers.

References: Raffel et al. 2020, arXiv 1910.10683; gated feed-forward: Shazeer 2020, arXiv
2002.05202; weight names and decoding rules: Hugging Face transformers, models/t5 and generation.
Shapes: B batch, S source tokens, T target tokens, D model width, H heads, K head width, C
vocabulary; in attention Q queries and M keys. Masks are bool, True = real token.
"""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.files import WeightsError, note, read_json, write_whole
from engine.weights import Unfilled, load_weights, odd_fields, open_weights

FIRST_UNUSED_ID = 32100  # where T5's vocabulary ends; hub files add untrained rows behind it
POLL = {"cpu": 1, "cuda": 8}  # steps between two looks for finished requests: a look stalls a GPU
NEVER = -1e9  # a score that loses against any real one


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
        if not odd:  # now these can be compared
            odd = [f"{name} = {getattr(self, name)}" for name in ids
                   if getattr(self, name) >= self.vocab_size]
        buckets, far = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if not odd and far <= buckets // 2:  # the nearest have a bucket each: relative_buckets
            odd = [f"relative_attention_max_distance = {far} beside {buckets} buckets"]
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            odd.append(f"feed_forward_proj = {self.feed_forward_proj!r}")
        if odd:
            raise WeightsError("expected the numbers of a T5, ids below vocab_size and 'relu' or "
                               f"'gated-gelu', got {', '.join(odd)}; use a T5's or flan-T5's own")

    @classmethod
    def from_hf(cls, raw: dict, path: Path, tie_head: bool) -> "T5Config":
        """The configuration in `raw`, a parsed config.json at `path`; WeightsError if not a T5's.

        tie_head is read off the weights, as transformers 5 writes tie_word_embeddings = true even
        beside a separate lm_head. That key only stands in for an absent scale_decoder_outputs."""
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        scale = raw.get("scale_decoder_outputs")
        if scale is None:
            scale = raw.get("tie_word_embeddings", True)
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
    `furthest`. Bidirectional: the upper half of the buckets is for keys to the right of the query.
    Otherwise keys to the right, which a decoder masks anyway, count as distance 0."""
    first = torch.zeros_like(distance)  # the bucket of distance 0 on this side
    if bidirectional:
        buckets //= 2
        first, distance = (distance > 0) * buckets, -distance.abs()
    distance = (-distance).clamp(min=0)
    near = buckets // 2  # as many distances have a bucket each
    growth = torch.log(distance.clamp(min=1).float() / near) / math.log(furthest / near)
    shared = (near + (growth * (buckets - near)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < near, distance, shared)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which attention runs on x, under autocast too; WeightsError for float16."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype == torch.float16:
        raise WeightsError("T5 computes in float32 or bfloat16; got float16, in which its hidden "
                           "states overflow to inf; use torch.bfloat16")
    return dtype


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask [B,M] -> [B,1,1,M]: 0 at real keys, the lowest finite value at padding.

    Finite, so that a row without any real key gives numbers. The storage is padded because the
    memory-efficient SDPA kernel copies a bias whose strides are not multiples of 8."""
    M = mask.shape[1]
    mask = F.pad(mask, (0, -M % 8))
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :M]


def prepare_memory(memory: Tensor, mask: Tensor | None,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """memory [B,M,D] and its mask [B,M] (None: all real) -> the memory with zeros at padding, and
    the bias [B,1,1,M] (or None) that hides padding from attention.

    Where the memory is 0, so is v = W x in every layer: attention to a row of padding gives 0."""
    if mask is None:
        return memory, None
    return memory.masked_fill(~mask[..., None], 0.0), mask_bias(mask, dtype)


def split_heads(x: Tensor, H: int) -> Tensor:
    """[B,S,H K] -> [B,H,S,K]."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B,H,S,K] -> [B,S,H K]."""
    return x.transpose(1, 2).flatten(2)


# ------------------------------------------------------------ layers
class Linear(nn.Linear):
    """A linear layer without bias whose weight is drawn from N(0, std^2)."""

    def __init__(self, width_in: int, width_out: int, std: float) -> None:
        super().__init__(width_in, width_out, bias=False)
        nn.init.normal_(self.weight, std=std)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean taken in float32, in the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention: softmax(q k^T + bias) v, with q of x, and k and v of a source."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        D, H, K = config.d_model, config.num_heads, config.d_kv
        self.heads = H
        self.q = Linear(D, H * K, (D * K) ** -0.5)  # K^-0.5: the scaling that the scores lack
        self.k = Linear(D, H * K, D ** -0.5)
        self.v = Linear(D, H * K, D ** -0.5)
        self.o = Linear(H * K, D, (H * K) ** -0.5)
        self.dropout = nn.Dropout(config.dropout_rate)  # of the attention weights

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        """x [B,Q,D], source [B,M,D], bias broadcastable to [B,H,Q,M] (None: 0) -> [B,Q,D]."""
        q = split_heads(self.q(x), self.heads)
        return self.o(join_heads(self.attend(q, *self.keys_values(source), bias)))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source [B,M,D] -> keys and values, both [B,H,M,K]."""
        return split_heads(self.k(source), self.heads), split_heads(self.v(source), self.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q [B,H,Q,K], k and v [B,H,M,K], bias broadcastable to [B,H,Q,M] -> [B,H,Q,K]."""
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
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = F.relu(self.up(x))
        else:
            hidden = F.gelu(self.gate(x), approximate="tanh") * self.up(x)
        return self.down(self.dropout(hidden))


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, and feed-forward, each added to its input."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        D, eps = config.d_model, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(D, eps)
        self.self_attention = Attention(config)
        self.cross_attention_norm = RMSNorm(D, eps) if decoder else None
        self.cross_attention = Attention(config) if decoder else None
        self.feed_forward_norm = RMSNorm(D, eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None,
                memory_bias: Tensor | None = None) -> Tensor:
        """x [B,S,D], bias [B or 1,H,S,S], memory and its bias from prepare_memory -> [B,S,D]."""
        normed = self.self_attention_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, bias))
        if self.cross_attention is not None:
            normed = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(normed, memory, memory_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """An encoder or a decoder: blocks between an input dropout and a final norm."""

    def __init__(self, config: T5Config, num_layers: int, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.furthest = decoder, config.relative_attention_max_distance
        self.recompute = False  # in training, save memory by computing each block twice
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.relative_bias.weight, std=config.d_model ** -0.5)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(num_layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def self_bias(self, S: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias [B or 1,H,S,S] of self-attention, the same in all blocks: a learned value for
        each distance; the lowest finite value at padding (mask [B,S], None: all tokens are real)
        and, in a decoder, at tokens to come. Its storage is padded as in mask_bias."""
        extra, lowest, weight = -S % 8, torch.finfo(dtype).min, self.relative_bias.weight
        position = torch.arange(S + extra, device=weight.device)
        distance = position - position[:S, None]  # [S,S+extra], of each key from each query
        buckets = relative_buckets(distance, not self.decoder, len(weight), self.furthest)
        bias = self.relative_bias(buckets).to(dtype).permute(2, 0, 1)[None].contiguous()
        if self.decoder:
            bias = bias.masked_fill(distance > 0, lowest)
        if mask is not None:
            bias = bias.masked_fill(~F.pad(mask, (0, extra))[:, None, None], lowest)
        return bias[..., :S]

    def forward(self, hidden: Tensor, mask: Tensor | None, memory: Tensor | None = None,
                memory_mask: Tensor | None = None) -> Tensor:
        """hidden [B,S,D], mask [B,S], in a decoder memory [B,M,D] and memory_mask [B,M] ->
        [B,S,D], of no meaning at padding. A mask of None: all tokens are real.

        A decoder makes no use of its mask: its padding comes last, where no real token sees it."""
        dtype, memory_bias = compute_dtype(hidden), None
        if self.decoder:
            mask = None
            memory, memory_bias = prepare_memory(memory, memory_mask, dtype)
        bias = self.self_bias(hidden.shape[1], mask, dtype)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        x = self.dropout(hidden)
        for block in self.blocks:
            inputs = x, bias, memory, memory_bias
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.dropout(self.final_norm(x))


# ------------------------------------------------------------ decoding
class CachedDecoder:
    """The decoder and its head, called with one token of each row after the other.

    Each block has a cache of the keys and values of the tokens so far: a call projects one token,
    appends its key and value to the cache, and attends to all of it. The keys and values of the
    memory are computed once for a request. Its beams, rows that follow each other, share them."""

    shrinks_at = 1.0  # finished requests leave when the share of unfinished ones falls to this

    def __init__(self, model: "T5", memory: Tensor, mask: Tensor, beams: int, steps: int) -> None:
        """memory [B,M,D], mask [B,M]; rows = B beams, of at most `steps` tokens each."""
        self.model, self.length, dtype = model, 0, compute_dtype(memory)
        if memory.device.type == "cpu":  # for few queries float32 is 4 times as fast as bfloat16
            dtype = torch.promote_types(dtype, torch.float32)
        self.bias = model.decoder.self_bias(steps, None, dtype)  # [1,H,steps,steps]
        memory, self.memory_bias = prepare_memory(memory, mask, dtype)
        self.memory_cache = [[t.to(dtype) for t in block.cross_attention.keys_values(memory)]
                             for block in model.decoder.blocks]  # [B,H,M,K]
        H, K = model.config.num_heads, model.config.d_kv
        empty = memory.new_empty(len(memory) * beams, H, 0, K, dtype=dtype)
        self.cache = [(empty, empty) for _ in model.decoder.blocks]  # [rows,H,tokens so far,K]

    def __call__(self, token: Tensor) -> Tensor:
        """The latest token of each row, [rows,1] -> logits of the one to follow, [rows,C]."""
        self.length += 1
        bias = self.bias[:, :, self.length - 1:self.length, :self.length]
        x = self.model.shared(token)
        for i, block in enumerate(self.model.decoder.blocks):
            layer, normed = block.self_attention, block.self_attention_norm(x)
            self.cache[i] = [torch.cat((old, new.to(old.dtype)), dim=2)
                             for old, new in zip(self.cache[i], layer.keys_values(normed))]
            x = x + layer.o(self.attend(layer, layer.q(normed), self.cache[i], bias))
            layer, q = block.cross_attention, block.cross_attention.q(block.cross_attention_norm(x))
            x = x + layer.o(self.attend(layer, q, self.memory_cache[i], self.memory_bias))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        return self.model.head(self.model.decoder.final_norm(x))[:, 0]

    def attend(self, layer: Attention, q: Tensor, cache: list[Tensor], bias: Tensor) -> Tensor:
        """q [rows,1,H K]; keys and values of each row, [rows,H,M,K], or of each request, [B,H,M,K],
        whose beams then count as its successive queries -> [rows,1,H K]."""
        k, v = cache
        queries = split_heads(q.reshape(len(k), -1, q.shape[-1]), layer.heads)  # [len(k),H,Q,K]
        with torch.autocast(q.device.type, enabled=False):
            out = layer.attend(queries.to(k.dtype), k, v, bias)
        return join_heads(out).reshape(q.shape).to(q.dtype)

    def select(self, rows: Tensor, requests: Tensor | None) -> None:
        """Make the k-th row continue what was row rows[k]; keep only `requests` (None: all)."""
        self.cache = [(k[rows], v[rows]) for k, v in self.cache]
        if requests is not None:
            self.memory_cache = [(k[requests], v[requests]) for k, v in self.memory_cache]
            self.memory_bias = self.memory_bias[requests]


class Search:
    """Beam search over the requests of a batch; with one beam, greedy search.

    As transformers 5 does with length_penalty 1 and early_stopping false: of the 2 * beams best
    continuations, those that do not end run on. Those that end and are among the first `beams`
    compete for `beams` places, by their mean log-probability. A request is done when its places are
    taken and its best running beam, if it ended now, would get none. Greedy: when its beam ends.

    tokens [B,beams,steps] and score [B,beams], the summed log-probability: of the running beams;
    best and best_score, the mean one: of those that have ended; done [B]."""

    def __init__(self, B: int, beams: int, steps: int, config: T5Config,
                 device: torch.device) -> None:
        self.eos, self.pad = config.eos_token_id, config.pad_token_id
        self.tokens = torch.full((B, beams, steps), config.pad_token_id, device=device)
        self.score = torch.full((B, beams), NEVER, device=device)
        self.best, self.best_score = self.tokens.clone(), self.score.clone()
        self.score[:, 0] = 0.0  # beams start equal, so only the first may be continued
        self.done = torch.zeros(B, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor, banned: Tensor, n: int) -> Tensor:
        """Choose the n-th token by logits [B*beams,C] -> the row that each row continues."""
        (B, beams, steps), C = self.tokens.shape, logits.shape[-1]
        if beams == 1:  # greedy: the best token is enough, no score is needed
            token = logits.masked_fill(banned, -math.inf).argmax(-1)
            self.tokens[:, 0, n - 1] = token.masked_fill(self.done, self.pad)
            self.best = self.tokens
            self.done |= token == self.eos
            return torch.arange(B, device=token.device)
        # Banned after the softmax, as in transformers: scores stay the model's probabilities.
        gain = logits.log_softmax(-1).masked_fill(banned, -math.inf).view(B, beams, C)
        score, choice = (self.score[..., None] + gain).flatten(1).topk(2 * beams)
        beam, token = choice // C, choice % C  # all [B,2*beams]
        tokens = self.tokens.take_along_dim(beam[..., None], 1)
        tokens[..., n - 1] = token
        ended = (token == self.eos) | (n == steps)
        ending = torch.where(ended & ~self.done[:, None], score / n, NEVER)[:, :beams]
        self.best_score, order = torch.cat((self.best_score, ending), 1).topk(beams)
        self.best = torch.cat((self.best, tokens[:, :beams]), 1).take_along_dim(order[..., None], 1)
        self.score, order = torch.where(ended, score + NEVER, score).topk(beams)
        self.tokens = tokens.take_along_dim(order[..., None], 1)
        hopeless = self.score[:, 0] / n <= self.best_score.amin(1)
        self.done |= (self.best_score > NEVER / 2).all(1) & hopeless
        first_row = torch.arange(0, B * beams, beams, device=beam.device)[:, None]
        return (first_row + beam.gather(1, order)).flatten()

    def keep(self, requests: Tensor) -> None:
        """Go on with these requests alone."""
        for name in ("tokens", "score", "best", "best_score", "done"):
            setattr(self, name, getattr(self, name)[requests])


# ------------------------------------------------------------ model
class T5(nn.Module):
    """Embedding, encoder, decoder, head; T5(config) is initialised as Mesh TensorFlow does."""
    decoder_class = CachedDecoder  # what generate decodes with

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)  # of encoder and decoder
        self.encoder = Stack(config, config.num_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, decoder=True)
        self.lm_head = None if config.tie_head else Linear(config.d_model, config.vocab_size, 1.0)

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None = None,
               inputs_embeds: Tensor | None = None) -> Tensor:
        """ids [B,S] or embeddings [B,S,D], mask [B,S] (None: all real) -> [B,S,D]."""
        hidden = self.shared(input_ids) if inputs_embeds is None else inputs_embeds
        return self.encoder(hidden, None if attention_mask is None else attention_mask.bool())

    @property
    def head_weight(self) -> Tensor:
        return (self.lm_head or self.shared).weight

    def head(self, hidden: Tensor) -> Tensor:
        """[...,D] -> logits [...,C]."""
        return F.linear(self.scaled(hidden), self.head_weight)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states as the head's matrix expects them: in v1.0 times D^-0.5."""
        return hidden * self.config.d_model ** -0.5 if self.config.scale_logits else hidden

    def decode_hidden(self, decoder_input_ids: Tensor, memory: Tensor,
                      memory_mask: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """ids [B,T], memory [B,M,D], its mask [B,M] (None: all real) -> [B,T,D] before the head.

        mask [B,T]: the real tokens of the target, whose padding comes last. The result at these is
        the same without it; a stack of fast/ computes no others."""
        memory_mask = None if memory_mask is None else memory_mask.bool()
        return self.decoder(self.shared(decoder_input_ids), mask, memory, memory_mask)

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
        T5's vocabulary, are never produced. Requests that are done leave the batch: whenever the
        rows that are computed change, on_rows(index [rows]) is told the request of each."""
        if self.training or max_new_tokens < 1 or num_beams < 1:
            raise ValueError("generate needs model.eval(), at least one token and one beam; got "
                             f"training={self.training}, {max_new_tokens=}, {num_beams=}")
        if (input_ids if memory is None else memory).shape[:2].numel() == 0:
            raise ValueError("generate: expected at least one row and one source token, got none")
        on_rows = on_rows or (lambda index: None)
        memory = self.encode(input_ids, attention_mask) if memory is None else memory
        mask = memory.new_ones(memory.shape[:2]) if attention_mask is None else attention_mask
        decoder = self.decoder_class(self, memory, mask.bool(), num_beams, max_new_tokens)
        search = Search(len(memory), num_beams, max_new_tokens, self.config, memory.device)
        banned = torch.arange(self.config.vocab_size, device=memory.device) >= FIRST_UNUSED_ID
        banned[banned_ids or []] = True
        requests = torch.arange(len(memory), device=memory.device)  # those still in the batch
        out, start = search.best[:, 0].clone(), self.config.decoder_start_token_id
        token = requests.new_full((len(memory) * num_beams, 1), start)
        if num_beams > 1:
            on_rows(requests.repeat_interleave(num_beams))
        for n in range(1, max_new_tokens + 1):
            rows = search.advance(decoder(token).float(), banned, n)
            out[requests] = search.best[:, 0]
            running = None  # which of `requests` go on, if the others leave now
            if n % POLL.get(memory.device.type, 8) == 0 and search.done.any():
                running = (~search.done).nonzero()[:, 0]
                if len(running) == 0:
                    break
                if len(running) > decoder.shrinks_at * len(requests):
                    running = None
            if running is not None:
                requests, rows = requests[running], rows.view(-1, num_beams)[running].flatten()
                search.keep(running)
                on_rows(requests.repeat_interleave(num_beams))
            if num_beams > 1 or running is not None:
                decoder.select(rows, running)
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
        shared = embedding_key(stored, raw)
        copies = {key for key in stored.keys() & {*COPIES, HEAD} - {shared} if shared in stored
                  and torch.equal(*(stored[k].get_tensor(k).float() for k in (key, shared)))}
        tied = HEAD == shared or HEAD in copies or HEAD not in stored
        config = T5Config.from_hf(raw, folder / "config.json", tied)
        if config.gated and config.scale_logits and not tied:
            note(f"{folder}/config.json: scale_decoder_outputs is true for a gated T5 with a head "
                 "of its own, a mistake of transformers 5.0.0; logits are scaled as it says: set "
                 "it to false if this is a T5 v1.1 or flan")
        with torch.device("meta"), Unfilled():
            model = cls(config)
        names = hf_names(config) | {"shared.weight": shared}
        load_weights(folder, stored, model, names, {*copies, UNUSED}, dtype)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what from_pretrained reads; each file appears under its name only when whole."""
        folder, state, names = Path(folder), self.state_dict(), hf_names(self.config)
        if state.keys() != names.keys():
            odd = sorted(state.keys() ^ names.keys())[:4]
            raise WeightsError(f"{folder}: expected a plain T5, as Hugging Face knows it; "
                               f"this one differs in {odd}; save it before adapting it")
        raw = asdict(self.config) | {"model_type": "t5", "is_encoder_decoder": True,
                                     "architectures": ["T5ForConditionalGeneration"]}
        raw["tie_word_embeddings"] = raw.pop("tie_head")
        raw["scale_decoder_outputs"] = raw.pop("scale_logits")
        tensors = {names[ours]: tensor.contiguous() for ours, tensor in state.items()}
        write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_whole(folder / "config.json", (json.dumps(raw, indent=2) + "\n").encode())


# ------------------------------------------------------------ weights
# What Hugging Face's keys say in place of our words, replaced from top to bottom; {f} is 1 in the
# encoder and 2 in the decoder, {up} is wi in v1.0 and wi_1 in v1.1.
HF_WORDS = {
    "final_norm": "final_layer_norm",
    "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "blocks": "block",
    "self_attention_norm": "layer.0.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "cross_attention_norm": "layer.1.layer_norm",
    "cross_attention": "layer.1.EncDecAttention",
    "feed_forward_norm": "layer.{f}.layer_norm",
    "feed_forward.gate": "layer.{f}.DenseReluDense.wi_0",
    "feed_forward.up": "layer.{f}.DenseReluDense.{up}",
    "feed_forward.down": "layer.{f}.DenseReluDense.wo",
}
# Never loaded: copies, if they equal shared; a bias in v1.0's files that no T5 ever used.
COPIES, HEAD = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "lm_head.weight"
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def embedding_key(stored: Collection[str], raw: dict) -> str:
    """The key of the embedding among those stored: of names that share a tensor, files may keep any
    one.  The head's alone counts where `raw`, a parsed config.json, says that it is tied."""
    tied = all(raw.get(name) in (None, True)
               for name in ("tie_word_embeddings", "scale_decoder_outputs"))
    names = ("shared.weight", *COPIES, *([HEAD] if tied else []))
    return next((name for name in names if name in stored), names[0])


def hf_names(config: T5Config) -> dict[str, str]:
    """Name of every parameter of T5(config) -> its key in Hugging Face's files."""
    with torch.device("meta"), Unfilled():
        names = {name: name for name in T5(config).state_dict()}
    for ours, theirs in names.items():
        for word, hub in HF_WORDS.items():
            theirs = theirs.replace(word, hub)
        names[ours] = theirs.format(f=2 if ours.startswith("decoder") else 1,
                                    up="wi_1" if config.gated else "wi")
    return names
