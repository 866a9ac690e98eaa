"""Runs one op over and over, ready for ncu, nsys or perf."""

from __future__ import annotations

from collections.abc import Callable

import torch

import lora_kernels as lk
from lora_kernels.testing import make_inputs

from ..suites import cases

OPS = ("quantize", "decode_absmax", "dequantize", "qlora_linear", "qlora_linear_backward")


def calls(op: str, shape: str, device: torch.device) -> Callable[[], object]:
    """A function that runs the op once.  Raises ValueError for an unknown op or shape."""
    if op not in OPS:
        raise ValueError(f"OP must be one of {', '.join(OPS)}, got {op!r}")
    case = cases.parse(shape)
    i = make_inputs(case, device=device)
    qw, s = i.qw, case.scaling
    if op == "quantize":
        weight = torch.randn(case.N, case.K, device=device, dtype=torch.bfloat16)
        return lambda: lk.quantize(weight)
    if op == "decode_absmax":
        return lambda: lk.decode_absmax(qw)
    if op == "dequantize":
        return lambda: lk.dequantize(qw, torch.bfloat16)
    args = (i.lora_A, i.lora_B, s)
    if op == "qlora_linear":
        return lambda: torch.ops.lora_kernels.qlora_linear(i.x, *qw.op_args(), *args, None, 0.0, None)
    _, h = torch.ops.lora_kernels.qlora_linear(i.x, *qw.op_args(), *args, None, 0.0, None)
    needs = [True, True, True, False]
    return lambda: torch.ops.lora_kernels.qlora_linear_backward(i.dy, i.x, h, *qw.op_args(), *args, 0.0, None, needs)


def profile(op: str, shape: str, device: torch.device, repeat: int) -> None:
    """Warms up, then runs `repeat` calls between cudaProfilerStart and Stop."""
    call = calls(op, shape, device)
    for _ in range(3):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for _ in range(repeat):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def hints(op: str, shape: str, device: torch.device) -> str:
    command = f"python -m bench profile {op} {shape} --device {device.type}"
    if device.type == "cuda":
        return (
            f"ncu --profile-from-start off --set full -o {op} {command}\n"
            f"nsys profile --capture-range cudaProfilerApi -o {op} {command}"
        )
    return f"perf record -g {command}\nperf stat -d {command}"
