"""The analyses of tools/: costs (Table 5), routing (Fig. 6), AML replay, pictures of runs.

The FLOP counter is held against torch's own, which watches every matrix product of a real forward
and backward pass, and against the figures that reproduce the paper's.
"""

import csv
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clorae
import data
import losses
from engine.compare import System
from engine.corpus import load_corpus, load_datasets
from engine.files import UsageError, save_csv
from engine.schema import Record
from engine.settings import Config
from evaluate import Decoding
from fast import speed_up
from fast.experts import mutual_information
from t5 import T5, T5Config
from tools import costs, replay, routing
from tools.costs import (COSTED, GEOMETRY, PAPER_COSTS, PAPER_LENGTHS, VISUAL_POLICIES, Costs,
                         FlopCounter, Geometry, mim_flops, paper_notes)
from tools.plot import draw_systems, error_counts, plot_curves, swept
from tools.replay import replayed_weights, variants, weight_slopes
from tools.routing import gate_sums, layer_means, plot_routing, route, routing_rows
from vision import UMIE

TINY = T5Config(50, 16, 6, 20, 2, 2, 3, feed_forward_proj="gated-gelu", tie_head=False)
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------- costs: the oracle

def tiny(method: str, policy: str, t5: T5Config = TINY, fusion: str = "gate",
         **options: object) -> UMIE:
    model = clorae.adapt(UMIE(T5(t5), 7, 8, fusion), method, 5, **options)
    model.free_adapter(policy)
    speed_up(model)
    return model.eval()


def watched(model: UMIE, S: int, T: int, V: int) -> tuple[int, int]:
    """FLOPs of all matrix products of one row's forward and backward pass, as torch sees them."""
    batch = SimpleNamespace(
        input_ids=torch.randint(0, 50, (1, S)), attention_mask=torch.ones(1, S, dtype=torch.bool),
        labels=torch.randint(0, 50, (1, T)), tasks=torch.tensor([1]),
        features=torch.randn(1, V, 7), boxes=torch.rand(1, V, 5),
        visual_mask=torch.ones(1, V, dtype=torch.bool))
    added = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1],  # torch lacks them
             torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]}
    forward, backward = (FlopCounterMode(display=False, custom_mapping=added) for _ in "fb")
    if model.training:
        clorae.keep_outputs(model)
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            loss = model(batch).sum()
            if model.training:
                loss = loss + mutual_information(model, 1)
        with backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def counted(model: UMIE, S: int, T: int, V: int) -> tuple[float, float]:
    flops = FlopCounter(model, S, T, V)
    return flops.forward, flops.backward


def test_every_method_is_counted():
    assert {name.split()[0] for name in COSTED} == set(clorae.METHODS)


@pytest.mark.parametrize("policy", VISUAL_POLICIES)
@pytest.mark.parametrize("method", COSTED)
def test_the_counter_finds_every_matrix_product_of_a_real_pass(method, policy):
    """Every method and visual policy; forward and backward.  Beside it stands what MTL-LoRA pays
    once a batch, whatever its tokens: the products w_t B that mix its heads."""
    model = tiny(method.split()[0], policy, **COSTED[method])
    once = sum(2 * layer.w_T.numel() * layer.B_E[0].numel()
               for layer in clorae.expert_layers(model).values() if hasattr(layer, "w_T"))
    forward, backward = counted(model, 9, 3, 4)
    assert (forward + once, backward + 2 * once) == watched(model, 9, 3, 4)


@pytest.mark.parametrize("method", ["full", "lora", "clorae"])
def test_a_row_without_an_image_pays_nothing_for_the_visual_adapter(method):
    model = tiny(method, "train")
    assert counted(model, 9, 3, 0) == watched(model, 9, 3, 0)


@pytest.mark.parametrize("case", [{"fusion": "concat"}, {"t5": dataclasses.replace(
    TINY, tie_head=True)}, {"t5": dataclasses.replace(TINY, feed_forward_proj="relu")}], ids=str)
@pytest.mark.parametrize("method", ["full", "clorae"])
def test_the_counter_knows_other_fusions_heads_and_feed_forwards(method, case):
    model = tiny(method, "train", **case)
    assert counted(model, 9, 3, 4) == watched(model, 9, 3, 4)


def test_the_mutual_information_loss_costs_what_it_adds_to_a_training_step():
    model = tiny("clorae", "train", dropout=0.0)
    without = sum(watched(model, 9, 3, 4))
    model.train()
    assert sum(watched(model, 9, 3, 4)) - without == sum(mim_flops(model, (9, 3, 4)))


# -------------------------------------------------------------------------------- costs: the paper

def umie(size: str, e: int, d: int, v: int) -> float:
    """FLOPs of UMIE as the paper's tool counts them: the quadratic that was fitted to its runs."""
    a, b, c, s, t, u = {"base": (210.665e6, 247.529e6, 32.153e6, 37008, 6168, 3084),
                        "large": (739.607e6, 783.024e6, 57.518e6, 98688, 8224, 4112)}[size]
    return a * e + b * d + c * v + s * (e * e + d * d + e * d) + t * v * v + u * e * v


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("lengths", [(95, 1, 21), (60, 12, 5)])
def test_full_fine_tuning_is_umie_but_for_the_two_differences_that_are_printed(size, lengths):
    """Token-wise projections before the gate's mean, and 1 FLOP per attention score."""
    S, T, V = lengths
    D, _, layers, heads = GEOMETRY[size]
    means = 2 * (D * 384 + 384 * 128) * (S + V - 2)
    scores = heads * (layers * (S * S + T * T + S * T) + 2 * V * V + S * V)
    ours = Geometry.of_size(size, 64, lengths).forward("full") * 1e9
    assert ours + means + scores == pytest.approx(umie(size, *lengths), rel=1e-5)


@pytest.fixture(scope="module")
def base() -> tuple[Geometry, Costs]:
    geometry = Geometry.of_size("base", 128, PAPER_LENGTHS)
    return geometry, costs.costs(geometry)


def test_the_paper_s_gflops_are_explained_as_far_as_its_model_is_ours(base):
    """Forward at (95, 1, 21): U and one task expert at full rank; its LoRA and LoRAMoE at half."""
    notes = "\n".join(paper_notes(*base, PAPER_COSTS["base"]))
    for value in ("21.28, paper 21.3", "clorae: 23.14, paper 23.2", "22.67 at rank R, 21.98 at R/2",
                  "moslora: 26.15", "loramoe: 22.69"):
        assert value in notes


def test_trainable_parameters_are_those_of_the_methods_and_policies(base):
    """Base: the experts alone (frozen), with the visual embedding (paper), with the adapter."""
    _, table = base
    frozen = {label: round(sum(costs_of["frozen"].trainable.values()) / 1e6, 3)
              for label, costs_of in table.items()}
    assert frozen == {"full": 269.922, "lora": 14.942, "moslora": 16.187, "loramoe": 30.001,
                      "hydralora": 30.060, "mtllora": 33.621, "clorae": 29.826, "tlora": 14.709,
                      "clorae --no-egr": 29.709, "clorae --no-mim": 29.768,
                      "clorae --mim-mean affine": 29.943, "clorae --mim-mean map": 30.235}
    visual = [table["clorae"][policy].trainable["visual"] for policy in VISUAL_POLICIES]
    assert [round(n / 1e6, 2) for n in visual] == [0.0, 0.42, 22.34]


def test_the_cost_command_needs_no_checkpoint_and_prints_the_paper_beside_it(base, monkeypatch,
                                                                             capsys):
    monkeypatch.setattr(costs, "costs", lambda geometry: base[1])
    costs.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["full", "21.20", "63.61", "63.59", "63.59", "63.59", "21.3", "63.8"] in lines
    with pytest.raises(SystemExit) as exit:
        costs.main(["a", "b"])
    assert exit.value.code == 2 and "name one at a time" in capsys.readouterr().err


def a_run(**config: object) -> SimpleNamespace:
    """A run as far as its costs go: its settings, its T5 and where its image tower lies."""
    return SimpleNamespace(config=Config(**config), model=SimpleNamespace(t5=T5(TINY)),
                           sources=SimpleNamespace(vit=None))


def test_the_costs_of_a_run_are_those_of_its_own_fusion(monkeypatch):
    """With concat the encoder reads the visual tokens too, and nothing else fuses them."""
    monkeypatch.setattr(costs.ViT, "feature_width", lambda folder: 7)
    record = Record("1", "d", "mner", ("a",), "a.jpg", objects=((0, 0, 1, 1),) * 3)
    rows = [data.Example(record, 0, 0, [1] * 9, [1] * 3, 0)]
    for fusion in ("gate", "concat"):
        geometry = Geometry.of_run(a_run(rank=6, max_objects=8, fusion=fusion), rows)
        assert geometry.lengths == (9, 3, 4)
        model = tiny("full", "train", fusion=fusion)
        assert geometry.forward("full") * 1e9 == pytest.approx(counted(model, 9, 3, 4)[0])


def test_a_geometry_that_no_method_can_have_is_refused():
    """A task expert needs a rank of its own; a row has source and target tokens."""
    with pytest.raises(UsageError, match="rank 3 or more.*got rank 2"):
        Geometry.of_run(a_run(method="lora", rank=2), [])
    for lengths in ((0, 1, 21), (95, 0, 21), (95, 1, -1)):
        with pytest.raises(UsageError, match="--lengths.*got " + " ".join(map(str, lengths))):
            Geometry.of_size("base", 6, lengths)
    assert Geometry.of_size("base", 6, (95, 1, 0)).lengths == (95, 1, 0)


# ----------------------------------------------------------------------------------------- routing

class Pictures:
    """Features that only depend on the record; every third one has no image."""

    width = 16

    def __call__(self, record: Record) -> tuple[torch.Tensor, torch.Tensor] | None:
        number = int(record.id.split("/")[2])
        draw = torch.Generator().manual_seed(number)
        V = number % 3
        return (torch.randn(V, 16, generator=draw), torch.rand(V, 5, generator=draw)) if V else None


@pytest.fixture(scope="module")
def world(small) -> tuple[UMIE, list[data.Example], list[tuple[str, str]], list[int]]:
    """A model with gates and experts that are not zero, examples, their groups."""
    torch.manual_seed(1)
    datasets = load_datasets(Path(small["data"]))
    examples = data.encode_records(load_corpus(Path(small["data"]), "test"), datasets,
                                   data.Tokenizer(Path(small["t5"])), 256, 24)
    model = clorae.adapt(UMIE(T5.from_pretrained(small["t5"]), 16), rank=6)
    for layer in clorae.expert_layers(model).values():
        for weight in (layer.W_g, layer.B_U, layer.B_T):
            nn.init.normal_(weight)
    pairs = [(example.record.task, example.record.dataset) for example in examples]
    groups = sorted(set(pairs))
    return model, examples, groups, [groups.index(pair) for pair in pairs]


def sums_of(world: tuple, rank: int = 0, processes: int = 1, rows: int = 5) -> torch.Tensor:
    model, examples, _, groups = world
    world = SimpleNamespace(rank=rank, size=processes, main=rank == 0, device=CPU,
                            sum=lambda tensor: tensor)  # the caller adds them up
    return gate_sums(model, examples, groups, Pictures(), Decoding(rows), world)


def rows_of(world: tuple, **how: int) -> list[dict]:
    return routing_rows(list(clorae.expert_layers(world[0])), world[2], sums_of(world, **how))


def test_shares_of_the_two_experts_add_up_to_one_and_lie_between(world):
    """0 <= share <= 1, and the shares of a row sum to 1."""
    rows = rows_of(world)
    for row in rows:
        assert row["soft"] + row["soft_universal"] == pytest.approx(1, abs=1e-6)
        assert 0 <= row["hard"] <= 1 and 0 <= row["soft"] <= 1
        assert 0 <= row["var"] <= 0.25 and 0 <= row["entropy"] <= math.log(2) + 1e-9
    assert len({round(row["soft"], 6) for row in rows}) > 20  # the gates are alive


def test_every_valid_token_that_meets_a_layer_is_counted_once(world):
    """Source tokens in the encoder and at cross-attention's v, target tokens in the rest of the
    decoder, visual tokens in the visual stack."""
    _, examples, names, groups = world
    visual = [len((Pictures()(example.record) or [()])[0]) for example in examples]
    wanted = {}
    for example, V, g in zip(examples, visual, groups):
        for stream, n in (("source", len(example.input_ids)), ("target", len(example.labels)),
                          ("visual", V)):
            wanted[stream, names[g]] = wanted.get((stream, names[g]), 0) + n
    for row in rows_of(world):
        stream = {"encoder": "source", "decoder": "target", "vstack": "visual"}[row["stack"]]
        stream = "source" if (row["site"], row["proj"]) == ("cross", "v") else stream
        assert row["n_tokens"] == wanted[stream, (row["task"], row["dataset"])]


def test_neither_amount_nor_content_of_padding_changes_a_sum(world, monkeypatch):
    single = sums_of(world, rows=1)  # no padding at all
    assert torch.allclose(sums_of(world, rows=7), single, rtol=1e-5)
    collate = data.collate

    def filled(*given):
        batch = collate(*given)
        batch.input_ids[~batch.attention_mask] = 9
        return batch

    monkeypatch.setattr(routing.data, "collate", filled)
    assert torch.allclose(sums_of(world, rows=7), single, rtol=1e-5)


def test_the_shares_of_three_processes_add_up_to_those_of_one(world):
    """Sums are reduced, not means, so shares are exact."""
    parts = [sums_of(world, rank, 3) for rank in range(3)]
    assert torch.allclose(sum(parts), sums_of(world), rtol=1e-12, atol=0)
    assert torch.equal(sum(parts)[..., [0, 3]], sums_of(world)[..., [0, 3]])  # the counts


def test_fresh_gates_are_half_and_half_and_no_token_is_beyond(world, small):
    fresh = clorae.adapt(UMIE(T5.from_pretrained(small["t5"]), 16), rank=6)
    for row in rows_of((fresh, *world[1:])):
        assert (row["soft"], row["hard"], row["var"]) == (0.5, 0.0, 0.0)
        assert row["entropy"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("method, reason", [("lora", "which has none"),
                                            ("loramoe", "knows no task expert")])
def test_a_method_without_a_gate_to_a_task_expert_is_refused(method, reason):
    job = SimpleNamespace(config=Config(method=method))
    with pytest.raises(UsageError, match=reason):
        route(job, Path(), None, None)


def test_layers_pool_their_linears_by_tokens_and_are_drawn(world, tmp_path):
    rows = [{"stack": "decoder", "layer": 0, "task": "mre", "dataset": "d", "n_tokens": n,
             "soft": soft} for n, soft in ((30, 0.2), (10, 0.6))]
    assert layer_means(rows, ["decoder"]) == {(0, "d mre"): pytest.approx(0.3)}
    save_csv(tmp_path / "routing.csv", rows_of(world))
    with open(tmp_path / "routing.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows_of(world))
    plot_routing(rows_of(world), [0], tmp_path / "routing.png")
    assert_drawn(tmp_path / "routing.png")


# -------------------------------------------------------------------------------------- AML replay

P = losses.SINGLE_TASK_F1
EARLY = dict(zip(P, (40, 50, 55, 20, 15, 20, 2)))
LATE = dict(zip(P, (75.9, 88.9, 89.3, 89.2, 82.8, 64.0, 31.2)))  # the paper's, large
OWN = {"reference": P, "margin": 1.05, "gamma": 2.0, "temperature": 1.0}
HISTORY = [{"epoch": t + 1, "f1": f1, "weights": losses.achievement_weights(f1, P)}
           for t, f1 in enumerate((EARLY, LATE))]
ROWS = dict(zip(P, (4000, 2848, 3971, 7824, 12247, 20875, 20875)))


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_slopes_are_those_of_finite_differences(gamma, temperature):
    """d weight_m / d ln p_k = M softmax_m (delta_mk - softmax_k) gamma (1 - a_k)^(gamma-1) a_k."""
    slopes = weight_slopes(EARLY, P, 1.05, gamma, temperature)
    for k in P:
        up, down = (losses.achievement_weights(EARLY, {**P, k: P[k] * math.exp(e)}, 1.05, gamma,
                                               temperature) for e in (1e-6, -1e-6))
        for m in P:
            assert slopes[m, k] == pytest.approx((up[m] - down[m]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("f1, slope, shift", [(EARLY, 0.37, 0.039), (LATE, 0.13, 0.018)])
def test_a_reference_that_is_wrong_by_a_tenth_moves_no_weight_far(f1, slope, shift):
    """Steepest d weight / d ln p, and the largest shift by one p_m x 0.9 or x 1.1."""
    assert max(map(abs, weight_slopes(f1, P).values())) == pytest.approx(slope, abs=5e-3)
    rows = replayed_weights([{"epoch": 1, "f1": f1}], variants(OWN), ROWS)
    shifts = [abs(row["shift"]) for row in rows if row["setting"].endswith(("x 0.9", "x 1.1"))
              and "all" not in row["setting"]]
    assert max(shifts) == pytest.approx(shift, abs=1e-3)


def test_the_replay_of_a_run_s_own_setting_gives_the_weights_it_trained_with():
    for row in replayed_weights(HISTORY, {"run": OWN}, ROWS):
        assert row["weight"] == HISTORY[row["after_epoch"] - 1]["weights"][row["unit"]]
        assert row["shift"] == 0


def test_a_margin_is_a_factor_on_all_references():
    """Eq. (9) sees margin p_m only: p x 1.05 at margin 1 is p at margin 1.05."""
    wider = {**OWN, "margin": 1.0, "reference": {m: 1.05 * p for m, p in P.items()}}
    rows = replayed_weights(HISTORY, {"run": OWN, "wider": wider}, ROWS)
    assert all(abs(row["shift"]) < 1e-12 for row in rows)


def test_shares_add_up_to_one_and_achieved_units_are_flagged():
    rows = replayed_weights(HISTORY, variants(OWN), ROWS)
    assert len(rows) == 2 * 7 * len(variants(OWN))
    own = [row for row in rows if row["setting"] == "run" and row["after_epoch"] == 2]
    assert sum(row["share"] for row in own) == pytest.approx(1)
    assert [row["unit"] for row in own if row["achieved"]] == ["V1", "MED", "MEAE"]


def test_the_replay_command_reads_a_run_s_history_and_trains_nothing(small, tmp_path, capsys):
    run = tmp_path / "run"
    config = dataclasses.asdict(Config(data=small["data"], aml_temperature=0.5))
    history = [{**past, "weights": losses.achievement_weights(past["f1"], P, temperature=0.5)}
               for past in HISTORY]
    (run / "step-00000002").mkdir(parents=True)
    (run / "step-00000002/state.json").write_text(
        json.dumps({"config": config, "history": history, "reference": P, "sha256": {}}))
    replay.main([str(run), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "p MEAE x 1.1" in printed and "wrong by 10 % moves a weight by at most 0.069" in printed
    assert "note:" not in printed
    with open(tmp_path / "out/aml.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * 7 * len(variants(OWN))
    assert_drawn(tmp_path / "out/aml.png")


# ---------------------------------------------------------------------------------------- pictures

def assert_drawn(path: Path) -> None:
    """A PNG of a size that can be read."""
    header = path.read_bytes()[:24]
    assert header[1:4] == b"PNG"
    width, height = (int.from_bytes(header[i:i + 4]) for i in (16, 20))
    assert 500 <= width <= 4000 and 300 <= height <= 4000


def system(name: str, f1: dict[str, tuple[float, ...]], missed: int = 0,
           **config: object) -> System:
    """Runs of one setting with these F1, one value a seed."""
    reports = [{"scores": {unit: {"f1": values[seed], "missed": missed, "boundary": 1}
                           for unit, values in f1.items()}} for seed in range(len(f1["T15"]))]
    return System(name, Config(out=name, **config), 0, reports)


def test_systems_are_drawn_side_by_side_and_over_the_setting_in_which_they_differ(tmp_path):
    """Fig. 4 and 5, and their errors; seed and folder are no setting."""
    systems = [system("r8", {u: (f1, f1 + 1) for u, f1 in LATE.items()}, 3, rank=8),
               system("r16", {"T15": (70.0,)}, 2, rank=16, seed=5)]
    made = draw_systems(systems, tmp_path)
    assert [path.name for path in made] == ["systems.png", "rank.png", "errors.png"]
    for path in made:
        assert_drawn(path)
    both = [system("a", {"T15": (1.0,)}, rank=8), system("b", {"T15": (1.0,)}, rank=16, dropout=.2)]
    assert swept(both) is None and swept(both[:1]) is None


def test_errors_are_told_by_unit_of_one_system_and_by_system_of_several():
    """A number per seed; bars without errors are left out."""
    one = system("one", {"T15": (1.0, 2.0), "V1": (3.0, 4.0)}, missed=4)
    assert error_counts([one])["V1"] == {
        "missed": 4, "boundary": 1, "wrong_type": 0, "spurious": 0, "malformed": 0}
    assert list(error_counts([one])) == ["T15", "V1"]
    found = error_counts([one, system("two", {"T15": (1.0,)})])
    assert {name: bar.total() for name, bar in found.items()} == {"one": 10, "two": 1}


def test_curves_are_drawn_and_a_run_without_a_step_has_none(tmp_path):
    """A unit that a step had no rows of is NaN there."""
    (tmp_path / "metrics.csv").write_text("step,loss,CE_T15,CE_V1\n")
    with pytest.raises(UsageError, match="name a run that has taken a step"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    (tmp_path / "metrics.csv").write_text("step,loss,CE_T15,CE_V1\n" + "".join(
        f"{i},{1 / i},nan,{1 / i}\n" for i in range(1, 9)))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(past) + "\n" for past in HISTORY))
    assert_drawn(plot_curves(tmp_path, tmp_path / "curves.png"))
