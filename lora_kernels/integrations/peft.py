"""PEFT: its LoRA layers over our 4-bit layers compute in one fused call, and keep every feature they have.

`enable_peft` teaches PEFT about our base layers (`FusedQLoRALinear` without adapters, and `FusedLinear4bit`): get_peft_model,
from_pretrained, add_adapter and load_adapter then make fused LoRA layers.  What can't be fused runs PEFT's own code on our
base layer; `why_not_fused` says why, and `lora_kernels.verify` shows it.
"""

# ruff: noqa: E402

from __future__ import annotations

from ..requirements import require

require("peft", "lora_kernels.integrations.peft")

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..autograd import dequantize, qlora_linear, quantize
from ..formats import QuantizedWeight
from ..nn import FusedQLoRALinear

try:
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    from .bitsandbytes import FusedLinear4bit
except ModuleNotFoundError:
    PeftLinear4bit = FusedLinear4bit = None  # type: ignore[assignment, misc]

_IGNORED_IN_4_BIT = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config")
"""Settings of LoraConfig that PEFT reads and then leaves out on 4-bit layers."""


def _is_base(module: Any) -> bool:
    return isinstance(module, FusedQLoRALinear) or (FusedLinear4bit is not None and isinstance(module, FusedLinear4bit))


def _base_of(module: Any) -> Any:
    """What is below PEFT's layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether reading the module's parameters is the same as calling it: no wrapper, no hook, no replaced forward."""
    fields = module.__dict__
    return type(module) is cls and not (fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields)


class _FusedLora:
    """What our LoRA layers add to PEFT's: a fused forward, and merges that can be undone exactly."""

    _unmerged: tuple[QuantizedWeight, Tensor | None] | None = None
    """Base weight and bias as they were before the first merge."""
    _row_norms: tuple[Tensor, Tensor] | None = None
    """For DoRA: the packed bytes and, for these, the squared length of each row of the weight."""

    # provided by PEFT's layer
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    merged_adapters: list[str]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    training: bool
    _modules: dict[str, Any]
    base_layer: nn.Module
    get_base_layer: Callable[[], Any]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config", next((a for a in args if hasattr(a, "init_lora_weights")), None))
        for field in _IGNORED_IN_4_BIT:
            if getattr(config, field, None):
                raise ValueError(
                    f"LoraConfig({field}=...) has no effect on a 4-bit layer: leave it out, or use a dense base model"
                )
        with self._dense_base() if getattr(config, "use_dora", False) else nullcontext():
            super().update_layer(*args, **kwargs)  # type: ignore[misc]

    # ---- forward

    def why_not_fused(self) -> str | None:
        """Why the active adapters run PEFT's own code on our base layer, or None if they are fused."""
        names = self._active()
        for name in names:
            variant = self.lora_variant.get(name)
            if variant is not None and type(variant) is not DoraLinearVariant:
                return f"adapter {name!r} is a {type(variant).__name__.removesuffix('LinearVariant')}, which PEFT computes"
            for part in (self.lora_A[name], self.lora_B[name]):
                if not _plain(part, nn.Linear):
                    return f"the matrices of adapter {name!r} are wrapped in {type(part).__name__} or have hooks"
            if type(self.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
                return f"adapter {name!r} has a {type(self.lora_dropout[name]).__name__} before lora_A"
        if len(names) > 1 and any(n in self.lora_variant for n in names):
            return "several adapters are active, one of them with DoRA"
        if len(names) > 1 and any(self._dropout(n) for n in names):
            return "several adapters are active in training, each with a dropout of its own"
        if not _plain(self.base_layer, type(self.get_base_layer())):
            return "the base layer is wrapped or has hooks"
        return None

    def fused_state(self) -> tuple[QuantizedWeight, str | None, str, str | None]:
        """Weight, adapter, what the layer computes, and why it is not fused (None: it is), for `lora_kernels.verify`."""
        names = self._active()
        if self.merged:
            why = "adapter merged into the 4-bit weight"
        elif self.disable_adapters or not names:
            why = "no active adapter"
        else:
            why = "DoRA on fused products" if names[0] in self.lora_variant else "adapter in the same call"
        problem = None if self.merged or self.disable_adapters else self.why_not_fused()
        return self.get_base_layer().quantized_weight, "+".join(names) or None, why, problem

    def _active(self) -> list[str]:
        return [n for n in self.active_adapters if n in self.lora_A]

    def _dropout(self, name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _one_plain_adapter(self) -> tuple[Any, nn.Module, nn.Module, str] | None:
        """Base layer, lora_A, lora_B and name, if one adapter without DoRA or bias is active and can be fused.

        What `forward` would find out in general, for the usual case, without nn.Module's slow attribute lookups.
        """
        fields, modules = self.__dict__, self._modules
        name = fields["_active_adapter"]
        if type(name) is not str:
            if len(name) != 1:
                return None
            name = name[0]
        lora_A = modules["lora_A"]._modules.get(name)
        if lora_A is None or fields["_disable_adapters"] or fields["merged_adapters"]:
            return None
        if name in fields["lora_variant"] or fields["lora_bias"][name]:
            return None
        base: Any = modules["base_layer"]
        lora_B, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        if not (_plain(lora_A, nn.Linear) and _plain(lora_B, nn.Linear) and type(dropout) in (nn.Identity, nn.Dropout)):
            return None
        return (base, lora_A, lora_B, name) if _is_base(base) and _plain(base, type(base)) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        plain, names = self._one_plain_adapter(), []
        if plain is None:
            names = self._active()
            if self.disable_adapters or self.merged or not names or self.why_not_fused() is not None:
                return super().forward(x)  # type: ignore[misc]
        base = self.get_base_layer() if plain is None else plain[0]
        compute_dtype = base.compute_dtype if isinstance(base, FusedQLoRALinear) else base.fixed_compute_dtype
        dtype = x.dtype
        if compute_dtype is not None:
            x = x.to(compute_dtype)
        if plain is None:
            y = self._fused(x, base, names)
        else:
            _, lora_A, lora_B, name = plain
            lora = (lora_A.weight, lora_B.weight, self.scaling[name], base.bias, self._dropout(name))
            y = qlora_linear(x, base.quantized_weight, *lora)  # type: ignore[arg-type]
        return y if compute_dtype is None else y.to(dtype)

    def _fused(self, x: Tensor, base: Any, names: list[str]) -> Tensor:
        qw, name = base.quantized_weight, names[0]
        if name in self.lora_variant:
            return self._dora(x, base, name)
        bias = base.bias
        for n in names:
            if self.lora_bias[n]:
                update = self.scaling[n] * self.lora_B[n].bias
                bias = update if bias is None else bias + update
        if len(names) == 1:
            lora = (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            return qlora_linear(x, qw, *lora, bias, self._dropout(name))
        lora_A = torch.cat([self.lora_A[n].weight for n in names])
        lora_B = torch.cat([self.scaling[n] * self.lora_B[n].weight for n in names], dim=1)
        return qlora_linear(x, qw, lora_A, lora_B, 1.0, bias)

    # ---- DoRA (Liu et al. 2024): y = m / |W + s B A| * (W + s B A) x + bias, the length of each row taken as a constant

    def _dora(self, x: Tensor, base: Any, name: str) -> Tensor:
        qw, A, B, s = base.quantized_weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        factor = self.lora_magnitude_vector[name].weight.float() / self._dora_norm(qw, A, B, s)
        p = self._dropout(name)
        if not p:
            z = factor * qlora_linear(x, qw, A, B, s)
            return (z if base.bias is None else z + base.bias).to(self._result_dtype(x))
        # dropout acts on everything that PEFT adds to the layer, which includes (factor - 1) W x
        dropped = nn.functional.dropout(x, p)
        update = factor * qlora_linear(dropped, qw, A, B, s) - qlora_linear(dropped, qw)
        return (qlora_linear(x, qw, bias=base.bias) + update).to(self._result_dtype(x))

    @staticmethod
    def _result_dtype(x: Tensor) -> torch.dtype:
        device_type = x.device.type
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype

    @torch.no_grad()
    def _dora_norm(self, qw: QuantizedWeight, A: Tensor, B: Tensor, s: float) -> Tensor:
        """|W + s B A| of each row, float32 [N], without W in full: |W|^2 is kept, the rest needs W Aᵀ [N, r] only."""
        if self._row_norms is None or self._row_norms[0] is not qw.packed:
            self._row_norms = (qw.packed, dequantize(qw, torch.float32).square().sum(1))
        A, B = A.float(), B.float()
        with torch.autocast(A.device.type, enabled=False):
            cross = (qlora_linear(A, qw).T * B).sum(1)
            update = ((B @ (A @ A.T)) * B).sum(1)
        return (self._row_norms[1] + 2 * s * cross + s * s * update).clamp_min(0).sqrt()

    # ---- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, quantizing base and all updates once; the original bytes are kept.

        Merging an update of zero changes nothing.  A small update is mostly lost in 4 bits: `merge_dense` keeps it.

        Raises:
            ValueError: the merged weight has NaN or infinity in it.
            RuntimeError: an adapter has a bias and the base layer has none, or the layer is sharded.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        if hasattr(base.weight, "device_mesh"):
            raise RuntimeError("merge: the layer is sharded over processes; save the adapter and merge it in one process")
        if self.merged and self._unmerged is None:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        original, bias = self._unmerged or (base.quantized_weight, base.bias)
        before = dequantize(original, torch.float32)
        after, new_bias = self._merged_dense(before, bias, [*self.merged_adapters, *names])
        if not torch.isfinite(after).all() or (new_bias is not None and not torch.isfinite(new_bias).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if torch.equal(after, before):
            qw = original
        else:
            qw = quantize(after, original.quant_type, original.blocksize, original.double_quant, original.quant_storage)
            qw = replace(qw, dtype=original.dtype)
        self._unmerged = (original, bias)
        self._set_base(qw, new_bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base layer's original bytes and bias back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        elif self._unmerged is None:  # merged before our code took over
            super().unmerge()  # type: ignore[misc]
        else:
            self._set_base(*self._unmerged)
            self._unmerged = None
            self.merged_adapters.clear()

    def _set_base(self, qw: QuantizedWeight, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        base.set_weight(qw)
        if bias is not None:
            base.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def _merged_dense(self, weight: Tensor, bias: Tensor | None, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after merging `names`, one after the other, into the float32 base weight."""
        base = weight
        for name in names:
            A, B, s = self.lora_A[name].weight.float(), self.lora_B[name].weight.float(), self.scaling[name]
            variant = self.lora_variant.get(name)
            if variant is None:
                weight = weight + s * (B @ A)
            elif type(variant) is DoraLinearVariant:
                update = s * (B @ A)
                factor = self.lora_magnitude_vector[name].weight.float() / torch.linalg.norm(base + update, dim=1)
                weight = factor.view(-1, 1) * (weight + update)
            else:
                weight = variant.merge_safe(self, name, weight)
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
                bias = bias + s * self.lora_B[name].bias.to(bias.dtype)
        return weight, bias

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer of the same effect: base plus active adapters, float32 arithmetic, one rounding to `dtype`."""
        base = self.get_base_layer()
        original, bias = self._unmerged or (base.quantized_weight, base.bias)
        names = [] if self.disable_adapters else self._active()
        weight, bias = self._merged_dense(dequantize(original, torch.float32), bias, self.merged_adapters or names)
        return _dense_linear(weight, bias, dtype or original.dtype, self.training)

    # ---- moving, initialising

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._row_norms = None
        if self._unmerged is not None:
            qw, bias = self._unmerged
            device = self.get_base_layer().weight.device
            self._unmerged = (qw.to(device), bias if bias is None else nn.Parameter(bias.to(device), requires_grad=False))
        return self

    @contextmanager
    def _dense_base(self) -> Iterator[None]:
        """Inside the block the base layer is a dense float32 one; a weight changed there is quantized again afterwards."""
        base, wrapper = self.get_base_layer(), self.base_layer
        qw = base.quantized_weight
        weight = dequantize(qw, torch.float32)
        dense = _dense_linear(weight.clone(), None, torch.float32, False)
        handed = {k: v for k, v in base.__dict__.items() if k in ("eigens", "_peft_loraga_grad")}
        dense.__dict__.update(handed)
        self.base_layer = dense
        try:
            yield
        finally:
            self.base_layer = wrapper
        for name in handed:
            if name not in dense.__dict__:
                delattr(base, name)
        if not torch.equal(dense.weight, weight):
            new = quantize(dense.weight, qw.quant_type, qw.blocksize, qw.double_quant, qw.quant_storage)
            _set_weight(base, replace(new, dtype=qw.dtype))

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """LoftQ (Li et al. 2023, algorithm 1) against the weight that the 4-bit base holds.

        With the dense weights at hand, `lora_kernels.loftq_init` does better.
        """
        base = self.get_base_layer()
        qw = base.quantized_weight
        weight = dequantize(qw, torch.float32)
        options, update = config.loftq_config, torch.zeros_like(weight)
        if options["loftq_bits"] != 4:
            raise ValueError(f"loftq_bits must be 4 for a 4-bit base layer, got {options['loftq_bits']}")
        r = self.lora_A[adapter_name].weight.shape[0]
        for _ in range(options["loftq_iter"]):
            new = quantize(weight - update, qw.quant_type, qw.blocksize, qw.double_quant, qw.quant_storage)
            A, B = _low_rank(weight - dequantize(new, torch.float32), r)
            update = B @ A
        _set_weight(base, replace(new, dtype=qw.dtype))
        self._set_lora(adapter_name, A, B)

    def _set_lora(self, name: str, A: Tensor, B: Tensor) -> None:
        for part, value in ((self.lora_A[name], A), (self.lora_B[name], B)):
            part.weight.data = value.to(part.weight.dtype).contiguous()


def _on_dense(method: str) -> Callable[..., None]:
    def init(self: Any, *args: Any) -> None:
        with self._dense_base():
            getattr(LoraLayer, method)(self, *args)

    init.__doc__ = f"PEFT's `{method}` on the dequantized base, whose residual is quantized again."
    return init


for _method in ("pissa_init", "corda_init", "olora_init", "mica_init", "orthogonal_init", "lora_ga_init"):
    setattr(_FusedLora, _method, _on_dense(_method))


class FusedLoraLinear(_FusedLora, PeftLinear):
    """PEFT's LoRA layer over a `FusedQLoRALinear` without adapters of its own."""


if PeftLinear4bit is not None:

    class FusedLoraLinear4bit(_FusedLora, PeftLinear4bit):
        """PEFT's LoRA layer for bitsandbytes, over a `FusedLinear4bit`."""


def _set_weight(base: Any, qw: QuantizedWeight) -> None:
    base.set_weight(qw)
    if base.weight.is_meta and not qw.packed.is_meta:  # as in `_dense_linear`
        packed = nn.Parameter(qw.packed, requires_grad=False) if isinstance(base, FusedQLoRALinear) else qw.to_bitsandbytes()
        base._parameters["weight"] = packed
        base.quant_state = getattr(packed, "quant_state", None)


def _dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, training: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    # set past register_parameter, which PEFT lets create everything on the meta device while it loads with low_cpu_mem_usage
    linear._parameters["weight"] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return linear.train(training)


def _low_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] whose product is the best approximation of rank r."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = S[:r].sqrt()
    return root.view(-1, 1) * Vh[:r], U[:, :r] * root


# ---- PEFT learns about our layers

_enabled = False


def enable_peft() -> None:
    """Makes PEFT create fused LoRA layers on our base layers, in this process; a second call does nothing.

    `lora_kernels.QLoRAQuantConfig`, `accelerate` and, where PEFT is imported already, `apply_qlora(r=0)` call it.
    """
    global _enabled
    if _enabled:
        return
    create, all_linear = LoraModel._create_new_module, tuners_utils._maybe_include_all_linear_layers

    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base: Any = _base_of(target)
        if _is_base(base) and kwargs.get("parameter_name") is None and not lora_config._custom_modules:
            return _fused_lora(target, base, adapter_name, lora_config, kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        config = all_linear(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            get_head: Any = getattr(model, "get_output_embeddings", None)
            head = get_head() if get_head is not None else None
            ours = {n for n, m in model.named_modules() if isinstance(m, FusedQLoRALinear) and m is not head}
            inside = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and _is_base(_base_of(m))}
            config.target_modules |= {n for n in ours if not any(n.startswith(f"{i}.") for i in inside)}
        return config

    LoraModel._create_new_module = staticmethod(create_new_module)
    tuners_utils._maybe_include_all_linear_layers = maybe_include_all_linear_layers
    _enabled = True


def _fused_lora(target: nn.Module, base: Any, adapter_name: str, config: Any, kwargs: dict[str, Any]) -> nn.Module:
    if getattr(base, "adapters", None):
        raise ValueError(
            f"the layer has adapters of its own ({', '.join(base.adapters)}), from lora_kernels.apply_qlora: "
            "use apply_qlora(r=0) for a model that PEFT adapts"
        )
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is for Conv1D layers; it is set to False for a 4-bit layer", stacklevel=2)
        config.fan_in_fan_out = False
    if isinstance(base, FusedQLoRALinear):
        return FusedLoraLinear(target, adapter_name, config=config, **kwargs)
    return FusedLoraLinear4bit(target, adapter_name, config=config, **kwargs)


def take_over(model: nn.Module) -> None:
    """Makes PEFT's LoRA layers over `FusedLinear4bit` fused ones, in place."""
    if PeftLinear4bit is None:
        return
    for module in model.modules():
        if type(module) is PeftLinear4bit and _is_base(_base_of(module)):
            module.__class__ = FusedLoraLinear4bit


# ---- leaving 4 bits, LoftQ


def merge_dense(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Merges the active adapters and returns the base model in `dtype`, for servers that want 16-bit weights.

    Each weight is the dequantized base plus the update, added in float32 and rounded once, so that nothing of the adapter is
    lost as it would be in a merge into 4 bits.  The model that was passed is used up.

    Args:
        model: a PEFT model, or any model with our layers in it.
        dtype: of the whole model that is returned.

    Raises:
        ValueError: there is no layer of ours in the model.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, _FusedLora):
            model.set_submodule(name, module.to_linear(dtype))
        elif isinstance(module, FusedQLoRALinear):
            if any(isinstance(model.get_submodule(n), nn.Linear) for n in _parents(name)):
                continue
            model.set_submodule(name, module.to_linear(dtype))
        elif _is_base(module):
            if any(type(model.get_submodule(n)) is nn.Linear for n in _parents(name)):
                continue
            linear = _dense_linear(module.dequantize(torch.float32), module.bias, dtype, module.training)
            model.set_submodule(name, linear)
        else:
            continue
        replaced += 1
    if not replaced:
        raise ValueError("model has no layer of lora_kernels in it: nothing to merge")
    unload = getattr(model, "unload", None)
    dense: Any = unload() if callable(unload) else model
    quantizer = getattr(dense, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(dense)
    dense.is_loaded_in_4bit = False
    return dense.to(dtype)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@torch.no_grad()
def loftq_init(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> nn.Module:
    """Sets lora_A and lora_B of each fused layer to the best approximation of what quantization took from the dense weight.

    Args:
        model: a PEFT model with fused LoRA layers.
        directory: of the dense model's safetensors files.
        adapter_name: which adapter.

    Returns:
        `model`.

    Raises:
        ValueError: no fused layer has the adapter, or the weights of one are missing or have another shape (it is named);
            the model is unchanged then.
    """
    from safetensors import safe_open

    layers = {n: m for n, m in model.named_modules() if isinstance(m, _FusedLora) and adapter_name in m.lora_A}
    if not layers:
        raise ValueError(f"model has no fused layer with an adapter {adapter_name!r}")
    where: dict[str, Path] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            where |= dict.fromkeys(f.keys(), file)
    found = {}
    for name, layer in layers.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in where:
            raise ValueError(f"{directory} has no {key} in its safetensors files")
        with safe_open(where[key], framework="pt") as f:
            weight = f.get_tensor(key)
        base = dequantize(layer.get_base_layer().quantized_weight, torch.float32)
        if weight.shape != base.shape:
            raise ValueError(f"{key} must be {list(base.shape)}, got {list(weight.shape)}")
        found[name] = _low_rank(weight.to(base) - base, layer.lora_A[adapter_name].weight.shape[0])
    for name, (A, B) in found.items():
        layers[name]._set_lora(adapter_name, A, B)
    return model
