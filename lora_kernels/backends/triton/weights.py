"""How a weight is passed to the kernels that decode it: its tensors, and the constants that they are compiled with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...formats import QuantizedWeight, codebook, format_of
from .launch import has_ptx
from .tiles import table_asm


def weight_args(qw: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """packed, absmax, code2, absmax2, offset, lut: what the kernels read of a weight they decode to `dtype`.

    `lut` is the codebook in memory, None where the codes are decoded with byte permutes.
    """
    lut = None if _in_registers(dtype) else constant(qw.quant_type, qw.device)
    scales = (t if t is None else t.contiguous() for t in (qw.absmax, qw.code2, qw.absmax2, qw.offset))
    return qw.codes().contiguous(), *scales, lut


def weight_meta(qw: QuantizedWeight, group: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `tiles.load_weight` for a weight that is decoded to `dtype` in groups of `group`."""
    return {
        "GROUP": group,
        "SHIFT": (qw.blocksize // group).bit_length() - 1,
        "NESTED": qw.double_quant,
        "TABLE": _table(qw.quant_type, dtype) if _in_registers(dtype) else None,
        "PTX": has_ptx(),
    }


def group_of(qw: QuantizedWeight, multiple: int) -> int:
    """Elements that a kernel decodes with one scale: the largest group that divides both a block and `multiple`, or 0 where
    neither 64 nor 32 does, or the bytes are not aligned, and elements have to be decoded one by one."""
    if (qw.packed.is_contiguous() and qw.packed.data_ptr() % 16) or qw.numel >= 1 << 34:
        return 0
    return next((g for g in (64, 32) if multiple % g == 0 and qw.blocksize % g == 0), 0)


@functools.cache
def constant(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a format, on `device`."""
    return codebook(quant_type).to(device)


def _in_registers(dtype: torch.dtype) -> bool:
    """Whether codes are decoded with byte permutes, which take 16-bit weights and NVIDIA's instructions."""
    return has_ptx() and dtype != torch.float32


@functools.cache
def _table(quant_type: str, dtype: torch.dtype) -> str:
    return table_asm(format_of(quant_type).code, "bf16" if dtype == torch.bfloat16 else "f16")
