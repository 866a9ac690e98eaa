"""Everything one would use instead of lora_kernels for one linear layer, each at its best documented setting.

A rival is a function that builds a `Layer` from the inputs of a case and the dense weight `W` (the dequantized one: all
contenders hold the same numbers).  It raises UnavailableError if its package is missing.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.formats import codebook
from lora_kernels.testing import Inputs

from ..suite import OURS, UnavailableError
from . import gpu as rivals_gpu


def need(package: str) -> ModuleType:
    """The imported package.  Raises UnavailableError where it can't be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        missing = not isinstance(e, ModuleNotFoundError) or e.name != package
        raise UnavailableError(f"not usable: {e}" if missing else "not installed") from None
    except Exception as e:  # a package that wants a GPU at import
        raise UnavailableError(f"not usable: {type(e).__name__}: {e}") from None


@dataclass
class Layer:
    """One copy of a contender's layer.

    Attributes:
        forward: `x [M, K]` -> `[M, N]`, differentiable.
        leaves: lora_A and lora_B, or nothing for a layer without adapter.
        nbytes: of the frozen weight as stored.
    """

    forward: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...] = ()
    nbytes: int = 0


def _adapter(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.lora_A is not None and inputs.lora_B is not None
    return inputs.lora_A.detach().clone().requires_grad_(), inputs.lora_B.detach().clone().requires_grad_()


def clone(qw: lk.QuantizedWeight) -> lk.QuantizedWeight:
    return copy.deepcopy(qw)


# ---- ours, and what needs no package


def ours(inputs: Inputs, W: Tensor) -> Layer:
    qw, r = clone(inputs.qw), inputs.case.r
    config = lk.AdapterConfig(r, inputs.case.scaling * r) if r else None
    layer = lk.FusedQLoRALinear.from_quantized(qw, None, None, config, training=True)
    leaves = _set(layer.lora_matrices("default"), inputs) if r else ()
    return Layer(layer, leaves, qw.nbytes)


def _set(matrices: tuple[Tensor, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    for matrix, value in zip(matrices, _adapter(inputs), strict=True):
        matrix.data.copy_(value)
    return matrices


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def dense(inputs: Inputs, W: Tensor) -> Layer:
    """A frozen bf16 `nn.Linear` without adapter: the limit."""
    return Layer(_linear(W.clone()), (), W.nbytes)


def torch_dequantize(qw: lk.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What one writes in plain torch: a table of the two codes of every byte, one gather, one product."""
    absmax = torch_decode_absmax(qw)
    values = _pairs(qw.quant_type, qw.device)[qw.codes().int()].view(-1)[: qw.numel]
    if qw.numel % qw.blocksize:
        return (values * absmax.repeat_interleave(qw.blocksize)[: qw.numel]).to(dtype).view(qw.shape)
    return (values.view(-1, qw.blocksize) * absmax.unsqueeze(1)).to(dtype).view(qw.shape)


@functools.cache
def _pairs(quant_type: str, device: torch.device) -> Tensor:
    code = codebook(quant_type).to(device)
    byte = torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)


def torch_decode_absmax(qw: lk.QuantizedWeight) -> Tensor:
    if not qw.double_quant:
        return qw.absmax
    assert qw.code2 is not None and qw.absmax2 is not None and qw.offset is not None
    return qw.code2[qw.absmax.int()] * qw.absmax2.repeat_interleave(256)[: qw.n_blocks] + qw.offset


def plain_torch(inputs: Inputs, W: Tensor) -> Layer:
    """Dequantize, matrix product, adapter by `addmm`."""
    qw, (A, B) = clone(inputs.qw), _adapter(inputs)
    s = inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, torch_dequantize(qw, x.dtype))
        return torch.addmm(y, x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=s)

    return Layer(forward, (A, B), qw.nbytes)


# ---- PEFT and bitsandbytes


def _peft(inputs: Inputs, base: nn.Module, autocast: bool, training: bool = True) -> Layer:
    need("peft")
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.q_proj = base
    r = inputs.case.r
    config = LoraConfig(r=r, lora_alpha=inputs.case.scaling * r, target_modules=["q_proj"], lora_dropout=0.0)
    layer = get_peft_model(holder, config).base_model.model.q_proj
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    leaves = _set(matrices, inputs)
    layer.train(training)
    if not autocast:
        return Layer(layer, leaves)
    device_type = inputs.x.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return layer(x)

    return Layer(forward, leaves)


def linear4bit(qw: lk.QuantizedWeight) -> nn.Module:
    """`bnb.nn.Linear4bit` over the same bytes."""
    bnb = need("bitsandbytes")
    N, K = qw.shape
    layer = bnb.nn.Linear4bit(K, N, False, torch.bfloat16, qw.double_quant, qw.quant_type, device="meta")
    layer.weight = clone(qw).to_bitsandbytes()
    layer.quant_state = layer.weight.quant_state
    return layer


def bnb_peft(autocast: bool) -> Callable[[Inputs, Tensor], Layer]:
    """In training mode, which on a CPU keeps the weight as it is stored.  Without autocast PEFT computes its float32 adapters
    in float32 (its default); with bf16 autocast in bf16 (what `Trainer(bf16=True)` does)."""

    def make(inputs: Inputs, W: Tensor) -> Layer:
        layer = _peft(inputs, linear4bit(inputs.qw), autocast)
        layer.nbytes = inputs.qw.nbytes
        return layer

    return make


def dense_peft(inputs: Inputs, W: Tensor) -> Layer:
    layer = _peft(inputs, _linear(W.clone()), autocast=True)
    layer.nbytes = W.nbytes
    return layer


def bnb_inference(inputs: Inputs, W: Tensor) -> Layer:
    """Without adapter."""
    layer, nbytes = _repacked(inputs)
    return Layer(layer, (), nbytes)


def bnb_inference_peft(inputs: Inputs, W: Tensor) -> Layer:
    base, nbytes = _repacked(inputs)
    layer = _peft(inputs, base, autocast=True, training=False)
    layer.nbytes = nbytes
    return layer


def _repacked(inputs: Inputs) -> tuple[nn.Module, int]:
    """bitsandbytes repacks a weight for the CPU at its first forward pass in eval mode: for inference only, and the scales
    become bf16.  Returns the layer and the bytes of its weight."""
    bnb = need("bitsandbytes")
    if inputs.x.device.type != "cpu":
        raise UnavailableError("a layout of the CPU only")
    if not bnb.functional.has_avx512bf16():
        raise UnavailableError("this CPU has no AVX512-BF16, without which bitsandbytes does not repack")
    layer = linear4bit(inputs.qw).eval()
    with torch.no_grad():
        layer(inputs.x[:1])
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        raise UnavailableError("bitsandbytes does not repack this shape")
    return layer, layer.weight.nbytes + state.absmax.nbytes


# ---- torchao


def torchao_nf4() -> ModuleType:
    """The module that holds torchao's NF4 tensor; it moved between versions."""
    need("torchao")
    for path in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        try:
            return importlib.import_module(path)
        except ImportError:
            continue
    raise UnavailableError("this version of torchao has no NF4 tensor")


def to_nf4(weight: Tensor) -> Tensor:
    """torchao's tensor at its default block sizes."""
    nf4 = torchao_nf4()
    if weight.numel() % (64 * 256):
        raise UnavailableError("takes multiples of 16384 elements only")
    return nf4.to_nf4(weight, 64, 256)


def torchao(inputs: Inputs, W: Tensor) -> Layer:
    """torchao's NF4 tensor and `linear_nf4`, with the adapter as torchtune's QLoRA has it."""
    nf4 = torchao_nf4()
    weight, (A, B), s = to_nf4(W.clone()), _adapter(inputs), inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        y = nf4.linear_nf4(x, weight)
        return y + (x @ A.to(x.dtype).T) @ B.to(x.dtype).T * s

    return Layer(forward, (A, B), inputs.qw.nbytes)


# ---- GPU only


def unsloth(inputs: Inputs, W: Tensor) -> Layer:
    """Unsloth's `LoRA_W` over a bitsandbytes weight; for one token without gradients `fast_linear_forward`, its decoding."""
    fast_lora, utils = rivals_gpu.unsloth()
    proj = _peft(inputs, linear4bit(inputs.qw), autocast=False)
    base, (A, B), s = proj.forward.base_layer, proj.leaves, inputs.case.scaling

    def forward(x: Tensor) -> Tensor:
        if x.shape[0] == 1 and not torch.is_grad_enabled():
            return utils.fast_linear_forward(proj.forward, x.unsqueeze(0)).squeeze(0)
        return fast_lora.LoRA_W.apply(x.unsqueeze(0), base.weight, base.weight.quant_state, A, B, s).squeeze(0)

    return Layer(forward, (A, B), inputs.qw.nbytes)


def unsloth_dequantize() -> Callable[..., Tensor]:
    return rivals_gpu.unsloth()[1].fast_dequantize


def lorafusion(dequantize: bool) -> Callable[[Inputs, Tensor], Layer]:
    """LoRAFusion's fused kernels: over a 16-bit weight, its own use, or over one that bitsandbytes dequantizes in each call."""

    def make(inputs: Inputs, W: Tensor) -> Layer:
        fused = rivals_gpu.lorafusion()
        (A, B), s, base = _adapter(inputs), inputs.case.scaling, W.clone()
        if dequantize:
            functional, held = need("bitsandbytes").functional, linear4bit(inputs.qw).weight

        def forward(x: Tensor) -> Tensor:
            weight = functional.dequantize_4bit(held.data, held.quant_state).to(x.dtype) if dequantize else base
            return fused(x.unsqueeze(0), weight, A.to(x.dtype), B.to(x.dtype), s, seed=0, dropout_p=0.0).squeeze(0)

        return Layer(forward, (A, B), inputs.qw.nbytes if dequantize else W.nbytes)

    return make


REGISTRY: dict[str, Callable[[Inputs, Tensor], Layer]] = {
    OURS: ours,
    "dense": dense,
    "dense+peft": dense_peft,
    "torch": plain_torch,
    "bnb+peft": bnb_peft(autocast=False),
    "bnb+peft-autocast": bnb_peft(autocast=True),
    "bnb-inference": bnb_inference,
    "bnb-inference+peft": bnb_inference_peft,
    "torchao": torchao,
    "unsloth": unsloth,
    "lorafusion": lorafusion(dequantize=False),
    "lorafusion-nf4": lorafusion(dequantize=True),
}

GPU_ONLY = ("unsloth", "lorafusion", "lorafusion-nf4")
CPU_ONLY = ("bnb-inference", "bnb-inference+peft")


def on(device: torch.device, names: Iterable[str]) -> list[str]:
    """Those that exist on the device."""
    return [n for n in names if n not in (GPU_ONLY if device.type == "cpu" else CPU_ONLY)]
