"""The losses of C-LoRAE: cross-entropy, achievement weights (AML), mutual information (MIM).

Paper: C-LoRAE, IJCAI 2025, arXiv 2505.06303, Eq. (5), (9), (10).  Margin, exponent and softmax of
AML follow the achievement-based loss that the paper builds on (Yun and Cho, ICCV 2023); the
variational bound follows Ahn et al., CVPR 2019.  docs/decisions.md lists where the paper is silent.

    paper symbol      name here        meaning
    s_t^m             f1               dev F1 of unit m after epoch t, in %
    p_m               reference        F1 to be reached by unit m ("SoTA"), in %
    w_t^m             weights          achievement weight of unit m in epoch t + 1
    ∂, gamma          margin, gamma    slack above the reference, exponent
    U, D              U, D             outputs of the universal and the task expert of a linear
    (Ahn) sigma^2     variance         one per output channel of a wrapped linear

Shapes: B rows, T target tokens, D model width, C vocabulary; S tokens of a row and D_out channels
that a wrapped linear puts out.  A unit is a column of Table 2: T15 T17 SNAP V1 V2 MED MEAE.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of padding
PIECE = 1024  # tokens whose logits are held at once
RMS_FLOOR = 1e-3  # keeps the scale of L_MIM finite while U is still zero

# p_m of Eq. (9), from Table 2: the best single-task model of each unit; or, the paper's other
# reading, the best of all, UMIE-XL included.
SINGLE_TASK_F1 = {"T15": 78.9, "T17": 89.8, "SNAP": 90.2, "V1": 81.8, "V2": 82.0,
                  "MED": 57.6, "MEAE": 23.4}
SOTA_F1 = {"T15": 78.9, "T17": 91.4, "SNAP": 91.0, "V1": 86.4, "V2": 82.0, "MED": 62.1,
           "MEAE": 24.5}


def token_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor],
                        piece: int = PIECE, real: Tensor | None = None) -> Tensor:
    """The cross-entropy of each row, summed over its target tokens: sum_j CE_ij, [B], in fp32.

    hidden [B,T,D]; labels [B,T], IGNORE at padding, which adds nothing; head: [n,D] -> logits
    [n,C]; real [n]: positions in labels.flatten() that include every label but padding, where they
    are known already.  L_MT of Eq. (10) is the sum over rows, each times the weight of its unit,
    divided by the target tokens of the global batch: with all weights 1, the mean over tokens.

    The logits are the largest tensor of a step.  So the head takes at most `piece` tokens at a
    time, and where there are more, the backward pass computes the logits again."""
    if real is None:  # on a GPU the host must wait for the result
        real = (labels.flatten() != IGNORE).nonzero()[:, 0]
    states, targets = hidden.flatten(0, 1)[real], labels.flatten()[real]

    def cross_entropy(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="none")

    if len(real) <= piece:
        per_token = cross_entropy(states, targets)
    else:  # a head draws no random numbers, so their state need not be kept
        per_token = torch.cat([
            checkpoint(cross_entropy, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(states.split(piece), targets.split(piece))])
    sums = hidden.new_zeros(len(labels), dtype=torch.float32)
    row_of_token = real // labels.shape[1]
    return sums.index_add(0, row_of_token, per_token)


def achievement_weights(f1: Mapping[str, float], reference: Mapping[str, float],
                        margin: float = 1.05, gamma: float = 2.0,
                        temperature: float = 1.0) -> dict[str, float]:
    """The weight of each unit for the next epoch, from its dev F1 and its reference (both in %).

    Eq. (9): v_m = max(0, 1 - s_m / (margin p_m))^gamma, and w = M softmax(v / temperature) over the
    M units of this run, so that the mean weight is 1.  For a unit above margin * p_m the printed
    Eq. (9) rises again or becomes NaN; the maximum with 0 keeps it at the least weight.  ValueError
    for a unit without a positive reference."""
    for unit in f1:
        if not reference.get(unit, 0) > 0:
            raise ValueError(f"AML: expected a positive reference F1 for unit {unit}, got "
                             f"{reference.get(unit)}; add it to aml_reference or use --no-aml")
    v = {m: max(0.0, 1 - f1[m] / (margin * reference[m])) ** gamma for m in f1}  # Eq. (9)
    exponentials = {m: math.exp(v[m] / temperature) for m in f1}
    total = sum(exponentials.values())
    return {m: len(f1) * e / total for m, e in exponentials.items()}


def mutual_information(outputs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], B: int | Tensor,
                       count: int) -> Tensor:
    """L_MIM, a scalar >= ln(0.1) / 2: the mean over wrapped linears l of L_l, the bound of Eq. (5).

    outputs: for each wrapped linear that saw tokens U and D [rows,S,D_out], the mask of the real
    tokens [rows,S] and variance [D_out] (clorae.expert_outputs); B: rows of the global batch;
    count: wrapped linears of the model, also those that saw no token.  In D's place may stand
    another mean of the student, see clorae.ExpertLinear.student.

    L_l is -log p(U | D) for a Gaussian with mean D and variance sigma^2, without its constants: the
    mean over channels, then over the real tokens of a row, then over rows.  U and D are divided by
    the row's RMS of U.  The teacher U gets no gradient.  As B counts the global batch, the values
    of micro-batches and ranks are to be added.  docs/decisions.md weighs a sum over channels."""
    total = torch.zeros(())
    for U, D, mask, variance in outputs:
        U, D = U.detach().to(variance.dtype), D.to(variance.dtype)
        real = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [rows,1]
        share = mask / real.to(variance.dtype)  # (share * x).sum(dim=1): a row's mean over tokens
        rms = (share * U.square().mean(dim=-1)).sum(dim=1).sqrt() + RMS_FLOOR  # [rows]
        e = (D - U) / rms[:, None, None]
        bound = 0.5 * (e.square() / variance + variance.log()).mean(dim=-1)  # Eq. (5), per token
        total = total + (share * bound).sum() / B
    return total / count
