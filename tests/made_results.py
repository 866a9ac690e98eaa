"""Results of benchmarks, made by hand."""

from __future__ import annotations

from typing import Any

from bench.suite import OURS, summary


def entries(**ratios: float) -> dict[str, Any]:
    """Of a row of a result."""
    ours = {OURS: {"status": "ok", "seconds": {"median": 1e-3}, "of_ceiling": 0.5}}
    return ours | {name: {"status": "ok", "ratio": {"median": value}} for name, value in ratios.items()}


def result_of(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"suite": suite, "driver": None, "rows": rows, "summary": summary(rows)}
