"""What training promises when something goes wrong, each in the short form of reliability.py.

The long form is a command: python tests/reliability.py
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from conftest import ENVIRONMENT, ROOT, run
from engine.files import UsageError, claim


@pytest.fixture(scope="module")
def holds(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """holds("R1") asserts the promise.

    Two processes try the promises that are asked for side by side, from the first question on: they
    start slowly, and half of the time they wait.
    """
    names = [item.function.__doc__.split(":")[0].split(",")[0] for item in request.session.items
             if item.path == request.path and "holds" in item.fixturenames]
    labs = [subprocess.Popen([sys.executable, "tests/reliability.py", "--quick", *share], cwd=ROOT,
                             env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)
            for share in (names[::2], names[1::2]) if share]

    def ask(name: str) -> None:
        line = labs[names.index(name) % 2].stdout.readline()
        assert line.split()[:2] == [name, "PASS"], line
    yield ask
    for lab in labs:
        lab.communicate()


def test_a_run_killed_at_any_moment_ends_with_the_bytes_of_one_that_was_not(holds):
    """R1: 6 SIGKILLs on 1 and 2 processes, half of them aimed at the writing of a checkpoint:
    weights, moments, state and logs are equal; a control that writes in place is caught."""
    holds("R1")


def test_another_number_of_processes_is_refused_or_equal_but_for_rounding(holds):
    """R3: --allow-world-change keeps the batches; losses agree within 1e-5 at dropout 0."""
    holds("R3")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(holds):
    """R4: 15 kinds of damage, 50 flipped bits."""
    holds("R4")


def test_a_full_disk_costs_a_checkpoint_and_if_it_stays_full_ends_with_code_74(holds):
    """R5: the checkpoints before are whole, metrics.csv loses no row, the run can be resumed."""
    holds("R5")


def test_ctrl_c_and_sigterm_save_and_leave_and_a_second_ctrl_c_leaves_at_once(holds):
    """R6: within 20 s, exit codes 130 and 143; after a signal only an evaluation is repeated."""
    holds("R6")


def test_one_failing_process_ends_the_job_soon_and_says_why(holds):
    """R7: raise, SIGKILL, exit 0, data error: 10 s; a hang: --timeout and 5 s."""
    holds("R7")


def test_torchrun_restarts_a_run_whose_worker_was_killed(holds):
    """R8, R19: --max-restarts, even with --resume none: the files of an undisturbed run, which had
    another PYTHONHASHSEED."""
    holds("R8")


def test_uneven_processes_take_equal_steps_and_score_equally(holds):
    """R9: each row once an epoch; evaluation on 1, 2, 3, 4 processes is equal."""
    holds("R9")


def test_what_is_not_finite_is_traced_to_its_row_and_never_saved(holds):
    """R10: NaN in an image feature, a loss, a gradient; the same step on every process."""
    holds("R10")


def test_a_folder_that_cannot_be_used_is_refused_in_a_sentence(tmp_path):
    """--out is a file, below a file, or in use by another process."""
    (tmp_path / "file").write_text("")
    taken = tmp_path / "taken"
    taken.mkdir()
    with open(taken / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for out, said in ((tmp_path / "file", "got a file; choose another --out"),
                          (tmp_path / "file" / "below", "Not a directory; choose another --out"),
                          (taken, "got one in use; wait for that run")):
            with pytest.raises(UsageError, match=said):
                claim(out)


def test_a_path_to_resume_that_does_not_exist_is_fatal(command, tmp_path):
    lost = run(command(tmp_path / "run", "--resume", tmp_path / "nowhere"))
    assert lost.returncode == 2 and "expected a checkpoint folder" in lost.stderr
    assert os.listdir(tmp_path / "run") == [".lock"]
