"""Tools of the Responses API as functions of a chat, and calls of those functions back again.

A custom tool takes free text, which becomes the one argument of a function. A namespace's functions get its name before
theirs, because two namespaces may have functions of one name.
"""

from typing import Any

import msgspec

from dualpath.server.chat.parts import Part
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.protocol import AllowedTools, FunctionChoice, FunctionName, FunctionTool, NamedToolChoice, Tool

_OFFERED_UNASKED = ("web_search",)
"""Codex offers it to every server. The model can do without: it is not told of it, and the answer's `tools` lack it."""
_FREE_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


class Format(msgspec.Struct):
    type: str
    syntax: str | None = None
    definition: str | None = None


class Definition(msgspec.Struct):
    """A tool as it is sent; which fields it must have depends on its type."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: Format | None = None
    tools: "list[Definition] | None" = None


class Choice(msgspec.Struct):
    type: str
    name: str = ""
    mode: str = "auto"
    tools: list[Definition] = []


class Origin(msgspec.Struct, frozen=True):
    """What a function was before it became one."""

    name: str
    custom: bool = False
    namespace: str | None = None


class Tools:
    """The tools of one request: `functions` and `choice` for the chat, `given` as the answer repeats them."""

    def __init__(self, given: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> None:
        self.given = [tool for tool in given or [] if tool.get("type") not in _OFFERED_UNASKED]
        self.functions: list[Tool] = []
        self._origins: dict[str, Origin] = {}
        for i, definition in enumerate(_convert(self.given, list[Definition], "tools")):
            self._add(definition, f"tools[{i}]", None)
        self.choice = self._chosen(choice)

    def call_item(self, part: Part, item_id: str, status: str) -> dict[str, Any]:
        """Returns the output item of a call."""
        origin = self._origin(part.name)
        item: dict[str, Any] = {"id": item_id, "call_id": part.call_id, "name": origin.name, "status": status}
        if origin.namespace is not None:
            item["namespace"] = origin.namespace
        if origin.custom:
            return {"type": "custom_tool_call", **item, "input": _free_text(part.text)}
        return {"type": "function_call", **item, "arguments": part.text}

    def is_custom(self, part: Part) -> bool:
        return self._origin(part.name).custom

    @staticmethod
    def function_name(name: str, namespace: str | None) -> str:
        return name if namespace is None else f"{namespace}__{name}"

    def _origin(self, function: str) -> Origin:
        return self._origins.get(function) or Origin(function)

    def _add(self, tool: Definition, where: str, namespace: str | None) -> None:
        if tool.type == "namespace" and namespace is None:
            for i, inner in enumerate(tool.tools or []):
                self._add(inner, f"{where}.tools[{i}]", tool.name)
            return
        if tool.type not in ("function", "custom"):
            raise _unsupported("tools", where, tool.type)
        function = self.function_name(tool.name, namespace)
        if not tool.name or function in self._origins:
            raise bad_parameter("tools", f"{where} needs a name that no other tool has, not {tool.name!r}")
        custom = tool.type == "custom"
        self._origins[function] = Origin(tool.name, custom, namespace)
        description = _with_format(tool) if custom else tool.description
        parameters = _FREE_TEXT if custom else tool.parameters
        self.functions.append(
            Tool(type="function", function=FunctionTool(function, description, parameters, tool.strict))
        )

    def _chosen(self, choice: str | dict[str, Any] | None) -> str | NamedToolChoice | None:
        if choice is None or isinstance(choice, str):
            return choice
        wanted = _convert(choice, Choice, "tool_choice")
        match wanted.type:
            case "function" | "custom":
                return NamedToolChoice(type="function", function=FunctionName(wanted.name))
            case "allowed_tools":
                chosen = [FunctionChoice("function", FunctionName(tool.name)) for tool in wanted.tools]
                return NamedToolChoice("allowed_tools", allowed_tools=AllowedTools(wanted.mode, chosen))
        raise _unsupported("tool_choice", "tool_choice", wanted.type)


def _with_format(tool: Definition) -> str | None:
    if tool.format is None or tool.format.definition is None:
        return tool.description
    grammar = f"The input must follow this {tool.format.syntax} grammar:\n{tool.format.definition}"
    return f"{tool.description}\n\n{grammar}" if tool.description else grammar


def _free_text(arguments: str) -> str:
    """Returns the text in a custom tool's arguments, or all of them if the model wrote something else."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, str])["input"]
    except (msgspec.DecodeError, KeyError, RecursionError):
        return arguments


def _convert(given: Any, kind: Any, param: str) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise bad_parameter(param, f"{param} is invalid: {error}") from None


def _unsupported(param: str, where: str, kind: str) -> ApiError:
    return bad_parameter(
        param,
        f"{where} is of type {kind!r}, which this server does not have; it takes function, custom and namespace tools, "
        "which the client runs",
        code="unsupported_parameter",
    )
