"""What the port answers while the cluster starts: probes, and to all else that it takes a while.

The port is bound before engines load. So one in use is said at once, and an orchestrator's probes are answered.
"""

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dualpath.server.door import json_response
from dualpath.server.drain import Drain
from dualpath.server.errors import ApiError
from dualpath.server.limits import ServerLimits
from dualpath.server.listening import Application

_RETRY_AFTER_S = 2.0
_NOT_READY = frozenset({"/health", "/ping", "/ready"})
_PROBES = _NOT_READY | {"/livez"}


class Front:
    """ASGI: the application, from `open` on. Before, `starting` returns what /health says.

    An application that is to be opened is made with this one's `limits` and `drain`.
    """

    def __init__(self, starting: Callable[[], dict[str, object]]) -> None:
        self.limits, self.drain = ServerLimits(), Drain()
        self.state = State(
            {"limits": self.limits, "drain": self.drain, "on_refusal": self._refused, "close": self._close}
        )
        self.patience_s = 0.0
        """How long requests wait for the application rather than be told that it loads."""
        self._starting = starting
        self._app: Application | None = None
        self._opened = asyncio.Event()

    def open(self, app: Application) -> None:
        """From now on `app` answers."""
        self._app = app
        self._opened.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None and self.patience_s and scope["type"] == "http" and scope["path"] not in _PROBES:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._opened.wait(), self.patience_s)
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._loading(scope["path"])(scope, receive, send)

    def _refused(self, error: ApiError) -> None:
        """Let the application count a request that its connection has refused."""
        if self._app is not None:
            self._app.state.on_refusal(error)

    async def _close(self) -> None:
        if self._app is not None:
            await self._app.state.close()

    def _loading(self, path: str) -> Response:
        if path == "/livez":
            return json_response({"status": "alive"})
        if path in _NOT_READY:
            response = json_response(self._starting(), 503)
            response.headers["retry-after"] = f"{_RETRY_AFTER_S:.0f}"
            return response
        message = "the server is loading its model; /health says how far it is"
        return ApiError(503, message, code="loading", retry_after_s=_RETRY_AFTER_S).response()
