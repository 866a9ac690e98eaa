"""The folders that the commands write: quantized models, merged models, and runs.

A run's folder holds the adapter in PEFT's format, `log.json` (settings, versions, losses, speed), `loss.png`, and
`checkpoints/` to resume from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..adapter_files import CONFIG, WEIGHTS, save_adapter, writing
from ..integrations.bnb_config import BnbConfig
from ..integrations.merge import merge_dense
from ..model import fused_layers

LOG, CURVE, CHECKPOINTS = "log.json", "loss.png", "checkpoints"


# ---- a model


def save_quantized(model: Any, tokenizer: Any, out: str | os.PathLike[str]) -> None:
    """Writes a model of `FusedQLoRALinear` layers, without its adapters, as a folder in bitsandbytes' 4-bit format.

    Args:
        model: every quantized layer has the same `quant_type`, blocksize, storage and double quantization.
        out: a folder that does not exist yet; it appears when complete.

    Raises:
        ValueError: the layers differ in format, or `out` exists.
    """
    from transformers.pytorch_utils import Conv1D

    from ..integrations.quantizer import forget_conversions

    layers = fused_layers(model)
    weights = [layer.quantized_weight for layer in layers.values()]
    formats = {(w.quant_type, w.double_quant, w.blocksize, w.quant_storage) for w in weights}
    if len(formats) != 1:
        raise ValueError(f"model must have 4-bit layers of one format, got {len(formats)} formats")
    dense = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and not _is_adapter(n)]
    # one code table serves all layers, and safetensors wants one tensor a key
    state = {k: v.clone() if k.endswith(".quant_map") else v for k, v in model.state_dict().items() if not _is_adapter(k)}
    forget_conversions(model, layers)
    model.config.quantization_config = BnbConfig(*formats.pop(), model.dtype, dense or None).to_dict()
    try:
        save_model(model, tokenizer, out, state)
    finally:
        del model.config.quantization_config


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def save_merged(model: Any, tokenizer: Any, out: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Writes the model as a dense folder: each weight is the dequantized base plus the active adapter's update, in `dtype`.

    The model that was passed is used up (see `lora_kernels.merge_dense`); one without 4-bit layers is written as it is.

    Args:
        out: a folder that does not exist yet; it appears when complete.
        dtype: of all weights.

    Raises:
        ValueError: `out` exists.
    """
    dense = merge_dense(model, dtype) if fused_layers(model) else model.to(dtype)
    save_model(dense, tokenizer, out)


def check_new_folder(out: str | os.PathLike[str]) -> Path:
    """`out` as a path; raises ValueError if there is something of that name."""
    if Path(out).exists():
        raise ValueError(f"--out {out} exists already: name a folder that does not")
    return Path(out)


def save_model(model: Any, tokenizer: Any, out: str | os.PathLike[str], state: dict[str, Tensor] | None = None) -> None:
    """Writes model and tokenizer as a folder in transformers' format.

    Args:
        out: a folder that does not exist yet; it appears when complete.
        state: what to write of the model; None for all of it.

    Raises:
        ValueError: `out` exists.
    """
    out = check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        with writing(out):
            model.save_pretrained(tmp, state_dict=state)
        tokenizer.save_pretrained(tmp)
        if tokenizer.name_or_path:
            for file in Path(tokenizer.name_or_path).glob("*processor_config.json"):  # how images are prepared
                shutil.copy(file, tmp)
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ---- a run

_MAY_CHANGE = ("out", "epochs", "max_steps", "max_minutes", "min_steps", "evals", "save_steps", "device", "strict")
"""Settings that a resumed run may change."""


class Run:
    """The folder of a run: `log`, which `save` writes with the adapter and the curve, and the `checkpoint` to resume from.

    Of several processes the first alone writes.
    """

    def __init__(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Looks at the folder and changes nothing.

        Args:
            settings: the fields of `finetune.Settings`, of which `out` is the folder and `data` a file.

        Raises:
            ValueError: the run can't start or go on there.
        """
        self.dir = Path(settings["out"])
        digest = hashlib.sha256(Path(settings["data"]).read_bytes()).hexdigest()
        self.settings = json.loads(json.dumps(settings)) | {"data_sha256": digest, "processes": processes.world_size()}
        self.log: dict[str, Any] = {"history": [], "held_out": [], "train_seconds": 0.0, "tokens": 0}
        self.checkpoint: Path | None = None
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if self.dir.exists() and not self.dir.is_dir():
            raise ValueError(f"--out {self.dir} is a file; it must be a folder")
        there = (self.dir / LOG).exists()
        if resume:
            self._find_checkpoint(there)
        elif there and not overwrite:
            raise ValueError(f"--out {self.dir} holds a run already: --resume goes on with it, --overwrite replaces it")
        elif not there and self.dir.exists() and any(self.dir.iterdir()):
            raise ValueError(f"--out {self.dir} is neither empty nor a run of lora-kernels: name another folder")

    def _find_checkpoint(self, there: bool) -> None:
        if not there:
            raise ValueError(f"--resume: {self.dir} holds no run ({LOG} is missing)")
        try:
            log = json.loads((self.dir / LOG).read_text())
            before = {"processes": 1} | log["settings"]
            self.log = {key: log[key] for key in self.log}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--resume: {self.dir / LOG} is damaged: {e!r}") from None
        for name, now in self.settings.items():
            if name not in _MAY_CHANGE and before.get(name) != now:
                raise ValueError(f"--resume: {name} is {now!r} now and was {before.get(name)!r} when the run began")
        self.checkpoint = max((self.dir / CHECKPOINTS).glob("checkpoint-*"), key=_step_of, default=None)
        if self.checkpoint is None:
            raise ValueError(f"--resume: {self.dir / CHECKPOINTS} holds no checkpoint: begin anew with --overwrite")
        for key in ("history", "held_out"):
            self.log[key] = [row for row in self.log[key] if row["step"] <= self.step]

    @property
    def step(self) -> int:
        """The step that the run resumes at, or 0."""
        return _step_of(self.checkpoint) if self.checkpoint else 0

    @processes.first_only
    def start(self, facts: dict[str, Any]) -> None:
        """Makes the folder, clears away what an older run left there, and writes the first log."""
        (self.dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for unfinished in (self.dir / CHECKPOINTS).glob(".checkpoint-*.tmp"):
            shutil.rmtree(unfinished)
        if self.checkpoint is None:
            shutil.rmtree(self.dir / CHECKPOINTS)
            (self.dir / CHECKPOINTS).mkdir()
            for name in (CONFIG, WEIGHTS, CURVE):
                (self.dir / name).unlink(missing_ok=True)
        self.log |= {"status": "running", "settings": self.settings, **facts}
        self.write()

    @processes.first_only
    def write(self) -> None:
        tmp = self.dir / f".{LOG}.tmp"
        tmp.write_text(json.dumps(self.log, indent=1) + "\n")
        tmp.replace(self.dir / LOG)

    @processes.first_only
    def save(self, model: nn.Module) -> None:
        """Writes adapter, log and curve as they are now."""
        save_adapter(model, self.dir)
        self.write()
        plot_losses(self.log, self.dir / CURVE)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def plot_losses(log: dict[str, Any], file: Path) -> None:
    """Draws the losses of a run's log."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = ([row[key] for row in log["history"]] for key in ("step", "loss"))
    window = max(1, len(losses) // 30)
    smooth = [fmean(losses[max(0, i - window) : i]) for i in range(1, len(losses) + 1)]
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=1)
    label = f"training (mean of {window} steps)" if window > 1 else "training"
    axes.plot(steps, smooth, color="tab:blue", linewidth=1.8, label=label)
    final = f"training loss {smooth[-1]:.2f}" if smooth else "no step"
    if log["held_out"]:
        at, held_out = ([row[key] for row in log["held_out"]] for key in ("step", "loss"))
        axes.plot(at, held_out, "o-", color="tab:orange", linewidth=2, markersize=6, label="held out")
        for i in (0, len(at) - 1):
            axes.annotate(f"{held_out[i]:.2f}", (at[i], held_out[i]), (0, 9), textcoords="offset points", ha="center")
        final = f"held-out loss {held_out[0]:.2f} → {held_out[-1]:.2f}, {final}"
    figure.suptitle(Path(log["settings"]["model"]).name, x=0.01, ha="left", fontweight="bold")
    axes.set_title(final, loc="left", fontsize="medium", color="dimgray")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    tmp = file.with_name(f".{file.name}.tmp")
    figure.savefig(tmp, dpi=160, format="png")
    tmp.replace(file)
