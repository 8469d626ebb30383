"""``dualpath store stat|fsck``."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dualpath.cli.arguments import command
from dualpath.cli.outcome import command_errors, file_progress, new_console, usage_errors, write_json

if TYPE_CHECKING:
    from dualpath.kv import Store

T = TypeVar("T")


def add(commands: Any) -> None:
    parser = command(commands, "store", "inspect or check a KV store", "")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    stat = command(actions, "stat", "show what a store holds", "example:\n  dualpath store stat .store/a\n", _stat)
    fsck = command(
        actions,
        "fsck",
        "check every block of a store; exit code 1 if anything is bad",
        "example:\n  dualpath store fsck .store/a --repair    move bad blocks aside, remove orphans and leftovers\n",
        _fsck,
    )
    fsck.add_argument("--repair", action="store_true", help="set bad blocks aside, delete orphans and leftovers")
    for action in (stat, fsck):
        action.add_argument("store", metavar="PLACE", help="a directory, or a URL, as for dualpath serve --store")
        action.add_argument("--json", metavar="FILE", type=Path, help="write the report here too")


def _stat(arguments: argparse.Namespace) -> int:
    """Prints what a store holds."""
    import msgspec

    from dualpath.kv.stores.inspection import stat
    from dualpath.lab.report.store import stat_table

    with _opened(arguments.store) as store:
        report = _interruptible(lambda: stat(store))
    write_json(arguments.json, report)
    new_console().print(stat_table(msgspec.to_builtins(report)))
    return 0


def _fsck(arguments: argparse.Namespace) -> int:
    """Checks a store. The exit code is 1 if something is bad and was not repaired, or could not be read."""
    import msgspec

    from dualpath.kv.stores.inspection import fsck
    from dualpath.lab.report.store import fsck_lines

    console = new_console()
    with _opened(arguments.store) as store, file_progress(console) as progress:
        report = _interruptible(lambda: fsck(store, repair=arguments.repair, progress=progress))
    write_json(arguments.json, report)
    console.print(*fsck_lines(msgspec.to_builtins(report)), sep="\n", highlight=False, soft_wrap=True)
    return 0 if report.is_clean or report.is_repaired else 1


@contextmanager
def _opened(location: str) -> "Iterator[Store]":
    """Opens a store. A location that can't be one is a bad value; a store that can't be read is a failure."""
    from dualpath.kv import StoreError, StoreLocationError, open_store

    with command_errors(StoreError), usage_errors(StoreLocationError):
        try:
            yield open_store(location)
        except KeyboardInterrupt:  # at once: Python's own way to end would wait for threads that wait for a server
            print("dualpath: interrupted", file=sys.stderr, flush=True)
            os._exit(130)


def _interruptible(work: Callable[[], T]) -> T:
    """Runs `work` on a thread and returns what it does: a call that waits for a server would not notice Ctrl-C."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return outcome.result()
