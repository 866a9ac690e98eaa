"""Every op in plain torch: the definition that the other backends are judged against.

Products are summed in float32 (float64 for float64 inputs) and rounded once at the end; runs on any device.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import BLOCKSIZE2, DYNAMIC_MAP, QuantizedWeight, codebook, format_of
from ..layer import Layer


def unavailable(device: torch.device) -> str | None:
    return None


# ---- quantize


def quantize(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`weight [*]` -> packed uint8 `[ceil(n / 2)]`, absmax `[n_blocks]` (float32, or uint8 with absmax2 and offset)."""
    if not torch.isfinite(weight).all():
        raise ValueError("weight contains NaN or infinity")
    values = weight.reshape(-1).float()
    full = values.numel() // blocksize * blocksize
    blocks = values[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1) if full else values.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)).view(-1)
    if full < values.numel():  # bitsandbytes divides in a short last block, where it multiplies by the reciprocal elsewhere
        tail = values[full:]
        tail_max = tail.abs().amax().clamp(min=1e-38)
        absmax, scaled = torch.cat([absmax, tail_max.view(1)]), torch.cat([scaled, tail / tail_max])
    form = format_of(quant_type)
    order = torch.tensor(form.order, dtype=torch.uint8, device=weight.device)
    indices = order[torch.bucketize(_pad(scaled, 2), torch.tensor(form.midpoints, device=weight.device))]
    packed = indices[::2] << 4 | indices[1::2]
    if not double_quant:
        return packed, absmax, None, None
    offset = absmax.mean()
    absmax_u8, absmax2 = _quantize_absmax(absmax - offset)
    return packed, absmax_u8, absmax2, offset


def _quantize_absmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `[n]` -> the nearest index into DYNAMIC_MAP as bitsandbytes finds it (through a table of 65536 steps of
    [-1, 1]), and one scale per 256."""
    blocks = _pad(values, BLOCKSIZE2).view(-1, BLOCKSIZE2)
    absmax2 = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax2).unsqueeze(1)
    step = (scaled.clamp(-1, 1) + 1) * 0.5
    step = (step.double() * 65535 + 0.5).float()  # one rounding, as a fused multiply-add does
    indices = _absmax_steps().to(values.device)[step.nan_to_num(0).to(torch.int64)]
    indices = torch.where(absmax2.unsqueeze(1) == 0, torch.zeros_like(indices), indices)
    return indices.view(-1)[: values.numel()].contiguous(), absmax2


@functools.cache
def _absmax_steps() -> Tensor:
    steps = torch.arange(65536, dtype=torch.float32, device="cpu") * 2 / 65535 - 1
    return torch.bucketize(steps, 0.5 * (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:])).to(torch.uint8)


def _pad(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % multiple))


# ---- dequantize


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    """uint8 `[n_blocks]` -> float32 `[n_blocks]`: `code2[absmax] * absmax2`, rounded, `+ offset`, rounded."""
    product = code2[absmax.long()] * absmax2.repeat_interleave(BLOCKSIZE2)[: absmax.numel()]
    return product + offset


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`[*shape]` in `dtype`: `code * absmax` in float32, rounded once."""
    absmax = decode_absmax(qw.absmax, qw.absmax2, qw.code2, qw.offset) if qw.double_quant else qw.absmax  # type: ignore[arg-type]
    codes = qw.codes()
    indices = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: qw.numel].long()
    values = codebook(qw.quant_type).to(codes.device)[indices]
    scales = absmax.repeat_interleave(qw.blocksize)[: qw.numel]
    return (values * scales).to(dtype).view(qw.shape)


# ---- qlora_linear


def dropout_scale(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """float32 `shape`: 0 where an element is dropped, `1 / (1 - p)` where it is kept.

    A pure function of (seed, element): Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
    with the seed as key and the flat index divided by 4 as counter; element i reads word i % 4 and is kept when that is at
    least `p * 2**32`.
    """
    low = 0xFFFFFFFF
    n = shape[0] * shape[1]
    counter = torch.arange((n + 3) // 4, dtype=torch.int64, device=seed.device)
    c0, c1 = counter & low, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], dim=1).view(-1)[:n]
    return ((words >= round(p * 2**32)).float() / (1 - p)).view(shape)


def qlora_linear(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer `y = x Wᵀ + s h Bᵀ + bias [M, N]` and `h = dropout(x) Aᵀ [M, r]`, both in x.dtype."""
    ys, hs = zip(*(_output(x, layer) for layer in layers), strict=True)
    return list(ys), list(hs)


def _output(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    acc = _accumulator(x)
    y = x.to(acc) @ dequantize(layer.weight, x.dtype).to(acc).T
    h = x.new_empty(x.shape[0], 0)
    if layer.lora_A is not None and layer.lora_B is not None:
        h_acc = _dropped(x, layer) @ layer.lora_A.to(acc).T
        y += layer.scaling * h_acc @ layer.lora_B.to(acc).T
        h = h_acc.to(x.dtype)
    if layer.bias is not None:
        y += layer.bias.to(acc)
    return y.to(x.dtype), h


def qlora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """`dx`, the sum over the layers rounded once, and `dA`, `dB`, `dbias` (float32) of each layer; `needs` says of each layer
    which of these three are wanted, the others are None.  With `g = dy B`, `dx = dy W + dropout(s g A)`,
    `dA = s gᵀ dropout(x)`, `dB = s dyᵀ h`, `dbias = sum dy`."""
    dx: Tensor | None = None
    others = []
    for dy, h, layer, need in zip(dys, hs, layers, needs, strict=True):
        part, *rest = _gradients(dy, x, h, layer, need_dx, *need)
        dx = part if dx is None or part is None else dx + part
        others.append(rest)
    dAs, dBs, dbiases = map(list, zip(*others, strict=True))
    return None if dx is None else dx.to(dys[0].dtype), dAs, dBs, dbiases


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: Layer,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, not rounded yet, dA, dB and dbias of one layer."""
    acc = _accumulator(dy)
    A, B, scaling = layer.lora_A, layer.lora_B, layer.scaling
    dy_acc = dy.to(acc)
    dx = dA = dB = None
    g = dy_acc @ B.to(acc) * scaling if B is not None and (need_dx or need_dA) else None
    if need_dx:
        dx = dy_acc @ dequantize(layer.weight, dy.dtype).to(acc)
        if g is not None and A is not None:
            dx_lora = g @ A.to(acc)
            if layer.dropout_p:
                assert layer.seed is not None
                dx_lora *= dropout_scale(layer.seed, (dx_lora.shape[0], dx_lora.shape[1]), layer.dropout_p)
            dx += dx_lora
    if need_dA:
        assert g is not None and x is not None and A is not None
        dA = (g.T @ _dropped(x, layer)).to(A.dtype)
    if need_dB:
        assert h is not None and B is not None
        dB = (scaling * dy_acc.T @ h.to(acc)).to(B.dtype)
    return dx, dA, dB, dy_acc.sum(0) if need_dbias else None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dropped(x: Tensor, layer: Layer) -> Tensor:
    """`dropout(x)` in the dtype of sums."""
    x_acc = x.to(_accumulator(x))
    if not layer.dropout_p:
        return x_acc
    assert layer.seed is not None
    return x_acc * dropout_scale(layer.seed, (x.shape[0], x.shape[1]), layer.dropout_p)
