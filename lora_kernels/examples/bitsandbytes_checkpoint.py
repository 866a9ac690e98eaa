"""A checkpoint that bitsandbytes made: straight into our layers, or first into bitsandbytes' and then made fused in place.

python -m lora_kernels.examples.bitsandbytes_checkpoint MODEL OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import lora_kernels as lk


def main(path: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=lk.QLoRAQuantConfig())
    print(lk.verify(model, strict=True))

    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)  # layers of bitsandbytes
    lk.accelerate(stock)  # every parameter stays where it is
    lk.verify(stock, strict=True)

    model.save_pretrained(out)  # bitsandbytes' format again: it loads with and without lora_kernels


if __name__ == "__main__":
    main(*sys.argv[1:3])
