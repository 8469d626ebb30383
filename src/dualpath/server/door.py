"""What every application over a cluster has, whoever generates: bodies within bounds, counted failures, the figures."""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import Literal, NamedTuple

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dualpath import __version__
from dualpath.cluster.generator import Generator, RequestError
from dualpath.server.body import Body, BodyReader
from dualpath.server.drain import Drain
from dualpath.server.errors import INTERNAL, ApiError, as_api_error
from dualpath.server.http import Gate
from dualpath.server.limits import ServerLimits
from dualpath.server.metrics import ServerMetrics
from dualpath.server.request_record import current

logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """One endpoint. `endpoints/` has a module per group, each with a function `routes`."""

    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    methods: tuple[str, ...] = ("GET",)


class Door:
    """The state that endpoints of any kind share. `endpoints` holds the application's paths, for the figures."""

    endpoints: frozenset[str] = frozenset()
    who_controls: Literal["nobody", "keys", "this host"] = "nobody"
    """Who may use the endpoints of `endpoints/control.py`; ``keys``: the gate has asked for one already."""

    def __init__(self, generator: Generator, limits: ServerLimits, drain: Drain) -> None:
        self.generator = generator
        self.limits = limits
        self.drain = drain
        self.bodies = BodyReader(limits)
        self.metrics = ServerMetrics(generator.model.name)

    async def body(self, request: Request, kind: type[Body]) -> Body:
        return await self.bodies.read(request, kind)

    async def optional_body(self, request: Request, kind: type[Body]) -> Body:
        """As `body`; no body counts as an empty object."""
        return await self.bodies.read(request, kind, optional=True)

    async def failed(self, request: Request, failure: Exception) -> Response:
        """Answer every failure before an answer has started."""
        response = self.error_of(request, failure).response(request.url.path)
        response.headers.update(getattr(failure, "headers", None) or {})
        return response

    def error_of(self, request: Request, failure: Exception) -> ApiError:
        """Count a failure. Returns what the client is told of it."""
        error = as_api_error(failure)
        self.count_failure(request.url.path, error)
        return error

    def failed_midway(self, path: str, event: Callable[[ApiError], bytes], failure: Exception) -> bytes:
        """Count a failure after a stream has begun. Returns the event that tells the client."""
        error = as_api_error(failure)
        if error.code == INTERNAL:
            logger.error("request %s: its stream failed unexpectedly; please report it", current().id, exc_info=failure)
        self.count_failure(path, error)
        return event(error)

    def count_failure(self, path: str, error: ApiError) -> None:
        # Clients must not be able to create series.
        self.metrics.failed(path if path in self.endpoints else "other", error.code)


def assembled(
    door: Door, routes: Iterable[Route], api_keys: Collection[str], close: Callable[[], Awaitable[None]]
) -> FastAPI:
    """Returns the application of these routes, with its gate and its handlers of failures. `close` ends it.

    Raises ValueError for an empty key, which would admit clients that send none.
    """
    if isinstance(api_keys, str) or not all(api_keys):
        raise ValueError("api_keys must be a collection of keys, none of them empty")
    app = FastAPI(title="dualpath", version=__version__, openapi_url=None)
    app.add_middleware(
        Gate,
        api_keys=frozenset(api_keys),
        max_inflight_requests=door.limits.max_inflight_requests,
        drain=door.drain,
        on_refusal=door.count_failure,
    )
    for failure in (ApiError, RequestError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(failure, door.failed)
    for route in (routes := list(routes)):
        app.add_route(route.path, route.endpoint, methods=list(route.methods))  # GET comes with HEAD
    door.endpoints = frozenset(route.path for route in routes)
    # What `serve` needs of it.
    app.state.limits, app.state.drain = door.limits, door.drain
    app.state.on_refusal = partial(door.count_failure, "")
    app.state.close = close
    return app


def json_response(record: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(record), status, media_type="application/json")
