"""The loss of a causal language model in blocks of rows that fit in a CPU's cache.

Transformers' own makes a float32 copy of all logits, their log-softmax and the gradients of both, and spends its time on fresh
memory: a fifth of a training step of SmolLM2-135M.  Here the logits stay in their dtype and are all that is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 4 << 20
"""Bytes of a block in float32."""


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mean cross entropy of each token's logits with the next token, in float32; a `loss_function` for transformers' models.

    Args:
        logits: `[*, length, vocab_size]`.
        labels: `[*, length]` token ids; `ignore_index` where there is nothing to learn.
        num_items_in_batch: what the sum is divided by; None for the number of labels that count.
        shift_labels: the next token of each position, in place of `labels`.

    Returns:
        A float32 scalar.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    kept = targets != ignore_index
    total = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets.where(kept, 0), kept)
    return total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


class _CrossEntropy(torch.autograd.Function):
    """Sum over the kept rows of `log sum exp(logits) - logits[target]`; its gradient is `softmax(logits) - onehot(target)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
        rows = max(1, _BLOCK // (4 * logits.shape[1]))
        norm = torch.cat([block.float().logsumexp(1) for block in logits.split(rows)])
        ctx.save_for_backward(logits, targets, kept, norm)
        ctx.rows = rows
        at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()
        return torch.where(kept, norm - at_target, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, kept, norm = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        parts = (dlogits, logits, norm.unsqueeze(1), targets.unsqueeze(1), (dloss * kept).unsqueeze(1))
        for out, block, block_norm, target, scale in zip(*(t.split(ctx.rows) for t in parts), strict=True):
            p = block.to(torch.float32, copy=True).sub_(block_norm).exp_()
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            out.copy_(p.mul_(scale))
        return dlogits, None, None
