"""What the rivals and suites are called in tables and pictures."""

from __future__ import annotations

from ..suite import GRAPH

SUITES = {
    "train_step": "A training step of a whole model (forward, backward, AdamW)",
    "decode": "Generating one token after another",
    "train_layer": "Forward and backward of one linear layer",
    "forward": "Forward of one linear layer, from one token up",
    "dequantize": "NF4 with double quantization to bf16",
    "quantize": "bf16 to NF4 with double quantization",
    "decode_absmax": "Double-quantized scales to float32",
    "memory": "Peak memory of a layer's forward and backward, weights not counted",
    "grid": "Every shape at every number of tokens",
}
"""In the order in which results are shown."""

RIVALS = {
    "dense": "bf16 nn.Linear, no adapter",
    "dense+peft": "bf16 + PEFT",
    "torch": "plain torch",
    "bnb": "bitsandbytes",
    "bnb+peft": "bitsandbytes + PEFT",
    "bnb+peft-autocast": "bitsandbytes + PEFT, autocast",
    "bnb+peft-bf16": "bitsandbytes + PEFT, bf16 adapters",
    "bnb-inference": "bitsandbytes repacked, no adapter",
    "bnb-inference+peft": "bitsandbytes repacked + PEFT",
    "torchao": "torchao NF4",
    "unsloth": "Unsloth",
    "lorafusion": "LoRAFusion, 16-bit weight",
    "lorafusion-nf4": "LoRAFusion + bitsandbytes",
}

GROUPS = {
    "bf16 nn.Linear, no adapter": ("dense",),
    "bf16 + PEFT": ("dense+peft",),
    "bitsandbytes (+ PEFT), best setting": ("bnb", "bnb+peft", "bnb+peft-autocast", "bnb+peft-bf16", "bnb-inference+peft"),
    "bitsandbytes repacked, no adapter": ("bnb-inference",),
    "torchao NF4": ("torchao",),
    "Unsloth": ("unsloth",),
    "LoRAFusion": ("lorafusion", "lorafusion-nf4"),
    "plain torch": ("torch",),
}
"""Columns of the overview; of several contenders the fastest on a line counts."""


def plain(name: str) -> str:
    """A rival as a reader knows it."""
    name = name.removesuffix(GRAPH)
    return RIVALS.get(name, name)
