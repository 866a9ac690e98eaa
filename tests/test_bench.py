"""The benchmark itself: it refuses wrong results, it writes what it says, and its commands fail with one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import lora_kernels as lk
from bench import bench_layer, bench_model, bench_weight, cases, cli, compile_check, measure, report, tune
from bench.suite import OURS, measure_line, summary
from lora_kernels.backends import reference

CPU = torch.device("cpu")
TOP = measure.Ceiling(1e10, 1e11, 256)


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    """Other processes may hold the second core, and waiting for it takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


# ---- wrong results


def wrong_backend(monkeypatch: pytest.MonkeyPatch, op: str, spoil: Any) -> None:
    """Registers a backend that is the reference except for one op."""
    module = ModuleType("lora_kernels.backends.wrong")
    for name in ("unavailable", "quantize", "decode_absmax", "dequantize", "qlora_linear", "qlora_linear_backward"):
        setattr(module, name, getattr(reference, name))
    right = getattr(reference, op)
    setattr(module, op, lambda *args: spoil(right(*args)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lk.backends.load.cache_clear()
    monkeypatch.setattr(lk.backends, "NAMES", (*lk.backends.NAMES, "wrong"))


def scaled(index: int, by: float = 1.02) -> Any:
    return lambda out: tuple(t * by if i == index and t is not None else t for i, t in enumerate(out))


LAYER = cases.case(5, 48, 96)
WRONG = {
    "quantize": (bench_weight.Quantize(64, 128, CPU, True), "quantize", lambda out: (out[0] ^ 1, *out[1:])),
    "decode_absmax": (bench_weight.DecodeAbsmax(64, 128, CPU, True), "decode_absmax", lambda a: a * 1.001),
    "dequantize": (bench_weight.Dequantize(64, 128, CPU, True), "dequantize", lambda w: w.roll(1, 0)),
    "y": (bench_layer.Forward(LAYER, CPU, True), "qlora_linear", scaled(0)),
    "h": (bench_layer.TrainLayer(LAYER, CPU, True), "qlora_linear", scaled(1)),
    "dx": (bench_layer.TrainLayer(LAYER, CPU, True), "qlora_linear_backward", scaled(0)),
    "dA": (bench_layer.TrainLayer(LAYER, CPU, True), "qlora_linear_backward", scaled(1)),
    "one element": (
        bench_layer.Forward(LAYER, CPU, True),
        "qlora_linear",
        lambda out: (out[0].index_fill(1, torch.tensor([7]), 0), out[1]),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_backend_is_refused_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, op, spoil = WRONG[what]
    wrong_backend(monkeypatch, op, spoil)
    with lk.use_backend("wrong"):
        entries = measure_line(line, ["torch"], measure.QUICK, TOP)
    line.release()
    assert entries[OURS].status.startswith("wrong: ")
    assert entries[OURS].seconds is None
    assert entries["torch"].ok
    assert entries["torch"].ratio is None


@pytest.mark.parametrize("what", WRONG)
def test_right_backend_is_timed(what: str) -> None:
    line = WRONG[what][0]
    with lk.use_backend("reference"):
        entries = measure_line(line, ["torch"], measure.QUICK, TOP)
    line.release()
    assert entries[OURS].status == "ok"
    assert entries["torch"].ratio is not None


def test_wrong_gradient_in_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    [line] = bench_model.lines("train_step", CPU, "tiny", None, True, 2, 8)
    wrong_backend(monkeypatch, "qlora_linear_backward", scaled(2, 1.3))
    with lk.use_backend("reference"):
        right = line.judge(OURS, line.build(OURS).outputs())
    with lk.use_backend("wrong"):
        wrong = line.judge(OURS, line.build(OURS).outputs())
    assert right is None
    assert wrong is not None
    assert "gradients" in wrong


# ---- numbers


def test_ratio_is_taken_within_a_round() -> None:
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 20.0, 4.0]
    assert measure.ratio(theirs, ours) == measure.Quartiles(2.0, 2.0, 2.0)


def test_interleave_takes_turns() -> None:
    order: list[str] = []
    runs = {name: lambda i, name=name: order.append(name) for name in "ab"}
    effort = measure.Effort(0.0, 4, 4, 0.0)
    times = measure.interleave(runs, CPU, effort)
    assert "".join(order) == "aabb" + "abba" * 2
    assert all(len(t) == 4 for t in times.values())


def test_summary_names_worst_and_best() -> None:
    def row(label: str, value: float) -> dict[str, Any]:
        return {"label": label, "entries": {OURS: {"status": "ok"}, "dense": {"status": "ok", "ratio": {"median": value}}}}

    got = summary([row("a", 0.5), row("b", 2.0)])["dense"]
    assert (got["worst"], got["worst_at"], got["best"], got["best_at"]) == (0.5, "a", 2.0, "b")
    assert got["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_device_has_cases(kind: str) -> None:
    device = torch.device(kind)
    for suite in (cases.forward, cases.train_layer, cases.memory):
        assert len({c.id for c in suite(device)}) == len(suite(device)) > 0
    assert cases.weights(device)


# ---- commands


def test_run_writes_results_that_report_reads(tmp_path: Path) -> None:
    out, readme = tmp_path / "results" / "cpu", tmp_path / "README.md"
    args = ("--quick", "--against", "torch,dense", "--json", str(out), "--plot", str(out))
    for suite in ("dequantize", "forward"):
        done = invoke("run", suite, *(a.replace("torch,dense", "torch") for a in args))
        assert done.exit_code == 0, done.output
    result = json.loads((out / "forward.json").read_text())
    assert {"device", "driver", "versions", "threads", "commit", "date", "backend", "ceiling", "rows", "summary"} <= set(result)
    entry = result["rows"][0]["entries"]["torch"]
    assert entry["seconds"]["median"] > 0
    assert entry["ratio"]["q1"] <= entry["ratio"]["median"] <= entry["ratio"]["q3"]
    assert (out / "forward.png").stat().st_size > 10_000

    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        done = invoke("report", "--readme", str(readme), "--results", str(tmp_path / "results"))
        assert done.exit_code == 0, done.output
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "results/cpu/dequantize.png" in text
    assert "plain torch" in text


def test_against_one_rival_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    done = invoke("run", "dequantize", "--quick", "--against", "torchao", "--only", "576x576")
    assert done.exit_code == 0, done.output
    assert "not installed" in done.output


BAD = [
    (("run", "forwards"), "SUITE must be all or one of"),
    (("run", "forward", "--against", "unslot"), "unslot is none of the rivals"),
    (("run", "forward", "--device", "tpu"), "--device must be cpu or cuda"),
    (("run", "train_step", "--model", "no/such/folder"), "model must be a folder or one of"),
    (("run", "forward", "dequantize", "--json", "x.json"), "is one file, but several suites are run"),
    (("profile", "qlora", "1x2x3"), "OP must be one of"),
    (("profile", "dequantize", "1x2"), "SHAPE must be MxNxK"),
    (("tune", "--device", "cpu"), "needs a CUDA GPU"),
    (("report", "--results", "no/such/folder"), "no results in"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_bad_input_is_one_clear_line(args: tuple[str, ...], message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "args", [("run", "forward", "--device", "cuda"), ("tune",), ("profile", "dequantize", "1x64x64", "--device", "cuda")]
)
def test_no_gpu_is_said(args: tuple[str, ...]) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert "finds no CUDA GPU" in done.stderr


# ---- tuner and compile-check, without a GPU


def test_search_finds_the_fastest_setting() -> None:
    settings = pytest.importorskip("lora_kernels.backends.triton.settings")
    cost = {"block_n": {64: 3, 128: 1}, "stages": {2: 2, 3: 1, 4: 0, 5: 5}}

    def faster(a: Any, b: Any) -> bool:
        total = [sum(costs.get(getattr(c, name), 9) for name, costs in cost.items()) + (c.path != "small") for c in (a, b)]
        return total[0] < total[1]

    start = [settings.Config("panel"), settings.Config("small", 16, 64, 128)]
    best = tune.search(start, "qlora_linear", faster)
    assert (best.path, best.block_n, best.stages) == ("small", 128, 4)


def test_every_tuned_problem_has_a_start() -> None:
    pytest.importorskip("lora_kernels.backends.triton.settings")
    for problem in tune.problems(quick=False):
        for arch in (80, 90, 100):
            assert tune.starts(problem, arch)


@pytest.mark.parametrize(
    ("name", "arch", "matrix", "lost"),
    [
        ("linear_fused", 90, "HGMMA", False),
        ("linear_fused", 90, "HMMA", True),
        ("dx_fused", 100, "-", True),
        ("dequantize_groups", 90, "-", False),
        ("project", 80, "-", True),
    ],
)
def test_a_lost_matrix_instruction_is_seen(name: str, arch: int, matrix: str, lost: bool) -> None:
    assert bool(compile_check.lost_matrix(name, arch, matrix)) == lost
