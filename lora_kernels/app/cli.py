"""The command line `lora-kernels`.

Commands parse their arguments, call the package and print.  Everything heavy is imported inside a command.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from ..requirements import PIP, TooOldError

if TYPE_CHECKING:
    from rich.console import Console

    from .finetune import Result


def _missing_extra(e: ModuleNotFoundError) -> str:
    return f"error: the command line needs more packages (no module named {e.name!r}): {PIP} install 'lora_kernels[cli]'"


try:
    import typer
    from typer import Argument, Option
    from typer.core import TyperGroup
except ModuleNotFoundError as e:
    sys.exit(_missing_extra(e))


FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the first of the processes that torchrun or `accelerate launch` started, or the only one."""


class _Commands(TyperGroup):
    """Turns what a user did wrong into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except ModuleNotFoundError as e:
            if e.name is None or e.name.startswith("lora_kernels"):
                raise
            _fail(_missing_extra(e), 2)
        except (ValueError, OSError, TooOldError) as e:
            _fail(f"error: {e}", 2)
        except RuntimeError as e:
            from ..processes import failed_elsewhere

            if not failed_elsewhere(e):
                raise
            raise typer.Exit(2) from None


def _fail(message: str, code: int) -> NoReturn:
    """Ends the command.  Until several processes have joined, they all find the same and the first speaks for them."""
    if FIRST:
        typer.echo(message, err=True)
    elif _joined():
        typer.echo(f"process {os.environ['RANK']}: {message}", err=True)
    raise typer.Exit(code)


def _joined() -> bool:
    from ..processes import world_size

    return world_size() > 1


app = typer.Typer(
    cls=_Commands,
    help="Fine-tune language models whose weights stay in 4 bits, with LoRA adapters, on CPU and GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, Argument(metavar="MODEL", help="A model folder, a GGUF file or a hub id.", show_default=False)]
Adapter = Annotated[Path, Option(help="Folder with an adapter in PEFT's format.", show_default=False)]
OptionalAdapter = Annotated[Path | None, Option(help="Folder with an adapter in PEFT's format.", show_default=False)]
Out = Annotated[Path, Option(help="Folder to write; it must not exist yet.", show_default=False)]
QuantType = Annotated[str, Option(help="nf4 or fp4.")]
Blocksize = Annotated[int, Option(help="Weights that share a scale: 32, 64, ... 4096.")]
DoubleQuant = Annotated[bool, Option(help="Also quantize the scales, to 8 bits.")]


def main() -> None:
    """Entry point of `lora-kernels`."""
    app()


def _quiet(model: str | Path | None = None) -> Console:
    """Silences other libraries' warnings (their errors stay) and keeps them off the network where `model` is a path."""
    from rich.console import Console

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if model is not None and Path(model).exists():
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in ("accelerate", "torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Console(highlight=False, soft_wrap=True, quiet=not FIRST)


def _note(line: str) -> None:
    """Tells something beside the output proper."""
    typer.echo(line, err=True)


def _load(model: str, adapter: Path | None) -> tuple[Any, Any, str]:
    """A model in 4 bits with an adapter, on the best device, its tokenizer, and how its weights became 4-bit."""
    from . import threads
    from .load import load_with_adapter, pick_device, pick_dtype

    threads.fit(_note)
    device = pick_device()
    loaded, tokenizer, how = load_with_adapter(model, adapter, pick_dtype(device))
    return loaded.to(device), tokenizer, how


# ---- training and using


@app.command()
def finetune(
    model: Model,
    data: Annotated[
        Path, Option(help="JSONL: chat messages, prompt/completion, instruction/input/output or text.", show_default=False)
    ],
    out: Annotated[Path, Option(help="Folder of the run: adapter, log.json, loss.png, checkpoints.", show_default=False)],
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False,
    r: Annotated[int, Option("--r", help="Rank of the adapters.")] = 16,
    lora_alpha: Annotated[float, Option(help="Scaling is lora-alpha / r.")] = 32,
    lora_dropout: Annotated[float, Option(help="Dropout on the adapter's input.")] = 0.0,
    use_rslora: Annotated[bool, Option("--use-rslora", help="Scaling is lora-alpha / sqrt(r).")] = False,
    target_modules: Annotated[str, Option(help="all-linear, or names parted by commas, such as q_proj,v_proj.")] = "all-linear",
    quant_type: QuantType = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    lr: Annotated[float, Option(help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[float, Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, Option(help="Optimizer steps, in place of --epochs.", show_default=False)] = None,
    max_minutes: Annotated[float | None, Option(help="Stop when steps have taken this time.", show_default=False)] = None,
    min_steps: Annotated[int, Option(help="Steps that --max-minutes waits for, up to three times as long.")] = 1,
    batch_size: Annotated[int, Option(help="Records a step and process.")] = 4,
    grad_accum: Annotated[int, Option(help="Batches added up for one optimizer step.")] = 1,
    max_length: Annotated[int, Option(help="Tokens a record; the rest is cut off.")] = 1024,
    eval_fraction: Annotated[float, Option(help="Part of the records held out.")] = 0.05,
    evals: Annotated[int, Option(help="Times to measure held-out loss on the way.")] = 4,
    save_steps: Annotated[int, Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, Option(help="Of split, order, initialisation and dropout.")] = 0,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, about a third slower.")
    ] = False,
    dtype: Annotated[str, Option(help="Of activations: auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    strict: Annotated[bool, Option("--strict", help="Refuse to train if a 4-bit layer is not fused.")] = False,
) -> None:
    """Train LoRA adapters over MODEL, frozen in 4 bits.

    Ctrl-C saves; --resume goes on.
    """
    options = dict(locals())
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    options |= {"data": str(data), "out": str(out), "target_modules": tuple(name.strip() for name in target_modules.split(","))}
    console = _quiet(model)
    from .finetune import Settings
    from .finetune import finetune as run

    result = run(Settings(**options), resume, overwrite, console)
    _stop_if_interrupted(result, console)
    losses = f"held-out loss {result.before:.4f} -> {result.after:.4f}, " if result.before is not None else ""
    console.print(f"{losses}{result.log['tokens_per_second']:.0f} tokens/s\nadapter, log.json and loss.png are in {result.dir}")


def _stop_if_interrupted(result: Result, console: Console) -> None:
    if result.interrupted:
        command = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
        console.print(f"interrupted; adapter, log.json and loss.png up to here are in {result.dir}; go on with")
        n = os.environ.get("WORLD_SIZE", "1")
        program = "lora-kernels" if n == "1" else f"torchrun --nproc-per-node {n} -m lora_kernels.cli"
        console.print(f"  {program} {shlex.join([*command, '--resume'])}", markup=False)
        raise typer.Exit(130)


@app.command()
def demo(
    folder: Annotated[Path, Option("--dir", help="Folder for model, data and run.")] = Path("demo"),
    minutes: Annotated[float, Option(help="Limit of the training itself, for at least 30 steps.")] = 5.0,
    resume: Annotated[bool, Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Fetch a small model, teach it Python's own docstrings, and show what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    console = _quiet(folder)
    from .demo import run

    result = run(folder, minutes, resume, console)
    _stop_if_interrupted(result, console)
    if result.before is None or result.after is None or result.after >= result.before:
        _fail("error: the held-out loss did not drop", 1)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="What to answer or to go on with.", show_default=False)],
    adapter: OptionalAdapter = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
) -> None:
    """Answer PROMPT with MODEL in 4 bits, as a chat where the tokenizer has a chat template."""
    _quiet(model)
    from transformers import TextStreamer

    from ..model import group_projections
    from .generate import answer
    from .threads import Watch

    with Watch(_note) as watch:
        loaded, tokenizer, _ = _load(model, adapter)
        group_projections(loaded)
        watch.look()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer(loaded, tokenizer, prompt, max_new_tokens, temperature, streamer)


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    out: Out,
    dtype: Annotated[str, Option(help="Of the merged weights: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Write MODEL with the adapter in its weights as a dense folder."""
    console = _quiet(model)
    import torch

    from .folders import check_new_folder, save_merged
    from .load import load_with_adapter

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    check_new_folder(out)
    loaded, tokenizer, how = load_with_adapter(model, adapter, dtypes[dtype])
    save_merged(loaded, tokenizer, out, dtypes[dtype])
    console.print(f"base      {model}, {how}\nadapter   {adapter}")
    console.print(f"merged    dequantized base + scaling B A in float32, rounded once to {dtype}: {out}", markup=False)


# ---- looking at and converting


@app.command()
def quantize(
    model: Model, out: Out, quant_type: QuantType = "nf4", blocksize: Blocksize = 64, double_quant: DoubleQuant = True
) -> None:
    """Write MODEL in 4 bits, in the checkpoint format of bitsandbytes that transformers loads."""
    console = _quiet(model)
    from ..formats import check_blocksize, check_quant_type
    from ..model import fused_layers
    from .folders import check_new_folder, save_quantized
    from .load import load_quantized

    check_quant_type(quant_type)
    check_blocksize(blocksize, quant_type)
    check_new_folder(out)
    quant: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    loaded, tokenizer, already = load_quantized(model, **quant)
    if already:
        raise ValueError(f"MODEL {model} is in 4 bits already")
    save_quantized(loaded, tokenizer, out)
    weights = [layer.quantized_weight for layer in fused_layers(loaded).values()]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.numel for w in weights)
    console.print(f"{len(weights)} linear layers in {quant_type}, {bits:.2f} bits a weight: {out}", markup=False)


@app.command()
def verify(
    model: Model,
    adapter: OptionalAdapter = None,
    strict: Annotated[bool, Option("--strict", help="Exit 1 if a layer that should be fused is not.")] = False,
) -> None:
    """Say of every linear layer of MODEL whether it runs in fused kernels, by which backend, and why."""
    console = _quiet(model)
    from rich.table import Column, Table

    from ..report import verify as report_on

    loaded, _, _ = _load(model, adapter)
    report = report_on(loaded)
    narrow = [Column(name, no_wrap=True) for name in ("layer", "fused", "backend", "adapter")]
    table = Table(*narrow, Column("why", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    for row in report.rows:
        table.add_row(row.name, "yes" if row.fused else "no", row.backend or "-", row.adapter or "-", row.reason)
    console.print(table)
    console.print(f"{len(report.fused)} of {len(report.rows)} linear layers fused")
    if strict:
        try:
            report_on(loaded, strict=True)
        except RuntimeError as e:
            _fail(f"error: {e}", 1)


@app.command()
def doctor() -> None:
    """Show versions and devices, which backend each device gets and why, and how to get a better one.

    Computes a small layer on each device, and exits 1 if the result is wrong, a package is too old, or the compiled
    extension is there and can't be used.
    """
    console = _quiet()
    from .doctor import report

    if not report(console):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
