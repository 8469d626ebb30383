"""OpenAI's Responses API, in: its request body, and how it becomes a chat."""

from typing import Any, ClassVar

import msgspec

from dualpath.server.chat.conversation import Conversation
from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import ChatRequest, ResponseFormat
from dualpath.server.responses.items import Item, Items, add_items
from dualpath.server.responses.tools import Tools

_ENCRYPTED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"


class Format(msgspec.Struct):
    """`type` is text, json_object or json_schema."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct):
    format: Format | None = None


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class InputTokensRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/responses/input_tokens: what makes the prompt."""

    api: ClassVar[str] = "responses"

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    cache_salt: str | None = None


class ResponsesRequest(InputTokensRequest, kw_only=True):
    """Body of /v1/responses."""

    stream: bool | None = None
    store: bool | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def seals_reasoning(self) -> bool:
        """Whether reasoning comes back in a form that a client without a memory can send again."""
        return _ENCRYPTED in (self.include or ())


def own_items(asked: InputTokensRequest) -> list[Item]:
    """Returns the items that the request itself brings."""
    if isinstance(asked.input, str):
        return [Item(role="user", content=asked.input)]
    return asked.input or []


def as_chat(asked: InputTokensRequest, earlier: list[Item], known: Items, tools: Tools) -> ChatRequest:
    """Returns the same request as a chat, without a limit of tokens. Raises ApiError (400).

    `earlier` are the items of the conversation that it continues; `known` finds an item by its id.
    """
    conversation = Conversation()
    if asked.instructions:
        conversation.say("system", asked.instructions)
    add_items(conversation, earlier, known, tools)
    add_items(conversation, own_items(asked), known, tools)
    effort = asked.reasoning.effort if asked.reasoning else None
    chat = ChatRequest(
        model=asked.model,
        messages=conversation.messages(),
        tools=tools.functions or None,
        tool_choice=tools.choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        response_format=_response_format(asked.text.format if asked.text else None),
        reasoning_effort=effort,
        cache_salt=asked.cache_salt,
    )
    if isinstance(asked, ResponsesRequest):
        if _LOGPROBS in (asked.include or ()):
            raise bad_parameter(
                "include", f"{_LOGPROBS} is not supported by this server; leave it out", code="unsupported_parameter"
            )
        chat.stream, chat.seed = asked.stream, asked.seed
        chat.temperature, chat.top_p, chat.top_k = asked.temperature, asked.top_p, asked.top_k
    return chat


def _response_format(wanted: Format | None) -> ResponseFormat | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ResponseFormat("json_object")
    if wanted.type != "json_schema" or wanted.schema is None:
        raise bad_parameter("text", "text.format must be of type text, json_object, or json_schema with a schema")
    schema = {"name": wanted.name or "output", "schema": wanted.schema, "strict": wanted.strict}
    return ResponseFormat("json_schema", schema)
