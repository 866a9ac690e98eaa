"""4-bit codes -> float32, float16 or bfloat16, double-quantized scales decoded in registers: one launch, one rounding."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantizedWeight
from .launch import config_of, has_ptx, launch, on
from .settings import MAX_PANEL_BYTES, Problem, cdiv
from .tiles import cast, decode, load_absmax
from .weights import Weight, constant, group_of, weight_args, weight_meta


@triton.jit
def dequantize_groups(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    out,
    first,
    count,
    cols,
    row_groups,
    N_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIP: tl.constexpr,
    NESTED: tl.constexpr,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """`count` groups of GROUP elements from group `first` on, a thread decoding 16 bytes; STRIP: the first `cols` groups of
    each run of `row_groups` (a range of columns)."""
    e = tl.program_id(0) * N_GROUPS + tl.arange(0, N_GROUPS)
    inside = e < count
    e = tl.where(inside, e, 0)
    group = first + e
    if STRIP:
        group = first + e // cols * row_groups + e % cols
    words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    W: tl.constexpr = GROUP // 8
    q = tl.load(words + group[:, None].to(tl.int64) * W + tl.arange(0, W)[None, :])
    s = load_absmax(absmax, code2, absmax2, offset, group >> 31, group >> SHIFT, NESTED, PTX)[:, None]
    w = decode(q, s, lut, N_GROUPS, W, out.dtype.element_ty, TABLE)
    tl.store(out + e[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :], w, mask=inside[:, None])


@triton.jit
def dequantize_elements(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    out,
    first,
    count,
    cols,
    row_elements,
    BLOCK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PTX: tl.constexpr,
):
    """Any elements, one by one: rows that start inside a byte or a block, a last byte that holds one code."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < count
    e = tl.where(inside, e, 0)
    i = first + e // cols * row_elements + e % cols
    byte = tl.load(packed + i // 2).to(tl.int32)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    block = (i // BLOCKSIZE).to(tl.int32)
    s = load_absmax(absmax, code2, absmax2, offset, block >> 31, block, NESTED, PTX)
    tl.store(out + e, cast(tl.load(lut + code) * s, out.dtype.element_ty), mask=inside)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`[*shape]` in `dtype`."""
    out = torch.empty(qw.shape, dtype=dtype, device=qw.device)
    with on(qw.device):
        _launch(qw, out, 0, qw.numel, qw.numel)
    return out


def decode_panel(w: Weight, rows: range, cols: range, panel: Tensor) -> Tensor:
    """`W[rows, cols]` of a weight `[N, K]`, contiguous, at the start of the flat buffer `panel` and in its dtype."""
    K = w.shape[1]
    out = panel[: len(rows) * len(cols)].view(len(rows), len(cols))
    first = rows.start * K + cols.start
    if len(cols) == K:
        _launch(w, out, first, out.numel(), out.numel())
    else:
        _launch(w, out, first, len(cols), K)
    return out


def slices(n: int, bytes_each: int, align: int = 256) -> list[range]:
    """`range(n)` in equal slices of at most `MAX_PANEL_BYTES`, cut at multiples of `align` where that is possible."""
    most = max(1, MAX_PANEL_BYTES // bytes_each)
    size = cdiv(n, cdiv(n, most))
    if size < n and most >= align:
        size = min(cdiv(size, align) * align, most // align * align)
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def _launch(w: Weight, out: Tensor, first: int, cols: int, stride: int) -> None:
    """Decodes to `out` the first `cols` elements of each run of `stride`, from element `first` on."""
    count, strip = out.numel(), cols != out.numel()
    args = weight_args(w, out.dtype)
    group = group_of(w, math.gcd(first, count, cols, stride if strip else 0))
    if group:
        config = config_of(Problem("dequantize", K=count), w.packed.device)
        n = config.block_n // group
        flags = {"N_GROUPS": n, "STRIP": strip, **weight_meta(w, group, out.dtype)}
        sizes = first // group, count // group, cols // group, stride // group
        launch(dequantize_groups, (cdiv(count // group, n),), (*args, out, *sizes), flags, config)
    else:
        config = config_of(Problem("dequantize_elements", K=count), w.packed.device)
        args = (*args[:5], constant(w.quant_type, w.packed.device))
        flags = {"BLOCK": config.block_n, "BLOCKSIZE": w.blocksize, "NESTED": w.absmax2 is not None, "PTX": has_ptx()}
        grid = (cdiv(count, config.block_n),)
        launch(dequantize_elements, grid, (*args, out, first, count, cols, stride), flags, config)
