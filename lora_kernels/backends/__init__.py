"""Which backend computes an op: the first one, in the order below, that has the op and can run on the device.

A backend is a module that has `unavailable(device)`, which says why it can't run there, or None, and some of the functions of
`OPS`, as `reference` defines them.  A single layer is a list of one.  It may also have

- `lacks(want)`: why it can't compute with a format or a kind of layer (see `lora_kernels.layer.wants`), or None;
- `qlora_linear_autograd`: the linear layer with its gradient (see `lora_kernels.autograd`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .. import env

OPS = ("quantize", "decode_absmax", "dequantize", "qlora_linear", "qlora_linear_backward")
ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
"""Backends of each device type, best first; other devices have `reference` alone."""
NAMES = ("triton", "native", "reference")

_forced: str | None = None


@functools.cache
def order(device: torch.device) -> tuple[str, ...]:
    return ORDER.get(device.type, ("reference",))


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def forced() -> str | None:
    """The backend that `use_backend` or LORA_KERNELS_BACKEND forces, or None."""
    name = _forced or env.backend()
    if name is not None and name not in NAMES:
        raise ValueError(f"LORA_KERNELS_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def pick(op: str, device: torch.device, *wants: str) -> ModuleType:
    """The backend that computes `op`, one of `OPS`, on `device`.

    Args:
        wants: what it must know besides, such as the `quant_type` of a weight.

    Raises:
        RuntimeError: a backend is forced that can't.
    """
    name = forced()
    if name is not None:
        if (reason := why_not(name, op, device, *wants)) is not None:
            raise RuntimeError(f"backend {name!r} is forced but can't run on {device}: {reason}")
        return load(name)
    return best(op, device, *wants)


@functools.cache
def best(op: str, device: torch.device, *wants: str) -> ModuleType:
    """The first backend of `device` that can compute `op`: what `pick` gives where none is forced."""
    return load(next(name for name in order(device) if why_not(name, op, device, *wants) is None))


def picked(op: str, device: torch.device, *wants: str) -> str:
    """The name of the backend that `pick` gives."""
    return pick(op, device, *wants).__name__.rpartition(".")[2]


def why_not(name: str, op: str, device: torch.device, *wants: str) -> str | None:
    """Why a backend can't compute `op` on `device`, or None."""
    backend = load(name)
    reason: str | None = backend.unavailable(device)
    if reason is None and not hasattr(backend, op):
        return f"it has no {op}"
    if reason is None and hasattr(backend, "lacks"):
        return next(filter(None, map(backend.lacks, wants)), None)
    return reason


def choices(op: str, device: torch.device, *wants: str) -> list[tuple[str, str | None]]:
    """Each backend of `device`, best first, with the reason why it can't compute `op`, or None."""
    return [(name, why_not(name, op, device, *wants)) for name in order(device)]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes every op inside the `with` block on one backend, in every thread; a call it can't run raises.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
