"""The same lines and contenders under pytest-benchmark: `pytest bench --benchmark-only`, `-k dequantize` for one suite.

Its table shows ours beside the rivals, one group a line.  `--benchmark-disable` runs each once, for correctness.  Ratios taken
within one interleaved run, which `python -m bench run` reports, are the more trustworthy numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from .suite import OURS, Contender, Line, prepare
from .suites import layer as bench_layer
from .suites import weight as bench_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUITES = (*bench_weight.CLASSES, "forward", "train_layer")


def lines(suite: str) -> Sequence[Line]:
    module: Any = bench_weight if suite in bench_weight.CLASSES else bench_layer
    return module.lines(suite, DEVICE, quick=True)


PROBLEMS = [
    pytest.param(line, name, id=f"{suite}-{line.label.replace('  ', '-')}-{name}")
    for suite in SUITES
    for line in lines(suite)
    for name in line.names
]


def contender(line: Line, name: str) -> Contender:
    """Built and judged; fails the test if its result is wrong, skips it if it can't take part."""
    ready, status = prepare(line, [name])
    if name not in ready:
        if name == OURS or status[name].startswith(("wrong", "failed")):
            pytest.fail(f"{name}: {status[name]}")
        pytest.skip(f"{name}: {status[name]}")
    return ready[name]


@pytest.mark.parametrize(("line", "name"), PROBLEMS)
def test_contender(line: Line, name: str, benchmark: Any) -> None:
    run, calls = contender(line, name).run, itertools.count()

    def call() -> Any:
        result = run(next(calls))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{line.suite} {line.label}"
    benchmark(call)
    line.release()
