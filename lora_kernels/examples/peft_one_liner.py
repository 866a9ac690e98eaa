"""PEFT as you know it, on our layers: the quantization config is the one line that changes.

python -m lora_kernels.examples.peft_one_liner MODEL OUT
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk


def main(path: str, out: str, steps: int = 10) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=lk.QLoRAQuantConfig())
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))
    lk.verify(model, strict=True)  # raises if a layer is not fused, and says why

    batch = tokenizer("two and two make four, and three and three make six.", return_tensors="pt")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)  # an ordinary PEFT adapter
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter in {out}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
