"""transformers loads models with our layers: quantized on the way in, saved and loaded again bit by bit."""

import copy
import ctypes
import gc
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import HANG, assert_same_bits, assert_same_state, edit_json, model_bytes, tiny_llama
from safetensors.torch import load_file, save_file
from tiny_folder import make_tokenizer
from torch import nn

import lora_kernels as lk

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from lora_kernels.integrations import quantizer  # noqa: E402
from lora_kernels.integrations.bitsandbytes import FusedLinear4bit  # noqa: E402
from lora_kernels.requirements import installed  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(36).reshape(2, 18) * 7 % 96
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["bitsandbytes", "own"])
def kind(request, monkeypatch):
    """With bitsandbytes, and as where it is not installed."""
    if request.param == "own":
        monkeypatch.setattr(quantizer, "installed", lambda name: None if name == "bitsandbytes" else installed(name))
    return request.param


@pytest.fixture
def dense(tmp_path):
    tiny_llama(dtype=BF16, tied=True).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(path, config=None, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config or lk.QLoRAQuantConfig(), **kwargs)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fused(model):
    return {r.name: r for r in lk.verify(model, strict=True).fused}


def weights(model):
    return {n: m.quantized_weight for n, m in model.named_modules() if hasattr(m, "quantized_weight")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant_type": "fp4", "double_quant": False},
        {"blocksize": 256, "quant_storage": "bfloat16"},
    ],
    ids=str,
)
def test_quantizes_while_loading_and_round_trips(kind, dense, tmp_path, options):
    config = lk.QLoRAQuantConfig(**options)
    model = load(dense, config, dtype=BF16)
    rows = fused(model)
    assert len(rows) == 14
    assert {r.format for r in rows.values()} == {f"{config.quant_type}/{config.blocksize}"}
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == BF16
    original = dict(tiny_llama(dtype=BF16, tied=True).named_modules())
    for name, qw in weights(model).items():
        want = lk.quantize(original[name].weight, config.quant_type, config.blocksize, config.double_quant)
        assert_same_bits(qw.codes(), want.codes(), name)
        assert_same_bits(lk.decode_absmax(qw), lk.decode_absmax(want), name)
        assert qw.quant_storage == config.quant_storage
    assert not any(p.requires_grad for n, p in model.named_parameters() if "proj" in n)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a", dtype=BF16)
    assert_same_state(model_bytes(model), model_bytes(again))
    assert_same_bits(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_checkpoints_of_bitsandbytes(kind, dense, tmp_path, quant_type, double_quant, storage):
    """Made by bitsandbytes: loaded by us with the logits of its training path; saved by us: loaded by bitsandbytes."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=BF16,
    )
    stock = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=FP32)
    stock.save_pretrained(tmp_path / "stock")
    model = load(tmp_path / "stock", lk.QLoRAQuantConfig(), dtype=FP32)
    assert len(fused(model)) == 14
    for m in stock.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.compute_dtype = FP32
    want = stock.train()(input_ids=IDS).logits.detach()
    got = logits(model)
    assert (got - want).norm() < 2e-5 * want.norm()
    model.save_pretrained(tmp_path / "ours")
    a, b = load_file(tmp_path / "stock/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        if "quant_state" not in name:  # JSON, whose entries may come in another order
            assert_same_bits(a[name], b[name], name)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=FP32)
    assert any(type(m) is bnb.nn.Linear4bit for m in back.modules())
    for m in back.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.compute_dtype = FP32
    assert_same_bits(back.train()(input_ids=IDS).logits.detach(), want)


def test_other_blocksizes_load_in_bitsandbytes(dense, tmp_path):
    load(dense, lk.QLoRAQuantConfig(blocksize=128), dtype=FP32).save_pretrained(tmp_path / "a")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=FP32).train()
    ours = lk.accelerate(copy.deepcopy(stock))
    assert {r.format for r in fused(ours).values()} == {"nf4/128"}
    for m in ours.modules():
        if isinstance(m, FusedLinear4bit):
            m.compute_dtype = FP32  # config.json names bfloat16, which bitsandbytes goes by
    assert_same_bits(logits(ours), logits(load(tmp_path / "a", dtype=FP32)))


def test_own_layers(dense, tmp_path):
    """Layers that take our adapters, though bitsandbytes is there; config.json says nothing of it."""
    model = load(dense, lk.QLoRAQuantConfig(own_layers=True), dtype=BF16)
    assert {type(model.get_submodule(name)) for name in weights(model)} == {lk.FusedQLoRALinear}
    model.save_pretrained(tmp_path / "own")
    load(dense, dtype=BF16).save_pretrained(tmp_path / "theirs")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again = load(tmp_path / "own", lk.QLoRAQuantConfig(own_layers=True), dtype=BF16)
    assert {type(again.get_submodule(name)) for name in weights(again)} == {lk.FusedQLoRALinear}
    assert_same_bits(logits(again), logits(model))


def test_without_bitsandbytes_and_peft(dense, tmp_path):
    """In a process that has neither, for the two ways in: `QLoRAQuantConfig` and the command line's loader."""
    load(dense, dtype=BF16).save_pretrained(tmp_path / "q")
    make_tokenizer().save_pretrained(tmp_path / "q")
    code = f"""
import importlib.metadata, sys
version = importlib.metadata.version
def hidden(name):
    if name in ("bitsandbytes", "peft"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
sys.modules |= {{"bitsandbytes": None, "peft": None}}
import lora_kernels as lk, torch
from lora_kernels.app.load import load_model
from transformers import AutoModelForCausalLM
models = [load_model({str(tmp_path / "q")!r})[0]]
for path in ({str(dense)!r}, {str(tmp_path / "q")!r}):
    models.append(AutoModelForCausalLM.from_pretrained(path, quantization_config=lk.QLoRAQuantConfig()))
for model in models:
    assert len(lk.verify(model, strict=True).fused) == 14
    lk.merge_dense(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_skipped_modules(kind, dense, tmp_path):
    model = load(dense, lk.QLoRAQuantConfig(modules_to_not_convert=["down_proj", "layers.0.self_attn.q_proj"]))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert len(weights(model)) == 11
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert weights(again).keys() == weights(model).keys()
    assert_same_bits(logits(again), logits(model))
    assert again.model.layers[0].mlp.down_proj.weight.dtype == model.model.layers[0].mlp.down_proj.weight.dtype


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_no_packed_byte_is_cast(kind, dense, tmp_path, storage):
    """Transformers before 5.21 would cast packed bytes that look like floats of another dtype than the model's."""
    model = load(dense, lk.QLoRAQuantConfig(quant_storage=storage), dtype=BF16)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a", dtype=BF16)
    assert_same_bits(logits(again), logits(model))
    assert "_get_dtype_plan" not in vars(again)


def test_dense_weights_are_not_taken_for_4_bits(dense, tmp_path):
    """A folder that says 4 bits and holds none gave a dense model."""
    load(dense).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    edit_json(dense / "config.json", quantization_config=config["quantization_config"])
    with pytest.raises(ValueError, match=r"found no 4-bit weight for any of model\.layers\.0\."):
        load(dense)


def test_names_of_modules_that_stay_dense():
    names = ["layers.1", "layers.1.up_proj", "layers.11.up_proj", "mlp.gate", "mlp.gate_proj", "lm_head"]
    for patterns, dense in (
        ([r"layers\.1"], names[:2]),
        ([r"layers\.1\."], names[1:2]),
        (["layers.*"], names[:3]),
        (["mlp.gate"], names[3:4]),
        (["gate_proj|mlp", "head"], names[3:]),
        ([], []),
    ):
        assert [n for n in names if quantizer._stays_dense(n, patterns)] == dense, patterns


def test_device_map_bias_and_conv1d(kind, tmp_path):
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    original = transformers.GPT2LMHeadModel(config).eval()
    original.save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2", device_map="auto", dtype=FP32)
    assert len(weights(model)) == 4
    block = model.transformer.h[0]
    assert torch.equal(block.attn.c_attn.bias, original.transformer.h[0].attn.c_attn.bias)
    want = lk.dequantize(lk.quantize(original.transformer.h[0].attn.c_attn.weight.T.contiguous()), FP32)
    assert_same_bits(block.attn.c_attn.dequantize(FP32), want)
    assert (logits(model) - logits(original)).norm() < 0.5 * logits(original).norm()
    model.save_pretrained(tmp_path / "q")
    assert_same_bits(logits(load(tmp_path / "q", dtype=FP32)), logits(model))


def test_dequantize_and_casts(kind, dense, tmp_path):
    model = load(dense, dtype=BF16)
    want = logits(model)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported"):
            cast()
    scales = {n: lk.decode_absmax(q) for n, q in weights(model).items()}
    copied = copy.deepcopy(model).to(torch.float16).to(BF16)
    for n, q in weights(copied).items():
        assert_same_bits(lk.decode_absmax(q), scales[n])
    model.save_pretrained(tmp_path / "a")  # turns config.dtype into a string
    plain = model.dequantize()
    assert not weights(plain) and not getattr(plain, "is_loaded_in_4bit", False)
    assert (logits(plain) - want).float().norm() < 0.05 * want.float().norm()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_peft_and_kbit_preparation(kind, dense):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(load(dense, dtype=BF16))
    assert model.model.norm.weight.dtype == FP32
    assert getattr(model, "is_gradient_checkpointing", False) == (kind == "bitsandbytes")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    assert len(fused(tuned)) == 14
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    assert (
        tuned.num_parameters() == tiny_llama(tied=True).num_parameters() + tuned.num_parameters(only_trainable=True)
        or kind == "own"
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_near_the_4_bit_size(kind, tmp_path):
    """Anonymous memory while loading stays below half of the dense model: it is never there as a whole."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(BF16)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is no room to load into

    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load(tmp_path, dtype=BF16)
    done.set()
    thread.join()
    peak[0] = max(peak[0], anonymous())  # however seldom a busy machine let the thread look
    held, used = sum(p.nbytes for p in model.parameters()), peak[0] - before
    print(f"dense {size / 1e6:.0f} MB, held {held / 1e6:.0f} MB, peak {used / 1e6:.0f} MB")
    assert held < 0.3 * size
    assert held / 2 < used < 0.5 * size


# ---- bad input


def saved(dense, tmp_path):
    load(dense).save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def damage(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


Q, OTHER = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"), f"{Q} has no {Q}.quant_state.*not a 4-bit weight saved by"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{Q}.")], f"{Q} has no {Q}.quant_state"),
        (lambda t: t.pop(Q), f"{Q} is missing: the 4-bit weight was saved incompletely"),
        (lambda t: t.pop(f"{Q}.absmax"), f"{Q}.absmax is missing"),
        (lambda t: t.pop(f"{Q}.nested_absmax"), f"{Q}.nested_absmax is missing"),
        (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1].clone()}), f"{Q}: absmax must be uint8 .* got uint8"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), f"{Q}: packed must hold .* bytes"),
        (lambda t: t.update({f"{Q}.quant_map": t[f"{Q}.quant_map"] * 2}), "quant_map is not the nf4 table"),
        (
            lambda t: [t.update({k: t[k.replace(Q, OTHER)].clone()}) for k in list(t) if k.startswith(Q)],
            rf"{Q} is a 4-bit weight \[64, \d+\], the model has \[\d+, 64\]",
        ),
    ],
    ids=["blob", "all", "bytes", "absmax", "nested", "short absmax", "short weight", "table", "shape"],
)
def test_damaged_checkpoints_are_named(kind, dense, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(damage(saved(dense, tmp_path), lambda t: (change(t), None)[1]))


def test_other_formats_are_refused(dense, tmp_path):
    path = saved(dense, tmp_path)
    edit_json(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantized already \(gptq\).*Take the dense model"):
        load(path)
    edit_json(path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="load_in_8bit"):
        load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int8"}, r"quant_type must be one of nf4, fp4.*got 'int8'"),
        ({"blocksize": 48}, "blocksize must be one of 32"),
        ({"quant_storage": "int32"}, "quant_storage must be one of uint8"),
        ({"compute_dtype": "float8"}, "compute_dtype must be one of float32"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lk.QLoRAQuantConfig(**options)


def test_bad_weights_and_devices(kind, dense, tmp_path, monkeypatch):
    bad = tiny_llama()
    bad.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("nan")
    bad.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path / "bad")
    with pytest.raises(ValueError, match="one kind of device"):
        load(dense, device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"})
    with pytest.raises(ValueError, match="names all of them"):
        load(dense, lk.QLoRAQuantConfig(modules_to_not_convert=["proj"]))
    monkeypatch.setattr(quantizer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ZeRO-3.*FSDP2"):
        load(dense)


def test_stock_configs_are_untouched(dense):
    """Loading with bitsandbytes' own config still gives its own layers."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert not any(isinstance(m, FusedLinear4bit) for m in model.modules())
    assert len(fused(lk.accelerate(model))) == 14
