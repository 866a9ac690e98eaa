"""memory: what one forward and backward pass of a layer needs besides its weights.

    peak     bytes in use at the worst moment above what was in use before
    besides  the peak less the output and the gradients, which every contender returns
    saved    bytes that autograd holds between forward and backward, the input included where it is kept

On the CPU the peak is that of the resident set, which no allocator can hide, and each contender runs in a process of its own.
On CUDA it is that of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lora_kernels as lk
from lora_kernels.testing import Case

from ..measure import ROOT
from ..rivals.base import Layer
from ..rivals.registry import REGISTRY, on
from ..suite import OURS, UnavailableError, failure, print_header, print_summary, summary
from . import cases
from .layer import TRAIN_NAMES as NAMES
from .layer import label as label_of

MB = 1e6


def labels(device: torch.device, quick: bool) -> list[str]:
    """Of the lines."""
    return [label_of(case) for case in cases.memory(device, quick)]


def run_suite(
    device: torch.device,
    against: Sequence[str],
    console: Console,
    env: dict[str, Any],
    quick: bool,
    only: str = "",
    deadline: float = math.inf,
) -> dict[str, Any]:
    print_header(console, "memory", env)
    rows, left_out = [], []
    for case in cases.memory(device, quick):
        label = label_of(case)
        if only not in label:
            continue
        if time.monotonic() > deadline:
            left_out.append(label)
            continue
        measure_one = _child if device.type == "cpu" else measure
        entries = {n: measure_one(n, case, device) for n in on(device, NAMES) if n == OURS or n in against}
        ours = entries[OURS].get("peak")
        for name, entry in entries.items():
            if name != OURS and ours and "peak" in entry:
                entry["ratio"] = dict.fromkeys(("q1", "median", "q3"), entry["peak"] / ours)
        rows.append({"label": label, "M": case.M, "N": case.N, "K": case.K, "r": case.r, "entries": entries})
        _print(console, label, entries)
    result = {"suite": "memory", **env, "quick": quick, "rows": rows, "left_out": left_out, "summary": summary(rows)}
    print_summary(console, result)
    return result


def _child(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    shape = f"{case.M}x{case.N}x{case.K}x{case.r}"
    command = [sys.executable, "-m", "bench.suites.memory", name, shape, str(device), str(torch.get_num_threads())]
    # a fixed threshold, so that every large buffer goes back to the system when it is freed
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"status": f"failed: {last[0]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _print(console: Console, label: str, entries: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"memory  {label}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("peak, MB", "over ours", "besides results, MB", "saved, MB", "weight, MB"):
        table.add_column(heading, justify="right")
    for name, e in entries.items():
        if e["status"] != "ok":
            table.add_row(name, e["status"])
            continue
        ratio = f"{e['ratio']['median']:.2f}x" if "ratio" in e else ""
        megabytes = [f"{e[k] / MB:.1f}" for k in ("peak", "besides", "saved", "weight_bytes")]
        table.add_row(name, megabytes[0], ratio, *megabytes[1:], style="bold" if name == OURS else None)
    console.print(table, "")


def measure(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    inputs = cases.inputs(case, device)
    try:
        layer = REGISTRY[name](inputs, lk.dequantize(inputs.qw, case.dtype))
        return {"status": "ok"} | _measure(layer, inputs.x.clone().requires_grad_(), inputs.dy, device)
    except UnavailableError as e:
        return {"status": str(e)}
    except Exception as e:
        return {"status": f"failed: {failure(e)}"}


def _measure(layer: Layer, x: Tensor, dy: Tensor, device: torch.device) -> dict[str, int]:
    torch.autograd.grad(layer.forward(x[:4]), (x, *layer.leaves), dy[:4])  # what a library sets up once is not counted
    before = _start(device)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if not isinstance(t, torch.nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    frozen = {p.untyped_storage().data_ptr() for p in _tensors(layer.forward)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.forward(x)
    grads = torch.autograd.grad(y, (x, *layer.leaves), dy)
    peak = _peak(device) - before
    results = sum(t.nbytes for t in (y, *grads))
    held = sum(size for pointer, size in saved.items() if pointer not in frozen)
    return {"peak": peak, "besides": peak - results, "saved": held, "weight_bytes": layer.nbytes}


def _tensors(forward: Any) -> list[Tensor]:
    """Parameters and buffers of a contender's module, which are not saved by autograd but referred to."""
    if not isinstance(forward, torch.nn.Module):
        return []
    return [*forward.parameters(), *forward.buffers()]


def _start(device: torch.device) -> int:
    """Resets the peak and returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as e:
        raise SystemExit(f"the peak of the resident set can't be reset on this system: {e}") from None
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    contender, problem, where, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(contender, cases.parse(problem), torch.device(where))))
