# ruff: noqa: SIM300 (DT is the dtype that is asked about)
"""What the kernels share on the device: decoding of codes and scales, dropout, program order, casts and dots.

A tile of the weight is decoded in groups: `GROUP` (32 or 64) elements of the flattened weight that start at a multiple of
GROUP lie in one block, whatever the shape, because a block is a multiple of GROUP; so a kernel that steps by GROUP needs one
scale a group, block index = group index >> `SHIFT`.  This holds for blocks that straddle rows too, as long as K % GROUP == 0.

Two twins decode codes, bit for bit alike (`round(code * absmax)`, one rounding):

- TABLE: the 16 values of a block are scaled and rounded once, kept as 32 bytes in 8 registers, and looked up with byte
  permutes: 2.6 integer operations a weight and no memory traffic.  16-bit weights on NVIDIA GPUs; TABLE is `table_asm`.
- `lut`: a gather from the 16 values in memory.  TABLE is None: float32 weights, other vendors, the interpreter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels.  Its bf16 casts truncate and its bf16 dots multiply bit patterns, so `cast`,
`to_float` and `dot` below do those themselves there."""


# ---- PTX


def table_asm(code: Sequence[float], dtype: str) -> str:
    """absmax ($8) -> the block's 16 scaled values in `dtype` (`bf16` or `f16`), low bytes in $0-$3, high bytes in $4-$7."""
    bits = [f"0f{struct.unpack('>I', struct.pack('>f', v))[0]:08X}" for v in code]
    asm = "{\n.reg .f32 v<16>;\n.reg .b32 p<8>;\n"
    asm += "".join(f"mul.rn.f32 v{i}, $8, {b};\n" for i, b in enumerate(bits))
    asm += "".join(f"cvt.rn.{dtype}x2.f32 p{i}, v{2 * i + 1}, v{2 * i};\n" for i in range(8))
    for i in range(4):
        asm += f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;\nprmt.b32 ${i + 4}, p{2 * i}, p{2 * i + 1}, 0x7531;\n"
    return asm + "}"


def word_asm() -> str:
    """8 codes ($4, as stored) and a table ($5-$12) -> 8 weights in order, four 16-bit pairs ($0-$3); 21 operations.

    A byte permute looks 4 codes up in 8 bytes, by the low 3 bits of each selector nibble: one for the first half of the
    table, one for the second, and a third that chooses between the two by the code's top bit.
    """
    asm = "{\n.reg .b32 sa, sb, ma, mb, a, b, l, h;\nand.b32 sa, $4, 0x77777777;\nshr.u32 sb, sa, 16;\n"
    asm += "shr.u32 ma, $4, 1;\nlop3.b32 ma, ma, 0x44444444, 0x32103210, 0xEA;\nshr.u32 mb, ma, 16;\n"
    for select, half, out in (("sa", "ma", 0), ("sb", "mb", 2)):
        asm += f"prmt.b32 a, $5, $6, {select};\nprmt.b32 b, $7, $8, {select};\nprmt.b32 l, a, b, {half};\n"
        asm += f"prmt.b32 a, $9, $10, {select};\nprmt.b32 b, $11, $12, {select};\nprmt.b32 h, a, b, {half};\n"
        asm += f"prmt.b32 ${out}, l, h, 0x4051;\nprmt.b32 ${out + 1}, l, h, 0x6273;\n"
    return asm + "}"


WORD = tl.constexpr(word_asm())
MUL_ADD = tl.constexpr("{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 $0, t, $3; }")


# ---- numbers


@triton.jit
def to_float(v):
    if INTERPRET and v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(tl.float32)


@triton.jit
def cast(v, DT: tl.constexpr):
    """`v` in dtype DT, rounded to nearest even."""
    if v.dtype == DT:
        return v
    elif INTERPRET and DT == tl.bfloat16:
        u = to_float(v).to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return u.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return to_float(v).to(DT)


@triton.jit
def dot(a, b, acc):
    """`a @ b + acc` in float32; float32 operands without TF32."""
    if INTERPRET and a.dtype == tl.bfloat16:
        return tl.dot(to_float(a), to_float(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def mul_add(a, b, c, PTX: tl.constexpr):
    """`a * b`, rounded, `+ c`, rounded: never a fused multiply-add."""
    if PTX:
        return tl.inline_asm_elementwise(MUL_ADD, "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b + c


# ---- scales


@triton.jit
def load_absmax(absmax, code2, absmax2, offset, zero, block, NESTED: tl.constexpr, PTX: tl.constexpr):
    """float32 scale of each block index, double quantization decoded in registers.

    The one `offset` is loaded at a vector of addresses, `zero`: zeros that the compiler can't see through.  As a scalar it
    would be splat into the layout of the decoded tile, and Triton 3.6 then converts layouts after the decode instead of before
    it, 64 two-byte stores to shared memory a step.  In a loop, `zero` must not depend on the step, or it is loaded in each.
    """
    if NESTED:
        value = tl.load(code2 + tl.load(absmax + block).to(tl.int32))
        return mul_add(value, tl.load(absmax2 + (block >> 8)), tl.load(offset + zero), PTX)
    else:
        return tl.load(absmax + block)


@triton.jit
def load_absmax4(absmax, code2, absmax2, offset, zero, word, NESTED: tl.constexpr, PTX: tl.constexpr):
    """The same for 4 neighbouring blocks at once, int32 `[R, 1]` index of 4 -> `[R, 4]`.

    A 4-byte load is asynchronous and is pipelined together with the gather from `code2`; a 1-byte load is not.
    """
    j = tl.arange(0, 4)[None, :]
    if NESTED:
        four = tl.load(absmax.to(tl.pointer_type(tl.int32), bitcast=True) + word)
        value = tl.load(code2 + ((four >> (8 * j)) & 255))
        return mul_add(value, tl.load(absmax2 + (word >> 6)), tl.load(offset + zero), PTX)
    else:
        return tl.load(absmax + word * 4 + j)


# ---- codes


@triton.jit
def _halves(pairs, DT: tl.constexpr):
    low = (pairs & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    return tl.join(low, ((pairs >> 16) & 0xFFFF).to(tl.int16).to(DT, bitcast=True))


@triton.jit
def decode(words, scale, lut, R: tl.constexpr, W: tl.constexpr, DT: tl.constexpr, TABLE: tl.constexpr):
    """int32 words `[R, W]` of 8 codes, float32 scale `[R, 1]` of the one block a row lies in -> DT `[R, 8 W]`."""
    if TABLE is not None:
        t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
            TABLE, "=r,=r,=r,=r,=r,=r,=r,=r,f", [scale], dtype=(tl.int32,) * 8, is_pure=True, pack=1
        )
        o0, o1, o2, o3 = tl.inline_asm_elementwise(
            WORD,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(tl.join(o0, o2), tl.join(o1, o3))  # [R, W, 2, 2], o0 o1 o2 o3 in memory order
        return tl.reshape(_halves(tl.reshape(pairs, (R, W * 4)), DT), (R, W * 8))
    else:
        i = tl.arange(0, 8)
        nibble = (i // 2) * 8 + 4 * (1 - i % 2)  # the first element is in the high nibble of its byte
        code = (words[:, :, None] >> nibble[None, None, :]) & 15
        return tl.reshape(cast(tl.load(lut + code) * scale[:, :, None], DT), (R, W * 8))


@triton.jit
def load_weight(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    lut,
    zero,
    rows,
    col,
    K,
    R: tl.constexpr,
    C: tl.constexpr,
    DT: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The decoded tile `W[rows, col : col + C]`, DT `[R, C]`; rows and columns in range, K and col multiples of GROUP;
    `zero [R]` as in `load_absmax`.

    No mask: on the packed load it costs a predicate and a zero fill a word, 12% of a GEMM's main loop.
    """
    G: tl.constexpr = C // GROUP
    row_words = tl.multiple_of(K // 8, GROUP // 8)  # without the hint the loads are 8 bytes wide, not 16
    first = tl.multiple_of(col // 8, GROUP // 8)
    words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    q = tl.load(words + rows[:, None] * row_words + (first + tl.arange(0, C // 8))[None, :])
    if SCALE_WORDS:
        tl.static_assert(G == 4 and SHIFT == 0)
        word = rows[:, None] * (K // (4 * GROUP)) + col // (4 * GROUP)
        s = load_absmax4(absmax, code2, absmax2, offset, zero[:, None], word, NESTED, PTX)
    else:
        group = rows[:, None] * (K // GROUP) + (col // GROUP + tl.arange(0, G))[None, :]
        s = load_absmax(absmax, code2, absmax2, offset, zero[:, None], group >> SHIFT, NESTED, PTX)
    W: tl.constexpr = GROUP // 8
    tile = decode(tl.reshape(q, (R * G, W)), tl.reshape(s, (R * G, 1)), lut, R * G, W, DT, TABLE)
    return tl.reshape(tile, (R, C))


@triton.jit
def shuffle_k(a, R: tl.constexpr, C: tl.constexpr):
    """A permutation of the columns of `[R, C]`, applied to both operands of a dot, which does not care about their order.

    (lane of 4, step, half, pair) -> (step, half, lane of 4, pair): the fragment of m16n8k16 and of wgmma for a lane that
    holds C / 4 consecutive weights, so that what a lane loads is its operand and W never goes through shared memory.
    """
    return tl.reshape(tl.permute(tl.reshape(a, (R, 4, C // 16, 2, 2)), (0, 2, 3, 1, 4)), (R, C))


# ---- dropout


@triton.jit
def kept(seed, threshold, rows, col, width, R: tl.constexpr, C: tl.constexpr, QUAD: tl.constexpr):
    """Whether dropout keeps each element of the tile `[rows, col : col + C]` of a matrix of `width` columns.

    Element i (flat) is kept when word i % 4 of Philox(seed, i // 4) exceeds `threshold`, an int32 holding the bits of the
    unsigned p * 2**32 - 1.  QUAD: width and col are multiples of 4, so one call serves 4 neighbours.
    """
    key = tl.load(seed)
    limit = threshold.to(tl.uint32, bitcast=True)
    row = rows.to(tl.int64)[:, None] * width
    if QUAD:
        quad = (row + col) // 4 + tl.arange(0, C // 4)[None, :]
        w0, w1, w2, w3 = tl.randint4x(key, quad)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, C))
    else:
        element = row + col + tl.arange(0, C)[None, :]
        w0, w1, w2, w3 = tl.randint4x(key, element // 4)
        lane = element % 4
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return words.to(tl.uint32, bitcast=True) > limit


# ---- program order


@triton.jit
def swizzle(pid, n_rows, n_cols, GROUP: tl.constexpr):
    """Tile (row, column) of a program: column by column inside groups of GROUP rows, so that neighbours share tiles in L2."""
    per_group = GROUP * n_cols
    first = (pid // per_group) * GROUP
    size = tl.minimum(n_rows - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def last_arrival(counter, count):
    """Whether this program is the last of `count` to arrive; the counter is left at zero for the next launch.

    The barrier orders every thread's stores before the arrival; the reader loads past L1 (`.cg`).
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last
