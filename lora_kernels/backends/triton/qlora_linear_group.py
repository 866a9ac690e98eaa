"""Several linear layers on one `x` (q, k, v; gate, up): what reads x, and what sums to dx, is done for all at once.

Adapters are stacked, padded with zeros to the largest of their ranks: `h` for all of them from one read of x, `dA` for all
from one.  Each layer draws its own dropout mask, so with dropout the programs of the layers run side by side on the same rows
of x, which then come from memory once and from L2 for the others.

dx is one tensor: it is written once with the sum of the adapters' terms, and each layer's GEMM adds to it in x.dtype, one
rounding a layer, as when autograd adds the gradients of separate layers.  A float32 sum would make each of these GEMMs write
and read twice the bytes, and round once more at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Layer = tuple[Any, ...]
from .launch import on
from .low_rank import expand, project, read, read_dy
from .qlora_linear import linear_config, qlora_linear
from .qlora_linear_backward import add_dx, add_panels, dx_config


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
    chosen = [i for i, layer in enumerate(layers) if wanted[i] and layer[1] is not None]
    chosen = [i for i in chosen if layers[i][5] == layers[chosen[0]][5]]
    if len(chosen) < 2:
        return None
    factors = [A for i in chosen if (A := layers[i][1]) is not None]
    seeds = [seed for i in chosen if (seed := layers[i][6]) is not None]
    ranks = [A.shape[0] for A in factors]
    each = max(ranks)
    A = torch.cat([pad(A, (0, 0, 0, each - A.shape[0])) for A in factors])
    return Stack(chosen, ranks, each, A, layers[chosen[0]][5], torch.cat(seeds) if seeds else None)


def qlora_linear_group(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """`y` and `h` of each layer on the same x."""
    given: dict[int, Tensor] = {}
    # few rows are read from cache, and h is computed with y
    if x.shape[0] and all(linear_config(x, layer[0], 1).path != "small" for layer in layers):
        stack = stack_of(layers, [True] * len(layers))
        if stack is not None:
            with on(x.device):
                hs = project(x, stack.A, stack.dropout_p, stack.seed, stack.each)
            # a copy each: results of an op must not share memory
            given = {i: h[:, :r].clone() for i, h, r in zip(stack.layers, hs, stack.ranks, strict=True)}
    outs = [qlora_linear(x, *layer, h=given.get(i)) for i, layer in enumerate(layers)]
    return [y for y, _ in outs], [h for _, h in outs]


def qlora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """dx, the sum over the layers, and `dA`, `dB`, `dbias` of each layer; `needs` are those of each layer."""
    with on(dys[0].device):
        gs: list[Tensor | None] = []
        dBs: list[Tensor | None] = []
        dbiases: list[Tensor | None] = []
        for dy, h, (_, _, B, scaling, *_), (need_dA, need_dB, need_dbias) in zip(dys, hs, layers, needs, strict=True):
            g, dB, dbias = read_dy(dy, h, B, scaling, need_dx or need_dA, need_dB, need_dbias)
            gs.append(g)
            dBs.append(dB)
            dbiases.append(dbias)
        dAs = _each_da(x, gs, layers, [need_dA for need_dA, _, _ in needs])
        dx = _dx(dys, gs, layers) if need_dx else None
    return dx, dAs, dBs, dbiases


def _each_da(x: Tensor | None, gs: Sequence[Tensor | None], layers: Sequence[Layer], wanted: list[bool]) -> list[Tensor | None]:
    if x is None or x.shape[0] == 0:
        As = [layer[1] for layer in layers]
        return [torch.zeros_like(A) if need and A is not None else None for need, A in zip(wanted, As, strict=True)]
    dAs: list[Tensor | None] = [None] * len(layers)
    stack = stack_of(layers, wanted)
    if stack is not None:
        grads = [torch.empty_like(stack.A[: stack.each]) for _ in stack.layers]
        read(x, None, _scaled(stack, gs, layers), 1.0, grads, True, None, stack.dropout_p, stack.seed)
        for i, dA, r in zip(stack.layers, grads, stack.ranks, strict=True):
            A = layers[i][1]
            assert A is not None
            dAs[i] = dA[:r].to(A.dtype)
    for i, (_, A, _, scaling, _, dropout_p, seed) in enumerate(layers):
        g = gs[i]
        if wanted[i] and dAs[i] is None and A is not None and g is not None:
            dA = dAs[i] = torch.empty_like(A)
            read(x, None, g, scaling, [dA], True, None, dropout_p, seed)
    return dAs


def _scaled(stack: Stack, gs: Sequence[Tensor | None], layers: Sequence[Layer]) -> Tensor:
    """`s g [M, r]` of each stacked layer, one after the other."""
    return stack.padded([g * layers[i][3] for i in stack.layers if (g := gs[i]) is not None])


def _dx(dys: Sequence[Tensor], gs: Sequence[Tensor | None], layers: Sequence[Layer]) -> Tensor:
    dx: Tensor | None = None
    done: list[int] = []
    if dys[0].shape[0] and all(dx_config(dy, layer[0], 1).path == "panel" for dy, layer in zip(dys, layers, strict=True)):
        stack = stack_of(layers, [g is not None for g in gs])
        if stack is not None:
            dx = expand(_scaled(stack, gs, layers), stack.A, False, 1.0, None, stack.dropout_p, stack.seed)
            done = stack.layers
    for i, (dy, g, (qw, A, _, scaling, _, dropout_p, seed)) in enumerate(zip(dys, gs, layers, strict=True)):
        dx = add_panels(dy, qw, dx) if i in done else add_dx(dy, g, qw, A, scaling, dropout_p, seed, dx)
    assert dx is not None
    return dx
