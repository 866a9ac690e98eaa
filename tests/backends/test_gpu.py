"""The Triton kernels on a GPU: `make gpu` runs this file; without a CUDA device it is not collected."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import HANG, assert_same_bits, run_ops

import lora_kernels as lk
from lora_kernels.backends import reference, triton
from lora_kernels.backends.triton.launch import config_of
from lora_kernels.backends.triton.settings import MAX_PANEL_BYTES, Config, forcing
from lora_kernels.backends.triton.weights import linear_problem
from lora_kernels.formats import BLOCKSIZES
from lora_kernels.layer import Layer
from lora_kernels.testing import Case, assert_close_to_oracle, make_inputs, relative_error

DEVICE = torch.device("cuda")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def on_triton():
    with lk.use_backend("triton"):
        yield


CASES = [
    # every path of the linear ops, by rows
    *(Case(M, 1024, 2048, r=16, dtype=dtype) for M in (1, 3, 16, 17, 33, 64, 65, 200, 512, 2048) for dtype in (BF16, FP16)),
    *(Case(M, 1024, 2048, r=16, dtype=BF16, bias=True, dropout=0.1) for M in (1, 16, 200, 1000)),
    Case(70, 512, 1024, r=16, dtype=FP32, bias=True, dropout=0.3),
    # ranks, formats
    *(Case(40, 512, 1024, r=r, dtype=BF16) for r in (0, 1, 3, 40, 64, 100, 256)),
    Case(130, 512, 1024, r=8, dtype=BF16, quant_type="fp4"),
    Case(130, 512, 1024, r=8, dtype=BF16, double_quant=False, lora_dtype=BF16),
    *(Case(130, 512, 1024, r=8, dtype=BF16, blocksize=blocksize) for blocksize in (32, 128, 4096)),
    # shapes that fit no tile
    Case(0, 64, 64, r=4, dtype=BF16, bias=True),
    Case(1, 1, 1, r=1, dtype=BF16),
    Case(5, 33, 101, r=5, dtype=BF16, dropout=0.1),
    Case(300, 129, 576, r=24, dtype=BF16),
    Case(300, 1001, 192, r=8, dtype=FP16),
    Case(17, 65, 4095, r=8, dtype=FP16, bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_against_float64(case, seed):
    inputs = make_inputs(case, seed, DEVICE)
    assert_close_to_oracle(run_ops(inputs), inputs)


PATHS = {
    "small": Config("small", 64, 64, 128, split=4),
    "small, one program": Config("small", 64, 128, 128, warps=8),
    "fused": Config("fused", 64, 64, 64),
    "fused, wide": Config("fused", 128, 128, 64, warps=8),
    "panel": Config("panel"),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_on_the_same_rows(path, seed):
    inputs = make_inputs(Case(50, 700, 1024, r=16, dtype=BF16, bias=True), seed, DEVICE)
    dx = PATHS[path] if PATHS[path].path != "small" else Config("fused", 64, 64, 128)
    with forcing(qlora_linear=PATHS[path], dx=dx):
        assert_close_to_oracle(run_ops(inputs), inputs)


GLUON_CASES = [
    *(Case(M, 1024, 2048, r=16, dtype=dtype) for M in (1, 200, 1000) for dtype in (BF16, FP16)),
    *(Case(300, 700, 1024, r=r, dtype=BF16, bias=True) for r in (0, 3, 64, 100)),
    Case(300, 513, 64, r=16, dtype=BF16),
    Case(300, 512, 576, r=16, dtype=BF16, dropout=0.1),
    Case(300, 512, 1024, r=16, dtype=BF16, quant_type="fp4"),
    Case(300, 512, 1024, r=16, dtype=BF16, double_quant=False, lora_dtype=BF16),
    Case(300, 512, 1024, r=16, dtype=BF16, blocksize=4096),
]


@pytest.mark.skipif(torch.cuda.get_device_capability(DEVICE) != (9, 0), reason="the gluon path is for sm_90")
@pytest.mark.parametrize("block_m", [128, 256])
@pytest.mark.parametrize("case", GLUON_CASES, ids=lambda c: c.id)
def test_gluon(case, block_m, seed):
    """Alike on every run, too: a buffer that is written while the tensor cores read it would show as other bits."""
    inputs = make_inputs(case, seed, DEVICE)
    with forcing(qlora_linear=Config("gluon", block_m, 128, 64, warps=8, stages=4)):
        layer = Layer.of(inputs.qw, inputs.lora_A, inputs.lora_B)
        assert config_of(linear_problem("qlora_linear", inputs.x, layer), DEVICE).path == "gluon"
        first = run_ops(inputs)
        assert_close_to_oracle(first, inputs)
        for _ in range(100):
            assert_same_bits(run_ops(inputs)["y"], first["y"])


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_are_those_of_the_cpu(quant_type, blocksize):
    for shape in ((64, 4096), (33, 65), (1, 1)):
        weight = torch.randn(shape)
        weight.view(-1)[:70] = 0
        for dtype in (FP32, BF16):
            w = weight.to(dtype)
            packed, absmax, _, _ = triton.quantize(w.to(DEVICE), quant_type, blocksize, False)
            want = reference.quantize(w, quant_type, blocksize, False)
            assert_same_bits(packed.cpu(), want[0])
            assert_same_bits(absmax.cpu(), want[1])
        with lk.use_backend("reference"):
            qw = lk.quantize(weight, quant_type, blocksize)
        there = qw.to(DEVICE)
        scales = (qw.absmax, qw.absmax2, qw.code2, qw.offset)
        assert_same_bits(lk.decode_absmax(there).cpu(), reference.decode_absmax(*scales))
        for dtype in (FP32, FP16, BF16):
            assert_same_bits(lk.dequantize(there, dtype).cpu(), reference.dequantize(qw, dtype), f"{shape} {dtype}")


@pytest.mark.parametrize("rows", [1, 16, 50])
def test_a_thousand_runs_of_split_k(rows, seed):
    """The last program to arrive adds the partials of the others: a race would show as other bits."""
    inputs = make_inputs(Case(rows, 512, 4096, r=16, dtype=BF16), seed, DEVICE)
    with forcing(qlora_linear=Config("small", 16 if rows <= 16 else 64, 64, 128, split=16, fuse_h=rows <= 16)):
        first = run_ops(inputs, (False, False, False, False))
        for _ in range(1000):
            again = run_ops(inputs, (False, False, False, False))
            for name in first:
                assert_same_bits(again[name], first[name], name)


def test_two_streams_at_once(seed):
    """Each stream has arrival counters of its own."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [make_inputs(Case(4, 1024, 4096, r=16, dtype=BF16), seed + i, DEVICE) for i in range(2)]
    want = [run_ops(i) for i in inputs]
    torch.cuda.synchronize()
    got: list[list[dict[str, torch.Tensor]]] = [[], []]
    for _ in range(50):
        for stream, i, out in zip(streams, inputs, got, strict=True):
            with torch.cuda.stream(stream):
                out.append(run_ops(i))
    torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for result in results:
            for name in expected:
                assert_same_bits(result[name], expected[name], name)


@pytest.mark.parametrize("rows", [1, 50, 300, 1000])
def test_cuda_graph(rows, seed):
    """Captured once, replayed on new values of x."""
    inputs = make_inputs(Case(rows, 1024, 2048, r=16, dtype=BF16, dropout=0.1), seed, DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_ops(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_ops(inputs)
    for _ in range(3):
        inputs.x.normal_()
        want = run_ops(inputs)
        graph.replay()
        for name in want:
            assert_same_bits(captured[name], want[name], name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("rows", [3, 200, 1000])
def test_group(rows, dropout, seed):
    cases = [Case(rows, n, 1024, r=r, dtype=BF16, dropout=dropout) for n, r in ((1024, 16), (256, 8))]
    inputs = [make_inputs(case, seed + i, DEVICE) for i, case in enumerate(cases)]
    x, dys = inputs[0].x, [i.dy for i in inputs]
    layers = [Layer.of(i.qw, i.lora_A, i.lora_B, i.case.scaling, None, dropout, i.seed) for i in inputs]
    needs = [(True, True, False)] * 2
    ys, hs = triton.qlora_linear(x, layers)
    dx, dAs, dBs, _ = triton.qlora_linear_backward(dys, x, hs, layers, True, needs)
    want_ys, want_hs = reference.qlora_linear(x, layers)
    want_dx, want_dAs, want_dBs, _ = reference.qlora_linear_backward(dys, x, want_hs, layers, True, needs)
    for got, want in zip([dx, *ys, *hs, *dAs, *dBs], [want_dx, *want_ys, *want_hs, *want_dAs, *want_dBs], strict=True):
        assert relative_error(got, want) < 4 * torch.finfo(BF16).eps


def test_memory_above_the_results():
    """A large layer at large M: never a whole 16-bit weight."""
    M, N, K = 2048, 14336, 4096
    inputs = make_inputs(Case(M, N, K, r=16, dtype=BF16), 0, DEVICE)
    run_ops(inputs)  # the library's own workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run_ops(inputs)
    torch.cuda.synchronize()
    kept = sum(t.nbytes for t in results.values())
    over = torch.cuda.max_memory_allocated() - before - kept
    assert over <= MAX_PANEL_BYTES + (4 << 20), over


def test_weight_of_more_than_2_31_elements():
    """Offsets above 32 bits: the last rows of the weight, computed alone, give the same columns of y."""
    N, K, last = 33000, 65600, 64
    free, _ = torch.cuda.mem_get_info()
    if free < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(N * K // 64, device=DEVICE)
    whole = lk.QuantizedWeight(packed, absmax, None, None, None, (N, K), BF16, "nf4", 64)
    blocks = last * K // 64
    end = lk.QuantizedWeight(packed[-last * K // 2 :], absmax[-blocks:], None, None, None, (last, K), BF16, "nf4", 64)
    for M in (1, 100, 1000):
        x = torch.randn(M, K, dtype=BF16, device=DEVICE)
        y, part = lk.qlora_linear(x, whole), lk.qlora_linear(x, end)
        assert relative_error(y[:, -last:], part) < 4 * torch.finfo(BF16).eps
    assert_same_bits(reference.dequantize(end, BF16), lk.dequantize(end, BF16))


SANITIZED = """
import torch, lora_kernels as lk
from lora_kernels.testing import Case, make_inputs
from helpers import run_ops
with lk.use_backend("triton"):
    for M, N, K in ((3, 65, 576), (20, 96, 192), (100, 130, 320), (600, 70, 128)):
        run_ops(make_inputs(Case(M, N, K, r=8, dtype=torch.bfloat16, bias=True, dropout=0.1), 0, "cuda"))
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    """No access out of bounds, no race in shared memory."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG)
    assert done.returncode == 0, done.stdout[-4000:]
