"""float32, float16 or bfloat16 -> 4-bit codes and scales, one launch: block maximum, nearest code, packing.

Bit-identical to bitsandbytes: a full block is scaled by the rounded reciprocal of its maximum, a short last block divided by
it; a code is the number of midpoints below the scaled value, so a tie goes to the smaller code.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import BLOCKSIZE2, DYNAMIC_MAP, format_of
from .launch import config_of, launch, on
from .settings import Problem, cdiv
from .tiles import to_float

TINY = tl.constexpr(1e-38)
"""Smallest divisor of a block."""


@triton.jit
def quantize_blocks(
    weight,
    packed,
    absmax,
    bad,
    count,
    BLOCKSIZE: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    MIDPOINTS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """N_BLOCKS blocks a program; `bad` becomes nonzero when an element is not finite.

    MIDPOINTS: between the 16 values of the format.  ORDER: their indices by ascending value, a nibble each; None where an index
    is its place.
    """
    block = tl.program_id(0).to(tl.int64) * N_BLOCKS + tl.arange(0, N_BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    v = to_float(tl.load(weight + i, mask=i < count, other=0.0))
    zero = tl.sum(v * 0.0, axis=1)  # NaN where an element is not finite, which a maximum would lose
    tl.store(bad + block * 0, 1, mask=zero != 0)
    most = tl.max(tl.abs(v), axis=1)
    divisor = tl.maximum(most, tl.full((N_BLOCKS,), TINY, tl.float32))
    scaled = v * tl.div_rn(tl.full((N_BLOCKS,), 1.0, tl.float32), divisor)[:, None]
    if TAIL:
        short = (block + 1) * BLOCKSIZE > count
        scaled = tl.where(short[:, None], tl.div_rn(v, tl.broadcast_to(divisor[:, None], v.shape)), scaled)
        most = tl.where(short, divisor, most)
    tl.store(absmax + block, most, mask=block * BLOCKSIZE < count)
    below = tl.zeros_like(scaled)  # counted in float32: LLVM would narrow an integer count to bytes kept on the stack
    for m in tl.static_range(15):
        below += tl.where(scaled > MIDPOINTS[m], 1.0, 0.0)
    code = below.to(tl.int32)
    if ORDER is not None:
        order = tl.full(code.shape, ORDER, tl.int64)
        code = ((order >> (4 * code).to(tl.int64)) & 15).to(tl.int32)
    nibble = 16 - 15 * tl.arange(0, 2)  # the first of two elements is the high half of their byte
    pair = tl.sum(tl.reshape(code, (N_BLOCKS, BLOCKSIZE // 2, 2)) * nibble[None, None, :], axis=2)
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, pair.to(tl.uint8), mask=byte * 2 < count)


@triton.jit
def quantize_scales(absmax, offset, midpoints, out, absmax2, count, BLOCK: tl.constexpr):
    """`absmax - offset` -> the nearest of the 256 values of the dynamic map, through bitsandbytes' grid of 65536 steps of
    [-1, 1], and one scale for BLOCK of them."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    v = tl.where(inside, tl.load(absmax + i, mask=inside, other=0.0) - tl.load(offset), 0.0)
    most = tl.max(tl.abs(v), axis=0)
    tl.store(absmax2 + block, most)
    one = tl.full((BLOCK,), 1.0, tl.float32)
    divisor = tl.where(most == 0, one, most)
    scaled = v * tl.div_rn(one, divisor)
    step = (tl.minimum(tl.maximum(scaled, -1.0), 1.0) + 1.0) * 0.5
    step = (step.to(tl.float64) * 65535.0 + 0.5).to(tl.float32).to(tl.int32)  # exact in float64: one rounding
    on_grid = tl.div_rn(step.to(tl.float32) * 2.0, one * 65535.0) - 1.0
    index = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(7, -1, -1):  # the number of midpoints below
        probe = index + (1 << bit)
        index = tl.where(tl.load(midpoints + probe - 1) < on_grid, probe, index)
    index = tl.where(most == 0, 0, tl.where(scaled == scaled, index, 0))  # 0 * inf where 1 / most overflows
    tl.store(out + i, index.to(tl.uint8), mask=inside)


def _order(quant_type: str) -> int | None:
    """`ORDER` of a format, as an int64."""
    order = format_of(quant_type).order
    if order == tuple(range(len(order))):
        return None
    packed = sum(index << 4 * i for i, index in enumerate(order))
    return packed - (1 << 64) if packed >> 63 else packed


@functools.cache
def _dynamic_midpoints(device: torch.device) -> Tensor:
    return (0.5 * (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:])).to(device)


def quantize(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`weight [*]` -> packed uint8 `[ceil(n / 2)]`, absmax `[n_blocks]` (float32, or uint8 with absmax2 and offset)."""
    n, device = weight.numel(), weight.device
    n_blocks = cdiv(n, blocksize)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(n_blocks, dtype=torch.float32, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    config = config_of(Problem("quantize", K=n), device)
    many = max(1, config.block_n // blocksize)
    flags = {
        "BLOCKSIZE": blocksize,
        "N_BLOCKS": many,
        "TAIL": n % blocksize != 0,
        "MIDPOINTS": format_of(quant_type).midpoints,
        "ORDER": _order(quant_type),
    }
    with on(device):
        launch(quantize_blocks, (cdiv(n_blocks, many),), (weight, packed, absmax, bad, n), flags, config)
        if not bad.is_meta and bad.item():
            raise ValueError("weight contains NaN or infinity")
        if not double_quant:
            return packed, absmax, None, None
        offset = absmax.mean()
        out = torch.empty(n_blocks, dtype=torch.uint8, device=device)
        absmax2 = torch.empty(cdiv(n_blocks, BLOCKSIZE2), dtype=torch.float32, device=device)
        args = (absmax, offset, _dynamic_midpoints(device), out, absmax2, n_blocks)
        launch(quantize_scales, (absmax2.numel(),), args, {"BLOCK": BLOCKSIZE2}, config)
    return packed, out, absmax2, offset
