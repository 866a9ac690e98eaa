"""The documented names of `lora_kernels.app.trainer` in earlier versions."""

from .app.trainer import Monitor, QLoRATrainer

__all__ = ["Monitor", "QLoRATrainer"]
