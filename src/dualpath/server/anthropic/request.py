"""Anthropic's Messages API, in: its request bodies, and how they become a chat."""

from typing import Any, ClassVar

import msgspec

from dualpath.server.chat.conversation import Conversation
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.protocol import (
    ChatMessage,
    ChatRequest,
    FunctionName,
    FunctionTool,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)

_VOLATILE = "x-anthropic-billing-header:"
"""Claude Code's first system block starts so. It changes with every request: with it, no prompt would be a prefix."""


class Block(msgspec.Struct):
    """A content block: text, tool_use, tool_result, thinking or redacted_thinking."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None


class Turn(msgspec.Struct):
    role: str
    content: str | list[Block]


class ToolDefinition(msgspec.Struct):
    """A tool that the client runs. Tools without an input_schema are Anthropic's own."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: str


class OutputFormat(msgspec.Struct):
    type: str
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/messages/count_tokens."""

    api: ClassVar[str] = "messages"

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_salt: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def as_chat(asked: CountTokensRequest) -> ChatRequest:
    """Returns the same request as a chat, without a limit of tokens. Raises ApiError (400)."""
    messages = _messages(asked)
    prefilled = bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls
    config, choice = asked.output_config or OutputConfig(), asked.tool_choice
    chat = ChatRequest(
        model=asked.model,
        messages=messages,
        tools=[_tool(i, tool) for i, tool in enumerate(asked.tools)] if asked.tools else None,
        tool_choice=_tool_choice(choice) if choice else None,
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        response_format=_response_format(config.format or asked.output_format),
        reasoning_effort=config.effort,
        chat_template_kwargs={"enable_thinking": asked.thinking.type != "disabled"} if asked.thinking else None,
        continue_final_message=prefilled or None,
        cache_salt=asked.cache_salt,
    )
    if isinstance(asked, MessagesRequest):
        chat.stream = asked.stream
        chat.stop = asked.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = asked.temperature, asked.top_p, asked.top_k
    return chat


def _messages(asked: CountTokensRequest) -> list[ChatMessage]:
    conversation = Conversation()
    for text in _texts(asked.system or [], "system"):
        if not text.startswith(_VOLATILE):
            conversation.say("system", text)
    for i, turn in enumerate(asked.messages):
        where = f"messages[{i}]"
        if turn.role not in ("user", "assistant", "system"):
            raise bad_parameter("messages", f"{where} has role {turn.role!r}; it must be user, assistant or system")
        if isinstance(turn.content, str):
            conversation.say(turn.role, turn.content)
            continue
        for j, block in enumerate(turn.content):
            _add_block(conversation, turn.role, block, f"{where}.content[{j}]")
    return conversation.messages()


def _add_block(conversation: Conversation, role: str, block: Block, where: str) -> None:
    match block.type, role:
        case "text", _:
            conversation.say(role, _given(block.text, "text", where))
        case "thinking", "assistant":
            conversation.think(_given(block.thinking, "thinking", where))
        case "redacted_thinking", "assistant":
            pass  # another server's secret
        case "tool_use", "assistant":
            arguments = msgspec.json.encode(block.input or {}).decode()
            conversation.call(_given(block.id, "id", where), _given(block.name, "name", where), arguments)
        case "tool_result", "user":
            texts = _texts(block.content or "", f"{where}.content")
            conversation.result(_given(block.tool_use_id, "tool_use_id", where), "\n".join(texts))
        case _:
            raise _unsupported(block.type, f"{where} (of role {role})")


def _texts(content: str | list[Block], where: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    for i, block in enumerate(content):
        if block.type != "text":
            raise _unsupported(block.type, f"{where}[{i}]")
    return [_given(block.text, "text", f"{where}[{i}]") for i, block in enumerate(content)]


def _given(value: str | None, name: str, where: str) -> str:
    if value is None:
        raise bad_parameter("messages", f"{where} has no {name!r}")
    return value


def _unsupported(kind: str, where: str) -> ApiError:
    message = (
        f"{where} is of type {kind!r}, which this server does not take there; it takes text, an assistant's thinking "
        "and tool_use, and a user's tool_result"
    )
    return bad_parameter("messages", message, code="unsupported_content")


def _tool(index: int, tool: ToolDefinition) -> Tool:
    if tool.type not in (None, "custom"):
        raise bad_parameter(
            "tools",
            f"tools[{index}] is of type {tool.type!r}, a tool of Anthropic's own; this server takes tools with an "
            "input_schema, which the client runs",
            code="unsupported_parameter",
        )
    if tool.input_schema is None:
        raise bad_parameter("tools", f"tools[{index}] has no input_schema")
    function = FunctionTool(tool.name, tool.description, tool.input_schema, tool.strict)
    return Tool(type="function", function=function)


def _tool_choice(choice: ToolChoice) -> str | NamedToolChoice:
    match choice.type:
        case "auto" | "none":
            return choice.type
        case "any":
            return "required"
        case "tool" if choice.name is not None:
            return NamedToolChoice(type="function", function=FunctionName(choice.name))
    raise bad_parameter("tool_choice", "tool_choice must be of type auto, any, none, or tool with a name")


def _response_format(wanted: OutputFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        raise bad_parameter("output_config", f"the output format {wanted.type!r} is not known; give a json_schema")
    return ResponseFormat("json_schema", {"name": "output", "schema": wanted.schema, "strict": True})
