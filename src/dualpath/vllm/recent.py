"""`Recent`: what is over since a moment ago, so that what comes late about it is known as late."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KEEP_S = 30.0
"""Not longer: owners are numbered anew when the coordinator is."""
MOST = 4096

Item = TypeVar("Item", bound=Hashable)


class Recent(Generic[Item]):
    """The newest items, for a while."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._added_s: OrderedDict[Item, float] = OrderedDict()

    def add(self, item: Item) -> None:
        self._added_s[item] = self._now_s()
        if len(self._added_s) > MOST:
            self._added_s.popitem(last=False)

    def discard(self, item: Item) -> None:
        self._added_s.pop(item, None)

    def __contains__(self, item: Item) -> bool:
        added_s = self._added_s.get(item)
        return added_s is not None and self._now_s() - added_s < KEEP_S
