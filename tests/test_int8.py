"""fast/int8.py as a specification: decoding with matrices that are rounded to eight bits."""

import copy
import json

import pytest
import torch
from torch import nn

import clorae
import evaluate
import train
from fast import int8, speed_up
from fast.decoder import JoinedDecoder
from t5 import T5, Linear
from test_t5 import FORMS, SMALL, largest_error, lively, small_batch


def rounded(model: nn.Module) -> nn.Module:
    """A fast copy of the model, with weights of eight bits."""
    model = copy.deepcopy(model)
    speed_up(model)
    int8.quantize(model)
    return model


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float64, with each row of W in 127 steps of its largest number."""
    step = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return x.double() @ ((weight.double() / step).round() * step).T


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("D_out, D_in", [(1, 1), (3, 5), (33, 17), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_weights_and_tokens(rows, D_out, D_in, dtype):
    """An input lies within half a step of its seven bits: the range of a token, which holds 0, has
    127 steps and is at most twice its largest number; ours adds the output's own type."""
    x, weight = torch.randn(rows, 1, D_in), torch.randn(D_out, D_in)
    x = x.to(dtype)
    y = int8.Int8([weight], dtype)(x)
    assert y.dtype == dtype and y.shape == (rows, 1, D_out)
    step = 2 * x.double().abs().amax(-1, keepdim=True) / 127
    bound = (0.51 * step) @ weight.double().abs().sum(1)[None]
    bound = bound + torch.finfo(dtype).eps * oracle(x, weight).abs() + 1e-6
    assert ((y.double() - oracle(x, weight)).abs() <= bound).all()


def test_matrices_are_joined_in_rows_or_columns():
    a, b, x = torch.randn(6, 5), torch.randn(6, 5), torch.randn(1, 1, 10)
    rows, columns = int8.Int8([a, b], a.dtype)(x[..., :5]), int8.Int8([a, b], a.dtype, dim=1)(x)
    assert largest_error(rows.double(), oracle(x[..., :5], torch.cat([a, b]))) < 0.02
    assert largest_error(columns.double(), oracle(x, torch.cat([a, b], 1))) < 0.02


def test_a_token_does_not_see_how_large_others_of_its_batch_are():
    """One token a million times as large, or all zero, beside it changes nothing but rounding."""
    x, weight = torch.randn(3, 1, 64), torch.randn(32, 64)
    product = int8.Int8([weight], x.dtype)
    alone = product(x[:1])
    for factor in (1e6, 0.0):
        beside = x * torch.tensor([1.0, factor, 1.0])[:, None, None]
        assert largest_error(product(beside)[:1], alone) < 0.02
    assert product(torch.zeros(2, 1, 64)).abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_encoding_and_decoding_come_close_to_the_stored_weights(form):
    """Encoder and decoder step both round, every matrix of a step among them."""
    model = lively(FORMS[form])
    quick, (ids, mask, _) = rounded(model), small_batch()
    with torch.no_grad():
        wanted = model.encode(ids, mask)
        memory = quick.encode(ids, mask)
        error = ((memory - wanted)[mask.bool()].norm() / wanted[mask.bool()].norm()).item()
        assert 1e-5 < error < 0.1
        start = torch.zeros(len(ids), 1, dtype=torch.long)
        steps = [decoder(each, wanted, mask.bool(), 1, 4)(start)
                 for decoder, each in ((model.decoder_class, model), (JoinedDecoder, quick))]
        error = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
        assert 1e-5 < error < 0.1
        products = JoinedDecoder(quick, wanted, mask.bool(), 1, 4)
    packed = [product.down for joined in products.products for product in joined.values()]
    assert all(type(each) is int8.Int8 for each in (*packed, products.head))
    assert not [m for m in quick.modules() if type(m) is Linear]


def test_experts_take_part():
    """Of an adapted layer W_0, A, B and the gate are rounded; its parameters stay as they were."""
    torch.manual_seed(0)
    model = T5(SMALL)
    clorae.adapt(model, "clorae", 6, ("mner", "mre", "mee"))
    for name, parameter in model.named_parameters():
        if ".B_" in name:
            nn.init.normal_(parameter, std=0.3)
    quick = rounded(model.eval())
    for one, other in zip(model.parameters(), quick.parameters(), strict=True):
        assert torch.equal(one, other)
    ids, mask, _ = small_batch()
    plain = copy.deepcopy(model)
    speed_up(plain)
    steps = []
    with torch.no_grad():
        for each in (plain, quick):
            plain.routing.set(torch.arange(len(ids)) % 3, memory=mask.bool())
            each.routing.set(torch.arange(len(ids)) % 3, memory=mask.bool())
            decoder = JoinedDecoder(each, plain.encode(ids, mask), mask.bool(), 1, 4)
            steps.append(decoder(torch.zeros(len(ids), 1, dtype=torch.long)))
    ups = [up for joined in decoder.products for product in joined.values() for up in product.up]
    assert any(type(up) is int8.Int8 for up in ups)
    assert 1e-5 < ((steps[1] - steps[0]).norm() / steps[0].norm()).item() < 0.1


def test_weights_that_change_are_rounded_anew():
    model = rounded(lively(SMALL))
    ids, mask, _ = small_batch()
    with torch.no_grad():
        before = model.encode(ids, mask)
        model.encoder.blocks[0].feed_forward.up.weight.mul_(3)
        assert not torch.equal(model.encode(ids, mask), before)


def test_where_it_cannot_be_had_it_is_refused():
    """Plain modules read no packed weights."""
    with pytest.raises(ValueError, match="expected a CPU, --impl fast or auto.*leave --weights"):
        int8.quantize(lively(SMALL))


def test_the_option_is_named_beside_every_score(small, tmp_path, capsys):
    """The checkpoint stays; scores of stored weights are not taken for those of rounded ones."""
    out = tmp_path / "run"
    files = [word for name, folder in small.items() for word in (f"--{name}", folder)]
    train.main([*files, "--max-target", "24", "--rank", "6", "--batch", "12", "--steps", "2",
                "--epochs", "1", "--units", "T15", "--out", str(out)])
    torch.set_deterministic_debug_mode("default")
    stored = json.loads((out / "scores-test.json").read_text())["made_from"]
    capsys.readouterr()
    evaluate.main([str(out), "--weights", "int8", "--units", "T15"])
    assert "greedy, weights rounded to 8 bits" in capsys.readouterr().out
    assert json.loads((out / "scores-test.json").read_text())["made_from"] == stored
    made_from = json.loads((out / "scores-test.int8.json").read_text())["made_from"]
    assert made_from["decoding"] == stored["decoding"] | {"weights": "int8"}
    assert made_from["checkpoint"] == stored["checkpoint"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(out), "--weights", "int8", "--impl", "plain"])
    assert stop.value.code == 2 and "--weights int8: expected" in capsys.readouterr().err
