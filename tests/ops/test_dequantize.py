"""`dequantize`: `code * absmax` in float32, rounded once to the dtype asked for."""

from dataclasses import replace

import pytest
import torch
from helpers import COUNTS, FLOATS, STORAGE, assert_same_bits, random_weight

import lora_kernels as lk
from lora_kernels.formats import BLOCKSIZES
from lora_kernels.testing import decode

pytestmark = pytest.mark.usefixtures("poisoned")

F = pytest.importorskip("bitsandbytes.functional")


def bnb_generic(packed, state, dtype):
    """bitsandbytes' definition: the plain torch kernel that it falls back to for shapes its C++ kernel can't take."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compiled

    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    compute = compiled.__wrapped__  # without torch.compile around it
    return compute(packed.view(torch.uint8).reshape(-1), absmax, state.code, state.blocksize, state.shape, dtype)


def bnb_kernel(packed, state, dtype):
    """What `bitsandbytes.functional.dequantize_4bit` returns, or None where its C++ kernel contradicts `bnb_generic`:

    - it starts a new block at each row of K % 16 == 0 elements that K % blocksize != 0 does not divide into whole blocks;
    - it flushes bfloat16 subnormals to zero.
    A weight of one byte comes back transposed, because its [1, 1] codes look like those of a transposed weight.
    Shapes for which it runs `bnb_generic` itself under torch.compile are left out too, for the time that compiling takes.
    """
    K = state.shape[-1]
    if len(state.shape) == 1 or K % 2 or state.blocksize >= 2048 or (K % 16 == 0 and K % state.blocksize):
        return None
    previous, state.dtype = state.dtype, dtype
    out = F.dequantize_4bit(packed, state).reshape(state.shape)
    state.dtype = previous
    generic = bnb_generic(packed, state, dtype)
    subnormal = (generic != 0) & (generic.abs() < torch.finfo(torch.bfloat16).smallest_normal)
    if dtype == torch.bfloat16 and subnormal.any():
        out = torch.where(subnormal, generic, out)
    return out


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_values_are_those_of_bitsandbytes(backend, quant_type, double_quant, seed):
    generator = torch.Generator().manual_seed(seed)
    for index in range(160):
        weight = random_weight(generator, index)
        blocksize = BLOCKSIZES[index // 8 % 8]
        packed, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
        qw = lk.QuantizedWeight.from_bitsandbytes((packed, state))
        for dtype in FLOATS:
            what = f"case {index}: {list(weight.shape)} {weight.dtype} blocksize {blocksize} to {dtype}"
            got = lk.dequantize(qw, dtype)
            assert_same_bits(got, bnb_generic(packed, state, dtype), what)
            kernel = bnb_kernel(packed, state, dtype)
            if kernel is not None:
                assert_same_bits(got + 0.0, kernel + 0.0, f"{what} (C++)")  # the C++ kernel may return -0 for 0
                COUNTS[f"dequantize, values compared with the C++ kernel of bitsandbytes ({backend})"] += 1
        COUNTS[f"dequantize, values compared with bitsandbytes ({backend})"] += 1


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_all_bytes(backend, quant_type, dtype):
    """All 256 bytes at each place of a block, under scales of all exponents."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(64)
    absmax = (torch.rand(1024) + 0.5) * 2.0 ** torch.randint(-140, 120, (1024,))
    qw = lk.QuantizedWeight(packed, absmax, None, None, None, (64, 512), torch.float32, quant_type, 32)
    assert_same_bits(lk.dequantize(qw, dtype), decode(qw, dtype))


@pytest.mark.parametrize("K", [1, 2, 3, 7, 16, 48, 63, 64, 65, 100, 336, 576])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_blocks_that_straddle_rows(backend, K, blocksize):
    for N in (1, 2, 5, 33):
        for double_quant in (False, True):
            qw = lk.quantize(torch.randn(N, K), "nf4", blocksize, double_quant)
            for dtype in FLOATS:
                assert_same_bits(lk.dequantize(qw, dtype), decode(qw, dtype), f"{N}x{K} blocksize {blocksize} {dtype}")


def test_large_enough_for_threads(backend):
    qw = lk.quantize(torch.randn(517, 2050))
    assert_same_bits(lk.dequantize(qw, torch.bfloat16), decode(qw, torch.bfloat16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = lk.dequantize(qw, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(single, lk.dequantize(qw, torch.bfloat16))


@pytest.mark.parametrize("storage", STORAGE, ids=lambda d: str(d)[6:])
def test_storage_and_strides_do_not_matter(backend, storage):
    qw = lk.quantize(torch.randn(24, 56))
    want = lk.dequantize(qw)
    assert_same_bits(lk.dequantize(replace(qw, packed=qw.packed.view(-1).view(storage))), want)
    spread = torch.zeros(qw.packed.numel(), 2, dtype=torch.uint8)
    spread[:, 0] = qw.packed.view(-1)
    assert_same_bits(lk.dequantize(replace(qw, packed=spread[:, 0])), want)
    wide = torch.zeros(qw.absmax.numel(), 3, dtype=torch.uint8)
    wide[:, 1] = qw.absmax
    assert_same_bits(lk.dequantize(replace(qw, absmax=wide[:, 1])), want)


def test_default_dtype(backend):
    assert lk.dequantize(lk.quantize(torch.randn(2, 64, dtype=torch.bfloat16))).dtype == torch.bfloat16
    assert lk.quantize(torch.randn(2, 64, dtype=torch.float16)).dequantize().dtype == torch.float16


def test_opcheck(backend):
    for weight, double_quant in ((torch.randn(5, 33), True), (torch.randn(7), False)):
        qw = lk.quantize(weight, double_quant=double_quant)
        torch.library.opcheck(torch.ops.lora_kernels.dequantize, (*qw.op_args(), torch.float16))
        torch.library.opcheck(torch.ops.lora_kernels.quantize, (weight, "fp4", 32, double_quant))
