"""`FusedQLoRALinear`: a frozen 4-bit linear layer with LoRA adapters, a drop-in for `nn.Linear` and `bnb.nn.Linear4bit`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .autograd import dequantize, linears, quantize
from .backends import FlatLayer
from .formats import WEIGHT_DTYPES, QuantizedWeight, dtype_name

if TYPE_CHECKING:
    import bitsandbytes as bnb

_SCALES = ("absmax", "absmax2", "code2", "offset")


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


class PackedWeight:
    """A layer whose `weight` is packed bytes and comes, in a state dict, with its scales under bitsandbytes' keys."""

    out_features: int
    in_features: int
    weight: nn.Parameter
    _unmerged: QuantizedWeight | None = None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        raise NotImplementedError

    def _set_weight(self, qw: QuantizedWeight) -> None:
        raise NotImplementedError

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint, which looks up each part of a key as an attribute."""
        return {"weight": "_weight_keys"}

    @property
    def _weight_keys(self) -> _Keys:
        return _Keys()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        own = {k: v for k, v in state_dict.items() if k == key or k.startswith(f"{key}.")}
        rest = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in own}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)  # type: ignore[misc]
        missing_keys += [k for k in missing if k != key or key not in own]
        if key not in own:
            return
        weight = self.weight
        if hasattr(weight, "device_mesh") and len(own) == 1:  # a process that gets its scales from another one
            if local_metadata.get("assign_to_params_buffers", False):
                self.weight = nn.Parameter(own[key], requires_grad=False)
            else:
                weight.detach().copy_(own[key])
            return
        try:
            qw = QuantizedWeight.from_state_dict(own, key)
        except (KeyError, ValueError) as e:
            error_msgs.append(e.args[0])
            return
        if qw.shape != (self.out_features, self.in_features):
            error_msgs.append(f"{key}: shape must be {[self.out_features, self.in_features]}, got {list(qw.shape)}")
            return
        self._unmerged = None
        if local_metadata.get("assign_to_params_buffers", False):
            self._set_weight(qw)
        elif hasattr(weight, "device_mesh"):  # sharded: the parameter must stay the same object
            weight.detach().copy_(qw.packed)
            scales = self.quantized_weight
            for name in _SCALES:
                if (t := getattr(scales, name)) is not None:
                    t.copy_(getattr(qw, name))
        else:
            here = qw.to(self.weight.device)
            self._set_weight(
                replace(here, **{n: t.clone() for n in ("packed", *_SCALES) if (t := getattr(here, n)) is not None})
            )


class _Keys:
    """Has every attribute: it stands for the entries of a state dict that belong to a packed weight."""

    def __getattr__(self, name: str) -> _Keys:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


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
        self._set_weight(qw)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.adapters: dict[str, AdapterConfig] = {}
        self.active_adapter: str | None = None
        self._shortcut: tuple[Any, ...] | None = None
        self.adapters_enabled = True
        self._unmerged: QuantizedWeight | None = None
        self._group: InputGroup | None = None
        if adapter is not None:
            self.add_adapter("default", adapter)

    @classmethod
    def _build(
        cls,
        qw: QuantizedWeight,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None,
        adapter: AdapterConfig | None,
        training: bool,
    ) -> FusedQLoRALinear:
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
        return cls._build(qw, linear.bias, compute_dtype, adapter, linear.training)

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
        return cls._build(qw, linear.bias, compute_dtype or linear.compute_dtype, adapter, linear.training)

    # ---- the layer

    def forward(self, x: Tensor) -> Tensor:
        """`x [*, in_features]` -> `[*, out_features]`."""
        y = linears(_cast(x, self.compute_dtype), (self._parts(),))[0] if self._group is None else self._group.compute(self, x)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def _parts(self) -> FlatLayer:
        # the dictionaries are read directly: nn.Module's attribute lookup would cost more than a small product
        parameters, buffers, name = self._parameters, self._buffers, self.active_adapter
        shape, _, quant_type, blocksize = self._weight_meta
        scales = buffers["absmax"], buffers["absmax2"], buffers["code2"], buffers["offset"]
        weight = parameters["weight"], *scales, shape, quant_type, blocksize
        if name is None or self._unmerged is not None or not self.adapters_enabled:
            return *weight, None, None, 1.0, parameters["bias"], 0.0, None
        adapter = self.adapters[name]
        A, B = self.lora_matrices(name)
        dropout_p = adapter.lora_dropout if self.training else 0.0
        return *weight, A, B, adapter.scaling, parameters["bias"], dropout_p, None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The base weight `[out_features, in_features]` as it is now (merged or not), sharing memory with the layer."""
        packed, absmax, absmax2, code2, offset = self._parts()[:5]
        return QuantizedWeight(packed, absmax, absmax2, code2, offset, *self._weight_meta)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The base weight `[out_features, in_features]` as it is now, in `dtype` (default: that before quantization)."""
        return dequantize(self.quantized_weight, dtype)

    @property
    def W_q(self) -> nn.Parameter:  # noqa: N802
        """The packed weight, under the name by which PEFT knows a layer that has a `dequantize`."""
        return self.weight

    def _set_weight(self, qw: QuantizedWeight) -> None:
        self.weight = nn.Parameter(qw.packed.detach(), requires_grad=False)
        for name in _SCALES:
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
        if self._shortcut is not None:
            of_A, A, parameters_A, of_B, B, parameters_B = self._shortcut
            if of_A.get(name) is A and of_B.get(name) is B:
                return parameters_A["weight"], parameters_B["weight"]
        modules: dict[str, Any] = self._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return A._parameters["weight"], B._parameters["weight"]

    def _find_shortcut(self) -> None:
        """To the matrices of the active adapter: the dictionaries at the end of the way through three nn.Modules, which takes
        3 % of the time in which SmolLM2-135M decodes a token."""
        self._shortcut = None
        if (name := self.active_adapter) is not None:
            A, B = self.lora_A[name], self.lora_B[name]
            self._shortcut = self.lora_A._modules, A, A._parameters, self.lora_B._modules, B, B._parameters

    def _replicate_for_data_parallel(self) -> FusedQLoRALinear:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._shortcut = None  # it leads to the matrices of the original
        return replica

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
        self._find_shortcut()
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
            self._find_shortcut()

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
        self._set_weight(replace(qw, dtype=original.dtype))
        self._unmerged = original
        norm2 = update.square().sum().item()
        if norm2 == 0:
            return MergeReport(1.0, 0.0)
        return MergeReport((change * update).sum().item() / norm2, math.sqrt((change - update).square().sum().item() / norm2))

    def unmerge(self) -> None:
        """Puts the original bytes back.  Raises RuntimeError if the layer is not merged."""
        if self._unmerged is None:
            raise RuntimeError("unmerge: the layer is not merged")
        self._set_weight(self._unmerged)
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved = (self._unmerged or self.quantized_weight).state_dict(f"{prefix}weight")
        destination.update({k: v if keep_vars else v.detach() for k, v in saved.items()})


_Waiting = tuple[Tensor | None, int | None, bool, dict[FusedQLoRALinear, Tensor]]
_NOTHING: _Waiting = (None, None, False, {})


class InputGroup:
    """Layers that a model calls one after another on the same x: the first call computes all of them from one read of x, the
    others pick up their results.  A layer called on another x, or called twice, computes anew.  From the first to the last of
    these calls the layers must stay as they are.

    Args:
        layers: at least two, of the same in_features, device and compute_dtype.

    Raises:
        ValueError: the layers can't share an input.
    """

    def __init__(self, layers: Sequence[FusedQLoRALinear]) -> None:
        kinds = {(layer.in_features, layer.weight.device, layer.compute_dtype) for layer in layers}
        if len(layers) < 2 or len(kinds) != 1:
            raise ValueError(f"layers must be two or more of one in_features, device and compute_dtype, got {list(layers)}")
        self.layers = tuple(layers)
        self._waiting = _NOTHING  # x, its version, whether gradients are recorded, and the results
        for layer in layers:
            layer._group = self

    def compute(self, layer: FusedQLoRALinear, x: Tensor) -> Tensor:
        of, version, with_grad, ys = self._waiting  # read at once: another thread may put its own there
        y = None
        if of is x and with_grad is torch.is_grad_enabled() and version == _version(x):
            y = ys.pop(layer, None)
        if y is None:
            layers = [one for one in self.layers if one.compute_dtype == layer.compute_dtype]
            if layer not in layers:  # a replica of one
                layers = [layer]
            results = linears(_cast(x, layer.compute_dtype), [one._parts() for one in layers])
            ys = dict(zip(layers, results, strict=True))
            y = ys.pop(layer)
            self._waiting = x, _version(x), torch.is_grad_enabled(), ys
        if not ys:
            self._waiting = _NOTHING
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_waiting": _NOTHING}


def _version(x: Tensor) -> int | None:
    """How often x was written to, where that is counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class GatedMLP:
    """What a block that computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` gets in front of its class: the same from the
    parts of its layers.  To call the layers as modules takes as long as a small layer does on a CPU.  Where such a call is more
    than a `forward` (hooks, a compiled or another layer), the block does as before."""

    _modules: dict[str, Any]
    before: type

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layers = self._modules
        gate, up, down = layers["gate_proj"], layers["up_proj"], layers["down_proj"]
        special = len(args) != 1 or kwargs or torch.compiler.is_compiling() or _has_any_global_hook()
        if special or not (_bare(gate) and _bare(up) and _bare(down)) or gate.compute_dtype != up.compute_dtype:
            return super().forward(*args, **kwargs)  # type: ignore[misc, no-any-return]
        (x,) = args
        y, z = linears(_cast(x, gate.compute_dtype), (gate._parts(), up._parts()))
        if gate.compute_dtype is not None:
            y, z = y.to(x.dtype), z.to(x.dtype)
        return down.forward(layers["act_fn"](y) * z)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_gated_mlp, (self.before,), *super().__reduce_ex__(protocol)[2:]

    @staticmethod
    def convert(block: nn.Module) -> None:
        """In place, if that is what the block computes."""
        layers = [block._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(map(_bare, layers)) and _formula(block) == "down_proj(mul(act_fn(gate_proj(x)), up_proj(x)))":
            block.__class__ = _gated(type(block))  # type: ignore[arg-type]


def _bare(layer: Any) -> bool:
    """Whether to call a layer is to call its forward."""
    return (
        isinstance(layer, FusedQLoRALinear)
        and not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)
        and layer._compiled_call_impl is None
        and "forward" not in layer.__dict__
    )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _formula(block: nn.Module) -> str | None:
    """What a block of one input x computes, in calls of its children and of functions."""

    def write(node: Any) -> str:
        if node.op == "placeholder":
            return "x"
        return f"{getattr(node.target, '__name__', node.target)}({', '.join(map(write, node.args))})"

    try:
        *nodes, output = _Tracer().trace(block).nodes
        one_input = sum(node.op == "placeholder" for node in nodes) == 1
        return write(output.args[0]) if one_input else None
    except Exception:  # whatever tracing raises of a forward that is more than a formula
        return None


@functools.cache
def _gated(cls: type) -> type:
    return type(cls.__name__, (GatedMLP, cls), {"__module__": cls.__module__, "before": cls})


def _new_gated_mlp(cls: type) -> Any:
    return object.__new__(_gated(cls))
