"""bitsandbytes: its 4-bit layer with our forward, models of it turned fused in place, and our kernels under its own ops.

`FusedLinear4bit` is a `bnb.nn.Linear4bit`, parameters, state dict and all; whatever recognises that class works with it.
"""

# ruff: noqa: E402

from __future__ import annotations

from ..requirements import require

require("bitsandbytes", "lora_kernels.integrations.bitsandbytes")

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from ..autograd import dequantize, qlora_linear, quantize
from ..formats import FORMATS, QuantizedWeight, codebook
from ..packed import PackedWeight

_OURS = (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)


class FusedLinear4bit(PackedWeight, bnb.nn.Linear4bit):
    """`bnb.nn.Linear4bit` with our forward, which never repacks the weight.

    Made by `from_quantized`, or by giving this class to a quantized `Linear4bit` after `adopt` accepted it.
    """

    @classmethod
    def from_quantized(
        cls, qw: QuantizedWeight, bias: Tensor | None, compute_dtype: torch.dtype | None = None, training: bool = False
    ) -> FusedLinear4bit:
        """A layer that shares the bytes of `qw` and, if there is one, the bias."""
        out_features, in_features = qw.shape
        with torch.device("meta"):
            self = cls(in_features, out_features, bias is not None, compute_dtype, quant_storage=qw.quant_storage)
        self.set_weight(qw)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        """`x [*, in_features]` -> `[*, out_features]`, computed in `compute_dtype` if that is set, else in the dtype of x."""
        dtype, compute_dtype = x.dtype, self.fixed_compute_dtype
        y = qlora_linear(x if compute_dtype is None else x.to(compute_dtype), self.quantized_weight, bias=self.bias)
        return y if compute_dtype is None else y.to(dtype)

    @property
    def fixed_compute_dtype(self) -> torch.dtype | None:
        """The dtype to compute in, if the layer was made with one or bitsandbytes settled on one."""
        return self.compute_dtype if self.compute_type_is_set else None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight `[out_features, in_features]`, sharing memory with the layer."""
        weight = self._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if state is None:  # a sharded or replaced parameter loses it; the layer keeps it
            state = self.quant_state
        nested = state.state2
        scales2: Any = (None, None, None) if nested is None else (nested.absmax, nested.code, state.offset)
        meta: Any = (tuple(state.shape), state.dtype, state.quant_type, state.blocksize)
        return QuantizedWeight(weight, state.absmax, *scales2, *meta)  # type: ignore[arg-type]

    def fused_state(self) -> tuple[QuantizedWeight, str | None, str, str | None]:
        """Weight, adapter, what the layer computes, and why it is not fused (None: it is), for `lora_kernels.verify`."""
        return self.quantized_weight, None, "no adapter", None

    def set_weight(self, qw: QuantizedWeight) -> None:
        weight = qw.to_bitsandbytes()
        weight.module = self
        self.weight, self.quant_state, self.quant_storage = weight, weight.quant_state, qw.quant_storage

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if getattr(self.weight, "quant_state", None) is None and self.quant_state is not None:
            saved = self.quantized_weight.state_dict(f"{prefix}weight")
            destination.update({k: v if keep_vars else v.detach() for k, v in saved.items()})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantize(self.quantized_weight, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinear4bit:
        """Moves everything; a cast of the model leaves packed bytes that are held as floats alone."""
        before = self._parameters["weight"].data  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        weight = self._parameters["weight"]
        assert weight is not None
        if weight.dtype != before.dtype:
            weight.data = before.to(weight.device)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            self.quant_state = state
        elif self.quant_state is not None:
            self.quant_state.to(weight.device)
        return self


def adopt(layer: bnb.nn.Linear4bit, name: str) -> None:
    """Checks that `FusedLinear4bit` can compute with this layer and brings its scales to float32, which changes no value.

    Raises:
        ValueError: not quantized yet, repacked by bitsandbytes for CPU inference, or in a format that is not ours.
    """
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise ValueError(f"{name} is not quantized yet: move the model to its device first, which quantizes it")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name} was repacked by bitsandbytes for CPU inference, which happens in the first forward pass in eval mode and "
            "drops the double-quantized scales: load the model again and call lora_kernels.accelerate before any forward pass"
        )
    if len(state.shape) != 2 or tuple(state.shape) != (layer.out_features, layer.in_features):
        want = [layer.out_features, layer.in_features]
        raise ValueError(f"{name}: the weight must be quantized as {want} (out_features, in_features), got {list(state.shape)}")
    try:
        qw = QuantizedWeight.from_bitsandbytes((layer.weight, state))
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    state.absmax = qw.absmax
    if state.state2 is not None:
        state.state2.absmax, state.state2.code, state.offset = qw.absmax2, qw.code2, qw.offset
    layer.quant_state = state


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the layers of an existing bitsandbytes or PEFT-on-bitsandbytes model fused, in place.

    Every parameter stays the same object, so that an optimizer in use keeps working, and the state dict keeps its keys.
    Adapters that PEFT adds later are fused too.  `lora_kernels.verify` says what became of each layer.

    Args:
        model: a model with `bnb.nn.Linear4bit` layers in it, with or without PEFT around it.

    Returns:
        `model`.

    Raises:
        TypeError: not a module.
        ValueError: there is no 4-bit layer, or one can't be taken over (it is named); the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = list(model.named_modules())
    linears = {name: m for name, m in named if type(m) in _OURS}
    if not linears and not any(isinstance(m, FusedLinear4bit) for _, m in named):
        kinds = sorted({type(m).__name__ for _, m in named if "Linear" in type(m).__name__})
        raise ValueError(
            "model has no bitsandbytes 4-bit layer (bnb.nn.Linear4bit); its linear layers are "
            f"{', '.join(kinds) or 'none'}. A dense model is quantized by lora_kernels.apply_qlora"
        )
    for name, layer in linears.items():
        adopt(layer, name or "model")
    for layer in linears.values():
        layer.__class__ = FusedLinear4bit
    try:
        from . import peft
    except ImportError:
        return model
    peft.enable_peft()
    peft.take_over(model)
    return model


# ---- our kernels under bitsandbytes' ops

_library: torch.library.Library | None = None


def patched() -> bool:
    """Whether `patch_bitsandbytes` is in effect."""
    return _library is not None


def patch_bitsandbytes() -> dict[str, list[str]]:
    """Puts our kernels under bitsandbytes' own ops, so that code which does not know of us gains too.

    Replaced are `quantize_4bit`, `dequantize_4bit` and `gemm_4bit` on the CPU and, where our kernels run there, on CUDA, and
    `gemv_4bit` on CUDA (on the CPU it reads bitsandbytes' own repacked weights).  A second call changes nothing.

    Returns:
        The ops that were replaced, by device type: a device for which only the plain torch backend is there is left alone.
    """
    global _library
    replaced: dict[str, list[str]] = {}
    library = torch.library.Library("bitsandbytes", "IMPL") if _library is None else None
    for device_type in ("cpu", "cuda"):
        if device_type == "cuda" and not torch.cuda.is_available():
            continue
        if backends.picked("qlora_linear", torch.device(device_type)) == "reference":
            continue
        ops = {"quantize_4bit": _quantize_4bit, "dequantize_4bit": _dequantize_4bit, "gemm_4bit": _gemm_4bit}
        if device_type == "cuda":
            ops |= {"gemv_4bit": _gemv_4bit}
        replaced[device_type] = sorted(ops)
        if library is not None:
            for name, fn in ops.items():
                library.impl(name, fn, device_type.upper(), allow_override=True)
    if library is not None:
        _library = library
    return replaced


def unpatch_bitsandbytes() -> None:
    """Gives bitsandbytes its own kernels back.  Does nothing if they are in place."""
    global _library
    if _library is not None:
        _library._destroy()  # type: ignore[no-untyped-call]
        _library = None


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    qw = quantize(A, quant_type, blocksize, double_quant=False, quant_storage=quant_storage)
    return qw.packed, qw.absmax


def _weight(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], nested: tuple[Tensor, ...] | None = None
) -> QuantizedWeight:
    absmax2, code2, offset = nested or (None, None, None)
    scales = (
        absmax if nested else absmax.float(),
        absmax2,
        None if code2 is None else code2.float(),
        None if offset is None else offset.float().reshape(()),
    )
    return QuantizedWeight(packed.contiguous(), *scales, tuple(shape), torch.float32, quant_type, blocksize)


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return dequantize(_weight(A, absmax, blocksize, quant_type, shape), dtype)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        qw = _weight(B, absmax, blocksize, quant_type, shapeB)
    else:
        qw = _weight(B, absmax_8bit, blocksize, quant_type, shapeB, (absmax.float(), absmax_code, absmax_offset))
    return qlora_linear(A, qw, bias=bias)


_quant_types = WeakTensorKeyDictionary()
"""The quant_type of each table that `gemv_4bit` was called with: reading a table waits for its device, so it is read once."""


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    quant_type = _quant_types.get(code)
    if quant_type is None:
        quant_type = next((q for q in FORMATS if torch.equal(code.float().cpu(), codebook(q))), None)
        if quant_type is None:
            raise ValueError("gemv_4bit: code is neither the nf4 nor the fp4 table; call lora_kernels.unpatch_bitsandbytes()")
        _quant_types[code] = quant_type
    return qlora_linear(A, _weight(B, absmax, blocksize, quant_type, shapeB))
