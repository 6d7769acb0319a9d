"""C-LoRAE expert layers: a universal LoRA expert and one small expert per task, mixed per token.

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303, Sec. 2.2 and 2.3.  `adapt(model, ...)` freezes a
Transformer and puts an `ExpertLinear` in the place of every q and v projection.  `ExpertLinear`
computes the equations as the paper writes them: Eq. (8) in `forward`, Eq. (2) in `experts`, Eq.
(3), (4) and (7) in `universal_and_task`, Eq. (6) in `gates`.  Initialisation and scale follow
github.com/huggingface/peft, the dense softmax router follows github.com/Ablustrund/LoRAMoE.  The
methods that the paper compares with are variants of the same layer: a mixer between A and B
(MoSLoRA, arXiv 2406.11909), or experts that a router weighs without knowing the task (LoRAMoE,
arXiv 2312.09979).  So are two that it does not compare with: several B over one A, mixed by a
router (HydraLoRA, arXiv 2404.19245) or by the task, which also has a matrix of its own between A
and B (MTL-LoRA, arXiv 2410.09437).  docs/decisions.md lists where the paper is silent.

    paper symbol        name here     shape          meaning
    x_ij                x             [B,S,D_in]     token j of sample i
    W_0                 base.weight   [D_out,D_in]   frozen weight
    A^U, B^U            A_U, B_U      [R,D_in], [D_out,R]          universal expert
    A^D_n, B^D_n        A_T, B_T      [N,r,D_in], [N,D_out,r]      experts of all N tasks (T)
    U_ij, D_ij          U, D          [B,S,D_out]    outputs of the universal and the task expert
    W_g                 W_g           [2,D_in]       gate router; the paper prints 2 x D_out
    g^1, g^2            gates         [B,S,2]        weight of the universal and of the task expert
    h_ij                h             [B,S,D_out]    what the experts add, before the scale
    (MoSLoRA) W         M_U           [R,R]          mixer of the ranks between A and B
    (LoRAMoE) A_e, B_e  A_E, B_E      [E,R,D_in], [E,D_out,R]      experts; their W_g is [E,D_in]
    (Hydra) A, B_i      A_U, B_E      [R,D_in], [E,D_out,R]        one A, E heads; W_g as LoRAMoE's
    (MTL) Lambda_t, w_t L_T, w_T      [N,R,R], [N,E]               a task's; A, B_i as HydraLoRA's
    alpha / r           scale, s      scalar         alpha / R, for both experts
    (Ahn) sigma^2       rho           [D_out]        softplus(rho) + 0.1 = variance in L_MIM
    (Ahn) mu            a_D, c_D, M_D [D_out], [D_out], [R,r]      of its mean: see `student`

Shapes: B rows of the batch, S tokens of a row (source, target or visual ones), D_in and D_out the
widths of one linear, R universal rank, r = floor(R / N) task rank, N tasks, E experts of LoRAMoE or
heads of HydraLoRA and MTL-LoRA.

This file is the definition of the layer (`--impl plain`).  fast/experts.py computes the same
without forming U and D, and fast/cuda.py on kernels; tests/test_experts.py holds all three equal.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.adapters import read_adapter, replace, wrapped_paths, write_adapter
from engine.settings import MEANS

METHODS = ("clorae", "lora", "tlora", "moslora", "loramoe", "hydralora", "mtllora", "full")
RHO_INIT = math.log(math.expm1(0.9))  # softplus(RHO_INIT) + VARIANCE_FLOOR = 1
VARIANCE_FLOOR = 0.1  # bounds L_MIM from below by ln(0.1) / 2
TAU = 0.5  # temperature of MTL-LoRA's softmax; its authors' scripts have 0.1 and 0.8


@dataclass(frozen=True)
class ExpertConfig:
    """How the experts are built; stored in every checkpoint."""
    method: str = "clorae"  # one of METHODS; "full" trains everything and wraps nothing
    rank: int = 128  # R of the universal expert; a task expert has floor(R / N)
    alpha: float | None = None  # numerator of the scale in Eq. (8); None: 2 R, a scale of 2
    dropout: float = 0.1  # on the experts' input; the gate sees x undropped
    egr: bool = True  # experts-motivated gate router; without it h = U + D
    mim: bool = True  # give each layer the variance vector that L_MIM learns
    mim_mean: str = "identity"  # one of MEANS: D, a D + c, or B_U M z_D, see ExpertLinear.student
    experts: int = 2  # E of LoRAMoE, each of rank R
    heads: int = 3  # E of HydraLoRA and MTL-LoRA: B's of rank R over one A
    targets: tuple[str, ...] = tuple(  # ends of the linears' paths, in whole names
        f"{site}_attention.{leaf}" for site in ("self", "cross") for leaf in "qv")
    modules: tuple[str, ...] = ()  # only linears inside one of these; (): inside any

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got '{self.method}'")
        if self.mim_mean not in MEANS:
            raise ValueError(f"mim_mean: expected one of {', '.join(MEANS)}, got '{self.mim_mean}'")
        for name in ("rank", "experts", "heads"):
            if not (number := getattr(self, name)) >= 1:
                raise ValueError(f"{name}: expected a whole number from 1 on, got {number}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        if str in (type(self.targets), type(self.modules)):
            raise ValueError("targets, modules: expected tuples of names, got "
                             f"{self.targets!r} and {self.modules!r}; write one name as ('q',)")

    @property
    def has_universal(self) -> bool:
        return self.method in ("clorae", "lora", "moslora")

    @property
    def has_tasks(self) -> bool:
        return self.method in ("clorae", "tlora")


class Routing:
    """The task of each row that is being computed: one object that all layers of a model share.

    UMIE calls `set` at the start of each forward pass; its decoding calls `rows` whenever rows are
    repeated for beams or dropped.  Around passes of any other model stands `with routing.batch()`.

    tasks [rows]: indices into `names`, or None before the first `set`.  masks: for each stream of
    tokens, "memory", "target" and "visual", which tokens of the batch are not padding, or None.
    derived: a cache of what the layers in fast/ compute from the tasks; emptied when they change.
    """

    def __init__(self, names: Sequence[str]):
        if isinstance(names, str) or len(set(names)) < len(names):
            raise ValueError(f"tasks: expected a list of different names, got {names!r}; "
                             "give each task a name")
        self.names = tuple(names)
        self.tasks: Tensor | None = None
        self.masks: dict[str, Tensor | None] = {}
        self.derived: dict[Any, Any] = {}
        self.batch_tasks: Tensor | None = None  # as `set` was given them, for `rows` to choose from
        self.repeats, self.all_real = 1, False  # see `batch`

    @contextmanager
    def batch(self, tasks: Sequence[int | str] | Tensor, *, repeats: int = 1,
              **masks: Tensor) -> Iterator[None]:
        """`with routing.batch(["mner", "mre"]):` gives the rows of all passes in the block a task.

        tasks [B]: names or indices.  masks: as `set` takes them; without any, all tokens count as
        real.  repeats: how many rows `generate` makes of each, its num_beams or
        num_return_sequences: passes of B and of B repeats rows are then right.  After the block
        what held before it holds again, so a backward pass that recomputes activations belongs
        inside."""
        if not isinstance(tasks, Tensor):
            tasks = torch.tensor(self.indices(tasks), dtype=torch.long)
        before = dict(vars(self))
        try:
            self.set(tasks, **{stream: mask.bool() for stream, mask in masks.items()})
            self.repeats, self.all_real = repeats, not masks
            yield
        finally:
            vars(self).update(before, derived={})

    def set(self, tasks: Tensor, memory: Tensor | None = None, target: Tensor | None = None,
            visual: Tensor | None = None) -> None:
        """Announce a batch: tasks [B], and the masks [B,S] (True at real tokens) of the streams.

        L_MIM needs the masks.  Raises ValueError for a task that has no expert; tasks on a GPU are
        not checked, since the host would have to wait for them."""
        if tasks.device.type == "cpu":
            self.check(tasks.tolist())
        self.tasks = self.batch_tasks = tasks
        self.masks = {"memory": memory, "target": target, "visual": visual}
        self.derived, self.repeats, self.all_real = {}, 1, False

    def rows(self, index: Tensor) -> None:
        """From now on the row computed k-th is row index[k] of the batch given to `set`."""
        if self.batch_tasks is not None:
            self.tasks = self.batch_tasks[index.to(self.batch_tasks.device)]
            self.derived = {}

    def indices(self, tasks: Sequence[int | str]) -> list[int]:
        """Tasks by name or index -> their indices; ValueError for one that has no expert."""
        indices = [self.names.index(task) if task in self.names else task for task in tasks]
        self.check(indices)
        return indices

    def check(self, tasks: Sequence[int]) -> None:
        """Raise ValueError unless every task has an expert."""
        unknown = [task for task in tasks if task not in range(len(self.names))]
        if unknown:
            raise ValueError(f"routing: expected task indices 0..{len(self.names) - 1} "
                             f"({', '.join(self.names)}), got {unknown[0]}; "
                             "build the experts with every task that the data holds")

    def check_mask(self, stream: str, seen: Tensor) -> None:
        """ValueError unless the mask of a stream has the tokens of `seen`, what a layer kept of all
        [rows,S,...] or of the real ones [t,...]; made here where all tokens are real."""
        mask, tokens = self.masks.get(stream), seen.shape[:-1].numel()
        if mask is None and self.all_real:
            mask = self.masks[stream] = seen.new_ones(len(self.tasks), tokens // len(self.tasks),
                                                      dtype=torch.bool)
        if mask is None or tokens != mask.numel() and tokens != mask.sum():
            got = "none" if mask is None else f"one of {list(mask.shape)}"
            raise ValueError(f"routing: expected masks of the streams {[stream]}, of {tokens} "
                             f"tokens, got {got}; L_MIM weighs tokens by them: give them to set() "
                             "or batch(), or change layer.stream")

    def tasks_of(self, rows: int) -> Tensor:
        """The tasks [rows]; ValueError if none or another number of rows was announced."""
        if self.tasks is None and len(self.names) > 1:
            raise ValueError(f"routing: expected the tasks of {rows} rows, got none; compute the "
                             "model inside `with routing.batch(tasks):`, its backward pass too "
                             "where it recomputes activations")
        if self.tasks is None:
            return torch.zeros(rows, dtype=torch.long)
        if rows == len(self.tasks):
            return self.tasks
        if rows == len(self.tasks) * self.repeats:
            return self.tasks.repeat_interleave(self.repeats)  # as `generate` repeats its rows
        raise ValueError(f"routing: expected {len(self.tasks)} rows, as announced"
                         f"{f', or {self.repeats} of each' * (self.repeats > 1)}, got {rows}; "
                         "announce all rows, by set() or batch(), and beams by rows() or repeats=")


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: a softmax and the terms of L_MIM lose too much in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(*factors: Tensor) -> Tensor:
    """product(B, A, x): B A x_j for each token x_j of x, -> [rows,S,D_out].

    The last factor is x [rows,S,D_in]; the others are matrices [D_out,D_in], or [rows,D_out,D_in]
    where each row has its own.  The cheap product A x comes first; matrices take the type of x."""
    *matrices, x = factors
    for W in reversed(matrices):
        x = x @ W.mT.to(x.dtype)  # tokens are the rows of x, so W x_j is row j of x W^T
    return x


def variance(rho: Tensor) -> Tensor:
    """sigma^2 of Eq. (5)'s Gaussian, in the shape of rho."""
    return F.softplus(rho) + VARIANCE_FLOOR


class ExpertLinear(nn.Module):
    """A frozen linear with low-rank experts beside it: y = W_0 x + s h.

    base: the linear, with W_0.  stream: the tokens that the layer sees, "memory", "target" or
    "visual"; routing.masks[stream] tells which are real.  Experts are fp32, whatever base is."""
    fixed_gates: tuple[float, float] | None = None  # (g1, g2) in place of Eq. (6); see `gates`
    keeps_outputs = False  # set by keep_outputs(model), cleared when the outputs are taken
    outputs: tuple | None = None  # for L_MIM, of the last forward pass: (U, the student's mean)

    def __init__(self, base: nn.Linear, config: ExpertConfig, routing: Routing, stream: str):
        super().__init__()
        N, R = len(routing.names), config.rank
        if config.has_tasks and R < N:
            raise ValueError(f"rank: expected at least one column per task ({N} tasks), got {R}; "
                             f"choose --rank {N} or more")
        d_out, d_in = base.weight.shape
        self.base, self.config, self.routing, self.stream = base, config, routing, stream
        self.scale = (2 * R if config.alpha is None else config.alpha) / R

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=base.weight.device))

        def drawn(*shape: int) -> nn.Parameter:  # each matrix by itself, as nn.Linear draws its own
            parameter = zeros(*shape)
            for matrix in parameter if len(shape) == 3 else [parameter]:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            return parameter

        if config.has_universal:
            self.A_U, self.B_U = drawn(R, d_in), zeros(d_out, R)
        if config.has_tasks:
            self.A_T, self.B_T = drawn(N, R // N, d_in), zeros(N, d_out, R // N)
        if config.method == "moslora":
            self.M_U = drawn(R, R)
        if config.method == "loramoe":
            E = config.experts
            self.A_E, self.B_E, self.W_g = drawn(E, R, d_in), zeros(E, d_out, R), drawn(E, d_in)
        if config.method in ("hydralora", "mtllora"):
            self.A_U, self.B_E = drawn(R, d_in), zeros(config.heads, d_out, R)
        if config.method == "hydralora":
            self.W_g = drawn(config.heads, d_in)
        if config.method == "mtllora":
            self.L_T, self.w_T = zeros(N, R, R), drawn(N, config.heads)
            for L_n in self.L_T:
                nn.init.eye_(L_n)
        if config.method == "clorae" and config.egr:
            self.W_g = zeros(2, d_in)  # both experts start at exactly one half
        if config.method == "clorae" and config.mim:
            self.rho = zeros(d_out)
            nn.init.constant_(self.rho, RHO_INIT)
            if config.mim_mean == "affine":
                self.a_D, self.c_D = zeros(d_out), zeros(d_out)
                nn.init.ones_(self.a_D)
            if config.mim_mean == "map":
                self.M_D = zeros(R, R // N)  # the mean begins at 0, as U does

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in] -> y [B,S,D_out]."""
        y = self.base(x)  # W_0 x
        h = self.experts(x.to(y.dtype))
        return y + self.scale * h  # Eq. (8): y = W_0 x + s h

    def experts(self, x: Tensor) -> Tensor:
        """x [B,S,D_in] -> h [B,S,D_out], what the experts of the layer's method add.

        docs/method.md tells what else a new method needs."""
        if self.config.method == "lora":
            return product(self.B_U, self.A_U, self.dropped(x))  # Eq. (2): h = B A x
        if self.config.method == "tlora":
            n = self.row_tasks(x)
            return product(self.B_T[n], self.A_T[n], self.dropped(x))
        if self.config.method == "moslora":
            return product(self.B_U, self.M_U, self.A_U, self.dropped(x))
        if self.config.method == "loramoe":  # each of the E experts draws its own dropout mask
            gates = self.gates(x).split(1, dim=-1)
            return sum(g * product(B, A, self.dropped(x))
                       for g, A, B in zip(gates, self.A_E, self.B_E))
        if self.config.method == "hydralora":  # one dropout mask; its authors draw one for each B
            gates, z = self.gates(x).split(1, dim=-1), product(self.A_U, self.dropped(x))
            return sum(g * product(B, z) for g, B in zip(gates, self.B_E))
        if self.config.method == "mtllora":
            n = self.row_tasks(x)
            return product(self.mixed_heads()[n], self.L_T[n], self.A_U, self.dropped(x))
        if self.config.method == "clorae":
            return self.universal_and_task(x)
        raise NotImplementedError(f"{self.config.method}: its h is to be written here")

    def universal_and_task(self, x: Tensor) -> Tensor:
        """C-LoRAE's h: the universal expert and the expert of the row's task, weighed per token."""
        gates = self.gates(x)
        n = self.row_tasks(x)
        x = self.dropped(x)  # one mask for both experts; the gates have seen x without dropout
        U = product(self.B_U, self.A_U, x)  # Eq. (3)
        D = product(self.B_T[n], self.A_T[n], x)  # Eq. (4)
        self.remember(U, self.student(D, x, n))  # Eq. (5): losses.mutual_information
        if gates is None:
            return U + D
        g1, g2 = gates.split(1, dim=-1)  # each [B,S,1]
        h = g1 * U + g2 * D  # Eq. (7)
        return h

    def student(self, D: Tensor, x: Tensor, n: Tensor) -> Tensor:
        """The mean of Eq. (5)'s Gaussian for U, [B,S,D_out], from the task expert: by default D.

        Ahn et al. put a learnt function there, the paper says nothing.  "affine": a * D + c with a
        and c for each channel; "map": B_U M z_D, which takes the task's codes z_D = A_n x to
        universal ones by an M that all tasks share: see docs/decisions.md."""
        if hasattr(self, "a_D"):
            return self.a_D * D + self.c_D
        if hasattr(self, "M_D"):
            return product(self.B_U.detach(), self.M_D, self.A_T[n], x)
        return D

    def mixed_heads(self) -> Tensor:
        """MTL-LoRA's sum_i softmax(w_t / tau)_i B_i of every task t, [N,D_out,R]."""
        shares = wide(self.w_T / TAU).softmax(dim=-1).to(self.B_E.dtype)
        return torch.tensordot(shares, self.B_E, dims=1)

    def gates(self, x: Tensor) -> Tensor | None:
        """x [...,D_in] -> gates [...,2] >= 0 that sum to 1, in x's type; None without a router.

        LoRAMoE's and HydraLoRA's gates weigh their E experts: [...,E].  C-LoRAE's gates may be
        fixed to the same two numbers for every token; only then can the layer be merged into one
        matrix."""
        if self.fixed_gates is not None and self.config.method == "clorae":
            return torch.stack([x.new_full(x.shape[:-1], g) for g in self.fixed_gates], dim=-1)
        if not hasattr(self, "W_g"):
            return None
        return self.weighed(F.linear(x, self.W_g.to(x.dtype)))

    def weighed(self, logits: Tensor) -> Tensor:
        """The router's logits [...,2], or [...,E], as gates; clorae.cu computes the same itself."""
        return wide(logits).softmax(dim=-1).to(logits.dtype)  # Eq. (6)

    def dropped(self, x: Tensor) -> Tensor:
        """x under dropout, in training."""
        return F.dropout(x, self.config.dropout, self.training)

    def row_tasks(self, x: Tensor) -> Tensor:
        """The task n of each row of x, [B]."""
        if x.dim() != 3:
            raise ValueError("routing: expected the tokens of rows, [B,S,D_in], got "
                             f"{list(x.shape)}, whose rows are unknown; adapt other linears")
        return self.routing.tasks_of(len(x)).to(x.device)

    def remember(self, *outputs: Any) -> None:
        """Keep U and the student's mean, or what fast/ computes in their place, if
        keep_outputs(model) has asked for them and the layer takes part in L_MIM."""
        if self.keeps_outputs and self.training and hasattr(self, "rho"):
            self.outputs = outputs

    @property
    def widths(self) -> tuple[int, int]:
        """R and r, each 0 where the method has no such expert."""
        R, r = self.config.rank, self.config.rank // len(self.routing.names)
        return R * self.config.has_universal, r * self.config.has_tasks

    @torch.no_grad()
    def stacked(self, task: int, gates: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """The experts of one task under fixed gates as one LoRA of the same scale.

        gates: the weight of each expert, the universal one first, or None where the layer has no
        router.  -> A [k,D_in] = [A_U ; A_n] and B [D_out,k] = [g1 B_U, g2 B_n], k = R + r.  Raises
        ValueError without gates where there is a router, as no single matrix equals a layer that
        weighs each token anew; for gates where there is only one expert; and for a method that is
        not written here."""
        if hasattr(self, "W_g") and gates is None:
            raise ValueError("merge: expected fixed gates, got a live gate router, which "
                             "weighs each token anew; pass mean gates to merge approximately")
        match self.config.method:
            case "lora":
                experts = [(self.A_U, self.B_U)]
            case "tlora":
                experts = [(self.A_T[task], self.B_T[task])]
            case "clorae":
                experts = [(self.A_U, self.B_U), (self.A_T[task], self.B_T[task])]
            case "moslora":
                experts = [(self.A_U, self.B_U @ self.M_U)]
            case "loramoe":
                experts = list(zip(self.A_E, self.B_E))
            case "hydralora":
                experts = [(self.A_U, B) for B in self.B_E]
            case "mtllora":
                experts = [(self.L_T[task] @ self.A_U, self.mixed_heads()[task])]
            case other:
                raise ValueError(f"merge: expected a method whose A and B are known, got {other}; "
                                 "write them here, if it adds s B A to W_0 at all")
        if gates is not None and len(experts) == 1 and not hasattr(self, "W_g"):
            raise ValueError(f"merge: expected no gates for {self.config.method}, whose one expert "
                             f"is always heard in full, got {tuple(gates)}; pass None")
        weights = [1.0] * len(experts) if gates is None else gates
        if len(weights) != len(experts):
            raise ValueError(f"merge: expected a gate for each of {len(experts)} experts of "
                             f"{self.config.method}, got {len(weights)}; give the means of all")
        return (torch.cat([A for A, _ in experts]),
                torch.cat([g * B for g, (_, B) in zip(weights, experts)], dim=1))

    def merged_weight(self, task: int, gates: Sequence[float] | None = None) -> Tensor:
        """W_0 + s (g1 B_U A_U + g2 B_n A_n) [D_out,D_in] for one task, fixed gates."""
        A, B = self.stacked(task, gates)
        return self.base.weight.detach() + self.scale * B @ A

    @torch.no_grad()
    def as_lora(self, task: int, gates: Sequence[float] | None = None) -> "ExpertLinear":
        """The layer of method lora that computes the same, whatever task its rows have."""
        A, B = self.stacked(task, gates)
        config = ExpertConfig("lora", rank=len(A), alpha=self.scale * len(A), dropout=0.0)
        layer = type(self)(self.base, config, self.routing, self.stream)
        layer.A_U.copy_(A)
        layer.B_U.copy_(B)
        return layer

    def extra_repr(self) -> str:
        return f"method={self.config.method}, rank={self.config.rank}, stream={self.stream}"


# ------------------------------------------------------------------------------------ whole models
def adapt(model: nn.Module, method: str = "clorae", rank: int = 128,
          tasks: Sequence[str] = ("mner", "mre", "mee"), **options: object) -> nn.Module:
    """Freeze `model`, any torch module, and wrap linears with experts, in place; returns `model`.

    options: the remaining fields of ExpertConfig; targets names the linears, q and v of UMIE or
    such as ("q_proj", "v_proj").  expert_layers(model) then says which were wrapped, and
    `model.routing` is the Routing that they share (for method "full" nothing is wrapped, everything
    is trainable and routing is None).  At the start every output equals the frozen model's bit for
    bit.  ValueError, before anything is changed, for a target that matches nothing or what is no
    linear, and for a model that is adapted already."""
    config = ExpertConfig(method=method, rank=rank, **options)
    check_fresh(model)
    routing, layers = Routing(tasks), {}
    for path in wrapped_paths(model, config) if method != "full" else ():
        linear = model.get_submodule(path)
        layers[linear] = ExpertLinear(linear, config, routing, stream_of(path))
        layers[linear].train(linear.training)
    model.requires_grad_(method == "full")
    replace(model, layers)
    model.routing = routing if layers else None
    return model


def check_fresh(model: nn.Module) -> None:
    """ValueError for a model that is adapted already."""
    if getattr(model, "routing", None) is not None or expert_layers(model):
        raise ValueError("adapt: expected a model without experts, got one that has them already "
                         "or has a `routing` of its own; merge() it, or adapt a fresh one")


def stream_of(path: str) -> str:
    """The stream of tokens that a wrapped linear sees, told by the names on its path: "visual" in a
    stack for images; "target" in a decoder, but "memory" at k and v of its cross-attention;
    "memory" elsewhere.  L_MIM takes a stream's mask; a layer's `stream` may be set otherwise."""
    *names, leaf = path.split(".")
    if {"vstack", "visual", "vision_tower", "vision_model"} & set(names):
        return "visual"
    crosses = {"cross_attention", "encoder_attn", "EncDecAttention", "crossattention"} & set(names)
    return "target" if "decoder" in names and not (crosses and leaf[0] in "kv") else "memory"


def merge(model: nn.Module, task: int | str,
          gates: Mapping[str, Sequence[float]] | None = None) -> nn.Module:
    """Turn an adapted model, in place, into a plain one that answers as for rows of one task.

    Experts are added to the weights of their linears, which stand where they stood before: exactly
    but for rounding where there is no gate router.  Where there is one, gates fixes it, which is an
    approximation: {path: (g1, g2)}, such as means of what read_gates reads.  Returns `model`."""
    layers = expert_layers(model)
    if not layers or gates is not None and gates.keys() != layers.keys():
        raise ValueError(f"merge: expected a model with experts and gates of all {len(layers)}, or "
                         f"none, got {gates and len(gates)}; adapt it, and name gates by the paths "
                         "of expert_layers(model)")
    n, = model.routing.indices([task])
    merged = {m: m.merged_weight(n, gates and gates[path]) for path, m in layers.items()}
    for layer, W in merged.items():
        old = layer.base.weight  # may be tied to another module's, which keeps its values
        layer.base.weight = nn.Parameter(W.to(old.dtype), requires_grad=old.requires_grad)
    replace(model, {layer: layer.base for layer in layers.values()})
    model.routing = None
    return model


@contextmanager
def read_gates(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """`with read_gates(model) as gates:` collects {path: the gates [B,S,2] of each pass} of the
    layers that have a gate router."""
    layers = {path: m for path, m in expert_layers(model).items() if hasattr(m, "W_g")}
    gates = {path: [] for path in layers}
    hooks = [layer.register_forward_pre_hook(
        lambda layer, inputs, path=path: gates[path].append(layer.gates(inputs[0]).detach()))
        for path, layer in layers.items()]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def save(model: nn.Module, path: str | Path) -> None:
    """Write the experts of an adapted model and their config, without the base, as one .safetensors
    file; `load` reads it."""
    layers = expert_layers(model)
    if not layers:
        raise ValueError(f"{path}: expected a model with experts, got none to save; adapt() first")
    config = asdict(next(iter(layers.values())).config)
    write_adapter(Path(path), {f"{name}.{leaf}": p for name, layer in layers.items()
                               for leaf, p in layer.named_parameters(recurse=False)},
                  {**config, "tasks": model.routing.names})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Adapt a fresh model as `save` found it, with the experts of that file; returns `model`.

    UsageError, before anything is changed, for a damaged file or one that fits other linears."""
    def shapes(tasks: Sequence[str], **options: Any) -> dict[str, list[int]]:
        config, expected = ExpertConfig(**options), {}
        for name in wrapped_paths(model, config):
            d_out, d_in = model.get_submodule(name).weight.shape
            layer = ExpertLinear(nn.Linear(d_in, d_out, device="meta"), config, Routing(tasks), "")
            expected |= {f"{name}.{leaf}": list(p.shape)
                         for leaf, p in layer.named_parameters(recurse=False)}
        return expected

    check_fresh(model)
    options, tensors = read_adapter(Path(path), shapes)
    adapt(model, **options)
    for name, tensor in tensors.items():
        p = model.get_parameter(name)
        p.data = tensor.to(p.device)  # in the type that was saved, whose bits an answer needs
    return model


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """All wrapped linears by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ExpertLinear)}


def keep_outputs(model: nn.Module) -> None:
    """Let each layer keep the outputs of its experts in the next forward pass.

    To be called before each forward pass whose loss has L_MIM; expert_outputs then takes them."""
    for layer in expert_layers(model).values():
        layer.keeps_outputs, layer.outputs = True, None


def take_outputs(model: nn.Module) -> list[tuple[ExpertLinear, tuple]]:
    """The layers that have seen tokens since keep_outputs, each with the outputs that it kept.

    The layers forget them and keep no more, so that a block which the backward pass computes a
    second time (--checkpoint-activations) leaves nothing behind.  Raises ValueError if the mask of
    a layer's stream is unknown or has another number of tokens."""
    taken = []
    for layer in expert_layers(model).values():
        if layer.outputs is not None:
            taken.append((layer, layer.outputs))
        layer.keeps_outputs, layer.outputs = False, None
    for layer, outputs in taken:
        layer.routing.check_mask(layer.stream, outputs[-1])
    return taken


def expert_outputs(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What L_MIM, Eq. (5), needs of each layer that has seen tokens since keep_outputs: U and the
    student's mean, by default D, [B,S,D_out], the mask of the real tokens [B,S], and sigma^2
    [D_out].  See take_outputs."""
    return [(*outputs, layer.routing.masks[layer.stream], variance(layer.rho))
            for layer, outputs in take_outputs(model)]


def parameter_split(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters as {"experts", "gate", "mim", "visual", "backbone"}."""
    split = {"experts": 0, "gate": 0, "mim": 0, "visual": 0, "backbone": 0}
    names = {  # of a layer's parameters; one that is missing here is a KeyError
        "experts": "A_U B_U A_T B_T A_E B_E M_U L_T", "gate": "W_g w_T", "mim": "rho a_D c_D M_D"}
    groups = {name: group for group, leaves in names.items() for name in leaves.split()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = name.split(".")
            visual = path[0] in ("visual_embedding", "vstack", "fusion")
            expert = isinstance(model.get_submodule(".".join(path[:-1])), ExpertLinear)
            group = groups[path[-1]] if expert else "visual" if visual else "backbone"
            split[group] += parameter.numel()
    return split
