"""What nvcc makes of every CUDA kernel: registers, spills, shared memory and matrix instructions.  Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
ARCHS = (75, 80, 90, 100, 120)
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "OMMA")
TENSOR_KERNELS = ("product_kernel", "small_kernel", "read_kernel")
"""Kernels that multiply 16-bit elements on tensor cores, where the architecture has them for the type."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one source for one architecture; `shared` is what it declares, the launch may give it more."""

    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: Counter[str]

    @property
    def matrix(self) -> dict[str, int]:
        return {op: n for op in MATRIX if (n := self.instructions[op])}

    def breaches(self) -> list[str]:
        """What is not as it should be."""
        wrong = [f"{n} bytes of {what}" for what, n in (("spills", self.spills), ("stack", self.stack)) if n]
        tensor_type = "half" in self.name or ("bfloat16" in self.name and self.arch >= 80)
        if self.name.startswith(TENSOR_KERNELS) and tensor_type and self.instructions and not self.matrix:
            wrong.append("no matrix instruction")
        return wrong


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings the disassembler along."""
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=str(f)) for f in folders)), None)


def output(*command: str) -> str:
    """Raises RuntimeError with what the command had to say, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout + done.stderr


def compile_source(nvcc: str, source: Path, arch: int) -> list[Kernel]:
    """Raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/{source.stem}.cubin"
        log = output(nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", binary)
        disassembler = tool("nvdisasm")
        code = dict(_instructions(output(disassembler, "-c", binary))) if disassembler else {}
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        symbol = entry.partition("'")[0]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.* (\d+) bytes spill stores, (\d+) bytes", entry).groups())  # type: ignore[union-attr]
        registers, shared = (re.search(rf"(\d+) {what}", entry) for what in ("registers", "bytes smem"))
        sizes = [int(m.group(1)) if m else 0 for m in (registers, shared)]
        kernels.append(Kernel(_readable(symbol), arch, sizes[0], stack, stores + loads, sizes[1], code.get(symbol, Counter())))
    return sorted(kernels, key=lambda k: k.name)


def _instructions(assembly: str) -> Iterator[tuple[str, Counter[str]]]:
    """Each function's instructions, counted by the first part of their names."""
    parts = re.split(r"^\.text\.(\S+):$", assembly, flags=re.MULTILINE)
    for symbol, body in zip(parts[1::2], parts[2::2], strict=True):
        yield symbol, Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", body))


def _readable(symbol: str) -> str:
    """Name and template arguments, without the namespaces and parameters."""
    filter_ = shutil.which("c++filt") or tool("cu++filt")
    name = output(filter_, symbol).strip() if filter_ else symbol
    name = re.sub(r"lora_kernels::cuda::|\(anonymous namespace\)::|^void ", "", name)
    return name[: name.rfind("(")] if name.endswith(")") else name


def check(archs: list[int], only: str, console: Console) -> int:
    """Prints a table an architecture; returns how many kernels are not as they should be.

    Raises:
        RuntimeError: there is no nvcc, or a source does not compile.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("resources needs nvcc, on PATH or in CUDA_HOME; it needs no GPU")
    if tool("nvdisasm") is None:
        console.print("no nvdisasm (it comes with the CUDA toolkit and with Triton): instructions are not counted")
    jobs = [(source, arch) for arch in archs for source in sorted(SOURCES.glob("*.cu")) if only in source.name]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: compile_source(nvcc, *job), jobs)
        kernels = [k for some in track(found, "compiling", total=len(jobs), console=console, transient=True) for k in some]
    for arch in archs:
        table = Table(title=f"sm_{arch}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("kernel", overflow="fold")
        for head in ("regs", "spills", "shared", "instr"):
            table.add_column(head, justify="right")
        table.add_column("matrix")
        table.add_column("")
        for k in (k for k in kernels if k.arch == arch):
            matrix = " ".join(f"{op} {n}" for op, n in k.matrix.items()) or "-"
            wrong = "; ".join(k.breaches())
            numbers = (k.registers, k.spills, k.shared, k.instructions.total())
            table.add_row(k.name, *map(str, numbers), matrix, f"[red]{wrong}" if wrong else "ok")
        console.print(table)
    return sum(bool(k.breaches()) for k in kernels)


def version() -> str:
    nvcc = tool("nvcc")
    found = re.search(r"release [\d.]+, V([\d.]+)", output(nvcc, "--version")) if nvcc else None
    return f"nvcc {found.group(1)}" if found else "nvcc"
