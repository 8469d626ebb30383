"""Virtual time: a heap of ``(time_ns, number, action, argument)``.

Theory of operation. An event is an action and its one argument, called when the clock gets there. Events of one time
are called in the order of posting, so a run is a function of its inputs. Nothing is ever taken out of the heap: an
action checks when it is called whether it still counts. A machine that expects something *later* than it has posted
posts nothing (lazy re-arm); it looks again when the early event comes.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[[Any], None]


class Events:
    """The heap and the clock. `now` is in integer nanoseconds and never goes back."""

    __slots__ = ("_heap", "_number", "now")

    def __init__(self) -> None:
        self.now = 0
        self._heap: list[tuple[int, int, Action, Any]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def posted(self) -> int:
        """Events posted since the start."""
        return self._number

    def at(self, time_ns: int, action: Action, argument: Any = None) -> None:
        """Calls `action` at `time_ns`, or now if that has passed."""
        number = self._number = self._number + 1
        heappush(self._heap, (time_ns if time_ns > self.now else self.now, number, action, argument))

    def step(self) -> None:
        """Goes to the next event and calls it. Raises IndexError if there is none."""
        self.now, _, action, argument = heappop(self._heap)
        action(argument)
