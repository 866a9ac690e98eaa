"""`qlora_linear_group`: several layers on one x are the layers one by one, and x is read and saved once."""

from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.layer import to_lists
from lora_kernels.testing import Case, Inputs, assert_close_to_oracle, assert_dx_of_group, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, FP32 = torch.bfloat16, torch.float32


def layers_on_one_x(cases: list[Case], seed: int) -> list[Inputs]:
    first, *others = (make_inputs(case, seed + i) for i, case in enumerate(cases))
    return [first, *(replace(inputs, x=first.x) for inputs in others)]


GROUPS = {
    "qkv": [Case(17, 96, 100, dtype=BF16), Case(17, 33, 100, r=4, dtype=BF16), Case(17, 1, 100, dtype=BF16, bias=True)],
    "mixed formats": [
        Case(9, 64, 128, dtype=FP32, quant_type="fp4", blocksize=32),
        Case(9, 65, 128, r=0, dtype=FP32, double_quant=False, bias=True),
        Case(9, 63, 128, r=40, dtype=FP32, dropout=0.3),
    ],
    "one": [Case(5, 64, 64, dtype=BF16, dropout=0.1)],
    "one row": [Case(1, 64, 192, r=16, dtype=BF16), Case(1, 32, 192, r=16, dtype=BF16)],
    "no row": [Case(0, 64, 64), Case(0, 32, 64)],
    "no adapter": [Case(33, 64, 65, r=0, dtype=BF16), Case(33, 7, 65, r=0, dtype=BF16)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_against_float64(backend, name, seed):
    """Each output and adapter gradient by the oracle of its layer; dx by the sum of the oracles'."""
    group = layers_on_one_x(GROUPS[name], seed)
    layers = [inputs.layer for inputs in group]
    n, x = len(group), group[0].x
    out = torch.ops.lora_kernels.qlora_linear_group(x, *to_lists(layers))
    ys, hs = out[:n], out[n:]
    needs = [flag for i in group for flag in (i.case.r > 0, i.case.r > 0, i.case.bias)]
    dys = [inputs.dy for inputs in group]
    dx, *grads = torch.ops.lora_kernels.qlora_linear_group_backward(dys, x, hs, x.shape[1], *to_lists(layers), True, needs)
    for i, inputs in enumerate(group):
        got = {"y": ys[i]}
        for j, key in enumerate(("dA", "dB", "dbias")):
            if needs[3 * i + j]:
                got[key] = grads[j * n + i]
        assert_close_to_oracle(got, inputs)
    assert_dx_of_group(dx, group)


def test_contract():
    group = layers_on_one_x([replace(c, dtype=FP32) for c in GROUPS["qkv"]], 0)
    args = to_lists([inputs.layer for inputs in group])
    torch.library.opcheck(torch.ops.lora_kernels.qlora_linear_group, (group[0].x, *args))
    hs = [inputs.x @ inputs.lora_A.T for inputs in group]
    dys = [inputs.dy for inputs in group]
    for need_dx, needs in ((True, [True] * 8 + [False]), (False, [False, True, False] * 3), (True, [False] * 9)):
        torch.library.opcheck(
            torch.ops.lora_kernels.qlora_linear_group_backward, (dys, group[0].x, hs, 100, *args, need_dx, needs)
        )


def test_x_is_saved_once(backend):
    group = layers_on_one_x([Case(16, 64, 96), Case(16, 32, 96)], 0)
    x = group[0].x.clone().requires_grad_()
    A, B = ([t.clone().requires_grad_() for t in ts] for ts in zip(*((i.lora_A, i.lora_B) for i in group), strict=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = lk.qlora_linear_group(x.view(4, 4, 96), [i.qw for i in group], A, B, [2.0, 2.0])
    assert [list(y.shape) for y in ys] == [[4, 4, 64], [4, 4, 32]]
    assert sum(t.shape == (4, 4, 96) for t in saved) == 1
    sum(y.float().sum() for y in ys).backward()
    assert all(t.grad is not None for t in (x, *A, *B))


def gradients(call, group: list[Inputs], trained: str):
    """Outputs, and gradients of x and of what is trained, of `call(x, weights, As, Bs, scalings, biases, dropouts)`."""
    x = group[0].x.clone().requires_grad_("x" in trained)
    leaves = [
        [None if t is None else t.clone().requires_grad_(letter in trained) for t in (getattr(i, name) for i in group)]
        for letter, name in (("A", "lora_A"), ("B", "lora_B"), ("b", "bias"))
    ]
    cases = [i.case for i in group]
    torch.manual_seed(3)
    ys = call(x, [i.qw for i in group], *leaves[:2], [c.scaling for c in cases], leaves[2], [c.dropout for c in cases])
    used = [(y, i.dy) for y, i in zip(ys, group, strict=True) if y.requires_grad]
    if used:
        torch.autograd.backward(*zip(*used, strict=True))
    return [y.detach() for y in ys], [None if t is None else t.grad for t in (x, *leaves[0], *leaves[1], *leaves[2])]


def one_by_one(x, *lists):
    return [lk.qlora_linear(x, *arguments) for arguments in zip(*lists, strict=True)]


@pytest.mark.parametrize("trained", ["xABb", "AB", "x", "B", "xA", "b", ""])
@pytest.mark.parametrize("name", ["qkv", "mixed formats"])
def test_gradient_is_that_of_the_layers(backend, name, trained, seed):
    """Also the same dropout masks.  In float32, where one sum differs from another by a rounding."""
    group = layers_on_one_x([replace(c, dtype=FP32) for c in GROUPS[name]], seed)
    ys, grads = gradients(lk.qlora_linear_group, group, trained)
    want_ys, want = gradients(one_by_one, group, trained)
    for y, want_y in zip(ys, want_ys, strict=True):
        torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_output_that_is_not_used(backend):
    group = layers_on_one_x([Case(5, 64, 96, dtype=FP32), Case(5, 32, 96, dtype=FP32)], 0)
    x = group[0].x.clone().requires_grad_()
    _, y = lk.qlora_linear_group(x, [i.qw for i in group], [i.lora_A for i in group], [i.lora_B for i in group], [2.0, 2.0])
    y.sum().backward()
    want = group[0].x.clone().requires_grad_()
    lk.qlora_linear(want, group[1].qw, group[1].lora_A, group[1].lora_B, 2.0).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)


def test_what_a_group_refuses(backend):
    qw, x = [lk.quantize(torch.randn(5, 64)) for _ in range(2)], torch.randn(3, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in lk.qlora_linear_group(x, qw)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3, 64))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            lk.qlora_linear_group(dual, qw)


def test_autocast(backend):
    group = layers_on_one_x([Case(5, 64, 96, dtype=FP32), Case(5, 32, 96, dtype=FP32)], 0)
    with torch.autocast("cpu", BF16):
        ys, grads = gradients(lk.qlora_linear_group, group, "xAB")
    want_ys, _ = gradients(lk.qlora_linear_group, [replace(i, x=i.x.to(BF16), dy=i.dy.to(BF16)) for i in group], "")
    assert all(torch.equal(y, want) for y, want in zip(ys, want_ys, strict=True))
    assert all(g.dtype == FP32 for g in grads[:5])


def test_bad_input():
    qw = lk.quantize(torch.randn(32, 64))
    x = torch.randn(2, 64)
    for args, words in (
        ((x, []), ["weights", "at least one"]),
        ((x, [qw, lk.quantize(torch.randn(32, 65))]), ["x", "K=65", "64"]),
        ((x, [qw, qw], [None]), ["lora_A", "2 weights", "1"]),
        ((x, [qw], None, None, [1.0, 2.0]), ["scaling", "1 weights", "2"]),
        ((x, [qw], [torch.randn(4, 64)]), ["lora_B", "together"]),
    ):
        with pytest.raises(ValueError, match=r"\w") as e:
            lk.qlora_linear_group(*args)
        assert all(word in str(e.value) for word in words), str(e.value)
