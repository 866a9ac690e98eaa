"""quantize, decode_absmax and dequantize: a weight on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels import formats
from lora_kernels.backends import reference
from lora_kernels.testing import Results, decode, relative_error

from ..rivals.base import clone, need
from ..rivals.gpu import unsloth_dequantize
from ..rivals.plain import torch_decode_absmax, torch_dequantize
from ..rivals.registry import on
from ..rivals.torchao_nf4 import to_nf4
from ..suite import OURS, Contender, Line, mismatch
from . import cases


class _WeightLine(Line):
    def __init__(self, N: int, K: int, device: torch.device, quick: bool = False) -> None:
        self.N, self.K, self.device, self.quick = N, K, device, quick
        self.names = on(device, self.names)
        self.label = f"{N}x{K}"

    def shape(self) -> dict[str, Any]:
        return {"N": self.N, "K": self.K, "dtype": "bfloat16"}

    @cached_property
    def qw(self) -> lk.QuantizedWeight:
        return cases.quantized(self.N, self.K, self.device)

    def _clones(self, nbytes: int) -> list[lk.QuantizedWeight]:
        return [clone(self.qw) for _ in range(self.copies(nbytes))]


def _bnb_state(qw: lk.QuantizedWeight) -> tuple[Tensor, Any]:
    """The packed bytes and `QuantState` that bitsandbytes' functions take."""
    need("bitsandbytes")
    weight = qw.to_bitsandbytes()
    state = weight.quant_state
    state.dtype = torch.bfloat16
    return weight.data, state


# ---- quantize


class Quantize(_WeightLine):
    """bf16 weight to NF4, double-quantized.  Judged by what is lost: the error of the dequantized weight may exceed that of the
    nearest code of every element, found in float64, by 2 %."""

    suite = "quantize"
    names = (OURS, "torch", "bnb", "torchao")

    @cached_property
    def dense(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(self.N, self.K, generator=generator) * 0.02).to(torch.bfloat16).to(self.device)

    @cached_property
    def best(self) -> float:
        """Relative error of the nearest code of every element."""
        W = self.dense.double().flatten()
        blocks = torch.nn.functional.pad(W, (0, -W.numel() % 64)).view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        code = formats.codebook("nf4").double().to(self.device)
        middle = (code[:-1] + code[1:]) / 2
        nearest = code[torch.bucketize(blocks / absmax.clamp(min=1e-38), middle)] * absmax
        return relative_error(nearest.flatten()[: W.numel()], W)

    def build(self, name: str) -> Contender:
        copies = [self.dense.clone() for _ in range(self.copies(self.dense.nbytes))]
        quantize, dequantize = self._functions(name)

        def run(i: int) -> Any:
            return quantize(copies[i % len(copies)])

        return Contender(run, lambda: {"W": dequantize(run(0))}, self.dense.nbytes, len(copies), graphable=False)

    def _functions(self, name: str) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        if name == OURS:
            return lk.quantize, lambda qw: decode(qw, torch.float32)
        if name == "torch":

            def read(parts: tuple[Tensor, ...]) -> Tensor:
                code2 = formats.DYNAMIC_MAP.to(self.device)
                packed, absmax, absmax2, offset = parts
                shape = (self.N, self.K)
                return decode(
                    lk.QuantizedWeight(packed, absmax, absmax2, code2, offset, shape, torch.bfloat16, "nf4", 64), torch.float32
                )

            return lambda w: reference.quantize(w, "nf4", 64, True), read
        if name == "bnb":
            functional = need("bitsandbytes").functional
            return (
                lambda w: functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True),
                lambda pair: functional.dequantize_4bit(*pair).float(),
            )
        return to_nf4, lambda t: t.get_original_weight().float()

    def judge(self, name: str, got: Results) -> str | None:
        error = relative_error(got["W"], self.dense)
        return None if error <= 1.02 * self.best else f"error {error:.4f}, of the nearest codes {self.best:.4f}"

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        return contender.nbytes * (1 + 0.26), 0.0  # read once, a quarter and the scales written


# ---- decode_absmax


class DecodeAbsmax(_WeightLine):
    suite = "decode_absmax"
    names = (OURS, "torch", "bnb")

    def build(self, name: str) -> Contender:
        nbytes = self.qw.absmax.nbytes
        weights = self._clones(nbytes)
        if name == OURS:
            run = lambda i: lk.decode_absmax(weights[i % len(weights)])  # noqa: E731
        elif name == "torch":
            run = lambda i: torch_decode_absmax(weights[i % len(weights)])  # noqa: E731
        else:
            functional = need("bitsandbytes").functional
            states = [_bnb_state(qw)[1] for qw in weights]

            def run(i: int) -> Tensor:
                state = states[i % len(states)]
                return functional.dequantize_blockwise(state.absmax, state.state2) + state.offset

        return Contender(run, lambda: {"absmax": run(0)}, nbytes, len(weights))

    def judge(self, name: str, got: Results) -> str | None:
        qw = self.qw
        assert qw.code2 is not None and qw.absmax2 is not None and qw.offset is not None
        group = torch.arange(qw.n_blocks, device=self.device) // 256
        want = {"absmax": qw.code2.double()[qw.absmax.int()] * qw.absmax2.double()[group] + qw.offset.double()}
        return mismatch(got, want, {"absmax": torch_decode_absmax(qw)}, torch.float32, name == OURS)

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        return contender.nbytes * 5.0, 0.0


# ---- dequantize


class Dequantize(_WeightLine):
    suite = "dequantize"
    names = (OURS, "torch", "bnb", "unsloth", "torchao")

    def build(self, name: str) -> Contender:
        nbytes = self.qw.nbytes
        if name == "torchao":
            W = cases.decoded(self.N, self.K, self.device)
            tensors = [to_nf4(W.clone()) for _ in range(self.copies(nbytes))]
            run: Callable[[int], Tensor] = lambda i: tensors[i % len(tensors)].get_original_weight()  # noqa: E731
            return Contender(run, lambda: {"W": run(0)}, nbytes, len(tensors))
        weights = self._clones(nbytes)
        if name == OURS:
            run = lambda i: lk.dequantize(weights[i % len(weights)], torch.bfloat16)  # noqa: E731
        elif name == "torch":
            run = lambda i: torch_dequantize(weights[i % len(weights)], torch.bfloat16)  # noqa: E731
        elif name == "bnb":
            functional = need("bitsandbytes").functional
            pairs = [_bnb_state(qw) for qw in weights]
            run = lambda i: functional.dequantize_4bit(*pairs[i % len(pairs)])  # noqa: E731
        else:
            fast_dequantize = unsloth_dequantize()
            pairs = [_bnb_state(qw) for qw in weights]
            run = lambda i: fast_dequantize(*pairs[i % len(pairs)])  # noqa: E731
        return Contender(run, lambda: {"W": run(0)}, nbytes, len(weights))

    def judge(self, name: str, got: Results) -> str | None:
        if name == "torchao":  # it quantizes on its own, with its own table: only that it is the weight, as well as 4 bits can
            error = relative_error(got["W"], decode(self.qw, torch.float32))
            return None if error < 0.11 else f"error {error:.3f} against the weight it was given"
        want = {"W": decode(self.qw, torch.float64)}
        base = {"W": cases.decoded(self.N, self.K, self.device)}
        return mismatch(got, want, base, torch.bfloat16, name == OURS)

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        return contender.nbytes + 2.0 * self.N * self.K, 0.0


CLASSES = {"quantize": Quantize, "decode_absmax": DecodeAbsmax, "dequantize": Dequantize}


def lines(suite: str, device: torch.device, quick: bool) -> Sequence[Line]:
    return [CLASSES[suite](N, K, device, quick) for N, K in cases.weights(device, quick)]
