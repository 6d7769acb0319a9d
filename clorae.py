"""C-LoRAE expert layers: a universal LoRA expert and one small expert per task, mixed per token.

What it is: `adapt(model, ...)` puts an `ExpertLinear` in the place of every q and v projection of a
frozen Transformer (Decision: README, "Where the paper is silent or wrong").  Paper: C-LoRAE, IJCAI
2025, arXiv 2505.06303, Sec. 2.2-2.3.  LoRA conventions (initialisation, scaling) follow
github.com/huggingface/peft, the dense softmax router follows github.com/Ablustrund/LoRAMoE.  The
methods that the paper compares with are variants of the same layer: a mixer between A and B
(MoSLoRA, arXiv 2406.11909), or routed experts that know no task (LoRAMoE, arXiv 2312.09979).

    paper symbol        name here     shape          meaning
    x_ij                x             [B,S,D_in]     token j of sample i
    W_0                 base.weight   [D_out,D_in]   frozen weight
    A^U, B^U            A_U, B_U      [R,D_in], [D_out,R]          universal expert
    A^D_n, B^D_n        A_T, B_T      [N,r,D_in], [N,D_out,r]      task experts, stacked
    W_g                 W_g           [2,D_in]       gate router (the paper's 2 x D_out cannot be)
    g^1, g^2            gates         [B,S,2]        weight of the universal and of the task expert
    (MoSLoRA) W         M_U           [R,R]          mixer of A's and B's subspaces
    (LoRAMoE) A_e, B_e  A_E, B_E      [E,R,D_in], [E,D_out,R]      experts; their W_g is [E,D_in]
    alpha / r           scale, s      scalar         alpha / R for both experts (r here is another)
    (Ahn) sigma^2       rho           [D_out]        variance of the MIM student, before softplus

Shapes: B rows of the batch, S tokens of a row (source, target or visual ones), D_in and D_out the
widths of one linear, R universal rank, r = floor(R / N) task rank, N tasks, E experts of LoRAMoE;
besides, k = R + r numbers of a token in rank space, t tokens that a layer sees, B S or only the
real ones of a batch with padding, and L wrapped linears that see one stream of tokens: the memory
that the decoder reads, the target, or the visual tokens.

Everything but W_0 x lives in rank space: the gate multiplies the k numbers z = [A_U x ; A_n x] of a
token before one product with [B_U B_n], so the experts' outputs U = B_U z_U and D = B_n z_n, each
D_out wide, are never formed.  The MIM loss (Eq. 5) needs only second moments of z, collected here.
"""

import hashlib
import itertools
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

METHODS = ("clorae", "lora", "tlora", "moslora", "loramoe", "full")
FUSED = ("clorae", "lora", "tlora")  # what clorae.cu computes
RHO_INIT = math.log(math.expm1(0.9))  # softplus(RHO_INIT) + VARIANCE_FLOOR = 1
VARIANCE_FLOOR = 0.1  # bounds L_MIM from below by ln(0.1) / 2
RMS_FLOOR = 1e-3  # keeps the MIM scale finite while U is still zero


@dataclass(frozen=True)
class ExpertConfig:
    """How the experts are built; stored in every checkpoint."""

    method: str = "clorae"  # one of METHODS; "full" trains everything and wraps nothing
    rank: int = 128  # R of the universal expert; a task expert has floor(R / N)
    alpha: float | None = None  # numerator of the scale in Eq. (8); None: 2 R, a scale of 2
    dropout: float = 0.1  # on the experts' input; the gate sees x undropped
    egr: bool = True  # experts-motivated gate router; without it h = U + D
    mim: bool = True  # give each layer the variance vector that L_MIM learns
    experts: int = 2  # E of LoRAMoE, each of rank R
    targets: tuple[str, ...] = ("q", "v")  # whole leaf names: "q" is not found in proj_q
    modules: tuple[str, ...] = ("encoder", "decoder", "vstack")  # a path must pass through one

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got '{self.method}'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    @property
    def has_universal(self) -> bool:
        return self.method in ("clorae", "lora", "moslora")

    @property
    def has_tasks(self) -> bool:
        return self.method in ("clorae", "tlora")


@dataclass
class Moments:
    """What L_MIM needs of the L wrapped linears that see one stream of tokens.

    distance [L,D_out]: sum_t a_t (D_tc - U_tc)^2 of each output channel c over the valid tokens t;
    b: sum_t b_t, a scalar (a_t and b_t: see `stream_moments`); variance [L,D_out]: sigma^2.
    """

    distance: Tensor
    b: Tensor
    variance: Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: softmax and second moments lose too much in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


Runs = list[tuple[int, int]]  # the task, and the number of tokens, of rows that share experts


class Table(NamedTuple):
    """The runs of T tokens as kernels read them, in int32 and on their device."""

    segments: Tensor  # [n,3]: task, first token and the one after the last, of runs 1 .. n
    tasks: Tensor  # [T]: of each token


def table_of(runs: Runs, device: torch.device) -> Table:
    """Runs known to the host -> their table."""
    stops = list(itertools.accumulate(size for _, size in runs))
    rows = [(task, stop - size, stop) for (task, size), stop in zip(runs, stops)]
    segments, tasks = (torch.tensor(some, dtype=torch.int32, device="cpu")
                       for some in (rows, list(zip(*runs))))
    tasks = tasks[0].repeat_interleave(tasks[1])
    return Table(*(some.to(device, non_blocking=True) for some in (segments, tasks)))


def table_of_rows(tasks: Tensor, S: int, N: int) -> Table:
    """The tasks [B] of rows of S tokens, sorted, which the host need not know -> their table, with
    a run for each of N tasks."""
    every = torch.arange(N, device=tasks.device)
    sizes = S * (tasks[:, None] == every).sum(dim=0)
    stops = sizes.cumsum(dim=0)
    return Table(torch.stack([every, stops - sizes, stops], dim=1).int(),
                 tasks.int()[:, None].expand(-1, S).flatten())


def spread(codes: Tensor, tasks: Tensor, N: int) -> Tensor:
    """Codes [...,T,r] of each token's own task -> those of all N, [...,T,N r]: 0 but for its own.
    A product over tokens is then one for all tasks, whose runs nobody needs to know."""
    own = tasks[:, None] == torch.arange(N, device=tasks.device)  # [T,N]
    return (codes[..., None, :] * own[..., None]).flatten(-2)


class Routing:
    """Which task each row belongs to: one object shared by all expert layers of a model.

    The model calls `set` at the start of each forward pass; decoding calls `rows` whenever rows
    are repeated for beams or dropped.  Until the first `set` every row counts as task 0.
    """

    def __init__(self, tasks: Sequence[str]):
        self.names = tuple(tasks)
        self.tasks: list[int] | None = None
        self.masks: dict[str, Tensor | None] = {}
        self.fixed_gates: tuple[float, float] | None = None  # replaces Eq. (6) in every layer
        self.impl = "auto"  # see `kernels`: whether layers run on clorae.cu
        self.stay = False  # tasks that come on a GPU stay there, as a CUDA graph needs: see `set`
        # global batch size B while L_MIM is wanted, else None
        self.mim_batch: int | Tensor | None = None
        # z_U, z_D for L_MIM, with the tokens' tasks; None once taken: recomputed layers report once
        self.codes: list[tuple["ExpertLinear", Runs | Tensor, Tensor, Tensor]] | None = []
        self.packs: dict[tuple, list[Tensor]] = {}  # see ExpertLinear.packs
        self._shares: dict[tuple, Tensor] = {}
        self._runs: dict[str, Runs] = {}  # of the real tokens of a stream
        self._tables: dict[tuple, Table] = {}
        self._rows: list[int] | None = None
        self._there: Tensor | None = None  # the tasks, where they stay on a GPU

    def set(self, tasks: Tensor, memory: Tensor | None = None, target: Tensor | None = None,
            visual: Tensor | None = None) -> None:
        """Announce a batch.

        tasks [B] indices into `names`; masks (bool, True = valid token) of the three token
        streams: memory [B,S], target [B,T], visual [B,V].  They are needed while L_MIM, which they
        weigh, is collected, and where tokens come without their padding.  Raises ValueError for a
        task that has no expert.  The host reads the tasks, unless they come on a GPU and `stay`
        there: then they are sorted, nobody checks them, and layers must run on kernels.
        """
        self.masks = {"memory": memory, "target": target, "visual": visual}
        self.codes, self.packs, self._shares, self._runs, self._tables = [], {}, {}, {}, {}
        self._there = tasks if self.stay and tasks.is_cuda else None
        if self._there is not None:
            return
        rows = tasks.tolist()
        unknown = [task for task in rows if not 0 <= task < len(self.names)]
        if unknown:
            raise ValueError(f"routing: expected task indices 0..{len(self.names) - 1} "
                             f"({', '.join(self.names)}), got {unknown[0]}; "
                             "build the experts with every task that the data holds")
        self.tasks, self._rows = rows, rows

    def runs(self, x: Tensor, stream: str) -> Runs:
        """The runs of rows of one task in x, with their numbers of tokens; x [B,S,D_in], or the
        real tokens [t,D_in] alone, as the stream's mask counts them."""
        if x.dim() == 3:
            return [(task, (rows.stop - rows.start) * x.shape[1])
                    for task, rows in self.segments(len(x))]
        if self._rows is None:
            return [(0, len(x))]
        mask = self.masks.get(stream)
        if stream not in self._runs and mask is not None:
            lengths = mask.sum(dim=1).tolist()
            self._runs[stream] = [(task, sum(lengths[rows]))
                                  for task, rows in self.segments(len(lengths))]
        runs = self._runs.get(stream, [])
        if (known := sum(size for _, size in runs)) != len(x):
            raise ValueError(f"routing: expected the {known} tokens of the stream {stream} that "
                             f"the mask given to set() calls real, got {len(x)}; give set() the "
                             "masks that the model is given")
        return runs

    def table(self, x: Tensor, runs: Callable[[Tensor], Runs]) -> Table:
        """The table of x [B,S,D_in] or [t,D_in], made once for all layers that see such a batch;
        runs(x): its runs, where the host knows them."""
        known = None if self._there is not None else runs(x)
        key = (x.shape[-2],) if known is None else (*known, x.device)
        if key not in self._tables:
            self._tables[key] = (table_of(known, x.device) if known is not None else
                                 table_of_rows(self._there, x.shape[-2], len(self.names)))
        return self._tables[key]

    def rows(self, index: Tensor) -> None:
        """Follow the decoder: computed row k is row index[k] of the batch given to `set`."""
        if self.tasks is not None:
            self._rows, self._shares = [self.tasks[i] for i in index.tolist()], {}

    def segments(self, rows: int) -> Iterator[tuple[int, slice]]:
        """Runs of equal tasks as (task, rows); a batch sorted by task gives one run per task."""
        if self._there is not None:
            raise ValueError("routing: expected layers that run on clorae.cu, since the tasks of "
                             "rows stay on the GPU, got one that asks for them; leave --graphs "
                             "away")
        if self._rows is None:
            yield 0, slice(0, rows)
            return
        if len(self._rows) != rows:
            raise ValueError(f"routing: expected {len(self._rows)} rows, as announced by set(), "
                             f"got {rows}; call set() before forward and rows() when rows change")
        start = 0
        for stop in range(1, rows + 1):
            if stop == rows or self._rows[stop] != self._rows[start]:
                yield self._rows[start], slice(start, stop)
                start = stop

    def shares(self, rows: int, widths: Sequence[int], scale: float, like: Tensor) -> Tensor:
        """[rows,2,R + N r]: what s g of a row is made of, for the codes of all experts: the scale s
        where g^1 counts, at the universal expert's, and where g^2 does, at its own task's; else 0.
        """
        key = rows, *widths, scale, like.dtype, like.device
        if key not in self._shares:
            R, r = widths
            shares = like.new_zeros(rows, 2, R + len(self.names) * r)
            shares[:, 0, :R] = scale
            for task, run in self.segments(rows):
                shares[run, 1, R + task * r:R + (task + 1) * r] = scale
            self._shares[key] = shares
        return self._shares[key]

    def moments(self) -> list[Moments]:
        """What the layers saw since `set`, one report per token stream; then it is forgotten."""
        codes, self.codes = self.codes or [], None
        if lost := {layer.stream for layer, *_ in codes if self.masks.get(layer.stream) is None}:
            raise ValueError(f"routing: expected masks of the streams {sorted(lost)}, got none; "
                             "L_MIM weighs tokens by them: give them to set()")
        streams = {name: [some for some in codes if some[0].stream == name] for name in self.masks}
        return [stream_moments([(layer, *z) for layer, _, *z in some], self.masks[name], some[0][1],
                               self.mim_batch) for name, some in streams.items() if some]


class SquaredDistance(torch.autograd.Function):
    """sum_t a_t (D_tc - U_tc)^2 of each channel c, for Eq. (5), without forming U or D.

    D_t - U_t is the product of C = [-B_U, B_n] and z_t = [z_U ; z_n].  So with the k x k matrix
    M = sum_t a_t z_t z_t^T the sums are the diagonal of C M C^T, taken apart into U's, the mixed
    and D's block of M.  Written by hand, since the gradients come from what is formed anyway: with
    w_c twice that of channel c's sum, B_n's is w (C M)_n and z_n's at t is B_n^T w C (a_t z_t).
    """

    @staticmethod
    def forward(ctx: Any, z_D: Tensor, B_D: Tensor, z_U: Tensor, B_U: Tensor, a: Tensor,
                sizes: Sequence[int]) -> Tensor:
        """-> [L,D_out].  z_D [L,r,t], z_U [L,R,t], both at least fp32; B_D [n,L,D_out,r] of the n
        runs of tokens that `sizes` counts, B_U [L,D_out,R]; a [L,1,t].  z_U, B_U and a get no
        gradient."""
        a_D, a_U, slopes = a * z_D, a * z_U, []
        distance = ((B_U @ (a_U @ z_U.mT)) * B_U).sum(dim=-1)  # U's block, of all tasks
        parts = (z.split(sizes, dim=2) for z in (z_D, a_D, a_U))
        for B_n, z_n, a_D_n, a_U_n in zip(B_D, *parts):
            own, mixed = B_n @ (a_D_n @ z_n.mT), B_U @ (a_U_n @ z_n.mT)  # [L,D_out,r]
            slopes.append(own - mixed)  # (C M)_n = sum_t a_t (D_t - U_t) z_n,t^T
            distance += ((slopes[-1] - mixed) * B_n).sum(dim=-1)  # D's block, less the mixed twice
        ctx.save_for_backward(B_D, B_U, a_D, a_U, *slopes)
        ctx.sizes = sizes
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        B_D, B_U, a_D, a_U, *slopes = ctx.saved_tensors
        dz, dB, w = torch.empty_like(a_D), torch.empty_like(B_D), 2 * gradient[..., None]
        parts = (z.split(ctx.sizes, dim=2) for z in (dz, a_D, a_U))
        for B_n, dB_n, slope, dz_n, a_D_n, a_U_n in zip(B_D, dB, slopes, *parts):
            torch.mul(w, slope, out=dB_n)
            back = (w * B_n).mT
            torch.sub(back @ B_n @ a_D_n, back @ B_U @ a_U_n, out=dz_n)
        return dz, dB, None, None, None, None


def stream_moments(codes: list[tuple["ExpertLinear", Tensor, Tensor]], mask: Tensor,
                   runs: Runs | Tensor, batch: int | Tensor) -> Moments:
    """Second moments for L_MIM, Eq. (5), of all layers at once; the teacher U has no gradient.

    codes: the layers, their z_U [R,t] and z_D [r,t] of all tokens of `mask` [B,S], or of the real
    ones; runs: of these t tokens, or their tasks [t].
    J_i are the real tokens of sample i.  Each counts b_t = 1 / (B |J_i|), and a_t = b_t / rms_i^2,
    with rms_i the RMS of U over the sample's tokens and channels.
    """
    layers, z_U, z_D = zip(*codes)
    z_U, z_D = torch.stack(z_U), torch.stack(z_D)  # [L,R,t], [L,r,t]
    B_U = torch.stack([layer.B_U for layer in layers]).detach()  # [L,D_out,R]
    B_D = torch.stack([layer.B_T for layer in layers], dim=1)  # [N,L,D_out,r]
    if isinstance(runs, Tensor):  # all tasks' experts as one
        z_D = spread(z_D.mT, runs, len(B_D)).mT
        B_D, sizes = torch.cat(B_D.unbind(), dim=-1)[None], (len(runs),)
    else:
        tasks, sizes = zip(*runs)
        B_D = of_tasks(B_D, tasks)
    rho = torch.stack([layer.rho for layer in layers])
    with torch.autocast(mask.device.type, enabled=False):  # fp32 island
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(rho.dtype)  # [B,S] 1 / |J_i|
        real = mask.flatten() if z_U.shape[-1] < mask.numel() else None  # z lacks the padding
        z_U, z_D = wide(z_U), wide(z_D)
        energy = (((B_U.mT @ B_U) @ z_U) * z_U).sum(dim=1)  # [L,t] |U_t|^2, no U formed
        if real is not None:
            energy = energy.new_zeros(len(layers), len(real)).masked_scatter(real, energy)
        power = (energy.unflatten(1, mask.shape) * share).sum(dim=-1) / B_U.shape[1]  # [L,B]
        rms = (power.clamp(min=0).sqrt() + RMS_FLOOR)[..., None]  # [L,B,1]
        a = (share / batch / rms.square()).flatten(1)  # [L,B S]
        a = (a if real is None else a[:, real])[:, None]  # [L,1,t]
        distance = SquaredDistance.apply(z_D, B_D, z_U, B_U, a, sizes)
        return Moments(distance, share.sum() / batch, F.softplus(rho) + VARIANCE_FLOOR)


def join(factors: Sequence[Tensor], tasks: Sequence[int],
         dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The experts of each of n tasks side by side: A [n,k (+ 1),D_in] and B [n,D_out,k].

    factors: A_U, A_T, B_U, B_T, W_g, the absent ones without rows.  Where there is a router, the
    last row of A is W_g[0] - W_g[1]: a softmax over two depends on nothing else.
    """
    A_U, A_T, B_U, B_T, W_g = factors
    n, R, k = len(tasks), len(A_U), len(A_U) + A_T.shape[1]
    A = A_U.new_empty(n, k + len(W_g) // 2, A_U.shape[1], dtype=dtype)
    B = A_U.new_empty(n, len(B_U), k, dtype=dtype)
    A[:, :R], A[:, R:k] = A_U, of_tasks(A_T, tasks)
    B[..., :R], B[..., R:] = B_U, of_tasks(B_T, tasks)
    if len(W_g):
        A[:, k] = W_g[0] - W_g[1]
    return A, B


def of_tasks(stacked: Tensor, tasks: Sequence[int]) -> Tensor:
    """[N,...] -> [n,...]: what belongs to each of n tasks."""
    if tasks == (*range(len(stacked)),):
        return stacked
    return torch.stack([stacked[task] for task in tasks])  # a list as an index would stall a GPU


def to_tasks(parts: Tensor, tasks: Sequence[int], N: int) -> Tensor:
    """The reverse of `of_tasks`: [n,...] -> [N,...], the sum for a task that stands there twice."""
    stacked = parts.new_zeros(N, *parts.shape[1:])
    for task, part in zip(tasks, parts):
        stacked[task] += part
    return stacked


def share_out(factors: Sequence[Tensor], tasks: Sequence[int], dA: Tensor,
              dB: Tensor) -> list[Tensor]:
    """The reverse of `join`: gradients of A and B -> those of the factors."""
    A_U, A_T, B_U, B_T, W_g = factors
    R, k = len(A_U), dB.shape[2]
    dA_T, dB_T = dA[:, R:k].to(A_T.dtype), dB[..., R:].to(B_T.dtype)
    if tasks != (*range(len(A_T)),):
        dA_T, dB_T = (to_tasks(gradient, tasks, len(A_T)) for gradient in (dA_T, dB_T))
    dA_U, dB_U, dW_g = (t.sum(0, dtype=A_U.dtype) for t in (dA[:, :R], dB[..., :R], dA[:, k:]))
    return [dA_U, dA_T, dB_U, dB_T, torch.cat([dW_g, -dW_g])]


def weigh(z: Tensor, weights: Tensor | float, widths: Sequence[int],
          out: Tensor | None = None) -> Tensor:
    """v = s g z, Eq. (7) in rank space: z [k,t], weights s g [E,t] or s alone, `widths` rows an
    expert."""
    if not isinstance(weights, Tensor):
        return torch.mul(z, weights, out=out)
    v = torch.empty_like(z) if out is None else out
    for some, part, weight in zip(z.split_with_sizes(widths), v.split_with_sizes(widths),
                                  weights.to(z.dtype).unbind()):
        torch.mul(some, weight, out=part)
    return v


class LowRank(torch.autograd.Function):
    """y + B (s g z) with z = A x, run by run of tokens that share their experts.

    Written by hand for what autograd cannot know: y may be added to in place, since nobody else
    needs W_0 x; the gate's logit is one more row of z; the joined factors, v = s g z and the
    dropped x are cheaper made again than kept.  The codes z are outputs as well, so that L_MIM's
    gradient comes back through z_D.  They have a row per rank and a column per token: each
    expert's part is then one block of memory.  Only products go run by run.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, keep: Tensor | None, gates: Tensor | None,
                scale: float, runs: Runs, *factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> y, and the codes z_U [R,t], which have no gradient, and z_D [r,t] of all tokens.

        y [t,D_out], written into; x [t,D_in]; keep [t,D_in] or None: dropout of the experts' input;
        all of one type.  gates [t,E] or None: weights in place of the router's.  factors: see
        `join`.
        """
        widths = len(factors[0]), factors[1].shape[1]  # R, r
        tasks, sizes = zip(*runs)
        A, B = join(factors, tasks, y.dtype)
        codes = LowRank.codes(x, keep, A, sum(widths), sizes)
        z, logit = codes.tensor_split([sum(widths)])
        g = None if gates is None else gates.T
        if gates is None and len(logit):
            g = wide(logit).sigmoid()  # Eq. (6): a softmax over two
            g = torch.cat([g, 1 - g])
        v = weigh(z, scale if g is None else scale * g, widths)
        for y_n, v_n, B_n in zip(y.split_with_sizes(sizes), v.T.split_with_sizes(sizes),
                                 B.mT.unbind()):
            y_n.addmm_(v_n, B_n)  # Eq. (7), Eq. (8)
        z_U, z_D = z.split_with_sizes(widths)
        ctx.mark_dirty(y)
        ctx.mark_non_differentiable(z_U)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, keep, codes, g, *factors)
        ctx.scale, ctx.widths, ctx.tasks, ctx.sizes = scale, widths, tasks, sizes
        ctx.routed = gates is None
        return y, z_U, z_D

    @staticmethod
    def codes(x: Tensor, keep: Tensor | None, A: Tensor, k: int,
              sizes: Sequence[int]) -> Tensor:
        """x [t,D_in] -> Eq. (3), Eq. (4) before B (LoRA: Eq. (2)), and the gate's logit, as
        [k (+ 1),t]."""
        codes = z = x.new_empty(A.shape[1], len(x))
        if keep is not None:  # the gate reads x without dropout; its row is the same for all tasks
            torch.mm(A[0, k:], x.T, out=codes[k:])
            x, A, z = x * keep, A[:, :k], codes[:k]
        for A_n, x_n, z_n in zip(A.unbind(), x.T.split_with_sizes(sizes, 1),
                                 z.split_with_sizes(sizes, 1)):
            torch.mm(A_n, x_n, out=z_n)
        return codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None,
                 dz_D: Tensor | None) -> tuple[Tensor | None, ...]:
        x, keep, codes, g, *factors = ctx.saved_tensors
        (A, B), k, sizes = join(factors, ctx.tasks, x.dtype), sum(ctx.widths), ctx.sizes
        weights = ctx.scale if g is None else ctx.scale * g
        dy = x.new_zeros(len(x), B.shape[1]) if dy is None else dy
        dv, dB = torch.empty_like(codes[:k]), torch.empty_like(B)
        v = weigh(codes[:k], weights, ctx.widths)
        for B_n, dB_n, v_n, dv_n, dy_n in zip(
                B.mT.unbind(), dB.unbind(), v.T.split_with_sizes(sizes),
                dv.split_with_sizes(sizes, 1), dy.T.split_with_sizes(sizes, 1)):
            torch.mm(B_n, dy_n, out=dv_n)
            torch.mm(dy_n, v_n, out=dB_n)
        d, dgates = LowRank.code_gradients(ctx, dv, codes, weights, g, dz_D)
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dA = LowRank.input_gradients(d, A, k, x, keep, sizes, dx)
        return dy, dx, None, dgates, None, None, *share_out(factors, ctx.tasks, dA, dB)

    @staticmethod
    def code_gradients(ctx: Any, dv: Tensor, codes: Tensor, weights: Tensor | float,
                       g: Tensor | None, dz_D: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradient dv [k,t] of v -> that of the codes [k (+ 1),t]; that of given gates [t,E].
        dz_D: what L_MIM adds to the gradient of z_D."""
        k, d = len(dv), torch.empty_like(codes)
        weigh(dv, weights, ctx.widths, out=d[:k])
        if dz_D is not None:
            d[ctx.widths[0]:k].add_(dz_D)
        if g is None:
            return d, None
        dg = [some.sum(0) for some in (dv * codes[:k]).split_with_sizes(ctx.widths)]
        if not ctx.routed:
            return d, ctx.scale * torch.stack(dg[:len(g)], dim=1)
        d[k] = (dg[0] - dg[1]) * weights[0] * g[1]
        return d, None

    @staticmethod
    def input_gradients(d: Tensor, A: Tensor, k: int, x: Tensor, keep: Tensor | None,
                        sizes: Sequence[int], dx: Tensor | None) -> Tensor:
        """Gradient d [k (+ 1),t] of the codes -> that of A; dx [t,D_in] is filled."""
        dA, d_z, seen = torch.empty_like(A), d, x
        if keep is not None:
            d_z, seen = d[:k], x * keep
            dA[:, k:] = 0
            torch.mm(d[k:], x, out=dA[0, k:])
        rows = slice(len(d_z))
        for dA_n, d_n, x_n in zip(dA[:, rows].unbind(), d_z.split_with_sizes(sizes, 1),
                                  seen.split_with_sizes(sizes)):
            torch.mm(d_n, x_n, out=dA_n)
        if dx is not None:
            for A_n, d_n, dx_n in zip(A[:, rows].unbind(), d_z.T.split_with_sizes(sizes),
                                      dx.split_with_sizes(sizes)):
                torch.mm(d_n, A_n, out=dx_n)
            if keep is not None:
                dx.mul_(keep).addmm_(d[k:].T, A[0, k:])
        return dA


class ExpertLinear(nn.Module):
    """A frozen linear with low-rank experts beside it: y = W_0 x + s (g^1 U + g^2 D).

    stream: whose mask tells this layer's valid tokens ("memory", "target" or "visual").
    """

    def __init__(self, base: nn.Linear, config: ExpertConfig, routing: Routing, stream: str):
        super().__init__()
        N, R = len(routing.names), config.rank
        if config.has_tasks and R < N:
            raise ValueError(f"rank: expected at least one column per task ({N} tasks), got {R}; "
                             f"choose --rank {N} or more")
        d_out, d_in = base.weight.shape
        self.base, self.config, self.routing, self.stream = base, config, routing, stream
        self.scale = (2 * R if config.alpha is None else config.alpha) / R

        def empty(*shape: int) -> nn.Parameter:  # trainables are fp32 whatever the backbone is
            return nn.Parameter(torch.zeros(*shape, device=base.weight.device))

        if config.has_universal:
            self.A_U, self.B_U = empty(R, d_in), empty(d_out, R)
            nn.init.kaiming_uniform_(self.A_U, a=math.sqrt(5))
        if config.has_tasks:
            self.A_T, self.B_T = empty(N, R // N, d_in), empty(N, d_out, R // N)
            for A_n in self.A_T:
                nn.init.kaiming_uniform_(A_n, a=math.sqrt(5))
        if config.method == "moslora":
            self.M_U = empty(R, R)
            nn.init.kaiming_uniform_(self.M_U, a=math.sqrt(5))
        if config.method == "loramoe":
            E = config.experts
            self.A_E, self.B_E, self.W_g = empty(E, R, d_in), empty(E, d_out, R), empty(E, d_in)
            for A_e in (*self.A_E, self.W_g):
                nn.init.kaiming_uniform_(A_e, a=math.sqrt(5))
        if config.method == "clorae" and config.egr:
            self.W_g = empty(2, d_in)  # zero: both experts start at exactly one half
        if config.method == "clorae" and config.mim:
            self.rho = empty(d_out)
            nn.init.constant_(self.rho, RHO_INIT)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in], or real tokens [t,D_in] -> y in that shape = W_0 x + s h, Eq. (8)."""
        if self.runs_on_kernels(x):
            return self.fused(x)
        runs, tokens = self.runs(x), x.flatten(0, -2)
        y = self.base(tokens)
        tokens = tokens.to(y.dtype)
        return self.adapted(y, tokens, runs).view(*x.shape[:-1], y.shape[-1])

    def adapted(self, y: Tensor, x: Tensor, runs: Runs) -> Tensor:
        """y [t,D_out] = W_0 x, which may be written into, and x [t,D_in] -> y + s h."""
        if self.config.method == "moslora":  # B M A x: the mixer joins all ranks
            A, M, B = (factor.to(y.dtype) for factor in (self.A_U, self.M_U, self.B_U))
            return y + F.linear(self.scale * F.linear(F.linear(self.dropped(x), A), M), B)
        gates = self.given_gates(x)
        if self.config.method == "loramoe":  # every expert for every row, each under its own mask
            for g, A_U, B_U in zip(gates.split(1, dim=-1), self.A_E, self.B_E):
                factors = self.factors({"A_U": A_U, "B_U": B_U})
                y, *_ = LowRank.apply(y, x, self.keep(x), g, self.scale, runs, *factors)
            return y
        y, *z = LowRank.apply(y, x, self.keep(x), gates, self.scale, runs, *self.factors())
        self.remember(runs, *z)
        return y

    def parts(self) -> tuple[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]] | None:
        """The layer for the next token of each row, as t5.Product asks: W_0 x + up between(down x)
        with [W_0, *down], up and the function between.  The experts of all tasks take part, so that
        rows of different tasks share a product.  None: forward is to be called."""
        on_kernels = kernels(self.base.weight.device, self.routing.impl) is not None
        known = self.config.method in FUSED and self.base.bias is None
        if on_kernels or not known:
            return None
        A_U, A_T, B_U, B_T, W_g = self.factors()
        return [self.base.weight, A_U, A_T.flatten(0, 1), W_g], [B_U, *B_T], self.between

    def between(self, codes: Tensor) -> Tensor:
        """codes [rows,1,K (+ 2)], z of all K = R + N r ranks and the gate's logits -> s g z, which
        is 0 for the experts of other tasks."""
        shares = self.routing.shares(len(codes), self.widths, self.scale, codes)
        z, logits = codes.tensor_split([shares.shape[-1]], dim=-1)
        if logits.shape[-1]:
            gates = wide(logits).softmax(dim=-1).to(z.dtype)  # Eq. (6)
        else:
            fixed = self.routing.fixed_gates if self.config.method == "clorae" else None
            gates = z.new_tensor(fixed or (1, 1)).expand(len(z), 1, 2)
        return z * (gates @ shares)

    def remember(self, runs: Runs | Tensor, z_U: Tensor, z_D: Tensor) -> None:
        """Keep the codes [R,t] and [r,t] for L_MIM, while it is wanted, with the runs of the tokens
        or their tasks [t]."""
        wanted = self.routing.mim_batch is not None and self.routing.codes is not None
        if wanted and self.training and hasattr(self, "rho"):
            self.routing.codes.append((self, runs, z_U, z_D))

    def runs_on_kernels(self, x: Tensor) -> bool:
        """Whether clorae.cu can do this layer's work: LoRA experts in bf16 or fp32, widths that are
        multiples of 8, where it is built."""
        fits = self.config.method in FUSED and x.dtype != torch.float64
        return (fits and not any(width % 8 for width in self.base.weight.shape)
                and kernels(x.device, self.routing.impl) is not None)

    def fused(self, x: Tensor) -> Tensor:
        """`forward` on the kernels of clorae.cu."""
        drops = self.training and self.config.dropout > 0
        packs, table, tokens = self.packs(x), self.routing.table(x, self.runs), x.flatten(0, -2)
        y, z, _ = expert_linear(tokens, self.base, self.factors(), table, self.scale,
                                dropped=self.dropped(tokens) if drops else None,
                                gates=self.given_gates(tokens), packs=packs)
        z_U, z_D = z.T.split_with_sizes(self.widths)
        self.remember(table.tasks, z_U.detach(), z_D)
        return y.view(*x.shape[:-1], y.shape[-1])

    def runs(self, x: Tensor) -> Runs:
        """The runs of x: all tokens are one where no expert belongs to a task."""
        if self.config.has_tasks:
            return self.routing.runs(x, self.stream)
        return [(0, x.shape[:-1].numel())]

    def keep(self, x: Tensor) -> Tensor | None:
        """Dropout of the experts' input: 0 with probability p, else 1 / (1 - p), in x's shape and
        type; one mask for both experts, None where nothing is dropped.

        On a CPU one random 64-bit word serves four elements, p in steps of 2^-16: a third of the
        time of Bernoulli draws.  (As t5.dropout_factors; this file needs none of the others.)
        """
        p = self.config.dropout
        if not self.training or p == 0:
            return None
        if x.device.type != "cpu":
            return F.dropout(torch.ones_like(x), p)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None)
        draws = words.view(torch.int16)[:x.numel()].view(x.shape)  # uniform in -2^15 .. 2^15 - 1
        least = min(round(p * 2 ** 16), 2 ** 16 - 1) - 2 ** 15  # of the draws that keep an element
        return (draws >= least).to(x.dtype).mul_(1 / (1 - p))

    def dropped(self, x: Tensor) -> Tensor:
        """x under dropout."""
        keep = self.keep(x)
        return x if keep is None else x * keep

    def gates(self, x: Tensor) -> Tensor | None:
        """x [...,D_in] -> gates [...,2] >= 0 summing to 1, in x's dtype; None without a router.

        LoRAMoE routes over its E experts instead: [...,E].
        """
        if self.routing.fixed_gates is not None and self.config.method == "clorae":
            fixed = [x.new_full(x.shape[:-1], gate) for gate in self.routing.fixed_gates]
            return torch.stack(fixed, dim=-1)  # a list as a tensor would stall a GPU
        if not hasattr(self, "W_g"):
            return None
        logits = F.linear(x, self.W_g.to(x.dtype))
        return wide(logits).softmax(dim=-1).to(logits.dtype)  # Eq. (6)

    def given_gates(self, x: Tensor) -> Tensor | None:
        """The gates that LowRank cannot make itself: fixed ones, and those over E experts."""
        own = self.routing.fixed_gates is None and self.config.method != "loramoe"
        return None if own else self.gates(x)

    @property
    def widths(self) -> tuple[int, int]:
        """R and r, 0 for experts that the method does not have: the rows of z of each."""
        R, r = self.config.rank, self.config.rank // len(self.routing.names)
        return R * self.config.has_universal, r * self.config.has_tasks

    def factors(self, own: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """A_U, A_T, B_U, B_T, W_g as `join` takes them; `own` in place of the layer's parameters.
        Under fixed gates there is no router."""
        (d_out, d_in), own = self.base.weight.shape, self._parameters if own is None else own
        shapes = {"A_U": (0, d_in), "A_T": (1, 0, d_in), "B_U": (d_out, 0), "B_T": (1, d_out, 0),
                  "W_g": (0, d_in)}
        hidden = ("W_g",) * (self.routing.fixed_gates is not None)
        some = next(iter(own.values()))
        return [own[name] if name in own and name not in hidden else some.new_empty(shape)
                for name, shape in shapes.items()]

    def packs(self, x: Tensor) -> list[Tensor] | None:
        """`pack`, done once for all the tokens with which a batch is answered; else None."""
        if x.shape[-2] > 1 or self.training or torch.is_grad_enabled():
            return None
        kept, key = self.routing.packs if self.routing.tasks else {}, (self, product_dtype(x))
        if key not in kept:
            kept[key] = pack([f.detach() for f in self.factors()], key[1])
        return kept[key]

    @torch.no_grad()
    def stacked(self, task: int, gates: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """The experts of one task under fixed gates as one LoRA: A [k,D_in] = [A_U ; A_n] and
        B [D_out,k] = [g^1 B_U, g^2 B_n], at the layer's own scale.

        Raises ValueError for a live gate: its weights depend on the token, so that no single
        matrix equals the layer; and for gates where there is one expert.
        """
        if hasattr(self, "W_g") and gates is None:
            raise ValueError("merge: expected fixed gates, got a live gate router, which "
                             "weighs each token anew; pass mean gates to merge approximately")
        if gates is not None and self.config.method in ("lora", "tlora", "moslora"):
            raise ValueError(f"merge: expected no gates for {self.config.method}, whose one expert "
                             f"is always heard in full, got {tuple(gates)}; pass None")
        if self.config.method == "loramoe":
            A, B = self.A_E.flatten(0, 1), torch.cat(self.B_E.unbind(), dim=1)
            widths = [self.config.rank] * self.config.experts
        else:
            factors, widths = self.factors(), self.widths
            (A,), (B,) = join(factors, (task * self.config.has_tasks,), factors[0].dtype)
            A, B = A[:B.shape[1]], B @ self.M_U if self.config.method == "moslora" else B
        return A, B if gates is None else weigh(B.T, B.new_tensor(gates)[:, None], widths).T

    def merged_weight(self, task: int, gates: Sequence[float] | None = None) -> Tensor:
        """W_0 + s (g^1 B_U A_U + g^2 B_n A_n) [D_out,D_in] for one task, fixed gates."""
        A, B = self.stacked(task, gates)
        return self.base.weight.detach() + self.scale * B @ A

    @torch.no_grad()
    def as_lora(self, task: int, gates: Sequence[float] | None = None) -> "ExpertLinear":
        """The layer of method lora that computes the same, whatever task its rows have."""
        A, B = self.stacked(task, gates)
        config = ExpertConfig("lora", rank=len(A), alpha=self.scale * len(A), dropout=0.0)
        layer = ExpertLinear(self.base, config, self.routing, self.stream)
        layer.A_U.copy_(A)
        layer.B_U.copy_(B)
        return layer

    def extra_repr(self) -> str:
        return f"method={self.config.method}, rank={self.config.rank}, stream={self.stream}"


def stream_of(path: str) -> str:
    """The token stream that reaches a wrapped linear: encoder and cross-attention v see the memory,
    the rest of the decoder sees the target, the visual stack its visual tokens."""
    parts = path.split(".")
    if "vstack" in parts:
        return "visual"
    if "decoder" in parts and not ("cross_attention" in parts and parts[-1] in ("k", "v")):
        return "target"
    return "memory"


def adapt(model: nn.Module, method: str = "clorae", rank: int = 128,
          tasks: Sequence[str] = ("mner", "mre", "mee"), **options: object) -> nn.Module:
    """Freeze `model` and wrap its q and v linears with experts, in place; returns `model`.

    options: the remaining fields of ExpertConfig.  `model.routing` becomes the Routing that the
    layers share (for method "full" nothing is wrapped, everything is trainable and routing is
    None).  At the start every output equals the frozen model's bit for bit.  Raises ValueError if
    nothing matches or the model is adapted already.
    """
    config = ExpertConfig(method=method, rank=rank, **options)
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError("adapt: expected a model without experts, got one that has them already")
    model.requires_grad_(method == "full")
    model.routing = None
    if method == "full":
        return model
    routing = Routing(tasks)
    for path in wrapped_paths(model, config):
        parent, _, leaf = path.rpartition(".")
        layer = ExpertLinear(model.get_submodule(path), config, routing, stream_of(path))
        setattr(model.get_submodule(parent), leaf, layer)
    model.routing = routing
    return model


def wrapped_paths(model: nn.Module, config: ExpertConfig) -> list[str]:
    """Paths of the linears to wrap: q and v of the attention blocks in `config.modules`."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)
             and path.split(".")[-1] in config.targets
             and set(path.split(".")[:-1]) & set(config.modules)]
    if not paths:
        raise ValueError(f"adapt: expected linears named {', '.join(config.targets)} below "
                         f"{', '.join(config.modules)}, got none; check the names in ExpertConfig")
    return paths


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """All wrapped linears by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ExpertLinear)}


def parameter_split(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters as {"experts", "gate", "mim", "visual", "backbone"}."""
    split = {"experts": 0, "gate": 0, "mim": 0, "visual": 0, "backbone": 0}
    kinds = {**dict.fromkeys(("A_U", "B_U", "A_T", "B_T", "A_E", "B_E", "M_U"), "experts"),
             "W_g": "gate", "rho": "mim"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            visual = name.split(".")[0] in ("visual_embedding", "vstack", "fusion")
            kind = kinds.get(name.split(".")[-1], "visual" if visual else "backbone")
            split[kind] += parameter.numel()
    return split


# --------------------------------------------------------------------------- the CUDA extension
#
# ExpertLinear's product on clorae.cu's kernels, as the operator clorae::experts.  The kernels are
# compiled on first use on a CUDA machine, into a cache; whatever goes wrong there is one warning,
# and the PyTorch lines above do the work.  Nothing is compiled at import.

SOURCE = Path(__file__).with_name("clorae.cu")
COMPILER = (sys.executable, __file__)  # as a command, this file is the extension's compiler
BUILD_SECONDS = 300  # for a build, and for waiting until another process has built
KERNELS: dict[str, object] = {"cpu": None}  # device type -> library; tests put the emulator here


def kernels(device: torch.device, impl: str = "auto") -> object | None:
    """The operators of clorae.cu for a device; None: take the PyTorch path.

    impl: "auto" (the extension wherever it can be built), "plain" or "fast" (never) or "cuda", for which
    a machine that cannot build it raises ValueError.
    """
    if impl in ("plain", "fast"):
        return None
    if device.type not in KERNELS:
        KERNELS[device.type] = load_extension() if device.type == "cuda" else None
    if KERNELS[device.type] is None and impl == "cuda":
        raise ValueError("--impl cuda: expected a CUDA device and a compiled extension, got "
                         f"'{device.type}' without one; use --impl auto for the PyTorch path")
    return KERNELS[device.type]


def load_extension() -> object | None:
    """torch.ops.clorae_kernels; None after one warning if it cannot be had."""
    try:
        arch = "{}.{}".format(*torch.cuda.get_device_capability())
        if float(arch) < 8:
            raise RuntimeError(f"the kernels need compute capability 8.0, this GPU has {arch}")
        version = f"{torch.__version__} {arch} {platform.machine()}".encode()
        key = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
        cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"))
        folder = cache.expanduser() / f"clorae-{key}"
        torch.ops.load_library(str(build(folder, {"TORCH_CUDA_ARCH_LIST": arch})))
        return torch.ops.clorae_kernels
    except Exception as problem:  # of any kind: the PyTorch path needs no extension
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(f"clorae.cu: not compiled, the PyTorch path is used:\n{problem}")
        return None


def build(folder: Path, environment: dict[str, str]) -> Path:
    """The library in `folder`, compiled first where it is missing: whole or not at all.

    One process builds, in a fresh folder that it renames; the others wait for its lock, which
    the system releases when its holder ends, however it ends.  Raises RuntimeError with the last
    lines of the compiler, or TimeoutError after BUILD_SECONDS.
    """
    library = folder / "clorae_kernels.so"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        acquire(lock)
        if library.exists():
            return library
        fresh = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            compile_in(fresh, environment)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return library


def acquire(lock: IO[str]) -> None:
    """Take an exclusive lock on an open file within BUILD_SECONDS; TimeoutError otherwise."""
    import fcntl  # not on every system: there the extension is not built
    deadline = time.monotonic() + BUILD_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {lock.name} for {BUILD_SECONDS} s")
            time.sleep(0.1)


def compile_in(folder: Path, environment: dict[str, str]) -> None:
    """Run this file in a process of its own, since a compiler may hang or take all with it."""
    child = subprocess.Popen([*COMPILER, SOURCE, folder], env={**os.environ, **environment},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    try:
        output, _ = child.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the compilers that it has started, too
        child.communicate()
        raise TimeoutError(f"the compiler has not finished within {BUILD_SECONDS} s")
    if child.returncode:
        raise RuntimeError("\n".join(output.strip().splitlines()[-12:]))


def compile_extension(source: str, folder: str) -> None:
    """clorae.cu twice, by nvcc (kernels) and by the C++ compiler (binding), into folder."""
    from torch.utils import cpp_extension
    copies = [shutil.copy(source, Path(folder, name)) for name in ("kernels.cu", "binding.cpp")]
    cpp_extension.load("clorae_kernels", [str(copy) for copy in copies],
                       extra_cflags=["-O2"], extra_cuda_cflags=["-O3"],
                       build_directory=folder, is_python_module=False)


def cuda_queue(x: Tensor) -> int:
    """Handle of the CUDA stream on which work for x is queued."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def new_packs(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Room for A [R + N r (+ 1),D_in] and Bt [R + N r,D_out] of clorae.cu."""
    A_U, A_T, B_U, _, W_g = parameters
    rows, gate = A_U.shape[0] + A_T.shape[0] * A_T.shape[1], W_g.shape[0] // 2
    return [A_U.new_empty(rows + gate, A_U.shape[1], dtype=dtype),
            A_U.new_empty(rows, B_U.shape[0], dtype=dtype)]


@torch.library.custom_op("clorae::pack", mutates_args=())
def pack(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The fp32 parameters (see `expert_linear`) as the two packs that the kernels read."""
    packs = new_packs(parameters, dtype)
    KERNELS[packs[0].device.type].pack(*parameters, *packs, cuda_queue(packs[0]))
    return packs


def new_outputs(x: Tensor, dropped: Tensor | None, weight: Tensor | None, gates: Tensor | None,
                packs: Sequence[Tensor], parameters: Sequence[Tensor], segments: Tensor,
                tasks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `experts` answers, with its arguments."""
    T, live = x.shape[0], gates is None
    width = (parameters[0].shape[0] + parameters[1].shape[1] + live + 7) // 8 * 8
    return (x.new_empty(T, packs[1].shape[1]), x.new_empty(T, width),
            x.new_empty(T if live else 0, 2, dtype=torch.float32))


@torch.library.custom_op("clorae::experts", mutates_args=())
def experts(x: Tensor, dropped: Tensor | None, weight: Tensor | None, gates: Tensor | None,
            packs: Sequence[Tensor], parameters: Sequence[Tensor], segments: Tensor,
            tasks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [T,D_out] = W_0 x + s [B_U B_n] [g1 z_U ; g2 z_n], codes z [T,W], gates g [T,2].

    T: all tokens of the batch; W: k rounded up (clorae.cu).  Arguments: see `expert_linear`; x
    [T,D_in]; weight: W_0, or None for the experts' part of y alone; gates [T,2], then g is empty;
    the parameters are here for their gradients alone; segments and tasks: see `Table`.
    """
    arguments = (x, dropped, weight, gates, packs, parameters, segments, tasks, scale)
    (y, z, g), (A, Bt), (A_U, A_T) = new_outputs(*arguments), packs, parameters[:2]
    library, queue, live = KERNELS[x.device.type], cuda_queue(x), gates is None
    y, weights = y if weight is None else F.linear(x, weight), g if live else gates
    ranks = [A_U.shape[0], A_T.shape[1], A_T.shape[0]]  # R, r, N
    if dropped is None:
        library.shrink(x, A, segments, ranks, live, z, weights, queue)
    else:  # the experts read dropped x, the gate x itself
        library.shrink(dropped, A[:len(Bt)], segments, ranks, live, z, weights, queue)
        if live:
            library.shrink(x, A[len(Bt):], segments, [0, 0, 0], True, z.new_empty(len(x), 8),
                           weights, queue)
    library.expand(z, weights, Bt, segments, ranks, live, scale, weight is not None, y, queue)
    return y, z, g


@torch.library.custom_op("clorae::experts_backward", mutates_args=())
def experts_backward(dy: Tensor, dz: Tensor | None, x: Tensor, dropped: Tensor | None,
                     weight: Tensor | None, gates: Tensor, A: Tensor, Bt: Tensor, z: Tensor,
                     segments: Tensor, tasks: Tensor, ranks: Sequence[int], scale: float,
                     live: bool) -> list[Tensor]:
    """Gradients of x, of dropped (empty without it) and of gates, and in fp32 of A and Bt.

    dy [T,D_out]; dz [T,W]: what has come in for z, from L_MIM.
    """
    library, queue, dy = KERNELS[x.device.type], cuda_queue(x), dy.contiguous()
    codes, weighted, dgates = torch.empty_like(z), torch.empty_like(z), torch.empty_like(gates)
    dz = None if dz is None else dz.contiguous()
    library.shrink_backward(dy, Bt, segments, ranks, live, scale, z, gates, dz, codes, weighted,
                            dgates, queue)
    source, ddropped = x, x.new_empty(0)
    dx = torch.zeros_like(x) if weight is None else dy @ weight
    if dropped is None:
        library.expand(codes, None, A, segments, ranks, live, 1.0, True, dx, queue)
    else:
        source, ddropped, k = dropped, torch.empty_like(dropped), ranks[0] + ranks[1]
        library.expand(codes, None, A[:len(Bt)], segments, ranks, live, 1.0, False, ddropped, queue)
        if live:
            dx.addmm_(codes[:, k:k + 1], A[len(Bt):])
    dA = rank_gradient(codes, source, tasks, ranks, x if live else None)
    return [dx, ddropped, dgates, dA, rank_gradient(weighted, dy, tasks, ranks)]


def rank_gradient(codes: Tensor, x: Tensor, tasks: Tensor, ranks: Sequence[int],
                  gate_x: Tensor | None = None) -> Tensor:
    """sum_t codes_t x_t^T in the order of a pack, [R + N r (+ 1 with gate_x),d], summed in fp32.

    One product for all tasks does more arithmetic than one for each, but nobody has to know where
    their tokens lie."""
    (R, r, N), fast = ranks, x.is_cuda and x.dtype == torch.bfloat16
    z, gate = codes[:, :R + r], codes[:, R + r:R + r + (gate_x is not None)]
    columns = [z[:, :R], spread(z[:, R:], tasks, N)] if r else [z]
    with torch.autocast(x.device.type, enabled=False):
        parts = [(torch.cat([*columns, gate], dim=1), x)]
        if gate_x is not None and gate_x is not x:  # the gate read x undropped
            parts = [(torch.cat(columns, dim=1), x), (gate, gate_x)]
        sums = [torch.mm(left.T, right, out_dtype=torch.float32) if fast
                else left.T.float() @ right.float() for left, right in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def keep_for_backward(ctx: object, inputs: tuple, output: tuple) -> None:
    """Keep x, the packs, z and g for the backward pass: nothing of width D_out."""
    x, dropped, weight, gates, (A, Bt), parameters, segments, tasks, ctx.scale = inputs
    _, z, g = output
    ctx.live, ctx.shapes = gates is None, [p.shape for p in parameters]
    ctx.save_for_backward(x, dropped, weight, g if ctx.live else gates, A, Bt, z, segments, tasks)
    ctx.mark_non_differentiable(g)
    ctx.set_materialize_grads(False)


def gradients(ctx: object, dy: Tensor | None, dz: Tensor | None, _: None) -> tuple:
    """Gradients of `experts` in the order of its arguments."""
    x, dropped, weight, g, A, Bt, z, segments, tasks = ctx.saved_tensors
    (R, d_in), (N, r, _), (d_out, _) = ctx.shapes[:3]
    dy = x.new_zeros(x.shape[0], d_out) if dy is None else dy
    dx, ddropped, dgates, dA, dBt = experts_backward(
        dy, dz, x, dropped, weight, g, A, Bt, z, segments, tasks, [R, r, N], ctx.scale, ctx.live)
    d_U, d_T, d_gate = dA.split([R, N * r, dA.shape[0] - R - N * r])
    dW_g = torch.cat([d_gate, -d_gate])  # the gate row is W_g[0] - W_g[1]
    parameters = [d_U, d_T.view(N, r, d_in), dBt[:R].T,
                  dBt[R:].view(N, r, d_out).transpose(1, 2), dW_g]
    return (dx, None if dropped is None else ddropped, None, None if ctx.live else dgates,
            [None, None], parameters, None, None, None)


pack.register_fake(new_packs)
experts.register_fake(new_outputs)
experts_backward.register_fake(lambda dy, dz, x, dropped, weight, gates, A, Bt, *rest: [
    torch.empty_like(x), x.new_empty(0) if dropped is None else torch.empty_like(dropped),
    torch.empty_like(gates), *(torch.empty_like(t, dtype=torch.float32) for t in (A, Bt))])
experts.register_autograd(gradients, setup_context=keep_for_backward)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which products with x are computed: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def expert_linear(x: Tensor, base: nn.Linear, parameters: Sequence[Tensor], table: Table,
                  scale: float, dropped: Tensor | None = None, gates: Tensor | None = None,
                  packs: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One ExpertLinear on the kernels, for T tokens: y [T,D_out], z [T,R + r], gates [T,2] (fp32).

    x [T,D_in]; parameters in fp32: A_U, A_T, B_U, B_T, W_g, absent ones without rows ([0,D_in],
    [1,0,D_in], [D_out,0], [1,D_out,0], [0,D_in]); table of the T tokens; dropped: x under dropout,
    for the experts alone; gates [T,2]: weights in place of the router's (without either h = U + D);
    packs: `pack`'s answer, where the parameters do not change between calls.
    """
    if len(table.tasks) != len(x):
        raise ValueError(f"expert_linear: expected a table of {len(x)} tokens, got one of "
                         f"{len(table.tasks)}; make it from the runs of these tokens")
    dtype = product_dtype(x)
    inputs = [None if t is None else t.to(dtype).contiguous() for t in (x, dropped)]
    given, (*experts_own, W_g) = gates, parameters
    if gates is None and len(W_g) == 0:
        given = x.new_ones(1, 2).expand(len(x), 2)
    if given is not None:
        given, W_g = given.float().contiguous(), W_g[:0]
    parameters = [*experts_own, W_g]
    A, Bt = pack([p.detach() for p in parameters], dtype) if packs is None else packs
    A = A[:len(Bt) + len(W_g) // 2]
    weight, learns = base.weight.to(dtype), base.weight.requires_grad
    y, z, g = experts(*inputs, None if learns else weight, given, [A, Bt], parameters, *table,
                      scale)
    if learns:  # no kernel forms a gradient of W_0
        y = y + F.linear(inputs[0], weight)
    y = y if base.bias is None else y + base.bias.to(dtype)
    return y, z[:, :parameters[0].shape[0] + parameters[1].shape[1]], g if given is None else given


if __name__ == "__main__":
    compile_extension(*sys.argv[1:])
