"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A file holds `base_model.model.<layer>.lora_A.weight [r, K]` and `.lora_B.weight [N, r]` for each adapted layer, without the
adapter's name; PEFT loads what is written here over a dense or a bitsandbytes base, and the reverse.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import processes
from .model import fused_layers
from .nn import AdapterConfig, FusedQLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter: str = "default") -> None:
    """Writes an adapter of `model` as PEFT does; files appear under their names only when complete.

    On a model that FSDP2 has sharded, every process must call it; the first one writes.

    Args:
        model: a model with `FusedQLoRALinear` layers.
        directory: created if need be; files of an older adapter in it are replaced.
        adapter: which adapter.

    Raises:
        ValueError: no layer of `model` has that adapter, an adapter weight holds NaN or infinity, or DeepSpeed or FSDP1 holds
            it in parts.
    """
    layers = {name: layer for name, layer in fused_layers(model).items() if adapter in layer.adapters}
    if not layers:
        known = sorted({a for layer in fused_layers(model).values() for a in layer.adapters})
        raise ValueError(f"adapter {adapter!r} is in no layer of the model; adapters: {', '.join(known) or 'none'}")
    tensors: dict[str, Tensor] = {}
    sharded = False
    for name, layer in layers.items():
        _check_whole(name, layer, adapter)
        for part, matrix in zip(("lora_A", "lora_B"), layer.lora_matrices(adapter), strict=True):
            whole = matrix
            if _is_sharded(matrix):
                sharded, whole = True, matrix.full_tensor()  # type: ignore[attr-defined]
            if not torch.isfinite(whole).all():
                raise ValueError(f"{name}.{part}.{adapter}.weight contains NaN or infinity: nothing was written")
            tensors[f"{_PREFIX}{name}.{part}.weight"] = whole.detach().cpu().contiguous().clone()
    config = _config(model, {name: layer.adapters[adapter] for name, layer in layers.items()})
    if not sharded:
        _write(Path(directory), tensors, config)
        return
    with processes.together():
        if processes.rank() == 0:
            _write(Path(directory), tensors, config)


def _write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weights_tmp, config_tmp = directory / f".{WEIGHTS}.tmp", directory / f".{CONFIG}.tmp"
    try:
        with writing(directory):
            save_file(tensors, weights_tmp, metadata={"format": "pt"})
        config_tmp.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        weights_tmp.replace(directory / WEIGHTS)
        config_tmp.replace(directory / CONFIG)
    finally:
        weights_tmp.unlink(missing_ok=True)
        config_tmp.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError that names `path` of what safetensors and torch raise when, say, the disk is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as e:
        if isinstance(e, SafetensorError) or "inline_container" in str(e):
            raise OSError(f"{path} can't be written, is the disk full? ({e})") from e
        raise


def _is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 holds the tensor, as a DTensor: that class is slow to import."""
    return hasattr(tensor, "device_mesh")


def _shard_like(sharded: Any, whole: Tensor) -> Tensor:
    """This process's part of a tensor that every process has read."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _check_whole(name: str, layer: FusedQLoRALinear, adapter: str) -> None:
    """Raises ValueError if this process has no way to the whole of the layer's matrices."""
    r = layer.adapters[adapter].r
    for part, matrix, shape in zip(
        ("lora_A", "lora_B"), layer.lora_matrices(adapter), ((r, layer.in_features), (layer.out_features, r)), strict=True
    ):
        if tuple(matrix.shape) == shape:
            continue
        what = f"{name}.{part}.{adapter}.weight is {list(matrix.shape)} here and {list(shape)} as a whole"
        if hasattr(matrix, "ds_id"):
            raise ValueError(
                f"{what}: DeepSpeed's ZeRO-3 holds it in parts. Call this inside deepspeed.zero.GatheredParameters(parameters),"
                " or train with ZeRO-2 or FSDP2"
            )
        raise ValueError(f"{what}: for FSDP1, call this inside FullyShardedDataParallel.summon_full_params(model)")


def _config(model: nn.Module, adapters: dict[str, AdapterConfig]) -> dict[str, Any]:
    """PEFT's LoraConfig: the commonest rank and alpha, and patterns for the layers that differ."""
    base, _ = Counter(adapters.values()).most_common(1)[0]
    for field in ("lora_dropout", "use_rslora"):
        if len({getattr(a, field) for a in adapters.values()}) > 1:
            raise ValueError(f"{field} differs between layers, which adapter_config.json can't hold: nothing was written")
    model_config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(model_config, "_name_or_path", None) or None,
        "r": base.r,
        "lora_alpha": base.lora_alpha,
        "lora_dropout": base.lora_dropout,
        "use_rslora": base.use_rslora,
        "target_modules": _targets(model, set(adapters)),
        "rank_pattern": {name: a.r for name, a in adapters.items() if a.r != base.r},
        "alpha_pattern": {name: a.lora_alpha for name, a in adapters.items() if a.lora_alpha != base.lora_alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last parts of the adapted layers' names if these name exactly those layers, else the whole names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    named = {
        n for n, m in model.named_modules() if n.rpartition(".")[2] in leaves and isinstance(m, (nn.Linear, FusedQLoRALinear))
    }
    return sorted(leaves if named == adapted else adapted)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter: str = "default") -> None:
    """Loads an adapter that `save_adapter` or PEFT wrote and makes it the active one.

    Layers that have an adapter of that name get its weights; the others of the file get the adapter added.

    Args:
        model: a model with `FusedQLoRALinear` layers (see `apply_qlora`); one that FSDP2 has sharded must have the adapter.
        directory: holds adapter_config.json and adapter_model.safetensors.
        adapter: the name it gets in the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the adapter is of a kind that the fused layer does not compute, or its layers, ranks or
            shapes do not fit the model.  The model is unchanged then.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG)
    tensors = _read_weights(directory / WEIGHTS)
    layers = fused_layers(model)
    if not layers:
        raise ValueError("model has no FusedQLoRALinear: call apply_qlora first")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            raise ValueError(f"{directory / WEIGHTS}: {key} is not a LoRA matrix of a linear layer")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{directory / WEIGHTS}: {key} contains NaN or infinity")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ValueError(f"{directory / WEIGHTS} holds no LoRA matrices")
    plan = {name: _plan(directory, name, pair, layers, config, adapter) for name, pair in pairs.items()}
    for name, adapter_config in plan.items():
        layer = layers[name]
        if adapter not in layer.adapters:
            layer.add_adapter(adapter, adapter_config)
        layer.adapters[adapter] = adapter_config
        with torch.no_grad():
            for part, matrix in zip(("lora_A", "lora_B"), layer.lora_matrices(adapter), strict=True):
                matrix.copy_(_shard_like(matrix, pairs[name][part]) if _is_sharded(matrix) else pairs[name][part])
    for name, layer in layers.items():
        layer.set_adapter(adapter if name in plan else None)


def _plan(
    directory: Path,
    name: str,
    pair: dict[str, Tensor],
    layers: dict[str, FusedQLoRALinear],
    config: dict[str, Any],
    adapter: str,
) -> AdapterConfig:
    """The adapter that layer `name` gets, or ValueError."""
    file = directory / WEIGHTS
    if name not in layers:
        raise ValueError(f"{file}: the model has no FusedQLoRALinear called {name}")
    if set(pair) != {"lora_A", "lora_B"}:
        raise ValueError(f"{file}: {name} has {', '.join(pair)} only; both lora_A and lora_B are needed")
    layer = layers[name]
    if layer.merged:
        raise ValueError(f"{name} has adapter {layer.active_adapter!r} merged into its weight: call unmerge() first")
    r = _pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    try:
        wanted = AdapterConfig(r, alpha, config.get("lora_dropout", 0.0), config.get("use_rslora", False))
    except ValueError as e:
        raise ValueError(f"{directory / CONFIG}: {e}") from None
    for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
        if tuple(pair[part].shape) != shape:
            raise ValueError(f"{file}: {name}.{part} must be {list(shape)} for rank {r}, got {list(pair[part].shape)}")
    if adapter not in layer.adapters:
        if _is_sharded(layer.weight):
            raise ValueError(f"{name} is sharded and has no adapter {adapter!r}: give it one of rank {r} before fully_shard")
        return wanted
    _check_whole(name, layer, adapter)
    if layer.adapters[adapter].r != r:
        raise ValueError(f"{name} has an adapter {adapter!r} of rank {layer.adapters[adapter].r}, the file one of rank {r}")
    return wanted


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: a key is a regular expression for the end of a layer's name."""
    return next((v for k, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)


_MUST_BE_UNSET = ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "target_parameters")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        missing = [k for k in ("peft_type", "r", "lora_alpha") if k not in config]
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: an adapter is a directory with {CONFIG} and {WEIGHTS}") from None
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file} is damaged: {e}") from None
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: not a LoRA adapter of PEFT")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{file}: peft_type must be LORA, got {config['peft_type']!r}")
    for key in _MUST_BE_UNSET:
        if config.get(key):
            raise ValueError(f"{file}: {key} must be unset for a fused layer, got {config[key]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias must be 'none', got {config['bias']!r}")
    return config


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: an adapter is a directory with {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(file, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged: {e}") from None
