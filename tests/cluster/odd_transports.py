"""Transports by somebody who has not read the contract. Each name here is one, for ``--transport MODULE:NAME``."""

import threading
from typing import Any

from dualpath.transfer.transport import Server
from dualpath.transfer.transports.shm import SharedMemoryTransport

go_on = threading.Event()
"""Lets go of what hangs."""
late: list[Server] = []
"""What it has made then."""


class _Raises(SharedMemoryTransport):
    def serve(self, *_: Any, **__: Any) -> Server:
        raise RuntimeError("my fabric is down")


class _Nothing(SharedMemoryTransport):
    def serve(self, *_: Any, **__: Any) -> Server:
        return None  # type: ignore[return-value]


class _Number(SharedMemoryTransport):
    def serve(self, *given: Any, **named: Any) -> Server:
        server = super().serve(*given, **named)
        server.address = 12345  # type: ignore[misc,assignment]
        return server


class _Hangs(SharedMemoryTransport):
    def serve(self, *given: Any, **named: Any) -> Server:
        go_on.wait()
        late.append(super().serve(*given, **named))
        return late[-1]


RAISES, NOTHING, NUMBER, HANGS = _Raises(), _Nothing(), _Number(), _Hangs()
