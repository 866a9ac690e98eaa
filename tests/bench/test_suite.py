"""A line: wrong results are refused and not timed, right ones are; what a suite says of its lines."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import CPU
from made_results import entries, result_of
from rich.console import Console

import lora_kernels as lk
from bench import measure, suite
from bench.report import overview
from bench.suite import OURS, measure_line, run_suite, summary
from bench.suites import cases, layer, model, weight
from lora_kernels.backends import reference

TOP = measure.Ceiling(1e10, 1e11, 256)


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
    "quantize": (weight.Quantize(64, 128, CPU, True), "quantize", lambda out: (out[0] ^ 1, *out[1:])),
    "decode_absmax": (weight.DecodeAbsmax(64, 128, CPU, True), "decode_absmax", lambda a: a * 1.001),
    "dequantize": (weight.Dequantize(64, 128, CPU, True), "dequantize", lambda w: w.roll(1, 0)),
    "y": (layer.Forward(LAYER, CPU, True), "qlora_linear", scaled(0)),
    "h": (layer.TrainLayer(LAYER, CPU, True), "qlora_linear", scaled(1)),
    "dx": (layer.TrainLayer(LAYER, CPU, True), "qlora_linear_backward", scaled(0)),
    "dA": (layer.TrainLayer(LAYER, CPU, True), "qlora_linear_backward", scaled(1)),
    "one element": (
        layer.Forward(LAYER, CPU, True),
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
    [line] = model.lines("train_step", CPU, "tiny", None, True, 2, 8)

    def spoil(out: Any) -> Any:
        dx, dA, dB, dbias = out
        return dx, dA, [1.3 * d for d in dB], dbias

    wrong_backend(monkeypatch, "qlora_linear_backward", spoil)
    with lk.use_backend("reference"):
        right = line.judge(OURS, line.build(OURS).outputs())
    with lk.use_backend("wrong"):
        wrong = line.judge(OURS, line.build(OURS).outputs())
    assert right is None
    assert wrong is not None
    assert "gradients" in wrong


def test_no_line_is_begun_after_the_deadline() -> None:
    lines = weight.lines("dequantize", CPU, quick=True)
    env = measure.environment(CPU)
    result = run_suite("dequantize", lines, CPU, ["torch"], measure.QUICK, Console(quiet=True), env, True, time.monotonic())
    assert result["rows"] == []
    assert result["left_out"] == [line.label for line in lines]


def test_summary_names_worst_and_best() -> None:
    got = summary([{"label": "a", "entries": entries(dense=0.5)}, {"label": "b", "entries": entries(dense=2.0)}])["dense"]
    assert (got["worst"], got["worst_at"], got["best"], got["best_at"]) == (0.5, "a", 2.0, "b")
    assert got["mean"] == pytest.approx(1.0)


def test_weights_of_every_contender_are_cold_or_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(layer, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(suite, "cache_bytes", lambda device: 1 << 20)
    for case, cold in ((cases.case(4, 256, 256), True), (cases.case(128, 128, 128), False)):
        line = layer.Forward(case, CPU)
        copies = {name: line.build(name).copies for name in (OURS, "dense", "torch")}
        assert len(set(copies.values())) == 1
        assert line.cold == cold
        smallest = line.inputs.qw.nbytes
        largest = line.weight.nbytes
        assert copies[OURS] * smallest > 2 << 20 if cold else copies[OURS] * largest < 1 << 19


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
    assert overview.rivals(result_of("forward", rows)) == ["dense (graph)"]
