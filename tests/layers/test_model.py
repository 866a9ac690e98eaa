"""Whole models: `apply_qlora`, `set_adapter`, `disable_adapters`."""

import copy

import pytest
import torch
from helpers import LEAVES, assert_same_bits, assert_same_state, bnb_llama, model_bytes, same_weight, tiny_llama
from torch import nn

import lora_kernels as lk
from lora_kernels import AdapterConfig, FusedQLoRALinear
from lora_kernels.model import fused_layers
from lora_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def unchanged(model, before):
    """The model is what it was: the same modules, parameters, values and flags."""
    modules, state, flags = before
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert_same_state(model_bytes(model), state)


def picture(model):
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return [(n, type(m)) for n, m in model.named_modules()], model_bytes(model), flags


def test_llama():
    model, reference = tiny_llama(), tiny_llama()
    assert lk.apply_qlora(model, r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True) is model
    layers = fused_layers(model)
    assert len(layers) == 2 * len(LEAVES)
    assert type(model.lm_head) is nn.Linear
    for name, layer in layers.items():
        assert layer.adapters == {"default": AdapterConfig(4, 8, 0.1, True)}
        same_weight(layer.quantized_weight, lk.quantize(reference.get_submodule(name).weight))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}.default.weight" for n in layers for x in "AB"}
    for name, p in reference.named_parameters():
        if "proj" not in name:
            assert_same_bits(model.get_parameter(name), p, name)

    ids = torch.randint(96, (2, 9))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, layer in layers.items():
        reference.get_submodule(name).weight.data = layer.quantized_weight.dequantize(torch.float32)
    assert relative_error(model.eval()(ids).logits, reference.eval()(ids).logits) < 1e-5
    again = tiny_llama(seed=1)
    lk.apply_qlora(again, r=4).load_state_dict(model.state_dict(), strict=True)
    assert_same_state(model_bytes(again), model.state_dict())


@pytest.mark.parametrize(
    ("targets", "exclude", "adapted", "dense"),
    [
        ("all-linear", ("lm_head",), LEAVES, ["lm_head"]),
        (["q_proj", "v_proj"], ("lm_head",), ["q_proj", "v_proj"], ["lm_head"]),
        ([r"model.layers.1.mlp.up_proj"], (), ["model.layers.1.mlp.up_proj"], []),
        (
            r".*\.0\.self_attn\.[qk]_proj",
            ("lm_head", "down_proj"),
            ["0.self_attn.q_proj", "0.self_attn.k_proj"],
            ["lm_head", "down_proj"],
        ),
        (
            "all-linear",
            r".*mlp.*|lm_head",
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["lm_head", "gate_proj", "up_proj", "down_proj"],
        ),
    ],
    ids=["all", "list", "one name", "regex", "excluding regex"],
)
def test_patterns(targets, exclude, adapted, dense):
    model = tiny_llama()
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    lk.apply_qlora(model, r=2, target_modules=targets, exclude_modules=exclude)
    for name in linears:
        layer = model.get_submodule(name)
        assert isinstance(layer, FusedQLoRALinear) != any(name.endswith(e) for e in dense), name
        if isinstance(layer, FusedQLoRALinear):
            assert bool(layer.adapters) == any(name.endswith(e) for e in adapted), name


def test_formats_reach_the_layers():
    model = tiny_llama(dtype=torch.bfloat16)
    lk.apply_qlora(
        model,
        r=0,
        quant_type="fp4",
        blocksize=32,
        double_quant=False,
        quant_storage=torch.bfloat16,
        compute_dtype=torch.float32,
    )
    for layer in fused_layers(model).values():
        qw = layer.quantized_weight
        assert (qw.quant_type, qw.blocksize, qw.double_quant, qw.quant_storage) == ("fp4", 32, False, torch.bfloat16)
        assert qw.dtype == torch.bfloat16
        assert layer.compute_dtype == torch.float32
        assert not layer.adapters
    assert not any(p.requires_grad for p in model.parameters())


def test_a_module_used_twice():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(64, 8)})
    lk.apply_qlora(model, r=2)
    assert model["a"] is model["b"][1]
    assert isinstance(model["a"], FusedQLoRALinear)


def test_tied_head():
    model = tiny_llama(tied=True)
    before = picture(model)
    with pytest.raises(ValueError, match=r"lm_head.weight is shared with model.embed_tokens.weight.*exclude_modules"):
        lk.apply_qlora(model, exclude_modules=())
    unchanged(model, before)
    lk.apply_qlora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_refusals_leave_the_model_unchanged():
    def nan(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")

    def infinite(model):
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = -float("inf")

    for spoil, options, error, words in (
        (nan, {}, ValueError, r"model.layers.1.mlp.up_proj.weight contains NaN or infinity"),
        (infinite, {}, ValueError, r"model.layers.0.self_attn.q_proj.weight contains NaN or infinity"),
        (None, {"r": -1}, ValueError, "r must be an integer >= 1, got -1"),
        (None, {"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite number"),
        (None, {"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\)"),
        (None, {"quant_type": "int8"}, ValueError, r"quant_type must be one of nf4, fp4.*got 'int8'"),
        (None, {"blocksize": 65}, ValueError, "blocksize must be one of"),
        (None, {"quant_storage": torch.int32}, ValueError, "quant_storage must be one of uint8"),
        (None, {"compute_dtype": torch.float64}, ValueError, "compute_dtype must be None or one of"),
        (None, {"target_modules": ["query"]}, ValueError, "target_modules: 'query' matches no linear layer.*q_proj"),
        (None, {"target_modules": ["q_proj", "query"]}, ValueError, "target_modules: 'query' matches no linear layer"),
        (None, {"target_modules": "q_proj"}, ValueError, "target_modules: 'q_proj' matches no linear layer"),
        (None, {"target_modules": [1]}, TypeError, "target_modules must be a string or a list of strings"),
        (None, {"exclude_modules": [None]}, TypeError, "exclude_modules must be a string or a list of strings"),
        (None, {"exclude_modules": ".*"}, ValueError, "model has no linear layer to convert"),
    ):
        model = tiny_llama()
        if spoil:
            spoil(model)
        before = picture(model)
        with pytest.raises(error, match=words):
            lk.apply_qlora(model, **options)
        unchanged(model, before)


def test_models_that_cannot_be_converted():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        lk.apply_qlora("model")
    with pytest.raises(ValueError, match="itself a linear layer"):
        lk.apply_qlora(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no linear layer"):
        lk.apply_qlora(nn.Sequential(nn.ReLU()))
    model = lk.apply_qlora(tiny_llama(), r=2)
    before = picture(model)
    with pytest.raises(ValueError, match=r"before.*add_adapter"):
        lk.apply_qlora(model)
    unchanged(model, before)


def test_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*before get_peft_model"):
        lk.apply_qlora(model)


def test_bitsandbytes_model():
    """The bytes are taken over; every result is that of the bitsandbytes layers."""
    pytest.importorskip("bitsandbytes")
    model = bnb_llama(quant_type="fp4")
    ids = torch.randint(96, (2, 9))
    want = model(ids).logits
    pointers = {n: m.weight.data_ptr() for n, m in model.named_modules() if hasattr(m, "quant_state")}
    assert len(pointers) == 14
    report = lk.verify(model)
    assert sum("a bitsandbytes layer" in r.reason for r in report.not_fused) == 14
    lk.apply_qlora(model, r=4, quant_type="nf4")
    for name, layer in fused_layers(model).items():
        assert layer.weight.data_ptr() == pointers[name]
        assert layer.quantized_weight.quant_type == "fp4"
        assert layer.compute_dtype == torch.float32
    assert relative_error(model(ids).logits, want) < 1e-5

    fresh = bnb_llama()
    fresh.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.*repacked.*load the model again"):
        lk.apply_qlora(fresh)
    assert not fused_layers(fresh)


def test_adapters_of_a_model():
    model = lk.apply_qlora(tiny_llama(), r=2)
    ids = torch.randint(96, (1, 7))
    layers = fused_layers(model)
    base = model(ids).logits
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    first = next(iter(layers.values()))
    first.add_adapter("extra", AdapterConfig(3, 1.0))
    lk.set_adapter(model, "default")
    default = model(ids).logits
    assert relative_error(default, base) > 0.1
    lk.set_adapter(model, "extra")
    assert [layer.active_adapter for layer in layers.values()] == ["extra"] + [None] * 13
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{next(iter(layers))}.lora_{x}.extra.weight" for x in "AB"
    }
    lk.set_adapter(model, None)
    assert_same_bits(model(ids).logits.detach(), base.detach())
    with pytest.raises(ValueError, match=r"no adapter 'third'.*default, extra"):
        lk.set_adapter(model, "third")
    lk.set_adapter(model, "default")
    assert_same_bits(model(ids).logits.detach(), default.detach())
    first.enable_adapters(False)
    with lk.disable_adapters(model):
        assert_same_bits(model(ids).logits.detach(), base.detach())
    with pytest.raises(ValueError, match="x must"), lk.disable_adapters(model):
        first(torch.randn(2, 3))
    assert [layer.adapters_enabled for layer in layers.values()] == [False] + [True] * 13


def test_set_adapter_of_a_merged_model_changes_nothing():
    model = lk.apply_qlora(tiny_llama(), r=2)
    for layer in fused_layers(model).values():
        layer.add_adapter("other", AdapterConfig(2, 1.0))
    lk.set_adapter(model, "default")
    last = list(fused_layers(model).values())[-1]
    last.merge()
    with pytest.raises(RuntimeError, match="merged"):
        lk.set_adapter(model, "other")
    assert {layer.active_adapter for layer in fused_layers(model).values()} == {"default"}


def test_model_copies(tmp_path):
    model = lk.apply_qlora(tiny_llama(), r=2)
    twin = copy.deepcopy(model)
    assert_same_state(model_bytes(twin), model.state_dict())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = lk.apply_qlora(tiny_llama(seed=5), r=2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    ids = torch.randint(96, (1, 5))
    assert_same_bits(fresh(ids).logits.detach(), model(ids).logits.detach())
