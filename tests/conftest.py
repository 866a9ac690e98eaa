"""Fixtures and helpers that several test files use."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends import native
from lora_kernels.testing import Inputs, Results

pytest_plugins = ["emulators.interpreted"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No deadline and no check of speed: a busy machine is no fault.
unchecked = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("tests", deadline=None, max_examples=40, suppress_health_check=unchecked)
settings.load_profile("tests")

HANG = 1800
"""Seconds after which a process that a test waits for hangs: no machine is so busy that work of seconds takes longer."""

COUNTS: Counter[str] = Counter()
"""Cases that a test counts; shown at the end of the run."""

CPU = torch.device("cpu")
collect_ignore = [] if torch.cuda.is_available() else ["backends/test_gpu.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs (default: a fresh one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draws the seed of this run, from which Hypothesis starts too."""
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    running = ", ".join(f"{n}: {why}" if why else n for n, why in backends.choices("qlora_linear", CPU))
    lines = [f"random inputs: --seed {config.option.seed}", f"backends of the CPU: {running}"]
    if native.unavailable(CPU) is None:
        extension = native.extension()
        lines.append(f"instruction set of native: {extension.cpu_level()} (of {', '.join(extension.cpu_levels())})")
    return "\n".join(lines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        command = f"python -m pytest {shlex.quote(item.nodeid)} --seed {item.config.option.seed}"
        report.sections.append(("The same random inputs again", command))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Also where -q leaves the header out."""
    for text, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{text}: {count} cases equal")
    terminalreporter.write_line(f"the same random inputs again: --seed {terminalreporter.config.option.seed}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test alone, from that of the run and the test's name; the random generators start from it."""
    value: int = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    random.seed(value)
    return value


INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
"""On a CPU Triton runs in its interpreter only: tests/emulators/interpreted.py sees to that."""


@pytest.fixture(params=(*INTERPRETED, *backends.ORDER["cpu"]))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of the CPU in turn, forced; one that can't run there is skipped with its reason."""
    reason = backends.load(request.param).unavailable(CPU)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """NaN in every fresh buffer, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests whose products are too small to share: on a busy machine a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- helpers


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
