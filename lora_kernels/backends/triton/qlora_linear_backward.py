"""The gradients of `qlora_linear`: with `g = dy B`, `dx = dy W + dropout(s g A)`, `dA = s gᵀ dropout(x)`, `dB = s dyᵀ h`,
`dbias = sum dy`.

`g`, `dB` and `dbias` come from one read of `dy`, `dA` from one read of `x`.  For dx, W is either decoded in the main loop, as
stored, not transposed, or to memory in strips of columns, so that each strip is summed over all of N at once and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantizedWeight
from .dequantize import decode_panel
from .launch import cdiv, config_of, group_of, launch, on, rank_block, weight_args, weight_meta
from .low_rank import expand, keep_args, low_rank, read, read_dy
from .qlora_linear import slices, usable
from .settings import Config
from .tiles import cast, dot, kept, load_weight, swizzle, to_float


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
    NF4: tl.constexpr,
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
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, NF4, False, PTX,
        )  # fmt: skip
        acc = dot(d, w, acc)
    mine = mm[:, None] & (rk >= pk * BLOCK_K)[None, :]
    place = dx + rows[:, None] * K + rk[None, :]
    if ADD:
        acc += to_float(tl.load(place, mask=mine, other=0.0))
    tl.store(place, cast(acc, DT), mask=mine)


def qlora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`dx, dA, dB, dbias` (float32), None where `needs` is False."""
    need_dx, need_dA, need_dB, need_dbias = needs
    with on(dy.device):
        g, dB, dbias = read_dy(dy, h, lora_B, scaling, need_dx or need_dA, need_dB, need_dbias)
        dA = None
        if need_dA:
            assert x is not None and g is not None and lora_A is not None
            dA = torch.empty_like(lora_A)
            if x.shape[0]:
                read(x, None, g, scaling, [dA], True, None, dropout_p, seed)
            else:
                dA.zero_()
        dx = add_dx(dy, g, qw, lora_A, scaling, dropout_p, seed, None) if need_dx else None
    return dx, dA, dB, dbias


def add_dx(
    dy: Tensor,
    g: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    onto: Tensor | None,
) -> Tensor:
    """`dy W + dropout(s g A)`, added to `onto` if it is given."""
    N, K = qw.shape
    M, r = dy.shape[0], 0 if g is None else g.shape[1]
    if M == 0:
        return dy.new_empty(0, K)
    config = dx_config(dy, qw, r)
    if config.path == "panel":
        if g is not None and lora_A is not None:
            onto = expand(g, lora_A, False, scaling, None, dropout_p, seed, onto)
        return add_panels(dy, qw, onto)
    dx = dy.new_empty(M, K) if onto is None else onto
    seed, threshold, keep_scale, flags = keep_args(seed, dropout_p, K)
    flags |= {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "R": rank_block(max(r, 1), 64),
        "GROUP_M": config.group,
        "LORA": g is not None,
        "ADD": onto is not None,
        "EVEN_N": N % config.block_n == 0,
    }
    grid = (cdiv(M, config.block_m) * cdiv(K, config.block_k),)
    args = (dy, g, lora_A if g is not None else None, dx, seed, threshold, scaling * keep_scale, M, N, K, r)
    launch(dx_fused, grid, (*weight_args(qw, dy.dtype), *args), flags | weight_meta(qw, group_of(qw, K)), config)
    return dx


def dx_config(dy: Tensor, qw: QuantizedWeight, r: int) -> Config:
    N, K = qw.shape
    return usable(config_of("dx", dy.shape[0], N, K, r, dy.device), qw, dy)


def add_panels(dy: Tensor, qw: QuantizedWeight, onto: Tensor | None) -> Tensor:
    """`dy W`, added to `onto` if it is given, a strip of columns at a time."""
    N, K = qw.shape
    dx = dy.new_empty(dy.shape[0], K) if onto is None else onto
    strips = slices(K, N * dy.itemsize)
    panel = dy.new_empty(N * len(strips[0]))
    for cols in strips:
        w = decode_panel(qw, range(N), cols, panel)
        strip = dx[:, cols.start : cols.stop]
        torch.mm(dy, w, out=strip) if onto is None else strip.addmm_(dy, w)
    return dx
