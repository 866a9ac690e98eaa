"""What a 4-bit quantized weight is: the codebooks, `QuantizedWeight`, and bitsandbytes' way of storing it.

The bytes are bitsandbytes' (0.50): two 4-bit codes a byte, the first element in the high nibble; one scale (`absmax`) for
each block of `blocksize` elements of the flattened row-major weight; with double quantization `absmax` is itself a byte, an
index into a 256-entry map `code2`, scaled by one float32 `absmax2` per 256 blocks and shifted by one `offset`
(Dettmers et al. 2023, "QLoRA", section 3).  The last block may be short and the number of elements odd.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import bitsandbytes as bnb

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZE2 = 256
"""Blocks that share one second-level scale."""
_TENSORS = ("packed", "absmax", "absmax2", "code2", "offset")
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _float32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _dynamic_map() -> Tensor:
    """The signed 8-bit dynamic type of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization", section 2.1):
    seven decades, the decade 10^(i-6) split into 2^i equal steps, plus 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-v for v in means]
    return _float32(sorted(values))


@dataclass(frozen=True)
class Format:
    """How the elements of a block are written, `bits` each, as indices into a table of values.

    Attributes:
        code: the value of each index, exact in float32, between -1 and 1.
        bits: of an index; a byte holds as many as fit, the first in its highest bits.
        blocksizes: numbers of elements that may share a scale.
    """

    code: tuple[float, ...]
    bits: int = 4
    blocksizes: tuple[int, ...] = BLOCKSIZES

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits must be 4, got {self.bits}")
        if len(self.code) != 1 << self.bits or not all(-1 <= v <= 1 for v in self.code):
            raise ValueError(f"code must be {1 << self.bits} values between -1 and 1, got {self.code}")
        if self.table.tolist() != list(self.code):
            raise ValueError("code must be values of float32")

    @cached_property
    def table(self) -> Tensor:
        """`code`, float32 on the CPU."""
        return _float32(list(self.code))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The indices by ascending value; of equal values the smaller index first."""
        return tuple(sorted(range(len(self.code)), key=self.code.__getitem__))

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """Float32 numbers halfway between neighbouring values: how many are below an element is its place in `order`."""
        ascending = self.table[list(self.order)]
        return tuple(((ascending[:-1] + ascending[1:]) / 2).tolist())


FORMATS = {
    # quantiles of the standard normal distribution (QLoRA, appendix E)
    "nf4": Format(
        (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        )
    ),
    # one sign, two exponent and one mantissa bit, scaled to [-1, 1]
    "fp4": Format(tuple((_float32([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12).tolist())),
}
"""Every `quant_type`: a format is added here, and every backend computes with it."""

DYNAMIC_MAP = _dynamic_map()
"""The 256-entry map of double-quantized scales."""


def codebook(quant_type: str) -> Tensor:
    """The float32 [16] value of each 4-bit index of `quant_type`, on the CPU."""
    return format_of(quant_type).table


def format_of(quant_type: str) -> Format:
    """Raises ValueError where there is no format of that name."""
    if not isinstance(quant_type, str) or quant_type not in FORMATS:
        raise ValueError(f"quant_type must be one of {', '.join(FORMATS)}, got {quant_type!r}")
    return FORMATS[quant_type]


def check_quant_type(quant_type: str) -> str:
    format_of(quant_type)
    return quant_type


def check_blocksize(blocksize: int, quant_type: str) -> int:
    accepted = format_of(quant_type).blocksizes
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize not in accepted:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, accepted))}, got {blocksize!r}")
    return blocksize


def check_storage(quant_storage: torch.dtype, numel: int) -> torch.dtype:
    """`quant_storage` if a weight of `numel` elements can be held in it: its bytes must fill whole storage elements."""
    if quant_storage not in STORAGE_DTYPES:
        raise ValueError(f"quant_storage must be one of {_names(STORAGE_DTYPES)}, got {quant_storage}")
    if (numel + 1) // 2 % quant_storage.itemsize:
        raise ValueError(
            f"quant_storage {dtype_name(quant_storage)} holds {quant_storage.itemsize} bytes an element, which does not divide "
            f"the {(numel + 1) // 2} packed bytes of a weight of {numel} elements; use quant_storage=torch.uint8"
        )
    return quant_storage


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(dtype_name, dtypes))


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen 4-bit weight: packed codes, their scales, and what is needed to read them.

    Attributes:
        packed: the codes, two a byte, any shape; uint8, or the same bytes viewed in another `quant_storage` dtype.
        absmax: `[n_blocks]` float32, or uint8 indices into `code2` when double-quantized.
        absmax2: `[ceil(n_blocks / 256)]` float32, second-level scales, or None.
        code2: `[256]` float32, the map that double-quantized `absmax` indexes, or None.
        offset: `[]` float32, mean of the scales, or None.
        shape: shape of the weight, `(N, K)` for a linear layer.
        dtype: dtype of the weight before quantization, and the default of `dequantize`.
        quant_type: `nf4` or `fp4`.
        blocksize: elements a scale.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str
    blocksize: int

    @property
    def double_quant(self) -> bool:
        return self.absmax2 is not None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def n_blocks(self) -> int:
        return -(self.numel // -self.blocksize)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def quant_storage(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and all scales."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / self.numel

    def codes(self) -> Tensor:
        """The packed bytes, uint8 `[ceil(numel / 2)]`, sharing memory with `packed`."""
        return self.packed.reshape(-1).view(torch.uint8)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[*shape]` in `dtype` (default: `self.dtype`)."""
        return torch.ops.lora_kernels.dequantize(*self.op_args(), self.dtype if dtype is None else dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on `device`."""
        return replace(self, **{n: t.to(device) for n in _TENSORS if (t := getattr(self, n)) is not None})

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.absmax, self.absmax2, self.code2, self.offset

    def op_args(self) -> tuple[Any, ...]:
        """The flat arguments by which the ops of `lora_kernels.ops` take a weight; `dtype` is not among them."""
        return *self.tensors(), self.shape, self.quant_type, self.blocksize

    # ---- bitsandbytes

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors bitsandbytes writes to a checkpoint for a weight called `prefix`."""
        meta: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        meta |= {"dtype": dtype_name(self.dtype), "shape": list(self.shape)}
        out = {prefix: self.packed, f"{prefix}.absmax": self.absmax}
        out[f"{prefix}.quant_map"] = codebook(self.quant_type).to(self.device, copy=True)
        if self.double_quant:
            assert self.absmax2 is not None and self.code2 is not None and self.offset is not None
            out[f"{prefix}.nested_absmax"] = self.absmax2
            out[f"{prefix}.nested_quant_map"] = self.code2.clone()
            meta |= {"nested_blocksize": BLOCKSIZE2, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        blob = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        out[f"{prefix}.quant_state.bitsandbytes__{self.quant_type}"] = blob.to(self.device)
        return out

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], prefix: str = "weight") -> QuantizedWeight:
        """Reads what `state_dict` or bitsandbytes wrote; the codes and scales share memory with `sd`.

        Raises:
            KeyError: a tensor is missing from `sd`.
            ValueError: a tensor has a wrong size, or the format is not one that lora_kernels computes with.
        """
        blob = [f"{prefix}.quant_state.bitsandbytes__{q}" for q in FORMATS]
        found = [k for k in blob if k in sd]
        if not found:
            raise KeyError(
                f"{prefix} has no {' or '.join(blob)}: it is not a 4-bit weight saved by bitsandbytes or lora_kernels"
            )
        try:
            meta = json.loads(bytes(sd[found[0]].tolist()))
        except ValueError as e:
            raise ValueError(f"{found[0]} is damaged: {e}") from None
        if not isinstance(meta, dict):
            raise ValueError(f"{found[0]} is damaged: it is no JSON object")
        if lacking := [name for name in ("blocksize", "dtype", "quant_type", "shape") if name not in meta]:
            raise ValueError(f"{found[0]} is damaged: it has no {', '.join(lacking)}")

        def get(name: str) -> Tensor:
            key = f"{prefix}.{name}" if name else prefix
            if key not in sd:
                raise KeyError(f"{key} is missing: the 4-bit weight {prefix} was saved incompletely")
            return sd[key]

        nested = "nested_blocksize" in meta
        if nested and meta["nested_blocksize"] != BLOCKSIZE2:
            raise ValueError(f"{prefix}: nested_blocksize must be {BLOCKSIZE2}, got {meta['nested_blocksize']}")
        packed = get("")
        return cls._checked(
            prefix,
            packed,
            get("absmax"),
            get("nested_absmax") if nested else None,
            get("nested_quant_map") if nested else None,
            torch.tensor(meta["nested_offset"], dtype=torch.float32, device=packed.device) if nested else None,
            meta["shape"],
            getattr(torch, meta["dtype"], None),
            meta["quant_type"],
            meta["blocksize"],
            get("quant_map"),
        )

    @classmethod
    def from_bitsandbytes(cls, weight: bnb.nn.Params4bit | tuple[Tensor, bnb.functional.QuantState]) -> QuantizedWeight:
        """The bytes of a `bnb.nn.Params4bit`, or of the pair that `bnb.functional.quantize_4bit` returns; shared, not copied.

        Raises:
            ValueError: not quantized yet, or repacked by bitsandbytes for CPU inference.
        """
        packed, state = weight if isinstance(weight, tuple) else (weight, getattr(weight, "quant_state", None))
        if state is None:
            raise ValueError("weight is a Params4bit that is not quantized yet: move its layer to a device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "weight was repacked by bitsandbytes for CPU inference, which drops its double-quantized scales: "
                "convert the layer before its first forward pass in eval mode"
            )
        s2 = state.state2
        if s2 is not None and s2.blocksize != BLOCKSIZE2:
            raise ValueError(f"weight: second-level blocksize must be {BLOCKSIZE2}, got {s2.blocksize}")
        return cls._checked(
            "weight",
            packed.data,
            state.absmax,
            s2.absmax if s2 else None,
            s2.code if s2 else None,
            state.offset if s2 else None,
            state.shape,
            state.dtype,
            state.quant_type,
            state.blocksize,
            state.code,
        )

    def to_bitsandbytes(self) -> bnb.nn.Params4bit:
        """The same bytes as a `bnb.nn.Params4bit`, ready to be the `weight` of a `bnb.nn.Linear4bit`."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        nested = None
        if self.double_quant:
            nested = QuantState(absmax=self.absmax2, code=self.code2, blocksize=BLOCKSIZE2, dtype=torch.float32)
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=codebook(self.quant_type).to(self.device, copy=True),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset,
            state2=nested,
        )
        return Params4bit(
            self.packed.reshape(-1, 1),
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=self.packed.dtype,
            bnb_quantized=True,
        )

    @classmethod
    def _checked(
        cls,
        name: str,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        code2: Tensor | None,
        offset: Tensor | None,
        shape: Any,
        dtype: torch.dtype | None,
        quant_type: str,
        blocksize: int,
        quant_map: Tensor | None,
    ) -> QuantizedWeight:
        """A weight from tensors of unknown origin: scales brought to float32, every size and table checked."""
        check_blocksize(blocksize, quant_type)
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name}: dtype must be one of {_names(WEIGHT_DTYPES)}, got {dtype}")
        if packed.dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"{name}: packed bytes must be stored as one of {_names(STORAGE_DTYPES)}, got {dtype_name(packed.dtype)}"
            )
        if quant_map is not None and not quant_map.is_meta and not torch.equal(quant_map.float().cpu(), codebook(quant_type)):
            raise ValueError(f"{name}: quant_map is not the {quant_type} table of bitsandbytes 0.50")
        qw = cls(
            packed,
            absmax if absmax2 is not None else absmax.float(),
            None if absmax2 is None else absmax2.float(),
            None if code2 is None else code2.float(),
            None if offset is None else offset.float().reshape(()),
            tuple(int(n) for n in shape),
            dtype,
            quant_type,
            blocksize,
        )
        qw.check(name)
        return qw

    def check(self, name: str = "weight") -> None:
        """Raises ValueError if the tensors do not have the sizes and dtypes that `shape` and `blocksize` ask for."""
        numel, n_blocks = self.numel, self.n_blocks
        want_bytes = (numel + 1) // 2
        nbytes = self.packed.numel() * self.packed.element_size()  # Tensor.nbytes fails on symbolic sizes
        if nbytes != want_bytes:
            raise ValueError(f"{name}: packed must hold {want_bytes} bytes for shape {list(self.shape)}, got {nbytes}")
        want = torch.uint8 if self.double_quant else torch.float32
        if self.absmax.dtype != want or self.absmax.numel() != n_blocks:
            raise ValueError(
                f"{name}: absmax must be {dtype_name(want)} [{n_blocks}] for shape {list(self.shape)} in blocks of "
                f"{self.blocksize}, got {dtype_name(self.absmax.dtype)} {list(self.absmax.shape)}"
            )
        if self.double_quant:
            for field, size in (("absmax2", -(n_blocks // -BLOCKSIZE2)), ("code2", 256), ("offset", 1)):
                t = getattr(self, field)
                if t is None or t.dtype != torch.float32 or t.numel() != size:
                    got = None if t is None else f"{dtype_name(t.dtype)} {list(t.shape)}"
                    raise ValueError(f"{name}: {field} must be float32 [{size}] in a double-quantized weight, got {got}")


def _flatten(qw: QuantizedWeight) -> tuple[list[Tensor | None], Any]:
    return list(qw.tensors()), (qw.shape, qw.dtype, qw.quant_type, qw.blocksize)


pytree.register_pytree_node(
    QuantizedWeight,
    _flatten,
    lambda tensors, meta: QuantizedWeight(*tensors, *meta),
    serialized_type_name="lora_kernels.QuantizedWeight",
)
