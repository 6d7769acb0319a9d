"""T5: equal to the official model, exact in its gradients, strict about weights, fair to each row.

The folders golden/t5_* hold tiny random checkpoints in the hub's layout and what transformers 5.23
computes with them. Letters: B batch, S source, T target, D width, H heads, K head width.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import t5
from engine.settings import say_once
from engine.weights import open_weights
from t5 import T5, Attention, Stack, T5Config, WeightsError

GOLDEN = Path(__file__).parent / "golden"
CASES = ("t5_flan", "t5_v1", "t5_flan_sharded_bf16")
SMALL = T5Config(vocab_size=29, d_model=11, d_kv=5, d_ff=13, num_layers=2, num_heads=3,
                 num_decoder_layers=3, relative_attention_num_buckets=8,
                 relative_attention_max_distance=20, feed_forward_proj="gated-gelu",
                 tie_head=False, scale_logits=False)
FORMS = {"v1.1": SMALL, "v1.0": replace(SMALL, feed_forward_proj="relu", tie_head=True,
                                        scale_logits=True)}


@pytest.fixture(scope="module", params=CASES)
def golden(request) -> tuple[T5, dict[str, Tensor]]:
    """A checkpoint in eval mode, and what it must compute."""
    folder = GOLDEN / request.param
    return T5.from_pretrained(folder).eval(), load_file(folder / "expected.safetensors")


@pytest.fixture(params=FORMS)
def config(request) -> T5Config:
    return FORMS[request.param]


def small_batch(config: T5Config = SMALL, B: int = 3, S: int = 7, T: int = 5) -> tuple[Tensor, ...]:
    """ids [B,S], mask [B,S] with rows of different length, labels [B,T] with -100 at the end."""
    ids = torch.randint(2, config.vocab_size, (B, S))
    mask = torch.arange(S) < torch.tensor([S, S - 3, 2, S - 1])[:B, None]
    labels = torch.randint(1, config.vocab_size, (B, T))
    labels[1, 3:] = -100
    return ids, mask, labels


def lively(config: T5Config, seed: int = 0) -> T5:
    """A random model in eval mode; norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    model = T5(config).eval()
    for name, param in model.named_parameters():
        if "norm" in name or "relative_bias" in name:
            nn.init.normal_(param, mean=1.0, std=0.5)
    return model


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# ------------------------------------------------------------------ equal to the official model
def test_encoder_logits_and_loss_equal_the_official_model(golden):
    model, want = golden
    with torch.no_grad():
        hidden = model.encode(want["input_ids"], want["attention_mask"])
        logits, loss = model(want["input_ids"], want["attention_mask"], want["labels"])
    assert largest_error(hidden, want["encoder_hidden"]) < 1e-5
    assert largest_error(logits, want["logits"]) < 1e-5
    assert abs(loss.item() - want["loss"].item()) < 1e-5


@pytest.mark.parametrize("beams, key", [(1, "greedy_ids"), (4, "beam4_ids")])
def test_generated_ids_are_identical_to_the_official_ones(golden, beams, key):
    """The official ids begin with the start token, which generate leaves out."""
    model, want = golden
    ids = model.generate(want["input_ids"], want["attention_mask"], 24, num_beams=beams)
    assert torch.equal(ids, want[key][:, 1:])


def test_a_request_gets_the_same_ids_alone_as_in_a_batch(golden):
    model, want = golden
    for row, length in enumerate(want["attention_mask"].sum(1).tolist()):
        for beams, key in (1, "greedy_ids"), (4, "beam4_ids"):
            alone = model.generate(want["input_ids"][row:row + 1, :length], None, 24, beams)[0]
            official = want[key][row, 1:]
            assert torch.equal(F.pad(alone, (0, len(official) - len(alone))), official)


def test_bfloat16_weights_and_bfloat16_autocast_stay_close_to_float32():
    want = load_file(GOLDEN / "t5_flan" / "expected.safetensors")
    inputs = want["input_ids"], want["attention_mask"], want["labels"]
    narrow = T5.from_pretrained(GOLDEN / "t5_flan", torch.bfloat16).eval()
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    wide = T5.from_pretrained(GOLDEN / "t5_flan").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = wide(*inputs)[0]
        assert wide.generate(*inputs[:2], 5, num_beams=3).shape[0] == 4
    for logits in (narrow(*inputs)[0], mixed):
        assert largest_error(logits.float(), want["logits"]) < 0.1
        assert (logits.float() - want["logits"]).std() < 0.05 * want["logits"].std()
    assert narrow.generate(*inputs[:2], 5, num_beams=3).shape[0] == 4


# ------------------------------------------------------------------ against the written definition
def slow_bucket(x: int, bidirectional: bool, buckets: int, furthest: int) -> int:
    """Bucket of one distance, in integers: the j-th wide one starts where
    (x/e)^(n-e) >= (furthest/e)^j, with n buckets on a side, of which e are exact."""
    n = buckets // 2 if bidirectional else buckets
    side, x = (n * (x > 0), abs(x)) if bidirectional else (0, max(-x, 0))
    e = n // 2
    if x < e:
        return side + x
    j = 0
    while j < n - e - 1 and x ** (n - e) * e ** (j + 1) >= furthest ** (j + 1) * e ** (n - e):
        j += 1
    return side + e + j


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (64, 256), (16, 50)])
def test_every_distance_falls_into_the_bucket_of_the_definition(bidirectional, buckets, furthest):
    distance = torch.arange(-400, 401)
    found = t5.relative_buckets(distance, bidirectional, buckets, furthest).tolist()
    assert found == [slow_bucket(x, bidirectional, buckets, furthest) for x in distance.tolist()]


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("S", [1, 2, 8, 13])
def test_the_shared_bias_holds_bucket_causality_and_padding_in_aligned_storage(decoder, S):
    """bias[b,h,i,j] = weight[bucket(j - i), h], the lowest number where j is padding or later."""
    stack, mask = Stack(SMALL, 1, decoder), torch.arange(S) < torch.tensor([[S], [S - 1]])
    bias, weight = stack.self_bias(S, mask, torch.float32), stack.relative_bias.weight
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        bucket = slow_bucket(j - i, not decoder, 8, 20)
        hidden = not mask[b, j] or decoder and j > i
        expected = torch.finfo(torch.float32).min if hidden else weight[bucket, h].item()
        assert bias[b, h, i, j].item() == expected
    padding = t5.mask_bias(mask, torch.bfloat16)
    assert all(stride % 8 == 0 for stride in padding.stride()[:-1])


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_attention(w: dict[str, Tensor], name: str, x: Tensor, source: Tensor, config: T5Config,
                    bias: Tensor) -> Tensor:
    """softmax(q k^T + bias) v, head by head, with -inf at what is hidden."""
    heads = []
    for h in range(config.num_heads):
        rows = slice(h * config.d_kv, (h + 1) * config.d_kv)
        q, k, v = (y @ w[f"{name}.{p}.weight"][rows].T for p, y in zip("qkv", (x, source, source)))
        scores = (q @ k.mT + bias[:, h]).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    return torch.cat(heads, -1) @ w[f"{name}.o.weight"].T


def plain_stack(w: dict[str, Tensor], s: str, x: Tensor, mask: Tensor, config: T5Config,
                memory: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
    """A stack without any of t5.py's shortcuts. mask [B,Q,M] of the self-attention."""
    S, causal = x.shape[1], memory is not None
    distance = [[slow_bucket(j - i, not causal, 8, 20) for j in range(S)] for i in range(S)]
    bias = w[f"{s}.relative_bias.weight"][torch.tensor(distance)].permute(2, 0, 1)
    bias = bias.masked_fill(~mask[:, None], -math.inf)
    for i in range(config.num_decoder_layers if causal else config.num_layers):
        b = f"{s}.blocks.{i}"
        n = plain_norm(x, w[f"{b}.self_attention_norm.weight"])
        x = x + plain_attention(w, f"{b}.self_attention", n, n, config, bias)
        if causal:
            n = plain_norm(x, w[f"{b}.cross_attention_norm.weight"])
            hide = torch.zeros(()).masked_fill(~memory_mask[:, None, None], -math.inf)
            hide = hide.expand(-1, config.num_heads, -1, -1)
            x = x + plain_attention(w, f"{b}.cross_attention", n, memory, config, hide)
        n = plain_norm(x, w[f"{b}.feed_forward_norm.weight"])
        up = n @ w[f"{b}.feed_forward.up.weight"].T
        if config.gated:
            g = n @ w[f"{b}.feed_forward.gate.weight"].T
            tanh = torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g ** 3))
            up = 0.5 * g * (1 + tanh) * up
        else:
            up = up.clamp(min=0)
        x = x + up @ w[f"{b}.feed_forward.down.weight"].T
    return plain_norm(x, w[f"{s}.final_norm.weight"])


def plain_loss(w: dict[str, Tensor], config: T5Config, ids: Tensor, mask: Tensor,
               labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and mean loss, written out."""
    B, T = labels.shape
    memory = plain_stack(w, "encoder", w["shared.weight"][ids], mask[:, None], config)
    shifted = torch.cat((torch.zeros(B, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)), 1)
    seen = torch.tensor([[[j <= i for j in range(T)] for i in range(T)]])
    x = plain_stack(w, "decoder", w["shared.weight"][shifted], seen, config, memory, mask)
    if config.scale_logits:
        x = x / math.sqrt(config.d_model)
    logits = x @ w.get("lm_head.weight", w["shared.weight"]).T
    picked = [-logits[b, t].log_softmax(-1)[labels[b, t]]
              for b in range(B) for t in range(T) if labels[b, t] >= 0]
    return logits, torch.stack(picked).mean()


def test_logits_and_every_gradient_equal_a_plain_float64_implementation(config):
    """The reference writes out softmax, masks and heads; sizes are odd on purpose."""
    model, (ids, mask, labels) = lively(config).double(), small_batch()
    w = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    want_logits, want_loss = plain_loss(w, config, ids, mask, labels)
    want_loss.backward()
    logits, loss = model(ids, mask, labels)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()  # `loss` itself is float32
    assert largest_error(logits, want_logits) < 1e-12 and abs(loss - want_loss) < 1e-5
    for name, param in model.named_parameters():
        assert largest_error(param.grad, w[name].grad) < 1e-10, name


def test_a_frozen_relative_bias_leaves_the_shared_bias_without_gradient():
    stack = Stack(SMALL, 1, decoder=False)
    assert stack.self_bias(4, None, torch.float32).requires_grad
    stack.relative_bias.weight.requires_grad_(False)
    assert not stack.self_bias(4, None, torch.float32).requires_grad


def test_labels_shift_right_behind_the_start_token_and_ignored_ones_become_padding():
    labels = torch.tensor([[5, 6, 1], [7, 1, -100], [-100, 3, 1]])
    expected = torch.tensor([[0, 5, 6], [0, 7, 1], [0, 0, 3]])
    assert torch.equal(T5(SMALL).shift_right(labels), expected)
    assert labels[1, 2] == -100  # the argument is left as it was


# ------------------------------------------------------------------ rows, padding, dropout
def test_a_row_depends_neither_on_its_neighbours_nor_on_the_amount_of_padding(config):
    model, (ids, mask, labels) = lively(config), small_batch(B=4)
    batch = model(ids, mask, labels)[0]
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row:row + 1, :length], None, labels[row:row + 1])[0]
        wider = model(F.pad(ids, (0, 9), value=3)[row:row + 1],
                      F.pad(mask, (0, 9))[row:row + 1], labels[row:row + 1])[0]
        assert largest_error(batch[row], alone[0]) < 1e-5
        assert largest_error(wider[0], alone[0]) < 1e-5


def test_a_row_whose_memory_is_all_padding_gives_the_numbers_of_no_memory_at_all():
    """Attention over nothing is 0, with any amount of padding, and its gradients are finite."""
    model = lively(SMALL)
    ids, memory = torch.randint(2, 29, (2, 4)), torch.randn(2, 5, 11, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    logits = model.head(model.decode_hidden(ids, memory, mask))
    logits.sum().backward()
    assert logits.isfinite().all() and memory.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert memory.grad[1].abs().max() == 0 < memory.grad[0].abs().max()
    nothing = torch.zeros(1, 1, 11)
    assert torch.allclose(logits[1:], model.head(model.decode_hidden(ids[1:], nothing)), atol=1e-5)
    hidden = model.encode(ids, torch.tensor([[True] * 4, [False] * 4]))
    assert hidden.isfinite().all()
    assert model.generate(memory=memory.detach(), attention_mask=mask, max_new_tokens=3).numel()


def test_dropout_acts_in_training_only_and_at_each_of_its_places():
    model, (ids, mask, labels) = lively(replace(SMALL, dropout_rate=0.3)), small_batch()
    assert torch.equal(model(ids, mask, labels)[0], model(ids, mask, labels)[0])
    model.train()
    assert not torch.equal(model(ids, mask, labels)[0], model(ids, mask, labels)[0])
    places = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for place in places:
        place.p = 0.0
    plain, real = model.eval()(ids, mask, labels)[0], labels != -100
    assert largest_error(model.train()(ids, mask, labels)[0][real], plain[real]) < 1e-5
    for place in places:
        place.p = 0.9
        dropped = model(ids, mask, labels)[0]
        assert largest_error(dropped[real], plain[real]) > 1e-3
        place.p = 0.0


def test_attention_under_dropout_drops_weights_and_is_exact_in_its_gradients():
    """o = sum_j w_j d_j v_j, d_j of the dropout; the same d for the written-out reference."""
    attention, x = Attention(SMALL).double().train(), torch.randn(2, 5, 11).double()
    bias = torch.randn(2, 3, 5, 5).double()
    x.requires_grad_()
    torch.manual_seed(1)
    attention(x, x, bias).square().sum().backward()
    torch.manual_seed(1)
    factors = F.dropout(torch.ones_like(bias), 0.1)
    wanted = [x, *attention.parameters()]
    ours = [t.grad for t in wanted]
    q, k, v = (layer(x).unflatten(-1, (3, 5)).transpose(1, 2)
               for layer in (attention.q, attention.k, attention.v))
    out = (factors * (q @ k.mT + bias).softmax(-1)) @ v
    loss = attention.o(out.transpose(1, 2).flatten(2)).square().sum()
    assert (factors == 0).any()
    for gradient, truth in zip(ours, torch.autograd.grad(loss, wanted), strict=True):
        assert largest_error(gradient, truth) < 1e-12


def test_any_module_that_calls_like_a_linear_may_stand_in_for_q_k_v_o():
    class Standin(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    model, (ids, mask, labels) = lively(SMALL), small_batch()
    before = model(ids, mask, labels)[0], model.generate(ids, mask, 6, num_beams=2)
    for attention in [m for m in model.modules() if isinstance(m, Attention)]:
        for p in "qkvo":
            setattr(attention, p, Standin(getattr(attention, p)))
    after = model(ids, mask, labels)[0], model.generate(ids, mask, 6, num_beams=2)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    with pytest.raises(WeightsError, match="before adapting"):
        model.save_pretrained("never-written")


# ------------------------------------------------------------------ decoding
def brief(seed: int) -> T5:
    """A random model whose end token is likely, so that rows end at different steps."""
    model = lively(SMALL, seed)
    model.lm_head.weight.data[1] *= 2.0
    return model


def slow_greedy(model: T5, memory: Tensor, steps: int, banned: list[int]) -> list[int]:
    """One request, decoded anew from the start at every step."""
    ids = [0]
    while len(ids) <= steps and ids[-1] != 1:
        logits = model.head(model.decode_hidden(torch.tensor([ids]), memory))[0, -1]
        logits[banned] = -math.inf
        ids.append(int(logits.argmax()))
    return ids[1:]


def slow_beams(model: T5, memory: Tensor, steps: int, banned: list[int], beams: int) -> list[int]:
    """One request with lists of (score, ids), in the words of Search's docstring."""
    running, finished = [(0.0, [0])], []
    for n in range(1, steps + 1):
        found = []
        for score, ids in running:
            logits = model.head(model.decode_hidden(torch.tensor([ids]), memory))
            gain = logits[0, -1].log_softmax(-1)
            gain[banned] = -math.inf
            found += [(score + g, ids + [c]) for c, g in enumerate(gain.tolist())]
        found = sorted(found, key=lambda pair: -pair[0])[:2 * beams]
        ended = [pair for pair in found[:beams] if pair[1][-1] == 1 or n == steps]
        finished += [(score / n, ids) for score, ids in ended]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        running = [pair for pair in found if pair[1][-1] != 1][:beams]
        if len(finished) == beams and running[0][0] / n <= finished[-1][0]:
            break
    return finished[0][1][1:]


@torch.no_grad()
@pytest.mark.parametrize("poll", [1, 4])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_cached_batched_search_equals_a_slow_search_without_cache(beams, poll, monkeypatch):
    """Rows end at different steps and leave the batch, at once or at the next look of the host."""
    monkeypatch.setitem(t5.POLL, "cpu", poll)
    steps, banned, lengths = 9, [4, 17], set()
    for seed in range(2, 7):
        model = brief(seed)
        ids, mask, _ = small_batch(B=4)
        found = model.generate(ids, mask, steps, beams, banned_ids=banned)
        for row, length in enumerate(mask.sum(1).tolist()):
            memory = model.encode(ids[row:row + 1, :length])
            want = (slow_greedy(model, memory, steps, banned) if beams == 1
                    else slow_beams(model, memory, steps, banned, beams))
            lengths.add(len(want))
            assert found[row].tolist() == want + [0] * (found.shape[1] - len(want))
    assert len(lengths) > 2


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_the_incremental_decoder_gives_the_logits_of_the_whole_prefix(config, autocast):
    """Token by token, from kept keys and values and packed weights, as all tokens at once."""
    model, (ids, mask, labels) = lively(config), small_batch()
    tokens = model.shift_right(labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        memory = model.encode(ids, mask)
        whole = model.head(model.decode_hidden(tokens, memory, mask)).float()
        decoder = t5.CachedDecoder(model, memory, mask, beams=1, steps=tokens.shape[1])
        steps = [decoder(tokens[:, t:t + 1]).float() for t in range(tokens.shape[1])]
    assert largest_error(torch.stack(steps, 1), whole) < (0.05 if autocast else 1e-5)


def test_memory_can_be_given_instead_of_ids():
    model, (ids, mask, _) = lively(SMALL), small_batch()
    memory = model.encode(ids, mask)
    for beams in (1, 3):
        assert torch.equal(model.generate(ids, mask, 6, beams),
                           model.generate(attention_mask=mask, max_new_tokens=6, num_beams=beams,
                                          memory=memory))


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_ids_and_ids_past_the_vocabulary_are_never_produced(beams, monkeypatch):
    model, (ids, mask, _) = lively(SMALL), small_batch(B=4)
    first = set(model.generate(ids, mask, 12, beams).flatten().tolist()) - {0, 1}
    found = model.generate(ids, mask, 12, beams, banned_ids=sorted(first) + [1])
    assert first and not first & set(found.flatten().tolist())
    assert found.shape == (4, 12)  # the end token was banned too
    monkeypatch.setattr(t5, "FIRST_UNUSED_ID", 9)
    assert model.generate(ids, mask, 12, beams).max() < 9


def test_id_0_is_an_ordinary_token_unless_banned():
    """v1.0's random checkpoint produces it over and over; see its greedy_ids."""
    want = load_file(GOLDEN / "t5_v1" / "expected.safetensors")
    model = T5.from_pretrained(GOLDEN / "t5_v1").eval()
    free = model.generate(want["input_ids"], want["attention_mask"], 5)
    assert free[1].tolist() == [0] * 5
    assert model.generate(want["input_ids"], want["attention_mask"], 5, banned_ids=[0]).min() > 0


@pytest.mark.parametrize("beams", [1, 3])
def test_on_rows_lets_outside_state_follow_the_rows(beams):
    """A query layer adds a vector of the row's request. With on_rows each request of a batch gets
    what it gets alone; without, the batch would mix the vectors up when rows leave or multiply."""
    class PerRequest(nn.Module):
        def __init__(self, base: nn.Linear, vectors: Tensor) -> None:
            super().__init__()
            self.base, self.vectors, self.rows = base, vectors, None

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.vectors[self.rows][:, None]

    calls, differ = [], False
    for seed in range(5):
        model, (ids, mask, _) = brief(seed), small_batch(B=4)
        attention = model.decoder.blocks[0].cross_attention
        attention.q = wrapped = PerRequest(attention.q, 9 * torch.randn(4, 15))
        memory = model.encode(ids, mask)

        def run(some: list[int]) -> Tensor:
            def on_rows(index: Tensor) -> None:
                calls.append(index.tolist())
                wrapped.rows = torch.tensor(some)[index]

            wrapped.rows = torch.tensor(some)
            return model.generate(memory=memory[some], attention_mask=mask[some],
                                  max_new_tokens=8, num_beams=beams, on_rows=on_rows)

        batch = run([0, 1, 2, 3])
        for row in range(4):
            alone = run([row])[0]
            assert F.pad(alone, (0, batch.shape[1] - len(alone))).tolist() == batch[row].tolist()
        differ |= len(set(map(tuple, batch.tolist()))) > 1
    assert differ and any(len(call) < 4 * beams for call in calls)
    assert beams == 1 or calls[0] == [0] * beams + [1] * beams + [2] * beams + [3] * beams


def test_generate_refuses_training_mode_and_empty_requests():
    model, (ids, mask, _) = lively(SMALL), small_batch()
    with pytest.raises(ValueError, match="eval"):
        model.train().generate(ids, mask, 4)
    with pytest.raises(ValueError, match="at least one token"):
        model.eval().generate(ids, mask, 0)


# ------------------------------------------------------------------ weights and configuration
@pytest.mark.parametrize("case", CASES)
def test_the_weight_map_is_a_bijection_between_parameters_and_official_keys(case):
    model = T5.from_pretrained(GOLDEN / case)
    names = t5.hf_names(model.config)
    assert names.keys() == model.state_dict().keys()
    assert len(set(names.values())) == len(names)
    stored = open_weights(GOLDEN / case).keys()
    assert stored - set(names.values()) <= {*t5.COPIES, t5.UNUSED}
    assert set(names.values()) <= stored


def test_save_then_load_gives_the_same_bits_and_the_same_config(config, tmp_path):
    model = lively(config)
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = T5.from_pretrained(tmp_path / "deep" / "folder")
    assert again.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [
        "config.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a small v1.1 checkpoint."""
    lively(SMALL).save_pretrained(tmp_path)
    return tmp_path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """A copy of what model.safetensors holds: what safetensors before 0.8 returns lies in the
    mapped file, and to read it after the file has been written anew ends the process (SIGBUS)."""
    stored = load_file(folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in stored.items()}


def edit(folder: Path, **tensors: Tensor | None) -> None:
    """Set (or with None remove) tensors of model.safetensors, `__` standing for a dot."""
    stored = tensors_of(folder)
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor.clone()
    save_file(stored, folder / "model.safetensors")


def edit_config(folder: Path, **fields: object) -> None:
    """Set (or with None remove) fields of config.json."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))


def refusal(folder: Path) -> str:
    """What from_pretrained says when it refuses the folder."""
    with pytest.raises(WeightsError) as caught:
        T5.from_pretrained(folder)
    return str(caught.value)


def test_duplicates_of_the_embedding_are_dropped_only_if_they_equal_it(saved):
    shared = tensors_of(saved)["shared.weight"]
    edit(saved, encoder__embed_tokens__weight=shared,
         decoder__embed_tokens__weight=shared.double())  # values count, not how they are stored
    T5.from_pretrained(saved)
    edit(saved, decoder__embed_tokens__weight=shared + 1)
    assert "decoder.embed_tokens.weight" in refusal(saved)


NAMES = ("shared.weight", *t5.COPIES, "lm_head.weight")


@pytest.mark.parametrize("case, names", [
    *((case, names) for case in ("t5_v1", "t5_flan")
      for names in (NAMES[:1], NAMES[1:2], NAMES[2:3], NAMES[1:3], NAMES[:3])),
    ("t5_v1", NAMES[3:]), ("t5_v1", NAMES[2:]), ("t5_v1", NAMES)])
def test_the_embedding_may_be_stored_under_any_of_its_names(tmp_path, case, names):
    """Encoder, decoder and a tied head share it, and a file may keep any one name: it gives the
    official logits.  The untied head of flan keeps its own."""
    stored = load_file(GOLDEN / case / "model.safetensors")
    embedding = stored["shared.weight"]
    stored = {name: stored[name] for name in stored if name not in NAMES[:3]}
    save_file(stored | {name: embedding.clone() for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / case / "config.json").read_bytes())
    want = load_file(GOLDEN / case / "expected.safetensors")
    model = T5.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits, _ = model(want["input_ids"], want["attention_mask"], want["labels"])
    assert largest_error(logits, want["logits"]) < 1e-5
    assert (model.lm_head is None) == (case == "t5_v1")


def test_an_embedding_that_is_not_certain_is_refused(saved):
    """None at all, two that differ, and a head of which nothing says that it is the embedding."""
    shared, head = (tensors_of(saved)[name] for name in ("shared.weight", "lm_head.weight"))
    edit(saved, shared__weight=None)
    assert "shared.weight" in refusal(saved)  # the configuration says that the head is untied
    edit_config(saved, tie_word_embeddings=True)  # as transformers 5 does, beside scale = false
    assert "shared.weight" in refusal(saved)
    edit_config(saved, scale_decoder_outputs=True)
    assert torch.equal(T5.from_pretrained(saved).shared.weight, head)
    edit(saved, encoder__embed_tokens__weight=shared, decoder__embed_tokens__weight=shared + 1)
    assert "decoder.embed_tokens.weight" in refusal(saved)
    edit(saved, encoder__embed_tokens__weight=shared[:, :7], decoder__embed_tokens__weight=None)
    assert "[29, 7]" in refusal(saved)


def test_a_gated_t5_that_scales_before_a_head_of_its_own_is_said_once(saved, capsys):
    """What transformers 5.0.0 writes for a flan, by mistake and for good; it is done as it says."""
    say_once.cache_clear()
    T5.from_pretrained(saved)
    assert capsys.readouterr().err == ""
    edit_config(saved, scale_decoder_outputs=True)
    assert T5.from_pretrained(saved).config.scale_logits and T5.from_pretrained(saved)
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and f"{saved}/config.json: scale_decoder_outputs" in said
    edit(saved, lm_head__weight=None)
    T5.from_pretrained(saved)
    assert capsys.readouterr().err == ""  # with a tied head it is nothing strange


def test_unknown_missing_and_misshapen_keys_are_named(saved):
    edit(saved, encoder__surprise=torch.zeros(2))
    assert "encoder.surprise" in refusal(saved)
    edit(saved, encoder__surprise=None, encoder__final_layer_norm__weight=None)
    assert "encoder.final_layer_norm.weight" in refusal(saved)
    edit(saved, encoder__final_layer_norm__weight=torch.ones(12))
    message = refusal(saved)
    assert "encoder.final_layer_norm.weight" in message and "[11]" in message and "[12]" in message
    edit(saved, encoder__final_layer_norm__weight=torch.ones(11, dtype=torch.int32))
    assert "I32" in refusal(saved)


def test_half_precision_files_are_read_and_half_precision_computing_is_refused(saved):
    stored = tensors_of(saved)
    save_file({k: v.half() for k, v in stored.items()}, saved / "model.safetensors")
    model = T5.from_pretrained(saved)
    assert torch.equal(model.shared.weight, stored["shared.weight"].half().float())
    with pytest.raises(WeightsError, match="float16"):
        T5.from_pretrained(saved, torch.float16)
    ids, mask, labels = small_batch()
    with pytest.raises(WeightsError, match="overflow"), torch.autocast("cpu", torch.float16):
        model(ids, mask, labels)
    with pytest.raises(WeightsError, match="overflow"):
        model.half()(ids, mask, labels)


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors into two shards with an index; returns key -> shard."""
    stored = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    shards = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(stored)}
    for name in set(shards.values()):
        save_file({k: v for k, v in stored.items() if shards[k] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return shards


def test_a_missing_shard_is_named_before_anything_is_read(saved):
    whole = T5.from_pretrained(saved)
    shard(saved)
    parts = T5.from_pretrained(saved)
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))
    (saved / "model-00002-of-00002.safetensors").unlink()
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"not even looked at")
    assert "model-00002-of-00002.safetensors" in refusal(saved)


def test_an_empty_folder_and_a_broken_config_are_refused_with_the_path(saved, tmp_path):
    assert "config.json" in refusal(tmp_path / "nowhere")
    edit_config(saved, d_model=None)
    assert "d_model" in refusal(saved)
    edit_config(saved, d_model=11, feed_forward_proj="gated-silu")
    assert "gated-silu" in refusal(saved)
    edit_config(saved, feed_forward_proj="gated-gelu", model_type="mt5")
    assert "mt5" in refusal(saved)
    edit_config(saved, model_type="t5", d_kv=6)
    assert "[18, 11]" in refusal(saved)
    (saved / "config.json").write_text("{")
    assert "config.json" in refusal(saved)


@pytest.mark.parametrize("buckets, furthest", [(1, 20), (3, 20), (8, 4), (32, 8)])
def test_positions_that_cannot_be_put_into_buckets_are_refused(saved, buckets, furthest):
    """Half of the buckets, or a quarter, hold one distance each; the rest grow up to furthest."""
    edit_config(saved, relative_attention_num_buckets=buckets,
                relative_attention_max_distance=furthest)
    assert "config.json" in refusal(saved) and "relative_attention" in refusal(saved)


def test_no_row_or_no_token_to_answer_is_refused():
    """An empty batch is a mistake of the caller, said in words."""
    model = T5(SMALL).eval()
    for shape in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match="at least one row and one source token"):
            model.generate(torch.zeros(shape, dtype=torch.long))


def test_absent_optional_fields_take_the_official_defaults(tmp_path):
    """Old hub files say neither how many decoder layers there are nor which activation."""
    config = T5Config(29, 11, 5, 13, 2, 3)
    assert (config.num_decoder_layers, config.feed_forward_proj) == (2, "relu")
    lively(config).save_pretrained(tmp_path)
    edit_config(tmp_path, num_decoder_layers=None, feed_forward_proj=None, dropout_rate=None,
                relative_attention_max_distance=None, scale_decoder_outputs=None,
                tie_word_embeddings=None, decoder_start_token_id=None, layer_norm_epsilon=None)
    assert T5.from_pretrained(tmp_path).config == config


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("scale", [True, False, None])
def test_head_and_scaling_follow_the_decision_table(saved, head, tie, scale):
    """Untied iff lm_head is stored and differs from shared. Scaled iff scale_decoder_outputs, and
    where it is absent iff tie_word_embeddings, which is true where absent. Among the 27 cases is
    the trap: transformers 5 saves a flan with tie = true, scale = false and a separate head."""
    stored = tensors_of(saved)
    equal, different = stored["shared.weight"], stored["lm_head.weight"]
    edit(saved, lm_head__weight={"absent": None, "equal": equal, "different": different}[head])
    edit_config(saved, tie_word_embeddings=tie, scale_decoder_outputs=scale)
    model = T5.from_pretrained(saved)
    assert (model.lm_head is None) == model.config.tie_head == (head != "different")
    assert model.config.scale_logits == (scale if scale is not None else tie is not False)


def test_loaded_weights_do_not_depend_on_the_file_any_more(saved):
    model = T5.from_pretrained(saved)
    before = model.shared.weight.clone()
    path = saved / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.shared.weight, before)


# ------------------------------------------------------------------ construction
def test_random_weights_have_the_spread_of_the_official_initialisation():
    config = T5Config(3000, 96, 32, 200, 1, 4, feed_forward_proj="gated-gelu", tie_head=False)
    model = T5(config)
    block = model.decoder.blocks[0]
    spread = {model.shared: 1.0, model.lm_head: 1.0, block.self_attention.q: (96 * 32) ** -0.5,
              block.self_attention.k: 96 ** -0.5, block.cross_attention.v: 96 ** -0.5,
              block.cross_attention.o: 128 ** -0.5, block.feed_forward.gate: 96 ** -0.5,
              block.feed_forward.up: 96 ** -0.5, block.feed_forward.down: 200 ** -0.5}
    for module, std in spread.items():
        assert abs(module.weight.std().item() / std - 1) < 0.05
    assert abs(model.encoder.relative_bias.weight.std().item() * 96 ** 0.5 - 1) < 0.25
    assert (block.feed_forward_norm.weight == 1).all()


@pytest.mark.parametrize("D, F_, L, H, K, count", [
    (768, 2048, 12, 12, 64, 247_577_856), (1024, 2816, 24, 16, 64, 783_150_080),
    (2048, 5120, 24, 32, 64, 2_849_757_184)])
def test_base_large_and_xl_have_their_published_parameter_counts(D, F_, L, H, K, count):
    """flan-t5-base, -large and -xl, built on the meta device."""
    config = T5Config(32128, D, K, F_, L, H, feed_forward_proj="gated-gelu", tie_head=False)
    with torch.device("meta"):
        model = T5(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_stack_stands_alone_and_every_stored_key_has_one_reader(tmp_path):
    """vision.py builds two encoder blocks of T5's config; a stack without mask is all real."""
    stack = Stack(SMALL, 2, decoder=False).eval()
    x = torch.randn(2, 5, 11)
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(stack(x, None), stack(x, everything), atol=1e-6)
    lively(SMALL).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(t5.hf_names(SMALL).values())
