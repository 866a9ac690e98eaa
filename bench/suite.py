"""A suite is a list of lines; a line is one problem that several contenders solve.  They are judged and timed here."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_kernels.testing import Results, error_floor, max_error, relative_error

from .measure import Ceiling, Effort, Graph, Quartiles, Run, cache_bytes, ceiling, copies_of, interleave, ratio

OURS = "lora_kernels"
FACTOR = {True: 2.0, False: 8.0}
"""Error allowed over that of plain torch at the same dtype: ours, a rival's."""


class UnavailableError(Exception):
    """A rival can't take part; the message says why."""


def failure(e: Exception) -> str:
    """Its type and the first line of its message."""
    return ": ".join([type(e).__name__, *str(e).splitlines()[:1]])


@dataclass
class Contender:
    """One way to solve a line.

    Attributes:
        run: computes on the i-th copy of the data.
        outputs: the results to judge, computed once by the same path.
        nbytes: bytes of the weight as this contender stores it.
        copies: of the data, through which `run` rotates.
        graphable: whether `run` may be captured in a CUDA graph.
    """

    run: Run
    outputs: Callable[[], Results]
    nbytes: int
    copies: int = 1
    graphable: bool = True


class Line(ABC):
    """One problem.

    Attributes:
        names: its contenders, ours first.
        cold: whether the weights are out of the cache when they are used, those of every contender alike.
        threads: CPU threads, where a line has its own number.
    """

    suite: str
    label: str
    names: Sequence[str]
    device: torch.device
    quick: bool = False
    cold: bool = True
    threads: int | None = None

    def copies(self, nbytes: int, other: int = 0) -> int:
        """Copies of the weight, whose smallest form has `nbytes`, so that none is found in the cache; two in a quick run."""
        n = 2 if self.quick else copies_of(nbytes, self.device, other)
        self.cold = n * nbytes + other > cache_bytes(self.device)
        return n

    @abstractmethod
    def build(self, name: str) -> Contender:
        """Raises UnavailableError."""

    @abstractmethod
    def judge(self, name: str, got: Results) -> str | None:
        """Why the results are wrong, or None."""

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        """Bytes that must move and operations that must be done, at least."""
        return float(contender.nbytes), 0.0

    def shape(self) -> dict[str, Any]:
        return {}

    def rate(self) -> tuple[str, float] | None:
        """What is counted besides bytes and operations, and how much of it a call does."""
        return None

    def release(self) -> None:
        """Drops what the line has cached, once it is measured."""
        for name in [n for n in self.__dict__ if isinstance(getattr(type(self), n, None), cached_property)]:
            del self.__dict__[name]


def mismatch(got: Results, want: Results, base: Results, dtype: torch.dtype, ours: bool) -> str | None:
    """Why `got` is wrong: compared with `want` in float64, and with the error that plain torch (`base`) makes."""
    for key, tensor in got.items():
        if tuple(tensor.shape) != tuple(want[key].shape):
            return f"{key} has shape {list(tensor.shape)}, expected {list(want[key].shape)}"
        floor = error_floor(want[key], dtype)
        for measure, loose in ((relative_error, 1), (max_error, 4)):
            error, plain = measure(tensor, want[key]), measure(base[key], want[key])
            allowed = FACTOR[ours] * (plain + loose * floor)
            if not error <= allowed:  # a NaN fails
                return f"{key}: {measure.__name__} {error:.2g} against float64, allowed {allowed:.2g}"
    return None


# ---- measuring a line


@dataclass
class Entry:
    """What came of one contender."""

    status: str
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def prepare(line: Line, names: Sequence[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders whose output is right, and why the others are not among them."""
    ready, status = {}, {}
    for name in names:
        try:
            contender = line.build(name)
            wrong = line.judge(name, contender.outputs())
        except UnavailableError as e:
            status[name] = str(e)
            continue
        except Exception as e:  # a rival's failure is a result, ours too
            status[name] = f"failed: {failure(e)}"
            continue
        if wrong:
            status[name] = f"wrong: {wrong}"
        else:
            ready[name] = contender
    return ready, status


def measure_line(line: Line, against: Sequence[str], effort: Effort, top: Ceiling) -> dict[str, Entry]:
    names = [n for n in line.names if n == OURS or n in against]
    ready, status = prepare(line, names)
    runs: dict[str, Run] = {name: c.run for name, c in ready.items()}
    if line.device.type == "cuda":
        for name, contender in ready.items():
            if not contender.graphable:
                continue
            try:
                runs[graphed(name)] = Graph(contender.run, contender.copies)
            except Exception as e:
                status[graphed(name)] = f"not capturable: {failure(e)}"
                torch.cuda.synchronize()
    times = interleave(runs, line.device, effort, always=(OURS, graphed(OURS))) if runs else {}
    entries = {}
    for name in dict.fromkeys([*names, *runs, *status]):
        if name in status:
            entries[name] = Entry(status[name])
            continue
        base = ours_for(name)
        plain_name = name.removesuffix(GRAPH)
        nbytes, flops = line.work(plain_name, ready[plain_name])
        seconds = Quartiles.of(list(times[name].values()))
        detail: dict[str, float] = {
            "rounds": len(times[name]),
            "copies": ready[plain_name].copies,
            "weight_bytes": ready[plain_name].nbytes,
        }
        if rate := line.rate():
            detail[f"{rate[0]}/s"] = rate[1] / seconds.median
        if nbytes:
            detail["GB/s"] = nbytes / seconds.median / 1e9
        if flops:
            detail["GFLOP/s"] = flops / seconds.median / 1e9
        if nbytes or flops:
            detail["of_ceiling"] = top.seconds(nbytes, flops) / seconds.median
        entries[name] = Entry(
            "ok",
            seconds,
            ratio(times[name], times[base]) if name != base and base in times else None,
            detail,
        )
    return entries


GRAPH = " (graph)"


def graphed(name: str) -> str:
    return name + GRAPH


def ours_for(name: str) -> str:
    """A graphed contender is compared with ours graphed."""
    return graphed(OURS) if name.endswith(GRAPH) else OURS


# ---- a suite


def run_suite(
    suite: str,
    lines: Sequence[Line],
    device: torch.device,
    against: Sequence[str],
    effort: Effort,
    console: Console,
    env: dict[str, Any],
    quick: bool = False,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Measures every line, prints as it goes, and returns what belongs in the JSON file.  `deadline`, in `time.monotonic`'s
    seconds, is the moment after which no further line is begun."""
    top = ceiling(device, torch.get_num_threads(), quick)
    print_header(console, suite, env)
    console.print(f"measured ceilings: copy {top.copy / 1e9:.0f} GB/s, bf16 matrix product {top.gemm / 1e9:.0f} GFLOP/s")
    rows, left_out = [], []
    for line in lines:
        if time.monotonic() > deadline:
            left_out.append(line.label)
            continue
        with _threads(line.threads):
            entries = measure_line(line, against, effort, ceiling(device, torch.get_num_threads(), quick))
        row = {"label": line.label, **line.shape(), "weights": "cold" if line.cold else "in cache"}
        rows.append(row | {"entries": {n: _entry_json(e) for n, e in entries.items()}})
        _print_line(console, line, entries)
        line.release()
    result = {
        "suite": suite,
        **env,
        "quick": quick,
        "ceiling": asdict(top),
        "rows": rows,
        "left_out": left_out,
        "summary": summary(rows),
    }
    print_summary(console, result)
    return result


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_header(console: Console, suite: str, env: dict[str, Any]) -> None:
    console.print(f"[bold]{suite}[/bold] on {env['device']}, {threads_text(env)}, backend {env['backend']}")


def _entry_json(entry: Entry) -> dict[str, Any]:
    out: dict[str, Any] = {"status": entry.status}
    if entry.seconds:
        out["seconds"] = asdict(entry.seconds)
    if entry.ratio:
        out["ratio"] = asdict(entry.ratio)
    return out | entry.detail


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each rival: worst, geometric mean and best of its median ratios, and where."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(n for row in rows for n in row["entries"]):
        found = [
            (row["entries"][name]["ratio"]["median"], row["label"]) for row in rows if "ratio" in row["entries"].get(name, {})
        ]
        if found:
            mean = math.exp(statistics.fmean(math.log(r) for r, _ in found))
            worst, best = min(found), max(found)
            out[name] = {"worst": worst[0], "worst_at": worst[1], "mean": mean, "best": best[0], "best_at": best[1]}
    return out


def wrong_lines(result: dict[str, Any]) -> list[str]:
    """Lines on which ours is wrong or failed."""
    bad = []
    for row in result["rows"]:
        entry = row["entries"].get(OURS)
        if entry and entry["status"] != "ok":
            bad.append(f"{row['label']}: {entry['status']}")
    return bad


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---- printing


def threads_text(env: dict[str, Any]) -> str:
    return f"{env['threads']} thread" + "s" * (env["threads"] != 1)


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            value = seconds * scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


_UNPRINTED = ("rounds", "copies", "weight_bytes")


def _print_line(console: Console, line: Line, entries: dict[str, Entry]) -> None:
    console.print(f"[bold]{line.suite}  {line.label}[/bold]{'' if line.cold else '  weights in cache'}", highlight=False)
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(k for e in entries.values() for k in e.detail if k not in _UNPRINTED))
    table.add_column("")
    for heading in ("time", "ours is faster by", *(c.replace("_", " ") for c in columns)):
        table.add_column(heading, justify="right")
    for name, entry in entries.items():
        if not entry.seconds:
            continue
        cells = [time_text(entry.seconds.median)]
        cells.append(f"{entry.ratio.median:.2f}x  [{entry.ratio.q1:.2f}, {entry.ratio.q3:.2f}]" if entry.ratio else "")
        for column in columns:
            value = entry.detail.get(column)
            cells.append("" if value is None else f"{value:.0%}" if column == "of_ceiling" else number_text(value))
        table.add_row(name, *cells, style="bold" if name.startswith(OURS) else None)
    console.print(table)
    for name, entry in entries.items():
        if not entry.ok:
            console.print(f"{name}: {entry.status}", style="red" if name.startswith(OURS) else "dim", highlight=False)
    console.print()


def print_summary(console: Console, result: dict[str, Any]) -> None:
    what = "how much more memory the others need" if result["suite"] == "memory" else "how much faster ours is"
    console.print(f"[bold]{result['suite']}: {what}, worst line, geometric mean, best line[/bold]")
    for name, s in result["summary"].items():
        worst, best = f"{s['worst']:.2f}x ({s['worst_at']})", f"{s['best']:.2f}x ({s['best_at']})"
        where = f"{s['worst']:.2f}x" if len(result["rows"]) == 1 else f"worst {worst}, mean {s['mean']:.2f}x, best {best}"
        console.print(f"  than {name}: {where}", highlight=False)
    if left := result.get("left_out"):
        console.print(f"[red]not measured, the time was up: {'; '.join(left)}[/red]")
    for bad in wrong_lines(result):
        console.print(f"[red]lora_kernels is wrong and was not timed: {bad}[/red]")
