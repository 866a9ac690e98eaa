"""The compiled backend: one call per op into C++ from csrc/cpu for CPU tensors and CUDA from csrc/cuda for those of a GPU.

A compiled module is for one Python and for one minor version of torch, which its name says (`lora_kernels._C_torch2_13`); the
package may hold several.
"""

import functools
import importlib
import json
import platform
import shlex
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from ..formats import DYNAMIC_MAP, FORMATS, QuantizedWeight, format_of
from ..layer import FIELDS, Layer
from ..requirements import PIP, numbers
from ..version import __version__

_PACKAGE = Path(__file__).parents[1]


def _build() -> str:
    """The command that compiles the extension for the Python and the torch that run: from the clone that this is, from where
    pip found the source (PEP 610), or from the index."""
    if (_PACKAGE.parent / "csrc").is_dir():
        return f"{PIP} install -e {shlex.quote(str(_PACKAGE.parent))}"
    again = f"{PIP} install --force-reinstall --no-deps --no-cache-dir"
    try:
        url = json.loads(distribution("lora_kernels").read_text("direct_url.json") or "{}").get("url", "")
    except (PackageNotFoundError, ValueError):
        url = ""
    if url.startswith("file:") and (path := Path(url2pathname(urlsplit(url).path))).is_dir():
        return f"{again} {shlex.quote(str(path))}"
    return f"{again} --no-binary lora_kernels lora_kernels=={__version__}"


BUILD = _build()
_BUILD_CUDA = f"LORA_KERNELS_BUILD=cuda {BUILD}"
MODULE = "lora_kernels._C_torch{}_{}".format(*numbers(torch.__version__))


def _files() -> list[str]:
    """The compiled modules of this package, for whatever torch and Python."""
    return sorted(file.name for file in _PACKAGE.glob("_C_torch*.so"))


def mismatch() -> str | None:
    """Why none of the compiled modules of this package is for the Python and the torch that run, or None; nothing is loaded."""
    files = _files()
    if any(MODULE.rpartition(".")[2] + suffix in files for suffix in EXTENSION_SUFFIXES):
        return None
    if not files:
        return f"the C++ extension is not built: {BUILD}"
    return (
        f"the C++ extension is not built for torch {torch.__version__} and Python {platform.python_version()}, only as "
        f"{', '.join(files)}: {BUILD}"
    )


def broken() -> bool:
    """Whether there are compiled modules, and none of them can be used."""
    return bool(_files()) and _load()[0] is None


def warn_of_mismatch() -> None:
    """For the import of the package: one line where modules were compiled and none of them is for this torch and Python."""
    if _files() and (reason := mismatch()):
        _warn(reason)


@functools.cache
def _warn(reason: str) -> None:
    """Once a reason: without the extension, what runs on a CPU takes many times as long."""
    message = f"it computes on a CPU in plain torch, slowly: {reason}"
    warnings.warn_explicit(message, RuntimeWarning, "lora_kernels", 0)  # one line, none of which is this code


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension, or None and the reason why it can't be used.

    Raises:
        ValueError: LORA_KERNELS_CPU_ISA names a level that this CPU does not have.
    """
    try:
        module = importlib.import_module(MODULE)
        if Path(module.__file__ or "").parent != _PACKAGE:  # of another clone that is installed too
            raise ModuleNotFoundError(MODULE)
        fields: tuple[str, ...] = getattr(module, "layer_fields", tuple)()
        if fields != FIELDS:
            raise ImportError(f"it was built for other fields of a layer, {', '.join(fields)} in place of {', '.join(FIELDS)}")
        module.cpu_level()
        for name in FORMATS:
            with suppress(ValueError):  # one that it can't compute with: a call that names it raises, the others go on
                _define(module, name)
    except ModuleNotFoundError:
        reason = mismatch() or f"{MODULE} is not found: {BUILD}"
    except ImportError as e:  # a shared library is missing, or torch is not what its version says
        reason = f"the C++ extension can't be loaded with torch {torch.__version__}: {e}; build it again: {BUILD}"
    else:
        return module, None
    _warn(reason)
    return None, reason


def _define(module: Any, name: str) -> None:
    what = format_of(name)
    module.define_format(name, what.code, what.order, what.blocksizes)


def define(name: str) -> None:
    """Tells the extension of a format that was added to FORMATS after it was loaded.

    Raises:
        ValueError: there is no such format, the extension can't compute with it, or it knows another one of that name.
    """
    _define(extension(), name)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"the C++ extension has no code for {device.type} tensors, only for cpu and cuda"
    module, reason = _load()
    if reason is not None or device.type == "cpu":
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _unavailable_cuda(module, device)


def cuda_archs(module: Any) -> list[str]:
    """The compute capabilities that the CUDA code is compiled for, such as "80"; "90+ptx" runs on all newer ones too."""
    return module.build_info().get("cuda_archs", "").split()


@functools.cache
def _unavailable_cuda(module: Any, device: torch.device) -> str | None:
    archs = cuda_archs(module)
    if not archs:
        return f"the C++ extension was built without CUDA code: {_BUILD_CUDA}"
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(arch, capability) for arch in archs):
        own = f"{capability[0]}{capability[1]}"
        return (
            f"the C++ extension has CUDA code for sm_{', sm_'.join(archs)}, this GPU is sm_{own}: "
            f"LORA_KERNELS_CUDA_ARCHS={own} {_BUILD_CUDA}"
        )
    if problem := module.cuda_problem():
        return f"the CUDA {module.build_info()['nvcc']} runtime of the C++ extension finds no GPU: {problem}"
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """A binary runs on later minor versions of its major version, PTX on everything later."""
    number, _, ptx = arch.partition("+")
    compiled = divmod(int(number), 10)
    return compiled <= capability and (compiled[0] == capability[0] or bool(ptx))


def extension() -> Any:
    """The compiled module.

    Raises:
        RuntimeError: it can't be used; the message says why and what to do.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def quantize(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return extension().quantize(weight, quant_type, blocksize, DYNAMIC_MAP if double_quant else None)


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    return extension().decode_absmax(absmax, absmax2, code2, offset)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return extension().dequantize(*qw.op_args(), dtype)


def qlora_linear(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    return extension().qlora_linear(x, layers)


def qlora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    return extension().qlora_linear_backward(dys, x, hs, layers, need_dx, needs)


def qlora_linear_autograd(x: Tensor, layers: Sequence[Layer]) -> list[Tensor] | None:
    """y of each layer with its gradient, as `lora_kernels.autograd` defines it, in C++ from end to end; the seed of a dropout
    mask is drawn where it is None.  None where something watches the call (a dispatch mode, torch.func, a tensor subclass) or
    an argument is not what the contract asks for.
    """
    return extension().qlora_linear_autograd(x, layers)
