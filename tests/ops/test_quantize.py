"""`quantize`: every byte is bitsandbytes'."""

import pytest
import torch
from helpers import COUNTS, FLOATS, STORAGE, assert_same_bits, bits, random_weight
from hypothesis import given
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.formats import BLOCKSIZES, codebook

pytestmark = pytest.mark.usefixtures("poisoned")

F = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_bytes_are_those_of_bitsandbytes(backend, quant_type, double_quant, seed):
    generator = torch.Generator().manual_seed(seed)
    for index in range(160):
        weight = random_weight(generator, index)
        blocksize = BLOCKSIZES[index // 8 % 8]
        packed, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
        qw = lk.quantize(weight, quant_type, blocksize, double_quant)
        what = f"case {index}: {list(weight.shape)} {weight.dtype} blocksize {blocksize}"
        assert_same_bits(qw.packed, packed, f"{what} packed")
        assert_same_bits(qw.absmax, state.absmax, f"{what} absmax")
        if double_quant:
            assert_same_bits(qw.absmax2, state.state2.absmax, f"{what} absmax2")
            assert_same_bits(qw.code2, state.state2.code, f"{what} code2")
            assert_same_bits(qw.offset, state.offset, f"{what} offset")
        COUNTS[f"quantize, bytes compared with bitsandbytes ({backend})"] += 1


def test_many_blocks(backend):
    """More blocks than one thread takes: the mean of the scales is summed in several parts."""
    weight = torch.randn(1030, 2048) * 0.02
    packed, state = F.quantize_4bit(weight, blocksize=32, compress_statistics=True, quant_type="nf4")
    qw = lk.quantize(weight, "nf4", 32)
    assert_same_bits(qw.packed, packed)
    assert_same_bits(qw.absmax, state.absmax)
    assert_same_bits(qw.offset, state.offset)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_second_level_borders(backend, quant_type):
    """Scales on the steps of the second level's table, where one rounding decides the index."""
    scales = torch.cat([torch.arange(0, 2 * 65535, 7) / 65535, torch.rand(5000)])
    weight = scales.float().repeat_interleave(32).view(-1, 32)
    _, state = F.quantize_4bit(weight, blocksize=32, compress_statistics=True, quant_type=quant_type)
    qw = lk.quantize(weight, quant_type, 32)
    assert_same_bits(qw.absmax, state.absmax)
    assert_same_bits(qw.absmax2, state.state2.absmax)


@pytest.mark.parametrize("storage", STORAGE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_storage_dtypes(backend, storage, double_quant):
    weight = torch.randn(24, 56)
    options = {"blocksize": 64, "compress_statistics": double_quant, "quant_type": "nf4", "quant_storage": storage}
    packed, state = F.quantize_4bit(weight, **options)
    qw = lk.quantize(weight, double_quant=double_quant, quant_storage=storage)
    assert_same_bits(qw.packed, packed)
    assert_same_bits(qw.absmax, state.absmax)
    assert torch.equal(bits(qw.dequantize()), bits(lk.quantize(weight, double_quant=double_quant).dequantize()))


def test_layout(backend):
    """First element in the high nibble, one scale a block, a lone last element padded with the code of zero."""
    weight = torch.tensor([1.0, -1.0, 0.0] + [0.5] * 30)
    qw = lk.quantize(weight, "nf4", 32, double_quant=False)
    assert qw.packed.shape == (17, 1)
    assert qw.codes()[:2].tolist() == [0xF0, 0x7C]  # 1 is code 15, -1 code 0, 0 code 7; 0.5 is nearest to 0.44 (12)
    assert qw.codes()[16].item() == 0xF7
    assert qw.absmax.tolist() == [1.0, 0.5]


def test_any_shape_and_strides(backend):
    weight = torch.randn(6, 8, 10)
    same = lk.quantize(weight)
    assert same.shape == (6, 8, 10)
    assert same.dequantize().shape == (6, 8, 10)
    turned = lk.quantize(weight.permute(2, 0, 1))
    assert_same_bits(turned.packed, lk.quantize(weight.permute(2, 0, 1).contiguous()).packed)
    scalar = lk.quantize(torch.tensor(3.0), double_quant=False)
    assert scalar.dequantize().item() == 3.0


def test_parameter_without_history(backend):
    """A weight that requires gradients is quantized without touching the graph."""
    weight = torch.nn.Parameter(torch.randn(8, 64))
    qw = lk.quantize(weight)
    assert not any(t.requires_grad for t in (qw.packed, qw.absmax, qw.absmax2, qw.code2, qw.offset))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("place", [0, 63, 100, 64 * 65])  # first, last of a block, inside, in the short last block
def test_non_finite_is_refused(backend, value, dtype, place):
    weight = torch.randn(1, 64 * 65 + 5).to(dtype)
    lk.quantize(weight)
    weight[0, place] = value
    with pytest.raises(ValueError, match=r"weight.*NaN or infinity"):
        lk.quantize(weight)


weights = st.builds(
    lambda n, scale, s: torch.randn(n, generator=torch.Generator().manual_seed(s)) * scale,
    st.integers(1, 700),
    st.sampled_from([1e-7, 1e-3, 1.0, 3e4]),
    st.integers(0, 2**32),
)


@given(weight=weights, quant_type=st.sampled_from(["nf4", "fp4"]), blocksize=st.sampled_from([32, 64, 512]))
def test_round_trip_error(backend, weight, quant_type, blocksize):
    """Each value comes back as the nearest code: at most half the widest gap beside it, times the scale of its block."""
    qw = lk.quantize(weight, quant_type, blocksize, double_quant=False)
    code = codebook(quant_type).double().sort().values
    scale = qw.absmax.double().repeat_interleave(blocksize)[: weight.numel()].clamp(min=1e-38)  # a block of one zero
    nearest = (weight.double() / scale).sub(code.unsqueeze(1)).abs().amin(0) * scale
    error = (qw.dequantize(torch.float32).double() - weight.double()).abs()
    assert (error <= nearest + 1e-6 * scale).all()


@given(weight=weights, blocksize=st.sampled_from([32, 64, 512]), quant_type=st.sampled_from(["nf4", "fp4"]))
def test_quantizing_again_changes_nothing(backend, weight, blocksize, quant_type):
    qw = lk.quantize(weight, quant_type, blocksize, double_quant=False)
    again = lk.quantize(qw.dequantize(torch.float32), quant_type, blocksize, double_quant=False)
    assert_same_bits(again.dequantize(torch.float32), qw.dequantize(torch.float32))
    if quant_type == "nf4":
        assert_same_bits(again.packed, qw.packed)
        assert_same_bits(again.absmax, qw.absmax)


@given(weight=weights, power=st.integers(-10, 10))
def test_scaling_by_a_power_of_two(backend, weight, power):
    """The codes don't change, the scales do by exactly that."""
    qw, scaled = (lk.quantize(w, double_quant=False) for w in (weight, weight * 2.0**power))
    assert_same_bits(scaled.packed, qw.packed)
    assert_same_bits(scaled.absmax, qw.absmax * 2.0**power)
