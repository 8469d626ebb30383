"""CPU time of other processes, and of everybody."""

import sys
import time

import psutil


def cpu_clocks(pids: list[int]) -> list[int]:
    """CPU nanoseconds of this process, then of `pids`, all their threads, dead ones included."""
    return [time.process_time_ns(), *(time.clock_gettime_ns(_cpu_clock(pid)) for pid in pids)]


def busy_cores_ns() -> float:
    """Of all processes of this machine, and of its host's others: what nobody could use is no core of ours."""
    times = psutil.cpu_times()
    return 1e9 * float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _cpu_clock(pid: int) -> int:
    """Linux's clock id of another process's CPU time (clock_getcpuclockid(3))."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("CPU clocks of other processes are read as on Linux")
    return (~pid << 3) | 2
