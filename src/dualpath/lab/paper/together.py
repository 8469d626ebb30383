"""Runs items side by side: each has a thread, which waits for its simulations on the runner's processes.

The largest simulations start first, because they take longest. Each item's result is handed out as soon as it is found.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from dualpath.lab.paper.items import ITEMS, SENSITIVITY
from dualpath.lab.paper.rows import Row
from dualpath.lab.paper.runner import Runner
from dualpath.lab.paper.sensitivity import WhatIf, sensitivity

Found = tuple[list[Row], list[WhatIf]]


def together(names: Sequence[str], runner: Runner) -> Iterator[Found]:
    """Yields each item's rows, or the what-if, as they are found; one after another without processes."""
    if not runner.parallel:
        for name in names:
            yield _found(name, runner)
        return
    threads = ThreadPoolExecutor(len(names))
    try:
        futures = [threads.submit(_found, name, runner) for name in reversed(names)]
        for future in as_completed(futures):
            yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _found(name: str, runner: Runner) -> Found:
    if name == SENSITIVITY:
        return [], sensitivity(runner)
    return ITEMS[name](runner), []
