"""How a command ends: with its output, or with one line that says what was wrong.

A bad value becomes a `UsageError` (exit code 2), a failure a `CommandError` (exit code 1). A bug keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dualpath.results import ResultFile

MIN_CONSOLE_WIDTH = 110
"""Width of output that is not on a terminal: wide enough for the demo's table."""


class UsageError(Exception):
    """The command line asks for something impossible."""


class CommandError(Exception):
    """The command line was right, but the command failed."""


def new_console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, MIN_CONSOLE_WIDTH))


def write_json(path: Path | None, report: Any) -> None:
    import msgspec

    if path is not None:
        with command_errors(OSError):
            path.write_bytes(msgspec.json.encode(report) + b"\n")


def write_report_beside(path: Path, result: "ResultFile") -> Path:
    """Writes the page of a result file beside `path`, with the suffix ``.html``."""
    from dualpath.lab.report.html import write_report

    page = path.with_suffix(".html")
    with command_errors(OSError):
        write_report(result, page)
    return page


@contextmanager
def file_progress(console: "Console") -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


@contextmanager
def command_errors(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error
