"""Double-quantized scales -> float32: `code2[absmax] * absmax2`, rounded, `+ offset`, rounded; one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import config_of, has_ptx, launch, on
from .settings import Problem, cdiv
from .tiles import load_absmax


@triton.jit
def decode_scales(absmax, code2, absmax2, offset, out, count, BLOCK: tl.constexpr, PTX: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    block = tl.where(inside, i, 0)
    value = load_absmax(absmax, code2, absmax2, offset, block >> 31, block, True, PTX)
    tl.store(out + i, value, mask=inside)


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    """uint8 `[n_blocks]` -> float32 `[n_blocks]`."""
    out = torch.empty_like(absmax, dtype=torch.float32)
    config = config_of(Problem("decode_absmax", K=absmax.numel()), absmax.device)
    with on(absmax.device):
        grid, args = (cdiv(out.numel(), config.block_n),), (absmax, code2, absmax2, offset, out, out.numel())
        launch(decode_scales, grid, args, {"BLOCK": config.block_n, "PTX": has_ptx()}, config)
    return out
