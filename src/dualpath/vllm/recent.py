"""`Recent`: a bounded set, so that what comes late about something that is over is known as late."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Recent(Generic[Item]):
    """The newest `size` items."""

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._items: OrderedDict[Item, None] = OrderedDict()

    def add(self, item: Item) -> None:
        self._items[item] = None
        if len(self._items) > self._size:
            self._items.popitem(last=False)

    def __contains__(self, item: object) -> bool:
        return item in self._items
