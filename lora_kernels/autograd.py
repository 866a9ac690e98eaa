"""The public functions on quantized weights, and the gradient of the linear layer.

Forward, with `x [M, K]`, `W [N, K]` frozen, `A [r, K]`, `B [N, r]`, `s = scaling` (Hu et al. 2021, "LoRA", equation 3):

    h = dropout(x) Aᵀ            y = x Wᵀ + s h Bᵀ + bias

Backward, with `g = dy B`:

    dx = dy W + dropout(s g A)   dA = s gᵀ dropout(x)   dB = s dyᵀ h   dbias = sum dy

The weight is frozen, so it has no gradient; forward saves `h` only for dB and `x` only for dA.  Autocast, leading dimensions
and the dropout seed are settled here and nowhere else.  A backend may bring the same Function in C++
(`qlora_linear_autograd`): Python's own costs more than a small layer on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .formats import DYNAMIC_MAP, WEIGHT_DTYPES, QuantizedWeight, check_storage
from .layer import FIELDS, TENSORS, Layer, to_args, to_lists, wants
from .ops import PLAIN, check_quantize
from .ops import call as _ops


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
) -> QuantizedWeight:
    """Quantizes a weight to 4 bits, bit-identical to bitsandbytes 0.50 on a CPU.

    Args:
        weight: `[N, K]` for a linear layer, any shape otherwise; float32, float16 or bfloat16; finite.
        quant_type: `nf4` or `fp4`.
        blocksize: elements that share a scale, a power of two from 32 to 4096.
        double_quant: also quantize the scales, to 8 bits.
        quant_storage: dtype in which the packed bytes are held (uint8, bfloat16, float16 or float32).

    Raises:
        TypeError: `weight` is no floating tensor of those dtypes.
        ValueError: an option is not one of those accepted, or `weight` is empty or holds NaN or infinity.
    """
    check_quantize(weight, quant_type, blocksize)
    check_storage(quant_storage, weight.numel())
    packed, absmax, absmax2, offset = _ops.quantize(weight.detach(), quant_type, blocksize, double_quant)
    packed = packed.view(quant_storage).unsqueeze(1)
    shape, dtype = tuple(weight.shape), weight.dtype
    if not double_quant:
        return QuantizedWeight(packed, absmax, None, None, None, shape, dtype, quant_type, blocksize)
    return QuantizedWeight(
        packed, absmax, absmax2, DYNAMIC_MAP.to(weight.device, copy=True), offset, shape, dtype, quant_type, blocksize
    )


def dequantize(qw: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight `[*qw.shape]` in float32, float16 or bfloat16 (default `qw.dtype`): `code * absmax`, rounded once.

    Raises:
        TypeError: another dtype.
        ValueError: the parts of `qw` do not fit together.
    """
    return _ops.dequantize(*_weight(qw).op_args(), qw.dtype if dtype is None else dtype)


def decode_absmax(qw: QuantizedWeight) -> Tensor:
    """The scales of `qw`, float32 `[n_blocks]`: `code2[absmax] * absmax2`, rounded, `+ offset`, rounded.

    A weight without double quantization returns its `absmax` itself.
    """
    if not _weight(qw).double_quant:
        return qw.absmax
    return _ops.decode_absmax(qw.absmax, qw.absmax2, qw.code2, qw.offset)


def qlora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`y = x Wᵀ + scaling (dropout(x) lora_Aᵀ) lora_Bᵀ + bias`, differentiable in x, lora_A, lora_B and bias.

    Args:
        x: `[*, K]`, float32, float16 or bfloat16, any leading dimensions, 0 rows included.
        weight: `[N, K]`, frozen.
        lora_A: `[r, K]`, or None with `lora_B` None for the plain quantized linear.
        lora_B: `[N, r]`.  Adapters and bias may be of another floating dtype than x; their gradients come in their own.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
        bias: `[N]` or None.
        dropout_p: probability with which an element of lora_A's input is zeroed, in [0, 1).  The mask is drawn anew each call
            from torch's generator, regenerated in backward, never stored.

    Returns:
        `[*, N]` in the dtype of x; under autocast, x is first cast to the autocast dtype.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or device; the message names it and what is accepted.
    """
    return linears(x, [Layer.of(_weight(weight), lora_A, lora_B, scaling, bias, dropout_p)])[0]


def qlora_linear_group(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    lora_A: Sequence[Tensor | None] | None = None,
    lora_B: Sequence[Tensor | None] | None = None,
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
    dropout_p: Sequence[float] | None = None,
) -> list[Tensor]:
    """`qlora_linear` of several layers on one x (q, k, v; gate, up): x is read, saved and given its gradient once.

    Args:
        x: `[*, K]`.
        weights: `[N_i, K]` each.
        lora_A, lora_B, scaling, bias, dropout_p: one entry for each weight, as in `qlora_linear`; None means the default of
            that function for all of them.

    Returns:
        `[*, N_i]` for each weight.

    Raises:
        TypeError, ValueError: as in `qlora_linear`; also if a list has not one entry for each weight.
    """
    n = len(weights)
    if n == 0:
        raise ValueError("weights must hold at least one QuantizedWeight, got none")
    lists: dict[str, Sequence[Any]] = {}
    for name, value, default in (
        ("lora_A", lora_A, None),
        ("lora_B", lora_B, None),
        ("scaling", scaling, 1.0),
        ("bias", bias, None),
        ("dropout_p", dropout_p, 0.0),
    ):
        lists[name] = [default] * n if value is None else value
        if len(lists[name]) != n:
            raise ValueError(f"{name} must have one entry for each of the {n} weights, got {len(lists[name])}")
    parts = zip(weights, *lists.values(), strict=True)
    return linears(x, [Layer.of(_weight(qw), *rest) for qw, *rest in parts])


def linears(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """`qlora_linear_group` of layers in parts; a seed that is None is drawn where there is dropout."""
    if type(x) in PLAIN and not torch.compiler.is_compiling():
        device, what = x.device, wants(layers)
        backend = backends.pick("qlora_linear", device, *what)
        at_once = getattr(backend, "qlora_linear_autograd", None)
        if at_once and (not torch.is_grad_enabled() or backends.pick("qlora_linear_backward", device, *what) is backend):
            ys = at_once(x, layers)
            if ys is not None:
                return ys
    ready = []
    for one in layers:
        x = _checked_input(x, one.shape)
        seed = one.seed
        if seed is None and one.lora_A is not None and one.dropout_p:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        ready.append(one._replace(scaling=float(one.scaling), dropout_p=float(one.dropout_p), seed=seed))
    if torch.is_grad_enabled():
        return list(_QLoRALinear.apply(x, *chain(*ready)))
    return _outputs(x, ready)[0]


NO_AUTOCAST = ("meta", "lazy", "vulkan")
"""Device types without autocast, of which it can't be asked; `is_autocast_available` breaks graphs of torch.compile 2.11."""


def _checked_input(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x, in the autocast dtype under autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(shape) != 2 or x.shape[-1] != shape[1]:
        raise ValueError(f"x must have last dimension K={shape[-1]} to match weight {list(shape)}, got {list(x.shape)}")
    device_type = x.device.type
    if device_type not in NO_AUTOCAST and torch.is_autocast_enabled(device_type) and x.dtype in WEIGHT_DTYPES:
        x = x.to(torch.get_autocast_dtype(device_type))
    return x


def _outputs(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """y and h of each layer."""
    n, rows = len(layers), _rows(x)
    out = _ops.qlora_linear(rows, *layers[0]) if n == 1 else _ops.qlora_linear_group(rows, *to_lists(layers))
    return [_like(x, y) for y in out[:n]], list(out[n:])


def _rows(t: Tensor) -> Tensor:
    """`[*, n]` as `[M, n]`."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """`[M, n]` with the leading dimensions of x, and no view, which autograd would not let a model add to in place."""
    return rows if x.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, [*x.shape[:-1], rows.shape[1]])


def _weight(qw: QuantizedWeight) -> QuantizedWeight:
    if not isinstance(qw, QuantizedWeight):
        raise TypeError(f"weight must be a QuantizedWeight (see lora_kernels.quantize), got {type(qw).__name__}")
    return qw


class _QLoRALinear(torch.autograd.Function):
    """Takes x and the fields of each layer, one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *fields: Any) -> tuple[Tensor, ...]:
        n = len(FIELDS)
        layers = [Layer(*fields[i : i + n]) for i in range(0, len(fields), n)]
        ys, hs = _outputs(x, layers)
        wanted = [Layer(*ctx.needs_input_grad[1 + i : 1 + i + n]) for i in range(0, len(fields), n)]
        ctx.needs = [(bool(w.lora_A), bool(w.lora_B), bool(w.bias)) for w in wanted]
        ctx.layers = [one.with_tensors([None] * len(TENSORS)) for one in layers]
        ctx.bias_dtypes = [None if one.bias is None else one.bias.dtype for one in layers]
        tensors: list[Tensor | None] = [x if any(need_dA for need_dA, _, _ in ctx.needs) else None]
        for one, h, (_, need_dB, _) in zip(layers, hs, ctx.needs, strict=True):
            tensors += [h if need_dB else None, *one._replace(bias=None).tensors()]
        ctx.save_for_backward(*tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        each = [tensors[i : i + 1 + len(TENSORS)] for i in range(0, len(tensors), 1 + len(TENSORS))]
        hs = [h for h, *_ in each]
        layers = [one.with_tensors(saved) for one, (_, *saved) in zip(ctx.layers, each, strict=True)]
        x, rows, need_dx = None if x is None else _rows(x), [_rows(dy) for dy in dys], ctx.needs_input_grad[0]
        if len(layers) == 1:
            out = _ops.qlora_linear_backward(*rows, x, *hs, *to_args(layers[0], "bias"), [need_dx, *ctx.needs[0]])
        else:
            needs, K = list(chain(*ctx.needs)), layers[0].shape[1]
            out = _ops.qlora_linear_group_backward(rows, x, hs, K, *to_lists(layers), need_dx, needs)
        grads: list[Tensor | None] = [_like(dys[0], out[0]) if need_dx else None]
        for i, (need, bias_dtype) in enumerate(zip(ctx.needs, ctx.bias_dtypes, strict=True)):
            dA, dB, dbias = (g if needed else None for g, needed in zip(out[1 + i :: len(layers)], need, strict=True))
            grads += _gradient(dA, dB, None if dbias is None else dbias.to(bias_dtype))
        return tuple(grads)


def _gradient(dA: Tensor | None, dB: Tensor | None, dbias: Tensor | None) -> list[Tensor | None]:
    """Of each field of a layer."""
    of = {"lora_A": dA, "lora_B": dB, "bias": dbias}
    return [of.get(name) for name in FIELDS]
