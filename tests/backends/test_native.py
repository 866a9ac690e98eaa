"""The compiled backend on each instruction-set level of this CPU, and around the sizes where it changes its algorithm."""

import ctypes
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, HANG

from lora_kernels import quantize, testing, use_backend
from lora_kernels.backends import native, reference
from lora_kernels.formats import DYNAMIC_MAP, FORMATS, Format
from lora_kernels.layer import Layer
from lora_kernels.testing import Case

pytestmark = pytest.mark.skipif(native.unavailable(torch.device("cpu")) is not None, reason="the C++ extension is not built")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def results(inputs: testing.Inputs, backend=native) -> testing.Results:
    case, layer = inputs.case, inputs.layer
    (y,), (h,) = backend.qlora_linear(inputs.x, [layer])
    needs = (case.r > 0, case.r > 0, case.bias)
    dx, (dA,), (dB,), (dbias,) = backend.qlora_linear_backward([inputs.dy], inputs.x, [h], [layer], True, [needs])
    out = {"y": y, "h": h if case.r else None, "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}
    return {name: t for name, t in out.items() if t is not None}


def digest(tensors: testing.Results) -> str:
    data = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values())
    return hashlib.sha256(data).hexdigest()


# Either side of each boundary: rows of x (tiles of 6, on level amx of 16 to 64; few rows go to the dot kernels), columns
# (panels of 64, groups of 16), K (straight decoding needs multiples of 32, dot kernels of 64), blocks (of 32, within a row,
# over several rows), rank (groups of 16, pairs), contraction blocks (64 float32 steps, 2560 steps).
BOUNDARIES = [
    Case(1, 64, 64),
    Case(1, 65, 640, r=17, bias=True, blocksize=4096),
    Case(1, 63, 100, r=1),
    Case(2, 1, 576, r=40, dropout=0.3),
    Case(5, 130, 576, r=16, bias=True, lora_dtype=BF16),
    Case(6, 130, 576, r=65),
    Case(7, 63, 640, r=8, blocksize=32, quant_type="fp4"),
    Case(12, 65, 2048, r=16, blocksize=1024, dropout=0.5),
    Case(13, 65, 2048, r=0),
    Case(2, 136, 390, r=0, bias=True, blocksize=1024),
    Case(16, 64, 96, r=3, blocksize=256, double_quant=False),
    Case(17, 63, 100, r=17, blocksize=4096, bias=True, dropout=0.1),
    Case(129, 65, 576, r=16, blocksize=32, bias=True),
    Case(80, 65, 577, r=33, blocksize=128, dropout=0.2),
    Case(64, 33, 33, r=5, blocksize=2048),
    Case(20, 5184, 64, r=2),
    Case(20, 32, 5184, r=2, dropout=0.2),
    Case(3, 7, 1, r=1),
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", BOUNDARIES, ids=lambda case: case.id)
def test_boundaries(case: Case, dtype: torch.dtype):
    lora_dtype = dtype if case.lora_dtype == BF16 else FP32
    inputs = testing.make_inputs(Case(**{**vars(case), "dtype": dtype, "lora_dtype": lora_dtype}))
    out = results(inputs)
    testing.assert_close_to_oracle(out, inputs)
    assert digest(out) == digest(results(inputs)), "a second run gave other bits"


@pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, False, False), (False, False, True, False),
                                   (False, False, False, True), (False, False, False, False)])  # fmt: skip
def test_gradients_alone_have_the_same_bits(needs: tuple[bool, bool, bool, bool]):
    inputs = testing.make_inputs(Case(40, 130, 192, r=9, bias=True, dropout=0.2))
    layer = inputs.layer
    _, hs = native.qlora_linear(inputs.x, [layer])

    def gradients(need_dx, *need):
        x, h = inputs.x if need[0] else None, hs[0] if need[1] else None
        dx, *each = native.qlora_linear_backward([inputs.dy], x, [h], [layer], need_dx, [need])
        return dx, *(g for [g] in each)

    for want, got, needed in zip(gradients(True, True, True, True), gradients(*needs), needs, strict=True):
        assert torch.equal(got, want) if needed else got is None


def test_no_rows_give_zero_gradients():
    inputs = testing.make_inputs(Case(0, 40, 64, r=4, bias=True))
    out = results(inputs)
    assert out["y"].shape == (0, 40) and out["dx"].shape == (0, 64)
    assert not any(out[name].any() for name in ("dA", "dB", "dbias"))


# The contraction of dx in one block and in several, with and without masks between; more layers than a block has room for.
@pytest.mark.parametrize(
    ("M", "widths"), [(1, (64, 130, 65)), (40, (64, 130, 65)), (20, (5200, 130, 2100)), (30, tuple(range(10, 70, 10)))]
)
def test_group_is_the_layers_and_sums_dx_before_rounding(M: int, widths: tuple[int, ...]):
    cases = [Case(M, N, 192, r=(16, 17, 1)[i % 3], dropout=(0.0, 0.3, 0.0)[i % 3]) for i, N in enumerate(widths)]
    several = [testing.make_inputs(case, seed=case.N) for case in cases]
    x = several[0].x
    layers = [i.layer._replace(bias=None) for i in several]
    ys, hs = native.qlora_linear(x, layers)
    for y, h, layer in zip(ys, hs, layers, strict=True):
        (want_y,), (want_h,) = native.qlora_linear(x, [layer])
        assert torch.equal(y, want_y) and torch.equal(h, want_h)
    dys = [i.dy for i in several]
    dx, dAs, dBs, _ = native.qlora_linear_backward(dys, x, hs, layers, True, [(True, True, False)] * len(layers))
    assert testing.relative_error(dx, sum(testing.oracle(i)["dx"] for i in several)) < 2e-3, "one bf16 rounding"
    for dy, h, layer, dA, dB in zip(dys, hs, layers, dAs, dBs, strict=True):
        _, [want_dA], [want_dB], _ = native.qlora_linear_backward([dy], x, [h], [layer], False, [(True, True, False)])
        assert torch.equal(dA, want_dA) and torch.equal(dB, want_dB)


# ---- each level, in its own process: the level and torch's threads are chosen once

# (M, N, K): the dot kernels on short and on long rows of W, and lengths that they can't take; the packed product with whole and
# with cut panels, with the contraction in several blocks, and with strips of panels where there is one thread.
LEVEL_SHAPES = [
    *((M, 800, 576) for M in (1, 2, 3, 5, 6)),
    *((M, 260, 2112) for M in range(1, 14)),
    *((M, 390, 1100) for M in (1, 4, 33)),
    *((64, 190, 576), (33, 130, 2720), (150, 96, 330), (13, 320, 5184)),
]
FEATURES = [  # each meets each dtype
    Case(1, 1, 1, r=16),
    Case(1, 1, 1, r=17, blocksize=4096, bias=True),
    Case(1, 1, 1, r=1, blocksize=128, dropout=0.3, quant_type="fp4"),
    Case(1, 1, 1, r=40, blocksize=256, double_quant=False),
    Case(1, 1, 1, r=3, blocksize=2048, bias=True, dropout=0.5),
    Case(1, 1, 1, r=0, blocksize=512, bias=True),
    Case(1, 1, 1, r=8, blocksize=1024, lora_dtype=BF16),
    Case(1, 1, 1, r=65, blocksize=32, double_quant=False, quant_type="fp4"),
]
DTYPES = (BF16, FP16, FP32)


def _level_results() -> Iterator[tuple[str, testing.Results]]:
    """Every op, each with enough work for a second thread."""
    for i, (shape, dtype) in enumerate(itertools.product(LEVEL_SHAPES, DTYPES)):
        M, N, K = shape
        assert (M + 8) * N * K > 3 << 20, "from 2 << 20 on a layer is shared among threads"
        inputs = testing.make_inputs(replace(FEATURES[i % len(FEATURES)], M=M, N=N, K=K, dtype=dtype))
        out = results(inputs)
        if i % 5 == 0:
            testing.assert_close_to_oracle(out, inputs)
        yield inputs.case.id, out
    for M, dtype in itertools.product((3, 12, 40), DTYPES):
        yield f"group {M} {dtype}", _group_results(M, dtype)
    for i, (case, dtype) in enumerate(itertools.product(FEATURES, DTYPES)):
        weight = torch.randn(301, 1013, generator=torch.Generator().manual_seed(i)).to(dtype)
        qw = quantize(weight, case.quant_type, case.blocksize, case.double_quant)
        W = native.dequantize(qw, dtype)
        assert torch.equal(W, reference.dequantize(qw, dtype))
        yield f"quantize {case.quant_type} {case.blocksize} {dtype}", {"packed": qw.packed, "absmax": qw.absmax, "W": W}
    scales = torch.randint(256, (70001,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    absmax2 = torch.rand(274, generator=torch.Generator().manual_seed(1))
    with torch.backends.mkldnn.flags(enabled=False):  # level amx then has to do without
        inputs = testing.make_inputs(Case(40, 260, 2112, r=16, bias=True, dropout=0.3))
        out = results(inputs)
        testing.assert_close_to_oracle(out, inputs)
        yield "without oneDNN", out
    yield "decode_absmax", {"absmax": native.decode_absmax(scales, absmax2, DYNAMIC_MAP, torch.tensor(0.1))}


def _group_results(M: int, dtype: torch.dtype) -> testing.Results:
    cases = [replace(case, M=M, N=N, K=2112, dtype=dtype) for case, N in zip(FEATURES, (130, 260, 390), strict=False)]
    several = [testing.make_inputs(case) for case in cases]
    x = several[0].x
    layers = [i.layer for i in several]
    ys, hs = native.qlora_linear(x, layers)
    needs = [(True, True, case.bias) for case in cases]
    dx, *grads = native.qlora_linear_backward([i.dy for i in several], x, hs, layers, True, needs)
    flat = {"dx": dx} | {str(i): t for i, t in enumerate(itertools.chain(ys, hs, *grads))}
    return {name: t for name, t in flat.items() if t is not None}


def _run_level() -> None:
    digests = {name: digest(out) for name, out in _level_results()}
    print(json.dumps({"level": native.extension().cpu_level(), "threads": torch.get_num_threads(), "digests": digests}))


def _levels() -> list[str]:
    """All that this CPU has, or the one that is forced."""
    if native.unavailable(torch.device("cpu")):
        return []
    extension = native.extension()
    return [extension.cpu_level()] if os.environ.get("LORA_KERNELS_CPU_ISA") else extension.cpu_levels()


@pytest.mark.parametrize("level", _levels())
def test_level_is_right_and_threads_do_not_change_a_bit(level: str):
    runs = []
    for threads in "1", "2":
        environment = os.environ | {"LORA_KERNELS_CPU_ISA": level, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=HANG)
        assert run.returncode == 0, run.stderr
        runs.append(json.loads(run.stdout))
    assert [(run["level"], run["threads"]) for run in runs] == [(level, 1), (level, 2)]
    one, two = (run["digests"] for run in runs)
    assert [name for name in one if one[name] != two[name]] == [], "2 threads gave other bits than 1"


def test_amx_is_the_best_level_where_the_cpu_has_it():
    levels = native.extension().cpu_levels()
    if "amx" not in levels:
        pytest.skip(f"this CPU has {', '.join(levels)}")
    assert (levels[0] == "amx") == (torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
    assert set(levels[:2]) == {"amx", "avx512bf16"}


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _run_memory() -> None:
    inputs = testing.make_inputs(Case(512, 4096, 4096, r=16, bias=True))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _memory("VmRSS")
    kept = sum(t.nbytes for t in results(inputs).values())
    print(_memory("VmHWM") - before - kept)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from /proc")
def test_layer_works_in_half_of_a_16_bit_weight():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, __file__, "memory"], env=environment, capture_output=True, text=True, timeout=HANG)
    assert run.returncode == 0, run.stderr
    assert 0 < int(run.stdout) < 4096 * 4096 * 2 // 2


def test_unknown_level_names_the_levels():
    command = "from lora_kernels.backends import native; native.extension()"
    environment = os.environ | {"LORA_KERNELS_CPU_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=HANG)
    assert run.returncode != 0 and "portable" in run.stderr and "mmx" in run.stderr


def test_module_of_other_fields_is_refused(monkeypatch):
    fields = (*native.extension().layer_fields()[:-1], "group")
    module = SimpleNamespace(__file__=native.extension().__file__, layer_fields=lambda: fields)
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(native, "_warn", lambda reason: None)
    got, reason = native._load.__wrapped__()
    assert got is None
    assert "was built for other fields of a layer, packed, " in reason and ", group in place of packed, " in reason
    assert reason.endswith(f"build it again: {native.BUILD}")


def test_module_from_before_there_were_fields_is_refused(monkeypatch):
    module = SimpleNamespace(__file__=native.extension().__file__)
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(native, "_warn", lambda reason: None)
    assert "was built for other fields" in native._load.__wrapped__()[1]


SQUARES = tuple((i / 16) ** 2 for i in range(16))


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("nf4", Format(SQUARES), "format 'nf4' is defined already, with other values"),
        (
            "odd",
            Format(SQUARES, blocksizes=(48,)),
            "format 'odd' must have blocks of a power of two from 32 to 4096 elements, got 48",
        ),
        ("small", Format(SQUARES, blocksizes=(32, 16)), "got 16"),
    ],
)
def test_format_that_can_not_be_defined(monkeypatch, name: str, what: Format, words: str):
    monkeypatch.setitem(FORMATS, name, what)
    with pytest.raises(ValueError, match=words):
        native.define(name)


def test_order_must_be_one():
    define = native.extension().define_format
    with pytest.raises(ValueError, match="every index once"):
        define("wrong", SQUARES, (*range(15), 0), (64,))
    with pytest.raises(ValueError, match="in the order of their values"):
        define("wrong", SQUARES, tuple(reversed(range(16))), (64,))
    with pytest.raises(ValueError, match="indices 0 to 15, got 16"):
        define("wrong", SQUARES, (*range(15), 16), (64,))


def test_a_format_is_defined_twice():
    native.define("nf4")
    with pytest.raises(ValueError, match=r"quant_type must be one of nf4, fp4.*got 'nf5'"):
        native.define("nf5")


def test_unknown_format_is_never_another():
    qw = quantize(torch.randn(6, 64))
    unknown = replace(qw, quant_type="nf5")
    for call in (
        lambda: native.quantize(torch.randn(64), "nf5", 64, True),
        lambda: native.dequantize(unknown, FP32),
        lambda: native.qlora_linear(torch.randn(2, 64), [Layer.of(unknown)]),
    ):
        with pytest.raises(ValueError, match=r"quant_type must be one of nf4, fp4.*got 'nf5'"):
            call()


def test_a_format_that_it_cannot_compute_with_leaves_the_others(monkeypatch):
    monkeypatch.setitem(FORMATS, "blocks of 16", Format(SQUARES, blocksizes=(16,)))
    native._load.cache_clear()
    try:
        assert native.unavailable.__wrapped__(CPU) is None
        with use_backend("native"):
            quantize(torch.randn(4, 64))
            with pytest.raises(RuntimeError, match=r"'native' is forced but .*: format 'blocks of 16' must have blocks"):
                quantize(torch.randn(4, 64), "blocks of 16", 16)
    finally:
        native._load.cache_clear()


if __name__ == "__main__":
    _run_memory() if sys.argv[1:] == ["memory"] else _run_level()
