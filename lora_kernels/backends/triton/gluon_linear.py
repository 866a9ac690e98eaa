"""The fused kernel for sm_90 in Gluon: W is decoded for one step while the tensor cores work on the step before.

Triton waits for a matrix instruction at once when an operand was written to shared memory in the loop, so `linear_fused`
decodes and multiplies in turns, and only a second program on the SM fills the gaps.  Gluon leaves the wait to the kernel.
It compiles ahead of time and has not run on a GPU yet: Gluon has no interpreter, and no setting takes this path by default.

x and y have 16 bits, K is a multiple of 64, and so is a block; `settings` sends the rest to the panel path.  Gluon changes from
one Triton to the next, so nothing imports this file before the path is asked for.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .tiles import cast, decode, mul_add, swizzle, to_float

_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # renamed in Triton 3.8
W_TILES = gl.constexpr(3)
"""Decoded tiles of W: one that is written, and two that matrix instructions in flight may read."""


@gluon.jit(do_not_specialize=["M"])
def linear_gluon(
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
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    X_TILES: gl.constexpr,
    GROUP_M: gl.constexpr,
    LORA: gl.constexpr,
    BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    SHIFT: gl.constexpr,
    NESTED: gl.constexpr,
    TABLE: gl.constexpr,
    PTX: gl.constexpr,
):
    """K is a multiple of BLOCK_K, and BLOCK_K is one group."""
    gl.static_assert(BLOCK_K == GROUP and X_TILES >= 3)
    DT: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = BLOCK_K // 8
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DT)
    w_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], DT)
    read: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes a lane
    read_words: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [WARPS, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16])
    xs = gl.allocate_shared_memory(DT, [X_TILES, BLOCK_M, BLOCK_K], x_shared)
    ws = gl.allocate_shared_memory(DT, [W_TILES, BLOCK_N, BLOCK_K], w_shared)
    pm, pn = swizzle(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), GROUP_M)
    last_row = M - 1 - pm * BLOCK_M  # rows are clamped to it, and only the store is masked
    last_out = N - 1 - pn * BLOCK_N
    last = K // BLOCK_K - 1

    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, read))[None, :]
    rows = gl.minimum(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, read)), last_row)[:, None]
    x_tile = x + pm.to(gl.int64) * BLOCK_M * K  # offsets inside the tile fit in 32 bits
    x_at = rows * K + columns
    for k in gl.static_range(X_TILES - 2):
        _copy(xs.index(k), x_tile + gl.minimum(k, last) * BLOCK_K + x_at)
        async_copy.commit_group()

    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=mma)
    if LORA:  # through the last buffers, which nothing else uses before step 1
        B_rows = gl.minimum(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, read)), last_out)[:, None]
        h_tile = h + pm.to(gl.int64) * BLOCK_M * r
        B_tile = B + pn.to(gl.int64) * BLOCK_N * r
        for first in range(0, r, BLOCK_K):
            ranks = first + columns
            xs.index(X_TILES - 1).store(gl.load(h_tile + rows * r + ranks, mask=ranks < r, other=0.0))
            ws.index(W_TILES - 1).store(cast(gl.load(B_tile + B_rows * r + ranks, mask=ranks < r, other=0.0), DT))
            fence_async_shared()
            tl.debug_barrier()
            acc = warpgroup_mma(xs.index(X_TILES - 1), ws.index(W_TILES - 1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            tl.debug_barrier()
        acc *= scaling
    if BIAS:
        seen = gl.minimum(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma)), last_out)
        acc += to_float(gl.load(bias + pn * BLOCK_N + seen))[None, :]

    outs = gl.minimum(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, read_words)), last_out)[:, None]
    row_words = gl.multiple_of(K // 8, WORDS)
    words = packed.to(gl.pointer_type(gl.int32), bitcast=True) + pn.to(gl.int64) * BLOCK_N * row_words
    word_at = outs * row_words + gl.arange(0, WORDS, layout=gl.SliceLayout(0, read_words))[None, :]
    block = (pn * BLOCK_N + outs) * (K // GROUP)
    shift = gl.load(offset) if NESTED else 0.0
    # a step's words and scale are loaded one step before they are decoded, the code of its scale two steps before
    word = gl.load(words + word_at)
    scale = scale_of(gl.load(absmax + (block >> SHIFT)), block >> SHIFT, code2, absmax2, shift, NESTED, PTX)
    ws.index(0).store(decode(word, scale, lut, BLOCK_N, WORDS, DT, TABLE))
    k1 = gl.minimum(1, last)
    word = gl.load(words + k1 * WORDS + word_at)
    scale = scale_of(gl.load(absmax + (block + k1 >> SHIFT)), block + k1 >> SHIFT, code2, absmax2, shift, NESTED, PTX)
    stored = gl.load(absmax + (block + gl.minimum(2, last) >> SHIFT))

    for k in range(0, last + 1):
        # after the barrier every thread sees both tiles of this step, and no instruction reads those of step k - 2
        async_copy.wait_group(X_TILES - 3)
        fence_async_shared()
        tl.debug_barrier()
        acc = warpgroup_mma(xs.index(k % X_TILES), ws.index(k % W_TILES).permute((1, 0)), acc, is_async=True)
        ahead = k + X_TILES - 2
        _copy(xs.index(ahead % X_TILES), x_tile + gl.minimum(ahead, last) * BLOCK_K + x_at)
        async_copy.commit_group()
        ws.index((k + 1) % W_TILES).store(decode(word, scale, lut, BLOCK_N, WORDS, DT, TABLE))
        k2 = gl.minimum(k + 2, last)
        word = gl.load(words + k2 * WORDS + word_at)
        scale = scale_of(stored, block + k2 >> SHIFT, code2, absmax2, shift, NESTED, PTX)
        stored = gl.load(absmax + (block + gl.minimum(k + 3, last) >> SHIFT))
        acc = warpgroup_mma_wait(1, deps=[acc])
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    tl.debug_barrier()  # what follows may use the buffers' memory

    write: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, write))[:, None]
    outs = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, write))[None, :]
    y_tile = y + pm.to(gl.int64) * BLOCK_M * N + pn * BLOCK_N
    gl.store(y_tile + rows * N + outs, gl.convert_layout(cast(acc, DT), write), mask=(rows <= last_row) & (outs <= last_out))


@gluon.jit
def scale_of(stored, block, code2, absmax2, shift, NESTED: gl.constexpr, PTX: gl.constexpr):
    """float32 scale of each block from what `absmax` holds of it."""
    if NESTED:
        return mul_add(gl.load(code2 + stored.to(gl.int32)), gl.load(absmax2 + (block >> 8)), shift, PTX)
    else:
        return stored
