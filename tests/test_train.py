"""train.py as a specification: one loss for any processes, exact resume, checkpoints, errors."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import clorae
import data
import evaluate
import losses
import tools.answer
import train
from conftest import ROOT, run, sums
from engine import settings
from engine.checkpoints import (Checkpoints, Progress, Sources, find_checkpoint, load_trainables,
                                newest_checkpoint, read_state, stored_config, write_checkpoint,
                                write_state)
from engine.command import Bar
from engine.corpus import hold_out, load_corpus, read_splits
from engine.files import UsageError, file_hash, note
from engine.parameters import FlatParameters
from engine.processes import World
from engine.schema import SPLITS, UNITS, Dataset, Record
from engine.settings import VIT, Launch, computed_in, parse_arguments
from engine.weights import find_weights
from evaluate import Setup, build, load_model
from fast import speed_up
from fast.experts import mutual_information
from t5 import T5, T5Config
from vision import UMIE


def first_step(command, tmp_path: Path, *flags: object, processes: int = 1) -> tuple[float, dict]:
    """Loss and gradients of the first step, dropout off."""
    target = tmp_path / f"step-{processes}-{'-'.join(map(str, flags))}.safetensors"
    done = run(command(target, "--dropout", 0, "--backbone-dropout", 0, "--clip", 1e9, *flags,
                       script="tests/first_step.py"), processes)
    assert done.returncode == 0, done.stderr
    with safe_open(target, "pt") as file:
        return float(file.metadata()["loss"]), {k: file.get_tensor(k) for k in file.keys()}


def assert_same_step(ours: tuple[float, dict], reference: tuple[float, dict]) -> None:
    assert math.isclose(ours[0], reference[0], rel_tol=1e-5)
    assert ours[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (ours[1][name] - gradient).abs().max() <= 1e-5 * scale, name


def test_two_processes_take_the_step_that_one_takes(command, tmp_path):
    """At dropout 0, loss and every gradient are equal within 1e-5."""
    assert_same_step(first_step(command, tmp_path, processes=2), first_step(command, tmp_path))


def test_accumulation_takes_the_step_that_one_pass_takes(command, tmp_path):
    """Micro-batches of 12, 5 or 1 rows give one and the same gradient."""
    whole = first_step(command, tmp_path, "--micro-batch", 12)
    for rows in (5, 1):
        assert_same_step(first_step(command, tmp_path, "--micro-batch", rows), whole)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> dict:
    """A short finished run: {"out", "line", "stdout"}."""
    out = tmp_path_factory.mktemp("finished") / "run"
    line = command(out, "--steps", 6, "--epochs", 1, "--save-every", 2)
    done = run(line)
    assert done.returncode == 0, done.stderr
    return {"out": out, "line": line, "stdout": done.stdout}


def test_a_finished_run_reprints_its_table(finished):
    """The same command on a finished run prints the table and exits 0."""
    again = run(finished["line"])
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert (finished["out"] / "table.txt").read_text() in again.stdout


@pytest.mark.parametrize("keeps_best", [True, False])
def test_a_run_that_goes_on_in_another_folder_has_its_best_checkpoint(finished, command, tmp_path,
                                                                     keeps_best):
    """--resume CHECKPOINT --out NEW brings the best along; if it is gone, the next one is best."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(finished["out"], old)
    if not keeps_best:
        shutil.rmtree(old / "best-00000006")
    step = 6 if keeps_best else 4  # after or before the only evaluation
    done = run(command(new, "--steps", 6, "--epochs", 1, "--save-every", 2, "--resume",
                       old / f"step-{step:08d}"))
    assert done.returncode == 0, done.stderr
    for name in ("table.txt", "best-00000006/model.safetensors"):
        assert (new / name).read_bytes() == (finished["out"] / name).read_bytes()


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(finished, command, tmp_path):
    """Only another value than the default would change what the run computes."""
    old = tmp_path / "old"
    shutil.copytree(finished["out"], old)
    folder = old / "step-00000004"
    state = read_state(folder)
    digests = {name: digest for name, digest in state.pop("sha256").items()
               if name != "state.json"}
    del state["config"]["graphs"], state["config"]["aml_gamma"]
    write_state(folder, state, digests)
    flags = ("--steps", 6, "--epochs", 1, "--save-every", 2, "--resume", folder)
    assert run(command(tmp_path / "new", *flags)).returncode == 0
    assert sums(tmp_path / "new")["metrics.csv"].split(b"\n")[-2:] == \
        sums(finished["out"])["metrics.csv"].split(b"\n")[-2:]
    done = run(command(tmp_path / "other", *flags, "--aml-gamma", 3))
    assert done.returncode == 2 and "aml_gamma 2.0 -> 3.0" in done.stderr


def test_a_run_of_f1199df_loads_scores_and_resumes(small, tmp_path, monkeypatch, capsys):
    """golden/run_f1199df is a checkpoint after 2 of 3 steps, and the metrics of all 3.

    Made by the code of that commit from conftest's small world and a random T5 (d_model 8, no
    dropout) and ViT (width 8) that lie beside it, with golden/tokenizer, by
    train.py --data world --t5 t5 --vit vit --rank 3 --max-target 16 --batch 12 --micro-batch 12
    --fusion concat --units T17 V1 --steps 3 --epochs 1 --save-every 2 --out run
    """
    golden = ROOT / "tests" / "golden"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(World, "listen", lambda world: None)  # leave this process its handlers
    for name in ("t5", "vit"):
        shutil.copytree(golden / "run_f1199df" / name, name)
    shutil.copy(golden / "tokenizer" / "spiece.model", "t5")
    Path("world").symlink_to(small["data"])
    shutil.copytree(golden / "run_f1199df" / "step-00000002", "run/step-00000002")
    setup = load_model(find_checkpoint(Path("run")), torch.device("cpu"))
    assert setup.config.rank == 3 and setup.config.impl == "auto"
    evaluate.main(["run"])
    assert "F1 UMIE" in capsys.readouterr().out
    train.main("--data world --t5 t5 --vit vit --rank 3 --max-target 16 --batch 12 --micro-batch "
               "12 --fusion concat --units T17 V1 --steps 3 --epochs 1 --save-every 2 --out run "
               "--precision fp32".split())
    assert "resumed run/step-00000002 at step 2" in capsys.readouterr().out
    now, then = ([float(word) for word in path.read_text().split("\n")[-2].split(",")[:-1]]
                 for path in (Path("run/metrics.csv"), golden / "run_f1199df" / "metrics.csv"))
    assert now == pytest.approx(then, rel=1e-5) and now[0] == 3
    assert Path("run/table.txt").exists() and Path("run/best-00000003").is_dir()


def test_the_old_name_of_an_implementation_is_read_as_the_new_one(finished, tmp_path, capsys):
    """--impl reference, given or standing in an old run's settings, is fast; it is said once."""
    note.cache_clear()
    assert parse_arguments(["--impl", "reference"])[0].impl == "fast"
    shutil.copytree(find_checkpoint(finished["out"]), tmp_path / "step-1")
    state = read_state(tmp_path / "step-1")
    digests = {name: digest for name, digest in state.pop("sha256").items()
               if name != "state.json"}
    state["config"]["impl"] = "reference"
    write_state(tmp_path / "step-1", state, digests)
    assert stored_config(tmp_path / "step-1").impl == "fast"
    assert capsys.readouterr().err == "note: --impl reference is now called fast\n"


def test_a_run_does_not_go_on_with_other_rows(finished, command, small, tmp_path):
    """Results of one run have one corpus behind them: a changed label is noticed on resuming."""
    rows = next(Path(small["data"]).glob("*/dev.jsonl"))
    before = rows.read_text(encoding="utf-8")
    rows.write_text("\n".join(before.splitlines()[1:]) + "\n", encoding="utf-8")
    try:
        done = run(command(tmp_path / "new", "--steps", 6, "--epochs", 1, "--save-every", 2,
                           "--resume", finished["out"] / "step-00000004"))
    finally:
        rows.write_text(before, encoding="utf-8")
    assert done.returncode == 2 and "corpus_sha256" in done.stderr


def test_the_first_lines_say_what_will_run(finished):
    """In this order: device, method, parameters, rows, images, steps, backbone, output, start."""
    heads = [line.split(":")[0] for line in finished["stdout"].split("\n")
             if not line.startswith("truncation")][:9]
    assert heads == ["device", "method", "trainable", "rows", "images", "steps", "backbone",
                     "output", "start"]


def test_evaluate_reproduces_the_table_alone_and_under_torchrun(finished, tmp_path):
    """The checkpoint suffices; predictions are equal for one and two processes."""
    texts = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        target = tmp_path / f"{len(launch)}.jsonl"
        done = run([finished["line"][0], *launch, str(ROOT / "evaluate.py"), str(finished["out"]),
                    "--out", str(target)])
        assert done.returncode == 0, done.stderr
        assert (finished["out"] / "table.txt").read_text().strip() in done.stdout
        texts.append(target.read_bytes())
    assert texts[0] == texts[1] == (finished["out"] / "predictions-test.jsonl").read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_encode_is_escaped_and_json_remains_json(finished, encoding,
                                                                        monkeypatch):
    """Tweets and paths with emoji, in an answer and in errors."""
    def said(main: Callable, *words: str) -> str:
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            monkeypatch.setattr(sys, name, stream)
        try:
            main(words)
        except SystemExit as end:
            assert end.code == 2
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return (sys.stdout.buffer.getvalue() or sys.stderr.buffer.getvalue()).decode(encoding)

    line = said(tools.answer.main, str(finished["out"]), "--text", "Zoë lives in Gegen 😀",
                "--task", "mner", "--dataset", "demo_t17", "--json")
    assert json.loads(line)["tokens"] == ["Zoë", "lives", "in", "Gegen", "😀"]
    for words in (["läuf😀"], ["run", "--läuf😀"]):
        answer = said(evaluate.main, *words)
        assert answer.startswith("error: ") and "uf" in answer
        assert ("\\ud83d\\ude00" in answer) == (encoding != "utf-8")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["when it ends", "while it prints"])
def test_a_command_whose_output_nobody_reads_any_more_ends_without_a_traceback(lines):
    """As `python -m tools.check data | head -1`; the exit code is the shell's for SIGPIPE."""
    printing = f"""if True:
        import sys
        from engine.processes import exit_codes
        with exit_codes():
            for line in range({lines}):
                print("a line")
            print("printed all", file=sys.stderr)"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", printing], cwd=ROOT, stdout=write, text=True,
                          stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ("printed all\n" if lines == 1 else "")


def test_words_that_are_no_text_are_refused_before_anything_is_computed(capsys):
    """A file name in Latin-1 in a UTF-8 terminal, which safetensors could write but never open."""
    with pytest.raises(SystemExit):
        train.main(["--out", "M\udcfcller"])
    assert "expected UTF-8, got 'M\\udcfcller'; rename" in capsys.readouterr().err


def test_a_checkpoint_reproduces_logits_on_a_fresh_backbone_bit_for_bit(finished, tmp_path):
    """Experts, gate, MIM and visual adapter are all that a checkpoint holds."""
    folder, device = find_checkpoint(finished["out"]), torch.device("cpu")
    setup = load_model(folder, device)
    flat = FlatParameters(setup.model, lr=0.1)
    flat.grads.normal_()
    flat.optimizer.step()  # away from what the checkpoint held
    write_checkpoint(tmp_path / "step-1", flat, read_state(folder))
    saved = load_file(tmp_path / "step-1" / "model.safetensors")
    assert not any(name.startswith("t5.") and name[-3:] not in ("A_U", "B_U", "A_T", "B_T", "W_g",
                                                                "rho") for name in saved)

    def logits(setup: Setup) -> torch.Tensor:
        records = load_corpus(setup.sources.corpus, "test")[:9]
        examples = data.encode_records(records, setup.datasets, setup.tokenizer)
        torch.manual_seed(5)
        visual = {record.id: (torch.randn(2, 16), torch.rand(2, 5)) for record in records}
        return setup.model.eval()(data.collate(examples, lambda record: visual[record.id], 16))

    before = logits(load_model(folder, device))
    assert torch.equal(logits(load_model(tmp_path / "step-1", device)), logits(setup))
    assert not torch.equal(logits(setup), before)


@pytest.mark.parametrize("flags, named", [(["--rank", "9"], "rank 6 -> 9"),
                                          (["--lr", "0.5"], "lr 0.001 -> 0.5"),
                                          (["--no-aml"], "aml True -> False")])
def test_resuming_with_other_settings_is_refused_by_name(finished, flags, named):
    """A run goes on as it began, or not at all."""
    refused = run([*finished["line"], *flags])
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert named in refused.stderr and "--resume none" in refused.stderr


def test_other_rank_on_loading_names_the_tensor(finished):
    """Changing R gives a clear error, not a partial load."""
    folder, device = find_checkpoint(finished["out"]), torch.device("cpu")
    setup = load_model(folder, device)
    other = build(dataclasses.replace(setup.config, rank=9), setup.sources, device)
    with pytest.raises(UsageError, match=r"A_T: expected \[3, 3, 32\], got"):
        load_trainables(other.model, folder)


# ------------------------------------------------------------------------------- arguments, errors

@pytest.fixture
def corpus(small, tmp_path) -> Path:
    """A copy of the small world that a test may spoil."""
    return shutil.copytree(small["data"], tmp_path / "corpus",
                           ignore=shutil.ignore_patterns(".features"))


def test_missing_images_are_an_error_unless_masked_and_then_counted(command, corpus, tmp_path):
    """Nothing is substituted; --missing-images mask is explicit and counted."""
    for image in (corpus / "demo_t15" / "images").glob("dev_*"):
        image.unlink()
    line = command(tmp_path / "run", "--steps", 1, "--epochs", 1, "--data", corpus)
    refused = run(line)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert re.search(r"2 are missing, first \S+dev_\S+ \(\S+dev.jsonl:\d+\)", refused.stderr)
    masked = run([*line, "--missing-images", "mask"])
    assert masked.returncode == 0, masked.stderr
    assert "images: 2 rows without their image" in masked.stdout


def test_weights_that_cannot_be_had_offline_say_what_to_fetch_and_where_to_put_it(command,
                                                                                  tmp_path):
    done = run([*command(tmp_path / "run")[:2], "--size", "large", "--data", str(tmp_path),
                "--out", str(tmp_path / "run")])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "google/flan-t5-large" in done.stderr and "weights/flan-t5-large" in done.stderr


def test_a_download_that_fails_without_a_word_is_named_by_its_kind(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(name: str, **_: object) -> None:
        raise ConnectionError
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the download failed .ConnectionError: .;"):
        find_weights("vit", None, VIT)


@pytest.mark.parametrize("flag, value, rule", [
    ("--rank", "2", "at least 3"), ("--steps", "0", "at least 1"), ("--lr", "nan", "above 0"),
    ("--clip", "0", "above 0"), ("--aml-margin", "0", "above 0"), ("--beta", "-1", "at least 0"),
    ("--aml-gamma", "-1", "at least 0"), ("--aml-temperature", "0", "above 0"),
    ("--backbone-dropout", "1", r"in \[0, 1\)"), ("--timeout", "0", "above 0")])
def test_a_number_that_cannot_work_is_refused_before_anything_is_computed(flag, value, rule):
    """Some would be found out an epoch later: Eq. (9) divides by the margin."""
    with pytest.raises(UsageError, match=f"{flag} {rule}, got {float(value):g}"):
        parse_arguments([flag, value])


@pytest.mark.parametrize("flags", [["--method", "lora"], ["--no-mim"], ["--beta", "0"]],
                         ids=" ".join)
def test_a_mean_for_a_loss_that_is_not_there_is_refused(flags):
    """Else a run would be named after a reading that it never tried."""
    assert parse_arguments(["--mim-mean", "affine"])[0].mim_mean == "affine"
    with pytest.raises(UsageError, match="--mim-mean other than identity with --method clorae"):
        parse_arguments(["--mim-mean", "affine", *flags])


@pytest.mark.parametrize("flag", ["--no-egr", "--no-mim"])
def test_a_part_that_a_method_lacks_cannot_be_left_out(flag):
    """Else two runs that compute the same would be compared as two systems."""
    assert parse_arguments([flag])[0].method == "clorae"
    with pytest.raises(UsageError, match="--no-egr and --no-mim with --method clorae, got"):
        parse_arguments(["--method", "loramoe", flag])


def test_settings_reach_the_layers_by_name(small, command, tmp_path):
    """Whatever field of ExpertConfig the command line has."""
    flags = ["--rank", 7, "--alpha", 9, "--dropout", 0.2, "--no-egr", "--mim-mean", "affine"]
    config, _ = parse_arguments([str(word) for word in command(tmp_path, *flags)[2:]])
    sources = Sources(Path(small["data"]), Path(small["t5"]), Path(small["vit"]), None)
    layers = clorae.expert_layers(build(config, sources, torch.device("meta")).model)
    assert {layer.config for layer in layers.values()} == {clorae.ExpertConfig(
        rank=7, alpha=9, dropout=0.2, egr=False, mim_mean="affine")}


def test_a_run_without_dev_and_test_rows_says_so_and_keeps_its_last_weights(command, corpus,
                                                                           tmp_path):
    """Nothing tells the epochs apart, and no F1 is made up.  --steps beyond the epochs are not
    announced as steps."""
    for path in (*corpus.glob("*/dev.jsonl"), *corpus.glob("*/test.jsonl")):
        path.unlink()
    line = command(tmp_path / "run", "--data", corpus, "--units", "V1", "--epochs", 2, "--steps",
                   9999)
    done = run(line)
    assert done.returncode == 0, done.stderr
    last = re.search(r"trained to step (\d+)", done.stdout)[1]
    assert f"steps: {last} of batch" in done.stdout
    assert "note: --steps 9999, but 2 epochs end before; raise --epochs" in done.stdout
    assert int(last) > 2 and f"best dev epoch ended at step {last}" in done.stdout
    assert "note: no dev rows for V1: no say" in done.stdout
    assert "  dev F1  V1 -, no dev rows\n" in done.stdout
    assert f"no test rows in {corpus}: nothing is scored" in done.stdout
    again = run(line)  # it is finished all the same
    assert "is finished" in again.stdout and "no test rows" in again.stdout


def test_a_label_that_can_never_be_answered_is_refused_before_training(command, corpus, tmp_path):
    described = corpus / "demo_t15" / "dataset.json"
    dataset = json.loads(described.read_text())
    dataset["labels"]["mner"].append("stra\u00dfe")
    described.write_text(json.dumps(dataset))
    refused = run(command(tmp_path / "run", "--data", corpus, "--units", "T15", "--dry-run"))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert 'demo_t15: mner: "stra\u00dfe" comes back as "stra \u2047 e"' in refused.stderr


def test_while_nothing_is_right_the_last_epoch_is_the_best(command, corpus, tmp_path):
    """Its weights are the most trained ones.  A unit without dev rows has no F1 and no part in the
    mean; the paper's references are named."""
    for path in (corpus / "demo_t15" / "dev.jsonl", *corpus.glob("*/test.jsonl")):
        path.unlink()
    done = run(command(tmp_path / "run", "--data", corpus, "--units", "T15", "T17", "--epochs", 2,
                       "--batch", 64))
    assert done.returncode == 0, done.stderr
    last = re.search(r"trained to step (\d+)", done.stdout)[1]
    assert done.stdout.count("  dev F1  T15 -  T17 0.0  mean 0.0\n") == 2
    assert f"best dev epoch ended at step {last}" in done.stdout
    assert "paper's test F1 of single-task models (T15 78.9, T17 89.8; of MED" in done.stdout


@pytest.mark.parametrize("reference", [None, '{"SHOP": 70}'])
def test_a_new_column_needs_a_line_in_the_schema_and_a_reference(small, corpus, tmp_path,
                                                                  reference):
    """As engine/schema.py says: then a run trains on it and prints a table with it."""
    shop = json.loads((corpus / "demo_t17" / "dataset.json").read_text())
    shop["units"] = {"mner": "SHOP"}
    (corpus / "demo_t17" / "dataset.json").write_text(json.dumps(shop))
    words = ["--t5", small["t5"], "--vit", small["vit"], "--data", str(corpus), "--units", "SHOP",
             "--steps", "1", "--epochs", "1", "--out", str(tmp_path / "run")]
    if reference:
        (tmp_path / "reference.json").write_text(reference)
        words += ["--aml-reference", str(tmp_path / "reference.json")]
    code = ("import engine.schema as schema; schema.UNIT_TASK['SHOP'] = 'mner'; schema.UNITS = "
            "tuple(schema.UNIT_TASK); import train; from engine.processes import exit_codes\n"
            f"with exit_codes(): train.main({words})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    if reference:
        assert done.returncode == 0, done.stderr
        assert "SHOP entity (type, first token, last token)" in done.stdout
    else:
        assert done.returncode == 2 and done.stderr.startswith("error: --aml-reference: expected")
        assert "for each of SHOP, got none for SHOP; add them" in done.stderr


def test_a_split_that_none_of_the_chosen_units_has_is_empty_as_without_a_choice(corpus):
    """Other units having one is no reason to refuse."""
    (corpus / "demo_v1" / "test.jsonl").unlink()
    records = read_splits(corpus, ["V1"])
    assert records["train"] and records["dev"] and not records["test"]
    assert read_splits(corpus, None)["test"]


def test_starting_over_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    """--out may be a folder that holds other things."""
    own = ["step-00000002", "best-00000002", ".step-00000004.writing"]
    others = [".git-old", "thesis-2", "notes.txt", ".lock"]
    for name in (*own, ".git-old", "thesis-2"):
        (tmp_path / name).mkdir()
    for name in ("metrics.csv", "table.txt", "scores-test.json", "notes.txt", ".lock"):
        (tmp_path / name).write_text("")
    checkpoints = Checkpoints(tmp_path, World(), None, None, Progress(), {}, {})
    assert "from the beginning" in checkpoints.resume(Launch(resume="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_references_are_numbers_and_may_not_change_within_a_run(command, tmp_path):
    """A number in quotes is one, too; the file may not say something else when a run goes on."""
    reference, out = tmp_path / "reference.json", tmp_path / "run"
    reference.write_text(json.dumps(dict.fromkeys(UNITS, "70.5")))
    line = command(out, "--steps", 1, "--epochs", 1, "--aml-reference", reference)
    done = run(line)
    assert done.returncode == 0, done.stderr
    reference.write_text(json.dumps(dict.fromkeys(UNITS, 80)))
    refused = run([*line, "--resume", str(out / "step-00000001")])
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "reference {'T15': 70.5" in refused.stderr and "-> {'T15': 80.0" in refused.stderr


def test_defaults_follow_the_size_and_the_paper():
    """Ranks 128 / 64 / 64, global batches 40 / 16 / 8, lr 1e-4, 20 epochs."""
    for size, rank, batch in (("base", 128, 40), ("large", 64, 16), ("xl", 64, 8)):
        config, *_ = parse_arguments(["--size", size])
        assert (config.rank, config.batch, config.lr, config.epochs) == (rank, batch, 1e-4, 20)
        assert config.aml and config.uses_mim and config.beta == 0.01
    assert not parse_arguments(["--method", "lora"])[0].aml
    assert parse_arguments(["--method", "lora", "--aml"])[0].aml


# -------------------------------------------------------------------------------------- the vector

def test_the_flat_vector_steps_as_one_adam_per_parameter():
    """Two slices, variance vectors at ten times the rate, equal to separate Adams."""
    def model() -> nn.Module:
        torch.manual_seed(1)
        config = T5Config(vocab_size=20, d_model=8, d_kv=3, d_ff=8, num_layers=1, num_heads=2,
                          feed_forward_proj="gated-gelu", dropout_rate=0.0)
        return clorae.adapt(T5(config), rank=3)

    ours, reference = model(), model()
    flat = FlatParameters(ours, lr=1e-2)
    named = [(n, p) for n, p in reference.named_parameters() if p.requires_grad]
    adam = torch.optim.Adam([{"params": [p], "lr": 0.1 if n.endswith("rho") else 0.01}
                             for n, p in named])
    for seed in range(3):
        for m in (ours, reference):
            torch.manual_seed(seed)
            for parameter in m.parameters():
                if parameter.requires_grad:
                    gradient = torch.randn(parameter.shape)
                    if m is ours:
                        parameter.grad.copy_(gradient)
                    else:
                        parameter.grad = gradient
        flat.optimizer.step()
        adam.step()
    for name, parameter in named:
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)


def test_c_lorae_overfits_what_a_lone_universal_expert_cannot():
    """3 tasks x 8 samples, the same inputs with a different answer per task.

    Task experts drive the loss below 0.05; plain LoRA sees no task and cannot pass ln(3) a token.
    """
    def final_loss(method: str, steps: int = 100) -> float:
        torch.manual_seed(0)
        config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                          feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_head=False,
                          scale_logits=False)
        model = clorae.adapt(T5(config), method, rank=12, dropout=0.0,
                             targets=("q", "v", "o", "up", "down"))
        inputs = torch.randint(3, 32, (8, 6)).repeat(3, 1)
        labels, tasks = torch.randint(3, 32, (24, 2)), torch.arange(3).repeat_interleave(8)
        flat = FlatParameters(model, lr=1e-2)
        mask = torch.ones_like(inputs, dtype=torch.bool)
        for _ in range(steps):
            model.routing.set(tasks, memory=mask, target=labels != -100)
            logits, loss = model(inputs, mask, labels)
            flat.grads.zero_()
            loss.backward()
            flat.optimizer.step()
        return loss.item()

    assert final_loss("clorae") < 0.05
    assert final_loss("lora") > 0.5


def test_weights_of_one_and_no_mim_give_the_plain_token_mean(command, tmp_path):
    """--no-aml and beta = 0: the logged loss is token-mean cross-entropy."""
    out = tmp_path / "run"
    done = run(command(out, "--steps", 1, "--epochs", 1, "--no-aml", "--beta", 0))
    assert done.returncode == 0, done.stderr
    head, row = (line.split(",") for line in (out / "metrics.csv").read_text().split("\n")[:2])
    values = dict(zip(head, row))
    assert values["loss"] == values["L_MT"] and float(values["L_MIM"]) == 0


def test_beta_zero_is_bitwise_the_run_without_mim(command, tmp_path):
    """--beta 0 and --no-mim end in the same weights."""
    ends = []
    for name, flags in (("beta", ["--beta", "0"]), ("no-mim", ["--no-mim"])):
        done = run(command(tmp_path / name, "--steps", 3, "--epochs", 1, *flags))
        assert done.returncode == 0, done.stderr
        ends.append((tmp_path / name / "step-00000003" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_a_torn_checkpoint_is_named_once_however_often_it_is_looked_for(tmp_path, capsys):
    """A start looks for the newest checkpoint up to three times."""
    torn = tmp_path / "step-00000003"
    torn.mkdir()
    assert [newest_checkpoint(tmp_path) for _ in range(3)] == [None] * 3
    assert capsys.readouterr().err.count(f"passed over: {torn}") == 1


def test_resume_restores_the_achievement_weights(finished):
    """History and weights are in the checkpoint, equal to Eq. (9) of its dev F1."""
    state = json.loads((find_checkpoint(finished["out"]) / "state.json").read_text())
    entry = state["history"][-1]
    weights = losses.achievement_weights(entry["f1"], losses.SINGLE_TASK_F1)
    assert state["weights"] == entry["weights"] == weights


def test_the_visual_policies_train_what_they_say_at_base_geometry():
    """All of VStack 14.16 M, gate layer 7.08 M, four projections 0.69 M and the visual
    embedding; or the embedding alone; or nothing."""
    with torch.device("meta"):
        config = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12,
                          num_heads=12, feed_forward_proj="gated-gelu")
        model = clorae.adapt(UMIE(T5(config), 768, 16), rank=128)
    before = clorae.parameter_split(model)
    embedding = sum(p.numel() for p in model.visual_embedding.parameters())
    for policy, visual in (("frozen", 0), ("paper", embedding)):
        model.free_adapter(policy)
        assert clorae.parameter_split(model) == {**before, "visual": visual}
    model.free_adapter("train")
    split = clorae.parameter_split(model)
    assert round((split["visual"] - embedding) / 1e6, 2) == 21.93  # 14.16 + 7.08 + 0.69
    assert {**split, "visual": 0} == before


def test_experts_can_sit_on_a_fully_trained_model(command, tmp_path):
    """Policies `paper` and `frozen`: --init gives the weights of a full run, which the checkpoint
    then needs and checks; without one a fresh adapter would stay what it is, so it is refused."""
    short = ("--steps", 2, "--epochs", 1)
    refused = run(command(tmp_path / "run", *short, "--visual-policy", "paper"))
    assert refused.returncode == 2 and "--init" in refused.stderr
    assert run(command(tmp_path / "full", *short, "--method", "full")).returncode == 0
    line = command(tmp_path / "run", *short, "--visual-policy", "paper", "--init",
                   tmp_path / "full")
    done = run(line)
    assert done.returncode == 0, done.stderr
    setup = load_model(find_checkpoint(tmp_path / "run"), torch.device("cpu"))
    full = load_file(find_checkpoint(tmp_path / "full") / "model.safetensors")
    parameters = dict(setup.model.named_parameters())
    for name in ("t5.decoder.blocks.0.feed_forward.up.weight", "fusion.attention.q.weight"):
        assert torch.equal(parameters[name], full[name]) and not parameters[name].requires_grad
    assert parameters["visual_embedding.feature.weight"].requires_grad
    (find_checkpoint(tmp_path / "full") / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="restore that folder"):
        load_model(find_checkpoint(tmp_path / "run"), torch.device("cpu"))
    wrong = run(command(tmp_path / "other", *short, "--init", tmp_path / "run"))
    assert wrong.returncode == 2 and "got method clorae" in wrong.stderr


def begun(line: list[str]) -> train.Run:
    """What a command has made before its first step, in this process."""
    config, _ = parse_arguments(line[2:])
    return train.Run(config, train.prepare(config), World())


def test_a_fresh_gate_is_turned_by_rows_that_have_an_image(command, tmp_path):
    """Even if the first micro-batch has none: shut, its projection is turned around again."""
    job = begun(command(tmp_path / "run"))
    first = [job.rows.examples[i].record for i in job.rows.batches(0)[0][:4]]
    features = job.rows.features
    features.missing |= {features.path(record) for record in first if record.image}
    job.open_gate()
    weight = job.model.fusion.proj_visual[1].weight
    opened = weight.detach().clone()
    weight.data.neg_()
    job.open_gate()
    assert torch.equal(weight, opened)


def test_micro_batches_do_not_decide_how_a_gate_is_opened(command, tmp_path):
    """Which rows judge it depends on the seed alone, as does all else but dropout's masks."""
    seen = []
    for size in (1, 3):
        job = begun(command(tmp_path / f"run{size}", "--micro-batch", size))
        job.model.open_gate = lambda batch: seen.append(batch.input_ids)
        job.open_gate()
    assert torch.equal(*seen) and len(seen[0]) > 3


def test_a_trained_gate_is_left_as_it_is(command, tmp_path):
    """With --init it may be frozen, and then no checkpoint would tell that it was turned."""
    done = run(command(tmp_path / "full", "--steps", 1, "--epochs", 1, "--method", "full"))
    assert done.returncode == 0, done.stderr
    full = find_checkpoint(tmp_path / "full")
    state, saved = read_state(full), load_file(full / "model.safetensors")
    for _ in range(2):  # of a projection and its opposite, one shuts the gate
        saved["fusion.proj_visual.1.weight"].neg_()
        save_file(saved, full / "model.safetensors")
        write_state(full, state, {name: file_hash(full / name) for name in (
            "model.safetensors", "optimizer.safetensors")})
        job = begun(command(tmp_path / "run", "--init", full, "--visual-policy", "frozen"))
        assert torch.equal(job.model.fusion.proj_visual[1].weight,
                           saved["fusion.proj_visual.1.weight"])


def test_hold_out_never_trains_on_what_it_tests():
    """Table 4: A ('paper') leaves out T17 and V2; B ('clean') also SNAP and every training text
    that stands in their test splits."""
    units = {"tweets": "T17", "others": "T15", "pool": "SNAP", "pairs": "V1", "held": "V2"}
    datasets = {name: Dataset(name, {"mre" if unit in ("V1", "V2") else "mner": unit}, {})
                for name, unit in units.items()}

    def records(split: str) -> list[Record]:
        rows = [("tweets", f"{split} one"), ("others", f"{split} two"), ("pool", f"{split} three"),
                ("pairs", f"{split} four"), ("held", f"{split} five"), ("pairs", "Test one!"),
                ("others", "test FIVE")]
        return [Record(f"{i}", name, "mre" if name in ("pairs", "held") else "mner",
                            tuple(text.split())) for i, (name, text) in enumerate(rows)]

    for how, kept in (("paper", ["others", "pool", "pairs", "pairs", "others"]),
                      ("clean", ["others", "pairs"])):
        splits = {split: records(split) for split in SPLITS}
        said = hold_out(splits, datasets, how)
        assert [r.dataset for r in splits["train"]] == [r.dataset for r in splits["dev"]] == kept
        assert len(splits["test"]) == 7
        assert f"{0 if how == 'paper' else 4} more records" in said
    assert hold_out(splits, datasets, "none") is None


@pytest.mark.parametrize("flags", [["--method", "lora"], ["--method", "tlora"], ["--no-egr"],
                                   ["--method", "moslora"], ["--method", "loramoe"],
                                   ["--method", "hydralora"], ["--method", "mtllora"],
                                   ["--mim-mean", "affine", "--aml-temperature", "0.1"],
                                   ["--hold-out", "clean"],
                                   ["--method", "full"], ["--fusion", "concat"],
                                   ["--precision", "bf16"]], ids=" ".join)
def test_every_method_fusion_and_precision_trains_and_prints_its_table(command, tmp_path, flags):
    """The same loop serves them all; the loss stays finite."""
    done = run(command(tmp_path / "run", "--steps", 2, "--epochs", 1, *flags))
    assert done.returncode == 0, done.stderr
    assert "test split, best checkpoint:" in done.stdout
    last = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[-2]
    assert math.isfinite(float(last.split(",")[2]))


@pytest.fixture
def slow_cpu(monkeypatch):
    """A CPU without instructions for bf16, as far as its measurement says."""
    monkeypatch.setattr(settings, "slow_bf16", lambda: 56.5)
    note.cache_clear()


SAID = "note: bf16 takes 56 times as long as fp32 on this CPU (measured), so fp32 is computed"


def test_bf16_is_measured_and_where_it_is_slow_fp32_is_computed(slow_cpu, monkeypatch, capsys):
    """One line says so, and the run's settings say what is computed; a GPU is never asked."""
    for flags, precision in ([], "fp32"), (["--precision", "fp32"], "fp32"):
        assert parse_arguments(flags)[0].precision == precision and not capsys.readouterr().err
    for _ in range(2):
        assert parse_arguments(["--precision", "bf16"])[0].precision == "fp32"
    assert capsys.readouterr().err.startswith(SAID) and not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert computed_in("bf16") == parse_arguments([])[0].precision == "bf16"


def test_what_decides_about_bf16_is_a_measurement(monkeypatch):
    """The ratio of the least times of one product; below 2 it counts as no difference.  Neither the
    random state nor the number of threads changes."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for slow, fast, factor in ((0.08, 0.002, 40.0), (0.003, 0.002, None), (0.001, 0.002, None)):
        times = itertools.cycle([9.0] + [fast] * 5 + [9.0] + [slow] * 5)
        monkeypatch.setattr(settings, "timeit", lambda run, number: run() is None or next(times))
        assert settings.slow_bf16.__wrapped__() == (factor and pytest.approx(factor))
    monkeypatch.undo()
    started = time.perf_counter()
    settings.slow_bf16.__wrapped__()
    assert time.perf_counter() - started < 5
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_a_corpus_without_training_records_is_refused(command, corpus, tmp_path):
    for path in corpus.glob("*/train.jsonl"):
        path.unlink()
    done = run(command(tmp_path / "run", "--data", corpus))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "expected training records" in done.stderr


@pytest.mark.slow
def test_base_geometry_takes_a_step_and_decodes_on_a_cpu(capsys):
    """flan-t5-base geometry, random weights: one training step of 6 rows and 16 decoded tokens."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12,
                      num_heads=12, feed_forward_proj="gated-gelu", tie_head=False,
                      scale_logits=False)
    model = clorae.adapt(UMIE(T5(config), 768, 16), rank=128)
    for part in (model.visual_embedding, model.vstack, model.fusion):
        part.requires_grad_(True)
    speed_up(model)
    flat = FlatParameters(model, 1e-4)
    batch = data.Batch(
        input_ids=torch.randint(3, 32000, (6, 48)), attention_mask=torch.ones(6, 48).bool(),
        labels=torch.randint(3, 32000, (6, 16)), tasks=torch.tensor([0, 0, 1, 1, 2, 2]),
        units=torch.tensor([0, 1, 3, 4, 5, 6]), features=torch.randn(6, 5, 768),
        boxes=torch.rand(6, 5, 5), visual_mask=torch.ones(6, 5).bool(), rows=torch.arange(6))
    clorae.keep_outputs(model)
    started = time.perf_counter()
    ce = losses.token_cross_entropy(model.train().hidden(batch), batch.labels, model.t5.head)
    loss = ce.sum() / batch.labels.numel() + 0.01 * mutual_information(model, 6)
    loss.backward()
    flat.optimizer.step()
    stepped = time.perf_counter()
    ids = model.eval().generate(batch, max_new_tokens=16, banned_ids=[1])  # no early end
    decoded = time.perf_counter()
    assert torch.isfinite(loss) and ids.shape == (6, 16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    with capsys.disabled():
        print(f"\nbase geometry, 6 rows: step {stepped - started:.1f} s, 16 tokens "
              f"{decoded - stepped:.1f} s, peak {peak:.1f} GiB, loss {loss.item():.2f}")


@pytest.mark.parametrize("flags, words", [
    ((), "expected a GPU, clorae.cu compiled for it"), (("--method", "moslora"), "method moslora")])
def test_graphs_are_refused_where_there_can_be_none(command, tmp_path, flags, words):
    """CUDA graphs need a GPU and kernels that read a batch's tasks from it."""
    done = run(command(tmp_path / "run", "--graphs", *flags))
    assert done.returncode == 2 and "--graphs" in done.stderr and words in done.stderr


def test_checkpoints_may_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors writes for the owner alone; a run's files are as readable as one another."""
    flat = FlatParameters(torch.nn.Linear(3, 2), 1e-3)
    flat.optimizer.step()
    write_checkpoint(tmp_path / "step-1", flat, {})
    modes = {file.stat().st_mode for file in (tmp_path / "step-1").iterdir()}
    assert len(modes) == 1


# -------------------------------------------------------------------------------------- progress

@pytest.mark.parametrize("seconds, lines", [(5, 0), (99, 9), (1000, 100)])
@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_adds_a_line_every_ten_seconds_to_a_log(seconds, lines, leave, monkeypatch, capfd):
    """A step a second; the first line comes after ten, and the log is not redrawn."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in Bar(range(seconds), desc="epoch 1/3", leave=leave):
        now[0] += 1
    said = capfd.readouterr().err
    assert said.count("\n") == lines == said.count("epoch 1/3") and "\r" not in said


def test_a_bar_redraws_itself_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in Bar(range(3), mininterval=0):
        pass
    said = capfd.readouterr().err
    assert said.count("\r") > 2 and said.count("\n") == 1
