"""Training data: a JSONL file of records in one of four formats, checked, tokenized, split and batched.

| format | keys of a record | loss on |
| --- | --- | --- |
| chat | `messages`: `[{"role": ..., "content": ...}, ...]`, the last one of the assistant | what the assistant says |
| completion | `prompt`, `completion` | the completion |
| instruction | `instruction`, `output`, optional `input` | the output |
| text | `text` | everything |

Chats and instructions go through the tokenizer's chat template; an instruction does without if there is none.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")
ACCEPTED = (
    'a record is a JSON object with "messages", with "prompt" and "completion", with "instruction" and "output" '
    '(and "input" if need be), or with "text"'
)
IGNORED = -100
"""Label of a token that has no part in the loss."""


@dataclass(frozen=True)
class Record:
    """One checked record: the line it stands on, its format ("chat", "completion", "instruction", "text") and its content."""

    line: int
    format: str
    content: dict[str, Any]


class Example(TypedDict):
    """One tokenized record; `labels` are the token ids where the loss counts and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


# ---- reading


def read_records(file: str | os.PathLike[str]) -> list[Record]:
    """Reads and checks a JSONL file; blank lines are skipped.

    Raises:
        ValueError: the file is missing or empty, or a line is not a record; the message names the line and what is accepted.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--data: {path} is {'a folder' if path.is_dir() else 'missing'}; it must be a JSONL file")
    records: list[Record] = []
    for line, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        try:
            record = _parse(line, raw)
            if records and record.format != records[0].format:
                before = f"line {records[0].line} of {records[0].format!r}"
                raise ValueError(f"is of the format {record.format!r}, {before}; a file holds one format")
        except ValueError as e:
            raise ValueError(f"{path}, line {line}: {e}") from None
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: it needs one record a line; {ACCEPTED}")
    return records


def _parse(line: int, raw: bytes) -> Record:
    try:
        content = json.loads(raw)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("is not valid UTF-8") from None
    except ValueError as e:
        raise ValueError(f"is not JSON ({e}); {ACCEPTED}") from None
    if not isinstance(content, dict):
        raise ValueError(f"is a JSON {type(content).__name__}; {ACCEPTED}")
    for name, (keys, check) in _FORMATS.items():
        if keys <= content.keys():
            check(content)
            return Record(line, name, content)
    raise ValueError(f"has the keys {', '.join(map(repr, content)) or 'none'}; {ACCEPTED}")


def _check_chat(content: dict[str, Any]) -> None:
    messages = content["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of at least one {"role": ..., "content": ...}')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f'message {i} must be {{"role": ..., "content": ...}}, got {message!r}')
        if message.get("role") not in ROLES:
            raise ValueError(f'message {i}: "role" must be one of {", ".join(ROLES)}, got {message.get("role")!r}')
        _check_text(message, "content", f"message {i}: ")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's answer, got the role {messages[-1]['role']!r}")


def _check_instruction(content: dict[str, Any]) -> None:
    _check_text(content, "instruction")
    _check_text(content, "output")
    if not isinstance(content.get("input", ""), str):
        raise ValueError(f'"input" must be a string, got {content["input"]!r}')


def _check_text(content: dict[str, Any], key: str, where: str = "") -> None:
    text = content.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}"{key}" must be a string that is not blank, got {text!r}')


def _check_completion(content: dict[str, Any]) -> None:
    _check_text(content, "prompt")
    _check_text(content, "completion")


_FORMATS: dict[str, tuple[set[str], Callable[[dict[str, Any]], None]]] = {
    "chat": ({"messages"}, _check_chat),
    "completion": ({"prompt", "completion"}, _check_completion),
    "instruction": ({"instruction", "output"}, _check_instruction),
    "text": ({"text"}, lambda content: _check_text(content, "text")),
}


# ---- tokenizing


def encode(records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example | None]:
    """Tokenizes records; the end of a long one is cut off, and one with nothing left to learn from is None.

    Raises:
        ValueError: the records need a chat template that the tokenizer lacks, or its template refuses one (named by line).
    """
    chats = records[0].format in ("chat", "instruction") and bool(tokenizer.chat_template)
    if records[0].format == "chat" and not chats:
        raise ValueError('--data: the tokenizer of MODEL has no chat template for "messages"; use "prompt" and "completion"')
    spans = [_chat_spans(r, tokenizer) if chats else _plain_spans(r, tokenizer) for r in records]
    texts = [text for text, prefixes in spans for text in (text, *prefixes)]
    ids: Iterator[list[int]] = iter(tokenizer(texts, add_special_tokens=not chats)["input_ids"])
    return [_label(next(ids), [next(ids) for _ in prefixes], max_length) for _, prefixes in spans]


def _label(ids: list[int], prefixes: list[list[int]], max_length: int) -> Example | None:
    """Labels the tokens between each pair of prefixes (from, to); without prefixes all of them."""
    labels = [IGNORED] * len(ids) if prefixes else list(ids)
    for start, stop in zip(prefixes[::2], prefixes[1::2], strict=True):
        if ids[: len(stop)] != stop:
            continue  # this template shows an earlier turn in another way once the chat goes on
        begin = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
        labels[begin : len(stop)] = ids[begin : len(stop)]
    if all(label == IGNORED for label in labels[1:max_length]):
        return None
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _chat_spans(record: Record, tokenizer: Any) -> tuple[str, list[str]]:
    """The text of a chat, and for each answer the text before it and up to its end."""
    from jinja2 import TemplateError

    messages = record.content.get("messages") or _as_chat(record.content)

    def render(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)

    try:
        full = render(len(messages), False)
        prefixes = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prefixes += [render(i, True), full if i + 1 == len(messages) else render(i + 1, False)]
    except TemplateError as e:
        raise ValueError(f"--data: line {record.line}: the chat template of MODEL refuses this chat: {e}") from None
    return full, prefixes


def _as_chat(content: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": _question(content)}, {"role": "assistant", "content": content["output"]}]


def _question(content: dict[str, Any]) -> str:
    return "\n\n".join(filter(None, (content["instruction"], content.get("input"))))


def _plain_spans(record: Record, tokenizer: Any) -> tuple[str, list[str]]:
    content, end = record.content, tokenizer.eos_token or ""
    if record.format == "text":
        return content["text"].removesuffix(end) + end, []
    if record.format == "completion":
        prompt, completion = content["prompt"], content["completion"]
    else:
        prompt, completion = _question(content) + "\n\n", content["output"]
    full = prompt + completion.removesuffix(end) + end
    return full, [prompt, full]


# ---- splitting and batching


def split(items: Sequence[T], eval_fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """The training and the held-out part of `items`, drawn with `seed`.

    Raises:
        ValueError: nothing would be left to train on.
    """
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    n = max(1, round(len(items) * eval_fraction)) if eval_fraction else 0
    if n >= len(items):
        raise ValueError(f"--eval-fraction {eval_fraction} of {len(items)} usable records leaves none to train on")
    return [items[i] for i in sorted(order[n:])], [items[i] for i in sorted(order[:n])]


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the left: the answers end together, so the loss needs the logits of the last few positions only.

    Attributes:
        pad_token_id: fills `input_ids`.
        logits_to_keep: whether the model can leave out the logits before the first answer.
    """

    pad_token_id: int
    logits_to_keep: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), longest), self.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, -n:] = torch.tensor(example["input_ids"])
            labels[row, -n:] = torch.tensor(example["labels"])
            mask[row, -n:] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if self.logits_to_keep:
            first = int((labels != IGNORED).any(0).int().argmax())
            keep = min(longest, longest - first + 1)  # one more: logits predict the next position
            # positions in place of their number: indexed states are contiguous, and torch multiplies a slice 4 times slower
            batch |= {"labels": labels[:, -keep:], "logits_to_keep": torch.arange(longest - keep, longest)}
        return batch
