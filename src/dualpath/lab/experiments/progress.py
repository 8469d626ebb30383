"""Progress of a plan on the terminal: a line for each cluster, with its turns and the time that is left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

from dualpath.results.turns import TurnFailure, TurnResult


class RunProgress:
    """A context manager. One phase is under way at a time; a phase that has ended keeps its line.

    Where the output is no terminal, a phase is a line when it begins and a line with what it came to.
    """

    def __init__(self, console: Console, total_turns: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("turns"),
            TimeElapsedColumn(),
            TextColumn("left"),
            RemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._overall = self._progress.add_task("[bold]all runs", total=total_turns, note="")
        self._phase: TaskID | None = None
        self._failed = 0

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str, turns: int) -> None:
        """A phase of `turns` turns begins: its cluster is being started."""
        self._failed = 0
        self._plain(f"{name}: starting, {turns} turns")
        self._phase = self._progress.add_task(name, total=turns, note="starting")

    def note(self, text: str) -> None:
        """What the phase is doing, or has come to."""
        if self._phase is not None:
            failed = f" [red]{self._failed} failed[/red]" if self._failed else ""
            self._progress.update(self._phase, note=text + failed)
            self._plain(f"{self._progress.tasks[self._phase].description}: {text}{failed}")

    def _plain(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def clock_starts(self) -> None:
        """The phase's cluster is up: time from here."""
        if self._phase is not None:
            self._progress.reset(self._phase, note="")

    def turn(self, outcome: TurnResult | TurnFailure) -> None:
        """A turn has ended."""
        assert self._phase is not None, "a turn outside any phase"
        ended = 1
        if isinstance(outcome, TurnFailure):
            ended += outcome.abandoned_rounds
            self._failed += ended
            self._progress.update(self._phase, note=f"[red]{self._failed} failed[/red]")
        self._progress.advance(self._phase, ended)
        self._progress.advance(self._overall, ended)
