"""forward, train_layer and memory: one linear layer with its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.testing import Case, Inputs, Results, decode, make_inputs

from . import cases
from .rivals import REGISTRY, Layer, on
from .suite import OURS, Contender, Line, mismatch

SAMPLE = 64
"""Rows of y and dx that are compared with float64; dA and dB are compared in full."""

FORWARD_NAMES = tuple(n for n in REGISTRY if n != "dense+peft")
TRAIN_NAMES = tuple(n for n in REGISTRY if not n.startswith("bnb-inference"))
NO_ADAPTER = ("dense", "bnb-inference")


class LayerLine(Line):
    def __init__(self, case: Case, device: torch.device, quick: bool = False) -> None:
        self.case, self.device, self.quick = case, device, quick
        self.names = on(device, self.names)
        self.label = f"{case.N}x{case.K}  M={case.M}  r={case.r}"

    def shape(self) -> dict[str, Any]:
        return {"M": self.case.M, "N": self.case.N, "K": self.case.K, "r": self.case.r, "dtype": "bfloat16"}

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.case, device=self.device)

    @cached_property
    def weight(self) -> Tensor:
        """The dequantized weight, decoded by the tests' own code."""
        return decode(self.inputs.qw, self.case.dtype)

    @cached_property
    def rows(self) -> Tensor:
        M = self.case.M
        return torch.arange(M) if M <= SAMPLE else torch.linspace(0, M - 1, SAMPLE).round().long()

    def layers(self, name: str) -> list[Layer]:
        """Copies of a contender's layer, enough of them to find no weight in the cache."""
        first = REGISTRY[name](self.inputs, self.weight)
        n = self.copies(first.nbytes, most=128 if self.case.M <= 64 else 16 if self.case.M < 512 else 4)
        return [first] + [REGISTRY[name](self.inputs, self.weight) for _ in range(n - 1)]

    @cached_property
    def expected(self) -> tuple[Results, Results]:
        """In float64, and in plain torch at the dtype of the case; `y0`, `dx0` are those of a layer without adapter."""
        return self._compute(torch.float64), self._compute(self.case.dtype)

    def _compute(self, dtype: torch.dtype) -> Results:
        i, s = self.inputs, self.case.scaling
        assert i.lora_A is not None and i.lora_B is not None
        x, dy, A, B, W = (t.to(dtype) for t in (i.x, i.dy, i.lora_A, i.lora_B, self.weight))
        h, g = linear(x, A), dy @ B
        some_x, some_dy = x[self.rows], dy[self.rows]
        out = {"y0": linear(some_x, W), "dx0": some_dy @ W}
        out["y"] = out["y0"] + s * linear(h[self.rows], B)
        out["dx"] = out["dx0"] + s * (g[self.rows] @ A)
        out["dA"], out["dB"] = s * (g.T @ x), s * (dy.T @ h)
        return out

    def judge(self, name: str, got: Results) -> str | None:
        want, base = self.expected
        return mismatch(got, want, base, self.case.dtype, name == OURS)

    def flops(self, adapter: bool) -> float:
        M, N, K, r = self.case.M, self.case.N, self.case.K, self.case.r if adapter else 0
        return 2.0 * M * N * K + 2.0 * M * r * (N + K)

    def io_bytes(self, adapter: bool) -> float:
        M, N, K, r = self.case.M, self.case.N, self.case.K, self.case.r if adapter else 0
        return 2.0 * M * (N + K) + 4.0 * r * (N + K)


def _suffix(layer: Layer) -> str:
    return "" if layer.leaves else "0"


class Forward(LayerLine):
    suite = "forward"
    names = FORWARD_NAMES

    def build(self, name: str) -> Contender:
        layers, x = self.layers(name), self.inputs.x

        @torch.no_grad()
        def run(i: int) -> Tensor:
            return layers[i % len(layers)].forward(x)

        def outputs() -> Results:
            return {"y" + _suffix(layers[0]): run(0)[self.rows]}

        return Contender(run, outputs, layers[0].nbytes, len(layers))

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        adapter = name not in NO_ADAPTER
        return contender.nbytes + self.io_bytes(adapter), self.flops(adapter)


class TrainLayer(LayerLine):
    suite = "train_layer"
    names = TRAIN_NAMES

    def build(self, name: str) -> Contender:
        layers, dy = self.layers(name), self.inputs.dy
        x = self.inputs.x.detach().clone().requires_grad_()

        def run(i: int) -> tuple[Tensor, ...]:
            layer = layers[i % len(layers)]
            return torch.autograd.grad(layer.forward(x), (x, *layer.leaves), dy)

        def outputs() -> Results:
            with torch.no_grad():
                y = layers[0].forward(x)
            dx, *rest = run(0)
            suffix = _suffix(layers[0])
            return {"y" + suffix: y[self.rows], "dx" + suffix: dx[self.rows]} | dict(zip(("dA", "dB"), rest, strict=False))

        return Contender(run, outputs, layers[0].nbytes, len(layers))

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        adapter = name not in NO_ADAPTER
        return 2 * (contender.nbytes + self.io_bytes(adapter)), 2 * self.flops(adapter) + (
            2.0 * self.case.M * self.case.r * (self.case.N + self.case.K) if adapter else 0
        )


def lines(suite: str, device: torch.device, quick: bool) -> Sequence[Line]:
    if suite == "forward":
        return [Forward(c, device, quick) for c in cases.forward(device, quick)]
    return [TrainLayer(c, device, quick) for c in cases.train_layer(device, quick)]
