"""The application over a `Generator`: its routes, its gate, and its handlers of failures.

Theory of operation. A body is read and decoded (`protocol`), checked and tokenised (`requests`), and becomes one
`GenerateRequest` per choice. The cluster's tokens become pieces of text (`generation`). Pieces become events or one
body (`answers`), and `http` sends them while the client is connected. Every failure becomes an `ApiError`, at the
latest in the handlers below. `service` connects these steps; `endpoints/` has the endpoints, a module per group.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dualpath import __version__
from dualpath.cluster.generator import Generator, RequestError
from dualpath.server.chat.dialect import Dialect
from dualpath.server.codec import TextCodec
from dualpath.server.drain import Drain
from dualpath.server.endpoints import control, messages, openai, operations, responses, rollout
from dualpath.server.errors import ApiError
from dualpath.server.http import Gate
from dualpath.server.limits import ServerLimits
from dualpath.server.service import Service

GROUPS = (
    *(openai.routes, responses.routes, messages.routes, operations.routes),
    *(rollout.routes, control.routes),
)


def create_app(
    generator: Generator,
    tokenizer: Any,
    *,
    api_keys: Collection[str] = (),
    limits: ServerLimits | None = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
    enable_control: bool = False,
    drain: Drain | None = None,
) -> FastAPI:
    """Returns the application. `tokenizer` is a Transformers tokenizer (`load_tokenizer`). No `api_keys`: open to all.

    `tool_call_parser` and `reasoning_parser` are names of `chat.formats`; None: as the chat template says.

    `enable_control` opens the endpoints that change how the cluster serves: to who has a key, else to this host.

    Raises ValueError for an empty key, which would admit clients that send none, and for an unknown parser.
    """
    if isinstance(api_keys, str) or not all(api_keys):
        raise ValueError("api_keys must be a collection of keys, none of them empty")
    limits = limits or ServerLimits()
    dialect = Dialect(tokenizer, generator.model.vocab_size, tool_call_parser, reasoning_parser)
    codec = TextCodec(tokenizer, generator.model.max_model_len_tokens, limits)
    service = Service(generator, codec, dialect, limits, drain or Drain())
    service.who_controls = ("keys" if api_keys else "this host") if enable_control else "nobody"
    app = FastAPI(title="dualpath", version=__version__, openapi_url=None)
    app.add_middleware(
        Gate,
        api_keys=frozenset(api_keys),
        max_inflight_requests=limits.max_inflight_requests,
        drain=service.drain,
        on_refusal=service.count_failure,
    )
    for failure in (ApiError, RequestError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(failure, service.failed)
    routes = [route for group in GROUPS for route in group(service)]
    for route in routes:
        app.add_route(route.path, route.endpoint, methods=list(route.methods))  # GET comes with HEAD
    service.endpoints = frozenset(route.path for route in routes)
    # What `serve` needs of it.
    app.state.limits, app.state.drain = limits, service.drain
    app.state.on_refusal = partial(service.count_failure, "")
    app.state.close = dialect.close
    return app
