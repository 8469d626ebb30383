"""What is known of a request while it is answered: found from anywhere within it."""

import time
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualpath.server.generation import Usage
    from dualpath.server.requests import CheckedRequest


class RequestRecord:
    """What is known of one request so far. `arrived_s` is ``time.perf_counter``'s."""

    __slots__ = ("arrived_s", "checked", "id", "status", "usage")

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.arrived_s = time.perf_counter()
        self.status: int | None = None
        self.checked: CheckedRequest | None = None
        """What it asks to be generated; None as long as it has not passed the checks."""
        self.usage: Usage | None = None
        """Tokens and times of that, which grow while it is answered."""


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def current() -> RequestRecord:
    """Returns the record of the request that this runs for; outside of one, a new record."""
    return CURRENT.get() or RequestRecord(uuid.uuid4().hex)
