"""Inputs, a float64 oracle and the error measure by which tests and benchmarks judge a backend.

The oracle shares no code with the backends: it decodes the bytes, draws the dropout mask and differentiates on its own.
A result passes if its error is at most twice that of the plain torch path at the same dtype, plus a small floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import quantize
from .formats import FORMATS, QuantizedWeight
from .layer import Layer

Results = dict[str, Tensor]
"""`y` and whichever of `dx`, `dA`, `dB`, `dbias` were asked for."""

_FP4_CODE = [i / 12 * sign + 0.0 for sign in (1, -1) for i in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


@dataclass(frozen=True)
class Case:
    """One QLoRA linear layer and its input: `x [M, K]`, `W [N, K]`, adapter of rank r (0: none).

    Attributes:
        dtype: of x, y and their gradients.
        lora_dtype: of lora_A, lora_B and bias.
        x_scale, w_scale: standard deviations of the inputs and of the weights.
    """

    M: int
    N: int
    K: int
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    bias: bool = False
    dropout: float = 0.0
    lora_dtype: torch.dtype = torch.float32
    scaling: float = 2.0
    x_scale: float = 1.0
    w_scale: float = 0.02

    @property
    def id(self) -> str:
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
        parts = [f"{self.M}x{self.N}x{self.K}", f"r{self.r}", short[self.dtype], self.quant_type, f"b{self.blocksize}"]
        parts += ["dq"] * self.double_quant + ["bias"] * self.bias + [f"p{self.dropout:g}"] * bool(self.dropout)
        parts += [f"lora-{short[self.lora_dtype]}"] * (self.lora_dtype != torch.float32)
        parts += [f"x{self.x_scale:g}"] * (self.x_scale != 1) + [f"w{self.w_scale:g}"] * (self.w_scale != 0.02)
        return "-".join(parts)


@dataclass(frozen=True)
class Inputs:
    """What a `Case` is computed on; `seed` is that of the dropout mask."""

    case: Case
    x: Tensor
    qw: QuantizedWeight
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    dy: Tensor
    seed: Tensor | None

    @property
    def layer(self) -> Layer:
        c = self.case
        return Layer.of(self.qw, self.lora_A, self.lora_B, c.scaling, self.bias, c.dropout, self.seed)


def make_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs of realistic magnitudes: lora_A as PEFT initialises it, lora_B as large as training makes it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    M, N, K, r = case.M, case.N, case.K, case.r
    dtype, lora_dtype = case.dtype, case.lora_dtype
    weight = normal(N, K, std=case.w_scale, dtype=torch.float32)
    qw = quantize(weight, case.quant_type, case.blocksize, case.double_quant)
    return Inputs(
        case,
        normal(M, K, std=case.x_scale, dtype=dtype),
        qw,
        normal(r, K, std=1 / math.sqrt(3 * K), dtype=lora_dtype) if r else None,
        normal(N, r, std=case.w_scale, dtype=lora_dtype) if r else None,
        normal(N, std=case.w_scale * case.x_scale, dtype=lora_dtype) if case.bias else None,
        normal(M, N, std=1.0, dtype=dtype),
        torch.randint(0, 2**63 - 1, (1,), generator=generator).to(device) if case.dropout else None,
    )


# ---- the oracle: own arithmetic, nothing from the backends


def decode(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: `code * absmax` in float32, rounded once; for float64 the float32 product itself."""
    code = torch.tensor(_FP4_CODE if qw.quant_type == "fp4" else FORMATS[qw.quant_type].code, dtype=torch.float32)
    packed = qw.packed.contiguous().view(torch.uint8).flatten()
    position = torch.arange(qw.numel, device=packed.device)
    nibble = torch.where(position % 2 == 0, packed[position // 2] // 16, packed[position // 2] % 16)
    absmax = qw.absmax
    if qw.absmax2 is not None:
        assert qw.code2 is not None and qw.offset is not None
        group = torch.arange(absmax.numel(), device=packed.device) // 256
        absmax = qw.code2[absmax.int()] * qw.absmax2[group]
        absmax = absmax + qw.offset
    return (code.to(packed.device)[nibble.int()] * absmax[position // qw.blocksize]).to(dtype).reshape(qw.shape)


def _mul32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, through 16-bit halves so that int64 never overflows."""
    a0, a1 = a % 65536, a // 65536
    b0, b1 = b % 65536, b // 65536
    mid = a1 * b0 + a0 * b0 // 65536
    mid2 = a0 * b1 + mid % 65536
    return a1 * b1 + mid // 65536 + mid2 // 65536, mid2 % 65536 * 65536 + a0 * b0 % 65536


def philox_words(seed: int, n: int) -> Tensor:
    """The first `n` 32-bit words of Philox 4x32-10 under the key `seed`, as int64."""
    count = torch.arange(-(n // -4), dtype=torch.int64)
    words = [count % 2**32, count // 2**32, torch.zeros_like(count), torch.zeros_like(count)]
    key0, key1 = seed % 2**32, seed // 2**32 % 2**32
    for i in range(10):
        hi0, lo0 = _mul32(words[0], 0xD2511F53)
        hi1, lo1 = _mul32(words[2], 0xCD9E8D57)
        words = [hi1 ^ words[1] ^ (key0 + i * 0x9E3779B9) % 2**32, lo1, hi0 ^ words[3] ^ (key1 + i * 0xBB67AE85) % 2**32, lo0]
    return torch.stack(words, dim=1).flatten()[:n]


def dropout_mask(inputs: Inputs) -> Tensor:
    """float64 `[M, K]`: 0 or `1 / (1 - p)`, the factor of each element of lora_A's input."""
    case = inputs.case
    if inputs.seed is None:
        return torch.ones(case.M, case.K, dtype=torch.float64, device=inputs.x.device)
    words = philox_words(int(inputs.seed.item()), case.M * case.K).view(case.M, case.K).to(inputs.x.device)
    return (words >= round(case.dropout * 2**32)).double() / (1 - case.dropout)


def _layer(inputs: Inputs, value: Callable[[Tensor], Tensor]) -> Results:
    """The formulas of the layer and of its gradients, of `value(t)` in place of each tensor t."""
    x, dy = value(inputs.x), value(inputs.dy)
    W = value(decode(inputs.qw, inputs.x.dtype))
    out = {"y": x @ W.T, "dx": dy @ W}
    if inputs.lora_A is not None and inputs.lora_B is not None:
        A, B, mask = value(inputs.lora_A), value(inputs.lora_B), value(dropout_mask(inputs))
        s = value(x.new_tensor(inputs.case.scaling))
        xd, g = x * mask, dy @ B
        out["h"] = xd @ A.T
        out["y"] = out["y"] + s * (out["h"] @ B.T)
        out["dx"] = out["dx"] + mask * (s * (g @ A))
        out["dA"], out["dB"] = s * (g.T @ xd), s * (dy.T @ out["h"])
    if inputs.bias is not None:
        out["y"] = out["y"] + value(inputs.bias)
        out["dbias"] = dy.sum(0)
    return out


def oracle(inputs: Inputs) -> Results:
    """Output and all gradients in float64, from the weight rounded to the dtype of x."""
    return _layer(inputs, lambda t: t.double())


def term_sizes(inputs: Inputs) -> Results:
    """How large each result would be if the signs of the terms it is summed of were random: the root of the sum of their
    squares.  Where terms cancel a result is smaller than that, but its rounding errors are not."""
    return {name: squares.sqrt() for name, squares in _layer(inputs, lambda t: t.double().square()).items()}


def plain(inputs: Inputs) -> Results:
    """The path without fused kernels: dequantize, matmul, two LoRA products, add, each rounded to the dtype of x."""
    dtype = inputs.x.dtype
    given = {"dx": inputs.x, "dA": inputs.lora_A, "dB": inputs.lora_B, "dbias": inputs.bias}
    leaves = {k: t.detach().clone().requires_grad_() for k, t in given.items() if t is not None}
    bias = leaves["dbias"].to(dtype) if "dbias" in leaves else None
    y = torch.nn.functional.linear(leaves["dx"], decode(inputs.qw, dtype), bias)
    out = {}
    if "dA" in leaves:
        h = torch.nn.functional.linear(leaves["dx"] * dropout_mask(inputs).to(dtype), leaves["dA"].to(dtype))
        out["h"] = h.detach()
        y = y + torch.nn.functional.linear(h, leaves["dB"].to(dtype)) * inputs.case.scaling
    y.backward(inputs.dy)
    out["y"] = y.detach()
    return out | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


# ---- the measure


def relative_error(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|` in the Frobenius norm, in float64; 0 for two zero tensors."""
    if got.numel() == 0:
        return 0.0
    norm = want.double().norm().item()
    error = (got.double() - want.double()).norm().item()
    return error / norm if norm else math.inf if error else 0.0


def max_error(got: Tensor, want: Tensor) -> float:
    """Largest `|got - want|` over largest `|want|`: one wrong element shows here, where the norm would hide it."""
    if got.numel() == 0:
        return 0.0
    scale = want.double().abs().max().item()
    error = (got.double() - want.double()).abs().max().item()
    return error / scale if scale else math.inf if error else 0.0


def error_floor(want: Tensor, dtype: torch.dtype, independent: int | None = None, terms: int = 1) -> float:
    """Relative error in the norm that results of `dtype` may have by bad luck, beyond what is usual for roundings to `dtype`.

    The norm of n independent errors of mean square s^2 exceeds s (sqrt(n) + 8) once in e^32 times, by the concentration of
    measure: relative to sqrt(n) that is 1 + 8 / sqrt(n).  Here s is the unit roundoff u of `dtype`, and that of float32 times
    sqrt(terms) for sums of so many terms, whose every addition errs by it, in whatever order (u / 8 covers that the usual
    error, of plain torch, is measured too).  Results so small that `dtype` holds them as subnormals err by their spacing.
    """
    info = torch.finfo(dtype)
    scale = want.double().square().mean().sqrt().item()
    subnormal = info.smallest_normal * info.eps / scale if scale else 0.0
    luck = 8 / math.sqrt(independent or want.numel())
    unit, sums = info.eps / 2, min(info.eps / 2, 2.0**-24) * math.sqrt(terms)
    return unit * (1 / 8 + luck) + sums * (1 + luck) + 2 * subnormal


def assert_close(
    name: str, got: Tensor, want: Tensor, base: Tensor, terms: Tensor, floor: float, factor: float = 2.0, where: str = ""
) -> None:
    """Raises AssertionError if `got` has another shape than `want`, holds NaN, or errs more, in the norm or in one element,
    than `factor` times `base` plus `floor` (relative to the terms of the sums, where they cancel)."""
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(want.shape)} {where}")
    if got.numel() == 0:
        return
    for what, p, loose in (("error", 2, 1), ("largest error", math.inf, 4)):
        error, plain_error = ((t.double() - want).norm(p).item() for t in (got, base))
        slack = loose * floor * max(terms.norm(p), want.norm(p)).item()
        if not error <= factor * plain_error + slack:  # a NaN fails
            raise AssertionError(
                f"{name}: {what} {error:.3g} against float64, plain torch errs {plain_error:.3g}, "
                f"allowed {factor:g} times that plus {slack:.2g} {where}"
            )


def assert_close_to_oracle(got: Results, inputs: Inputs, factor: float = 2.0) -> dict[str, float]:
    """Raises AssertionError if a tensor in `got` has another shape than the oracle's, holds NaN, or errs more, in the norm or
    in one element, than `factor` times the plain path plus `error_floor` (of the terms, where they cancel).  Returns the error
    of each over that of the plain path."""
    c = inputs.case
    want, base, terms = oracle(inputs), plain(inputs), term_sizes(inputs)
    ratios = {}
    for name, tensor in got.items():
        # every row of dA and dB shares the errors of g and h [M, r]
        independent = max(1, min(tensor.numel(), c.M * c.r) if name in ("dA", "dB") else tensor.numel())
        floor = error_floor(want[name], c.dtype, independent, c.M + c.N + c.K + c.r)
        assert_close(name, tensor, want[name], base[name], terms[name], floor, factor, f"({c.id})")
        if tensor.numel():
            error, plain_error = (relative_error(t, want[name]) for t in (tensor, base[name]))
            ratios[name] = error / plain_error if plain_error else math.nan
    return ratios


def assert_dx_of_group(dx: Tensor, group: Sequence[Inputs]) -> None:
    """Raises AssertionError as `assert_close_to_oracle` does, for the gradient of the x that the layers of a group share."""
    want, base, squares = (
        torch.stack([t["dx"] for t in parts]).sum(0)
        for parts in zip(*((oracle(i), plain(i), {"dx": term_sizes(i)["dx"].square()}) for i in group), strict=True)
    )
    terms = sum(i.case.M + i.case.N + i.case.K + i.case.r for i in group)
    assert_close("dx", dx, want, base, squares.sqrt(), error_floor(want, dx.dtype, max(1, dx.numel()), terms))
