"""Aborts that engines have not answered: in time, overdue, or not even sent.

Theory of operation. What an aborted attempt holds is only given back when the engine says that no transfer touches it
any more. The PE's word (or its loss) is also the proof that nobody writes into the DE's blocks, so the DE's Abort waits
*behind* the PE's. Every Abort may take equally long, so those in time are in order of their deadlines; a late one is
counted, and frees nothing.
"""

from collections import OrderedDict

from dualpath.core.vocabulary import Abort, EngineId, RequestId

AttemptAt = tuple[EngineId, RequestId, int]
"""``(engine, request, attempt)``."""


class Aborts:
    """All unanswered Aborts. Times in nanoseconds."""

    def __init__(self, release_ns: int) -> None:
        self._release_ns = release_ns
        self.in_time: OrderedDict[AttemptAt, int] = OrderedDict()
        """Unanswered Aborts in time, with their deadlines."""
        self.overdue: dict[AttemptAt, None] = {}
        """Unanswered Aborts out of time."""
        self.behind: dict[AttemptAt, EngineId] = {}
        """DEs whose Abort waits for their PE's answer, by the PE."""

    def send(self, now: int, at: AttemptAt, lost_peer: EngineId | None = None) -> Abort:
        """The command, for the outbox; its answer is awaited from now on."""
        self.in_time[at] = now + self._release_ns
        engine, request, attempt = at
        return Abort(request, attempt, engine, lost_peer)

    def awaited(self, at: AttemptAt) -> bool:
        return at in self.in_time or at in self.overdue

    def answered(self, at: AttemptAt) -> EngineId | None:
        """Forget the Abort; the DE behind it, if there is one, is no longer held back."""
        self.in_time.pop(at, None)
        self.overdue.pop(at, None)
        return self.behind.pop(at, None)

    def lose(self, engine: EngineId) -> list[AttemptAt]:
        """Nothing is awaited of a lost engine; the DEs that waited behind it can be told."""
        for at in [at for at in self.in_time if at[0] == engine]:
            del self.in_time[at]
        self.overdue = {at: None for at in self.overdue if at[0] != engine}
        behind, self.behind = self.behind, {}
        proven: list[AttemptAt] = []
        for at, decode in behind.items():
            if at[0] == engine:
                proven.append((decode, at[1], at[2]))
            elif decode != engine:
                self.behind[at] = decode
        return proven

    def earliest(self) -> int:
        """The next deadline of those in time, of which there must be one."""
        return next(iter(self.in_time.values()))

    def expire(self, now: int) -> None:
        """What should have been answered at or before `now` is overdue."""
        while self.in_time and self.earliest() <= now:
            at, _ = self.in_time.popitem(last=False)
            self.overdue[at] = None
