"""Weights are found or named, a dry run tells all, and what was trained travels by itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clorae
import data
import evaluate
import train
from conftest import ENVIRONMENT, ROOT
from engine import settings
from engine.checkpoints import Sources, read_state, write_checkpoint
from engine.corpus import load_corpus, load_datasets
from engine.features import Features
from engine.files import UsageError, file_hash
from engine.parameters import FlatParameters
from engine.processes import World
from engine.settings import SIZES, VIT, Config, parse_arguments
from engine.weights import HUB_FILES, HUB_GB, find_weights
from evaluate import Setup, build, load_model
from samples import tokenizer_json
from t5 import T5, T5Config, hf_names
from tools import answer, export
from tools.costs import Geometry
from tools.export import fix_gates, mean_gates
from vision import UMIE, ViT

HUB = {"t5": "google/flan-t5-large", "vit": VIT}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---------------------------------------------------------------------------------------- weights

def hub_cache(small: dict[str, str], root: Path) -> Path:
    """A hub cache with small's T5 and ViT under their big sisters' names: blobs, refs, snapshots
    of links into the blobs."""
    for part, name in HUB.items():
        repo = root / ("models--" + name.replace("/", "--"))
        snapshot = repo / "snapshots" / COMMIT
        for folder in (repo / "blobs", repo / "refs", snapshot):
            folder.mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        for file in Path(small[part]).iterdir():
            digest = file_hash(file)
            shutil.copy(file, repo / "blobs" / digest)
            (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return root


@pytest.fixture
def cache(small, tmp_path, monkeypatch) -> Path:
    """Such a cache, the working directory beside it, and a hub that nobody can reach."""
    import huggingface_hub
    from huggingface_hub import constants

    def refuse(name: str, **_: object) -> None:
        raise ConnectionError("[Errno 111] Connection refused")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub_cache(small, tmp_path / "hub")


def snapshot(cache: Path, part: str) -> Path:
    return next(cache.glob(f"*{HUB[part].split('/')[1]}/snapshots/*"))


def found(part: str = "t5", given: Path | None = None) -> Path:
    return find_weights(part, given, HUB[part])


def test_weights_come_from_the_given_folder_then_weights_then_the_hub_cache(cache, small, tmp_path):
    """In this order, and a folder that is whole is enough."""
    assert found() == snapshot(cache, "t5") and found("vit") == snapshot(cache, "vit")
    shutil.copytree(small["t5"], "weights/flan-t5-large")
    assert found() == Path("weights/flan-t5-large")
    assert found(given=Path(small["t5"])) == Path(small["t5"])


def test_a_t5_saved_by_transformers_5_is_whole_without_a_spiece_model(small, tmp_path):
    """tokenizer.json stands in for it, in the search for weights and in a checkpoint's hashes."""
    folder = shutil.copytree(small["t5"], tmp_path / "five")
    raw = tokenizer_json(folder / "spiece.model")
    (folder / "spiece.model").unlink()
    with pytest.raises(UsageError, match="five: expected a whole model.* lacks spiece.model"):
        found(given=folder)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert found(given=folder) == folder
    sources = Sources(Path(small["data"]), folder, Path(small["vit"]))
    hashes = sources.fingerprints()
    assert hashes["t5_tokenizer_sha256"] == file_hash(folder / "tokenizer.json")
    text = "Text: Ann in Paris <spot> O1"
    assert data.Tokenizer(folder).encode(text) == data.Tokenizer(small["t5"]).encode(text)


def test_the_snapshot_of_main_is_preferred_and_an_older_whole_one_is_better_than_half_a_new(cache):
    """refs/main names the snapshot; a later commit of which files are missing is passed over."""
    old = snapshot(cache, "t5")
    new = old.with_name("f" * 40)
    shutil.copytree(old, new, symlinks=True)
    assert found() == old
    (old.parent.parent / "refs" / "main").write_text(new.name)
    assert found() == new
    (new / "spiece.model").unlink()
    assert found() == old


def shards(folder: Path) -> None:
    """model.safetensors as two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def lose_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HALVES = {"a shard": (lose_shard, "model-00002-of-00002.safetensors"),
          "the tokenizer": (lambda folder: (folder / "spiece.model").unlink(), "spiece.model"),
          "the configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
          "all but pickles": (only_pickles, "pytorch_model.bin"),
          "the end of a file": (cut, "model.safetensors")}


@pytest.mark.parametrize("case", HALVES)
@pytest.mark.parametrize("place", ["given", "weights", "cache"])
def test_a_half_downloaded_folder_is_named_before_anything_is_loaded(
        cache, small, monkeypatch, capsys, case, place):
    """R16: the folder and what it lacks; no tensor is read, the command to fetch it is given."""
    spoil, what = HALVES[case]
    folder = {"given": Path("mine"), "weights": Path("weights/flan-t5-large"),
              "cache": snapshot(cache, "t5")}[place]
    shutil.rmtree(folder, ignore_errors=True)
    if place != "cache":
        shutil.rmtree(snapshot(cache, "t5"))
    shutil.copytree(small["t5"], folder)
    spoil(folder)
    monkeypatch.setattr(T5, "from_pretrained", None)
    with pytest.raises(UsageError) as problem:
        found(given=folder if place == "given" else None)
    said = str(problem.value) + capsys.readouterr().err
    assert str(folder) in said and what in said
    assert place == "given" or "hf download google/flan-t5-large" in said


def test_a_whole_model_in_shards_is_found(cache):
    """flan-t5-xl comes in shards with an index."""
    folder = snapshot(cache, "t5")
    shards(folder)
    assert found() == folder


def test_offline_without_weights_both_models_are_named_with_what_to_fetch_and_where_to_put_it(
        cache, small, capsys):
    """One start tells of T5 and ViT: names, size, command, folder, the reason of the failure."""
    shutil.rmtree(cache)
    config = Config(size="large", data=small["data"]).resolved()
    with pytest.raises(UsageError) as problem:
        train.prepare(config)
    said = str(problem.value)
    for part, name in HUB.items():
        local = f"weights/{name.split('/')[1]}"
        assert f"hf download {name} --local-dir {local} --include 'model*.safetensors*'" in said
        assert f"--{part} DIR" in said and f"about {HUB_GB[name]} GB" in said
    assert said.count("spiece.model") == 2 and "Connection refused" in said
    assert "Traceback" not in said and str(cache) in said


def test_a_download_is_used_if_it_is_whole(cache, small, monkeypatch):
    """The hub is asked for safetensors, configurations and the tokenizer, never for pickles."""
    import huggingface_hub
    shutil.rmtree(cache)
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.update({name: options}) or small["t5"])
    assert found() == Path(small["t5"])
    assert asked[HUB["t5"]]["allow_patterns"] == HUB_FILES
    assert not any("bin" in pattern or pattern == "*" for pattern in HUB_FILES)


@pytest.mark.parametrize("size", ["base", "large", "xl"])
def test_the_sizes_to_fetch_are_those_of_the_models(size):
    """4 bytes a parameter, counted on the meta device."""
    with torch.device("meta"):
        model = T5(Geometry.of_size(size, 64, (1, 1, 1)).t5)
    expected = sum(p.numel() for p in model.parameters()) * 4e-9
    assert HUB_GB[SIZES[size].t5] == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------------------------------- dry run

def test_a_dry_run_from_the_hub_cache_tells_all_and_writes_nothing(cache, small, capsys,
                                                                   monkeypatch):
    """Files with hashes, parameters by group, rows, steps, memory; no weight is loaded."""
    monkeypatch.setattr(T5, "from_pretrained", None)
    train.main(["--size", "large", "--data", small["data"], "--rank", "6", "--dry-run",
                "--method", "clorae", "--micro-batch", "3", "--out", "run"])
    said = capsys.readouterr().out
    assert not Path("run").exists()
    for part in HUB:
        path = snapshot(cache, part) / "model.safetensors"
        assert f"{path}, {path.stat().st_size:,} bytes, sha256 {file_hash(path)[:12]}" in said
    for words in ("experts", "gate", "mim", "visual", "frozen: ", "rows: train T15", "; dev T15",
                  "; test T15", "of batch 16 (micro-batches of 3), 20 epochs", "start: from the"):
        assert words in said
    total, *terms = map(float, re.findall(r"(?<= )\d+\.\d\d(?= GB| \+|$)",
                                          said.rpartition("memory per process")[2].strip()))
    assert len(terms) == 6 and sum(terms) == pytest.approx(total, abs=0.03)


def test_under_torchrun_the_cache_of_hf_home_serves_and_one_process_speaks(small, tmp_path):
    """HF_HOME is honoured; the counts are those of the model that a run builds."""
    hub_cache(small, tmp_path / "home" / "hub")
    flags = ["--size", "large", "--data", small["data"], "--rank", "6", "--method", "lora"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), *flags, "--dry-run"], capture_output=True, text=True, timeout=300,
        cwd=tmp_path, env={**ENVIRONMENT, "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    config, *_ = parse_arguments(flags, "", clorae.METHODS)
    setup = build(config, Sources(*map(Path, small.values())), torch.device("cpu"))
    trained = sum(clorae.parameter_split(setup.model).values())
    total = sum(p.numel() for p in setup.model.parameters())
    assert done.stdout.count(f"trainable: {trained:,} of {total:,} parameters") == 1
    assert f"frozen: {total - trained:,} parameters" in done.stdout
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------- adapters

@pytest.fixture(scope="module")
def runs(small, tmp_path_factory) -> Callable[..., Path]:
    """runs(method, ...): a checkpoint whose trained tensors are random, as after training."""
    made = {}

    def make(method: str, precision: str = "fp32", **options: object) -> Path:
        key = (method, precision, *options.items())
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("run") / "step-00000001"
            config = Config(method=method, precision=precision, rank=6, max_target=12,
                                  **small, **options).resolved()
            init = options.get("init") and Path(options["init"])
            sources = Sources(*map(Path, small.values()), init)
            setup = build(config, sources, torch.device("cpu"))
            flat = FlatParameters(setup.model, 1e-3)
            torch.manual_seed(3)
            for name, view in flat.views(flat.values).items():
                if name.split(".")[-1] in ("B_U", "B_T", "B_E", "W_g", "M_U", "L_T", "w_T"):
                    view.normal_(std=0.2)
            flat.optimizer.step()
            write_checkpoint(folder, flat, {"config": asdict(config), "step": 1,
                                   "history": [], "t5": small["t5"], "vit": small["vit"],
                                   "init": options.get("init"), **sources.fingerprints()})
        return made[key]
    return make


@pytest.fixture
def elsewhere(small, tmp_path) -> dict[str, str]:
    """The backbone at other places, as on another machine."""
    return {part: str(shutil.copytree(small[part], tmp_path / "elsewhere" / part))
            for part in ("t5", "vit")}


def batch_of(setup: Setup, small: dict[str, str], rows: int = 6) -> data.Batch:
    records = load_corpus(small["data"], "dev")[::11][:rows]
    features = Features(Sources(*map(Path, small.values())), records, "error", 16,
                        torch.device("cpu"), ViT)
    examples = data.encode_records(records, setup.datasets, setup.tokenizer, 256, 12, lambda _: 0)
    return data.collate(examples, features, features.width)


@torch.no_grad()
def logits(setup: Setup, small: dict[str, str]) -> torch.Tensor:
    setup.model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.config.precision == "bf16"):
        return setup.model(batch_of(setup, small))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["clorae", "lora", "full"])
def test_an_exported_adapter_on_a_fresh_backbone_gives_the_same_logits_bit_for_bit(
        runs, small, elsewhere, tmp_path, method, precision):
    """The folder alone, with the backbone from elsewhere; of method full it is the whole model."""
    source = runs(method, precision)
    expected = logits(load_model(source, torch.device("cpu")), small)
    export.main([str(source), "--out", str(tmp_path / "adapter")])
    setup = load_model(tmp_path / "adapter", torch.device("cpu"), **elsewhere)
    assert [str(setup.sources.t5), str(setup.sources.vit)] == list(elsewhere.values())
    assert torch.equal(logits(setup, small), expected)


def test_a_bf16_run_is_decoded_in_fp32_from_its_bf16_weights_where_bf16_is_slow(
        runs, small, monkeypatch):
    """The numbers of the weights are those of the training; what was computed is recorded."""
    source, device = runs("clorae", "bf16"), torch.device("cpu")
    monkeypatch.setattr(settings, "slow_bf16", lambda: None)
    setup = load_model(source, device)
    assert evaluate.Decoding.of(setup.config).precision == "bf16"
    monkeypatch.setattr(settings, "slow_bf16", lambda: 56.5)
    slow = load_model(source, device)
    decoding = evaluate.Decoding.of(slow.config)
    assert evaluate.made_from(source, slow.config, "dev", decoding)["decoding"][
        "precision"] == decoding.precision == "fp32"
    for ours, theirs in zip(slow.model.t5.parameters(), setup.model.t5.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())
    assert setup.model.t5.shared.weight.dtype == torch.bfloat16
    examples = data.encode_records(load_corpus(small["data"], "dev")[:2], slow.datasets,
                                   slow.tokenizer, 256, 12, lambda _: 0)
    features = Features(slow.sources, [e.record for e in examples], "error", 16, device, ViT)
    rows = evaluate.evaluate_split(slow, examples, features, decoding, World())
    assert len(rows) == 2


def test_an_adapter_on_a_full_run_travels_with_that_run(runs, small, elsewhere, tmp_path, capsys):
    """--init: the experts' backbone is the full run, itself exported; without it, an error."""
    full = runs("full")
    source = runs("clorae", init=str(full), visual_policy="frozen")
    for run_, name in ((full, "full"), (source, "adapter")):
        export.main([str(run_), "--out", str(tmp_path / name)])
    assert f"init of sha256 {file_hash(full / 'model.safetensors')[:12]}" in \
        capsys.readouterr().out
    setup = load_model(tmp_path / "adapter", torch.device("cpu"), **elsewhere,
                             init=str(tmp_path / "full"))
    expected = logits(load_model(source, torch.device("cpu")), small)
    assert torch.equal(logits(setup, small), expected)
    with pytest.raises(UsageError, match="--init DIR"):
        load_model(tmp_path / "adapter", torch.device("cpu"), **elsewhere)
    with pytest.raises(SystemExit):
        export.main([str(source), "--out", str(tmp_path / "lora"), "--task", "mner"])
    assert "all of its T5 was trained" in capsys.readouterr().err


def test_an_adapter_holds_no_path_no_moments_and_nothing_of_mim(runs, small, tmp_path):
    """Experts, gates, visual adapter, labels and hashes: nothing of the machine, nothing of T5,
    neither variance nor mean of L_MIM's Gaussian; and it loads."""
    export.main([str(runs("clorae", mim_mean="affine")), "--out", str(tmp_path / "adapter")])
    load_model(tmp_path / "adapter", torch.device("cpu"), t5=small["t5"], vit=small["vit"])
    files = {str(path.relative_to(tmp_path / "adapter")) for path in
             (tmp_path / "adapter").rglob("*") if path.is_file()}
    modes = {(tmp_path / "adapter" / name).stat().st_mode & 0o777 for name in files}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}  # as the umask has it
    labels = {f"corpus/{name}/dataset.json" for name in load_datasets(small["data"])}
    assert files == {"state.json", "model.safetensors"} | labels
    text = (tmp_path / "adapter" / "state.json").read_text()
    assert not any(folder in text for folder in (*small.values(), str(tmp_path)))
    names = load_file(tmp_path / "adapter" / "model.safetensors").keys()
    assert not [name for name in names if name.endswith(".rho") or name.startswith("t5.")
                and name.split(".")[-1] not in ("A_U", "B_U", "A_T", "B_T", "W_g")]


def test_an_adapter_answers_and_scores_where_only_the_backbone_is(runs, small, elsewhere, tmp_path,
                                                                 capsys, monkeypatch):
    """One example needs the labels that travel along; scoring needs --data; a tiny backbone is
    found in weights/ by its hash; a wrong backbone or none is an error that says which is
    expected."""
    adapter = tmp_path / "adapter"
    export.main([str(runs("clorae")), "--out", str(adapter)])
    capsys.readouterr()
    there = ["--t5", elsewhere["t5"], "--vit", elsewhere["vit"]]
    answer.main([str(adapter), *there, "--text", "Ann in Paris", "--task", "mner"])
    assert "malformed" in capsys.readouterr().out
    evaluate.main([str(adapter), *there, "--data", small["data"], "--units", "T15"])
    assert "F1" in capsys.readouterr().out and list(
        adapter.glob("scores-test.*units-T15.json"))
    made = tmp_path / "weights" / "tiny-00000000"
    for part in ("t5", "vit"):
        shutil.copytree(small[part], made / part)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        answer.main([str(adapter), "--text", "Ann in Paris", "--task", "mner"])
    assert "malformed" in capsys.readouterr().out
    state = read_state(adapter)
    other = Path(elsewhere["t5"])
    (other / "spiece.model").write_bytes((other / "spiece.model").read_bytes() + b"\n")
    for line, words in (([], ["--t5 DIR", state["t5_sha256"][:12]]),
                        (there, ["tokenizer", state["t5_tokenizer_sha256"][:12]]),
                        (["--t5", elsewhere["vit"], "--vit", elsewhere["vit"]], ["spiece.model"])):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(adapter), *line, "--data", small["data"]])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and all(word in said for word in words), said


def test_the_folder_to_export_to_must_be_empty(runs, tmp_path, capsys):
    """Nothing is overwritten."""
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit):
        export.main([str(runs("clorae")), "--out", str(tmp_path)])
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


# ------------------------------------------------------------------------------------ LoRA for PEFT

LORAS = {"clorae": {}, "clorae-plain": {"egr": False}, "lora": {}, "tlora": {}, "moslora": {},
         "loramoe": {}, "hydralora": {}, "mtllora": {}}


def export_task(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> UMIE:
    """Run --export --task mre; returns our model with the gates fixed."""
    models = []
    real = fix_gates
    monkeypatch.setattr(export, "fix_gates", lambda model, *rest: models.append(model)
                        or real(model, *rest))
    export.main([str(run), "--out", str(folder), "--task", "mre"])
    return models[0].eval()


def text_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [3,9], mask, labels [3,5] of text alone."""
    ids, mask = torch.randint(3, 250, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return ids, mask, torch.randint(3, 250, (3, 5))


def test_our_layers_and_hugging_face_s_names_are_one_to_one():
    """The exported keys are the weight map's: injective, and onto T5's q and v."""
    for config in (T5Config(100, 16, 8, 24, 2, 2), T5Config(
            100, 16, 8, 24, 3, 2, feed_forward_proj="gated-gelu", num_decoder_layers=2)):
        names = hf_names(config)
        assert len(set(names.values())) == len(names) == len(T5(config).state_dict())
        ours = {f"{p}.weight" for p in clorae.wrapped_paths(T5(config), clorae.ExpertConfig())}
        theirs = {hub for hub in names.values() if hub.split(".")[-2] in ("q", "v")}
        assert {names[name] for name in ours} == theirs


@pytest.mark.parametrize("case", LORAS)
def test_the_exported_lora_merged_into_the_backbone_is_our_model_with_fixed_gates(
        runs, small, tmp_path, monkeypatch, capsys, case):
    """1.4: W + alpha' / k B A under Hugging Face's names, loaded as any T5, gives our logits."""
    ours = export_task(runs(case.split("-")[0], **LORAS[case]), tmp_path / "lora", monkeypatch)
    said = capsys.readouterr().out
    assert all(f"F1 {name}: V1 " in said for name in
               ("before", "after, gates fixed", "after, without images"))
    assert "the visual adapter, with its experts, is not part of it" in said
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "lora").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == small["t5"]  # an absolute path
    pairs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    merged = load_file(Path(small["t5"]) / "model.safetensors")
    for key in [key for key in pairs if ".lora_A." in key]:
        A, B = pairs[key], pairs[key.replace("lora_A", "lora_B")]
        assert A.shape[0] == B.shape[1] == config["r"]
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        merged[name] += config["lora_alpha"] / config["r"] * B @ A
    folder = shutil.copytree(small["t5"], tmp_path / "merged")
    save_file(merged, folder / "model.safetensors")
    ids, mask, labels = text_batch()
    with torch.no_grad():
        expected = ours.t5(ids, mask, labels)[0]
        plain = T5.from_pretrained(small["t5"]).eval()(ids, mask, labels)[0]
        got = T5.from_pretrained(folder).eval()(ids, mask, labels)[0]
        # Two orders of the same sums: they differ by roundings of the largest terms.
        assert (got - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2


def test_lora_and_tlora_lose_nothing_by_the_export(runs, small, tmp_path, monkeypatch):
    """Without a gate the one LoRA is the layer itself, for the task's rows."""
    for method in set(clorae.METHODS) - {"clorae", "loramoe", "hydralora", "full"}:
        setup = load_model(runs(method), torch.device("cpu"))
        setup.model.eval()
        batch = batch_of(setup, small)
        batch.tasks.fill_(1)
        with torch.no_grad():
            before = setup.model(batch)
            fix_gates(setup.model, 1, dict.fromkeys(clorae.expert_layers(setup.model)))
            torch.testing.assert_close(setup.model(batch), before, rtol=1e-4, atol=1e-4)


def test_mean_gates_are_means_over_the_tokens_of_the_task(runs, small):
    """Layer by layer, over valid tokens, teacher-forced; the two sum to one."""
    setup = load_model(runs("clorae"), torch.device("cpu"))
    sums = torch.tensor([[[4.0, 1.0, 3.0, 2, 1, 1]]]).expand(len(
        clorae.expert_layers(setup.model)), 1, 6)
    gates = mean_gates(setup.model, sums)
    assert set(gates.values()) == {(0.25, 0.75)}


def test_a_task_without_rows_has_no_lora_to_export(runs, tmp_path, capsys):
    """Its gates could not be averaged, its loss not be told."""
    with pytest.raises(SystemExit):
        export.main([str(runs("clorae")), "--out", str(tmp_path / "lora"), "--task", "mner",
                       "--units", "V1"])
    assert "expected rows of it in the dev and the test split" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("size, trained_on, given, expected", [
    ("base", "t5", None, "t5"), ("base", None, None, "google/flan-t5-base"),
    ("base", None, "elsewhere", "elsewhere"), ("base", "t5", "elsewhere", "elsewhere"),
    ("tiny", None, None, "t5")])
def test_the_lora_names_the_t5_that_it_belongs_to(
        runs, small, elsewhere, tmp_path, monkeypatch, capsys, size, trained_on, given, expected):
    """The hub's name only where no --t5 was given, in training or now: else PEFT would put the LoRA
    on other weights of the same shape, without a word."""
    folders = {"t5": str(Path(small["t5"]).resolve()), "elsewhere": elsewhere["t5"]}
    real = export.Job.load

    def load(job: export.Job, world: World) -> tuple:
        setup, examples = real(job, world)
        setup.config.size = size
        setup.config.t5 = folders.get(given or trained_on)  # as stored_config has it
        return setup, examples

    monkeypatch.setattr(export.Job, "load", load)
    monkeypatch.setattr(export, "evaluate_split", lambda *_: [])  # no F1 is asked for
    flags = ["--t5", folders[given]] if given else []
    export.main([str(runs("lora")), "--out", str(tmp_path / "lora"), "--task", "mre", *flags])
    raw = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    base = folders.get(expected, expected)
    assert raw["base_model_name_or_path"] == base
    assert f"on the q and v of {base}, sha256" in capsys.readouterr().out


def test_a_full_run_has_no_lora_to_export(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(runs("full")), "--out", str(tmp_path / "lora"), "--task", "mner"])
    assert "export it without --task" in capsys.readouterr().err


PEER = """
import sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
from transformers import T5ForConditionalGeneration
t5, lora, file = sys.argv[1:]
given = load_file(file)
model = T5ForConditionalGeneration.from_pretrained(t5)
model.save_pretrained(file + ".saved")
model = T5ForConditionalGeneration.from_pretrained(file + ".saved").eval()
model = PeftModel.from_pretrained(model, lora).eval().double()
with torch.no_grad():
    out = model(input_ids=given["ids"], attention_mask=given["mask"], labels=given["labels"])
save_file({"logits": out.logits.contiguous()}, file)
"""


def peer_python() -> str | None:
    """A Python that has transformers and peft: this one, or the one CLORAE_PEER names."""
    for python in filter(None, (sys.executable, os.environ.get("CLORAE_PEER"))):
        code = "import importlib.util as u; import sys; " \
               "sys.exit(not (u.find_spec('peft') and u.find_spec('transformers')))"
        if subprocess.run([python, "-c", code]).returncode == 0:
            return python
    return None


@pytest.mark.parametrize("method", ["clorae", "lora"])
def test_peft_loads_the_exported_lora_and_gives_our_logits(runs, small, tmp_path, monkeypatch,
                                                          method):
    """With transformers and peft as the oracle, both in float64, where transformers still takes
    norms and softmax in fp32: equal to 1e-5."""
    python = peer_python()
    if python is None:
        pytest.skip("needs transformers and peft here, or CLORAE_PEER=python of where they are")
    ours = export_task(runs(method), tmp_path / "lora", monkeypatch)
    ids, mask, labels = text_batch()
    save_file({"ids": ids, "mask": mask, "labels": labels}, tmp_path / "batch")
    done = subprocess.run([python, "-c", PEER, small["t5"], str(tmp_path / "lora"),
                           str(tmp_path / "batch")], capture_output=True, text=True,
                          timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower()
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "batch")["logits"],
                                   ours.t5.double()(ids, mask, labels)[0], rtol=1e-5, atol=1e-5)
