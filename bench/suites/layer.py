"""forward, train_layer and grid: one linear layer with its adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.testing import Case, Inputs, Results

from ..measure import cache_bytes
from ..rivals.base import Layer
from ..rivals.registry import REGISTRY, on
from ..suite import OURS, Contender, Line, mismatch
from . import cases

SAMPLE = 64
"""Rows of y and dx that are compared with float64; dA and dB are compared in full."""

FORWARD_NAMES = tuple(n for n in REGISTRY if n != "dense+peft")
TRAIN_NAMES = tuple(n for n in REGISTRY if not n.startswith("bnb-inference"))
GRID_NAMES = (OURS, "dense", "bnb+peft")
NO_ADAPTER = ("dense", "bnb-inference")


def rows(M: int) -> Tensor:
    return torch.arange(M) if M <= SAMPLE else torch.linspace(0, M - 1, SAMPLE).round().long()


@functools.lru_cache(maxsize=1)
def expected(case: Case, device: torch.device) -> tuple[Results, Results]:
    """In float64, and in plain torch at the dtype of the case; `y0`, `dx0` are those of a layer without adapter."""
    i, W, some = cases.inputs(case, device), cases.decoded(case.N, case.K, device), rows(case.M)

    def compute(dtype: torch.dtype) -> Results:
        x, dy, A, B, w = (t.to(dtype) for t in (i.x, i.dy, i.lora_A, i.lora_B, W) if t is not None)
        h, g, s = linear(x, A), dy @ B, case.scaling
        out = {"y0": linear(x[some], w), "dx0": dy[some] @ w}
        out["y"] = out["y0"] + s * linear(h[some], B)
        out["dx"] = out["dx0"] + s * (g[some] @ A)
        out["dA"], out["dB"] = s * (g.T @ x), s * (dy.T @ h)
        return out

    return compute(torch.float64), compute(case.dtype)


@functools.lru_cache(maxsize=1)
def _shelf(N: int, K: int, r: int, device: torch.device, n: int) -> dict[str, list[Layer]]:
    """Layers by contender, kept for the next line of the same shape: PEFT takes milliseconds to make one."""
    return {}


def label(case: Case) -> str:
    return f"{case.N}x{case.K}  M={case.M}  r={case.r}"


class LayerLine(Line):
    def __init__(
        self,
        case: Case,
        device: torch.device,
        quick: bool = False,
        names: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.case, self.device, self.quick, self.threads = case, device, quick, threads
        self.names = on(device, names or self.names)
        self.label = label(case)

    def shape(self) -> dict[str, Any]:
        return {"M": self.case.M, "N": self.case.N, "K": self.case.K, "r": self.case.r, "dtype": "bfloat16"}

    @property
    def inputs(self) -> Inputs:
        return cases.inputs(self.case, self.device)

    @property
    def weight(self) -> Tensor:
        return cases.decoded(self.case.N, self.case.K, self.device)

    def layers(self, name: str) -> list[Layer]:
        """Copies of a contender's layer: as many for each, so that of the smallest, the 4-bit one, no weight is in the cache.
        Where reading a weight is a few percent of the work, four will do, if they are in the cache for every contender."""
        M, N, K = self.case.M, self.case.N, self.case.K
        if M > 64 and cache_bytes(self.device) // 16 >= 2 * N * K and not self.quick:
            n, self.cold = 4, False
        else:
            n = self.copies(self.inputs.qw.nbytes, other=2 * M * (N + K) if M > 64 else 0)
        shelf = _shelf(N, K, self.case.r, self.device, n)
        if name not in shelf:
            shelf[name] = [REGISTRY[name](self.inputs, self.weight) for _ in range(n)]
        return shelf[name]

    def judge(self, name: str, got: Results) -> str | None:
        want, base = expected(self.case, self.device)
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
            return {"y" + _suffix(layers[0]): run(0)[rows(self.case.M)]}

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
            some, suffix = rows(self.case.M), _suffix(layers[0])
            return {"y" + suffix: y[some], "dx" + suffix: dx[some]} | dict(zip(("dA", "dB"), rest, strict=False))

        return Contender(run, outputs, layers[0].nbytes, len(layers))

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        adapter = name not in NO_ADAPTER
        return 2 * (contender.nbytes + self.io_bytes(adapter)), 2 * self.flops(adapter) + (
            2.0 * self.case.M * self.case.r * (self.case.N + self.case.K) if adapter else 0
        )


class _Grid(LayerLine):
    suite = "grid"
    what: str

    def __init__(self, case: Case, device: torch.device, quick: bool, threads: int) -> None:
        super().__init__(case, device, quick, GRID_NAMES, threads)
        self.label = f"{self.what}  {case.N}x{case.K}  M={case.M}  {threads} thread{'s' * (threads > 1)}"

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"what": self.what, "threads": self.threads}


class GridForward(_Grid, Forward):
    what = "forward"


class GridTrain(_Grid, TrainLayer):
    what = "forward and backward"


def lines(suite: str, device: torch.device, quick: bool) -> Sequence[Line]:
    if suite == "forward":
        return [Forward(c, device, quick) for c in cases.forward(device, quick)]
    if suite == "train_layer":
        return [TrainLayer(c, device, quick) for c in cases.train_layer(device, quick)]
    counts = sorted({1, torch.get_num_threads()})
    return [kind(c, device, quick, n) for c in cases.grid(quick) for n in counts for kind in (GridForward, GridTrain)]
