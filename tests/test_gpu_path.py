"""What runs on a GPU as a specification, on a GPU that is pretended (tests/pretend_gpu.py)."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import ENVIRONMENT, ROOT, run
from pretend_gpu import build_guard
from test_train import assert_same_step, first_step


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory,
           emulator_library: Path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """on_gpu(line, kernels=True): run a command of ours on the pretended GPU."""
    guard = build_guard(tmp_path_factory.mktemp("gpu"))
    machine = subprocess.Popen(  # which forks for each command, since torch is slow to import
        [sys.executable, str(ROOT / "tests/pretend_gpu.py"), "-"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**ENVIRONMENT, "PRETEND_GUARD": str(guard)})

    def command(line: list[str], kernels: bool = True) -> subprocess.CompletedProcess:
        request = line[1:], str(emulator_library) if kernels else None
        print(json.dumps(request), file=machine.stdin, flush=True)
        done = subprocess.CompletedProcess(line, *json.loads(machine.stdout.readline()))
        assert done.returncode == 0, done.stderr
        return done
    yield command
    machine.stdin.close()
    machine.wait(60)


@pytest.mark.parametrize("kernels", [True, False], ids=["clorae.cu", "PyTorch"])
def test_a_gpu_takes_the_step_that_a_cpu_takes(command, on_gpu, tmp_path, kernels):
    """fp32, dropout off: loss and every gradient within 1e-5, though padding is computed there."""
    target = tmp_path / "there.safetensors"
    on_gpu(command(target, "--dropout", 0, "--backbone-dropout", 0, "--clip", 1e9, "--precision",
                   "fp32", script="tests/first_step.py"), kernels)
    with safe_open(target, "pt") as file:
        there = float(file.metadata()["loss"]), {k: file.get_tensor(k) for k in file.keys()}
    assert_same_step(there, first_step(command, tmp_path, "--precision", "fp32"))


def test_in_a_training_step_the_host_waits_for_the_gpu_once(command, on_gpu, tmp_path):
    """Else the GPU is idle while the host prepares what comes next: two waits in two steps of two
    micro-batches each.  Type and kernels are chosen by the machine."""
    done = on_gpu(command(tmp_path / "run", "--steps", 2, "--batch", 8, "--dropout", 0.1,
                          script="tests/gpu_steps.py"))
    assert re.search(r"device: cuda:0, .*, bf16, modules in the form cuda, seed", done.stdout)
    waits = re.findall(r"waited (\d+) times: (.*) in train_step", done.stderr)
    assert [int(times) for times, _ in waits] == [2], waits


def test_a_gpu_gives_the_answers_that_a_cpu_gives(command, on_gpu, tmp_path):
    """A checkpoint in fp32, with three beams: rows are repeated, reordered and dropped."""
    out, here, there = (tmp_path / name for name in ("run", "here.jsonl", "there.jsonl"))
    train = command(out, "--steps", 2, "--epochs", 1, "--units", "V1", "MED")
    assert run(train).returncode == 0
    line = [train[0], str(ROOT / "evaluate.py"), str(out), "--graphs", "--beams", "3", "--out"]
    assert run([*line, str(here)]).returncode == 0
    on_gpu([*line, str(there)])
    assert here.read_bytes() == there.read_bytes()


def test_graphs_compute_what_single_launches_compute(command, on_gpu, tmp_path):
    """A graph captured for one batch gives another one's loss, norm and dropout masks, bit for bit:
    it waits for nothing, takes nothing from the host and has no number of its batch built in."""
    done = on_gpu(command(tmp_path / "run", "--graphs", "--steps", 4, "--batch", 8, "--dropout",
                          0.1, "--max-objects", 5, "--max-target", 16,
                          script="tests/gpu_steps.py"))
    graphs, replays = map(int, re.search(r"(\d+) graphs, (\d+) replays", done.stderr).groups())
    assert graphs > 1 and replays > graphs, (graphs, replays)
    captured, plain = re.findall(r"^\[.*", done.stdout, re.MULTILINE)
    assert captured == plain
    assert re.findall(r"waited (\d+) times: .* in train_step", done.stderr) == ["8"]  # a step: one


ENDING = """
import copy
import torch
from fast import speed_up
from t5 import T5, T5Config
torch.manual_seed(0)
config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                  feed_forward_proj="gated-gelu", tie_head=False)
model = T5(config).eval().requires_grad_(False)
model.lm_head.weight[1] *= 3  # half of the rows end, at different times
ids, mask = torch.randint(2, 60, (12, 9)), torch.arange(9) < torch.randint(1, 10, (12, 1))
plain = copy.deepcopy(model).to("cuda:0")
speed_up(model)
for beams in (1, 3):
    here = model.to("cpu").generate(ids, mask, 40, beams)
    there = model.to("cuda:0")
    there.graphs = True
    for form in (there, plain):
        answers = form.generate(ids.to("cuda:0"), mask.to("cuda:0"), 40, beams).cpu()
        assert torch.equal(here, answers), (here, answers)
    assert 5 < (here == 1).any(1).sum() < 12
"""


def test_decoding_by_graphs_gives_the_same_tokens_while_rows_end(on_gpu, tmp_path):
    """One graph for the first 32 tokens, one for all 40, others after half of the rows have left:
    three for one beam, four for three; the step before each is taken without."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    done = on_gpu([sys.executable, str(script)], kernels=False)
    assert "7 graphs, 73 replays" in done.stderr


def test_what_a_graph_may_not_hold_is_an_error_on_the_pretended_gpu(on_gpu, tmp_path):
    """Waits and copies from the host, which a real capture refuses."""
    script = tmp_path / "captured.py"
    script.write_text("import torch\nx = torch.ones(2, device='cuda:0')\n"
                      "for bad in (lambda: x.sum().item(), lambda: x + torch.ones(2).to(x.device),"
                      " lambda: x[x > 0]):\n"
                      "    try:\n        with torch.cuda.graph(torch.cuda.CUDAGraph()):\n"
                      "            bad()\n"
                      "    except RuntimeError as cause:\n        print(cause)\n")
    done = on_gpu([sys.executable, str(script)], kernels=False)
    assert done.stdout.count("not permitted while a graph is captured") == 3


UNFIT = """
import clorae, torch
from fast.cuda import CudaExpertLinear, keep_tasks_on_gpu
device, routing = torch.device("cuda:0"), clorae.Routing(("mner", "mre", "mee"))
for width in (16, 12):
    layer = clorae.ExpertLinear(torch.nn.Linear(width, 8, bias=False).requires_grad_(False),
                                clorae.ExpertConfig(rank=6), routing, "memory").to(device)
    x, tasks = torch.ones(3, 4, width, device=device), torch.tensor([0, 1, 2], device=device)
    layer.__class__ = CudaExpertLinear
    routing.set(tasks)
    layer(x)
    keep_tasks_on_gpu(layer)
    routing.set(tasks)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
            print(width, "is captured")
    except ValueError as cause:
        print(width, cause)
"""


def test_a_layer_that_no_kernel_fits_is_refused_where_tasks_stay_on_the_gpu(on_gpu, tmp_path):
    """It would go on with the tasks that the host has heard of last."""
    script = tmp_path / "unfit.py"
    script.write_text(UNFIT)
    done = on_gpu([sys.executable, str(script)])
    assert "16 is captured" in done.stdout
    assert "12 routing: expected layers that run on clorae.cu" in done.stdout


def test_operations_across_devices_are_errors_on_the_pretended_gpu(on_gpu, tmp_path):
    """What would fail on a GPU fails here: else these tests could not."""
    script = tmp_path / "mixed.py"
    script.write_text("import torch\ntry:\n    torch.ones(2, device='cuda:0') + torch.ones(2)\n"
                      "except RuntimeError as cause:\n    print(cause)\n")
    done = on_gpu([sys.executable, str(script)], kernels=False)
    assert "tensors on the GPU and on the CPU in one operation" in done.stdout
