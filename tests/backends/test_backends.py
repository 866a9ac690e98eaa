"""Which backend computes, and that none is taken silently."""

import json
import threading

import pytest
import torch
from helpers import CPU, assert_same_bits, python
from torch import nn

import lora_kernels as lk
from lora_kernels import backends, env, testing
from lora_kernels.backends import reference
from lora_kernels.formats import FORMATS, Format


@pytest.fixture(autouse=True)
def _nothing_forced_or_found_before(monkeypatch):
    monkeypatch.setattr(backends, "best", backends.best.__wrapped__)
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
def test_a_backend_is_what_the_package_says(name):
    module = backends.load(name)
    assert callable(module.unavailable)
    assert any(callable(getattr(module, op, None)) for op in backends.OPS)
    assert name != "reference" or all(hasattr(module, op) for op in backends.OPS)
    assert getattr(module, "lacks", lambda want: None)("nf4") is None


@pytest.mark.parametrize("lacking", backends.OPS)
def test_an_op_that_a_backend_lacks_falls_to_the_next(lacking, monkeypatch):
    """What a new op is on the day on which one backend has it."""
    before = {op: backends.picked(op, CPU) for op in backends.OPS}
    first = before[lacking]
    if first == "reference":
        pytest.skip("there is one backend")
    monkeypatch.delattr(backends.load(first), lacking)
    after = backends.order(CPU)[backends.order(CPU).index(first) + 1]
    assert {op: backends.picked(op, CPU) for op in backends.OPS} == before | {lacking: after}
    inputs = testing.make_inputs(testing.Case(5, 48, 64, r=4, bias=True))
    x, A, B = (t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    y = lk.qlora_linear(x, inputs.qw, A, B, inputs.case.scaling, inputs.bias)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), inputs.dy)
    testing.assert_close_to_oracle({"y": y, "dx": dx, "dA": dA, "dB": dB}, inputs)
    row = lk.verify(nn.Sequential(lk.FusedQLoRALinear(64, 48))).rows[0]
    if lacking.startswith("qlora_linear"):
        forward, backward = (after, first) if lacking == "qlora_linear" else (first, after)
        assert row.backend == f"{forward}, backward {backward}"
        assert row.reason == f"plain torch, because {first}: it has no {lacking}"
    else:
        assert row.fused
    with (
        lk.use_backend(first),
        pytest.raises(RuntimeError, match=f"{first!r} is forced but can't run on cpu: it has no {lacking}"),
    ):
        backends.pick(lacking, CPU)


def test_a_format_that_a_backend_lacks_falls_to_the_next(monkeypatch):
    """Blocks of 16 elements are none that compiled code takes; layers of other formats are computed as before."""
    first = backends.picked("qlora_linear", CPU, "nf4")
    if first != "native":
        pytest.skip("the C++ extension is not built")
    monkeypatch.setitem(FORMATS, "fine4", Format(FORMATS["nf4"].code, blocksizes=(16, 32)))
    weight = torch.randn(48, 96)
    fine, usual = lk.quantize(weight, "fine4", 16, double_quant=False), lk.quantize(weight, "nf4", 32)
    assert_same_bits(fine.dequantize(), testing.decode(fine, torch.float32))
    x = torch.randn(5, 96, requires_grad=True)
    ys = lk.qlora_linear_group(x, [fine, usual])
    for qw, y in zip((fine, usual), ys, strict=True):
        for got in (y, lk.qlora_linear(x, qw)):
            torch.testing.assert_close(got, x @ testing.decode(qw, torch.float32).T)
    for what, name in (("fine4", "reference"), ("nf4", "native")):
        assert {backends.picked(op, CPU, what) for op in backends.OPS} == {name}
    layer = lk.FusedQLoRALinear(96, 48, quant_type="fine4", blocksize=16)
    (row,) = lk.verify(layer).rows
    assert (row.backend, row.fused, row.format) == ("reference", False, "fine4/16")
    assert row.reason.startswith("plain torch, because native: format 'fine4' must have blocks of a power of two")
    with lk.use_backend("native"), pytest.raises(RuntimeError, match="'native' is forced but can't run on cpu: format 'fine4'"):
        layer(x)
    with pytest.raises(ValueError, match="blocksize must be one of 16, 32, got 64"):
        lk.quantize(weight, "fine4")


def test_best_first():
    for device_type, names in backends.ORDER.items():
        assert names[-1] == "reference"
        assert set(names) <= set(backends.NAMES)
        assert [n for n, _ in backends.choices("qlora_linear", torch.device(device_type))] == list(names)
    available = [n for n, why in backends.choices("qlora_linear", CPU) if why is None]
    assert name_of(backends.pick("qlora_linear", CPU)) == available[0]
    assert backends.order(torch.device("mps")) == ("reference",)
    assert name_of(backends.pick("qlora_linear", torch.device("mps"))) == "reference"


def test_next_one_when_the_first_cannot_run(monkeypatch):
    for name in backends.order(CPU)[:-1]:
        monkeypatch.setattr(backends.load(name), "unavailable", lambda device: "not here")
    assert backends.pick("qlora_linear", CPU) is reference
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
    other = next((n for n, why in backends.choices("qlora_linear", CPU) if why is None), "reference")
    with lk.use_backend(other):  # the innermost wins over the environment
        assert name_of(backends.pick("qlora_linear", CPU)) == other


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
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(qw.tensors(), want.tensors()))
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
