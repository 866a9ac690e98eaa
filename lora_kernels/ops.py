"""The contract of each op: schema, argument checks, fake output, and one body that picks the backend.

Registered as `torch.ops.lora_kernels.*`, opaque to torch.compile.  A quantized weight travels as its flat parts
(`QuantizedWeight.op_args`).  Optional results are empty tensors where they were not asked for.  No op here has a gradient:
the differentiable functions are in `autograd`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import backends, layer
from .formats import BLOCKSIZE2, WEIGHT_DTYPES, QuantizedWeight, check_blocksize, dtype_name
from .layer import Layer

_FLOATS = ", ".join(map(dtype_name, WEIGHT_DTYPES))

_library = torch.library.Library("lora_kernels", "DEF")

call = SimpleNamespace()
"""Each op as a function: `torch.ops.lora_kernels.<op>` where something traces or watches the call (torch.compile, fake tensors,
a dispatch mode), else its body at once: the dispatcher costs more than a small layer."""


def _register(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an op: what it computes, and the shapes that it gives."""

    def without_autocast(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if not torch.is_autocast_enabled(first.device.type):
            return body(*args)
        with torch.autocast(first.device.type, enabled=False):  # a body's own products are in the dtypes that it chose
            return body(*args)

    def called(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(args[0]) not in PLAIN:
            return op(*args)
        return op(*args) if args[0].is_meta else without_autocast(*args)

    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.lora_kernels, name)
    setattr(call, name, called)


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that have no say in how they are computed with."""


def _describe(t: Any) -> str:
    return f"{dtype_name(t.dtype)} {list(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)


# ---- quantize


def check_quantize(weight: Tensor, quant_type: str, blocksize: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight must be one of {_FLOATS}, got {dtype_name(weight.dtype)}")
    if weight.numel() == 0:
        raise ValueError(f"weight must have at least one element, got shape {list(weight.shape)}")
    check_blocksize(blocksize, quant_type)


def _quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> tuple[Tensor, ...]:
    check_quantize(weight, quant_type, blocksize)
    backend = backends.pick("quantize", weight.device, quant_type)
    parts = backend.quantize(weight.contiguous(), quant_type, blocksize, double_quant)
    return tuple(weight.new_empty(0, dtype=torch.float32) if t is None else t for t in parts)


def _quantize_fake(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> tuple[Tensor, ...]:
    check_quantize(weight, quant_type, blocksize)
    n_blocks = -(weight.numel() // -blocksize)
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(n_blocks, dtype=torch.uint8 if double_quant else torch.float32)
    absmax2 = weight.new_empty(-(n_blocks // -BLOCKSIZE2) if double_quant else 0, dtype=torch.float32)
    return packed, absmax, absmax2, weight.new_empty(() if double_quant else 0, dtype=torch.float32)


_register(
    "quantize(Tensor weight, str quant_type, int blocksize, bool double_quant) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)


# ---- decode_absmax


def check_decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> None:
    n2 = -(absmax.numel() // -BLOCKSIZE2)
    if absmax.dtype != torch.uint8 or absmax.dim() != 1:
        raise ValueError(f"absmax must be uint8 [n_blocks], got {_describe(absmax)}")
    for name, t, size in (("absmax2", absmax2, n2), ("code2", code2, 256), ("offset", offset, 1)):
        if t.dtype != torch.float32 or t.numel() != size or t.device != absmax.device:
            raise ValueError(f"{name} must be float32 [{size}] on {absmax.device}, got {_describe(t)}")


def _decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    check_decode_absmax(absmax, absmax2, code2, offset)
    backend = backends.pick("decode_absmax", absmax.device)
    return backend.decode_absmax(absmax.contiguous(), absmax2.contiguous(), code2.contiguous(), offset)


def _decode_absmax_fake(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    check_decode_absmax(absmax, absmax2, code2, offset)
    return torch.empty_like(absmax, dtype=torch.float32)


_register(
    "decode_absmax(Tensor absmax, Tensor absmax2, Tensor code2, Tensor offset) -> Tensor", _decode_absmax, _decode_absmax_fake
)


# ---- dequantize


def check_dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be one of {_FLOATS}, got {dtype_name(dtype)}")
    _check_weight(qw, qw.device)


def _dequantize(*args: Any) -> Tensor:
    *parts, dtype = args
    qw = layer.weight_from_args(parts)
    check_dequantize(qw, dtype)
    return backends.pick("dequantize", qw.device, qw.quant_type).dequantize(qw, dtype)


def _dequantize_fake(*args: Any) -> Tensor:
    *parts, dtype = args
    qw = layer.weight_from_args(parts)
    check_dequantize(qw, dtype)
    return qw.packed.new_empty(qw.shape, dtype=dtype)


_register(f"dequantize({layer.schema(weight_only=True)}, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake)


def _check_weight(qw: QuantizedWeight, device: torch.device) -> None:
    check_blocksize(qw.blocksize, qw.quant_type)
    if qw.numel == 0:
        raise ValueError(f"weight must have at least one element, got shape {list(qw.shape)}")
    qw.check()
    for name in ("packed", "absmax", "absmax2", "code2", "offset"):
        t = getattr(qw, name)
        if t is not None and t.device != device:
            raise ValueError(f"weight.{name} must be on {device}, got {t.device}")


# ---- qlora_linear: layers on one x


def check_qlora_linear(x: Tensor, layers: Sequence[Layer]) -> None:
    if not layers:
        raise ValueError("weights must hold at least one QuantizedWeight, got none")
    for one in layers:
        qw = one.weight
        _check_input("x", x, 1, "K", qw)
        _check_lora(x, qw, one)
        if one.bias is not None:
            _check_parameter("bias", one.bias, (qw.shape[0],), "[N]", x)


def _check_input(name: str, t: Tensor, axis: int, letter: str, qw: QuantizedWeight) -> None:
    shape = list(qw.shape)
    if len(shape) != 2:
        raise ValueError(f"weight must have shape [N, K], got {shape}")
    if t.dim() != 2 or t.shape[1] != shape[axis]:
        raise ValueError(
            f"{name} must be [M, {letter}] with {letter}={shape[axis]} to match weight {shape}, got {list(t.shape)}"
        )
    if t.dtype not in WEIGHT_DTYPES and not (t.dtype == torch.float64 and backends.forced() == "reference"):
        also = "float64 inside `with use_backend('reference')` only"
        raise TypeError(f"{name} must be one of {_FLOATS} ({also}), got {dtype_name(t.dtype)}")
    _check_weight(qw, t.device)


def _check_parameter(name: str, t: Tensor, shape: tuple[int, ...], letters: str, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {list(shape)}, got {list(t.shape)}")
    if t.dtype not in WEIGHT_DTYPES and not (t.dtype == x.dtype == torch.float64):
        raise TypeError(f"{name} must be one of {_FLOATS}, got {dtype_name(t.dtype)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the input, got {t.device}")


def _check_lora(x: Tensor, qw: QuantizedWeight, one: Layer) -> None:
    A, B, p, seed = one.lora_A, one.lora_B, one.dropout_p, one.seed
    for name, t in (("lora_A", A), ("lora_B", B)):
        if not isinstance(t, Tensor | None):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if (A is None) != (B is None):
        given, missing = ("lora_A", "lora_B") if B is None else ("lora_B", "lora_A")
        raise ValueError(f"lora_A and lora_B must be given together, got {given} without {missing}")
    if not math.isfinite(one.scaling):
        raise ValueError(f"scaling must be a finite number, got {one.scaling}")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    if A is None or B is None:
        if p:
            raise ValueError(f"dropout_p acts on the input of lora_A, which is None: it must be 0, got {p}")
        return
    N, K = qw.shape
    r = A.shape[0] if A.dim() == 2 else 0
    if r == 0:
        raise ValueError(f"lora_A must be [r, K] = [r, {K}] with r >= 1, got {list(A.shape)}")
    _check_parameter("lora_A", A, (r, K), "[r, K]", x)
    _check_parameter("lora_B", B, (N, r), "[N, r]", x)
    if p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(f"seed must be int64 [1] on {x.device} when dropout_p > 0, got {_describe(seed)}")


def _contiguous(one: Layer) -> Layer:
    """The adapter and the bias contiguous; a backend sees to the weight itself."""
    parts = one.lora_A, one.lora_B, one.bias
    if all(t is None or t.is_contiguous() for t in parts):
        return one
    A, B, bias = (None if t is None else t.contiguous() for t in parts)
    return one._replace(lora_A=A, lora_B=B, bias=bias)


def _linear(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    check_qlora_linear(x, layers)
    backend = backends.pick("qlora_linear", x.device, *layer.wants(layers))
    return backend.qlora_linear(x.contiguous(), [_contiguous(one) for one in layers])


def _linear_fake(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    check_qlora_linear(x, layers)
    return [x.new_empty(x.shape[0], one.shape[0]) for one in layers], [x.new_empty(x.shape[0], one.r) for one in layers]


def _single(linear: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def computed(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        (y,), (h,) = linear(x, [layer.from_args(args)])
        return y, h

    return computed


def _group(linear: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def computed(x: Tensor, *lists: Any) -> list[Tensor]:
        ys, hs = linear(x, layer.from_lists(x.shape[1], lists))
        return [*ys, *hs]

    return computed


_register(f"qlora_linear(Tensor x, {layer.schema()}) -> (Tensor, Tensor)", _single(_linear), _single(_linear_fake))
_register(f"qlora_linear_group(Tensor x, {layer.lists_schema()}) -> Tensor[]", _group(_linear), _group(_linear_fake))


# ---- qlora_linear_backward


def check_qlora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    needs: Sequence[tuple[bool, ...]],
) -> None:
    for dy, h, one, (need_dA, need_dB, _) in zip(dys, hs, layers, needs, strict=True):
        qw, M = one.weight, dy.shape[0]
        _check_input("dy", dy, 0, "N", qw)
        _check_lora(dy, qw, one)
        if (need_dA or need_dB) and one.lora_A is None:
            raise ValueError(f"needs asks for dA or dB, but lora_A is None: needs = {[need_dA, need_dB]}")
        for name, t, need, width in (("x", x, need_dA, qw.shape[1]), ("h", h, need_dB, one.r)):
            if need and (t is None or tuple(t.shape) != (M, width) or t.dtype != dy.dtype or t.device != dy.device):
                raise ValueError(f"{name} must be {dtype_name(dy.dtype)} {[M, width]} on {dy.device}, got {_describe(t)}")


def _backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, ...]],
) -> tuple[Tensor, ...]:
    """dx, then dA, dB and dbias of each layer, with empty tensors in the place of what is not wanted."""
    check_qlora_linear_backward(dys, x, hs, layers, needs)
    x = x.contiguous() if x is not None and any(need_dA for need_dA, _, _ in needs) else None
    hs = [h.contiguous() if h is not None and need_dB else None for h, (_, need_dB, _) in zip(hs, needs, strict=True)]
    dys, layers = [dy.contiguous() for dy in dys], [_contiguous(one) for one in layers]
    backend = backends.pick("qlora_linear_backward", dys[0].device, *layer.wants(layers))
    dx, dAs, dBs, dbiases = backend.qlora_linear_backward(dys, x, hs, layers, need_dx, needs)
    return tuple(dys[0].new_empty(0) if g is None else g for g in (dx, *dAs, *dBs, *dbiases))


def _backward_fake(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, ...]],
) -> tuple[Tensor, ...]:
    check_qlora_linear_backward(dys, x, hs, layers, needs)
    first = dys[0]
    dx = first.new_empty((first.shape[0], layers[0].shape[1]) if need_dx else 0)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

    def like(t: Tensor | None, wanted: bool) -> Tensor:
        return first.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)

    each = list(zip(layers, needs, strict=True))
    dAs = [like(one.lora_A, need_dA) for one, (need_dA, _, _) in each]
    dBs = [like(one.lora_B, need_dB) for one, (_, need_dB, _) in each]
    dbiases = [first.new_empty(one.shape[0], dtype=dtype) if need[2] else first.new_empty(0) for one, need in each]
    return dx, *dAs, *dBs, *dbiases


def _single_backward(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def computed(dy: Tensor, x: Tensor | None, h: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *fields, needs = args
        if len(needs) != 4:
            raise ValueError(f"needs must be 4 flags (dx, dA, dB, dbias), got {list(needs)}")
        return backward([dy], x, [h], [layer.from_args(fields, "bias")], needs[0], [tuple(needs[1:])])

    return computed


def _group_backward(backward: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def computed(dys: list[Tensor], x: Tensor | None, hs: list[Tensor | None], K: int, *args: Any) -> list[Tensor]:
        *lists, need_dx, needs = args
        each = [(needs[i], needs[i + 1], needs[i + 2]) for i in range(0, len(needs), 3)]
        return list(backward(dys, x, hs, layer.from_lists(K, lists), need_dx, each))

    return computed


_register(
    f"qlora_linear_backward(Tensor dy, Tensor? x, Tensor? h, {layer.schema('bias')}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _single_backward(_backward),
    _single_backward(_backward_fake),
)
_register(
    f"qlora_linear_group_backward(Tensor[] dy, Tensor? x, Tensor?[] h, int K, {layer.lists_schema()}, bool need_dx, "
    "bool[] needs) -> Tensor[]",
    _group_backward(_backward),
    _group_backward(_backward_fake),
)
