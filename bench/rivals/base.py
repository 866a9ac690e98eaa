"""What a rival is: a function that builds a `Layer` from the inputs of a case and the dense weight `W`.

`W` is the dequantized weight: all contenders hold the same numbers.  A rival raises UnavailableError if its package is missing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import Inputs

from ..suite import UnavailableError


def need(package: str) -> ModuleType:
    """The imported package.  Raises UnavailableError where it can't be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        missing = not isinstance(e, ModuleNotFoundError) or e.name != package
        raise UnavailableError(f"not usable: {e}" if missing else "not installed") from None
    except Exception as e:  # a package that wants a GPU at import
        raise UnavailableError(f"not usable: {type(e).__name__}: {e}") from None


@dataclass
class Layer:
    """One copy of a contender's layer.

    Attributes:
        forward: `x [M, K]` -> `[M, N]`, differentiable.
        leaves: lora_A and lora_B, or nothing for a layer without adapter.
        nbytes: of the frozen weight as stored.
    """

    forward: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...] = ()
    nbytes: int = 0


def adapter(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Leaves of its own, lora_A and lora_B, with the values of the case."""
    assert inputs.lora_A is not None and inputs.lora_B is not None
    return inputs.lora_A.detach().clone().requires_grad_(), inputs.lora_B.detach().clone().requires_grad_()


def set_adapter(matrices: tuple[Tensor, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Gives the matrices of a finished layer the values of the case."""
    for matrix, value in zip(matrices, adapter(inputs), strict=True):
        matrix.data.copy_(value)
    return matrices


def frozen_linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def clone(qw: lk.QuantizedWeight) -> lk.QuantizedWeight:
    return copy.deepcopy(qw)
