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

from . import backends
from .backends import FlatLayer, Layer
from .formats import BLOCKSIZE2, WEIGHT_DTYPES, QuantizedWeight, check_blocksize, check_quant_type, dtype_name

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int[] shape, str quant_type, int blocksize"
)
_LORA = "Tensor? lora_A, Tensor? lora_B, float scaling"
_DROPOUT = "float dropout_p, Tensor? seed"
_FLOATS = ", ".join(map(dtype_name, WEIGHT_DTYPES))

_library = torch.library.Library("lora_kernels", "DEF")

call = SimpleNamespace()
"""Each op as a function: `torch.ops.lora_kernels.<op>` where something traces or watches the call (torch.compile, fake tensors,
a dispatch mode), else its body at once: the dispatcher costs more than a small layer."""


def _register(schema: str, body: Callable[..., Any], fake: Callable[..., Any], weight_at: int | None = None) -> None:
    """Defines an op.  `body` and `fake` take a QuantizedWeight at position `weight_at`, the op its flat parts there."""

    def rebuilt(fn: Callable[..., Any]) -> Callable[..., Any]:
        if weight_at is None:
            return fn

        def flat(*args: Any) -> Any:
            packed, absmax, absmax2, code2, offset, shape, quant_type, blocksize = args[weight_at : weight_at + 8]
            qw = QuantizedWeight(packed, absmax, absmax2, code2, offset, tuple(shape), torch.float32, quant_type, blocksize)
            return fn(*args[:weight_at], qw, *args[weight_at + 8 :])

        return flat

    def without_autocast(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if not torch.is_autocast_enabled(first.device.type):
            return computed(*args)
        with torch.autocast(first.device.type, enabled=False):  # a body's own products are in the dtypes that it chose
            return computed(*args)

    def called(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(args[0]) not in PLAIN:
            return op(*args)
        return op(*args) if args[0].is_meta else without_autocast(*args)

    name, computed = schema.partition("(")[0], rebuilt(body)
    _library.define(schema)
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{name}", rebuilt(fake), lib=_library)
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
    check_quant_type(quant_type)
    check_blocksize(blocksize)


def _quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> tuple[Tensor, ...]:
    check_quantize(weight, quant_type, blocksize)
    parts = backends.pick(weight.device).quantize(weight.contiguous(), quant_type, blocksize, double_quant)
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
    return backends.pick(absmax.device).decode_absmax(absmax.contiguous(), absmax2.contiguous(), code2.contiguous(), offset)


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


def _dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    check_dequantize(qw, dtype)
    return backends.pick(qw.device).dequantize(qw, dtype)


def _dequantize_fake(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    check_dequantize(qw, dtype)
    return qw.packed.new_empty(qw.shape, dtype=dtype)


_register(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake, weight_at=0)


def _check_weight(qw: QuantizedWeight, device: torch.device) -> None:
    check_quant_type(qw.quant_type)
    check_blocksize(qw.blocksize)
    if qw.numel == 0:
        raise ValueError(f"weight must have at least one element, got shape {list(qw.shape)}")
    qw.check()
    for name in ("packed", "absmax", "absmax2", "code2", "offset"):
        t = getattr(qw, name)
        if t is not None and t.device != device:
            raise ValueError(f"weight.{name} must be on {device}, got {t.device}")


# ---- qlora_linear


def check_qlora_linear(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    _check_input("x", x, 1, "K", qw)
    _check_lora(x, qw, lora_A, lora_B, scaling, dropout_p, seed)
    if bias is not None:
        _check_parameter("bias", bias, (qw.shape[0],), "[N]", x)


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


def _check_lora(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, Tensor | None):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if (lora_A is None) != (lora_B is None):
        given, missing = ("lora_A", "lora_B") if lora_B is None else ("lora_B", "lora_A")
        raise ValueError(f"lora_A and lora_B must be given together, got {given} without {missing}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if lora_A is None or lora_B is None:
        if dropout_p:
            raise ValueError(f"dropout_p acts on the input of lora_A, which is None: it must be 0, got {dropout_p}")
        return
    N, K = qw.shape
    r = lora_A.shape[0] if lora_A.dim() == 2 else 0
    if r == 0:
        raise ValueError(f"lora_A must be [r, K] = [r, {K}] with r >= 1, got {list(lora_A.shape)}")
    _check_parameter("lora_A", lora_A, (r, K), "[r, K]", x)
    _check_parameter("lora_B", lora_B, (N, r), "[N, r]", x)
    if dropout_p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(f"seed must be int64 [1] on {x.device} when dropout_p > 0, got {_describe(seed)}")


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _qlora_linear(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_qlora_linear(x, qw, lora_A, lora_B, scaling, bias, dropout_p, seed)
    x_, A, B, bias = _contiguous(x, lora_A, lora_B, bias)
    return backends.pick(x.device).qlora_linear(x_, qw, A, B, scaling, bias, dropout_p, seed)


def _qlora_linear_fake(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_qlora_linear(x, qw, lora_A, lora_B, scaling, bias, dropout_p, seed)
    return x.new_empty(x.shape[0], qw.shape[0]), x.new_empty(x.shape[0], 0 if lora_A is None else lora_A.shape[0])


_register(
    f"qlora_linear(Tensor x, {_WEIGHT}, {_LORA}, Tensor? bias, {_DROPOUT}) -> (Tensor, Tensor)",
    _qlora_linear,
    _qlora_linear_fake,
    weight_at=1,
)


# ---- qlora_linear_backward


def check_qlora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> None:
    _check_input("dy", dy, 0, "N", qw)
    _check_lora(dy, qw, lora_A, lora_B, scaling, dropout_p, seed)
    if len(needs) != 4:
        raise ValueError(f"needs must be 4 flags (dx, dA, dB, dbias), got {list(needs)}")
    if (needs[1] or needs[2]) and lora_A is None:
        raise ValueError(f"needs asks for dA or dB, but lora_A is None: needs = {list(needs)}")
    M, r = dy.shape[0], 0 if lora_A is None else lora_A.shape[0]
    for name, t, need, width in (("x", x, needs[1], qw.shape[1]), ("h", h, needs[2], r)):
        if need and (t is None or tuple(t.shape) != (M, width) or t.dtype != dy.dtype or t.device != dy.device):
            raise ValueError(f"{name} must be {dtype_name(dy.dtype)} {[M, width]} on {dy.device}, got {_describe(t)}")


def _qlora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    check_qlora_linear_backward(dy, x, h, qw, lora_A, lora_B, scaling, dropout_p, seed, needs)
    dy_, x, h, A, B = _contiguous(dy, x if needs[1] else None, h if needs[2] else None, lora_A, lora_B)
    backend = backends.pick(dy.device)
    grads = backend.qlora_linear_backward(dy_, x, h, qw, A, B, scaling, dropout_p, seed, tuple(needs))
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


def _qlora_linear_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    check_qlora_linear_backward(dy, x, h, qw, lora_A, lora_B, scaling, dropout_p, seed, needs)
    N, K = qw.shape
    dbias_dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return (
        dy.new_empty((dy.shape[0], K) if needs[0] else 0),
        dy.new_empty(0) if lora_A is None or not needs[1] else lora_A.new_empty(lora_A.shape),
        dy.new_empty(0) if lora_B is None or not needs[2] else lora_B.new_empty(lora_B.shape),
        dy.new_empty(N if needs[3] else 0, dtype=dbias_dtype if needs[3] else dy.dtype),
    )


_register(
    f"qlora_linear_backward(Tensor dy, Tensor? x, Tensor? h, {_WEIGHT}, {_LORA}, {_DROPOUT}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _qlora_linear_backward,
    _qlora_linear_backward_fake,
    weight_at=3,
)


# ---- qlora_linear_group: several layers on one x

_WEIGHTS = (
    "Tensor[] packed, Tensor[] absmax, Tensor?[] absmax2, Tensor?[] code2, Tensor?[] offset, "
    "int[] N, str[] quant_type, int[] blocksize"
)
_LORAS = "Tensor?[] lora_A, Tensor?[] lora_B, float[] scaling, Tensor?[] bias, float[] dropout_p, Tensor?[] seed"


def group_args(layers: Sequence[FlatLayer]) -> list[list[Any]]:
    """The list arguments by which the group ops take `layers`."""
    lists = [list(part) for part in zip(*layers, strict=True)]
    lists[5] = [N for N, _ in lists[5]]
    return lists


def _layers(K: int, args: Sequence[Sequence[Any]]) -> list[Layer]:
    layers = []
    for packed, absmax, absmax2, code2, offset, N, quant_type, blocksize, *rest in zip(*args, strict=True):
        qw = QuantizedWeight(packed, absmax, absmax2, code2, offset, (N, K), torch.float32, quant_type, blocksize)
        A, B, scaling, bias, dropout_p, seed = rest
        layers.append((qw, *_contiguous(A, B), scaling, *_contiguous(bias), dropout_p, seed))
    return layers


def _check_group(x: Tensor, layers: list[Layer]) -> None:
    if not layers:
        raise ValueError("weights must hold at least one QuantizedWeight, got none")
    for layer in layers:
        check_qlora_linear(x, *layer)


def _qlora_linear_group(x: Tensor, *args: Any) -> list[Tensor]:
    layers = _layers(x.shape[1], args)
    _check_group(x, layers)
    ys, hs = backends.pick(x.device).qlora_linear_group(x.contiguous(), layers)
    return [*ys, *hs]


def _qlora_linear_group_fake(x: Tensor, *args: Any) -> list[Tensor]:
    layers = _layers(x.shape[1], args)
    _check_group(x, layers)
    return [x.new_empty(x.shape[0], qw.shape[0]) for qw, *_ in layers] + [
        x.new_empty(x.shape[0], 0 if A is None else A.shape[0]) for _, A, *_ in layers
    ]


_register(f"qlora_linear_group(Tensor x, {_WEIGHTS}, {_LORAS}) -> Tensor[]", _qlora_linear_group, _qlora_linear_group_fake)


def _check_group_backward(
    dys: list[Tensor], x: Tensor | None, hs: list[Tensor | None], layers: list[Layer], need_dx: bool, needs: list[bool]
) -> list[tuple[bool, bool, bool]]:
    each = [(needs[i], needs[i + 1], needs[i + 2]) for i in range(0, len(needs), 3)]
    for dy, h, (qw, A, B, scaling, _, dropout_p, seed), need in zip(dys, hs, layers, each, strict=True):
        check_qlora_linear_backward(dy, x, h, qw, A, B, scaling, dropout_p, seed, [need_dx, *need])
    return each


def _qlora_linear_group_backward(
    dys: list[Tensor], x: Tensor | None, hs: list[Tensor | None], K: int, *args: Any
) -> list[Tensor]:
    *lists, need_dx, needs = args
    layers = _layers(K, lists)
    each = _check_group_backward(dys, x, hs, layers, need_dx, needs)
    backend = backends.pick(dys[0].device)
    x, *hs = _contiguous(x, *hs)
    dx, dAs, dBs, dbiases = backend.qlora_linear_group_backward([dy.contiguous() for dy in dys], x, hs, layers, need_dx, each)
    return [dys[0].new_empty(0) if g is None else g for g in (dx, *dAs, *dBs, *dbiases)]


def _qlora_linear_group_backward_fake(
    dys: list[Tensor], x: Tensor | None, hs: list[Tensor | None], K: int, *args: Any
) -> list[Tensor]:
    *lists, need_dx, needs = args
    layers = _layers(K, lists)
    each = _check_group_backward(dys, x, hs, layers, need_dx, needs)
    parts: list[tuple[Tensor, ...]] = []
    for dy, h, (qw, A, B, scaling, _, dropout_p, seed), need in zip(dys, hs, layers, each, strict=True):
        flags = [need_dx and not parts, *need]
        parts.append(_qlora_linear_backward_fake(dy, x, h, qw, A, B, scaling, dropout_p, seed, flags))
    return [parts[0][0], *(part[i] for i in (1, 2, 3) for part in parts)]


_register(
    f"qlora_linear_group_backward(Tensor[] dy, Tensor? x, Tensor?[] h, int K, {_WEIGHTS}, {_LORAS}, bool need_dx, bool[] needs)"
    " -> Tensor[]",
    _qlora_linear_group_backward,
    _qlora_linear_group_backward_fake,
)
