"""`causal_lm_loss` against float64, and in place of the loss of a transformers model."""

import math

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from lora_kernels.app import loss
from lora_kernels.app.loss import causal_lm_loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V = 300
U = 2.0**-24
"""Unit roundoff of float32, in which the loss is computed."""


def make(dtype, shape=(3, 50)):
    """Logits, and labels of which a third does not count."""
    logits = (4 * torch.randn(*shape, V)).to(dtype)
    labels = torch.randint(V, shape)
    return logits, labels.where(torch.rand(shape) > 1 / 3, -100)


def expected(logits, labels, items=None):
    """Loss and gradient in float64."""
    leaf = logits.detach().double().requires_grad_()
    count = (labels[:, 1:] != -100).sum() if items is None else items
    flat = leaf[:, :-1].reshape(-1, logits.shape[-1])
    value = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / count
    value.backward()
    return value.detach(), leaf.grad


def bounds(logits, labels, items=None):
    """The most by which loss and gradient in float32 may miss those of float64, however the sums are ordered.

    Each operation errs by U, `exp` and `log` by 4 U, a sum of n positive terms by (n - 1) U.  `logsumexp` is max + log sum
    exp(x - max): x - max errs by U (max - x), which weighted by the exponentials is at most U log V, for that is their entropy.
    """
    x, targets = logits.detach().double()[:, :-1], labels[:, 1:, None]
    v, kept = x.shape[-1], targets != -100
    targets = targets.where(kept, 0)
    norm = x.logsumexp(-1, keepdim=True)
    norm_error = U * (norm.abs() + (v - 1) + 4 + 5 * math.log(v))
    terms = norm - x.gather(-1, targets)
    share = kept / (kept.sum() if items is None else items)
    value = (share * (norm_error + U * (kept.numel() + 1) * terms)).sum()
    p = (x - norm).exp()
    dx = p.scatter_add(-1, targets, -torch.ones_like(norm))  # p relatively errs by what its exponent does, and 4 U
    grad = share * (p * (norm_error + U * (x - norm).abs() + 4 * U) + 4 * U * dx.abs())
    return value, nn.functional.pad(grad, (0, 0, 0, 1))


@pytest.fixture(params=[1 << 10, 16 * 4 * V, 4 << 20], ids=["rows of 1", "rows of 16", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(loss, "_BLOCK", request.param)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_against_float64(dtype, items, block):
    logits, labels = make(dtype)
    before = logits.clone()
    value, grad = expected(logits, labels, items)
    value_error, grad_error = bounds(logits, labels, items)
    got = causal_lm_loss(logits.requires_grad_(), labels, V, items)
    assert got.dtype == FP32
    assert (got - value).abs() <= value_error
    (3 * got).backward()
    assert logits.grad.dtype == dtype
    grad, grad_error = 3 * grad, 3 * grad_error
    rounding = torch.finfo(dtype).eps / 2 * (grad.abs() + grad_error).clamp(min=torch.finfo(dtype).tiny)
    assert ((logits.grad - grad).abs() <= grad_error + rounding).all(), "more than one rounding"
    assert torch.equal(logits, before)


def test_shifted_labels_and_other_ignored_label():
    logits, labels = make(FP32)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    want = causal_lm_loss(logits, labels, V)
    assert torch.equal(causal_lm_loss(logits, None, V, shift_labels=shifted), want)
    other = labels.where(labels != -100, 5)
    labels = other.where(other != 5, -100)
    got = causal_lm_loss(logits, other, V, ignore_index=5)
    assert (got - expected(logits, labels)[0]).abs() <= bounds(logits, labels)[0]


def test_nothing_counts():
    logits = torch.randn(1, 4, V, requires_grad=True)
    causal_lm_loss(logits, torch.full((1, 4), -100), V, 1).backward()
    assert not logits.grad.any()


def test_in_a_model():
    """The loss of transformers' own, and its gradient where the model takes it up: the two are twice their bound apart."""
    model = tiny_llama()
    ids = torch.randint(96, (2, 20))
    labels = ids.where(torch.rand(2, 20) > 0.5, -100)

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(9))
        out.logits.retain_grad()
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        return out.loss.detach(), out.logits.detach(), out.logits.grad

    value, logits, grad = run()
    model.loss_function = causal_lm_loss
    got, same, got_grad = run()
    assert torch.equal(same, logits)
    value_error, grad_error = bounds(logits, labels, 9)
    assert (got - value).abs() <= 2 * value_error
    assert ((got_grad - grad).abs() <= 2 * grad_error).all()
