"""The expert layer's fast forms against the plain one of clorae.py: one body for all of them.

"fast" is rank space in PyTorch (fast/experts.py), "emulator" clorae.cu compiled by g++ with
tests/emulator.h playing the GPU, "cuda" a GPU, where there is one.  The plain layer in float64 is
the truth; a form may be wrong by three times the error of the plain layer in its own type.

Letters: B rows, S tokens, R universal rank, r task rank, N tasks.
"""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clorae
import fast.cuda
import fast.experts
import losses
from clorae import ExpertConfig, ExpertLinear, Routing
from fast.experts import FastExpertLinear
from t5 import T5, Stack, T5Config
from vision import UMIE

TASKS = ("mner", "mre", "mee")
METHODS = [("clorae", {}), ("clorae", {"egr": False}), ("clorae", {"mim": False}), ("lora", {}),
           ("tlora", {}), ("moslora", {}), ("loramoe", {}), ("hydralora", {"heads": 2}),
           ("mtllora", {"heads": 2})]


def test_every_method_is_held_by_the_tests_of_this_file():
    assert {method for method, _ in METHODS} == set(clorae.METHODS) - {"full"}


# name: (task of each row, real tokens of each row, S, D_in, D_out, R)
CASES = {
    "sorted, with a row of padding": ([0, 0, 1, 2, 2], [7, 4, 6, 0, 1], 7, 24, 16, 9),
    "runs that come twice": ([2, 0, 1, 0, 0, 2], [5, 3, 4, 5, 1, 2], 5, 16, 32, 12),
    "an absent task": ([1, 1, 2], [6, 2, 3], 6, 16, 16, 10),
    "one task, no padding": ([1, 1], [4, 4], 4, 8, 24, 3),
    "one sample": ([2], [5], 8, 24, 8, 7),
    "one token": ([1], [1], 1, 8, 8, 3),
    "odd sizes": ([0, 2, 2], [3, 5, 1], 5, 23, 19, 11),
}

# Sums in another order, where the plain layer happens to be nearly exact.
SLACK = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


class Form:
    """A form of the layer: its class, and the device and types in which it computes."""

    def __init__(self, name: str, kind: type[ExpertLinear], device: str = "cpu"):
        self.name, self.kind, self.device = name, kind, torch.device(device)

    def __call__(self, module: nn.Module) -> nn.Module:
        """A copy of a plain layer, or of a model with plain layers, in this form."""
        module = copy.deepcopy(module).to(self.device)
        for layer in clorae.expert_layers(module).values():
            layer.__class__ = self.kind
        return module

    def mim(self, model: nn.Module, B: int) -> Tensor:
        if self.kind is ExpertLinear:
            count = len(clorae.expert_layers(model))
            return losses.mutual_information(clorae.expert_outputs(model), B, count)
        return fast.experts.mutual_information(model, B)


PLAIN = Form("plain", ExpertLinear)
FAST = Form("fast", FastExpertLinear)


@pytest.fixture(params=["fast", "emulator", "cuda"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    if request.param == "fast":
        return FAST
    if request.param == "emulator":
        torch.ops.load_library(str(request.getfixturevalue("emulator_library")))
        monkeypatch.setitem(fast.cuda.KERNELS, "cpu", torch.ops.clorae_emulator)
        return Form("emulator", fast.cuda.CudaExpertLinear)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the extension must build where there is a GPU
        assert fast.form_on(torch.device("cuda")) == "cuda"
    return Form("cuda", fast.cuda.CudaExpertLinear, "cuda")


def plain_layer(case: str, method: str = "clorae", dropout: float = 0.0,
                **options: object) -> ExpertLinear:
    """A wrapped linear in training, all of whose parameters have values that are not zero."""
    *_, d_in, d_out, R = CASES[case]
    torch.manual_seed(1)
    config = ExpertConfig(method=method, rank=R, dropout=dropout, **options)
    layer = ExpertLinear(nn.Linear(d_in, d_out, bias=False), config, Routing(TASKS), "memory")
    layer.base.requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name in ("B_U", "B_T", "B_E", "W_g", "rho", "L_T", "w_T", "a_D", "c_D", "M_D"):
            nn.init.normal_(parameter, std=0.3)
    return layer.train()


def batch(case: str, dtype: torch.dtype) -> SimpleNamespace:
    """x [B,S,D_in], upstream gradient dy, 0 at padding, tasks, mask, factors of three dropouts."""
    tasks, lengths, S, d_in, d_out, _ = CASES[case]
    torch.manual_seed(2)
    B, mask = len(tasks), torch.arange(S) < torch.tensor(lengths)[:, None]
    return SimpleNamespace(
        x=torch.randn(B, S, d_in).to(dtype), dy=torch.randn(B, S, d_out) * mask[..., None],
        tasks=torch.tensor(tasks), mask=mask, drops=(torch.rand(3, B, S, d_in) > 0.3) / 0.7)


def run(form: Form, layer: ExpertLinear, given: SimpleNamespace, real: bool = False,
        autocast: bool = False) -> dict[str, Tensor]:
    """y at the real tokens, L_MIM and every gradient of <dy, y> + 30 L_MIM, in float64, by name.
    real: the real tokens are given alone."""
    mask = given.mask.to(form.device)
    at = mask if real else slice(None)
    x, dy, drops = (t.to(form.device) for t in (given.x, given.dy, given.drops))
    x = x[at].clone().requires_grad_()
    draws = itertools.cycle(drop[at] for drop in drops)
    layer.dropped = lambda seen: seen * next(draws).view_as(seen).to(seen.dtype)
    if not (layer.training and layer.config.dropout):
        del layer.dropped
    layer.routing.set(given.tasks, memory=mask)
    clorae.keep_outputs(layer)
    with torch.autocast(form.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        y = layer(x)
    L_MIM = form.mim(layer, len(mask)) if hasattr(layer, "rho") else y.new_zeros(())
    names, wanted = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad])
    dx, *gradients = torch.autograd.grad((y * dy[at]).sum() + 30 * L_MIM, [x, *wanted],
                                         allow_unused=True, materialize_grads=True)
    y, dx = (t if real else t[mask] for t in (y, dx))
    found = {"y": y.detach(), "L_MIM": L_MIM.detach(), "dx": dx, **dict(zip(names, gradients))}
    return {name: value.double().cpu() for name, value in found.items()}


def error(value: Tensor, truth: Tensor) -> float:
    """Error in the Frobenius norm, relative, where the truth is not 0; NaN if there is a NaN."""
    norm = truth.norm()
    return float((value - truth).norm() / (norm if norm > 0 else 1.0))


def assert_equal_forms(form: Form, layer: ExpertLinear, case: str, dtype: torch.dtype) -> None:
    """y, L_MIM and gradients of a form of `layer`, for all tokens and for the real ones alone."""
    given, autocast = batch(case, dtype), dtype == torch.bfloat16
    double = copy.deepcopy(given)
    double.x = given.x.double()
    layer = copy.deepcopy(layer)
    layer.base.to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    truth = run(PLAIN, copy.deepcopy(layer).double(), double)
    ours = run(PLAIN, copy.deepcopy(layer), given, autocast=autocast)
    for real in (False, True):
        for name, value in run(form, form(layer), given, real, autocast).items():
            wrong = error(value, truth[name])
            assert wrong <= 3 * error(ours[name], truth[name]) + SLACK[dtype], (name, real, wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_a_fast_form_equals_the_plain_layer_with_every_gradient(form, method, options, case, dtype):
    """Every method, padding, absent tasks, runs that come twice, one token, one sample; a bf16
    linear under autocast."""
    assert_equal_forms(form, plain_layer(case, method, **options), case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", ["affine", "map"])
def test_other_means_of_the_student_are_the_same_in_all_forms(form, mean, dtype):
    """L_MIM and what it gives to a, c, M and the task experts; mixed tasks, padding, odd sizes."""
    for case in ("runs that come twice", "an absent task", "odd sizes"):
        assert_equal_forms(form, plain_layer(case, mim_mean=mean), case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_under_dropout_forms_are_equal_with_the_same_draws(form, method, options, dtype):
    """One mask for both experts, none for the gate; one for each expert of LoRAMoE."""
    case = "sorted, with a row of padding"
    assert_equal_forms(form, plain_layer(case, method, 0.3, **options), case, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_fixed_gates_and_a_linear_that_learns_are_the_same_in_all_forms(form, method, options,
                                                                        dropout):
    """Gates (.3, .7) in place of Eq. (6), in the methods that have two experts; dW_0 = dy^T x."""
    case = "runs that come twice"
    for gates, learns in itertools.product((None, (0.3, 0.7)), (False, True)):
        layer = plain_layer(case, method, dropout, **options)
        layer.fixed_gates = gates
        layer.base.requires_grad_(learns)
        assert_equal_forms(form, layer, case, torch.float32)


@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_in_evaluation_and_before_any_batch_is_announced_forms_are_equal(form, method, options):
    """Nothing is dropped and nothing kept; without `set` experts of tasks refuse; a bias counts."""
    given = batch("one task, no padding", torch.float32)
    layer = plain_layer("one task, no padding", method, 0.3, **options).eval()
    layer.base = nn.Linear(*layer.base.weight.T.shape).requires_grad_(False)
    other = form(layer)
    clorae.keep_outputs(other)
    for tasks in (None, given.tasks):
        if tasks is not None:
            layer.routing.set(tasks), other.routing.set(tasks)
        elif layer.config.has_tasks or method == "mtllora":
            for each, x in ((layer, given.x), (other, given.x.to(form.device))):
                with pytest.raises(ValueError, match="expected the tasks of 2 rows, got none"):
                    each(x)
            continue
        y = other(given.x.to(form.device)).cpu()
        torch.testing.assert_close(y, layer(given.x), rtol=1e-5, atol=1e-5)
    assert other.outputs is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_zero_initialised_experts_leave_the_linear_unchanged_bit_for_bit(form, method, options,
                                                                         training):
    """B = 0, so y = W_0 x exactly, with dropout drawn or not."""
    case = "sorted, with a row of padding"
    layer, given = plain_layer(case, method, 0.1, **options), batch(case, torch.float32)
    for name in ("B_U", "B_T", "B_E"):
        nn.init.zeros_(getattr(layer, name, torch.zeros(1)))
    layer, x = form(layer).train(training), given.x.to(form.device)
    layer.routing.set(given.tasks, memory=given.mask)
    assert torch.equal(layer(x), layer.base(x))


def test_a_batch_of_one_task_trains_no_other_expert(form):
    """Gradients of A_k, B_k are exactly 0 for every absent task k."""
    answers = run(form, form(plain_layer("one task, no padding")),
                  batch("one task, no padding", torch.float32))
    for name in ("A_T", "B_T"):
        assert answers[name][1].any() and not answers[name][[0, 2]].any()


@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_a_batch_without_a_real_token_gives_nothing_and_learns_nothing(form, method, options):
    """t = 0, as of the visual tokens of rows without images."""
    case = "sorted, with a row of padding"
    layer, given = form(plain_layer(case, method, **options)), batch(case, torch.float32)
    layer.routing.set(given.tasks, memory=given.mask & False)
    y = layer(torch.randn(0, 24, device=form.device, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 16)
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_tokens_that_the_masks_do_not_know_are_refused(form):
    """Which row a token belongs to follows from the mask: another number of tokens is an error."""
    case = "sorted, with a row of padding"
    layer, given = form(plain_layer(case)), batch(case, torch.float32)
    tokens = given.x[given.mask].to(form.device)
    for mask, sentence in ((given.mask, "expected the 18 tokens of the stream memory .* got 17"),
                           (None, "expected the 0 tokens .* give set")):
        layer.routing.set(given.tasks, memory=mask)
        with pytest.raises(ValueError, match=sentence):
            layer(tokens[1:])
    layer.routing.set(given.tasks[:2])
    with pytest.raises(ValueError, match="expected 2 rows"):
        layer(given.x.to(form.device))
    with pytest.raises(ValueError, match="expected the tasks of 18 rows, got none"):
        form(plain_layer(case))(tokens)


def test_gradients_in_rank_space_pass_a_float64_gradcheck():
    """Finite differences through gates and experts, and through L_MIM in the student and rho."""
    given = batch("sorted, with a row of padding", torch.float64)
    m = FAST(plain_layer("sorted, with a row of padding").double())
    x, tasks, mask = given.x[1:4, :3].requires_grad_(), given.tasks[1:4], given.mask[1:4, :3]
    names, students = ("A_U", "B_U", "A_T", "B_T", "W_g"), ("A_T", "B_T", "rho")

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        m.routing.set(tasks)
        return torch.func.functional_call(m, dict(zip(names, values)), (x,))

    def loss(*values: Tensor) -> Tensor:
        m.routing.set(tasks, memory=mask)
        clorae.keep_outputs(m)
        torch.func.functional_call(m, dict(zip(students, values)), (x.detach(),))
        (layer, (runs, z_U, z_D)), = clorae.take_outputs(m)
        twin = SimpleNamespace(routing=m.routing, stream="memory", B_U=m.B_U,
                               **dict(zip(students, values)))
        distance, b, sigma2 = fast.experts.stream_moments([(twin, runs, z_U, z_D)], 5)
        return (distance / sigma2 + b * sigma2.log()).sum()

    assert torch.autograd.gradcheck(outputs, (x, *(getattr(m, name) for name in names)))
    assert torch.autograd.gradcheck(loss, tuple(getattr(m, name) for name in students))


def test_mim_alone_may_be_differentiated(form):
    """The loss on y may be absent: then only L_MIM's gradient reaches the factors."""
    given = batch("runs that come twice", torch.float32)
    given.dy.zero_()
    layer = plain_layer("runs that come twice")
    plain, answers = run(PLAIN, copy.deepcopy(layer), given), run(form, form(layer), given)
    layer = form(layer)
    layer.routing.set(given.tasks, memory=given.mask.to(form.device))
    clorae.keep_outputs(layer)
    layer(given.x.to(form.device))
    wanted = {name: getattr(layer, name) for name in ("A_T", "B_T", "rho")}
    gradients = torch.autograd.grad(30 * form.mim(layer, len(given.mask)), list(wanted.values()))
    for name, value in zip(wanted, gradients):
        torch.testing.assert_close(value.double().cpu(), plain[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answers[name], plain[name], rtol=1e-4, atol=1e-5)
    for name in ("A_U", "B_U", "W_g"):
        assert not answers[name].any() and not plain[name].any()  # the teacher learns nothing


def test_mim_is_the_mean_over_all_layers_and_needs_the_masks(form):
    """Layers of two streams, one of which has seen nothing; a missing mask is an error."""
    case = "sorted, with a row of padding"
    given, model = batch(case, torch.float32), nn.ModuleList(plain_layer(case) for _ in range(4))
    routing = model[0].routing
    for layer, stream in zip(model, ("memory", "target", "memory", "visual")):
        layer.routing, layer.stream = routing, stream
        nn.init.normal_(layer.B_T, std=0.5)
    values, mask = [], given.mask
    for each in (PLAIN, form):
        twin = each(model)
        shared = twin[0].routing
        shared.set(given.tasks, memory=mask.to(each.device), target=mask[:, :5].to(each.device))
        clorae.keep_outputs(twin)
        for layer, S in zip(twin, (7, 5, 7)):
            layer(given.x[:, :S].to(each.device))
        values.append(each.mim(twin, 5).cpu())
        assert all(layer.outputs is None for layer in twin)
        clorae.keep_outputs(twin)
        shared.set(given.tasks)
        twin[0](given.x.to(each.device))
        with pytest.raises(ValueError, match=r"expected masks of the streams \['memory'\]"):
            each.mim(twin, 5)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_input_in_another_memory_order_has_the_same_gradient(form, dropout):
    """x may be a transposed view; its gradient is that of a contiguous copy, bit for bit."""
    case, gradients = "sorted, with a row of padding", []
    layer = form(plain_layer(case, dropout=dropout))
    x = batch(case, torch.float32).x.to(form.device).transpose(0, 1).contiguous().transpose(0, 1)
    for seen in (x, x.contiguous()):
        seen = seen.detach().requires_grad_()
        torch.manual_seed(7)
        layer.routing.set(torch.tensor([0, 0, 1, 2, 2]))
        layer(seen).square().sum().backward()
        gradients.append(seen.grad)
    assert not x.is_contiguous() and torch.equal(*gradients)


@pytest.mark.parametrize("method, options", METHODS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_is_read_before_it_is_written(form, method, options, dropout):
    """With all fresh memory full of NaN, as torch can be told to do, no NaN comes out."""
    case = "sorted, with a row of padding"
    layer, given = form(plain_layer(case, method, dropout, **options)), batch(case, torch.float32)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        answers = run(form, layer, given)
    finally:
        torch.set_deterministic_debug_mode("default")
    assert all(value.isfinite().all() for value in answers.values())


def test_dropout_drops_its_share_scales_what_it_keeps_and_follows_the_seed():
    """Each element is 0 with probability p, else x / (1 - p); the mean is kept."""
    m, x = FAST(plain_layer("one sample", dropout=0.1)), torch.ones(7, 333, 101)
    torch.manual_seed(3)
    first = m.dropped(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert (first == 0).float().mean(dim=(0, 1)).sub(0.1).abs().max() < 0.03  # in every column
    torch.manual_seed(3)
    assert torch.equal(m.dropped(x), first) and not torch.equal(m.dropped(x), first)
    assert m.eval().dropped(x) is x
    nearly = FAST(plain_layer("one sample", dropout=0.999999))  # steps of 2^-16 wrap not around
    assert torch.count_nonzero(nearly.dropped(torch.ones(100, 100))) <= 5


# ---------------------------------------------------------------------------------------- decoding

def test_beams_and_dropped_rows_keep_their_tasks(form):
    """Row k of the decoder computes with the task of request index[k]."""
    case = "sorted, with a row of padding"
    layer, x = form(plain_layer(case)).eval(), batch(case, torch.float32).x.to(form.device)
    layer.routing.set(torch.tensor([0, 1, 2, 1, 0]))
    layer.routing.rows(torch.tensor([1, 1, 3, 4], device=form.device))
    followed = layer(x[:4])
    layer.routing.set(torch.tensor([1, 1, 1, 0]))
    assert torch.equal(followed, layer(x[:4]))


def joined(layer: FastExpertLinear, x: Tensor) -> Tensor:
    """W_0 x + up between(down x): what parts() promises."""
    down, up, between = layer.parts()
    heights = [len(down[0]), sum(len(matrix) for matrix in down[1:])]
    y, codes = F.linear(x, torch.cat([W.to(x.dtype) for W in down])).split(heights, dim=-1)
    return y + F.linear(between(codes), torch.cat([W.to(x.dtype) for W in up], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method, options", METHODS, ids=str)
@pytest.mark.parametrize("gates", [None, (0.0, 1.0), (0.3, 0.4)])
def test_the_parts_of_a_layer_equal_it_for_rows_of_any_tasks(dtype, method, options, gates):
    """W_0 and the experts of all tasks at once are Eq. (8), one token a row; also when rows
    change and when gates are fixed."""
    case = "sorted, with a row of padding"
    plain, given = plain_layer(case, method, **options).to(dtype).eval(), batch(case, dtype)
    plain.fixed_gates = gates
    layer = FAST(plain)
    if method in ("moslora", "loramoe", "hydralora", "mtllora"):
        assert layer.parts() is None
        return
    plain.routing.set(given.tasks), layer.routing.set(given.tasks)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for rows in (torch.arange(5), torch.tensor([4, 1, 1, 0]), torch.tensor([2])):
        plain.routing.rows(rows), layer.routing.rows(rows)
        for t in range(given.x.shape[1]):
            x = given.x[rows, t:t + 1]
            assert torch.allclose(joined(layer, x), plain(x), atol=tolerance, rtol=0)


@torch.no_grad()
def test_the_parts_of_a_layer_ignore_experts_of_other_tasks():
    """A row's output does not depend on B_n of a task that is not its own, bit for bit."""
    layer = FAST(plain_layer("sorted, with a row of padding")).eval()
    x = torch.randn(5, 1, 24)
    layer.routing.set(torch.ones(5, dtype=torch.long))
    before = joined(layer, x)
    layer.A_T[[0, 2]] += 1
    layer.B_T[[0, 2]] -= 1
    assert torch.equal(joined(layer, x), before)
    layer.B_T[1] += 1
    assert not torch.equal(joined(layer, x), before)
    layer.base = nn.Linear(24, 16)
    assert layer.parts() is None  # a bias would be lost


def test_a_layer_on_kernels_has_no_parts(form):
    """Its forward is called; and kernels do what fits them, the rest goes on in PyTorch."""
    layer = form(plain_layer("one sample"))
    assert (layer.parts() is None) == (form is not FAST)
    if form is not FAST:
        x = torch.zeros(1, 8, 24, device=form.device)
        assert layer.fits(x) and layer.fits(x.bfloat16()) and not layer.fits(x.double())
        assert not form(plain_layer("odd sizes")).fits(x)
        assert not form(plain_layer("one sample", "loramoe")).fits(x)


# ------------------------------------------------------------------------------------ whole models

def tiny_umie(fusion: str = "gate") -> UMIE:
    """A UMIE whose H K = 3 * 5 differs from D = 16, as in t5-small."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=5, d_ff=24, num_layers=2,
                      num_decoder_layers=1, num_heads=3, feed_forward_proj="gated-gelu",
                      dropout_rate=0.0, tie_head=False, scale_logits=False)
    torch.manual_seed(3)
    model = clorae.adapt(UMIE(T5(config), feature_width=12, max_objects=4, fusion=fusion), rank=6,
                         dropout=0.0)
    for layer in clorae.expert_layers(model).values():
        nn.init.normal_(layer.B_U, std=0.3), nn.init.normal_(layer.B_T, std=0.3)
    if fusion == "gate":
        nn.init.normal_(model.fusion.feed_forward.down.weight)
    return model.requires_grad_(True)


def ragged_batch() -> SimpleNamespace:
    """Four rows with padding and holes; rows without visual tokens."""
    lengths = [torch.tensor(n)[:, None] for n in ([4, 7, 2, 5], [1, 4, 0, 0], [3, 1, 5, 4])]
    mask, visual, target = (torch.arange(n) < length for n, length in zip((7, 4, 5), lengths))
    mask[1, 3] = visual[1, 2] = False
    return SimpleNamespace(
        input_ids=torch.randint(3, 40, (4, 7)), attention_mask=mask, visual_mask=visual,
        labels=torch.randint(3, 40, (4, 5)).masked_fill(~target, -100), boxes=torch.rand(4, 4, 5),
        tasks=torch.tensor([0, 2, 2, 0]), features=torch.randn(4, 4, 12).double())


def step(model: UMIE, given: SimpleNamespace, mim: Callable) -> list[Tensor]:
    """Hidden states at real targets, cross-entropy, L_MIM and all gradients of a training step."""
    clorae.keep_outputs(model)
    hidden = model.hidden(given)
    ce = losses.token_cross_entropy(hidden, given.labels, model.t5.head).sum().double()
    L_MIM = mim(model, len(given.labels))
    gradients = torch.autograd.grad(ce + L_MIM, list(model.parameters()), allow_unused=True)
    assert all(layer.outputs is None for layer in clorae.expert_layers(model).values())
    return [hidden[given.labels != -100], ce, L_MIM, *gradients]


@pytest.mark.parametrize("fusion", ["gate", "concat"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_fast_model_trains_as_the_plain_one_does(fusion, recompute):
    """The whole model, experts and L_MIM included: equal losses and gradients, to 1e-9, with
    padding in the plain form and without it in the fast one."""
    torch.manual_seed(3)
    given, model = ragged_batch(), tiny_umie(fusion).double().train()
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = recompute
    plain = step(model, given, PLAIN.mim)
    assert fast.speed_up(model, "fast") == "fast"
    for ours, truth in zip(step(model, given, FAST.mim), plain, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_recomputed_activations_change_no_gradient_of_the_experts(form):
    """Bit for bit the same loss, L_MIM and gradients, dropout on, nothing left behind."""
    model, answers = form(tiny_umie()).train(), []
    given = ragged_batch()
    given.attention_mask[:] = given.visual_mask[:] = True
    given.features, given.labels = given.features.float(), torch.randint(3, 40, (4, 5))
    given = SimpleNamespace(**{name: value if name == "tasks" else value.to(form.device)
                               for name, value in vars(given).items()})
    for layer in clorae.expert_layers(model).values():
        layer.config = ExpertConfig(rank=6, dropout=0.3)
    for recompute in (False, True):
        for module in model.modules():
            if isinstance(module, Stack):
                module.recompute = recompute
        torch.manual_seed(7)
        answers.append(step(model, given, form.mim))
    assert all(torch.equal(a, b) for a, b in zip(*answers) if a is not None)
