"""The same lines and contenders under pytest-benchmark: `pytest bench --benchmark-only`, `-k dequantize` for one suite.

Its table shows ours beside the rivals, one group a line.  `--benchmark-disable` runs each once, for correctness.  Ratios taken
within one interleaved run, which `python -m bench run` reports, are the more trustworthy numbers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from .suite import OURS, Contender, Line, prepare
from .suites.catalogue import problems

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEMS = [
    pytest.param(line, name, id=f"{line.suite}-{line.label.replace('  ', '-')}-{name}") for line, name in problems(DEVICE)
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
