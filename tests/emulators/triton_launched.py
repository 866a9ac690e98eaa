"""What reaches the driver, on a machine without one: a stub stands where Triton would call CUDA.

A launch that goes past Triton's argument handling must hand over the kernel, grid and arguments that Triton would.
`test_triton.py` runs this file in a process of its own.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lora_kernels.backends import triton
from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.settings import Config, forcing
from lora_kernels.layer import Layer
from lora_kernels.testing import Case, make_inputs

calls: list[tuple] = []


class Utils:
    def load_binary(self, *args):
        return 0, 0, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    def __init__(self, src, metadata):
        self.kernel = metadata.hash

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        values = [("tensor", a.dtype, tuple(a.shape)) if isinstance(a, torch.Tensor) else a for a in args]
        calls.append((self.kernel, (x, y, z), stream, *values))


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())


def handed_over(run) -> list[tuple]:
    calls.clear()
    run()
    return list(calls)


def odd(t: torch.Tensor) -> torch.Tensor:
    """A copy of `t` at an address that is no multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def linear(x: torch.Tensor, scaling: float = 2.0, bias: torch.Tensor | None = None) -> object:
    return triton.qlora_linear(x, [Layer.of(qw, A, B, scaling, bias)])


def gluon(x: torch.Tensor) -> object:
    with forcing(qlora_linear=Config("gluon", 128, 128, 64, warps=8)):
        return linear(x)


inputs = make_inputs(Case(3, 128, 256, r=16, dtype=torch.bfloat16))
qw, A, B = inputs.qw, inputs.lora_A, inputs.lora_B
variants = {
    "as it is": lambda: linear(inputs.x),
    "other rows": lambda: linear(inputs.x[:1]),
    "other scaling": lambda: linear(inputs.x, 0.5),
    "x off alignment": lambda: linear(odd(inputs.x)),
    "float16": lambda: linear(inputs.x.half()),
    "bias": lambda: linear(inputs.x, bias=B[:, 0].contiguous()),
    "gluon": lambda: gluon(inputs.x),
    "dequantize": lambda: triton.dequantize(qw, torch.bfloat16),
}
by_triton = {}
for name, run in variants.items():
    launch._compiled.clear()
    by_triton[name] = handed_over(run)
assert len({handed[0][0] for handed in by_triton.values()}) == len(variants) - 2  # rows and scaling compile nothing new
launch._compiled.clear()
for run in variants.values():
    run()
kept = len(launch._compiled)
for name, run in variants.items():
    assert handed_over(run) == by_triton[name], name
assert len(launch._compiled) == kept
print(f"{sum(map(len, by_triton.values()))} launches alike")
