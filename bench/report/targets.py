"""What the project promises, as numbers, and whether a set of results keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..suite import GRAPH, OURS, time_text
from .names import plain

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Ours may take at most `most` times what a rival takes, on every matching line of a suite; or a value of ours has a bound.

    Attributes:
        rivals: names; the fastest of them on a line is the one that counts.  Empty: `value` of ours is bounded.
        most: bound of the ratio ours / rival, or of `value`.
        where: which rows of the suite are meant.
        value: seconds, of_ceiling (bounded from below) or besides (bytes).
    """

    suite: str
    rivals: tuple[str, ...]
    most: float
    where: Callable[[Row], bool] = lambda row: True
    value: str = ""


def layer(shapes: tuple[tuple[int, int], ...] = (), M: tuple[int, ...] = (), r: int = 16) -> Callable[[Row], bool]:
    return lambda row: (not shapes or (row["N"], row["K"]) in shapes) and (not M or row["M"] in M) and row.get("r", r) == r


BNB = ("bnb+peft", "bnb+peft-autocast")
SQUARE = ((4096, 4096),)
SMALL = ((576, 576), (1536, 576), (576, 1536))

CPU = (
    Target("train_layer", ("dense",), 0.75, layer(SQUARE, (16,))),
    Target("train_layer", ("dense",), 0.95, layer(SQUARE, (512, 2048))),
    Target("train_layer", ("dense",), 1.00, layer(((11008, 4096), (4096, 11008)), (512,))),
    Target("train_layer", ("dense",), 1.05, layer(((1024, 4096),), (512,))),
    Target("train_layer", ("dense",), 1.20, layer(SMALL)),
    Target("train_layer", BNB, 1.00),
    Target("forward", ("dense",), 0.14, layer(SQUARE, (1,))),
    Target("forward", ("bnb-inference", "bnb-inference+peft"), 0.75, layer(SQUARE, (1,))),
    Target("dequantize", ("bnb",), 0.12, lambda row: (row["N"], row["K"]) in SQUARE),
    Target("quantize", ("bnb",), 0.03, lambda row: (row["N"], row["K"]) in SQUARE),
    Target("train_step", ("bnb+peft",), 0.78),
    Target("decode", ("bnb+peft",), 0.50),
)
GPU = (
    Target("dequantize", (), 0.90, lambda row: row["N"] * row["K"] >= 1 << 24, "of_ceiling"),
    Target("dequantize", ("bnb", "unsloth"), 1 / 1.3, lambda row: row["N"] * row["K"] >= 1 << 24),
    Target("forward", (), 5e-6, layer(SQUARE, (1, 2, 4, 8, 16)), "seconds"),
    Target("forward", (), 14e-6, layer(((14336, 4096),), (1, 2, 4, 8, 16)), "seconds"),
    Target("forward", BNB, 1 / 1.3, layer(M=(1, 2, 4, 8, 16))),
    Target("train_layer", ("dense",), 1.20, layer(M=(4096,))),
    Target("train_layer", ("dense",), 1.12, layer(M=(8192,))),
    Target("train_layer", BNB, 1 / 1.3, layer(M=(4096, 8192))),
    Target("train_layer", ("unsloth",), 1 / 1.1, layer(M=(4096, 8192))),
    Target("train_layer", ("lorafusion", "lorafusion-nf4"), 1.00, layer(M=(4096, 8192))),
    Target("forward", ("torch",), 1.00),
    Target("train_layer", ("torch",), 1.00),
    Target("memory", (), 64 * 2**20, value="besides"),
)


@dataclass(frozen=True)
class Verdict:
    target: Target
    measured: float | None
    at: str

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.target.most if self.target.value == "of_ceiling" else self.measured <= self.target.most


def check(results: list[dict[str, Any]]) -> list[Verdict]:
    """Of one device.  The worst matching line decides."""
    by_suite = {result["suite"]: result for result in results}
    out = []
    for target in GPU if any(result["driver"] for result in results) else CPU:
        found = []
        for row in by_suite.get(target.suite, {"rows": []})["rows"]:
            if target.where(row) and (value := _value(target, row["entries"])) is not None:
                found.append((value, row["label"].replace("  ", " ")))
        worst = (min if target.value == "of_ceiling" else max)(found, default=(None, ""))
        out.append(Verdict(target, *worst))
    return out


def _value(target: Target, entries: dict[str, Row]) -> float | None:
    def entry(name: str) -> Row:
        """In CUDA graphs where there are any: there no time of the host is counted."""
        return entries.get(name + GRAPH) or entries.get(name, {})

    if target.value:
        value = entry(OURS).get(target.value)
        return value["median"] if isinstance(value, dict) else value
    ratios = [entry(name)["ratio"]["median"] for name in target.rivals if "ratio" in entry(name)]
    return 1 / min(ratios) if ratios else None


def _text(target: Target, value: float) -> str:
    if target.value == "seconds":
        return time_text(value)
    return f"{value:.0%}" if target.value == "of_ceiling" else f"{value / 1e6:.0f} MB" if target.value else f"{value:.3g}"


HEADING = ("suite", "against", "asked", "is", "", "at")


def texts(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row under HEADING for each target."""
    rows: list[tuple[str, ...]] = []
    for v in check(results):
        t = v.target
        bound = f"{'>=' if t.value == 'of_ceiling' else '<='} {_text(t, t.most)}"
        against = " or ".join(plain(n) for n in t.rivals) or f"our {t.value.replace('_', ' ')}"
        if v.measured is None:
            rows.append((t.suite, against, bound, "", "not measured", ""))
            continue
        verdict = "reached" if v.reached else f"missed by {abs(v.measured / t.most - 1):.0%}"
        rows.append((t.suite, against, bound, _text(t, v.measured), verdict, v.at))
    return rows


def show(results: list[dict[str, Any]], console: Console) -> None:
    console.print("[bold]targets: our time over theirs, on the worst line[/bold]")
    table = Table(box=None, pad_edge=False)
    for text in HEADING:
        table.add_column(text, justify="right" if text in ("asked", "is") else "left")
    for row in texts(results):
        table.add_row(*row, style="red" if row[4].startswith("missed") else None)
    console.print(table, "")
