"""Finds launch settings of the Triton backend on the GPU at hand and writes them as a table.

For each problem the search starts from the shipped setting and changes one field at a time as long as that helps (coordinate
descent, twice around).  A candidate must give the shipped setting's result; it is timed in a CUDA graph over cold copies of the
weight, interleaved with the best one so far, and replaces it if it is faster by more than the noise (MARGIN) in the median of
pairwise ratios.  Which path a linear op takes (decode in the main loop, or to memory and then a GEMM) is part of the setting.

`quantize` is left out: it looks at its result on the host, so it can't be captured.  So is the sum of partials, which is a few
microseconds of any launch that makes them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lora_kernels as lk
from lora_kernels.testing import Case, make_inputs, relative_error

from ..measure import Effort, Graph, Run, copies_of, environment, interleave, ratio
from ..rivals.base import clone
from ..suite import write_text
from ..suites import cases

MARGIN = 1.02
"""A candidate must be faster by this factor."""
TOLERANCE = 0.02
"""Relative difference allowed between the results of two settings in bf16."""
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "small": {
        "block_n": (64, 128),
        "block_k": (64, 128, 256),
        "split": (1, 2, 3, 4, 6, 8, 12, 16),
        "warps": (4, 8),
        "stages": (2, 3, 4, 5),
        "shuffle": (False, True),
        "fuse_h": (False, True),
    },
    "fused": {
        "block_m": (64, 128, 256),
        "block_n": (64, 128, 256),
        "block_k": (32, 64, 128),
        "warps": (4, 8),
        "stages": (2, 3, 4),
        "group": (4, 8, 16),
        "registers": (0, 128),
    },
    "gluon": {"block_m": (128, 256), "stages": (3, 4, 5), "group": (4, 8, 16)},
    "panel": {},
    "project": {
        "block_m": (16, 32, 64, 128),
        "block_k": (64, 128),
        "split": (1, 2, 4, 8, 16, 32),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "expand": {"block_m": (32, 64, 128), "block_n": (64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3)},
    "read_once": {
        "block_m": (16, 32, 64, 128),
        "block_n": (64, 128, 256),
        "steps": (1, 2, 4, 8, 16),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "dequantize": {"block_n": (1024, 2048, 4096, 8192, 16384), "warps": (2, 4, 8)},
    "decode_absmax": {"block_n": (512, 1024, 2048, 4096), "warps": (2, 4, 8)},
}
"""What is tried for each path of the linear ops, and for each other op."""


@dataclass(frozen=True)
class Problem:
    """One entry of the table: a launch of `op` inside a call of ours."""

    op: str
    case: Case

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K and r as in `settings.Problem`."""
        c = self.case
        return {
            "dequantize": (0, 0, c.N * c.K, 0),
            "decode_absmax": (0, 0, c.N * c.K // c.blocksize, 0),
            "project": (c.M, 0, c.K, c.r),
            "expand": (c.M, c.N, 0, c.r),
            "read_once": (c.M, c.N, 0, c.r),
        }.get(self.op, (c.M, c.N, c.K, c.r))


def problems(quick: bool) -> list[Problem]:
    """What is tuned; M stands for the rows up to it."""
    shapes = cases.LLAMA_8B[:1] if quick else (*cases.LLAMA_8B, *cases.LLAMA_1B, (576, 576))
    tokens = (1, 256) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    out = [Problem(op, cases.case(1, N, K)) for op in ("dequantize", "decode_absmax") for N, K in shapes]
    out += [Problem("qlora_linear", cases.case(M, N, K)) for N, K in shapes for M in tokens]
    out += [Problem("dx", cases.case(M, N, K)) for N, K in shapes for M in tokens if M >= 16]
    for op in ("project", "expand", "read_once"):
        out += [Problem(op, cases.case(M, N, K, r)) for N, K in shapes for M in tokens if M >= 16 for r in (16, 64)]
    return list({(p.op, *p.sizes): p for p in out}.values())


def triton_module(name: str) -> Any:
    try:
        return importlib.import_module(f"lora_kernels.backends.triton.{name}")
    except ImportError as e:
        raise RuntimeError(f"the Triton backend can't be imported: {e}") from None


def neighbours(config: Any, op: str) -> Iterator[Any]:
    """Settings that differ from `config` in one field, the other paths of the linear ops among them."""
    for name, values in FIELDS[config.path or op].items():
        for value in values:
            if value != getattr(config, name):
                yield replace(config, **{name: value})


def search(start: list[Any], op: str, faster: Callable[[Any, Any], bool], rounds: int = 2) -> Any:
    """The best setting found from any of `start`; `faster(a, b)` says whether a beats b."""
    best = start[0]
    for config in start[1:]:
        if faster(config, best):
            best = config
    for _ in range(rounds):
        before = best
        for candidate in list(neighbours(best, op)):
            if faster(candidate, best):
                best = candidate
        if best == before:
            break
    return best


class Bench:
    """Runs one problem under any setting, and compares settings by time."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.op, self.device = problem.op, device
        self.inputs = make_inputs(problem.case, device=device)
        self.weights = [clone(self.inputs.qw) for _ in range(copies_of(self.inputs.qw.nbytes, device, most=64))]
        self.h = torch.randn(problem.case.M, problem.case.r, device=device).to(problem.case.dtype)
        self.expected = self.run(0)
        self.graphs: dict[Any, Graph | None] = {}

    def run(self, i: int) -> torch.Tensor:
        x, qw = self.inputs, self.weights[i % len(self.weights)]
        ops, s = torch.ops.lora_kernels, self.inputs.case.scaling
        low_rank = triton_module("low_rank")
        if self.op == "decode_absmax":
            return lk.decode_absmax(qw)
        if self.op == "project":
            return low_rank.project(x.x, x.lora_A, 0.0, None)
        if self.op == "expand":
            return low_rank.expand(self.h, x.lora_B, True, s, None, 0.0, None)
        if self.op == "read_once":
            g, dB, _ = low_rank.read_dy(x.dy, self.h, x.lora_B, s, True, True, False)
            return torch.cat([g.float(), dB])
        if self.op == "dequantize":
            return lk.dequantize(qw, torch.bfloat16)
        if self.op == "qlora_linear":
            return ops.qlora_linear(x.x, *qw.op_args(), x.lora_A, x.lora_B, s, None, 0.0, None)[0]
        needs = [True, False, False, False]
        return ops.qlora_linear_backward(x.dy, None, None, *qw.op_args(), x.lora_A, x.lora_B, s, 0.0, None, needs)[0]

    def graph(self, config: Any) -> Graph | None:
        """None if the setting does not compile, does not fit or is wrong."""
        if config not in self.graphs:
            with triton_module("settings").forcing(**{self.op: config}):
                try:
                    right = relative_error(self.run(0), self.expected) < TOLERANCE
                    self.graphs[config] = Graph(self.run, len(self.weights)) if right else None
                except Exception:  # out of registers or shared memory, or a tile that Triton refuses
                    self.graphs[config] = None
                    torch.cuda.synchronize(self.device)
        return self.graphs[config]

    def faster(self, a: Any, b: Any) -> bool:
        graph_a, graph_b = self.graph(a), self.graph(b)
        if graph_a is None or graph_b is None:
            return graph_a is not None
        runs: dict[str, Run] = {"a": graph_a, "b": graph_b}
        times = interleave(runs, self.device, Effort(0.02, 7, 15, 2.0))
        return ratio(times["b"], times["a"]).median > MARGIN


def starts(problem: Problem, gpu: Any) -> list[Any]:
    """The shipped setting on a `settings.Gpu`, and for the linear ops the floor of every other path."""
    settings, case = triton_module("settings"), problem.case
    shipped = settings.pick_config(settings.Problem(problem.op, *problem.sizes), gpu)
    if not shipped.path:
        return [shipped]
    others = [settings.Config("panel")]
    others.append(settings.Config("fused", 128 if case.M > 64 else 64, 64, 64, warps=4))
    if problem.op == "qlora_linear" and case.M <= 64:
        block_m = 16 if case.M <= 16 else 32 if case.M <= 32 else 64
        others.append(settings.Config("small", block_m, 64, 128 if case.K >= 128 else 32, warps=4))
    if problem.op == "qlora_linear" and gpu.arch == 90 and case.M > 64:
        others.append(settings.Config("gluon", 128 if case.M <= 128 else 256, 128, 64, warps=8, stages=4))
    return [shipped, *(c for c in others if c.path != shipped.path)]


def tune(device: torch.device, quick: bool, only: str, path: Path | None, console: Console) -> Path:
    """Searches every problem and writes the table."""
    settings, gpu = triton_module("settings"), triton_module("launch").current_gpu(device)
    env = environment(device)
    if env["backend"] != "triton":
        raise RuntimeError(f"on {device} ops run on the backend {env['backend']}, not on triton: there is nothing to tune")
    entries = []
    for problem in problems(quick):
        if only not in problem.op:
            continue
        bench = Bench(problem, device)
        found = starts(problem, gpu)
        best = search(found, problem.op, bench.faster)
        default = asdict(settings.Config())
        config = {k: v for k, v in asdict(best).items() if v != default[k]}
        entries.append({"op": problem.op, **dict(zip("MNKr", problem.sizes, strict=True)), "config": config})
        gain = "kept" if best == found[0] else f"{found[0]} -> {best}"
        console.print(f"{problem.op} M, N, K, r = {problem.sizes}: {gain}", highlight=False)
    path = path or triton_module("settings.tables").file_of(str(env["device"]))
    rows = ",\n".join("  " + json.dumps(e) for e in entries)
    head = json.dumps(
        {"device": env["device"], "arch": gpu.arch, "versions": env["versions"], "commit": env["commit"], "date": env["date"]}
    )
    write_text(path, f'{{"machine": {head},\n "entries": [\n{rows}\n]}}\n')
    return path
