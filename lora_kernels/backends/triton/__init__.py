"""Every op in fused Triton kernels, for NVIDIA GPUs from sm_80 on, and for AMD GPUs where Triton runs.

With TRITON_INTERPRET=1 set before Triton is first imported, the same kernels run on the CPU in Triton's interpreter: slow, for
tests.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from ...formats import FORMATS
from ...requirements import PIP, installed, missing, numbers

MINIMUM_CAPABILITY = (8, 0)

if importlib.util.find_spec("triton") is not None:
    from .decode_absmax import decode_absmax
    from .dequantize import dequantize
    from .qlora_linear import qlora_linear, qlora_linear_backward
    from .quantize import quantize

    __all__ = ["decode_absmax", "dequantize", "lacks", "qlora_linear", "qlora_linear_backward", "quantize", "unavailable"]
else:
    __all__ = ["lacks", "unavailable"]


def lacks(want: str) -> str | None:
    """Why the kernels can't compute with a format, or None."""
    return None if want in FORMATS else f"it does not compute {want}"


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernels can't run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton, which is there for Linux, is not installed: {PIP} install triton"
    if (problem := missing("triton")) is not None:
        return f"the Triton kernels need {problem}"
    from .tiles import INTERPRET

    if INTERPRET.value:
        if (numpy := installed("numpy")) and numbers(numpy) >= (2, 4) and missing("triton", "3.7"):
            return f"the interpreter of Triton 3.6 needs numpy before 2.4, found {numpy}: {PIP} install 'triton>=3.7'"
        return None if device.type in ("cpu", "cuda") else f"Triton's interpreter has no {device.type} tensors"
    if device.type != "cuda":
        return "Triton runs on CUDA devices; set TRITON_INTERPRET=1 before Triton is imported to run its interpreter on the CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
