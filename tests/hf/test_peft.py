"""PEFT on our base layers gives what PEFT gives on the dequantized model: logits, gradients, files."""

import copy

import pytest
import torch
from helpers import as_bitsandbytes, assert_same_bits, python, tiny_llama
from torch import nn

import lora_kernels as lk
from lora_kernels.requirements import numbers

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from lora_kernels import FusedQLoRALinear  # noqa: E402
from lora_kernels.integrations.bitsandbytes import FusedLinear4bit  # noqa: E402
from lora_kernels.integrations.peft import FusedLoraLinear, FusedLoraLinear4bit, _FusedLora  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
IDS = torch.arange(36).reshape(2, 18) * 7 % 96
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Already:UserWarning")]


@pytest.fixture(params=["bitsandbytes", "own"])
def kind(request):
    """The two base layers: a bitsandbytes layer with our forward, and FusedQLoRALinear without adapters."""
    return request.param


def quantized(kind, dtype=FP32, bias=False, **quant):
    """A 4-bit model and the dense model that its bytes stand for."""
    model = tiny_llama(dtype=dtype)
    if bias:
        for name, m in list(model.named_modules()):
            if type(m) is nn.Linear and name != "lm_head":
                m.bias = nn.Parameter(torch.linspace(-1, 1, m.out_features, dtype=dtype))
    lk.enable_peft()
    lk.apply_qlora(model, r=0, **quant)
    dense = copy.deepcopy(model)
    for name, m in list(dense.named_modules()):
        if isinstance(m, FusedQLoRALinear):
            dense.set_submodule(name, m.to_linear(dtype))
    if kind == "bitsandbytes":
        as_bitsandbytes(model)
    return model, dense


def trained(model, seed=0):
    """Gives the adapters values as after training."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=g).to(p.dtype)
    return model


def pair(kind, config, dtype=FP32, **options):
    """PEFT over our layers and over the dense ones, with the same adapter."""
    model, dense = quantized(kind, dtype, **options)
    torch.manual_seed(0)
    ours = trained(get_peft_model(model, copy.deepcopy(config)))
    torch.manual_seed(0)
    stock = trained(get_peft_model(dense, copy.deepcopy(config)))
    same_adapters(ours, stock)
    return ours, stock


def same_adapters(ours, stock):
    theirs = dict(stock.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_" in name:
            theirs[name].data.copy_(p.data)


def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def close(ours, stock, tolerance=2e-5, floor=0.0):
    error = (ours - stock).norm() / max(stock.norm(), floor)
    assert error < tolerance, f"relative error {error:.2e}"


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(ours, stock, tolerance=2e-5):
    close(logits(ours), logits(stock), tolerance)
    a, b = gradients(ours), gradients(stock)
    assert a.keys() == b.keys() and a
    floor = 0.01 * max(g.norm() for g in b.values())  # gradients that vanish are noise in both
    for name in a:
        close(a[name], b[name], tolerance, floor)


def fused(model):
    layers = [m for m in model.modules() if isinstance(m, _FusedLora)]
    assert layers
    return [m.why_not_fused() for m in layers]


# ---- every adapter that is fused


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 3, "down_proj": 7}, "alpha_pattern": {"v_proj": 5}},
        {"use_dora": True},
        {"lora_bias": True, "bias": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"quant_type": "fp4", "blocksize": 128, "double_quant": False},
    ],
    ids=str,
)
def test_logits_and_gradients_are_pefts(kind, options):
    base = {k: options.pop(k) for k in ("bias", "quant_type", "blocksize", "double_quant") if k in options}
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
    ours, stock = pair(kind, config, **base)
    assert set(fused(ours)) == {None}
    assert len(fused(ours)) == (14 if config.target_modules == "all-linear" else 8)
    compare(ours, stock)
    report = lk.verify(ours, strict=True)
    assert sum(r.adapter == "default" for r in report.rows) == len(fused(ours))


@pytest.mark.parametrize("dora", [False, True])
def test_bf16(kind, dora):
    """Our error against the float32 model is at most that of PEFT's bf16 path, doubled."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=dora)
    ours, stock = pair(kind, config, BF16)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {FP32}
    exact = copy.deepcopy(stock).float()
    want = logits(exact)
    assert (logits(ours).float() - want).norm() <= 2 * (logits(stock).float() - want).norm()
    for p in ours.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    assert torch.isfinite(logits(ours)).all()
    grads = gradients(ours)
    assert {g.dtype for g in grads.values()} == {BF16}


def test_dropout_is_fused_and_scales_as_pefts(kind):
    """The mask our call draws, put into PEFT's layer in place of its own: same outputs and gradients."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.3)
    ours, stock = pair(kind, config)
    assert set(fused(ours.train())) == {None}
    masks = {}

    def mask_of(module, x):
        """Rows of the identity through an adapter that is the identity show what dropout kept."""
        K = x.shape[-1]
        zero = lk.quantize(torch.zeros(1, K).add_(1e-8))
        kept = torch.zeros(x.shape)
        flat = x.reshape(-1, K)
        for k in range(0, K, 16):
            n = min(16, K - k)
            A = torch.zeros(n, K)
            A[torch.arange(n), torch.arange(k, k + n)] = 1
            ones = torch.ones_like(flat)
            y = torch.ops.lora_kernels.qlora_linear(ones, *zero.op_args(), A, torch.ones(1, n), 1.0, None, 0.3, masks[module])[
                1
            ]
            kept.view(-1, K)[:, k : k + n] = y
        return kept.round(decimals=3)

    order = []
    hooks = [
        m.register_forward_hook(lambda m, a, y, n=n: order.append((n, a[0].detach())))
        for n, m in ours.named_modules()
        if isinstance(m, _FusedLora)
    ]
    before = torch.get_rng_state()
    loss = ours(input_ids=IDS, labels=IDS).loss
    loss.backward()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    seeds = [torch.randint(2**63 - 1, (1,)) for _ in order]
    assert len(seeds) == 8
    assert torch.equal(torch.get_rng_state(), after), "a layer draws one seed and nothing else"
    layers = dict(stock.named_modules())
    for (name, x), seed in zip(order, seeds, strict=True):
        masks[name] = seed
        kept = mask_of(name, x)
        rate = (kept == 0).float().mean()
        assert 0.2 < rate < 0.4
        layers[name].lora_dropout["default"] = Masked(kept)
    want = stock.train()(input_ids=IDS, labels=IDS).loss
    want.backward()
    close(loss, want)
    theirs = dict(stock.named_parameters())
    for name, p in ours.named_parameters():
        if p.grad is not None:
            close(p.grad, theirs[name].grad, 1e-3)
    for h in hooks:
        h.remove()


class Masked(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return x * self.kept


def test_dropout_is_off_in_eval(kind):
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5))
    close(logits(ours.eval()), logits(stock.eval()))


def test_dora_with_dropout_trains(kind):
    """Expectation over masks is the layer without dropout."""
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, use_dora=True))
    layer = next(m for m in ours.modules() if isinstance(m, _FusedLora)).train()
    dense = next(m for m in stock.modules() if isinstance(m, peft.tuners.lora.Linear)).eval()
    x = torch.randn(2000, 64).mean(0, keepdim=True).expand(4000, 64) + torch.randn(1, 64)
    close(layer(x).mean(0), dense(x[:1])[0], 0.02)
    layer(x[:3]).sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


# ---- several adapters


def test_several_adapters(kind, tmp_path):
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=TARGETS))
    base, default = logits(quantized(kind)[0]), logits(ours)
    for model in (ours, stock):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True))
        trained(model, 1)
    same_adapters(ours, stock)
    compare(ours, stock)
    assert (logits(ours) - default).norm() > 0  # `trained` moved the first adapter too
    for model in (ours, stock):
        model.set_adapter("other")
    compare(ours, stock)
    assert set(fused(ours)) == {None}
    with ours.disable_adapter():
        assert_same_bits(logits(ours), base)
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "other"])
    assert set(fused(ours)) == {None}
    compare(ours, stock)
    for model in (ours, stock):
        model.set_adapter("default")
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "mix", combination_type="cat")
        model.set_adapter("mix")
    close(logits(ours), logits(stock))
    for model in (ours.eval(), stock.eval()):
        model.set_adapter("default")
    names = ["default", "__base__", "other", "default"]
    ids = IDS.repeat(2, 1)
    with torch.no_grad():
        a, b = (m(input_ids=ids, adapter_names=names).logits for m in (ours, stock))
    close(a, b)
    assert_same_bits(a[1:2], base[1:2].detach().contiguous()) if torch.equal(a[1:2], base[1:2]) else close(a[1:2], base[1:2])
    for model in (ours, stock):
        model.delete_adapter("other")
    close(logits(ours), logits(stock))


def test_files_are_pefts(kind, tmp_path):
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1))
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    a, b = ((tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("ours", "stock"))
    assert a == b
    for low in (False, True):
        model, dense = quantized(kind)
        again = PeftModel.from_pretrained(model, tmp_path / "stock", low_cpu_mem_usage=low).eval()
        assert set(fused(again)) == {None}
        assert_same_bits(logits(again), logits(ours.eval()))
        onto = PeftModel.from_pretrained(dense, tmp_path / "ours").eval()
        close(logits(onto), logits(again))
    ours.load_adapter(tmp_path / "stock", adapter_name="second")
    ours.set_adapter("second")
    assert_same_bits(logits(ours), logits(again))


def test_transformers_own_adapter_api(kind, tmp_path):
    wanted = transformers.integrations.peft.MIN_PEFT_VERSION
    if numbers(wanted) > numbers(peft.__version__):
        pytest.skip(f"add_adapter of transformers {transformers.__version__} wants peft {wanted}, found {peft.__version__}")
    model, dense = quantized(kind)
    for m in (model, dense):
        torch.manual_seed(0)
        m.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
        trained(m)
    same_adapters(model, dense)
    close(logits(model), logits(dense))
    assert set(fused(model)) == {None}
    assert sum(isinstance(m, FusedLoraLinear if kind == "own" else FusedLoraLinear4bit) for m in model.modules()) == 8


def test_modules_to_save_and_trainable_tokens(kind):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    ours, stock = pair(kind, config)
    compare(ours, stock)


# ---- merging


def test_merge_and_exact_unmerge(kind):
    ours, _ = pair(kind, LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS))
    before = logits(ours)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.merge_adapter()
    merged = logits(ours)
    assert 0 < (merged - before).norm() / before.norm() < 0.5
    assert {r.reason for r in lk.verify(ours).rows if r.adapter} == {"adapter merged into the 4-bit weight"}
    ours.unmerge_adapter()
    assert_same_bits(logits(ours), before)
    for k, v in ours.state_dict().items():
        assert torch.equal(v, state[k]), k


def test_merging_two_adapters_quantizes_once(kind):
    ours, _ = pair(kind, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"]))
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    trained(ours, 1)
    layer = next(m for m in ours.modules() if isinstance(m, _FusedLora))
    original = layer.get_base_layer().dequantize(FP32)
    ours.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        ours.merge_adapter(["other"])
    update = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    want = lk.dequantize(lk.quantize(original + update), FP32)
    assert_same_bits(layer.get_base_layer().dequantize(FP32), want)
    ours.unmerge_adapter()
    assert_same_bits(layer.get_base_layer().dequantize(FP32), original)


@pytest.mark.parametrize("bf16", [False, True])
def test_merging_a_zero_adapter_moves_nothing(kind, bf16):
    """Also after a forward pass in eval mode, in which bitsandbytes itself would repack the weights."""
    model, _ = quantized(kind, BF16 if bf16 else FP32)
    ours = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)).eval()
    with torch.no_grad():
        before = logits(ours)
        merged = ours.merge_and_unload()
        assert_same_bits(logits(merged), before)


def test_merge_and_unload_keeps_the_layer_fused(kind):
    ours, _ = pair(kind, LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS))
    before = logits(ours)
    merged = ours.merge_and_unload(safe_merge=True)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    assert (logits(merged) - before).norm() / before.norm() < 0.5
    assert len(lk.verify(merged, strict=True).fused) == 14


@pytest.mark.parametrize("dora", [False, True])
def test_merge_dense_loses_nothing(kind, dora):
    ours, _ = pair(kind, LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS, use_dora=dora, lora_bias=not dora), bias=True)
    before = logits(ours)
    dense = lk.merge_dense(ours, FP32)
    assert type(dense) is type(tiny_llama())
    assert {type(m) for m in dense.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    close(logits(dense), before)
    with pytest.raises(ValueError, match="nothing to merge"):
        lk.merge_dense(dense)


def test_broken_adapter_is_not_merged(kind):
    ours, _ = pair(kind, LoraConfig(r=4, target_modules=["q_proj"]))
    layer = next(m for m in ours.modules() if isinstance(m, _FusedLora))
    before = layer.get_base_layer().dequantize(FP32)
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="seems to be broken"):
        ours.merge_adapter()
    assert_same_bits(layer.get_base_layer().dequantize(FP32), before)


# ---- initialisation from the weight


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica", "pissa_niter_4"])
def test_initialisation(kind, init):
    """lora_A and lora_B are PEFT's on the dense base; where the base changes, ours holds the same residual in 4 bits."""
    model, dense = quantized(kind)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=init)
    torch.manual_seed(0)
    ours = get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(0)
    stock = get_peft_model(dense, copy.deepcopy(config))
    theirs = dict(stock.named_modules())
    for name, m in ours.named_modules():
        if isinstance(m, _FusedLora):
            close(m.get_delta_weight("default") + 1, theirs[name].get_delta_weight("default") + 1, 1e-4)
            residual = theirs[name].get_base_layer().weight
            want = residual if init in ("orthogonal", "mica") else lk.dequantize(lk.quantize(residual.detach()))
            close(m.get_base_layer().dequantize(FP32), want, 1e-3)
            for p in (m.lora_A["default"].weight, m.lora_B["default"].weight):
                assert p.dtype == FP32


def test_loftq(kind, tmp_path):
    """Both ways leave less error than quantization alone."""
    original = tiny_llama()
    original.save_pretrained(tmp_path)
    model, _ = quantized(kind)
    ours = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    dense = dict(original.named_modules())
    layers = {n.removeprefix("base_model.model."): m for n, m in ours.named_modules() if isinstance(m, _FusedLora)}

    def errors():
        return {n: (m.to_linear(FP32).weight - dense[n].weight).norm() for n, m in layers.items()}

    before = errors()
    lk.loftq_init(ours, tmp_path)
    after = errors()
    assert all(after[n] < 0.9 * before[n] for n in layers)
    with pytest.raises(ValueError, match="no fused layer with an adapter 'x'"):
        lk.loftq_init(ours, tmp_path, "x")
    with pytest.raises(ValueError, match=r"has no model\.layers\.0"):
        lk.loftq_init(ours, tmp_path / "nothing")

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"])
    config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 2}  # its own check wants scipy
    model, dequantized = quantized(kind)
    again = get_peft_model(model, config)
    for name, m in again.named_modules():
        if isinstance(m, _FusedLora):
            target = dict(dequantized.named_modules())[name.removeprefix("base_model.model.")].weight
            assert (m.to_linear(FP32).weight - target).norm() <= (m.get_base_layer().dequantize(FP32) - target).norm() + 1e-6


# ---- what is refused, and what is not fused


@pytest.mark.parametrize("field", ["use_qalora", "use_bdlora", "kasa_config", "monteclora_config"])
def test_settings_that_peft_drops_on_4_bit_layers_raise(kind, field):
    model, _ = quantized(kind)
    config = LoraConfig(r=4, target_modules=["q_proj"])
    setattr(config, field, object())
    with pytest.raises(ValueError, match=field):
        get_peft_model(model, config)
    lk.verify(model, strict=True)


def test_adapters_of_our_own_are_not_wrapped():
    model = lk.apply_qlora(tiny_llama(), r=4)
    with pytest.raises(ValueError, match=r"apply_qlora\(r=0\)"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_adapter_of_another_base_is_refused(kind, tmp_path):
    ours, _ = pair(kind, LoraConfig(r=4, target_modules=["q_proj"]))
    ours.save_pretrained(tmp_path)
    other = lk.apply_qlora(torch.nn.Sequential(nn.Linear(8, 8)), r=0)
    with pytest.raises(ValueError, match="q_proj"):
        PeftModel.from_pretrained(other, tmp_path)


def test_adapter_of_another_size_is_refused(kind, tmp_path):
    """PEFT names each matrix and both shapes; the base, which it has wrapped by then, is as before."""
    ours, _ = pair(kind, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ours.save_pretrained(tmp_path)
    model, _ = quantized(kind)
    wide = FusedQLoRALinear(320, 64, bias=False, r=0)
    if kind == "bitsandbytes":
        wide = FusedLinear4bit.from_quantized(wide.quantized_weight, None)
    model.model.layers[1].mlp.down_proj = wide
    before = copy.deepcopy(model)
    words = r"layers\.1\.mlp\.down_proj\.lora_A\.default\.weight.*\[4, 192\].*\[4, 320\]"
    with pytest.raises(RuntimeError, match=words):
        PeftModel.from_pretrained(model, tmp_path)
    x = torch.randn(3, 320)
    assert_same_bits(model.get_submodule("model.layers.1.mlp.down_proj.base_layer")(x), before.model.layers[1].mlp.down_proj(x))


def test_fallback_is_correct_and_named(kind):
    """A hook on lora_A would be passed over by a fused call: PEFT's own code runs, and verify says so."""
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=["q_proj"]))
    for model in (ours, stock):
        for name, m in model.named_modules():
            if name.endswith("lora_A.default"):
                m.register_forward_hook(lambda m, a, y: 2 * y)
    assert all("hooks" in why for why in fused(ours))
    compare(ours, stock)
    report = lk.verify(ours)
    assert len(report.not_fused) == 3  # two q_proj and lm_head
    assert "hooks" in report.not_fused[0].reason
    with pytest.raises(RuntimeError, match="hooks"):
        lk.verify(ours, strict=True)


def test_alora_and_arrow_run_pefts_code(kind):
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    ours, stock = pair(kind, config)
    assert all("ALora" in why for why in fused(ours))
    close(logits(ours), logits(stock))


def test_verify_of_stock_peft_says_what_to_do():
    from lora_kernels.formats import QuantizedWeight

    model = tiny_llama(dtype=BF16)
    for name, m in list(model.named_modules()):
        if type(m) is nn.Linear and name != "lm_head":
            model.set_submodule(name, bnb.nn.Linear4bit(m.in_features, m.out_features, False, quant_type="nf4"))
    model = model.to("cpu")
    model.is_loaded_in_4bit = True
    rows = lk.verify(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))).rows
    assert {r.reason for r in rows if r.kind == "Linear4bit" and "q_proj" in r.name} == {
        "a bitsandbytes layer: accelerate(model) makes it fused"
    }
    assert not any("lora_A" in r.name or "base_layer" in r.name for r in rows)
    assert QuantizedWeight


# ---- the rest of the stack


def test_copies_casts_and_moves(kind, tmp_path):
    ours, _ = pair(kind, LoraConfig(r=4, target_modules=TARGETS))
    want = logits(ours)
    assert_same_bits(logits(copy.deepcopy(ours)), want)
    torch.save(ours, tmp_path / "model.pt")
    assert_same_bits(logits(torch.load(tmp_path / "model.pt", weights_only=False)), want)
    cast = copy.deepcopy(ours).to(torch.float64).to(FP32)
    close(logits(cast), want, 1e-6)


def test_gradient_checkpointing(kind):
    ours, _ = pair(kind, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.2))
    ours.train()
    torch.manual_seed(5)
    want = gradients(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    got = gradients(ours)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-6)


def test_results_can_be_changed_in_place(kind):
    """As those of nn.Linear can: models add residuals so."""
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=["q_proj"]))
    layer, dense = (next(m for m in x.modules() if isinstance(m, peft.tuners.lora.LoraLayer)) for x in (ours, stock))
    x, grads = torch.randn(2, 3, 64), []
    for m in (layer, dense):
        for part in (m, m.base_layer):
            x.requires_grad_().grad = None
            y = part(x)
            y += x
            y.square().sum().backward()
            grads.append(x.grad.clone())
    close(grads[0], grads[2])
    close(grads[1], grads[3])


def test_autocast(kind):
    ours, stock = pair(kind, LoraConfig(r=4, target_modules=TARGETS))
    want = logits(stock)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = logits(ours).float(), logits(stock).float()
    assert (a - want).norm() <= 2 * (b - want).norm()


def test_import_is_light():
    out = python(
        "import sys, lora_kernels as lk\n"
        "print([m for m in ('transformers', 'peft', 'bitsandbytes', 'accelerate') if m in sys.modules])\n"
        "lk.accelerate; print('bitsandbytes' in sys.modules)"
    )
    assert out.splitlines() == ["[]", "True"]


def test_small_updates_survive_in_bf16():
    """An update far below the rounding step of the base's output is in the sum before the one rounding, so that it shows on
    average.  PEFT rounds the base's output first, and adding the update then changes nothing."""
    ours, stock = pair("own", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]), BF16)
    layer, dense = (next(m for m in x.modules() if isinstance(m, peft.tuners.lora.Linear)) for x in (ours, stock))
    x = torch.randn(4000, 64, dtype=BF16)
    for m in (layer, dense):
        m.lora_A["default"].weight.data.copy_(torch.eye(4, 64))
        m.lora_B["default"].weight.data.fill_(1e-5)

    def share(m):
        """How much of the update is in the output: its projection on the exact one."""
        with torch.no_grad():
            exact = x.float()[:, :4].sum(1, keepdim=True).expand(-1, m.out_features) * 1e-5
            change = m(x).float() - m.base_layer(x).float()
        return (change * exact).sum() / exact.square().sum()

    assert abs(share(layer) - 1) < 0.2
    assert share(dense) < 0.5


def test_dora_files_and_two_dora_adapters(kind, tmp_path):
    """Two DoRA adapters at once run PEFT's own code on our base layer."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True)
    ours, stock = pair(kind, config)
    ours.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(quantized(kind)[0], tmp_path, low_cpu_mem_usage=low)
        assert_same_bits(logits(again), logits(ours))
    for model in (ours, stock):
        torch.manual_seed(2)
        model.add_adapter("other", config)
        trained(model, 2)
        model.base_model.set_adapter(["default", "other"])
    same_adapters(ours, stock)
    assert all("several adapters" in why for why in fused(ours))
    close(logits(ours), logits(stock))


def test_pissa_adapters_load(kind, tmp_path):
    """PEFT initialises again on loading, which takes the same part out of the base."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    ours = trained(get_peft_model(quantized(kind)[0], config))
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(kind)[0], tmp_path)
    close(logits(again), logits(ours), 1e-4)


def test_pissa_with_low_cpu_mem_usage_fails_in_peft_itself(kind, tmp_path):
    """It initialises from a weight on the CPU into matrices on the meta device, over a dense base too."""
    model, dense = quantized(kind)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(model, config).save_pretrained(tmp_path)
    for base in (quantized(kind)[0], dense):
        with pytest.raises(RuntimeError, match="set_data"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
