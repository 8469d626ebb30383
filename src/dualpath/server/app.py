"""The OpenAI-compatible application over a `Generator`.

Theory of operation. A body is read and decoded (`protocol`), checked and tokenised (`requests`), and becomes one
`GenerateRequest` per choice. The cluster's tokens become pieces of text (`generation`). Pieces become events or one
body (`answers`), and `http` sends them while the client is connected. Every failure becomes an `ApiError`, at the
latest in the handlers below.
"""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Collection
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dualpath import __version__
from dualpath.cluster.generator import Generator, RequestError
from dualpath.server.answers import DONE, ChatWriter, CompletionWriter, Writer
from dualpath.server.codec import TextCodec
from dualpath.server.errors import INTERNAL, ApiError, as_api_error, bad_parameter
from dualpath.server.generation import Usage, run_request
from dualpath.server.http import EventStream, Gate, read_body, while_connected
from dualpath.server.metrics import GenerationTimer, ServerMetrics
from dualpath.server.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode_body,
)
from dualpath.server.requests import CheckedRequest, RequestChecker

logger = logging.getLogger(__name__)


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what clients may use of the server."""

    max_body_bytes: int = 32 * 2**20
    max_choices: int = 128
    """Most choices (prompts × n) in one request."""
    max_inflight_requests: int = 8192
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    """How long a client may leave its stream unread."""


def create_app(
    generator: Generator,
    tokenizer: Any,
    *,
    api_keys: Collection[str] = (),
    limits: ServerLimits | None = None,
) -> FastAPI:
    """Returns the application. `tokenizer` is a Transformers tokenizer (`load_tokenizer`). No `api_keys`: open to all.

    Raises ValueError for an empty key, which would admit clients that send none.
    """
    if isinstance(api_keys, str) or not all(api_keys):
        raise ValueError("api_keys must be a collection of keys, none of them empty")
    limits = limits or ServerLimits()
    api = _Api(generator, TextCodec(tokenizer), limits)
    app = FastAPI(title="dualpath", version=__version__, openapi_url=None)
    app.add_middleware(
        Gate,
        api_keys=frozenset(api_keys),
        max_inflight_requests=limits.max_inflight_requests,
        on_refusal=api.count_failure,
    )
    for failure in (ApiError, RequestError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(failure, api.failed)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/tokenize", api.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", api.detokenize, methods=["POST"])
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.exposition)
    app.add_api_route("/version", api.version)
    api.endpoints = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    return app


class _Api:
    """The endpoints, and the state that they share."""

    endpoints: frozenset[str] = frozenset()

    def __init__(self, generator: Generator, codec: TextCodec, limits: ServerLimits) -> None:
        self._generator = generator
        self._codec = codec
        self._limits = limits
        self._checker = RequestChecker(generator.model, codec, limits.max_choices)
        self._metrics = ServerMetrics(generator.model.name)
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        checked = await self._checker.completion(await self._body(request, CompletionRequest))
        return await self._answer(
            request, checked, CompletionWriter(self._generator.model.name, checked, self._codec), arrived_s
        )

    async def chat(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        checked = await self._checker.chat(await self._body(request, ChatRequest))
        return await self._answer(
            request, checked, ChatWriter(self._generator.model.name, checked, self._codec), arrived_s
        )

    async def models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._checker.check_model(request.path_params["name"])
        return _json(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        asked = await self._body(request, TokenizeRequest)
        self._checker.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_parameter("prompt", "give either prompt or messages")
        if asked.messages is not None:
            tokens = await self._checker.chat_prompt(asked, asked.messages)
        else:
            special = asked.add_special_tokens is not False
            tokens = await self._codec.encode(asked.prompt or "", add_special_tokens=special)
        context = self._generator.model.max_model_len_tokens
        return _json({"count": len(tokens), "max_model_len": context, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._body(request, DetokenizeRequest)
        self._checker.check_model(asked.model)
        self._checker.check_token_ids(asked.tokens, "tokens")
        return _json({"prompt": self._codec.decode(asked.tokens, skip_special_tokens=False)})

    async def health(self, _request: Request) -> Response:
        health = self._generator.health()
        return _json(health, 503 if health["status"] == "unavailable" else 200)

    async def exposition(self, _request: Request) -> Response:
        text = self._metrics.exposition(self._generator.gauges())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _request: Request) -> Response:
        return _json({"version": __version__})

    async def failed(self, request: Request, failure: Exception) -> Response:
        """Answer every failure before an answer has started."""
        error = as_api_error(failure)
        self.count_failure(request.url.path, error)
        response = error.response()
        if isinstance(failure, HTTPException):
            response.headers.update(failure.headers or {})
        return response

    def count_failure(self, path: str, error: ApiError) -> None:
        self._metrics.failed(self._endpoint(path), error.code)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        body = await read_body(request, self._limits.max_body_bytes, self._limits.body_timeout_s)
        return decode_body(body, kind)

    async def _answer(self, request: Request, checked: CheckedRequest, writer: Writer, arrived_s: float) -> Response:
        path = request.url.path
        pieces = run_request(
            self._generator, self._codec, checked, partial(GenerationTimer, self._metrics, path, arrived_s)
        )
        usage = Usage(checked)
        if checked.stream:
            events = self._events(pieces, checked, writer, usage)
            on_failure = partial(self._failed_midway, path)
            return EventStream(events, on_failure, self._limits.write_timeout_s)
        return await while_connected(request.receive, self._whole(pieces, writer, usage))

    async def _whole(self, pieces: AsyncGenerator[Any, None], writer: Writer, usage: Usage) -> Response:
        collected = []
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                usage.add(piece)
                collected.append(piece)
        self._count(usage)
        return Response(writer.whole(collected, usage), media_type="application/json")

    async def _events(
        self, pieces: AsyncGenerator[Any, None], checked: CheckedRequest, writer: Writer, usage: Usage
    ) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                usage.add(piece)
                yield writer.event(piece)
        self._count(usage)
        yield writer.usage_event(usage) + DONE if checked.include_usage or checked.return_timings else DONE

    def _count(self, usage: Usage) -> None:
        self._metrics.answered(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def _failed_midway(self, path: str, failure: Exception) -> ApiError:
        error = as_api_error(failure)
        if error.code == INTERNAL:
            logger.error("a stream failed with an unexpected error; please report it", exc_info=failure)
        self.count_failure(path, error)
        return error

    def _endpoint(self, path: str) -> str:
        return path if path in self.endpoints else "other"  # clients must not be able to create series

    def _model_card(self) -> dict[str, Any]:
        model = self._generator.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "dualpath",
            "max_model_len": model.max_model_len_tokens,
            "cluster": model.cluster,
        }


def _json(record: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(record), status, media_type="application/json")
