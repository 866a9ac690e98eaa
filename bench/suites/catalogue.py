"""The suites by name: their order, their lines, and how long a line is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..measure import Effort
from ..suite import Line
from . import layer, model, weight

SUITES = ("train_step", "decode", "train_layer", "forward", "dequantize", "quantize", "decode_absmax", "memory")
"""Those of `all`."""
GPU_ORDER = ("dequantize", "train_layer", "forward", "train_step", "memory", "quantize", "decode_absmax", "decode")
"""On a GPU, where the time may be up before all is measured: what tells most first."""
GRID = "grid"
"""Every shape at every number of tokens and threads, against two rivals; seven minutes more."""
MODEL_SUITES = ("train_step", "decode")


def lines_of(
    suite: str,
    device: torch.device,
    quick: bool,
    net: str | None = None,
    layers: int | None = None,
    batch: int = 2,
    length: int = 16,
) -> Sequence[Line]:
    """The lines of every suite but memory, which has none.  `net`, `layers`, `batch` and `length` are for whole models."""
    if suite in MODEL_SUITES:
        models = [(net, layers)] if net else default_models(device, quick)
        return [line for m, n in models for line in model.lines(suite, device, m, layers or n, quick, batch, length)]
    if suite in weight.CLASSES:
        return weight.lines(suite, device, quick)
    return layer.lines(suite, device, quick)


def default_models(device: torch.device, quick: bool) -> list[tuple[str, int | None]]:
    """A shape and how many of its layers."""
    if quick:
        return [("tiny", None)]
    return [("smollm2-135m", None)] if device.type == "cpu" else [("llama-3.2-1b", None), ("llama-3.1-8b", 8)]


def effort_of(suite: str, device: torch.device, seconds: float) -> Effort:
    """`seconds` is the time that a contender gets on one line."""
    if suite in MODEL_SUITES:  # a step takes seconds: few rounds, one step each
        return Effort(10.0, 5, 9, 1.0)
    if suite == GRID:
        return Effort(1.5 * seconds, 3, 15)
    if device.type == "cuda":  # events are steadier than the clock of a shared CPU: shorter rounds will do
        return Effort(seconds, round_ms=2.0)
    return Effort(seconds)


def problems(device: torch.device) -> list[tuple[Line, str]]:
    """Every small line of one weight or layer with each of its contenders, for tests."""
    suites = (*weight.CLASSES, "forward", "train_layer")
    return [(line, name) for suite in suites for line in lines_of(suite, device, quick=True) for name in line.names]
