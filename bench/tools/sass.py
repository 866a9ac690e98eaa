"""What a compiler made of a GPU kernel: numbers that need no GPU, read off the machine code that `nvdisasm` prints."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MATRIX = ("UTCHMMA", "UTCMMA", "HGMMA", "HMMA", "QMMA", "OMMA")
COPIES = ("UTMALDG", "LDGSTS", "LDG")
"""Loads from global memory: by the tensor copy engine, asynchronous to shared memory, to registers."""
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that one program may use."""


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture.

    Attributes:
        stack: bytes of stack frame a thread.
        spills: loads and stores of local memory from Triton, bytes of them from nvcc.
        shared: bytes of shared memory; of nvcc what the kernel declares, to which the launch may add.
        instructions: how many of each opcode; empty where there was no disassembler.
        per_weight: instructions of the main loop and lane for each weight it decodes, or None where it decodes none.
    """

    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter)
    per_weight: float | None = None

    @property
    def matrix(self) -> dict[str, int]:
        """How many instructions of each of MATRIX."""
        return {op: n for op in MATRIX if (n := self.instructions[op])}

    @property
    def copies(self) -> dict[str, int]:
        """How many instructions of each of COPIES."""
        return {op: n for op in COPIES if (n := self.instructions[op])}

    def breaches(self) -> list[str]:
        """What no kernel should have.  A stack frame counts even without a spill: what lies there goes through memory."""
        wrong = [f"{self.spills} spills"] * bool(self.spills) + [f"{self.stack} bytes of stack"] * bool(self.stack)
        if self.shared > (most := SHARED_MEMORY.get(self.arch, self.shared)):
            wrong.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {most}")
        return wrong


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings the disassemblers along."""
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=str(f)) for f in folders)), None)


def instructions(text: str) -> list[tuple[int, str]]:
    """(address, opcode and operands) of each machine instruction, predicates removed."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", text)
    return [(int(address, 16), op) for address, op in found]


def opcodes(lines: list[tuple[int, str]]) -> Counter[str]:
    """How many of each opcode, without what comes after its first point."""
    return Counter(op.split(None, 1)[0].split(".")[0] for _, op in lines)


def main_loop(text: str, lines: list[tuple[int, str]]) -> list[str]:
    """The instructions of the innermost loop with the most byte permutes: the one that decodes.

    A loop with asynchronous loads comes first: an odd rank in 16 bits is put together with byte permutes too.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    pending: list[str] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            pending.append(label[1])
            continue
        at = re.search(r"/\*([0-9a-f]{4,})\*/\s+(@?\S.*);", line)
        if not at:
            continue
        address = int(at[1], 16)
        labels |= dict.fromkeys(pending, address)
        pending = []
        jump = re.search(r"BRA\S*\s.*`\((\.L\w+)\)", line)
        if jump and labels.get(jump[1], address) < address:
            loops.append((labels[jump[1]], address))

    def body(loop: tuple[int, int]) -> list[str]:
        return [op for address, op in lines if loop[0] <= address <= loop[1]]

    bodies = [body(a) for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] and _permutes(body(b)) for b in loops)]

    def decodes(ops: list[str]) -> tuple[bool, int]:
        return any(op.startswith("LDGSTS") for op in ops), _permutes(ops)

    return max(bodies, key=decodes, default=[op for _, op in lines])


def _permutes(ops: list[str]) -> int:
    return sum(op.startswith("PRMT") for op in ops)
