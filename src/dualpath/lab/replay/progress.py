"""Progress of a replay on the terminal; without one, a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dualpath.results.turns import TurnFailure, TurnResult

PLAIN_EVERY_S = 30.0


class ReplayProgress:
    """A context manager that is told of every turn. `turns` is None where agents arrive, so nobody knows."""

    def __init__(self, console: Console, name: str, turns: int | None) -> None:
        self._console = console
        self._name = name
        self._turns = turns
        self._ended = 0
        self._failed = 0
        self._said_at_s = time.monotonic()
        ahead = () if turns is None else (TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("turns"),
            TimeElapsedColumn(),
            *ahead,
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(name, total=turns, note="")

    def __enter__(self) -> "ReplayProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def turn(self, outcome: TurnResult | TurnFailure) -> None:
        """A turn has ended; a failed one takes those after it along."""
        ended = 1
        if isinstance(outcome, TurnFailure):
            ended += outcome.abandoned_rounds
            self._failed += ended
            self._progress.update(self._task, note=f"[red]{self._failed} failed[/red]")
        self._ended += ended
        self._progress.advance(self._task, ended)
        if not self._console.is_terminal and time.monotonic() - self._said_at_s > PLAIN_EVERY_S:
            self._said_at_s = time.monotonic()
            of = "" if self._turns is None else f" of {self._turns}"
            self._console.print(f"{self._name}: {self._ended}{of} turns, {self._failed} failed", highlight=False)
