"""A format that is added to FORMATS at run time: every backend computes with it, and none takes it for another."""

import pytest
import torch
from emulators import cuda_emulated
from helpers import CPU, assert_same_bits

import lora_kernels as lk
from lora_kernels import testing
from lora_kernels.backends import native, reference
from lora_kernels.formats import FORMATS, Format, QuantizedWeight
from lora_kernels.testing import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEST4 = Format(code=tuple((i if i < 8 else i - 16) / 8 for i in range(16)))
"""4-bit integers in two's complement: neither ascending nor symmetric."""


@pytest.fixture(autouse=True)
def _test4(monkeypatch):
    monkeypatch.setitem(FORMATS, "test4", TEST4)
    if native.unavailable(CPU) is None:
        native.define("test4")


@pytest.fixture(params=[reference, native, cuda_emulated], ids=["reference", "native", "cuda_emulated"])
def computes(request: pytest.FixtureRequest):
    """A backend, as a module."""
    if request.param is native and (reason := native.unavailable(CPU)):
        pytest.skip(reason)
    return request.param


def quantized(computes, weight: torch.Tensor, blocksize: int, double_quant: bool) -> QuantizedWeight:
    packed, absmax, absmax2, offset = computes.quantize(weight, "test4", blocksize, double_quant)
    code2 = lk.formats.DYNAMIC_MAP if double_quant else None
    return QuantizedWeight(packed, absmax, absmax2, code2, offset, tuple(weight.shape), weight.dtype, "test4", blocksize)


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nearest_value_is_taken(computes, dtype, blocksize):
    weight = torch.randn(33, 1001).to(dtype)
    qw = quantized(computes, weight, blocksize, False)
    last = weight.numel() // blocksize * blocksize  # a short block is divided by its scale
    scales = qw.absmax.repeat_interleave(blocksize)[: weight.numel()]
    scaled = weight.flatten().float()[:last] * (1 / qw.absmax).repeat_interleave(blocksize)[:last]
    scaled = torch.cat([scaled, weight.flatten().float()[last:] / scales[last:]])
    places = torch.bucketize(scaled, torch.tensor(TEST4.midpoints))  # of equal distance, the lower
    codes = torch.tensor(TEST4.order)[places]
    packed = qw.codes()
    got = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].long()
    assert torch.equal(got, codes)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_dequantize(computes, double_quant):
    for blocksize in (32, 64, 4096):
        qw = quantized(computes, torch.randn(31, 1001), blocksize, double_quant)
        for dtype in DTYPES:
            assert_same_bits(computes.dequantize(qw, dtype), testing.decode(qw, dtype), f"{blocksize} {dtype}")


# Few rows and many, whole panels and pieces, straight decoding and the general way.
CASES = [
    Case(1, 130, 576, r=8, bias=True, quant_type="test4"),
    Case(5, 65, 100, r=3, blocksize=32, double_quant=False, quant_type="test4"),
    Case(12, 65, 640, r=16, blocksize=1024, dropout=0.3, quant_type="test4"),
    Case(40, 130, 192, r=17, dropout=0.2, bias=True, quant_type="test4"),
    Case(70, 33, 100, r=0, blocksize=256, quant_type="test4"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_layer(computes, case, dtype, seed):
    inputs = testing.make_inputs(Case(**{**vars(case), "dtype": dtype}), seed)
    (y,), (h,) = computes.qlora_linear(inputs.x, [inputs.layer])
    lora = case.r > 0
    x, saved_h = (inputs.x, h) if lora else (None, None)
    needs = (lora, lora, case.bias)
    dx, (dA,), (dB,), (dbias,) = computes.qlora_linear_backward([inputs.dy], x, [saved_h], [inputs.layer], True, [needs])
    results = {"y": y, "h": h if lora else None, "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}
    testing.assert_close_to_oracle({name: t for name, t in results.items() if t is not None}, inputs)


def test_public_functions():
    qw = lk.quantize(torch.randn(33, 64), "test4")
    assert_same_bits(qw.dequantize(), testing.decode(qw, torch.float32))
    assert FORMATS[lk.QuantizedWeight.from_state_dict(qw.state_dict()).quant_type] is TEST4
    layer = lk.FusedQLoRALinear.from_linear(torch.nn.Linear(64, 6), r=2, quant_type="test4")
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.quantized_weight.quant_type == "test4"
