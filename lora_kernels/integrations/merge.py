"""Leaving 4 bits: a model of our layers, with or without PEFT around it, as a dense model with its adapters merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def merge_dense(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Merges the active adapters and returns the base model in `dtype`, for servers that want 16-bit weights.

    Each weight is the dequantized base plus the update, added in float32 and rounded once, so that nothing of the adapter is
    lost as it would be in a merge into 4 bits.  The model that was passed is used up.

    Args:
        model: a PEFT model, or any model with our layers in it.
        dtype: of the whole model that is returned.

    Raises:
        ValueError: there is no layer of ours in the model.
    """
    replaced = ""
    for name, module in list(model.named_modules()):
        inside = replaced and name.startswith(f"{replaced}.")  # parts come right after their layer
        if not inside and hasattr(type(module), "to_linear"):
            linear = module.to_linear(dtype)  # type: ignore[operator]
            base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            model.set_submodule(name, _conv1d(linear) if getattr(base, "was_conv1d", False) else linear)
            replaced = name
    if not replaced:
        raise ValueError("model has no layer of lora_kernels in it: nothing to merge")
    unload = getattr(model, "unload", None)
    dense: Any = unload() if callable(unload) else model
    quantizer = getattr(dense, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(dense)
    dense.is_loaded_in_4bit = False
    return dense.to(dtype)


def _conv1d(linear: nn.Linear) -> nn.Module:
    """The same as transformers' Conv1D, the class of GPT-2's linear layers, which holds the weight transposed."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer: nn.Module = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    layer.bias = linear.bias
    return layer.train(linear.training)


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, training: bool) -> nn.Linear:
    """A frozen linear layer of `weight [N, K]` and `bias [N]`, both brought to `dtype`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    # set past register_parameter, which PEFT lets create everything on the meta device while it loads with low_cpu_mem_usage
    linear._parameters["weight"] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return linear.train(training)
