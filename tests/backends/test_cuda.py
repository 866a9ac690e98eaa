"""The CUDA code without a GPU: tests/emulators/cuda_emulator runs the ops, nvcc compiles them."""

import ctypes
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulators import cuda_emulated as cuda
from helpers import FLOATS, assert_same_bits, random_weight
from rich.console import Console

import lora_kernels as lk
from bench.tools import compile_check, sass
from lora_kernels import testing
from lora_kernels.backends import native, reference
from lora_kernels.formats import BLOCKSIZES, DYNAMIC_MAP, codebook
from lora_kernels.requirements import PIP

ROOT = Path(__file__).parents[2]

# ---- the emulator


@pytest.fixture(scope="module")
def probe():
    lib = cuda.build([cuda.EMULATOR / "probe.cu"])
    lib.probe_error.restype = ctypes.c_char_p

    def run(name: str, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.zeros(16, 8)
        pointers = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (a, b, out))
        if lib.probe(name.encode(), *pointers) < 0:
            raise RuntimeError(lib.probe_error().decode())
        return out

    run.library = lib
    return run


def test_matrix_instructions(probe):
    a, b = torch.randint(-8, 9, (16, 16)).half(), torch.randint(-8, 9, (8, 16)).half()  # whose products float32 holds
    want = a.float() @ b.float().T
    assert torch.equal(probe("product", a, b), want)
    assert torch.equal(probe("transposed", a.T.contiguous(), b), want)


def test_copies_are_late(probe):
    assert probe("no_wait", torch.randn(16, 16).half(), torch.randn(8, 16).half()).isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("waits_for_the_departed", "threads wait for ever: .* __syncwarp"),
        ("diverged", "lanes of a warp meet at different instructions"),
        ("out_of_bounds", "access outside of an allocation in thread .0, 0, 0. of block .0, 0, 0."),
        ("beyond_shared", "access outside of an allocation"),
        ("misaligned", "misaligned access"),
        ("too_many_threads", "launching 1 x 1 x 1 blocks of 2048 threads .* failed: invalid configuration argument"),
    ],
)
def test_faults_are_errors(probe, name, message):
    with pytest.raises(RuntimeError, match=f"^{name}: .*{message}"):
        probe(name)
    a, b = torch.randn(16, 16).half(), torch.randn(8, 16).half()
    assert probe("product", a, b).isfinite().all(), "the emulator is unusable after an error"


@pytest.mark.parametrize("name", ["counts_on_order", "counts_on_warps"])
def test_order_is_random(probe, name):
    assert any(probe(name).view(torch.int32)[0, 1] == 1 for _ in range(5))


# ---- decoding


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_table_of_byte_permutations(probe, dtype, quant_type):
    """Each byte in each place of a word, under scales of both signs and many exponents."""
    words = torch.arange(256, dtype=torch.uint8).repeat_interleave(4).repeat(16).view(-1, 4).contiguous()
    for place in range(4):
        words[:, place] = words[:, place].roll(37 * place)
    n = words.shape[0]
    scales = (torch.rand(n) + 0.5) * 2.0 ** torch.randint(-30, 15, (n,)) * torch.tensor([1.0, -1.0])[torch.randint(2, (n,))]
    out = torch.empty(n, 8, dtype=dtype)
    code, *pointers = (ctypes.c_void_p(t.data_ptr()) for t in (codebook(quant_type), words, scales, out))
    probe.library.probe_decode(dtype == torch.float16, code, n, *pointers)
    codes = torch.stack([words >> 4, words & 15], dim=2).view(n, 8).long()
    assert_same_bits(out, (codebook(quant_type)[codes] * scales[:, None]).to(dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codebook_is_pythons(quant_type):
    packed = torch.arange(0, 256, 17, dtype=torch.uint8)  # both nibbles of byte i are i
    qw = lk.QuantizedWeight(packed, torch.ones(1), None, None, None, (32,), torch.float32, quant_type, 32)
    assert_same_bits(cuda.dequantize(qw, torch.float32)[::2].contiguous(), codebook(quant_type))


def test_decode_absmax():
    for n_blocks in (1, 3, 256, 257, 1000, 5000):
        absmax = torch.randint(256, (n_blocks,), dtype=torch.uint8)
        absmax2, offset = torch.rand(-(n_blocks // -256)) * 0.05, torch.rand(()) * 0.1
        arguments = (absmax, absmax2, DYNAMIC_MAP, offset)
        assert_same_bits(cuda.decode_absmax(*arguments), reference.decode_absmax(*arguments))


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_dequantize(double_quant, seed):
    generator = torch.Generator().manual_seed(seed)
    for index in range(32):
        weight = random_weight(generator, index)
        qw = lk.quantize(weight, ("nf4", "fp4")[index % 2], BLOCKSIZES[index // 4 % 8], double_quant)
        for dtype in FLOATS:
            assert_same_bits(cuda.dequantize(qw, dtype), testing.decode(qw, dtype), f"{qw.shape} {qw.blocksize} {dtype}")


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantize_a_range(blocksize):
    """A panel may start and end inside a block."""
    qw = lk.quantize(torch.randn(31, 1001), blocksize=blocksize)
    want = testing.decode(qw, torch.float16).view(-1)
    for begin, end in ((0, 31), (32, 64), (32 * 100, 31 * 1001), (32 * 257, 32 * 257 + 8193)):
        assert_same_bits(cuda.dequantize(qw, torch.float16, begin, end), want[begin:end])


# ---- quantize


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_quantize_is_bitsandbytes(double_quant, seed):
    F = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(seed)
    for index in range(64):
        weight, blocksize, quant_type = random_weight(generator, index), BLOCKSIZES[index // 8 % 8], ("nf4", "fp4")[index % 2]
        want, state = F.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
        packed, absmax, absmax2, offset = cuda.quantize(weight, quant_type, blocksize, double_quant)
        what = f"case {index}: {list(weight.shape)} {weight.dtype} blocksize {blocksize}"
        assert_same_bits(packed, want.view(-1), f"{what} packed")
        assert_same_bits(absmax, state.absmax, f"{what} absmax")
        if double_quant:
            assert_same_bits(absmax2, state.state2.absmax, f"{what} absmax2")
            assert_same_bits(offset, state.offset, f"{what} offset")


def test_second_level_borders():
    """Scales on the steps of the second level's table, where one rounding decides the index."""
    scales = torch.cat([torch.arange(0, 2 * 65535, 31) / 65535, torch.rand(5000)])
    for got, want in zip(
        cuda.quantize(scales.repeat_interleave(32), "nf4", 32, True),
        reference.quantize(scales.repeat_interleave(32), "nf4", 32, True),
        strict=True,
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_quantize_refuses_what_is_not_finite(value, dtype):
    for place in (0, 63, 100, 64 * 65):
        weight = torch.randn(64 * 65 + 5).to(dtype)
        weight[place] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            cuda.quantize(weight, "nf4", 64, False)


# ---- decoded panels and the library's product, as csrc/panels.cpp joins them for many rows


def test_panels():
    inputs = testing.make_inputs(testing.Case(40, 130, 100, r=9, bias=True, dropout=0.2, dtype=torch.float16, blocksize=256))
    (y,), (h,) = cuda.qlora_linear(inputs.x, [inputs.layer], product=False)
    arguments = ([inputs.dy], inputs.x, [h], [inputs.layer], True, [(True, True, True)])
    dx, (dA,), (dB,), (dbias,) = cuda.qlora_linear_backward(*arguments, product=False)
    K = inputs.qw.shape[1]
    for begin in range(0, 130, 32):
        end = min(130, begin + 32)
        panel = cuda.dequantize(inputs.qw, torch.float16, begin * K, end * K).view(-1, K)
        y[:, begin:end].addmm_(inputs.x, panel.T)
        dx.addmm_(inputs.dy[:, begin:end], panel)
    results = {"y": y, "h": h, "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}
    testing.assert_close_to_oracle(results, inputs)


# ---- the build


def extension(archs: str | None, problem: str = "") -> SimpleNamespace:
    info = {} if archs is None else {"cuda_archs": archs, "nvcc": "13.0"}
    return SimpleNamespace(build_info=lambda: info, cuda_problem=lambda: problem)


@pytest.mark.parametrize(
    ("archs", "capability", "reason"),
    [
        (None, (8, 0), f"built without CUDA code: LORA_KERNELS_BUILD=cuda {PIP} install"),
        ("80 90", (8, 0), None),
        ("80 90", (8, 9), None),  # a binary runs on later minor versions
        ("89", (8, 6), "for sm_89, this GPU is sm_86: LORA_KERNELS_CUDA_ARCHS=86 LORA_KERNELS_BUILD=cuda "),
        ("80 90", (12, 0), "for sm_80, sm_90, this GPU is sm_120"),
        ("80 90+ptx", (12, 0), None),
        ("80 90+ptx", (7, 5), "this GPU is sm_75"),
    ],
)
def test_where_native_runs(monkeypatch, archs, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = native._unavailable_cuda.__wrapped__(extension(archs), torch.device("cuda", 0))
    assert got is None if reason is None else reason in got


def test_runtime_that_finds_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    got = native._unavailable_cuda.__wrapped__(extension("80", "driver too old"), torch.device("cuda", 0))
    assert got == "the CUDA 13.0 runtime of the C++ extension finds no GPU: driver too old"


def test_breaches():
    """What a kernel must not have, and must."""

    def kernel(name: str, arch: int = 80, stack: int = 0, spills: int = 0, **instructions: int) -> list[str]:
        compiled = sass.Compiled(arch, 32, stack, spills, 0, Counter(FADD=1, **instructions))
        return [*compiled.breaches(), *filter(None, [compile_check.cuda_lost_matrix(name, compiled)])]

    assert kernel("dequantize_kernel<float>") == []
    assert kernel("dequantize_kernel<float>", stack=8, spills=16) == ["16 spills", "8 bytes of stack"]
    assert kernel("product_kernel<__half>", HMMA=4) == kernel("product_kernel<__nv_bfloat16>", HMMA=4) == []
    assert kernel("product_kernel<__half>", 75) == kernel("product_kernel<__nv_bfloat16>") == ["no matrix instruction"]
    assert kernel("product_kernel<float>") == kernel("product_kernel<__nv_bfloat16>", 75) == []


if sass.tool("nvcc"):

    def test_nvcc_compiles_without_spills():
        console = Console(file=io.StringIO(), width=200)
        assert compile_check.check_cuda([80], "", console) == 0, console.file.getvalue()

    @pytest.mark.parametrize("archs", ["80 33", "sm_80"])
    def test_unknown_architecture_is_refused(archs):
        environment = os.environ | {"LORA_KERNELS_BUILD": "cuda", "LORA_KERNELS_CUDA_ARCHS": archs}
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert re.search(rf"LORA_KERNELS_CUDA_ARCHS must be some of 75 .*80.*, got '{archs}'", done.stderr), done.stderr
