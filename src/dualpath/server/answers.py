"""Answers to clients: OpenAI's bodies and stream events, written with msgspec because every token passes here.

A writer holds what the answers of one request share, and knows one endpoint's shape. It turns each piece into a
server-sent event, or merges all pieces into one body. Fields that the client did not request are left out (`UNSET`);
`usage` always has ``prompt_tokens_details.cached_tokens``.
"""

import time
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from dualpath.server.chat.deltas import Delta, fold
from dualpath.server.codec import TextCodec
from dualpath.server.errors import ApiError
from dualpath.server.generation import Piece, Usage, by_choice
from dualpath.server.logprobs import LogprobShapes, PromptEntry
from dualpath.server.request_record import current
from dualpath.server.requests import CheckedRequest
from dualpath.spec.timings import Timings

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class CachedTokens(msgspec.Struct, gc=False):
    cached_tokens: int


class UsageBody(msgspec.Struct, gc=False):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChoiceBody(msgspec.Struct, kw_only=True, gc=False):
    """One choice: `text` (completions), `message` (chats) or `delta` (chats, streamed) is set."""

    index: int
    text: str | UnsetType = UNSET
    message: dict[str, Any] | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[PromptEntry | None] | UnsetType = UNSET


class AnswerBody(msgspec.Struct, kw_only=True, gc=False):
    """A whole response, or one event of a streamed one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: UsageBody | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[PromptEntry | None] | UnsetType = UNSET


class Writer(Protocol):
    """Shapes one request's answer."""

    def event(self, piece: Piece) -> bytes:
        """Returns the server-sent event (or two) of one piece."""
        ...

    def end(self, usage: Usage) -> bytes:
        """Returns the last events of a stream that has not failed."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """Returns the event that ends a stream which fails midway."""
        ...

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        """Returns the body of an answer that is not streamed, from all its pieces."""
        ...


class _Answer:
    """The part that both endpoints share: the envelope, usage, and pieces merged per choice."""

    object: str
    chunk_object: str
    id_prefix: str

    def __init__(self, model: str, checked: CheckedRequest, codec: TextCodec) -> None:
        self._id = f"{self.id_prefix}-{current().id}"
        self._created = int(time.time())
        self._model = model
        self._checked = checked
        self._shapes = LogprobShapes(codec, checked.tokens_as_ids)
        self._begun = [False] * len(checked.choices)

    def end(self, usage: Usage) -> bytes:
        if not (self._checked.include_usage or self._checked.return_timings):
            return DONE
        return b"data: %b\n\n" % _encode(self._last(self.chunk_object, [], usage)) + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: %b\n\n" % error.body

    def _last(self, kind: str, choices: list[ChoiceBody], usage: Usage) -> AnswerBody:
        """Returns the body that carries usage: the last event, or the whole answer."""
        body = self._body(kind, choices, usage_body(usage))
        if self._checked.return_timings and usage.timings is not None:
            body.timings = usage.timings
        return body

    def _body(self, kind: str, choices: list[ChoiceBody], usage: UsageBody | UnsetType | None) -> AnswerBody:
        return AnswerBody(
            id=self._id, object=kind, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _chunk(self, choice: ChoiceBody) -> AnswerBody:
        return self._body(self.chunk_object, [choice], None if self._checked.include_usage else UNSET)

    def _choice(self, piece: Piece) -> ChoiceBody:
        token_ids = piece.token_ids if self._checked.return_token_ids else UNSET
        return ChoiceBody(index=piece.choice, finish_reason=piece.finish_reason, token_ids=token_ids)

    def _is_first(self, choice: int) -> bool:
        first, self._begun[choice] = not self._begun[choice], True
        return first


class CompletionWriter(_Answer):
    """/v1/completions."""

    object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: str, checked: CheckedRequest, codec: TextCodec) -> None:
        super().__init__(model, checked, codec)
        self._offsets = [0] * len(checked.choices)

    def event(self, piece: Piece) -> bytes:
        return b"data: %b\n\n" % _encode(self._chunk(self._choice(piece)))

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        choices = [self._choice(piece) for piece in by_choice(pieces)]
        return _encode(self._last(self.object, choices, usage))

    def _choice(self, piece: Piece) -> ChoiceBody:
        choice = super()._choice(piece)
        choice.text = piece.text
        checked, asked = self._checked, self._checked.choices[piece.choice]
        entries, unscored = list(piece.logprobs or []), None
        if self._is_first(piece.choice):
            prompt = asked.request.prompt_token_ids
            if checked.return_token_ids:
                choice.prompt_token_ids = prompt
            if checked.prompt_logprobs is not None:
                choice.prompt_logprobs = self._shapes.prompt(piece.prompt_logprobs or [])
            if checked.echo is not None:
                choice.text = checked.echo[asked.prompt_index] + piece.text
                kept, unscored = 1 + (checked.logprobs or 0), prompt[0]
                entries = [score.tokens[:kept] for score in piece.prompt_logprobs or []] + entries
        if checked.logprobs is not None:
            choice.logprobs, self._offsets[piece.choice] = self._shapes.completion(
                entries, self._offsets[piece.choice], unscored
            )
        return choice


class ChatWriter(_Answer):
    """/v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def event(self, piece: Piece) -> bytes:
        choice, deltas = self._choice(piece), piece.deltas
        plain = len(deltas) == 1 and deltas[0].kind == "content"
        choice.delta = {"content": deltas[0].text} if plain else _delta(deltas)
        if not (choice.delta or piece.finish_reason or piece.logprobs or self._checked.return_token_ids):
            event = b""  # what was generated is not sure yet
        else:
            event = b"data: %b\n\n" % _encode(self._chunk(choice))
        return self._opening(piece.choice) + event if self._is_first(piece.choice) else event

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        choices, reading = [], self._checked.reading
        for piece in by_choice(pieces):
            choice = self._choice(piece)
            choice.message = _message(piece.deltas, only_calls=reading is not None and reading.required)
            choices.append(choice)
        body = self._last(self.object, choices, usage)
        if self._checked.return_token_ids:
            body.prompt_token_ids = self._checked.prompts[0]
        if self._checked.prompt_logprobs is not None:
            scores = next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), [])
            body.prompt_logprobs = self._shapes.prompt(scores)
        return _encode(body)

    def _opening(self, choice: int) -> bytes:
        """Returns the event that names the role before any text."""
        delta = {"role": "assistant", "content": ""}
        chunk = self._chunk(ChoiceBody(index=choice, delta=delta, finish_reason=None))
        if self._checked.return_token_ids:
            chunk.prompt_token_ids = self._checked.prompts[0]
        return b"data: %b\n\n" % _encode(chunk)

    def _choice(self, piece: Piece) -> ChoiceBody:
        choice = super()._choice(piece)
        if self._checked.logprobs is not None:
            choice.logprobs = self._shapes.chat(piece.logprobs or [])
        return choice


def _delta(deltas: list[Delta]) -> dict[str, Any]:
    """Returns one event's delta. Reasoning has both its names: vLLM's, and the one that DeepSeek's clients read."""
    record: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        match delta.kind:
            case "content":
                record["content"] = record.get("content", "") + delta.text
            case "reasoning":
                record["reasoning"] = record["reasoning_content"] = record.get("reasoning", "") + delta.text
            case "call":
                calls[delta.call] = _call(delta.call_id, delta.text, "", index=delta.call)
            case "arguments":
                own = calls.setdefault(delta.call, {"index": delta.call, "function": {"arguments": ""}})
                own["function"]["arguments"] += delta.text
    if calls:
        record["tool_calls"] = list(calls.values())
    return record


def _message(deltas: list[Delta], only_calls: bool) -> dict[str, Any]:
    message = fold(deltas)
    empty = None if message.calls or message.reasoning or only_calls else ""
    content = empty if message.content is None else message.content
    record: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if message.reasoning is not None:
        record["reasoning"] = record["reasoning_content"] = message.reasoning
    if message.calls:
        record["tool_calls"] = [_call(call.call_id, call.name, call.arguments) for call in message.calls]
    return record


def _call(call_id: str, name: str, arguments: str, **more: int) -> dict[str, Any]:
    return {**more, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        CachedTokens(usage.cached_tokens),
    )
