"""Fixtures of the tests of bench, and results made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from bench import cli, measure


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    """Other processes may hold the second core, and waiting for it takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be told back, and other tests in this process measure memory."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: False)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets seconds pass on the clock that `measure` reads, which otherwise stands still."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    return pass_seconds
