"""train_step and decode: a whole model, SmolLM2-135M on a CPU, larger shapes on a GPU.

Every contender starts from the same weights and the same adapters.  The right answer is that of a float32 model with the
dequantized weights: the loss and every adapter gradient of one step, or the logits of a prompt, may be off by twice what the
same model errs in plain torch at bf16 (ours), or eight times (rivals).  Dense contenders hold the weights before quantization,
a different function, so only their loss is compared.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import Results

from ..rivals.base import need
from ..suite import FACTOR, OURS, Contender, Line, UnavailableError

R, ALPHA, LR = 16, 32, 1e-4


@dataclass(frozen=True)
class Shape:
    """A Llama-like model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 1, 256, True),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, False),
}


def load(model: str, layers: int | None, device: torch.device) -> nn.Module:
    """A bf16 model: a folder that transformers can load, or random weights in one of SHAPES, cut to `layers` layers."""
    need("transformers")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if Path(model).is_dir():
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
        if layers:
            net.model.layers = net.model.layers[:layers]
            net.config.num_hidden_layers = layers
    elif model in SHAPES:
        s = SHAPES[model]
        config = LlamaConfig(
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_hidden_layers=layers or s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            vocab_size=s.vocab,
            tie_word_embeddings=s.tied,
            max_position_embeddings=8192,
        )
        torch.manual_seed(0)
        with torch.device(device):
            net = LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        raise ValueError(f"model must be a folder or one of {', '.join(SHAPES)}, got {model!r}")
    net.config.use_cache = False
    return net.to(device).requires_grad_(False)


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """The layers that get an adapter: every linear but the head."""
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


class Base:
    """What all contenders share: the dense model, its quantized weights and the starting adapters."""

    def __init__(self, model: str, layers: int | None, device: torch.device) -> None:
        self.net = load(model, layers, device)
        self.device = device
        self.quantized = {n: lk.quantize(m.weight) for n, m in linears(self.net).items()}
        generator = torch.Generator().manual_seed(1)
        self.adapters = {}
        for name, m in linears(self.net).items():
            A = torch.randn(R, m.in_features, generator=generator) / (3 * m.in_features) ** 0.5
            B = torch.randn(m.out_features, R, generator=generator) * 0.005
            self.adapters[name] = (A.to(device), B.to(device))

    @property
    def nbytes(self) -> int:
        return sum(qw.nbytes for qw in self.quantized.values())

    def dense(self, quantized: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The model with its own or with the dequantized weights."""
        net = copy.deepcopy(self.net).to(dtype)
        if quantized:
            for name, m in linears(net).items():
                m.weight.data = lk.dequantize(self.quantized[name], dtype)
        return net

    # ---- contenders

    def ours(self) -> nn.Module:
        """As `lora-kernels finetune` and `generate` build it."""
        net = lk.apply_qlora(copy.deepcopy(self.net), r=R, lora_alpha=ALPHA)
        lk.group_projections(net)
        self._start(net)
        return net

    def peft(self, net: nn.Module, **options: Any) -> nn.Module:
        need("peft")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none")
        config.task_type = "CAUSAL_LM"
        net = get_peft_model(net, config, **options)
        self._start(net)
        return net

    def bitsandbytes(self, **options: Any) -> nn.Module:
        """NF4 with double quantization in `Linear4bit`, as transformers' loader puts it there, and PEFT's adapters on top."""
        bnb = need("bitsandbytes")
        net = copy.deepcopy(self.net)
        for name, m in linears(net).items():
            layer = bnb.nn.Linear4bit(m.in_features, m.out_features, False, torch.bfloat16, device="meta")
            layer.weight, layer.bias = self._cloned(name).to_bitsandbytes(), m.bias
            layer.quant_state = layer.weight.quant_state
            net.set_submodule(name, layer)
        net.is_loaded_in_4bit = True
        return self.peft(net, **options)

    def _cloned(self, name: str) -> lk.QuantizedWeight:
        return copy.deepcopy(self.quantized[name])

    @torch.no_grad()
    def _start(self, net: nn.Module) -> None:
        for name, (A, B) in adapters_of(net).items():
            start_A, start_B = self.adapters[name]
            A.copy_(start_A)
            B.copy_(start_B)


def adapters_of(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B by the name of the linear layer in the base model, for our layers and for PEFT's."""
    found = {}
    for name, m in net.named_modules():
        if getattr(m, "lora_A", None):
            found[name.removeprefix("base_model.model.")] = (m.lora_A["default"].weight, m.lora_B["default"].weight)
    return found


def build(base: Base, name: str) -> tuple[nn.Module, bool]:
    """The model of a contender, and whether it runs under bf16 autocast."""
    autocast = name.endswith("-autocast")
    kind = name.removesuffix("-autocast").removesuffix("-bf16")
    options = {"autocast_adapter_dtype": False} if name.endswith("-bf16") else {}
    if kind == OURS:
        return base.ours(), False
    if kind == "bnb+peft":
        net = base.bitsandbytes(**options)
    elif kind == "dense+peft":
        net = base.peft(base.dense(False), **options)
    elif kind == "dense":
        net = base.dense(False)
    else:
        raise UnavailableError(f"no such contender: {name}")
    if name.endswith("-bf16"):
        for pair in adapters_of(net).values():
            for matrix in pair:
                matrix.data = matrix.data.to(torch.bfloat16)
    return net, autocast


# ---- train_step

TRAIN_NAMES = (
    OURS,
    "bnb+peft",  # PEFT's default: float32 adapters, computed in float32
    "bnb+peft-autocast",  # what Trainer(bf16=True) does: float32 adapters, computed in bf16
    "bnb+peft-bf16",  # autocast_adapter_dtype=False: bf16 adapters and optimizer state
    "dense+peft",
    "dense",  # frozen, no adapters, no optimizer: the limit
)


class _ModelLine(Line):
    def __init__(self, base: Base, model: str, device: torch.device) -> None:
        self._base: Base | None = base
        self.model, self.device = model, device

    @property
    def base(self) -> Base:
        assert self._base is not None, "the line was released"
        return self._base

    def release(self) -> None:
        super().release()
        self._base = None


class TrainStep(_ModelLine):
    suite = "train_step"
    names = TRAIN_NAMES

    def __init__(self, base: Base, model: str, batch: int, length: int, device: torch.device) -> None:
        super().__init__(base, model, device)
        self.batch, self.length = batch, length
        layers = base.net.config.num_hidden_layers
        self.label = f"{Path(model).name}, {layers} layers, batch {batch} x {length}"
        generator = torch.Generator().manual_seed(2)
        vocab = base.net.config.vocab_size
        self.ids = [torch.randint(0, vocab, (batch, length), generator=generator).to(device) for _ in range(4)]

    def shape(self) -> dict[str, Any]:
        return {"model": Path(self.model).name, "batch": self.batch, "length": self.length}

    def rate(self) -> tuple[str, float]:
        return "tokens", float(self.batch * self.length)

    def build(self, name: str) -> Contender:
        net, autocast = build(self.base, name)
        net.train()
        params = [p for p in net.parameters() if p.requires_grad]
        if not params:  # dense: gradients still flow through every layer, from the embeddings on
            net.enable_input_require_grads()
        optimizer = torch.optim.AdamW(params, lr=LR) if params else None

        def loss(i: int) -> Tensor:
            ids = self.ids[i % len(self.ids)]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                return net(input_ids=ids, labels=ids).loss

        def step(i: int) -> None:
            loss(i).backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        def outputs() -> Results:
            value = loss(0)
            value.backward()
            got = {"loss": value.detach()} | gradients(net)
            for p in params:
                p.grad = None
            return got

        return Contender(step, outputs, self.base.nbytes, graphable=False)

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        weights = sum(qw.numel for qw in self.base.quantized.values()) + self.base.net.lm_head.weight.numel()
        adapters = 0 if name == "dense" else sum(A.numel() + B.numel() for A, B in self.base.adapters.values())
        tokens = self.batch * self.length
        return 0.0, tokens * (4.0 * weights + 6.0 * adapters)

    @cached_property
    def _expected(self) -> tuple[Results, Results]:
        """Of the float32 model with the dequantized weights, and of plain torch in bf16."""
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            net = self.base.peft(self.base.dense(True, dtype)).train()
            value = net(input_ids=self.ids[0], labels=self.ids[0]).loss
            value.backward()
            found.append({"loss": value.detach()} | gradients(net))
        return found[0], found[1]

    def judge(self, name: str, got: Results) -> str | None:
        want, base = self._expected
        value, right = got["loss"].item(), want["loss"].item()
        off = abs(value - right) / right
        if name.startswith("dense"):
            return None if off < 0.25 else f"loss {value:.4f}, that of the quantized model is {right:.4f}"
        allowed = FACTOR[name == OURS] * abs(base["loss"].item() - right) / right + 2e-3
        if not off <= allowed:
            return f"loss {value:.5f}, in float32 {right:.5f}"
        if set(got) != set(want):
            return f"{len(got) - 1} adapter gradients, expected {len(want) - 1}"
        errors, plain = ([_distance(r[k], want[k]) for k in want if k != "loss"] for r in (got, base))
        for what, measure in (("median", statistics.median), ("largest", max)):
            error, most = measure(errors), FACTOR[name == OURS] * measure(plain) + 1e-2
            if not error <= most:
                return f"{what} relative error of the adapter gradients {error:.2g} against float32, allowed {most:.2g}"
        return None


def gradients(net: nn.Module) -> Results:
    """float32 copies of the gradients of all adapters."""
    return {
        f"{name}.{letter}": matrix.grad.detach().float().clone()
        for name, pair in adapters_of(net).items()
        for letter, matrix in zip("AB", pair, strict=True)
        if matrix.grad is not None
    }


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm().clamp(min=1e-30)).item()


# ---- decode

DECODE_NAMES = (OURS, "bnb+peft", "bnb+peft-bf16", "dense+peft", "dense")


class Decode(_ModelLine):
    suite = "decode"
    names = DECODE_NAMES

    def __init__(self, base: Base, model: str, prompt: int, new: int, device: torch.device) -> None:
        super().__init__(base, model, device)
        self.new = new
        self.label = f"{Path(model).name}, {base.net.config.num_hidden_layers} layers, prompt {prompt}, {new} new tokens"
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, base.net.config.vocab_size, (1, prompt), generator=generator).to(device)

    def shape(self) -> dict[str, Any]:
        return {"model": Path(self.model).name, "prompt": self.ids.shape[1], "new": self.new}

    def rate(self) -> tuple[str, float]:
        return "tokens", float(self.new)

    def build(self, name: str) -> Contender:
        net, _ = build(self.base, name)
        net.eval()
        net.config.use_cache = True

        @torch.no_grad()
        def run(i: int) -> Tensor:
            return net.generate(
                input_ids=self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                do_sample=False,
                pad_token_id=0,
            )

        def outputs() -> Results:
            with torch.no_grad():
                return {"logits": net(input_ids=self.ids).logits[0].float()}

        return Contender(run, outputs, self.base.nbytes, graphable=False)

    def work(self, name: str, contender: Contender) -> tuple[float, float]:
        head = self.base.net.lm_head.weight
        weights = contender.nbytes if not name.startswith("dense") else sum(2 * q.numel for q in self.base.quantized.values())
        return float(self.new * (weights + head.nbytes)), 0.0

    @cached_property
    def _expected(self) -> tuple[Results, Results]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            net = self.base.peft(self.base.dense(True, dtype)).eval()
            with torch.no_grad():
                found.append({"logits": net(input_ids=self.ids).logits[0].float()})
        return found[0], found[1]

    def judge(self, name: str, got: Results) -> str | None:
        want, base = self._expected
        error, plain = (_distance(r["logits"], want["logits"]) for r in (got, base))
        if name.startswith("dense"):
            return None if error < 1 else f"logits differ by {error:.2g} from those of the quantized model"
        allowed = FACTOR[name == OURS] * plain + 2e-3
        return None if error <= allowed else f"relative error of the logits {error:.2g} against float32, allowed {allowed:.2g}"


def lines(
    suite: str, device: torch.device, model: str, layers: int | None, quick: bool, batch: int, length: int
) -> Sequence[Line]:
    base = Base(model, layers, device)
    if suite == "train_step":
        return [TrainStep(base, model, batch, length, device)]
    return [Decode(base, model, 16, 4 if quick else 32, device)]
