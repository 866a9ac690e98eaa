"""Answering a prompt."""

from __future__ import annotations

from typing import Any

import torch


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float = 0.0, streamer: Any = None) -> str:
    """Answers a prompt, as a chat if the tokenizer has a chat template.

    Args:
        temperature: 0 for the likeliest token each time.
        streamer: a transformers streamer that gets the tokens as they come.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = inputs["input_ids"].shape[1]
    model.eval()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
