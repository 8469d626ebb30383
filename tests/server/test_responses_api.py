"""/v1/responses through OpenAI's own client, and its types as judges of every body and event."""

from typing import Any

import httpx
import openai
import pytest
from fake_cluster import MAX_MODEL_LEN_TOKENS, TOKENIZER, FakeGenerator, running_server, says
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted_deltas import AGENT_TURN, CONTENT, events_of, scripted

from dualpath.cluster.generator import GeneratedTokens, RequestError
from dualpath.server import ServerLimits
from dualpath.server.chat.deltas import Delta
from dualpath.server.responses.request import ResponsesRequest
from dualpath.server.unsupported import UNSUPPORTED

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS: Any = [
    {"type": "function", "name": "read_file", "parameters": {"type": "object"}, "strict": False},
    {"type": "custom", "name": "apply_patch", "description": "Edit files."},
]


def client(url: str, api_key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=30)


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json={"model": "tiny", "input": "hello"} | fields, timeout=30)


def prompt(cluster: FakeGenerator) -> str:
    return str(TOKENIZER.decode(cluster.requests[-1].prompt_token_ids))


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_with_its_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = scripted(monkeypatch, CONTENT, cached_tokens=16)
    with running_server(cluster) as url:
        raw = post(url, temperature=0.5, metadata={"a": "b"}).json()
        answer = client(url).responses.create(model="tiny", input="hello", instructions="Be brief.")
    assert Response.model_validate(raw).metadata == {"a": "b"}
    assert raw["temperature"] == 0.5
    assert prompt(cluster).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello")
    assert (answer.output_text, answer.status, answer.instructions) == ("Hello", "completed", "Be brief.")
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(cluster.requests[1].prompt_token_ids)
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens) == (16, 3)
    assert usage.total_tokens == usage.input_tokens + 3


def test_reasoning_text_and_calls_whole_and_streamed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, AGENT_TURN)) as url:
        whole = client(url).responses.create(model="tiny", input="hello", tools=TOOLS)
        with client(url).responses.stream(model="tiny", input="hello", tools=TOOLS) as stream:
            streamed = stream.get_final_response()
    reasoning, message, read, patch = whole.output
    assert reasoning.type == "reasoning" and reasoning.content is not None
    assert [part.text for part in reasoning.content] == ["I must look."]
    assert message.type == "message" and whole.output_text == "Looking:"
    assert read.type == "function_call"
    assert (read.call_id, read.name, read.arguments) == ("call_1", "read_file", '{"path": "a.py"}')
    assert patch.type == "custom_tool_call"
    assert (patch.call_id, patch.name, patch.input) == ("call_2", "apply_patch", "*** Begin Patch")
    assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens == 2
    ids = {"id", "parsed_arguments", "parsed"}
    assert streamed.usage == whole.usage
    for one, other in zip(streamed.output, whole.output, strict=True):
        assert one.to_dict().keys() - ids == other.to_dict().keys() - ids
        assert {k: v for k, v in one.to_dict().items() if k not in {*ids, "content"}} == {
            k: v for k, v in other.to_dict().items() if k not in {*ids, "content"}
        }


def test_every_event_is_of_its_type_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, AGENT_TURN)) as url:
        events = events_of(post(url, stream=True, tools=TOOLS).text)
    for i, (name, data) in enumerate(events):
        assert (data["type"], data["sequence_number"]) == (name, i)
        EVENTS.validate_python(data)
    assert [name.removeprefix("response.") for name, _ in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", *["reasoning_text.delta"] * 2, "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", *["output_text.delta"] * 2, "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done"),
        "output_item.done",
        *("output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"),
        "completed",
    ]
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert done == events[-1][1]["response"]["output"]


def test_an_answer_cut_off_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, CONTENT, finish_reason="length")) as url:
        whole = Response.model_validate(post(url).json())
        *_, (name, last) = events_of(post(url, stream=True).text)
    assert name == "response.incomplete"
    for response in (whole, Response.model_validate(last["response"])):
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].type == "message" and response.output[0].status == "incomplete"


def test_more_tokens_than_the_context_has_are_as_many_as_it_has() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        post(url, max_output_tokens=10**6)
        post(url, max_output_tokens=3)
    first, second = cluster.requests
    assert first.sampling.max_tokens == MAX_MODEL_LEN_TOKENS - len(first.prompt_token_ids)
    assert second.sampling.max_tokens == 3


def test_structured_output_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        number: int

    with running_server(scripted(monkeypatch, [[Delta("content", '{"number": 7}')]])) as url:
        answer = client(url).responses.parse(model="tiny", input="hello", text_format=Answer)
    assert answer.output_parsed == Answer(number=7)


def test_a_failure_midway_is_an_error_and_a_failed_response() -> None:
    cluster = FakeGenerator(
        lambda request: [GeneratedTokens(token_ids=[65]), RequestError(503, "engine_lost", "the engine is gone")]
    )
    with running_server(cluster) as url:
        *_, error, failed = events_of(post(url, stream=True).text)
    assert (error[0], error[1]["code"], error[1]["message"]) == ("error", "engine_lost", "the engine is gone")
    event = EVENTS.validate_python(failed[1])
    assert event.type == "response.failed"
    assert (event.response.error.code, event.response.status) == ("server_error", "failed")


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_required_tool_and_a_wanted_form_are_enforced_by_grammar() -> None:
    cluster = FakeGenerator(says("ok"))
    cluster.max_model_len_tokens = 4096
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}
    with running_server(cluster) as url:
        for fields in ({}, {"tools": TOOLS, "tool_choice": "required"}, {"text": form}):
            assert post(url, **fields).status_code == 200
    free, call, formed = (request.sampling.grammar for request in cluster.requests)
    assert not free and "apply_patch" in call and formed


def test_count_of_input_tokens() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        count = client(url).responses.input_tokens.count(model="tiny", input="hello", instructions="Be brief.")
        client(url).responses.create(model="tiny", input="hello", instructions="Be brief.")
    assert count.input_tokens == len(cluster.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "param", "says_why"),
    [
        ({"input": None}, "input", "input is empty"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", r"input\[0\] has role 'tool'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", r"content\[0\].*input_image"),
        ({"input": [{"role": "user"}]}, "input", r"input\[0\].content is missing"),
        ({"input": [{"type": "local_shell_call"}]}, "input", r"input\[0\] is of type 'local_shell_call'"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "no 'call_id'"),
        ({"tools": [{"type": "file_search"}]}, "tools", r"tools\[0\] is of type 'file_search'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", r"tools\[1\] needs a name that no other tool has"),
        ({"tools": [{"type": "function"}]}, "tools", "needs a name"),
        ({"tools": [{}]}, "tools", "tools is invalid"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "'mcp'"),
        ({"text": {"format": {"type": "xml"}}}, "text", "text.format must be"),
        ({"include": ["message.output_text.logprobs"]}, "include", "logprobs is not supported"),
        ({"background": True}, "background", "background is not supported"),
        ({"conversation": "c"}, "conversation", "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt is not supported"),
        ({"truncation": "auto"}, "truncation", "truncation is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "Previous response with id 'resp_x' not found"),
    ],
)
def test_refusals_name_the_field(fields: Any, param: str, says_why: str) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url, pytest.raises(openai.BadRequestError, match=says_why) as caught:
        client(url).responses.create(model="tiny", **({"input": "hello"} | fields))
    assert caught.value.param == param
    assert cluster.requests == []


# ── stored responses ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_response_is_given_again_continued_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = scripted(monkeypatch, CONTENT)
    with running_server(cluster) as url:
        api = client(url).responses
        first = api.create(model="tiny", input="hello", instructions="Only for the first.")
        assert api.retrieve(first.id) == first
        second = api.create(model="tiny", input="more", previous_response_id=first.id)
        assert second.previous_response_id == first.id
        with api.stream(model="tiny", input="and more", previous_response_id=second.id) as stream:
            third = stream.get_final_response()
        said = "user\nhello<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>"
        assert prompt(cluster) == (
            f"<|im_start|>{said}{said.replace('hello', 'more')}user\nand more<|im_end|>\n<|im_start|>assistant\n"
        )
        assert api.retrieve(third.id).output_text == "Hello"
        api.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            api.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            api.delete(first.id)
        with pytest.raises(openai.BadRequestError, match=first.id) as caught:
            api.create(model="tiny", input="again", previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


def test_an_item_is_found_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = scripted(monkeypatch, CONTENT)
    with running_server(cluster) as url:
        api = client(url).responses
        first = api.create(model="tiny", input="hello")
        reference: Any = {"type": "item_reference", "id": first.output[0].id}
        follow_up: Any = [{"role": "user", "content": "hello"}, reference, {"role": "user", "content": "more"}]
        api.create(model="tiny", input=follow_up)
        assert "assistant\nHello<|im_end|>\n<|im_start|>user\nmore" in prompt(cluster)
        follow_up[1]["id"] += "0"
        with pytest.raises(openai.NotFoundError, match="is not stored"):
            api.create(model="tiny", input=follow_up)


def test_another_key_and_another_salt_reach_no_stored_response(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, CONTENT), api_keys={"mine", "theirs"}) as url:
        mine, theirs = client(url, "mine").responses, client(url, "theirs").responses
        first = mine.create(model="tiny", input="hello", extra_body={"cache_salt": "s"})
        assert mine.retrieve(first.id).id == first.id
        for attempt in (theirs.retrieve, theirs.delete):
            with pytest.raises(openai.NotFoundError):
                attempt(first.id)
        with pytest.raises(openai.BadRequestError):
            theirs.create(model="tiny", input="x", previous_response_id=first.id, extra_body={"cache_salt": "s"})
        with pytest.raises(openai.BadRequestError):
            mine.create(model="tiny", input="x", previous_response_id=first.id)
        mine.create(model="tiny", input="x", previous_response_id=first.id, extra_body={"cache_salt": "s"})


def test_what_is_not_to_be_stored_or_has_failed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(scripted(monkeypatch, CONTENT)) as url:
        response = client(url).responses.create(model="tiny", input="hello", store=False)
        assert response.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError, match="not found"):
            client(url).responses.retrieve(response.id)


def test_the_memory_of_responses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ServerLimits(max_stored_responses=2)
    with running_server(scripted(monkeypatch, CONTENT), limits=limits) as url:
        api = client(url).responses
        first, second = (api.create(model="tiny", input="hello") for _ in range(2))
        api.retrieve(first.id)
        third = api.create(model="tiny", input="hello")
        assert [api.retrieve(kept.id).id for kept in (first, third)] == [first.id, third.id]
        with pytest.raises(openai.NotFoundError):
            api.retrieve(second.id)


# ── anything at all ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_value_of_any_field_fails_the_server() -> None:
    values: list[Any] = [None, True, -1, 2**64, 1e308, "", "x", [], [[]], [{}], {}, {"type": "x"}, [{"type": "text"}]]
    kinds = ("message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "item_reference")
    keys = ("role", "content", "call_id", "name", "namespace", "arguments", "input", "output", "summary", "id")
    items = [
        {"type": kind, "role": "user", "call_id": "c", "name": "f", "content": "x", key: value}
        for kind in kinds
        for key in (*keys, "encrypted_content")
        for value in values
    ]
    tools = [
        {"type": kind, "name": "f", key: value}
        for kind in ("function", "custom", "namespace", "allowed_tools", "web_search")
        for key in ("type", "name", "description", "parameters", "format", "tools", "mode")
        for value in values
    ]
    fields = [(name, value) for name in ResponsesRequest.__struct_fields__ for value in values]
    refused = [entry.name for entry in UNSUPPORTED if "responses" in entry.endpoints]
    fields += [(name, value) for name in refused for value in values]
    fields += [("input", [item]) for item in items] + [("tools", [tool]) for tool in tools]
    fields += [("tool_choice", tool) for tool in tools]
    with running_server(FakeGenerator(says("ok"))) as url, httpx.Client(base_url=url, timeout=30) as http:
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            for name, value in fields:
                body = {"model": "tiny", "input": "hello", name: value}
                response = http.post(path, json=body)
                assert response.status_code in (200, 400, 404), (body, response.text)
