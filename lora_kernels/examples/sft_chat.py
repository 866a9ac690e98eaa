"""TRL's SFTTrainer on a chat dataset: a JSONL file whose lines are {"messages": [{"role": ..., "content": ...}, ...]}.

python -m lora_kernels.examples.sft_chat MODEL DATA.jsonl OUT
"""

import sys
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lora_kernels as lk


def main(path: str, data: str, out: str, **options: Any) -> list[float]:
    """`options` go to SFTConfig."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=lk.QLoRAQuantConfig())
    trainer = SFTTrainer(
        model,
        SFTConfig(out, bf16=True, learning_rate=2e-4, logging_steps=1, **options),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    lk.verify(trainer.model, strict=True)
    trainer.train()
    trainer.save_model(out)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main(*sys.argv[1:4])
