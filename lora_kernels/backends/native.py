"""The compiled backend: one call per op into `lora_kernels._C`, C++ from csrc/cpu for CPU tensors and CUDA from csrc/cuda for
those of a GPU."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import DYNAMIC_MAP, QuantizedWeight
from . import FlatLayer, Layer

_BUILD = "pip install --no-build-isolation -e . (needs g++)"
_BUILD_CUDA = "LORA_KERNELS_BUILD=cuda pip install --no-build-isolation -e . (needs g++ and nvcc)"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension, or None and the reason why it can't be used.

    Raises:
        ValueError: LORA_KERNELS_CPU_ISA names a level that this CPU does not have.
    """
    try:
        extension = importlib.import_module("lora_kernels._C")
        extension.cpu_level()
    except ModuleNotFoundError:
        return None, f"the C++ extension is not built: {_BUILD}"
    except ImportError as e:  # compiled for another torch or Python, or a shared library is missing
        return None, f"the C++ extension can't be loaded: {e}; build it again for torch {torch.__version__}: {_BUILD}"
    built, running = extension.build_info()["torch"], torch.__version__
    if built.split("+")[0] != running.split("+")[0]:
        return None, f"the C++ extension was built for torch {built}, this is torch {running}; build it again: {_BUILD}"
    return extension, None


@functools.cache
def unavailable(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"the C++ extension has no code for {device.type} tensors, only for cpu and cuda"
    extension, reason = _load()
    if reason is not None or device.type == "cpu":
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _unavailable_cuda(extension, device)


def cuda_archs(extension: Any) -> list[str]:
    """The compute capabilities that the CUDA code is compiled for, such as "80"; "90+ptx" runs on all newer ones too."""
    return extension.build_info().get("cuda_archs", "").split()


@functools.cache
def _unavailable_cuda(extension: Any, device: torch.device) -> str | None:
    archs = cuda_archs(extension)
    if not archs:
        return f"the C++ extension was built without CUDA code: {_BUILD_CUDA}"
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(arch, capability) for arch in archs):
        own = f"{capability[0]}{capability[1]}"
        return (
            f"the C++ extension has CUDA code for sm_{', sm_'.join(archs)}, this GPU is sm_{own}: "
            f"LORA_KERNELS_CUDA_ARCHS={own} {_BUILD_CUDA}"
        )
    if problem := extension.cuda_problem():
        return f"the CUDA {extension.build_info()['nvcc']} runtime of the C++ extension finds no GPU: {problem}"
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """A binary runs on later minor versions of its major version, PTX on everything later."""
    number, _, ptx = arch.partition("+")
    compiled = divmod(int(number), 10)
    return compiled <= capability and (compiled[0] == capability[0] or bool(ptx))


def _extension() -> Any:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension


def _flat(layers: Sequence[Layer]) -> list[tuple[Any, ...]]:
    """Layers as the extension takes them: the parts of the weight, then the rest."""
    return [(*qw.op_args(), *rest) for qw, *rest in layers]


def quantize(
    weight: Tensor, quant_type: str, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return _extension().quantize(weight, quant_type, blocksize, DYNAMIC_MAP if double_quant else None)


def decode_absmax(absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor) -> Tensor:
    return _extension().decode_absmax(absmax, absmax2, code2, offset)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return _extension().dequantize(*qw.op_args(), dtype)


def qlora_linear(
    x: Tensor,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (y,), (h,) = qlora_linear_group(x, [(qw, lora_A, lora_B, scaling, bias, dropout_p, seed)])
    return y, h


def qlora_linear_autograd(x: Tensor, layers: Sequence[FlatLayer]) -> list[Tensor] | None:
    """y of each layer with its gradient, as `lora_kernels.autograd` defines it, in C++ from end to end; the seed of a dropout
    mask is drawn where it is None.  None where something watches the call (a dispatch mode, torch.func, a tensor subclass) or
    an argument is not what the contract asks for.
    """
    try:
        return _extension().qlora_linear_autograd(x, layers)
    except TypeError:  # pybind11's, of an argument that is not even a tensor, number or string where it should be
        return None


def qlora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    qw: QuantizedWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    layer = (qw, lora_A, lora_B, scaling, None, dropout_p, seed)
    dx, (dA,), (dB,), (dbias,) = qlora_linear_group_backward([dy], x, [h], [layer], needs[0], [needs[1:]])
    return dx, dA, dB, dbias


def qlora_linear_group(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    return _extension().qlora_linear(x, _flat(layers))


def qlora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    hs: Sequence[Tensor | None],
    layers: Sequence[Layer],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    return _extension().qlora_linear_backward(dys, x, hs, _flat(layers), need_dx, needs)
