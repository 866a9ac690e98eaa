"""Fine-tuning: a run's settings, its checks, and the training itself."""

from __future__ import annotations

import inspect
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments

from .. import backends, processes
from ..allocator import keep_freed_memory
from ..formats import check_blocksize, check_quant_type, dtype_name
from ..model import fused_layers, group_projections
from ..nn import AdapterConfig
from ..report import Report, verify
from ..version import __version__
from . import threads
from .data import Collator, Example, Record, encode, read_records, split
from .folders import CHECKPOINTS, Run
from .load import add_adapters, load_quantized, pick_device, pick_dtype
from .loss import causal_lm_loss
from .trainer import Monitor, QLoRATrainer

SHORT = 256
"""Up to this many tokens a record, a CPU trains faster with plain attention: torch's fused one in bfloat16 spent 20 ms a layer
on the backward pass of 8 records of 70 tokens, a fifth of a SmolLM2 step; beyond, its memory would count."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run.  Raises ValueError for a value out of range, naming its option.

    Attributes:
        model: a folder, a GGUF file or a hub id.
        data: a JSONL file (see `lora_kernels.app.data`).
        out: the run's folder.
        target_modules: layers that get an adapter: ("all-linear",) or last parts of their names.
        lr: peak learning rate; it rises over the first 5 % of the run and falls to 0 along a half cosine.
        max_steps: optimizer steps; None for `epochs`.
        max_minutes: training stops when its steps have taken this time, with the learning rate at its end by then; evaluation,
            saving and the first step, which warms up, are not counted; None for no limit.
        min_steps: optimizer steps that `max_minutes` waits for, up to three times as long.
        batch_size: records a step and process.
        max_length: tokens a record; the rest of a longer one is cut off.
        eval_fraction: part of the records that is held out.
        evals: times that the held-out loss is measured during training, besides before and after.
        save_steps: steps between checkpoints.
        dtype: of activations and unquantized weights; "auto" is bfloat16 where the device computes in it, else float32.
        device: "auto", "cpu" or "cuda".
        strict: refuse to train if a layer that is in 4 bits does not run in fused kernels.
    """

    model: str
    data: str
    out: str
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    lr: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    max_minutes: float | None = None
    min_steps: int = 1
    batch_size: int = 4
    grad_accum: int = 1
    max_length: int = 1024
    eval_fraction: float = 0.05
    evals: int = 4
    save_steps: int = 100
    seed: int = 0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    device: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        AdapterConfig(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)
        check_quant_type(self.quant_type)
        check_blocksize(self.blocksize, self.quant_type)
        for name in ("max_steps", "min_steps", "batch_size", "grad_accum", "save_steps"):
            self._check(name, "at least 1", lambda v: v >= 1)
        self._check("max_length", "at least 2", lambda v: v >= 2)
        self._check("evals", "at least 0", lambda v: v >= 0)
        for name in ("lr", "epochs", "max_minutes"):
            self._check(name, "a finite number above 0", lambda v: 0 < v < math.inf)
        self._check("eval_fraction", "in [0, 1)", lambda v: 0 <= v < 1)
        self._check("seed", "in [0, 2**32)", lambda v: 0 <= v < 2**32)
        self._check("dtype", f"one of auto, {', '.join(DTYPES)}", lambda v: v in ("auto", *DTYPES))
        self._check("device", "one of auto, cpu, cuda", lambda v: v in ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device")

    def _check(self, name: str, accepted: str, ok: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is not None and not ok(value):
            raise ValueError(f"--{name.replace('_', '-')} must be {accepted}, got {value!r}")

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)

    @property
    def format(self) -> dict[str, Any]:
        """How a dense model is quantized."""
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}

    @property
    def torch_device(self) -> torch.device:
        return pick_device() if self.device == "auto" else torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return pick_dtype(self.torch_device) if self.dtype == "auto" else DTYPES[self.dtype]

    def steps(self, n_train: int) -> int:
        """Optimizer steps of the run on `n_train` examples."""
        batches = math.ceil(n_train / (self.batch_size * processes.world_size()))
        per_epoch = math.ceil(batches / self.grad_accum)
        return self.max_steps or math.ceil(per_epoch * self.epochs)


# ---- training


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        dir: the run's folder.
        log: what its `log.json` holds.
        interrupted: whether Ctrl-C ended it.
    """

    dir: Path
    log: dict[str, Any]
    interrupted: bool

    @property
    def before(self) -> float | None:
        """Held-out loss before the first step, or None where nothing is held out."""
        return self.log["held_out"][0]["loss"] if self.log["held_out"] else None

    @property
    def after(self) -> float | None:
        """The last held-out loss that was measured."""
        return self.log["held_out"][-1]["loss"] if self.log["held_out"] else None


Hook = Callable[[Any, Any, list[Record]], None]


@processes.joined()
def finetune(
    settings: Settings,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    before: Hook | None = None,
    after: Hook | None = None,
) -> Result:
    """Fine-tunes adapters; everything is checked before anything is written.

    Under torchrun or `accelerate launch` each process holds the whole model and trains on its share of each batch (DDP); the
    first one talks and writes.  A mistake that one process finds ends them all.

    On a busy CPU the number of torch's threads may change on the way (see `lora_kernels.app.threads`; the log has it for each
    step), and torch's own sums depend on it in the last bits: set `OMP_NUM_THREADS` for a `resume` to the bit.

    Args:
        resume: go on with the run in `settings.out`.
        overwrite: replace the run in `settings.out`.
        console: where progress goes; None for stdout.
        before, after: called with model, tokenizer and held-out records when the adapters are in place, and
            when they are trained; in the first process.

    Raises:
        ValueError: bad data, settings, model or folder; nothing was written.
        processes.AnotherProcessError: another process raised one of these.
        KeyboardInterrupt: Ctrl-C before training began, or a second one while it ends.
    """
    shown = (console or Console()) if processes.rank() == 0 else Console(quiet=True)

    def say(line: str) -> None:
        shown.print(line, markup=False)

    threads.fit(say)
    with threads.Watch(say) as watch:
        return _finetune(settings, resume, overwrite, shown, before, after, watch)


def _finetune(
    settings: Settings,
    resume: bool,
    overwrite: bool,
    console: Console,
    before: Hook | None,
    after: Hook | None,
    watch: threads.Watch,
) -> Result:
    first = processes.rank() == 0
    with processes.together():
        records = read_records(settings.data)
        run = Run(asdict(settings), resume, overwrite)
        with console.status(f"loading {settings.model}"):
            model, tokenizer, _ = load_quantized(settings.model, settings.torch_dtype, **settings.format)
            encoded = encode(records, tokenizer, settings.max_length)
        usable = [(record, example) for record, example in zip(records, encoded, strict=True) if example is not None]
        if not usable:
            raise ValueError(f"--max-length {settings.max_length} leaves no record with an answer to learn from")
        train, held_out = split(usable, settings.eval_fraction, settings.seed)
        if run.step >= settings.steps(len(train)):
            raise ValueError(f"--resume: the run has done its {run.step} steps; more need a higher --epochs or --max-steps")
        _prepare(model, settings)
        report = verify(model)
        if settings.strict and len(fused_layers(model)) > len(report.fused):
            raise ValueError(f"--strict: {_not_fused(report)}")
        facts = _facts(model, report, settings) | {"train_records": len(train), "held_out_records": len(held_out)}
        facts["left_out_records"] = len(records) - len(usable)

    console.print(_headline(facts, report), markup=False)
    watch.look()
    if before is not None and first:
        before(model, tokenizer, [record for record, _ in held_out])
    with processes.together():
        run.start(facts)
    evals, on_cpu = settings.evals if held_out else 0, settings.torch_device.type == "cpu"
    if on_cpu:
        model.loss_function = causal_lm_loss
        keep_freed_memory()
        if max(len(e["input_ids"]) for _, e in train) <= SHORT:
            model.set_attn_implementation("eager")
    monitor = Monitor(
        run.log,
        run.write,
        console,
        settings.max_minutes,
        evals,
        settings.save_steps,
        settings.min_steps,
        watch if on_cpu else None,
    )
    trainer = _trainer(settings, model, tokenizer, [e for _, e in train], [e for _, e in held_out], monitor)
    if held_out and run.checkpoint is None:
        trainer.evaluate()
    with monitor.watch():
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    run.log |= {"status": "interrupted" if monitor.interrupted else "finished", "steps": trainer.state.global_step}
    run.log |= {"tokens_per_second": monitor.tokens_per_second, "peak_memory": peak_memory()}
    run.log["waited"] = watch.meter.waited()
    run.save(model)
    if not monitor.interrupted:
        if held_out:
            trainer.evaluate()
            run.save(model)
        if after is not None and first:
            after(model, tokenizer, [record for record, _ in held_out])
    return Result(run.dir, run.log, monitor.interrupted)


def _prepare(model: nn.Module, settings: Settings) -> None:
    """Gives the model its adapters, joins layers that read the same input, and moves everything to the device."""
    torch.manual_seed(settings.seed)
    targets = "all-linear" if settings.target_modules == ("all-linear",) else settings.target_modules
    add_adapters(model, settings.adapter, targets)
    group_projections(model)
    model.to(settings.torch_device)


def _trainer(
    settings: Settings, model: Any, tokenizer: Any, train: list[Example], held_out: list[Example], monitor: Monitor
) -> QLoRATrainer:
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # in transformers 5.23
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    args = TrainingArguments(
        output_dir=str(Path(settings.out) / CHECKPOINTS),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        seed=settings.seed,
        use_cpu=settings.torch_device.type == "cpu",
        logging_steps=1,
        save_strategy="no",  # the monitor says when
        include_num_input_tokens_seen="non_padding",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        **{checkpointing: settings.gradient_checkpointing},
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU: no DataParallel
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    collator = Collator(pad, "logits_to_keep" in inspect.signature(model.forward).parameters)
    held_out = sorted(held_out, key=lambda example: len(example["input_ids"]))
    return QLoRATrainer(monitor, model=model, args=args, data_collator=collator, train_dataset=train, eval_dataset=held_out)


def _facts(model: nn.Module, report: Report, settings: Settings) -> dict[str, Any]:
    """What a log says of the machine and the model."""
    weights = [layer.quantized_weight for layer in fused_layers(model).values()]
    rest = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad) - sum(w.packed.numel() for w in weights)
    linear, packed = sum(w.numel for w in weights), sum(w.nbytes for w in weights)
    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "versions": {"lora_kernels": __version__, "python": platform.python_version()} | {p: version(p) for p in packages},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(settings.torch_device),
        "dtype": dtype_name(settings.torch_dtype),
        "backend": backends.picked("qlora_linear", settings.torch_device),
        "processes": processes.world_size(),
        "linear_layers": len(weights),
        "fused_layers": len(report.fused),
        "parameters": linear + rest,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linear_bytes": packed,
        "linear_bytes_16bit": 2 * linear,
        "base_bytes": packed + 2 * rest,
        "base_bytes_16bit": 2 * (linear + rest),
    }


def _headline(facts: dict[str, Any], report: Report) -> str:
    trained = f"{facts['trainable_parameters'] / 1e6:.3g} M of {facts['parameters'] / 1e6:.3g} M parameters"
    size = f"{facts['linear_layers']} linear layers in {facts['linear_bytes'] / 1e6:.3g} MB"
    size += f" ({facts['linear_bytes_16bit'] / 1e6:.3g} in 16 bits)"
    where = f"{facts['device']}, {facts['dtype']}, backend {facts['backend']}"
    where += f", {facts['processes']} processes" if facts["processes"] > 1 else ""
    fused = f"{len(report.fused)} of {len(report.rows)} linear layers fused" + (
        f"; {_not_fused(report)}" * bool(report.not_fused)
    )
    records = f"{facts['train_records']} records to train on, {facts['held_out_records']} held out"
    left_out = f", {facts['left_out_records']} left out: no answer within --max-length" if facts["left_out_records"] else ""
    return f"{size}; training {trained} on {where}\n{fused}\n{records}{left_out}"


def _not_fused(report: Report) -> str:
    """Which layers are not fused, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in report.not_fused:
        reasons.setdefault(row.reason, []).append(row.name)
    listed = []
    for reason, names in reasons.items():
        listed.append(f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''} ({reason})")
    return f"not fused: {'; '.join(listed)}"


def peak_memory() -> dict[str, int]:
    """Highest memory so far in bytes, and of the GPU where there is one: that of the process that took most."""
    if sys.platform == "win32":
        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    here = {"cpu": peak} | ({"cuda": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})
    return {where: max(peaks[where] for peaks in processes.gather(here)) for where in here}
