"""CPU time of other processes, of two of an engine's threads, and of everybody."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dualpath.thread_names import COMPUTE_THREAD

Clocks = Callable[[], list[int]]
"""CPU nanoseconds so far of client, server, and of a PE's and a DE's main and compute threads."""


def cpu_clocks(pids: list[int]) -> list[int]:
    """CPU nanoseconds of this process, then of `pids`, all their threads, dead ones included."""
    return [time.process_time_ns(), *(time.clock_gettime_ns(_cpu_clock(pid)) for pid in pids)]


def engine_clocks(pids: list[int]) -> list[int]:
    """CPU nanoseconds of each engine's main thread, which has control, and of its compute thread; engine by engine.

    The model's own threads beside the compute thread count with it: they have its name.
    """
    clocks = []
    for pid in pids:
        tasks = Path(f"/proc/{pid}/task")
        computing = [task for task in tasks.iterdir() if _name(task) == COMPUTE_THREAD]
        clocks += [_thread_ns(tasks / str(pid)), sum(map(_thread_ns, computing))]
    return clocks


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return ""  # a thread that has just ended


def _thread_ns(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


def busy_cores_ns() -> float:
    """Of all processes of this machine, and of its host's others: what nobody could use is no core of ours."""
    times = psutil.cpu_times()
    return 1e9 * float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _cpu_clock(pid: int) -> int:
    """Linux's clock id of another process's CPU time (clock_getcpuclockid(3))."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("CPU clocks of other processes are read as on Linux")
    return (~pid << 3) | 2
