"""What a setting is chosen for, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PATHS = ("small", "fused", "gluon", "panel")
OPS = (
    "quantize",
    "decode_absmax",
    "dequantize",
    "dequantize_elements",
    "qlora_linear",
    "dx",
    "project",
    "expand",
    "read_once",
    "reduce",
)
MAX_PANEL_BYTES = 64 << 20
"""Most memory that decoded weight takes at a time; a larger panel is computed in slices."""
MAX_PARTIAL_BYTES = 16 << 20
"""Most memory for the partial sums of one launch: what stays in L2 until they are added."""
ONE_READ_RANKS = 32
"""Ranks up to which `dy B` comes from the read that makes `dB`: a row of N elements has N / 128 partials of r floats, r / 16
bytes an element written and read, where a second read of dy costs 2."""


class Gpu(NamedTuple):
    """What kernels are launched on.

    Attributes:
        vendor: `nvidia` or `amd`.
        arch: compute capability (major * 10 + minor) on NVIDIA, 0 on AMD.
        name: as the driver gives it, by which its table is found; empty for none.
    """

    vendor: str
    arch: int
    name: str = ""


class Problem(NamedTuple):
    """What a launch is chosen for.

    Attributes:
        op: `quantize`, `decode_absmax`, `dequantize` (in aligned groups), `dequantize_elements` (one by one) and `reduce` (the
            sum of partials), all of K elements; `qlora_linear` and `dx` of x or dy with M rows, weight `[N, K]` and rank r;
            and the adapter's products `project` (`[M, K] -> [M, r]`), `expand` (`[M, r] -> [M, N]`) and `read_once`
            (`[M, N]` and `[M, r]` -> `[M, r]`, `[N, r]`).
        M, N, K, r: sizes, 0 where the op has none.
        float32: whether products are of float32, which take no tensor cores and twice the memory.
        dropout: whether lora_A's input is dropped.
        group: elements of a row of W that are decoded with one scale, 64 or 32; 0 where none are aligned.
        scales_in_words: whether the scales of 4 neighbouring groups of a row are one aligned word.
    """

    op: str
    M: int = 0
    N: int = 0
    K: int = 0
    r: int = 0
    float32: bool = False
    dropout: bool = False
    group: int = 64
    scales_in_words: bool = False


@dataclass(frozen=True)
class Config:
    """One kernel launch.

    Attributes:
        path: how the weight reaches the dot: `small` (weight as the left operand, K split), `fused` (decoded in the main
            loop), `gluon` (the same, overlapped by hand, on sm_90; only where it was measured to pay), `panel` (decoded to
            memory, then the library's GEMM); empty for kernels that have one way.
        block_m, block_n, block_k: tile along M, N and K (rows, and columns of `x`, for the adapter's products; `block_n`
            elements for the ops of K elements).
        ranks: most ranks in a tile; fewer take the next power of two.
        split: programs that share one output tile.
        steps: row tiles that one program reads in turn.
        warps, stages: of Triton; the gluon path keeps `stages` tiles of x in shared memory.
        group: row tiles that share columns in L2, for `swizzle`.
        shuffle: whether both operands of the dot get the K order in which a lane loads its own fragment.
        fuse_h: whether the small path computes `h` itself.
        scale_words: whether the small path loads 4 scales at once.
        registers: most registers a thread, 0 for no limit.
    """

    path: str = ""
    block_m: int = 1
    block_n: int = 1
    block_k: int = 64
    ranks: int = 64
    split: int = 1
    steps: int = 1
    warps: int = 4
    stages: int = 3
    group: int = 8
    shuffle: bool = False
    fuse_h: bool = False
    scale_words: bool = False
    registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told besides the kernel's own arguments."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options | {"maxnreg": self.registers} if self.registers else options


def cdiv(a: int, b: int) -> int:
    return -(a // -b)
