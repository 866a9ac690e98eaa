"""A tiny random Llama with a tokenizer and a chat template, as a folder on disk, and data for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog and says what a function does with its arguments"
WORDS = TEXT.split()


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer trained on a few words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def make_folder(path: Path, tied: bool = True, template: str | None = TEMPLATE, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes model and tokenizer to `path`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return save_with_tokenizer(LlamaForCausalLM(config).to(dtype), tokenizer, path)


def save_with_tokenizer(model: Any, tokenizer: Any, path: Path, **options: Any) -> Path:
    """Writes both to `path`; `options` go to the model's save_pretrained."""
    model.save_pretrained(path, **options)
    tokenizer.save_pretrained(path)
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(file: Path, records: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def chats(n: int = 24) -> list[dict[str, Any]]:
    """Questions and answers of different lengths."""
    return [chat(" ".join(WORDS[i % 7 : i % 7 + 3]), " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])) for i in range(n)]
