"""The Triton kernels in Triton's interpreter, on the CPU: `emulators/interpreted.py` runs this file in a process of its own."""

import importlib
from dataclasses import replace
from itertools import chain

import pytest
import torch
from helpers import COUNTS, CPU, assert_same_bits, run_ops

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends import reference, triton
from lora_kernels.backends.triton import low_rank, settings
from lora_kernels.backends.triton.dequantize import decode_panel, slices
from lora_kernels.backends.triton.settings import Config, forcing
from lora_kernels.formats import BLOCKSIZES, FORMATS, Format
from lora_kernels.layer import Layer
from lora_kernels.testing import Case, assert_close_to_oracle, assert_dx_of_group, make_inputs

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned", "on_triton")]

# the package has functions of these modules' names
decoder, quantizer = (importlib.import_module(f"lora_kernels.backends.triton.{name}") for name in ("dequantize", "quantize"))
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FLOATS = (FP32, FP16, BF16)


@pytest.fixture
def on_triton(monkeypatch):
    if (reason := triton.unavailable(CPU)) is not None:
        assert "interpreter of Triton 3.6 needs numpy before 2.4" in reason
        pytest.skip(reason)
    monkeypatch.setattr(backends, "NAMES", tuple(dict.fromkeys((*backends.NAMES, "triton"))))
    with lk.use_backend("triton"):
        yield


def test_bytes_are_those_of_bitsandbytes(seed):
    """200 random weights, quantized and decoded by both."""
    F = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(seed)

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for index in range(200):
        weight = torch.randn(1 + integer(9), 1 + integer(200), generator=generator) * 10.0 ** (integer(12) - 8)
        if index % 5 == 0:
            weight.view(-1)[: integer(weight.numel() + 1)] = 0
        weight = weight.to(FLOATS[index % 3]).clamp(-6e4, 6e4)
        quant_type, double_quant, blocksize = ("nf4", "fp4")[index % 2], index % 4 < 2, BLOCKSIZES[integer(8)]
        packed, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
        qw = lk.quantize(weight, quant_type, blocksize, double_quant)
        what = f"case {index}: {list(weight.shape)} {weight.dtype} {quant_type} {blocksize}"
        assert_same_bits(qw.packed, packed, f"{what} packed")
        assert_same_bits(qw.absmax, state.absmax, f"{what} absmax")
        if double_quant:
            assert_same_bits(qw.absmax2, state.state2.absmax, f"{what} absmax2")
            absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert_same_bits(lk.decode_absmax(qw), absmax, f"{what} decode_absmax")
        for dtype in FLOATS:
            with lk.use_backend("reference"):
                want = lk.dequantize(qw, dtype)
            assert_same_bits(lk.dequantize(qw, dtype), want, f"{what} to {dtype}")
        COUNTS["bytes and values on Triton compared with bitsandbytes"] += 1


def test_scales_on_every_step():
    """All 65536 steps of [-1, 1] on which a scale is rounded to 8 bits."""
    steps = torch.arange(65536, dtype=FP32) * 2 / 65535 - 1
    blocks = torch.cat([steps.view(-1, 128), torch.ones(512, 128)], dim=1).flatten()  # 1: so that the block is not scaled
    out, absmax2 = torch.empty(blocks.numel(), dtype=torch.uint8), torch.empty(512)
    quantizer.quantize_scales[(512,)](
        blocks, torch.zeros(()), quantizer._dynamic_midpoints(blocks.device), out, absmax2, out.numel(), 256
    )
    want, want2 = reference._quantize_absmax(blocks)
    assert_same_bits(out, want)
    assert_same_bits(absmax2, want2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 63, 130])
def test_quantize_refuses_what_is_not_finite(value, at):
    weight = torch.randn(131)
    weight[at] = value
    with pytest.raises(ValueError, match="weight contains NaN or infinity"):
        triton.quantize(weight, "nf4", 64, True)


def test_any_rows_and_columns():
    for N, K, blocksize in ((9, 128, 64), (9, 96, 32), (7, 101, 64)):
        qw = lk.quantize(torch.randn(N, K), "nf4", blocksize)
        want = reference.dequantize(qw, FP16)
        for rows, cols in ((range(2, 7), range(K)), (range(N), range(64, 96)), (range(1, 4), range(3, 10))):
            got = decode_panel(qw, rows, cols, torch.empty(N * K, dtype=FP16))
            assert_same_bits(got, want[rows.start : rows.stop, cols.start : cols.stop].contiguous(), f"{rows} {cols}")


CASES = [
    Case(1, 70, 256, r=16, dtype=FP16),
    Case(3, 65, 576, r=8, dtype=FP16, bias=True, lora_dtype=FP16),
    Case(5, 130, 512, r=40, dtype=BF16, dropout=0.3),
    Case(17, 64, 640, r=3, dtype=FP16, quant_type="fp4", blocksize=256),
    Case(33, 33, 96, r=8, dtype=BF16, blocksize=32, double_quant=False),
    Case(64, 96, 192, r=0, dtype=FP16, bias=True),
    Case(72, 129, 320, r=100, dtype=FP16, dropout=0.5),
    Case(130, 66, 128, r=16, dtype=BF16, blocksize=4096),
    Case(5, 33, 101, r=5, dtype=FP16, dropout=0.1),
    Case(6, 64, 1024, r=300, dtype=FP32, lora_dtype=BF16),
    Case(0, 64, 64, r=4, dtype=FP16, bias=True),
    Case(1, 1, 1, r=1, dtype=FP32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_against_float64(case, seed):
    inputs = make_inputs(case, seed)
    assert_close_to_oracle(run_ops(inputs), inputs)


PATHS = {
    "small": Config("small", 64, 64, 64, split=3),
    "small, one program": Config("small", 64, 64, 128, split=1, shuffle=True, fuse_h=True),
    "small, h in the kernel": Config("small", 64, 64, 64, split=2, fuse_h=True),
    "fused": Config("fused", 32, 64, 64),
    "panel": Config("panel"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [c for c in CASES if c.M in (3, 17, 33)], ids=lambda c: c.id)
def test_every_path_on_the_same_rows(case, path, seed):
    """A path is a matter of speed: each gives the same product, whatever the settings choose."""
    picks = {"qlora_linear": PATHS[path], "dx": Config("panel") if path == "panel" else Config("fused", 16, 32, 64)}
    inputs = make_inputs(case, seed)
    with forcing(**picks):
        assert_close_to_oracle(run_ops(inputs), inputs)


def test_panels_in_slices(monkeypatch, seed):
    """A weight above the cap is decoded a slice at a time, rows for y and columns for dx."""
    monkeypatch.setattr(decoder, "MAX_PANEL_BYTES", 16 << 10)
    for case in (Case(9, 96, 192, r=8, dtype=FP16, bias=True), Case(9, 95, 130, r=0, dtype=FP32, bias=True)):
        inputs = make_inputs(case, seed)
        assert len(slices(case.N, case.K * 2)) > 1
        with forcing(qlora_linear=Config("panel"), dx=Config("panel")):
            assert_close_to_oracle(run_ops(inputs), inputs)


def test_same_input_same_bits(seed):
    for case in (Case(3, 65, 1024, r=8, dtype=FP16), Case(130, 66, 128, r=16, dtype=FP16, bias=True, dropout=0.2)):
        inputs = make_inputs(case, seed)
        first, second = run_ops(inputs), run_ops(inputs)
        for name in first:
            assert_same_bits(second[name], first[name], name)


def test_rows_in_slices(monkeypatch, seed):
    """Partial sums above their cap: `dy B` a slice of rows at a time, `dB` with more rows a program."""
    for module in (settings, low_rank):
        monkeypatch.setattr(module, "MAX_PARTIAL_BYTES", 20 << 10)
    launched = []
    launch = low_rank.launch
    monkeypatch.setattr(low_rank, "launch", lambda kernel, *args: (launched.append(kernel), launch(kernel, *args)))
    inputs = make_inputs(Case(300, 130, 64, r=8, dtype=FP16, bias=True), seed)
    with settings.forcing(read_once=Config("", 64, 128, warps=8)):
        assert_close_to_oracle(run_ops(inputs), inputs)
    assert launched.count(low_rank.read_once) == 3  # two slices of dy, and x


TWOS_COMPLEMENT = tuple(((i + 8) % 16 - 8) / 8 for i in range(16))


@pytest.mark.parametrize("code", [TWOS_COMPLEMENT, tuple(sorted(TWOS_COMPLEMENT))], ids=["any order", "ascending"])
def test_a_format_that_is_new(code, monkeypatch, seed):
    """An entry of FORMATS is all that it takes."""
    name = f"new{code[0]}"
    monkeypatch.setitem(FORMATS, name, Format(code))
    weight = torch.randn(33, 128)
    qw = lk.quantize(weight, name)
    with lk.use_backend("reference"):
        want = lk.quantize(weight, name)
        values = lk.dequantize(want, FP16)
    assert_same_bits(qw.packed, want.packed)
    assert_same_bits(lk.dequantize(qw, FP16), values)
    for case in (Case(3, 33, 128, r=4, dtype=FP16, quant_type=name), Case(70, 33, 65, r=4, dtype=BF16, quant_type=name)):
        inputs = make_inputs(case, seed)
        assert_close_to_oracle(run_ops(inputs), inputs)


@pytest.mark.parametrize("op", ["quantize", "dequantize", "qlora_linear"])
def test_a_format_that_is_unknown(op):
    qw = replace(lk.quantize(torch.randn(32, 64)), quant_type="nf5")
    x = torch.randn(2, 64)
    calls = {
        "quantize": lambda: triton.quantize(x, "nf5", 64, False),
        "dequantize": lambda: triton.dequantize(qw, FP16),
        "qlora_linear": lambda: triton.qlora_linear(x, [Layer.of(qw)]),
    }
    with pytest.raises(ValueError, match=r"quant_type must be one of nf4, fp4.*got 'nf5'"):
        calls[op]()


GROUPS = {
    "plain": ((64, 8, 0.0), (33, 8, 0.0), (40, 8, 0.0)),
    "ranks differ": ((64, 8, 0.0), (33, 20, 0.0), (40, 3, 0.0), (16, 0, 0.0)),
    "dropout": ((64, 8, 0.3), (33, 8, 0.3), (40, 4, 0.3), (16, 0, 0.0)),
    "dropout differs": ((64, 8, 0.3), (33, 8, 0.0), (40, 8, 0.3), (16, 70, 0.3)),
}


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("group", GROUPS)
def test_group(group, rows, seed):
    """Layers on one x, stacked and not, give what they give alone; dx is their sum."""
    cases = [Case(rows, n, 128, r=r, dtype=FP16, dropout=p, bias=n == 33) for n, r, p in GROUPS[group]]
    x = make_inputs(cases[0], seed).x
    inputs = [replace(make_inputs(case, seed + i), x=x) for i, case in enumerate(cases)]
    layers = [Layer.of(i.qw, i.lora_A, i.lora_B, i.case.scaling, i.bias, i.case.dropout, i.seed) for i in inputs]
    needs = [(i.case.r > 0, i.case.r > 0, i.case.bias) for i in inputs]
    dys = [i.dy for i in inputs]
    paths = {"qlora_linear": Config("panel"), "dx": Config("panel")} if rows == 70 else {}
    with forcing(**paths):  # where adapters are stacked
        ys, hs = triton.qlora_linear(x, layers)
        dx, *grads = triton.qlora_linear_backward(dys, x, hs, layers, True, needs)
    want_ys, want_hs = reference.qlora_linear(x, layers)
    want_dx, *want = reference.qlora_linear_backward(dys, x, want_hs, layers, True, needs)
    for got, expected in zip([dx, *ys, *hs, *chain(*grads)], [want_dx, *want_ys, *want_hs, *chain(*want)], strict=True):
        assert (got is None) == (expected is None)
        if got is not None and got.numel():
            assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    for i, y, h, *rest in zip(inputs, ys, hs, *grads, strict=True):
        named = zip(("y", "h", "dA", "dB", "dbias"), (y, h if i.case.r else None, *rest), strict=True)
        assert_close_to_oracle({name: t for name, t in named if t is not None}, i)
    assert_dx_of_group(dx, inputs)


def test_training_follows_the_reference(seed):
    """Two layers, five steps: the losses are those of the reference backend.  Nothing here makes more of a rounding than it is,
    as Adam does with a gradient near zero and ReLU with a sum."""
    losses = {}
    for name in ("triton", "reference"):
        torch.manual_seed(seed)
        with lk.use_backend(name):
            make = lk.FusedQLoRALinear.from_linear
            model = torch.nn.Sequential(
                make(torch.nn.Linear(64, 128), r=4, lora_alpha=8),
                torch.nn.Tanh(),
                make(torch.nn.Linear(128, 8), r=4, lora_alpha=8),
            )
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            x, y = torch.randn(20, 64), torch.randn(20, 8)
            losses[name] = []
            for _ in range(5):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert losses["triton"][-1] < losses["triton"][0]
