"""`group_projections` and `InputGroup`: layers on one x compute together, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from helpers import tiny_llama

import lora_kernels as lk
from lora_kernels.autograd import linears
from lora_kernels.grouping import InputGroup
from lora_kernels.model import fused_layers
from lora_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

BF16 = torch.bfloat16


def test_grouped_model():
    """A Llama with grouped projections: the logits and gradients of the ungrouped one, also compiled, copied and pickled."""
    model = tiny_llama()
    lk.apply_qlora(model, r=4)
    for fused in fused_layers(model).values():
        torch.nn.init.normal_(fused.lora_matrices("default")[1], std=0.05)
    grouped = copy.deepcopy(model)
    assert lk.group_projections(grouped) == 4
    grouped = pickle.loads(pickle.dumps(copy.deepcopy(grouped)))
    ids = torch.randint(0, 96, (2, 11))

    def gradients(m, forward):
        m.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in m.named_parameters() if p.grad is not None}

    want = gradients(model, model)
    for forward in (grouped, torch.compile(grouped, fullgraph=True, backend="aot_eager")):
        got = gradients(grouped, forward)
        assert got.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(grouped(ids).logits, model(ids).logits)
        q = grouped.model.layers[0].self_attn.q_proj
        x = torch.randn(3, 64)  # a layer called alone, and twice
        torch.testing.assert_close(q(x), model.model.layers[0].self_attn.q_proj(x))
        assert torch.equal(q(x), q(x))


def input_group(**options) -> list[lk.FusedQLoRALinear]:
    layers = [lk.FusedQLoRALinear(64, N, **options) for N in (32, 48)]
    for fused in layers:
        torch.nn.init.normal_(fused.lora_matrices("default")[1])
    InputGroup(layers)
    return layers


@pytest.mark.parametrize("options", [{}, {"compute_dtype": BF16}], ids=str)
def test_input_group_computes_once(options, monkeypatch):
    calls = []
    monkeypatch.setattr(lk.grouping, "linears", lambda x, layers: calls.append(len(layers)) or linears(x, layers))
    q, k = input_group(**options)
    x = torch.randn(3, 64)
    q(x), k(x)
    assert calls == [2]
    q(x), q(x), k(x)
    assert calls == [2, 2, 2]


def test_input_group_computes_anew_what_changed():
    """A result that waits for its layer is for the same x, unchanged, with the same need of a gradient."""
    q, k = input_group()
    alone = copy.deepcopy(k)
    alone.group = None
    x = torch.randn(3, 64)
    q(x)
    x.add_(1)
    assert torch.equal(k(x), alone(x))
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    with torch.inference_mode():
        x = torch.randn(3, 64)
        q(x)
        assert torch.equal(k(x), alone(x))


def test_a_layer_of_another_compute_dtype_leaves_the_group():
    q, k = input_group()
    alone = copy.deepcopy(k)
    alone.group = None
    k.compute_dtype = alone.compute_dtype = BF16
    x = torch.randn(3, 64)
    q(x)
    assert torch.equal(k(x), alone(x))
    mlp = gated_mlp()
    x = torch.randn(3, 64)
    mlp.up_proj.compute_dtype = BF16
    assert torch.equal(mlp(x), MLP.forward(mlp, x))


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
        self.down_proj, self.act_fn = torch.nn.Linear(96, 64), torch.nn.GELU()

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def gated_mlp(**options) -> torch.nn.Module:
    mlp = lk.apply_qlora(torch.nn.Sequential(MLP()), r=4, **options)[0]
    for fused in fused_layers(mlp).values():
        torch.nn.init.normal_(fused.lora_matrices("default")[1], std=0.05)
    lk.group_projections(mlp)
    return mlp


@pytest.mark.parametrize("options", [{}, {"compute_dtype": BF16}], ids=str)
def test_gated_mlp_in_a_group_is_the_block_without(options):
    mlp = gated_mlp(**options)
    assert type(mlp) is MLP
    x = torch.randn(2, 3, 64, requires_grad=True)
    inputs = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    copies = copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))
    y = mlp(x)
    got = y, *torch.autograd.grad(y.sum(), inputs)
    for other in copies:
        assert torch.equal(other(x), y)
        other.down_proj.set_adapter(None)
        assert not torch.equal(other(x), y)
    mlp.gate_proj.group = mlp.up_proj.group = None
    want = mlp(x)
    want = want, *torch.autograd.grad(want.sum(), inputs)
    y, dx, *others = zip(got, want, strict=True)
    for g, w in [y, *others]:
        assert torch.equal(g, w)
    # Of a group dx is summed before it is rounded.
    assert relative_error(*dx) < (4 * torch.finfo(BF16).eps if options else 1e-5)


@pytest.mark.parametrize("change", ["forward hook", "forward pre-hook", "backward hook", "forward", "layer", "compiled"])
def test_gated_mlp_with_a_layer_that_does_more(change):
    mlp, seen = gated_mlp(), []
    hook = lambda *args: seen.append(change)  # noqa: E731
    down = mlp.down_proj
    if change == "forward hook":
        down.register_forward_hook(hook)
    elif change == "forward pre-hook":
        down.register_forward_pre_hook(hook)
    elif change == "backward hook":
        down.register_full_backward_hook(hook)
    elif change == "layer":
        mlp.down_proj = torch.nn.Linear(96, 64)
        mlp.down_proj.register_forward_hook(hook)
    elif change == "forward":
        down.forward = lambda x: seen.append(change) or lk.FusedQLoRALinear.forward(down, x)
    else:
        down.compile(backend=lambda graph, inputs: seen.append(change) or graph.forward)
    mlp(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert seen == [change]
