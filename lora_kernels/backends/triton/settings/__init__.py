"""How each kernel is launched: `pick_config` decides, and launchers do as it says.

A GPU that was measured has a table that comes first (see `tables`).  Else there are floors, by vendor (`nvidia`, `amd`): values
that follow from instruction counts and memory traffic rather than from a clock.  No GPU is needed and nothing is timed here.

What is no setting, because it follows from sizes alone: how many programs there are, into how many slices a weight or a sum of
partials is cut so that it stays below `MAX_PANEL_BYTES` or `MAX_PARTIAL_BYTES`, and which flags a kernel is compiled with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from . import amd, nvidia, tables
from .config import MAX_PANEL_BYTES, MAX_PARTIAL_BYTES, ONE_READ_RANKS, OPS, PATHS, Config, Gpu, Problem, cdiv

__all__ = [
    "MAX_PANEL_BYTES",
    "MAX_PARTIAL_BYTES",
    "ONE_READ_RANKS",
    "OPS",
    "PATHS",
    "Config",
    "Gpu",
    "Problem",
    "cdiv",
    "forcing",
    "pick_config",
]

VENDORS = {"nvidia": nvidia, "amd": amd}

_forced: dict[str, Config] = {}


@contextmanager
def forcing(**configs: Config) -> Iterator[None]:
    """Every launch of the ops named in the block uses the setting given, where it can: for the tuner and for tests."""
    global _forced
    before, _forced = _forced, _forced | configs
    try:
        yield
    finally:
        _forced = before


def pick_config(problem: Problem, gpu: Gpu) -> Config:
    """The launch of `problem` on `gpu`: as forced, else as measured, else as the vendor's floors say; made to fit.

    Raises:
        ValueError: there is no op of that name.
    """
    forced = _forced.get(problem.op)
    return fitted(forced, problem, gpu) if forced is not None else _pick(problem, gpu)


@functools.lru_cache(maxsize=1 << 14)
def _pick(problem: Problem, gpu: Gpu) -> Config:
    if problem.op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {problem.op!r}")
    measured = tables.nearest(tables.entries_of(gpu.name), *problem[:5])
    return fitted(measured or VENDORS[gpu.vendor].floor(problem, gpu), problem, gpu)


def fitted(config: Config, problem: Problem, gpu: Gpu) -> Config:
    """`config`, or the nearest to it that `problem` can be launched with: floors and tables know sizes and 16-bit products."""
    match problem.op:
        case "qlora_linear" | "dx":
            return _linear(config, problem, gpu)
        case "project" if problem.float32:
            return replace(config, block_m=min(config.block_m, 32), block_k=32, stages=2)
        case "expand" if problem.float32:
            return replace(config, stages=2)
        case "read_once":
            if problem.float32:  # its products take many registers
                config = replace(config, ranks=16, stages=2)
            # a program reads so many rows that the partials of dB [N, r] stay below their cap
            most = max(1, MAX_PARTIAL_BYTES // (4 * problem.N * max(1, problem.r)))
            return replace(config, steps=max(config.steps, cdiv(problem.M, config.block_m * most)))
    return config


def _linear(config: Config, problem: Problem, gpu: Gpu) -> Config:
    """The panel path where W has no aligned groups along K, or K does not fill a tile, or products are float32, which have no
    tensor cores to feed; elsewhere `config`, its flags as they can be."""
    K, group = problem.K, problem.group
    fits = group > 0 and config.block_k <= K and not problem.float32
    if config.path == "gluon":
        fits = fits and gpu.vendor == "nvidia" and nvidia.takes_gluon(config, problem, gpu)
    if not fits:
        return Config("panel")
    small = config.path == "small"
    fuse_h = small and config.fuse_h and 0 < problem.r <= config.ranks and not problem.dropout
    words = small and problem.scales_in_words and config.block_k == 4 * group and K % config.block_k == 0
    return replace(config, fuse_h=fuse_h, scale_words=words)
