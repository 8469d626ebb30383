"""Every request's id, its line in the access log, and its trace.

`RequestLog` is the outermost ASGI layer, so that refusals and unexpected failures have an id too. What happens inside
notes its figures in the request's `RequestRecord`, which `current` finds from anywhere within the request.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from starlette.types import Message, Receive, Scope, Send

from dualpath.server.http import OPEN_PATHS
from dualpath.server.listening import Application
from dualpath.server.request_record import CURRENT, RequestRecord

logger = logging.getLogger(__name__)
access = logging.getLogger("dualpath.access")

_SENT_ID = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)
"""Ids of clients that are taken over; any other is replaced, as it could forge lines of a log."""
_MAX_PATH_CHARACTERS = 200


Observer = Callable[[Scope, RequestRecord], None]
"""Is told of every request once it has ended."""


class RequestLog:
    """ASGI: gives every request its record and its ``x-request-id`` header, and tells `observers` when it has ended."""

    def __init__(self, app: Application, observers: tuple[Observer, ...] = ()) -> None:
        self.state = app.state
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = RequestRecord(_id_of(scope))
        header = (b"x-request-id", record.id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        token = CURRENT.set(record)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.error("request %s failed unexpectedly; please report it", record.id)
            raise
        finally:
            CURRENT.reset(token)
            for observer in self._observers:
                observer(scope, record)


def _id_of(scope: Scope) -> str:
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return sent.decode() if _SENT_ID.fullmatch(sent) else uuid.uuid4().hex


def log_access(scope: Scope, record: RequestRecord) -> None:
    """Write a request's line: what, its status (499 when its client left before one), who, seconds, tokens, id.

    Probes have none. Nothing of what was asked or answered is written.
    """
    path = scope["path"]
    if path in OPEN_PATHS:
        return
    client = scope.get("client")
    fields: dict[str, Any] = {
        "client": client[0] if client else "-",
        "seconds": round(time.perf_counter() - record.arrived_s, 3),
    }
    if (usage := record.usage) is not None:
        fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
    fields["request_id"] = record.id
    shown = quote(path)[:_MAX_PATH_CHARACTERS]
    access.info("%s %s %d", scope["method"], shown, record.status or 499, extra={"fields": fields})
