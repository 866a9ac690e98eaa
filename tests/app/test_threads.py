"""How many threads: what containers allow, what the rule makes of readings, and that nothing changes on an idle machine."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import python

from lora_kernels.app import threads
from lora_kernels.app.threads import BUSY, Meter, Reading, Rule, Watch, cpu_quota, fit, threads_for

# ---- what the process may use


def machine(root, cgroup, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


V1 = "9:name=systemd:/\n4:memory:/a\n3:cpuset:/b\n2:cpu,cpuacct:/docker/x\n0::/\n"
QUOTAS = {
    "v2 own": ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
    "v2 no limit": ("0::/\n", {"cpu.max": "max 100000"}, None),
    "v2 root has no file": ("0::/a\n", {"a/cpu.max": "200000 50000"}, 4.0),
    "v2 parent is stricter": ("0::/a/b/c\n", {"a/cpu.max": "200000 100000", "a/b/c/cpu.max": "400000 100000"}, 2.0),
    "v2 child is stricter": ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
    "v2 parent alone": ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
    "v2 another group": ("0::/a\n", {"cpu.max": "max 100000", "b/cpu.max": "100000 100000"}, None),
    "v2 path of the host": ("0::/system.slice/docker-1.scope\n", {"cpu.max": "250000 100000"}, 2.5),
    "v1": (V1, {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"}, 3.0),
    "v1 no limit": (
        V1,
        {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
        None,
    ),
    "v1 as a container sees it": (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "20000"}, 2.5),
    "v1 nested": (
        "2:cpu:/a/b\n",
        {
            "cpu/a/cpu.cfs_quota_us": "100000",
            "cpu/a/cpu.cfs_period_us": "100000",
            "cpu/a/b/cpu.cfs_quota_us": "700000",
            "cpu/a/b/cpu.cfs_period_us": "100000",
        },
        1.0,
    ),
    "v1 with v2 beside it": ("1:cpu:/\n0::/\n", {"unified/cpu.max": "100000 100000"}, 1.0),
    "v1 group of another controller": ("3:cpuset:/b\n", {"cpuset/b/cpu.max": "100000 100000"}, None),
    "no files": ("0::/\n", {}, None),
    "not a number": ("0::/\n", {"cpu.max": "many 100000"}, None),
    "empty": ("0::/\n", {"cpu.max": ""}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_quota(name, tmp_path):
    cgroup, files, want = QUOTAS[name]
    assert cpu_quota(machine(tmp_path, cgroup, files)) == want


def test_quota_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "quota", "processes", "want"),
    [(8, None, 1, 8), (8, 2.5, 1, 2), (8, 0.3, 1, 1), (2, 16.0, 1, 2), (8, None, 3, 2), (8, 4.0, 2, 2), (2, None, 4, 1)],
)
def test_threads_for(cores, quota, processes, want):
    assert threads_for(cores, quota, processes) == want


@pytest.fixture
def torch_threads(monkeypatch):
    """A stand-in for torch's number of threads, 8 to begin with, and no setting of the user's."""
    number = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: number.__setitem__(0, n))
    for name in (*threads.USER, *threads.WAITING, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return number


@pytest.mark.parametrize(
    ("cores", "quota", "want", "line"),
    [
        (8, None, 8, None),
        (16, 12.0, 8, None),
        (8, 2.5, 2, "a CPU quota of 2.5 cores: torch gets 2 threads in place of 8"),
        (1, None, 1, "1 cores: torch gets 1 thread in place of 8"),
    ],
)
def test_fit(cores, quota, want, line, torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(cores)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    said = []
    fit(said.append)
    assert torch_threads == [want]
    assert said == ([line] if line else [])


def test_fit_respects_the_user(torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    said = []
    fit(said.append)
    fit(said.append, "--threads=8")
    assert torch_threads == [8]
    limit = "is more than this machine gives (a CPU quota of 2 cores)"
    assert said == [f"OMP_NUM_THREADS=8 {limit}: OMP_NUM_THREADS=2 is faster", f"--threads=8 {limit}: --threads=2 is faster"]


# ---- the rule


IDLE = Reading(waited=0.02, idle=0.0, speed=100.0)


def run(rule, machine, readings=300):
    """The numbers of threads that a rule uses on a machine: a function of the number and of how many readings there were."""
    used = []
    for i in range(readings):
        rule.next(machine(rule.threads, i))
        used.append(rule.threads)
    return used


def changes(used):
    return sum(a != b for a, b in itertools.pairwise(used))


def shared(cores, others):
    """A machine on which `others` loops run: as fast as the cores that nobody else holds, and much slower with more threads."""

    def reading(n, i):
        busy = others(i) if callable(others) else others
        waited = max(0.0, 1 - cores / (n + busy))
        free = max(cores - busy, 1)
        return Reading(waited, max(0.0, cores - busy - n), 100.0 * min(n, free) / (1 if n <= free else 3))

    return reading


@pytest.mark.parametrize("most", [1, 2, 8, 64])
def test_idle_machine_changes_nothing(most):
    rule = Rule(most, most)
    waits = [0.0, 0.03, BUSY]
    assert set(run(rule, lambda n, i: replace(IDLE, waited=waits[i % 3], speed=100 + 80 * (i % 2)))) == {most}
    assert not rule.brief


@pytest.mark.parametrize(("cores", "others", "want"), [(2, 2, 1), (2, 8, 1), (16, 8, 8), (64, 63, 1)])
def test_fewer_threads_where_they_are_faster(cores, others, want):
    rule = Rule(cores, cores)
    used = run(rule, shared(cores, others))
    assert rule.brief
    assert used[0] == cores  # first they wait briefly
    assert used[-1] == rule.settled == want


@pytest.mark.parametrize(("n", "cores", "others"), [(2, 2, 0.5), (4, 4, 1), (16, 16, 8), (10, 16, 7), (64, 64, 63)])
def test_fewer_are_the_cores_that_others_leave(n, cores, others):
    waited = 1 - cores / (n + others)
    assert threads.fewer(n, waited, cores) == max(1, min(n - 1, round(cores - others)))
    assert threads.fewer(n, 1.0, cores) == threads.fewer(2, 0.99, 2) == 1


def test_threads_stay_where_fewer_are_slower():
    """Attempts become rare, and each lasts one reading."""
    rule = Rule(2, 2)
    used = run(rule, lambda n, i: Reading(0.5, 0.0, 100.0 * n))
    assert used[-1] == rule.settled == 2
    assert 1 <= used.count(1) <= 10


def test_an_attempt_must_beat_what_was_before_and_after():
    """A number of threads that looked better while the others were slow for another reason."""
    speeds = iter([50, 50, 80, 90, 90])  # brief waits, an attempt's before, during and after
    rule = Rule(2, 2)
    used = run(rule, lambda n, i: Reading(0.5, 0.0, next(speeds)), 5)
    assert used == [2, 1, 2, 2, 2]
    speeds = iter([50, 50, 80, 50])
    rule = Rule(2, 2)
    assert run(rule, lambda n, i: Reading(0.5, 0.0, next(speeds)), 4) == [2, 1, 2, 1]


def test_threads_come_back_when_the_cores_are_free():
    rule = Rule(4, 4)
    used = run(rule, shared(4, lambda i: 3 if i < 50 else 0))
    assert used[49] == 1
    assert used[-1] == 4
    assert not rule.brief


@pytest.mark.parametrize("period", [1, 2, 5, 20])
def test_no_to_and_fro(period):
    """A load that comes and goes: of a thousand readings few change the number."""
    rule = Rule(8, 8)
    used = run(rule, shared(8, lambda i: 8 if i // period % 2 else 0), 1000)
    assert changes(used) <= 80, changes(used)
    assert changes(used[500:]) <= 40


def test_fixed_number():
    rule = Rule(8, 8, fixed=True)
    assert set(run(rule, shared(8, 8))) == {8}
    assert rule.brief


def test_waiting_as_the_user_set_it():
    rule = Rule(2, 2, can_be_brief=False)
    run(rule, shared(2, 2))
    assert not rule.brief
    assert rule.threads == 1


# ---- the watch


@pytest.fixture
def watch(torch_threads, monkeypatch):
    """A watch on a machine that `watch.machine` describes, without a clock: ten seconds a step."""

    class Waits:
        possible, on = True, False

        def set(self, on):
            self.on = on

    monkeypatch.setattr(threads, "BriefWaits", Waits)
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(8)))

    def make(machine):
        said = []
        watch = Watch(said.append)
        monkeypatch.setattr(watch.meter, "read", lambda: machine(torch_threads[0], 0))

        def steps(n):
            for _ in range(n):
                watch.step(10.0, int(10 * machine(torch_threads[0], 0).speed))

        return watch, steps, said

    return make


def test_watch_lowers_says_so_and_restores(watch, torch_threads):
    watch, steps, said = watch(shared(8, 8))
    with watch:
        watch.look()
        assert watch._waits.on
        steps(40)
        assert torch_threads == [1]
    assert torch_threads == [8]
    assert not watch._waits.on
    busy = "other programs hold the cores"
    assert said == [
        f"{busy}, for which threads waited 50% of the time: threads go to sleep now where they spun",
        f"{busy}: 1 thread from here on, 8 before",
    ]


def test_watch_leaves_the_users_number_alone(watch, torch_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    watch, steps, said = watch(shared(8, 8))
    with watch:
        steps(40)
        assert torch_threads == [8]
    assert len(said) == 2  # one of them of how threads wait
    assert said[1].endswith("for which threads waited 50% of the time: OMP_NUM_THREADS is 8, try OMP_NUM_THREADS=1")


def test_watch_says_nothing_on_an_idle_machine(watch, torch_threads):
    watch, steps, said = watch(lambda n, i: IDLE)
    with watch:
        watch.look()
        steps(40)
        assert torch_threads == [8]
    assert said == []


# ---- the readings themselves

LOOP = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"
METER = """
import os, subprocess, sys, time
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
from lora_kernels.app.threads import Meter
others = [subprocess.Popen([sys.executable, "-c", sys.argv[1] % core]) for _ in range(2)]
try:
    time.sleep(2)
    meter, end = Meter(), time.monotonic() + 2
    while time.monotonic() < end:
        pass
    print(meter.waited())
finally:
    for process in others:
        process.kill()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not say how long threads wait")
def test_meter_sees_others_on_the_same_core():
    """Two loops leave a third of their core, or less where more run on it."""
    done = subprocess.run([sys.executable, "-c", METER, LOOP], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0.4 < float(done.stdout) < 1


def test_meter_where_the_kernel_says_nothing_of_threads(monkeypatch, torch_threads):
    """What others use of 10 cores, by the seconds that all and this process were on a core."""
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(10)))
    clock = iter([(0.0, 0.0, {}, 0.0, 0.0), (1.0, 8.0, {}, 2.0, 8.0), (2.0, 14.0, {}, 2.0, 18.0)])
    monkeypatch.setattr(Meter, "_read", lambda self: next(clock))
    meter = Meter()
    assert meter.read() == Reading(waited=0.0, idle=2.0)
    assert meter.read() == Reading(waited=2 / 8, idle=0.0)  # others hold 4 cores: 2 of 8 threads have none


BRIEF = """
import time, torch
from lora_kernels.app.threads import BriefWaits
torch.set_num_threads(2)
x = torch.zeros(1 << 20)
def spun():
    x.add_(1)
    before = time.process_time()
    time.sleep(0.05)
    return time.process_time() - before
waits = BriefWaits()
if waits.possible:
    long = any(spun() > 5e-4 for _ in range(400))
    waits.set(True)
    brief = sorted(spun() for _ in range(21))[10]
    waits.set(False)
    print(long, brief, any(spun() > 5e-4 for _ in range(400)), torch.get_num_threads())
"""


@pytest.mark.skipif(len(threads._affinity()) < 2, reason="one core: threads never spin")
def test_brief_waits():
    """CPU time that goes by while all threads have nothing to do."""
    out = python(BRIEF, **dict.fromkeys((*threads.WAITING, *threads.USER))).split()
    if not out:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    long, brief, again, number = out
    assert (long, again, number) == ("True", "True", "2")
    assert float(brief) < 5e-4


@pytest.mark.parametrize("name", threads.WAITING)
def test_waits_that_the_user_set_are_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1000")
    assert not threads.BriefWaits().possible
