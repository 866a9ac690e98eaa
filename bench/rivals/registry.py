"""The rivals by name, and where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lora_kernels.testing import Inputs

from ..suite import OURS
from . import bnb_peft, gpu, plain, torchao_nf4
from .base import Layer

REGISTRY: dict[str, Callable[[Inputs, Tensor], Layer]] = {
    OURS: plain.ours,
    "dense": plain.dense,
    "dense+peft": bnb_peft.dense_peft,
    "torch": plain.plain_torch,
    "bnb+peft": bnb_peft.bnb_peft(autocast=False),
    "bnb+peft-autocast": bnb_peft.bnb_peft(autocast=True),
    "bnb-inference": bnb_peft.bnb_inference,
    "bnb-inference+peft": bnb_peft.bnb_inference_peft,
    "torchao": torchao_nf4.torchao,
    "unsloth": gpu.unsloth,
    "lorafusion": gpu.lorafusion(dequantize=False),
    "lorafusion-nf4": gpu.lorafusion(dequantize=True),
}

GPU_ONLY = ("unsloth", "lorafusion", "lorafusion-nf4")
CPU_ONLY = ("bnb-inference", "bnb-inference+peft")


def on(device: torch.device, names: Iterable[str]) -> list[str]:
    """Those that exist on the device."""
    return [n for n in names if n not in (GPU_ONLY if device.type == "cpu" else CPU_ONLY)]
