"""The command line through its own entry point, on a tiny random Llama."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import HANG, snapshot
from safetensors.torch import load_file, save_file
from tiny_folder import chat, chats, make_folder, write_jsonl

import lora_kernels as lk
from lora_kernels.model import fused_layers

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)
from typer.testing import CliRunner  # noqa: E402

from lora_kernels.app.load import load_model, load_with_adapter  # noqa: E402
from lora_kernels.cli import app  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, and a run on them by the command line."""
    path = tmp_path_factory.mktemp("cli")
    make_folder(path / "model")
    write_jsonl(path / "data.jsonl", chats())
    done = cli("finetune", path / "model", "--data", path / "data.jsonl", "--out", path / "run", "--max-steps", 8, "--lr", 0.02)
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output
    assert "tokens/s" in done.output
    return path


def cli(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def tokens():
    return torch.arange(3, 33).reshape(3, 10)


def test_help():
    done = cli("--help")
    assert done.exit_code == 0
    for command in ("doctor", "finetune", "generate", "merge", "quantize", "verify", "demo"):
        assert command in done.output
        assert cli(command, "--help").exit_code == 0


def test_doctor():
    done = cli("doctor")
    assert done.exit_code == 0
    assert torch.__version__.partition("+")[0] in done.output
    assert re.search(r"cpu: (native|reference)", done.output)
    assert "check: forward and backward of a QLoRA layer agree with float64" in done.output


def test_doctor_finds_a_wrong_result(monkeypatch):
    from lora_kernels.app import doctor

    right = doctor.qlora_linear
    monkeypatch.setattr(doctor, "qlora_linear", lambda *a: right(*a) * 1.01)
    done = cli("doctor")
    assert done.exit_code == 1
    assert "check: FAILED: AssertionError: y: error" in done.output


def test_doctor_names_what_is_too_old(monkeypatch):
    from lora_kernels import requirements

    monkeypatch.setitem(requirements.FLOORS, "peft", "99.1")
    done = cli("doctor")
    assert done.exit_code == 1
    assert re.search(
        r"^too old: needed is peft 99\.1 or newer, found \S+: .*pip install 'peft>=99\.1'$", done.stdout, re.MULTILINE
    )


def test_doctor_says_how_to_get_the_better_backend():
    with lk.use_backend("reference"):
        done = cli("doctor")
    assert "cpu: reference" in done.output
    assert "better: native" in done.output


def test_generate(folder):
    base = cli("generate", folder / "model", "the fox", "--max-new-tokens", 5)
    adapted = cli("generate", folder / "model", "the fox", "--max-new-tokens", 5, "--adapter", folder / "run")
    assert base.exit_code == adapted.exit_code == 0, base.output + adapted.output
    assert base.output.strip()
    assert base.output != adapted.output
    assert cli("generate", folder / "model", "the fox", "--max-new-tokens", 5, "--temperature", 0.8).exit_code == 0


def test_generate_without_chat_template(tmp_path):
    make_folder(tmp_path / "model", template=None)
    assert cli("generate", tmp_path / "model", "the fox", "--max-new-tokens", 3).exit_code == 0


@pytest.mark.parametrize("tied", [True, False])
def test_merge(folder, tmp_path, tied):
    """The merged folder, loaded by transformers alone, computes what base and adapter compute."""
    from transformers import AutoModelForCausalLM

    model, out = folder / "model", tmp_path / "merged"
    if not tied:
        model = make_folder(tmp_path / "untied", tied=False)
    done = cli("merge", model, "--adapter", folder / "run", "--out", out, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "log.json" in done.output
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    adapted, _, _ = load_with_adapter(str(model), folder / "run", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()).logits, adapted(tokens()).logits, rtol=1e-4, atol=1e-4)
    before = snapshot(out)
    again = cli("merge", model, "--adapter", folder / "run", "--out", out)
    assert again.exit_code == 2
    assert snapshot(out) == before


@pytest.mark.parametrize("options", [[], ["--no-double-quant"], ["--quant-type", "fp4", "--blocksize", "32"]])
@pytest.mark.parametrize("tied", [True, False])
def test_quantize_loads_with_bitsandbytes(folder, tmp_path, options, tied):
    """The folder is one of bitsandbytes': transformers loads it, with the same logits as through our layers."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = make_folder(tmp_path / "model", tied, dtype=torch.float32)
    done = cli("quantize", model, "--out", tmp_path / "q", *options)
    assert done.exit_code == 0, done.output
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q").train()
    assert theirs.is_loaded_in_4bit
    ours, tokenizer = load_model(tmp_path / "q")
    assert theirs.dtype == ours.dtype == torch.float32
    assert tokenizer.chat_template
    assert len(fused_layers(ours)) == 14
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_folder_quantized_by_bitsandbytes(folder, tmp_path):
    """The reverse: what transformers and bitsandbytes write, we load without bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "q")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "q")
    ours, _ = load_model(tmp_path / "q", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs.train()(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_verify(folder, tmp_path):
    done = cli("verify", folder / "model", "--adapter", folder / "run")
    assert done.exit_code == 0, done.output
    assert "model.layers.0.self_attn.q_proj" in done.output
    assert re.search(r"(14|0) of 15 linear layers fused", done.output)
    with lk.use_backend("reference"):
        strict = cli("verify", folder / "model", "--strict")
    assert strict.exit_code == 1
    assert "14 linear layers are not fused" in strict.stderr


# ---- refusals


def line_of_error(done, code=2):
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    (line,) = [text for text in done.stderr.splitlines() if text.strip() and not re.search(r"it/s|s/it", text)]
    assert line.startswith("error: ")
    return line


def test_broken_data(folder, tmp_path):
    """Three broken records: the first bad line is named, and nothing is written."""
    good = chat("the fox", "jumps")
    data = write_jsonl(tmp_path / "data.jsonl", [good, {"messages": 3}, {"a": 1}, "x"])
    line = line_of_error(cli("finetune", folder / "model", "--data", data, "--out", tmp_path / "run"))
    assert f"{data}, line 2" in line
    assert '"messages" must be a list' in line
    assert not (tmp_path / "run").exists()


def broken_folder(folder, tmp_path, change):
    shutil.copytree(folder / "model", tmp_path / "broken")
    change(tmp_path / "broken")
    return tmp_path / "broken"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(f, changes):
    tensors = load_file(f / "model.safetensors") | changes
    given = {name: t for name, t in tensors.items() if t is not None}
    save_file(given, f / "model.safetensors", metadata={"format": "pt"})


def store_a_path(f):
    torch.save({"model.norm.weight": f}, f / "pytorch_model.bin")
    (f / "model.safetensors").unlink()


MODELS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "is damaged"),
    "torn weights": (lambda f: os.truncate(f / "model.safetensors", 1000), "can't be loaded"),
    "a weight left out": (
        lambda f: change_weights(f, {"model.layers.0.mlp.up_proj.weight": None}),
        "lack model.layers.0.mlp.up_proj.weight",
    ),
    "a weight of another shape": (
        lambda f: change_weights(f, {"model.norm.weight": torch.ones(63)}),
        "model.norm.weight is [63], the model has [64] there",
    ),
    "a projection of another shape": (
        lambda f: change_weights(f, {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 5)}),
        "up_proj.weight is [3, 5], the model has [128, 64] there",
    ),
    "weights that run code": (store_a_path, "can't be loaded: Weights only load failed"),
    "quantized, in a word": (lambda f: edit(f / "config.json", quantization_config="nf4"), "can't be loaded"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
    "GPTQ": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "quantized ('gptq'"),
    "4 bits without bytes": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "no 4-bit weight",
    ),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "give its base as MODEL"),
}


@pytest.mark.parametrize("name", MODELS)
def test_broken_model(name, folder, tmp_path):
    change, words = MODELS[name]
    model = broken_folder(folder, tmp_path, change)
    line = line_of_error(cli("verify", model))
    assert words in line
    assert str(model) in line


def test_no_such_model(tmp_path):
    assert "does not exist" in line_of_error(cli("verify", tmp_path / "nothing"))
    assert "does not exist" in line_of_error(cli("verify", tmp_path / "nothing.gguf"))
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    assert "no GGUF file" in line_of_error(cli("verify", tmp_path / "junk.gguf"))
    (tmp_path / "model.bin").write_bytes(b"junk")
    assert "a file that is no .gguf" in line_of_error(cli("verify", tmp_path / "model.bin"))
    assert "neither a path here nor a model id" in line_of_error(cli("verify", "nobody/nothing"))


def test_bad_adapter(folder, tmp_path):
    assert "has no adapter_config.json" in line_of_error(cli("generate", folder / "model", "x", "--adapter", tmp_path))
    shutil.copytree(folder / "run", tmp_path / "torn")
    os.truncate(tmp_path / "torn" / "adapter_model.safetensors", 1000)
    assert "is damaged" in line_of_error(cli("generate", folder / "model", "x", "--adapter", tmp_path / "torn"))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--quant-type", "int3", "nf4, fp4"),
        ("--blocksize", "65", "blocksize must be one of"),
        ("--out", None, "exists already"),
    ],
)
def test_bad_quantize(option, value, words, folder, tmp_path):
    out = ["--out", str(tmp_path / "q")]
    done = cli("quantize", folder / "model", *out, option, value if value is not None else tmp_path)
    assert words in line_of_error(done)
    assert not (tmp_path / "q").exists()


def test_bad_dtype(folder, tmp_path):
    done = cli("merge", folder / "model", "--adapter", folder / "run", "--out", tmp_path / "m", "--dtype", "int8")
    assert "--dtype must be one of bfloat16, float16, float32" in line_of_error(done)


def test_usage_errors():
    assert cli("finetune").exit_code == 2
    assert cli("generate", "x", "y", "--max-new-tokens", 0).exit_code == 2


# ---- processes of their own


def test_missing_extra(tmp_path):
    """Without typer, and without a package that a command needs: what to install, no traceback."""
    for missing, words in (("typer", ["--help"]), ("transformers", ["verify", str(tmp_path)])):
        code = (
            f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {words!r}; from lora_kernels.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
        assert done.returncode != 0
        assert "pip install 'lora_kernels[cli]'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fails", ["save_adapter", "torch.save", "merge"])
def test_full_disk(fails, folder, tmp_path, monkeypatch):
    """One line; nothing half-written, and what was there before is whole."""
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full_for_torch(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 75968 vs 75860")

    run = shutil.copytree(folder / "run", tmp_path / "run")
    before = snapshot(run / "checkpoints")
    if fails == "merge":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
        words = ["merge", folder / "model", "--adapter", run, "--out", tmp_path / "merged"]
    else:
        where, error = (
            ("lora_kernels.adapter_files.save_file", full) if fails == "save_adapter" else ("torch.save", full_for_torch)
        )
        monkeypatch.setattr(where, error)
        words = ["finetune", folder / "model", "--data", folder / "data.jsonl", "--out", run, "--lr", 0.02]
        words += ["--max-steps", 9, "--resume"]
    assert "can't be written, is the disk full?" in line_of_error(cli(*words))
    assert snapshot(run / "checkpoints") == before
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_ctrl_c(folder, tmp_path):
    """Ctrl-C in a running process: exit code 130, files in place, and the command that goes on with the run works."""
    options = ["--data", folder / "data.jsonl", "--out", tmp_path / "run", "--epochs", 10000, "--batch-size", 2, "--evals", 0]
    command = [sys.executable, "-m", "lora_kernels.cli", "finetune", folder / "model", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    for line in process.stdout:
        if "step 1 " in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=HANG)[0]
    assert process.returncode == 130, rest
    assert "--resume" in rest
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert log["status"] == "interrupted"
    done = len(log["history"])
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    resumed = cli("finetune", folder / "model", *options, "--max-steps", done + 2, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(json.loads((tmp_path / "run" / "log.json").read_text())["history"]) == done + 2
