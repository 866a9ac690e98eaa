"""Base and adapter as one dense 16-bit model, for vLLM or for llama.cpp's convert_hf_to_gguf.py.

    python -m lora_kernels.examples.merge_to_16_bit MODEL ADAPTER OUT

The update is added to the dequantized base in float32 and rounded once.  A merge into 4 bits would lose most of it.
"""

import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk


def main(path: str, adapter: str, out: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=lk.QLoRAQuantConfig())
    model: Any = lk.merge_dense(PeftModel.from_pretrained(base, adapter), torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
