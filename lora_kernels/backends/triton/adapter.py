"""The adapter's products: `h = dropout(x) Aᵀ`, `s h Bᵀ + bias`, `dropout(s g A)`, and `g`, `dA`, `dB`, `dbias` from one read.

Ranks are padded to a power of two in the tile and masked; a rank above the widest tile is done in chunks.  Sums over programs
go through float32 partials that are added in a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import arch_of, cdiv, launch, rank_block
from .settings import Config, pick_config
from .tiles import cast, dot, kept, last_arrival, to_float
from .workspace import counters


@triton.jit(do_not_specialize=["M", "threshold", "split"])
def project_rows(
    x,
    A,
    h,
    partial,
    counter,
    seed,
    threshold,
    scale,
    M,
    K,
    r,
    each,
    split,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    STACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """`h [M, r] = scale * dropped(x [M, K]) A [r, K]ᵀ`; `split` programs share a tile, the last to arrive adds their sums.

    BY_COLUMN: A is stored `[K, r]` (lora_B, for `g = dy B`).  STACKED: A holds r / each adapters of `each` ranks, and h is one
    `[M, each]` after the other.
    """
    DT: tl.constexpr = x.dtype.element_ty
    pm = tl.program_id(0)
    pr = tl.program_id(1)
    ps = tl.program_id(2)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    rr = pr * R + tl.arange(0, R)
    mm = rm < M
    mr = rr < r
    rows = tl.where(mm, rm, 0).to(tl.int64)
    chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    for k in range(ps * chunk, tl.minimum((ps + 1) * chunk, K), BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        mk = rk < K
        a = tl.load(x + rows[:, None] * K + rk[None, :], mask=mk[None, :], other=0.0)
        if DROPOUT:
            a = tl.where(kept(seed, threshold, rows, k, K, BLOCK_M, BLOCK_K, QUAD), a, tl.zeros_like(a))
        if BY_COLUMN:
            f = tl.load(A + rk[:, None] * r + rr[None, :], mask=mk[:, None] & mr[None, :], other=0.0)
            acc = dot(a, cast(f, DT), acc)
        else:
            f = tl.load(A + rr[:, None] * K + rk[None, :], mask=mr[:, None] & mk[None, :], other=0.0)
            acc = dot(a, cast(f, DT).T, acc)
    inside = mm[:, None] & mr[None, :]
    at = rows[:, None] * r + rr[None, :]
    out = h + rank_offsets(rows, rr, M, r, each, STACKED)
    if not SPLIT:
        tl.store(out, cast(acc * scale, DT), mask=inside)
    else:
        size = M.to(tl.int64) * r
        tl.store(partial + ps * size + at, acc, mask=inside)
        if last_arrival(counter + pm * tl.num_programs(1) + pr, split):
            total = tl.zeros((BLOCK_M, R), tl.float32)
            for i in range(split):
                total += tl.load(partial + i * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out, cast(total * scale, DT), mask=inside)


@triton.jit
def rank_offsets(rows, ranks, M, r, each, STACKED: tl.constexpr):
    """Offsets into `[M, r]`, or into r / each `[M, each]` one after the other."""
    if STACKED:
        return (ranks // each * M.to(tl.int64) * each + ranks % each)[None, :] + rows[:, None] * each
    else:
        return rows[:, None] * r + ranks[None, :]


@triton.jit(do_not_specialize=["M", "threshold"])
def expand_rows(
    t,
    f,
    bias,
    out,
    seed,
    threshold,
    scale,
    M,
    C,
    r,
    each,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    STACKED: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """`out [M, C] = dropped(scale * t [M, r] F) + bias`, F stored `[C, r]` (BY_COLUMN: lora_B) or `[r, C]` (lora_A).

    ADD: onto what `out` holds.  STACKED: t is r / each `[M, each]` one after the other.
    """
    DT: tl.constexpr = t.dtype.element_ty
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    rc = first + tl.arange(0, BLOCK_C)
    mm = rm < M
    mc = rc < C
    rows = tl.where(mm, rm, 0).to(tl.int64)
    acc = low_rank(t, f, rows, rc, mc, M, C, r, each, BLOCK_M, BLOCK_C, R, BY_COLUMN, STACKED, DT) * scale
    if DROPOUT:
        acc = tl.where(kept(seed, threshold, rows, first, C, BLOCK_M, BLOCK_C, QUAD), acc, 0.0)
    if BIAS:
        acc += to_float(tl.load(bias + rc, mask=mc, other=0.0))[None, :]
    inside = mm[:, None] & mc[None, :]
    place = out + rows[:, None] * C + rc[None, :]
    if ADD:
        acc += to_float(tl.load(place, mask=inside, other=0.0))
    tl.store(place, cast(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def low_rank(
    t,
    f,
    rows,
    cols,
    mask_cols,
    M,
    C,
    r,
    each,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    STACKED: tl.constexpr,
    DT: tl.constexpr,
):
    """float32 tile of `t [M, r] F`, R ranks at a time; rows in range, columns masked."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in tl.range(0, r, R, num_stages=1):
        rr = first + tl.arange(0, R)
        mr = rr < r
        a = tl.load(t + rank_offsets(rows, rr, M, r, each, STACKED), mask=mr[None, :], other=0.0)
        if BY_COLUMN:
            b = tl.load(f + cols[:, None] * r + rr[None, :], mask=mask_cols[:, None] & mr[None, :], other=0.0)
            acc = dot(a, cast(b, DT).T, acc)
        else:
            b = tl.load(f + rr[:, None] * C + cols[None, :], mask=mr[:, None] & mask_cols[None, :], other=0.0)
            acc = dot(a, cast(b, DT), acc)
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "steps"])
def read_once(
    x,
    f,
    t,
    product,
    grad,
    total,
    seed,
    threshold,
    M,
    C,
    r,
    each,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    STACKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_BY_RANK: tl.constexpr,
    TOTAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """Everything that reads `x [M, C]`, from one read of it: a program owns steps * BLOCK_M rows of BLOCK_C columns.

    float32 partials: PRODUCT: `x f [C, r]`, one `[M, r]` a column tile; GRAD: `dropped(x)ᵀ t [M, r]`, one `[C, r]` (or
    `[r, C]` if GRAD_BY_RANK) a row range; TOTAL: the sum of the rows, one `[C]` a row range.
    """
    DT: tl.constexpr = x.dtype.element_ty
    pm = tl.program_id(0)
    pc = tl.program_id(1)
    pr = tl.program_id(2)
    first = pc * BLOCK_C
    rc = first + tl.arange(0, BLOCK_C)
    rr = pr * R + tl.arange(0, R)
    mc = rc < C
    mr = rr < r
    if PRODUCT:
        b = cast(tl.load(f + rc[:, None] * r + rr[None, :], mask=mc[:, None] & mr[None, :], other=0.0), DT)
    acc = tl.zeros((BLOCK_C, R), tl.float32)
    rows_sum = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(steps):
        rm = (pm * steps + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        mm = rm < M
        rows = tl.where(mm, rm, 0).to(tl.int64)
        a = tl.load(x + rows[:, None] * C + rc[None, :], mask=mm[:, None] & mc[None, :], other=0.0)
        if PRODUCT:
            part = dot(a, b, tl.zeros((BLOCK_M, R), tl.float32))
            at = (pc * M.to(tl.int64) + rows[:, None]) * r + rr[None, :]
            tl.store(product + at, part, mask=mm[:, None] & mr[None, :])
        if TOTAL:
            rows_sum += tl.sum(to_float(a), axis=0)
        if GRAD:
            if DROPOUT:
                a = tl.where(kept(seed, threshold, rows, first, C, BLOCK_M, BLOCK_C, QUAD), a, tl.zeros_like(a))
            v = tl.load(t + rank_offsets(rows, rr, M, r, each, STACKED), mask=mm[:, None] & mr[None, :], other=0.0)
            acc = dot(a.T, v, acc)
    if GRAD:
        at = rr[None, :] * C + rc[:, None] if GRAD_BY_RANK else rc[:, None] * r + rr[None, :]
        tl.store(grad + pm.to(tl.int64) * C * r + at, acc, mask=mc[:, None] & mr[None, :])
    if TOTAL and pr == 0:
        tl.store(total + pm.to(tl.int64) * C + rc, rows_sum, mask=mc)


@triton.jit(do_not_specialize=["n", "stride"])
def add_partials(partial, out, scale, count, stride, n, BLOCK: tl.constexpr):
    """`out = scale * sum of n partials`, `stride` apart, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in range(n):
        acc += tl.load(partial + p * stride.to(tl.int64) + i, mask=inside, other=0.0)
    tl.store(out + i, cast(acc * scale, out.dtype.element_ty), mask=inside)


# ---- launchers


def keep_args(seed: Tensor | None, p: float, columns: int) -> tuple[Tensor | None, int, float, dict[str, Any]]:
    """seed, threshold, `1 / (1 - p)` and the flags with which kernels drop elements; the mask is drawn in the kernel."""
    level = round(p * 2**32)
    if seed is None or level == 0:
        return None, 0, 1.0, {"DROPOUT": False, "QUAD": False}
    bits = level - 1
    return seed, bits - (1 << 32) if bits >> 31 else bits, 1 / (1 - p), {"DROPOUT": True, "QUAD": columns % 4 == 0}


MAX_PARTIAL_BYTES = 16 << 20
"""Most memory for the partial sums of one read: beyond it, reading the input twice costs less than writing them."""


def project(
    x: Tensor,
    A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    each: int | None = None,
    by_column: bool = False,
    h: Tensor | None = None,
) -> Tensor:
    """`h = dropout(x) Aᵀ [M, r]` in x.dtype, into `h` if it is given; for a stack of adapters of `each` ranks,
    `[r / each, M, each]`; `by_column`: A is stored `[K, r]`."""
    M, K = x.shape
    r = A.shape[1 if by_column else 0]
    if h is None:
        h = x.new_empty(M, r) if each is None else x.new_empty(r // each, M, each)
    config = _buffers(pick_config("project", M, 0, K, r, arch_of(x.device)), x.dtype)
    R = rank_block(r, 128)
    grid = (cdiv(M, config.block_m), cdiv(r, R), config.split)
    partial = counter = None
    if config.split > 1:
        partial = x.new_empty(config.split, M, r, dtype=torch.float32)
        counter = counters(x.device, grid[0] * grid[1])
    seed, threshold, scale, flags = keep_args(seed, dropout_p, K)
    flags |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "R": R}
    flags |= {"BY_COLUMN": by_column, "STACKED": each is not None, "SPLIT": config.split > 1}
    args = (x, A, h, partial, counter, seed, threshold, scale, M, K, r, each or r, config.split)
    launch(project_rows, grid, args, flags, config)
    return h


def expand(
    t: Tensor,
    factor: Tensor,
    by_column: bool,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    onto: Tensor | None = None,
) -> Tensor:
    """`dropout(scaling * t F) + bias` in t.dtype, F being lora_B `[C, r]` (`by_column`) or lora_A `[r, C]`.

    `onto` is added to, and returned.  `t` may be a stack `[n, M, each]` for n adapters stacked in F.
    """
    M, each = t.shape[-2:]
    C, r = (factor.shape[0], factor.shape[1]) if by_column else (factor.shape[1], factor.shape[0])
    out = t.new_empty(M, C) if onto is None else onto
    config = _buffers(pick_config("expand", M, C, 0, r, arch_of(t.device)), t.dtype)
    grid = (cdiv(M, config.block_m), cdiv(C, config.block_n))
    seed, threshold, keep_scale, flags = keep_args(seed, dropout_p, C)
    flags |= {"BLOCK_M": config.block_m, "BLOCK_C": config.block_n, "R": rank_block(r, 64)}
    flags |= {"BY_COLUMN": by_column, "STACKED": t.dim() == 3, "ADD": onto is not None, "BIAS": bias is not None}
    args = (t, factor, bias, out, seed, threshold, scaling * keep_scale, M, C, r, each)
    launch(expand_rows, grid, args, flags, config)
    return out


def read(
    x: Tensor,
    factor: Tensor | None,
    t: Tensor | None,
    scaling: float,
    grads: Sequence[Tensor],
    by_rank: bool,
    total: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    product: Tensor | None = None,
) -> None:
    """One read of `x [M, C]`: fills `product [M, r]` with `x F` for `factor` `[C, r]`; `grads` with
    `scaling * dropout(x)ᵀ t` (`[C, r]`, or `[r, C]` if `by_rank`; one for each of a stack `t [n, M, each]`); and `total [C]`
    with the sum of the rows."""
    M, C = x.shape
    each = 1 if t is None and factor is None else (t if t is not None else factor).shape[-1]  # type: ignore[union-attr]
    r = each * max(1, len(grads))
    config = _buffers(pick_config("read_once", M, C, 0, r, arch_of(x.device)), x.dtype)
    R = rank_block(r, 64 if x.dtype != torch.float32 else 16)  # float32 products take no tensor cores but many registers
    column_tiles = cdiv(C, config.block_n)
    if product is not None and factor is not None and 4 * column_tiles * M * r > MAX_PARTIAL_BYTES:
        project(x, factor, 0.0, None, by_column=True, h=product)
        product = None
        if not grads and total is None:
            return
    ranges = max(1, MAX_PARTIAL_BYTES // (4 * C * r))
    steps = max(config.steps, cdiv(M, config.block_m * ranges))
    row_ranges = cdiv(M, config.block_m * steps)

    def partials(wanted: bool, *shape: int) -> Tensor | None:
        return x.new_empty(shape, dtype=torch.float32) if wanted else None

    products = partials(product is not None, column_tiles, M, r)
    sums = partials(bool(grads), row_ranges, C * r)
    totals = partials(total is not None, row_ranges, C)
    seed, threshold, keep_scale, flags = keep_args(seed, dropout_p, C)
    flags |= {"BLOCK_M": config.block_m, "BLOCK_C": config.block_n, "R": R, "STACKED": t is not None and t.dim() == 3}
    flags |= {"PRODUCT": product is not None, "GRAD": bool(grads), "GRAD_BY_RANK": by_rank, "TOTAL": total is not None}
    args = (x, factor if product is not None else None, t, products, sums, totals, seed, threshold, M, C, r, each, steps)
    launch(read_once, (row_ranges, column_tiles, cdiv(r, R)), args, flags, config)
    for i, grad in enumerate(grads):
        assert sums is not None
        _add(sums[:, i * C * each :], grad, scaling * keep_scale)
    if totals is not None and total is not None:
        _add(totals, total, 1.0)
    if products is not None and product is not None:
        _add(products, product, 1.0)


def _add(partial: Tensor, out: Tensor, scale: float) -> None:
    """`out = scale * partial.sum(0)`, `partial` being `[n, at least out.numel()]`."""
    count = out.numel()
    config = pick_config("reduce", 0, 1, count, 0, arch_of(out.device))
    args = (partial, out, scale, count, partial.stride(0), partial.shape[0])
    launch(add_partials, (cdiv(count, config.block_n),), args, {"BLOCK": config.block_n}, config)


def _buffers(config: Config, dtype: torch.dtype) -> Config:
    """`config` with fewer tiles in flight where they are twice as large."""
    return replace(config, stages=2) if dtype == torch.float32 else config
