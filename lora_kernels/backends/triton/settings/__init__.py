# ruff: noqa: SIM300 (M and K are sizes, not constants)
"""How each kernel is launched: a frozen `Config` and the pure function that picks one.

No GPU is needed and nothing is timed here: these are the floors, values that follow from instruction counts and memory
traffic rather than from a clock.  A GPU that was measured has a table that comes first (see `tables`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PATHS = ("small", "fused", "gluon", "panel")
MAX_PANEL_BYTES = 64 << 20
"""Most memory that decoded weight takes at a time; a larger panel is computed in slices."""


@dataclass(frozen=True)
class Config:
    """One kernel launch.

    Attributes:
        path: how the weight reaches the dot: `small` (weight as the left operand, K split), `fused` (decoded in the main
            loop), `gluon` (the same, overlapped by hand, on sm_90; only where it was measured to pay), `panel` (decoded to
            memory, then the library's GEMM); empty for kernels that have one way.
        block_m, block_n, block_k: tile along M, N and K (rows, and columns of `x`, for the adapter kernels).
        split: programs that share one output tile.
        steps: row tiles that one program reads in turn.
        warps, stages: of Triton; the gluon path keeps `stages` tiles of x in shared memory.
        group: row tiles that share columns in L2, for `swizzle`.
        shuffle: whether both operands of the dot get the K order in which a lane loads its own fragment.
        fuse_h: whether the small path computes `h` itself.
        registers: most registers a thread, 0 for no limit.
    """

    path: str = ""
    block_m: int = 1
    block_n: int = 1
    block_k: int = 64
    split: int = 1
    steps: int = 1
    warps: int = 4
    stages: int = 3
    group: int = 8
    shuffle: bool = False
    fuse_h: bool = False
    registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told besides the kernel's own arguments."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options | {"maxnreg": self.registers} if self.registers else options


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on: streaming multiprocessors, and M up to which each path of the linear ops is taken."""

    sms: int
    small: int
    fused: int
    fused_dx: int


GPUS = {
    80: Gpu(sms=108, small=64, fused=256, fused_dx=256),
    86: Gpu(sms=84, small=64, fused=256, fused_dx=256),
    89: Gpu(sms=128, small=64, fused=256, fused_dx=256),
    90: Gpu(sms=132, small=64, fused=384, fused_dx=384),
    100: Gpu(sms=148, small=64, fused=256, fused_dx=256),
    103: Gpu(sms=148, small=64, fused=256, fused_dx=256),
    120: Gpu(sms=170, small=64, fused=256, fused_dx=256),
}
"""By compute capability (major * 10 + minor).  Floors: a fused kernel at 55% of peak beats decode + GEMM up to M = 470 on
sm_90; none of these crossovers has been measured yet."""
UNKNOWN = Gpu(sms=64, small=64, fused=128, fused_dx=128)


def pick_config(op: str, M: int, N: int, K: int, r: int, arch: int) -> Config:
    """The launch of kernel `op` for `x [M, K]`, weight `[N, K]`, rank `r` (0 without adapter) on compute capability `arch`.

    Ops: `quantize`, `decode_absmax`, `dequantize` (of N x K elements), `qlora_linear`, `dx`, and the adapter products
    `project` (`[M, K] -> [M, r]`), `expand` (`[M, r] -> [M, N]`), `read_once` (`[M, N]` and `[M, r]` -> `[M, r]`, `[N, r]`).
    """
    return _PICK[op](M, N, K, r, GPUS.get(arch, UNKNOWN), arch)


def _flat(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    return Config(block_n=1024)


def _quantize(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    return Config(block_n=2048)


def _dequantize(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    return Config(block_n=64 * 64)


def _qlora_linear(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    if M <= gpu.small:
        return _small(M, N, K, r, gpu, arch)
    if M <= gpu.fused:
        if not _asynchronous(arch):
            # 4 warps side by side along N: each decodes its own part of W, 8.6 instructions a weight for 17
            return Config("fused", 64, 128, 64, warps=4)
        # 128 x 128 x 64 with 8 warps leaves room for two programs an SM, and the second one is what hides the decode
        block_n = 128 if _tiles(M, 128, N, 128) >= gpu.sms else 64
        if block_n == 128:
            return Config("fused", 128, 128, 64, warps=8, registers=128)
        return Config("fused", 128, 64, 64, warps=4)
    return Config("panel")


def _small(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    shuffle = not _tensor_memory(arch)  # the shuffled operand does not compile for it in Triton 3.6
    fuse_h = block_m == 16 and 0 < r <= 16
    config = Config("small", block_m, 64, 128, warps=4, shuffle=shuffle, fuse_h=fuse_h)
    if block_m == 64 or (_tensor_memory(arch) and (fuse_h or block_m == 32)):
        config = replace(config, block_n=128, warps=8, stages=2 if fuse_h else 3)
    elif block_m == 16 and not fuse_h and K % 256 == 0 and _asynchronous(arch):
        config = replace(config, block_k=256)
    if K < config.block_k:
        config = replace(config, block_k=64 if K >= 64 else 32)
    want = -(-4 * gpu.sms // -(-N // config.block_n))  # at least 4 programs an SM
    return replace(config, split=max(1, min(want, K // (2 * config.block_k), 16)))


def _dx(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    if M > gpu.fused_dx:
        return Config("panel")
    block_m = 128 if M > 64 and _asynchronous(arch) else 64
    if K >= 128 and (_tiles(M, 128, K, 128) >= gpu.sms or not _asynchronous(arch)):
        return Config("fused", block_m, 64, 128, warps=8, registers=128 if block_m == 128 else 0)
    return Config("fused", block_m, 64, 64 if K >= 64 else 32, warps=4)


def _asynchronous(arch: int) -> bool:
    """Whether the tensor cores read operands from shared or tensor memory (sm_90, sm_100), not from registers."""
    return 90 <= arch < 120


def _tensor_memory(arch: int) -> bool:
    """Whether accumulators live in tensor memory (sm_100), from where some tiles come back through spills."""
    return 100 <= arch < 120


def _project(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    tiles = -(-M // block_m)
    split = max(1, min(2 * gpu.sms // tiles, K // 512, 32))
    if r <= 64:
        return Config("", block_m, 64, 64, split=split, warps=4, stages=4)
    return Config("", block_m, 128, 64, split=split, warps=8, stages=2 if _tensor_memory(arch) and block_m == 64 else 3)


def _expand(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    return Config("", 64, 128, 64, warps=8, stages=2)


def _read_once(M: int, N: int, K: int, r: int, gpu: Gpu, arch: int) -> Config:
    block_m = 64 if M > 32 else 32
    columns = -(-N // 128)
    # fewer partials of dB, as long as 2 programs an SM are left
    steps = max(1, min(8, -(-M // block_m) * columns // (2 * gpu.sms)))
    return Config("", block_m, 128, steps=steps, warps=4 if r <= 32 and not _asynchronous(arch) else 8)


_PICK = {
    "quantize": _quantize,
    "decode_absmax": _flat,
    "reduce": _flat,
    "dequantize": _dequantize,
    "qlora_linear": _qlora_linear,
    "dx": _dx,
    "project": _project,
    "expand": _expand,
    "read_once": _read_once,
}
OPS = tuple(_PICK)


def _tiles(M: int, block_m: int, N: int, block_n: int) -> int:
    return -(-M // block_m) * -(-N // block_n)
