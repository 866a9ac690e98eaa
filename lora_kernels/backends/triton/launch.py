"""The one place that launches kernels, and that can list launches instead of doing them.

Triton compiles a kernel once for each combination of dtypes, flags, tile and divisibility by 16 of its integers, and keeps it;
nothing is tuned or synchronised in a call.  Kernels run on the current stream of the device of their arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...formats import QuantizedWeight, codebook
from .settings import Config
from .tiles import INTERPRET


@dataclass(frozen=True)
class Launch:
    """A launch as asked for: the kernel, its arguments in order, its constants, its settings."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    config: Config


@dataclass
class Recording:
    arch: int
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Lists the launches made inside the block, for a GPU of compute capability `arch`, instead of doing them.

    Meant for tensors on the meta device: the settings, flags and argument types are those of real calls.
    """
    global _recording
    _recording = Recording(arch, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], config: Config) -> None:
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta, config))
    elif all(grid):
        kernel[grid](*args, **meta, **config.options)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one for launches, if it isn't."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def arch_of(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; 90 for the interpreter and for other vendors."""
    return _recording.arch if _recording is not None else _arch(device)


@functools.cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def has_ptx() -> bool:
    """Whether the kernels may use NVIDIA's instructions."""
    return not INTERPRET.value and torch.version.hip is None


@functools.cache
def constant(name: str, device: torch.device) -> Tensor:
    """The codebook `name` on `device`."""
    return codebook(name).to(device)


# ---- how a weight is passed


def weight_args(qw: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """packed, absmax, code2, absmax2, offset, lut: what the kernels read of a weight they decode to `dtype`.

    `lut` is the codebook in memory, None where the codes are decoded with byte permutes.
    """
    lut = None if has_ptx() and dtype != torch.float32 else constant(qw.quant_type, qw.device)
    scales = (t if t is None else t.contiguous() for t in (qw.absmax, qw.code2, qw.absmax2, qw.offset))
    return qw.codes().contiguous(), *scales, lut


def group_of(qw: QuantizedWeight, multiple: int) -> int:
    """Elements that a kernel decodes with one scale: the largest group that divides both a block and `multiple`, or 0 where
    neither 64 nor 32 does, or the bytes are not aligned, and elements have to be decoded one by one."""
    if (qw.packed.is_contiguous() and qw.packed.data_ptr() % 16) or qw.numel >= 1 << 35:
        return 0
    return next((g for g in (64, 32) if multiple % g == 0 and qw.blocksize % g == 0), 0)


def weight_meta(qw: QuantizedWeight, group: int) -> dict[str, Any]:
    shift = (qw.blocksize // group).bit_length() - 1
    return {
        "GROUP": group,
        "SHIFT": shift,
        "NESTED": qw.double_quant,
        "NF4": qw.quant_type == "nf4",
        "PTX": has_ptx(),
    }


def cdiv(a: int, b: int) -> int:
    return -(a // -b)


def rank_block(r: int, most: int) -> int:
    """The tile that holds r ranks, or `most` of them: a power of two, at least the 16 that a dot takes."""
    return min(max(16, triton.next_power_of_2(r)), most)
