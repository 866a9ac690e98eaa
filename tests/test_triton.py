"""The Triton backend without a GPU: the interpreter, the PTX it emits, and ahead-of-time compilation."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import CPU, python

from lora_kernels.backends import triton as backend
from lora_kernels.formats import codebook

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
HERE = Path(__file__).parent


@needs_triton
def test_interpreted_kernels(request):
    """Runs `triton_interpreted.py` where Triton interprets its kernels."""
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", HERE / "triton_interpreted.py"]
    seed = request.config.getoption("--seed")
    command += ["--seed", str(seed)] if seed is not None else []
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=600)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def test_imports_without_triton():
    """The package needs no Triton, and says what is missing."""
    out = python(
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\nfrom lora_kernels.backends import triton\n"
        "print(triton.unavailable(torch.device('cuda')))"
    )
    assert "pip install triton" in out


@needs_triton
def test_says_how_to_run_on_a_cpu():
    assert "TRITON_INTERPRET=1" in backend.unavailable(CPU)


# ---- the PTX that decodes, run instruction by instruction


def _permute(a: int, b: int, selector: int) -> int:
    source = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def _float(bits: int) -> torch.Tensor:
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)


def _run(asm: str, registers: dict[str, object]) -> dict[str, object]:
    """Executes the few instructions that the decode is made of."""

    def value(operand: str):
        if operand.startswith("0f"):
            return _float(int(operand[2:], 16))
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    for statement in asm.strip("{}\n ").split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        target, *operands = (o.strip() for o in words[1].split(","))
        v = [value(o) for o in operands]
        match words[0].split("."):
            case ["and", "b32"]:
                out = v[0] & v[1]
            case ["shr", "u32"]:
                out = v[0] >> v[1]
            case ["lop3", "b32"]:
                assert v[3] == 0xEA  # (a & b) | c
                out = v[0] & v[1] | v[2]
            case ["prmt", "b32"]:
                out = _permute(*v)
            case ["mul", "rn", "f32"]:
                out = v[0] * v[1]
            case ["cvt", "rn", kind, "f32"]:
                dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
                high, low = (int(f.to(dtype).view(torch.int16)) & 0xFFFF for f in v)
                out = high << 16 | low
            case other:
                raise AssertionError(f"unknown instruction {other}")
        registers[target] = out
    return registers


@needs_triton
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ptx_decodes_every_byte(quant_type, dtype):
    """All 256 bytes at each of the 4 places of a word, scales of every magnitude: `round(code * absmax)`, bit for bit."""
    from lora_kernels.backends.triton import tiles

    code = codebook(quant_type)
    table_asm = tiles.table_asm(code.tolist(), "bf16" if dtype == torch.bfloat16 else "f16")
    for scale in (*(10.0 ** torch.empty(6).uniform_(-6, 4)), torch.tensor(0.0), torch.tensor(-0.013), torch.tensor(1e-30)):
        scale = scale.float().view(1)
        table = _run(table_asm, {"$8": scale})
        want = (code * scale).to(dtype).view(torch.int16).int() & 0xFFFF
        for byte in range(256):
            stored = [byte, byte * 7 + 1 & 255, byte * 29 + 5 & 255, 255 - byte]
            registers: dict[str, object] = {"$4": int.from_bytes(bytes(stored), "little")}
            registers |= {f"${i + 5}": table[f"${i}"] for i in range(8)}
            pairs = [_run(tiles.word_asm(), registers)[f"${i}"] for i in range(4)]
            got = [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
            assert got == [int(want[i]) for b in stored for i in (b >> 4, b & 15)]


# ---- settings and compilation


@needs_triton
def test_settings_cover_every_shape():
    from lora_kernels.backends.triton.settings import GPUS, PATHS, pick_config

    for arch in (*GPUS, 75, 130):
        for N, K in ((4096, 4096), (14336, 4096), (1024, 4096), (576, 576), (128256, 4096), (1, 1), (32, 32), (7, 65)):
            for M in (1, 2, 16, 17, 64, 65, 512, 2048, 16384):
                for r in (0, 1, 16, 64, 256):
                    for op in ("qlora_linear", "dx", "project", "expand", "read_once", "dequantize", "quantize", "reduce"):
                        config = pick_config(op, M, N, K, r, arch)
                        tile = (config.block_m, config.block_n, config.block_k, config.warps)
                        assert all(n & (n - 1) == 0 for n in tile), (op, config)
                        assert config.split >= 1 and config.steps >= 1
                        assert config.path in (PATHS if op in ("qlora_linear", "dx") else ("",))
                        if config.path == "small":
                            assert config.block_m >= M


@needs_triton
@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_compiles_without_spills(arch, instruction):
    """One build of each kernel; `shipped` lists them all, for a longer check."""
    from lora_kernels.backends.triton import aot

    builds = aot.shipped(arch)
    names = {"linear_small", "linear_fused", "dx_fused", "project_rows", "read_once", "expand_rows", "dequantize_groups"}
    assert names <= {b.name for b in builds}
    for name in sorted(names):
        compiled = aot.compile_build(next(b for b in builds if b.name == name and dict(b.constants).get("LORA", True)), arch)
        assert not compiled.breaches(), (compiled.build.setting, compiled.breaches())
        if name in ("linear_small", "linear_fused", "dx_fused"):
            assert instruction in compiled.matrix, compiled.build.setting
            most = {"linear_small": 6.5, "linear_fused": 8.2, "dx_fused": 7.9} if arch > 80 else dict.fromkeys(names, 20)
            assert compiled.per_weight is not None and compiled.per_weight <= most[name], compiled.per_weight


@needs_triton
@pytest.mark.parametrize(("M", "N", "K", "r"), [(1, 1, 1, 1), (1, 64, 64, 1), (5, 7, 65, 3), (70, 70001, 70001, 1)])
def test_odd_shapes_compile(M, N, K, r):
    """What the JIT turns into constants (sizes of 1) or 64-bit integers compiles; the interpreter can't show that."""
    from lora_kernels.backends.triton import aot
    from lora_kernels.backends.triton.launch import recording

    qw = aot.meta_weight(N, K, "nf4", 64, True)
    x, dy, A, B = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((M, K), (M, N), (r, K), (N, r)))
    with recording(90) as launches:
        _, h = backend.qlora_linear(x, qw, A, B, 2.0, B[:, 0], 0.0, None)
        backend.qlora_linear_backward(dy, x, h, qw, A, B, 2.0, 0.0, None, (True, True, True, True))
        backend.quantize(torch.empty(N, K, device="meta"), "fp4", 64, True)
    for build in dict.fromkeys(map(aot.build_of, launches)):
        assert not aot.compile_build(build, 90).breaches(), build.setting


@needs_triton
def test_transient_memory_is_capped():
    """Large layers at large M: no buffer but results is above 64 MiB."""
    from lora_kernels.backends.triton import aot
    from lora_kernels.backends.triton.launch import recording

    M, N, K, r = 8192, 14336, 4096, 64
    qw = aot.meta_weight(N, K, "nf4", 64, True)
    x, dy, A, B = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((M, K), (M, N), (r, K), (N, r)))
    with recording(90) as launches:
        _, h = backend.qlora_linear(x, qw, A, B, 2.0, None, 0.0, None)
        backend.qlora_linear_backward(dy, x, h, qw, A, B, 2.0, 0.0, None, (True, True, True, False))
    given = {(M, K), (M, N)}
    sizes = [
        a.nbytes for launch in launches for a in launch.args if isinstance(a, torch.Tensor) and tuple(a.shape) not in given
    ]
    assert max(sizes) <= 64 << 20, max(sizes)


@needs_triton
def test_one_launch_each():
    """No op converts, copies or decodes scales beside its kernels."""
    from lora_kernels.backends.triton import aot
    from lora_kernels.backends.triton.launch import recording

    qw = aot.meta_weight(4096, 4096, "nf4", 64, True)
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device="meta")
    A, B = (
        torch.empty(16, 4096, dtype=torch.bfloat16, device="meta"),
        torch.empty(4096, 16, dtype=torch.bfloat16, device="meta"),
    )
    with recording(90) as launches:
        backend.dequantize(qw, torch.bfloat16)
        backend.qlora_linear(x, qw, A, B, 1.0, None, 0.0, None)
    assert [launch.kernel.__name__ for launch in launches] == ["dequantize_groups", "linear_small"]
