"""Anthropic's Messages API, out: message bodies, stream events and errors."""

from typing import Any

import msgspec

from dualpath.server.chat.parts import Part, Parts, Step
from dualpath.server.errors import ApiError
from dualpath.server.generation import Piece, Usage
from dualpath.server.request_record import current
from dualpath.server.requests import CheckedRequest

_SIGNATURE = "dualpath"
"""Clients send thinking back with its signature, and some send none back without. Nothing is signed here."""

_encode = msgspec.json.Encoder().encode


class MessagesWriter:
    """/v1/messages. `max_tokens` is what the client allows; the context may leave less."""

    def __init__(self, model: str, checked: CheckedRequest, max_tokens: int) -> None:
        self._id = f"msg_{current().id}"
        self._model = model
        self._prompt_tokens = len(checked.prompts[0])
        self._ends_context = checked.choices[0].request.sampling.max_tokens < max_tokens
        self._parts = Parts()
        self._last: Piece | None = None

    def event(self, piece: Piece) -> bytes:
        opening = b"" if self._last else self._opening(piece)
        self._last = piece
        return opening + b"".join(map(_step_event, self._parts.take(piece.deltas)))

    def end(self, usage: Usage) -> bytes:
        closing = b"".join(map(_step_event, self._parts.close()))
        delta = _event("message_delta", delta=self._stop(), usage=_usage(usage))
        return closing + delta + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error.anthropic_body

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        for _step in self._parts.take(delta for piece in pieces for delta in piece.deltas):
            pass
        self._last = pieces[-1]
        return _encode(self._message([_block(part) for part in self._parts.all], self._stop(), _usage(usage)))

    def _opening(self, piece: Piece) -> bytes:
        stop = {"stop_reason": None, "stop_sequence": None}
        usage = _usage_body(self._prompt_tokens, piece.cached_tokens, 0)
        return _event("message_start", message=self._message([], stop, usage))

    def _message(self, content: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **stop,
            "usage": usage,
        }

    def _stop(self) -> dict[str, Any]:
        assert self._last is not None
        if self._last.finish_reason == "length":
            reason = "model_context_window_exceeded" if self._ends_context else "max_tokens"
        elif self._last.stop_string is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if any(part.kind == "call" for part in self._parts.all) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": self._last.stop_string}


def _step_event(step: Step) -> bytes:
    part = step.part
    match step.kind, part.kind:
        case "open", _:
            return _event("content_block_start", index=part.index, content_block=_block(part))
        case "grow", "content":
            delta = {"type": "text_delta", "text": step.text}
        case "grow", "reasoning":
            delta = {"type": "thinking_delta", "thinking": step.text}
        case "grow", _:
            delta = {"type": "input_json_delta", "partial_json": step.text}
        case _, "reasoning":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
        case _:
            return _event("content_block_stop", index=part.index)
    event = _event("content_block_delta", index=part.index, delta=delta)
    return event if step.kind == "grow" else event + _event("content_block_stop", index=part.index)


def _block(part: Part) -> dict[str, Any]:
    match part.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": _SIGNATURE if part.text else ""}
        case "content":
            return {"type": "text", "text": part.text, "citations": None}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _input(part.text)}


def _input(arguments: str) -> dict[str, Any]:
    """Returns a call's arguments. What is no JSON object is kept, in the way that Anthropic advises clients to."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {"INVALID_JSON": arguments}


def _usage(usage: Usage) -> dict[str, Any]:
    details = {"output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}}
    return _usage_body(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) | details


def _usage_body(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
