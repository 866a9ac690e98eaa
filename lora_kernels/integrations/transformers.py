"""The documented names of `lora_kernels.app.load`, `folders` and `generate` in earlier versions."""

from ..app.folders import save_merged, save_quantized
from ..app.generate import answer
from ..app.load import load_model

__all__ = ["answer", "load_model", "save_merged", "save_quantized"]
