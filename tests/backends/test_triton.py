"""The Triton backend without a GPU: settings, launches, the PTX it emits, and ahead-of-time compilation."""

import importlib.util
import json
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch
from helpers import CPU, HANG, python
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends import reference
from lora_kernels.backends import triton as backend
from lora_kernels.formats import FORMATS
from lora_kernels.layer import Layer
from lora_kernels.testing import Case, make_inputs, relative_error

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
HERE = Path(__file__).parents[1] / "emulators"


@needs_triton
def test_launches_are_those_of_triton():
    """Runs `triton_launched.py`."""
    done = subprocess.run([sys.executable, HERE / "triton_launched.py"], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "launches alike" in done.stdout


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


CODES = {name: f.code for name, f in FORMATS.items()} | {"any other": tuple(((i + 8) % 16 - 8) / 8 for i in range(16))}


@needs_triton
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ptx_decodes_every_byte(code, dtype):
    """All 256 bytes at each of the 4 places of a word, scales of every magnitude: `round(code * absmax)`, bit for bit."""
    from lora_kernels.backends.triton import tiles

    table_asm = tiles.table_asm(CODES[code], "bf16" if dtype == torch.bfloat16 else "f16")
    values = torch.tensor(CODES[code])
    for scale in (*(10.0 ** torch.empty(6).uniform_(-6, 4)), torch.tensor(0.0), torch.tensor(-0.013), torch.tensor(1e-30)):
        scale = scale.float().view(1)
        table = _run(table_asm, {"$8": scale})
        want = (values * scale).to(dtype).view(torch.int16).int() & 0xFFFF
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
    from lora_kernels.backends.triton.settings import OPS, PATHS, Gpu, Problem, nvidia, pick_config

    for gpu in (*(Gpu("nvidia", arch) for arch in (*nvidia.ARCHS, 75, 130)), Gpu("amd", 0)):
        for N, K in ((4096, 4096), (14336, 4096), (1024, 4096), (576, 576), (128256, 4096), (1, 1), (32, 32), (7, 65)):
            for M in (1, 2, 16, 17, 64, 65, 512, 2048, 16384):
                for r in (0, 1, 16, 64, 256):
                    for op in OPS:
                        group = 64 if K % 64 == 0 else 32 if K % 32 == 0 else 0
                        config = pick_config(Problem(op, M, N, K, r, group=group), gpu)
                        tile = (config.block_m, config.block_n, config.block_k, config.ranks, config.warps)
                        assert all(n & (n - 1) == 0 for n in tile), (op, config)
                        assert config.split >= 1 and config.steps >= 1
                        assert config.path in (PATHS if op in ("qlora_linear", "dx") else ("",))
                        if config.path == "small":
                            assert config.block_m >= M
                        if config.path in ("small", "fused"):
                            assert group and config.block_k <= K
                        assert not config.fuse_h or (config.path == "small" and 0 < r <= config.ranks)


@needs_triton
def test_settings_are_launched_as_they_are():
    """What a problem can't take is known before a kernel is launched."""
    from lora_kernels.backends.triton.settings import MAX_PARTIAL_BYTES, Config, Gpu, Problem, forcing, pick_config

    gpu = Gpu("nvidia", 90)
    few = Problem("qlora_linear", 1, 4096, 4096, 16, scales_in_words=True)
    assert pick_config(few, gpu).fuse_h and not pick_config(few, gpu).scale_words
    assert not pick_config(few._replace(dropout=True), gpu).fuse_h
    with forcing(qlora_linear=Config("small", 16, 64, 64, fuse_h=True)):
        assert pick_config(few._replace(r=64), gpu).fuse_h and not pick_config(few._replace(r=65), gpu).fuse_h
    assert pick_config(few._replace(r=32), gpu).scale_words
    assert pick_config(few._replace(r=32, scales_in_words=False), gpu).block_k == 256
    for wrong in ({"float32": True}, {"group": 0}, {"K": 32, "group": 32}):
        with forcing(qlora_linear=Config("small", 16, 64, 64, fuse_h=True)):
            assert pick_config(few, gpu).path == "small"
            assert pick_config(few._replace(**wrong), gpu) == Config("panel")
    for op in ("project", "expand", "read_once"):
        assert pick_config(Problem(op, 512, 4096, 4096, 16, float32=True), gpu).stages == 2
    many = pick_config(Problem("read_once", 1 << 20, 4096, r=64), gpu)
    assert (1 << 20) / (many.steps * many.block_m) * 4 * 4096 * 64 <= MAX_PARTIAL_BYTES
    with pytest.raises(ValueError, match=r"op must be one of quantize, .*, got 'gemm'"):
        pick_config(Problem("gemm"), gpu)


@needs_triton
@pytest.mark.parametrize("hip", [None, "6.4"])
def test_vendor(hip, monkeypatch):
    """An AMD GPU has settings of its own, and no instructions of NVIDIA's."""
    from lora_kernels.backends.triton import launch
    from lora_kernels.backends.triton.settings import Gpu

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    launch.current_gpu.cache_clear()
    assert launch.gpu_of(device) == (Gpu("amd", 0, "some GPU") if hip else Gpu("nvidia", 94, "some GPU"))
    assert launch.has_ptx() == (hip is None)
    launch.current_gpu.cache_clear()


@needs_triton
@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_compiles_without_spills(arch, instruction):
    """One build of each kernel; `shipped` lists them all, for a longer check."""
    from bench.tools import triton_builds

    builds = triton_builds.shipped(arch)
    names = {"linear_small", "linear_fused", "dx_fused", "project_rows", "read_once", "expand_rows", "dequantize_groups"}
    assert names <= {b.name for b in builds}
    for name in sorted(names):
        build = next(b for b in builds if b.name == name and dict(b.constants).get("LORA", True))
        compiled = triton_builds.compile_build(build, arch)
        assert not compiled.breaches(), (build.setting, compiled.breaches())
        if name in ("linear_small", "linear_fused", "dx_fused"):
            assert instruction in compiled.matrix, build.setting
            most = {"linear_small": 7.6, "linear_fused": 7.8, "dx_fused": 7.7} if arch > 80 else dict.fromkeys(names, 20)
            assert compiled.per_weight is not None and compiled.per_weight <= most[name], compiled.per_weight
            assert compiled.copies["LDGSTS"], build.setting  # loads are asynchronous


GLUON = {"path": "gluon", "block_m": 256, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4}


@needs_triton
def test_gluon_compiles_without_spills():
    from bench.tools import triton_builds

    builds = {dict(b.constants)["BLOCK_M"]: b for b in reversed(triton_builds.shipped(90)) if b.name == "linear_gluon"}
    assert set(builds) == {128, 256}
    for build in builds.values():
        compiled = triton_builds.compile_build(build, 90)
        assert not compiled.breaches(), compiled.breaches()
        assert "HGMMA" in compiled.matrix and compiled.copies["LDGSTS"]
        assert compiled.per_weight is not None and compiled.per_weight <= 7.8, compiled.per_weight
    assert not any(b.name == "linear_gluon" for b in triton_builds.shipped(80))


def _path(arch: int, K: int, dtype: torch.dtype = torch.bfloat16, blocksize: int = 64) -> str:
    """The path that a linear takes where the gluon path is asked for."""
    from bench.tools import triton_builds
    from lora_kernels.backends.triton.launch import config_of, recording
    from lora_kernels.backends.triton.settings import Config, Gpu, forcing
    from lora_kernels.backends.triton.weights import linear_problem

    with recording(Gpu("nvidia", arch)), forcing(qlora_linear=Config(**GLUON)):
        x, _, layer = triton_builds.inputs(Case(512, 256, K, r=16, dtype=dtype, blocksize=blocksize))
        return config_of(linear_problem("qlora_linear", x, layer), x.device).path


@needs_triton
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "more"),
    [
        (130, 140, 576, 16, {"bias": True}),
        (300, 129, 64, 0, {}),
        (5, 70, 128, 100, {"dtype": torch.float16}),
        (140, 33, 256, 3, {"quant_type": "fp4", "lora_dtype": torch.bfloat16}),
        (40, 260, 320, 8, {"double_quant": False, "bias": True}),
        (40, 64, 512, 8, {"blocksize": 256}),
    ],
)
@pytest.mark.parametrize("stages", [3, 4, 5])
@pytest.mark.parametrize("block_m", [128, 256])
def test_gluon_emulated(M, N, K, r, more, stages, block_m):
    """Its indices, masks, prefetches and buffers."""
    from emulators import gluon_emulated

    from lora_kernels.backends.triton.launch import recording
    from lora_kernels.backends.triton.linear import linear
    from lora_kernels.backends.triton.settings import Config, Gpu, forcing

    inputs = make_inputs(Case(M, N, K, r=r, **{"dtype": torch.bfloat16, **more}))
    layer = Layer.of(inputs.qw, inputs.lora_A, inputs.lora_B, inputs.case.scaling, inputs.bias)
    (want,), (h,) = reference.qlora_linear(inputs.x, [layer])
    config = Config(**GLUON | {"block_m": block_m, "stages": stages})
    with recording(Gpu("nvidia", 90)) as launches, forcing(qlora_linear=config):
        y, _ = linear(inputs.x, layer, h)
    assert [done.kernel.__name__ for done in launches] == ["linear_gluon"]
    y.fill_(torch.nan)
    gluon_emulated.run(launches[0])
    assert relative_error(y, want) < 4 * torch.finfo(y.dtype).eps


@needs_triton
def test_what_gluon_takes():
    assert _path(90, 576) == _path(90, 64, torch.float16) == _path(90, 1024, blocksize=4096) == "gluon"
    assert _path(90, 608) == _path(90, 1024, torch.float32) == _path(90, 1024, blocksize=32) == "panel"
    assert _path(80, 1024) == _path(100, 1024) == "panel"


@needs_triton
def test_without_gluon(monkeypatch):
    """A Triton whose Gluon is another: a warning, and the path that takes everything."""
    from lora_kernels.backends.triton.settings.nvidia import gluon_kernel

    gluon_kernel.cache_clear()
    monkeypatch.delitem(sys.modules, "lora_kernels.backends.triton.gluon_linear", raising=False)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    with pytest.warns(UserWarning, match="no path 'gluon' with Triton"):
        assert _path(90, 1024) == "panel"
    gluon_kernel.cache_clear()


@needs_triton
def test_amd_compiles_without_spills():
    """The settings of a vendor whose GPUs nobody has tried: registers and shared memory of gfx942."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.tools import triton_builds
    from lora_kernels.backends.triton.launch import recording
    from lora_kernels.backends.triton.settings import Gpu

    with recording(Gpu("amd", 0)) as launches:
        for M in (16, 300):
            x, dy, layer = triton_builds.inputs(Case(M, 4096, 4096, r=16))
            _, hs = backend.qlora_linear(x, [layer])
            backend.qlora_linear_backward([dy], x, hs, [layer], True, [(True, True, False)])
    builds = {build.name: build for build in map(triton_builds.build_of, launches)}
    assert {"linear_small", "dx_fused", "read_once", "project_rows", "expand_rows", "dequantize_groups"} <= set(builds)
    for build in builds.values():
        attributes = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
        source = ASTSource(build.kernel, dict(build.signature), dict(build.constants), attributes)
        compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=dict(build.options))
        assert compiled.metadata.shared <= 64 << 10, build.setting
        assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"], build.setting


@needs_triton
@pytest.mark.parametrize(("M", "N", "K", "r"), [(1, 1, 1, 1), (1, 64, 64, 1), (5, 7, 65, 3), (70, 70001, 70001, 1)])
def test_odd_shapes_compile(M, N, K, r):
    """What the JIT turns into constants (sizes of 1) or 64-bit integers compiles; the interpreter can't show that."""
    from bench.tools import triton_builds
    from lora_kernels.backends.triton.launch import recording
    from lora_kernels.backends.triton.settings import Gpu

    x, dy, layer = triton_builds.inputs(Case(M, N, K, r=r, bias=True, lora_dtype=torch.bfloat16))
    with recording(Gpu("nvidia", 90)) as launches:
        _, hs = backend.qlora_linear(x, [layer])
        backend.qlora_linear_backward([dy], x, hs, [layer], True, [(True, True, True)])
        backend.quantize(torch.empty(N, K, device="meta"), "fp4", 64, True)
    for build in dict.fromkeys(map(triton_builds.build_of, launches)):
        assert not triton_builds.compile_build(build, 90).breaches(), build.setting


class Live(TorchDispatchMode):
    """Counts the bytes of the buffers that live, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
            self.bytes += out.nbytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(out, self._freed, out.nbytes)
        return out

    def _freed(self, nbytes: int) -> None:
        self.bytes -= nbytes


@needs_triton
@pytest.mark.parametrize(("M", "N", "K", "r"), [(8192, 14336, 4096, 64), (8192, 4096, 14336, 16), (64, 28672, 8192, 256)])
def test_transient_memory_is_capped(M, N, K, r, monkeypatch):
    """Large layers: no more than 64 MiB live beside the results."""
    from bench.tools import triton_builds
    from lora_kernels.backends.triton import launch
    from lora_kernels.backends.triton.settings import MAX_PANEL_BYTES, Gpu

    x, dy, layer = triton_builds.inputs(Case(M, N, K, r=r, lora_dtype=torch.bfloat16))
    with launch.recording(Gpu("nvidia", 90)):
        monkeypatch.setattr(launch._recording, "launches", deque(maxlen=0))  # would hold the arguments
        with Live() as forward:
            (y,), (h,) = backend.qlora_linear(x, [layer])
        assert forward.peak - y.nbytes - h.nbytes <= MAX_PANEL_BYTES
        with Live() as backward:
            dx, dAs, dBs, _ = backend.qlora_linear_backward([dy], x, [h], [layer], True, [(True, True, False)])
        assert backward.peak - sum(g.nbytes for g in (dx, *dAs, *dBs)) <= MAX_PANEL_BYTES


ENTRIES = (
    ("dx", 16, 4096, 4096, 16, {"path": "fused", "block_m": 64}),
    ("dx", 256, 4096, 4096, 16, {"path": "fused", "block_m": 128}),
    ("dx", 4096, 4096, 4096, 16, {"path": "panel"}),
    ("dx", 256, 14336, 4096, 16, {"path": "panel"}),
    ("qlora_linear", 1, 4096, 4096, 16, {"path": "small", "block_m": 16, "block_k": 256}),
    ("qlora_linear", 1, 4096, 4096, 64, {"path": "small", "block_m": 16, "block_k": 128, "split": 8}),
)


def _table(entries, **machine: object) -> str:
    rows = [dict(zip(("op", "M", "N", "K", "r", "config"), e, strict=True)) for e in entries]
    return json.dumps({"machine": {"device": "Fake GPU (1)", "arch": 90} | machine, "entries": rows})


@needs_triton
def test_nearest_measured_setting(tmp_path, monkeypatch):
    """N and K first, then r, then the smallest M that is not below; far from all, the floors."""
    from bench.tools import triton_builds
    from lora_kernels.backends.triton import launch
    from lora_kernels.backends.triton.settings import Gpu, Problem, tables

    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    path = tables.file_of("Fake GPU (1)")
    assert path.name == "fake-gpu-1.json"
    path.write_text(_table(ENTRIES))
    entries = tables.entries_of("Fake GPU (1)")

    def nearest(op: str, *sizes: int) -> tuple | None:
        config = tables.nearest(entries, op, *sizes)
        return None if config is None else (config.path, config.block_m, config.block_k, config.split)

    assert nearest("dx", 16, 4096, 4096, 16) == ("fused", 64, 64, 1)
    assert nearest("dx", 17, 4096, 4096, 16) == ("fused", 128, 64, 1)
    assert nearest("dx", 300, 4096, 4096, 64)[0] == "panel"
    assert nearest("dx", 100000, 5120, 4096, 16)[0] == "panel"
    assert nearest("dx", 20, 14336, 4096, 8)[0] == "panel"
    assert nearest("dx", 20, 576, 576, 16) is None  # more than 4 doublings away
    assert nearest("dx", 20, 4096, 48, 16) is None
    assert nearest("qlora_linear", 1, 4096, 4096, 32) == ("small", 16, 256, 1)
    assert nearest("qlora_linear", 1, 4096, 4096, 128) == ("small", 16, 128, 8)
    assert nearest("qlora_linear", 2, 4096, 4096, 16)[0] == "small"
    assert nearest("qlora_linear", 17, 4096, 4096, 16) is None  # no tile that holds 17 rows
    assert nearest("project", 16, 0, 4096, 16) is None

    with launch.recording(Gpu("nvidia", 90, "Fake GPU (1)")):
        assert launch.config_of(Problem("dx", 300, 4096, 4096, 64), CPU).path == "panel"
        assert launch.config_of(Problem("dx", 20, 576, 576, 16), CPU).path == "fused"
    assert tables.tuned(90) == ["Fake GPU (1)"] and tables.tuned(80) == []
    triton_builds.shipped.cache_clear()
    measured = triton_builds.shipped(90)
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "none")
    triton_builds.shipped.cache_clear()
    assert set(triton_builds.shipped(90)) < set(measured)  # what a table asks for is compiled too
    triton_builds.shipped.cache_clear()


@needs_triton
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "a table is"),
        ('{"entries": []}', "a table is"),
        (_table([("project", 1, 2, 3, 4, {}), ("gemm", 1, 2, 3, 4, {})]), "entry 1 .*op must be one of .*'gemm'"),
        (_table([("dx", 1, 2, -3, 4, {})]), "M, N, K, r must be integers >= 0"),
        (_table([("dx", 1, 2, 3, 4, {"path": "fused", "block": 64})]), "no field 'block', only path, block_m"),
        (_table([("dx", 1, 2, 3, 4, {"path": "fused", "block_m": 48})]), "block_m must be a power of two, got 48"),
        (_table([("dx", 1, 2, 3, 4, {"path": "fused", "warps": "4"})]), "warps must be int, got '4'"),
        (_table([("dx", 1, 2, 3, 4, {"path": "small"})]), "path of dx must be one of 'fused', 'panel', got 'small'"),
        (_table([("project", 1, 2, 3, 4, {"split": 0})]), "split must be at least 1, got 0"),
    ],
)
def test_malformed_table(text, message, tmp_path):
    from lora_kernels.backends.triton.settings import tables

    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        tables.load(tmp_path / "gpu.json")
    assert "gpu.json" in str(e.value)


@needs_triton
def test_one_launch_each():
    """No op converts, copies or decodes scales beside its kernels."""
    from bench.tools import triton_builds
    from lora_kernels.backends.triton.launch import recording
    from lora_kernels.backends.triton.settings import Gpu

    x, _, layer = triton_builds.inputs(Case(4, 4096, 4096, r=16))
    with recording(Gpu("nvidia", 90)) as launches:
        backend.dequantize(layer.weight, torch.bfloat16)
        backend.qlora_linear(x, [layer])
    assert [launch.kernel.__name__ for launch in launches] == ["dequantize_groups", "linear_small"]
