"""Shapes that the benchmarks run.  One definition for the command, pytest-benchmark, the tuner and the profiler."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.formats import QuantizedWeight
from lora_kernels.testing import Case, Inputs, decode, make_inputs

# (N, K): the layers of real models, the awkward ones kept in
SMOLLM2_135M = ((576, 576), (192, 576), (1536, 576), (576, 1536))  # K is no multiple of 128, N small
LLAMA_1B = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))
LLAMA_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # 1024x4096: k and v of grouped-query attention
LLAMA_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))
QWEN_7B = ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944))
MISTRAL_7B = LLAMA_8B
LLAMA2_7B = ((11008, 4096), (4096, 11008))


def case(M: int, N: int, K: int, r: int = 16) -> Case:
    """A layer as it is trained: bf16, float32 adapters, NF4 in blocks of 64, double quantization."""
    return Case(M, N, K, r=r, dtype=torch.bfloat16, scaling=2.0)


@functools.lru_cache(maxsize=1)
def quantized(N: int, K: int, device: torch.device) -> QuantizedWeight:
    """The weight of every case of this shape, as quantized from a bf16 model."""
    return replace(make_inputs(case(1, N, K), device=device).qw, dtype=torch.bfloat16)


@functools.lru_cache(maxsize=1)
def decoded(N: int, K: int, device: torch.device) -> Tensor:
    """The same weight in bf16, by the tests' own code."""
    return decode(quantized(N, K, device), torch.bfloat16)


@functools.lru_cache(maxsize=1)
def inputs(c: Case, device: torch.device) -> Inputs:
    """As the tests' inputs, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = c.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    A, B = normal(c.r, c.K, std=(3 * c.K) ** -0.5, dtype=c.lora_dtype), normal(c.N, c.r, std=c.w_scale, dtype=c.lora_dtype)
    return Inputs(c, normal(c.M, c.K), quantized(c.N, c.K, device), A, B, None, normal(c.M, c.N), None)


_QUICK = ((192, 576), (576, 576))


def weights(device: torch.device, quick: bool = False) -> list[tuple[int, int]]:
    """(N, K) for quantize, decode_absmax and dequantize."""
    if quick:
        return list(_QUICK)
    if device.type == "cpu":
        return [(576, 576), (1536, 576), (1024, 4096), (4096, 4096), (4096, 11008)]
    return [(576, 576), *LLAMA_1B, *LLAMA_8B, *QWEN_7B, (28672, 8192)]


def forward(device: torch.device, quick: bool = False) -> list[Case]:
    """M from one token up, LoRA included."""
    if quick:
        return [case(M, N, K) for N, K in _QUICK for M in (1, 16)]
    if device.type == "cpu":
        shapes, tokens = ((576, 576), (1536, 576), (1024, 4096), (4096, 4096), (11008, 4096)), (1, 4, 16, 128)
        return [case(M, N, K) for N, K in shapes for M in tokens] + [case(1, 4096, 4096, r) for r in (8, 64)]
    cases = [case(M, N, K) for N, K in LLAMA_8B for M in (1, 2, 4, 8, 16, 64, 256, 512)]
    cases += [case(M, N, K) for N, K in ((576, 576), *LLAMA_1B, *QWEN_7B[1:], *LLAMA_70B[2:]) for M in (1, 16)]
    return cases + [case(M, 4096, 4096, r) for r in (8, 64) for M in (1, 16)]


def train_layer(device: torch.device, quick: bool = False) -> list[Case]:
    """Forward and backward of one layer."""
    if quick:
        return [case(M, N, K) for N, K in _QUICK for M in (16, 64)]
    if device.type == "cpu":
        cases = [case(M, N, K) for N, K in ((576, 576), (1536, 576), (576, 1536)) for M in (16, 256, 1024)]
        cases += [case(M, 4096, 4096) for M in (16, 512, 2048)] + [case(512, 4096, 4096, r) for r in (8, 64)]
        return cases + [case(512, N, K) for N, K in ((1024, 4096), *LLAMA2_7B)]
    cases = [case(M, N, K) for N, K in LLAMA_8B for M in (16, 512, 1024, 2048, 4096, 8192)]
    cases += [case(M, 4096, 4096) for M in (64, 128, 256, 16384)]
    cases += [case(4096, N, K) for N, K in ((576, 576), *LLAMA_1B, *QWEN_7B[1:], (8192, 8192))]
    return cases + [case(4096, 4096, 4096, r) for r in (8, 64)]


def grid(quick: bool = False) -> list[Case]:
    """Every shape at every number of tokens, so that no favourable one can be picked."""
    if quick:
        return [case(M, N, K) for N, K in _QUICK for M in (1, 16)]
    shapes = ((4096, 4096), *LLAMA2_7B, (1024, 4096), (576, 576), (1536, 576), (49152, 576))  # the last: a small model's head
    return [case(M, N, K) for N, K in shapes for M in (1, 4, 16, 64, 128, 512, 2048)]


def memory(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [case(64, 576, 576)]
    if device.type == "cpu":
        return [case(1024, 11008, 4096)]
    return [case(M, N, K) for N, K in LLAMA_8B for M in (4096,)] + [case(8192, 14336, 4096)]


def parse(shape: str) -> Case:
    """`MxNxK` or `MxNxKxr`, as the profiler takes it."""
    try:
        sizes = [int(part) for part in shape.lower().split("x")]
        if len(sizes) not in (3, 4) or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"SHAPE must be MxNxK or MxNxKxr, such as 16x4096x4096 or 16x4096x4096x64, got {shape!r}") from None
    return replace(case(*sizes[:3]), r=sizes[3] if len(sizes) == 4 else 16)
