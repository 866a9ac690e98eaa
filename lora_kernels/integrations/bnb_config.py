"""The entry `quantization_config` by which a config.json says that a folder is in bitsandbytes' 4-bit format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import dtype_name


@dataclass(frozen=True)
class BnbConfig:
    """What such an entry tells, in our terms; `to_dict` and `from_dict` alone know bitsandbytes' names for it.

    Attributes:
        quant_type, double_quant, blocksize: see `lora_kernels.quantize`.
        quant_storage: dtype of the packed bytes, or its name.
        compute_dtype: dtype that bitsandbytes' layers compute in, or its name.
        dense_modules: names, or last parts of names, of the linear layers that are not in 4 bits.
    """

    quant_type: str
    double_quant: bool
    blocksize: int
    quant_storage: torch.dtype | str
    compute_dtype: torch.dtype | str
    dense_modules: Sequence[str] | None

    def to_dict(self) -> dict[str, Any]:
        """The entry: that of transformers' BitsAndBytesConfig, with the blocksize added."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "_load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_quant_storage": _name(self.quant_storage),
            "bnb_4bit_compute_dtype": _name(self.compute_dtype),
            "llm_int8_skip_modules": None if self.dense_modules is None else list(self.dense_modules),
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "blocksize": self.blocksize,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> BnbConfig:
        """Reads an entry that `is_4bit`; what it leaves out has bitsandbytes' default."""
        return cls(
            entry.get("bnb_4bit_quant_type", "fp4"),
            entry.get("bnb_4bit_use_double_quant", False),
            entry.get("blocksize", 64),
            entry.get("bnb_4bit_quant_storage", "uint8"),
            entry.get("bnb_4bit_compute_dtype", "float32"),
            entry.get("llm_int8_skip_modules"),
        )


def is_4bit(entry: Mapping[str, Any]) -> bool:
    """Whether an entry `quantization_config` is one of bitsandbytes' 4-bit format."""
    ours = entry.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return ours and bool(entry.get("load_in_4bit") or entry.get("_load_in_4bit"))


def _name(dtype: torch.dtype | str) -> str:
    return dtype if isinstance(dtype, str) else dtype_name(dtype)
