"""bitsandbytes: models turned fused in place, our kernels under its ops, and its other users left working."""

import copy
import gc
import re

import pytest
import torch
from helpers import assert_same_bits, tiny_llama
from torch import nn

import lora_kernels as lk

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from bitsandbytes import functional as F  # noqa: E402, N812
from peft import LoraConfig, get_peft_model  # noqa: E402

from lora_kernels.integrations import bitsandbytes as ours  # noqa: E402
from lora_kernels.integrations.bitsandbytes import FusedLinear4bit  # noqa: E402
from lora_kernels.integrations.peft import FusedLoraLinear4bit  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(36).reshape(2, 18) * 7 % 96
pytestmark = pytest.mark.usefixtures("one_thread")


def bnb_model(dtype=BF16, storage=torch.uint8, quant_type="nf4", double_quant=True, compute_dtype=None, seed=0):
    """A model as transformers makes it with BitsAndBytesConfig(load_in_4bit=True)."""
    model = tiny_llama(seed, dtype)
    for name, m in list(model.named_modules()):
        if type(m) is nn.Linear and name != "lm_head":
            new = bnb.nn.Linear4bit(
                m.in_features, m.out_features, False, compute_dtype, double_quant, quant_type, quant_storage=storage
            )
            new.weight.data = m.weight.data
            model.set_submodule(name, new)
    model = model.to("cpu").train()
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def peft_model(**options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options.pop("lora", {})
    return get_peft_model(bnb_model(**options), LoraConfig(**config))


def steps(model, optimizer, n):
    losses = []
    for i in range(n):
        ids = (IDS * (i + 3)) % 96
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


# ---- accelerate


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["q_proj", "up_proj"]}], ids=str
)
def test_in_the_middle_of_training(dtype, lora):
    """The next losses are those of a run that was left alone; parameters, optimizer and state dict keys are the same."""
    left, taken = peft_model(dtype=dtype, lora=lora), peft_model(dtype=dtype, lora=lora)
    optimizers = adamw(left), adamw(taken)
    before = steps(left, optimizers[0], 3), steps(taken, optimizers[1], 3)
    assert_same_bits(*before)
    parameters, keys = {n: id(p) for n, p in taken.named_parameters()}, list(taken.state_dict())
    assert lk.accelerate(taken) is taken
    assert {n: id(p) for n, p in taken.named_parameters()} == parameters
    assert list(taken.state_dict()) == keys
    assert len(lk.verify(taken, strict=True).fused) == 14
    a, b = steps(left, optimizers[0], 4), steps(taken, optimizers[1], 4)
    assert (a - b).abs().max() < (1e-4 if dtype == FP32 else 5e-2), (a, b)
    assert before[0][0] > b[-1]


def test_gradients_are_those_of_stock():
    left, taken = peft_model(dtype=FP32), lk.accelerate(peft_model(dtype=FP32))
    for model in (left, taken):
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = torch.linspace(-0.1, 0.1, p.numel()).view(p.shape)
        model(input_ids=IDS, labels=IDS).loss.backward()
    theirs = dict(left.named_parameters())
    for n, p in taken.named_parameters():
        if p.requires_grad:
            assert (p.grad - theirs[n].grad).norm() < 1e-4 * theirs[n].grad.norm() + 1e-6, n


def test_the_rest_of_pefts_api_still_works(tmp_path):
    model = lk.accelerate(peft_model(dtype=FP32))
    assert all(type(m) is FusedLoraLinear4bit for m in model.modules() if isinstance(m, peft.tuners.lora.bnb.Linear4bit))
    out = model(input_ids=IDS).logits
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert len(lk.verify(model, strict=True).fused) == 14
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert_same_bits(model(input_ids=IDS).logits, out)
    assert_same_bits(copy.deepcopy(model)(input_ids=IDS).logits, out)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert_same_bits(model.merge_and_unload()(input_ids=IDS).logits, before)  # lora_B is zero


def test_eval_forward_does_not_repack():
    model = lk.accelerate(bnb_model()).eval()
    layer = next(m for m in model.modules() if isinstance(m, FusedLinear4bit))
    before = layer.weight.data.clone()
    with torch.no_grad():
        model(input_ids=IDS)
    assert_same_bits(layer.weight.data, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP32], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_format(quant_type, storage, double_quant):
    model = bnb_model(FP32, storage, quant_type, double_quant)
    want = model(input_ids=IDS).logits
    if double_quant:  # as it comes from a checkpoint loaded under a bf16 default dtype
        for m in model.modules():
            if isinstance(m, bnb.nn.Linear4bit):
                m.weight.quant_state.offset = m.weight.quant_state.offset.bfloat16()
        want = model(input_ids=IDS).logits
    got = lk.accelerate(model)(input_ids=IDS).logits
    assert (got - want).norm() < 2e-5 * want.norm()
    assert all(r.format == f"{quant_type}/64" for r in lk.verify(model).fused)


def test_casts_leave_float_storage_alone():
    model = lk.accelerate(bnb_model(FP32, BF16))
    want = model(input_ids=IDS).logits
    cast = copy.deepcopy(model).to(torch.float16).to(FP32)
    layer = next(m for m in cast.modules() if isinstance(m, FusedLinear4bit))
    assert layer.weight.dtype == BF16
    got = cast(input_ids=IDS).logits
    assert (got - want).norm() < 1e-2 * want.norm()
    assert_same_bits(layer.weight.data, next(m for m in model.modules() if isinstance(m, FusedLinear4bit)).weight.data)


def test_compute_dtype_is_kept():
    model = lk.accelerate(bnb_model(BF16, compute_dtype=FP32))
    layer = next(m for m in model.modules() if isinstance(m, FusedLinear4bit))
    x, W = torch.randn(3, 64, dtype=BF16), layer.dequantize(FP32)
    want, sums = x.float() @ W.T, 64 * 2.0**-23 * (x.float().abs() @ W.T.abs())  # the most by which two of them can differ
    rounding = torch.finfo(BF16).eps / 2 * (want.abs() + sums)
    assert ((layer(x).float() - want).abs() <= sums + rounding).all(), "more than one rounding to bfloat16"
    assert layer(x).dtype == BF16


def test_bias_trains_and_keeps_its_dtype():
    linear = bnb.nn.Linear4bit(64, 32, True, quant_type="nf4")
    model = nn.Sequential(linear).to("cpu")
    lk.accelerate(model)
    y = model(torch.randn(5, 64, dtype=BF16))
    y.sum().backward()
    assert y.dtype == BF16 and linear.bias.dtype == FP32
    assert torch.equal(linear.bias.grad, torch.full((32,), 5.0))


def test_refusals():
    model = bnb_model()
    if next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)).support_avx512bf16_for_cpu:
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        with pytest.raises(ValueError, match=r"q_proj was repacked by bitsandbytes for CPU inference.*load the model again"):
            lk.accelerate(model)
        assert not any(isinstance(m, FusedLinear4bit) for m in model.modules())
    with pytest.raises(ValueError, match="not quantized yet"):
        lk.accelerate(nn.Sequential(bnb.nn.Linear4bit(8, 8)))
    with pytest.raises(ValueError, match=r"no bitsandbytes 4-bit layer.*Linear\. A dense model is quantized by"):
        lk.accelerate(tiny_llama())
    with pytest.raises(TypeError, match="model must be"):
        lk.accelerate("model")
    transposed = nn.Sequential(bnb.nn.Linear4bit(64, 32, False, quant_type="nf4").to("cpu"))
    transposed[0].weight.quant_state.shape = torch.Size((64, 32))
    with pytest.raises(ValueError, match=r"\[32, 64\].*got \[64, 32\]"):
        lk.accelerate(transposed)
    assert type(transposed[0]) is bnb.nn.Linear4bit


def test_accelerate_twice_and_on_part_of_a_model():
    model = bnb_model()
    lk.accelerate(lk.accelerate(model.model.layers[0]))
    assert len(lk.verify(model).fused) == 7
    rows = lk.verify(model).not_fused
    assert {r.reason for r in rows if r.kind == "Linear4bit"} == {
        "a bitsandbytes layer: apply_qlora or accelerate takes it over without touching its bytes"
    }


# ---- other tuners of PEFT recognise the layer unaided

LORA = ["q_proj", "v_proj"]
MM = "RuntimeError: (mm: )?mat1 and mat2"  # torch 2.15 names the op
TUNERS = {
    "AdaLoraConfig": ("trains, does not merge", {"total_step": 10, "init_r": 4}),
    "AdaptionPromptConfig": ("trains", {"target_modules": None, "adapter_len": 4, "adapter_layers": 1}),
    "BOFTConfig": ("trains, merges", {"boft_block_size": 4}),
    "BeftConfig": ("trains, does not merge", {}),
    "C3AConfig": ("trains, does not merge", {"block_size": 16}),
    "DeftConfig": (MM, {}),
    "DeloraConfig": (r"\w+Error: linalg.vector_norm: Expected a floating point", {}),
    "FourierFTConfig": ("trains, does not merge", {"n_frequency": 16}),
    "FrodConfig": ("RuntimeError: Only Tensors of floating point", {}),
    "GloraConfig": ("ValueError: Target module", {}),
    "GraloraConfig": ("trains, does not merge", {}),
    "HRAConfig": (MM, {}),
    "HiraConfig": ("trains, merges", {}),
    "IA3Config": ("trains, does not merge", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LNTuningConfig": ("trains, merges", {"target_modules": ["input_layernorm"]}),
    "LilyConfig": ("trains, does not merge", {}),
    "LoHaConfig": (MM, {}),
    "LoKrConfig": ("RuntimeError: shape", {}),
    "LoraConfig": ("trains, merges", {}),
    "MissConfig": ("trains, merges", {}),
    "OFTConfig": ("trains, merges", {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False}),
    "PeanutConfig": (MM, {}),
    "PrefixTuningConfig": ("trains", {"target_modules": None, "num_virtual_tokens": 4}),
    "PromptEncoderConfig": ("trains", {"target_modules": None, "num_virtual_tokens": 4}),
    "PromptTuningConfig": ("trains", {"target_modules": None, "num_virtual_tokens": 4}),
    "PsoftConfig": ("TypeError: PSOFT init requires float32", {}),
    "PveraConfig": ("trains, merges", {}),
    "RandLoraConfig": ("trains, does not merge", {}),
    "RoadConfig": ("trains, merges", {"group_size": 32}),
    "ShiraConfig": ("trains, merges", {"r": 4}),
    "TinyLoraConfig": ("RuntimeError: Only Tensors of floating point", {}),
    "TrainableTokensConfig": ("trains, merges", {"target_modules": ["embed_tokens"], "token_indices": [1, 2]}),
    "VBLoRAConfig": ("trains, does not merge", {"vector_length": 16, "num_vectors": 8, "topk": 2}),
    "VeraConfig": ("trains, merges", {}),
    "WaveFTConfig": ("trains, does not merge", {"n_frequency": 16}),
}
"""What each tuner of PEFT does on our layer, which is what it does on bitsandbytes' own, and its settings for a tiny model."""


def outcome(name, model, options):
    """What a tuner does on a model: `trains`, `merges`, or the error that stops it."""
    options = {k: v for k, v in ({"target_modules": LORA} | options).items() if v is not None}
    try:
        tuned = get_peft_model(model, getattr(peft, name)(**options, task_type="CAUSAL_LM"))
        tuned(input_ids=IDS, labels=IDS).loss.backward()
    except Exception as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
    grads = [p.grad for p in tuned.parameters() if p.requires_grad]
    if not any(g is not None and g.abs().sum() > 0 for g in grads):
        return "has no gradient"
    if not hasattr(tuned.base_model, "merge_and_unload"):
        return "trains"
    try:
        tuned.merge_and_unload()
    except Exception:
        return "trains, does not merge"
    return "trains, merges"


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tuners(name):
    expected, options = TUNERS[name]
    model = bnb_model(FP32)
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    got = outcome(name, lk.accelerate(model), options)
    assert re.match(expected, got), got
    assert all(type(m) is FusedLinear4bit for m in linears)


# ---- our kernels under bitsandbytes' ops


@pytest.fixture
def patch():
    replaced = lk.patch_bitsandbytes()
    yield replaced
    lk.unpatch_bitsandbytes()
    gc.collect()


def results(dtype=BF16, quant_type="nf4", blocksize=64):
    g = torch.Generator().manual_seed(3)
    w, x = torch.randn(96, 128, generator=g).to(dtype), torch.randn(2, 5, 128, generator=g).to(dtype)
    out = {}
    for nested in (False, True):
        q, state = F.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
        out[f"packed{nested}"], out[f"absmax{nested}"] = q, state.absmax
        out[f"dense{nested}"] = F.dequantize_4bit(q, state)
        out[f"y{nested}"] = bnb.matmul_4bit(x, q, state)
    return out


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_patched_ops_are_bitsandbytes(patch, dtype, quant_type):
    """The same bytes and dense weights; products within rounding."""
    got = results(dtype, quant_type)
    lk.unpatch_bitsandbytes()
    assert not ours.patched()
    want = results(dtype, quant_type)
    for name in want:
        if name.startswith("y"):
            assert (got[name] - want[name]).float().norm() < 1e-2 * want[name].float().norm()
        else:
            assert_same_bits(got[name], want[name], name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_patch_and_unpatch(patch):
    native = not __import__("lora_kernels").backends.choices("qlora_linear", torch.device("cpu"))[0][1]
    assert patch == ({"cpu": ["dequantize_4bit", "gemm_4bit", "quantize_4bit"]} if native else {})
    assert lk.patch_bitsandbytes() == patch
    calls = []
    original = ours.qlora_linear
    ours.qlora_linear = lambda *a, **k: calls.append(1) or original(*a, **k)
    try:
        layer = nn.Sequential(bnb.nn.Linear4bit(64, 32, False, quant_type="nf4").to("cpu").train())
        with torch.no_grad():
            layer(torch.randn(3, 64))
        assert bool(calls) == native
        lk.unpatch_bitsandbytes()
        lk.unpatch_bitsandbytes()
        calls.clear()
        with torch.no_grad():
            layer(torch.randn(3, 64))
        assert not calls
    finally:
        ours.qlora_linear = original


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stock_training_gains_from_the_patch(patch):
    """A PEFT-on-bitsandbytes model that never heard of us trains to the same losses."""
    model = peft_model(dtype=FP32)
    got = steps(model, adamw(model), 3)
    lk.unpatch_bitsandbytes()
    model = peft_model(dtype=FP32)
    assert (steps(model, adamw(model), 3) - got).abs().max() < 1e-4
