"""Every kernel with the settings it is shipped with, compiled ahead of time for a GPU that need not be there.

`shipped(arch)` runs the real ops on tensors without data and lists what they would launch on that GPU;
`compile_build` compiles one of them and reads registers, spills, shared memory and instructions off the machine code.
Both results are kept in Triton's cache folder, so a build that did not change costs nothing the next time.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from ...formats import BLOCKSIZE2, QuantizedWeight
from ...testing import Case
from .. import Layer
from . import (
    decode_absmax,
    dequantize,
    qlora_linear,
    qlora_linear_backward,
    qlora_linear_group,
    qlora_linear_group_backward,
    quantize,
)
from .launch import Launch, forcing, recording
from .settings import Config, tables

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (576, 576), (1536, 576), (576, 1536))
"""(N, K) of the layers of an 8B and of a 135M model."""
ROWS = (1, 16, 17, 64, 256, 512, 4096)
GLUON = ((256, 4), (128, 4))
"""block_m and stages of the gluon path."""
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
COPIES = ("UTMALDG", "LDGSTS", "LDG")
"""Loads from global memory: by the tensor copy engine, asynchronous to shared memory, to registers."""


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
    def float32(self) -> bool:
        """Whether its products are of float32, which take no matrix instruction."""
        return not any(t in ("*fp16", "*bf16") for _, t in self.signature)

    @property
    def setting(self) -> str:
        """Dtypes, tile, flags, and the sizes that are no multiple of 16, for a table."""
        types = dict(self.signature)
        dtypes = {t[1:] for t in types.values() if t in ("*fp16", "*bf16")} or {"fp32"}
        factors = {t[1:] for name in ("A", "B", "f", "factor") if (t := types.get(name, "")) in POINTERS.values()}
        shown = {k: v for k, v in self.constants if v is not None and not k.islower() and k not in ("A", "B", "PTX")}
        flags = [f"{k}={v}" if not isinstance(v, bool) else k for k, v in shown.items() if v is not False]
        aligned = {self.signature[i][0] for i in self.aligned}
        odd = [f"{k}%16" for k in ("N", "K", "C", "r") if types.get(k, "constexpr") != "constexpr" and k not in aligned]
        options = dict(self.options)
        words = [*sorted(dtypes), *(f"adapter:{t}" for t in sorted(factors - dtypes)), *flags, *odd]
        return " ".join([*words, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a build for one architecture.

    Attributes:
        stack: bytes of stack frame a thread.
        spills: loads and stores of local memory.
        copies: how many instructions of each of `COPIES`.
        per_weight: instructions of the main loop and lane for each weight it decodes, or None where it decodes none.
    """

    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    copies: dict[str, int]
    instructions: int
    per_weight: float | None

    def breaches(self) -> list[str]:
        """A stack frame counts even without a spill: what lies there is read and written through memory."""
        out = []
        if self.stack or self.spills:
            out.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            out.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_MEMORY[self.arch]}")
        return out


@functools.cache
def shipped(arch: int) -> list[Build]:
    """Every kernel that the ops launch on sm_`arch`, once for each way it is compiled, tables of measured GPUs included."""
    launches: list[Launch] = []
    for gpu in ("", *tables.tuned(arch)):
        with recording(arch, gpu) as found:
            for case in _cases():
                _run(case)
            _run_group(Case(17, 4096, 4096), Case(4096, 4096, 4096), Case(4096, 4096, 4096, dropout=0.1))
            _run_storage()
        launches += found
    with recording(arch) as found:
        for block_m, stages in GLUON:
            with forcing(qlora_linear=Config("gluon", block_m, 128, 64, warps=8, stages=stages)):
                for case in _gluon_cases():
                    x, _, layer = _inputs(case)
                    qlora_linear(x, *layer)
    launches += [launch for launch in found if launch.kernel.__name__ == "linear_gluon"]
    return list(dict.fromkeys(map(build_of, launches)))


def _cases() -> Iterator[Case]:
    """The benchmark's layers, then each thing they leave out by itself."""
    for N, K in SHAPES:
        for M in ROWS:
            for r in (0, *RANKS) if (N, K) == (4096, 4096) and M in (1, 256, 4096) else (0, 16, 64):
                yield Case(M, N, K, r=r)
    for M in (16, 64, 256, 4096):
        case = Case(M, 4096, 4096, r=16)
        yield replace(case, bias=True)
        yield replace(case, dropout=0.1)
        yield replace(case, lora_dtype=torch.bfloat16)
        yield replace(case, dtype=torch.float16)
        yield replace(case, quant_type="fp4")
        yield replace(case, double_quant=False)
        yield replace(case, blocksize=32)
        yield replace(case, blocksize=256)
    yield Case(64, 4096, 4096, r=16, dtype=torch.float32, dropout=0.1)
    yield Case(64, 65, 65, r=3)


def _gluon_cases() -> Iterator[Case]:
    """What no setting but a measured one asks for, where it can be launched at all."""
    case = Case(512, 4096, 4096, r=16)
    yield case
    yield replace(case, r=0)
    yield replace(case, r=3, bias=True)
    yield replace(case, dtype=torch.float16)
    yield replace(case, lora_dtype=torch.bfloat16)
    yield replace(case, quant_type="fp4")
    yield replace(case, double_quant=False)
    yield replace(case, blocksize=256)


def _run(case: Case) -> None:
    """Forward, and backward where layers are trained: not with a few rows."""
    x, dy, (qw, A, B, scaling, bias, p, seed) = _inputs(case)
    _, h = qlora_linear(x, qw, A, B, scaling, bias, p, seed)
    if case.M >= 16:
        needs = (True, case.r > 0, case.r > 0, case.bias)
        qlora_linear_backward(dy, x, h if case.r else None, qw, A, B, scaling, p, seed, needs)


def _run_group(*cases: Case) -> None:
    """Each case twice, on the same input."""
    for case in cases:
        x, dy, layer = _inputs(case)
        _, hs = qlora_linear_group(x, [layer, layer])
        qlora_linear_group_backward([dy, dy], x, hs, [layer, layer], True, [(True, True, False)] * 2)


def _run_storage() -> None:
    """quantize, dequantize and decode_absmax."""
    for quant_type, blocksize, columns in (("nf4", 64, 4096), ("fp4", 64, 4096), ("nf4", 64, 65), ("nf4", 4096, 4096)):
        quantize(torch.empty(4096, columns, dtype=torch.bfloat16, device="meta"), quant_type, blocksize, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for weight in (("nf4", 64, True), ("fp4", 64, True), ("nf4", 64, False), ("nf4", 256, True)):
            dequantize(meta_weight(4096, 4096, *weight), dtype)
    dequantize(meta_weight(33, 65, "nf4", 64, True), torch.bfloat16)
    absmax, absmax2, code2, offset = (t for t in meta_weight(4096, 4096, "nf4", 64, True).op_args()[1:5])
    decode_absmax(absmax, absmax2, code2, offset)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Layer]:
    """x, dy and the layer of a case, without data."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qw = meta_weight(case.N, case.K, case.quant_type, case.blocksize, case.double_quant)
    A = empty(case.r, case.K, dtype=case.lora_dtype) if case.r else None
    B = empty(case.N, case.r, dtype=case.lora_dtype) if case.r else None
    bias = empty(case.N, dtype=case.lora_dtype) if case.bias else None
    seed = empty(1, dtype=torch.int64) if case.dropout else None
    return empty(case.M, case.K), empty(case.M, case.N), (qw, A, B, case.scaling, bias, case.dropout, seed)


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

    attrs = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
    if build.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    source = ASTSource(build.kernel, dict(build.signature), dict(build.constants), attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))
    cache = get_cache_manager(compiled.metadata.hash)
    kept = cache.get_file("disassembly.txt")
    if kept is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            text = _tool("cuobjdump", "-res-usage", f.name) + _tool("nvdisasm", "-c", f.name)
        cache.put(text, "disassembly.txt", binary=False)
    else:
        text = Path(kept).read_text()
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    assert found, text
    lines = instructions(text)
    matrix = next((k for k in MATRIX if any(k in op for _, op in lines)), "-")
    weights = _weights_per_lane(build)
    return Compiled(
        arch,
        int(found[1]),
        int(found[2]),
        sum(op.startswith(("LDL", "STL")) for _, op in lines),
        compiled.metadata.shared,
        matrix,
        {name: sum(op.split(None, 1)[0].split(".")[0] == name for _, op in lines) for name in COPIES},
        len(lines),
        None if weights is None else len(main_loop(text, lines)) / weights,
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
    """The instructions of the innermost loop with the most byte permutes: the one that decodes.

    A loop with asynchronous loads comes first: an odd rank in 16 bits is put together with byte permutes too.
    """
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

    def decodes(ops: list[str]) -> tuple[bool, int]:
        return any(op.startswith("LDGSTS") for op in ops), _prmts(ops)

    return max(bodies, key=decodes, default=[op for _, op in lines])


def _prmts(ops: list[str]) -> int:
    return sum(op.startswith("PRMT") for op in ops)


def _weights_per_lane(build: Build) -> float | None:
    constants = dict(build.constants)
    lanes = 32 * dict(build.options)["num_warps"]
    if build.name in ("linear_small", "linear_fused", "linear_gluon", "dx_fused"):
        return constants["BLOCK_N"] * constants["BLOCK_K"] / lanes
    if build.name == "dequantize_groups":
        return constants["N_GROUPS"] * constants["GROUP"] / lanes
    return None
