"""clorae.py as a specification: the expert layer against the paper's equations, a token at a time.

The fast forms of the layer are held equal to this one by tests/test_experts.py.

Letters: B rows, S tokens, R universal rank, r task rank, N tasks.
"""

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clorae
import losses
from clorae import ExpertConfig, ExpertLinear, Routing
from engine.weights import SHIPPED
from t5 import T5, Stack, T5Config
from vision import UMIE

TASKS = ("mner", "mre", "mee")
METHODS = [("clorae", {}), ("clorae", {"egr": False}), ("clorae", {"mim": False}), ("lora", {}),
           ("tlora", {}), ("moslora", {}), ("loramoe", {}), ("loramoe", {"experts": 3}),
           ("hydralora", {}), ("hydralora", {"heads": 2}), ("mtllora", {"heads": 2})]
MIM_ALONE = ("rho", "a_D", "c_D", "M_D")  # parameters that no output depends on
B, S, D_IN, D_OUT, R, r, N = 5, 7, 24, 20, 9, 3, 3


def layer(method: str = "clorae", dtype: torch.dtype = torch.float32, awake: bool = True,
          dropout: float = 0.0, **options: object) -> ExpertLinear:
    """One wrapped linear with D_in != D_out; `awake` gives B and W_g values that are not zero."""
    torch.manual_seed(1)
    config = ExpertConfig(method=method, rank=R, dropout=dropout, **options)
    made = ExpertLinear(nn.Linear(D_IN, D_OUT, bias=False), config, Routing(TASKS), "memory")
    made.base.requires_grad_(False)
    if awake:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name in ("B_U", "B_T", "B_E", "W_g", "L_T", "w_T", "a_D", "c_D", "M_D"):
                    parameter.normal_(0, 0.3)
    return made.to(dtype)


def naive(m: ExpertLinear, x: Tensor, tasks: Tensor,
          drops: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3), (4), (6)-(8) word for word, for one token after the other: y, U, D [B,S,D_out].

    LoRAMoE: sum_e softmax(W_g x)_e B_e A_e x; MoSLoRA: B M A x; HydraLoRA: sum_i softmax(W_g x)_i
    B_i A x; MTL-LoRA: sum_i softmax(w_t / tau)_i B_i Lambda_t A x.  drops: x under dropout, for
    all experts, or for each of LoRAMoE's.
    """
    triples = [naive_token(m, x[i, j], int(tasks[i]), [drop[i, j] for drop in drops or [x]])
               for i in range(len(x)) for j in range(x.shape[1])]
    return tuple(torch.stack(vectors).view(*x.shape[:2], D_OUT) for vectors in zip(*triples))


def naive_token(m: ExpertLinear, x: Tensor, n: int, seen: list[Tensor]) -> list[Tensor]:
    """y, U and D of one token x [D_in] of task n; seen: x under dropout."""
    U = D = x.new_zeros(D_OUT)
    gates = [1, 1]
    if hasattr(m, "W_g"):
        powers = [torch.exp(W @ x) for W in m.W_g]
        gates = [power / sum(powers) for power in powers]
    if m.config.method == "loramoe":
        h = sum(g * (B @ (A @ drop)) for g, A, B, drop in zip(gates, m.A_E, m.B_E, 3 * seen))
        return [m.base.weight @ x + 2.0 * h, U, D]
    if m.config.method == "hydralora":
        h = sum(g * (B @ (m.A_U @ seen[0])) for g, B in zip(gates, m.B_E))
        return [m.base.weight @ x + 2.0 * h, U, D]
    if m.config.method == "mtllora":
        powers = [torch.exp(w / 0.5) for w in m.w_T[n]]
        h = sum(power / sum(powers) * (B @ (m.L_T[n] @ (m.A_U @ seen[0])))
                for power, B in zip(powers, m.B_E))
        return [m.base.weight @ x + 2.0 * h, U, D]
    if m.config.method == "moslora":
        return [m.base.weight @ x + 2.0 * (m.B_U @ (m.M_U @ (m.A_U @ seen[0]))), U, D]
    assert m.config.method in ("clorae", "lora", "tlora"), "write the method's equation here"
    if m.config.has_universal:
        U = m.B_U @ (m.A_U @ seen[0])
    if m.config.has_tasks:
        D = m.B_T[n] @ (m.A_T[n] @ seen[0])
    h = gates[0] * U + gates[1] * D
    return [m.base.weight @ x + 2.0 * h, U, D]  # alpha / r = 2 R / R


def naive_mim(m: ExpertLinear, x: Tensor, tasks: Tensor, mask: Tensor) -> Tensor:
    """Eq. (5) word for word: mean over samples of the Gaussian bound, U detached."""
    _, U, D = naive(m, x, tasks)
    U, total = U.detach(), x.new_zeros(())
    if m.config.mim_mean == "affine":
        D = torch.stack([a * D[..., k] + c for k, (a, c) in enumerate(zip(m.a_D, m.c_D))], dim=-1)
    if m.config.mim_mean == "map":
        means = [m.B_U.detach() @ (m.M_D @ (m.A_T[n] @ x_j))
                 for n, row in zip(tasks.tolist(), x) for x_j in row]
        D = torch.stack(means).view_as(D)
    variance = F.softplus(m.rho) + 0.1
    for i in range(len(x)):
        valid = mask[i]
        if valid.any():
            rho = U[i, valid].square().mean().sqrt() + 1e-3
            e = (D[i, valid] - U[i, valid]) / rho
            total = total + (0.5 * (e.square() / variance + variance.log())).mean()
    return total / len(x)


def run(m: ExpertLinear, x: Tensor, tasks: Tensor, mask: Tensor | None = None) -> Tensor:
    m.routing.set(tasks, memory=mask)
    clorae.keep_outputs(m)
    return m(x)


def mim(model: nn.Module, rows: int = B, count: int = 1) -> Tensor:
    return losses.mutual_information(clorae.expert_outputs(model), rows, count)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, tasks in sorted order, and a mask with a row that has no valid token at all."""
    torch.manual_seed(2)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = mask[3] = mask[4, 1:] = False
    return torch.randn(B, S, D_IN, dtype=dtype), torch.tensor([0, 0, 1, 2, 2]), mask


def test_every_method_is_held_by_the_tests_of_this_file():
    assert {method for method, _ in METHODS} == set(clorae.METHODS) - {"full"}


@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_zero_initialised_experts_leave_the_linear_unchanged_bit_for_bit(method, options, training):
    """B_U = B_n = 0, so y = W_0 x exactly, with dropout drawn or not."""
    m = layer(method, awake=False, dropout=0.1, **options).train(training)
    x, tasks, _ = inputs()
    assert torch.equal(run(m, x, tasks), m.base(x))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gates_start_at_one_half_and_stay_a_distribution(dtype, tolerance):
    """W_g = 0 gives g = (.5, .5); later g >= 0 and g1 + g2 = 1."""
    x, _, _ = inputs(dtype)
    assert torch.equal(layer(dtype=dtype, awake=False).gates(x),
                       torch.full((B, S, 2), 0.5, dtype=dtype))
    gates = layer(dtype=dtype).gates(x).float()
    assert (gates >= 0).all()
    assert (gates.sum(-1) - 1).abs().max() <= tolerance


@pytest.mark.parametrize("method, options", METHODS)
def test_the_layer_equals_the_paper_equations_with_every_gradient(method, options):
    """y = W_0 x + s (g1 U + g2 D), to 1e-10 in float64."""
    m, (x, tasks, _) = layer(method, torch.float64, **options), inputs(torch.float64)
    x.requires_grad_()
    upstream = torch.randn(B, S, D_OUT, dtype=torch.float64)
    wanted = {n: p for n, p in m.named_parameters() if p.requires_grad and n not in MIM_ALONE}
    wanted["x"], reference, y = x, naive(m, x, tasks)[0], run(m, x, tasks)
    torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-10)
    got, expected = ({n: p.clone() for n, p in zip(wanted, torch.autograd.grad(
        (outputs * upstream).sum(), list(wanted.values()), materialize_grads=True))}
        for outputs in (y, reference))
    for name in wanted:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-10,
                                   msg=lambda said, name=name: f"gradient of {name}: {said}")
        assert got[name].any(), f"{name} trains and has no part in the layer"


@pytest.mark.parametrize("method, options", METHODS)
def test_a_batch_without_a_real_token_gives_nothing_and_learns_nothing(method, options):
    """t = 0, as of the visual tokens of rows without images."""
    m, (_, tasks, mask) = layer(method, **options).train(), inputs()
    y = run(m, torch.randn(B, 0, D_IN, requires_grad=True), tasks, mask[:, :0])
    (y.sum() + (mim(m) if hasattr(m, "rho") else 0)).backward()
    assert y.shape == (B, 0, D_OUT)
    assert not any(p.grad is not None and p.grad.any() for p in m.parameters())


def test_float64_gradcheck_of_the_layer():
    """Finite differences agree with autograd through gates and experts."""
    m, (x, tasks, _) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    x = x[:3, :2].clone().requires_grad_()
    names = ("A_U", "B_U", "A_T", "B_T", "W_g")

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        m.routing.set(tasks[:3])
        return torch.func.functional_call(m, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *(getattr(m, name) for name in names)))


def test_float64_gradcheck_of_mim_in_the_student_and_the_variance():
    """L_MIM has the gradients of finite differences in A_n, B_n and rho."""
    m, (x, tasks, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    names = ("A_T", "B_T", "rho")

    def loss(*values: Tensor) -> Tensor:
        m.routing.set(tasks[1:4], memory=mask[1:4])
        clorae.keep_outputs(m)
        named = dict(zip(names, values))
        torch.func.functional_call(m, named, (x[1:4],))
        (U, D, kept, _), = clorae.expert_outputs(m)
        return losses.mutual_information([(U, D, kept, clorae.variance(named["rho"]))], B, 2)

    assert torch.autograd.gradcheck(loss, tuple(getattr(m, name) for name in names))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_layer_stays_within_twice_the_error_of_the_naive_form(autocast):
    """The error against float64 is bounded by twice the naive formula's own in bf16; autocast: a
    bf16 linear with fp32 experts, as in training."""
    x, tasks, _ = inputs()
    exact = naive(layer(dtype=torch.float64), x.double(), tasks)[0]
    m = layer(dtype=torch.float32 if autocast else torch.bfloat16)
    m.base.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = run(m, x if autocast else x.bfloat16(), tasks)
    plain = naive(layer(dtype=torch.bfloat16), x.bfloat16(), tasks)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_first_backward_reaches_only_the_up_projections():
    """With B = 0, B_U and B_n get gradient; A's and W_g exactly zero; all finite."""
    m, (x, tasks, mask) = layer(awake=False).train(), inputs()
    y = run(m, x, tasks, mask)
    loss = y.square().sum() + mim(m)
    loss.backward()
    for name in ("A_U", "A_T", "W_g"):
        assert torch.count_nonzero(getattr(m, name).grad) == 0, name
    for name in ("B_U", "B_T"):
        assert torch.count_nonzero(getattr(m, name).grad) > 0, name
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.requires_grad)


def test_a_batch_of_one_task_trains_no_other_expert():
    """Gradients of A_k, B_k are exactly 0 for every absent task k."""
    m, (x, _, mask) = layer().train(), inputs()
    y = run(m, x, torch.full((B,), 1), mask)
    (y.square().sum() + mim(m)).backward()
    for parameter in (m.A_T, m.B_T):
        assert torch.count_nonzero(parameter.grad[1]) > 0
        assert torch.count_nonzero(parameter.grad[[0, 2]]) == 0


def test_the_task_changes_the_output_only_once_task_experts_have_learned():
    """A task label matters iff B_n is not zero."""
    x, tasks, _ = inputs()
    for awake in (False, True):
        m = layer(awake=awake)
        same = torch.equal(run(m, x, tasks), run(m, x, (tasks + 1) % N))
        assert same is not awake


def test_rows_in_any_order_of_tasks_equal_rows_alone():
    """A mixed batch is the sum of its rows, sorted by task or not."""
    m, (x, _, _) = layer(), inputs()
    tasks = torch.tensor([2, 0, 1, 0, 2])
    together = run(m, x, tasks)
    alone = torch.cat([run(m, x[i:i + 1], tasks[i:i + 1]) for i in range(B)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_mixed_batch_gradients_equal_any_micro_batch_split():
    """With global normalisers, loss and gradients add up over micro-batches."""
    m, (x, tasks, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)

    def gradients(parts: list[list[int]]) -> dict[str, Tensor]:
        m.zero_grad()
        for rows in parts:
            y = run(m, x[rows], tasks[rows], mask[rows])
            (y.square().sum() + mim(m)).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}

    whole = gradients([[0, 1, 2, 3, 4]])
    for split in ([[0, 1], [2], [3, 4]], [[4, 0], [1, 3, 2]], [[i] for i in range(B)]):
        for name, value in gradients(split).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mean", clorae.MEANS)
@pytest.mark.parametrize("order", [[0, 0, 1, 2, 2], [2, 0, 2, 1, 0], [1, 1, 1, 1, 1]])
def test_mim_equals_its_formula_with_every_gradient(order, mean):
    """Eq. (5) from what the layer keeps: tasks sorted, in runs that come twice, or absent; under
    every reading of the student's mean.  U's factors and the gate learn nothing from it."""
    m, (x, _, mask) = layer(dtype=torch.float64, mim_mean=mean).train(), inputs(torch.float64)
    tasks = torch.tensor(order)
    wanted = [p for p in m.parameters() if p.requires_grad] + [x.requires_grad_()]
    expected_value = naive_mim(m, x, tasks, mask)
    expected = torch.autograd.grad(expected_value, wanted, allow_unused=True)
    run(m, x, tasks, mask)
    value = mim(m)
    got = torch.autograd.grad(value, wanted, allow_unused=True)
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-9)
    named = dict(zip([n for n, p in m.named_parameters() if p.requires_grad], got))
    assert {name for name, gradient in named.items() if gradient is None} == {
        "A_U", "B_U", "W_g"} | ({"B_T"} if mean == "map" else set())
    for ours, reference in zip(got, expected):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", clorae.MEANS)
def test_every_mean_of_the_student_starts_finite_and_learns(mean):
    """L_MIM is 0 at the start, where U and every mean are; once U is not, the mean's parameters
    have a gradient.  "affine" starts as the identity, "map" at a mean of 0."""
    m, (x, tasks, mask) = layer(mim_mean=mean, awake=False).train(), inputs()
    run(m, x, tasks, mask)
    assert mim(m).item() == pytest.approx(0, abs=1e-6)
    nn.init.normal_(m.B_U, std=1e-3)
    nn.init.normal_(m.B_T, std=1e-3)
    run(m, x, tasks, mask)
    (U, kept, *_), = clorae.expert_outputs(m)
    D = naive(m, x, tasks)[2]
    torch.testing.assert_close(kept, torch.zeros_like(D) if mean == "map" else D)
    run(m, x, tasks, mask)
    mim(m).backward()
    for name in {"identity": ("B_T",), "affine": ("a_D", "c_D", "B_T"), "map": ("M_D",)}[mean]:
        gradient = getattr(m, name).grad
        assert torch.isfinite(gradient).all() and torch.count_nonzero(gradient) > 0, name


def test_the_student_s_mean_is_for_training_alone():
    """A layer without the variance, as an exported adapter builds it, has none of its numbers."""
    m, (x, tasks, _) = layer(mim=False, mim_mean="map"), inputs()
    assert not hasattr(m, "M_D")
    run(m, x, tasks)
    with pytest.raises(ValueError, match="mim_mean: expected one of identity, affine, map"):
        layer(mim_mean="network")


def test_mim_starts_at_zero_and_never_falls_below_its_floor():
    """0 within 1e-9 at the start (U = D = 0, sigma = 1), >= ln(.1) / 2."""
    x, tasks, mask = inputs()
    mask[3, 0] = True  # the mean is over the batch: a row without tokens would lower its weight
    m = layer(awake=False).train()
    run(m, x, tasks, mask)
    assert abs(mim(m).item()) < 1e-6
    with torch.no_grad():
        m.rho.fill_(-50.0)
    run(m, x, tasks, mask)
    assert math.isclose(mim(m).item(),
                        0.5 * math.log(0.1), rel_tol=1e-5)


def test_mim_gives_the_teacher_no_gradient_and_the_student_some():
    """U is detached, D learns."""
    m, (x, tasks, mask) = layer().train(), inputs()
    run(m, x, tasks, mask)
    mim(m).backward()
    for name in ("A_U", "B_U", "W_g"):
        grad = getattr(m, name).grad
        assert grad is None or torch.count_nonzero(grad) == 0, name
    assert torch.count_nonzero(m.A_T.grad) > 0 and torch.count_nonzero(m.B_T.grad) > 0


def test_padding_changes_no_mim():
    """Neither the content nor the amount of padding matters."""
    m, (x, tasks, mask) = layer().train(), inputs()
    values = []
    for padded, valid in ((x, mask), (x.masked_fill(~mask[..., None], 9.0), mask),
                          (F.pad(x, (0, 0, 0, 3), value=-4.0), F.pad(mask, (0, 3)))):
        run(m, padded, tasks, valid)
        values.append(mim(m).item())
    assert max(values) - min(values) < 1e-6


def test_outputs_are_kept_when_they_are_wanted_and_taken_once():
    """None in evaluation, none unless keep_outputs asked for them, none after they were taken."""
    m, (x, tasks, mask) = layer(), inputs()
    run(m.eval(), x, tasks, mask)
    assert clorae.expert_outputs(m) == []
    m.train()(x)
    assert m.outputs is None
    run(m, x, tasks, mask)
    (U, D, kept, variance), = clorae.expert_outputs(m)
    for ours, truth in zip((U, D), naive(m, x, tasks)[1:]):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    assert kept is mask and torch.equal(variance, F.softplus(m.rho) + 0.1)
    m(x)
    assert m.outputs is None and clorae.expert_outputs(m) == []
    without = layer(mim=False).train()
    run(without, x, tasks, mask)
    assert clorae.expert_outputs(without) == []


def copy(source: ExpertLinear, target: ExpertLinear) -> ExpertLinear:
    """Give target the parameters that both have."""
    target.load_state_dict(source.state_dict(), strict=False)
    return target


@pytest.mark.parametrize("gates, method", [((1.0, 0.0), "lora"), ((0.0, 1.0), "tlora")])
def test_c_lorae_with_a_closed_gate_is_plain_lora(gates, method):
    """g = (1, 0) leaves the universal expert, g = (0, 1) the task experts."""
    x, tasks, _ = inputs()
    full = layer()
    full.fixed_gates = gates
    torch.testing.assert_close(run(full, x, tasks), run(copy(full, layer(method)), x, tasks))


def test_c_lorae_without_router_and_task_experts_is_plain_lora():
    """--no-egr with B_n = 0 gives h = U."""
    x, tasks, _ = inputs()
    m = layer(egr=False)
    nn.init.zeros_(m.B_T)
    torch.testing.assert_close(run(m, x, tasks), run(copy(m, layer("lora")), x, tasks))


def test_moslora_with_the_identity_as_mixer_is_plain_lora():
    """M = I."""
    x, tasks, _ = inputs()
    m = layer("moslora")
    nn.init.eye_(m.M_U)
    torch.testing.assert_close(run(m, x, tasks), run(copy(m, layer("lora")), x, tasks))


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_loramoe_with_equal_experts_or_only_one_is_plain_lora(experts):
    """Gates sum to 1, so that equal experts are one."""
    x, tasks, _ = inputs()
    m, plain = layer("loramoe", experts=experts), layer("lora")
    with torch.no_grad():
        m.A_E.copy_(plain.A_U.expand_as(m.A_E))
        m.B_E.copy_(plain.B_U.expand_as(m.B_E))
    torch.testing.assert_close(run(m, x, tasks), run(plain, x, tasks), rtol=1e-5, atol=1e-5)


def test_loramoe_draws_a_dropout_mask_for_each_expert():
    """As its authors' code: y = W_0 x + s sum_e g_e B_e A_e dropout_e(x); the router sees x."""
    m, (x, tasks, _) = layer("loramoe", dropout=0.5).train(), inputs()
    torch.manual_seed(7)
    y = run(m, x, tasks)
    torch.manual_seed(7)
    drops = [F.dropout(x, 0.5) for _ in m.A_E]
    assert not torch.equal(*drops)
    torch.testing.assert_close(y, naive(m, x, tasks, drops)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "moslora", "loramoe", "hydralora"])
def test_methods_without_task_experts_never_look_at_the_task(method):
    """Their rows give the same output whatever the task, announced or not."""
    m, (x, tasks, _) = layer(method), inputs()
    assert torch.equal(run(m, x, tasks), run(m, x, (tasks + 1) % N))


def test_hydralora_with_equal_heads_is_plain_lora():
    """Gates sum to 1, so that equal heads are one."""
    x, tasks, _ = inputs()
    m, plain = layer("hydralora"), layer("lora")
    with torch.no_grad():
        m.A_U.copy_(plain.A_U)
        m.B_E.copy_(plain.B_U.expand_as(m.B_E))
    torch.testing.assert_close(run(m, x, tasks), run(plain, x, tasks), rtol=1e-5, atol=1e-5)


def test_mtllora_starts_as_its_authors_code_and_is_then_a_lora_of_each_task():
    """Lambda_t = 1, B_i = 0, random w_t; with all w_t equal its heads count alike."""
    m, (x, _, _) = layer("mtllora", awake=False), inputs()
    assert torch.equal(m.L_T, torch.eye(R).expand(N, R, R)) and not m.B_E.any()
    assert m.w_T.unique().numel() == 3 * N
    m, plain = layer("mtllora"), layer("lora")
    nn.init.zeros_(m.w_T)
    for n in range(N):
        with torch.no_grad():
            plain.A_U.copy_(m.L_T[n] @ m.A_U)
            plain.B_U.copy_(m.B_E.mean(dim=0))
        tasks = torch.full((B,), n)
        torch.testing.assert_close(run(m, x, tasks), run(plain, x, tasks), rtol=1e-5, atol=1e-5)


def test_merging_needs_a_fixed_gate_and_then_is_exact():
    """W_0 + s (g1 B_U A_U + g2 B_n A_n) equals the layer; a live gate refuses."""
    x, _, _ = inputs()
    m = layer()
    with pytest.raises(ValueError, match="live gate"):
        m.merged_weight(1)
    m.fixed_gates = (0.3, 0.7)
    y = run(m, x, torch.full((B,), 1))
    torch.testing.assert_close(x @ m.merged_weight(1, (0.3, 0.7)).T, y, rtol=1e-5, atol=1e-5)
    for method in sorted({method for method, _ in METHODS}):
        plain = layer(method)
        if hasattr(plain, "W_g"):
            continue
        y = run(plain, x, torch.full((B,), 2))
        torch.testing.assert_close(x @ plain.merged_weight(2).T, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.as_lora(2)(x), y, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="expected no gates"):
            plain.merged_weight(2, (0.3, 0.7))


def test_what_a_method_does_not_say_of_itself_is_not_guessed():
    """Its h, its product and the group of its parameters: docs/method.md lists where they stand."""
    m, (x, tasks, _) = layer("lora"), inputs()
    object.__setattr__(m.config, "method", "mine")
    with pytest.raises(NotImplementedError, match="mine: its h"):
        run(m, x, tasks)
    with pytest.raises(ValueError, match="merge: expected a method whose A and B are known, got m"):
        m.merged_weight(0)
    m.magnitude = nn.Parameter(torch.ones(D_OUT))
    with pytest.raises(KeyError, match="magnitude"):
        clorae.parameter_split(nn.ModuleDict({"q": m}))


def test_dropout_is_one_mask_for_both_experts_and_spares_the_gate():
    """U and D read the same dropped x, the gate x itself: y and every gradient, in float64."""
    m, (x, tasks, _) = layer(dtype=torch.float64, dropout=0.5).train(), inputs(torch.float64)
    wanted = [p for n, p in m.named_parameters() if p.requires_grad and n != "rho"]
    wanted += [x.requires_grad_()]
    torch.manual_seed(7)
    y = run(m, x, tasks)
    torch.manual_seed(7)
    expected, *_ = naive(m, x, tasks, [F.dropout(x, 0.5)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad((y * upstream).sum(), wanted),
                               torch.autograd.grad((expected * upstream).sum(), wanted)):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_mim_alone_may_be_differentiated():
    """The loss on y may be absent: then only L_MIM's gradient reaches the factors."""
    m, (x, tasks, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    run(m, x, tasks, mask)
    wanted = (m.A_T, m.B_T, m.rho)
    got = torch.autograd.grad(mim(m), wanted)
    expected = torch.autograd.grad(naive_mim(m, x, tasks, mask), wanted)
    for ours, reference in zip(got, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_dropout_drops_its_share_scales_what_it_keeps_and_follows_the_seed():
    """Each element is 0 with probability p, else x / (1 - p); the mean is kept."""
    m, x = layer(dropout=0.1).train(), torch.ones(7, 333, 101)
    torch.manual_seed(3)
    first = m.dropped(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    torch.manual_seed(3)
    assert torch.equal(m.dropped(x), first) and not torch.equal(m.dropped(x), first)
    assert torch.equal(m.eval().dropped(x), x)


def test_beams_and_dropped_rows_keep_their_tasks():
    """Row k of the decoder computes with the task of request index[k]."""
    m, (x, _, _) = layer(), inputs()
    m.routing.set(torch.tensor([0, 1, 2, 1, 0]))
    index = torch.tensor([1, 1, 3, 4])
    m.routing.rows(index)
    followed = m(x[:4])
    expected = run(m, x[:4], torch.tensor([1, 1, 1, 0]))
    assert torch.equal(followed, expected)


def test_what_is_derived_from_the_rows_is_forgotten_with_them():
    """`set` and `rows` empty `derived`; rows before any batch change nothing.  Without a batch only
    a single task goes without saying."""
    routing = Routing(TASKS)
    routing.rows(torch.tensor([0, 0]))
    assert routing.tasks is None and Routing(["mner"]).tasks_of(3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="expected the tasks of 3 rows, got none"):
        routing.tasks_of(3)
    for change, values in ((routing.set, [0, 2]), (routing.rows, [1, 1, 1])):
        routing.derived["made"] = 1
        change(torch.tensor(values))
        assert routing.derived == {}
    assert routing.tasks_of(3).tolist() == [2, 2, 2]


def test_unknown_tasks_and_forgotten_rows_are_errors():
    """A task without expert, or a batch that was never announced, names itself."""
    m, (x, _, _) = layer(), inputs()
    with pytest.raises(ValueError, match="got 3"):
        m.routing.set(torch.tensor([0, 3]))
    m.routing.set(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected 2 rows"):
        m(x)
    with pytest.raises(ValueError, match="at least one column per task"):
        clorae.adapt(tiny_umie(), "clorae", rank=2)


# --------------------------------------------------------------------------------- whole models

def tiny_umie(fusion: str = "gate", d_kv: int = 5) -> UMIE:
    """A UMIE whose H K = 3 * 5 differs from D = 16, as in t5-small."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=d_kv, d_ff=24, num_layers=2,
                      num_decoder_layers=1, num_heads=3, feed_forward_proj="gated-gelu",
                      dropout_rate=0.0, tie_head=False, scale_logits=False)
    torch.manual_seed(3)
    return UMIE(T5(config), feature_width=12, max_objects=4, fusion=fusion)


def test_adapt_wraps_q_and_v_of_t5_and_vstack_and_nothing_else():
    """Encoder, decoder self and cross, VStack; never the fusion, k, o, or a proj_v."""
    model = tiny_umie()
    model.vstack.proj_v = nn.Linear(4, 4)
    clorae.adapt(model, rank=6)
    paths = list(clorae.expert_layers(model))
    assert len(paths) == 2 * (2 + 2 * 1 + 2)
    assert {path.split(".")[-1] for path in paths} == {"q", "v"}
    assert not any("fusion" in path or "proj_v" in path for path in paths)
    assert [p for p in paths if clorae.stream_of(p) == "visual"] == \
        [p for p in paths if p.startswith("vstack")]
    assert clorae.stream_of("t5.decoder.blocks.0.cross_attention.v") == "memory"
    assert clorae.stream_of("t5.decoder.blocks.0.cross_attention.q") == "target"
    assert clorae.stream_of("t5.encoder.blocks.0.self_attention.q") == "memory"


def test_adapting_twice_or_in_vain_is_an_error():
    model = clorae.adapt(tiny_umie(), rank=6)
    with pytest.raises(ValueError, match="without experts"):
        clorae.adapt(model, rank=6)
    with pytest.raises(ValueError, match="expected linears"):
        clorae.adapt(nn.Linear(3, 3), rank=6)
    with pytest.raises(ValueError, match="method"):
        clorae.adapt(tiny_umie(), "adapter")


@pytest.mark.parametrize("method, options", METHODS)
def test_an_adapted_t5_equals_the_frozen_one_bit_for_bit(method, options):
    """B = 0 leaves a whole model as it is, D_in != D_out, whatever the tasks."""
    ids, mask = torch.randint(2, 40, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    labels = torch.randint(2, 40, (2, 5))
    t5 = tiny_umie().t5.eval().requires_grad_(False)  # as the frozen model: same kernels
    before, _ = t5(ids, mask, labels)
    clorae.adapt(t5, method, rank=6, **options)
    with t5.routing.batch([2, 1]):
        assert torch.equal(t5(ids, mask, labels)[0], before)


# flan-t5 geometries and what must be counted there (in parameters, experts of the method only).
GEOMETRIES = {"base": (768, 12, 12, 2048, 128), "large": (1024, 24, 16, 2816, 64),
              "xl": (2048, 24, 32, 5120, 64)}
COUNTS = {("lora", ()): (14.942, 19.399, 38.797), ("tlora", ()): (14.709, 19.096, 38.191),
          ("clorae", ()): (29.826, 38.949, 77.898),
          ("clorae", ("egr",)): (29.709, 38.646, 77.292),
          ("clorae", ("mim",)): (29.768, 38.797, 77.595),
          ("moslora", ()): (16.187, 20.005, 39.404), ("loramoe", ()): (30.001, 39.100, 78.201),
          ("hydralora", ()): (30.060, 39.252, 78.504), ("mtllora", ()): (33.621, 40.617, 79.415)}


@pytest.mark.parametrize("size", GEOMETRIES)
@pytest.mark.parametrize("method, without", COUNTS)
def test_parameter_counts_equal_the_table_at_published_geometry(size, method, without):
    """76 / 148 / 148 wrapped linears; LoRA 2dr, task experts 2d*3*floor(r/3), gate 2d,
    MIM d, MoSLoRA's mixer r^2, LoRAMoE two LoRAs and a router of 2d per linear, HydraLoRA and
    MTL-LoRA one A, three B and a router of 3d or, per task, r^2 + 3 numbers, exactly."""
    d, layers, heads, d_ff, rank = GEOMETRIES[size]
    with torch.device("meta"):
        config = T5Config(vocab_size=32128, d_model=d, d_kv=64, d_ff=d_ff, num_layers=layers,
                          num_decoder_layers=layers, num_heads=heads,
                          feed_forward_proj="gated-gelu", tie_head=False, scale_logits=False)
        model = UMIE(T5(config), feature_width=768, max_objects=16, fusion="gate")
        clorae.adapt(model, method, rank=rank, **dict.fromkeys(without, False))
    linears = len(wrapped := clorae.expert_layers(model))
    assert linears == {"base": 76, "large": 148, "xl": 148}[size]
    assert {len(m.base.weight) for m in wrapped.values()} == {d}  # see mutual_information
    universal, task = 2 * d * rank, 2 * d * 3 * (rank // 3)
    each = {"lora": universal, "tlora": task, "clorae": universal + task,
            "moslora": universal + rank ** 2, "loramoe": 2 * universal + 2 * d,
            "hydralora": 4 * d * rank + 3 * d, "mtllora": 4 * d * rank + 3 * rank ** 2 + 9}[method]
    if method == "clorae":
        each += 2 * d * ("egr" not in without) + d * ("mim" not in without)
    split = clorae.parameter_split(model)
    assert sum(split.values()) == linears * each
    published = COUNTS[method, without][list(GEOMETRIES).index(size)]
    assert round(sum(split.values()) / 1e6, 3) == published
    assert split["visual"] == split["backbone"] == 0


def test_the_experts_of_the_tiny_backbone_are_all_as_wide():
    """What docs/decisions.md says of the sum over channels holds in the tiny size, too."""
    with torch.device("meta"):
        raw = json.loads((SHIPPED / "t5" / "config.json").read_text())
        config = T5Config.from_hf(raw, SHIPPED, False)
        model = clorae.adapt(UMIE(T5(config), 64, 16), rank=24)
    assert {len(m.base.weight) for m in clorae.expert_layers(model).values()} == {128}


def test_full_fine_tuning_wraps_nothing_and_trains_everything():
    """Method `full`: every parameter of T5 and of the visual adapter."""
    model = clorae.adapt(tiny_umie(), "full")
    assert not clorae.expert_layers(model) and model.routing is None
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_weights_never_move():
    """After optimizer steps the backbone is unchanged and asks for no gradient."""
    t5 = tiny_umie().t5
    before = {n: p.clone() for n, p in t5.named_parameters()}
    clorae.adapt(t5, rank=6)
    optimizer = torch.optim.Adam([p for p in t5.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = torch.randint(2, 40, (3, 6)), torch.randint(2, 40, (3, 5))
    for _ in range(3):
        t5.routing.set(torch.tensor([0, 1, 2]))
        _, loss = t5(ids, torch.ones(3, 6, dtype=torch.bool), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in t5.named_parameters():
        plain = name.replace(".base.", ".")
        if plain in before:
            assert not parameter.requires_grad and torch.equal(parameter, before[plain]), name
    assert any(torch.count_nonzero(m.B_U) for m in clorae.expert_layers(t5).values())


@pytest.mark.parametrize("beams", [1, 3])
def test_tasks_survive_beams_and_dropped_rows_in_a_whole_model(beams):
    """A mixed batch decodes as its rows do alone, whatever ends first."""
    model = clorae.adapt(tiny_umie(), rank=6).eval()
    with torch.no_grad():
        for m in clorae.expert_layers(model).values():
            m.B_U.normal_(0, 0.2)
            m.B_T.normal_(0, 0.5)
            m.W_g.normal_(0, 0.3)
        model.t5.lm_head.weight[1] *= 2  # rows end early, at different steps
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    ids = torch.randint(3, 40, (2, 7)).repeat(3, 1)

    def generate(rows: slice) -> list[list[int]]:
        count = len(tasks[rows])
        batch = SimpleNamespace(
            input_ids=ids[rows], attention_mask=torch.ones(count, 7, dtype=torch.bool),
            labels=None, tasks=tasks[rows], features=torch.zeros(count, 0, 12),
            boxes=torch.zeros(count, 0, 5), visual_mask=torch.zeros(count, 0, dtype=torch.bool))
        found = model.generate(batch, max_new_tokens=9, num_beams=beams)
        return [[i for i in row if i] for row in found.tolist()]

    together = generate(slice(None))
    assert together == [generate(slice(i, i + 1))[0] for i in range(6)]
    assert together[0] != together[2] or together[0] != together[4]  # same input, other task
    assert len({len(row) for row in together}) > 1  # some rows ended earlier than others


@pytest.mark.parametrize("method", ["clorae", "lora"])
def test_recomputed_activations_change_no_gradient_and_keep_less(method):
    """Bit for bit the same loss, L_MIM and gradients, dropout on, with fewer numbers kept."""
    model, ids = clorae.adapt(tiny_umie(), method, rank=6), torch.randint(3, 40, (3, 7))
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    batch = SimpleNamespace(
        input_ids=ids, attention_mask=torch.ones(3, 7, dtype=torch.bool), labels=ids[:, :5],
        tasks=torch.tensor([0, 1, 2]), features=torch.randn(3, 4, 12), boxes=torch.rand(3, 4, 5),
        visual_mask=torch.ones(3, 4, dtype=torch.bool))
    for layer in clorae.expert_layers(model).values():
        nn.init.normal_(layer.B_U, std=0.3)
        if hasattr(layer, "rho"):
            nn.init.normal_(layer.B_T, std=0.3)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        numbers.append(x.numel() * (x.untyped_storage().data_ptr() not in weights))
        return x

    found, kept = [], []
    for recompute in (False, True):
        for stack in stacks:
            stack.recompute = recompute
        model.zero_grad()
        numbers = []
        clorae.keep_outputs(model)
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ce = losses.token_cross_entropy(
                model.train().hidden(batch), batch.labels, model.t5.head).sum()
        L_MIM = mim(model, 3)
        (ce + L_MIM).backward()
        assert all(m.outputs is None for m in clorae.expert_layers(model).values())
        found.append([ce, L_MIM, *(p.grad for p in model.parameters() if p.requires_grad)])
        kept.append(sum(numbers))
    assert all(torch.equal(a, b) for a, b in zip(*found) if a is not None)
    assert kept[1] < 0.5 * kept[0]


def test_mim_without_masks_says_what_is_missing():
    """L_MIM weighs tokens by their masks; `set` without them is an error, not a guess."""
    m, (x, tasks, _) = layer().train(), inputs()
    run(m, x, tasks)
    with pytest.raises(ValueError, match=r"expected masks of the streams \['memory'\]"):
        clorae.expert_outputs(m)
