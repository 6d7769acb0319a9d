"""L_MIM, Eq. (5), from the codes of fast/experts.py: exact, without forming U or D.

losses.mutual_information needs U and D of width D_out; here second moments of the codes z = A x
take their place, of all layers that see one stream of tokens at once.  The gradient is written by
hand: the same moments under autograd took 1.3 times as long (12 layers 768 wide, 2,048 tokens,
ranks 128 and 42, fp32, two cores of a Xeon with AVX-512 and AMX).

Letters as in clorae.py; L layers of one stream, t tokens, n runs of tokens of one task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clorae import ExpertLinear, expert_layers, take_outputs, variance, wide
from fast.experts import Runs, of_tasks, spread

RMS_FLOOR = 1e-3  # as in losses.py


def mutual_information(model: nn.Module, B: int | Tensor) -> Tensor:
    """L_MIM of what the layers have kept since clorae.keep_outputs, a scalar; they forget it.

    B: rows of the global batch.  The mean is over all wrapped linears of the model, also those that
    saw no token.  Additive over micro-batches and ranks.
    """
    taken, total = take_outputs(model), torch.zeros(())
    for stream in ("memory", "target", "visual"):
        members = [(layer, *kept) for layer, kept in taken if layer.stream == stream]
        if members:
            seen = stream_moments(members, B)
            with torch.autocast(seen.variance.device.type, enabled=False):  # fp32 island
                bound = (seen.distance / seen.variance + seen.b * seen.variance.log()).sum()
            total = total + bound / (2 * seen.variance.shape[-1])  # Eq. (5)
    return total / len(expert_layers(model))


@dataclass
class Moments:
    """What Eq. (5) needs of the L layers of one stream.

    distance [L,D_out]: sum_t a_t (D_tc - U_tc)^2 of each output channel c over the real tokens t;
    b: sum_t b_t, a scalar (a_t and b_t: see `stream_moments`); variance [L,D_out]: sigma^2.
    """

    distance: Tensor
    b: Tensor
    variance: Tensor


def stream_moments(members: Sequence[tuple[ExpertLinear, Runs | Tensor, Tensor, Tensor]],
                   B: int | Tensor) -> Moments:
    """Second moments of all layers of a stream; the teacher U has no gradient.

    members: each layer with the runs of its tokens, or their tasks [t], and the codes z_U [R,t] and
    z_D [r,t] of all tokens of the stream's mask [rows,S], or of the real ones.
    J_i are the real tokens of sample i.  Each counts b_t = 1 / (B |J_i|), and a_t = b_t / rms_i^2,
    with rms_i the RMS of U over the sample's tokens and channels.
    """
    layers, (runs, *_), z_U, z_D = zip(*members)
    mask = layers[0].routing.masks[layers[0].stream]
    z_U, z_D = torch.stack(z_U), torch.stack(z_D)  # [L,R,t], [L,r,t]
    B_U = torch.stack([layer.B_U for layer in layers]).detach()  # [L,D_out,R]
    B_D = torch.stack([layer.B_T for layer in layers], dim=1)  # [N,L,D_out,r]
    if isinstance(runs, Tensor):  # all tasks' experts as one
        z_D = spread(z_D.mT, runs, len(B_D)).mT
        B_D, sizes = torch.cat(B_D.unbind(), dim=-1)[None], (len(runs),)
    else:
        tasks, sizes = zip(*runs)
        B_D = of_tasks(B_D, tasks)
    sigma2 = variance(torch.stack([layer.rho for layer in layers]))  # [L,D_out]
    with torch.autocast(mask.device.type, enabled=False):  # fp32 island
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(sigma2.dtype)  # 1 / |J_i|
        real = mask.flatten() if z_U.shape[-1] < mask.numel() else None  # z lacks the padding
        z_U, z_D = wide(z_U), wide(z_D)
        energy = (((B_U.mT @ B_U) @ z_U) * z_U).sum(dim=1)  # [L,t] |U_t|^2, no U formed
        if real is not None:
            energy = energy.new_zeros(len(layers), len(real)).masked_scatter(real, energy)
        power = (energy.unflatten(1, mask.shape) * share).sum(dim=-1) / B_U.shape[1]  # [L,rows]
        rms = (power.clamp(min=0).sqrt() + RMS_FLOOR)[..., None]  # [L,rows,1]
        a = (share / B / rms.square()).flatten(1)  # [L,rows S]
        a = (a if real is None else a[:, real])[:, None]  # [L,1,t]
        distance = SquaredDistance.apply(z_D, B_D, z_U, B_U, a, sizes)
        return Moments(distance, share.sum() / B, sigma2)


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
        pieces = (z.split(sizes, dim=2) for z in (z_D, a_D, a_U))
        for B_n, z_n, a_D_n, a_U_n in zip(B_D, *pieces):
            student, mixed = B_n @ (a_D_n @ z_n.mT), B_U @ (a_U_n @ z_n.mT)  # [L,D_out,r]
            slopes.append(student - mixed)  # (C M)_n = sum_t a_t (D_t - U_t) z_n,t^T
            distance += ((slopes[-1] - mixed) * B_n).sum(dim=-1)  # D's block, less the mixed twice
        ctx.save_for_backward(B_D, B_U, a_D, a_U, *slopes)
        ctx.sizes = sizes
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        B_D, B_U, a_D, a_U, *slopes = ctx.saved_tensors
        dz, dB, w = torch.empty_like(a_D), torch.empty_like(B_D), 2 * gradient[..., None]
        pieces = (z.split(ctx.sizes, dim=2) for z in (dz, a_D, a_U))
        for B_n, dB_n, slope, dz_n, a_D_n, a_U_n in zip(B_D, dB, slopes, *pieces):
            torch.mul(w, slope, out=dB_n)
            back = (w * B_n).mT
            torch.sub(back @ B_n @ a_D_n, back @ B_U @ a_U_n, out=dz_n)
        return dz, dB, None, None, None, None
