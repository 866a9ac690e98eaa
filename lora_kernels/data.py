"""The documented names of `lora_kernels.app.data` in earlier versions."""

from .app.data import Collator, encode, read_records, split

__all__ = ["Collator", "encode", "read_records", "split"]
