# ruff: noqa: SIM300 (M is a size, not a constant)
"""Measured settings: a file `tuned/<gpu>.json` for each GPU that was tuned, written by `python -m bench tune`.

    {"machine": {"device": ..., "arch": 90, ...},
     "entries": [{"op": "dx", "M": 64, "N": 4096, "K": 4096, "r": 16, "config": {"path": "fused", "block_m": 64, ...}}]}

An entry gives the fields of `Config` that differ from its defaults, and stands for up to M rows.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import log2
from pathlib import Path
from typing import Any

from .config import OPS, PATHS, Config

FOLDER = Path(__file__).parent / "tuned"
FAR = 4.0
"""Doublings of N and K, in all, beyond which an entry says nothing about a problem."""
SIZES = ("M", "N", "K", "r")
TILES = ("block_m", "block_n", "block_k", "ranks", "warps")


@dataclass(frozen=True)
class Entry:
    op: str
    M: int
    N: int
    K: int
    r: int
    config: Config


@dataclass(frozen=True)
class Table:
    gpu: str
    arch: int
    entries: tuple[Entry, ...]


def file_of(gpu: str) -> Path:
    """Where the table of a GPU lies, by the name that its driver gives it."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def entries_of(gpu: str) -> tuple[Entry, ...]:
    """The measured settings of a GPU; none where it was never tuned."""
    path = file_of(gpu)
    return load(path).entries if path.is_file() else ()


def tuned(arch: int) -> list[str]:
    """The GPUs of a compute capability that have a table."""
    return [table.gpu for table in map(load, sorted(FOLDER.glob("*.json"))) if table.arch == arch]


def load(path: Path) -> Table:
    """Raises ValueError, naming file and entry, where a table is not what the kernels can use."""
    try:
        data = json.loads(path.read_text())
        gpu, arch, rows = data["machine"]["device"], data["machine"]["arch"], data["entries"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f'{path}: a table is {{"machine": {{"device", "arch", ...}}, "entries": [...]}}: {e!r}') from None
    entries = []
    for i, row in enumerate(rows):
        try:
            entries.append(_entry(row))
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(f"{path}: entry {i} ({json.dumps(row)}): {e}") from None
    return Table(gpu, arch, tuple(entries))


def _entry(row: dict[str, Any]) -> Entry:
    if set(row) != {"op", *SIZES, "config"}:
        raise ValueError(f"keys must be op, {', '.join(SIZES)} and config, got {', '.join(row)}")
    op, sizes = row["op"], [row[name] for name in SIZES]
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"{', '.join(SIZES)} must be integers >= 0, got {sizes}")
    M, N, K, r = sizes
    return Entry(op, M, N, K, r, _config(op, row["config"]))


def _config(op: str, given: dict[str, Any]) -> Config:
    types = {f.name: type(f.default) for f in fields(Config)}
    for name, value in given.items():
        if name not in types:
            raise ValueError(f"config has no field {name!r}, only {', '.join(types)}")
        if type(value) is not types[name]:
            raise ValueError(f"config: {name} must be {types[name].__name__}, got {value!r}")
    config = Config(**given)
    paths = {"qlora_linear": PATHS, "dx": ("fused", "panel")}.get(op, ("",))
    if config.path not in paths:
        raise ValueError(f"config: path of {op} must be one of {', '.join(map(repr, paths))}, got {config.path!r}")
    for name in TILES:
        n = getattr(config, name)
        if n < 1 or n & (n - 1):
            raise ValueError(f"config: {name} must be a power of two, got {n}")
    for name in ("split", "steps", "stages", "group"):
        if getattr(config, name) < 1:
            raise ValueError(f"config: {name} must be at least 1, got {getattr(config, name)}")
    return config


def nearest(entries: Sequence[Entry], op: str, M: int, N: int, K: int, r: int) -> Config | None:
    """The setting of the entry for the nearest (N, K); of those the nearest r; of those the smallest M that is not below
    this one, else the largest.  None where no entry of `op` is near and takes the problem."""

    def order(e: Entry) -> tuple[float, float, bool, float]:
        return _apart(e.N, N) + _apart(e.K, K), _apart(e.r, r), e.M < M, _apart(e.M, M)

    near = [e for e in entries if e.op == op and _apart(e.N, N) + _apart(e.K, K) <= FAR and _takes(e, M, K)]
    return min(near, key=order).config if near else None


def _apart(a: int, b: int) -> float:
    return abs(log2(max(a, 1) / max(b, 1)))


def _takes(entry: Entry, M: int, K: int) -> bool:
    """Whether the tile of a linear op holds M rows and fits in K, and M is not far above what was measured."""
    config = entry.config
    if config.path == "small" and config.block_m < M:
        return False
    return config.path in ("", "panel") or (M <= 2 * entry.M and K >= config.block_k)
