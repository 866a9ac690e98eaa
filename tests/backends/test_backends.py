"""Which backend computes, and that none is taken silently."""

import json
import threading

import pytest
import torch
from helpers import CPU, assert_same_bits, python

import lora_kernels as lk
from lora_kernels import backends, env
from lora_kernels.backends import reference

OPS = ("quantize", "decode_absmax", "dequantize", "qlora_linear", "qlora_linear_backward")


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    env.backend.cache_clear()
    yield
    env.backend.cache_clear()


def force_by_environment(monkeypatch, name):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", name)
    env.backend.cache_clear()


def name_of(module):
    return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_has_every_op(name):
    module = backends.load(name)
    for op in (*OPS, "unavailable"):
        assert callable(getattr(module, op))


def test_best_first():
    for device_type, names in backends.ORDER.items():
        assert names[-1] == "reference"
        assert set(names) <= set(backends.NAMES)
        assert [n for n, _ in backends.choices(torch.device(device_type))] == list(names)
    available = [n for n, why in backends.choices(CPU) if why is None]
    assert name_of(backends.pick(CPU)) == available[0]
    assert backends.order(torch.device("mps")) == ("reference",)
    assert name_of(backends.pick(torch.device("mps"))) == "reference"


def test_next_one_when_the_first_cannot_run(monkeypatch):
    for name in backends.order(CPU)[:-1]:
        monkeypatch.setattr(backends.load(name), "unavailable", lambda device: "not here")
    assert backends.pick(CPU) is reference
    assert lk.quantize(torch.randn(3, 64)).dequantize().shape == (3, 64)


def test_forced_backend(monkeypatch):
    calls = []
    real = reference.dequantize
    monkeypatch.setattr(reference, "dequantize", lambda *args: calls.append(args) or real(*args))
    qw = lk.quantize(torch.randn(3, 64))
    with lk.use_backend("reference"):
        assert backends.forced() == "reference"
        lk.dequantize(qw)
        thread = threading.Thread(target=lk.dequantize, args=(qw,))
        thread.start()
        thread.join()
    assert len(calls) == 2
    assert backends.forced() is None
    force_by_environment(monkeypatch, "reference")
    lk.dequantize(qw)
    assert len(calls) == 3
    other = next((n for n, why in backends.choices(CPU) if why is None), "reference")
    with lk.use_backend(other):  # the innermost wins over the environment
        assert name_of(backends.pick(CPU)) == other


def test_forced_backend_is_restored():
    with pytest.raises(ZeroDivisionError), lk.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.forced() is None
    with lk.use_backend("native"):
        with lk.use_backend("reference"):
            assert backends.forced() == "reference"
        assert backends.forced() == "native"


def test_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(backends.load("native"), "unavailable", lambda device: "it is not built: run this")
    qw = lk.quantize(torch.randn(3, 64))
    with lk.use_backend("native"):
        for call in (
            lambda: lk.quantize(torch.randn(3, 64)),
            lambda: lk.dequantize(qw),
            lambda: lk.qlora_linear(torch.randn(2, 64), qw),
        ):
            with pytest.raises(RuntimeError, match="'native' is forced but can't run on cpu: it is not built: run this"):
                call()


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*reference, got 'cutlass'"), lk.use_backend("cutlass"):
        pass
    assert backends.forced() is None
    force_by_environment(monkeypatch, "fast")
    with pytest.raises(ValueError, match=r"LORA_KERNELS_BACKEND must be one of .*reference, got 'fast'"):
        lk.quantize(torch.randn(3, 64))
    force_by_environment(monkeypatch, "")
    assert backends.forced() is None


def test_native_codebooks_are_ours():
    native = backends.load("native")
    if reason := native.unavailable(CPU):
        pytest.skip(reason)
    from lora_kernels.formats import codebook

    for quant_type in ("nf4", "fp4"):
        table = torch.as_tensor(native.extension().codebook(quant_type), dtype=torch.float32)
        assert_same_bits(table, codebook(quant_type), quant_type)


ISA_CHECK = """
import json, torch
import lora_kernels as lk
from lora_kernels.backends.native import extension
from lora_kernels.testing import Case, assert_close_to_oracle, decode, make_inputs
from helpers import run_ops
assert extension().cpu_level() == {level!r}, extension().cpu_level()
done = 0
with lk.use_backend("native"):
    shapes = [(0, 5, 7, 1), (1, 33, 100, 3), (17, 70, 129, 8), (65, 48, 320, 40), (3, 64, 576, 16), (33, 1, 1, 0)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for i, (M, N, K, r) in enumerate(shapes):
            case = Case(M, N, K, r, dtype, ["nf4", "fp4"][i % 2], [64, 32, 512][i % 3], i % 2 == 0, True, 0.2 if r else 0.0)
            inputs = make_inputs(case, {seed} + i)
            assert_close_to_oracle(run_ops(inputs), inputs)
            got = lk.dequantize(inputs.qw, dtype)
            assert torch.equal(got.view(-1).view(torch.uint8), decode(inputs.qw, dtype).view(-1).view(torch.uint8)), case.id
            weight = torch.randn(N, K, generator=torch.Generator().manual_seed({seed} + i)).to(dtype)
            qw = lk.quantize(weight, case.quant_type, case.blocksize, case.double_quant)
            with lk.use_backend("reference"):
                want = lk.quantize(weight, case.quant_type, case.blocksize, case.double_quant)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(qw._tensors(), want._tensors()))
            done += 1
print(json.dumps(done))
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_native_levels(level, seed):
    """Every instruction set that this CPU has computes the same, in an interpreter of its own."""
    native = backends.load("native")
    if reason := native.unavailable(CPU):
        pytest.skip(reason)
    levels = native.extension().cpu_levels()
    if level not in levels:
        pytest.skip(f"this CPU has {', '.join(levels)}")
    code = ISA_CHECK.format(level=level, seed=seed)
    assert json.loads(python(code, LORA_KERNELS_CPU_ISA=level, LORA_KERNELS_BACKEND=None).splitlines()[-1]) == 18


def test_unknown_native_level():
    if reason := backends.load("native").unavailable(CPU):
        pytest.skip(reason)
    code = """
import torch, lora_kernels as lk
try:
    lk.quantize(torch.randn(2, 64))
except ValueError as e:
    print(e)
"""
    message = python(code, LORA_KERNELS_CPU_ISA="sse9", LORA_KERNELS_BACKEND=None)
    for word in ("LORA_KERNELS_CPU_ISA", "sse9", "portable"):
        assert word in message
