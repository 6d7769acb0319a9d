"""fast/ as a specification: every form there computes what the chapters compute in plain form.

Most tests run one body on a model and on a copy of it after speed_up. Letters as in t5.py.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import t5
from engine.parameters import FlatParameters
from fast import decoder, padding, speed_up
from fast.dropout import WordDropout
from t5 import T5, T5Config
from test_t5 import FORMS, GOLDEN, SMALL, brief, largest_error, lively, small_batch
from test_vision import make_batch, make_umie
from vision import UMIE


@pytest.fixture(params=FORMS)
def config(request) -> T5Config:
    return FORMS[request.param]


def both(model: nn.Module) -> list[nn.Module]:
    """The model, and a copy of it in fast form."""
    fast = copy.deepcopy(model)
    assert speed_up(fast) == "fast"
    return [model, fast]


def fast_t5(config: T5Config = SMALL, seed: int = 0) -> decoder.FastT5:
    model = lively(config, seed)
    speed_up(model)
    return model


def test_speed_up_changes_classes_and_nothing_else():
    """Parameters, their names and order, modes and settings stay; "plain" changes nothing at all,
    and a second call does no more than the first."""
    model = UMIE(T5(SMALL), 12, 4)
    classes = [type(module) for module in model.modules()]
    assert speed_up(model, "plain") == "plain"
    assert classes == [type(module) for module in model.modules()]
    before = dict(model.named_parameters())
    model.t5.encoder.recompute, model.fusion.attention.dropout.p = True, 0.7
    for _ in range(2):
        assert speed_up(model) == "fast"
        after = dict(model.named_parameters())
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)
        assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert model.t5.encoder.recompute and model.fusion.attention.dropout.p == 0.7
    changed = {type(module) for module in model.modules()}
    assert not changed & {nn.Dropout, t5.Stack, T5}


# ------------------------------------------------------------------ training
MASKS = {"padding last": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
         "holes": [[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]],
         "an empty row": [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
         "none real": [[0, 0, 0, 0]] * 3, "all real": [[1, 1, 1, 1]] * 3}


def teaches(model: UMIE, batch: SimpleNamespace) -> list[Tensor]:
    """Logits at real tokens, the loss, and the gradients of all that learns."""
    logits = model(batch)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, learning, materialize_grads=True, allow_unused=True)
    return [logits[batch.labels != -100], loss, *gradients]


@pytest.mark.parametrize("text", ["padding last", "holes", "all real"])
@pytest.mark.parametrize("visual", MASKS)
@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_training_teaches_what_the_plain_form_teaches(fusion, visual, text):
    """Dropout 0, float64: logits, loss and every gradient within 1e-9, whatever is padding; also
    under recomputation."""
    model = make_umie(fusion, "gated-gelu").double().train()
    if fusion == "gate":
        del model.fusion.cosine  # which would belong to one model in both copies
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    batch = make_batch(S=4)
    batch.features, batch.boxes = batch.features.double(), batch.boxes.double()
    batch.attention_mask, batch.visual_mask = (torch.tensor(MASKS[m]).bool()
                                               for m in (text, visual))
    plain, fast = both(model)
    wanted = teaches(plain, batch)
    for recompute in (False, True):
        for stack in (m for m in fast.modules() if isinstance(m, t5.Stack)):
            stack.recompute = recompute
        for one, other in zip(teaches(fast, batch), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_training_computes_real_tokens_alone_and_teaches_what_all_would_teach(config):
    """The feed-forward of the fast form sees 7 + 3 + 1 source tokens of 21 and 5 + 2 + 5 target
    tokens of 15, with a label left out in the middle of a target among them; eval() sees all."""
    tokens, answers, model = [], [], lively(replace(config, dropout_rate=0.0)).double()
    ids, labels = torch.randint(2, 29, (3, 7)), torch.randint(1, 29, (3, 5))
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    labels[0, 1] = labels[1, 2:] = -100
    plain, fast = both(model)
    for stack in (plain.encoder, plain.decoder, fast.encoder, fast.decoder):
        stack.blocks[0].feed_forward.register_forward_pre_hook(
            lambda _, args: tokens.append(args[0][..., 0].numel()))
    for form, training in ((plain, True), (fast, False), (fast, True)):
        logits, loss = form.train(training)(ids, mask, labels)
        answers.append([logits[labels != -100], loss,
                        *torch.autograd.grad(loss, list(form.parameters()))])
    assert tokens == [21, 15, 21, 15, 11, 12]
    for wanted, *others in zip(*answers, strict=True):
        for other in others:
            torch.testing.assert_close(other, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "all real"])
@pytest.mark.parametrize("H", [1, 3])
def test_padding_is_taken_out_and_put_in_again_for_all_heads(mask, H):
    """merge takes the real tokens, split is its reverse and 0 elsewhere; gradients included."""
    taken_out = padding.Padding(mask := torch.tensor(MASKS[mask]).bool())
    tokens = torch.randn(mask.sum(), H * 2, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(3, 4, H * 2, dtype=torch.float64)
    rows[mask] = tokens.detach()
    heads = rows.unflatten(-1, (H, 2)).transpose(1, 2).clone().requires_grad_()
    assert torch.equal(taken_out.split(tokens, H), heads)
    assert torch.equal(taken_out.merge(heads), tokens)
    assert torch.equal(taken_out.pad(tokens), rows) and torch.equal(taken_out.unpad(rows), tokens)
    assert torch.autograd.gradcheck(lambda x: taken_out.split(x, H).square(), tokens)
    assert torch.autograd.gradcheck(lambda x: taken_out.merge(x).square(), heads)


def test_tokens_stay_in_rows_where_all_are_real():
    """Then split and merge only split and join heads; pad and unpad do nothing."""
    x = torch.randn(2, 2, 6)
    for rows in (padding.Padding(torch.ones(2, 2).bool()), padding.Padding(None)):
        assert torch.equal(rows.unpad(x), x) and torch.equal(rows.pad(x), x)
        heads = rows.split(x, 3)
        assert torch.equal(heads[1, 2, 0], x[1, 0, 4:]) and torch.equal(rows.merge(heads), x)


@pytest.mark.parametrize("B, S, T", [(3, 7, 5), (1, 7, 5), (3, 1, 1), (1, 1, 1)])
def test_frozen_weights_give_the_logits_and_input_gradients_of_the_plain_form(config, B, S, T):
    """Gradients reach the input where no weight has one; also one row, one token."""
    ids, labels = torch.randint(2, 29, (B, S)), torch.randint(1, 29, (B, T))
    mask = torch.arange(S) < torch.tensor([S, max(S - 3, 1), 1])[:B, None]
    answers = []
    for model in both(lively(config).requires_grad_(False)):
        embeds = model.shared(ids).requires_grad_()
        memory = model.encode(None, mask, embeds)
        logits = model.head(model.decode_hidden(model.shift_right(labels), memory, mask))
        logits.sum().backward()  # of an expanded gradient
        answers.append((logits.detach(), embeds.grad))
    for one, other in zip(*answers):
        assert largest_error(other, one) < 1e-5


# ------------------------------------------------------------------ dropout
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_dropout_keeps_the_rate_and_the_mean_and_treats_every_element_for_itself(p):
    """x -> x / (1 - p) with probability 1 - p, else 0; an odd number of elements."""
    torch.manual_seed(0)
    words, x = WordDropout(p), torch.full((301, 997), 2.0, requires_grad=True)
    y = words(x)
    y.sum().backward()
    kept = (y != 0).double()
    assert torch.equal(y, torch.where(y != 0, 2.0 / (1 - p), 0.0)) and torch.equal(y, 2.0 * x.grad)
    noise = (p * (1 - p)) ** 0.5  # of one element
    assert abs(kept.mean() - (1 - p)) < 4 * noise / kept.numel() ** 0.5
    assert abs(kept.mean(0) - (1 - p)).max() < 5 * noise / 301 ** 0.5
    assert abs(kept.mean(1) - (1 - p)).max() < 5 * noise / 997 ** 0.5
    z = ((kept - (1 - p)) / noise).flatten()
    for lag in (1, 2, 3, 4, 997):  # four neighbours share a random word, a row follows a row
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / z.numel() ** 0.5
    torch.manual_seed(0)
    assert torch.equal(words(x), y) and not torch.equal(words(x), y)
    assert words.eval()(x) is x and words(x[:0]).shape == (0, 997)


def test_dropout_keeps_a_byte_of_each_element_for_the_gradient():
    kept, x = [], torch.ones(7, 11, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda _: None):
        WordDropout(0.3)(x)
    assert sum(kept) == x.numel()


@pytest.mark.parametrize("training", [False, True])
def test_dropout_acts_at_each_of_its_places_in_training_only(training):
    model = both(lively(replace(SMALL, dropout_rate=0.0)))[1].train(training)
    (ids, mask, labels), real = small_batch(), small_batch()[2] != -100
    still = model(ids, mask, labels)[0]
    for place in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        place.p = 0.9
        error = largest_error(model(ids, mask, labels)[0][real], still[real])
        assert error > 1e-3 if training else error == 0
        place.p = 0.0


# ------------------------------------------------------------------ decoding
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e15])
@pytest.mark.parametrize("width", [1, 7, 768])
def test_the_norm_of_decoding_is_that_of_the_chapter_in_float64(width, size):
    """Also where epsilon counts, and where the squares come near the largest that fp32 holds."""
    torch.manual_seed(0)
    plain, x = t5.RMSNorm(width, eps=1e-6), size * torch.randn(3, 5, width)
    nn.init.normal_(plain.weight)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    with torch.no_grad():
        fast_form = decoder.FastRMSNorm(width, eps=1e-6)
        fast_form.load_state_dict(plain.state_dict())
        for norm in (plain, fast_form):
            assert largest_error(norm(x).double(), expected * plain.weight.double()) < 1e-6
        fast_form.weight.mul_(2)  # what was made of the weight is made anew
        assert largest_error(fast_form(x), 2 * plain(x)) < 1e-6


@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_after_a_step_nothing_that_was_decoded_with_before_is_used(fusion):
    """An optimizer writes all weights through one vector, which does not count as a write to any:
    also the norms of the visual adapter are to be read anew."""
    model, batch = make_umie(fusion).requires_grad_(True), make_batch()
    chapters = {form: plain for plain, form in (decoder.FORMS | padding.FORMS).items()}
    speed_up(model)
    flat = FlatParameters(model, lr=0.1)
    with torch.no_grad():
        before = model.eval().encode(batch)[0]
        model.train()
        flat.grads.normal_()
        flat.optimizer.step()
        after = model.eval().encode(batch)[0]
        for module in model.modules():
            module.__class__ = chapters.get(type(module), type(module))
        expected = model.encode(batch)[0]
    assert largest_error(after, expected) < 1e-5 < largest_error(before, expected)


@pytest.mark.parametrize("case", ["t5_flan", "t5_v1", "t5_flan_sharded_bf16"])
@pytest.mark.parametrize("beams, key", [(1, "greedy_ids"), (4, "beam4_ids")])
def test_generated_ids_are_identical_to_the_official_ones(case, beams, key):
    want = load_file(GOLDEN / case / "expected.safetensors")
    model = T5.from_pretrained(GOLDEN / case).eval()
    speed_up(model)
    ids = model.generate(want["input_ids"], want["attention_mask"], 24, num_beams=beams)
    assert torch.equal(ids, want[key][:, 1:])


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_ids_are_those_of_the_plain_decoder(beams, precision):
    """Rows end at different steps and leave the batch; one request has no memory at all."""
    lengths = set()
    for seed in range(5):
        dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
        plain, fast = both(brief(seed).to(dtype))
        ids, mask, _ = small_batch(B=4)
        mask[2], rows = False, ([], [])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            wanted, answered = (model.generate(ids, mask, 9, beams, banned_ids=[4, 17],
                                               on_rows=lambda index: calls.append(index.tolist()))
                             for model, calls in zip((plain, fast), rows))
        assert torch.equal(wanted, answered) and rows[0] == rows[1]
        lengths |= set((wanted != 0).sum(1).tolist())
    assert len(lengths) > 2


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_the_joined_decoder_gives_the_logits_of_the_whole_prefix(config, autocast):
    """Token by token, from kept keys and values and packed weights, as all tokens at once."""
    model, (ids, mask, labels) = fast_t5(config), small_batch()
    tokens = model.shift_right(labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        memory = model.encode(ids, mask)
        whole = model.head(model.decode_hidden(tokens, memory, mask)).float()
        by_token = decoder.JoinedDecoder(model, memory, mask, beams=1, steps=tokens.shape[1])
        steps = [by_token(tokens[:, t:t + 1]).float() for t in range(tokens.shape[1])]
    assert largest_error(torch.stack(steps, 1), whole) < (0.05 if autocast else 1e-5)


class Cubed(t5.Linear):
    """y = W_0 x + (x A^T)^3 B^T, in one piece and in the parts that JoinedProduct asks for."""

    def __init__(self, width_in, width_out, std):
        super().__init__(width_in, width_out, std)
        self.A, self.B = nn.Parameter(torch.randn(2, width_in)), torch.randn(width_out, 2)

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.A) ** 3, self.B)

    def parts(self):
        down = [self.weight, self.A[:1], self.A[1:]]
        return down, [self.B[:, :1], self.B[:, 1:]], lambda z: z ** 3


Plain = t5.Linear
LAYERS = {"one": [Plain], "three": [Plain] * 3, "with factors": [Cubed, Plain, Cubed],
          "one with factors": [Cubed]}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("case", LAYERS)
def test_a_joined_product_is_what_each_layer_makes_of_x_also_after_a_write(rows, dtype, case):
    """[W_0; A] x at once, then B; the copies serve until any of the matrices is written to."""
    layers = [make(11, height, 0.3).to(dtype) for make, height in zip(LAYERS[case], (13, 1, 7))]
    for layer in layers:
        if isinstance(layer, Cubed):
            layer.B = layer.B.to(dtype)
    x, owner = torch.randn(rows, 1, 11).to(dtype), layers[0].weight
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for written in (None, "weight", "A", "B"):
        if hasattr(layers[-1], written or "weight"):
            before = decoder.JoinedProduct(layers, dtype) and owner.packed
            if written:
                getattr(layers[-1], written).mul_(2)
            joined = decoder.JoinedProduct(layers, dtype)(x)
            for layer, y in zip(layers, joined, strict=True):
                assert largest_error(y, layer(x)) < tolerance * layer(x).abs().max()
            assert (owner.packed is before) == (written is None)


@torch.no_grad()
def test_layers_without_parts_are_called_and_so_are_their_neighbours():
    """What wraps q is asked itself."""
    q, k, x = Plain(11, 13, 1.0), Plain(11, 13, 1.0), torch.randn(2, 1, 11)
    layers = [nn.Sequential(q), k]
    for layer, y in zip(layers, decoder.JoinedProduct(layers, torch.float32)(x), strict=True):
        assert torch.equal(y, layer(x))
    assert not any(hasattr(weight, "packed") for weight in (q.weight, k.weight))


def test_a_model_made_in_inference_mode_decodes_and_keeps_no_copies():
    """Its weights count no writes, so that an outdated copy would go unseen."""
    (ids, mask, _), wanted = small_batch(), fast_t5()
    with torch.inference_mode():
        model = fast_t5()
        for _ in range(2):
            assert torch.equal(model.generate(ids, mask, 6), wanted.generate(ids, mask, 6))
            for parameter, other in zip(model.parameters(), wanted.parameters()):
                parameter.mul_(1.1)
                other.data.mul_(1.1)
            wanted.train().eval()  # nobody was told of the writes
    assert model.head_weight.is_inference()
    assert not any(hasattr(parameter, "packed") for parameter in model.parameters())


def test_weights_are_packed_once_follow_a_load_and_training_drops_the_copies():
    model, (ids, mask, _) = fast_t5(), small_batch()
    first = model.generate(ids, mask, 6)
    packed = model.head_weight.packed
    assert torch.equal(model.generate(ids, mask, 6), first) and packed is model.head_weight.packed
    other = fast_t5(seed=5)
    wanted = other.generate(ids, mask, 6)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(ids, mask, 6), wanted)
    assert packed is not model.head_weight.packed
    assert not any(hasattr(parameter, "packed") for parameter in model.train().parameters())
