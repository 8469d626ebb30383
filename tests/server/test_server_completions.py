"""/v1/completions through the official client."""

from typing import Any

import httpx
import pytest
from fake_cluster import EOS, MAX_MODEL_LEN_TOKENS, FakeGenerator, ids, running_server, says
from openai import OpenAI

from dualpath.cluster.generator import GeneratedTokens


def client(url: str, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30, **options)


def test_text_prompt_usage_and_the_default_of_16_tokens() -> None:
    cluster = FakeGenerator(says("x" * 50))
    with running_server(cluster) as url:
        answer = client(url).completions.create(model="tiny", prompt="héllo")
    assert cluster.requests[0].prompt_token_ids == ids("héllo")
    assert cluster.requests[0].sampling.stop_token_ids == (EOS,)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.object) == ("x" * 16, "length", "text_completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 16, 22)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_token_id_prompt_and_cached_tokens() -> None:
    cluster = FakeGenerator(says("ok", cached_tokens=64))
    with running_server(cluster) as url:
        answer = client(url).completions.create(model="tiny", prompt=list(range(100)))
    assert cluster.requests[0].prompt_token_ids == list(range(100))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == "ok"  # the end-of-sequence token is counted but is no text
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 64


@pytest.mark.parametrize("prompts", [["ab", "cde"], [ids("ab"), ids("cde")]])
def test_several_prompts_and_n_number_their_choices(prompts: Any) -> None:
    def script(request: Any) -> list[Any]:
        return says(f"{len(request.prompt_token_ids)}:{request.sampling.seed}", cached_tokens=1)(request)

    cluster = FakeGenerator(script)
    with running_server(cluster) as url:
        answer = client(url).completions.create(model="tiny", prompt=prompts, n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["2:7", "2:8", "3:7", "3:8"]
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == 5  # a prompt counts once, however many choices it has
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_without_a_seed_each_prompt_draws_its_own() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        client(url).completions.create(model="tiny", prompt=["same", "same"])
    first, second = (request.sampling.seed for request in cluster.requests)
    assert first != second
    assert 0 <= first < 2**63


def test_streaming_gives_the_text_in_order_then_usage() -> None:
    text = "grüße, 😀 and the rest"
    with running_server(FakeGenerator(says(text, tokens_per_step=3, cached_tokens=128))) as url:
        stream = client(url).completions.create(
            model="tiny", prompt="hi", max_tokens=100, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert last.usage.completion_tokens == len(ids(text)) + 1
    assert last.usage.prompt_tokens_details.cached_tokens == 128


def test_the_stream_on_the_wire_ends_with_done_and_has_no_usage_unasked() -> None:
    body = {"model": "tiny", "prompt": "hi", "stream": True}
    with running_server(FakeGenerator(says("ok"))) as url:
        response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert len(events) == 4
    assert all(event.startswith("data: ") for event in events)
    assert "usage" not in response.text


def test_streamed_choices_interleave_and_each_is_whole() -> None:
    def script(request: Any) -> list[Any]:
        return says(f"answer {request.sampling.seed}")(request)

    with running_server(FakeGenerator(script)) as url:
        stream = client(url).completions.create(model="tiny", prompt="hi", n=5, seed=10, stream=True, max_tokens=50)
        texts = [""] * 5
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [f"answer {seed}" for seed in range(10, 15)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
def test_a_stop_string_over_several_tokens_cuts_text_and_cancels(stream: bool, tokens_per_step: int) -> None:
    cluster = FakeGenerator(says("one STO two STOP three", tokens_per_step=tokens_per_step, finish_reason="length"))
    options: Any = {"model": "tiny", "prompt": "hi", "stop": ["nope", "STOP"], "max_tokens": 100}
    with running_server(cluster) as url:
        if stream:
            chunks = list(client(url).completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].text for chunk in chunks)
            reason: str | None = chunks[-1].choices[0].finish_reason
        else:
            answer = client(url).completions.create(**options)
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            assert answer.usage is not None
            assert answer.usage.completion_tokens == len("one STO two STOP")
        assert (text, reason) == ("one STO two ", "stop")
        assert cluster.all_closed.wait(5)


def test_a_stop_string_that_never_completes_is_text_after_all() -> None:
    with running_server(FakeGenerator(says("ends in ST"))) as url:
        answer = client(url).completions.create(model="tiny", prompt="hi", stop="STOP", max_tokens=50)
    assert answer.choices[0].text == "ends in ST"


def test_stop_strings_wait_for_min_tokens() -> None:
    with running_server(FakeGenerator(says("a.b.c.d"))) as url:
        answer = client(url).completions.create(model="tiny", prompt="hi", stop=".", extra_body={"min_tokens": 3})
    assert answer.choices[0].text == "a.b"


def test_a_stop_token_that_has_text_is_counted_but_not_shown() -> None:
    cluster = FakeGenerator(lambda request: [GeneratedTokens(token_ids=ids("ab!"), finish_reason="stop")])
    with running_server(cluster) as url:
        answer = client(url).completions.create(model="tiny", prompt="hi", extra_body={"stop_token_ids": ids("!")})
    assert answer.choices[0].text == "ab"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_logprobs_run_parallel_to_tokens() -> None:
    with running_server(FakeGenerator(says("ab"))) as url:
        answer = client(url).completions.create(model="tiny", prompt="hi", logprobs=2)
        chunks = list(client(url).completions.create(model="tiny", prompt="hi", logprobs=0, stream=True))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "<|im_end|>"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry.text_offset for entry in streamed if entry] == [[0], [1], [2]]
    assert next(entry.top_logprobs for entry in streamed if entry) == [{"a": -0.5}]


def test_minus_infinity_is_valid_json() -> None:
    def script(request: Any) -> list[Any]:
        (step, *_) = says("a", finish_reason="length")(request)
        assert isinstance(step, GeneratedTokens) and step.logprobs
        entry = [type(step.logprobs[0][0])(token_id=step.token_ids[0], logprob=float("-inf"))]
        return [GeneratedTokens(token_ids=step.token_ids, logprobs=[entry], finish_reason="length")]

    with running_server(FakeGenerator(script)) as url:
        answer = client(url).completions.create(model="tiny", prompt="hi", logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [-9999.0]


def test_vllm_extensions_reach_the_cluster() -> None:
    cluster = FakeGenerator(says("ok"))
    extra = {
        "top_k": 5,
        "min_tokens": 2,
        "stop_token_ids": [3, EOS],
        "ignore_eos": True,
        "cache_salt": "team-a",
        "return_token_ids": True,
        "a_field_of_tomorrow": {"is": "ignored"},
        "best_of": 1,
        "logit_bias": None,
    }
    with running_server(cluster) as url:
        answer: Any = client(url).completions.create(
            model="tiny", prompt="hi", temperature=0, top_p=0.5, max_tokens=9, user="someone", extra_body=extra
        )
        chunks: list[Any] = list(
            client(url).completions.create(
                model="tiny", prompt="hi", stream=True, extra_body={"return_token_ids": True}
            )
        )
    request = cluster.requests[0]
    assert request.tenant == "team-a"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 5)
    assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (3, EOS))
    assert answer.choices[0].prompt_token_ids == ids("hi")
    assert answer.choices[0].token_ids == [*ids("ok"), EOS]
    assert [chunk.choices[0].token_ids for chunk in chunks] == [[*ids("o")], [*ids("k")], [EOS]]
    assert chunks[0].choices[0].prompt_token_ids == ids("hi")
    assert not hasattr(chunks[1].choices[0], "prompt_token_ids")


def test_without_max_tokens_the_default_shrinks_to_the_context() -> None:
    cluster = FakeGenerator(says("x" * 50))
    with running_server(cluster) as url:
        client(url).completions.create(model="tiny", prompt=[1] * (MAX_MODEL_LEN_TOKENS - 3))
    assert cluster.requests[0].sampling.max_tokens == 3


def test_prompt_text_longer_than_a_thread_hop_is_tokenised_whole() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url, pytest.raises(Exception, match="5003"):
        client(url).completions.create(model="tiny", prompt="é" * 2500 + "abc", max_tokens=1)
    assert cluster.requests == []
