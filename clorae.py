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
    alpha / r           scale         scalar         alpha / R for both experts
    sigma^2 (Sec. 2.3)  rho           [D_out]        variance of the MIM student, before softplus

Shapes: B rows of the batch, S tokens, D_in and D_out the widths of one linear, R universal rank,
r = floor(R / N) task rank, N tasks, E experts of LoRAMoE, k columns that a row computes (R + r).

Everything but W_0 x lives in rank space: the gate multiplies the k numbers z = [A_U x ; A_n x] of a
token before one product with [B_U B_n], so the experts' outputs U = B_U z_U and D = B_n z_n, each
D_out wide, are never formed.  The MIM loss (Eq. 5) needs only second moments of z, collected here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

METHODS = ("clorae", "lora", "tlora", "moslora", "loramoe", "full")
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
    targets: tuple[str, ...] = ("q", "v")  # exact leaf names, so that proj_v is never wrapped
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
    """What L_MIM needs of the L wrapped linears that see one token stream (README, "MIM").

    q [L,D_out]: sum_t a_t (D_tc - U_tc)^2 of each output channel c over the valid tokens t;
    b: sum_t 1 / (B |J_i|), a scalar; variance [L,D_out]: the layers' sigma^2.
    """

    q: Tensor
    b: Tensor
    variance: Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: softmax and second moments lose too much in bf16 (D35)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        self.mim_batch: int | None = None  # global batch size B while L_MIM is wanted, else None
        self.codes: list[tuple["ExpertLinear", list[Tensor]]] = []  # z of each run, for L_MIM
        self._rows: list[int] | None = None

    def set(self, tasks: Tensor, memory: Tensor | None = None, target: Tensor | None = None,
            visual: Tensor | None = None) -> None:
        """Announce a batch.

        tasks [B] indices into `names`; masks (bool, True = valid token) of the three token
        streams: memory [B,S], target [B,T], visual [B,V].  They weigh L_MIM and are needed only
        while it is collected.  Raises ValueError for a task that has no expert.
        """
        rows = tasks.tolist()
        unknown = [task for task in rows if not 0 <= task < len(self.names)]
        if unknown:
            raise ValueError(f"routing: expected task indices 0..{len(self.names) - 1} "
                             f"({', '.join(self.names)}), got {unknown[0]}; "
                             "build the experts with every task that the data holds")
        self.tasks, self._rows = rows, rows
        self.masks = {"memory": memory, "target": target, "visual": visual}
        self.codes = []

    def rows(self, index: Tensor) -> None:
        """Follow the decoder: computed row k is row index[k] of the batch given to `set`."""
        if self.tasks is not None:
            self._rows = [self.tasks[i] for i in index.tolist()]

    def segments(self, rows: int) -> Iterator[tuple[int, slice]]:
        """Runs of equal tasks as (task, rows); a batch sorted by task gives one run per task."""
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


    def moments(self) -> list[Moments]:
        """What the layers saw since `set`, one report per token stream; then it is forgotten."""
        codes, self.codes = self.codes, []
        tasks = [task for task, _ in self.segments(len(self.tasks or []))]
        streams = {name: [(layer, z) for layer, z in codes if layer.stream == name]
                   for name in self.masks}
        return [stream_moments(some, self.masks[name], tasks, self.mim_batch)
                for name, some in streams.items() if some]


def stream_moments(codes: list[tuple["ExpertLinear", list[Tensor]]], mask: Tensor,
                   tasks: list[int], batch: int) -> Moments:
    """Second moments for L_MIM, Eq. (5), of all layers at once; the teacher U has no gradient.

    Weights per valid token t of sample i: a_t = 1 / (B |J_i| rho_i^2), b_t = 1 / (B |J_i|), with
    rho_i the RMS of U over the sample's tokens and channels.  With C = [-B_U, B_n] and S = sum_t
    a_t z_t z_t^T, q = diag(C S C^T), taken apart into U's, the mixed and D's block of S.
    """
    layers, R = [layer for layer, _ in codes], codes[0][0].config.rank
    z = [torch.stack(parts) for parts in zip(*(parts for _, parts in codes))]  # runs of [L,b S,k]
    B_U = torch.stack([layer.B_U for layer in layers]).detach()  # [L,D_out,R]
    B_T = torch.stack([layer.B_T for layer in layers], dim=1)  # [N,L,D_out,r]
    rho = torch.stack([layer.rho for layer in layers])
    with torch.autocast(mask.device.type, enabled=False):  # fp32 island
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(rho.dtype)  # [B,S] 1 / |J_i|
        z_U = wide(torch.cat([part[..., :R] for part in z], dim=1).detach())  # [L,B S,R]
        energy = ((z_U @ (B_U.mT @ B_U)) * z_U).sum(dim=-1)  # |U_t|^2, no U formed
        power = (energy.unflatten(1, mask.shape) * share).sum(dim=-1) / B_U.shape[1]  # [L,B]
        scale = (power.clamp(min=0).sqrt() + RMS_FLOOR).square()[..., None]
        a = (share / batch / scale).flatten(1)[..., None]  # [L,B S,1]
        weighted = a * z_U
        q = ((B_U @ (weighted.mT @ z_U)) * B_U).sum(dim=-1)  # U's block, one for all tasks
        start = 0
        for task, part in zip(tasks, z):
            run = slice(start, start := start + part.shape[1])
            z_D, B_n = wide(part[..., R:]), B_T[task]
            mixed, own = weighted[:, run].mT @ z_D, (a[:, run] * z_D).mT @ z_D
            q = q + ((B_n @ own - 2 * (B_U @ mixed)) * B_n).sum(dim=-1)
        return Moments(q, share.sum() / batch, F.softplus(rho) + VARIANCE_FLOOR)


def spread(gates: Tensor, widths: Sequence[int]) -> Tensor:
    """gates [...,E] -> [...,k]: each expert's gate beside each of its columns."""
    if len(widths) == 1:
        return gates
    return torch.cat([g.expand(*g.shape[:-1], width)
                      for g, width in zip(gates.split(1, dim=-1), widths)], dim=-1)


class LowRank(torch.autograd.Function):
    """y + (s g z) B^T with z = x A^T, run by run of rows that share their experts.

    Written by hand for what autograd cannot know: the product is added into y, which nobody else
    needs; no [tokens, D_out] tensor is kept or filled with zeros; s g z is cheaper made again
    than stored.  The codes z are outputs as well, so that L_MIM's gradient comes back through them.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, gates: Tensor | None, scale: float,
                widths: Sequence[int], runs: Sequence[slice], *factors: Tensor
                ) -> tuple[Tensor, ...]:
        """y [B,S,D_out] (overwritten), x [B,S,D_in], gates [B,S,E] or None, and for each run its
        A [k,D_in] and B [D_out,k] -> y, then each run's z [b S,k]."""
        A, B = ([f.to(y.dtype) for f in factors[side::2]] for side in (0, 1))
        x, codes = x.to(y.dtype), []
        for rows, A_n, B_n in zip(runs, A, B):
            z = x[rows].flatten(0, 1) @ A_n.T  # Eq. (3), Eq. (4) before B_U and B_n
            weights = LowRank.weights(gates, scale, widths, rows, y.dtype)
            y[rows].flatten(0, 1).addmm_(z * weights, B_n.T)  # Eq. (7), Eq. (8)
            codes.append(z)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, gates, *A, *B, *codes)
        ctx.scale, ctx.widths, ctx.runs = scale, widths, runs
        return y, *codes

    @staticmethod
    def weights(gates: Tensor | None, scale: float, widths: Sequence[int], rows: slice,
                dtype: torch.dtype) -> Tensor | float:
        """s g^1 or s g^2 for each column of z, Eq. (7) in rank space; without gates s alone."""
        if gates is None:
            return scale
        return spread((scale * gates[rows]).flatten(0, 1), widths).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dcodes: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gates, *saved = ctx.saved_tensors
        n = len(ctx.runs)
        A, B, codes = saved[:n], saved[n:2 * n], saved[2 * n:]
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dgates = None if gates is None else torch.empty_like(gates)
        dfactors: list[Tensor] = []
        for rows, A_n, B_n, z, dcode in zip(ctx.runs, A, B, codes, dcodes):
            dy_n = dy[rows].flatten(0, 1)
            weights = LowRank.weights(gates, ctx.scale, ctx.widths, rows, dy.dtype)
            dv = dy_n @ B_n  # gradient of v = s g z
            if dgates is not None:
                parts = (ctx.scale * dv * z).split(ctx.widths, dim=-1)
                dgates[rows].flatten(0, 1).copy_(torch.stack([p.sum(-1) for p in parts], dim=-1))
            dz = dv * weights if dcode is None else dcode + dv * weights
            dfactors += [dz.T @ x[rows].flatten(0, 1), dy_n.T @ (z * weights)]
            if dx is not None:
                torch.mm(dz, A_n, out=dx[rows].flatten(0, 1))
        return dy, dx, dgates, None, None, None, *dfactors


class ExpertLinear(nn.Module):
    """A frozen linear with low-rank experts beside it: y = W_0 x + s (g^1 U + g^2 D).

    stream: whose mask tells this layer's valid tokens ("memory", "target" or "visual").
    """

    def __init__(self, base: nn.Linear, config: ExpertConfig, routing: Routing, stream: str):
        super().__init__()
        N, R = len(routing.names), config.rank
        if R < N:
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
        """x [B,S,D_in] -> y [B,S,D_out] = W_0 x + (alpha / r) h, Eq. (8)."""
        y, gates = self.base(x), self.gates(x)
        if self.config.method == "moslora":  # B M A x: the mixer joins all ranks
            A, M, B = (factor.to(y.dtype) for factor in (self.A_U, self.M_U, self.B_U))
            z = F.linear(F.linear(self.dropped(x).to(y.dtype), A), M)
            return y + F.linear(self.scale * z, B)
        if self.config.method == "loramoe":  # every expert for every row, each under its own mask
            every, R = [slice(0, len(x))], [self.config.rank]
            for g, A_e, B_e in zip(gates.split(1, dim=-1), self.A_E, self.B_E):
                y, _ = LowRank.apply(y, self.dropped(x), g, self.scale, R, every, A_e, B_e)
            return y
        tasks, runs = zip(*self.segments(len(x)))
        y, *codes = LowRank.apply(y, self.dropped(x), gates, self.scale, self.widths, runs,
                                  *self.factors(tasks))
        if self.training and self.routing.mim_batch is not None and hasattr(self, "rho"):
            self.routing.codes.append((self, codes))
        return y

    def segments(self, rows: int) -> Iterator[tuple[int, slice]]:
        """The runs of rows that share their experts: all rows where no expert belongs to a task."""
        if self.config.has_tasks:
            return self.routing.segments(rows)
        return iter([(0, slice(0, rows))])

    def dropped(self, x: Tensor) -> Tensor:
        """x under dropout: one mask for both experts (D14)."""
        return F.dropout(x, self.config.dropout, self.training)

    def gates(self, x: Tensor) -> Tensor | None:
        """x [B,S,D_in] -> gates [B,S,2] >= 0 summing to 1, in x's dtype; None without a router.

        LoRAMoE routes over its E experts instead: [B,S,E].
        """
        if self.routing.fixed_gates is not None and self.config.method == "clorae":
            return x.new_tensor(self.routing.fixed_gates).expand(*x.shape[:-1], 2)
        if not hasattr(self, "W_g"):
            return None
        logits = F.linear(x, self.W_g.to(x.dtype))
        return wide(logits).softmax(dim=-1).to(logits.dtype)  # Eq. (6)

    @property
    def widths(self) -> list[int]:
        """How many columns of z belong to each gate."""
        R, r = self.config.rank, self.config.rank // len(self.routing.names)
        return [R] * self.config.has_universal + [r] * self.config.has_tasks

    def factors(self, tasks: Sequence[int]) -> list[Tensor]:
        """For each run of rows of one task its experts side by side: A [k,D_in], B [D_out,k]..."""
        if not self.config.has_tasks:
            return [self.A_U, self.B_U]  # Eq. (2): plain LoRA
        pairs = list(zip(self.A_T.unbind(), self.B_T.unbind()))
        if self.config.has_universal:
            pairs = [(torch.cat([self.A_U, A_n]), torch.cat([self.B_U, B_n], dim=1))
                     for A_n, B_n in pairs]
        return [factor for task in tasks for factor in pairs[task]]

    @torch.no_grad()
    def merged_weight(self, task: int, gates: tuple[float, ...] | None = None) -> Tensor:
        """W_0 + (alpha / r) (g^1 B_U A_U + g^2 B_n A_n) [D_out,D_in] for one task, fixed gates.

        Raises ValueError for a live gate: its weights depend on the token, so that no single
        matrix equals the layer.
        """
        if hasattr(self, "W_g") and gates is None:
            raise ValueError("merge: expected fixed gates, got a live gate router, which "
                             "weighs each token anew; pass mean gates to merge approximately")
        if self.config.method == "loramoe":
            A, B = self.A_E.flatten(0, 1), torch.cat(self.B_E.unbind(), dim=1)
            widths = [self.config.rank] * self.config.experts
        else:
            (A, B), widths = self.factors([task]), self.widths
            B = B @ self.M_U if self.config.method == "moslora" else B
        weights = 1.0 if gates is None else spread(A.new_tensor(gates), widths)
        return self.base.weight + self.scale * (B * weights) @ A

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
    """Paths of the linears that D1 wraps: q and v of the attention blocks in `config.modules`."""
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
