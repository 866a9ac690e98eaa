"""`causal_lm_loss` against float64, and in place of the loss of a transformers model."""

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from lora_kernels import loss
from lora_kernels.loss import causal_lm_loss
from lora_kernels.testing import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V = 300


def make(dtype, shape=(3, 50)):
    """Logits, and labels of which a third does not count."""
    logits = (4 * torch.randn(*shape, V)).to(dtype)
    labels = torch.randint(V, shape)
    return logits, labels.where(torch.rand(shape) > 1 / 3, -100)


def expected(logits, labels, items=None):
    """Loss and gradient in float64."""
    leaf = logits.detach().double().requires_grad_()
    total = nn.functional.cross_entropy(leaf[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum")
    value = total / ((labels[:, 1:] != -100).sum() if items is None else items)
    value.backward()
    return value.detach(), leaf.grad


@pytest.fixture(params=[1 << 10, 16 * 4 * V, 4 << 20], ids=["rows of 1", "rows of 16", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(loss, "_BLOCK", request.param)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_against_float64(dtype, items, block):
    logits, labels = make(dtype)
    before = logits.clone()
    value, grad = expected(logits, labels, items)
    got = causal_lm_loss(logits.requires_grad_(), labels, V, items)
    assert got.dtype == FP32
    assert relative_error(got, value) < 1e-6
    (3 * got).backward()
    assert logits.grad.dtype == dtype
    error, exponentials = (logits.grad.double() - 3 * grad).abs(), 3e-6 * grad.abs().max()
    rounding = torch.finfo(dtype).eps * (3 * grad).abs().clamp(min=torch.finfo(dtype).tiny)
    assert (error <= rounding + exponentials).all(), "more than one rounding"
    assert torch.equal(logits, before)


def test_shifted_labels_and_other_ignored_label():
    logits, labels = make(FP32)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    want = causal_lm_loss(logits, labels, V)
    assert torch.equal(causal_lm_loss(logits, None, V, shift_labels=shifted), want)
    other = labels.where(labels != -100, 5)
    only = causal_lm_loss(logits, other, V, ignore_index=5)
    assert relative_error(only, expected(logits, other.where(other != 5, -100))[0]) < 1e-6


def test_nothing_counts():
    logits = torch.randn(1, 4, V, requires_grad=True)
    causal_lm_loss(logits, torch.full((1, 4), -100), V, 1).backward()
    assert not logits.grad.any()


def test_in_a_model():
    """The loss and the gradients of transformers' own."""
    model = tiny_llama()
    ids = torch.randint(96, (2, 20))
    labels = ids.where(torch.rand(2, 20) > 0.5, -100)

    def run():
        model.zero_grad()
        value = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(9)).loss
        value.backward()
        return value.detach(), [p.grad.clone() for p in model.parameters()]

    value, grads = run()
    model.loss_function = causal_lm_loss
    got, got_grads = run()
    assert relative_error(got, value) < 1e-6
    for a, b in zip(got_grads, grads, strict=True):
        assert relative_error(a, b) < 1e-5
