"""Floors for AMD GPUs: **none was ever measured, and no kernel has run on one yet**.

They keep to what every such GPU has: 64 KiB of shared memory, so two tiles in flight and none larger than 64 x 128; and weights
are decoded by a gather from memory, so from few rows on it pays to decode to memory, once, and then call the library's GEMM.
Triton 3.7 compiles them for gfx942 without a spill; for gfx1100 the kernels that decode in the main loop spill.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Gpu, Problem, cdiv

COMPUTE_UNITS = 96
"""How many are kept busy: as many as the largest RX 7900 has, fewer than an MI250 or MI300."""
SMALL, FUSED_DX = 64, 64
"""M up to which W is decoded in the main loop."""


def floor(problem: Problem, gpu: Gpu) -> Config:
    """The setting of a problem on a GPU that was not measured."""
    op, M, N, K, r, *_ = problem
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    match op:
        case "quantize":
            return Config(block_n=2048)
        case "dequantize":
            return Config(block_n=2048)
        case "dequantize_elements":
            return Config(block_n=512)
        case "qlora_linear" if M <= SMALL:
            config = Config("small", block_m, 64, 64 if K >= 64 else 32, stages=2, fuse_h=block_m == 16 and 0 < r <= 16)
            want = cdiv(4 * COMPUTE_UNITS, cdiv(N, config.block_n))
            return replace(config, split=max(1, min(want, K // (2 * config.block_k), 16)))
        case "dx" if M <= FUSED_DX:
            return Config("fused", block_m, 64, 64 if K >= 64 else 32, stages=2)
        case "qlora_linear" | "dx":
            return Config("panel")
        case "project":
            split = max(1, min(2 * COMPUTE_UNITS // cdiv(M, block_m), K // 512, 32))
            return Config("", block_m, 64, 64, split=split, stages=2)
        case "expand":
            return Config("", 64, 64, 64, stages=2)
        case "read_once":
            steps = max(1, min(8, cdiv(M, block_m) * cdiv(N, 64) // (2 * COMPUTE_UNITS)))
            return Config("", max(block_m, 32), 64, steps=steps, stages=2)
    return Config(block_n=1024)
