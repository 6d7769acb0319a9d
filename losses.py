"""The losses of C-LoRAE: cross-entropy, achievement weights (AML), mutual information (MIM).

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303, Eq. (5), (9), (10).  Margin, exponent and softmax of
AML follow the achievement-based loss that the paper builds on (Yun and Cho, ICCV 2023); the
variational bound follows Ahn et al., CVPR 2019.  README lists where the paper is silent.

    paper symbol      name here        meaning
    s_t^m             f1               dev F1 of unit m after epoch t, in %
    p_m               reference        F1 of the single-task reference of unit m, in %
    w_t^m             weights          achievement weight of unit m in epoch t + 1
    margin, gamma     margin, gamma    slack above the reference, exponent
    U, D              (never formed)   outputs of the universal and the task expert
    sigma^2           variance         one per output channel of a wrapped linear

Shapes: B rows, T target tokens, C vocabulary, D_out width of a wrapped linear, k = R + r its
rank-space columns.  A unit is a column of Table 2: T15 T17 SNAP V1 V2 MED MEAE.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # label of padding


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_j CE_ij of each row, [B], in fp32.

    logits [B,T,C]; labels [B,T] with IGNORE for padding, which adds nothing.  Weighed by the rows'
    units and divided by the target tokens of the global batch it is L_MT of Eq. (10); with all
    weights 1 that is the plain token mean.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE,
                             reduction="none")
    return losses.view_as(labels).sum(dim=1)


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
    """What the wrapped linears of one token stream report (clorae.Moments), L of them."""

    q: Tensor  # [L,D_out] sum_t a_t (D_tc - U_tc)^2
    b: Tensor  # sum_t b_t
    variance: Tensor  # [L,D_out] sigma^2


def mutual_information(streams: Sequence[Moments], count: int) -> Tensor:
    """L_MIM = 1 / count sum_l L_l, a scalar >= ln(0.1) / 2, exact without forming U or D.

    L_l = 1 / (2 D_out) sum_c (q_c / sigma_c^2 + (sum_t b_t) ln sigma_c^2): the Gaussian bound
    -E log q(U | D) of Eq. (5) with mean D and variance sigma^2, constants dropped.
    streams: the reports of this (micro-)batch; count: wrapped linears of the model, including those
    that saw no valid token.  Additive over micro-batches and ranks.
    """
    total = torch.zeros(())
    for report in streams:
        variance = report.variance
        with torch.autocast(variance.device.type, enabled=False):  # fp32 island
            bound = (report.q / variance + report.b * variance.log()).sum()
        total = total.to(bound.device) + bound / (2 * variance.shape[-1])  # Eq. (5)
    return total / count
