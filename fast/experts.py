"""The expert layer in rank space: clorae.ExpertLinear without forming U and D.

    y = W_0 x + s (g1 B_U A_U x + g2 B_n A_n x) = W_0 x + [B_U B_n] (s g z),   z = [A_U ; A_n] x

The gate multiplies the k = R + r numbers z of a token, its codes, instead of two outputs of width
D_out.  Tokens of one task that follow each other, a run, share one product; padding may have been
taken out of them.

Letters as in clorae.py; t tokens, k = R + r ranks.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from clorae import ExpertLinear, Routing, wide

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


# --------------------------------------------------------------------------------------- the layer

class FastExpertLinear(ExpertLinear):
    """ExpertLinear in rank space.  It also takes the real tokens of a batch alone, [t,D_in].

    For L_MIM it keeps (runs, z_U [t,R], z_D [t,r]) in place of U and D: see fast/mim.py.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in], or real tokens [t,D_in] -> y in that shape."""
        if self.config.method not in ("clorae", "tlora"):  # the others take tokens in any shape
            return super().forward(x)
        runs, tokens = token_runs(self.routing, x, self.stream), x.flatten(0, -2)
        y = self.base(tokens)
        y = self.adapted(y, tokens.to(y.dtype), runs)
        return y.view(*x.shape[:-1], y.shape[-1])

    def adapted(self, y: Tensor, x: Tensor, runs: Runs) -> Tensor:
        """y [t,D_out] = W_0 x, and x [t,D_in] in its type -> y + s h.

        Products with the universal expert take all tokens at once, those with the task experts one
        run at a time.
        """
        tasks, sizes = zip(*runs)
        gates = self.gates(x)
        s1, s2 = ((self.scale, self.scale) if gates is None
                  else (self.scale * gates).split(1, dim=-1))  # s g1 and s g2, [t,1]
        x = self.dropped(x)
        A_T, B_T = self.A_T.to(x.dtype), self.B_T.to(x.dtype)
        z_D = torch.cat([x_n @ A_T[n].T for n, x_n in zip(tasks, x.split(sizes))])
        y = y + torch.cat([z_n @ B_T[n].T for n, z_n in zip(tasks, (s2 * z_D).split(sizes))])
        if self.config.has_universal:
            z_U = x @ self.A_U.to(x.dtype).T
            self.remember(runs, z_U.detach(), z_D)
            y = torch.addmm(y, s1 * z_U, self.B_U.to(x.dtype).T)
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

    def factors(self) -> list[Tensor]:
        """A_U, A_T, B_U, B_T and W_g; absent ones have no rows, and under fixed gates W_g is."""
        d_out, d_in = self.base.weight.shape
        shapes = {"A_U": (0, d_in), "A_T": (1, 0, d_in), "B_U": (d_out, 0), "B_T": (1, d_out, 0),
                  "W_g": (0, d_in)}
        given = dict(self.named_parameters(recurse=False))
        like = next(iter(given.values()))
        if self.fixed_gates is not None:
            given.pop("W_g", None)
        return [given[name] if name in given else like.new_empty(shape)
                for name, shape in shapes.items()]


FORMS = {ExpertLinear: FastExpertLinear}
