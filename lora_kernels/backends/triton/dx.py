"""`dx = dy W + dropout(s g A)`, with `g = dy B`.

W is either decoded in the main loop, as stored, not transposed, or to memory in strips of columns, so that each strip is summed
over all of N at once and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layer import Layer
from .dequantize import decode_panel, slices
from .launch import config_of, launch, rank_block
from .low_rank import expand, keep_args, low_rank
from .settings import cdiv
from .tiles import cast, dot, kept, load_weight, swizzle, to_float
from .weights import linear_problem, weight_args, weight_meta


@triton.jit(do_not_specialize=["M", "threshold"])
def dx_fused(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    dy,
    g,
    A,
    dx,
    seed,
    threshold,
    scale,
    M,
    N,
    K,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    GROUP_M: tl.constexpr,
    LORA: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Tile `[BLOCK_M, BLOCK_K]` of dx, summed over N in steps of BLOCK_N; ADD: onto what dx holds."""
    DT: tl.constexpr = dy.dtype.element_ty
    pm, pk = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    mm = rm < M
    rows = tl.where(mm, rm, 0).to(tl.int64)
    col = tl.minimum(pk * BLOCK_K, K - BLOCK_K)  # the last tile starts earlier and stores what is its own
    rk = col + tl.arange(0, BLOCK_K)
    dy_tile = dy + pm.to(tl.int64) * BLOCK_M * N
    local = tl.where(mm, tl.arange(0, BLOCK_M), 0)
    if LORA:
        acc = low_rank(g, A, rows, rk, rk < K, M, K, r, 0, r, r, BLOCK_M, BLOCK_K, R, False, False, DT) * scale
        if DROPOUT:
            acc = tl.where(kept(seed, threshold, rows, col, K, BLOCK_M, BLOCK_K, QUAD), acc, 0.0)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    zero = (col + tl.arange(0, BLOCK_N)) >> 31
    for n in range(0, N, BLOCK_N):
        rn = n + tl.arange(0, BLOCK_N)
        if EVEN_N:
            d = tl.load(dy_tile + local[:, None] * N + rn[None, :])
            outs = rn
        else:
            d = tl.load(dy_tile + local[:, None] * N + rn[None, :], mask=(rn < N)[None, :], other=0.0)
            outs = tl.minimum(rn, N - 1)
        w = load_weight(
            packed, absmax, code2, absmax2, offset, lut, zero, outs, col, K,
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, False, TABLE, PTX,
        )  # fmt: skip
        acc = dot(d, w, acc)
    mine = mm[:, None] & (rk >= pk * BLOCK_K)[None, :]
    place = dx + rows[:, None] * K + rk[None, :]
    if ADD:
        acc += to_float(tl.load(place, mask=mine, other=0.0))
    tl.store(place, cast(acc, DT), mask=mine)


def add_dx(dy: Tensor, g: Tensor | None, layer: Layer, onto: Tensor | None) -> Tensor:
    """`dy W + dropout(s g A)`, added to `onto` if it is given."""
    problem, A = linear_problem("dx", dy, layer), layer.lora_A
    _, M, N, K, r, *_ = problem
    config = config_of(problem, dy.device)
    if config.path == "panel":
        if g is not None and A is not None:
            onto = expand(g, A, False, layer.scaling, None, layer.dropout_p, layer.seed, onto)
        return add_panels(dy, layer, onto)
    dx = dy.new_empty(M, K) if onto is None else onto
    seed, threshold, keep_scale, flags = keep_args(layer.seed, layer.dropout_p, K)
    flags |= {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "R": rank_block(r, config.ranks),
        "GROUP_M": config.group,
        "LORA": g is not None,
        "ADD": onto is not None,
        "EVEN_N": N % config.block_n == 0,
    }
    grid = (cdiv(M, config.block_m) * cdiv(K, config.block_k),)
    args = (dy, g, A, dx, seed, threshold, layer.scaling * keep_scale, M, N, K, r)
    meta = weight_meta(layer, problem.group, dy.dtype)
    launch(dx_fused, grid, (*weight_args(layer, dy.dtype), *args), flags | meta, config)
    return dx


def add_panels(dy: Tensor, layer: Layer, onto: Tensor | None) -> Tensor:
    """`dy W`, added to `onto` if it is given, a strip of columns at a time."""
    N, K = layer.shape
    dx = dy.new_empty(dy.shape[0], K) if onto is None else onto
    strips = slices(K, N * dy.itemsize)
    panel = dy.new_empty(N * len(strips[0]))
    for cols in strips:
        w = decode_panel(layer, range(N), cols, panel)
        strip = dx[:, cols.start : cols.stop]
        torch.mm(dy, w, out=strip) if onto is None else strip.addmm_(dy, w)
    return dx
