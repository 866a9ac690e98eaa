"""`y = x Wᵀ + s h Bᵀ + bias` and `h = dropout(x) Aᵀ`, by the number of rows of `x` (see `settings`).

- small: one launch; W is the left operand (acc `[N, M]`, so that 16 rows of x do not pad a 64-row tile), K is split between
  programs, the last to arrive at a tile adds the partials in order.
- fused: W is decoded in the main loop; the adapter's product seeds the accumulator, so the epilogue is a plain store.
- gluon: the same with the decode hidden behind the dot, on sm_90 (see `gluon_linear`).
- panel: W is decoded to memory, at most `MAX_PANEL_BYTES` at a time; the adapter's product and the bias seed `y`, and the
  library's GEMM accumulates onto it.  It takes every shape: the fallback where the weight has no aligned groups.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantizedWeight
from .dequantize import decode_panel
from .launch import capability, cdiv, config_of, group_of, has_ptx, launch, on, rank_block, weight_args, weight_meta
from .low_rank import expand, low_rank, project
from .settings import MAX_PANEL_BYTES, Config
from .tiles import cast, dot, last_arrival, load_weight, shuffle_k, swizzle, to_float
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
    WORD4: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    NF4: tl.constexpr,
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
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, NF4, WORD4, PTX,
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
    NF4: tl.constexpr,
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
            BLOCK_N, BLOCK_K, DT, GROUP, SHIFT, NESTED, NF4, False, PTX,
        )  # fmt: skip
        acc = dot(a, w.T, acc)
    tl.store(y + rows[:, None] * N + rn[None, :], cast(acc, DT), mask=(rm < M)[:, None] & (rn < N)[None, :])


# ---- launchers


def qlora_linear(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`y [M, N]` and `h [M, r]`, both in x.dtype; `h` is not computed where it is given."""
    M, r = x.shape[0], 0 if lora_A is None else lora_A.shape[0]
    if M == 0:
        return x.new_empty(0, qw.shape[0]), x.new_empty(0, r)
    config = linear_config(x, qw, r)
    with on(x.device):
        fuse_h = config.fuse_h and lora_A is not None and not dropout_p and h is None
        if h is None:
            h = x.new_empty(M, r) if lora_A is None or fuse_h else project(x, lora_A, dropout_p, seed)
        if config.path == "small":
            y = _small(x, h, qw, lora_A if fuse_h else None, lora_B, scaling, bias, config)
        else:
            y = (_panel if config.path == "panel" else _fused)(x, h, qw, lora_B, scaling, bias, config)
    return y, h


def linear_config(x: Tensor, qw: QuantizedWeight, r: int) -> Config:
    N, K = qw.shape
    return usable(config_of("qlora_linear", x.shape[0], N, K, r, x.device), qw, x)


def usable(config: Config, qw: QuantizedWeight, x: Tensor) -> Config:
    """`config`, or the panel path where W has no aligned groups along K, or K does not fill a tile, or products are float32,
    which has no tensor cores to feed.  The gluon path also wants sm_90, and a step of K that is one group of 64."""
    K = qw.shape[1]
    group = group_of(qw, K)
    fits = group and config.block_k <= K and x.dtype != torch.float32
    if fits and config.path == "gluon":
        fits = group == config.block_k == 64 and has_ptx() and capability(x.device) == 90 and gluon_kernel() is not None
    return config if fits else Config("panel")


@functools.cache
def gluon_kernel() -> Any:
    """`linear_gluon`, or None, with a warning, where this Triton has another Gluon than the kernel is written in."""
    try:
        from .gluon_linear import linear_gluon
    except (ImportError, AttributeError) as e:
        warnings.warn(f"qlora_linear: no path 'gluon' with Triton {triton.__version__}, 'panel' instead: {e}", stacklevel=2)
        return None
    return linear_gluon


def _small(
    x: Tensor,
    h: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    config: Config,
) -> Tensor:
    """Computes `h` too, into `h`, where `lora_A` is given."""
    N, K = qw.shape
    M, r = h.shape
    y, split, grid = x.new_empty(M, N), config.split, (cdiv(N, config.block_n), config.split)
    partial = h_partial = counter = None
    if split > 1:
        partial, counter = x.new_empty(split, M, N, dtype=torch.float32), counters(x.device, grid[0])
        h_partial = None if lora_A is None else x.new_empty(split, M, r, dtype=torch.float32)
    group = group_of(qw, K)
    even = K % config.block_k == 0
    flags = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "R": rank_block(max(r, 1), 64),
        "SPLIT": split > 1,
        "FUSE_H": lora_A is not None,
        "LORA": lora_B is not None,
        "BIAS": bias is not None,
        "EVEN_K": even,
        "SHUFFLE": config.shuffle,
        "WORD4": config.block_k == 256 and group == 64 and qw.blocksize == 64 and even and qw.absmax.data_ptr() % 16 == 0,
    }
    args = (x, lora_A, lora_B, bias, h, h_partial, y, partial, counter, scaling, M, N, K, r, split)
    launch(linear_small, grid, (*weight_args(qw, x.dtype), *args), flags | weight_meta(qw, group), config)
    return y


def _fused(
    x: Tensor, h: Tensor, qw: QuantizedWeight, lora_B: Tensor | None, scaling: float, bias: Tensor | None, config: Config
) -> Tensor:
    N, K = qw.shape
    M, r = x.shape[0], h.shape[1]
    y = x.new_empty(M, N)
    flags = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group,
        "LORA": lora_B is not None,
        "BIAS": bias is not None,
    }
    if config.path == "gluon":
        kernel, flags = gluon_kernel(), flags | {"X_TILES": config.stages}
    else:
        kernel, flags = linear_fused, flags | {"R": rank_block(max(r, 1), 64), "EVEN_K": K % config.block_k == 0}
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    args = (*weight_args(qw, x.dtype), x, h, lora_B, bias, y, scaling, M, N, K, r)
    launch(kernel, grid, args, flags | weight_meta(qw, group_of(qw, K)), config)
    return y


def _panel(
    x: Tensor, h: Tensor, qw: QuantizedWeight, lora_B: Tensor | None, scaling: float, bias: Tensor | None, config: Config
) -> Tensor:
    N, K = qw.shape
    seeded = lora_B is not None
    y = expand(h, lora_B, True, scaling, bias, 0.0, None) if lora_B is not None else x.new_empty(x.shape[0], N)
    strips = slices(N, K * x.itemsize)
    panel = x.new_empty(len(strips[0]) * K)
    for rows in strips:
        w = decode_panel(qw, rows, range(K), panel)
        out = y[:, rows.start : rows.stop]
        if seeded:
            out.addmm_(x, w.T)
        elif bias is not None:
            torch.addmm(bias[rows.start : rows.stop].to(x.dtype), x, w.T, out=out)
        else:
            torch.mm(x, w.T, out=out)
    return y


def slices(n: int, bytes_each: int, align: int = 256) -> list[range]:
    """`range(n)` in equal slices of at most `MAX_PANEL_BYTES`, cut at multiples of `align` where that is possible."""
    most = max(1, MAX_PANEL_BYTES // bytes_each)
    size = cdiv(n, cdiv(n, most))
    if size < n and most >= align:
        size = min(cdiv(size, align) * align, most // align * align)
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
