"""`FusedQLoRALinear`: a drop-in for `nn.Linear` that survives everything torch does to modules."""

import copy
import math
import pickle

import pytest
import torch
from helpers import assert_same_bits, assert_same_state, bnb_linear, dense, layer_of, model_bytes, same_weight
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import AdapterConfig, FusedQLoRALinear
from lora_kernels.testing import decode, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def base_output(layer, x):
    layer.enable_adapters(False)
    y = layer(x)
    layer.enable_adapters()
    return y.detach()


# ---- the layer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "r": 8, "lora_alpha": 8},
        {"r": 0},
        {"r": 4, "use_rslora": True, "lora_alpha": 3.5},
        {"quant_type": "fp4", "blocksize": 32, "double_quant": False},
        {"quant_storage": BF16, "blocksize": 4096},
    ],
    ids=str,
)
def test_forward_is_a_dense_layer_with_lora(backend, options):
    layer = layer_of(**options)
    x = torch.randn(2, 7, 100)
    assert relative_error(layer(x), dense(layer, x)) < 1e-5


def test_initial_adapter_is_pefts():
    """lora_A Kaiming-uniform, lora_B zero: a new layer computes as its base; base and bias are frozen."""
    torch.manual_seed(0)
    layer = FusedQLoRALinear(100, 36, r=16, lora_alpha=8)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.dtype, B.dtype, A.shape, B.shape) == (FP32, FP32, (16, 100), (36, 16))
    bound = 1 / math.sqrt(100)  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < A.abs().max() <= bound
    assert not B.any()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.default.weight", "lora_B.default.weight"}
    assert layer.adapters["default"].scaling == 0.5
    assert AdapterConfig(16, 8, use_rslora=True).scaling == 2.0
    x = torch.randn(3, 100)
    assert_same_bits(layer(x).detach(), base_output(layer, x))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: str(d)[6:])
def test_from_linear(dtype):
    linear = nn.Linear(100, 36, dtype=dtype).eval()
    layer = FusedQLoRALinear.from_linear(linear, r=4, lora_dropout=0.1)
    same_weight(layer.quantized_weight, lk.quantize(linear.weight))
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert not layer.bias.requires_grad
    assert linear.bias.requires_grad, "the dense layer is left as it was"
    assert not layer.training
    assert layer.quantized_weight.dtype == dtype
    x = torch.randn(4, 100, dtype=dtype)
    assert relative_error(layer(x), dense(layer, x)) < (1e-5 if dtype == FP32 else 4 * torch.finfo(dtype).eps)
    assert layer(x).dtype == dtype
    assert FusedQLoRALinear.from_linear(nn.Linear(5, 3, bias=False), r=0).bias is None


def test_from_bitsandbytes_shares_memory():
    pytest.importorskip("bitsandbytes")
    theirs = bnb_linear(torch.randn(36, 100), bias=True)
    theirs.compute_dtype = BF16
    layer = FusedQLoRALinear.from_bitsandbytes(theirs, r=4)
    state = theirs.weight.quant_state
    for ours, other in (
        (layer.weight, theirs.weight),
        (layer.absmax, state.absmax),
        (layer.absmax2, state.state2.absmax),
        (layer.code2, state.state2.code),
        (layer.bias, theirs.bias),
    ):
        assert ours.data_ptr() == other.data_ptr()
    assert layer.offset.item() == state.offset.item()
    assert layer.compute_dtype == BF16
    x = torch.randn(3, 100)
    assert relative_error(FusedQLoRALinear.from_bitsandbytes(theirs, compute_dtype=FP32)(x), dense(layer, x)) < 1e-5


def test_compute_dtype():
    layer = layer_of(compute_dtype=BF16)
    x = torch.randn(3, 100)
    y = layer(x)
    assert y.dtype == FP32
    layer.compute_dtype = None
    assert_same_bits(y.detach(), layer(x.to(BF16)).detach().float())


def another(t):
    return nn.Parameter(torch.randn_like(t), requires_grad=t.requires_grad)


CHANGES = {
    "bytes in place": lambda layer, other: layer.weight.data.copy_(other.weight),
    "data of the weight": lambda layer, other: setattr(layer.weight, "data", other.weight.data),
    "the weight": lambda layer, other: setattr(layer, "weight", other.weight),
    "scales": lambda layer, other: setattr(layer, "absmax", other.absmax),
    "second scales": lambda layer, other: layer.absmax2.mul_(2),
    "offset": lambda layer, other: setattr(layer, "offset", layer.offset + 0.1),
    "bias": lambda layer, other: setattr(layer, "bias", another(layer.bias)),
    "no bias": lambda layer, other: setattr(layer, "bias", None),
    "a matrix": lambda layer, other: setattr(layer.lora_A["default"], "weight", another(layer.lora_A["default"].weight)),
    "data of a matrix": lambda layer, other: setattr(layer.lora_B["default"].weight, "data", torch.randn(36, 16)),
    "a matrix in place": lambda layer, other: layer.lora_B["default"].weight.data.normal_(),
    "the module of a matrix": lambda layer, other: layer.lora_A.update({"default": nn.Linear(100, 16, bias=False)}),
    "the adapter": lambda layer, other: layer.add_adapter("other", AdapterConfig(4, 8)),
    "no adapter": lambda layer, other: layer.set_adapter(None),
    "a state dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "a state dict, assigned": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "bytes of another format": lambda layer, other: layer.load_state_dict(
        FusedQLoRALinear(100, 36, quant_type="fp4", blocksize=256, double_quant=False).state_dict()
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_sees_what_changed_since_the_last(change, grad):
    layer, x = layer_of(), torch.randn(3, 100)
    with torch.set_grad_enabled(grad):
        before = layer(x).detach()
        CHANGES[change](layer, layer_of())
        assert relative_error(layer(x), dense(layer, x)) < 1e-5
        assert relative_error(layer(x), before) > 1e-3


def test_a_replica_has_its_own_matrices():
    """As nn.DataParallel makes it: other modules in a copy of the dictionaries."""
    layer, other, x = layer_of(), layer_of(), torch.randn(3, 100)
    replica = layer._replicate_for_data_parallel()
    replica._parameters, replica._modules = dict(layer._parameters), dict(other._modules)
    assert relative_error(replica(x), dense(replica, x)) < 1e-5
    assert relative_error(replica(x), layer(x)) > 1e-3


# ---- training


def test_autocast(backend):
    layer = layer_of()
    x = torch.randn(4, 100)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == BF16
    assert_same_bits(y.detach(), layer(x.to(BF16)).detach())


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved hooks", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(backend, reentrant, dropout):
    """The recomputed forward draws the same dropout mask: the same bits as without checkpointing."""
    layers = nn.Sequential(layer_of(64, 64, lora_dropout=dropout), nn.GELU(), layer_of(64, 64, lora_dropout=dropout))
    x = torch.randn(5, 64, requires_grad=True)
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        layers.zero_grad()
        x.grad = None
        torch.manual_seed(7)
        y = wrap(layers, x)
        y.square().sum().backward()
        grads.append([y.detach(), x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)])
    assert len(grads[0]) == 6
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


def test_dropout_in_training_only():
    layer = layer_of(lora_dropout=0.5)
    x = torch.randn(20, 100)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_same_bits(layer(x).detach(), layer(x).detach())
    assert relative_error(layer(x), dense(layer, x)) < 1e-5


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(backend, compiler):
    """No graph break, gradients included, and other batch sizes in the same graph."""
    torch._dynamo.reset()
    layer = layer_of(64, 48, r=4)
    model = nn.Sequential(layer, nn.GELU(), layer_of(48, 32, r=4))
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)
    for M in (5, 8, 3):
        x = torch.randn(2, M, 64)
        for module in (model, compiled):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.square().sum().backward()
            result = [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
            if module is model:
                want = result
        for a, b in zip(result, want, strict=True):
            assert relative_error(a, b) < 1e-5
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_compile_with_dropout_and_autocast():
    torch._dynamo.reset()
    layer = layer_of(64, 48, r=4, lora_dropout=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(200, 64)
    with torch.autocast("cpu", BF16):
        a, b = compiled(x), compiled(x)
    assert a.dtype == BF16
    assert not torch.equal(a, b)
    a.float().square().sum().backward()
    assert layer.lora_A["default"].weight.grad.isfinite().all()


def test_training_lowers_the_loss(backend):
    torch.manual_seed(0)
    layer = FusedQLoRALinear(64, 32, r=8)
    target = nn.Linear(64, 32)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(128, 64)
    losses = []
    frozen = layer.weight.detach().clone()
    for _ in range(30):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert_same_bits(layer.weight.detach(), frozen)


# ---- several adapters


def test_several_adapters():
    layer = layer_of(r=4)
    x = torch.randn(3, 100)
    first = layer(x)
    layer.add_adapter("second", AdapterConfig(8, 2.0))
    assert layer.active_adapter == "second"
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.second.weight", "lora_B.second.weight"}
    assert_same_bits(layer(x).detach(), base_output(layer, x))
    nn.init.normal_(layer.lora_B["second"].weight)
    assert relative_error(layer(x), dense(layer, x)) < 1e-5
    layer.set_adapter("default")
    assert_same_bits(layer(x).detach(), first.detach())
    layer.set_adapter(None)
    assert not any(p.requires_grad for p in layer.parameters())
    assert_same_bits(layer(x), base_output(layer, x))
    layer.set_adapter("second")
    layer.delete_adapter("second")
    assert layer.active_adapter is None
    assert list(layer.adapters) == ["default"]
    assert not any("second" in k for k in layer.state_dict())


def test_adapter_of_a_cast_layer():
    layer = layer_of().to(BF16)
    layer.add_adapter("fresh", AdapterConfig(4, 8))
    assert layer.lora_A["fresh"].weight.dtype == FP32


# ---- merging


@pytest.mark.parametrize(
    "options", [{}, {"quant_type": "fp4", "double_quant": False}, {"quant_storage": BF16, "r": 3}], ids=str
)
def test_merge_and_unmerge(options):
    layer = layer_of(**options)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    before = model_bytes(layer)
    original = copy.deepcopy(layer).quantized_weight
    report = layer.merge()
    assert layer.merged
    base, after = decode(original, FP32).double(), decode(layer.quantized_weight, FP32).double()
    update = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * layer.adapters[
        "default"
    ].scaling
    change = after - base
    assert report.survived == pytest.approx((change * update).sum().item() / update.square().sum().item(), rel=1e-4)
    assert report.relative_error == pytest.approx((change - update).norm().item() / update.norm().item(), rel=1e-4)
    merged = lk.quantize(
        (base + update).float(), *(original.quant_type, original.blocksize, original.double_quant, original.quant_storage)
    )
    # a weight within rounding of the border of two codes, one in millions, may go to either: 0.6 % of the norm
    assert relative_error(decode(layer.quantized_weight, FP32), decode(merged, FP32)) < 1e-2
    assert (layer.quantized_weight.quant_storage, layer.quantized_weight.dtype) == (original.quant_storage, original.dtype)
    x = torch.randn(3, 100)
    assert relative_error(layer(x), x.double() @ after.T + layer.bias.double()) < 1e-5
    assert_same_state(model_bytes(layer), before)  # a checkpoint holds the base, not the merge
    layer.unmerge()
    assert not layer.merged
    same_weight(layer.quantized_weight, original)


def test_small_update_is_lost_in_merging():
    layer = layer_of(r=4)
    layer.lora_B["default"].weight.data.mul_(1e-4)
    assert layer.merge().survived < 0.5
    layer.unmerge()
    layer.lora_B["default"].weight.data.zero_()
    report = layer.merge()
    assert (report.survived, report.relative_error) == (1.0, 0.0)


def test_merged_layers_move_and_save():
    layer = layer_of(quant_storage=BF16)
    original = copy.deepcopy(layer).quantized_weight
    layer.merge()
    merged = copy.deepcopy(layer).quantized_weight
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(FP16)):
        assert other.merged
        same_weight(other.quantized_weight, merged)
        other.unmerge()
        same_weight(other.quantized_weight, original)
    fresh = layer_of(quant_storage=BF16)
    fresh.merge()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert not fresh.merged
    same_weight(fresh.quantized_weight, original)
    for call in (layer.merge, lambda: layer.set_adapter(None), lambda: layer.delete_adapter("default")):
        with pytest.raises(RuntimeError, match=r"merged into the weight.*unmerge"):
            call()
    with pytest.raises(RuntimeError, match=r"merged into the weight.*unmerge"):
        layer.add_adapter("other", AdapterConfig(4, 8))


def test_merge_that_fails_changes_nothing():
    layer = layer_of()
    layer.lora_B["default"].weight.data[0, 0] = float("inf")
    original = copy.deepcopy(layer).quantized_weight
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge()
    assert not layer.merged
    same_weight(layer.quantized_weight, original)


@pytest.mark.parametrize("dtype", [None, FP32, FP16, BF16], ids=str)
def test_to_linear(dtype):
    layer = FusedQLoRALinear.from_linear(nn.Linear(100, 36, dtype=BF16), r=4)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    linear = layer.eval().to_linear(dtype)
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    want = decode(layer.quantized_weight, FP32).double() + layer.adapters["default"].scaling * (B @ A)
    assert type(linear) is nn.Linear
    assert (linear.weight.dtype, linear.bias.dtype) == (dtype or BF16,) * 2
    assert not linear.training
    assert (linear.weight - want).abs().max() <= torch.finfo(dtype or BF16).eps * want.abs().max()
    assert linear.bias.data_ptr() != layer.bias.data_ptr()
    x = torch.randn(3, 100)
    if dtype == FP32:
        assert relative_error(linear(x), layer(x)) < 1e-5
        layer.merge()
        assert_same_bits(layer.to_linear(FP32).weight.detach(), linear.weight.detach())
        layer.unmerge()
        layer.set_adapter(None)
        assert_same_bits(layer.to_linear(FP32).weight.detach(), layer.quantized_weight.dequantize(FP32))


def test_repr():
    text = repr(layer_of(r=4, lora_alpha=8))
    for part in ("in_features=100", "out_features=36", "quant_type=nf4", "double_quant=True", "default: r=4, lora_alpha=8"):
        assert part in text


def test_pickles_of_earlier_versions():
    """There `group` was called `_group`, and an MLP block in a group had a class of its own."""
    layer = lk.FusedQLoRALinear(64, 32, r=2)
    state = {k: v for k, v in vars(layer).items() if k != "group"} | {"_group": None, "_shortcut": (1, 2)}
    old = lk.FusedQLoRALinear.__new__(lk.FusedQLoRALinear)
    old.__setstate__(state)
    assert vars(old).keys() == vars(layer).keys()
    x = torch.randn(3, 64)
    assert torch.equal(old(x), layer(x))
    assert type(lk.nn._new_gated_mlp(torch.nn.Linear)) is torch.nn.Linear
