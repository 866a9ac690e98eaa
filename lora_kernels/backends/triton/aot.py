"""Every kernel with the settings it is shipped with, compiled ahead of time for a GPU that need not be there.

`shipped(arch)` runs the real ops on tensors without data and lists what they would launch on that GPU;
`compile_build` compiles one of them and reads registers, spills, shared memory and instructions off the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...formats import BLOCKSIZE2, QuantizedWeight
from . import decode_absmax, dequantize, qlora_linear, qlora_linear_backward, quantize
from .launch import Launch, recording

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (576, 576), (1536, 576), (576, 1536))
"""(N, K) of the benchmark's layers."""
ROWS = (1, 4, 16, 17, 64, 256, 512, 4096)
RANKS = (8, 16, 32, 64, 256)
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that one program may use."""
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MATRIX = ("UTCHMMA", "UTCMMA", "HGMMA", "HMMA")


@dataclass(frozen=True)
class Build:
    """One kernel to compile: what Triton's JIT would compile for a launch on the GPU."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def setting(self) -> str:
        """Dtype, tile and flags, for a table."""
        dtypes = dict.fromkeys(t for _, t in self.signature if t in ("*fp16", "*bf16"))
        shown = {k: v for k, v in self.constants if v is not None and not k.islower() and k not in ("PTX",)}
        flags = [f"{k}={v}" if not isinstance(v, bool) else k for k, v in shown.items() if v is not False]
        options = dict(self.options)
        return " ".join([*dtypes, *flags, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a build. `per_weight`: instructions of the main loop and lane for each weight it decodes, or
    None where it decodes none."""

    build: Build
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    instructions: int
    per_weight: float | None

    def breaches(self) -> list[str]:
        out = []
        if self.stack or self.spills:
            out.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            out.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_MEMORY[self.arch]}")
        return out


def shipped(arch: int, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> list[Build]:
    """Every kernel that the ops launch on sm_`arch` for the benchmark's shapes, once for each way it is compiled."""
    with recording(arch) as launches:
        for _ in _calls(dtypes):
            pass
    return list(dict.fromkeys(map(build_of, launches)))


def _calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    for dtype in dtypes:
        for double_quant in (True, False):
            for quant_type in ("nf4", "fp4") if double_quant else ("nf4",):
                qw = meta_weight(4096, 4096, quant_type, 64, double_quant)
                dequantize(qw, dtype)
        for weight, quant_type, blocksize in ((4096, "nf4", 64), (4096, "fp4", 64), (65, "nf4", 64), (4096, "nf4", 4096)):
            quantize(torch.empty(4096, weight, dtype=dtype, device="meta"), quant_type, blocksize, True)
        dequantize(meta_weight(33, 65, "nf4", 64, True), dtype)
        for N, K in SHAPES:
            qw = meta_weight(N, K, "nf4", 64, True)
            for M in ROWS:
                x, dy = (torch.empty(M, n, dtype=dtype, device="meta") for n in (K, N))
                qlora_linear(x, qw, None, None, 1.0, None, 0.0, None)
                yield
                for r in RANKS if M in (1, 256, 4096) and N == 4096 else (16, 64):
                    A, B = torch.empty(r, K, dtype=dtype, device="meta"), torch.empty(N, r, dtype=dtype, device="meta")
                    _, h = qlora_linear(x, qw, A, B, 2.0, None, 0.0, None)
                    if M >= 16:
                        qlora_linear_backward(dy, x, h, qw, A, B, 2.0, 0.0, None, (True, True, True, False))
                    yield
        # what the shapes above leave out: dropout, bias, float32 adapters
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        A, B = torch.empty(16, 4096, device="meta"), torch.empty(4096, 16, device="meta")
        bias = torch.empty(4096, dtype=dtype, device="meta")
        qw = meta_weight(4096, 4096, "nf4", 64, False)
        for M in (16, 256, 4096):
            x = torch.empty(M, 4096, dtype=dtype, device="meta")
            for p in (0.0, 0.1):
                _, h = qlora_linear(x, qw, A, B, 2.0, bias, p, seed if p else None)
                qlora_linear_backward(x, x, h, qw, A, B, 2.0, p, seed if p else None, (True, True, True, True))
                yield
    absmax, absmax2, code2, offset = (t for t in meta_weight(4096, 4096, "nf4", 64, True).op_args()[1:5])
    decode_absmax(absmax, absmax2, code2, offset)


def meta_weight(N: int, K: int, quant_type: str, blocksize: int, double_quant: bool) -> QuantizedWeight:
    """A weight without data."""

    def empty(n: int | tuple[()], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    n_blocks = -(N * K // -blocksize)
    packed = empty((N * K + 1) // 2, torch.uint8)
    if not double_quant:
        return QuantizedWeight(packed, empty(n_blocks), None, None, None, (N, K), torch.bfloat16, quant_type, blocksize)
    scales = empty(n_blocks, torch.uint8), empty(-(n_blocks // -BLOCKSIZE2)), empty(256), empty(())
    return QuantizedWeight(packed, *scales, (N, K), torch.bfloat16, quant_type, blocksize)


def build_of(launch: Launch) -> Build:
    """The specialization that Triton's JIT would make of a launch: argument types, constants, divisibility by 16."""
    fn = launch.kernel
    fixed = {fn.arg_names.index(n) if isinstance(n, str) else n for n in fn.do_not_specialize}
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    aligned: list[int] = []
    for i, (name, value) in enumerate(zip(fn.arg_names, launch.args, strict=False)):
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = POINTERS[value.dtype]
            aligned.append(i)
        elif isinstance(value, bool) or value is None:
            constants.append((name, value))
        elif isinstance(value, int):
            if value == 1 and i not in fixed:
                constants.append((name, value))
            else:
                kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if value % 16 == 0 and i not in fixed:
                    aligned.append(i)
        else:
            kind = "fp32"
        signature.append((name, kind))
    for name in fn.arg_names[len(launch.args) :]:
        signature.append((name, "constexpr"))
        constants.append((name, launch.meta[name]))
    return Build(fn, tuple(signature), tuple(constants), tuple(aligned), tuple(launch.config.options.items()))


def compile_build(build: Build, arch: int) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
    source = ASTSource(build.kernel, dict(build.signature), dict(build.constants), attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "-res-usage", f.name)
        sass = _tool("nvdisasm", "-c", f.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    assert found, usage
    lines = instructions(sass)
    matrix = next((k for k in MATRIX if any(k in op for _, op in lines)), "-")
    weights = _weights_per_lane(build)
    return Compiled(
        build,
        arch,
        int(found[1]),
        int(found[2]),
        sum(op.startswith(("LDL", "STL")) for _, op in lines),
        compiled.metadata.shared,
        matrix,
        len(lines),
        None if weights is None else len(main_loop(sass, lines)) / weights,
    )


def _tool(name: str, *args: str) -> str:
    import triton.backends.nvidia as nvidia

    done = subprocess.run([Path(nvidia.__file__).parent / "bin" / name, *args], capture_output=True, text=True)
    return done.stdout + done.stderr


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, opcode and operands) of each machine instruction, predicates removed."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", sass)
    return [(int(address, 16), op) for address, op in found]


def main_loop(sass: str, lines: list[tuple[int, str]]) -> list[str]:
    """The instructions of the innermost loop with the most byte permutes: the one that decodes."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    pending: list[str] = []
    for line in sass.splitlines():
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

    bodies = [body(a) for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] and _prmts(body(b)) for b in loops)]
    return max(bodies, key=_prmts, default=[op for _, op in lines])


def _prmts(ops: list[str]) -> int:
    return sum(op.startswith("PRMT") for op in ops)


def _weights_per_lane(build: Build) -> float | None:
    constants = dict(build.constants)
    lanes = 32 * dict(build.options)["num_warps"]
    if build.name in ("linear_small", "linear_fused", "dx_fused"):
        return constants["BLOCK_N"] * constants["BLOCK_K"] / lanes
    if build.name == "dequantize_groups":
        return constants["N_GROUPS"] * constants["GROUP"] / lanes
    return None
