"""How many CPU threads torch gets, and how they wait, beside other programs and inside a container.

torch starts a thread for each core that it sees.  Where a container may use fewer (its CPU quota), or other programs hold the
cores, more threads are slower, not faster: each part of a step ends when its last thread has run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

BUSY = 0.1
"""Part of the time that threads wait for a core from which on the machine counts as busy; on a machine of one's own it is 0.00
to 0.03."""
FASTER = 1.1
"""Another number of threads is kept if it makes training this much faster."""
MUCH_FASTER = 2.0
"""From this on one look is enough."""
USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user sets the number of threads; it is then left alone."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user sets how OpenMP's threads wait."""

Say = Callable[[str], None]


# ---- what the process may use


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process may use: the least of its own and its parents'; None for no limit.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for group in groups:
        if group.count(":") < 2:
            continue
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 is mounted here or in `unified`, version 1 under the names of its controllers; a container may see its own
        # group as the top of the mount, whatever its path says
        names = [controllers, "cpu"] if controllers else ["", "unified"]
        for mount in (root / "sys/fs/cgroup" / name for name in names):
            group_dir = mount / path.lstrip("/")
            quotas += [_quota_of(d) for d in (group_dir, *group_dir.parents) if d.is_relative_to(mount)]
    return min((q for q in quotas if q is not None), default=None)


def _quota_of(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


def _affinity() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_for(cores: int, quota: float | None, processes: int = 1) -> int:
    """Threads of each of `processes` alike processes, on `cores` cores of which all together may use `quota`; at least 1."""
    return max(1, int(cores if quota is None else min(cores, quota)) // processes)


def set_by_user() -> str | None:
    """The setting by which the user chose the number of threads, as `NAME=value`; None if torch chose it."""
    return next((f"{name}={os.environ[name]}" for name in USER if os.environ.get(name)), None)


def fit(say: Say, chosen: str | None = None) -> None:
    """Lowers torch's threads to what this process may use, or says what to set where the user has set more.

    Args:
        say: gets one line about it.
        chosen: the setting by which the user chose the number, as `NAME=value`; None for a variable of `USER`, if it is set.
    """
    cores, quota, processes = len(_affinity()), cpu_quota(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    may, has = threads_for(cores, quota, processes), torch.get_num_threads()
    if has <= may:
        return
    limit = f"{cores} cores" if quota is None or quota >= cores else f"a CPU quota of {quota:.3g} cores"
    limit += f" for {processes} processes" if processes > 1 else ""
    if user := chosen or set_by_user():
        say(f"{user} is more than this machine gives ({limit}): {user.partition('=')[0]}={may} is faster")
    else:
        torch.set_num_threads(may)
        say(f"{limit}: torch gets {_threads(may)} in place of {has}")


def _threads(n: int) -> str:
    return f"{n} thread" + "s" * (n != 1)


# ---- what it gets


@dataclass(frozen=True)
class Reading:
    """What the process got during a part of its run.

    Attributes:
        waited: part of the time that its threads wanted a core and had none, in [0, 1].
        idle: cores that nobody used.
        speed: tokens a second.
    """

    waited: float
    idle: float
    speed: float = 0.0


class Meter:
    """Reads what the process gets, from one reading to the next.

    On Linux the kernel says how long each thread ran and how long it waited for a core.  Time on a core alone would not tell: a
    thread that waits for another one by spinning uses it too.  Elsewhere it is reckoned from what other programs use.
    """

    def __init__(self) -> None:
        self._cores = _affinity()
        self._total_waited = self._total_wanted = 0.0
        self._before = self._read()

    def read(self) -> Reading:
        """Since the reading before."""
        (wall, own, tasks, idle, busy), now = self._before, self._read()
        self._before = now
        seconds = max(now[0] - wall, 1e-9)
        free = max(now[3] - idle, 0.0) / seconds
        if now[2]:
            deltas = [(ran - tasks.get(t, (0, 0))[0], wait - tasks.get(t, (0, 0))[1]) for t, (ran, wait) in now[2].items()]
            wanted, waited = sum(map(sum, deltas)) / 1e9, sum(wait for _, wait in deltas) / 1e9
        else:
            others = max(now[4] - busy - (now[1] - own), 0.0) / seconds
            threads = torch.get_num_threads()
            wanted = threads * seconds
            waited = min(max(threads + others - len(self._cores), 0.0), threads) * seconds
        self._total_waited, self._total_wanted = self._total_waited + waited, self._total_wanted + wanted
        return Reading(waited / wanted if wanted else 0.0, free)

    def waited(self) -> float:
        """From the beginning until now: part of the time that threads wanted a core and had none."""
        self.read()
        return self._total_waited / self._total_wanted if self._total_wanted else 0.0

    def _read(self) -> tuple[float, float, dict[str, tuple[int, int]], float, float]:
        """Wall clock and own CPU time in seconds; nanoseconds that each thread ran and waited; idle and busy core seconds."""
        tasks = {}
        for file in Path("/proc/self/task").glob("*/schedstat"):
            try:
                ran, waited, _ = file.read_text().split()
            except (OSError, ValueError):  # the thread has ended
                continue
            tasks[file.parent.name] = (int(ran), int(waited))
        times = psutil.cpu_times(percpu=True)
        times = [times[i] for i in self._cores if i < len(times)]
        idle = sum(t.idle + getattr(t, "iowait", 0.0) for t in times)
        busy = sum(t.user + t.system + getattr(t, "nice", 0.0) for t in times)
        return time.monotonic(), time.process_time(), tasks, idle, busy


# ---- what to make of it


class Rule:
    """How many threads to use, and whether they wait briefly, from the readings so far.

    On a busy machine threads wait briefly first.  If they still wait for cores, fewer of them are tried for a reading, and kept
    if training is faster with them; so are more once cores are idle.  An attempt that fails, or that undoes an earlier one,
    doubles the readings until the next one, so that nothing goes to and fro.

    Attributes:
        threads: to use until the next reading.
        brief: whether threads that wait are to go to sleep soon.
    """

    def __init__(self, most: int, cores: int, fixed: bool = False, can_be_brief: bool = True) -> None:
        """Makes a rule.

        Args:
            most: the number of threads to begin with, which is never exceeded.
            cores: where they run.
            fixed: whether the number stays.
            can_be_brief: whether how threads wait can be changed.
        """
        self.most = self.threads = most
        self.cores, self.fixed, self.can_be_brief = cores, fixed, can_be_brief
        self.brief = False
        self._home = self._other = most
        self._speeds: list[float] = []
        """Of an attempt: before it, during it, and, if that is not clear, after it."""
        self._direction = -1
        self._rest, self._patience = 0, 1

    @property
    def settled(self) -> int:
        """The number of threads, attempts aside."""
        return self._home if self._speeds else self.threads

    def next(self, reading: Reading) -> None:
        """Decides for the time until the next reading."""
        busy = reading.waited > BUSY
        if self._speeds:
            self._judge(reading.speed)
        elif busy and self.can_be_brief and not self.brief:
            self.brief = True
        elif self._rest:
            self._rest -= 1
        elif busy and self.threads > 1 and not self.fixed:
            self._try(fewer(self.threads, reading.waited, self.cores), reading.speed)
        elif not busy and self.threads < self.most and reading.idle > 0.75:
            self._try(min(self.most, self.threads + round(reading.idle)), reading.speed)
        elif self.brief and self.threads == self.most and reading.waited < BUSY / 4:
            self.brief = False
            self._wait_longer()

    def _try(self, other: int, speed: float) -> None:
        self._home, self._other, self.threads, self._speeds = self.threads, other, other, [speed]

    def _judge(self, speed: float) -> None:
        self._speeds.append(speed)
        before, during, *after = self._speeds
        faster = during >= FASTER * max([before, *after])
        if faster and not after and during < MUCH_FASTER * before:
            self.threads = self._home  # for a second look
            return
        self._speeds = []
        self.threads = self._other if faster else self._home
        direction = 1 if self._other > self._home else -1
        if not faster or direction != self._direction:
            self._wait_longer()
        if faster:
            self._direction = direction

    def _wait_longer(self) -> None:
        self._patience = min(2 * self._patience, 64)
        self._rest = self._patience


def fewer(threads: int, waited: float, cores: int) -> int:
    """The cores that other programs leave, but fewer than `threads`, and at least 1.

    `threads` that waited for that part of their time shared the cores evenly with `cores / (1 - waited) - threads` others.
    """
    others = cores / max(1 - waited, 1e-9) - threads
    return max(1, min(threads - 1, round(cores - others)))


class Watch:
    """Keeps torch's threads to what the machine gives while a model trains on its CPU.

    Each step is counted with `step`; the first one, which warms up, is left out.  What was changed is undone at the end of the
    `with` block.

    Attributes:
        meter: what the process got since the watch was made.
    """

    def __init__(self, say: Say) -> None:
        """Makes a watch that tells in one line what it changes, or, where the user set the number, what to set."""
        self.meter = Meter()
        self._say, self._user, self._waits = say, set_by_user(), BriefWaits()
        self._rule = Rule(torch.get_num_threads(), len(_affinity()), self._user is not None, self._waits.possible)
        self._warm = self._advised = False
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._waits.set(False)
        torch.set_num_threads(self._rule.most)

    def look(self) -> None:
        """Before the first step: makes threads wait briefly if they had to wait for cores in what ran so far."""
        reading = self.meter.read()
        if reading.waited > BUSY and self._waits.possible:
            self._apply(reading)

    def step(self, seconds: float, tokens: int) -> None:
        """Counts one step; every few seconds decides anew."""
        if not self._warm:
            self._warm = True
            self.meter.read()
            return
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + seconds
        if self._seconds >= (3 if self._steps >= 3 else 10):
            self._apply(replace(self.meter.read(), speed=self._tokens / self._seconds))
            self._steps = self._tokens = 0
            self._seconds = 0.0

    def _apply(self, reading: Reading) -> None:
        rule = self._rule
        threads, brief = rule.settled, rule.brief
        rule.next(reading)
        busy = f"other programs hold the cores, for which threads waited {reading.waited:.0%} of the time"
        if rule.brief != brief:
            self._waits.set(rule.brief)
            if rule.brief:
                self._say(f"{busy}: threads go to sleep now where they spun")
        elif self._user and reading.waited > BUSY and threads > 1 and not self._advised:
            self._advised = True
            name, _, value = self._user.partition("=")
            self._say(f"{busy}: {name} is {value}, try {name}={fewer(threads, reading.waited, rule.cores)}")
        if rule.threads != torch.get_num_threads():
            torch.set_num_threads(rule.threads)
        if rule.settled != threads:
            why = "other programs hold the cores" if rule.settled < threads else "cores are free again"
            self._say(f"{why}: {_threads(rule.settled)} from here on, {threads} before")


class BriefWaits:
    """Makes OpenMP threads sleep soon where they wait by spinning, on GNU's runtime, which is torch's on Linux.

    There a thread spins for milliseconds, but only for microseconds while there are more threads than cores: a second pool of
    threads, all asleep, makes them more.
    """

    def __init__(self) -> None:
        self._end: threading.Event | None = None

    @property
    def possible(self) -> bool:
        """Whether torch runs on GNU's runtime, and the user has not set how its threads wait."""
        try:
            gnu = "libgomp" in Path("/proc/self/maps").read_text()
        except OSError:
            return False
        return gnu and not any(os.environ.get(name) for name in WAITING)

    def set(self, on: bool) -> None:
        if self._end is not None and not on:
            self._end.set()
            self._end = None
        elif self._end is None and on:
            threads, begun, self._end = torch.get_num_threads(), threading.Event(), threading.Event()
            threading.Thread(target=_hold, args=(len(_affinity()) + 1, begun, self._end), daemon=True).start()
            begun.wait()
            torch.set_num_threads(threads)  # the other thread's number had become everyone's


def _hold(threads: int, begun: threading.Event, end: threading.Event) -> None:
    """Has a pool of `threads` threads until the end."""
    torch.set_num_threads(threads)
    torch.ones(1 << 17).add_(1)
    begun.set()
    end.wait()
