"""Rivals that run on a GPU only: Unsloth's and LoRAFusion's kernels, imported without the training stacks around them.

Both are repositories that expect much else to be installed at import.  What their kernel files import and do not need for one
linear layer (device detection, fp8 kernels, loggers, their own benchmarks) is replaced by stand-ins during the import; the
kernels themselves are untouched.

    UNSLOTH_PATH      a checkout of unsloth (the folder that holds unsloth/); default: the installed package
    LORAFUSION_PATH   a checkout of LoRAFusion (the folder that holds lorafusion/)
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing import Inputs

from ..suite import UnavailableError
from .base import Layer, adapter, need
from .bnb_peft import linear4bit, with_peft


def unsloth(inputs: Inputs, W: Tensor) -> Layer:
    """Unsloth's `LoRA_W` over a bitsandbytes weight; for one token without gradients `fast_linear_forward`, its decoding."""
    fast_lora, utils = unsloth_kernels()
    proj = with_peft(inputs, linear4bit(inputs.qw), autocast=False)
    base, (A, B), s = proj.forward.base_layer, proj.leaves, inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        if x.shape[0] == 1 and not torch.is_grad_enabled():
            return utils.fast_linear_forward(proj.forward, x.unsqueeze(0)).squeeze(0)
        return fast_lora.LoRA_W.apply(x.unsqueeze(0), base.weight, base.weight.quant_state, A, B, s).squeeze(0)

    return Layer(forward, (A, B), inputs.qw.nbytes)


def unsloth_dequantize() -> Callable[..., Tensor]:
    return unsloth_kernels()[1].fast_dequantize


def lorafusion(dequantize: bool) -> Callable[[Inputs, Tensor], Layer]:
    """LoRAFusion's fused kernels: over a 16-bit weight, its own use, or over one that bitsandbytes dequantizes in each call."""

    def make(inputs: Inputs, W: Tensor) -> Layer:
        fused = lorafusion_kernel()
        (A, B), s, base = adapter(inputs), inputs.case.scaling, W.clone()
        if dequantize:
            functional, held = need("bitsandbytes").functional, linear4bit(inputs.qw).weight

        def forward(x: Tensor) -> Tensor:
            weight = functional.dequantize_4bit(held.data, held.quant_state).to(x.dtype) if dequantize else base
            return fused(x.unsqueeze(0), weight, A.to(x.dtype), B.to(x.dtype), s, seed=0, dropout_p=0.0).squeeze(0)

        return Layer(forward, (A, B), inputs.qw.nbytes if dequantize else W.nbytes)

    return make


# ---- their kernels


class _Stub(ModuleType):
    """A module in which every name is a function that does nothing, unless it is given."""

    def __init__(self, name: str, path: Path | None = None, **names: Any) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=path is not None)
        if path is not None:
            self.__path__ = [str(path)]
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


@contextmanager
def _in_place_of(*stubs: _Stub) -> Iterator[None]:
    before = {stub.__name__: sys.modules.get(stub.__name__) for stub in stubs}
    sys.modules.update({stub.__name__: stub for stub in stubs})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _root(variable: str, package: str) -> Path:
    """The folder of a package, found without importing it."""
    if path := os.environ.get(variable):
        folder = Path(path) / package
        if not folder.is_dir():
            raise UnavailableError(f"{variable}={path} holds no folder {package}")
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(f"not installed (or set {variable} to a checkout)")
    return Path(next(iter(spec.submodule_search_locations)))


def _import(what: str, name: str, stubs: list[_Stub]) -> ModuleType:
    try:
        with _in_place_of(*stubs):
            return importlib.import_module(name)
    except Exception as e:  # whatever their import does without a GPU or a dependency
        raise UnavailableError(f"{what} can't be imported: {type(e).__name__}: {e}") from None


class _CurrentStreams:
    """In place of the streams that Unsloth looks up once at import: with those its dequantization misses a CUDA graph."""

    def __getitem__(self, device_index: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream(device_index).cuda_stream)


@functools.cache
def unsloth_kernels() -> tuple[ModuleType, ModuleType]:
    """`unsloth.kernels.fast_lora` and `unsloth.kernels.utils`."""
    root = _root("UNSLOTH_PATH", "unsloth")
    if not torch.cuda.is_available():
        raise UnavailableError("runs on a GPU only")
    try:
        from packaging.version import Version
    except ImportError:
        raise UnavailableError("needs the package packaging") from None
    kind = "hip" if torch.version.hip else "cuda"
    stubs = [
        _Stub("unsloth", root),
        _Stub("unsloth.kernels", root / "kernels"),
        _Stub(
            "unsloth.device_type",
            is_hip=lambda: kind == "hip",
            get_device_type=lambda: kind,
            DEVICE_TYPE=kind,
            DEVICE_TYPE_TORCH="cuda",
            DEVICE_COUNT=torch.cuda.device_count(),
            ALLOW_PREQUANTIZED_MODELS=True,
        ),
        _Stub("unsloth.bnb_availability", native_kernels_ready=lambda *args: True),
        _Stub("unsloth.kernels.fp8"),
        _Stub("unsloth_zoo", root),
        _Stub("unsloth_zoo.utils", Version=lambda v: Version(str(v))),
    ]
    fast_lora = _import("unsloth", "unsloth.kernels.fast_lora", stubs)
    utils = sys.modules["unsloth.kernels.utils"]
    utils.CUDA_STREAMS = _CurrentStreams()
    return fast_lora, utils


@functools.cache
def lorafusion_kernel() -> Callable[..., Tensor]:
    """`fused_linear_lora(x [1, M, K], W, A, B, alpha, seed, dropout_p)`."""
    root = _root("LORAFUSION_PATH", "lorafusion")
    if not torch.cuda.is_available():
        raise UnavailableError("runs on a GPU only")
    stubs = [
        _Stub("lorafusion", root),
        _Stub("lorafusion.utils.benchmark"),
        _Stub("lorafusion.utils.testing"),
    ]
    import triton.language as tl

    if not hasattr(tl, "_experimental_descriptor_load"):  # its TMA kernels want an older Triton; it has the same without TMA
        tiles = "lorafusion.ops.triton_ops"
        stubs += [_Stub(f"{tiles}.fused_lora_{k}_tma") for k in ("xw_sb", "dyw_dsa")]
        stubs.append(_Stub(f"{tiles}.tma_utils", HAS_TMA_DESC=False))
    if importlib.util.find_spec("loguru") is None:
        stubs.append(_Stub("loguru", logger=_Stub("logger")))
    fused = _import("LoRAFusion", "lorafusion.ops.lora_v1", stubs).fused_linear_lora
    config = sys.modules["lorafusion.ops.triton_ops.config"]
    if torch.cuda.get_device_capability()[0] >= 9:  # it knows GPUs by name: an H200 takes the H100's settings
        config.HARDWARE_CONFIGS.setdefault(config.get_device_short_name(), config.H100_CONFIG)
    return fused
