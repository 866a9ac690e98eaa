"""One 4-bit base, two adapters: switched between requests, or mixed in one batch.

python -m lora_kernels.examples.serve_two_adapters MODEL ADAPTER_A ADAPTER_B
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk


@torch.inference_mode()
def main(path: str, adapter_a: str, adapter_b: str, prompt: str = "two and two make") -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=lk.QLoRAQuantConfig())
    model = PeftModel.from_pretrained(base, adapter_a, adapter_name="a")
    model.load_adapter(adapter_b, adapter_name="b")
    model.eval()
    answers = {}

    one = tokenizer([prompt], return_tensors="pt")
    for name in ("a", "b"):  # one adapter at a time: each layer is one fused call
        model.set_adapter(name)
        out = model.generate(**one, max_new_tokens=8, do_sample=False)
        answers[name] = tokenizer.decode(out[0], skip_special_tokens=True)

    names = ["a", "b", "__base__"]  # a row each: the base is read once for all of them
    batch = tokenizer([prompt] * 3, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, adapter_names=names)
    for name, text in zip(names, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
        answers[f"batch {name}"] = text
    for name, text in answers.items():
        print(f"{name}: {text}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:4])
