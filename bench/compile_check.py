"""Compiles every Triton kernel with every shipped setting ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
"""The matrix instruction that a large tile is meant to become: mma.sync, wgmma on sm_90, tcgen05 on sm_100."""
LARGE = ("linear_small", "linear_fused", "dx_fused")
"""Kernels whose tile is large enough for it; the other products (rank-r tiles) must have some matrix instruction."""
ADAPTER = ("project", "expand", "read_once")


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


def check(archs: list[int], only: str, console: Console) -> int:
    """Prints a table an architecture and returns the number of breaches."""
    aot = aot_module()
    if unknown := [a for a in archs if a not in MATRIX or a not in aot.SHARED_MEMORY]:
        raise ValueError(f"--arch must be some of {', '.join(map(str, MATRIX))}, got {', '.join(map(str, unknown))}")
    bad = 0
    for arch in archs:
        builds = [b for b in aot.shipped(arch) if only in b.name]
        table = Table(title=f"sm_{arch}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        heads = ("kernel", "setting", "regs", "spills", "shared", "matrix", "copies", "instr", "a weight", "")
        for head in heads:
            table.add_column(head, justify="right" if head in ("regs", "spills", "shared", "instr", "a weight") else "left")
        for build in track(builds, f"sm_{arch}", console=console, transient=True):
            try:
                c = aot.compile_build(build, arch)
            except Exception as e:
                bad += 1
                text = str(e).strip().splitlines()
                table.add_row(
                    build.name, build.setting, *[""] * 7, f"[red]does not compile: {text[0] if text else type(e).__name__}"
                )
                continue
            wrong = [*c.breaches(), *filter(None, [lost_matrix(build.name, arch, c.matrix)])]
            bad += bool(wrong)
            per_weight = "" if c.per_weight is None else f"{c.per_weight:.1f}"
            row = [build.name, build.setting, str(c.registers), str(c.spills), str(c.shared), c.matrix, _copies(c)]
            table.add_row(*row, str(c.instructions), per_weight, f"[red]{'; '.join(wrong)}" if wrong else "ok")
        console.print(table)
        counts = Counter(b.name for b in builds)
        console.print(", ".join(f"{name}: {n}" for name, n in counts.items()), "")
    return bad


def _copies(compiled: Any) -> str:
    """How global memory is read: LDGSTS is cp.async, UTMALDG is TMA, LDG a plain load."""
    return " ".join(f"{op} {n}" for op, n in getattr(compiled, "copies", {}).items() if n)


def versions() -> str:
    import triton

    return f"triton {triton.__version__}, torch {torch.__version__}"
