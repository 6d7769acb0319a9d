"""clorae.py as a specification: the expert layer against the paper's equations written out naively.

Letters: B rows, S tokens, R universal rank, r task rank, N tasks.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clorae
import losses
from clorae import ExpertConfig, ExpertLinear, Routing
from t5 import T5, Linear, Padding, Product, Stack, T5Config
from vision import UMIE

TASKS = ("mner", "mre", "mee")
METHODS = [("clorae", {}), ("clorae", {"egr": False}), ("clorae", {"mim": False}), ("lora", {}),
           ("tlora", {}), ("moslora", {}), ("loramoe", {}), ("loramoe", {"experts": 3})]
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
                if name in ("B_U", "B_T", "B_E", "W_g"):
                    parameter.normal_(0, 0.3)
    return made.to(dtype)


def naive(m: ExpertLinear, x: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3), (4), (6)-(8) word for word: y, U, D, all of width D_out.

    LoRAMoE: sum_e softmax(W_g x)_e B_e A_e x; MoSLoRA: B M A x.
    """
    zero = x.new_zeros(*x.shape[:2], D_OUT)
    if m.config.method == "loramoe":
        g = torch.softmax(x @ m.W_g.T, dim=-1)
        h = sum(g[..., e:e + 1] * (x @ m.A_E[e].T @ m.B_E[e].T) for e in range(len(m.A_E)))
        return m.base(x) + 2.0 * h, h, zero
    if m.config.method == "moslora":
        h = x @ m.A_U.T @ m.M_U.T @ m.B_U.T
        return m.base(x) + 2.0 * h, h, zero
    U = x @ m.A_U.T @ m.B_U.T if m.config.has_universal else zero
    D = torch.stack([x[i] @ m.A_T[n].T @ m.B_T[n].T for i, n in enumerate(tasks)]) \
        if m.config.has_tasks else zero
    h = U + D
    if hasattr(m, "W_g"):
        g = torch.softmax(x @ m.W_g.T, dim=-1)
        h = g[..., :1] * U + g[..., 1:] * D
    return m.base(x) + 2.0 * h, U, D  # alpha / r = 2 R / R


def naive_mim(m: ExpertLinear, x: Tensor, tasks: Tensor, mask: Tensor) -> Tensor:
    """Eq. (5) word for word: mean over samples of the Gaussian bound, U detached."""
    _, U, D = naive(m, x, tasks)
    U, total = U.detach(), x.new_zeros(())
    variance = F.softplus(m.rho) + 0.1
    for i in range(len(x)):
        valid = mask[i]
        if valid.any():
            rho = U[i, valid].square().mean().sqrt() + 1e-3
            e = (D[i, valid] - U[i, valid]) / rho
            total = total + (0.5 * (e.square() / variance + variance.log())).mean()
    return total / len(x)


def run(m: ExpertLinear, x: Tensor, tasks: Tensor, mask: Tensor | None = None,
        batch: int | None = None) -> Tensor:
    m.routing.set(tasks, memory=mask)
    m.routing.mim_batch = batch
    return m(x)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, tasks in sorted order, and a mask with a row that has no valid token at all."""
    torch.manual_seed(2)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = mask[3] = mask[4, 1:] = False
    return torch.randn(B, S, D_IN, dtype=dtype), torch.tensor([0, 0, 1, 2, 2]), mask


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
def test_rank_space_layer_equals_the_paper_equations_with_every_gradient(method, options):
    """y = W_0 x + s [B_U B_n] [g1 A_U x ; g2 A_n x], to 1e-10 in float64."""
    m, (x, tasks, _) = layer(method, torch.float64, **options), inputs(torch.float64)
    x.requires_grad_()
    upstream = torch.randn(B, S, D_OUT, dtype=torch.float64)
    wanted = [p for n, p in m.named_parameters() if p.requires_grad and n != "rho"] + [x]
    expected = torch.autograd.grad((naive(m, x, tasks)[0] * upstream).sum(), wanted)
    y = run(m, x, tasks)
    got = torch.autograd.grad((y * upstream).sum(), wanted)
    torch.testing.assert_close(y, naive(m, x, tasks)[0], rtol=1e-10, atol=1e-10)
    for ours, reference in zip(got, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method, options", METHODS)
def test_real_tokens_alone_give_what_they_give_among_padding(method, options):
    """[t,D_in] in place of [B,S,D_in]: outputs, L_MIM and every gradient; a row without tokens."""
    m, (x, tasks, mask) = layer(method, torch.float64, **options).train(), inputs(torch.float64)
    upstream = torch.randn(B, S, D_OUT, dtype=torch.float64)
    wanted, answers = [p for p in m.parameters() if p.requires_grad], []
    for some, dy in ((x, upstream * mask[..., None]), (x[mask], upstream[mask])):
        some = some.clone().requires_grad_()
        y = run(m, some, tasks, mask, batch=B)
        L_MIM = sum(losses.mutual_information(m.routing.moments(), 1) for _ in m.routing.codes[:1])
        *gradients, dx = torch.autograd.grad((y * dy).sum() + L_MIM, [*wanted, some],
                                             allow_unused=True, materialize_grads=True)
        answers.append([*gradients, *((y[mask], dx[mask]) if y.dim() == 3 else (y, dx))])
    for among, alone in zip(*answers, strict=True):
        torch.testing.assert_close(alone, among, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method, options", METHODS)
def test_a_batch_without_a_real_token_gives_nothing_and_learns_nothing(method, options):
    """t = 0, as of the visual tokens of rows without images."""
    m, (_, tasks, mask) = layer(method, **options).train(), inputs()
    y = run(m, torch.randn(0, D_IN, requires_grad=True), tasks, mask & False, batch=B)
    y.sum().backward()
    assert y.shape == (0, D_OUT)
    assert not any(p.grad is not None and p.grad.any() for p in m.parameters())


def test_tokens_that_the_masks_do_not_know_are_refused():
    """Which row a token belongs to follows from the mask: another number of tokens is an error."""
    m, (x, tasks, mask) = layer(), inputs()
    with pytest.raises(ValueError, match="expected the 19 tokens of the stream memory .* got 18"):
        run(m, x[mask][1:], tasks, mask)
    with pytest.raises(ValueError, match="expected the 0 tokens .* give set"):
        run(m, x[mask], tasks)
    fresh = layer()  # whose rows are all of task 0
    torch.testing.assert_close(fresh(x[mask]), fresh(x)[mask], rtol=1e-6, atol=1e-6)


def test_float64_gradcheck_of_the_layer():
    """Finite differences agree with autograd through gates, experts and MIM moments."""
    m, (x, tasks, _) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    x = x[:3, :2].clone().requires_grad_()
    names = ("A_U", "B_U", "A_T", "B_T", "W_g")

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        m.routing.set(tasks[:3])
        return torch.func.functional_call(m, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *(getattr(m, name) for name in names)))


def test_float64_gradcheck_of_mim_in_the_student_and_the_variance():
    """The rank-space L_MIM has the gradients of finite differences in A_n, B_n and rho."""
    m, (x, tasks, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    names = ("A_T", "B_T", "rho")

    def loss(*values: Tensor) -> Tensor:
        m.routing.set(tasks[1:4], memory=mask[1:4])
        m.routing.mim_batch = B
        torch.func.functional_call(m, dict(zip(names, values)), (x[1:4],))
        return losses.mutual_information(m.routing.moments(), 2)

    assert torch.autograd.gradcheck(loss, tuple(getattr(m, name) for name in names))


def test_bf16_layer_stays_within_twice_the_error_of_the_naive_form():
    """bf16: the error against float64 is bounded by twice the naive formula's own bf16 error."""
    x, tasks, _ = inputs()
    exact = naive(layer(dtype=torch.float64), x.double(), tasks)[0]
    ours = run(layer(dtype=torch.bfloat16), x.bfloat16(), tasks)
    plain = naive(layer(dtype=torch.bfloat16), x.bfloat16(), tasks)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_first_backward_reaches_only_the_up_projections():
    """With B = 0, B_U and B_n get gradient; A's and W_g exactly zero; all finite."""
    m, (x, tasks, mask) = layer(awake=False).train(), inputs()
    y = run(m, x, tasks, mask, batch=B)
    loss = y.square().sum() + losses.mutual_information(m.routing.moments(), 1)
    loss.backward()
    for name in ("A_U", "A_T", "W_g"):
        assert torch.count_nonzero(getattr(m, name).grad) == 0, name
    for name in ("B_U", "B_T"):
        assert torch.count_nonzero(getattr(m, name).grad) > 0, name
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.requires_grad)


def test_a_batch_of_one_task_trains_no_other_expert():
    """Gradients of A_k, B_k are exactly 0 for every absent task k."""
    m, (x, _, mask) = layer().train(), inputs()
    y = run(m, x, torch.full((B,), 1), mask, batch=B)
    (y.square().sum() + losses.mutual_information(m.routing.moments(), 1)).backward()
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
            y = run(m, x[rows], tasks[rows], mask[rows], batch=B)
            (y.square().sum() + losses.mutual_information(m.routing.moments(), 1)).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}

    whole = gradients([[0, 1, 2, 3, 4]])
    for split in ([[0, 1], [2], [3, 4]], [[4, 0], [1, 3, 2]], [[i] for i in range(B)]):
        for name, value in gradients(split).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("order", [[0, 0, 1, 2, 2], [2, 0, 2, 1, 0], [1, 1, 1, 1, 1]])
def test_rank_space_mim_equals_the_materialised_loss_with_every_gradient(order):
    """The diagonal of C M C^T gives the same L_MIM and gradients as forming U and D: tasks sorted,
    in runs that come twice, or absent."""
    m, (x, _, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    tasks = torch.tensor(order)
    wanted = [m.A_T, m.B_T, m.rho]
    x.requires_grad_()
    expected_value = naive_mim(m, x, tasks, mask)
    expected = torch.autograd.grad(expected_value, [*wanted, x])
    run(m, x, tasks, mask, batch=B)
    value = losses.mutual_information(m.routing.moments(), 1)
    got = torch.autograd.grad(value, [*wanted, x])
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(got, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_mim_starts_at_zero_and_never_falls_below_its_floor():
    """0 within 1e-9 at the start (U = D = 0, sigma = 1), >= ln(.1) / 2."""
    x, tasks, mask = inputs()
    mask[3, 0] = True  # the mean is over the batch: a row without tokens would lower its weight
    m = layer(awake=False).train()
    run(m, x, tasks, mask, batch=B)
    assert abs(losses.mutual_information(m.routing.moments(), 1).item()) < 1e-6
    with torch.no_grad():
        m.rho.fill_(-50.0)
    run(m, x, tasks, mask, batch=B)
    assert math.isclose(losses.mutual_information(m.routing.moments(), 1).item(),
                        0.5 * math.log(0.1), rel_tol=1e-5)


def test_mim_gives_the_teacher_no_gradient_and_the_student_some():
    """U is detached, D learns."""
    m, (x, tasks, mask) = layer().train(), inputs()
    run(m, x, tasks, mask, batch=B)
    losses.mutual_information(m.routing.moments(), 1).backward()
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
        run(m, padded, tasks, valid, batch=B)
        values.append(losses.mutual_information(m.routing.moments(), 1).item())
    assert max(values) - min(values) < 1e-6


def test_mim_is_collected_in_training_only():
    """No statistics in evaluation, nor when no batch size asks for them."""
    m, (x, tasks, mask) = layer(), inputs()
    run(m.eval(), x, tasks, mask, batch=B)
    assert m.routing.codes == []
    run(m.train(), x, tasks, mask, batch=None)
    assert m.routing.codes == []


def copy(source: ExpertLinear, target: ExpertLinear) -> ExpertLinear:
    """Give target the parameters that both have."""
    target.load_state_dict(source.state_dict(), strict=False)
    return target


@pytest.mark.parametrize("gates, method", [((1.0, 0.0), "lora"), ((0.0, 1.0), "tlora")])
def test_c_lorae_with_a_closed_gate_is_plain_lora(gates, method):
    """g = (1, 0) leaves the universal expert, g = (0, 1) the task experts."""
    x, tasks, _ = inputs()
    full = layer()
    full.routing.fixed_gates = gates
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
    seen, g = [m.dropped(x) for _ in m.A_E], torch.softmax(x @ m.W_g.T, dim=-1)
    h = sum(g[..., e:e + 1] * (seen[e] @ m.A_E[e].T @ m.B_E[e].T) for e in range(2))
    torch.testing.assert_close(y, m.base(x) + 2 * h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "moslora", "loramoe"])
def test_methods_without_task_experts_never_look_at_the_task(method):
    """Their rows give the same output whatever the task, announced or not."""
    m, (x, tasks, _) = layer(method), inputs()
    assert torch.equal(run(m, x, tasks), run(m, x, (tasks + 1) % N))


def test_merging_needs_a_fixed_gate_and_then_is_exact():
    """W_0 + s (g1 B_U A_U + g2 B_n A_n) equals the layer; a live gate refuses."""
    x, _, _ = inputs()
    m = layer()
    with pytest.raises(ValueError, match="live gate"):
        m.merged_weight(1)
    m.routing.fixed_gates = (0.3, 0.7)
    y = run(m, x, torch.full((B,), 1))
    torch.testing.assert_close(x @ m.merged_weight(1, (0.3, 0.7)).T, y, rtol=1e-5, atol=1e-5)
    for method in ("lora", "tlora", "moslora"):
        plain = layer(method)
        y = run(plain, x, torch.full((B,), 2))
        torch.testing.assert_close(x @ plain.merged_weight(2).T, y, rtol=1e-5, atol=1e-5)


        with pytest.raises(ValueError, match="expected no gates"):
            plain.merged_weight(2, (0.3, 0.7))


def test_dropout_is_one_mask_for_both_experts_and_spares_the_gate():
    """U and D read the same dropped x, the gate x itself: y and every gradient, in float64."""
    m, (x, tasks, _) = layer(dtype=torch.float64, dropout=0.5).train(), inputs(torch.float64)
    wanted = [p for n, p in m.named_parameters() if p.requires_grad and n != "rho"]
    wanted += [x.requires_grad_()]
    torch.manual_seed(7)
    y = run(m, x, tasks)
    torch.manual_seed(7)
    _, U, D = naive(m, m.dropped(x), tasks)
    g = torch.softmax(x @ m.W_g.T, dim=-1)
    expected = m.base(x) + 2 * (g[..., :1] * U + g[..., 1:] * D)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad((y * upstream).sum(), wanted),
                               torch.autograd.grad((expected * upstream).sum(), wanted)):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_input_in_another_memory_order_has_the_same_gradient(dropout):
    """x may be a transposed view; its gradient is that of a contiguous copy, bit for bit."""
    m, found = layer(dropout=dropout).train(), []
    x = inputs()[0].transpose(0, 1).contiguous().transpose(0, 1)
    for some in (x, x.contiguous()):
        some = some.detach().requires_grad_()
        torch.manual_seed(7)
        run(m, some, torch.tensor([0, 0, 1, 2, 2])).square().sum().backward()
        found.append(some.grad)
    assert not x.is_contiguous() and torch.equal(*found)


@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_is_read_before_it_is_written(method, options, dropout):
    """With all fresh memory full of NaN, as torch can be told to do, no NaN comes out."""
    m, (x, tasks, mask) = layer(method, dropout=dropout, **options), inputs()
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        y = run(m, x.requires_grad_(), tasks, mask, batch=B)
        loss = losses.mutual_information(m.routing.moments(), 1) if hasattr(m, "rho") else 0
        (y.sum() + loss).backward()
    finally:
        torch.set_deterministic_debug_mode("default")
    wanted = [y, x.grad, *(p.grad for p in m.parameters() if p.requires_grad)]
    assert all(t.isfinite().all() for t in wanted)


def test_mim_alone_may_be_differentiated():
    """The loss on y may be absent: then only L_MIM's gradient reaches the factors."""
    m, (x, tasks, mask) = layer(dtype=torch.float64).train(), inputs(torch.float64)
    run(m, x, tasks, mask, batch=B)
    wanted = (m.A_T, m.B_T, m.rho)
    got = torch.autograd.grad(losses.mutual_information(m.routing.moments(), 1), wanted)
    expected = torch.autograd.grad(naive_mim(m, x, tasks, mask), wanted)
    for ours, reference in zip(got, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_a_dropout_near_one_drops_nearly_everything():
    """p in steps of 2^-16 must not wrap around: at most one element in 65,536 is kept."""
    m = layer(dropout=0.999999).train()
    assert torch.count_nonzero(m.dropped(torch.ones(100, 100))) <= 5


def test_dropout_drops_its_share_scales_the_rest_and_follows_the_seed():
    """Each element is 0 with probability p, else x / (1 - p); the mean stays."""
    m, x = layer(dropout=0.1).train(), torch.ones(7, 333, 101)
    torch.manual_seed(3)
    first = m.dropped(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert (first == 0).float().mean(dim=(0, 1)).sub(0.1).abs().max() < 0.03  # in every column
    torch.manual_seed(3)
    assert torch.equal(m.dropped(x), first) and not torch.equal(m.dropped(x), first)
    assert m.eval().dropped(x) is x or torch.equal(m.dropped(x), x)


def test_beams_and_dropped_rows_keep_their_tasks():
    """Row k of the decoder computes with the task of request index[k]."""
    m, (x, _, _) = layer(), inputs()
    m.routing.set(torch.tensor([0, 1, 2, 1, 0]))
    index = torch.tensor([1, 1, 3, 4])
    m.routing.rows(index)
    followed = m(x[:4])
    expected = run(m, x[:4], torch.tensor([1, 1, 1, 0]))
    assert torch.equal(followed, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("gates", [None, (0.0, 1.0), (0.3, 0.4)])
def test_the_decoders_product_equals_the_layer_for_rows_of_any_tasks(dtype, method, options, gates):
    """t5.Product on W_0 and the experts of all tasks at once is Eq. (8), one token a row; also
    when rows change, when gates are fixed, and beside a plain linear that reads the same."""
    m, (x, tasks, _), k = layer(method, dtype, **options), inputs(dtype), Linear(D_IN, 6, 0.2)
    k, m.routing.fixed_gates = k.to(dtype), gates
    m.routing.set(tasks)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    with torch.inference_mode():
        product = Product([m.eval(), k], dtype)
    assert (product.down is None) == (method in ("moslora", "loramoe"))
    for rows in (torch.arange(B), torch.tensor([4, 1, 1, 0]), torch.tensor([2])):
        m.routing.rows(rows)
        for t in range(S):
            y, keys = product(x[rows, t:t + 1])
            assert torch.allclose(y, m(x[rows, t:t + 1]), atol=tolerance, rtol=0)
            assert torch.allclose(keys, k(x[rows, t:t + 1]), atol=tolerance, rtol=0)


@torch.no_grad()
def test_the_decoders_product_ignores_experts_of_other_tasks():
    """A row's output does not depend on B_n of a task that is not its own, bit for bit."""
    m, (x, _, _) = layer().eval(), inputs()
    m.routing.set(torch.ones(B, dtype=torch.long))
    before, = Product([m], torch.float32)(x[:, :1])
    m.A_T[[0, 2]] += 1
    m.B_T[[0, 2]] -= 1
    assert torch.equal(Product([m], torch.float32)(x[:, :1])[0], before)
    m.B_T[1] += 1
    assert not torch.equal(Product([m], torch.float32)(x[:, :1])[0], before)


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
    """B = 0 leaves a whole model as it is, D_in != D_out, before any routing is set."""
    ids, mask = torch.randint(2, 40, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    labels = torch.randint(2, 40, (2, 5))
    t5 = tiny_umie().t5.eval().requires_grad_(False)  # as the frozen model: same kernels
    before, _ = t5(ids, mask, labels)
    clorae.adapt(t5, method, rank=6, **options)
    assert torch.equal(t5(ids, mask, labels)[0], before)


# flan-t5 geometries and what must be counted there (in parameters, experts of the method only).
GEOMETRIES = {"base": (768, 12, 12, 2048, 128), "large": (1024, 24, 16, 2816, 64),
              "xl": (2048, 24, 32, 5120, 64)}
COUNTS = {("lora", ()): (14.942, 19.399, 38.797), ("tlora", ()): (14.709, 19.096, 38.191),
          ("clorae", ()): (29.826, 38.949, 77.898),
          ("clorae", ("egr",)): (29.709, 38.646, 77.292),
          ("clorae", ("mim",)): (29.768, 38.797, 77.595),
          ("moslora", ()): (16.187, 20.005, 39.404), ("loramoe", ()): (30.001, 39.100, 78.201)}


@pytest.mark.parametrize("size", GEOMETRIES)
@pytest.mark.parametrize("method, without", COUNTS)
def test_parameter_counts_equal_the_table_at_published_geometry(size, method, without):
    """76 / 148 / 148 wrapped linears; LoRA 2dr, task experts 2d*3*floor(r/3), gate 2d,
    MIM d, MoSLoRA's mixer r^2, LoRAMoE two LoRAs and a router of 2d per linear, exactly."""
    d, layers, heads, d_ff, rank = GEOMETRIES[size]
    with torch.device("meta"):
        config = T5Config(vocab_size=32128, d_model=d, d_kv=64, d_ff=d_ff, num_layers=layers,
                          num_decoder_layers=layers, num_heads=heads,
                          feed_forward_proj="gated-gelu", tie_head=False, scale_logits=False)
        model = UMIE(T5(config), feature_width=768, max_objects=16, fusion="gate")
        clorae.adapt(model, method, rank=rank, **dict.fromkeys(without, False))
    linears = len(clorae.expert_layers(model))
    assert linears == {"base": 76, "large": 148, "xl": 148}[size]
    universal, task = 2 * d * rank, 2 * d * 3 * (rank // 3)
    each = {"lora": universal, "tlora": task, "clorae": universal + task,
            "moslora": universal + rank ** 2, "loramoe": 2 * universal + 2 * d}[method]
    if method == "clorae":
        each += 2 * d * ("egr" not in without) + d * ("mim" not in without)
    split = clorae.parameter_split(model)
    assert sum(split.values()) == linears * each
    published = COUNTS[method, without][list(GEOMETRIES).index(size)]
    assert round(sum(split.values()) / 1e6, 3) == published
    assert split["visual"] == split["backbone"] == 0


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
        model.routing.mim_batch, numbers = 3, []
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ce = losses.token_cross_entropy(
                model.train().hidden(batch), batch.labels, model.t5.head).sum()
        L_MIM = losses.mutual_information(model.routing.moments(), 1)
        (ce + L_MIM).backward()
        assert not model.routing.codes
        found.append([ce, L_MIM, *(p.grad for p in model.parameters() if p.requires_grad)])
        kept.append(sum(numbers))
    assert all(torch.equal(a, b) for a, b in zip(*found) if a is not None)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("fusion", ["gate", "concat"])
@pytest.mark.parametrize("recompute", [False, True])
def test_training_without_padding_is_training_with_it(fusion, recompute, monkeypatch):
    """The whole model, experts and L_MIM included: equal losses and gradients, to 1e-9."""
    torch.manual_seed(3)
    lengths = [torch.tensor(some)[:, None] for some in ([4, 7, 2, 5], [1, 4, 0, 0], [3, 1, 5, 4])]
    mask, visual, target = (torch.arange(n) < some for n, some in zip((7, 4, 5), lengths))
    mask[1, 3] = visual[1, 2] = False  # holes
    batch = SimpleNamespace(
        input_ids=torch.randint(3, 40, (4, 7)), attention_mask=mask, visual_mask=visual,
        labels=torch.randint(3, 40, (4, 5)).masked_fill(~target, -100), boxes=torch.rand(4, 4, 5),
        tasks=torch.tensor([0, 2, 2, 0]), features=torch.randn(4, 4, 12).double())
    model = clorae.adapt(tiny_umie(fusion), rank=6, dropout=0.0).double().train()
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, clorae.ExpertLinear):
            nn.init.normal_(module.B_U, std=0.3), nn.init.normal_(module.B_T, std=0.3)
        elif isinstance(module, Stack):
            module.recompute = recompute
    if fusion == "gate":
        nn.init.normal_(model.fusion.feed_forward.down.weight)
    answers, t = [], int(mask.sum() + (0 if fusion == "gate" else visual.sum()))
    for taken_out in (True, False):
        if not taken_out:
            monkeypatch.setattr(Padding, "__init__", lambda self, *_: setattr(self, "mask", None))
        model.routing.mim_batch, shapes = 4, []
        block = model.t5.encoder.blocks[0].feed_forward
        hook = block.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:-1]))
        hidden = model.hidden(batch)
        hook.remove()
        assert shapes == [(t,) if taken_out else (4, 7 if fusion == "gate" else 11)]
        ce = losses.token_cross_entropy(hidden, batch.labels, model.t5.head).sum().double()
        L_MIM = losses.mutual_information(model.routing.moments(), 1)
        gradients = torch.autograd.grad(ce + L_MIM, list(model.parameters()), allow_unused=True)
        answers.append([hidden[target], ce, L_MIM, *gradients])
    for without, within in zip(*answers, strict=True):
        torch.testing.assert_close(without, within, rtol=1e-9, atol=1e-9)


def test_mim_without_masks_says_what_is_missing():
    """L_MIM weighs tokens by their masks; `set` without them is an error, not a guess."""
    m, (x, tasks, _) = layer().train(), inputs()
    run(m, x, tasks, batch=B)
    with pytest.raises(ValueError, match=r"expected masks of the streams \['memory'\]"):
        m.routing.moments()
