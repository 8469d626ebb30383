"""What a chat request says of tools: which are offered, and whether the model must call one."""

import re
from typing import Any, Literal

import msgspec

from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import ChatRequest, FunctionTool

_NAME = re.compile(r"[\w.:/-]{1,128}")
_MODES = ("none", "auto", "required")


class ToolUse(msgspec.Struct, frozen=True):
    """The functions that may be called now. `named`: the request names the only one."""

    functions: list[FunctionTool]
    mode: Literal["none", "auto", "required"]
    named: bool = False

    @property
    def offered(self) -> bool:
        return bool(self.functions) and self.mode != "none"

    def parameters(self, only_strict: bool = False) -> dict[str, dict[str, Any]]:
        """Returns each function's parameters; with `only_strict`, any object for functions that are not strict."""
        anything = {"type": "object"}
        return {
            one.name: {**anything, **(one.parameters or {})} if one.strict or not only_strict else anything
            for one in self.functions
        }


def tool_use(asked: ChatRequest) -> ToolUse:
    """Raises ApiError (400) that names the tool or the choice at fault."""
    functions = [_function(index, tool) for index, tool in enumerate(asked.tools or [])]
    names: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in names:
            raise bad_parameter(f"tools[{index}].function.name", f"two tools are called {function.name!r}")
        names.add(function.name)
    choice = asked.tool_choice
    if choice is None:
        return ToolUse(functions, "auto" if functions else "none")
    if isinstance(choice, str):
        return _by_mode(functions, choice)
    if choice.type == "function" and choice.function is not None:
        return ToolUse(_chosen(functions, [choice.function.name]), "required", named=True)
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        return _by_mode(_chosen(functions, [one.function.name for one in allowed.tools]), allowed.mode)
    raise bad_parameter("tool_choice", f"tool_choice of type {choice.type!r} is not supported; name a function")


def _function(index: int, tool: Any) -> FunctionTool:
    if tool.type != "function" or tool.function is None:
        raise bad_parameter(
            f"tools[{index}].type",
            f"a tool of type {tool.type!r} is not supported; give one of type function with a function",
            code="unsupported_parameter",
        )
    if not _NAME.fullmatch(tool.function.name):
        raise bad_parameter(
            f"tools[{index}].function.name", "a function's name is 1 to 128 letters, digits, and _ . : / -"
        )
    function: FunctionTool = tool.function
    if function.parameters and function.parameters.get("type", "object") != "object":
        param = f"tools[{index}].function.parameters"
        raise bad_parameter(param, f"{param} must be the schema of an object, with type: object")
    return function


def _by_mode(functions: list[FunctionTool], mode: str) -> ToolUse:
    if mode not in _MODES:
        raise bad_parameter(
            "tool_choice", f"tool_choice is {mode!r}; it must be one of {', '.join(_MODES)}, or a function"
        )
    if mode == "required" and not functions:
        raise bad_parameter("tool_choice", "tool_choice is 'required' and there are no tools; give tools")
    return ToolUse(functions, mode if functions else "none")  # type: ignore[arg-type]


def _chosen(functions: list[FunctionTool], names: list[str]) -> list[FunctionTool]:
    chosen, known = set(names), {function.name for function in functions}
    for name in names:
        if name not in known:
            raise bad_parameter("tool_choice", f"tool_choice names {name!r}, which is not among the tools")
    return [function for function in functions if function.name in chosen]
