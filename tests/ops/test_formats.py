"""The storage format: codebooks, and bitsandbytes' files read and written byte for byte."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import COUNTS, FLOATS, STORAGE, assert_same_bits, bnb_linear, random_weight, same_weight
from torch.utils import _pytree as pytree

import lora_kernels as lk
from lora_kernels.formats import BLOCKSIZES, DYNAMIC_MAP, codebook

bnb = pytest.importorskip("bitsandbytes")
QuantState = bnb.functional.QuantState


def bnb_saved(linear):
    """The tensors that bitsandbytes saves for the weight of `linear`."""
    return {k: v for k, v in linear.state_dict().items() if k.startswith("weight")}


def test_tables_are_those_of_bitsandbytes():
    for quant_type in ("nf4", "fp4"):
        assert_same_bits(codebook(quant_type), bnb.functional.get_4bit_type(quant_type, device="cpu"), quant_type)
    assert_same_bits(DYNAMIC_MAP, bnb.functional.create_dynamic_map(), "dynamic map")


def test_files_are_those_of_bitsandbytes(seed):
    """What bitsandbytes saves we load, what we save is the same bytes, and bitsandbytes loads it strictly."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(128):
        weight = random_weight(generator, index)
        if weight.numel() < 3:  # bitsandbytes confuses a packed weight of one byte with a transposed one
            continue
        blocksize, double_quant = BLOCKSIZES[index % 8], index // 8 % 2 == 0
        quant_type = ("nf4", "fp4")[index // 16 % 2]
        storage = STORAGE[index // 32 % 4] if (weight.numel() + 1) // 2 % 4 == 0 else torch.uint8
        theirs = bnb_linear(weight, blocksize, double_quant, quant_type, storage)
        saved = bnb_saved(theirs)
        ours = lk.quantize(weight, quant_type, blocksize, double_quant, storage)
        written = ours.state_dict()
        assert set(written) == set(saved)
        for name in saved:
            assert_same_bits(written[name], saved[name], f"case {index}: {name}")
        same_weight(lk.QuantizedWeight.from_state_dict(saved), ours)

        state = QuantState.from_dict(
            {k.removeprefix("weight."): v for k, v in written.items() if k != "weight"}, torch.device("cpu")
        )
        same_weight(lk.QuantizedWeight.from_bitsandbytes((written["weight"], state)), ours)

        # bitsandbytes registers no 4-bit keys, so it takes them through from_prequantized, as transformers does
        loaded = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
        stats = {k.removeprefix("weight."): v for k, v in written.items() if k != "weight"}
        loaded.weight = bnb.nn.Params4bit.from_prequantized(written["weight"], stats, device="cpu", module=loaded)
        again = bnb_saved(loaded)
        for name in saved:
            assert_same_bits(again[name], saved[name], f"case {index}: {name} saved by bitsandbytes again")
        COUNTS["files compared with bitsandbytes, both ways"] += 1


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_params_both_ways(quant_type, double_quant):
    weight = torch.randn(40, 96, dtype=torch.bfloat16)
    theirs = bnb_linear(weight, 64, double_quant, quant_type)
    ours = lk.QuantizedWeight.from_bitsandbytes(theirs.weight)
    same_weight(ours, lk.quantize(weight, quant_type, 64, double_quant))
    assert ours.packed.data_ptr() == theirs.weight.data_ptr()
    assert ours.absmax.data_ptr() == theirs.weight.quant_state.absmax.data_ptr()

    params = ours.to_bitsandbytes()
    assert params.bnb_quantized
    assert params.data_ptr() == theirs.weight.data_ptr()
    linear = bnb.nn.Linear4bit(96, 40, bias=False)
    linear.weight = params
    for a, b in zip(bnb_saved(linear).values(), bnb_saved(theirs).values(), strict=True):
        assert_same_bits(a, b)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    assert_same_bits(linear.train()(x), theirs(x))
    assert (params.blocksize, params.quant_type, params.compress_statistics) == (64, quant_type, double_quant)


def test_layer_writes_the_keys_of_linear4bit():
    """Linear4bit.load_state_dict(strict=True) takes weight and bias; the other keys are those that it writes itself."""
    theirs = bnb_linear(torch.randn(8, 64), bias=True)
    ours = lk.FusedQLoRALinear.from_bitsandbytes(theirs, r=0)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], tensor, name)


def test_blob_is_readable_json():
    qw = lk.quantize(torch.randn(8, 64, dtype=torch.float16))
    blob = json.loads(bytes(qw.state_dict("model.q_proj.weight")["model.q_proj.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert blob.pop("nested_offset") == qw.offset.item()
    assert blob == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [8, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


@pytest.mark.parametrize("offset_dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_offset_and_scales_in_any_dtype(offset_dtype):
    """Some checkpoints hold the offset or the scales in 16 bits."""
    weight = torch.randn(8, 64)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.offset = state.offset.to(offset_dtype)
    state.state2.absmax = state.state2.absmax.to(offset_dtype)
    qw = lk.QuantizedWeight.from_bitsandbytes((packed, state))
    assert qw.offset.dtype == qw.absmax2.dtype == torch.float32
    assert qw.offset.item() == state.offset.item()
    assert qw.absmax2.tolist() == state.state2.absmax.tolist()
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    state.absmax = state.absmax.to(offset_dtype)
    assert lk.QuantizedWeight.from_bitsandbytes((packed, state)).absmax.tolist() == state.absmax.tolist()


def test_safetensors_file(tmp_path):
    from safetensors.torch import load_file, save_file

    for double_quant in (True, False):
        qw = lk.quantize(torch.randn(33, 65), double_quant=double_quant)
        save_file(qw.state_dict("layer.weight"), tmp_path / "w.safetensors")
        same_weight(lk.QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "layer.weight"), qw)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_properties_and_copies(double_quant):
    qw = lk.quantize(torch.randn(100, 100), blocksize=32, double_quant=double_quant)
    n_blocks = 10000 // 32 + 1
    scales = n_blocks + 2 * 4 + 1024 + 4 if double_quant else 4 * n_blocks
    assert (qw.numel, qw.n_blocks, qw.double_quant, qw.nbytes) == (10000, n_blocks, double_quant, 5000 + scales)
    assert qw.bits_per_param == 8 * qw.nbytes / 10000
    assert qw.device == torch.device("cpu")
    for other in (copy.deepcopy(qw), pickle.loads(pickle.dumps(qw)), qw.to("cpu")):
        same_weight(other, qw)
    assert copy.deepcopy(qw).packed.data_ptr() != qw.packed.data_ptr()
    assert qw.to("meta").packed.is_meta


def test_pytree():
    qw = lk.quantize(torch.randn(4, 64))
    leaves, spec = pytree.tree_flatten({"w": qw})
    assert len(leaves) == 5
    same_weight(pytree.tree_unflatten(leaves, spec)["w"], qw)
    moved = pytree.tree_map(torch.clone, qw)
    same_weight(moved, qw)
    single = lk.quantize(torch.randn(4, 64), double_quant=False)
    same_weight(pytree.tree_map_only(torch.Tensor, torch.clone, single), single)


def test_repacked_by_bitsandbytes_is_refused():
    """In eval mode without gradients bitsandbytes repacks a weight on CPUs with AVX512-BF16, and drops what we need."""
    linear = bnb_linear(torch.randn(64, 64))
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked by bitsandbytes"):
        lk.QuantizedWeight.from_bitsandbytes(linear.weight)
    fresh = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(ValueError, match="not quantized yet"):
        lk.QuantizedWeight.from_bitsandbytes(fresh.weight)


def test_damaged_state_dict():
    qw = lk.quantize(torch.randn(8, 64))
    good = qw.state_dict()
    blob = "weight.quant_state.bitsandbytes__nf4"

    def meta(**changes):
        data = json.loads(bytes(good[blob].tolist())) | changes
        return {blob: torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)}

    cases = [
        ({blob: None}, KeyError, "bitsandbytes__nf4"),
        ({blob: good[blob][:20]}, ValueError, "damaged"),
        ({blob: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, ValueError, "damaged: it is no JSON object"),
        ({blob: torch.tensor(list(b"{}"), dtype=torch.uint8)}, ValueError, "damaged: it has no blocksize, dtype, quant_type"),
        ({"weight": None}, KeyError, "weight is missing"),
        ({"weight.absmax": None}, KeyError, "weight.absmax is missing"),
        ({"weight.nested_absmax": None}, KeyError, "weight.nested_absmax is missing"),
        ({"weight.quant_map": good["weight.quant_map"] * 2}, ValueError, "quant_map is not the nf4 table"),
        ({"weight": good["weight"][:-1]}, ValueError, "packed must hold 256 bytes.*got 255"),
        ({"weight.absmax": good["weight.absmax"][:-1]}, ValueError, r"absmax must be uint8 \[8\].*got uint8 \[7\]"),
        ({"weight.nested_quant_map": torch.zeros(16)}, ValueError, r"code2 must be float32 \[256\]"),
        ({"weight": good["weight"].int()}, ValueError, "must be stored as one of uint8, bfloat16"),
        (meta(blocksize=48), ValueError, "blocksize must be one of 32, 64.*got 48"),
        (meta(quant_type="int4"), ValueError, r"quant_type must be one of nf4, fp4.*got 'int4'"),
        (meta(dtype="float64"), ValueError, "dtype must be one of float32, float16, bfloat16"),
        (meta(dtype="nonsense"), ValueError, "dtype must be one of"),
        (meta(nested_blocksize=128), ValueError, "nested_blocksize must be 256, got 128"),
        (meta(shape=[8, 65]), ValueError, "packed must hold 260 bytes"),
    ]
    for changes, error, words in cases:
        sd = {k: v for k, v in (good | changes).items() if v is not None}
        with pytest.raises(error, match=words):
            lk.QuantizedWeight.from_state_dict(sd)


def test_check_names_the_part():
    qw = lk.quantize(torch.randn(8, 64))
    for field, value in (
        ("packed", qw.packed[:-1]),
        ("absmax", qw.absmax.float()),
        ("absmax", qw.absmax[:-1]),
        ("absmax2", torch.rand(2)),
        ("code2", None),
        ("offset", qw.offset.double()),
    ):
        with pytest.raises(ValueError, match=field):
            lk.dequantize(replace(qw, **{field: value}))
