"""Runs on a tiny random Llama: files, resuming, interrupting, time limit, 4-bit bases, refusals."""

import io
import json
import math
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import snapshot
from tiny_folder import chats, make_folder, write_jsonl

import lora_kernels as lk

pytest.importorskip("transformers")
pytest.importorskip("rich")
from rich.console import Console
from safetensors.torch import load_file

from lora_kernels.app import demo, trainer
from lora_kernels.app.finetune import Settings, finetune
from lora_kernels.app.trainer import Monitor, lr_factor
from lora_kernels.integrations.transformers import load_model, save_quantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    make_folder(path / "model")
    write_jsonl(path / "data.jsonl", chats())
    return path


@pytest.fixture
def settings(folder, tmp_path):
    return Settings(
        str(folder / "model"), str(folder / "data.jsonl"), str(tmp_path / "run"), r=4, lr=1e-2, max_steps=6, eval_fraction=0.2
    )


def run(settings, **options):
    return finetune(settings, console=Console(file=io.StringIO()), **options)


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same_adapter(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_run(settings, tmp_path):
    result = run(settings)
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "log.json", "loss.png", "checkpoints"
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = json.loads((out / "log.json").read_text())
    assert log == result.log
    assert (log["status"], log["steps"], log["backend"]) == ("finished", 6, log["backend"])
    assert log["settings"]["r"] == 4
    assert [row["step"] for row in log["history"]] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in log["held_out"]] == [0, 2, 3, 4, 5, 6]
    assert result.after < result.before
    assert log["tokens"] > 0
    assert log["tokens_per_second"] > 0
    assert log["peak_memory"]["cpu"] > 1e7
    assert len(weights(out)) == 2 * 7 * 2


def test_checkpoint_has_no_base(settings, folder, tmp_path):
    run(settings)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-6"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    assert_same_adapter(checkpoint, tmp_path / "run")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_exact(settings, tmp_path, monkeypatch, dropout):
    """Ctrl-C after three steps, then --resume: the adapter of the run that was left alone, to the bit."""
    settings = replace(settings, lora_dropout=dropout, epochs=3, max_steps=10, batch_size=3)
    whole = run(settings)
    step_begin = Monitor.on_step_begin

    def interrupt(self, args, state, control, **kwargs):
        step_begin(self, args, state, control, **kwargs)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    halves = replace(settings, out=str(tmp_path / "halves"))
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_step_begin", interrupt)
        first = run(halves)
    assert first.interrupted
    assert first.log["status"] == "interrupted"
    assert len(first.log["history"]) == 3
    assert (first.dir / "loss.png").exists()
    assert_same_adapter(first.dir, first.dir / "checkpoints" / "checkpoint-3")
    second = run(halves, resume=True)
    assert not second.interrupted
    assert_same_adapter(second.dir, whole.dir)
    for ours, theirs in zip(second.log["history"], whole.log["history"], strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])
    assert second.after == whole.after
    assert second.log["tokens"] == whole.log["tokens"]


def test_time_limit(settings, monkeypatch):
    """A run that time ends has its learning rate at the end of its schedule, not in the middle.  On a clock of its own, on
    which a step takes six seconds; the first one, which warms up, is not counted."""
    now, step_begin = [0.0], Monitor.on_step_begin

    def six_seconds(*args, **kwargs):
        step_begin(*args, **kwargs)
        now[0] += 6

    monkeypatch.setattr(Monitor, "on_step_begin", six_seconds)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: now[0]}))
    result = run(replace(settings, max_steps=1000, max_minutes=1))
    assert result.log["steps"] == 1 + 10
    assert result.log["history"][-1]["learning_rate"] < 0.3 * settings.lr


def test_schedule():
    assert lr_factor(0) < 0.05
    assert lr_factor(0.05) == pytest.approx(1, abs=0.01)
    assert lr_factor(0.525) == pytest.approx(0.5, abs=0.05)
    assert lr_factor(1) == lr_factor(2) == 0


def test_quantized_folder_trains_alike(settings, folder, tmp_path):
    """A base that was quantized beforehand, and one that is quantized on loading: the same bytes, the same adapter."""
    model, tokenizer = load_model(folder / "model")
    save_quantized(lk.apply_qlora(model, r=0), tokenizer, tmp_path / "quantized")
    a = run(replace(settings, dtype="bfloat16"))
    b = run(replace(settings, dtype="bfloat16", model=str(tmp_path / "quantized"), out=str(tmp_path / "b")))
    assert_same_adapter(a.dir, b.dir)


def test_gradient_checkpointing_and_accumulation(settings, tmp_path):
    """Both change memory, not the gradient: the first loss is the same, later ones nearly so."""
    settings = replace(settings, dtype="float32", grad_accum=1)
    want = run(settings).log["history"]
    changed = {"a": {"gradient_checkpointing": True}, "b": {"batch_size": 2, "grad_accum": 2}}
    for name, change in changed.items():
        got = run(replace(settings, out=str(tmp_path / name), **change)).log["history"]
        for ours, theirs in zip(got, want, strict=True):
            assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-3), (name, ours, theirs)


def test_target_modules(settings):
    result = run(replace(settings, target_modules=("q_proj", "v_proj"), max_steps=1))
    assert {name.split(".")[-3] for name in weights(result.dir)} == {"q_proj", "v_proj"}


def test_nothing_held_out(settings):
    result = run(replace(settings, eval_fraction=0, max_steps=1))
    assert result.before is result.after is None
    assert result.log["held_out"] == []


def test_held_out_loss_is_that_of_a_token(settings, tmp_path):
    """Of whatever batches: the mean over batches would depend on how records are put together."""
    a = run(replace(settings, max_steps=1, dtype="float32"))
    b = run(replace(settings, max_steps=1, dtype="float32", batch_size=3, out=str(tmp_path / "b")))
    assert a.before == pytest.approx(b.before, rel=1e-6)


def test_strict(settings):
    """A run says which layers are fused; --strict wants them all."""
    out = io.StringIO()
    with lk.use_backend("reference"):
        with pytest.raises(ValueError, match=r"--strict: not fused: .*q_proj, .*k_proj and 12 more \(plain torch is forced\)"):
            run(replace(settings, strict=True))
        assert not run_folder(settings).exists()
        log = finetune(replace(settings, max_steps=1), console=Console(file=out, width=1000)).log
    assert log["fused_layers"] == 0
    assert "0 of 15 linear layers fused; not fused: " in out.getvalue()


def test_hooks_see_untrained_and_trained(settings):
    seen = []

    def hook(model, tokenizer, held_out):
        B = model.get_submodule("model.layers.0.self_attn.q_proj").lora_B["default"].weight
        seen.append((B.abs().sum().item(), [r.line for r in held_out]))

    run(settings, before=hook, after=hook)
    (before, lines), (after, same) = seen
    assert before == 0 < after
    assert lines == same
    assert len(lines) == 5


def test_overwrite_and_resume_where_there_is_a_run(settings):
    run(replace(settings, max_steps=2))
    before = snapshot(run_dir := run_folder(settings))
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite replaces it"):
        run(settings)
    with pytest.raises(ValueError, match="r is 8 now and was 4"):
        run(replace(settings, r=8), resume=True)
    with pytest.raises(ValueError, match="has done its 2 steps"):
        run(replace(settings, max_steps=2), resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        run(settings, resume=True, overwrite=True)
    assert snapshot(run_dir) == before
    assert [row["step"] for row in run(replace(settings, max_steps=3), resume=True).log["history"]] == [1, 2, 3]
    assert [row["step"] for row in run(replace(settings, max_steps=1), overwrite=True).log["history"]] == [1]


def run_folder(settings):
    from pathlib import Path

    return Path(settings.out)


def test_resume_without_a_run(settings):
    with pytest.raises(ValueError, match="holds no run"):
        run(settings, resume=True)


def test_damaged_log(settings):
    run(replace(settings, max_steps=1))
    (run_folder(settings) / "log.json").write_text("{")
    with pytest.raises(ValueError, match=r"log\.json is damaged"):
        run(settings, resume=True)


def test_folder_of_something_else(settings):
    run_folder(settings).mkdir()
    (run_folder(settings) / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="neither empty nor a run"):
            run(settings, overwrite=overwrite)
    assert snapshot(run_folder(settings)) == {"thesis.tex": b"precious"}


BAD = {
    "r": (0, "r must be an integer >= 1"),
    "lora_dropout": (1.0, r"lora_dropout must be in \[0, 1\)"),
    "quant_type": ("int3", "quant_type must be one of nf4, fp4"),
    "blocksize": (65, "blocksize must be one of 32"),
    "batch_size": (0, "--batch-size must be at least 1, got 0"),
    "max_steps": (0, "--max-steps must be at least 1, got 0"),
    "min_steps": (0, "--min-steps must be at least 1, got 0"),
    "max_length": (1, "--max-length must be at least 2"),
    "lr": (float("nan"), "--lr must be a finite number above 0, got nan"),
    "epochs": (-1, "--epochs must be a finite number above 0"),
    "eval_fraction": (1.0, r"--eval-fraction must be in \[0, 1\)"),
    "seed": (-1, "--seed must be in"),
    "dtype": ("int8", "--dtype must be one of auto, bfloat16, float32"),
    "device": ("tpu", "--device must be one of auto, cpu, cuda"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, settings):
    value, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        replace(settings, **{name: value})


def test_refusals_write_nothing(settings, folder, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [*chats(2), {"what": "is this"}])
    for change, words in (
        ({"data": str(bad)}, "line 3: has the keys 'what'"),
        ({"model": str(tmp_path / "nowhere")}, "does not exist"),
        ({"target_modules": ("qproj",)}, "target_modules: 'qproj' matches no linear layer"),
        ({"max_length": 2}, "--max-length 2 leaves no record"),
        ({"eval_fraction": 0.99}, "leaves none to train on"),
    ):
        with pytest.raises(ValueError, match=words):
            run(replace(settings, **change))
        assert not run_folder(settings).exists()


# ---- the time limit


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({}, 2),  # the first step is not counted
        ({"min_steps": 5}, 5),
        ({"min_steps": 5, "max_steps": 3}, 3),
    ],
)
def test_time_that_is_up_at_once(settings, monkeypatch, change, steps):
    """Whatever the machine's speed; `min_steps` are then what a run lasts."""
    monkeypatch.setattr(trainer, "PATIENCE", 1e12)
    out = io.StringIO()
    options = replace(settings, max_minutes=1e-9, **({"max_steps": 1000} | change))
    log = finetune(options, console=Console(file=out, width=1000)).log
    assert log["steps"] == steps
    assert ("minutes are over after 2 steps: goes on up to 5 steps" in out.getvalue()) == (steps > 2)
    assert {row["threads"] for row in log["history"]} == {1}
    assert 0 <= log["waited"] <= 1


def test_time_limit_waits_for_steps_up_to_a_limit(settings):
    assert run(replace(settings, max_minutes=1e-9, max_steps=1000, min_steps=500)).log["steps"] == 2


def test_time_limit_counts_steps_alone(settings, monkeypatch):
    """Not evaluation, not the checkpoints: both take an hour here, by the clock that the trainer sees."""
    hours = [0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda now=time.monotonic: now() + 3600 * hours[0])

    def an_hour(fn):
        def longer(*args, **kwargs):
            hours[0] += 1
            return fn(*args, **kwargs)

        return longer

    for name in ("evaluate", "_save_checkpoint"):
        monkeypatch.setattr(trainer.QLoRATrainer, name, an_hour(getattr(trainer.QLoRATrainer, name)))
    log = run(replace(settings, max_minutes=59, save_steps=2)).log
    assert hours[0] > 6
    assert log["steps"] == 6
    assert log["train_seconds"] < 3600


@pytest.mark.parametrize(
    ("seconds", "step", "done"), [(0, 0, 0), (30, 1, 1 / 6), (30, 29, 1 / 2), (90, 15, 1 / 2), (180, 6, 1), (60, 30, 1)]
)
def test_progress_of_a_demo(seconds, step, done):
    """A minute for 30 steps: by time where these are reached, by steps where they are not, and at most three minutes."""
    monitor = Monitor({}, lambda: None, Console(), 1, 0, 1, min_steps=30)
    monitor._seconds = seconds
    assert monitor.progress(step, 10000) == pytest.approx(done)


def test_demo_says_why_it_made_few_steps():
    log = {"steps": 200, "train_seconds": 300, "waited": 0.5, "device": "cpu", "backend": "native", "threads": 2, "history": []}
    assert demo.settings("m", "d", "o", 5.0).min_steps == demo.MIN_STEPS == 30
    assert demo.why_short(log, 5.0) is None
    assert demo.why_short(log | {"steps": 10, "train_seconds": 900}, 5.0) == (
        "10 steps in 15.0 minutes, 90.0 s each: the machine was busy: threads waited 50% of the time for a core"
    )
    slow = log | {"steps": 30, "train_seconds": 600, "waited": 0.01}
    assert demo.why_short(slow, 5.0) == (
        "30 steps in 10.0 minutes, 20.0 s each: this machine is slow (cpu, backend native, 2 CPU threads)"
    )
