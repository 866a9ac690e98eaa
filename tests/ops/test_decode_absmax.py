"""`decode_absmax`: double-quantized scales to float32, a product rounded and a sum rounded."""

import pytest
import torch
from helpers import assert_same_bits

import lora_kernels as lk
from lora_kernels.formats import DYNAMIC_MAP

pytestmark = pytest.mark.usefixtures("poisoned")

decode = torch.ops.lora_kernels.decode_absmax


def rounded_twice(absmax, absmax2, code2, offset):
    """`code2 * absmax2` and the sum in float64, each rounded to float32: exact before each rounding."""
    product = (code2[absmax.int()].double() * absmax2.double().repeat_interleave(256)[: absmax.numel()]).float()
    return (product.double() + offset.double()).float()


@pytest.mark.parametrize("n_blocks", [1, 2, 255, 256, 257, 1000, 70000])
def test_against_float64(backend, n_blocks):
    absmax = torch.randint(256, (n_blocks,), dtype=torch.uint8)
    absmax2 = torch.rand(-(n_blocks // -256)) * 0.05
    offset = torch.rand(()) * 0.1
    got = decode(absmax, absmax2, DYNAMIC_MAP, offset)
    assert_same_bits(got, rounded_twice(absmax, absmax2, DYNAMIC_MAP, offset))


@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
def test_all_codes(backend, scale):
    """All 256 bytes under many scales, with offsets of both signs: a fused multiply-add would differ in some of them."""
    absmax = torch.arange(256, dtype=torch.uint8).repeat(64)
    absmax2 = torch.rand(64) * scale
    fused = 0
    for offset in (torch.rand(()) * scale, -torch.rand(()) * scale, torch.zeros(())):
        want = rounded_twice(absmax, absmax2, DYNAMIC_MAP, offset)
        assert_same_bits(decode(absmax, absmax2, DYNAMIC_MAP, offset), want)
        once = (DYNAMIC_MAP[absmax.int()].double() * absmax2.double().repeat_interleave(256) + offset.double()).float()
        fused += int((once != want).sum())
    assert fused, "these inputs can't tell a fused multiply-add from two roundings"


def test_against_bitsandbytes(backend):
    F = pytest.importorskip("bitsandbytes.functional")
    for n_blocks in (1, 100, 256, 300, 5000):
        weight = torch.randn(n_blocks, 64) * torch.rand(n_blocks, 1)
        packed, state = F.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        want = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert_same_bits(lk.decode_absmax(lk.QuantizedWeight.from_bitsandbytes((packed, state))), want)


def test_single_quantization_returns_the_scales(backend):
    qw = lk.quantize(torch.randn(4, 100), double_quant=False)
    assert lk.decode_absmax(qw) is qw.absmax


def test_opcheck(backend):
    qw = lk.quantize(torch.randn(30, 100))
    torch.library.opcheck(decode, (qw.absmax, qw.absmax2, qw.code2, qw.offset))
