"""Reading, checking, tokenizing, splitting and batching of training data."""

import json

import pytest
import torch
from helpers import tiny_llama
from tiny_folder import chat, make_tokenizer, write_jsonl

from lora_kernels.app.data import IGNORED, Collator, encode, read_records, split

RECORDS = {
    "chat": chat("what does the fox say", "the quick brown"),
    "completion": {"prompt": "the lazy", "completion": " dog"},
    "instruction": {"instruction": "say what", "input": "the fox", "output": "a function does"},
    "text": {"text": "the quick brown fox"},
}
ANSWERS = {
    "chat": "the quick brown<|end|>",
    "completion": " dog<|end|>",
    "instruction": "a function does<|end|>",
    "text": "the quick brown fox<|end|>",
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def labelled(example, tokenizer):
    return tokenizer.decode([t for t in example["labels"] if t != IGNORED])


@pytest.mark.parametrize("name", RECORDS)
def test_formats(name, tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_text("\n" + json.dumps(RECORDS[name]) + "\r\n   \n" + json.dumps(RECORDS[name]))
    records = read_records(file)
    assert [(r.line, r.format) for r in records] == [(2, name), (4, name)]
    for example in encode(records, tokenizer, 64):
        assert labelled(example, tokenizer) == ANSWERS[name]
        assert len(example["input_ids"]) == len(example["labels"])


def test_instruction_without_chat_template(tmp_path):
    tokenizer = make_tokenizer(template=None)
    (example,) = encode(read_records(write_jsonl(tmp_path / "d", [RECORDS["instruction"]])), tokenizer, 64)
    assert tokenizer.decode(example["input_ids"]) == "say what\n\nthe fox\n\na function does<|end|>"
    assert labelled(example, tokenizer) == ANSWERS["instruction"]


def test_chat_with_several_answers(tmp_path, tokenizer):
    turns = [
        {"role": "system", "content": "quick"},
        *chat("the fox", "jumps")["messages"],
        *chat("over", "the dog")["messages"],
    ]
    records = read_records(write_jsonl(tmp_path / "d", [{"messages": turns}]))
    (example,) = encode(records, tokenizer, 64)
    assert labelled(example, tokenizer) == "jumps<|end|>the dog<|end|>"


@pytest.mark.parametrize("name", RECORDS)
def test_same_as_trl(name, tmp_path, tokenizer):
    """TRL's own preparation of the same records: the same ids, the same part with loss."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    record = dict(RECORDS[name])
    if name == "instruction":
        record = chat("say what\n\nthe fox", record["output"])
    if "messages" in record:
        record = {"prompt": record["messages"][:1], "completion": record["messages"][1:]}
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_length=12, report_to="none"),
        train_dataset=datasets.Dataset.from_list([record] * 2),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    (ours,) = encode(read_records(write_jsonl(tmp_path / "d", [RECORDS[name]])), tokenizer, 12)
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]


def test_too_long(tmp_path, tokenizer):
    records = read_records(write_jsonl(tmp_path / "d", [chat("the fox " * 30, "dog"), chat("fox", "dog and fox " * 30)]))
    lost, cut = encode(records, tokenizer, 16)
    assert lost is None
    assert len(cut["input_ids"]) == 16
    assert cut["labels"][-1] != IGNORED


GOOD = json.dumps(RECORDS["completion"])
BAD = {
    "no JSON": ("{'prompt': 1}", "is not JSON"),
    "an array": ("[1, 2]", "is a JSON list"),
    "unknown keys": ('{"question": "a", "answer": "b"}', "'question', 'answer'"),
    "no completion": ('{"prompt": "a"}', "'prompt'"),
    "a number": ('{"prompt": "a", "completion": 3}', '"completion" must be a string that is not blank, got 3'),
    "blank": ('{"prompt": " ", "completion": "b"}', '"prompt" must be a string that is not blank'),
    "mixed": ('{"text": "a"}', "line 1 of 'completion'"),
    "not UTF-8": (b'{"text": "\xff"}', "not valid UTF-8"),
    "half a surrogate": ('{"text": "\\ud800"}', "not valid UTF-8"),
    "no messages": ('{"messages": []}', '"messages" must be a list'),
    "a message of text": ('{"messages": ["hi"]}', "message 1 must be"),
    "unknown role": ('{"messages": [{"role": "bot", "content": "a"}]}', "one of system, user, assistant, tool, got 'bot'"),
    "no content": ('{"messages": [{"role": "user"}]}', 'message 1: "content"'),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "last message must be the assistant's"),
    "input of another type": ('{"instruction": "a", "input": 1, "output": "b"}', '"input" must be a string'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record(name, tmp_path):
    line, words = BAD[name]
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD.encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + GOOD.encode())
    with pytest.raises(ValueError, match="line 3") as error:
        read_records(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "missing"), ("", "is empty"), ("\n \n", "is empty"), (..., "is a folder")]
)
def test_bad_file(content, words, tmp_path):
    file = tmp_path / "data.jsonl"
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_records(file)


def test_chat_needs_a_template(tmp_path):
    records = read_records(write_jsonl(tmp_path / "d", [RECORDS["chat"]]))
    with pytest.raises(ValueError, match="no chat template"):
        encode(records, make_tokenizer(template=None), 64)


def test_template_that_refuses(tmp_path):
    records = read_records(write_jsonl(tmp_path / "d", [RECORDS["chat"]]))
    with pytest.raises(ValueError, match="line 1: the chat template of MODEL refuses this chat: no foxes"):
        encode(records, make_tokenizer(template="{{ raise_exception('no foxes') }}"), 64)


@pytest.mark.parametrize(("n", "fraction", "held_out"), [(100, 0.1, 10), (3, 0.05, 1), (10, 0.0, 0)])
def test_split(n, fraction, held_out):
    train, rest = split(range(n), fraction, seed=5)
    assert len(rest) == held_out
    assert sorted([*train, *rest]) == list(range(n))
    assert (train, rest) == split(range(n), fraction, seed=5)
    if held_out > 1:
        assert rest != split(range(n), fraction, seed=6)[1]


def test_split_that_leaves_nothing():
    with pytest.raises(ValueError, match=r"--eval-fraction 0\.5 of 1 usable"):
        split([1], 0.5, seed=0)


@pytest.mark.parametrize("keep", [True, False])
def test_batch_gives_the_loss_of_its_records(keep, tmp_path):
    """Padding, positions and left-out logits change nothing: the mean over all labelled tokens, one record at a time."""
    model = tiny_llama()
    examples = [
        {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
        {"input_ids": [9, 8, 7, 6, 5, 4, 3], "labels": [IGNORED] * 5 + [4, 3]},
        {"input_ids": [1, 2], "labels": [IGNORED, 2]},
    ]
    total = 0.0
    for e in examples:
        logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        total -= sum(logits[i, t] for i, t in enumerate(e["labels"][1:]) if t != IGNORED)
    batch = Collator(pad_token_id=0, logits_to_keep=keep)(examples)
    out = model(**batch)
    assert out.logits.shape[1] == (3 if keep else 7)
    torch.testing.assert_close(out.loss.double(), total / 5, rtol=1e-5, atol=1e-5)
