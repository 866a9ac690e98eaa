"""The clock: rounds, turns, CUDA events and graphs; the last two with stand-ins for the parts that need a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CPU

from bench import measure
from bench.suite import OURS


def test_ratio_is_taken_within_the_rounds_that_both_took_part_in() -> None:
    ours, theirs = {0: 1.0, 1: 10.0, 2: 2.0, 3: 1.0}, {0: 2.0, 2: 4.0, 3: 2.0}
    assert measure.ratio(theirs, ours) == measure.Quartiles(2.0, 2.0, 2.0)


def test_a_long_call_is_its_own_warm_up(takes: Any) -> None:
    calls: dict[str, list[int]] = {"long": [], "short": []}
    runs = {"long": lambda i: calls["long"].append(i) or takes(0.11), "short": lambda i: calls["short"].append(i)}
    measure.interleave(runs, CPU, measure.Effort(0.0, 1, 1, 0.0, slow_rounds=1))
    assert calls == {"long": [0, 2], "short": [0, 1, 2]}


@pytest.mark.usefixtures("takes")
def test_interleave_takes_turns() -> None:
    order: list[str] = []
    runs = {name: lambda i, name=name: order.append(name) for name in "ab"}
    effort = measure.Effort(0.0, 4, 4, 0.0, slow_rounds=4)
    times = measure.interleave(runs, CPU, effort)
    assert "".join(order) == "aabb" + "abba" * 2
    assert all(list(t) == [0, 1, 2, 3] for t in times.values())


def test_a_slow_contender_takes_part_in_fewer_rounds_ours_in_all(takes: Any) -> None:
    wait = {OURS: 0.02, "fast": 0.001, "slow": 0.02}
    runs = {name: lambda i, s=s: takes(s) for name, s in wait.items()}
    times = measure.interleave(runs, CPU, measure.Effort(0.0, 9, 9, 0.0, slow_rounds=3), always=(OURS,))
    assert {name: len(t) for name, t in times.items()} == {OURS: 9, "fast": 9, "slow": 3}
    assert list(times["slow"]) == [2, 5, 8]  # spread over the whole time


def test_environment_names_what_a_result_depends_on() -> None:
    env = measure.environment(CPU)
    assert env["device"]
    assert env["versions"]["torch"] == torch.__version__
    assert len(env["sources"]) == 12
    assert isinstance(env["dirty"], bool)


class Event:
    """A clock that advances by what `tick` says."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def tick(i: int) -> None:
    Event.now += (2.0, 3.0, 10.0)[i % 3]


def test_cuda_events_give_the_median_and_the_cache_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    buffer = SimpleNamespace(zero_=lambda: flushed.append(Event.now))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: buffer)
    timer = measure._cuda_timer(CPU)
    assert timer(tick, 0, 3) == pytest.approx(3e-3)
    assert len(flushed) == 3


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A graph whose replay runs `capture.replay`."""
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda g: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
        "CUDAGraph": lambda: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graph


def test_a_graph_holds_a_call_for_each_copy_and_its_result_is_compared(capture: Any) -> None:
    outs: list[torch.Tensor] = []

    def run(i: int) -> torch.Tensor:
        outs.append(torch.full((3,), float(i + 1)))
        return outs[-1]

    capture.replay = lambda: outs[-1].fill_(4.0)
    assert measure.Graph(run, 4).calls == 4
    assert len(outs) == 3 + 4 + 1  # warm-up, capture, comparison

    capture.replay = lambda: None
    with pytest.raises(RuntimeError, match="a replay gives another result"):
        measure.Graph(run, 4)
