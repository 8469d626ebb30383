"""Errors in OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, as responses and stream events."""

import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dualpath.cluster.generator import RequestError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
INTERNAL = "internal_error"
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error for the client. `param` names the field at fault, `code` is a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        record = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": record})

    def response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read, so the connection can't be used again
            headers["connection"] = "close"
        return Response(self.body, self.status, headers, media_type="application/json")


def bad_parameter(param: str, message: str, *, code: str = "invalid_value") -> ApiError:
    """Returns a 400 error that names the field at fault."""
    return ApiError(400, message, code=code, param=param)


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
