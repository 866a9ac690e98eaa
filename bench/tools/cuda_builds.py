"""Every CUDA kernel of `csrc/cuda`, compiled by nvcc for a GPU that need not be there."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from .sass import Compiled, instructions, opcodes, tool

SOURCES = Path(__file__).parents[2] / "csrc/cuda"


def compile_source(nvcc: str, source: Path, arch: int) -> list[tuple[str, Compiled]]:
    """Name and numbers of each kernel of a source.  Raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/{source.stem}.cubin"
        log = output(nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", binary)
        disassembler = tool("nvdisasm")
        code = _functions(output(disassembler, "-c", binary)) if disassembler else {}
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        symbol = entry.partition("'")[0]
        frame = re.search(r"(\d+) bytes stack.* (\d+) bytes spill stores, (\d+) bytes", entry)
        assert frame, entry
        stack, stores, loads = map(int, frame.groups())
        registers, shared = (re.search(rf"(\d+) {what}", entry) for what in ("registers", "bytes smem"))
        sizes = [int(m.group(1)) if m else 0 for m in (registers, shared)]
        compiled = Compiled(arch, sizes[0], stack, stores + loads, sizes[1], code.get(symbol, Counter()))
        kernels.append((_readable(symbol), compiled))
    return sorted(kernels, key=lambda k: k[0])


def _functions(assembly: str) -> dict[str, Counter[str]]:
    """The opcodes of each function."""
    parts = re.split(r"^\.text\.(\S+):$", assembly, flags=re.MULTILINE)
    return {symbol: opcodes(instructions(body)) for symbol, body in zip(parts[1::2], parts[2::2], strict=True)}


def _readable(symbol: str) -> str:
    """Name and template arguments, without the namespaces and parameters."""
    filter_ = shutil.which("c++filt") or tool("cu++filt")
    name = output(filter_, symbol).strip() if filter_ else symbol
    name = re.sub(r"lora_kernels::cuda::|\(anonymous namespace\)::|^void ", "", name)
    return name[: name.rfind("(")] if name.endswith(")") else name


def output(*command: str) -> str:
    """Raises RuntimeError with what the command had to say, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout + done.stderr
