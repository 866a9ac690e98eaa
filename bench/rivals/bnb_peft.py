"""PEFT over a dense layer and over bitsandbytes, and bitsandbytes' repacked layer for inference on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import Inputs

from ..suite import UnavailableError
from .base import Layer, clone, frozen_linear, need, set_adapter


def with_peft(inputs: Inputs, base: nn.Module, autocast: bool, training: bool = True) -> Layer:
    need("peft")
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.q_proj = base
    r = inputs.case.r
    config = LoraConfig(r=r, lora_alpha=inputs.case.scaling * r, target_modules=["q_proj"], lora_dropout=0.0)
    layer = get_peft_model(holder, config).base_model.model.q_proj
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    leaves = set_adapter(matrices, inputs)
    layer.train(training)
    if not autocast:
        return Layer(layer, leaves)
    device_type = inputs.x.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return layer(x)

    return Layer(forward, leaves)


def linear4bit(qw: lk.QuantizedWeight) -> nn.Module:
    """`bnb.nn.Linear4bit` over the same bytes."""
    bnb = need("bitsandbytes")
    N, K = qw.shape
    layer = bnb.nn.Linear4bit(K, N, False, torch.bfloat16, qw.double_quant, qw.quant_type, device="meta")
    layer.weight = clone(qw).to_bitsandbytes()
    layer.quant_state = layer.weight.quant_state
    return layer


def bnb_peft(autocast: bool) -> Callable[[Inputs, Tensor], Layer]:
    """In training mode, which on a CPU keeps the weight as it is stored.  Without autocast PEFT computes its float32 adapters
    in float32 (its default); with bf16 autocast in bf16 (what `Trainer(bf16=True)` does)."""

    def make(inputs: Inputs, W: Tensor) -> Layer:
        layer = with_peft(inputs, linear4bit(inputs.qw), autocast)
        layer.nbytes = inputs.qw.nbytes
        return layer

    return make


def dense_peft(inputs: Inputs, W: Tensor) -> Layer:
    layer = with_peft(inputs, frozen_linear(W.clone()), autocast=True)
    layer.nbytes = W.nbytes
    return layer


def bnb_inference(inputs: Inputs, W: Tensor) -> Layer:
    """Without adapter."""
    layer, nbytes = _repacked(inputs)
    return Layer(layer, (), nbytes)


def bnb_inference_peft(inputs: Inputs, W: Tensor) -> Layer:
    base, nbytes = _repacked(inputs)
    layer = with_peft(inputs, base, autocast=True, training=False)
    layer.nbytes = nbytes
    return layer


def _repacked(inputs: Inputs) -> tuple[nn.Module, int]:
    """bitsandbytes repacks a weight for the CPU at its first forward pass in eval mode: for inference only, and the scales
    become bf16.  Returns the layer and the bytes of its weight."""
    bnb = need("bitsandbytes")
    if inputs.x.device.type != "cpu":
        raise UnavailableError("a layout of the CPU only")
    if not bnb.functional.has_avx512bf16():
        raise UnavailableError("this CPU has no AVX512-BF16, without which bitsandbytes does not repack")
    layer = linear4bit(inputs.qw).eval()
    with torch.no_grad():
        layer(inputs.x[:1])
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        raise UnavailableError("bitsandbytes does not repack this shape")
    return layer, layer.weight.nbytes + state.absmax.nbytes
