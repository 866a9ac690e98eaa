"""The commands: they write what they say, and fail with one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU
from typer.testing import CliRunner

from bench import cli, measure
from bench.report import page
from lora_kernels.app import threads
from lora_kernels.app.threads import BUSY


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


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

    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    everything = tmp_path / "docs" / "results.md"
    everything.parent.mkdir()
    for _ in range(2):
        done = invoke("report", "--readme", str(readme), "--page", str(everything), "--results", str(tmp_path / "results"))
        assert done.exit_code == 0, done.output
    done = invoke("targets", "--results", str(tmp_path / "results"))
    assert done.exit_code == 0, done.output
    assert "not measured" in done.output

    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "\nold\n" not in text
    table = "| NF4 with double quantization to bf16 |"
    assert text.count(table) == everything.read_text().count(table) == 1
    for picture in ("../results/cpu/dequantize.png", "../results/cpu/forward.png"):
        assert f"]({picture})" in everything.read_text()
        assert (everything.parent / picture).is_file()


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


def test_folder_of_a_gpu() -> None:
    assert cli.device_slug(torch.device("cuda"), "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert cli.device_slug(CPU, "AMD EPYC") == "cpu"
