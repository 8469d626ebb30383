"""Shows the progress of replays on the terminal: a line for each, with its turns and the time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dualpath.results.turns import TurnFailure, TurnResult

PLAIN_EVERY_S = 30.0


class TurnProgress:
    """A context manager. One phase is under way at a time; an ended phase keeps its line.

    `total_turns` of all phases adds a line for their sum. If the output is no terminal, a phase prints a line when it
    begins, one now and then, and one with its result.
    """

    def __init__(self, console: Console, total_turns: int | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("turns"))
        ahead = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, *ahead, console=console, disable=not console.is_terminal)
        self._console = console
        self._overall: TaskID | None = None
        if total_turns is not None:
            self._overall = self._progress.add_task("[bold]all runs", total=total_turns, note="")
        self._phase: TaskID | None = None
        self._failed = 0
        self._said_at_s = 0.0

    def __enter__(self) -> "TurnProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str, turns: int | None) -> None:
        """Begins a phase of `turns` turns (None: unknown), whose cluster is being started."""
        self._failed = 0
        self._plain(f"{name}: starting" + ("" if turns is None else f", {turns} turns"))
        self._phase = self._progress.add_task(name, total=turns, note="starting")

    def note(self, text: str) -> None:
        """Shows what the phase is doing, or its result."""
        if self._phase is not None:
            failed = f" [red]{self._failed} failed[/red]" if self._failed else ""
            self._progress.update(self._phase, note=text + failed)
            self._plain(f"{self._progress.tasks[self._phase].description}: {text}{failed}")

    def clock_starts(self) -> None:
        """Starts the phase's time, when its cluster is up."""
        if self._phase is not None:
            self._progress.reset(self._phase, note="")

    def turn(self, outcome: TurnResult | TurnFailure) -> None:
        """Counts a turn that has ended; a failed one takes its agent's later turns along."""
        assert self._phase is not None, "a turn outside any phase"
        ended = 1
        if isinstance(outcome, TurnFailure):
            ended += outcome.abandoned_rounds
            self._failed += ended
            self._progress.update(self._phase, note=f"[red]{self._failed} failed[/red]")
        self._progress.advance(self._phase, ended)
        if self._overall is not None:
            self._progress.advance(self._overall, ended)
        if time.monotonic() - self._said_at_s > PLAIN_EVERY_S:
            task = self._progress.tasks[self._phase]
            of = "" if task.total is None else f" of {task.total:g}"
            self._plain(f"{task.description}: {task.completed:g}{of} turns, {self._failed} failed")

    def _plain(self, text: str) -> None:
        self._said_at_s = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)
