"""Every Triton kernel with the settings it is shipped with, compiled for a GPU that need not be there.

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

from lora_kernels.backends.triton import decode_absmax, dequantize, qlora_linear, qlora_linear_backward, quantize
from lora_kernels.backends.triton.launch import Launch, recording
from lora_kernels.backends.triton.settings import Config, Gpu, forcing, tables
from lora_kernels.backends.triton.tiles import table_asm
from lora_kernels.formats import BLOCKSIZE2, FORMATS, QuantizedWeight
from lora_kernels.layer import Layer
from lora_kernels.testing import Case

from .sass import Compiled, instructions, main_loop, opcodes

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (576, 576), (1536, 576), (576, 1536))
"""(N, K) of the layers of an 8B and of a 135M model."""
ROWS = (1, 16, 17, 64, 256, 512, 4096)
GLUON = ((256, 4), (128, 4))
"""block_m and stages of the gluon path."""
RANKS = (8, 16, 32, 64, 256)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@functools.cache
def _formats() -> dict[Any, str]:
    """The format of each constant by which a kernel is compiled for one."""
    permuted = {table_asm(f.code, dtype): name for name, f in FORMATS.items() for dtype in ("bf16", "f16")}
    return permuted | {f.midpoints: name for name, f in FORMATS.items()}


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
        """Dtypes, tile, flags, format, and the sizes that are no multiple of 16, for a table."""
        types = dict(self.signature)
        dtypes = {t[1:] for t in types.values() if t in ("*fp16", "*bf16")} or {"fp32"}
        factors = {t[1:] for name in ("A", "B", "f", "factor") if (t := types.get(name, "")) in POINTERS.values()}
        hidden = ("A", "B", "PTX", "ORDER")
        shown = {k: v for k, v in self.constants if v is not None and v is not False and not k.islower() and k not in hidden}
        flags = [_formats().get(v) or (k if v is True else f"{k}={v}") for k, v in shown.items()]
        aligned = {self.signature[i][0] for i in self.aligned}
        odd = [f"{k}%16" for k in ("N", "K", "C", "r") if types.get(k, "constexpr") != "constexpr" and k not in aligned]
        options = dict(self.options)
        words = [*sorted(dtypes), *(f"adapter:{t}" for t in sorted(factors - dtypes)), *flags, *odd]
        return " ".join([*words, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])


@functools.cache
def shipped(arch: int) -> list[Build]:
    """Every kernel that the ops launch on sm_`arch`, once for each way it is compiled, tables of measured GPUs included."""
    launches: list[Launch] = []
    for gpu in ("", *tables.tuned(arch)):
        with recording(Gpu("nvidia", arch, gpu)) as found:
            for case in _cases():
                _run(case)
            _run_group(Case(17, 4096, 4096), Case(4096, 4096, 4096), Case(4096, 4096, 4096, dropout=0.1))
            _run_storage()
        launches += found
    with recording(Gpu("nvidia", arch)) as found:
        for block_m, stages in GLUON:
            with forcing(qlora_linear=Config("gluon", block_m, 128, 64, warps=8, stages=stages)):
                for case in _gluon_cases():
                    x, _, layer = inputs(case)
                    qlora_linear(x, [layer])
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
    x, dy, layer = inputs(case)
    _, hs = qlora_linear(x, [layer])
    if case.M >= 16:
        needs = (case.r > 0, case.r > 0, case.bias)
        qlora_linear_backward([dy], x, hs if case.r else [None], [layer], True, [needs])


def _run_group(*cases: Case) -> None:
    """Each case twice, on the same input."""
    for case in cases:
        x, dy, layer = inputs(case)
        _, hs = qlora_linear(x, [layer, layer])
        qlora_linear_backward([dy, dy], x, hs, [layer, layer], True, [(True, True, False)] * 2)


def _run_storage() -> None:
    """quantize, dequantize and decode_absmax."""
    for quant_type, blocksize, columns in (("nf4", 64, 4096), ("fp4", 64, 4096), ("nf4", 64, 65), ("nf4", 4096, 4096)):
        quantize(torch.empty(4096, columns, dtype=torch.bfloat16, device="meta"), quant_type, blocksize, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for weight in (("nf4", 64, True), ("fp4", 64, True), ("nf4", 64, False), ("nf4", 256, True)):
            dequantize(meta_weight(4096, 4096, *weight), dtype)
    dequantize(meta_weight(33, 65, "nf4", 64, True), torch.bfloat16)
    qw = meta_weight(4096, 4096, "nf4", 64, True)
    decode_absmax(qw.absmax, qw.absmax2, qw.code2, qw.offset)


def inputs(case: Case) -> tuple[Tensor, Tensor, Layer]:
    """x, dy and the layer of a case, without data."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qw = meta_weight(case.N, case.K, case.quant_type, case.blocksize, case.double_quant)
    A = empty(case.r, case.K, dtype=case.lora_dtype) if case.r else None
    B = empty(case.N, case.r, dtype=case.lora_dtype) if case.r else None
    bias = empty(case.N, dtype=case.lora_dtype) if case.bias else None
    seed = empty(1, dtype=torch.int64) if case.dropout else None
    layer = Layer.of(qw, A, B, case.scaling, bias, case.dropout, seed)
    return empty(case.M, case.K), empty(case.M, case.N), layer


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
    lines, weights = instructions(text), _weights_per_lane(build)
    ops = opcodes(lines)
    return Compiled(
        arch,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=ops["LDL"] + ops["STL"],
        shared=compiled.metadata.shared,
        instructions=ops,
        per_weight=None if weights is None else len(main_loop(text, lines)) / weights,
    )


def _tool(name: str, *args: str) -> str:
    import triton.backends.nvidia as nvidia

    done = subprocess.run([Path(nvidia.__file__).parent / "bin" / name, *args], capture_output=True, text=True)
    return done.stdout + done.stderr


def _weights_per_lane(build: Build) -> float | None:
    constants = dict(build.constants)
    lanes = 32 * dict(build.options)["num_warps"]
    if build.name in ("linear_small", "linear_fused", "linear_gluon", "dx_fused"):
        return constants["BLOCK_N"] * constants["BLOCK_K"] / lanes
    if build.name == "dequantize_groups":
        return constants["N_GROUPS"] * constants["GROUP"] / lanes
    return None
