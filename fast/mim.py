"""L_MIM, Eq. (5), from the codes of fast/experts.py: exact, without forming U or D.

losses.mutual_information needs U and D of width D_out; here second moments of the codes z = A x
take their place, of all layers that see one stream of tokens at once.

Letters as in clorae.py; L layers of one stream, t tokens, n runs of tokens of one task.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clorae import ExpertLinear, expert_layers, take_outputs, variance, wide
from fast.experts import Runs, spread

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

    members: each layer with the runs of its tokens, or their tasks [t], and the codes z_U [t,R] and
    z_D [t,r] of all tokens of the stream's mask [rows,S], or of the real ones.
    J_i are the real tokens of sample i.  Each counts b_t = 1 / (B |J_i|), and a_t = b_t / rms_i^2,
    with rms_i the RMS of U over the sample's tokens and channels.
    """
    layers, (runs, *_), z_U, z_D = zip(*members)
    mask = layers[0].routing.masks[layers[0].stream]
    z_U, z_D = torch.stack(z_U), torch.stack(z_D)  # [L,t,R], [L,t,r]
    B_U = torch.stack([layer.B_U for layer in layers]).detach()  # [L,D_out,R]
    B_D = torch.stack([layer.B_T for layer in layers], dim=1)  # [N,L,D_out,r]
    if isinstance(runs, Tensor):  # all tasks' experts as one
        z_D = spread(z_D, runs, len(B_D))
        B_D, sizes = torch.cat(B_D.unbind(), dim=-1)[None], (len(runs),)
    else:
        tasks, sizes = zip(*runs)
        B_D = torch.stack([B_D[n] for n in tasks])  # a list as an index would stall a GPU
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
        return Moments(distance, share.sum() / B, sigma2)


def squared_distance(z_U: Tensor, z_D: Tensor, B_U: Tensor, B_D: Tensor, a: Tensor,
                     sizes: Sequence[int]) -> Tensor:
    """sum_t a_t (D_tc - U_tc)^2 of each channel c -> [L,D_out], without forming U or D.

    z_U [L,t,R], z_D [L,t,r], both at least fp32; B_U [L,D_out,R], B_D [n,L,D_out,r] of the n runs
    of tokens that `sizes` counts; a [L,t,1].  With z = [z_U, z_D] and S = sum_t a_t z_t^T z_t the
    sums are the diagonal of C S C^T for C = [-B_U, B_D], taken apart into three blocks of S.
    """
    a_U, a_D = a * z_U, a * z_D
    distance = ((B_U @ (a_U.mT @ z_U)) * B_U).sum(dim=-1)  # the block of U, of all tasks
    for B_n, z_n, a_U_n, a_D_n in zip(B_D, *(z.split(sizes, dim=1) for z in (z_D, a_U, a_D))):
        student, mixed = B_n @ (a_D_n.mT @ z_n), B_U @ (a_U_n.mT @ z_n)  # [L,D_out,r]
        distance = distance + ((student - 2 * mixed) * B_n).sum(dim=-1)
    return distance
