"""The two linear ops, each of several layers on one `x` (q, k, v; gate, up) or of one.

What reads x, and what sums to dx, is done for all layers at once.  Adapters are stacked, padded with zeros to the largest of
their ranks: `h` for all of them from one read of x, `dA` for all from one.  Each layer draws its own dropout mask, so with
dropout the programs of the layers run side by side on the same rows of x, which then come from memory once and from L2 for the
others.  `g`, `dB` and `dbias` of a layer come from one read of its `dy`.

dx is one tensor: it is written once with the sum of the adapters' terms, and each layer's GEMM adds to it in x.dtype, one
rounding a layer, as when autograd adds the gradients of separate layers.  A float32 sum would make each of these GEMMs write
and read twice the bytes, and round once more at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...layer import Layer
from .dx import add_dx, add_panels
from .launch import config_of, on
from .linear import linear
from .low_rank import expand, project, read, read_dy
from .weights import linear_problem

Gradients = list[Tensor | None]
"""One for each layer, None where it was not asked for."""


def qlora_linear(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """`y = x Wᵀ + s h Bᵀ + bias [M, N]` and `h = dropout(x) Aᵀ [M, r]` of each layer, in x.dtype."""
    M = x.shape[0]
    if M == 0:
        return [x.new_empty(0, layer.shape[0]) for layer in layers], [x.new_empty(0, layer.r) for layer in layers]
    with on(x.device):
        given = _stacked_h(x, layers) if len(layers) > 1 else {}
        outs = [linear(x, layer, given.get(i)) for i, layer in enumerate(layers)]
    return [y for y, _ in outs], [h for _, h in outs]


def qlora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, Gradients, Gradients, Gradients]:
    """dx, the sum over the layers of `dy W + dropout(s g A)` with `g = dy B`, in dy.dtype; then of each layer
    `dA = s gᵀ dropout(x)`, `dB = s dyᵀ h` and `dbias = sum dy` (float32), where its `needs` ask for them."""
    with on(dys[0].device):
        gs: Gradients = []
        dBs: Gradients = []
        dbiases: Gradients = []
        for dy, h, layer, (need_dA, need_dB, need_dbias) in zip(dys, hs, layers, needs, strict=True):
            g, dB, dbias = read_dy(dy, h, layer.lora_B, layer.scaling, need_dx or need_dA, need_dB, need_dbias)
            gs.append(g)
            dBs.append(dB)
            dbiases.append(dbias)
        dAs = _each_dA(x, gs, layers, [need_dA for need_dA, _, _ in needs])
        dx = _dx(dys, gs, layers) if need_dx else None
    return dx, dAs, dBs, dbiases


@dataclass(frozen=True)
class Stack:
    """Adapters that go through the same launches: the layers they belong to, their ranks, and what they share.

    Attributes:
        each: the rank that all are padded to.
        A: `[len(layers) * each, K]`.
        seed: one for each layer, None without dropout.
    """

    layers: list[int]
    ranks: list[int]
    each: int
    A: Tensor
    dropout_p: float
    seed: Tensor | None

    def padded(self, ts: Sequence[Tensor]) -> Tensor:
        """`[M, r]` of each layer -> `[n, M, each]`."""
        return torch.stack([pad(t, (0, self.each - t.shape[1])) for t in ts])


def stack_of(layers: Sequence[Layer], wanted: Sequence[bool]) -> Stack | None:
    """The layers among those `wanted` that have an adapter and the dropout of the first such layer, if they are several."""
    chosen = [i for i, layer in enumerate(layers) if wanted[i] and layer.r]
    chosen = [i for i in chosen if layers[i].dropout_p == layers[chosen[0]].dropout_p]
    if len(chosen) < 2:
        return None
    factors = [A for i in chosen if (A := layers[i].lora_A) is not None]
    seeds = [seed for i in chosen if (seed := layers[i].seed) is not None]
    ranks = [A.shape[0] for A in factors]
    each = max(ranks)
    A = torch.cat([pad(A, (0, 0, 0, each - A.shape[0])) for A in factors])
    return Stack(chosen, ranks, each, A, layers[chosen[0]].dropout_p, torch.cat(seeds) if seeds else None)


def _paths(op: str, rows: Sequence[Tensor], layers: Sequence[Layer]) -> set[str]:
    """The paths that layers take."""
    each = zip(rows, layers, strict=True)
    return {config_of(linear_problem(op, t, layer), t.device).path for t, layer in each}


def _stacked_h(x: Tensor, layers: Sequence[Layer]) -> dict[int, Tensor]:
    """`h` of the layers that are stacked."""
    if "small" in _paths("qlora_linear", [x] * len(layers), layers):
        return {}  # few rows are read from cache, and h is computed with y
    stack = stack_of(layers, [True] * len(layers))
    if stack is None:
        return {}
    hs = project(x, stack.A, stack.dropout_p, stack.seed, stack.each)
    # a copy each: results of an op must not share memory
    return {i: h[:, :r].clone() for i, h, r in zip(stack.layers, hs, stack.ranks, strict=True)}


def _each_dA(x: Tensor | None, gs: Gradients, layers: Sequence[Layer], wanted: list[bool]) -> Gradients:  # noqa: N802
    dAs: Gradients = [None] * len(layers)
    stack = stack_of(layers, wanted) if len(layers) > 1 and x is not None and x.shape[0] else None
    if x is not None and stack is not None:
        grads = [torch.empty_like(stack.A[: stack.each]) for _ in stack.layers]
        read(x, None, _scaled(stack, gs, layers), 1.0, grads, True, None, stack.dropout_p, stack.seed)
        for i, dA, r in zip(stack.layers, grads, stack.ranks, strict=True):
            A = layers[i].lora_A
            assert A is not None
            dAs[i] = dA[:r].to(A.dtype)
    for i, (layer, g) in enumerate(zip(layers, gs, strict=True)):
        if not wanted[i] or dAs[i] is not None:
            continue
        assert x is not None and g is not None and layer.lora_A is not None
        dA = dAs[i] = torch.empty_like(layer.lora_A)
        if x.shape[0]:
            read(x, None, g, layer.scaling, [dA], True, None, layer.dropout_p, layer.seed)
        else:
            dA.zero_()
    return dAs


def _scaled(stack: Stack, gs: Gradients, layers: Sequence[Layer]) -> Tensor:
    """`s g [M, r]` of each stacked layer, one after the other."""
    return stack.padded([g * layers[i].scaling for i in stack.layers if (g := gs[i]) is not None])


def _dx(dys: Sequence[Tensor], gs: Gradients, layers: Sequence[Layer]) -> Tensor:
    if dys[0].shape[0] == 0:
        return dys[0].new_empty(0, layers[0].shape[1])
    dx: Tensor | None = None
    done: list[int] = []
    if len(layers) > 1 and _paths("dx", dys, layers) == {"panel"}:
        stack = stack_of(layers, [g is not None for g in gs])
        if stack is not None:
            dx = expand(_scaled(stack, gs, layers), stack.A, False, 1.0, None, stack.dropout_p, stack.seed)
            done = stack.layers
    for i, (dy, g, layer) in enumerate(zip(dys, gs, layers, strict=True)):
        dx = add_panels(dy, layer, dx) if i in done else add_dx(dy, g, layer, dx)
    assert dx is not None
    return dx
