"""transformers: `from_pretrained(path, quantization_config=lora_kernels.QLoRAQuantConfig())` gives a model with our layers.

A dense checkpoint is quantized tensor by tensor while it is read; one in bitsandbytes' 4-bit format is taken as it is.
`save_pretrained` writes bitsandbytes' format, so that what it wrote loads with or without this package.
"""

# ruff: noqa: E402

from __future__ import annotations

from ..requirements import installed, missing, require

require("transformers", "lora_kernels.QLoRAQuantConfig")

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..autograd import quantize
from ..formats import (
    FORMATS,
    STORAGE_DTYPES,
    WEIGHT_DTYPES,
    QuantizedWeight,
    check_blocksize,
    check_quant_type,
    check_storage,
    dtype_name,
)
from ..nn import FusedQLoRALinear
from ..packed import PackedWeight
from .bnb_config import BnbConfig, is_4bit
from .merge import merge_dense

METHOD = "lora_kernels"


def _dtype(name: str, value: torch.dtype | str | None, accepted: tuple[torch.dtype, ...]) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype is not None and dtype not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(dtype_name, accepted))}, got {value!r}")
    return dtype  # type: ignore[return-value]


@register_quantization_config(METHOD)
class QLoRAQuantConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a dense model; for a checkpoint in 4 bits the checkpoint's own format counts.

    Args:
        quant_type: `nf4` or `fp4`.
        double_quant: also quantize the scales.
        blocksize: elements that share a scale, a power of two from 32 to 4096.
        quant_storage: dtype in which the packed bytes are held.
        compute_dtype: layers cast their input to it and their output back; None computes in the dtype of the input.
        modules_to_not_convert: names, or last parts of names, of linear layers that stay dense, besides the output head and
            tied layers, which stay dense in any case.
        own_layers: make `FusedQLoRALinear` layers, which take adapters of `lora_kernels` (`add_adapter`, `load_adapter`), also
            where bitsandbytes is installed; else they are `bnb.nn.Linear4bit` layers with our forward, for PEFT and whatever
            else knows that class.  A choice of the moment: it is not written to config.json.

    Raises:
        ValueError: an option is not one of those accepted.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        blocksize: int = 64,
        quant_storage: torch.dtype | str = torch.uint8,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: list[str] | None = None,
        own_layers: bool = False,
    ) -> None:
        self.quant_method = METHOD
        self.quant_type = check_quant_type(quant_type)
        self.double_quant = bool(double_quant)
        self.blocksize = check_blocksize(blocksize, quant_type)
        self.quant_storage = _dtype("quant_storage", quant_storage, STORAGE_DTYPES) or torch.uint8
        self.compute_dtype = _dtype("compute_dtype", compute_dtype, WEIGHT_DTYPES)
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert must be a list of names, got the string {modules_to_not_convert!r}")
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.own_layers = own_layers

    @classmethod
    def from_bitsandbytes(cls, config: dict[str, Any], given: QLoRAQuantConfig) -> QLoRAQuantConfig:
        """The format of a checkpoint whose config.json holds `config`, with `given`'s compute_dtype and own_layers.

        Raises:
            ValueError: the checkpoint is not in bitsandbytes' 4-bit format.
        """
        if not is_4bit(config):
            bits = ", load_in_8bit" if config.get("load_in_8bit") else ""
            raise ValueError(
                f"the checkpoint is quantized already ({config.get('quant_method')}{bits}); QLoRAQuantConfig reads dense "
                "checkpoints and those in bitsandbytes' 4-bit format. Take the dense model it was made from"
            )
        found = BnbConfig.from_dict(config)
        dense = None if found.dense_modules is None else list(found.dense_modules)
        storage = (found.blocksize, found.quant_storage)
        return cls(found.quant_type, found.double_quant, *storage, given.compute_dtype, dense, given.own_layers)

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        storage = (self.blocksize, self.quant_storage)
        compute_dtype = self.compute_dtype or torch.bfloat16
        return BnbConfig(self.quant_type, self.double_quant, *storage, compute_dtype, self.modules_to_not_convert).to_dict()


class _Convert(ConversionOps):
    """Puts our layer in the place of a dense one as soon as its weight is there."""

    def __init__(self, hf_quantizer: QLoRAQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Convert:
        """Transformers copies its converters for each weight; all of them report to one quantizer."""
        return self

    def _layer(self, model: nn.Module, name: str, qw: QuantizedWeight) -> nn.Module:
        path = name.removesuffix(".weight")
        dense = model.get_submodule(path)
        features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
        if qw.shape != tuple(features):  # type: ignore[arg-type]
            raise ValueError(f"{name} is a 4-bit weight {list(qw.shape)}, the model has {list(features)} there")  # type: ignore[arg-type]
        layer = self.hf_quantizer.new_layer(qw, dense.bias, dense.training)  # type: ignore[arg-type]
        layer._is_hf_initialized = True  # type: ignore[assignment]
        layer.was_conv1d = isinstance(dense, Conv1D)  # type: ignore[assignment]
        model.set_submodule(path, layer)
        self.hf_quantizer.loaded[path] = qw
        return layer


class Quantize(_Convert):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        config, out = self.hf_quantizer.quantization_config, {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            dense = model.get_submodule(name.removesuffix(".weight"))
            if weight.shape != dense.weight.shape:
                self.hf_quantizer.problems.append(
                    f"{name} is {list(weight.shape)}, the model has {list(dense.weight.shape)} there"
                )
                continue
            if isinstance(dense, Conv1D):
                weight = weight.T.contiguous()
            try:
                qw = quantize(weight, config.quant_type, config.blocksize, config.double_quant, config.quant_storage)
                out[name] = self._layer(model, name, qw).weight
            except (ValueError, TypeError) as e:
                self.hf_quantizer.problems.append(f"{name}: {e}")
        return out  # type: ignore[return-value]


class Deserialize(_Convert):
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        weight = tensors.get("weight")
        module, _ = get_module_from_name(model, full_layer_name)
        if len(tensors) == 1 and weight is not None and weight.is_floating_point():
            want = model.get_parameter_or_buffer(full_layer_name)
            packed = full_layer_name.removesuffix(".weight") in self.hf_quantizer.targets and weight.shape != want.shape
            if not packed:
                return {"weight": weight.to(want.dtype)}
        if weight is None:
            self.hf_quantizer.problems.append(f"{full_layer_name} is missing: the 4-bit weight was saved incompletely")
            return {}
        if not isinstance(module, (nn.Linear, Conv1D)):
            return input_dict
        try:
            named = {full_layer_name + k.removeprefix("weight"): v for k, v in tensors.items()}
            return {
                "weight": self._layer(model, full_layer_name, QuantizedWeight.from_state_dict(named, full_layer_name)).weight
            }
        except (ValueError, KeyError) as e:
            self.hf_quantizer.problems.append(str(e.args[0]))
            return {}


def _serialized_names() -> list[str]:
    """What a 4-bit weight is made of, the weight itself last: transformers takes the first name that is part of a key."""
    parts = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
    return [f"weight{p}" for p in [*parts, *(f".quant_state.bitsandbytes__{q}" for q in FORMATS), ""]]


def _stays_dense(name: str, patterns: list[str]) -> bool:
    """Whether a module is one of `patterns` or inside one: regular expressions for whole parts of a name, or ends of names.

    Transformers before 5.21 took `layers.1` for a part of `layers.11` too.
    """
    return any(re.fullmatch(rf"(?:{p})(?:(?:\.|(?<=\.)).*)?", name) or name.endswith(p) for p in patterns)


def _load_uncast(model: Any, layers: set[str]) -> None:
    """Keeps transformers before 5.21 from casting packed bytes that are held as floats to the dtype of the model."""
    weights, plan = "|".join(map(re.escape, layers)), model._get_dtype_plan
    model._get_dtype_plan = lambda dtype: {rf"^(?:{weights})\.weight$": None} | plan(dtype)


@register_quantizer(METHOD)
class QLoRAQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with a `QLoRAQuantConfig`."""

    quantization_config: QLoRAQuantConfig

    def __init__(self, quantization_config: QLoRAQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()
        self.loaded: dict[str, QuantizedWeight] = {}
        self.problems: list[str] = []
        self.own_layers = quantization_config.own_layers or installed("bitsandbytes") is None

    def new_layer(self, qw: QuantizedWeight, bias: Tensor | None, training: bool) -> nn.Module:
        """The layer that takes the place of a dense one."""
        compute_dtype = self.quantization_config.compute_dtype
        if self.own_layers:
            return FusedQLoRALinear.from_quantized(qw, bias, compute_dtype, training=training)
        from .bitsandbytes import FusedLinear4bit

        return FusedLinear4bit.from_quantized(qw, bias, compute_dtype, training)

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if not self.own_layers:
            require("bitsandbytes", "lora_kernels.QLoRAQuantConfig")
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ZeRO-3 can't shard 4-bit weights: use FSDP2, or ZeRO-2 or DDP with the 4-bit model on each device"
            )
        devices = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                "device_map puts some layers on the disk or the CPU and others elsewhere: 4-bit layers are not moved back and "
                "forth. Use one kind of device, or fewer layers"
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and path in self.targets

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes, for what transformers plans to put where."""
        return 0.5 if self.param_needs_quantization(model, param_name) else param.element_size()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model,
            config.modules_to_not_convert,
            model._keep_in_fp32_modules,
            add_default_skips=not self.pre_quantized,
        )
        for name, module in model.named_modules():
            # as bitsandbytes does; a subclass may compute something else, or be read by its owner, as in nn.MultiheadAttention
            if type(module) in (nn.Linear, Conv1D) and not _stays_dense(name, skip):
                if not self.pre_quantized:
                    check_storage(config.quant_storage, module.weight.numel())
                self.targets.add(name)
                module.requires_grad_(False)
        if not self.targets:
            raise ValueError("model has no linear layer to quantize, or modules_to_not_convert names all of them")
        config.modules_to_not_convert = sorted(skip)
        if not config.own_layers and installed("peft"):
            from .peft import enable_peft

            enable_peft()
        if self.pre_quantized and missing("transformers", "5.21"):
            _load_uncast(model, self.targets)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.targets:
            module = model.get_submodule(name)
            if type(module) is nn.Linear and tuple(module.weight.shape) != (module.out_features, module.in_features):
                self.problems.append(
                    f"{name}.weight is {list(module.weight.shape)}: the parts of a 4-bit weight were not found"
                )
        if self.problems:
            listed = "; ".join(self.problems[:5]) + (f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else "")
            raise ValueError(f"the model was not loaded: {listed}")
        model.__dict__.pop("_get_dtype_plan", None)
        if not self.loaded:
            raise ValueError(
                f"the model was not loaded: transformers {installed('transformers')} found no "
                f"{'4-bit' if self.pre_quantized else 'dense'} weight for any of {', '.join(sorted(self.targets)[:3])}, ..."
            )
        for name, qw in self.loaded.items():
            layer = model.get_submodule(name)
            if isinstance(layer, FusedQLoRALinear):  # transformers put empty tensors in the place of its buffers
                layer.set_weight(qw)
        loaded = set(self.loaded)
        self.loaded.clear()
        ours = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in ours if not any(isinstance(op, Deserialize) for op in _operations(c))]
        forget_conversions(model, loaded)
        for name, module in model.named_modules():
            if name in self.targets or isinstance(module, PackedWeight):
                module.requires_grad_(False)
        if not self.own_layers:
            model.is_loaded_in_4bit = True
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        return merge_dense(model, _dtype("dtype", dtype, WEIGHT_DTYPES) or torch.bfloat16)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        return [WeightConverter(_serialized_names(), "weight", [Deserialize(self)])] if self.pre_quantized else []


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def forget_conversions(model: Any, packed: Collection[str]) -> None:
    """Lets `save_pretrained` keep the names of layers `packed` where a checkpoint would hold their weights joined or turned
    round, which packed bytes can't be; from_pretrained reads both."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not made by from_pretrained: as save_pretrained finds them then
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in found if not isinstance(c, PrefixChange)]

    def changes_packed_bytes(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        backwards = conversion.reverse_transform()
        return any(backwards.rename_source_key(f"{name}.weight")[1] is not None for name in packed)

    model._weight_conversions = [c for c in conversions if not changes_packed_bytes(c)]


_merge = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]


def _merge_quantization_configs(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """Lets a QLoRAQuantConfig load checkpoints in bitsandbytes' format, which transformers takes for a conflict."""
    if not isinstance(quantization_config_from_args, QLoRAQuantConfig):
        return _merge(cls, quantization_config, quantization_config_from_args)
    found = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    return QLoRAQuantConfig.from_bitsandbytes(found, quantization_config_from_args)


AutoHfQuantizer.merge_quantization_configs = classmethod(_merge_quantization_configs)
