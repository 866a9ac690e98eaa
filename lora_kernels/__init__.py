"""Fused QLoRA kernels: a frozen 4-bit linear layer with low-rank adapters, forward and backward, on any machine."""

import sys
from pathlib import Path

from .requirements import PIP, TooOldError, require

try:
    require("torch", "lora_kernels")
except TooOldError as e:
    if Path(sys.argv[0]).name != "lora-kernels":
        raise
    sys.exit(f"error: {e}")  # for the command line, which can't begin before this

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapter_files import load_adapter, save_adapter
from .allocator import keep_freed_memory
from .autograd import decode_absmax, dequantize, qlora_linear, qlora_linear_group, quantize
from .backends import use_backend
from .backends.native import warn_of_mismatch
from .formats import QuantizedWeight
from .model import after_quantizing, apply_qlora, disable_adapters, group_projections, set_adapter
from .nn import AdapterConfig, FusedQLoRALinear, MergeReport
from .report import Report, verify
from .version import __version__

if TYPE_CHECKING:
    from .integrations.bitsandbytes import accelerate, patch_bitsandbytes, unpatch_bitsandbytes
    from .integrations.peft import enable_peft, loftq_init, merge_dense
    from .integrations.quantizer import QLoRAQuantConfig

warn_of_mismatch()

_LAZY = {
    "QLoRAQuantConfig": "quantizer",
    "accelerate": "bitsandbytes",
    "enable_peft": "peft",
    "loftq_init": "peft",
    "merge_dense": "peft",
    "patch_bitsandbytes": "bitsandbytes",
    "unpatch_bitsandbytes": "bitsandbytes",
}
"""Names that need transformers, PEFT or bitsandbytes, and the module of `integrations` they come from."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".integrations.{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as e:
        raise ImportError(f"lora_kernels.{name} needs {e.name}, which is not installed: {PIP} install {e.name}") from e


def _teach_peft() -> None:
    if "peft" in sys.modules:
        __getattr__("enable_peft")()


after_quantizing.append(_teach_peft)

__all__ = [
    "AdapterConfig",
    "FusedQLoRALinear",
    "MergeReport",
    "QLoRAQuantConfig",
    "QuantizedWeight",
    "Report",
    "__version__",
    "accelerate",
    "apply_qlora",
    "decode_absmax",
    "dequantize",
    "disable_adapters",
    "enable_peft",
    "group_projections",
    "keep_freed_memory",
    "load_adapter",
    "loftq_init",
    "merge_dense",
    "patch_bitsandbytes",
    "qlora_linear",
    "qlora_linear_group",
    "quantize",
    "save_adapter",
    "set_adapter",
    "unpatch_bitsandbytes",
    "use_backend",
    "verify",
]
