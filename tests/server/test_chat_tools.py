"""Tools through the official client: whole and streamed, enforced, sent back, refused by name."""

import json
from typing import Any

import msgspec
import pytest
from fake_cluster import TOKENIZER, FakeGenerator, running_server, says
from masked_model import MaskedModel
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest

HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "other"}}
STRICT: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
MODEL = MaskedModel(TOKENIZER, 300)
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Roomy(FakeGenerator):
    @property
    def model(self) -> Any:
        return msgspec.structs.replace(super().model, max_model_len_tokens=8192)


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def obeys(request: GenerateRequest) -> list[Any]:
    """A script that draws at random what the request's grammar allows."""
    tokens = [*MODEL.draw(request.sampling.grammar, request.sampling.seed), TOKENIZER.eos_token_id]
    return [GeneratedTokens(token_ids=tokens, finish_reason="stop")]


def folded(chunks: list[Any]) -> dict[str, Any]:
    """Returns the message that a stream's chunks add up to, as OpenAI's documentation adds them."""
    message: dict[str, Any] = {"content": "", "calls": {}}
    for chunk in chunks:
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        for call in delta.tool_calls or []:
            own = message["calls"].setdefault(call.index, ["", "", ""])
            own[0] += call.id or ""
            own[1] += call.function.name or ""
            own[2] += call.function.arguments or ""
    return message


@pytest.mark.parametrize("per_step", [1, 7, 1000])
def test_calls_whole_and_streamed(per_step: int) -> None:
    second = CALL.replace("get_weather", "other").replace('"Paris"', '"</tool_call> \\"é"')
    cluster = Roomy(says(f"Let me see.\n{CALL}\n{second}", tokens_per_step=per_step))
    with running_server(cluster) as url:
        ask = client(url).chat.completions.create
        whole = ask(model="tiny", messages=HELLO, tools=[WEATHER, OTHER])
        chunks = list(ask(model="tiny", messages=HELLO, tools=[WEATHER, OTHER], stream=True))
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "get_weather"), ("function", "other")]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", '</tool_call> "é']
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    streamed = folded(chunks)
    assert streamed["content"] == "Let me see."
    assert [call[1:] for call in streamed["calls"].values()] == [
        [call.function.name, call.function.arguments] for call in calls
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert cluster.requests[0].sampling.grammar == ""


def test_arguments_are_streamed_while_they_are_generated() -> None:
    with running_server(Roomy(says(CALL))) as url:
        stream = client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], stream=True)
        parts = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].function is not None and parts[0].function.name == "get_weather"
    assert len(parts) > 10 and all(part.id is None and part.type is None for part in parts[1:])


def test_a_conversation_with_calls_is_rendered_as_the_model_wrote_it() -> None:
    cluster = Roomy(says(CALL))
    with running_server(cluster) as url:
        ask = client(url).chat.completions.create
        first = ask(model="tiny", messages=HELLO, tools=[WEATHER]).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id if first.tool_calls else "", "content": "sun"}
        ask(model="tiny", messages=[*HELLO, first, result], tools=[WEATHER])
    before, after = (TOKENIZER.decode(request.prompt_token_ids) for request in cluster.requests)
    assert '"name": "get_weather"' in before
    result_turn = "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
    assert after == f"{before}{CALL}<|im_end|>\n{result_turn}<|im_start|>assistant\n"


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_required_and_named_calls_are_enforced(choice: Any, reason: str) -> None:
    with running_server(Roomy(obeys)) as url:
        for seed in range(5):
            answer = client(url).chat.completions.create(
                model="tiny",
                messages=HELLO,
                tools=[OTHER, WEATHER],
                tool_choice=choice,
                seed=seed,
                parallel_tool_calls=False,
            )
            message = answer.choices[0].message
            assert answer.choices[0].finish_reason == reason
            assert message.content is None and message.tool_calls is not None
            (call,) = message.tool_calls
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            if choice == NAMED or call.function.name == "get_weather":
                assert call.function.name == "get_weather" and len(arguments["city"]) <= 8


def test_only_the_first_call_counts_without_parallel_calls() -> None:
    with running_server(Roomy(says(f"{CALL}\n{CALL}"))) as url:
        answer = client(url).chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], parallel_tool_calls=False
        )
    assert len(answer.choices[0].message.tool_calls or []) == 1


def test_tool_choice_none_shows_tools_and_reads_no_calls() -> None:
    cluster = Roomy(says(CALL))
    with running_server(cluster) as url:
        answer = client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (CALL, "stop")
    assert "get_weather" in TOKENIZER.decode(cluster.requests[0].prompt_token_ids)


def test_allowed_tools_leave_the_prompt_and_bind_the_model() -> None:
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    cluster = Roomy(obeys)
    with running_server(cluster) as url:
        answer = client(url).chat.completions.create(
            model="tiny", messages=HELLO, tools=[OTHER, WEATHER], tool_choice=allowed
        )
    assert {call.function.name for call in answer.choices[0].message.tool_calls or [] if call.type == "function"} == {
        "get_weather"
    }
    assert "other" in TOKENIZER.decode(cluster.requests[0].prompt_token_ids)


def test_strict_tools_are_held_to_their_schema_only_from_where_a_call_starts() -> None:
    cluster = Roomy(says("free"))
    with running_server(cluster) as url:
        client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[STRICT, OTHER])
    grammar = cluster.requests[0].sampling.grammar
    start = 'Text, then\n<tool_call>\n{"name": "get_weather", "arguments": '
    text = TOKENIZER.decode(MODEL.draw(grammar, 1, start))
    assert text.startswith(start + '{"city": ')


def test_parse_with_a_pydantic_model() -> None:
    class Point(BaseModel):
        x: int
        name: str | None

    with running_server(Roomy(obeys)) as url:
        for seed in range(5):
            answer = client(url).chat.completions.parse(model="tiny", messages=HELLO, response_format=Point, seed=seed)
            assert isinstance(answer.choices[0].message.parsed, Point)


def test_a_call_that_runs_into_the_limit_is_given_as_far_as_it_came() -> None:
    with running_server(Roomy(says(CALL))) as url:
        answer = client(url).chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], max_tokens=len(CALL) - 19
        )
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "length"
    assert call.type == "function" and call.function.arguments == '{"city": "Pa'


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_required_call_that_is_cut_in_its_head_leaves_no_text(choice: Any) -> None:
    with running_server(Roomy(says(f"{CALL}\n{CALL}"))) as url:
        ask = client(url).chat.completions.create
        for tokens in (5, 20, len(CALL) + 5, len(CALL) + 30):
            options: Any = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": tokens}
            whole = ask(model="tiny", messages=HELLO, **options).choices[0]
            assert (whole.finish_reason, whole.message.content) == ("length", None)
            assert len(whole.message.tool_calls or []) == tokens // len(CALL)
            chunks = list(ask(model="tiny", messages=HELLO, stream=True, **options))
            assert folded(chunks)["content"] == ""
        auto = ask(model="tiny", messages=HELLO, tools=[WEATHER], max_tokens=20)
    assert auto.choices[0].message.content == CALL[:20]


@pytest.mark.parametrize("per_step", [1, 7, 1000])
def test_stop_strings_are_searched_in_text_and_not_in_calls(per_step: int) -> None:
    stops = ["Paris", "city", "</tool_call>", "END"]
    said = says(f"Let me\n{CALL}\nSeen. END{CALL}", tokens_per_step=per_step)
    with running_server(Roomy(said)) as url:
        ask = client(url).chat.completions.create
        choice = ask(model="tiny", messages=HELLO, tools=[WEATHER], stop=stops).choices[0]
        streamed = folded(list(ask(model="tiny", messages=HELLO, tools=[WEATHER], stop=stops, stream=True)))
        plain = ask(model="tiny", messages=HELLO, stop=stops).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Paris"}
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let meSeen.")
    assert streamed["content"] == choice.message.content and streamed["calls"][0][2] == call.function.arguments
    assert plain.message.content == f"Let me\n{CALL[: CALL.index('city')]}"


@pytest.mark.parametrize("apart", [False, True])
def test_the_stop_token_is_no_text_also_where_special_tokens_are(apart: bool) -> None:
    def script(request: GenerateRequest) -> list[Any]:
        (step,) = says("ok", tokens_per_step=9)(request)
        assert isinstance(step, GeneratedTokens)
        if not apart:
            return [step]
        end = GeneratedTokens(token_ids=[], finish_reason="stop")
        return [msgspec.structs.replace(step, finish_reason=None), end]

    with running_server(Roomy(script)) as url:
        ask = client(url).chat.completions.create
        for shown, text in ((False, "ok"), (True, "ok<|im_end|>")):
            options = {"skip_special_tokens": False, "include_stop_str_in_output": shown}
            assert ask(model="tiny", messages=HELLO, extra_body=options).choices[0].message.content == text


@pytest.mark.parametrize(
    ("options", "param", "says_why"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "custom"),
        ({"tools": [OTHER, OTHER]}, "tools[1].function.name", "two tools"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [OTHER], "tool_choice": "any"}, "tool_choice", "one of none, auto, required"),
        ({"tools": [OTHER], "tool_choice": NAMED}, "tool_choice", "not among"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {
                "tools": [OTHER, {"type": "function", "function": {"name": "b", "parameters": {"if": {}}}}],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
            'Unimplemented keys: \\["if"\\]',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]},
            "messages[0].tool_calls[0]",
            "must be",
        ),
        (
            {
                "tools": [OTHER, {"type": "function", "function": {"name": "b", "parameters": {"if": {}}}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tools[1].function.parameters",
            "Unimplemented",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"if": {}}}},
                    {"type": "function", "function": {"name": "b", "strict": True, "parameters": {"if": {}}}},
                ]
            },
            "tools[1].function.parameters",
            "Unimplemented",
        ),
        (
            {"tools": [OTHER, {"type": "function", "function": {"name": "b", "parameters": {"type": "string"}}}]},
            "tools[1].function.parameters",
            "schema of an object",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": [1]}}],
                    },
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
            "JSON text of an object",
        ),
        ({"tools": [OTHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format", "exclude"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(options: Any, param: str, says_why: str) -> None:
    cluster = Roomy(says("ok"))
    with running_server(cluster) as url, pytest.raises(BadRequestError, match=says_why) as caught:
        client(url).chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})
    assert caught.value.param == param
    assert cluster.requests == []
