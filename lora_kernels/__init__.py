"""Fused QLoRA kernels: a frozen 4-bit linear layer with low-rank adapters, forward and backward, on any machine."""

from .adapter import load_adapter, save_adapter
from .autograd import decode_absmax, dequantize, qlora_linear, quantize
from .backends import use_backend
from .formats import QuantizedWeight
from .model import Report, apply_qlora, disable_adapters, set_adapter, verify
from .nn import AdapterConfig, FusedQLoRALinear, MergeReport
from .version import __version__

__all__ = [
    "AdapterConfig",
    "FusedQLoRALinear",
    "MergeReport",
    "QuantizedWeight",
    "Report",
    "__version__",
    "apply_qlora",
    "decode_absmax",
    "dequantize",
    "disable_adapters",
    "load_adapter",
    "qlora_linear",
    "quantize",
    "save_adapter",
    "set_adapter",
    "use_backend",
    "verify",
]
