"""Models of the transformers library: load one from a folder, a GGUF file or the hub, give it adapters, write it back.

`load_model` also takes folders in bitsandbytes' 4-bit format, without bitsandbytes: their bytes go straight into
`FusedQLoRALinear`.  `save_quantized` writes such folders.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapter_files import writing
from ..formats import FORMATS, QuantizedWeight, dtype_name
from ..model import apply_qlora, fused_layers
from ..nn import AdapterConfig, FusedQLoRALinear
from ..requirements import require

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STATE = tuple(f".quant_state.bitsandbytes__{q}" for q in FORMATS)


def is_local(model: str) -> bool:
    """Whether `model` is a path on this machine, and not the id of a model on the hub."""
    return Path(model).exists() or model.endswith(".gguf") or model.startswith(("/", ".", "~")) or model.count("/") > 1


def load_model(model: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer on the CPU.

    Args:
        model: a folder in transformers' format, dense or in bitsandbytes' 4-bit format; a GGUF file; or a hub id.
        dtype: of every weight that is not quantized; None for the dtype they are stored in (bfloat16 for a GGUF file).

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: `model` is nothing that can be loaded; the message says what is missing.
    """
    require("transformers", "a model of transformers")
    from transformers import AutoTokenizer

    path = Path(model).expanduser()
    wanted = "auto" if dtype is None else dtype
    if not is_local(str(model)):
        with _errors(f"MODEL {model} is neither a path here nor a model id that can be fetched from the hub"):
            return _load_dense(str(model), dtype=wanted), AutoTokenizer.from_pretrained(str(model))
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype or torch.bfloat16)
    config = _read_config(path)
    with _errors(f"MODEL {path} has no tokenizer that transformers can read"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if config.get("quantization_config"):
        return _load_quantized(path, config["quantization_config"], dtype), tokenizer
    with _errors(f"MODEL {path} can't be loaded"):
        return _load_dense(str(path), dtype=wanted, local_files_only=True), tokenizer


def _load_dense(where: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys'])[:5])}")
    return model


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """One line in place of the many kinds of errors by which a loader says that its input is unfit."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, SafetensorError) as e:
        raise ValueError(f"{what}: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}") from e


def _read_config(path: Path) -> dict[str, Any]:
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
        return json.loads((path / "config.json").read_text())


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


# ---- 4-bit folders


def _load_quantized(path: Path, quantization: dict[str, Any], dtype: torch.dtype | None) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if quantization.get("quant_method") != "bitsandbytes" or not quantization.get("load_in_4bit"):
        method = f"{quantization.get('quant_method')!r}, load_in_4bit={bool(quantization.get('load_in_4bit'))}"
        raise ValueError(f"MODEL {path} is quantized ({method}); only dense weights and bitsandbytes' 4-bit format are read")
    with _errors(f"MODEL {path} can't be loaded"):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        del config.quantization_config
        dtype = dtype or config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tensors = _read_weights(path)
        _fill(model, tensors, dtype)
        if (path / "generation_config.json").exists():
            model.generation_config = type(model.generation_config).from_pretrained(str(path), local_files_only=True)
    return model.eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    index = path / _INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(path / file, framework="pt") as f:
            tensors |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Puts 4-bit layers and all other weights into a model whose parameters are on the meta device."""
    quantized = [k.removesuffix(s) for k in tensors for s in _STATE if k.endswith(s)]
    if not quantized:
        raise ValueError("config.json says 4 bits, but the weights hold no 4-bit weight")
    for key in quantized:
        qw = QuantizedWeight.from_state_dict(tensors, key)
        for used in [k for k in tensors if k == key or k.startswith(f"{key}.")]:
            del tensors[used]
        name = key.removesuffix(".weight")
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != qw.shape:
            raise ValueError(f"{key} is a 4-bit weight {list(qw.shape)}, the model has {linear} there")
        if linear.bias is not None and f"{name}.bias" not in tensors:
            raise ValueError(f"the weights lack {name}.bias")
        bias = None if linear.bias is None else tensors.pop(f"{name}.bias").to(dtype)
        model.set_submodule(name, FusedQLoRALinear.from_quantized(qw, bias, None, None, training=False))
    dense = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    _, unexpected = model.load_state_dict(dense, strict=False, assign=True)
    if unexpected:
        raise ValueError(f"the model has no {', '.join(unexpected[:5])}")
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"the weights lack {', '.join(missing[:5])}")
    model.requires_grad_(False)


def save_quantized(model: Any, tokenizer: Any, out: str | os.PathLike[str]) -> None:
    """Writes a model of `FusedQLoRALinear` layers, without its adapters, as a folder in bitsandbytes' 4-bit format.

    Args:
        model: every quantized layer has the same `quant_type`, blocksize, storage and double quantization.
        out: a folder that does not exist yet; it appears when complete.

    Raises:
        ValueError: the layers differ in format, or `out` exists.
    """
    layers = fused_layers(model)
    weights = [layer.quantized_weight for layer in layers.values()]
    formats = {(w.quant_type, w.double_quant, w.quant_storage) for w in weights}
    if len(formats) != 1:
        raise ValueError(f"model must have 4-bit layers of one format, got {len(formats)} formats")
    ((quant_type, double_quant, storage),) = formats
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_adapter(n)]
    # one code table serves all layers, and safetensors wants one tensor a key
    state = {k: v.clone() if k.endswith(".quant_map") else v for k, v in model.state_dict().items() if not _is_adapter(k)}
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "_load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": dtype_name(storage),
        "bnb_4bit_compute_dtype": dtype_name(model.dtype),
        "llm_int8_skip_modules": skipped or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    try:
        _save_folder(model, tokenizer, out, state)
    finally:
        del model.config.quantization_config


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def save_merged(model: Any, tokenizer: Any, out: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Writes the model as a dense folder: each weight is the dequantized base plus the active adapter's update, in `dtype`.

    The `FusedQLoRALinear` layers of `model` are replaced by `nn.Linear`.

    Args:
        out: a folder that does not exist yet; it appears when complete.
        dtype: of all weights.

    Raises:
        ValueError: `out` exists.
    """
    for name, layer in fused_layers(model).items():
        model.set_submodule(name, layer.to_linear(dtype))
    _save_folder(model.to(dtype), tokenizer, out, None)


def check_new_folder(out: str | os.PathLike[str]) -> Path:
    """`out` as a path; raises ValueError if there is something of that name."""
    if Path(out).exists():
        raise ValueError(f"--out {out} exists already: name a folder that does not")
    return Path(out)


def _save_folder(model: Any, tokenizer: Any, out: str | os.PathLike[str], state: dict[str, Tensor] | None) -> None:
    out = check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        with writing(out):
            model.save_pretrained(tmp, state_dict=state)
        tokenizer.save_pretrained(tmp)
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ---- adapters and answers


def add_adapters(model: nn.Module, adapter: AdapterConfig, target_modules: str | Sequence[str], **quant: Any) -> None:
    """Gives a model fresh adapters: `apply_qlora`, or for a model that is in 4 bits already, an adapter on each target.

    Args:
        adapter: of each target layer.
        target_modules: as in `apply_qlora`.
        quant: `quant_type`, `blocksize`, `double_quant` for a dense model; one in 4 bits keeps its own.
    """
    layers = fused_layers(model)
    if not layers:
        lora = (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora)
        apply_qlora(model, *lora, target_modules=target_modules, **quant)
        return
    from ..model import check_patterns, matches

    if target_modules != "all-linear":
        check_patterns("target_modules", target_modules, list(layers), strict=True)
    model.requires_grad_(False)
    for name, layer in layers.items():
        if target_modules == "all-linear" or matches(name, target_modules):
            layer.add_adapter("default", adapter)


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float = 0.0, streamer: Any = None) -> str:
    """Answers a prompt, as a chat if the tokenizer has a chat template.

    Args:
        temperature: 0 for the likeliest token each time.
        streamer: a transformers streamer that gets the tokens as they come.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = inputs["input_ids"].shape[1]
    model.eval()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
