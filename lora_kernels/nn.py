"""`FusedQLoRALinear`: a frozen 4-bit linear layer with LoRA adapters, a drop-in for `nn.Linear` and `bnb.nn.Linear4bit`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .autograd import dequantize, linears, quantize
from .formats import WEIGHT_DTYPES, QuantizedWeight, dtype_name
from .grouping import InputGroup, cast
from .layer import Layer, make
from .packed import SCALES, PackedWeight

if TYPE_CHECKING:
    import bitsandbytes as bnb


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter of a layer, in PEFT's terms.  Raises ValueError if a value is out of range.

    Attributes:
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA (Kalajdzievski 2023, equation 4).
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    scaling: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be an integer >= 1, got {self.r!r}")
        if not isinstance(self.lora_alpha, (int, float)) or not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        object.__setattr__(self, "scaling", self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r))


def check_compute_dtype(dtype: torch.dtype | None, name: str = "compute_dtype") -> None:
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} must be None or one of {', '.join(map(dtype_name, WEIGHT_DTYPES))}, got {dtype}")


@dataclass(frozen=True)
class MergeReport:
    """What requantization left of a merged update: with dW the update, dQ the change of the dequantized weight.

    Attributes:
        survived: `<dQ, dW> / <dW, dW>`; 1 if the whole update is in the merged weight, 0 if nothing is.
        relative_error: `|dQ - dW| / |dW|`.
    """

    survived: float
    relative_error: float


class FusedQLoRALinear(PackedWeight, nn.Module):
    """`y = x Wᵀ + scaling (dropout(x) lora_Aᵀ) lora_Bᵀ + bias` with `W [out_features, in_features]` frozen in 4 bits.

    Base weight and bias are frozen; `lora_A[name].weight [r, in_features]` (Kaiming-uniform) and
    `lora_B[name].weight [out_features, r]` (zero) are trained, as in PEFT, one adapter active at a time.  The state dict
    holds the base weight under bitsandbytes' keys and the adapters under PEFT's.

    Args:
        in_features, out_features: K and N.
        bias: add a bias `[N]`.
        r: rank of the adapter called "default"; 0 for none.
        lora_alpha: numerator of the scaling `lora_alpha / r`.
        lora_dropout: probability in [0, 1) with which elements of lora_A's input are zeroed in training.
        use_rslora: scaling `lora_alpha / sqrt(r)`.
        quant_type, blocksize, double_quant, quant_storage: see `lora_kernels.quantize`.
        compute_dtype: x is cast to it, and y back to the dtype of x; None computes in the dtype of x.
        device: where to create the layer.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it and what is accepted.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        adapter = AdapterConfig(r, lora_alpha, lora_dropout, use_rslora) if r else None
        dense = nn.Linear(in_features, out_features, bias, device)
        qw = quantize(dense.weight, quant_type, blocksize, double_quant, quant_storage)
        self._setup(qw, dense.bias, compute_dtype, adapter)

    def _setup(
        self, qw: QuantizedWeight, bias: Tensor | None, compute_dtype: torch.dtype | None, adapter: AdapterConfig | None
    ) -> None:
        check_compute_dtype(compute_dtype)
        super().__init__()
        self.out_features, self.in_features = qw.shape
        self.compute_dtype = compute_dtype
        self.set_weight(qw)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.adapters: dict[str, AdapterConfig] = {}
        self.active_adapter: str | None = None
        self.adapters_enabled = True
        self._unmerged: QuantizedWeight | None = None
        self.group: InputGroup | None = None
        if adapter is not None:
            self.add_adapter("default", adapter)

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        adapter: AdapterConfig | None = None,
        training: bool = False,
    ) -> FusedQLoRALinear:
        """A layer that shares the bytes of `qw` `[out_features, in_features]` and, if there is one, the bias.

        Args:
            adapter: of the adapter called "default"; None for none.

        Raises:
            ValueError: `compute_dtype` is out of range.
        """
        self = cls.__new__(cls)
        self._setup(qw, bias, compute_dtype, adapter)
        return self.train(training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        compute_dtype: torch.dtype | None = None,
    ) -> FusedQLoRALinear:
        """Quantizes a dense linear layer; its bias is shared.  Arguments and errors are those of the class."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        adapter = AdapterConfig(r, lora_alpha, lora_dropout, use_rslora) if r else None
        qw = quantize(linear.weight, quant_type, blocksize, double_quant, quant_storage)
        return cls.from_quantized(qw, linear.bias, compute_dtype, adapter, linear.training)

    @classmethod
    def from_bitsandbytes(
        cls,
        linear: bnb.nn.Linear4bit,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> FusedQLoRALinear:
        """Takes over a quantized `bnb.nn.Linear4bit`: bytes, scales and bias are shared, not copied.

        Args:
            compute_dtype: as in the class; None takes the layer's own.

        Raises:
            TypeError: `linear` is no `Linear4bit`.
            ValueError: the layer is not quantized yet, or bitsandbytes repacked it for CPU inference.
        """
        if not hasattr(getattr(linear, "weight", None), "quant_state"):
            raise TypeError(f"linear must be a bitsandbytes.nn.Linear4bit, got {type(linear).__name__}")
        adapter = AdapterConfig(r, lora_alpha, lora_dropout, use_rslora) if r else None
        qw = QuantizedWeight.from_bitsandbytes(linear.weight)
        return cls.from_quantized(qw, linear.bias, compute_dtype or linear.compute_dtype, adapter, linear.training)

    # ---- the layer

    def forward(self, x: Tensor) -> Tensor:
        """`x [*, in_features]` -> `[*, out_features]`."""
        y = linears(cast(x, self.compute_dtype), (self.as_layer(),))[0] if self.group is None else self.group.compute(self, x)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def as_layer(self) -> Layer:
        """The layer as it computes now, for `lora_kernels.autograd.linears`."""
        # read directly: nn.Module's attribute lookup would cost more than a small product
        parameters, buffers, name = self._parameters, self._buffers, self.active_adapter
        shape, _, quant_type, blocksize = self._weight_meta
        packed, bias = parameters["weight"], parameters["bias"]
        absmax, absmax2, code2, offset = buffers["absmax"], buffers["absmax2"], buffers["code2"], buffers["offset"]
        A = B = None
        scaling, dropout_p = 1.0, 0.0
        if name is not None and self._unmerged is None and self.adapters_enabled:
            adapter = self.adapters[name]
            A, B = self.lora_matrices(name)
            scaling, dropout_p = adapter.scaling, adapter.lora_dropout if self.training else 0.0
        weight = packed, absmax, absmax2, code2, offset, shape, quant_type, blocksize
        return make((*weight, A, B, scaling, bias, dropout_p, None))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The base weight `[out_features, in_features]` as it is now (merged or not), sharing memory with the layer."""
        return QuantizedWeight(self.weight, self.absmax, self.absmax2, self.code2, self.offset, *self._weight_meta)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The base weight `[out_features, in_features]` as it is now, in `dtype` (default: that before quantization)."""
        return dequantize(self.quantized_weight, dtype)

    @property
    def W_q(self) -> nn.Parameter:  # noqa: N802
        """The packed weight, under the name by which PEFT knows a layer that has a `dequantize`."""
        return self.weight

    def set_weight(self, qw: QuantizedWeight) -> None:
        self.weight = nn.Parameter(qw.packed.detach(), requires_grad=False)
        for name in SCALES:
            self.register_buffer(name, getattr(qw, name), persistent=False)
        self._weight_meta = (qw.shape, qw.dtype, qw.quant_type, qw.blocksize)

    def extra_repr(self) -> str:
        _, _, quant_type, blocksize = self._weight_meta
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts += [f"quant_type={quant_type}, blocksize={blocksize}, double_quant={self.absmax2 is not None}"]
        parts += [f"{name}: r={a.r}, lora_alpha={a.lora_alpha}" for name, a in self.adapters.items()]
        return ", ".join(parts)

    # ---- adapters

    def lora_matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameters `lora_A [r, in_features]` and `lora_B [out_features, r]` of an adapter."""
        modules: dict[str, Any] = self._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return A._parameters["weight"], B._parameters["weight"]

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Adds an adapter (lora_A Kaiming-uniform, lora_B zero, float32) and makes it the active one.

        Raises:
            ValueError: the name is taken, empty or has a dot in it.
        """
        if not name or "." in name:
            raise ValueError(f"adapter name must be a non-empty string without a dot, got {name!r}")
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} exists already; adapters of this layer: {', '.join(self.adapters)}")
        self.require_unmerged("add_adapter")
        factory: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": torch.float32}
        self.lora_A[name] = nn.Linear(self.in_features, config.r, **factory)
        self.lora_B[name] = nn.Linear(config.r, self.out_features, **factory)
        nn.init.zeros_(self.lora_matrices(name)[1])
        self.adapters[name] = config
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        """Makes `name` the active adapter (None: no adapter); it alone requires gradients.

        Raises:
            ValueError: there is no adapter of that name.
        """
        if name is not None:
            self._require_adapter(name)
        self.require_unmerged("set_adapter")
        self.active_adapter = name
        for matrices in (self.lora_A, self.lora_B):
            for other, matrix in matrices.items():
                matrix.requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; if it was the active one, none is active.  Raises ValueError if there is none of that name."""
        self._require_adapter(name)
        self.require_unmerged("delete_adapter")
        del self.lora_A[name], self.lora_B[name], self.adapters[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switches the active adapter's part of the output on or off."""
        self.adapters_enabled = enabled

    def _require_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}; adapters of this layer: {', '.join(self.adapters) or 'none'}")

    def require_unmerged(self, what: str) -> None:
        """Raises RuntimeError, naming `what` could not be done, if an adapter is merged."""
        if self.merged:
            raise RuntimeError(f"{what}: adapter {self.active_adapter!r} is merged into the weight; call unmerge() first")

    # ---- merging

    @property
    def merged(self) -> bool:
        """Whether the active adapter is in the 4-bit weight."""
        return self._unmerged is not None

    def _merged_weight(self) -> tuple[Tensor, Tensor]:
        """Dequantized base and update `scaling B A` of the active adapter, float32 `[out_features, in_features]`."""
        base = dequantize(self._unmerged or self.quantized_weight, torch.float32)
        if self.active_adapter is None:
            return base, torch.zeros_like(base)
        A, B = (m.detach().float() for m in self.lora_matrices(self.active_adapter))
        return base, self.adapters[self.active_adapter].scaling * (B @ A)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer, dequantized base plus the active adapter's update: the merge that loses nothing but one rounding.

        Args:
            dtype: of the dense weight and bias; None takes the dtype that the base weight had before quantization.

        Raises:
            ValueError: `dtype` is not float32, float16 or bfloat16.
        """
        check_compute_dtype(dtype, "dtype")
        dtype = dtype or self._weight_meta[1]
        base, update = self._merged_weight()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter((base + update).to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    @torch.no_grad()
    def merge(self) -> MergeReport:
        """Requantizes base plus update into 4 bits.  The original bytes are kept, so that `unmerge` is exact.

        A small update is mostly lost: most weights fall back to the code they had.  The report says how much survived;
        `to_linear` keeps it all.

        Raises:
            RuntimeError: already merged, or there is no active adapter.
            ValueError: the merged weight holds NaN or infinity; the layer is unchanged.
        """
        self.require_unmerged("merge")
        if self.active_adapter is None:
            raise RuntimeError("merge: there is no active adapter")
        original = self.quantized_weight
        base, update = self._merged_weight()
        qw = quantize(base + update, original.quant_type, original.blocksize, original.double_quant, original.quant_storage)
        change = dequantize(qw, torch.float32) - base
        self.set_weight(replace(qw, dtype=original.dtype))
        self._unmerged = original
        norm2 = update.square().sum().item()
        if norm2 == 0:
            return MergeReport(1.0, 0.0)
        return MergeReport((change * update).sum().item() / norm2, math.sqrt((change - update).square().sum().item() / norm2))

    def unmerge(self) -> None:
        """Puts the original bytes back.  Raises RuntimeError if the layer is not merged."""
        if self._unmerged is None:
            raise RuntimeError("unmerge: the layer is not merged")
        self.set_weight(self._unmerged)
        self._unmerged = None

    # ---- moving and saving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedQLoRALinear:
        """Moves everything, but casts neither the float32 scales nor packed bytes that are viewed as floats."""
        kept = {n: t for n, t in self._buffers.items() if t is not None}
        weight = self.weight.detach()  # super()._apply replaces the data of the parameter itself
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, t in kept.items():
            if self._buffers[name].dtype != t.dtype:  # type: ignore[union-attr]
                self._buffers[name] = t.to(self._buffers[name].device)  # type: ignore[union-attr]
        if self.weight.dtype != weight.dtype:
            self.weight = nn.Parameter(weight.detach().to(self.weight.device), requires_grad=False)
        if self._unmerged is not None:
            self._unmerged = self._unmerged.to(self.weight.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what earlier versions pickled too: `group` was private there, `_shortcut` led to the matrices of an adapter."""
        state = {name: value for name, value in state.items() if name not in ("_group", "_shortcut")} | {
            "group": state.get("group", state.get("_group"))
        }
        super().__setstate__(state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved = (self._unmerged or self.quantized_weight).state_dict(f"{prefix}weight")
        destination.update({k: v if keep_vars else v.detach() for k, v in saved.items()})


def _new_gated_mlp(cls: type) -> Any:
    """An object of `cls`: earlier versions pickled the MLP blocks of a grouped model as calls of this function."""
    return object.__new__(cls)
