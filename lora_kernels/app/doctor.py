"""What `lora-kernels doctor` shows: versions, devices, and for each device its backend, what bars a better one, and a check."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import backends
from ..autograd import qlora_linear
from ..backends import native
from ..requirements import FLOORS, installed, missing
from ..testing import Case, assert_close_to_oracle, make_inputs
from ..version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "bitsandbytes")
FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "sve", "bf16")


def report(console: Console) -> bool:
    """Prints the whole report.  Returns whether every device computes a layer as it should, no installed package is too
    old, and the extension can be used if there is one."""
    console.print(_rows({"lora_kernels": __version__, "python": platform.python_version(), **_versions(), **_devices()}))
    console.print()
    forced = backends.forced()
    if forced:
        console.print(f"LORA_KERNELS_BACKEND forces {forced!r} on every device")
    too_old = _too_old()
    for package in too_old:
        console.print(f"too old: needed is {package}", soft_wrap=True, markup=False)
    healthy = not too_old and not native.broken()
    for device in _torch_devices():
        problem = _problem(device)
        check = problem or "forward and backward of a QLoRA layer agree with float64"
        console.print(f"{_choice(device)}\n  check: {check}", soft_wrap=True, markup=False)
        healthy &= problem is None
    return healthy


def _rows(rows: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _versions() -> dict[str, str]:
    return {name: installed(name) or "not installed" for name in PACKAGES} | {"compiler": _compiler()}


def _too_old() -> list[str]:
    """The installed packages that are older than lora_kernels supports, each with the command that cures it."""
    return [problem for name in FLOORS if installed(name) and (problem := missing(name))]


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return "none: install g++ to build the C++ backend"
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[0]


def _devices() -> dict[str, str]:
    cpu = torch.cpu.get_capabilities()
    features = ", ".join(name for name in FEATURES if cpu.get(name)) or "none of interest"
    rows = {"cpu": f"{cpu.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads, {features}"}
    try:
        extension = native.extension()
    except RuntimeError as e:
        rows["native"] = str(e)
    else:
        archs = native.cuda_archs(extension)
        rows["native level"] = f"{extension.cpu_level()} (LORA_KERNELS_CPU_ISA chooses another)"
        rows["native CUDA"] = f"sm_{', sm_'.join(archs)}, nvcc {extension.build_info()['nvcc']}" if archs else "not built"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 1e9:.0f} GB"
    return rows


def _torch_devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _problem(device: torch.device) -> str | None:
    """Computes a small layer on `device` and says what is wrong with the result."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(Case(48, 96, 192, dtype=dtype, bias=True), device=device)
            given = {"dx": inputs.x, "dA": inputs.lora_A, "dB": inputs.lora_B, "dbias": inputs.bias}
            leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
            x, A, B, bias = leaves.values()
            y = qlora_linear(x, inputs.qw, A, B, inputs.case.scaling, bias)
            y.backward(inputs.dy)
            grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            assert_close_to_oracle({"y": y.detach(), **grads}, inputs)
    except Exception as e:
        return f"FAILED: {type(e).__name__}: {e}"
    return None


def _choice(device: torch.device) -> str:
    """Which backend `device` gets, and what stands in the way of each better one."""
    try:
        chosen = backends.picked("qlora_linear", device)
    except RuntimeError as e:
        return f"{device}: no backend: {e}"
    lines = [f"{device}: {chosen}"]
    for name, reason in backends.choices("qlora_linear", device):
        if name == chosen:
            break
        lines.append(f"  better: {name}; not now: {reason or 'another is forced'}")
    return "\n".join(lines) + ("" if len(lines) > 1 else ", the best there is for it")
