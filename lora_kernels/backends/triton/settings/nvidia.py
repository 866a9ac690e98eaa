# ruff: noqa: SIM300 (M and K are sizes, not constants)
"""Floors for NVIDIA GPUs, by compute capability."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import triton

from ..tiles import INTERPRET
from .config import Config, Gpu, Problem, cdiv


@dataclass(frozen=True)
class Arch:
    """What the choice depends on: streaming multiprocessors, and M up to which each path of the linear ops is taken."""

    sms: int
    small: int
    fused: int
    fused_dx: int


ARCHS = {
    80: Arch(sms=108, small=64, fused=256, fused_dx=256),
    86: Arch(sms=84, small=64, fused=256, fused_dx=256),
    89: Arch(sms=128, small=64, fused=256, fused_dx=256),
    90: Arch(sms=132, small=64, fused=384, fused_dx=384),
    100: Arch(sms=148, small=64, fused=256, fused_dx=256),
    103: Arch(sms=148, small=64, fused=256, fused_dx=256),
    120: Arch(sms=170, small=64, fused=256, fused_dx=256),
}
"""By compute capability (major * 10 + minor).  Floors: a fused kernel at 55% of peak beats decode + GEMM up to M = 470 on
sm_90; none of these crossovers has been measured yet."""
UNKNOWN = Arch(sms=64, small=64, fused=128, fused_dx=128)


def floor(problem: Problem, gpu: Gpu) -> Config:
    """The setting of a problem on a GPU that was not measured."""
    op, M, N, K, r, *_ = problem
    cc, arch = gpu.arch, ARCHS.get(gpu.arch, UNKNOWN)
    match op:
        case "quantize":
            return Config(block_n=2048)
        case "dequantize":
            return Config(block_n=64 * 64)
        case "dequantize_elements":  # 64-bit indices take registers
            return Config(block_n=8 * 64)
        case "qlora_linear":
            return _qlora_linear(M, N, K, r, cc, arch)
        case "dx":
            return _dx(M, N, K, cc, arch)
        case "project":
            return _project(M, K, r, cc, arch)
        case "expand":
            return Config("", 64, 128, 64, warps=8, stages=2)
        case "read_once":
            return _read_once(M, N, r, cc, arch)
    return Config(block_n=1024)


def _qlora_linear(M: int, N: int, K: int, r: int, cc: int, arch: Arch) -> Config:
    if M <= arch.small:
        return _small(M, N, K, r, cc, arch)
    if M <= arch.fused:
        if not _asynchronous(cc):
            # 4 warps side by side along N: each decodes its own part of W, 8.6 instructions a weight for 17
            return Config("fused", 64, 128, 64, warps=4)
        # 128 x 128 x 64 with 8 warps leaves room for two programs an SM, and the second one is what hides the decode
        if cdiv(M, 128) * cdiv(N, 128) >= arch.sms:
            return Config("fused", 128, 128, 64, warps=8, registers=128)
        return Config("fused", 128, 64, 64, warps=4)
    return Config("panel")


def _small(M: int, N: int, K: int, r: int, cc: int, arch: Arch) -> Config:
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    shuffle = not _tensor_memory(cc)  # the shuffled operand does not compile for it in Triton 3.6
    fuse_h = block_m == 16 and 0 < r <= 16
    config = Config("small", block_m, 64, 128, warps=4, shuffle=shuffle, fuse_h=fuse_h)
    if block_m == 64 or (_tensor_memory(cc) and (fuse_h or block_m == 32)):
        config = replace(config, block_n=128, warps=8, stages=2 if fuse_h else 3)
    elif block_m == 16 and not fuse_h and K % 256 == 0 and _asynchronous(cc):
        config = replace(config, block_k=256)
    if K < config.block_k:
        config = replace(config, block_k=64 if K >= 64 else 32)
    want = cdiv(4 * arch.sms, cdiv(N, config.block_n))  # at least 4 programs an SM
    return replace(config, split=max(1, min(want, K // (2 * config.block_k), 16)))


def _dx(M: int, N: int, K: int, cc: int, arch: Arch) -> Config:
    if M > arch.fused_dx:
        return Config("panel")
    block_m = 128 if M > 64 and _asynchronous(cc) else 64
    if K >= 128 and (cdiv(M, 128) * cdiv(K, 128) >= arch.sms or not _asynchronous(cc)):
        return Config("fused", block_m, 64, 128, warps=8, registers=128 if block_m == 128 else 0)
    return Config("fused", block_m, 64, 64 if K >= 64 else 32, warps=4)


def _project(M: int, K: int, r: int, cc: int, arch: Arch) -> Config:
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    split = max(1, min(2 * arch.sms // cdiv(M, block_m), K // 512, 32))
    if r <= 64:
        return Config("", block_m, 64, 64, 128, split=split, warps=4, stages=4)
    return Config("", block_m, 128, 64, 128, split=split, warps=8, stages=2 if _tensor_memory(cc) and block_m == 64 else 3)


def _read_once(M: int, N: int, r: int, cc: int, arch: Arch) -> Config:
    block_m = 64 if M > 32 else 32
    # fewer partials of dB, as long as 2 programs an SM are left
    steps = max(1, min(8, cdiv(M, block_m) * cdiv(N, 128) // (2 * arch.sms)))
    return Config("", block_m, 128, steps=steps, warps=4 if r <= 32 and not _asynchronous(cc) else 8)


def _asynchronous(cc: int) -> bool:
    """Whether the tensor cores read operands from shared or tensor memory (sm_90, sm_100), not from registers."""
    return 90 <= cc < 120


def _tensor_memory(cc: int) -> bool:
    """Whether accumulators live in tensor memory (sm_100), from where some tiles come back through spills."""
    return 100 <= cc < 120


# ---- the gluon path


def takes_gluon(config: Config, problem: Problem, gpu: Gpu) -> bool:
    """Whether the gluon path can be launched: on sm_90, with a step of K that is one group of 64."""
    return gpu.arch == 90 and problem.group == config.block_k == 64 and gluon_kernel() is not None


@functools.cache
def gluon_kernel() -> Any:
    """`linear_gluon`, or None: in the interpreter, which has no Gluon, and, with a warning, where this Triton has another Gluon
    than the kernel is written in."""
    if INTERPRET.value:
        return None
    try:
        from ..gluon_linear import linear_gluon
    except (ImportError, AttributeError) as e:
        warnings.warn(f"qlora_linear: no path 'gluon' with Triton {triton.__version__}, 'panel' instead: {e}", stacklevel=2)
        return None
    return linear_gluon
