"""Compiles every Triton kernel with every shipped setting ahead of time, for GPUs that need not be there.

A build breaks a rule if it has a spill or a stack frame, takes more shared memory than the GPU has, lost its matrix
instruction, or needs more instructions a weight than `instructions.json` records (`--record` writes that file anew).
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..suite import write_text

MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
"""The matrix instruction that a large tile is meant to become: mma.sync, wgmma on sm_90, tcgen05 on sm_100."""
LARGE = ("linear_small", "linear_fused", "linear_gluon", "dx_fused")
"""Kernels whose tile is large enough for it; the other products (rank-r tiles) must have some matrix instruction."""
ADAPTER = ("project", "expand", "read_once")
RECORDED = Path(__file__).parent / "instructions.json"
MARGIN = 1.01
"""More instructions a weight than recorded, by this factor, are too many."""


def aot_module() -> Any:
    """The Triton backend's listing.  Raises RuntimeError where there is no Triton or no listing."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: pip install triton (Linux); compile-check needs no GPU")
    if importlib.util.find_spec("lora_kernels.backends.triton.aot") is None:
        raise RuntimeError("this version of lora_kernels has no Triton kernels to compile")
    return importlib.import_module("lora_kernels.backends.triton.aot")


def lost_matrix(name: str, arch: int, matrix: str) -> str | None:
    """Why the matrix instruction is not the one that the kernel is meant to have, or None."""
    if name in LARGE and matrix != MATRIX[arch]:
        return f"{matrix if matrix != '-' else 'no matrix instruction'} instead of {MATRIX[arch]}"
    if name.startswith(ADAPTER) and matrix == "-":
        return "no matrix instruction"
    return None


def too_many(per_weight: float | None, recorded: float | None) -> str | None:
    """Why there are more instructions a weight than recorded, or None."""
    if per_weight is None or recorded is None or per_weight <= recorded * MARGIN:
        return None
    return f"{per_weight:.2f} instructions a weight, {recorded:.2f} recorded"


def recorded(arch: int, version: str) -> dict[str, float]:
    """Instructions a weight of each build by the compiler of this Triton version; empty for another version."""
    data = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    return data.get(f"sm_{arch}", {}) if data.get("triton") == version else {}


def check(archs: list[int], only: str, console: Console, record: bool = False) -> int:
    """Prints a table an architecture and returns the number of breaches."""
    aot = aot_module()
    import triton

    version = triton.__version__
    if unknown := [a for a in archs if a not in MATRIX or a not in aot.SHARED_MEMORY]:
        raise ValueError(f"--arch must be some of {', '.join(map(str, MATRIX))}, got {', '.join(map(str, unknown))}")
    bad = 0
    counts: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _silence) as pool:
        for arch in archs:
            start, before = time.perf_counter(), recorded(arch, version)
            builds = {i: b for i, b in enumerate(aot.shipped(arch)) if only in b.name}
            table, found = _table(arch), counts.setdefault(f"sm_{arch}", {})
            results = pool.map(_compile, [arch] * len(builds), builds)
            for build, c in track(
                zip(builds.values(), results, strict=True), f"sm_{arch}", len(builds), console=console, transient=True
            ):
                if isinstance(c, str):
                    bad += 1
                    table.add_row(build.name, build.setting, *[""] * 7, f"[red]does not compile: {c}")
                    continue
                key = f"{build.name} {build.setting}"
                if c.per_weight is not None:
                    found[key] = round(c.per_weight, 2)
                lost = None if build.float32 else lost_matrix(build.name, arch, c.matrix)
                wrong = [*c.breaches(), *filter(None, [lost, too_many(c.per_weight, before.get(key))])]
                bad += bool(wrong)
                per_weight = "" if c.per_weight is None else f"{c.per_weight:.2f}"
                copies = " ".join(f"{op} {n}" for op, n in c.copies.items() if n)
                row = [build.name, build.setting, str(c.registers), str(c.spills), str(c.shared), c.matrix, copies]
                table.add_row(*row, str(c.instructions), per_weight, f"[red]{'; '.join(wrong)}" if wrong else "ok")
            console.print(table)
            numbers = Counter(b.name for b in builds.values())
            console.print(", ".join(f"{name}: {n}" for name, n in numbers.items()))
            known = f"{len(found.keys() & before.keys())} of {len(found)} compared with {RECORDED.name}"
            console.print(f"sm_{arch}: {len(builds)} builds in {time.perf_counter() - start:.0f} s, {known}\n")
    if record:
        _record(counts, version)
    return bad


def _table(arch: int) -> Table:
    table = Table(title=f"sm_{arch}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    right = ("regs", "spills", "shared", "instr", "a weight")
    for head in ("kernel", "setting", "regs", "spills", "shared", "matrix", "copies", "instr", "a weight", ""):
        table.add_column(head, justify="right" if head in right else "left")
    return table


def _record(counts: dict[str, dict[str, float]], version: str) -> None:
    """Replaces what is recorded of these builds; keeps the other architectures, if they are of the same Triton version."""
    data = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    if data.get("triton") != version:
        data = {"triton": version}
    for arch, found in counts.items():
        data[arch] = dict(sorted({**data.get(arch, {}), **found}.items()))
    write_text(RECORDED, json.dumps(data, indent=1) + "\n")


def _silence() -> None:
    """In a worker: the compiler prints whole modules when it fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _compile(arch: int, index: int) -> Any:
    """In a worker: the counts of a build, or why it does not compile."""
    aot = aot_module()
    try:
        return aot.compile_build(aot.shipped(arch)[index], arch)
    except Exception as e:
        text = str(e).strip().splitlines()
        return text[0] if text else type(e).__name__


def versions() -> str:
    import triton

    return f"triton {triton.__version__}, torch {torch.__version__}"
