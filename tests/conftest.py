"""Fixtures of several test files, and what pytest asks.  Plain functions are in helpers.py."""

from __future__ import annotations

import os
import random
import shlex
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from helpers import COUNTS, CPU
from hypothesis import HealthCheck, settings

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends import native

HERE = Path(__file__).parent
pytest_plugins = ["emulators.interpreted"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that a test starts find this checkout and helpers.py, whatever is installed and wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
# No deadline and no check of speed: a busy machine is no fault.
unchecked = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("tests", deadline=None, max_examples=40, suppress_health_check=unchecked)
settings.load_profile("tests")

collect_ignore = [] if torch.cuda.is_available() else ["backends/test_gpu.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs (default: a fresh one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draws the seed of this run, from which Hypothesis starts too."""
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    running = ", ".join(f"{n}: {why}" if why else n for n, why in backends.choices("qlora_linear", CPU))
    lines = [f"random inputs: --seed {config.option.seed}", f"backends of the CPU: {running}"]
    if native.unavailable(CPU) is None:
        extension = native.extension()
        lines.append(f"instruction set of native: {extension.cpu_level()} (of {', '.join(extension.cpu_levels())})")
    return "\n".join(lines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        command = f"python -m pytest {shlex.quote(item.nodeid)} --seed {item.config.option.seed}"
        report.sections.append(("The same random inputs again", command))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Also where -q leaves the header out."""
    for text, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{text}: {count} cases equal")
    terminalreporter.write_line(f"the same random inputs again: --seed {terminalreporter.config.option.seed}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test alone, from that of the run and the test's name; the random generators start from it."""
    value: int = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    random.seed(value)
    return value


INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
"""On a CPU Triton runs in its interpreter only: tests/emulators/interpreted.py sees to that."""


@pytest.fixture(params=(*INTERPRETED, *backends.ORDER["cpu"]))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of the CPU in turn, forced; one that can't run there is skipped with its reason."""
    reason = backends.load(request.param).unavailable(CPU)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """NaN in every fresh buffer, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests whose products are too small to share: on a busy machine a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
