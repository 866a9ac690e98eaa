"""All results of a device in one table: a row a suite, a column a rival."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..measure import ROOT
from ..suite import GRAPH, OURS, time_text
from . import grid
from .names import GROUPS, SUITES

RESULTS = ROOT / "bench/results"


def load(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """All results, devices by name, suites in the order of SUITES."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.rglob("*.json"))]
    order = list(SUITES)
    return sorted(
        ((p, r) for p, r in found if r.get("suite") in order), key=lambda f: (f[1]["device"], order.index(f[1]["suite"]))
    )


def rivals(result: dict[str, Any]) -> list[str]:
    """Rivals with a ratio on some line; on a GPU those timed in CUDA graphs, where no time of the host is counted."""
    names = list(result["summary"])
    graphs = [n for n in names if n.endswith(GRAPH)]
    return graphs or names


def texts(results: Sequence[dict[str, Any]], strong: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows; a worst ratio below 1 stands between two `strong`."""
    groups = {text: names for text, names in GROUPS.items() if any(worst_mean_best(r, names) for r in results)}
    rows = []
    for result in results:
        cells = []
        for names in groups.values():
            found = worst_mean_best(result, names)
            if not found:
                cells.append("")
                continue
            worst, mean, best = (f"{value:.2f}x" for value in found)
            worst = f"{strong}{worst}{strong}" if grid.lost(worst) else worst
            cells.append(worst if len(result["rows"]) == 1 else f"{worst} to {best}, mean {mean}")
        rows.append([SUITES[result["suite"]], _ours(result), *cells])
    return ["", "ours", *groups], rows


def worst_mean_best(result: dict[str, Any], names: Sequence[str]) -> tuple[float, float, float] | None:
    """Ratios over the lines of a suite, of the fastest of `names` on each; None where none of them took part."""
    here = [name for name in rivals(result) if name.removesuffix(GRAPH) in names]
    lines = [
        [row["entries"][n]["ratio"]["median"] for n in here if "ratio" in row["entries"].get(n, {})] for row in result["rows"]
    ]
    fastest = [min(line) for line in lines if line]
    if not fastest:
        return None
    return min(fastest), math.exp(statistics.fmean(map(math.log, fastest))), max(fastest)


def _ours(result: dict[str, Any]) -> str:
    """What ours does on a suite of one line; of more lines their number."""
    if len(result["rows"]) != 1:
        return f"{len(result['rows'])} lines"
    row = result["rows"][0]
    entry = row["entries"].get(OURS, {"status": "not run"})
    if entry["status"] != "ok":
        return entry["status"].partition(":")[0]
    if result["suite"] == "memory":
        return f"{entry['peak'] / 1e6:.0f} MB"
    text = time_text(entry["seconds"]["median"])
    return f"{text}, {entry['tokens/s']:.0f} tokens/s" if "tokens/s" in entry else text


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    heading, rows = texts(results, "")
    console.print("[bold]worst to best ratio: above 1 ours is faster[/bold]")
    table = Table(box=None, pad_edge=False)
    for text in heading:
        table.add_column(text)
    for cells in rows:
        table.add_row(*cells)
    console.print(table, "")
