"""Loading what a command is given: a model from a folder, a GGUF file or the hub, and an adapter over it.

Every model comes through transformers' own `from_pretrained`, with our quantizer where its layers are to be in 4 bits, so that
whatever transformers reads can be quantized, trained and merged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..adapter_files import CONFIG, load_adapter
from ..integrations.bnb_config import is_4bit
from ..model import apply_qlora, check_patterns, fused_layers, matches
from ..nn import AdapterConfig
from ..requirements import require
from .folders import LOG

DEFAULT_FORMAT = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
"""How a dense model is quantized where nothing says otherwise."""


def pick_device() -> torch.device:
    """The first GPU that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def load_model(model: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads a language model and its tokenizer on the CPU, as it is: a folder in bitsandbytes' 4-bit format gives a model of
    `FusedQLoRALinear` layers, with or without bitsandbytes; anything else a dense one.

    Args:
        model: a folder in transformers' format, dense or in bitsandbytes' 4-bit format; a GGUF file; or a hub id.
        dtype: of every weight that is not quantized; None for the dtype they are stored in (bfloat16 for a GGUF file).

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: `model` is nothing that can be loaded; the message says what is missing.
    """
    loaded, tokenizer, _ = _load(str(model), dtype, None)
    return loaded, tokenizer


def load_quantized(model: str | os.PathLike[str], dtype: torch.dtype | None = None, **quant: Any) -> tuple[Any, Any, bool]:
    """Loads a model in 4 bits, frozen, its layers `FusedQLoRALinear`.  A dense one is quantized weight by weight as it is read.

    Args:
        model, dtype: as for `load_model`.
        quant: `quant_type`, `blocksize` and `double_quant` for a dense model; one in 4 bits keeps its own.

    Returns:
        The model, in eval mode, its tokenizer, and whether it was in 4 bits already.

    Raises:
        ValueError: `model` is nothing that can be loaded; the message says what is missing.
    """
    loaded, tokenizer, already = _load(str(model), dtype, DEFAULT_FORMAT | quant)
    return loaded.requires_grad_(False), tokenizer, already


def load_with_adapter(model: str, adapter: Path | None, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """A model in 4 bits with a trained adapter, as it was during its training.

    A dense model is quantized as the `log.json` beside the adapter says, by default to NF4 in blocks of 64, double-quantized.

    Returns:
        Model, tokenizer, and a phrase for how the weights became 4-bit.

    Raises:
        ValueError, FileNotFoundError: model or adapter can't be loaded, or they do not fit together.
    """
    quant, how = DEFAULT_FORMAT, "no log.json beside an adapter"
    if adapter is not None:
        if not (adapter / CONFIG).exists():
            raise ValueError(f"--adapter {adapter} has no {CONFIG}: it must be a folder that holds an adapter")
        if (adapter / LOG).exists():
            quant, how = _quant_of(adapter / LOG), f"as in {adapter / LOG}"
    loaded, tokenizer, already = load_quantized(model, dtype, **quant)
    what = f"{quant['quant_type']}, blocksize {quant['blocksize']}, double_quant={quant['double_quant']}"
    if adapter is not None:
        load_adapter(loaded, adapter)
    return loaded.eval(), tokenizer, "4 bits already" if already else f"quantized to {what} ({how})"


def _quant_of(log: Path) -> dict[str, Any]:
    try:
        before = json.loads(log.read_text())["settings"]
        return {key: before[key] for key in DEFAULT_FORMAT}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{log} is damaged ({e!r}), so how the base was quantized is unknown; remove it for nf4") from None


def add_adapters(model: nn.Module, adapter: AdapterConfig, target_modules: str | Sequence[str]) -> None:
    """Freezes a model in 4 bits and gives each target layer a fresh adapter.

    Args:
        adapter: of each target layer.
        target_modules: as in `apply_qlora`.
    """
    layers = fused_layers(model)
    if target_modules != "all-linear":
        check_patterns("target_modules", target_modules, list(layers), strict=True)
    model.requires_grad_(False)
    for name, layer in layers.items():
        if target_modules == "all-linear" or matches(name, target_modules):
            layer.add_adapter("default", adapter)


# ---- one way in


def _load(model: str, dtype: torch.dtype | None, quant: dict[str, Any] | None) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether the model is stored in 4 bits.  `quant` None leaves a dense model dense."""
    require("transformers", "a model of transformers")
    from transformers import AutoConfig, AutoTokenizer

    path, options = Path(model).expanduser(), {}
    if not _is_local(model):
        where, unreadable = model, f"MODEL {model} is neither a path here nor a model id that can be fetched from the hub"
    elif path.suffix == ".gguf":
        loaded, tokenizer = _load_gguf(path, dtype or torch.bfloat16)
        if quant is not None:
            apply_qlora(loaded, r=0, **quant)
        return loaded, tokenizer, False
    else:
        _check_folder(path)
        where, unreadable, options = str(path), f"MODEL {path} can't be loaded", {"local_files_only": True}
    with _errors(unreadable):
        config = AutoConfig.from_pretrained(where, **options)
    stored = _quantization(config)
    already = _is_4bit(stored, where)
    with _errors(f"MODEL {path} has no tokenizer that transformers can read" if options else unreadable):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if already:  # in a format of its own
        quant, dtype = quant or {}, dtype or config.dtype or torch.float32
    with _errors(unreadable):
        return _from_pretrained(where, config, dtype, quant, options), tokenizer, already


def _from_pretrained(
    where: str, config: Any, dtype: torch.dtype | None, quant: dict[str, Any] | None, options: dict[str, Any]
) -> Any:
    if quant is not None:
        from ..integrations.quantizer import QLoRAQuantConfig

        options = options | {"quantization_config": QLoRAQuantConfig(**quant, own_layers=True)}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # its own error does not say which
    model, info = _auto_class(config).from_pretrained(where, dtype="auto" if dtype is None else dtype, **options)
    if info["mismatched_keys"]:
        key, given, wanted = min(info["mismatched_keys"])
        raise ValueError(f"{key} is {list(given)}, the model has {list(wanted)} there")
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys'])[:5])}")
    if _quantization(config) and info["unexpected_keys"]:  # a dense folder may hold what its model does not use
        raise ValueError(f"the model has no {', '.join(sorted(info['unexpected_keys'])[:5])}")
    if quant is not None:  # from here on it is a model like any other, whose layers happen to be ours
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes models which write text of such a config; of several, the one that was saved."""
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        transformers.AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        transformers.AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        transformers.AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    able = {auto: names[config.model_type] for auto, names in kinds.items() if config.model_type in names}
    saved = [auto for auto, name in able.items() if name in (config.architectures or [])]
    return (saved or list(able) or [transformers.AutoModelForCausalLM])[0]


def _quantization(config: Any) -> dict[str, Any]:
    """The entry `quantization_config` of config.json, empty for a dense model."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _is_4bit(stored: dict[str, Any], where: str) -> bool:
    """Whether a model is stored in bitsandbytes' 4-bit format; raises ValueError if it is in any other but a dense one."""
    if not stored:
        return False
    if not is_4bit(stored):
        method = f"{stored.get('quant_method')!r}, load_in_4bit={bool(stored.get('load_in_4bit'))}"
        raise ValueError(f"MODEL {where} is quantized ({method}); only dense weights and bitsandbytes' 4-bit format are read")
    return True


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ValueError(f"MODEL {path} does not exist; it must be a model folder, a GGUF file or a hub id")
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions can also keep GGUF's own blocks, which nothing else reads
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _errors(f"MODEL {path} is no GGUF file that transformers can read"):
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **where, **dense)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
    return model, tokenizer


# ---- what is wrong with a MODEL


def _is_local(model: str) -> bool:
    """Whether `model` is a path on this machine, and not the id of a model on the hub."""
    return Path(model).exists() or model.endswith(".gguf") or model.startswith(("/", ".", "~")) or model.count("/") > 1


_UNFIT = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """One line in place of the many kinds of errors by which a loader says that its input is unfit."""
    try:
        yield
    except (*_UNFIT, SafetensorError, UnpicklingError) as e:
        raise ValueError(f"{what}: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}") from e


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"MODEL {path} does not exist; it must be a model folder, a GGUF file or a hub id")
    if not path.is_dir():
        raise ValueError(f"MODEL {path} is a file that is no .gguf; it must be a model folder, a GGUF file or a hub id")
    if not (path / "config.json").is_file():
        adapter = " (it holds an adapter: give its base as MODEL and this folder to --adapter)"
        raise ValueError(f"MODEL {path} has no config.json{adapter if (path / 'adapter_config.json').exists() else ''}")
    if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise ValueError(f"MODEL {path} has a config.json but no weights (*.safetensors)")
    with _errors(f"MODEL {path / 'config.json'} is damaged"):
        json.loads((path / "config.json").read_text())
