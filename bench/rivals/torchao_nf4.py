"""torchao's NF4 tensor."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from lora_kernels.testing import Inputs

from ..suite import UnavailableError
from .base import Layer, adapter, need


def torchao_nf4() -> ModuleType:
    """The module that holds torchao's NF4 tensor; it moved between versions."""
    need("torchao")
    for path in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        try:
            return importlib.import_module(path)
        except ImportError:
            continue
    raise UnavailableError("this version of torchao has no NF4 tensor")


def to_nf4(weight: Tensor) -> Tensor:
    """torchao's tensor at its default block sizes."""
    nf4 = torchao_nf4()
    if weight.numel() % (64 * 256):
        raise UnavailableError("takes multiples of 16384 elements only")
    return nf4.to_nf4(weight, 64, 256)


def torchao(inputs: Inputs, W: Tensor) -> Layer:
    """torchao's NF4 tensor and `linear_nf4`, with the adapter as torchtune's QLoRA has it."""
    nf4 = torchao_nf4()
    weight, (A, B), s = to_nf4(W.clone()), adapter(inputs), inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        y = nf4.linear_nf4(x, weight)
        return y + (x @ A.to(x.dtype).T) @ B.to(x.dtype).T * s

    return Layer(forward, (A, B), inputs.qw.nbytes)
