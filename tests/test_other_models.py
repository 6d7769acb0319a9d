"""The experts on models that this project did not write, as docs/other_models.md promises it.

The first half takes a small transformer of plain torch, written here; the second LLaVA, Qwen2-VL
and T5 of transformers, and is skipped where transformers is not installed.

Letters: B rows, S tokens, D width, R universal rank, r task rank, N tasks.
"""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import clorae
import fast
import fast.experts
import losses
from clorae import ExpertLinear
from conftest import ENVIRONMENT, ROOT
from engine.adapters import digest
from engine.files import UsageError

TASKS, R, D, B, S = ("count", "colour"), 5, 16, 4, 6
METHODS = [("clorae", {}), ("clorae", {"egr": False}), ("lora", {}), ("tlora", {}),
           ("moslora", {}), ("loramoe", {}), ("hydralora", {}), ("mtllora", {})]
ROWS = [1, 0, 0, 1]  # the task of each row
FORMS = ("plain", "fast")


def test_every_method_is_held_by_the_tests_of_this_file():
    assert {method for method, _ in METHODS} == set(clorae.METHODS) - {"full"}


class Attention(nn.Module):
    """Self-attention with the names and the biases of Qwen's: two heads of q read one of k and v,
    so that q_proj and v_proj have other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.v_proj, self.o_proj = nn.Linear(D, D), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, D)).transpose(1, 2).expand(-1, 2, -1, -1)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Somebody else's model: ids [B,S] and mask [B,S] -> logits [B,S,11]."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.recompute = nn.Embedding(11, D), recompute
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention()}) for _ in range(2))
        self.head = nn.Linear(D, 11)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + (checkpoint(layer["self_attn"], x, mask, use_reentrant=False)
                     if self.recompute else layer["self_attn"](x, mask))
        return self.head(x)


def awaken(model: nn.Module) -> nn.Module:
    """Give every expert and gate values as training does; B and W_g are 0 at first."""
    torch.manual_seed(6)
    for layer in clorae.expert_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            if name in ("B_U", "B_T", "B_E", "W_g"):
                nn.init.normal_(parameter, std=0.3)
    return model


def adapted(method: str = "clorae", form: str = "plain", recompute: bool = False,
            **options: object) -> nn.Module:
    """A Reader whose q_proj and v_proj have experts that have learned something."""
    options = {"dropout": 0.0, "targets": ("q_proj", "v_proj"), **options}
    model = clorae.adapt(Reader(recompute), method, R, TASKS, **options)
    fast.speed_up(awaken(model), form)
    return model


def words() -> tuple[Tensor, Tensor]:
    """Ids [B,S] and a mask of left padding [B,S]."""
    torch.manual_seed(7)
    mask = torch.arange(S) >= torch.tensor([2, 0, 3, 1])[:, None]
    return torch.randint(0, 11, (B, S)), mask


# ------------------------------------------------------------------------------------ adapting

def test_adapt_takes_linears_by_name_says_which_and_freezes_everything_else():
    """Targets are ends of paths in whole names, modules names on the way."""
    where = ["layers.0.self_attn", "layers.1.self_attn"]
    for targets, modules, expected in (
            (("q_proj", "v_proj"), (), [f"{at}.{leaf}" for at in where for leaf in
                                        ("q_proj", "v_proj")]),
            (["self_attn.o_proj"], ["1"], ["layers.1.self_attn.o_proj"]),
            (("head", "0.self_attn.k_proj"), (), ["layers.0.self_attn.k_proj", "head"])):
        model = Reader()
        assert clorae.adapt(model, "clorae", R, TASKS, targets=targets, modules=modules) is model
        layers = clorae.expert_layers(model)
        assert list(layers) == expected
        assert all(layer.routing is model.routing for layer in layers.values())
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name.rpartition(".")[0] for name in learning} == set(expected)
        assert clorae.parameter_split(model)["backbone"] == 0


@pytest.mark.parametrize("method, options", METHODS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_an_adapted_model_starts_as_the_frozen_one_bit_for_bit(form, method, options):
    model, (ids, mask) = Reader().requires_grad_(False), words()
    before = model(ids, mask)
    clorae.adapt(model, method, R, TASKS, targets=("q_proj", "v_proj"), **options)
    fast.speed_up(model, form)
    with model.routing.batch(ROWS):
        assert torch.equal(model(ids, mask), before)


class Turned(nn.Module):
    """A linear that is none, as GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D, D))


def odd_reader(change: str) -> nn.Module:
    model = Reader()
    if change == "own routing":
        model.routing = object()
    elif change == "adapted":
        clorae.adapt(model, "lora", R, TASKS, targets=("v_proj",))
    elif change == "other layer":
        model.layers[1]["self_attn"].q_proj = Turned()
    elif change == "bytes":
        model.layers[1]["self_attn"].q_proj.weight = nn.Parameter(
            torch.zeros(D, D, dtype=torch.uint8), requires_grad=False)
    elif change == "attention of torch":
        model.extra = nn.MultiheadAttention(D, 2)
    elif change == "layer of torch":
        model.extra = nn.TransformerEncoderLayer(D, 2)
    return model


@pytest.mark.parametrize("change, options, sentence", [
    ("", {"targets": ("query",)}, "linears named query below the model, got none; choose .* "
     "names of its linears: q_proj, k_proj, v_proj, o_proj, head"),
    ("", {"targets": ("q_proj", "value")}, "linears named value below the model, got none"),
    ("", {"targets": ("q_proj",), "modules": ("tower",)}, "named q_proj below tower, got none"),
    ("", {"targets": ("proj",)}, "linears named proj below"),  # whole names
    ("", {"targets": "q_proj"}, "tuples of names, got 'q_proj'"),
    ("", {"targets": ("q_proj",), "tasks": "count"}, "list of different names, got 'count'"),
    ("", {"targets": ("q_proj",), "tasks": ("a", "b", "a")}, "list of different names"),
    ("", {"targets": ("q_proj",), "rank": 1}, "one column per task"),
    ("", {"targets": ("q_proj",), "rank": 0}, "rank: expected a whole number"),
    ("", {"targets": ("embed",)}, "nn.Linear of floats at embed, got Embedding; leave it out"),
    ("other layer", {}, r"at layers.1.self_attn.q_proj, got Turned; leave it out"),
    ("bytes", {}, "at layers.1.self_attn.q_proj, got Linear of torch.uint8"),
    ("own routing", {}, "expected a model without experts, got one .* adapt a fresh one"),
    ("adapted", {}, "expected a model without experts, got one that has them already"),
    ("attention of torch", {"targets": ("out_proj",)}, "whose weight MultiheadAttention reads"),
    ("layer of torch", {"targets": ("linear1",)}, "weight TransformerEncoderLayer reads itself")])
def test_what_cannot_be_adapted_is_an_error_and_stays_as_it_was(change, options, sentence):
    """Four parts: what was expected, what came, where, what to do; nothing is half wrapped."""
    model = odd_reader(change)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    options = {"targets": ("q_proj",), "rank": R, "tasks": TASKS, **options}
    with pytest.raises(ValueError, match=sentence):
        clorae.adapt(model, **options)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_linear_at_two_places_is_wrapped_and_merged_at_both():
    """Two layers share q_proj: one ExpertLinear, heard twice."""
    model, (ids, mask) = Reader(), words()
    first, second = (layer["self_attn"] for layer in model.layers)
    second.q_proj = first.q_proj
    awaken(clorae.adapt(model, "tlora", R, TASKS, targets=("q_proj",)))
    assert first.q_proj is second.q_proj and isinstance(second.q_proj, ExpertLinear)
    with model.eval().routing.batch([1] * B):
        y = model(ids, mask)
    clorae.merge(model, "colour")
    assert first.q_proj is second.q_proj and type(second.q_proj) is nn.Linear
    torch.testing.assert_close(model(ids, mask), y, rtol=1e-5, atol=1e-5)


def test_experts_are_in_training_or_not_as_the_model_was():
    """A model that comes in eval mode, as from_pretrained leaves it, drops nothing."""
    for training in (True, False):
        model = clorae.adapt(Reader().train(training), "clorae", R, TASKS, targets=("q_proj",))
        assert all(module.training == training for module in model.modules())
        assert all(not module.training for module in model.eval().modules())


# ------------------------------------------------------------------------------ rows and tasks

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["clorae", "tlora"])
def test_rows_of_mixed_tasks_equal_rows_alone(form, method):
    """Tasks by index, by name, or as a tensor."""
    model, (ids, mask) = adapted(method, form), words()
    alone = []
    for i, task in enumerate(ROWS):
        with model.routing.batch([TASKS[task]]):
            alone.append(model(ids[i:i + 1], mask[i:i + 1]))
    for tasks in (ROWS, [TASKS[n] for n in ROWS], torch.tensor(ROWS), ["colour", 0, "count", 1]):
        with model.routing.batch(tasks):
            together = model(ids, mask)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with model.routing.batch([0] * B):
        assert not torch.allclose(model(ids, mask), together, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_may_be_nested_and_left_by_an_exception(form):
    """After a block what held before it holds again; what was derived from the tasks is new."""
    model, (ids, mask) = adapted(form=form), words()

    def answer() -> Tensor:
        return model(ids, mask)

    with model.routing.batch(ROWS):
        first = answer()
        with model.routing.batch([0] * B, memory=mask):
            assert not torch.equal(answer(), first) and not model.routing.all_real
        assert torch.equal(answer(), first) and model.routing.all_real
        with pytest.raises(RuntimeError, match="within"), model.routing.batch([1] * B, repeats=3):
            raise RuntimeError("within")
        assert torch.equal(answer(), first) and model.routing.repeats == 1
        with pytest.raises(ValueError, match="got red"), model.routing.batch(["red"]):
            pass
        assert torch.equal(answer(), first)
    with pytest.raises(ValueError, match=f"tasks of {B} rows, got none; .*routing.batch"):
        answer()


@pytest.mark.parametrize("form", FORMS)
def test_rows_repeated_in_blocks_keep_their_tasks(form):
    """Beams and returned sequences: an encoder sees B rows, a decoder B repeats; no other number
    goes unnoticed, nor a multiple that was not announced."""
    model, (ids, mask) = adapted(form=form), words()
    with model.routing.batch(ROWS, repeats=3):
        once, thrice = model(ids, mask), model(*(t.repeat_interleave(3, 0) for t in (ids, mask)))
        with pytest.raises(ValueError, match="expected 4 rows, as announced, or 3 of each, got 8"):
            model(*(t.repeat_interleave(2, 0) for t in (ids, mask)))
    torch.testing.assert_close(thrice, once.repeat_interleave(3, 0), rtol=1e-5, atol=1e-5)
    with model.routing.batch(ROWS[:2]), pytest.raises(ValueError, match="expected 2 rows.* got 4"):
        model(ids, mask)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_unknown_rows_are_refused(form):
    """A linear that sees [t,D] or [B,H,W,D] instead of the tokens of rows."""
    model = adapted(form=form)
    layer = model.layers[0]["self_attn"].q_proj
    with model.routing.batch([0, 1]):
        for x in (torch.zeros(2, D), torch.zeros(2, 2, 3, D), torch.zeros(D)):
            with pytest.raises(ValueError, match="routing: expected"):
                layer(x)


# ----------------------------------------------------------------------------------- gradients

class Equations(nn.Module):
    """Eq. (3), (4), (6)-(8), a row after the other, on the parameters of a layer; it keeps U, D."""

    def __init__(self, layer: ExpertLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        m, rows, self.U, self.D = self.layer, [], [], []
        for x_i, n in zip(x, ROWS, strict=True):
            U, D_i = x_i @ (m.B_U @ m.A_U).T, x_i @ (m.B_T[n] @ m.A_T[n]).T
            g = torch.softmax(x_i @ m.W_g.T, dim=1)
            rows.append(m.base(x_i) + 2 * (g[:, :1] * U + g[:, 1:] * D_i))
            self.U.append(U.detach()), self.D.append(D_i)
        return torch.stack(rows)

    def mim(self, mask: Tensor) -> Tensor:
        """Eq. (5), as losses.py scales it."""
        sigma2, total = F.softplus(self.layer.rho) + 0.1, 0.0
        for U, D_i, real in zip(self.U, self.D, mask):
            rms = U[real].square().mean().sqrt() + 1e-3
            e = (D_i[real] - U[real]) / rms
            total = total + 0.5 * (e.square() / sigma2 + sigma2.log()).mean()
        return total / len(mask)


def gradients(model: nn.Module, mim: Callable[[], Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients of all parameters of experts, in float64."""
    ids, real = words()
    logits = model(ids, real)
    loss = F.cross_entropy(logits[real].double(), ids[real]) + mim()
    loss.backward()
    return {"loss": loss.detach(), **{
        name.replace(".layer.", "."): p.grad.double()
        for name, p in model.named_parameters() if p.requires_grad}}


def truth(masked: bool) -> dict[str, Tensor]:
    """The same by autograd of the equations in float64."""
    model, mask = adapted().double(), words()[1]
    for layer in model.layers:
        for leaf in ("q_proj", "v_proj"):
            setattr(layer["self_attn"], leaf, Equations(getattr(layer["self_attn"], leaf)))
    twins = [module for module in model.modules() if isinstance(module, Equations)]
    mask = mask if masked else torch.ones_like(mask)
    return gradients(model, lambda: sum(twin.mim(mask) for twin in twins) / len(twins), mask)


def L_MIM(model: nn.Module, form: str) -> Tensor:
    if form == "fast":
        return fast.experts.mutual_information(model, B)
    count = len(clorae.expert_layers(model))
    return losses.mutual_information(clorae.expert_outputs(model), B, count)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_is_that_of_the_equations(form, recompute, masked):
    """Of the loss with L_MIM, masks given or all tokens real; also where the backward pass
    computes activations a second time."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model, mask = adapted(form=form, recompute=recompute).to(dtype), words()[1]
        clorae.keep_outputs(model)
        with model.routing.batch(ROWS, **({"memory": mask.long()} if masked else {})):
            ours = gradients(model, lambda: L_MIM(model, form), mask)
        expected = truth(masked)
        assert ours.keys() == expected.keys() and len(ours) == 1 + 4 * 6
        for name, value in ours.items():
            error = (value - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, (name, error)


def test_a_backward_pass_that_recomputes_outside_of_the_block_is_an_error():
    """Else it would be computed with other tasks."""
    model, (ids, mask) = adapted(recompute=True), words()
    with model.routing.batch(ROWS):
        loss = model(ids, mask).sum()
    with pytest.raises(ValueError, match="got none; .* its backward pass too"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_masks_that_do_not_fit_a_stream_are_errors(form):
    """The mask of another stream, or of other tokens; a layer's stream can be set."""
    model, (ids, mask) = adapted(form=form), words()
    for masks, sentence in (({"target": mask}, r"streams \['memory'\], of 24 tokens, got none"),
                            ({"memory": mask[:, 1:]}, r"of 24 tokens, got one of \[4, 5\]")):
        clorae.keep_outputs(model)
        with model.routing.batch(ROWS, **masks):
            model(ids, mask)
            with pytest.raises(ValueError, match=sentence):
                L_MIM(model, form)
    for layer in clorae.expert_layers(model).values():
        layer.stream = "target"
    clorae.keep_outputs(model)
    with model.routing.batch(ROWS, target=mask):
        model(ids, mask)
        assert L_MIM(model, form).isfinite()


@pytest.mark.parametrize("path, stream", [
    ("model.language_model.layers.0.self_attn.q_proj", "memory"),
    ("model.vision_tower.encoder.layers.0.self_attn.v_proj", "visual"),
    ("model.visual.blocks.0.attn.qkv", "visual"),
    ("model.decoder.layers.0.self_attn.v_proj", "target"),
    ("model.decoder.layers.0.encoder_attn.q_proj", "target"),
    ("model.decoder.layers.0.encoder_attn.v_proj", "memory"),
    ("decoder.block.0.layer.1.EncDecAttention.k", "memory"),
    ("encoder.block.0.layer.0.SelfAttention.q", "memory")])
def test_the_stream_of_a_linear_follows_from_the_names_that_the_field_uses(path, stream):
    assert clorae.stream_of(path) == stream


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_stay_in_fp32_beside_a_base_of_half_precision(form, dtype):
    """They learn in fp32, compute in the type of the base, and their answer has its type."""
    model, (ids, mask) = Reader().to(dtype), words()
    clorae.adapt(model, "clorae", R, TASKS, targets=("q_proj", "v_proj"), dropout=0.0)
    fast.speed_up(awaken(model), form)
    with model.routing.batch(ROWS):
        logits = model(ids, mask)
        wide = copy.deepcopy(model).double()(ids, mask)
        logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert (logits - wide).norm() / wide.norm() < 0.02
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in learning
               if p.grad is not None)


# ---------------------------------------------------------------- copies, files, plain linears

def test_copies_are_independent_and_state_dicts_go_from_one_to_the_other():
    """A deep copy has its own routing, shared by its layers."""
    model, (ids, mask) = adapted(), words()
    other = copy.deepcopy(model)
    assert {layer.routing for layer in clorae.expert_layers(other).values()} == {other.routing}
    assert other.routing is not model.routing
    with model.routing.batch(ROWS), other.routing.batch([0] * B):
        y = model(ids, mask)
        assert not torch.equal(other(ids, mask), y)
    fresh = clorae.adapt(Reader(), "clorae", R, TASKS, targets=("q_proj", "v_proj"), dropout=0.0)
    fresh.load_state_dict(model.state_dict())
    with fresh.routing.batch(ROWS):
        assert torch.equal(fresh(ids, mask), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_a_saved_adapter_gives_a_fresh_model_the_same_logits_bit_for_bit(form, method, options,
                                                                         dtype, tmp_path):
    """The file holds the experts alone, and says how they were built."""
    model, (ids, mask) = adapted(method, form, alpha=7.0, **options).eval(), words()
    model.to(dtype)  # the experts too, as torch does
    clorae.save(model, tmp_path / "experts.safetensors")
    fresh = clorae.load(Reader().eval().to(dtype), tmp_path / "experts.safetensors")
    fast.speed_up(fresh, form)
    with model.routing.batch(ROWS), fresh.routing.batch(["colour", "count", "count", "colour"]):
        assert torch.equal(fresh(ids, mask), model(ids, mask))
    layer, twin = (next(iter(clorae.expert_layers(m).values())) for m in (model, fresh))
    assert (twin.config, twin.scale, fresh.routing.names) == (layer.config, 7.0 / R, TASKS)
    stored = load_file(tmp_path / "experts.safetensors")
    assert set(stored) == {name for name, p in model.named_parameters() if p.requires_grad}


def forge(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change the config or the tensors of a file, with a sha256 that fits."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["clorae"])
    tensors = load_file(path)
    change(config, tensors)
    text = json.dumps(config)
    save_file(tensors, path, {"clorae": text, "sha256": digest(text, tensors)})


HEAD = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("change, sentence", [
    (lambda config, tensors: tensors.pop(f"{HEAD}.A_U"),
     rf"{HEAD}.A_U: expected \[5, 16\], got nothing \(1 tensors differ\); load it into the model"),
    (lambda config, tensors: tensors.update({f"{HEAD}.W_g": torch.zeros(3, D)}),
     rf"{HEAD}.W_g: expected \[2, 16\], got \[3, 16\]"),
    (lambda config, tensors: tensors.update(other=torch.zeros(1)), "other: expected nothing, got"),
    (lambda config, tensors: tensors.update({f"{HEAD}.W_g": torch.zeros(2, D).int()}),
     f"{HEAD}.W_g is no tensor of floats; name another file"),
    (lambda config, tensors: config.update(rank=6), r"A_T: expected \[2, 3, 16\], got \[2, 2, 16"),
    (lambda config, tensors: config.update(rank=1 << 40), "rank: expected 1 to 65536"),
    (lambda config, tensors: config.update(rank="5"), "rank: expected 1 to 65536, got '5'"),
    (lambda config, tensors: config.update(tasks=list("ab") * 600), "tasks: expected 1 to 1024"),
    (lambda config, tensors: config.update(tasks=[1, 2]), "tasks: expected names"),
    (lambda config, tensors: config.update(dropout="much"), "experts that clorae.save wrote"),
    (lambda config, tensors: config.update(device="meta"), "unexpected keyword argument"),
    (lambda config, tensors: config.update(targets=["query"]), "linears named query .* got none"),
    (lambda config, tensors: config.pop("tasks"), "got KeyError: 'tasks'; name another file")])
def test_a_file_that_does_not_fit_is_refused_before_the_model_is_changed(change, sentence,
                                                                         tmp_path):
    clorae.save(adapted(), path := tmp_path / "experts.safetensors")
    forge(path, change)
    model = Reader()
    with pytest.raises(UsageError, match=sentence) as refusal:
        clorae.load(model, path)
    assert str(path) in str(refusal.value)
    assert not clorae.expert_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    """Every changed byte is noticed; so are a file of others, an absent one, and a model of
    another width or without experts."""
    clorae.save(adapted(), path := tmp_path / "experts.safetensors")
    content = path.read_bytes()
    for at in (3, 20, 400, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        with pytest.raises(UsageError, match="experts.safetensors: "):
            clorae.load(Reader(), path)
    path.write_bytes(content[:-9])
    save_file({"weight": torch.zeros(2)}, tmp_path / "others.safetensors")
    for name in ("experts.safetensors", "others.safetensors", "absent.safetensors", "."):
        with pytest.raises(UsageError, match="expected experts that clorae.save wrote"):
            clorae.load(Reader(), tmp_path / name)
    path.write_bytes(content)
    model = Reader()
    model.layers[1]["self_attn"].v_proj = nn.Linear(D, 3 * D)
    with pytest.raises(UsageError, match=r"layers.1.self_attn.v_proj.B_T: expected \[2, 48, 2\]"):
        clorae.load(model, path)
    with pytest.raises(ValueError, match="without experts"):
        clorae.load(adapted(), path)
    with pytest.raises(ValueError, match="experts, got none to save"):
        clorae.save(Reader(), path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_merging_leaves_plain_linears_that_answer_the_same(form, method, options):
    """Exactly but for rounding; where there is a router, as with the gates that were fixed."""
    for task, name in enumerate(TASKS):
        model, (ids, mask) = adapted(method, form, **options).eval(), words()
        layers, gates = clorae.expert_layers(model), None
        if hasattr(next(iter(layers.values())), "W_g"):
            experts = len(next(iter(layers.values())).W_g)
            gates = {path: (0.3 + i / 10, 0.7, 0.2)[:experts] for i, path in enumerate(layers)}
            for path, layer in layers.items():
                layer.gates = lambda x, g=gates[path]: x.new_tensor(g).expand(*x.shape[:-1], -1)
            with pytest.raises(ValueError, match="live gate router"):
                clorae.merge(model, task)
        with model.routing.batch([task] * B):
            y = model(ids, mask)
        assert clorae.merge(model, name, gates) is model and model.routing is None
        assert [type(module) for module in model.modules()] == [
            type(module) for module in Reader().modules()]
        torch.testing.assert_close(model(ids, mask), y, rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in model.parameters())
        clorae.adapt(model, "lora", R, TASKS, targets=("q_proj",))  # and may be adapted anew


def test_what_cannot_be_merged_stays_adapted():
    """An unknown task, gates of some layers only, no experts at all."""
    model = adapted()
    gates = dict.fromkeys(clorae.expert_layers(model), (0.5, 0.5))
    for task, some, sentence in (("red", gates, "got red"), (2, gates, "got 2"),
                                 (0, dict(list(gates.items())[1:]), "gates of all 4"),
                                 (0, dict.fromkeys(gates, (1, 1, 1)), "each of 2 experts of clo"),
                                 (0, None, "live gate")):
        with pytest.raises(ValueError, match=sentence):
            clorae.merge(model, task, some)
        assert len(clorae.expert_layers(model)) == 4
    with pytest.raises(ValueError, match="expected a model with experts"):
        clorae.merge(Reader(), 0)


def test_merging_spares_a_weight_that_another_module_shares():
    """A head tied to the embedding: the embedding keeps its values."""
    model = Reader()
    model.head.weight = model.embed.weight
    awaken(clorae.adapt(model, "lora", R, TASKS, targets=("head",)))
    before = model.embed.weight.clone()
    clorae.merge(model, 0)
    assert torch.equal(model.embed.weight, before)
    assert not torch.allclose(model.head.weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_gates_are_read_pass_by_pass(form):
    """Eq. (6) of what each layer sees; nothing is left behind, and nothing read without gates."""
    model, (ids, mask) = adapted(form=form), words()
    with model.routing.batch(ROWS), clorae.read_gates(model) as gates:
        model(ids, mask), model(ids[:, 1:], mask[:, 1:])
    assert list(gates) == list(clorae.expert_layers(model))
    layer, x = model.layers[0]["self_attn"].q_proj, model.embed(ids)
    expected = torch.softmax(x @ layer.W_g.T, dim=-1)
    torch.testing.assert_close(gates[HEAD][0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert [tuple(g.shape) for g in gates[HEAD]] == [(B, S, 2), (B, S - 1, 2)]
    with model.routing.batch(ROWS):
        model(ids, mask)
    assert len(gates[HEAD]) == 2
    with clorae.read_gates(adapted("tlora", form)) as none:
        pass
    assert none == {}


# ------------------------------------------------------------------------ models of transformers

TRANSFORMERS = importlib.util.find_spec("transformers") is not None
peer = pytest.mark.skipif(not TRANSFORMERS, reason="needs transformers; .ci/run installs it")
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = 63  # the id that stands for a visual token


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small random LLaVA, and images for four rows."""
    import transformers
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE, image_seq_length=4))
    return model, {"pixel_values": torch.randn(B, 3, 16, 16)}


def qwen2_vl() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small random Qwen2-VL, whose images are patches without rows."""
    import transformers
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                       "mlp_ratio": 2, "patch_size": 4}, image_token_id=IMAGE,
        video_token_id=62, vision_start_token_id=61, vision_end_token_id=60))
    return model, {"pixel_values": torch.randn(16 * B, 3 * 2 * 4 * 4),
                   "image_grid_thw": torch.tensor([[1, 4, 4]] * B)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small random T5: its encoder sees B rows where its decoder sees all beams."""
    import transformers
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        initializer_factor=3.0, decoder_start_token_id=0)), {}


OTHERS = {"llava": (llava, ("language_model",)), "qwen2_vl": (qwen2_vl, ("language_model",)),
          "t5": (t5, ())}


def other(name: str, method: str = "clorae", form: str = "plain",
          **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """One of these with experts, in eval mode, and four rows of which two have left padding."""
    make, modules = OTHERS[name]
    torch.manual_seed(8)
    model, inputs = make()
    targets = ("q", "v") if name == "t5" else ("q_proj", "v_proj")
    clorae.adapt(model, method, R, TASKS, targets=targets, modules=modules, dropout=0.0, **options)
    fast.speed_up(awaken(model), form)
    ids = torch.randint(3, 60, (B, 10))
    if inputs:
        ids[:, 3], ids[:, 4:8] = 61, IMAGE
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    ids[0, :2], ids[3, :1] = 0, 0
    if name == "llava":
        del inputs["mm_token_type_ids"]
    return model.eval(), {"input_ids": ids, "attention_mask": (ids != 0).long(), **inputs}


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Row i alone, with its image."""
    return {name: t.unflatten(0, (B, -1))[i] for name, t in inputs.items()}


def continued(model: nn.Module, inputs: dict[str, Tensor], **how: object) -> Tensor:
    """Ids that generate adds, always as many."""
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True,
           "suppress_tokens": [60, 61, 62, IMAGE], **how}
    return model.generate(**inputs, **how)[:, -6:]


@peer
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OTHERS)
def test_generate_keeps_the_tasks_of_rows(name, form):
    """Mixed rows with left padding, images, with a cache and without, greedy, with beams and
    several sequences: each row as it is alone, with its own task."""
    model, inputs = other(name, form=form)
    for how in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        beams = how.get("num_beams", 1)
        alone = []
        for i, task in enumerate(ROWS):
            with model.routing.batch([task], repeats=beams):
                alone.append(continued(model, row(inputs, i), **how))
        for use_cache in (True, False):
            with model.routing.batch(ROWS, repeats=beams):
                together = continued(model, inputs, use_cache=use_cache, **how)
            assert torch.equal(together, torch.cat(alone))
    answers = []
    for tasks in (ROWS, [0] * B):
        with model.routing.batch(tasks):
            answers.append(continued(model, inputs))
    assert not torch.equal(*answers)
    with model.routing.batch(ROWS), pytest.raises(ValueError, match="beams by rows.. or repeats="):
        continued(model, inputs, num_beams=3)


@peer
def test_sampled_sequences_of_a_row_have_its_task():
    """num_return_sequences without beams: rows in blocks, too."""
    model, inputs = other("llava")
    for tasks in (ROWS, [0] * B):
        drawn = []
        for repeated in (False, True):
            torch.manual_seed(9)
            given, named, n = inputs, tasks, 2
            if repeated:
                given = {name: t.repeat_interleave(2, 0) for name, t in inputs.items()}
                named, n = [task for task in tasks for _ in range(2)], 1
            with model.routing.batch(named, repeats=n):
                drawn.append(continued(model, given, do_sample=True, num_return_sequences=n))
        assert torch.equal(*drawn)


@peer
@pytest.mark.parametrize("name", OTHERS)
def test_both_forms_train_other_models_alike(name):
    """Loss with L_MIM and every gradient, with the activations of the base kept and computed
    again."""
    values = []
    for form, recompute in (("plain", False), ("fast", False), ("fast", True)):
        model, inputs = other(name, form=form)
        model.double()
        inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        mask, labels = inputs["attention_mask"].bool(), inputs["input_ids"].clone()
        labels[~mask] = -100
        clorae.keep_outputs(model.train())
        streams = {"memory": mask, **({"target": labels != -100} if name == "t5" else {})}
        with model.routing.batch(ROWS, **streams):
            loss = model(**inputs, labels=labels).loss + L_MIM(model, form)
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in gradients)
        values.append([loss.detach(), *gradients])
    for fast_form in values[1:]:
        torch.testing.assert_close(fast_form, values[0], rtol=1e-4, atol=1e-6)


@peer
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method, options", [("clorae", {}), ("clorae", {"egr": False}),
                                             ("tlora", {})], ids=str)
def test_other_models_are_saved_loaded_and_merged(name, method, options, tmp_path):
    """Loaded: the logits bit for bit.  Merged: the adapted model's ids; under fixed gates those of
    the adapted model under these gates, which is near to the live one at best."""
    model, inputs = other(name, method, **options)
    clorae.save(model, tmp_path / "experts.safetensors")
    torch.manual_seed(8)
    fresh = clorae.load(OTHERS[name][0]()[0], tmp_path / "experts.safetensors").eval()
    labels = {"labels": inputs["input_ids"]} if name == "t5" else {}
    with model.routing.batch(ROWS), fresh.routing.batch(ROWS), clorae.read_gates(model) as gates:
        assert torch.equal(fresh(**inputs, **labels).logits, model(**inputs, **labels).logits)
    means = {path: torch.cat([g.flatten(0, 1) for g in passes]).mean(0).tolist()
             for path, passes in gates.items()} or None
    for path, layer in clorae.expert_layers(model).items():
        layer.fixed_gates = means and tuple(means[path])
    with model.routing.batch([1] * B, repeats=3):
        ids, beams = continued(model, inputs), continued(model, inputs, num_beams=3)
    clorae.merge(model, "colour", means)
    assert not clorae.expert_layers(model)
    assert torch.equal(continued(model, inputs), ids)
    assert torch.equal(continued(model, inputs, num_beams=3), beams)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(continued(again, inputs), ids)


@peer
def test_a_tower_that_sees_images_without_rows_is_refused_and_one_with_rows_is_not():
    """Qwen2-VL's patches [t,D] have no rows; LLaVA's tower sees one image a row."""
    torch.manual_seed(8)
    model, _ = qwen2_vl()
    clorae.adapt(model, "clorae", R, TASKS, targets=("attn.qkv",))
    _, inputs = other("qwen2_vl")
    with model.routing.batch(ROWS), pytest.raises(ValueError, match="whose rows are unknown"):
        model(**inputs)
    model, _ = llava()
    clorae.adapt(model, "clorae", R, TASKS, targets=("q_proj", "v_proj"), dropout=0.0)
    awaken(model).eval()
    _, inputs = other("llava")
    with model.routing.batch(ROWS):
        together = model(**inputs).logits
    with model.routing.batch(["colour"]):
        alone = model(**row(inputs, 3)).logits
    torch.testing.assert_close(together[3:, 1:], alone[:, 1:], rtol=1e-4, atol=1e-5)


@peer
def test_the_example_of_the_docs_prints_what_its_page_shows():
    """docs/other_models.py, but for the last digits."""
    done = subprocess.run([sys.executable, "-m", "docs.other_models"], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "other_models.md").read_text()
    shown = re.search(r"```\n(wrapped\n.*?)```", page, re.S)[1]
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", done.stdout) == number.sub("#", shown)
    told, said = (list(map(float, number.findall(text))) for text in (shown, done.stdout))
    assert said == pytest.approx(told, abs=0.1)
