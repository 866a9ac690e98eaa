"""The documented names of `lora_kernels.app.finetune` and `lora_kernels.app.load` in earlier versions."""

from .app.finetune import Result, Settings, finetune
from .app.load import load_with_adapter

__all__ = ["Result", "Settings", "finetune", "load_with_adapter"]
