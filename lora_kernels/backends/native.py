"""The compiled backend: one call per op into `lora_kernels._C`, C++ from csrc/ for CPU tensors."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import DYNAMIC_MAP, QuantizedWeight
from . import Layer

_BUILD = "pip install --no-build-isolation -e . (needs g++)"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension, or None and the reason why it can't be used.

    Raises:
        ValueError: LORA_KERNELS_CPU_ISA names a level that this CPU does not have.
    """
    try:
        extension = importlib.import_module("lora_kernels._C")
        extension.cpu_level()
    except ModuleNotFoundError:
        return None, f"the C++ extension is not built: {_BUILD}"
    except ImportError as e:  # compiled for another torch or Python, or a shared library is missing
        return None, f"the C++ extension can't be loaded: {e}; build it again for torch {torch.__version__}: {_BUILD}"
    built, running = extension.build_info()["torch"], torch.__version__
    if built.split("+")[0] != running.split("+")[0]:
        return None, f"the C++ extension was built for torch {built}, this is torch {running}; build it again: {_BUILD}"
    return extension, None


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ extension has no code for {device.type} tensors, only for cpu"
    return _load()[1]


def _extension() -> Any:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension


def _weight(qw: QuantizedWeight) -> tuple[Any, ...]:
    return qw.codes(), qw.absmax, qw.absmax2, qw.code2, qw.offset, qw.shape, qw.quant_type, qw.blocksize


def quantize(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return _extension().quantize(weight, quant_type, blocksize, DYNAMIC_MAP if double_quant else None)


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    return _extension().decode_absmax(absmax, absmax2, code2, offset)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return _extension().dequantize(*_weight(qw), dtype)


def qlora_linear(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _extension().qlora_linear(x, *_weight(qw), lora_A, lora_B, scaling, bias, dropout_p, seed)


def qlora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return _backward(dy, x, h, (qw, lora_A, lora_B, scaling, None, dropout_p, seed), needs, None)


def _backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: Layer, needs: tuple[bool, bool, bool, bool], dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`dx`, if given, is float32 and is added to."""
    qw, lora_A, lora_B, scaling, _, dropout_p, seed = layer
    return _extension().qlora_linear_backward(dy, x, h, *_weight(qw), lora_A, lora_B, scaling, dropout_p, seed, needs, dx)


def qlora_linear_group(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    ys, hs = zip(*(qlora_linear(x, *layer) for layer in layers), strict=True)
    return list(ys), list(hs)


def qlora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    dx = None
    if need_dx:  # the sum over the layers, rounded once at the end
        dx = dys[0].new_zeros(dys[0].shape[0], layers[0][0].shape[1], dtype=torch.float32)
    others = []
    for dy, h, layer, need in zip(dys, hs, layers, needs, strict=True):
        others.append(_backward(dy, x if need[0] else None, h, layer, (need_dx, *need), dx)[1:])
    dAs, dBs, dbiases = map(list, zip(*others, strict=True))
    return None if dx is None else dx.to(dys[0].dtype), dAs, dBs, dbiases
