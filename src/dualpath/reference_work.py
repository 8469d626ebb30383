"""How fast this machine is just now: what a fixed piece of work takes, again and again, beside whatever else runs.

On a shared host a core's speed is not its own: with a neighbour on the core's other hardware thread the same work takes
up to 1.7 times the CPU time, and that may change from one second to the next (docs/lab-log.md). Job completion times
that are made of computing change with it. So whoever measures them notes how long the reference work took meanwhile.

A process of its own does the work: some 0.3 ms of vector arithmetic, 20 times a second, on one core after the other, in
CPU time, so that waiting for a core is no part of it. That takes a hundredth of a core.
"""

import asyncio
import itertools
import os
import select
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np

PERIOD_S = 0.05
VALUES = 8192
PASSES = 200
WARM_PASSES = 100
"""Not counted: a core that wakes up, and caches that others used, are slow for 0.1 ms."""
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0


class ReferenceWork:
    """`mean_ns` of CPU time, known once the measurement is left; None where its process was killed."""

    mean_ns: float | None = None


@asynccontextmanager
async def reference_work() -> AsyncIterator[ReferenceWork]:
    """``async with reference_work() as meanwhile: …``, then `meanwhile.mean_ns`. Raises OSError, TimeoutError first."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for those beside it
    )
    assert process.stdin is not None and process.stdout is not None
    meanwhile = ReferenceWork()
    try:
        await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        yield meanwhile
        process.stdin.close()  # its sign to stop, which it gets too if this process dies
        with suppress(TimeoutError, ValueError):
            async with asyncio.timeout(END_TIMEOUT_S):
                said = await process.stdout.read()
                await process.wait()  # or `kill` would reap it before asyncio can, which then warns
            meanwhile.mean_ns = float(said)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def _main() -> None:
    """Ready; then the work until standard input ends; then the mean of its CPU times."""
    values = np.ones(VALUES, np.float32)
    products = np.empty_like(values)

    def work(passes: int) -> None:
        for _ in range(passes):
            np.multiply(values, 1.0001, out=products)
            np.add(products, values, out=products)

    print(flush=True)
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    times_ns: list[int] = []
    while not times_ns or not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        os.sched_setaffinity(0, {next(cores)})
        work(WARM_PASSES)
        started_ns = time.thread_time_ns()
        work(PASSES)
        times_ns.append(time.thread_time_ns() - started_ns)
    print(statistics.mean(times_ns), flush=True)


if __name__ == "__main__":
    _main()
