"""The benchmark itself: it refuses wrong results, it writes what it says, and its commands fail with one clear line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

import lora_kernels as lk
from bench import cli, measure, report, suite, test_suites
from bench.report import grid, targets
from bench.report.plot import Span, draw_overview
from bench.suite import OURS, measure_line, run_suite, summary
from bench.suites import cases
from bench.suites import layer as bench_layer
from bench.suites import model as bench_model
from bench.suites import weight as bench_weight
from bench.tools import compile_check, tune
from lora_kernels.app import threads
from lora_kernels.app.threads import BUSY
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


@pytest.fixture(autouse=True)
def same_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be told back, and other tests in this process measure memory."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: False)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets seconds pass on the clock that `measure` reads, which otherwise stands still."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    return pass_seconds


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


def entries(**ratios: float) -> dict[str, Any]:
    """Of a row of a result."""
    ours = {OURS: {"status": "ok", "seconds": {"median": 1e-3}, "of_ceiling": 0.5}}
    return ours | {name: {"status": "ok", "ratio": {"median": value}} for name, value in ratios.items()}


def result_of(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"suite": suite, "driver": None, "rows": rows, "summary": summary(rows)}


# ---- wrong results


def wrong_backend(monkeypatch: pytest.MonkeyPatch, op: str, spoil: Any) -> None:
    """Registers a backend that is the reference except for one op."""
    module = ModuleType("lora_kernels.backends.wrong")
    module.__dict__.update({name: f for name, f in vars(reference).items() if not name.startswith("_")})
    right = getattr(reference, op)
    setattr(module, op, lambda *args: spoil(right(*args)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lk.backends.load.cache_clear()
    monkeypatch.setattr(lk.backends, "NAMES", (*lk.backends.NAMES, "wrong"))


def scaled(index: int, by: float = 1.02) -> Any:
    """Spoils a result of an op on a list of layers: dx, which is one tensor, or that of each layer."""

    def spoil(part: Any) -> Any:
        return [None if t is None else t * by for t in part] if isinstance(part, list) else part * by

    return lambda out: tuple(spoil(part) if i == index else part for i, part in enumerate(out))


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
        lambda out: ([y.index_fill(1, torch.tensor([7]), 0) for y in out[0]], out[1]),
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

    def spoil(out: Any) -> Any:
        dx, dA, dB, dbias = out
        return dx, dA, [1.3 * d for d in dB], dbias

    wrong_backend(monkeypatch, "qlora_linear_group_backward", spoil)
    with lk.use_backend("reference"):
        right = line.judge(OURS, line.build(OURS).outputs())
    with lk.use_backend("wrong"):
        wrong = line.judge(OURS, line.build(OURS).outputs())
    assert right is None
    assert wrong is not None
    assert "gradients" in wrong


@pytest.mark.parametrize(("line", "name"), test_suites.PROBLEMS)
def test_every_contender_is_right(line: Any, name: str) -> None:
    """What `pytest bench` times, once and untimed."""
    test_suites.contender(line, name)
    line.release()


# ---- numbers


def test_ratio_is_taken_within_the_rounds_that_both_took_part_in() -> None:
    ours, theirs = {0: 1.0, 1: 10.0, 2: 2.0, 3: 1.0}, {0: 2.0, 2: 4.0, 3: 2.0}
    assert measure.ratio(theirs, ours) == measure.Quartiles(2.0, 2.0, 2.0)


def test_a_long_call_is_its_own_warm_up(takes: Any) -> None:
    calls: dict[str, list[int]] = {"long": [], "short": []}
    runs = {"long": lambda i: calls["long"].append(i) or takes(0.11), "short": lambda i: calls["short"].append(i)}
    measure.interleave(runs, CPU, measure.Effort(0.0, 1, 1, 0.0, slow_rounds=1))
    assert calls == {"long": [0, 2], "short": [0, 1, 2]}


@pytest.mark.usefixtures("takes")
def test_interleave_takes_turns() -> None:
    order: list[str] = []
    runs = {name: lambda i, name=name: order.append(name) for name in "ab"}
    effort = measure.Effort(0.0, 4, 4, 0.0, slow_rounds=4)
    times = measure.interleave(runs, CPU, effort)
    assert "".join(order) == "aabb" + "abba" * 2
    assert all(list(t) == [0, 1, 2, 3] for t in times.values())


def test_a_slow_contender_takes_part_in_fewer_rounds_ours_in_all(takes: Any) -> None:
    wait = {OURS: 0.02, "fast": 0.001, "slow": 0.02}
    runs = {name: lambda i, s=s: takes(s) for name, s in wait.items()}
    times = measure.interleave(runs, CPU, measure.Effort(0.0, 9, 9, 0.0, slow_rounds=3), always=(OURS,))
    assert {name: len(t) for name, t in times.items()} == {OURS: 9, "fast": 9, "slow": 3}
    assert list(times["slow"]) == [2, 5, 8]  # spread over the whole time


def test_weights_of_every_contender_are_cold_or_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(bench_layer, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(suite, "cache_bytes", lambda device: 1 << 20)
    for case, cold in ((cases.case(4, 256, 256), True), (cases.case(128, 128, 128), False)):
        line = bench_layer.Forward(case, CPU)
        copies = {name: line.build(name).copies for name in (OURS, "dense", "torch")}
        assert len(set(copies.values())) == 1
        assert line.cold == cold
        smallest = line.inputs.qw.nbytes
        largest = line.weight.nbytes
        assert copies[OURS] * smallest > 2 << 20 if cold else copies[OURS] * largest < 1 << 19


def test_no_line_is_begun_after_the_deadline() -> None:
    lines = bench_weight.lines("dequantize", CPU, quick=True)
    env = measure.environment(CPU)
    result = run_suite("dequantize", lines, CPU, ["torch"], measure.QUICK, Console(quiet=True), env, True, time.monotonic())
    assert result["rows"] == []
    assert result["left_out"] == [line.label for line in lines]


def test_environment_names_what_a_result_depends_on() -> None:
    env = measure.environment(CPU)
    assert env["device"]
    assert env["versions"]["torch"] == torch.__version__
    assert len(env["sources"]) == 12
    assert isinstance(env["dirty"], bool)


def test_summary_names_worst_and_best() -> None:
    got = summary([{"label": "a", "entries": entries(dense=0.5)}, {"label": "b", "entries": entries(dense=2.0)}])["dense"]
    assert (got["worst"], got["worst_at"], got["best"], got["best_at"]) == (0.5, "a", 2.0, "b")
    assert got["mean"] == pytest.approx(1.0)


def test_overview_takes_the_fastest_setting_of_a_rival_and_marks_a_loss() -> None:
    rows = [
        {"label": "a", "entries": entries(dense=0.5) | entries(**{"bnb+peft": 3.0, "bnb+peft-autocast": 2.0})},
        {"label": "b", "entries": entries(dense=2.0) | entries(**{"bnb+peft": 8.0, "bnb+peft-autocast": 9.0})},
    ]
    heading, [cells] = report.overview([result_of("train_layer", rows)], "**")
    found = dict(zip(heading, cells, strict=True))
    assert found["ours"] == "2 lines"
    assert found["bf16 nn.Linear, no adapter"] == "**0.50x** to 2.00x, mean 1.00x"
    assert found["bitsandbytes (+ PEFT), best setting"] == "2.00x to 8.00x, mean 4.00x"
    assert "Unsloth" not in found


def test_targets_are_decided_by_the_worst_line() -> None:
    rows = [
        {"label": f"4096x4096  M={M}", "M": M, "N": 4096, "K": 4096, "r": 16, "entries": entries(dense=ratio)}
        for M, ratio in ((16, 2.0), (512, 1.25), (2048, 1.0))
    ]
    verdicts = [v for v in targets.check([result_of("train_layer", rows)]) if v.measured is not None]
    assert [(v.target.most, v.measured, v.reached) for v in verdicts] == [(0.75, 0.5, True), (0.95, 1.0, False)]
    assert verdicts[1].at == "4096x4096 M=2048"


def test_grid_has_a_cell_for_every_shape_and_number_of_tokens() -> None:
    rows = [
        {"what": "forward", "threads": 1, "N": N, "K": 8, "M": M, "label": "", "entries": entries(dense=M / N)}
        for N, M in ((4, 1), (4, 2), (5, 2))
    ]
    [matrix] = grid.matrices(result_of("grid", rows))
    assert list(matrix.texts()) == [["", "M=1", "M=2"], ["4x8", "0.25x", "0.50x"], ["5x8", "", "0.40x"]]


def test_grid_shows_the_worst_lines_first_with_their_work() -> None:
    def entry(seconds: float, **ratio: float) -> dict[str, Any]:
        times = {"seconds": {"median": seconds}, "GFLOP/s": 3 / seconds, "GB/s": 2 / seconds}
        return times | ({"ratio": {"q1": 0.1, "q3": 9, **ratio}} if ratio else {})

    rows = [{"label": f"M={r}", "entries": {OURS: entry(1e-3), "dense": entry(2e-3, median=r)}} for r in (2.0, 0.5, 1.5)]
    result = result_of("grid", rows)
    assert grid.standing(result, "dense") == "against bf16 nn.Linear, no adapter: faster on 2 of 3 lines, mean 1.14x"
    _, worst, best = grid.extremes(result, "dense")
    assert worst == ["M=0.5", "0.50x [0.10, 9.00]", "1.00 ms", "2.00 ms", "1.00 of theirs", "1.00 of theirs"]
    assert best[0] == "M=2.0"
    text = report._table(grid.standing(result, "dense"), grid.extremes(result, "dense"))
    assert "| M=0.5 | **0.50x [0.10, 9.00]** | 1.00 ms |" in text
    assert "| M=2.0 | 2.00x [0.10, 9.00] |" in text


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_device_has_cases(kind: str) -> None:
    device = torch.device(kind)
    for of in (cases.forward, cases.train_layer, cases.memory):
        assert len({c.id for c in of(device)}) == len(of(device)) > 0
    assert cases.weights(device)


# ---- commands


def test_run_writes_results_that_report_reads(tmp_path: Path) -> None:
    out, readme = tmp_path / "results" / "cpu", tmp_path / "README.md"
    args = ("--quick", "--against", "torch", "--json", str(out), "--plot", str(out))
    for name in ("dequantize", "forward"):
        done = invoke("run", name, *args)
        assert done.exit_code == 0, done.output
    result = json.loads((out / "forward.json").read_text())
    expected = {"device", "driver", "versions", "threads", "commit", "dirty", "date", "backend", "ceiling", "rows", "summary"}
    assert expected <= set(result)
    entry = result["rows"][0]["entries"]["torch"]
    assert entry["seconds"]["median"] > 0
    assert entry["ratio"]["q1"] <= entry["ratio"]["median"] <= entry["ratio"]["q3"]
    assert (out / "forward.png").stat().st_size > 10_000

    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    for _ in range(2):
        done = invoke("report", "--readme", str(readme), "--page", str(page), "--results", str(tmp_path / "results"))
        assert done.exit_code == 0, done.output
    done = invoke("targets", "--results", str(tmp_path / "results"))
    assert done.exit_code == 0, done.output
    assert "not measured" in done.output

    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "\nold\n" not in text
    table = "| NF4 with double quantization to bf16 |"
    assert text.count(table) == page.read_text().count(table) == 1
    for picture in ("../results/cpu/dequantize.png", "../results/cpu/forward.png"):
        assert f"]({picture})" in page.read_text()
        assert (page.parent / picture).is_file()


def test_overview_draws_every_suite_in_both_themes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(report, "draw_overview", lambda *args: drawn.append(args))
    rows = [{"label": "a", "entries": entries(dense=0.5, torch=9.0)}, {"label": "b", "entries": entries(dense=2.0)}]
    found = [
        (tmp_path / "abacus" / f"{name}.json", result_of(name, rows) | {"device": "Abacus", "date": "2026-01-02T03"})
        for name in ("train_layer", "forward")
    ]
    monkeypatch.setattr(report, "draw", lambda result, path: None)
    report.pictures(found, tmp_path)
    for groups, spans, where, path, dark in drawn:
        assert groups == ["bf16 nn.Linear, no adapter"]  # plain torch is in the tables alone
        assert spans == {report.SUITES[name]: [(0.5, 1.0, 2.0)] for name in ("train_layer", "forward")}
        assert where == "Abacus, 2026-01-02"
        assert path == tmp_path / f"overview-abacus-{'dark' if dark else 'light'}.png"
    assert len(drawn) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_overview_is_a_picture(tmp_path: Path, dark: bool) -> None:
    rows = {
        "a suite": [Span(0.5, 0.8, 2.0), None],
        "one line": [None, Span(1.5, 1.5, 1.5)],
        "losses": [Span(0.1, 0.2, 0.9), None],
    }
    draw_overview(["one", "two"], rows, "here", tmp_path / "all.png", dark)
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_readme_and_page_hold_the_committed_results() -> None:
    """After a new measurement `python -m bench report` must be run."""
    found = report.load()
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.section(found)
    assert report.PAGE.read_text(encoding="utf-8") == report.page(found)


@pytest.mark.parametrize("waited", [0.01, 0.4])
def test_busy_machine_is_said_first_and_stored(waited: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "waited_now", lambda: waited)
    monkeypatch.setattr(measure.Meter, "waited", lambda self: waited)
    file = tmp_path / "result.json"
    done = invoke("run", "dequantize", "--quick", "--against", "torch", "--only", "576x576", "--json", str(file))
    assert done.exit_code == 0, done.output
    said = "warning: other programs hold the cores, for which threads wait 40% of the time: do not trust the numbers below"
    assert done.stdout.startswith(said) == (waited > BUSY)
    assert ("warning: dequantize: threads waited 40%" in done.stdout) == (waited > BUSY)
    result = json.loads(file.read_text())
    assert result["waited"] == waited
    assert "cpu_quota" in result


def test_threads_beyond_the_quota_are_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    done = invoke("run", "dequantize", "--quick", "--against", "torch", "--only", "576x576", "--threads", "2")
    assert done.exit_code == 0, done.output
    assert "--threads=2 is more than this machine gives" in done.stdout
    assert "--threads=1 is faster" in done.stdout
    assert ", 2 threads, backend" in done.stdout


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
    (("targets", "--device", "abacus"), "no results in"),
    (("run", "decode_absmax", "memory", "--quick", "--only", "7x7"), "no line contains '7x7'"),
    (("run", "decode_absmax", "--save", "--only", "576x576"), "--save replaces the results of whole suites"),
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


# ---- the CUDA method, with stand-ins for the parts that need a GPU


class Event:
    """A clock that advances by what `tick` says."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def tick(i: int) -> None:
    Event.now += (2.0, 3.0, 10.0)[i % 3]


def test_cuda_events_give_the_median_and_the_cache_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    buffer = SimpleNamespace(zero_=lambda: flushed.append(Event.now))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: buffer)
    timer = measure._cuda_timer(CPU)
    assert timer(tick, 0, 3) == pytest.approx(3e-3)
    assert len(flushed) == 3


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A graph whose replay runs `capture.replay`."""
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda g: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
        "CUDAGraph": lambda: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graph


def test_a_graph_holds_a_call_for_each_copy_and_its_result_is_compared(capture: Any) -> None:
    outs: list[torch.Tensor] = []

    def run(i: int) -> torch.Tensor:
        outs.append(torch.full((3,), float(i + 1)))
        return outs[-1]

    capture.replay = lambda: outs[-1].fill_(4.0)
    assert measure.Graph(run, 4).calls == 4
    assert len(outs) == 3 + 4 + 1  # warm-up, capture, comparison

    capture.replay = lambda: None
    with pytest.raises(RuntimeError, match="a replay gives another result"):
        measure.Graph(run, 4)


def test_a_graphed_contender_is_compared_with_ours_graphed(monkeypatch: pytest.MonkeyPatch, takes: Any) -> None:
    class Line(suite.Line):
        suite, label, names, device = "forward", "8x8  M=1  r=16", (OURS, "dense", "torch"), torch.device("cuda")

        def build(self, name: str) -> suite.Contender:
            return suite.Contender(lambda i: takes(2e-3 if name == "dense" else 1e-3), dict, 1)

        def judge(self, name: str, got: Any) -> None:
            return None

    class Graph:
        calls = 1

        def __init__(self, run: Any, copies: int) -> None:
            if made := getattr(Graph, "made", 0):
                assert made < 2, "no capture for the third"
            Graph.made = made + 1

        def __call__(self, i: int) -> None:
            takes(0.5e-3)

    for module in (measure, suite):
        monkeypatch.setattr(module, "Graph", Graph)
    monkeypatch.setattr(measure, "_cuda_timer", lambda device: measure._cpu_timer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    got = measure_line(Line(), ["dense", "torch"], measure.QUICK, TOP)
    assert got["dense"].ratio.median == pytest.approx(2)
    assert got["dense (graph)"].ratio.median == pytest.approx(1)
    assert got[f"{OURS} (graph)"].ratio is None
    assert got["torch (graph)"].status == "not capturable: AssertionError: no capture for the third"
    rows = [{"label": "8x8", "entries": {n: suite._entry_json(e) for n, e in got.items()}}]
    assert report.rivals(result_of("forward", rows)) == ["dense (graph)"]


def test_folder_of_a_gpu() -> None:
    assert cli.device_slug(torch.device("cuda"), "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert cli.device_slug(CPU, "AMD EPYC") == "cpu"


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
    settings = pytest.importorskip("lora_kernels.backends.triton.settings")
    for problem in tune.problems(quick=False):
        for arch in (80, 90, 100):
            assert tune.starts(problem, settings.Gpu("nvidia", arch))


@pytest.mark.parametrize(
    ("name", "arch", "matrix", "lost"),
    [
        ("linear_fused", 90, "HGMMA", False),
        ("linear_fused", 90, "HMMA", True),
        ("dx_fused", 100, "", True),
        ("dequantize_groups", 90, "", False),
        ("project", 80, "", True),
    ],
)
def test_a_lost_matrix_instruction_is_seen(name: str, arch: int, matrix: str, lost: bool) -> None:
    assert bool(compile_check.lost_matrix(name, arch, [matrix] * bool(matrix))) == lost
