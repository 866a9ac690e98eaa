"""Plain functions and constants that several test files use.  Fixtures and pytest's hooks are in conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kernels as lk
from lora_kernels.formats import codebook
from lora_kernels.testing import Inputs, Results, decode

HANG = 1800
"""Seconds after which a process that a test waits for hangs: no machine is so busy that work of seconds takes longer."""

COUNTS: Counter[str] = Counter()
"""Cases that a test counts; shown at the end of the run."""

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
"""What a packed weight may be stored as."""

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama's block."""

TEXTS = [f"number {i} and {i * i} make {i + i * i}." for i in range(16)]
"""What the trainers of the tests learn."""


def bits(t: torch.Tensor) -> torch.Tensor:
    """The elements of `t` as integers."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(sizes[t.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, expected {list(want.shape)}"
    differ = bits(got) != bits(want)
    if differ.any():
        i = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {got.numel()} differ, first at {i}: {got[i]!r}, expected {want[i]!r}"
        )


def same_weight(a: lk.QuantizedWeight, b: lk.QuantizedWeight) -> None:
    """The same bytes, scales and meaning."""
    assert (a.shape, a.dtype, a.quant_type, a.blocksize) == (b.shape, b.dtype, b.quant_type, b.blocksize)
    assert_same_bits(a.codes(), b.codes(), "packed")
    assert a.quant_storage == b.quant_storage
    for name in ("absmax", "absmax2", "code2", "offset"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert_same_bits(x, y, name)


def run_ops(inputs: Inputs, needs: tuple[bool, bool, bool, bool] | None = None) -> Results:
    """Forward and backward of a case through the two ops, with the case's own dropout seed."""
    c = inputs.case
    ops = torch.ops.lora_kernels
    lora = (inputs.lora_A, inputs.lora_B, c.scaling)
    y, h = ops.qlora_linear(inputs.x, *inputs.qw.op_args(), *lora, inputs.bias, c.dropout, inputs.seed)
    if needs is None:
        needs = (True, bool(c.r), bool(c.r), c.bias)
    saved = (inputs.x if needs[1] else None, h if needs[2] else None)
    grads = ops.qlora_linear_backward(inputs.dy, *saved, *inputs.qw.op_args(), *lora, c.dropout, inputs.seed, list(needs))
    names = zip(("dx", "dA", "dB", "dbias"), grads, needs, strict=True)
    return {"y": y} | ({"h": h} if c.r else {}) | {name: g for name, g, need in names if need}


def python(code: str, **env: str | None) -> str:
    """Standard output of a fresh interpreter that runs `code`; a failing one fails the test with its error."""
    full = {k: v for k, v in (os.environ | env).items() if v is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` and its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def model_bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state of a model."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name], name)


def layer_of(K: int = 100, N: int = 36, trained: bool = True, **options: Any) -> lk.FusedQLoRALinear:
    """A layer whose adapter has an effect, as after training."""
    layer = lk.FusedQLoRALinear(K, N, **options)
    if trained and layer.active_adapter:
        torch.nn.init.normal_(layer.lora_B[layer.active_adapter].weight, std=0.02)
    return layer


def dense(layer: lk.FusedQLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer should compute, in float64 from its own bytes."""
    y = x.double() @ decode(layer.quantized_weight, torch.float32).double().T
    name = layer.active_adapter
    if name and layer.adapters_enabled and not layer.merged:
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        y = y + layer.adapters[name].scaling * (x.double() @ A.T @ B.T)
    return y if layer.bias is None else y + layer.bias.double()


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2) -> torch.nn.Module:
    """A random Llama; every K is a multiple of 64, where bitsandbytes' CPU kernels decode a block of 64 as they should."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    torch.set_rng_state(state)
    return model


def random_weight(generator: torch.Generator, index: int) -> torch.Tensor:
    """A weight of the kind `index`: random sizes, odd ones and short last blocks among them, nasty contents."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    N, K = integer(1, 40), integer(1, 700) if index % 3 else 64 * integer(1, 9)
    weight = torch.randn(N, K, generator=generator)
    kind = ("normal", "tiny", "huge", "zero blocks", "outlier rows", "denormal", "constant", "few values")[index % 8]
    if kind == "normal":
        weight *= 0.02
    elif kind == "tiny":
        weight *= 1e-7
    elif kind == "huge":
        weight *= 3e4
    elif kind == "zero blocks":
        weight.view(-1)[: integer(0, weight.numel() + 1)] = 0
        weight[integer(0, N) :] = -0.0
    elif kind == "outlier rows":
        weight[integer(0, N)] *= 1000
    elif kind == "denormal":
        weight *= 1e-40
    elif kind == "constant":
        weight[:] = weight[0, 0]
    else:  # values on and beside the borders between codes
        borders = (codebook("nf4")[1:] + codebook("nf4")[:-1]) / 2
        weight = torch.cat([borders, borders.nextafter(torch.ones(())), codebook("nf4")])[
            torch.randint(46, (N, K), generator=generator)
        ]
    dtype = FLOATS[integer(0, 3)]
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


def bnb_linear(
    weight: torch.Tensor,
    blocksize: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
    bias: bool = False,
) -> torch.nn.Module:
    """A quantized Linear4bit; it stays in training mode, because in eval mode bitsandbytes repacks the weight on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    N, K = weight.shape
    linear = bnb.nn.Linear4bit(K, N, bias=bias)
    options = {"blocksize": blocksize, "compress_statistics": double_quant, "quant_type": quant_type, "quant_storage": storage}
    linear.weight = bnb.nn.Params4bit(weight.clone(), module=linear, **options)
    return linear.to("cpu").train()


def bnb_llama(seed: int = 0, dtype: torch.dtype = torch.float32, quant_type: str = "nf4", layers: int = 2) -> torch.nn.Module:
    """A random Llama whose linear layers but lm_head are bitsandbytes' with double quantization, in training mode: in eval
    mode bitsandbytes repacks them on the CPU at the first forward pass."""
    model = tiny_llama(seed, dtype, layers=layers)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            linear = bnb_linear(module.weight.data, quant_type=quant_type)
            linear.compute_dtype, linear.compute_type_is_set = dtype, True
            model.set_submodule(name, linear)
    return model.train()


def as_bitsandbytes(model: torch.nn.Module) -> None:
    """Puts bitsandbytes' layers with our forward in place of the fused ones: what `accelerate` makes of a loaded model."""
    from lora_kernels.integrations.bitsandbytes import FusedLinear4bit

    for name, m in list(model.named_modules()):
        if isinstance(m, lk.FusedQLoRALinear):
            model.set_submodule(name, FusedLinear4bit.from_quantized(m.quantized_weight, m.bias))
    model.is_loaded_in_4bit = True


def edit_json(file: Path, **changes: object) -> None:
    """Changes entries of a JSON file; None removes one."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def torchrun(*program: object) -> subprocess.CompletedProcess[str]:
    """Two processes; what they printed, and how torchrun ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--rdzv-backend", "c10d", "--local-addr", "localhost", *map(str, program)]  # whatever the host's name
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG)
