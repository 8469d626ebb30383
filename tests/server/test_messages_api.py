"""/v1/messages through Anthropic's own client, and its types as judges of every body and event."""

from typing import Any

import anthropic
import httpx
import msgspec
import pytest
from anthropic import Anthropic
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from fake_cluster import MAX_MODEL_LEN_TOKENS, TOKENIZER, FakeGenerator, running_server, says
from pydantic import TypeAdapter
from scripted_deltas import AGENT_TURN, CONTENT, events_of, scripted

from dualpath.cluster.generator import GeneratedTokens, RequestError
from dualpath.server import ServerLimits
from dualpath.server.anthropic.request import CountTokensRequest, MessagesRequest, as_chat
from dualpath.server.chat.deltas import Delta
from dualpath.server.errors import ApiError
from dualpath.server.protocol import ChatRequest, FunctionName, decode_body

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
HELLO_TEXT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def client(url: str, **options: Any) -> Anthropic:
    return Anthropic(base_url=url, max_retries=0, timeout=30, **({"api_key": "none"} | options))


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 50} | fields
    return httpx.post(f"{url}/v1/messages", json=body, timeout=30)


def chat_of(**fields: Any) -> ChatRequest:

    body = msgspec.json.encode({"model": "tiny", "messages": HELLO, "max_tokens": 50} | fields)
    return as_chat(decode_body(body, MessagesRequest))


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stop", "reason", "sequence"), [("END", "stop_sequence", "END"), ("name", "tool_use", None)])
def test_a_stop_sequence_that_ended_the_answer_is_the_reason_also_after_calls(
    stop: str, reason: str, sequence: str | None
) -> None:
    cluster = FakeGenerator(says(f"{CALL}END" if sequence else CALL))
    cluster.max_model_len_tokens = 8192
    with running_server(cluster) as url:
        answer = post(url, tools=[TOOL], stop_sequences=[stop], max_tokens=100).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert [block["input"] for block in answer["content"]] == [{}]


def test_an_answer_with_its_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = scripted(monkeypatch, CONTENT, cached_tokens=16)
    with running_server(cluster) as url:
        raw = post(url).json()
        answer = client(url).messages.create(model="tiny", messages=HELLO, max_tokens=50)
    Message.model_validate(raw)
    assert TOKENIZER.decode(cluster.requests[0].prompt_token_ids) == HELLO_TEXT
    assert [(block.type, block.text) for block in answer.content if block.type == "text"] == [("text", "Hello")]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    prompt_tokens = len(cluster.requests[0].prompt_token_ids)
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt_tokens - 16, 16)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 3)


def test_thinking_text_and_tool_use_whole_and_streamed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = scripted(monkeypatch, AGENT_TURN, cached_tokens=8)
    with running_server(cluster) as url:
        whole = client(url).messages.create(model="tiny", messages=HELLO, max_tokens=50)
        with client(url).messages.stream(model="tiny", messages=HELLO, max_tokens=50) as stream:
            streamed = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, read, patch = whole.content
    assert thinking.type == "thinking" and (thinking.thinking, bool(thinking.signature)) == ("I must look.", True)
    assert text.type == "text" and text.text == "Looking:"
    assert read.type == "tool_use" and (read.id, read.name, read.input) == ("call_1", "read_file", {"path": "a.py"})
    assert patch.type == "tool_use" and patch.input == {"input": "*** Begin Patch"}
    assert whole.stop_reason == "tool_use"
    assert whole.usage.output_tokens_details is not None and whole.usage.output_tokens_details.thinking_tokens == 2
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]


def test_every_event_is_of_its_type_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, AGENT_TURN, cached_tokens=8)) as url:
        events = events_of(post(url, stream=True).text)
    for name, data in events:
        assert data["type"] == name
        EVENTS.validate_python(data)
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    thinking = [*block[:3], "content_block_delta", block[3]]  # and the signature
    expected = ["message_start", *thinking, *block, *block, *block, "message_delta", "message_stop"]
    assert [name for name, _ in events] == expected
    assert events[0][1]["message"]["usage"]["cache_read_input_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "script", "reason", "sequence"),
    [
        ({}, says("hello"), "end_turn", None),
        ({"stop_sequences": ["no", "l"]}, says("hello"), "stop_sequence", "l"),
        ({"max_tokens": 2}, says("hello"), "max_tokens", None),
        ({"max_tokens": 10**6}, says("x" * 300), "model_context_window_exceeded", None),
    ],
)
def test_why_it_stopped(fields: Any, script: Any, reason: str, sequence: str | None) -> None:
    with running_server(FakeGenerator(script)) as url:
        whole = post(url, **fields).json()
        *_, (_, delta), (_, _stop) = events_of(post(url, stream=True, **fields).text)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_arguments_that_are_no_json_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [[Delta("call", "f", 0, "c")], [Delta("arguments", '{"a": ', 0)]]
    with running_server(scripted(monkeypatch, steps, finish_reason="length")) as url:
        answer = Message.model_validate(post(url).json())
    assert answer.content[0].type == "tool_use" and answer.content[0].input == {"INVALID_JSON": '{"a": '}
    assert answer.stop_reason == "max_tokens"


def test_count_tokens_counts_what_the_prompt_has() -> None:
    cluster = FakeGenerator(says("ok"))
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    with running_server(cluster) as url:
        count = client(url).messages.count_tokens(model="tiny", messages=HELLO, system=system)
        client(url).messages.create(model="tiny", messages=HELLO, system=system, max_tokens=9)
        raw = httpx.post(f"{url}/v1/messages/count_tokens", json={"model": "tiny", "messages": HELLO}).json()
    assert count.input_tokens == len(cluster.requests[0].prompt_token_ids)
    assert MessageTokensCount.model_validate(raw).input_tokens == len(TOKENIZER(HELLO_TEXT)["input_ids"])


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_becomes_a_chat() -> None:
    chat = chat_of(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1234;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "?"},
                    {"type": "text", "text": "I look"},
                    {"type": "tool_use", "id": "t1", "name": "ls", "input": {"path": "."}},
                    {"type": "tool_use", "id": "t2", "name": "pwd", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "x.py"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
    )
    system, user, assistant, first, second, last = chat.messages
    assert (system.role, system.content) == ("system", "You are an agent.")
    assert user.content == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (assistant.content, assistant.reasoning_content) == ("I look", "hm")
    assert [call["function"] for call in assistant.tool_calls or []] == [
        {"name": "ls", "arguments": '{"path":"."}'},
        {"name": "pwd", "arguments": "{}"},
    ]
    assert [(m.role, m.tool_call_id, m.content) for m in (first, second)] == [
        ("tool", "t1", "x.py"),
        ("tool", "t2", ""),
    ]
    assert (last.role, last.content) == ("user", "go on")
    assert chat.continue_final_message is None


def test_a_required_tool_and_a_wanted_form_are_enforced_by_grammar() -> None:
    cluster = FakeGenerator(says("ok"))
    cluster.max_model_len_tokens = 4096
    tool = {"name": "look_up", "input_schema": {"type": "object"}}
    form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    with running_server(cluster) as url:
        for fields in ({}, {"tools": [tool], "tool_choice": {"type": "any"}}, {"output_config": form}):
            assert post(url, **fields).status_code == 200
    free, call, formed = (request.sampling.grammar for request in cluster.requests)
    assert not free and "look_up" in call and formed


def test_an_unfinished_answer_is_continued() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        post(url, messages=[*HELLO, {"role": "assistant", "content": "Sure, it"}])
    assert TOKENIZER.decode(cluster.requests[0].prompt_token_ids).endswith("<|im_start|>assistant\nSure, it")


def test_settings_become_a_chats() -> None:
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}
    chat = chat_of(
        tools=[tool | {"cache_control": {"type": "ephemeral"}, "type": "custom"}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        stop_sequences=["x"],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        metadata={"user_id": "u"},
    )
    assert chat.tools is not None
    function = chat.tools[0].function
    assert function is not None
    assert (function.name, function.description, function.parameters) == ("f", "d", {"type": "object"})
    assert function.strict is True
    assert not isinstance(chat.tool_choice, str | None) and chat.tool_choice.function == FunctionName("f")
    assert (chat.parallel_tool_calls, chat.reasoning_effort) == (False, "low")
    assert chat.chat_template_kwargs == {"enable_thinking": True}
    assert chat.response_format is not None and chat.response_format.json_schema is not None
    assert chat.response_format.json_schema["schema"] == {"type": "object"}
    assert (chat.stop, chat.temperature, chat.top_p, chat.top_k) == (["x"], 0.5, 0.9, 7)
    assert (chat.max_tokens, chat_of(thinking={"type": "disabled"}).chat_template_kwargs) == (
        None,
        {"enable_thinking": False},
    )
    choices = {kind: chat_of(tool_choice={"type": kind}).tool_choice for kind in ("auto", "any", "none")}
    assert choices == {"auto": "auto", "any": "required", "none": "none"}


@pytest.mark.parametrize(
    ("fields", "says_why"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, r"content\[0\].*'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "'tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "no 'tool_use_id'"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "document"}]}],
                    }
                ]
            },
            r"content\[0\].content\[0\].*'document'",
        ),
        ({"system": [{"type": "image"}]}, r"system\[0\].*'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "no input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool with a name"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "'xml'"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"container": "c"}, "container is not supported"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_refusals_say_where_and_why(fields: Any, says_why: str) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        response = post(url, **fields)
        with pytest.raises(anthropic.BadRequestError, match=says_why):
            client(url).messages.create(model="tiny", messages=HELLO, max_tokens=5, extra_body=fields)
    assert response.status_code == 400
    assert ErrorResponse.model_validate(response.json()).error.type == "invalid_request_error"
    assert cluster.requests == []


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_long_a_prompt_is_said_in_the_words_that_claude_code_looks_for() -> None:
    long: Any = [{"role": "user", "content": "x" * MAX_MODEL_LEN_TOKENS}]
    tokens = len(TOKENIZER(HELLO_TEXT.replace("hello", long[0]["content"]))["input_ids"])
    with running_server(FakeGenerator(says("ok"))) as url, pytest.raises(anthropic.BadRequestError) as caught:
        client(url).messages.create(model="tiny", messages=long, max_tokens=1)
    assert f"prompt is too long: {tokens} tokens > {MAX_MODEL_LEN_TOKENS - 1} maximum" in caught.value.message


def test_the_gates_and_the_routers_errors_have_anthropics_shape() -> None:
    with running_server(FakeGenerator(says("ok")), api_keys={"k"}) as url:
        for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
            assert post_with(url, headers).status_code == 200
        assert error_type(post_with(url, {"x-api-key": "wrong"}), 401) == "authentication_error"
        assert error_type(post_with(url, {}), 401) == "authentication_error"
        with pytest.raises(anthropic.AuthenticationError):
            client(url, api_key="wrong").messages.create(model="tiny", messages=HELLO, max_tokens=5)
        assert client(url, api_key="k").messages.create(model="tiny", messages=HELLO, max_tokens=5).role == "assistant"
        key = {"x-api-key": "k"}
        assert error_type(httpx.get(f"{url}/v1/messages", headers=key), 405) == "invalid_request_error"
        assert error_type(httpx.post(f"{url}/v1/messages/batches", headers=key), 404) == "not_found_error"
        assert error_type(post_with(url, key, model="huge"), 404) == "not_found_error"
        assert httpx.post(f"{url}/v1/chat/completions").json()["error"]["code"] == "invalid_api_key"
    limits = ServerLimits(max_body_bytes=10, max_inflight_requests=1)
    with running_server(FakeGenerator(says("ok")), limits=limits) as url:
        too_large = post(url)
        assert (too_large.status_code, too_large.json()["error"]["type"]) == (413, "request_too_large")


def post_with(url: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 5} | fields
    return httpx.post(f"{url}/v1/messages", json=body, headers=headers)


def error_type(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    return ErrorResponse.model_validate(response.json()).error.type


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (408, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_every_status_has_its_type_of_error(status: int, kind: str) -> None:
    response = ApiError(status, "so it is", code="c").response("/v1/messages")
    body = anthropic.types.shared.ErrorResponse.model_validate_json(bytes(response.body))
    assert (response.status_code, body.error.type, body.error.message) == (status, kind, "so it is")


def test_a_failure_midway_is_an_error_event() -> None:
    cluster = FakeGenerator(
        lambda request: [GeneratedTokens(token_ids=[65]), RequestError(503, "engine_lost", "the engine is gone")]
    )
    with running_server(cluster) as url:
        *_, (name, data) = events_of(post(url, stream=True).text)
        with pytest.raises(anthropic.APIStatusError, match="the engine is gone"):
            list(client(url).messages.create(model="tiny", messages=HELLO, max_tokens=5, stream=True))
    assert name == "error"
    assert ErrorResponse.model_validate(data).error.type == "overloaded_error"


# ── anything at all ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_value_of_any_field_fails_the_server() -> None:
    values: list[Any] = [None, True, -1, 2**64, 1e308, "", "x", [], [[]], [{}], {}, {"type": "x"}, [{"type": "text"}]]
    nested = [{"role": "user", "content": value} for value in values] + [{"role": value} for value in values]
    blocks = [
        {"role": role, "content": [{"type": kind, key: value}]}
        for role in ("user", "assistant")
        for kind in ("text", "tool_use", "tool_result", "thinking")
        for key in ("text", "input", "content", "id", "name", "tool_use_id")
        for value in values
    ]
    with running_server(FakeGenerator(says("ok"))) as url, httpx.Client(base_url=url, timeout=30) as http:
        for path, kind in (("/v1/messages", MessagesRequest), ("/v1/messages/count_tokens", CountTokensRequest)):
            fields = [(name, value) for name in (*kind.__struct_fields__, "container") for value in values]
            fields += [("messages", [message]) for message in nested + blocks]
            for name, value in fields:
                body = {"model": "tiny", "messages": HELLO, "max_tokens": 5, name: value}
                response = http.post(path, json=body)
                assert response.status_code in (200, 400, 404), (body, response.text)
                if response.status_code != 200:
                    ErrorResponse.model_validate(response.json())
