"""The grid suite as its worst and best lines, and as one small table for each pass, number of threads and rival."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..suite import OURS, ours_for, time_text
from .names import plain

EXTREMES = 5
"""Lines at either end that are shown with what they need."""


@dataclass(frozen=True)
class Matrix:
    """`cells[i][j]`: ratio on shape i at the j-th number of tokens, None where it was not measured."""

    what: str
    threads: int
    rival: str
    shapes: list[str]
    tokens: list[int]
    cells: list[list[float | None]]

    @property
    def title(self) -> str:
        return f"{self.what}, {self.threads} thread{'s' * (self.threads > 1)}, against {plain(self.rival)}"

    def texts(self) -> Iterator[list[str]]:
        """Heading, then rows."""
        yield ["", *(f"M={M}" for M in self.tokens)]
        for shape, cells in zip(self.shapes, self.cells, strict=True):
            yield [shape, *("" if cell is None else f"{cell:.2f}x" for cell in cells)]


def matrices(result: dict[str, Any]) -> list[Matrix]:
    rows = result["rows"]
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    tokens = sorted({row["M"] for row in rows})
    rivals = dict.fromkeys(name for row in rows for name in row["entries"] if name != OURS)
    found = {
        (row["what"], row["threads"], name, row["N"], row["K"], row["M"]): entry["ratio"]["median"]
        for row in rows
        for name, entry in row["entries"].items()
        if "ratio" in entry
    }
    return [
        Matrix(
            what,
            threads,
            name,
            [f"{N}x{K}" for N, K in shapes],
            tokens,
            [[found.get((what, threads, name, N, K, M)) for M in tokens] for N, K in shapes],
        )
        for name in rivals
        for threads in sorted({row["threads"] for row in rows})
        for what in dict.fromkeys(row["what"] for row in rows)
    ]


def lost(cell: str) -> bool:
    """Whether a cell of `Matrix` or `extremes` is a ratio below 1."""
    return cell.startswith("0.") and "x" in cell


def standing(result: dict[str, Any], rival: str) -> str:
    """On how many lines ours is faster."""
    rows, mean = _ranked(result, rival), result["summary"][rival]["mean"]
    won = sum(row["entries"][rival]["ratio"]["median"] >= 1 for row in rows)
    return f"against {plain(rival)}: faster on {won} of {len(rows)} lines, mean {mean:.2f}x"


def extremes(result: dict[str, Any], rival: str) -> Iterator[list[str]]:
    """Heading, then the worst lines and the best ones, from the worst on, with the work of ours over that of the rival."""
    yield ["", "ratio [quartiles]", "ours", "theirs", "operations", "bytes"]
    rows = _ranked(result, rival)
    n = min(EXTREMES, len(rows) // 2)
    for row in rows[:n] + rows[len(rows) - n :]:
        ours, theirs = row["entries"][ours_for(rival)], row["entries"][rival]
        ratio = theirs["ratio"]
        times = [entry["seconds"]["median"] for entry in (ours, theirs)]
        work = [ours[rate] * times[0] / (theirs[rate] * times[1]) for rate in ("GFLOP/s", "GB/s")]
        yield [
            row["label"].replace("  ", " "),
            f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
            *map(time_text, times),
            *(f"{share:.2f} of theirs" for share in work),
        ]


def _ranked(result: dict[str, Any], rival: str) -> list[dict[str, Any]]:
    """Rows with a ratio, the worst first."""
    rows = [row for row in result["rows"] if "ratio" in row["entries"].get(rival, {})]
    return sorted(rows, key=lambda row: row["entries"][rival]["ratio"]["median"])


def show(result: dict[str, Any], console: Console) -> None:
    for rival in result["summary"]:
        _print(console, standing(result, rival), extremes(result, rival))
    for matrix in matrices(result):
        _print(console, matrix.title, matrix.texts())


def _print(console: Console, title: str, texts: Iterator[list[str]]) -> None:
    heading, *rows = texts
    console.print(f"[bold]grid: {title}[/bold]")
    table = Table(box=None, pad_edge=False)
    for i, text in enumerate(heading):
        table.add_column(escape(text), justify="right" if i else "left")
    for label, *cells in rows:
        table.add_row(label, *(f"[bold]{escape(c)}[/bold]" if lost(c) else escape(c) for c in cells))
    console.print(table, "")
