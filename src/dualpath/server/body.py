"""A request's body: read within bounds, and looked over before anything is made of it.

Decoding keeps the interpreter lock, and what comes after it walks what was decoded. So a body must not hold more than
can be walked at once (30 MB of short messages took 17 s), nor be nested deeper than Python recurses. Both are counted
with the primitives of `bytes`, which need 0.1 s for 30 MB and give the lock back in between; a small body without
many brackets is passed after two counts.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request

from dualpath.server.budget import Budget
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.lanes import decoding
from dualpath.server.limits import ServerLimits
from dualpath.server.protocol import decode_body, decode_fields

Body = TypeVar("Body", bound=msgspec.Struct)
T = TypeVar("T")

_LARGE_BYTES = 64 * 2**10
"""Smaller bodies are decoded in less than about a millisecond, and count in no budget."""
_BRACKETS = bytes.maketrans(b"[]", b"{}")
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))


class BodyReader:
    """Reads bodies into records. One per application: it bounds what all its requests hold together."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._budget = Budget(limits.max_large_body_bytes, limits.max_waiting, limits.body_timeout_s, "large bodies")

    async def read(self, request: Request, kind: type[Body], optional: bool = False) -> Body:
        """Returns the body, decoded; where it is `optional`, no body counts as an empty object.

        Raises ApiError: 400, 408, 413, 415, or 429 when too many large ones wait.
        """
        return await self._read(request, lambda body: self._decoded(body or (b"{}" if optional else b""), kind))

    async def fields(self, request: Request) -> dict[str, msgspec.Raw]:
        """Returns the fields of the body, each as it came. Raises ApiError as `read`."""
        return await self._read(request, self._fields)

    async def raw(self, request: Request) -> bytes:
        """Returns a body of any kind. Raises ApiError: 408, 413, or 429 when too many large ones wait."""
        async with self._budget.hold(self._limits.max_body_bytes):
            return await self._bytes(request)

    async def _read(self, request: Request, decode: Callable[[bytes], T]) -> T:
        declared_bytes = _declared_bytes(request)
        if declared_bytes is not None and declared_bytes > self._limits.max_body_bytes:
            raise self._too_large()
        if declared_bytes is not None and declared_bytes <= _LARGE_BYTES:
            return decode(await self._bytes(request))
        async with self._budget.hold(self._limits.max_body_bytes if declared_bytes is None else declared_bytes):
            body = await self._bytes(request)
            if len(body) <= _LARGE_BYTES:
                return decode(body)
            return await decoding(partial(decode, body))

    async def _bytes(self, request: Request) -> bytes:
        body, timeout_s = bytearray(), self._limits.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limits.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(
                408, f"the request body did not arrive within {timeout_s:g} s", code="body_timeout"
            ) from None
        return bytes(body)

    def _decoded(self, body: bytes, kind: type[Body]) -> Body:
        check_structure(body, self._limits)
        record = decode_body(body, kind)
        check_values(record, self._limits)
        return record

    def _fields(self, body: bytes) -> dict[str, msgspec.Raw]:
        check_structure(body, self._limits)
        return decode_fields(body)

    def _too_large(self) -> ApiError:
        message = f"the request body is larger than {self._limits.max_body_bytes} bytes"
        return ApiError(413, message, code="body_too_large")


def check_structure(body: bytes, limits: ServerLimits) -> None:
    """Raises ApiError (400) when `body`, if it is JSON, is nested too deep or has too many objects, lists and names."""
    most_quotes = 8 * limits.max_body_containers
    few_brackets = body.count(b"[") + body.count(b"{") <= limits.max_nesting
    if few_brackets and body.count(b":") <= limits.max_body_containers and body.count(b'"') <= most_quotes:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if plain.count(b'"') > most_quotes:
        raise _too_much(limits)
    level = b"".join(plain.split(b'"')[::2]).translate(_BRACKETS, _NO_STRUCTURE)
    if level.count(b"{") + level.count(b":") > limits.max_body_containers:
        raise _too_much(limits)
    if _is_deeper(level.replace(b":", b""), limits.max_nesting):
        raise ApiError(
            400,
            f"the request body is nested more than {limits.max_nesting} levels deep, or its brackets don't match",
            code="invalid_json",
        )


def _is_deeper(level: bytes, most: int) -> bool:
    """Whether braces are nested more than `most` deep. Those without a partner count as if they were nested."""
    for _ in range(most):
        outer = level.replace(b"{}", b"")  # takes away the innermost level
        if len(outer) == len(level):
            return len(level) > most
        level = outer
    return bool(level)


def check_values(record: msgspec.Struct, limits: ServerLimits) -> None:
    """Raises ApiError (400) for a list in `record` that is too long to be walked."""
    for name, value in zip(record.__struct_fields__, msgspec.structs.astuple(record), strict=True):
        if isinstance(value, list):
            named = {"messages": limits.max_messages, "input": limits.max_messages, "tools": limits.max_tools}
            most = named.get(name, limits.max_list_entries)
            if len(value) > most:
                raise bad_parameter(name, f"{name} has {len(value)} entries; a request may have {most}")


def _too_much(limits: ServerLimits) -> ApiError:
    message = (
        f"the request body has more than {limits.max_body_containers} objects, lists and names in objects; send less "
        "in one request"
    )
    return ApiError(400, message, code="invalid_value")


def _declared_bytes(request: Request) -> int | None:
    """Returns the body's length, if the headers say it. Raises ApiError (415) when they say that it is no JSON."""
    declared = None
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            declared = int(value)  # the connection has checked that it is a number
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise _not_json(f"the request body has the content encoding {value.decode('latin-1')!r}; send it as it is")
        elif name == b"content-type" and value != b"application/json":
            kind = value.partition(b";")[0].strip().lower()
            if kind != b"application/json" and not kind.endswith(b"+json"):
                raise _not_json(
                    f"the request body has the content type {kind.decode('latin-1')!r}; send "
                    "Content-Type: application/json"
                )
    return declared


def _not_json(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")
