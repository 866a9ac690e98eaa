"""Ours, and what needs no package: a dense layer and plain torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.formats import codebook
from lora_kernels.testing import Inputs

from .base import Layer, adapter, clone, frozen_linear, set_adapter


def ours(inputs: Inputs, W: Tensor) -> Layer:
    qw, r = clone(inputs.qw), inputs.case.r
    config = lk.AdapterConfig(r, inputs.case.scaling * r) if r else None
    layer = lk.FusedQLoRALinear.from_quantized(qw, None, None, config, training=True)
    leaves = set_adapter(layer.lora_matrices("default"), inputs) if r else ()
    return Layer(layer, leaves, qw.nbytes)


def dense(inputs: Inputs, W: Tensor) -> Layer:
    """A frozen bf16 `nn.Linear` without adapter: the limit."""
    return Layer(frozen_linear(W.clone()), (), W.nbytes)


def torch_dequantize(qw: lk.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What one writes in plain torch: a table of the two codes of every byte, one gather, one product."""
    absmax = torch_decode_absmax(qw)
    values = _pairs(qw.quant_type, qw.device)[qw.codes().int()].view(-1)[: qw.numel]
    if qw.numel % qw.blocksize:
        return (values * absmax.repeat_interleave(qw.blocksize)[: qw.numel]).to(dtype).view(qw.shape)
    return (values.view(-1, qw.blocksize) * absmax.unsqueeze(1)).to(dtype).view(qw.shape)


@functools.cache
def _pairs(quant_type: str, device: torch.device) -> Tensor:
    code = codebook(quant_type).to(device)
    byte = torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)


def torch_decode_absmax(qw: lk.QuantizedWeight) -> Tensor:
    if not qw.double_quant:
        return qw.absmax
    assert qw.code2 is not None and qw.absmax2 is not None and qw.offset is not None
    return qw.code2[qw.absmax.int()] * qw.absmax2.repeat_interleave(256)[: qw.n_blocks] + qw.offset


def plain_torch(inputs: Inputs, W: Tensor) -> Layer:
    """Dequantize, matrix product, adapter by `addmm`."""
    qw, (A, B) = clone(inputs.qw), adapter(inputs)
    s = inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, torch_dequantize(qw, x.dtype))
        return torch.addmm(y, x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=s)

    return Layer(forward, (A, B), qw.nbytes)
