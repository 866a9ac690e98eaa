"""`y = x Wᵀ + s h Bᵀ + bias` and `h = dropout(x) Aᵀ`, by the number of rows of `x` (see `settings`).

- small: one launch; W is the left operand (acc `[N, M]`, so that 16 rows of x do not pad a 64-row tile), K is split between
  programs, the last to arrive at a tile adds the partials in order.
- fused: W is decoded in the main loop; the adapter's product seeds the accumulator, so the epilogue is a plain store.
- gluon: the same with the decode hidden behind the dot, on sm_90 (see `gluon_linear`).
- panel: W is decoded to memory, at most `MAX_PANEL_BYTES` at a time; the adapter's product and the bias seed `y`, and the
  library's GEMM accumulates onto it.  It takes every shape: the fallback where the weight has no aligned groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layer import Layer
from .dequantize import decode_panel, slices
from .launch import config_of, launch, rank_block
from .low_rank import expand, low_rank, project
from .settings import Config, cdiv
from .settings.nvidia import gluon_kernel
from .tiles import cast, dot, last_arrival, load_weight, shuffle_k, swizzle, to_float
from .weights import linear_problem, weight_args, weight_meta
from .workspace import counters


@triton.jit(do_not_specialize=["M", "split"])
def linear_small(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    x,
    A,
    B,
    bias,
    h,
    h_partial,
    y,
    partial,
    counter,
    scaling,
    M,
    N,
    K,
    r,
    split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSE_H: tl.constexpr,
    LORA: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SHUFFLE: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """M <= BLOCK_M.  FUSE_H: each program multiplies its part of h (linear in K) by B, so no program waits for another."""
    DT: tl.constexpr = x.dtype.element_ty
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    rm = tl.arange(0, BLOCK_M)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, R)
    mm = rm < M
    mr = rr < r
    rows = tl.minimum(rn, N - 1)
    chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part_h = tl.zeros((BLOCK_M, R), tl.float32)
    for k in range(pk * chunk, tl.minimum((pk + 1) * chunk, K), BLOCK_K):
        col = k
        if not EVEN_K:  # the last step starts earlier and skips what was done
            col = tl.minimum(k, K - BLOCK_K)
        rk = col + tl.arange(0, BLOCK_K)
        mx = mm[:, None]
        if not EVEN_K:
            mx = mx & (rk >= k)[None, :]
        a = tl.load(x + rm[:, None] * K + rk[None, :], mask=mx, other=0.0)
        w = load_weight(
            packed, absmax, code2, absmax2, offset, lut, rows >> 31, rows, col, K,
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, SCALE_WORDS, TABLE, PTX,
        )  # fmt: skip
        if SHUFFLE:
            w = shuffle_k(w, BLOCK_N, BLOCK_K)
            acc = dot(w, shuffle_k(a, BLOCK_M, BLOCK_K).T, acc)
        else:
            acc = dot(w, a.T, acc)
        if FUSE_H:
            f = tl.load(A + rr[:, None] * K + rk[None, :], mask=mr[:, None], other=0.0)
            part_h = dot(a, cast(f, DT).T, part_h)
    if FUSE_H:
        b = cast(tl.load(B + rows[:, None] * r + rr[None, :], mask=mr[None, :], other=0.0), DT)
        acc += dot(b, cast(part_h, DT).T, tl.zeros((BLOCK_N, BLOCK_M), tl.float32)) * scaling
    elif LORA and pk == 0:
        term = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in tl.range(0, r, R, num_stages=1):
            rf = first + tl.arange(0, R)
            b = tl.load(B + rows[:, None] * r + rf[None, :], mask=(rf < r)[None, :], other=0.0)
            t = tl.load(h + rm[:, None] * r + rf[None, :], mask=mm[:, None] & (rf < r)[None, :], other=0.0)
            term = dot(cast(b, DT), t.T, term)
        acc += term * scaling
    if BIAS and pk == 0:
        acc += to_float(tl.load(bias + rows))[:, None]
    inside = (rn < N)[:, None] & mm[None, :]
    at = rm[None, :] * N + rn[:, None]
    at_h = rm[:, None] * r + rr[None, :]
    inside_h = mm[:, None] & mr[None, :]
    if not SPLIT:
        tl.store(y + at, cast(acc, DT), mask=inside)
        if FUSE_H and pn == 0:
            tl.store(h + at_h, cast(part_h, DT), mask=inside_h)
    else:
        tl.store(partial + pk * M * N + at, acc, mask=inside)
        if FUSE_H and pn == 0:
            tl.store(h_partial + pk * M * r + at_h, part_h, mask=inside_h)
        if last_arrival(counter + pn, split):
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in range(split):
                total += tl.load(partial + i * M * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + at, cast(total, DT), mask=inside)
            if FUSE_H and pn == 0:
                total_h = tl.zeros((BLOCK_M, R), tl.float32)
                for i in range(split):
                    total_h += tl.load(h_partial + i * M * r + at_h, mask=inside_h, other=0.0, cache_modifier=".cg")
                tl.store(h + at_h, cast(total_h, DT), mask=inside_h)


@triton.jit(do_not_specialize=["M"])
def linear_fused(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    x,
    h,
    B,
    bias,
    y,
    scaling,
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
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    DT: tl.constexpr = x.dtype.element_ty
    pm, pn = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(rm, M - 1).to(tl.int64)  # clamped, not masked: a mask keeps predicates alive across the loop
    outs = tl.minimum(rn, N - 1)
    x_tile = x + pm.to(tl.int64) * BLOCK_M * K  # offsets inside the tile fit in 32 bits, half the instructions
    local = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - pm * BLOCK_M)
    if LORA:
        acc = low_rank(h, B, rows, outs, rn < N, M, N, r, 0, r, r, BLOCK_M, BLOCK_N, R, True, False, DT) * scaling
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS:
        acc += to_float(tl.load(bias + outs))[None, :]
    for k in range(0, K, BLOCK_K):
        col = k
        if EVEN_K:
            a = tl.load(x_tile + local[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :])
        else:  # the last step starts earlier and skips what was done
            col = tl.minimum(k, K - BLOCK_K)
            rk = col + tl.arange(0, BLOCK_K)
            a = tl.load(x_tile + local[:, None] * K + rk[None, :], mask=(rk >= k)[None, :], other=0.0)
        w = load_weight(
            packed, absmax, code2, absmax2, offset, lut, outs >> 31, outs, col, K,
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, False, TABLE, PTX,
        )  # fmt: skip
        acc = dot(a, w.T, acc)
    tl.store(y + rows[:, None] * N + rn[None, :], cast(acc, DT), mask=(rm < M)[:, None] & (rn < N)[None, :])


# ---- launchers


def linear(x: Tensor, layer: Layer, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`y [M, N]` and `h [M, r]`, both in x.dtype; `h` is not computed where it is given."""
    problem = linear_problem("qlora_linear", x, layer)
    config = config_of(problem, x.device)
    if h is None:
        A = layer.lora_A
        h = x.new_empty(x.shape[0], problem.r) if A is None or config.fuse_h else project(x, A, layer.dropout_p, layer.seed)
    if config.path == "panel":
        return _panel(x, h, layer), h
    return (_small if config.path == "small" else _fused)(x, h, layer, problem.group, config), h


def _small(x: Tensor, h: Tensor, layer: Layer, group: int, config: Config) -> Tensor:
    """Computes `h` too, into `h`, where the setting says so."""
    N, K = layer.shape
    M, r = h.shape
    A = layer.lora_A if config.fuse_h else None
    y, split, grid = x.new_empty(M, N), config.split, (cdiv(N, config.block_n), config.split)
    partial = h_partial = counter = None
    if split > 1:
        partial, counter = x.new_empty(split, M, N, dtype=torch.float32), counters(x.device, grid[0])
        h_partial = x.new_empty(split, M, r, dtype=torch.float32) if config.fuse_h else None
    flags = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "R": rank_block(r, config.ranks),
        "SPLIT": split > 1,
        "FUSE_H": config.fuse_h,
        "LORA": r > 0,
        "BIAS": layer.bias is not None,
        "EVEN_K": K % config.block_k == 0,
        "SHUFFLE": config.shuffle,
        "SCALE_WORDS": config.scale_words,
    }
    args = (x, A, layer.lora_B, layer.bias, h, h_partial, y, partial, counter, layer.scaling, M, N, K, r, split)
    launch(linear_small, grid, (*weight_args(layer, x.dtype), *args), flags | weight_meta(layer, group, x.dtype), config)
    return y


def _fused(x: Tensor, h: Tensor, layer: Layer, group: int, config: Config) -> Tensor:
    N, K = layer.shape
    M, r = h.shape
    y = x.new_empty(M, N)
    flags = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group,
        "LORA": r > 0,
        "BIAS": layer.bias is not None,
    }
    if config.path == "gluon":
        kernel, flags = gluon_kernel(), flags | {"X_TILES": config.stages}
    else:
        kernel, flags = linear_fused, flags | {"R": rank_block(r, config.ranks), "EVEN_K": K % config.block_k == 0}
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    args = (*weight_args(layer, x.dtype), x, h, layer.lora_B, layer.bias, y, layer.scaling, M, N, K, r)
    launch(kernel, grid, args, flags | weight_meta(layer, group, x.dtype), config)
    return y


def _panel(x: Tensor, h: Tensor, layer: Layer) -> Tensor:
    N, K = layer.shape
    B, bias = layer.lora_B, layer.bias
    y = x.new_empty(x.shape[0], N) if B is None else expand(h, B, True, layer.scaling, bias, 0.0, None)
    strips = slices(N, K * x.itemsize)
    panel = x.new_empty(len(strips[0]) * K)
    for rows in strips:
        w = decode_panel(layer, rows, range(K), panel)
        out = y[:, rows.start : rows.stop]
        if B is not None:
            out.addmm_(x, w.T)
        elif bias is not None:
            torch.addmm(bias[rows.start : rows.stop].to(x.dtype), x, w.T, out=out)
        else:
            torch.mm(x, w.T, out=out)
    return y
