"""How a weight is passed to the kernels that decode it: tensors and constants; and what of it settings are chosen by."""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...formats import QuantizedWeight, codebook, format_of
from ...layer import Layer
from .launch import has_ptx
from .settings import Problem
from .tiles import table_asm

Weight = QuantizedWeight | Layer
"""What has the fields of a weight: a weight alone, or a layer."""


def weight_args(w: Weight, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """packed, absmax, code2, absmax2, offset, lut: what the kernels read of a weight they decode to `dtype`.

    `lut` is the codebook in memory, None where the codes are decoded with byte permutes.
    """
    lut = None if _in_registers(dtype) else constant(w.quant_type, w.packed.device)
    scales = (t if t is None else t.contiguous() for t in (w.absmax, w.code2, w.absmax2, w.offset))
    return w.packed.reshape(-1).view(torch.uint8).contiguous(), *scales, lut


def weight_meta(w: Weight, group: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `tiles.load_weight` for a weight that is decoded to `dtype` in groups of `group`."""
    return {
        "GROUP": group,
        "SHIFT": (w.blocksize // group).bit_length() - 1,
        "NESTED": w.absmax2 is not None,
        "TABLE": _table(w.quant_type, dtype) if _in_registers(dtype) else None,
        "PTX": has_ptx(),
    }


def group_of(w: Weight, multiple: int) -> int:
    """Elements that a kernel decodes with one scale: the largest group that divides both a block and `multiple`, or 0 where
    neither 64 nor 32 does, or the bytes are not aligned, and elements have to be decoded one by one."""
    if (w.packed.is_contiguous() and w.packed.data_ptr() % 16) or prod(w.shape) >= 1 << 34:
        return 0
    return next((g for g in (64, 32) if multiple % g == 0 and w.blocksize % g == 0), 0)


def linear_problem(op: str, rows: Tensor, layer: Layer) -> Problem:
    """`op` (`qlora_linear` or `dx`) on `rows`, which are x or dy."""
    N, K = layer.shape
    group = group_of(layer, K)
    in_words = group == layer.blocksize == 64 and layer.absmax.data_ptr() % 16 == 0
    return Problem(op, rows.shape[0], N, K, layer.r, rows.dtype == torch.float32, layer.dropout_p > 0, group, in_words)


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
