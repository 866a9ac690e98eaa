"""The suites: every contender is right, every device has lines."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU

from bench.suite import OURS, Line, prepare
from bench.suites import cases
from bench.suites.catalogue import problems


@pytest.mark.parametrize(("line", "name"), problems(CPU), ids=lambda v: v if isinstance(v, str) else f"{v.suite}-{v.label}")
def test_every_contender_is_right(line: Line, name: str) -> None:
    ready, status = prepare(line, [name])
    line.release()
    if name in ready:
        return
    assert name != OURS, status[name]
    assert not status[name].startswith(("wrong", "failed")), status[name]
    pytest.skip(status[name])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_device_has_cases(kind: str) -> None:
    device = torch.device(kind)
    for of in (cases.forward, cases.train_layer, cases.memory):
        assert len({c.id for c in of(device)}) == len(of(device)) > 0
    assert cases.weights(device)
