"""Every example runs, on a tiny model, from start to end; those of the README too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXTS, tiny_llama, torchrun
from torch import nn

import lora_kernels as lk

for package in ("transformers", "peft", "bitsandbytes", "trl"):
    pytest.importorskip(package)
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from lora_kernels import examples  # noqa: E402
from lora_kernels.app.data import _FORMATS, read_records  # noqa: E402
from lora_kernels.examples import (  # noqa: E402
    bitsandbytes_checkpoint,
    merge_to_16_bit,
    peft_one_liner,
    serve_two_adapters,
    sft_chat,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(dtype=torch.bfloat16, tied=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters")
    runs = []
    for name, steps in (("a", 10), ("b", 3)):
        torch.manual_seed(0)
        runs.append(peft_one_liner.main(model, str(out / name), steps))
    assert runs[0][-1] < runs[0][0]
    return str(out / "a"), str(out / "b")


def test_every_example_has_a_test():
    names = {p.stem for p in Path(examples.__path__[0]).glob("*.py")} - {"__init__"}
    assert names == {
        "bitsandbytes_checkpoint",
        "fsdp2",
        "merge_to_16_bit",
        "peft_one_liner",
        "serve_two_adapters",
        "sft_chat",
    }


def test_sft_chat(model, tmp_path):
    rows = [[{"role": "user", "content": t[:9]}, {"role": "assistant", "content": t[9:]}] for t in TEXTS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    options = {"max_steps": 3, "use_cpu": True, "max_length": 32, "disable_tqdm": True}
    losses = sft_chat.main(model, str(tmp_path / "chat.jsonl"), str(tmp_path / "out"), **options)
    assert len(losses) == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_bitsandbytes_checkpoint(model, tmp_path, capsys):
    quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=lk.QLoRAQuantConfig())
    quantized.save_pretrained(tmp_path / "bnb")
    bitsandbytes_checkpoint.main(str(tmp_path / "bnb"), str(tmp_path / "out"))
    assert "14 of 15 linear layers fused" in capsys.readouterr().out
    a, b = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("bnb", "out"))
    assert a == b


def test_fsdp2(model, tmp_path):
    done = torchrun("-m", "lora_kernels.examples.fsdp2", model, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("holds 24576 of 49152 bytes of 4-bit weights") == 2
    assert (tmp_path / "adapter_model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=lk.QLoRAQuantConfig())
    tuned = PeftModel.from_pretrained(base, tmp_path)
    assert any(p.abs().sum() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)


def test_serve_two_adapters(model, adapters):
    answers = serve_two_adapters.main(model, *adapters)
    assert len(answers) == 5
    assert answers["batch a"] == answers["a"]


def test_merge_to_16_bit(model, adapters, tmp_path):
    merge_to_16_bit.main(model, adapters[0], str(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=lk.QLoRAQuantConfig())
    tuned = PeftModel.from_pretrained(base, adapters[0]).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        a, b = merged(input_ids=ids).logits.float(), tuned(input_ids=ids).logits.float()
    assert (a - b).norm() < 0.03 * b.norm()


# ---- the README


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_readme_example_learns(tmp_path):
    """As a reader runs it: pasted into a file, in a folder of its own."""
    (tmp_path / "example.py").write_text(PYTHON[0], encoding="utf-8")
    root = str(Path(lk.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "28 of 29 linear layers fused" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    assert done.stdout.split("\n")[-2].strip() == "After Monday comes Tuesday."
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_readme_lines_for_a_real_model(model):
    hub = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert PYTHON[1].count(hub) == 2
    names = {"AutoTokenizer": AutoTokenizer, "AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch, "lk": lk}
    exec(PYTHON[1].replace(hub, repr(model)), names)
    assert len(lk.verify(names["model"], strict=True).fused) == 14
    assert names["tokenizer"].eos_token


def test_readme_records_are_accepted(tmp_path):
    """One sample of every format, each in a file of its own."""
    [block] = re.findall(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    formats = []
    for line in block.splitlines():
        (tmp_path / "data.jsonl").write_text(line + "\n", encoding="utf-8")
        formats += [record.format for record in read_records(tmp_path / "data.jsonl")]
    assert formats == list(_FORMATS)
