"""Several processes: loading a model that FSDP2 has sharded, and what it weighs on each process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..packed import SCALES, PackedWeight


def load_full_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], src: int = 0) -> None:
    """Fills a sharded model from a whole state dict that one process holds; the others pass an empty one.

    The model may have been made on the meta device and given memory by `to_empty`.  Packed weights and other parameters are
    sent in shards, scales, which are not sharded, whole.

    Args:
        model: sharded by `torch.distributed.fsdp.fully_shard`, with our layers in it.
        state_dict: as `model.state_dict()` gave it in one process.
        src: rank of the process that has it.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the model has no layer of ours in it.
    """
    if not dist.is_initialized():
        raise RuntimeError("load_full_state_dict: torch.distributed is not initialised; start the program with torchrun")
    layers = [m for m in model.modules() if isinstance(m, PackedWeight)]
    if not layers:
        raise ValueError("model has no layer of lora_kernels in it: load it with set_model_state_dict")
    given: dict[str, Any] = dict(state_dict) if dist.get_rank() == src else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=dist.get_rank() == src)
    set_model_state_dict(model, given, options=options)
    for layer in layers:
        scales = layer.quantized_weight
        for name in SCALES:
            if (t := getattr(scales, name)) is not None:
                dist.broadcast(t, src)


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the packed weights that this process holds, and of all of them."""
    here = whole = 0
    for module in model.modules():
        if isinstance(module, PackedWeight):
            weight: Any = module._parameters["weight"]
            whole += weight.numel() * weight.element_size()
            local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
            here += local.numel() * local.element_size()
    return here, whole
