"""The expert layer in rank space: clorae.ExpertLinear without forming U and D.

    y = W_0 x + s (g1 B_U A_U x + g2 B_n A_n x) = W_0 x + [B_U B_n] (s g z),   z = [A_U ; A_n] x

The gate multiplies the k = R + r numbers z of a token, its codes, instead of two outputs of width
D_out.  Tokens of one task that follow each other, a run, share one product; padding may have been
taken out of them.  Gradients are written by hand (LowRank): the same under autograd took 1.07 to
1.16 times as long per layer (768 wide, 2,048 tokens, ranks 128 and 42, fp32, two cores of a Xeon
with AVX-512 and AMX).

Letters as in clorae.py; t tokens, n runs of them, k = R + r ranks, E experts of LoRAMoE.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clorae import ExpertLinear, Routing, wide
from fast.products import dropout_factors

RANK_SPACE = ("clorae", "lora", "tlora")  # methods of one universal and one task expert at most

Runs = list[tuple[int, int]]  # the task, and the number of tokens, of each run


# -------------------------------------------------------------------------- which tokens make a run

def row_runs(routing: Routing, rows: int) -> list[tuple[int, slice]]:
    """Runs of rows of one task, as (task, rows); a batch sorted by task has one run per task.

    On a GPU the host reads the tasks, once a batch, and checks them then.
    """
    key = "rows", rows
    if key not in routing.derived:
        tasks = routing.tasks_of(rows).tolist()
        routing.check(tasks)
        edges = [i for i in range(rows + 1) if i in (0, rows) or tasks[i] != tasks[i - 1]]
        runs = [(tasks[i], slice(i, j)) for i, j in itertools.pairwise(edges)]
        routing.derived[key] = runs or [(0, slice(0, 0))]
    return routing.derived[key]


def token_runs(routing: Routing, x: Tensor, stream: str) -> Runs:
    """The runs of x [B,S,D_in], or of the real tokens [t,D_in] alone, which are as many in each row
    as the stream's mask says.  ValueError if these are not t."""
    if x.dim() == 3:
        return [(task, (rows.stop - rows.start) * x.shape[1])
                for task, rows in row_runs(routing, len(x))]
    if routing.tasks is None:
        return [(0, len(x))]
    mask, key = routing.masks.get(stream), ("runs", stream)
    if key not in routing.derived and mask is not None:
        lengths = mask.sum(dim=1).tolist()
        routing.derived[key] = [(task, sum(lengths[rows]))
                                for task, rows in row_runs(routing, len(lengths))]
    runs = routing.derived.get(key, [])
    if (known := sum(size for _, size in runs)) != len(x):
        raise ValueError(f"routing: expected the {known} tokens of the stream {stream} that "
                         f"the mask given to set() calls real, got {len(x)}; give set() the "
                         "masks that the model is given")
    return runs


def gate_shares(routing: Routing, rows: int, widths: tuple[int, int], scale: float,
                like: Tensor) -> Tensor:
    """[rows,2,R + N r]: gates @ shares is s g of each rank of all experts, for rows of one token.

    The scale stands where g1 counts, at the universal expert's ranks, and where g2 does, at those
    of the row's own task; elsewhere 0.
    """
    key = "shares", rows, *widths, scale, like.dtype, like.device
    if key not in routing.derived:
        (R, r), N = widths, len(routing.names)
        shares = like.new_zeros(rows, 2, R + N * r)
        shares[:, 0, :R] = scale
        tasks = routing.tasks_of(rows).to(like.device)
        shares[:, 1, R:] = spread(like.new_full((rows, r), scale), tasks, N)
        routing.derived[key] = shares
    return routing.derived[key]


def spread(codes: Tensor, tasks: Tensor, N: int) -> Tensor:
    """Codes [...,t,r] of the task of each token, [t] -> those of all N tasks, [...,t,N r], 0 for
    other tasks: a product over tokens is then one for all tasks, whose runs nobody needs."""
    active = tasks[:, None] == torch.arange(N, device=tasks.device)  # [t,N]
    return (codes[..., None, :] * active[..., None]).flatten(-2)


# ------------------------------------------------------------------- the factors of several experts

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


def to_tasks(gradients: Tensor, tasks: Sequence[int], N: int) -> Tensor:
    """The reverse of `of_tasks`: [n,...] -> [N,...], the sum for a task that comes twice."""
    stacked = gradients.new_zeros(N, *gradients.shape[1:])
    for task, gradient in zip(tasks, gradients):
        stacked[task] += gradient
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
    for z_e, v_e, weight in zip(z.split_with_sizes(widths), v.split_with_sizes(widths),
                                weights.to(z.dtype).unbind()):
        torch.mul(z_e, weight, out=v_e)
    return v


# ------------------------------------------------------------------------ the product in rank space

class LowRank(torch.autograd.Function):
    """y + B (s g z) with z = A x, run by run of tokens that share their experts.

    Written by hand for what autograd cannot know: y may be added to in place, since nobody else
    needs W_0 x; the gate's logit is one more row of z; the joined factors, v = s g z and the
    dropped x are cheaper made again than kept.  The codes z are outputs as well, so that L_MIM's
    gradient comes back through z_D.  They have a row per rank and a column per token: those of one
    expert are then one block of memory.  Only products go run by run.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, keep: Tensor | None, gates: Tensor | None,
                scale: float, runs: Runs, *factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> y, and the codes z_U [R,t], which have no gradient, and z_D [r,t] of all tokens.

        y [t,D_out], written into; x [t,D_in]; keep [t,D_in] or None: factors of dropout on the
        experts' input; all of one type.  gates [t,E] or None: weights in place of the router's.
        factors: see `join`.
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
        dg = [products.sum(0) for products in (dv * codes[:k]).split_with_sizes(ctx.widths)]
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


class FastExpertLinear(ExpertLinear):
    """ExpertLinear in rank space.  It also takes the real tokens of a batch alone, [t,D_in].

    For L_MIM it keeps (runs, z_U [R,t], z_D [r,t]) in place of U and D: see fast/mim.py.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in], or real tokens [t,D_in] -> y in that shape."""
        runs, tokens = self.runs(x), x.flatten(0, -2)
        y = self.base(tokens)
        y = self.adapted(y, tokens.to(y.dtype), runs)
        return y.view(*x.shape[:-1], y.shape[-1])

    def adapted(self, y: Tensor, x: Tensor, runs: Runs) -> Tensor:
        """y [t,D_out] = W_0 x, which may be written into, and x [t,D_in] -> y + s h."""
        if self.config.method == "moslora":  # B M A x: the mixer joins all ranks
            A, M, B = (factor.to(y.dtype) for factor in (self.A_U, self.M_U, self.B_U))
            return y + F.linear(self.scale * F.linear(F.linear(self.dropped(x), A), M), B)
        gates = self.given_gates(x)
        if self.config.method == "loramoe":  # every expert for every row, each under its own mask
            for g, A_U, B_U in zip(gates.split(1, dim=-1), self.A_E, self.B_E):
                factors = self.factors({"A_U": A_U, "B_U": B_U})
                y, *_ = LowRank.apply(y, x, self.dropout_mask(x), g, self.scale, runs, *factors)
            return y
        y, *codes = LowRank.apply(y, x, self.dropout_mask(x), gates, self.scale, runs,
                                  *self.factors())
        self.remember(runs, *codes)
        return y

    def parts(self) -> tuple[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]] | None:
        """The layer for the next token of each row, as fast/decoder.py joins it with others:
        W_0 x + up between(down x), with [W_0, *down], up and the function between.

        The experts of all tasks take part, so that rows of different tasks share a product.  None:
        forward is to be called.
        """
        if self.config.method not in RANK_SPACE or self.base.bias is not None:
            return None
        A_U, A_T, B_U, B_T, W_g = self.factors()
        return [self.base.weight, A_U, A_T.flatten(0, 1), W_g], [B_U, *B_T], self.between

    def between(self, codes: Tensor) -> Tensor:
        """codes [rows,1,K (+ 2)], z of all K = R + N r ranks and the gate's logits -> s g z, which
        is 0 for the experts of other tasks."""
        shares = gate_shares(self.routing, len(codes), self.widths, self.scale, codes)
        z, logits = codes.tensor_split([shares.shape[-1]], dim=-1)
        if logits.shape[-1]:
            gates = wide(logits).softmax(dim=-1).to(z.dtype)  # Eq. (6)
        else:
            fixed = self.fixed_gates if self.config.method == "clorae" else None
            gates = z.new_tensor(fixed or (1, 1)).expand(len(z), 1, 2)
        return z * (gates @ shares)

    def runs(self, x: Tensor) -> Runs:
        """The runs of x: all tokens are one where no expert belongs to a task."""
        if self.config.has_tasks:
            return token_runs(self.routing, x, self.stream)
        return [(0, x.shape[:-1].numel())]

    def dropout_mask(self, x: Tensor) -> Tensor | None:
        """Dropout of the experts' input: 0 with probability p, else 1 / (1 - p), in x's shape and
        type; one mask for both experts, None where nothing is dropped."""
        p = self.config.dropout
        if not self.training or p == 0:
            return None
        return dropout_factors(x, p) if x.device.type == "cpu" else F.dropout(torch.ones_like(x), p)

    def dropped(self, x: Tensor) -> Tensor:
        """x under dropout, in training."""
        mask = self.dropout_mask(x)
        return x if mask is None else x * mask

    def given_gates(self, x: Tensor) -> Tensor | None:
        """The gates that LowRank cannot make itself: fixed ones, and those over E experts."""
        given = self.fixed_gates is not None or self.config.method == "loramoe"
        return self.gates(x) if given else None

    def factors(self, given: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """A_U, A_T, B_U, B_T, W_g as `join` takes them; `given` in place of the layer's parameters.
        Under fixed gates there is no router."""
        d_out, d_in = self.base.weight.shape
        shapes = {"A_U": (0, d_in), "A_T": (1, 0, d_in), "B_U": (d_out, 0), "B_T": (1, d_out, 0),
                  "W_g": (0, d_in)}
        given = dict(self._parameters if given is None else given)
        like = next(iter(given.values()))
        if self.fixed_gates is not None:
            given.pop("W_g", None)
        return [given[name] if name in given else like.new_empty(shape)
                for name, shape in shapes.items()]


FORMS = {ExpertLinear: FastExpertLinear}
