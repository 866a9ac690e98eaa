"""Layers that a model calls on the same input, computed in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .autograd import linears
from .layer import Layer


class Groupable(Protocol):
    """A layer that an `InputGroup` may hold."""

    in_features: int
    weight: Any
    compute_dtype: torch.dtype | None
    group: InputGroup | None

    def as_layer(self) -> Layer: ...


_Waiting = tuple[Tensor | None, int | None, bool, dict[Groupable, Tensor]]
_NOTHING: _Waiting = (None, None, False, {})


class InputGroup:
    """Layers that a model calls one after another on the same x: the first call computes all of them from one read of x, the
    others pick up their results.  A layer called on another x, or called twice, computes anew.  From the first to the last of
    these calls the layers must stay as they are.

    Args:
        layers: at least two, of the same in_features, device and compute_dtype.

    Raises:
        ValueError: the layers can't share an input.
    """

    def __init__(self, layers: Sequence[Groupable]) -> None:
        kinds = {(layer.in_features, layer.weight.device, layer.compute_dtype) for layer in layers}
        if len(layers) < 2 or len(kinds) != 1:
            raise ValueError(f"layers must be two or more of one in_features, device and compute_dtype, got {list(layers)}")
        self.layers = tuple(layers)
        self._waiting = _NOTHING  # x, its version, whether gradients are recorded, and the results
        for layer in layers:
            layer.group = self

    def compute(self, layer: Groupable, x: Tensor) -> Tensor:
        of, version, with_grad, ys = self._waiting  # read at once: another thread may put its own there
        y = None
        if of is x and with_grad is torch.is_grad_enabled() and version == _version(x):
            y = ys.pop(layer, None)
        if y is None:
            layers = [one for one in self.layers if one.compute_dtype == layer.compute_dtype]
            if layer not in layers:  # a replica of one
                layers = [layer]
            results = linears(cast(x, layer.compute_dtype), [one.as_layer() for one in layers])
            ys = dict(zip(layers, results, strict=True))
            y = ys.pop(layer)
            self._waiting = x, _version(x), torch.is_grad_enabled(), ys
        if not ys:
            self._waiting = _NOTHING
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_waiting": _NOTHING}


def _version(x: Tensor) -> int | None:
    """How often x was written to, where that is counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)
