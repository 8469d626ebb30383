"""Python imports this when a process of a vLLM server on a CPU starts: one that waits gives its core away.

vLLM's scheduler and workers wait for each other in a loop of `os.sched_yield`, for a second after the last message,
because on a GPU host each has a core to itself. Several servers on few cores compute a third less for it, and Linux
6.18 lets two such loops starve every other process for minutes (its log then says "workqueue lockup").
"""

import os
import time

WAIT_S = 20e-6


def sched_yield() -> None:
    time.sleep(WAIT_S)


os.sched_yield = sched_yield
