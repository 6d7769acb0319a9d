"""The expert layer in rank space: clorae.ExpertLinear without forming U and D.

    y = W_0 x + s (g1 B_U A_U x + g2 B_n A_n x) = W_0 x + [B_U B_n] (s g z),   z = [A_U ; A_n] x

The gate multiplies the k = R + r numbers z of a token, its codes, instead of two outputs of width
D_out.  Tokens of one task that follow each other, a run, share one product; padding may have been
taken out of them.

Letters as in clorae.py; t tokens, k = R + r ranks.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clorae import ExpertLinear, Routing, expert_layers, product, take_outputs, variance, wide
from fast.dropout import dropout

RMS_FLOOR = 1e-3  # as in losses.py
RANK_SPACE = ("clorae", "lora", "tlora")  # methods of one universal and one task expert at most

Runs = list[tuple[int, int]]  # the task, and the number of tokens, of each run


# -------------------------------------------------------------------------- which tokens make a run
def row_runs(routing: Routing, rows: int) -> list[tuple[int, slice]]:
    """Runs of rows of one task, as (task, rows); a batch sorted by task has one run per task.

    On a GPU the host reads the tasks, once a batch, and checks them then."""
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
    if routing.tasks is None:  # of one task, or an error
        return [(0, len(routing.tasks_of(len(x))))]
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
    of the row's own task; elsewhere 0."""
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

    For L_MIM it keeps (runs, z_U [t,R], z_D [t,r]) in place of U and D."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B,S,D_in], or real tokens [t,D_in] -> y in that shape."""
        if self.config.method not in ("clorae", "tlora", "mtllora"):
            return super().forward(x)  # which never asks for the task: tokens may be in any shape
        runs, tokens = token_runs(self.routing, x, self.stream), x.flatten(0, -2)
        y = self.base(tokens)
        y = self.adapted(y, tokens.to(y.dtype), runs)
        return y.view(*x.shape[:-1], y.shape[-1])

    def adapted(self, y: Tensor, x: Tensor, runs: Runs) -> Tensor:
        """y [t,D_out] = W_0 x, and x [t,D_in] in its type -> y + s h.

        Products with the universal expert take all tokens at once, those with the task experts one
        run at a time.  y is changed in place, which keeps the heap of a training step small."""
        tasks, sizes = zip(*runs)
        if self.config.method == "mtllora":
            z, B = self.dropped(x) @ self.A_U.to(x.dtype).T, self.mixed_heads()
            return y.add_(self.scale * torch.cat([
                product(B[n], self.L_T[n], z_n) for n, z_n in zip(tasks, z.split(sizes))]))
        gates = self.gates(x)
        s1, s2 = ((self.scale, self.scale) if gates is None
                  else (self.scale * gates).split(1, dim=-1))  # s g1 and s g2, [t,1]
        x = self.dropped(x)
        A_T, B_T = self.A_T.to(x.dtype), self.B_T.to(x.dtype)
        z_D = torch.cat([x_n @ A_T[n].T for n, x_n in zip(tasks, x.split(sizes))])
        y.add_(torch.cat([z_n @ B_T[n].T for n, z_n in zip(tasks, (s2 * z_D).split(sizes))]))
        if self.config.has_universal:
            z_U = x @ self.A_U.to(x.dtype).T
            self.remember(runs, z_U.detach(), z_D)
            y.addmm_(s1 * z_U, self.B_U.to(x.dtype).T)
        return y

    def parts(self) -> tuple[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]] | None:
        """The layer for the next token of each row, as fast/decoder.py joins it with others:
        W_0 x + up between(down x), with [W_0, *down], up and the function between.

        The experts of all tasks take part, so that rows of different tasks share a product.  None:
        forward is to be called."""
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
            gates = self.weighed(logits)
        else:
            fixed = self.fixed_gates if self.config.method == "clorae" else None
            gates = z.new_tensor(fixed or (1, 1)).expand(len(z), 1, 2)
        return z * (gates @ shares)

    def dropped(self, x: Tensor) -> Tensor:
        """x under dropout, in training."""
        return dropout(x, self.config.dropout, self.training)

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


# ------------------------------------------------------------------------------ L_MIM from codes
#
# losses.mutual_information needs U and D; here second moments of the codes take their place, of all
# the L layers of one width that see one stream of tokens at once.
def mutual_information(model: nn.Module, B: int | Tensor) -> Tensor:
    """L_MIM of what the layers have kept since clorae.keep_outputs, a scalar; they forget it.

    B: rows of the global batch.  The mean is over all wrapped linears of the model, also those that
    saw no token.  Additive over micro-batches and ranks."""
    total, groups = torch.zeros(()), defaultdict(list)
    for layer, kept in take_outputs(model):  # q and v of other people's models differ in D_out
        groups[layer.stream, len(layer.B_U)].append((layer, *kept))
    for _, members in sorted(groups.items()):
        distance, b, sigma2 = stream_moments(members, B)
        with torch.autocast(sigma2.device.type, enabled=False):  # fp32 island
            bound = (distance / sigma2 + b * sigma2.log()).sum()
        total = total + bound / (2 * sigma2.shape[-1])  # Eq. (5)
    return total / len(expert_layers(model))


def stream_moments(members: Sequence[tuple[ExpertLinear, Runs | Tensor, Tensor, Tensor]],
                   B: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. (5) needs of L layers of one stream and width; the teacher U has no gradient.

    -> distance [L,D_out], sum_t a_t (D_tc - U_tc)^2 of each output channel c over the real tokens
    t; sum_t b_t, a scalar; and sigma^2 [L,D_out].
    members: each layer with the runs of its tokens, or their tasks [t], and the codes z_U [t,R] and
    z_D [t,r] of all tokens of the stream's mask [rows,S], or of the real ones.
    J_i are the real tokens of sample i.  Each counts b_t = 1 / (B |J_i|), and a_t = b_t / rms_i^2,
    with rms_i the RMS of U over the sample's tokens and channels."""
    layers, (runs, *_), z_U, z_D = zip(*members)
    mask = layers[0].routing.masks[layers[0].stream]
    z_U, z_D = torch.stack(z_U), torch.stack(z_D)  # [L,t,R], [L,t,r]
    B_U = torch.stack([layer.B_U for layer in layers]).detach()  # [L,D_out,R]
    z_D, B_D = student(layers, z_D, B_U)
    if isinstance(runs, Tensor):  # all tasks' experts as one
        z_D = spread(z_D, runs, len(B_D))
        B_D, sizes = torch.cat(B_D.unbind(), dim=-1)[None], (len(runs),)
    else:
        tasks, sizes = zip(*runs)
        B_T = B_D.unbind()  # whose gradient, unlike that of an index, fills nothing with 0
        B_D = [B_T[n] for n in tasks]
    sigma2 = variance(torch.stack([layer.rho for layer in layers]))  # [L,D_out]
    with torch.autocast(mask.device.type, enabled=False):  # fp32 island
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(sigma2.dtype)  # 1 / |J_i|
        real = mask.flatten() if z_U.shape[1] < mask.numel() else None  # z lacks the padding
        z_U, z_D = wide(z_U), wide(z_D)
        energy = ((z_U @ (B_U.mT @ B_U)) * z_U).sum(dim=2)  # [L,t] |U_t|^2, no U formed
        if real is not None:
            energy = energy.new_zeros(len(layers), len(real)).masked_scatter(real, energy)
        power = (energy.unflatten(1, mask.shape) * share).sum(dim=-1) / B_U.shape[1]  # [L,rows]
        rms = (power.clamp(min=0).sqrt() + RMS_FLOOR)[..., None]  # [L,rows,1]
        a = (share / B / rms.square()).flatten(1)  # [L,rows S]
        a = (a if real is None else a[:, real])[..., None]  # [L,t,1]
        distance = squared_distance(z_U, z_D, B_U, B_D, a, sizes)
        return distance, share.sum() / B, sigma2


def student(layers: Sequence[ExpertLinear], z_D: Tensor, B_U: Tensor) -> tuple[Tensor, Tensor]:
    """ExpertLinear.student of L layers as codes [L,t,k] and what takes them to outputs, of each
    task, [N,L,D_out,k].  z_D [L,t,r]; B_U [L,D_out,R], without gradient."""
    B_D = torch.stack([layer.B_T for layer in layers], dim=1)
    if hasattr(layers[0], "a_D"):  # a D + c = [a B_n, c] [z_D ; 1]
        a, c = (torch.stack([getattr(layer, name) for layer in layers])[..., None]
                for name in ("a_D", "c_D"))  # [L,D_out,1]
        B_D = torch.cat([a * B_D, c.expand(len(B_D), -1, -1, -1)], dim=-1)
        z_D = F.pad(z_D, (0, 1), value=1.0)
    if hasattr(layers[0], "M_D"):  # the up-projection is B_U, whatever the task
        with torch.autocast(z_D.device.type, enabled=False):  # fp32 island
            z_D = product(torch.stack([layer.M_D for layer in layers]), wide(z_D))
        B_D = B_U.expand(len(B_D), -1, -1, -1)
    return z_D, B_D


def squared_distance(z_U: Tensor, z_D: Tensor, B_U: Tensor, B_D: Sequence[Tensor], a: Tensor,
                     sizes: Sequence[int]) -> Tensor:
    """sum_t a_t (D_tc - U_tc)^2 of each channel c -> [L,D_out], without forming U or D.

    z_U [L,t,R], z_D [L,t,r], both at least fp32; B_U [L,D_out,R], and B_D [L,D_out,r] of each run
    of tokens that `sizes` counts; a [L,t,1].  With z = [z_U, z_D] and S = sum_t a_t z_t^T z_t the
    sums are the diagonal of C S C^T for C = [-B_U, B_D], taken apart into three blocks of S."""
    a_U, a_D = a * z_U, a * z_D
    distance = ((B_U @ (a_U.mT @ z_U)) * B_U).sum(dim=-1)  # the block of U, of all tasks
    for B_n, z_n, a_U_n, a_D_n in zip(B_D, *(z.split(sizes, dim=1) for z in (z_D, a_U, a_D))):
        student, mixed = B_n @ (a_D_n.mT @ z_n), B_U @ (a_U_n.mT @ z_n)  # [L,D_out,r]
        distance = distance + ((student - 2 * mixed) * B_n).sum(dim=-1)
    return distance


FORMS = {ExpertLinear: FastExpertLinear}
