"""The grid suite as one small table for each pass, number of threads and rival: shapes down, tokens across."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .names import plain
from .suite import OURS


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


def show(result: dict[str, Any], console: Console) -> None:
    for matrix in matrices(result):
        heading, *rows = matrix.texts()
        console.print(f"[bold]grid: {matrix.title}[/bold]")
        table = Table(box=None, pad_edge=False)
        for i, text in enumerate(heading):
            table.add_column(text, justify="right" if i else "left")
        for cells in rows:
            table.add_row(cells[0], *(f"[bold]{c}[/bold]" if c.startswith("0") else c for c in cells[1:]))
        console.print(table, "")
