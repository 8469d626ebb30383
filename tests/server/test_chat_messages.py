"""Messages as templates need them: roles, calls, reasoning, and what a template would drop without a word."""

from typing import Any

import pytest
from fake_cluster import TOKENIZER, byte_tokenizer, running_server, says
from openai import BadRequestError
from test_chat_tools import HELLO, OTHER, Roomy, client

KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool'] %}"
    "[{{ m.role }}] {{ m.content }}{% if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}:{{ ARGUMENTS }}{% endfor %}{{ '\n' }}"
    "{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}{{ '\n' }}{% endfor %}"
)
CALLING: Any = {
    "role": "assistant",
    "content": None,
    "reasoning": "why",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": "é"}'}}],
}


def tokenizer_of(template: str, **names: str) -> Any:
    tokenizer = byte_tokenizer()
    for name, value in names.items():
        template = template.replace(name, value)
    tokenizer.chat_template = template
    return tokenizer


def prompt_of(messages: Any, tokenizer: Any, **options: Any) -> str:
    cluster = Roomy(says("ok"))
    with running_server(cluster, tokenizer) as url:
        client(url).chat.completions.create(model="tiny", messages=messages, **options)
    return str(TOKENIZER.decode(cluster.requests[0].prompt_token_ids))


def test_a_developer_is_the_system_where_the_template_has_none() -> None:
    messages: Any = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert prompt_of(messages, tokenizer_of(KNOWN_ROLES)) == "[system] Be brief.\n[user] hello\n"
    assert "<|im_start|>developer\nBe brief." in prompt_of(messages, TOKENIZER)


@pytest.mark.parametrize("role", ["function", "critic", "x" * 100])
def test_a_role_that_the_template_would_drop_is_refused(role: str) -> None:
    cluster = Roomy(says("ok"))
    with running_server(cluster, tokenizer_of(KNOWN_ROLES)) as url, pytest.raises(BadRequestError) as caught:
        client(url).chat.completions.create(model="tiny", messages=[*HELLO, {"role": role, "content": "x"}])
    assert caught.value.param == "messages[1].role" and "would drop the message" in str(caught.value)
    assert cluster.requests == []


def test_a_template_that_is_strict_about_order_says_so_itself() -> None:
    tokenizer = tokenizer_of(ALTERNATING)
    assert prompt_of(HELLO, tokenizer) == "[user] hello\n"
    with running_server(Roomy(says("ok")), tokenizer) as url, pytest.raises(BadRequestError, match="must alternate"):
        client(url).chat.completions.create(model="tiny", messages=[*HELLO, *HELLO])


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ("call.function.arguments | tojson", '{"b": 1, "a": "é"}'),
        ("call.function.arguments['a']", "é"),
        ("'' + call.function.arguments", '{"b": 1, "a": "é"}'),  # as DeepSeek's own templates do
    ],
)
def test_calls_and_reasoning_reach_the_template_as_it_wants_them(arguments: str, rendered: str) -> None:
    tokenizer = tokenizer_of(KNOWN_ROLES, ARGUMENTS=arguments)
    messages: Any = [*HELLO, CALLING, {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "r"}]}]
    assert prompt_of(messages, tokenizer) == f"[user] hello\n[assistant]  (why) f:{rendered}\n[tool] r\n"


@pytest.mark.parametrize("text", ['{"path": ', "[1]", "say hello"])
@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ("call.function.arguments", "{}"),
        ("'' + call.function.arguments", "{}"),
        ("call.function.arguments.items() | list", "[('INVALID_JSON', {!r})]"),
        ("call.function.arguments['INVALID_JSON']", "{}"),
    ],
)
def test_arguments_that_are_no_json_go_back_as_they_came(arguments: str, rendered: str, text: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    messages: Any = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    tokenizer = tokenizer_of(KNOWN_ROLES, ARGUMENTS=arguments)
    assert f"f:{rendered.format(text)}\n" in prompt_of(messages, tokenizer)
    assert f'"arguments": {text}}}\n</tool_call>' in prompt_of(messages, TOKENIZER)


def test_tools_that_the_template_does_not_show_are_refused() -> None:
    with running_server(Roomy(says("ok")), tokenizer_of(KNOWN_ROLES)) as url:
        ask = client(url).chat.completions.create
        with pytest.raises(BadRequestError, match="does not show tools") as caught:
            ask(model="tiny", messages=HELLO, tools=[OTHER])
        assert caught.value.param == "tools"
        assert ask(model="tiny", messages=HELLO, tools=[OTHER], tool_choice="none").choices[0].message.content == "ok"


def test_tools_whose_calls_nobody_can_read_are_refused_until_the_format_is_named() -> None:
    tokenizer = tokenizer_of(KNOWN_ROLES + "{{ tools }}")
    with (
        running_server(Roomy(says("ok")), tokenizer) as url,
        pytest.raises(BadRequestError, match="--tool-call-parser"),
    ):
        client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[OTHER])
    said = '{"name": "other", "parameters": {}}'
    with running_server(Roomy(says(said)), tokenizer, tool_call_parser="llama3_json") as url:
        answer = client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[OTHER])
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("other", "{}")


def test_an_unknown_parser_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ValueError, match=r"unknown reasoning parser 'x'; choose from .*qwen3"):
        from dualpath.server import create_app

        create_app(Roomy(says("ok")), TOKENIZER, reasoning_parser="x")


TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "[CALL]",
            "close": "[/CALL]",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


@pytest.mark.parametrize("per_step", [1, 100])
def test_a_tokenizers_own_response_template_wins(per_step: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.response_template = TEMPLATE
    said = '<think>Hm</think>Yes[CALL]{"name": "other", "arguments": {"a": 1}}[/CALL]'
    with running_server(Roomy(says(said, tokens_per_step=per_step)), tokenizer) as url:
        answer: Any = client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[OTHER])
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("Hm", "Yes")
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [("other", '{"a": 1}')]


def test_what_a_response_template_cant_read_is_content() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.response_template = TEMPLATE
    with running_server(Roomy(says("Yes[CALL]{no JSON[/CALL] more")), tokenizer) as url:
        answer = client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[OTHER])
    assert answer.choices[0].message.content == "Yes[CALL]{no JSON[/CALL] more"
    assert answer.choices[0].finish_reason == "stop"
