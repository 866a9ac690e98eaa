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

from .settings import Config, Gpu, Problem, pick_config
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
    gpu: Gpu
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def recording(gpu: Gpu) -> Iterator[list[Launch]]:
    """Lists the launches made inside the block, for `gpu`, instead of doing them.

    Meant for tensors on the meta device: the settings, flags and argument types are those of real calls.
    """
    global _recording
    _recording = Recording(gpu, [])
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
        found = _compiled.get(key)
        if found is not None:
            compiled, constants = found
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


def config_of(problem: Problem, device: torch.device) -> Config:
    """How a problem is launched on `device`."""
    return pick_config(problem, gpu_of(device))


def gpu_of(device: torch.device) -> Gpu:
    """What kernels are launched on: the GPU that launches are recorded for, or the one at hand."""
    return _recording.gpu if _recording is not None else current_gpu(device)


@functools.cache
def current_gpu(device: torch.device) -> Gpu:
    """The GPU at hand, whatever is recorded."""
    if device.type != "cuda":
        return Gpu("nvidia", 90)  # in the interpreter, the settings that most tests have seen
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return Gpu("amd", 0, name)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu("nvidia", major * 10 + minor, name)


def has_ptx() -> bool:
    """Whether the kernels may use NVIDIA's instructions."""
    vendor = _recording.gpu.vendor if _recording is not None else "amd" if torch.version.hip is not None else "nvidia"
    return not INTERPRET.value and vendor == "nvidia"


def rank_block(r: int, most: int) -> int:
    """The tile that holds r ranks, or `most` of them: a power of two, at least the 16 that a dot takes."""
    return min(max(16, triton.next_power_of_2(max(r, 1))), most)
