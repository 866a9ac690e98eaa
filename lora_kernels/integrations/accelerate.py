"""`lora_kernels.accelerate`: a model of bitsandbytes' layers, with or without PEFT around it, made fused in place."""

from __future__ import annotations

from torch import nn

from ..requirements import installed
from .bitsandbytes import STOCK_LAYERS, FusedLinear4bit, adopt


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the layers of an existing bitsandbytes or PEFT-on-bitsandbytes model fused, in place.

    Every parameter stays the same object, so that an optimizer in use keeps working, and the state dict keeps its keys.
    Adapters that PEFT adds later are fused too.  `lora_kernels.verify` says what became of each layer.

    Args:
        model: a model with `bnb.nn.Linear4bit` layers in it, with or without PEFT around it.

    Returns:
        `model`.

    Raises:
        TypeError: not a module.
        ValueError: there is no 4-bit layer, or one can't be taken over (it is named); the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = list(model.named_modules())
    linears = {name: m for name, m in named if type(m) in STOCK_LAYERS}
    if not linears and not any(isinstance(m, FusedLinear4bit) for _, m in named):
        kinds = sorted({type(m).__name__ for _, m in named if "Linear" in type(m).__name__})
        raise ValueError(
            "model has no bitsandbytes 4-bit layer (bnb.nn.Linear4bit); its linear layers are "
            f"{', '.join(kinds) or 'none'}. A dense model is quantized by lora_kernels.apply_qlora"
        )
    for name, layer in linears.items():
        adopt(layer, name or "model")
    for layer in linears.values():
        layer.__class__ = FusedLinear4bit
    if installed("peft"):
        from . import peft

        peft.enable_peft()
        peft.take_over(model)
    return model
