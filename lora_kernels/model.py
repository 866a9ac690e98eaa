"""Whole models: put `FusedQLoRALinear` in place of the linear layers, and choose adapters."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .formats import check_blocksize, check_storage
from .grouping import InputGroup
from .nn import AdapterConfig, FusedQLoRALinear, check_compute_dtype


def fused_layers(model: nn.Module) -> dict[str, FusedQLoRALinear]:
    """The `FusedQLoRALinear` modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedQLoRALinear)}


def matches(name: str, patterns: str | Collection[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def is_bitsandbytes(module: nn.Module) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def is_peft(module: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


after_quantizing: list[Callable[[], None]] = []
"""Called when `apply_qlora` has made a model without adapters, which another library may add."""


def apply_qlora(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = ("lm_head",),
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Turns a model into a QLoRA model, in place: every linear layer but the excluded ones is frozen in 4 bits, the targets
    get an adapter called "default", and every other parameter is frozen.

    Dense layers are quantized one at a time; `bnb.nn.Linear4bit` layers keep their bytes and their own format.

    Args:
        model: any `nn.Module` with `nn.Linear` or `bnb.nn.Linear4bit` layers below it.
        r, lora_alpha, lora_dropout, use_rslora: of each adapter; `r=0` quantizes only.
        target_modules: layers that get an adapter: "all-linear", a list of names or last parts of names ("q_proj"), or a
            regular expression for the whole name.
        exclude_modules: layers that stay as they are, named in the same way.
        quant_type, blocksize, double_quant, quant_storage, compute_dtype: see `FusedQLoRALinear`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: a bad argument, a pattern that matches no linear layer, a weight with NaN or infinity (named),
            a weight shared with another module, a model that carries adapters already.  The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    adapter = AdapterConfig(r, lora_alpha, lora_dropout, use_rslora) if r else None
    check_blocksize(blocksize, quant_type)
    check_compute_dtype(compute_dtype)
    if isinstance(model, (nn.Linear, FusedQLoRALinear)):
        raise ValueError("model is itself a linear layer, which can't be replaced in place: use FusedQLoRALinear.from_linear")
    for name, module in model.named_modules():
        if isinstance(module, FusedQLoRALinear):
            raise ValueError(f"model was given to apply_qlora before ({name} is a FusedQLoRALinear): use its add_adapter")
        if is_peft(module):
            raise ValueError(f"model carries PEFT adapters ({name}): give apply_qlora the base model, before get_peft_model")

    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(module, []).append(name)
    names = [n for group in places.values() for n in group]
    check_patterns("exclude_modules", exclude_modules, names, strict=False)
    linears = {m: group for m, group in places.items() if not any(matches(n, exclude_modules) for n in group)}
    if not linears:
        raise ValueError(f"model has no linear layer to convert; linear layers: {', '.join(names) or 'none'}")
    if target_modules != "all-linear":
        check_patterns("target_modules", target_modules, [n for group in linears.values() for n in group], strict=True)
    _check_weights(model, linears, quant_storage)

    for param in model.parameters():
        param.requires_grad_(False)
    for module, group in linears.items():
        target = adapter if target_modules == "all-linear" or any(matches(n, target_modules) for n in group) else None
        if is_bitsandbytes(module):
            fused = FusedQLoRALinear.from_bitsandbytes(module, r=0, compute_dtype=compute_dtype)
        else:
            assert isinstance(module, nn.Linear)
            fused = FusedQLoRALinear.from_linear(
                module,
                r=0,
                quant_type=quant_type,
                blocksize=blocksize,
                double_quant=double_quant,
                quant_storage=quant_storage,
                compute_dtype=compute_dtype,
            )
        if target is not None:
            fused.add_adapter("default", target)
        for name in group:
            model.set_submodule(name, fused)
    if adapter is None:
        for call in after_quantizing:
            call()
    return model


def check_patterns(argument: str, patterns: str | Sequence[str], names: list[str], strict: bool) -> None:
    if not isinstance(patterns, str) and not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument} must be a string or a list of strings, got {patterns!r}")
    if strict:
        for p in [patterns] if isinstance(patterns, str) else patterns:
            if not any(matches(n, patterns if isinstance(patterns, str) else [p]) for n in names):
                leaves = sorted({n.rpartition(".")[2] for n in names})
                raise ValueError(f"{argument}: {p!r} matches no linear layer; their names end in {', '.join(leaves)}")


def _check_weights(model: nn.Module, linears: dict[nn.Module, list[str]], quant_storage: torch.dtype) -> None:
    owners: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(param), []).append(name)
    for module, group in linears.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        own = {f"{n}.weight" for n in group}
        shared = [n for n in owners[id(weight)] if n not in own]
        if shared:
            raise ValueError(
                f"{group[0]}.weight is shared with {shared[0]} and can't be quantized: add {group[0]!r} to exclude_modules"
            )
        if is_bitsandbytes(module):
            state = getattr(weight, "quant_state", None)
            if state is None or getattr(state, "packing_format_for_cpu", False):
                why = "is not quantized yet" if state is None else "was repacked by bitsandbytes for CPU inference"
                raise ValueError(
                    f"{group[0]}: this Linear4bit {why}; load the model again and convert it before its first forward pass"
                )
            continue
        check_storage(quant_storage, weight.numel())
        if not weight.is_meta and not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise ValueError(f"{group[0]}.weight contains NaN or infinity")


# ---- adapters of a whole model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes `name` the active adapter of every layer that has it; the other layers then run without one.

    Args:
        name: an adapter, or None for none.

    Raises:
        ValueError: no layer has an adapter of that name.
        RuntimeError: an adapter is merged into its layer's weight.  The model is unchanged then.
    """
    layers = fused_layers(model).values()
    for layer in layers:
        layer.require_unmerged("set_adapter")
    known = sorted({a for layer in layers for a in layer.adapters})
    if name is not None and name not in known:
        raise ValueError(f"there is no adapter {name!r} in the model; adapters: {', '.join(known) or 'none'}")
    for layer in layers:
        layer.set_adapter(name if name in layer.adapters else None)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model computes as its frozen base."""
    before = {layer: layer.adapters_enabled for layer in fused_layers(model).values()}
    for layer in before:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.enable_adapters(enabled)


PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a Hugging Face attention or MLP block that are called on the same x."""


def group_projections(model: nn.Module, groups: Sequence[Sequence[str]] = PROJECTIONS) -> int:
    """Lets sibling layers that a block calls on the same input compute in one call, which reads x once and saves it once.

    Only where every layer of a group is a `FusedQLoRALinear` of the same in_features; results are those of separate calls.

    Args:
        groups: names of sibling layers, one sequence a group.

    Returns:
        The number of groups made.
    """
    made = 0
    for block in model.modules():
        for names in groups:
            layers = [child for name in names if isinstance(child := getattr(block, name, None), FusedQLoRALinear)]
            if len(layers) == len(names) and len({(layer.in_features, layer.compute_dtype) for layer in layers}) == 1:
                InputGroup(layers)
                made += 1
    return made
