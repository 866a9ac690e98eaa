"""Which backend computes an op: the first one, in the order below, that can run on the device.

A backend is a module that has a function for every op and `unavailable(device)`, which says why it can't run there, or None.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import env
from ..formats import QuantizedWeight

Layer = tuple[QuantizedWeight, Tensor | None, Tensor | None, float, Tensor | None, float, Tensor | None]
"""What `qlora_linear` takes after x: weight, lora_A, lora_B, scaling, bias, dropout_p, seed."""
FlatLayer = tuple[Any, ...]
"""A `Layer` with the parts of its weight (`QuantizedWeight.op_args`) in place of the weight."""

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


def pick(device: torch.device) -> ModuleType:
    """The backend that computes on `device`.

    Raises:
        RuntimeError: a backend is forced that can't run there.
    """
    name = forced()
    if name is not None:
        reason = load(name).unavailable(device)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is forced but can't run on {device}: {reason}")
        return load(name)
    for name in order(device):
        backend = load(name)
        if backend.unavailable(device) is None:
            break
    return backend


def choices(device: torch.device) -> list[tuple[str, str | None]]:
    """Each backend of `device`, best first, with the reason why it can't run, or None."""
    return [(name, load(name).unavailable(device)) for name in order(device)]


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
