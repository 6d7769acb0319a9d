"""losses.py as a specification: cross-entropy, AML (Eq. 9), MIM (Eq. 5) against worked values."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losses

UNITS = ("T15", "T17", "SNAP", "V1", "V2", "MED", "MEAE")
SINGLE = dict(zip(UNITS, (78.9, 89.8, 90.2, 81.8, 82.0, 57.6, 23.4)))


@pytest.mark.parametrize("piece", [1024, 20, 5, 1])
def test_cross_entropy_per_row_sums_to_the_token_mean(piece):
    """With all weights 1, sum_i CE_i / tokens is plain token-mean CE, with every
    gradient, in one piece or in many."""
    head, hidden = nn.Linear(7, 11), torch.randn(4, 6, 7, requires_grad=True)
    labels = torch.randint(0, 11, (4, 6))
    labels[1, 3:] = labels[2] = losses.IGNORE
    rows = losses.token_cross_entropy(hidden, labels, head, piece)
    tokens = (labels != losses.IGNORE).sum()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(rows.sum() / tokens, expected)
    assert rows[2] == 0
    wanted = [hidden, *head.parameters()]
    for ours, own in zip(torch.autograd.grad(rows.sum() / tokens, wanted),
                         torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(ours, own)


def test_the_head_sees_real_tokens_only_and_never_more_than_a_piece_of_them():
    """[B,T,C] would be the largest tensor of a step; padding needs no logits at all."""
    seen, labels = [], torch.randint(0, 11, (4, 6))
    labels[1, 3:] = labels[2] = losses.IGNORE

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return states

    losses.token_cross_entropy(torch.randn(4, 6, 11), labels, head, 6)
    assert seen == [6, 6, 3]


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    """Cross-entropy is an fp32 island."""
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    labels = torch.randint(0, 50, (2, 3))
    rows = losses.token_cross_entropy(logits, labels, nn.Identity())
    assert rows.dtype == torch.float32
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(rows.sum().double(), exact, rtol=1e-6, atol=1e-6)


def test_without_any_achievement_all_weights_are_one():
    """Eq. (9): s = 0 for all gives w = 1 for all."""
    weights = losses.achievement_weights(dict.fromkeys(UNITS, 0.0), SINGLE)
    assert all(math.isclose(w, 1.0) for w in weights.values())


def test_the_early_training_example():
    """s = 40 50 55 20 15 20 2 against Table 2's single-task models, by an independent script."""
    weights = losses.achievement_weights(dict(zip(UNITS, (40, 50, 55, 20, 15, 20, 2))), SINGLE)
    expected = [0.801, 0.765, 0.731, 1.105, 1.213, 0.960, 1.426]
    assert [round(w, 3) for w in weights.values()] == expected


def test_weights_by_hand_for_two_units():
    """One unit at half its margin, one done: w = (.25, 0), 2 softmax(.25, 0)."""
    weights = losses.achievement_weights({"T15": 52.5, "T17": 105.0}, {"T15": 100, "T17": 100})
    assert math.isclose(weights["T15"], 2 * math.exp(0.25) / (math.exp(0.25) + 1))
    assert math.isclose(weights["T17"], 2 / (math.exp(0.25) + 1))


@pytest.mark.parametrize("seed", range(20))
def test_weights_have_mean_one_and_stay_in_their_range(seed):
    """Mean 1; for M = 7 within [0.404, 2.184]."""
    generator = torch.Generator().manual_seed(seed)
    f1 = dict(zip(UNITS, (torch.rand(7, generator=generator) * 110).tolist()))
    weights = losses.achievement_weights(f1, SINGLE)
    assert math.isclose(sum(weights.values()), 7)
    assert all(0.404 <= w <= 2.184 for w in weights.values())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_a_units_weight_never_rises_with_its_own_score(gamma):
    """Non-increasing in s, also beyond margin * p, and never NaN."""
    others = dict.fromkeys(UNITS, 30.0)
    values = [losses.achievement_weights({**others, "MEAE": s / 2}, SINGLE, gamma=gamma)["MEAE"]
              for s in range(200)]
    assert all(math.isfinite(v) for v in values)
    assert all(a >= b for a, b in zip(values, values[1:]))


def test_weights_follow_their_units_under_any_order():
    """Permuting the units permutes the weights."""
    f1 = dict(zip(UNITS, (40, 50, 55, 20, 15, 20, 2)))
    weights = losses.achievement_weights(f1, SINGLE)
    reversed_weights = losses.achievement_weights(dict(reversed(f1.items())), SINGLE)
    assert all(math.isclose(weights[unit], reversed_weights[unit]) for unit in UNITS)


def test_an_absent_unit_shrinks_the_total():
    """The weights sum to the number of units of this run."""
    weights = losses.achievement_weights({"T15": 10.0, "MED": 50.0, "V2": 3.0}, SINGLE)
    assert math.isclose(sum(weights.values()), 3)


def test_a_unit_without_reference_is_named():
    with pytest.raises(ValueError, match="unit MED"):
        losses.achievement_weights({"MED": 10.0}, {"T15": 70.0})


def test_mim_closed_form_of_one_token():
    """Eq. (5) by hand: e = (D - U) / rms, L = mean_c (e^2 / sigma^2 + ln sigma^2) / 2."""
    U, D = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, 1.0]]])
    variance, rms = torch.tensor([0.5, 2.0]), math.sqrt(2.5) + 1e-3
    expected = 0.5 * ((4 / rms ** 2 / 0.5 + math.log(0.5)) + (9 / rms ** 2 / 2 + math.log(2.0))) / 2
    ours = losses.mutual_information([(U, D, torch.tensor([[True]]), variance)], 1, 1)
    assert math.isclose(ours.item(), expected, rel_tol=1e-6)


def naive_mim(U: torch.Tensor, D: torch.Tensor, mask: torch.Tensor, variance: torch.Tensor,
              B: int) -> torch.Tensor:
    """Eq. (5) word for word: over samples, the mean bound of their real tokens, U detached."""
    U, total = U.detach(), D.new_zeros(())
    for i in range(len(U)):
        J = mask[i].nonzero()[:, 0].tolist()
        rms = torch.stack([U[i, j] for j in J]).square().mean().sqrt() + 1e-3 if J else 1.0
        for j in J:
            for c in range(U.shape[-1]):
                e = (D[i, j, c] - U[i, j, c]) / rms
                bound = 0.5 * (e ** 2 / variance[c] + variance[c].log())
                total = total + bound / (len(J) * U.shape[-1])
    return total / B


def test_mim_equals_the_bound_written_out_with_every_gradient():
    """Padding, a row without a real token, a batch of more rows; the teacher learns nothing."""
    U, D = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    variance = torch.rand(5, dtype=torch.float64).add(0.1).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    ours = losses.mutual_information([(U, D, mask, variance)], 8, 1)
    truth = naive_mim(U, D, mask, variance, 8)
    torch.testing.assert_close(ours, truth)
    wanted = [U, D, variance]
    for a, b in zip(*(torch.autograd.grad(value, wanted, allow_unused=True)
                      for value in (ours, truth))):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert torch.autograd.grad(losses.mutual_information([(U, D, mask, variance)], 8, 1), U,
                               allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(
        lambda D, v: losses.mutual_information([(U, D, mask, v)], 8, 1), (D, variance))


def test_eq_5_as_a_sum_over_channels_is_beta_times_their_number_where_all_layers_are_as_wide():
    """So no option is needed for that reading.  With layers of two widths it would be another."""
    def layer(width: int) -> tuple[torch.Tensor, ...]:
        U, D = torch.randn(2, 3, 4, width, dtype=torch.float64)
        return U, D, torch.ones(3, 4, dtype=torch.bool), torch.rand(width).double() + 0.1

    for widths, same in (((5, 5), True), ((5, 7), False)):
        layers = [layer(width) for width in widths]
        summed = sum(width * naive_mim(*each, 3) for width, each in zip(widths, layers)) / 2
        assert torch.isclose(5 * losses.mutual_information(layers, 3, 2), summed).item() is same


def test_mim_of_bf16_outputs_is_computed_in_fp32():
    """The outputs come as autocast leaves them; the variance is fp32."""
    U, D = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    mask, variance = torch.ones(3, 4, dtype=torch.bool), torch.full((5,), 1.5)
    ours = losses.mutual_information([(U, D, mask, variance)], 3, 1)
    truth = naive_mim(U.double(), D.double(), mask, variance.double(), 3)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_mim_is_the_mean_over_all_layers_also_those_that_saw_nothing():
    """1 / |l| sum_l, with |l| the wrapped linears of the model; layers may differ in width."""
    one, other = ((torch.randn(3, 4, n), torch.randn(3, 4, n), torch.ones(3, 4, dtype=torch.bool),
                   torch.full((n,), 2.0)) for n in (5, 7))
    each = [losses.mutual_information([layer], 3, 1) for layer in (one, other)]
    torch.testing.assert_close(losses.mutual_information([one, other], 3, 8), sum(each) / 8)
    assert losses.mutual_information([], 3, 8) == 0
