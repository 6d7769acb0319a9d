"""Several nodes, each with a folder of its own: they train, resume, test and score as one.

Two processes stand for two nodes; the slow test starts two agents of torchrun on this machine.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import evaluate
import train
from conftest import ENVIRONMENT, ROOT, descendants, sums
from engine.checkpoints import read_state
from engine.processes import World, carry_out
from reliability import Job, Mark, before, fork, free_port, telling

FLAGS = ("--data data --t5 t5 --vit vit --units T17 V1 --max-target 24 --rank 6 --batch 10 "
         "--micro-batch 3 --lr 0.003 --save-every 2 --steps 8 --out run").split()


class Nodes:
    """Folders that stand for nodes, each with links to corpus and backbone and nothing else."""

    def __init__(self, root: Path, small: dict[str, str]):
        self.root, self.small = root, small

    def __getitem__(self, node: str) -> Path:
        if not (self.root / node).exists():
            (self.root / node).mkdir()
            for name, folder in self.small.items():
                (self.root / node / name).symlink_to(folder)
        return self.root / node

    def start(self, nodes: str, command: Callable[[], None], dies_at: int = 0) -> Job:
        """A command with a process on each of the nodes named; the first has rank 0.  dies_at: the
        step in which both are killed."""
        steps, folders = [], [self[node] for node in nodes]

        def step() -> None:
            steps.append(1)
            if len(steps) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def enter(rank: int, mark: Mark) -> None:
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # not those of pytest
            os.chdir(folders[rank])
            os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0")
            telling(rank, mark)
            before(train.Trainer, "train_step", step)
        return fork(command, len(nodes), enter, **ENVIRONMENT)

    def run(self, nodes: str, command: Callable[[], None], dies_at: int = 0) -> tuple[list, str]:
        """Exit codes of both processes, and all that they have printed."""
        job = self.start(nodes, command, dies_at)
        return job.wait(), job.text

    def refusal(self, nodes: str, command: Callable[[], None]) -> str:
        """What is said where both end with an error, the second perhaps by torchrun's signal."""
        codes, text = self.run(nodes, command)
        assert codes[0] == 2 and codes[1] in (2, -signal.SIGTERM) and "Traceback" not in text, text
        return text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def best_of(run: Path) -> str:
    """The name of its best checkpoint, whose step is chance where a model has hardly learnt."""
    best, = run.glob("best-*")
    return best.name


training = partial(train.main, FLAGS)


@pytest.fixture(scope="module")
def nodes(small, tmp_path_factory) -> Nodes:
    """After a run on nodes a and b that was killed in step 6, and ended after rank 0 had moved to
    b, where a checkpoint of step 2 lay."""
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), small)
    nodes.first = nodes.run("ab", training, dies_at=6)
    assert "run" not in names(nodes["b"])
    shutil.copytree(nodes["a"] / "run" / "step-00000002", nodes["b"] / "run" / "step-00000002")
    nodes.second = nodes.run("ba", training)
    return nodes


def test_the_node_with_the_newest_checkpoint_goes_on_wherever_rank_0_is(nodes):
    """The run ends with the bytes of one that has a folder for both and was not killed."""
    assert nodes.first[0] == [-signal.SIGKILL] * 2, nodes.first[1]
    assert nodes.second[0] == [0, 0], nodes.second[1]
    assert "start: resumed run/step-00000004 at step 4" in nodes.second[1]
    assert names(nodes["b"] / "run") == ["step-00000002"]
    assert nodes.run("ss", training)[0] == [0, 0]
    assert sums(nodes["a"] / "run") == sums(nodes["s"] / "run")


def test_a_checkpoint_that_is_named_is_read_where_it_is(nodes):
    """--resume PATH: the best one comes along into the new run folder of that node."""
    flags = [*FLAGS[:-1], "new", "--resume", "run/step-00000008"]
    codes, text = nodes.run("ca", partial(train.main, flags))
    assert codes == [0, 0] and "start: resumed run/step-00000008 at step 8" in text
    assert not (nodes["c"] / "new").exists()
    for name in ("table.txt", f"{best_of(nodes['a'] / 'run')}/model.safetensors"):
        assert (nodes["a"] / "new" / name).read_bytes() == (nodes["a"] / "run" / name).read_bytes()
    text = nodes.refusal("ca", partial(train.main, [*flags[:-1], "run/step-00000009"]))
    assert "run/step-00000009: expected a checkpoint" in text


def test_a_node_that_comes_late_reads_why_the_first_has_ended(nodes):
    """Rank 0 holds the store in which the reason stands, and would end at once."""
    def opens(args: None, world: World) -> None:
        if world.rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a torchrun that is late, too
            return world.together(lambda: time.sleep(1))
        world.together(lambda: read_state(Path("nothing")))
    codes, text = nodes.run("ab", partial(carry_out, opens, None))
    assert codes[0] == 2 and codes[1] in (2, -signal.SIGTERM) and "[c10d]" not in text, text
    assert "error: nothing: expected a checkpoint" in text


def test_starting_over_empties_the_run_folders_of_all_nodes(nodes):
    """Else an old checkpoint on one would be taken for the newest of the new run."""
    for node in "gh":
        shutil.copytree(nodes["a"] / "run", nodes[node] / "run")
    codes, _ = nodes.run("gh", partial(train.main, [*FLAGS, "--resume", "none"]), dies_at=4)
    assert codes == [-signal.SIGKILL] * 2
    assert names(nodes["h"] / "run") == [".lock"]
    assert names(nodes["g"] / "run") == [".lock", "metrics.csv", "step-00000002"]


def test_a_finished_run_is_reprinted_wherever_its_table_is(nodes):
    codes, text = nodes.run("ab", training)
    assert codes == [0, 0] and "run is finished" in text
    assert (nodes["a"] / "run" / "table.txt").read_text() in text
    codes, text = nodes.run("ca", training)
    assert codes == [0, 0] and "run is finished" in text


def test_a_table_that_one_node_cannot_read_ends_all_with_the_name_of_that_node(nodes):
    shutil.copytree(nodes["a"] / "run", nodes["t"] / "run")
    (nodes["t"] / "run" / "table.txt").unlink()
    (nodes["t"] / "run" / "table.txt").mkdir()
    text = nodes.refusal("ut", training)
    assert "error: node 1 (" in text and "Is a directory" in text


def test_nodes_without_the_checkpoint_or_with_another_are_named_before_anything_slow(nodes):
    """evaluate.py on all: c has no run, d another checkpoint than a."""
    score = partial(evaluate.main, ["run", "--out", "predictions.jsonl"])
    shutil.copytree(nodes["a"] / "run" / "step-00000006", nodes["d"] / "run" / "step-00000006")
    for other, said in (("c", r"node 1 \(\S+\): run: expected a run folder .*copy it from"),
                        ("d", r"run, checkpoint: expected the same on every node, got \w{64} on "
                              r"node 0 \(\S+\) and \w{64} on node 1")):
        text = nodes.refusal("a" + other, score)
        assert re.search(f"^error: {said}", text, re.M) and "decoding" not in text, text
    assert nodes.run("aa", score)[0] == [0, 0]


def test_stored_scores_of_the_first_node_serve_all(nodes):
    """evaluate.py --csv: a has scores of the test split, i the checkpoint alone."""
    best = best_of(nodes["a"] / "run")
    shutil.copytree(nodes["a"] / "run" / best, nodes["i"] / "run" / best)
    codes, text = nodes.run("ai", partial(evaluate.main, ["run", "--csv", "systems.csv", "--units",
                                                          "T17", "V1"]))
    assert codes == [0, 0] and f"run/{best}: scores of run/scores-test.json" in text, text
    assert names(nodes["i"] / "run") == [best]


def test_a_file_that_one_node_lacks_or_has_otherwise_ends_all_with_its_name(nodes, small, tmp_path):
    (nodes["e"] / "t5").unlink()
    text = nodes.refusal("ce", training)
    assert re.search(r"^error: node 1 \(\S+\): --t5: t5: expected", text, re.M), text
    (nodes["f"] / "data").unlink()
    (nodes["f"] / "data").mkdir()
    for dataset in Path(small["data"]).iterdir():
        if dataset.name != "demo_t15":
            (nodes["f"] / "data" / dataset.name).symlink_to(dataset)
    text = nodes.refusal("cf", training)
    assert re.search(r"^error: corpus_sha256: expected the same on every node, got", text, re.M)


def agents(nodes: Nodes, order: str, *words: str, processes: int = 1) -> list[subprocess.Popen]:
    """Agents of torchrun started one after the other, as c10d gives rank 0 to the lowest pid of a
    machine, and the first holds its store; each writes into NODE/log."""
    flags = ["--nnodes=2", f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_id=run",
             f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    return [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags,
                              f"--rdzv_conf=is_host={int(i == 0)}", str(ROOT / words[0]),
                              *words[1:]], cwd=nodes[node], env=ENVIRONMENT,
                             stdout=open(nodes[node] / "log", "w"), stderr=subprocess.STDOUT)
            for i, node in enumerate(order)]


@pytest.mark.slow
def test_two_agents_of_torchrun_go_on_after_one_node_was_killed_and_score_alike(small, tmp_path):
    """Two nodes of one process, with c10d: killed, resumed in the other order, scored by both."""
    nodes, words = Nodes(tmp_path, small), ["train.py", *FLAGS, "--timeout", "20"]

    def both(order: str, *words: str) -> str:
        codes = [agent.wait(120) for agent in agents(nodes, order, *words)]
        text = "".join((nodes[node] / "log").read_text() for node in order)
        assert codes == [0, 0], text
        return text

    job, log = agents(nodes, "ab", *words), nodes["a"] / "run" / "metrics.csv"
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert job[0].poll() is None, (nodes["a"] / "log").read_text()
        time.sleep(0.005)
    for pid in (*descendants(job[1].pid), job[1].pid):
        os.kill(pid, signal.SIGKILL)
    assert job[0].wait(60) == 1 and job[1].wait(60) < 0
    assert "another process has ended" in (nodes["a"] / "log").read_text()
    assert "start: resumed run/step-0000000" in both("ba", *words)
    both("ss", *words)
    assert sums(nodes["a"] / "run") == sums(nodes["s"] / "run") and "run" not in names(nodes["b"])
    shutil.copytree(nodes["a"] / "run", nodes["c"] / "run")
    table = (nodes["a"] / "run" / "table.txt").read_text()
    assert table in both("ca", "evaluate.py", "run", "--units", "T17", "V1")
