"""OpenAI's Responses API, out: response bodies and stream events."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from dualpath.server.chat.parts import Part, Parts, Step
from dualpath.server.errors import ApiError
from dualpath.server.generation import Piece, Usage
from dualpath.server.requests import CheckedRequest
from dualpath.server.responses.items import seal
from dualpath.server.responses.request import Format, Reasoning, ResponsesRequest, Text
from dualpath.server.responses.store import item_id, response_id
from dualpath.server.responses.tools import Tools

Keep = Callable[[str, bytes, list[dict[str, Any]]], None]
"""Stores a response: its id, its body, its output items."""

_PREFIXES = {"content": "msg", "reasoning": "rs", "call": "fc"}

_encode = msgspec.json.Encoder().encode


class ResponsesWriter:
    """/v1/responses. `keep` is called with what has ended without failing."""

    def __init__(self, model: str, checked: CheckedRequest, asked: ResponsesRequest, tools: Tools, keep: Keep) -> None:
        self._key = uuid.uuid4().hex
        self._tools = tools
        self._seals = asked.seals_reasoning
        self._keep = keep
        self._parts = Parts()
        self._sequence_number = 0
        self._finish_reason: str | None = None
        self._cut = False
        self._envelope = _envelope(model, checked, asked, tools) | {"id": response_id(self._key)}

    def event(self, piece: Piece) -> bytes:
        opening = b"" if self._sequence_number else self._opening()
        self._finish_reason = piece.finish_reason
        return opening + b"".join(map(self._step, self._parts.take(piece.deltas)))

    def end(self, usage: Usage) -> bytes:
        self._cut = self._finish_reason == "length"
        closing = b"".join(map(self._step, self._parts.close()))
        response = self._finished(usage)
        return closing + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        self._cut = True
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed", error={"code": code, "message": error.message})
        event = self._event("error", code=error.code, message=error.message, param=error.param)
        return event + self._event("response.failed", response=response)

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        for _step in self._parts.take(delta for piece in pieces for delta in piece.deltas):
            pass
        self._finish_reason = pieces[-1].finish_reason
        self._cut = self._finish_reason == "length"
        return _encode(self._finished(usage))

    def _finished(self, usage: Usage) -> dict[str, Any]:
        if self._cut:
            reason = {"reason": "max_output_tokens"}
            response = self._response("incomplete", incomplete_details=reason, usage=_usage(usage))
        else:
            response = self._response("completed", completed_at=int(time.time()), usage=_usage(usage))
        self._keep(self._key, _encode(response), response["output"])
        return response

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        output = [self._item(part) for part in self._parts.all]
        return {**self._envelope, "status": status, "output": output, **more}

    def _item(self, part: Part, *, begun: bool = False) -> dict[str, Any]:
        """Returns the output item of a part. Only the last can be incomplete."""
        cut = self._cut and part is self._parts.all[-1]
        status = "in_progress" if begun else "incomplete" if cut else "completed"
        item: dict[str, Any] = {"id": self._item_id(part), "status": status}
        match part.kind:
            case "content":
                return {"type": "message", **item, "role": "assistant", "content": [] if begun else [_content(part)]}
            case "reasoning":
                item = {"type": "reasoning", **item, "summary": [], "content": [] if begun else [_content(part)]}
                return item | {"encrypted_content": seal(part.text)} if self._seals else item
        return self._tools.call_item(part, item["id"], status)

    def _item_id(self, part: Part) -> str:
        custom = part.kind == "call" and self._tools.is_custom(part)
        return item_id("ctc" if custom else _PREFIXES[part.kind], self._key, part.index)

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _opening(self) -> bytes:
        response = self._response("in_progress")
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def _step(self, step: Step) -> bytes:
        match step.kind:
            case "open":
                return self._open(step.part)
            case "grow":
                return self._grow(step.part, step.text)
        return self._close(step.part)

    def _open(self, part: Part) -> bytes:
        item = self._item(part, begun=True)
        event = self._event("response.output_item.added", output_index=part.index, item=item)
        if part.kind == "call":
            return event
        return event + self._content_event("response.content_part.added", part, part=_content(part))

    def _grow(self, part: Part, text: str) -> bytes:
        match part.kind:
            case "content":
                return self._content_event("response.output_text.delta", part, delta=text, logprobs=[])
            case "reasoning":
                return self._content_event("response.reasoning_text.delta", part, delta=text)
        if self._tools.is_custom(part):  # its text is known once its JSON is whole
            return b""
        return self._item_event("response.function_call_arguments.delta", part, delta=text)

    def _close(self, part: Part) -> bytes:
        item = self._item(part)
        match part.kind:
            case "content":
                events = self._content_event("response.output_text.done", part, text=part.text, logprobs=[])
            case "reasoning":
                events = self._content_event("response.reasoning_text.done", part, text=part.text)
            case _ if self._tools.is_custom(part):
                events = self._item_event("response.custom_tool_call_input.delta", part, delta=item["input"])
                events += self._item_event("response.custom_tool_call_input.done", part, input=item["input"])
            case _:
                done = "response.function_call_arguments.done"
                events = self._item_event(done, part, name=item["name"], arguments=part.text)
        if part.kind != "call":
            events += self._content_event("response.content_part.done", part, part=_content(part))
        return events + self._event("response.output_item.done", output_index=part.index, item=item)

    def _content_event(self, kind: str, of: Part, **fields: Any) -> bytes:
        return self._item_event(kind, of, content_index=0, **fields)

    def _item_event(self, kind: str, of: Part, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item_id(of), output_index=of.index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = _encode({"type": kind, "sequence_number": self._sequence_number, **fields})
        self._sequence_number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def _content(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _envelope(model: str, checked: CheckedRequest, asked: ResponsesRequest, tools: Tools) -> dict[str, Any]:
    """Returns the fields that stay the same from the first event to the last: mostly what the request said."""
    sampling = checked.choices[0].request.sampling
    reasoning, text = asked.reasoning or Reasoning(), asked.text or Text()
    return {
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "store": asked.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": text.format or Format("text")},
        "tool_choice": asked.tool_choice or "auto",
        "tools": tools.given,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }
