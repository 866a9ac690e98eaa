"""What an op takes of a linear layer besides its input: a `Layer`, whose fields are named here and nowhere else.

The order of the fields is the order of the arguments of the registered ops and of `lora_kernels::Layer` in csrc/layer.h; the
extension tells its own, and a module that was compiled with another one is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import QuantizedWeight


class Layer(NamedTuple):
    """One linear layer, `y = x Wᵀ + scaling (dropout(x) lora_Aᵀ) lora_Bᵀ + bias`.

    Attributes:
        packed, absmax, absmax2, code2, offset, shape, quant_type, blocksize: the weight `[N, K]`, see `QuantizedWeight`.
        lora_A: `[r, K]`, or None with `lora_B` None for a layer without adapter.
        lora_B: `[N, r]`.
        scaling: of the adapter.
        bias: `[N]` or None.
        dropout_p: probability with which an element of lora_A's input is zeroed.
        seed: int64 `[1]` of the dropout mask, None where there is none or it is still to be drawn.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    quant_type: str
    blocksize: int
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def weight(self) -> QuantizedWeight:
        """The weight alone; its `dtype` is float32, because no op asks for it."""
        scales = self.absmax, self.absmax2, self.code2, self.offset
        return QuantizedWeight(self.packed, *scales, self.shape, torch.float32, self.quant_type, self.blocksize)

    @property
    def r(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields of TENSORS."""
        return tuple(getattr(self, name) for name in TENSORS)

    def with_tensors(self, tensors: Iterable[Tensor | None]) -> Layer:
        """The layer with other tensors in the fields of TENSORS."""
        given: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        return self._replace(**given)

    @classmethod
    def of(cls, weight: QuantizedWeight, *rest: Any) -> Layer:
        """A weight and the fields after it."""
        return cls(*weight.op_args(), *rest)


FIELDS = Layer._fields
make = functools.partial(tuple.__new__, Layer)
"""A layer of the tuple of all its fields, in a third of the time of `Layer(...)`, which counts in a layer with one row."""
N_WEIGHT = FIELDS.index("lora_A")
"""How many fields are the weight's."""

_SCHEMA = {
    "packed": "Tensor",
    "absmax": "Tensor",
    "absmax2": "Tensor?",
    "code2": "Tensor?",
    "offset": "Tensor?",
    "shape": "int[]",
    "quant_type": "str",
    "blocksize": "int",
    "lora_A": "Tensor?",
    "lora_B": "Tensor?",
    "scaling": "float",
    "bias": "Tensor?",
    "dropout_p": "float",
    "seed": "Tensor?",
}
"""The type of each field in the schema of an op."""
TENSORS = tuple(name for name in FIELDS if _SCHEMA[name].startswith("Tensor"))


def wants(layers: Sequence[Layer]) -> tuple[str, ...]:
    """What a backend must know to compute these layers (`lora_kernels.backends.pick`): their formats.

    A field that some backends do not compute belongs here: its name, where a layer has it.
    """
    if len(layers) == 1:
        return (str(layers[0].quant_type),)
    return tuple(dict.fromkeys(str(one.quant_type) for one in layers))


def schema(*without: str, weight_only: bool = False) -> str:
    """The arguments by which a registered op takes a layer, or its weight alone."""
    names = FIELDS[:N_WEIGHT] if weight_only else FIELDS
    return ", ".join(f"{_SCHEMA[name]} {name}" for name in names if name not in without)


def to_args(layer: Layer, *without: str) -> list[Any]:
    """The arguments of `schema(*without)`."""
    return [value for name, value in zip(FIELDS, layer, strict=True) if name not in without]


def from_args(args: Sequence[Any], *without: str) -> Layer:
    """The layer that `to_args` took apart; what was left out has its default."""
    layer = Layer(**dict(zip((name for name in FIELDS if name not in without), args, strict=True)))
    return layer._replace(shape=tuple(layer.shape))


def weight_from_args(args: Sequence[Any]) -> QuantizedWeight:
    """The weight that an op took by the arguments of `schema(weight_only=True)`."""
    return from_args(args, *FIELDS[N_WEIGHT:]).weight


def lists_schema() -> str:
    """The arguments by which a registered op takes several layers of one K: a list for each field, N in place of the shape."""
    return ", ".join("int[] N" if name == "shape" else f"{_SCHEMA[name]}[] {name}" for name in FIELDS)


def to_lists(layers: Sequence[Layer]) -> list[list[Any]]:
    """The arguments of `lists_schema`."""
    lists = [list(field) for field in zip(*layers, strict=True)]
    at = FIELDS.index("shape")
    lists[at] = [N for N, _ in lists[at]]
    return lists


def from_lists(K: int, lists: Sequence[Sequence[Any]]) -> list[Layer]:
    """The layers that `to_lists` took apart."""
    at = FIELDS.index("shape")
    shapes = [(N, K) for N in lists[at]]
    return [Layer(*fields) for fields in zip(*lists[:at], shapes, *lists[at + 1 :], strict=True)]
