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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .backends import Layer
from .formats import DYNAMIC_MAP, WEIGHT_DTYPES, QuantizedWeight, check_storage
from .ops import PLAIN, check_quantize, group_args
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
    x = _checked_input(x, weight)
    seed, scaling, dropout_p = _seed(x, lora_A, dropout_p), float(scaling), float(dropout_p)
    if type(x) in PLAIN and not torch.compiler.is_compiling():
        whole = getattr(backends.pick(x.device), "qlora_linear_autograd", None)
        y = whole and whole(x, *weight.op_args(), lora_A, lora_B, scaling, bias, dropout_p, seed)
        if y is not None:
            return y
    if torch.is_grad_enabled():
        return _QLoRALinear.apply(x, lora_A, lora_B, bias, seed, scaling, dropout_p, *weight.op_args())
    y, _ = _ops.qlora_linear(_rows(x), *weight.op_args(), lora_A, lora_B, scaling, bias, dropout_p, seed)
    return _like(x, y)


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
    layers = []
    for qw, A, B, s, b, p in zip(weights, *lists.values(), strict=True):
        x = _checked_input(x, qw)
        layers.append((qw, A, B, float(s), b, float(p), _seed(x, A, p)))
    tensors = [t for qw, A, B, _, b, _, seed in layers for t in (A, B, b, seed, *qw.op_args()[:5])]
    meta = [(qw.shape, qw.quant_type, qw.blocksize, s, p) for qw, _, _, s, _, p, _ in layers]
    return list(_QLoRALinearGroup.apply(x, meta, *tensors))


def _checked_input(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x, in the autocast dtype under autocast."""
    _weight(weight)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have last dimension K={weight.shape[-1]} to match weight {list(weight.shape)}, got {list(x.shape)}"
        )
    device_type = x.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)  # never on "meta"
    if autocast and x.dtype in WEIGHT_DTYPES:
        x = x.to(torch.get_autocast_dtype(device_type))
    return x


def _rows(t: Tensor) -> Tensor:
    """`[*, n]` as `[M, n]`."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """`[M, n]` with the leading dimensions of x, and no view, which autograd would not let a model add to in place."""
    return rows if x.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, [*x.shape[:-1], rows.shape[1]])


def _seed(x: Tensor, lora_A: Tensor | None, dropout_p: float) -> Tensor | None:
    """A fresh seed for the dropout mask where there is one."""
    if not dropout_p or lora_A is None:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _weight(qw: QuantizedWeight) -> QuantizedWeight:
    if not isinstance(qw, QuantizedWeight):
        raise TypeError(f"weight must be a QuantizedWeight (see lora_kernels.quantize), got {type(qw).__name__}")
    return qw


class _QLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        *weight: Any,
    ) -> Tensor:
        y, h = _ops.qlora_linear(_rows(x), *weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
        _, need_dA, need_dB, _ = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_dA else None, h if need_dB else None, lora_A, lora_B, seed, *weight[:5])
        ctx.weight_meta = weight[5:]
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, h, lora_A, lora_B, seed, *weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        x = None if x is None else _rows(x)
        lora = (lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
        grads = _ops.qlora_linear_backward(_rows(dy), x, h, *weight, *ctx.weight_meta, *lora, needs)
        dx, dA, dB, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
        dx = None if dx is None else _like(dy, dx)
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dx, dA, dB, dbias, *[None] * 11


class _QLoRALinearGroup(torch.autograd.Function):
    """`tensors` are 9 for each layer: lora_A, lora_B, bias, seed, and the five of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: list[tuple[Any, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = _group_layers(meta, tensors)
        out = _ops.qlora_linear_group(_rows(x), *group_args(layers))
        ys, hs = out[: len(meta)], out[len(meta) :]
        needs = [ctx.needs_input_grad[2 + 9 * i : 5 + 9 * i] for i in range(len(meta))]
        hs = [h if need[1] else None for h, need in zip(hs, needs, strict=True)]
        ctx.save_for_backward(x if any(need[0] for need in needs) else None, *hs, *tensors)
        ctx.meta, ctx.needs, ctx.K = meta, needs, x.shape[-1]
        return tuple(_like(x, y) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        n = len(ctx.meta)
        x, *rest = ctx.saved_tensors
        hs, tensors = rest[:n], rest[n:]
        layers = _group_layers(ctx.meta, tensors)
        need_dx, needs = ctx.needs_input_grad[0], [flag for need in ctx.needs for flag in need]
        x, rows = None if x is None else _rows(x), [_rows(dy) for dy in dys]
        dx, *grads = _ops.qlora_linear_group_backward(rows, x, hs, ctx.K, *group_args(layers), need_dx, needs)
        out: list[Tensor | None] = []
        for i, need in enumerate(ctx.needs):
            dA, dB, dbias = (grads[j * n + i] if need[j] else None for j in range(3))
            out += [dA, dB, None if dbias is None else dbias.to(tensors[9 * i + 2].dtype), *[None] * 6]
        return _like(dys[0], dx) if need_dx else None, None, *out


def _group_layers(meta: list[tuple[Any, ...]], tensors: Sequence[Tensor | None]) -> list[Layer]:
    layers = []
    for i, (shape, quant_type, blocksize, scaling, dropout_p) in enumerate(meta):
        A, B, bias, seed, packed, absmax, absmax2, code2, offset = tensors[9 * i : 9 * i + 9]
        assert packed is not None and absmax is not None
        qw = QuantizedWeight(packed, absmax, absmax2, code2, offset, shape, torch.float32, quant_type, blocksize)
        layers.append((qw, A, B, scaling, bias, dropout_p, seed))
    return layers
