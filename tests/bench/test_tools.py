"""The tuner and the compile check, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from bench.tools import compile_check, tune


def test_search_finds_the_fastest_setting() -> None:
    settings = pytest.importorskip("lora_kernels.backends.triton.settings")
    cost = {"block_n": {64: 3, 128: 1}, "stages": {2: 2, 3: 1, 4: 0, 5: 5}}

    def faster(a: Any, b: Any) -> bool:
        total = [sum(costs.get(getattr(c, name), 9) for name, costs in cost.items()) + (c.path != "small") for c in (a, b)]
        return total[0] < total[1]

    start = [settings.Config("panel"), settings.Config("small", 16, 64, 128)]
    best = tune.search(start, "qlora_linear", faster)
    assert (best.path, best.block_n, best.stages) == ("small", 128, 4)


def test_every_tuned_problem_has_a_start() -> None:
    settings = pytest.importorskip("lora_kernels.backends.triton.settings")
    for problem in tune.problems(quick=False):
        for arch in (80, 90, 100):
            assert tune.starts(problem, settings.Gpu("nvidia", arch))


@pytest.mark.parametrize(
    ("name", "arch", "matrix", "lost"),
    [
        ("linear_fused", 90, "HGMMA", False),
        ("linear_fused", 90, "HMMA", True),
        ("dx_fused", 100, "", True),
        ("dequantize_groups", 90, "", False),
        ("project", 80, "", True),
    ],
)
def test_a_lost_matrix_instruction_is_seen(name: str, arch: int, matrix: str, lost: bool) -> None:
    assert bool(compile_check.lost_matrix(name, arch, [matrix] * bool(matrix))) == lost
