"""Compiles every GPU kernel ahead of time, for GPUs that need not be there: `compile-check` those of Triton with every shipped
setting, `resources` those in CUDA C++.

A kernel breaks a rule if it has a spill or a stack frame, takes more shared memory than the GPU has, or lost its matrix
instruction; one in Triton also if it needs more instructions a weight than `instructions.json` records (`--record` writes that
file anew).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..suite import write_text
from . import cuda_builds
from .sass import SHARED_MEMORY, Compiled, tool

TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = (75, 80, 90, 100, 120)
"""Compute capabilities that are checked if none is named."""
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
"""The matrix instruction that a large tile of Triton is meant to become: mma.sync, wgmma on sm_90, tcgen05 on sm_100."""
LARGE = ("linear_small", "linear_fused", "linear_gluon", "dx_fused")
"""Triton kernels whose tile is large enough for it; the other products must have some matrix instruction."""
PRODUCTS = ("project", "expand", "read_once", "product_kernel", "small_kernel", "read_kernel")
"""How the names of the other products begin: of Triton those of an adapter, then those in CUDA C++."""
RECORDED = Path(__file__).parent / "instructions.json"
MARGIN = 1.01
"""More instructions a weight than recorded, by this factor, are too many."""


def lost_matrix(name: str, arch: int, matrix: Iterable[str]) -> str | None:
    """Why the matrix instructions of a product of 16-bit elements are not those that it is meant to have, or None."""
    if name in LARGE and MATRIX[arch] not in matrix:
        return f"{' '.join(matrix) or 'no matrix instruction'} instead of {MATRIX[arch]}"
    if name.startswith(PRODUCTS) and not list(matrix):
        return "no matrix instruction"
    return None


def too_many(per_weight: float | None, recorded: float | None) -> str | None:
    """Why there are more instructions a weight than recorded, or None."""
    if per_weight is None or recorded is None or per_weight <= recorded * MARGIN:
        return None
    return f"{per_weight:.2f} instructions a weight, {recorded:.2f} recorded"


class Report:
    """A table of the kernels of one architecture, a row each, and how many of them are `bad`."""

    def __init__(self, arch: int) -> None:
        self.bad = 0
        self.table = Table(title=f"sm_{arch}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        right = ("regs", "spills", "shared", "instr", "a weight")
        for head in ("kernel", "setting", "regs", "spills", "shared", "matrix", "copies", "instr", "a weight", ""):
            self.table.add_column(head, justify="right" if head in right else "left", overflow="fold")

    def add(self, name: str, setting: str, c: Compiled | str, *wrong: str | None) -> None:
        """A kernel's numbers, or why it does not compile, and what is wrong besides `Compiled.breaches`."""
        if isinstance(c, str):
            faults, cells = [f"does not compile: {c}"], [""] * 7
        else:
            faults = [*c.breaches(), *filter(None, wrong)]
            matrix, copies = (" ".join(f"{op} {n}" for op, n in ops.items()) for ops in (c.matrix, c.copies))
            per_weight = "" if c.per_weight is None else f"{c.per_weight:.2f}"
            numbers = [str(n) for n in (c.registers, c.spills, c.shared)]
            cells = [*numbers, matrix or "-", copies, str(c.instructions.total()), per_weight]
        self.bad += bool(faults)
        self.table.add_row(name, setting, *cells, f"[red]{'; '.join(faults)}" if faults else "ok")


# ---- Triton


def triton_builds() -> Any:
    """The listing of Triton's kernels.  Raises RuntimeError where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: pip install triton (Linux); compile-check needs no GPU")
    return importlib.import_module(".triton_builds", __package__)


def check_triton(archs: list[int], only: str, console: Console, record: bool = False) -> int:
    """Prints a table an architecture and returns the number of kernels that break a rule.

    Raises:
        RuntimeError: there is no Triton.
        ValueError: an architecture is none that the rules are made for.
    """
    listing = triton_builds()
    import triton

    version = triton.__version__
    if unknown := [a for a in archs if a not in MATRIX or a not in SHARED_MEMORY]:
        raise ValueError(f"--arch must be some of {', '.join(map(str, MATRIX))}, got {', '.join(map(str, unknown))}")
    bad = 0
    counts: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _silence) as pool:
        for arch in archs:
            report, before, found = Report(arch), recorded(arch, version), counts.setdefault(f"sm_{arch}", {})
            builds = {i: b for i, b in enumerate(listing.shipped(arch)) if only in b.name}
            results = pool.map(_compile, [arch] * len(builds), builds)
            both = zip(builds.values(), results, strict=True)
            for build, c in track(both, f"sm_{arch}", len(builds), console=console, transient=True):
                lost = few = None
                if isinstance(c, Compiled):
                    key = f"{build.name} {build.setting}"
                    lost = None if build.float32 else lost_matrix(build.name, arch, c.matrix)
                    few = too_many(c.per_weight, before.get(key))
                    if c.per_weight is not None:
                        found[key] = round(c.per_weight, 2)
                report.add(build.name, build.setting, c, lost, few)
            console.print(report.table)
            known = f"{len(found.keys() & before.keys())} of {len(found)} compared with {RECORDED.name}"
            console.print(f"sm_{arch}: {len(builds)} builds, {known}\n")
            bad += report.bad
    if record:
        _record(counts, version)
    return bad


def triton_version() -> str:
    """Of Triton and the torch that it is for."""
    import triton

    return f"triton {triton.__version__}, torch {torch.__version__}"


def recorded(arch: int, version: str) -> dict[str, float]:
    """Instructions a weight of each build by the compiler of this Triton version; empty for another version."""
    data = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    return data.get(f"sm_{arch}", {}) if data.get("triton") == version else {}


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


def _compile(arch: int, index: int) -> Compiled | str:
    """In a worker: the counts of a build, or why it does not compile."""
    listing = triton_builds()
    try:
        return listing.compile_build(listing.shipped(arch)[index], arch)
    except Exception as e:
        text = str(e).strip().splitlines()
        return text[0] if text else type(e).__name__


# ---- CUDA C++


def check_cuda(archs: list[int], only: str, console: Console) -> int:
    """Prints a table an architecture and returns the number of kernels that break a rule.

    Raises:
        RuntimeError: there is no nvcc, or a source does not compile.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("resources needs nvcc, on PATH or in CUDA_HOME; it needs no GPU")
    if tool("nvdisasm") is None:
        console.print("no nvdisasm (it comes with the CUDA toolkit and with Triton): instructions are not counted")
    jobs = [(source, arch) for arch in archs for source in sorted(cuda_builds.SOURCES.glob("*.cu")) if only in source.name]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: cuda_builds.compile_source(nvcc, *job), jobs)
        kernels = [k for some in track(found, "compiling", total=len(jobs), console=console, transient=True) for k in some]
    bad = 0
    for arch in archs:
        report = Report(arch)
        for name, c in kernels:
            if c.arch == arch:
                report.add(name, "", c, cuda_lost_matrix(name, c))
        console.print(report.table)
        bad += report.bad
    return bad


def cuda_version() -> str:
    """Of the nvcc that there is."""
    nvcc = tool("nvcc")
    found = re.search(r"release [\d.]+, V([\d.]+)", cuda_builds.output(nvcc, "--version")) if nvcc else None
    return f"nvcc {found.group(1)}" if found else "nvcc"


def cuda_lost_matrix(name: str, c: Compiled) -> str | None:
    """`lost_matrix` of a kernel in CUDA C++, whose elements are in its name: tensor cores take bfloat16 from sm_80 on."""
    on_tensor_cores = "half" in name or ("bfloat16" in name and c.arch >= 80)
    return lost_matrix(name, c.arch, c.matrix) if on_tensor_cores and c.instructions else None
