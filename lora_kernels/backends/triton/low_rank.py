"""The adapter's products: `h = dropout(x) Aᵀ`, `s h Bᵀ + bias`, `dropout(s g A)`, and `g`, `dA`, `dB`, `dbias` from one read.

Ranks are padded to a power of two in the tile and masked; a rank above the widest tile is done in chunks.  Sums over programs
go through float32 partials that are added in a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import config_of, launch, rank_block
from .settings import MAX_PARTIAL_BYTES, ONE_READ_RANKS, Problem, cdiv
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
    MASKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """`h [M, r] = scale * dropped(x [M, K]) A [r, K]ᵀ`; `split` programs share a tile, the last to arrive adds their sums.

    BY_COLUMN: A is stored `[K, r]` (lora_B, for `g = dy B`).  STACKED: A holds r / each adapters of `each` ranks, and h is one
    `[M, each]` after the other.  MASKS: each of them drops its own elements of x, by its own seed.
    """
    DT: tl.constexpr = x.dtype.element_ty
    n_ranks = rank_tiles(r, each, R, MASKS)
    pm = tl.program_id(0) // n_ranks  # tiles of ranks next to each other: they read the same x, once from memory
    pr = tl.program_id(0) % n_ranks
    ps = tl.program_id(1)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    rr, end, adapter = rank_tile(pr, r, each, R, MASKS)
    mm = rm < M
    mr = rr < end
    rows = tl.where(mm, rm, 0).to(tl.int64)
    chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    for k in range(ps * chunk, tl.minimum((ps + 1) * chunk, K), BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        mk = rk < K
        a = tl.load(x + rows[:, None] * K + rk[None, :], mask=mk[None, :], other=0.0)
        if DROPOUT:
            a = tl.where(kept(seed + adapter, threshold, rows, k, K, BLOCK_M, BLOCK_K, QUAD), a, tl.zeros_like(a))
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
        if last_arrival(counter + tl.program_id(0), split):
            total = tl.zeros((BLOCK_M, R), tl.float32)
            for i in range(split):
                total += tl.load(partial + i * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out, cast(total * scale, DT), mask=inside)


@triton.jit
def rank_tiles(r, each, R: tl.constexpr, MASKS: tl.constexpr):
    """Tiles of R ranks: of all r, or, with masks, of each adapter by itself."""
    if MASKS:
        return r // each * tl.cdiv(each, R)
    else:
        return tl.cdiv(r, R)


@triton.jit
def rank_tile(pr, r, each, R: tl.constexpr, MASKS: tl.constexpr):
    """The ranks of tile `pr`, the rank they must stay below, and the adapter they belong to (0 without masks)."""
    if MASKS:
        tiles = tl.cdiv(each, R)
        adapter = pr // tiles
        return adapter * each + pr % tiles * R + tl.arange(0, R), (adapter + 1) * each, adapter
    else:
        return pr * R + tl.arange(0, R), r, 0


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
    MASKS: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """`out [M, C] = dropped(scale * t [M, r] F) + bias`, F stored `[C, r]` (BY_COLUMN: lora_B) or `[r, C]` (lora_A).

    ADD: onto what `out` holds.  STACKED: t is r / each `[M, each]` one after the other.  MASKS: the product of each of them is
    dropped by its own seed.
    """
    DT: tl.constexpr = t.dtype.element_ty
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    rc = first + tl.arange(0, BLOCK_C)
    mm = rm < M
    mc = rc < C
    rows = tl.where(mm, rm, 0).to(tl.int64)
    span = each if MASKS else r
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for begin in tl.range(0, r, span, num_stages=1):
        part = low_rank(t, f, rows, rc, mc, M, C, r, begin, begin + span, each, BLOCK_M, BLOCK_C, R, BY_COLUMN, STACKED, DT)
        if DROPOUT:
            part = tl.where(kept(seed + begin // span, threshold, rows, first, C, BLOCK_M, BLOCK_C, QUAD), part, 0.0)
        acc += part
    acc *= scale
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
    begin,
    end,
    each,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    STACKED: tl.constexpr,
    DT: tl.constexpr,
):
    """float32 tile of `t [M, r] F` over ranks `begin` to `end`, R at a time; rows in range, columns masked."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in tl.range(begin, end, R, num_stages=1):
        rr = first + tl.arange(0, R)
        mr = rr < end
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
    MASKS: tl.constexpr,
    PRODUCT: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_BY_RANK: tl.constexpr,
    TOTAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUAD: tl.constexpr,
):
    """Everything that reads `x [M, C]`, from one read of it: a program owns steps * BLOCK_M rows of BLOCK_C columns.

    float32 partials: PRODUCT: `x f [C, r]`, one `[M, r]` a column tile; GRAD: `dropped(x)ᵀ t [M, r]`, one `[C, r]` (or
    `[r, C]` if GRAD_BY_RANK) a row range; TOTAL: the sum of the rows, one `[C]` a row range.  MASKS: as in `project_rows`.
    """
    DT: tl.constexpr = x.dtype.element_ty
    n_ranks = rank_tiles(r, each, R, MASKS)
    pm = tl.program_id(0) // n_ranks
    pr = tl.program_id(0) % n_ranks
    pc = tl.program_id(1)
    first = pc * BLOCK_C
    rc = first + tl.arange(0, BLOCK_C)
    rr, end, adapter = rank_tile(pr, r, each, R, MASKS)
    mc = rc < C
    mr = rr < end
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
                a = tl.where(kept(seed + adapter, threshold, rows, first, C, BLOCK_M, BLOCK_C, QUAD), a, tl.zeros_like(a))
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
    `[r / each, M, each]`, with a seed for each of them; `by_column`: A is stored `[K, r]`."""
    M, K = x.shape
    r = A.shape[1 if by_column else 0]
    if h is None:
        h = x.new_empty(M, r) if each is None else x.new_empty(r // each, M, each)
    config = config_of(Problem("project", M, 0, K, r, x.dtype == torch.float32), x.device)
    flags, tiles, seed, threshold, scale = _ranks(r, each, config.ranks, seed, dropout_p, K)
    grid = (cdiv(M, config.block_m) * tiles, config.split)
    partial = counter = None
    if config.split > 1:
        partial = x.new_empty(config.split, M, r, dtype=torch.float32)
        counter = counters(x.device, grid[0])
    flags |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BY_COLUMN": by_column, "SPLIT": config.split > 1}
    args = (x, A, h, partial, counter, seed, threshold, scale, M, K, r, each or r, config.split)
    launch(project_rows, grid, args, flags, config)
    return h


def _ranks(
    r: int, each: int | None, most: int, seed: Tensor | None, dropout_p: float, columns: int
) -> tuple[dict[str, Any], int, Tensor | None, int, float]:
    """Flags and number of the tiles of r ranks, of `most` at a time, of a stack of adapters of `each` ranks or of one; then
    what `keep_args` gives."""
    seed, threshold, scale, flags = keep_args(seed, dropout_p, columns)
    masks = each is not None and seed is not None
    R = rank_block(each if masks and each is not None else r, most)
    tiles = r // each * cdiv(each, R) if masks and each is not None else cdiv(r, R)
    return flags | {"R": R, "STACKED": each is not None, "MASKS": masks}, tiles, seed, threshold, scale


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

    `onto` is added to, and returned.  `t` may be a stack `[n, M, each]` for n adapters stacked in F, with n seeds.
    """
    M, each = t.shape[-2:]
    C, r = (factor.shape[0], factor.shape[1]) if by_column else (factor.shape[1], factor.shape[0])
    out = t.new_empty(M, C) if onto is None else onto
    config = config_of(Problem("expand", M, C, 0, r, t.dtype == torch.float32), t.device)
    grid = (cdiv(M, config.block_m), cdiv(C, config.block_n))
    flags, _, seed, threshold, keep_scale = _ranks(r, each if t.dim() == 3 else None, config.ranks, seed, dropout_p, C)
    flags |= {"BLOCK_M": config.block_m, "BLOCK_C": config.block_n, "BY_COLUMN": by_column}
    flags |= {"ADD": onto is not None, "BIAS": bias is not None}
    args = (t, factor, bias, out, seed, threshold, scaling * keep_scale, M, C, r, each)
    launch(expand_rows, grid, args, flags, config)
    return out


def read_dy(
    dy: Tensor, h: Tensor | None, lora_B: Tensor | None, scaling: float, need_g: bool, need_dB: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`g = dy B`, `dB` and `dbias` (float32) from one read of `dy`, None where not needed."""
    M, N = dy.shape
    g = dy.new_empty(M, lora_B.shape[1]) if need_g and lora_B is not None else None
    dB = torch.empty_like(lora_B) if need_dB and lora_B is not None else None
    dbias = dy.new_empty(N, dtype=torch.float32) if need_dbias else None
    if M == 0:
        return g, None if dB is None else dB.zero_(), None if dbias is None else dbias.zero_()
    if g is not None or dB is not None or dbias is not None:
        read(dy, lora_B, h if need_dB else None, scaling, [] if dB is None else [dB], False, dbias, product=g)
    return g, dB, dbias


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
    `scaling * dropout(x)ᵀ t` (`[C, r]`, or `[r, C]` if `by_rank`; one for each of a stack `t [n, M, each]`, with n seeds); and
    `total [C]` with the sum of the rows.  A product is made a slice of rows at a time, so that its partials stay small, or from
    a read of its own where that is cheaper."""
    M, C = x.shape
    each = 1 if t is None and factor is None else (t if t is not None else factor).shape[-1]  # type: ignore[union-attr]
    r = each * max(1, len(grads))
    config = config_of(Problem("read_once", M, C, 0, r, x.dtype == torch.float32), x.device)
    stacked = t is not None and t.dim() == 3
    flags, tiles, seed, threshold, keep_scale = _ranks(r, each if stacked else None, config.ranks, seed, dropout_p, C)
    columns = cdiv(C, config.block_n)
    rows = config.block_m * config.steps  # that one program reads
    ranges = cdiv(M, rows)
    at_once = ranges
    if product is not None and factor is not None:
        at_once = MAX_PARTIAL_BYTES // (4 * columns * r * rows)
        if r > ONE_READ_RANKS or not at_once or not (grads or total is not None):
            project(x, factor, 0.0, None, by_column=True, h=product)
            product, at_once = None, ranges
            if not grads and total is None:
                return

    def partials(wanted: bool, *shape: int) -> Tensor | None:
        return x.new_empty(shape, dtype=torch.float32) if wanted else None

    products = partials(product is not None, columns, min(M, at_once * rows), r)
    sums = partials(bool(grads), ranges, C * r)
    totals = partials(total is not None, ranges, C)
    flags |= {"BLOCK_M": config.block_m, "BLOCK_C": config.block_n, "PRODUCT": product is not None}
    flags |= {"GRAD": bool(grads), "GRAD_BY_RANK": by_rank, "TOTAL": total is not None}
    for i in range(0, ranges, at_once):
        part = slice(i * rows, min(M, (i + at_once) * rows))
        m = part.stop - part.start
        here = [None if p is None else p[i:] for p in (sums, totals)]
        args = (
            x[part],
            factor,
            t if stacked or t is None else t[part],
            products,
            *here,
            seed,
            threshold,
            m,
            C,
            r,
            each,
            config.steps,
        )
        launch(read_once, (cdiv(m, rows) * tiles, columns), args, flags, config)
        if products is not None and product is not None:
            _add(products.view(-1)[: columns * m * r].view(columns, m * r), product[part], 1.0)
    for i, grad in enumerate(grads):
        assert sums is not None
        _add(sums[:, i * C * each :], grad, scaling * keep_scale)
    if totals is not None and total is not None:
        _add(totals, total, 1.0)


def _add(partial: Tensor, out: Tensor, scale: float) -> None:
    """`out = scale * partial.sum(0)`, `partial` being `[n, at least out.numel()]`."""
    count = out.numel()
    config = config_of(Problem("reduce", K=count), out.device)
    args = (partial, out, scale, count, partial.stride(0), partial.shape[0])
    launch(add_partials, (cdiv(count, config.block_n),), args, {"BLOCK": config.block_n}, config)
