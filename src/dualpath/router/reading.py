"""Reads the answers of vLLM servers: what they used, their last event, and `cached_tokens` put right.

A decode server takes every token of a prompt that was handed to it for cached; what was cached is what the cluster has
read from storage. All else passes as it came: fields that nobody looks at are not decoded.
"""

from typing import Any

import msgspec
from msgspec import Raw

from dualpath.router.asked import Fields
from dualpath.router.upstream import UpstreamError, data_of, with_data
from dualpath.server.errors import ApiError

DONE = b"data: [DONE]"
_encode = msgspec.json.encode


class Used(msgspec.Struct):
    """What an answer used so far, by its server's count."""

    completion_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reason: str = "stop"


class _Details(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    output_tokens: int | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _ChoiceEnd(msgspec.Struct):
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


def fields_of(data: bytes | Raw, what: str) -> Fields:
    """Returns an object's fields. Raises UpstreamError."""
    fields: Fields = decoded(data, Fields, what)
    return fields


def decoded(data: bytes | Raw, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UpstreamError(f"{what} of the vLLM server is not what it should be: {error}") from error


class Reader:
    """Reads one choice's answer, streamed or whole, of an API; here OpenAI's, of chats and completions.

    `cached_tokens` are the right ones. The event with the usage is kept in `usage_event`: who merges choices, or adds
    to it, sends it. `asked_usage` tells whether the client gets one.
    """

    def __init__(self, cached_tokens: int, asked_usage: bool) -> None:
        self.cached_tokens = cached_tokens
        self.used = Used()
        self.usage_event: Fields | None = None
        self.last: bytes | None = None
        """The last event, once it has come."""
        self._asked_usage = asked_usage
        self._held: Fields | None = None

    # ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, block: bytes) -> list[bytes]:
        """Returns the events that can be sent after `block`. Raises UpstreamError for one that is none."""
        data = data_of(block)
        if not data:
            return [block]
        if data == b"[DONE]":
            self.last = block
            return [*self._released({})]
        return self._chunk(block, fields_of(data, "an event"))

    def _chunk(self, block: bytes, chunk: Fields) -> list[bytes]:
        if _given(chunk, "error"):
            self.used.finish_reason = "error"
            return [*self._released({}), block]
        if bytes(chunk.get("choices", Raw())) == b"[]" and _given(chunk, "usage"):
            self.usage_event = self._corrected(chunk)
            return self._released(chunk)
        ends = decoded(chunk.get("choices", Raw(b"[]")), list[_ChoiceEnd], "an event's choices")
        reason = next((end.finish_reason for end in ends if end.finish_reason is not None), None)
        if reason is not None:
            self.used.finish_reason = reason
        ready = self._released({})
        if _given(chunk, "usage"):
            chunk = self._corrected(chunk)
            block = _event(chunk)
        if reason is not None and not self._asked_usage:
            self._held = chunk
            return ready
        return [*ready, block]

    def _released(self, usage: Fields) -> list[bytes]:
        """Returns the event that ends the choice, with the fingerprint that vLLM gives the last event of a stream: it
        has put it into the one with the usage, which the client does not get."""
        held, self._held = self._held, None
        if held is None:
            return []
        if "system_fingerprint" in usage:
            held = held | {"system_fingerprint": usage["system_fingerprint"]}
        return [_event(held)]

    def failed(self, error: ApiError) -> bytes:
        """Returns the event by which a stream ends that has failed."""
        return b"data: %b\n\n" % error.body

    def server_failed(self, block: bytes) -> str | None:
        """Returns what an event says of a failure that another server may not have; else None."""
        data = data_of(block)
        if b'"error"' not in data:
            return None
        found = fields_of(data, "an event")
        if not _given(found, "error"):
            return None
        error = decoded(found["error"], _Error, "an error")
        return error.message if not isinstance(error.code, int) or error.code >= 500 else None

    # ── whole answers ───────────────────────────────────────────────────────────────────────────────────────────────

    def whole(self, body: bytes) -> Fields:
        """Returns the answer's fields. Raises UpstreamError."""
        answer = fields_of(body, "the answer")
        if not _given(answer, "usage"):
            raise UpstreamError("the answer of the vLLM server has no usage")
        for end in decoded(answer.get("choices", Raw(b"[]")), list[_ChoiceEnd], "the answer's choices"):
            self.used.finish_reason = end.finish_reason or "stop"
        return without_transfer(self._corrected(answer))

    def _corrected(self, answer: Fields) -> Fields:
        usage = fields_of(answer["usage"], "usage")
        self._count(answer["usage"])
        return answer | {"usage": Raw(_encode(self._with_cached(usage)))}

    def _count(self, usage: Raw) -> None:
        counted = decoded(usage, _Usage, "usage")
        self.used.completion_tokens = counted.completion_tokens or counted.output_tokens or 0
        details = counted.completion_tokens_details or counted.output_tokens_details
        self.used.reasoning_tokens = (details.reasoning_tokens or 0) if details else 0

    def _with_cached(self, usage: Fields) -> Fields:
        return _with_details(usage, "prompt_tokens_details", {"cached_tokens": self.cached_tokens})


class ResponsesReader(Reader):
    """Of /v1/responses: the last event has the whole answer."""

    def __init__(self, cached_tokens: int, asked_usage: bool) -> None:
        super().__init__(cached_tokens, asked_usage)
        self._begun: Fields = {}
        self._number = 0

    def take(self, block: bytes) -> list[bytes]:
        data = data_of(block)
        if not data:
            return [block]
        event = fields_of(data, "an event")
        self._number += 1
        if not _given(event, "response"):
            return [block]
        response = fields_of(event["response"], "a response")
        if not self._begun:
            self._begun = response
        if not _given(response, "usage"):
            return self._ended_or(block, event)
        response = without_transfer(self._corrected(response))
        self._finish(response)
        return self._ended_or(with_data(block, _encode(event | {"response": Raw(_encode(response))})), event)

    def _ended_or(self, block: bytes, event: Fields) -> list[bytes]:
        if bytes(event.get("type", Raw())) in _LAST_OF_RESPONSES:
            self.last = block
            return []
        return [block]

    def whole(self, body: bytes) -> Fields:
        answer = fields_of(body, "the answer")
        if _given(answer, "usage"):
            answer = self._corrected(answer)
        self._finish(answer)
        return without_transfer(answer)

    def _finish(self, response: Fields) -> None:
        if bytes(response.get("status", Raw())) == b'"incomplete"':
            self.used.finish_reason = "length"

    def _with_cached(self, usage: Fields) -> Fields:
        name = "input_tokens_details"
        given = fields_of(usage[name], "usage") if _given(usage, name) else {}
        turns = decoded(given.get("cached_tokens_per_turn", Raw(b"[]")), list[int] | None, "usage") or []
        if turns:  # what the server has generated after its own tool calls was its own affair
            turns[0] = self.cached_tokens
        own = {"cached_tokens": sum(turns) if turns else self.cached_tokens}
        return _with_details(usage, name, own | ({"cached_tokens_per_turn": turns} if turns else {}))

    def failed(self, error: ApiError) -> bytes:
        told = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        event = b"event: error\ndata: %b\n\n" % _encode(told | {"sequence_number": self._number})
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        why = {"status": "failed", "error": {"code": code, "message": error.message}}
        failed = {"response": self._begun | why, "sequence_number": self._number + 1, "type": "response.failed"}
        return event + b"event: response.failed\ndata: %b\n\n" % _encode(failed)

    def server_failed(self, block: bytes) -> str | None:
        return data_of(block).decode(errors="replace")[:300] if block.startswith(b"event: error") else None


class MessagesReader(Reader):
    """Of /v1/messages: input tokens leave out those that were cached."""

    def take(self, block: bytes) -> list[bytes]:
        data = data_of(block)
        if not data:
            return [block]
        event = fields_of(data, "an event")
        if bytes(event.get("type", Raw())) == b'"message_stop"':
            self.last = block
            return []
        if _given(event, "usage"):
            event = self._corrected(event)
            self._finish(event.get("delta"))
        elif _given(event, "message"):
            message = fields_of(event["message"], "a message")
            if _given(message, "usage"):
                event = event | {"message": Raw(_encode(self._corrected(message)))}
        else:
            return [block]
        return [with_data(block, _encode(event))]

    def whole(self, body: bytes) -> Fields:
        answer = fields_of(body, "the answer")
        if _given(answer, "usage"):
            answer = self._corrected(answer)
        self._finish(Raw(_encode(answer)))
        return without_transfer(answer)

    def _finish(self, delta: Raw | None) -> None:
        if delta is not None and b'"stop_reason":"max_tokens"' in bytes(delta):
            self.used.finish_reason = "length"

    def _with_cached(self, usage: Fields) -> Fields:
        names = ("input_tokens", "cache_read_input_tokens")
        given, read = (decoded(usage.get(name, Raw(b"0")), int | None, "usage") or 0 for name in names)
        right = (max(0, given + read - self.cached_tokens), self.cached_tokens)
        return usage | {name: Raw(_encode(value)) for name, value in zip(names, right, strict=True)}

    def failed(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error.anthropic_body

    def server_failed(self, block: bytes) -> str | None:
        return data_of(block).decode(errors="replace")[:300] if block.startswith(b"event: error") else None


READERS: dict[str, type[Reader]] = {
    "/v1/chat/completions": Reader,
    "/v1/completions": Reader,
    "/v1/responses": ResponsesReader,
    "/v1/messages": MessagesReader,
}
"""The endpoints whose requests are routed."""
_LAST_OF_RESPONSES = (b'"response.completed"', b'"response.incomplete"', b'"response.failed"')


def without_transfer(answer: Fields) -> Fields:
    """Returns the answer without what the servers tell each other about KV."""
    name = "kv_transfer_params"
    return answer | {name: Raw(b"null")} if _given(answer, name) else answer


def _given(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def _with_details(usage: Fields, name: str, own: dict[str, Any]) -> Fields:
    details = fields_of(usage[name], "usage") if _given(usage, name) else {}
    return usage | {name: Raw(_encode(details | own))}


def _event(chunk: Fields) -> bytes:
    return b"data: " + _encode(chunk)
