"""The public functions on quantized weights, and the gradient of the linear layer.

Forward, with `x [M, K]`, `W [N, K]` frozen, `A [r, K]`, `B [N, r]`, `s = scaling` (Hu et al. 2021, "LoRA", equation 3):

    h = dropout(x) Aᵀ            y = x Wᵀ + s h Bᵀ + bias

Backward, with `g = dy B`:

    dx = dy W + dropout(s g A)   dA = s gᵀ dropout(x)   dB = s dyᵀ h   dbias = sum dy

The weight is frozen, so it has no gradient; forward saves `h` only for dB and `x` only for dA.  Autocast, leading dimensions
and the dropout seed are settled here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .formats import DYNAMIC_MAP, QuantizedWeight, check_storage
from .ops import check_quantize

_ops = torch.ops.lora_kernels


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
    _weight(weight)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have last dimension K={weight.shape[-1]} to match weight {list(weight.shape)}, got {list(x.shape)}"
        )
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(torch.get_autocast_dtype(device_type))
    seed = None
    if dropout_p and lora_A is not None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    y = _QLoRALinear.apply(
        x.reshape(-1, x.shape[-1]), lora_A, lora_B, bias, seed, float(scaling), float(dropout_p), *weight.op_args()
    )
    return y.view(*x.shape[:-1], weight.shape[0])


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
        y, h = _ops.qlora_linear(x, *weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
        _, need_dA, need_dB, _ = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_dA else None, h if need_dB else None, lora_A, lora_B, seed, *weight[:5])
        ctx.weight_meta = weight[5:]
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, h, lora_A, lora_B, seed, *weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        grads = _ops.qlora_linear_backward(
            dy, x, h, *weight, *ctx.weight_meta, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, needs
        )
        dx, dA, dB, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dx, dA, dB, dbias, *[None] * 11
