"""Several linear layers on one `x` (q, k, v; gate, up): what reads x, and what sums to dx, is done for all at once.

Adapters of equal rank and without dropout are stacked: `h` for all of them from one read of x, `dA` for all from one. Dropout
draws a mask for each layer, so with dropout each layer reads x itself.  dx is one tensor that each layer adds to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import Layer
from .adapter import expand, project, read
from .launch import on
from .qlora_linear import linear_config, qlora_linear
from .qlora_linear_backward import add_dx, add_panels, dx_config, read_dy


def qlora_linear_group(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """`y` and `h` of each layer on the same x."""
    stack = _stack(layers, [layer[1] is not None for layer in layers])
    if x.shape[0] and all(linear_config(x, layers[i][0], 1).path != "small" for i in stack):
        with on(x.device):
            given = _given_h(x, layers, stack)
    else:  # few rows are read from cache, and h is computed with y
        given = {}
    outs = [qlora_linear(x, *layer, h=given.get(i)) for i, layer in enumerate(layers)]
    return [y for y, _ in outs], [h for _, h in outs]


def _given_h(x: Tensor, layers: Sequence[Layer], stack: list[int]) -> dict[int, Tensor]:
    if not stack:
        return {}
    factors = _factors(layers, stack)
    h = project(x, factors, 0.0, None, factors.shape[0] // len(stack))
    return {i: h[j].clone() for j, i in enumerate(stack)}  # results of an op must not share memory


def _stack(layers: Sequence[Layer], wanted: Sequence[bool]) -> list[int]:
    """The layers among those `wanted` whose adapters can be stacked: without dropout, and of the rank of the first."""
    found: list[int] = []
    for i, (_, A, _, _, _, dropout_p, _) in enumerate(layers):
        if wanted[i] and A is not None and not dropout_p:
            first = layers[found[0]][1] if found else A
            if first is not None and first.shape[0] == A.shape[0]:
                found.append(i)
    return found if len(found) > 1 else []


def _factors(layers: Sequence[Layer], stack: Sequence[int]) -> Tensor:
    return torch.cat([A for i in stack if (A := layers[i][1]) is not None])


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
    dAs = [torch.empty_like(A) if need and A is not None else None for need, (_, A, *_) in zip(wanted, layers, strict=True)]
    if x is None:
        return dAs
    if x.shape[0] == 0:
        return [dA if dA is None else dA.zero_() for dA in dAs]
    stack = _stack(layers, wanted)
    if stack:
        grads = [dA for i in stack if (dA := dAs[i]) is not None]
        read(x, None, _scaled(gs, layers, stack), 1.0, grads, True)
    for i, (_, _, _, scaling, _, dropout_p, seed) in enumerate(layers):
        dA, g = dAs[i], gs[i]
        if i not in stack and dA is not None and g is not None:
            read(x, None, g, scaling, [dA], True, None, dropout_p, seed)
    return dAs


def _scaled(gs: Sequence[Tensor | None], layers: Sequence[Layer], stack: Sequence[int]) -> Tensor:
    """`s g [M, r]` of each stacked layer, one after the other."""
    return torch.stack([g * layers[i][3] for i in stack if (g := gs[i]) is not None])


def _dx(dys: Sequence[Tensor], gs: Sequence[Tensor | None], layers: Sequence[Layer]) -> Tensor:
    stack = _stack(layers, [g is not None for g in gs])
    panels = all(dx_config(dy, layer[0], 1).path == "panel" for dy, layer in zip(dys, layers, strict=True))
    dx: Tensor | None = None
    if not stack or not panels or dys[0].shape[0] == 0:
        stack = []
    else:
        dx = expand(_scaled(gs, layers, stack), _factors(layers, stack), False, 1.0, None, 0.0, None)
    for i, (dy, g, (qw, A, _, scaling, _, dropout_p, seed)) in enumerate(zip(dys, gs, layers, strict=True)):
        dx = add_panels(dy, qw, dx) if i in stack else add_dx(dy, g, qw, A, scaling, dropout_p, seed, dx)
    assert dx is not None
    return dx
