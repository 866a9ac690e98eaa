"""The packed weight of a module: state dicts in bitsandbytes' keys, copies, casts and the meta device keep every byte."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same_bits, assert_same_state, dense, layer_of, model_bytes, same_weight
from torch import nn

from lora_kernels import FusedQLoRALinear
from lora_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

ROUND_TRIPS = [{}, {"double_quant": False}, {"quant_storage": BF16}, {"quant_type": "fp4", "blocksize": 128}, {"bias": False}]


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict(options, assign):
    layer, other = layer_of(**options), layer_of(**options)
    saved = layer.state_dict()
    assert all(not t.requires_grad for t in saved.values())
    result = other.load_state_dict(saved, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(model_bytes(other), saved)
    shares = other.weight.data_ptr() == layer.weight.data_ptr()
    assert shares == assign
    assert (other.absmax.data_ptr() == layer.absmax.data_ptr()) == assign
    assert not other.weight.requires_grad
    x = torch.randn(3, 100)
    assert_same_bits(other(x).detach(), layer(x).detach())


def test_state_dict_into_a_layer_of_another_format():
    layer = layer_of(quant_type="fp4", blocksize=256, double_quant=False)
    for assign in (False, True):
        other = layer_of(quant_storage=BF16)
        other.load_state_dict(layer.state_dict(), strict=True, assign=assign)
        same_weight(other.quantized_weight, layer.quantized_weight)
        assert_same_state(model_bytes(other), layer.state_dict())


def test_state_dict_keys_are_bitsandbytes_and_pefts():
    assert sorted(layer_of().state_dict()) == [
        "bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
        "weight",
        "weight.absmax",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ]


def test_state_dict_errors():
    layer = layer_of()
    good = layer.state_dict()
    before = model_bytes(layer)
    for changes, words in (
        ({"weight.absmax": None}, "weight.absmax is missing"),
        ({"weight.quant_state.bitsandbytes__nf4": None}, "bitsandbytes__nf4"),
        ({"weight": good["weight"][:-1]}, "packed must hold"),
        ({"bias": None}, "Missing key.*bias"),
        ({"nonsense": torch.zeros(1)}, "Unexpected key.*nonsense"),
        ({"lora_A.default.weight": torch.zeros(3, 100)}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict({k: v for k, v in (good | changes).items() if v is not None}, strict=True)
    assert_same_state(model_bytes(layer), before)
    with pytest.raises(RuntimeError, match=r"shape must be \[36, 100\], got \[36, 99\]"):
        layer.load_state_dict(layer_of(99).state_dict())
    missing = layer.load_state_dict({k: v for k, v in good.items() if not k.startswith("weight")}, strict=False)
    assert missing.missing_keys == ["weight"]
    nested = nn.Sequential(layer_of(), layer_of())
    nested.load_state_dict(nn.Sequential(layer, layer_of()).state_dict(), strict=True)
    same_weight(nested[0].quantized_weight, layer.quantized_weight)


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=str)
def test_copies(options, tmp_path):
    layer = layer_of(**options)
    torch.save(layer, tmp_path / "layer.pt")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(tmp_path / "layer.pt", weights_only=False)]
    fresh = layer_of(**options)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(3, 100)
    want = layer(x)
    for other in (*others, fresh):
        assert_same_state(model_bytes(other), layer.state_dict())
        assert_same_bits(other(x).detach(), want.detach())
        assert other.weight.data_ptr() != layer.weight.data_ptr()
    others[0].lora_A["default"].weight.data.zero_()
    assert_same_bits(layer(x).detach(), want.detach())


@pytest.mark.parametrize("cast", [lambda m: m.to(BF16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", FP16)])
@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP32], ids=lambda d: str(d)[6:])
def test_cast_keeps_scales_and_bytes(cast, storage):
    for double_quant in (True, False):
        layer = layer_of(double_quant=double_quant, quant_storage=storage)
        before = copy.deepcopy(layer).quantized_weight
        model = cast(nn.Sequential(layer))
        same_weight(model[0].quantized_weight, before)
        dtype = layer.lora_A["default"].weight.dtype
        assert dtype != FP32
        assert layer.bias.dtype == dtype
        assert not layer.weight.requires_grad
        if dtype != torch.float64:
            x = torch.randn(3, 100, dtype=dtype)
            assert relative_error(model(x), dense(layer, x)) < 0.03


def test_meta_and_back():
    layer = layer_of(quant_storage=BF16)
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.is_meta
    assert meta.absmax.is_meta
    assert meta(torch.empty(3, 100, device="meta")).shape == (3, 36)
    meta.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 100)
    assert_same_bits(meta(x).detach(), layer(x).detach())
    empty = FusedQLoRALinear(100, 36, device="meta")
    assert empty.weight.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bits(empty(x).detach(), layer(x).detach())
