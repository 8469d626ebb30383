"""How items and tools of the Responses API become a chat, what is stored, and a message as a row of parts."""

from typing import Any

import msgspec
import pytest

from dualpath.server.chat.conversation import Conversation
from dualpath.server.chat.deltas import Delta
from dualpath.server.chat.parts import Part, Parts
from dualpath.server.errors import ApiError
from dualpath.server.protocol import ChatRequest, FunctionName, NamedToolChoice, decode_body
from dualpath.server.responses.items import Item, seal, unseal
from dualpath.server.responses.request import ResponsesRequest, as_chat
from dualpath.server.responses.store import Owner, ResponseStore, item_id, response_id
from dualpath.server.responses.tools import Tools

MINE = Owner(b"mine")


def chat_of(**fields: Any) -> ChatRequest:
    asked = decode_body(msgspec.json.encode({"input": "hello"} | fields), ResponsesRequest)
    return as_chat(asked, [], lambda _: None, Tools(asked.tools, asked.tool_choice))


def part(name: str, arguments: str) -> Part:
    return Part("call", 0, arguments, name, "c")


def test_instructions_at_the_start_are_one_system_message() -> None:
    conversation = Conversation()
    for role, text in [("system", "a"), ("developer", "b"), ("user", "c"), ("user", "d"), ("developer", "e")]:
        conversation.say(role, text)
    ab, cd, e = conversation.messages()
    assert [(m.role, len(m.content or "")) for m in (ab, cd, e)] == [("system", 2), ("user", 2), ("developer", 1)]


def test_items_of_an_agents_turn_are_one_message() -> None:
    chat = chat_of(
        instructions="Be an agent.",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Mind the style."}]},
            {"role": "user", "content": "hello"},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
            {"type": "function_call", "call_id": "1", "name": "ls", "arguments": '{"path": "."}'},
            {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "***"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x.py"}]},
            {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
        ],
    )
    system, user, assistant, first, second = chat.messages
    assert [part["text"] for part in system.content or [] if isinstance(part, dict)] == [
        "Be an agent.",
        "Mind the style.",
    ]
    assert (user.role, user.content) == ("user", "hello")
    assert (assistant.reasoning_content, assistant.content) == ("hm", "I look")
    assert assistant.tool_calls == [
        {"id": "1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "."}'}},
        {"id": "2", "type": "function", "function": {"name": "patch", "arguments": '{"input":"***"}'}},
    ]
    assert [(m.role, m.tool_call_id, m.content) for m in (first, second)] == [
        ("tool", "1", "x.py"),
        ("tool", "2", "done"),
    ]


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        ({"encrypted_content": seal("grübel"), "summary": []}, "grübel"),
        ({"encrypted_content": "gAAAA of another server", "summary": [{"type": "summary_text", "text": "s"}]}, "s"),
        ({"encrypted_content": "dualpath:???", "summary": []}, None),
        ({"summary": [], "content": [{"type": "reasoning_text", "text": "t"}], "encrypted_content": seal("u")}, "t"),
    ],
)
def test_reasoning_comes_back_with_a_client_that_stores_it(item: dict[str, Any], reasoning: str | None) -> None:
    answered = {"role": "assistant", "content": "ok"}
    (message,) = chat_of(input=[{"type": "reasoning", "id": "rs"} | item, answered]).messages
    assert message.reasoning_content == reasoning
    assert unseal(seal("x" * 1000)) == "x" * 1000 and unseal(None) == ""


def test_settings_become_a_chats() -> None:
    chat = chat_of(
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        reasoning={"effort": "low", "summary": "auto"},
        parallel_tool_calls=False,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=1,
        stream=True,
        cache_salt="s",
        tool_choice="required",
        max_output_tokens=5,
    )
    assert chat.response_format is not None
    assert chat.response_format.json_schema == {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert (chat.reasoning_effort, chat.parallel_tool_calls, chat.tool_choice) == ("low", False, "required")
    assert (chat.temperature, chat.top_p, chat.top_k, chat.seed, chat.stream) == (0.5, 0.9, 5, 1, True)
    assert (chat.cache_salt, chat.max_tokens) == ("s", None)
    assert [chat_of(text={"format": {"type": kind}}).response_format for kind in ("text",)] == [None]


def test_custom_tools_and_namespaces_are_functions_and_calls_of_them_are_not() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    given: list[dict[str, Any]] = [
        {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True},
        {"type": "custom", "name": "patch", "description": "Edit.", "format": grammar},
        {"type": "namespace", "name": "mcp", "description": "d", "tools": [{"type": "function", "name": "f"}]},
        {"type": "web_search", "external_web_access": False},
    ]
    tools = Tools(given, "auto")
    f, patch, inner = (tool.function for tool in tools.functions if tool.function)
    assert (f.name, f.strict, inner.name) == ("f", True, "mcp__f")
    assert patch.parameters is not None and patch.parameters["required"] == ["input"]
    assert patch.description == 'Edit.\n\nThe input must follow this lark grammar:\nstart: "x"'
    assert tools.given == given[:3]
    call = tools.call_item(part("mcp__f", "{}"), "id", "completed")
    assert (call["type"], call["name"], call["namespace"], call["arguments"]) == ("function_call", "f", "mcp", "{}")
    for arguments, text in [('{"input": "a\\nb"}', "a\nb"), ('{"input": 3}', '{"input": 3}'), ("{", "{")]:
        call = tools.call_item(part("patch", arguments), "id", "completed")
        assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", text)
    unknown = tools.call_item(part("invented", "{}"), "id", "completed")
    assert (unknown["type"], unknown["name"]) == ("function_call", "invented")


def test_tool_choice_names_one_tool_or_allows_some() -> None:
    given = [{"type": "function", "name": name} for name in "abc"]
    chosen = Tools(given, {"type": "function", "name": "b"}).choice
    assert isinstance(chosen, NamedToolChoice) and chosen.function == FunctionName("b")
    some = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": name} for name in "ac"]}
    allowed = Tools(given, some).choice
    assert isinstance(allowed, NamedToolChoice) and allowed.allowed_tools is not None
    assert [one.function.name for one in allowed.allowed_tools.tools] == ["a", "c"]
    assert allowed.allowed_tools.mode == "required"


def test_the_store_keeps_within_its_bytes_and_a_conversations_end_goes_before_its_beginning() -> None:
    store = ResponseStore(max_bytes=1000, max_responses=100)
    own = [Item(role="user", content="x")]
    for key in "abc":
        store.put(key, MINE, b"_" * 200, own, [], response_id("a") if key == "b" else None)
    store.conversation(response_id("b"), MINE)
    store.put("d", MINE, b"_" * 400, own, [], None)
    assert [key for key in "abcd" if _has(store, key)] == ["a", "b", "d"]
    store.conversation(response_id("b"), MINE)
    store.put("e", MINE, b"_" * 600, own, [], None)
    assert [key for key in "abcde" if _has(store, key)] == ["a", "e"]
    store.put("f", MINE, b"_" * 1000, own, [], None)
    assert not any(_has(store, key) for key in "abcdef"), "one that is too large is not kept"


def _has(store: ResponseStore, key: str) -> bool:
    try:
        store.conversation(response_id(key), MINE)
    except ApiError:
        return False
    return True


def test_an_item_is_only_its_owners() -> None:
    store = ResponseStore(max_bytes=1000, max_responses=100)
    wanted = item_id("msg", "k", 0)
    store.put("k", MINE, b"{}", [], [{"id": wanted, "type": "message"}], None)
    found = store.item(wanted, MINE)
    assert found is not None and found.id == wanted
    for other in (item_id("msg", "k", 1), item_id("msg", "z", 0), "", "msg", "msg_k"):
        assert store.item(other, MINE) is None
    assert store.item(wanted, Owner(b"theirs")) is None


def test_parts_open_grow_and_close_in_turn() -> None:
    parts = Parts()
    deltas = [Delta("content", ""), Delta("content", "a"), Delta("content", "b"), Delta("call", "f", 0, "c")]
    steps = [(step.kind, step.part.kind, step.text) for step in [*parts.take(deltas), *parts.close(), *parts.close()]]
    assert steps == [
        ("open", "content", ""),
        ("grow", "content", "a"),
        ("grow", "content", "b"),
        ("close", "content", ""),
        ("open", "call", ""),
        ("close", "call", ""),
    ]
