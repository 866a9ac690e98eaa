"""The linear ops of csrc/cuda without a GPU: tests/emulators/cuda_emulator runs the kernels, float64 judges them."""

import random

import pytest
import torch
from emulators import cuda_emulated as cuda
from helpers import assert_same_bits

from lora_kernels import testing
from lora_kernels.formats import BLOCKSIZES
from lora_kernels.layer import Layer
from lora_kernels.testing import Case, Inputs, Results, assert_close_to_oracle, make_inputs

HALF, BF16, FLOAT = DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def device():
    cuda.device()
    yield
    cuda.device()


def run(inputs: Inputs) -> Results:
    lora = bool(inputs.case.r)
    (y,), (h,) = cuda.qlora_linear(inputs.x, [inputs.layer])
    x, h = (inputs.x, h) if lora else (None, None)
    needs = (lora, lora, inputs.case.bias)
    dx, (dA,), (dB,), (dbias,) = cuda.qlora_linear_backward([inputs.dy], x, [h], [inputs.layer], True, [needs])
    results = {"y": y, "h": h, "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}
    return {name: t for name, t in results.items() if t is not None}


CASES = [
    *(Case(M, 129, 576, r=16, dtype=HALF) for M in (1, 5, 8, 9, 16, 17, 33, 64, 65, 130)),  # every kernel and its last tile
    *(Case(130, N, 64, r=8, dtype=BF16, bias=True) for N in (1, 63, 64, 65, 129)),
    *(Case(5, 65, K, r=8, dtype=dtype) for K in (31, 32, 100, 1600, 1601) for dtype in DTYPES),  # K splits, rows within a byte
    *(Case(M, 65, 64 * k, r=8, dtype=HALF) for M in (8, 16, 32, 64) for k in (1, 3, 5)),  # a part of the last step is outside
    *(Case(17, 65, 160, r=r, dtype=dtype, bias=True) for r in (0, 1, 17, 64, 80) for dtype in DTYPES),
    *(Case(70, 64, 96, r=8, dtype=dtype, dropout=0.1, bias=True) for dtype in DTYPES),
    *(Case(3, 33, K, r=4, dtype=HALF, dropout=0.5) for K in (99, 101, 102)),  # four elements of a draw lie in two rows
    *(Case(40, 65, 96, dtype=HALF, blocksize=size, double_quant=size % 3 == 1, quant_type="fp4") for size in BLOCKSIZES),
    *(Case(9, 33, 100, dtype=FLOAT, blocksize=size, double_quant=size % 3 == 2) for size in BLOCKSIZES),
    *(Case(20, 40, 64, r=9, dtype=a, lora_dtype=b, bias=True) for a in DTYPES for b in DTYPES),
    Case(200, 200, 32, r=200, dtype=HALF),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_against_float64(case, seed):
    assert_close_to_oracle(run(make_inputs(case, seed)), make_inputs(case, seed))


def test_random_cases(seed):
    draw = random.Random(seed)
    for _ in range(25):
        case = Case(
            draw.randint(1, 140),
            draw.randint(1, 140),
            draw.choice((draw.randint(1, 300), 32 * draw.randint(1, 20))),
            r=(r := draw.choice((0, draw.randint(1, 70)))),
            dtype=draw.choice((HALF, BF16)),
            quant_type=draw.choice(("nf4", "fp4")),
            blocksize=draw.choice(BLOCKSIZES),
            double_quant=draw.random() < 0.5,
            bias=draw.random() < 0.5,
            dropout=draw.choice((0.0, 0.25)) if r else 0.0,
            lora_dtype=draw.choice(DTYPES),
        )
        cuda.device(draw.choice((75, 80)), processors := draw.choice((1, 16, 132)))
        try:
            assert_close_to_oracle(run(make_inputs(case, seed)), make_inputs(case, seed))
        except (AssertionError, RuntimeError) as e:
            raise AssertionError(f"{case} on {processors} multiprocessors: {e}") from e


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_same_bits_in_any_order_of_blocks(dtype):
    """Blocks run in a new random order each time, and share tiles."""
    cuda.device(processors=132)
    inputs = make_inputs(Case(30, 65, 1600, r=8, dtype=dtype, dropout=0.1, bias=True))
    first = run(inputs)
    for _ in range(3):
        for name, again in run(inputs).items():
            assert_same_bits(again, first[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_no_rows(dtype):
    got = run(make_inputs(Case(0, 33, 64, r=8, dtype=dtype, bias=True)))
    assert [list(got[name].shape) for name in ("y", "h", "dx")] == [[0, 33], [0, 8], [0, 64]]
    assert all(not got[name].any() for name in ("dA", "dB", "dbias")), "a gradient of no rows is zero, not what was there"


def test_each_gradient_alone():
    inputs = make_inputs(Case(20, 65, 96, r=8, bias=True, dropout=0.1))
    _, (h,) = cuda.qlora_linear(inputs.x, [inputs.layer])
    want = run(inputs)
    for i, name in enumerate(("dx", "dA", "dB", "dbias")):
        need_dx, *needs = (j == i for j in range(4))
        x, saved_h = inputs.x if needs[0] else None, h if needs[1] else None
        dx, (dA,), (dB,), (dbias,) = cuda.qlora_linear_backward([inputs.dy], x, [saved_h], [inputs.layer], need_dx, [needs])
        got = (dx, dA, dB, dbias)
        assert [g is not None for g in got] == [need_dx, *needs]
        if name in ("dx", "dA"):  # g is summed in another order without dB
            assert testing.relative_error(got[i], want[name]) < 2**-8
        else:
            assert_same_bits(got[i], want[name], name)


def test_dx_of_a_group_is_added():
    several = [make_inputs(Case(20, N, 96, r=8), seed=N) for N in (65, 33, 40)]
    dys, layers = [i.dy for i in several], [i.layer for i in several]
    dx, *_ = cuda.qlora_linear_backward(dys, None, [None] * 3, layers, True, [(False, False, False)] * 3)
    testing.assert_dx_of_group(dx, several)
    want = sum(testing.oracle(i)["dx"] for i in several)
    assert testing.relative_error(dx, want) < 2**-8, "rounded to bfloat16 more than once"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_without_the_product(dtype):
    """What is left for a library to add to: the adapter's term, rounded, and zero where there is none."""
    inputs = make_inputs(Case(70, 65, 96, r=8, dtype=dtype, bias=True, dropout=0.1))
    W = testing.decode(inputs.qw, dtype).double()
    (y,), _ = cuda.qlora_linear(inputs.x, [inputs.layer], product=False)
    backward = ([inputs.dy], None, [None], [inputs.layer], True, [(False, False, False)])
    dx, *_ = cuda.qlora_linear_backward(*backward, product=False)
    whole = {"y": y.double() + inputs.x.double() @ W.T, "dx": dx.double() + inputs.dy.double() @ W}
    assert_close_to_oracle({name: t.to(dtype) for name, t in whole.items()}, inputs)
    (y,), _ = cuda.qlora_linear(inputs.x, [Layer.of(inputs.qw)], product=False)
    assert not y.any()


def test_partial_sums_of_g_that_would_outgrow_dy(seed):
    """So many rows and ranks that g has a launch of its own.  Small integers: the long sums are exact in any order."""
    inputs = make_inputs(Case(64, 1, 1, r=66000, dtype=FLOAT), seed)
    assert inputs.lora_A is not None and inputs.lora_B is not None
    for t in (inputs.dy, inputs.lora_A, inputs.lora_B):
        t.random_(-3, 4)
    dx, *_ = cuda.qlora_linear_backward([inputs.dy], None, [None], [inputs.layer], True, [(False, False, False)])
    assert_close_to_oracle({"dx": dx}, inputs)
