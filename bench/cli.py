"""The commands: run, report, targets, tune, profile, compile-check, resources."""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
except ImportError as e:
    sys.exit(f"error: {e.name} is not installed: pip install 'lora_kernels[bench]'")

import torch

from lora_kernels.allocator import keep_freed_memory
from lora_kernels.app.threads import BUSY, Meter, fit

from .measure import QUICK, environment, waited_now
from .report import grid, overview, page, targets
from .report.plot import draw
from .suite import OURS, run_suite, write_json, write_text, wrong_lines
from .suites import memory
from .suites.catalogue import GPU_ORDER, GRID, SUITES, effort_of, lines_of
from .tools import compile_check, profile_op, tune

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
app = typer.Typer(help="Benchmarks of lora_kernels, side by side with what one would use instead.", no_args_is_help=True)


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def make_console() -> Console:
    """As wide as the terminal; wide enough for every table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=128)


def get_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        fail(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; this torch ({torch.__version__}) is built without CUDA"
        fail(f"--device cuda: torch finds no CUDA GPU{built}")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def names_of(contenders: Sequence[str], against: str) -> list[str]:
    known = list(dict.fromkeys(n for n in contenders if n != OURS))
    if against == "all":
        return known
    names = [n.strip() for n in against.split(",") if n.strip()]
    unknown = [n for n in names if n not in known]
    if unknown:
        fail(f"--against: {', '.join(unknown)} is none of the rivals of this suite: {', '.join(known)}")
    return names


def target(path: Path | None, suite: str, suffix: str, several: bool) -> Path | None:
    """The file of a suite: `path` itself, or a file in it where it is a folder."""
    if path is None or (path.suffix == suffix and not several):
        return path
    if path.suffix == suffix:
        fail(f"{path} is one file, but several suites are run: give a folder")
    return path / f"{suite}{suffix}"


@app.command()
def run(
    suites: Annotated[list[str], typer.Argument(help=f"all, or some of: {', '.join((*SUITES, GRID))}")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    against: Annotated[str, typer.Option(help="all, or rivals separated by commas")] = "all",
    json: Annotated[Path | None, typer.Option(help="result file, or a folder that gets SUITE.json")] = None,
    plot: Annotated[Path | None, typer.Option(help="picture, or a folder that gets SUITE.png")] = None,
    save: Annotated[bool, typer.Option(help="write both under bench/results/, in the folder of this device")] = False,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="begin no further line after so long, and say which were left out")
    ] = 0.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice")] = None,
    quick: Annotated[bool, typer.Option(help="tiny shapes and three rounds: to see that it works, not to compare")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="time a contender gets on one line; default 0.2, on a GPU 0.1")
    ] = None,
    model: Annotated[str | None, typer.Option(help="train_step and decode: a model folder, or a shape's name")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="train_step and decode: only the first layers")] = None,
    batch: Annotated[int, typer.Option(min=1, help="train_step: sequences")] = 4,
    length: Annotated[int | None, typer.Option(min=2, help="train_step: tokens of each; default 256, on a GPU 1024")] = None,
    only: Annotated[str, typer.Option(help="lines whose label contains this text")] = "",
) -> None:
    """Measures suites side by side, prints a table a line, worst and best ratios last."""
    if unknown := [s for s in suites if s not in ("all", *SUITES, GRID)]:
        fail(f"SUITE must be all or one of {', '.join((*SUITES, GRID))}, got {', '.join(unknown)}")
    where = get_device(device)
    on_cpu = where.type == "cpu"
    if "all" in suites:
        suites = list(SUITES if on_cpu else GPU_ORDER)
    if threads:
        torch.set_num_threads(threads)
    if on_cpu:
        fit(typer.echo, f"--threads={threads}" if threads else None)
    length = length or (256 if on_cpu else 1024)
    seconds = (0.2 if on_cpu else 0.1) if seconds is None else seconds
    if quick:
        batch, length = min(batch, 2), min(length, 16)
    console, env = make_console(), environment(where)
    if on_cpu and (waits := waited_now()) > BUSY:
        busy = f"other programs hold the cores, for which threads wait {waits:.0%} of the time"
        console.print(f"[red]warning: {busy}: do not trust the numbers below[/red]")
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    if save and (quick or only):
        fail("--save replaces the results of whole suites: not with --quick or --only")
    if save:
        folder = overview.RESULTS / device_slug(where, env["device"])
        json, plot = json or folder, plot or folder
    results: list[dict[str, Any]] = []
    for suite in suites:
        env["freed_memory_kept"] = on_cpu and keep_freed_memory()
        meter = Meter() if on_cpu else None
        file, picture = (target(p, suite, s, len(suites) > 1) for p, s in ((json, ".json"), (plot, ".png")))
        if suite == "memory":
            if not any(only in label for label in memory.labels(where, quick)):
                continue
            names = names_of(memory.NAMES, against)
            results.append(memory.run_suite(where, names, console, env, quick, only, deadline))
            _finish(results[-1], file, picture, meter)
            continue
        try:
            lines = [line for line in lines_of(suite, where, quick, model, layers, batch, length) if only in line.label]
        except ValueError as e:
            fail(str(e))
        if not lines:
            continue
        effort = QUICK if quick else effort_of(suite, where, seconds)
        names = names_of([n for line in lines for n in line.names], against)
        results.append(run_suite(suite, lines, where, names, effort, console, env, quick, deadline))
        _finish(results[-1], file, picture, meter)
        if suite == GRID:
            grid.show(results[-1], console)
    if not results:
        fail(f"--only: no line contains {only!r}")
    if len(results) > 1:
        overview.show(results, console)
    if set(suites) >= set(SUITES):
        targets.show(results, console)
    if bad := [f"{r['suite']} {line}" for r in results for line in wrong_lines(r)]:
        fail("lora_kernels is wrong on " + "; ".join(bad))


def _finish(result: dict[str, Any], file: Path | None, picture: Path | None, meter: Meter | None) -> None:
    """Writes the result, on a CPU with the part of the time that threads waited for a core."""
    result["waited"] = meter.waited() if meter else None
    if meter and result["waited"] > BUSY:
        busy = f"threads waited {result['waited']:.0%} of the time for a core: do not trust its numbers"
        typer.echo(f"warning: {result['suite']}: {busy}")
    if file:
        write_json(file, result)
    if picture:
        try:
            draw(result, picture)
        except ImportError as e:
            typer.echo(f"no {picture.name}: {e.name} is not installed", err=True)


def device_slug(device: torch.device, name: Any) -> str:
    """The folder of a device's results."""
    return "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


@app.command("report")
def write_report(
    readme: Annotated[Path, typer.Option(help="file that gets the summary between its markers")] = page.README,
    everything: Annotated[
        Path, typer.Option("--page", help="file that gets everything; a picture of all suites beside it")
    ] = page.PAGE,
    results: Annotated[Path, typer.Option(help="folder of result files")] = overview.RESULTS,
) -> None:
    """Writes the page of all results, the README's summary and the pictures from the result files."""
    found = overview.load(results)
    if not found:
        fail(f"no results in {results}: python -m bench run all --json {results}/cpu")
    try:
        page.update(readme, page.section(found))
        write_text(everything, page.document(found, everything.resolve().parent))
        page.pictures(found, everything.resolve().parent)
    except (OSError, ValueError, ImportError) as e:
        fail(str(e))
    typer.echo(f"{readme}, {everything}: {len(found)} suites")


@app.command("targets")
def show_targets(
    device: Annotated[str, typer.Option(help="folder of the results")] = "cpu",
    results: Annotated[Path, typer.Option(help="folder of result folders")] = overview.RESULTS,
) -> None:
    """Which of the speeds that the project promises were reached, and by how much the others were missed."""
    found = [result for _, result in overview.load(results / device)]
    if not found:
        fail(f"no results in {results / device}: python -m bench run all --save")
    targets.show(found, make_console())


@app.command("tune")
def sweep(
    device: Annotated[str, typer.Option(help="cuda")] = "cuda",
    only: Annotated[str, typer.Option(help="dequantize, qlora_linear or dx")] = "",
    quick: Annotated[bool, typer.Option(help="one layer, two sizes")] = False,
    out: Annotated[Path | None, typer.Option(help="default: the table that the Triton backend reads for this GPU")] = None,
) -> None:
    """Sweeps the Triton backend's launch settings on this GPU and writes its table."""
    if device == "cpu":
        fail("tune: the C++ backend has no launch settings; this needs a CUDA GPU")
    where = get_device(device)
    try:
        path = tune.tune(where, quick, only, out, make_console())
    except RuntimeError as e:
        fail(str(e))
    typer.echo(f"wrote {path}")


@app.command()
def profile(
    op: Annotated[str, typer.Argument(help=", ".join(profile_op.OPS))],
    shape: Annotated[str, typer.Argument(help="MxNxK or MxNxKxr")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeat: Annotated[int, typer.Option(min=1, help="calls")] = 100,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads")] = None,
) -> None:
    """Runs one op, ready for ncu, nsys or perf; prints the command lines."""
    where = get_device(device)
    if threads:
        torch.set_num_threads(threads)
    try:
        profile_op.profile(op, shape, where, repeat)
    except ValueError as e:
        fail(str(e))
    typer.echo(profile_op.hints(op, shape, where))


@app.command("compile-check")
def check_triton(
    arch: Annotated[list[int] | None, typer.Option(help="compute capabilities; default 80 90 100")] = None,
    more: Annotated[list[int] | None, typer.Argument(help="further ones, so that --arch 80 90 100 works")] = None,
    only: Annotated[str, typer.Option(help="kernels whose name contains this text")] = "",
    record: Annotated[bool, typer.Option(help="write the instructions a weight to bench/tools/instructions.json")] = False,
) -> None:
    """Compiles every Triton kernel ahead of time; exit code 1 on a spill, a lost matrix instruction, or more instructions than
    recorded.  Needs no GPU."""
    console = make_console()
    try:
        archs = [*(arch or []), *(more or [])] or list(compile_check.TRITON_ARCHS)
        bad = compile_check.check_triton(archs, only, console, record)
    except (RuntimeError, ValueError) as e:
        fail(str(e))
    verdict(console, compile_check.triton_version(), bad)


@app.command("resources")
def check_cuda(
    arch: Annotated[list[int] | None, typer.Option(help="compute capabilities; default 75 80 90 100 120")] = None,
    more: Annotated[list[int] | None, typer.Argument(help="further ones, so that --arch 80 90 works")] = None,
    only: Annotated[str, typer.Option(help="sources whose name contains this text")] = "",
) -> None:
    """The same for every kernel in CUDA C++, with nvcc; exit code 1 on a spill or a lost matrix instruction.  Needs no GPU."""
    console = make_console()
    try:
        archs = [*(arch or []), *(more or [])] or list(compile_check.CUDA_ARCHS)
        bad = compile_check.check_cuda(archs, only, console)
    except RuntimeError as e:
        fail(str(e))
    verdict(console, compile_check.cuda_version(), bad)


def verdict(console: Console, compilers: str, bad: int) -> None:
    """The last line of a check; ends the program with exit code 1 where kernels are bad."""
    console.print(f"{compilers}: " + (f"[red]{bad} kernels are not as they should be" if bad else "all ok"))
    if bad:
        raise typer.Exit(1)
