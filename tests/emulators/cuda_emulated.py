"""The CUDA ops of csrc/cuda on CPU tensors: the .cu files, compiled by g++ and run by tests/emulators/cuda_emulator.

Has the functions of a backend, so that whatever judges a backend judges these.  The library is compiled once for each state
of the sources and kept in the temporary directory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.formats import DYNAMIC_MAP, QuantizedWeight, format_of
from lora_kernels.layer import Layer

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g0",
    "-fPIC",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-I",
    str(ROOT / "tests/emulators/cuda_emulator"),
]
TRAPS = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # in kernels, where the emulator reports them
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


EMULATOR = ROOT / "tests/emulators/cuda_emulator"


@functools.cache
def library() -> ctypes.CDLL:
    lib = build([*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/formats.cpp", EMULATOR / "harness.cpp"])
    lib.emulator_error.restype = ctypes.c_char_p
    return lib


def build(sources: list[Path]) -> ctypes.CDLL:
    """The sources and the emulator as a library; every object is compiled once for each state of itself and the headers."""
    folder = Path(tempfile.gettempdir()) / f"lora_kernels_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    headers = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh"), *EMULATOR.glob("*.h")])
    common = CXX + " ".join(FLAGS + TRAPS) + "".join(p.read_text() for p in headers)

    def make(name: str, key: str, *command: str) -> Path:
        target = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not target.exists():
            run([CXX, *command, "-o", f"{target}.{os.getpid()}"])
            os.replace(f"{target}.{os.getpid()}", target)
        return target

    def compile_one(source: Path) -> Path:
        traps = TRAPS if source.suffix == ".cu" else []
        return make(source.name, common + source.read_text(), *FLAGS, *traps, "-c", "-x", "c++", str(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, EMULATOR / "emulator.cpp"]))
    return ctypes.CDLL(str(make("library", "".join(o.name for o in objects), "-shared", *map(str, objects))))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def device(capability: int = 80, processors: int = 4) -> None:
    """What the host code is told about the GPU."""
    library().emulator_device(capability, processors)


class WeightArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax_u8", "absmax2", "code2", "offset")),
        *((name, ctypes.c_int64) for name in ("N", "K", "blocksize")),
        ("quant_type", ctypes.c_char_p),
    )


class AdapterArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "AB"),
        *((name, ctypes.c_int) for name in ("A_dtype", "B_dtype")),
        ("r", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_void_p),
    )


def call(function: str, *arguments: Any) -> None:
    """Calls a function of harness.cpp: tensors as pointers, integers as int64, structures by reference."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr() or None)
        if isinstance(argument, ctypes.Structure):
            return ctypes.byref(argument)
        return ctypes.c_int64(argument) if isinstance(argument, int) else argument

    run_op = getattr(library(), f"emulate_{function}")
    run_op.restype = ctypes.c_bool
    if not run_op(*map(convert, arguments)):
        raise RuntimeError(library().emulator_error().decode())


def pointer(t: Tensor | None) -> int | None:
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def defined(quant_type: str) -> bytes:
    """The name of a format, which the library has been told."""
    what = format_of(quant_type)
    arrays = (ctypes.c_float * 16)(*what.code), (ctypes.c_uint8 * 16)(*what.order)
    sizes = (ctypes.c_int64 * len(what.blocksizes))(*what.blocksizes)
    call("define_format", quant_type.encode(), *arrays, sizes, ctypes.c_int(len(sizes)))
    return quant_type.encode()


def weight_arguments(qw: QuantizedWeight, shape: tuple[int, int] | None = None) -> WeightArguments:
    N, K = shape or (1, qw.numel)
    return WeightArguments(
        pointer(qw.codes()),
        None if qw.double_quant else pointer(qw.absmax),
        pointer(qw.absmax) if qw.double_quant else None,
        pointer(qw.absmax2),
        pointer(qw.code2),
        pointer(qw.offset),
        N,
        K,
        qw.blocksize,
        defined(qw.quant_type),
    )


def adapter_arguments(layer: Layer) -> AdapterArguments:
    A, B = layer.lora_A, layer.lora_B
    if A is None or B is None:
        return AdapterArguments(None, None, 0, 0, 0, layer.scaling, 0.0, None)
    dtypes, dropout = (DTYPES[A.dtype], DTYPES[B.dtype]), (layer.dropout_p, pointer(layer.seed))
    return AdapterArguments(pointer(A), pointer(B), *dtypes, layer.r, layer.scaling, *dropout)


# ---- the ops


def quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> tuple[Any, ...]:
    n = weight.numel()
    packed, absmax = torch.empty((n + 1) // 2, dtype=torch.uint8), torch.empty(-(n // -blocksize))
    bad = torch.zeros(1, dtype=torch.int32)
    call("quantize", weight.contiguous(), DTYPES[weight.dtype], n, defined(quant_type), blocksize, packed, absmax, bad)
    if bad:
        raise ValueError("weight contains NaN or infinity")
    if not double_quant:
        return packed, absmax, None, None
    offset, absmax_u8 = absmax.mean(), torch.empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(-(absmax.numel() // -256))
    call("quantize_absmax", absmax, absmax.numel(), offset, DYNAMIC_MAP, absmax_u8, absmax2)
    return packed, absmax_u8, absmax2, offset


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    out = torch.empty(absmax.numel())
    arguments = (pointer(t) for t in (absmax, absmax2, code2, offset))
    call("decode_absmax", WeightArguments(None, None, *arguments, 1, absmax.numel(), 1, None), out)
    return out


def dequantize(qw: QuantizedWeight, dtype: torch.dtype, begin: int = 0, end: int | None = None) -> Tensor:
    """Elements [begin, end) alone come back flat."""
    out = torch.empty((qw.numel if end is None else end) - begin, dtype=dtype)
    call("dequantize", weight_arguments(qw), begin, begin + out.numel(), DTYPES[dtype], out)
    return out.view(qw.shape) if out.numel() == qw.numel else out


def qlora_linear(x: Tensor, layers: Sequence[Layer], product: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """`product`: False leaves x Wᵀ to the caller."""
    ys, hs = [], []
    for one in layers:
        (M, K), N, bias = x.shape, one.shape[0], one.bias
        y, h = x.new_empty(M, N), x.new_empty(M, one.r)
        bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        arguments = (weight_arguments(one.weight, (N, K)), adapter_arguments(one), bias, bias_dtype)
        call("qlora_linear", DTYPES[x.dtype], M, x, *arguments, y, h, product)
        ys.append(y)
        hs.append(h)
    return ys, hs


def qlora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    product: bool = True,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """`product`: False leaves dy W to the caller.  dx of several layers is summed in float32, as csrc/host.cpp has it."""
    (M, _), K, several = dys[0].shape, layers[0].shape[1], len(layers) > 1
    dx = None
    if need_dx:
        dx = torch.zeros(M, K) if several else dys[0].new_empty(M, K)
    dAs, dBs, dbiases = [], [], []
    for dy, h, one, (need_dA, need_dB, need_dbias) in zip(dys, hs, layers, needs, strict=True):
        dA = torch.empty_like(one.lora_A) if need_dA and one.lora_A is not None else None
        dB = torch.empty_like(one.lora_B) if need_dB and one.lora_B is not None else None
        dbias = torch.empty(one.shape[0]) if need_dbias else None
        arguments = (M, dy, x, h, weight_arguments(one.weight, one.shape), adapter_arguments(one))
        call("qlora_linear_backward", DTYPES[dy.dtype], *arguments, several, dx, dA, dB, dbias, product)
        dAs.append(dA)
        dBs.append(dB)
        dbiases.append(dbias)
    return dx if dx is None else dx.to(dys[0].dtype), dAs, dBs, dbiases
