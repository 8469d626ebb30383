"""The rows of a supervisor's table: what is started, and the processes that each row has had."""

from collections.abc import Callable

import msgspec

from dualpath.cluster.children import Child, Start

FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 10.0
CAN_NOT_RUN = "can't run: "
"""How the last words of a part begin that says itself why it can't start."""


class Part(msgspec.Struct, frozen=True):
    """A row of the table: what it is called, such as ``decode-1``, and how it is started."""

    name: str
    start: Start
    dismiss: Callable[[Child], None] | None = None
    """Tells its process to leave when all ends; None: it learns that otherwise."""


class ReplaceError(Exception):
    """A part could not be replaced; the message says why. It goes on as it was, or is brought back."""


class Slot:
    """A part's processes: one, none while it is down, two while one replaces the other."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.current: Child | None = None
        self.retiring: Child | None = None
        """The process that is about to be replaced: its end is no accident."""
        self.ends_in_a_row = 0
        self.failed_starts = 0
        self.ever_ready = False
        self.note = "waits to be started"
        """What it does while it has no process."""

    def pause_s(self) -> float:
        return min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** max(0, self.ends_in_a_row - 1))
