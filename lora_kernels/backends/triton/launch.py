"""The one place that launches kernels, and that can list launches instead of doing them.

Triton compiles a kernel once for each combination of dtypes, flags, tile and divisibility by 16 of its integers, and keeps it;
nothing is tuned or synchronised in a call.  Kernels run on the current stream of the device of their arguments.

What Triton asks of each of some 35 arguments on every call costs the host more than the call of the driver, so the compiled
kernels are also kept here, by what they were compiled for, and launched directly.
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
from .settings import Config, pick_config
from .settings.tables import entries_of, nearest
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
    gpu: str
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def recording(arch: int, gpu: str = "") -> Iterator[list[Launch]]:
    """Lists the launches made inside the block, for a GPU of compute capability `arch`, instead of doing them.

    Meant for tensors on the meta device: the settings, flags and argument types are those of real calls.  `gpu`: the GPU
    whose table of measured settings is used.
    """
    global _recording
    _recording = Recording(arch, gpu, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Compiled kernels and their constants in order, by device, kernel, setting, constants and arguments."""
MOST_COMPILED = 1 << 14


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], config: Config) -> None:
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta, config))
    elif not all(grid):
        return
    elif not has_ptx():  # the interpreter; AMD, where Triton looks at more than dtype and alignment of a tensor
        kernel[grid](*args, **meta, **config.options)
    else:
        kinds = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
        key = (args[0].device, kernel, config, *meta.values(), *kinds)
        if key in _compiled:
            compiled, constants = _compiled[key]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
        else:
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            compiled = kernel[grid](*args, **meta, **config.options)
            _compiled[key] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one for launches, if it isn't."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# ---- settings

_forced: dict[str, Config] = {}


@contextmanager
def forcing(**configs: Config) -> Iterator[None]:
    """Every launch of the ops named in the block uses the setting given: for the tuner and for tests."""
    global _forced
    before, _forced = _forced, _forced | configs
    try:
        yield
    finally:
        _forced = before


def config_of(op: str, M: int, N: int, K: int, r: int, device: torch.device) -> Config:
    """How kernel `op` is launched on `device`: as measured there, else as `pick_config` says."""
    if op in _forced:
        return _forced[op]
    return _config(op, M, N, K, r, *_gpu_of(device))


def capability(device: torch.device) -> int:
    """Compute capability (major * 10 + minor) that kernels are launched on."""
    return _gpu_of(device)[0]


def _gpu_of(device: torch.device) -> tuple[int, str]:
    return (_recording.arch, _recording.gpu) if _recording is not None else _gpu(device)


@functools.lru_cache(maxsize=1 << 14)
def _config(op: str, M: int, N: int, K: int, r: int, arch: int, gpu: str) -> Config:
    return nearest(entries_of(gpu), op, M, N, K, r) or pick_config(op, M, N, K, r, arch)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, str]:
    """Compute capability as major * 10 + minor, and name; 90 for the interpreter and for other vendors."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 90, ""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor, torch.cuda.get_device_name(device)


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
    if (qw.packed.is_contiguous() and qw.packed.data_ptr() % 16) or qw.numel >= 1 << 34:
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
