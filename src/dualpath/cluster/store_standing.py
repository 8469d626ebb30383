"""What came of the latest calls to the store, and so whether another one is worth a try.

Whose fault is a call that failed? If another call was answered after this one had begun, then the store answers, and
the fault is this block's: it alone is missed. Otherwise it is the store's. If the failure has cost time, the store is
then left alone for a while, except for one call now and then. Calls of different kinds do not speak for each other: a
full disk can be read.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping

QUICK_S = 0.25
"""A refusal that comes within this time costs nobody any: the next call is tried, too."""
REFUSED_AWAY_S = 1.0
"""How long the store is left alone after one that took longer."""
SLOW, UNREACHABLE, READ_ONLY = "slow", "unreachable", "read-only"
TROUBLES = (UNREACHABLE, SLOW, READ_ONLY)
"""The worst first. Reads are refused; calls are not answered in time; writes are refused."""
MOST_AWAY_S = 60.0
"""The longest time that the store is left alone, after trials that it has not answered in time."""
MAX_REFUSED_BLOCKS = 8
"""After this many blocks that can't be read, with none between them that can, it is the store."""
MEMORY_S = 60.0
"""How long a failure counts as news when no other call follows."""


class StoreStanding:
    """Calls of one kind. Any thread may use it."""

    def __init__(self, late_away_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._away_s = self._late_away_s = late_away_s
        self._clock = clock
        self._lock = threading.Lock()
        self._answered_s = self._failed_s = self._retry_s = -math.inf
        self._since_s = math.inf
        self._refused_blocks = 0
        self.late = False
        """Whether the latest failure was a missed deadline."""

    def worth_a_try(self) -> bool:
        """Returns False while the store is left alone. A call that is let through is a trial: others wait for it."""
        with self._lock:
            now_s = self._clock()
            if now_s < self._retry_s:
                return False
            if self._since_s < math.inf:
                if self.late:  # a trial may cost a thread
                    self._away_s = min(2 * self._away_s, max(MOST_AWAY_S, self._late_away_s))
                self._retry_s = now_s + self._away_s
            return True

    @property
    def hangs(self) -> bool:
        """Whether the latest call has missed its deadline, and none has been answered since."""
        return self.late and self._since_s < math.inf

    def answered(self) -> None:
        """A call has been answered, be it that its block is bad or gone."""
        with self._lock:
            self._answered_s = self._clock()
            self._retry_s, self._since_s = -math.inf, math.inf
            self._refused_blocks = 0

    def failed(self, began_s: float, *, late: bool = False) -> bool:
        """A call that began at `began_s` was refused or is late. Returns True when that speaks against the store."""
        with self._lock:
            if self._answered_s > began_s:
                return False
            self._fail(began_s, late)
            return True

    def refused_block(self, began_s: float) -> bool:
        """The store says of one block that it can't be read now. Returns True when it has said so of too many."""
        with self._lock:
            self._refused_blocks += 1
            if self._refused_blocks < MAX_REFUSED_BLOCKS:
                return False
            self._fail(began_s, late=False)
            return True

    def _fail(self, began_s: float, late: bool) -> None:
        hung, self.late, self._failed_s = self.hangs, late, self._clock()
        self._since_s = min(self._since_s, self._failed_s)
        refused_away_s = REFUSED_AWAY_S if self._failed_s - began_s > QUICK_S else 0.0
        if not (late and hung):
            self._away_s = self._late_away_s if late else refused_away_s
        self._retry_s = self._failed_s + self._away_s

    @property
    def failing_s(self) -> float:
        """For how long calls have failed; 0 when they are answered, or when there was none for `MEMORY_S`."""
        with self._lock:
            now_s = self._clock()
            return now_s - self._since_s if self._since_s < math.inf and now_s < self._failed_s + MEMORY_S else 0.0


def troubles_s(reads: StoreStanding, writes: StoreStanding) -> Mapping[str, float]:
    """Returns for how long each of `TROUBLES` has lasted, in seconds; 0: it is not so."""
    found = dict.fromkeys(TROUBLES, 0.0)
    for standing, refused in ((writes, READ_ONLY), (reads, UNREACHABLE)):
        trouble = SLOW if standing.late else refused
        found[trouble] = max(found[trouble], standing.failing_s)
    return found
