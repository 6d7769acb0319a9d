"""The losses of C-LoRAE: cross-entropy, achievement weights (AML), mutual information (MIM).

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303, Eq. (5), (9), (10).  Margin, exponent and softmax of
AML follow the achievement-based loss that the paper builds on (Yun and Cho, ICCV 2023); the
variational bound follows Ahn et al., CVPR 2019.  README lists where the paper is silent.

    paper symbol      name here        meaning
    s_t^m             f1               dev F1 of unit m after epoch t, in %
    p_m               reference        F1 to be reached by unit m ("SoTA"), in %
    w_t^m             weights          achievement weight of unit m in epoch t + 1
    ∂, gamma          margin, gamma    slack above the reference, exponent
    U, D              (never formed)   outputs of the universal and the task expert
    (Ahn) sigma^2     variance         one per output channel of a wrapped linear

Shapes: B rows, T target tokens, D model width, C vocabulary, D_out width of a wrapped linear,
k = R + r its rank-space columns.  A unit is a column of Table 2: T15 T17 SNAP V1 V2 MED MEAE.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of padding
PIECE = 1024  # tokens whose logits are held at once

# p_m of Eq. (9), from Table 2: the best single-task model of each unit; or, the paper's other
# reading, the best of all, UMIE-XL included.
SINGLE_TASK_F1 = {"T15": 78.9, "T17": 89.8, "SNAP": 90.2, "V1": 81.8, "V2": 82.0,
                  "MED": 57.6, "MEAE": 23.4}
SOTA_F1 = {"T15": 78.9, "T17": 91.4, "SNAP": 91.0, "V1": 86.4, "V2": 82.0, "MED": 62.1,
           "MEAE": 24.5}


def token_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor],
                        piece: int = PIECE, real: Tensor | None = None) -> Tensor:
    """sum_j CE_ij of each row, [B], in fp32.

    hidden [B,T,D]; labels [B,T] with IGNORE for padding, which adds nothing; head: [n,D] -> logits
    [n,C]; real [n]: where the labels that count lie among all B T, if that is known; padding may be
    among them.  Weighed by the rows' units and divided by the target tokens of the global batch it
    is L_MT of Eq. (10); with all weights 1 that is the plain token mean.  The head runs on these
    tokens alone and, past `piece` of them, on one piece at a time, which the backward pass makes
    again: the logits [B,T,C] are the largest tensor that a step would keep.
    """
    if real is None:  # to find them, the host waits for a GPU
        real = (labels.flatten() != IGNORE).nonzero()[:, 0]
    pieces = list(zip(hidden.flatten(0, 1)[real].split(piece), labels.flatten()[real].split(piece)))

    def loss(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="none")

    again = dict(use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a head
    found = [checkpoint(loss, *some, **again) if len(pieces) > 1 else loss(*some)
             for some in pieces]
    rows = real // labels.shape[1]
    return hidden.new_zeros(len(labels), dtype=torch.float32).index_add(0, rows, torch.cat(found))


def achievement_weights(f1: Mapping[str, float], reference: Mapping[str, float],
                        margin: float = 1.05, gamma: float = 2.0,
                        temperature: float = 1.0) -> dict[str, float]:
    """The weight of each unit for the next epoch, from its dev F1 and its reference (both in %).

    w_m = max(0, 1 - s_m / (margin p_m))^gamma, then M softmax(w / temperature) over the M units of
    this run, so that the mean weight is 1.  The clamp keeps a unit that passes margin * p_m at
    weight zero, where Eq. (9) as printed would rise again or become NaN.  Computed in float64, the
    same on every rank.  Raises ValueError for a unit without a positive reference.
    """
    for unit in f1:
        if not reference.get(unit, 0) > 0:
            raise ValueError(f"AML: expected a positive reference F1 for unit {unit}, got "
                             f"{reference.get(unit)}; add it to aml_reference or use --no-aml")
    raw = {m: max(0.0, 1 - f1[m] / (margin * reference[m])) ** gamma for m in f1}  # Eq. (9)
    exponentials = {m: math.exp(w / temperature) for m, w in raw.items()}
    total = sum(exponentials.values())
    return {m: len(f1) * e / total for m, e in exponentials.items()}


class Moments(Protocol):
    """What the L wrapped linears of one stream of tokens report; made by clorae.stream_moments,
    which explains the weights a_t and b_t of a token t."""

    distance: Tensor  # [L,D_out] sum_t a_t (D_tc - U_tc)^2
    b: Tensor  # sum_t b_t
    variance: Tensor  # [L,D_out] sigma^2


def mutual_information(streams: Sequence[Moments], count: int) -> Tensor:
    """L_MIM = 1 / count sum_l L_l, a scalar >= ln(0.1) / 2, exact without forming U or D.

    L_l = 1 / (2 D_out) sum_c (distance_c / sigma_c^2 + (sum_t b_t) ln sigma_c^2): the bound of
    Eq. (5), -E log p(U | D) for a Gaussian with mean D and variance sigma^2, constants dropped.
    streams: the reports of this (micro-)batch; count: wrapped linears of the model, including those
    that saw no valid token.  Additive over micro-batches and ranks.
    """
    total = torch.zeros(())
    for report in streams:
        variance = report.variance
        with torch.autocast(variance.device.type, enabled=False):  # fp32 island
            bound = (report.distance / variance + report.b * variance.log()).sum()
        total = total + bound / (2 * variance.shape[-1])  # Eq. (5)
    return total / count
