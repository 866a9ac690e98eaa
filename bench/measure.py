"""Timing, ceilings and the description of the machine.  Knows nothing of what is timed."""

from __future__ import annotations

import datetime
import functools
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_kernels.app.threads import Meter, cpu_quota
from lora_kernels.backends import native

Run = Callable[[int], object]
"""Computes once, on the i-th copy of the data."""


@dataclass(frozen=True)
class Effort:
    """How long one line is measured.

    Attributes:
        seconds: wall clock a contender gets, at least.
        min_rounds, max_rounds: bounds on the number of rounds it takes part in.
        round_ms: a contender is called often enough in a round to take this long.
        slow_rounds: as many are enough for one that needs more than twice the time of the fastest.
    """

    seconds: float = 0.2
    min_rounds: int = 7
    max_rounds: int = 51
    round_ms: float = 10.0
    slow_rounds: int = 3


QUICK = Effort(0.05, 3, 3, 1.0)


@dataclass(frozen=True)
class Quartiles:
    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        if len(values) < 2:
            return cls(*values * 3)
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


Times = dict[int, float]
"""Seconds of one call, by round."""


def ratio(theirs: Times, ours: Times) -> Quartiles:
    """Quartiles over the rounds that both took part in of their time over ours in that round."""
    return Quartiles.of([theirs[i] / ours[i] for i in theirs.keys() & ours.keys()])


# ---- time


def interleave(runs: dict[str, Run], device: torch.device, effort: Effort, always: Collection[str] = ()) -> dict[str, Times]:
    """Times of each contender.  The slow ones take part in some rounds only, evenly spread; those in `always` in every round.
    A graph's call is one of those that it holds."""
    timer = _cuda_timer(device) if device.type == "cuda" else _cpu_timer
    seconds, calls, rounds = {}, {}, {}
    for name, run in runs.items():
        seconds[name] = timer(run, 0, 1)
        if device.type == "cuda" or seconds[name] < 0.1:  # it only warmed up; of a long call it tells enough
            seconds[name] = timer(run, 1, 1)
    for name, run in runs.items():
        turn = seconds[name] * (run.calls if isinstance(run, Graph) else 1)
        calls[name] = max(1, min(1000, round(effort.round_ms / 1e3 / max(turn, 1e-7))))
        fast = seconds[name] <= 2 * min(seconds.values())
        wanted = int(effort.seconds / max(turn * calls[name], 1e-7))
        rounds[name] = max(effort.min_rounds if fast else effort.slow_rounds, min(effort.max_rounds, wanted))
    last = max(rounds.values())
    rounds |= {name: last for name in runs if name in always}
    times: dict[str, Times] = {name: {} for name in runs}
    position = dict.fromkeys(runs, 2)
    gc.collect()
    gc.disable()
    try:
        for i in range(last):
            for name in list(runs) if i % 2 == 0 else reversed(runs):
                if (i + 1) * rounds[name] // last > i * rounds[name] // last:
                    times[name][i] = timer(runs[name], position[name], calls[name])
                    position[name] += calls[name]
    finally:
        gc.enable()
    return times


def _cpu_timer(run: Run, first: int, calls: int) -> float:
    start = time.perf_counter()
    for i in range(first, first + calls):
        run(i)
    return (time.perf_counter() - start) / calls


def _cuda_timer(device: torch.device) -> Callable[[Run, int, int], float]:
    flush = torch.empty(max(2 * cache_bytes(device), 1 << 28), dtype=torch.uint8, device=device)

    def timer(run: Run, first: int, calls: int) -> float:
        events = []
        for i in range(first, first + min(calls, 20)):
            if not isinstance(run, Graph):
                flush.zero_()  # also gives the host a head start, so that launches of a fast op do not queue up behind it
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(i)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        per_event = run.calls if isinstance(run, Graph) else 1
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3 / per_event

    return timer


class Graph:
    """A CUDA graph of one call for each copy of the data, so that a replay finds no weight in the cache.

    Raises RuntimeError if what a replay writes is not what the call itself returns: work that went to another stream than the
    captured one is missing from the graph.
    """

    def __init__(self, run: Run, copies: int) -> None:
        self.calls = max(copies, 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(min(self.calls, 3)):
                run(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.calls):
                out = run(i)
        written = _tensors(out)
        for tensor in written:
            tensor.zero_()
        self.graph.replay()
        for got, want in zip(written, _tensors(run(self.calls - 1)), strict=True):
            if not (got.float() - want.float()).norm() <= 1e-2 * want.float().norm():
                raise RuntimeError("a replay gives another result than the call")

    def __call__(self, i: int) -> None:
        self.graph.replay()


def _tensors(out: object) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]


# ---- the machine


def waited_now(seconds: float = 0.5) -> float:
    """Part of so many seconds of work on all threads that they waited for a core."""
    x = torch.ones(512, 512)
    meter, end = Meter(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        x @ x
    return meter.waited()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache; 64 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=64 << 20)


def copies_of(nbytes: int, device: torch.device, other: int = 0, most: int = 600) -> int:
    """Copies of a weight that exceed three times the last-level cache, with the `other` bytes that every call touches."""
    return min(most, max(1, -((3 * cache_bytes(device) - other) // -nbytes)))


@dataclass(frozen=True)
class Ceiling:
    """What the library reaches in this run.

    Attributes:
        copy: bytes/s read and written by `Tensor.copy_` of a buffer larger than the cache.
        gemm: operations/s of a bf16 matrix product.
        gemm_size: its M = N = K.
    """

    copy: float
    gemm: float
    gemm_size: int

    def seconds(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.copy, flops / self.gemm)


@functools.cache
def ceiling(device: torch.device, threads: int, quick: bool = False) -> Ceiling:
    """Measured once in a process for each number of threads, which the caller has set."""
    gpu = device.type == "cuda"
    nbytes = 1 << (30 if gpu else 24 if quick else 28)
    size = 8192 if gpu else 256 if quick else 2048
    a, b = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    x, w = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = interleave(
        {"copy": lambda i: b.copy_(a), "gemm": lambda i: torch.nn.functional.linear(x, w)},
        device,
        QUICK if quick else Effort(0.5, 5, 31),
        always=("copy", "gemm"),
    )
    copy, gemm = (min(times[n].values()) for n in ("copy", "gemm"))  # what can be reached, not what usually is
    return Ceiling(2 * nbytes / copy, 2 * size**3 / gemm, size)


PACKAGES = ("torch", "triton", "bitsandbytes", "kernels", "peft", "transformers", "torchao", "unsloth")
"""`kernels` lets bitsandbytes load a faster CPU kernel from a hub."""
CHECKOUTS = {"unsloth": "UNSLOTH_PATH", "lorafusion": "LORAFUSION_PATH"}
"""Rivals that can be used from a checkout, whose commit is then their version."""
ROOT = Path(__file__).parent.parent


def environment(device: torch.device) -> dict[str, object]:
    """Everything that a result depends on and that the code does not say."""
    from lora_kernels import __version__, backends
    from lora_kernels.requirements import installed

    versions: dict[str, str | None] = {"lora_kernels": __version__, "python": platform.python_version()}
    versions |= {package: installed(package) for package in PACKAGES}
    for package, variable in CHECKOUTS.items():
        if path := os.environ.get(variable):
            versions[package] = _output("git", "-C", path, "rev-parse", "--short=12", "HEAD") or f"a checkout, {variable}"
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!README.md")
    info: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "backend": backends.picked("qlora_linear", device),
        "threads": torch.get_num_threads(),
        "cpu_quota": cpu_quota(),
        "cache_bytes": cache_bytes(device),
        "versions": versions,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(changes),
        "sources": sources(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        info["isa"] = native_level() or torch.backends.cpu.get_cpu_capability()
    return info


def sources() -> str:
    """A hash of the package's source files: what was measured, also where there is no git or the tree has changes."""
    digest = hashlib.sha256()
    for folder in ("lora_kernels", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def native_level() -> str | None:
    """Instruction set that the C++ backend chose, if it is built."""
    try:
        return str(native.extension().cpu_level())
    except RuntimeError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
