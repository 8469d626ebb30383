"""Errors in OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, as responses and stream events.

Anthropic's API has a shape of its own: ``{"type": "error", "error": {"type", "message"}, "request_id"}``.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dualpath.cluster.generator import RequestError, overflow_message
from dualpath.server.request_record import current

_MESSAGE_CHARACTERS = 2000
"""Messages quote what the client sent, which may be megabytes."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPIC_PATHS = "/v1/messages"
INTERNAL = "internal_error"
SHUTTING_DOWN = "shutting_down"
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error for the client. `param` names the field at fault, `code` is a stable word for programs.

    `overflow`: how many tokens a prompt has that is too long, and how many it may have.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        overflow: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MESSAGE_CHARACTERS else f"{message[:_MESSAGE_CHARACTERS]}…"
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.overflow = overflow

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        record = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": record})

    @property
    def anthropic_body(self) -> bytes:
        """The error as JSON of Anthropic's API. Claude Code compacts its context at these words."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        message = self.message
        if self.overflow is not None:
            message = "prompt is too long: {} tokens > {} maximum".format(*self.overflow)
        return msgspec.json.encode(
            {"type": "error", "error": {"type": kind, "message": message}, "request_id": current().id}
        )

    def response(self, path: str = "") -> Response:
        """Returns the response, in the shape of the API that `path` belongs to."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.code == SHUTTING_DOWN:
            headers["connection"] = "close"
        body = self.anthropic_body if path.startswith(_ANTHROPIC_PATHS) else self.body
        return Response(body, self.status, headers, media_type="application/json")


def bad_parameter(
    param: str, message: str, *, code: str = "invalid_value", overflow: tuple[int, int] | None = None
) -> ApiError:
    """Returns a 400 error that names the field at fault."""
    return ApiError(400, message, code=code, param=param, overflow=overflow)


@contextlib.contextmanager
def in_words_of_client(names: Mapping[str, str]) -> Iterator[None]:
    """Name fields in errors as a client does whose request was translated. `names`: patterns of ours, and theirs."""
    try:
        yield
    except ApiError as error:
        for ours, theirs in names.items():
            if error.param is not None:
                error.param = re.sub(rf"^{ours}(?=$|[.\[])", theirs, error.param)
            error.message = re.sub(rf"(?<![\w.]){ours}(?!\w)", theirs, error.message)
        raise


def context_exceeded(context_tokens: int, prompt_tokens: int, completion_tokens: int | None, param: str) -> ApiError:
    """Returns a 400 error for a prompt that, with what is to be generated, exceeds the model's context.

    `completion_tokens` None: as many as there is room for.
    """
    message = overflow_message(context_tokens, prompt_tokens, 1 if completion_tokens is None else completion_tokens)
    overflow = None if completion_tokens else (prompt_tokens, context_tokens - 1)
    return bad_parameter(param, message, code="context_length_exceeded", overflow=overflow)


def as_api_error(error: Exception) -> ApiError:
    """Translate any failure. The client sees no details of an unexpected one; the log has them."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(error.status, str(error), code=error.code, retry_after_s=error.retry_after_s)
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code, "http_error")
        return ApiError(error.status_code, str(error.detail), code=code)
    if isinstance(error, ClientDisconnect):  # no client reads it; the code is for the counters
        return ApiError(499, "the client went away", code="client_disconnected")
    return ApiError(500, "the server failed on this request; its log says why, please report it", code=INTERNAL)
