"""Test files in two processes, side by side: a hook of pytest, which conftest.py imports.

The second process is a fork after collection.  Each takes the next file when it is through with
one, and the second one's reports are told by the first, as if it had run the tests itself.  One
process runs all of a single file, and where a person looks on (-x, -s, --pdb).
"""

import ast
import os
import tempfile
from collections.abc import Iterator
from itertools import chain, pairwise

import pytest


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests; None leaves that to pytest."""
    option, files = session.config.option, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    watched = option.maxfail or option.usepdb or option.capture != "fd" or option.collectonly
    if watched or session.testsfailed or len(files) < 2 or (os.cpu_count() or 1) < 2:
        return None
    turns, filled = os.pipe()
    os.write(filled, bytes(range(len(files))))  # a number for each file, whoever reads it first
    os.close(filled)
    with tempfile.TemporaryFile() as reports:  # the second process writes, the first one reads
        told, first, second = 0, os.getpid(), os.fork()
        if not second:
            become_second(session, reports.fileno())
        for item, following in pairwise(chain(shared(turns, list(files.values())), [None])):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if not second and os.getppid() != first:
                raise session.Interrupted("the first process of the tests has gone")
            if second and (following is None or following.path != item.path):
                told = tell(session, reports.fileno(), told)
        if second:
            code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            tell(session, reports.fileno(), told)
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                raise session.Interrupted(f"the second process of the tests ended with {code}")
    return True


def shared(turns: int, files: list[list[pytest.Item]]) -> Iterator[pytest.Item]:
    """The tests of the files that fall to this process."""
    while number := os.read(turns, 1):
        yield from files[number[0]]


def become_second(session: pytest.Session, reports: int) -> None:
    """Let this process print nothing and write its reports: a line each, of Python, since JSON has
    no tuples."""
    config = session.config
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # its files are the first process' own
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    capture.start_global_capturing()
    capture.suspend_global_capture()

    class Reporter:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            data = config.hook.pytest_report_to_serializable(config=config, report=report)
            os.write(reports, f"{data!r}\n".encode())

    config.pluginmanager.register(Reporter())


def tell(session: pytest.Session, reports: int, told: int) -> int:
    """Tell the reports that have come since; told: how many bytes were, before and now."""
    hook = session.config.hook
    text = os.pread(reports, os.fstat(reports).st_size - told, told)
    whole = text[:text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        data = ast.literal_eval(line.decode())
        report = hook.pytest_report_from_serializable(config=session.config, data=data)
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
    return told + len(whole)
