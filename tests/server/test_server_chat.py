"""/v1/chat/completions through the official client."""

from typing import Any

import pytest
from fake_cluster import MAX_MODEL_LEN_TOKENS, TOKENIZER, FakeGenerator, byte_tokenizer, ids, running_server, says
from openai import BadRequestError, OpenAI

HELLO: Any = [{"role": "user", "content": "hello"}]
HELLO_TOKENS = TOKENIZER("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def test_a_chat_is_rendered_with_the_models_template_and_may_use_the_rest_of_the_context() -> None:
    cluster = FakeGenerator(says("hi there", cached_tokens=0))
    with running_server(cluster) as url:
        answer = client(url).chat.completions.create(model="tiny", messages=HELLO)
    assert cluster.requests[0].prompt_token_ids == HELLO_TOKENS
    assert cluster.requests[0].sampling.max_tokens == MAX_MODEL_LEN_TOKENS - len(HELLO_TOKENS)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hi there", "stop")
    assert answer.object == "chat.completion"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_text_parts_tool_results_and_answers_sent_back() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        first = client(url).chat.completions.create(model="tiny", messages=HELLO)
        messages: Any = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            first.choices[0].message,
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ]
        client(url).chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3, max_tokens=9)
    text = TOKENIZER.decode(cluster.requests[1].prompt_token_ids)
    assert text == (
        "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert cluster.requests[1].sampling.max_tokens == 3


def test_continue_final_message_leaves_the_turn_open() -> None:
    cluster = FakeGenerator(says("ok"))
    messages: Any = [*HELLO, {"role": "assistant", "content": "Sure, it"}]
    with running_server(cluster) as url:
        client(url).chat.completions.create(
            model="tiny", messages=messages, extra_body={"continue_final_message": True}
        )
    assert TOKENIZER.decode(cluster.requests[0].prompt_token_ids).endswith("<|im_start|>assistant\nSure, it")


def test_streaming_names_the_role_then_the_text_then_usage() -> None:
    with running_server(FakeGenerator(says("grüße 😀", cached_tokens=64))) as url:
        stream = client(url).chat.completions.create(
            model="tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in own) == "grüße 😀"
        assert all(choice.delta.role is None for choice in own[1:])
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens == len(HELLO_TOKENS)
    assert last.usage.prompt_tokens_details.cached_tokens == 64


def test_logprobs_per_token() -> None:
    with running_server(FakeGenerator(says("ab", finish_reason="length"))) as url:
        answer = client(url).chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
        bare = client(url).chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
        none = client(url).chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].logprobs is not None
    first, second = answer.choices[0].logprobs.content or []
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("b", -0.5), ("c", -1.5)]
    assert bare.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content or []] == [[], []]
    assert none.choices[0].logprobs is None


def test_token_ids_are_returned_where_vllm_puts_them() -> None:
    extra = {"return_token_ids": True}
    with running_server(FakeGenerator(says("ab", finish_reason="length"))) as url:
        whole: Any = client(url).chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
        chunks: list[Any] = list(
            client(url).chat.completions.create(model="tiny", messages=HELLO, extra_body=extra, stream=True)
        )
    assert whole.prompt_token_ids == HELLO_TOKENS
    assert whole.choices[0].token_ids == ids("ab")
    assert chunks[0].prompt_token_ids == HELLO_TOKENS
    assert [token for chunk in chunks[1:] for token in chunk.choices[0].token_ids] == ids("ab")


@pytest.mark.parametrize(
    ("options", "param", "says_why"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "user"}]}, "messages", "no content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "image_url",
        ),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": HELLO, "extra_body": {"functions": [{"name": "f"}]}}, "functions", "send tools"),
        (
            {"messages": HELLO, "extra_body": {"chat_template_kwargs": {"tokenize": True}}},
            "chat_template_kwargs",
            "tokenize may not",
        ),
    ],
)
def test_refusals_name_the_field(options: Any, param: str, says_why: str) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url, pytest.raises(BadRequestError, match=says_why) as caught:
        client(url).chat.completions.create(model="tiny", **options)
    assert caught.value.param == param
    assert cluster.requests == []


def test_neutral_values_of_what_is_not_supported_pass() -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        answer = client(url).chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            presence_penalty=0.0,
            frequency_penalty=0,
            logit_bias={},
        )
    assert answer.choices[0].message.content == "ok"


def test_a_template_that_refuses_is_the_clients_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with (
        running_server(FakeGenerator(says("ok")), tokenizer) as url,
        pytest.raises(BadRequestError, match="roles must alternate"),
    ):
        client(url).chat.completions.create(model="tiny", messages=HELLO)


def test_a_model_without_a_template_says_so() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with (
        running_server(FakeGenerator(says("ok")), tokenizer) as url,
        pytest.raises(BadRequestError, match="no chat template"),
    ):
        client(url).chat.completions.create(model="tiny", messages=HELLO)
