"""Runs the tests marked `interpreted` where Triton interprets its kernels: in a process of its own, because TRITON_INTERPRET
must be set before Triton is imported.

They are collected, picked (-k, node ids) and reported one by one like all others.  The first of them starts one process that
runs all that were picked and sends its reports through a pipe.  A pytest that has TRITON_INTERPRET=1 itself runs them on the
spot.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from typing import IO

import pytest
from helpers import HANG

PIPE = "LORA_KERNELS_TEST_PIPE"
"""The file descriptor to which the process writes its reports."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in a process in which Triton interprets its kernels")
    if PIPE in os.environ:
        config.pluginmanager.register(Sender(config))
    elif os.environ.get("TRITON_INTERPRET") != "1":
        config.pluginmanager.register(Receiver())


class Sender:
    """In the interpreter's process: writes each report to the pipe."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.pipe = os.fdopen(int(os.environ.pop(PIPE)), "wb")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        pickle.dump(data, self.pipe)
        self.pipe.flush()


class Receiver:
    """In the process of the other tests: has the marked ones run, and passes their reports on."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: IO[bytes]
        self.output: IO[bytes]
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.get_closest_marker("interpreted") is None:
            return None
        if self.process is None:
            self.start(item.session)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.wait(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        item.session._setupstate.teardown_exact(nextitem)  # what the test before this one left for its neighbours
        return True

    def start(self, session: pytest.Session) -> None:
        picked = [item.nodeid for item in session.items if item.get_closest_marker("interpreted") is not None]
        options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--seed", str(session.config.option.seed)]
        source, target = os.pipe()
        self.pipe, self.output = os.fdopen(source, "rb"), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *picked],
            cwd=session.config.rootpath,
            env=os.environ | {"TRITON_INTERPRET": "1", PIPE: str(target)},
            pass_fds=[target],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        os.close(target)
        self.timer = threading.Timer(HANG, self.process.kill)
        self.timer.start()

    def wait(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Setup, call and teardown of a test; a failure in their place where the process ended without them."""
        reports = self.reports[item.nodeid]
        while not any(report.when == "teardown" for report in reports):
            try:
                data = pickle.load(self.pipe)
            except EOFError:
                self.output.seek(0)
                text = f"the interpreter's process ended before this test:\n{self.output.read().decode()[-6000:]}"
                return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            self.reports[report.nodeid].append(report)
        return reports

    def pytest_sessionfinish(self) -> None:
        if self.process is not None:
            self.timer.cancel()
            self.process.kill()  # it may have more to do where -x stopped this one
            self.process.wait()
