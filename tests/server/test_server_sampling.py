"""Sampling fields: what the cluster is asked for, the bounds of every number, prompts that are scored, and defaults."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from fake_cluster import EOS, MAX_MODEL_LEN_TOKENS, VOCABULARY_TOKENS, FakeGenerator, ids, running_server, says

from dualpath.server.codec import StopMatcher, TextCodec
from dualpath.server.protocol import ChatRequest, CompletionRequest
from dualpath.spec.generation_defaults import GenerationDefaults
from dualpath.spec.sampling import SamplingParams


@pytest.fixture(scope="module")
def cluster() -> FakeGenerator:
    return FakeGenerator(says("ok"))


@pytest.fixture(scope="module")
def url(cluster: FakeGenerator) -> Iterator[str]:
    with running_server(cluster) as address:
        yield address


def post(url: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    response = httpx.post(url + path, json={"prompt": "hi"} | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_every_field_reaches_the_cluster(url: str, cluster: FakeGenerator) -> None:
    post(
        url,
        min_p=0.1,
        frequency_penalty=-2,
        presence_penalty=1.5,
        repetition_penalty=1.2,
        logit_bias={"5": 3, "6": -100},
        bad_words=["to"],
        allowed_token_ids=[7, 8, 7],
        top_k=-1,
        temperature=1e-9,
        logprobs=1,
        logprobs_mode="processed_logprobs",
        prompt_logprobs=2,
        seed=-3,
    )
    asked = cluster.requests[-1].sampling
    assert asked == SamplingParams(
        max_tokens=16,
        temperature=0.0,
        min_p=0.1,
        frequency_penalty=-2,
        presence_penalty=1.5,
        repetition_penalty=1.2,
        logit_bias=((5, 3), (6, -100)),
        bad_words=(tuple(ids("to")),),
        allowed_token_ids=(7, 8),
        stop_token_ids=(EOS,),
        logprobs=1,
        logprobs_mode="processed_logprobs",
        prompt_logprobs=2,
        seed=2**63 - 3,
    )


EXTREMES: list[Any] = [
    0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, 1e-320, 1e-6, 1e300, -1e300,
    "1", True, [], [0], [2**64], [-1], list(range(VOCABULARY_TOKENS)), [""], ["a" * 300],
    {}, {"1": 1e300}, {"5": -100.0}, [[1]],
]  # fmt: skip


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_no_value_of_any_field_breaks_the_server_or_a_message(
    url: str, cluster: FakeGenerator, kind: type[msgspec.Struct]
) -> None:
    """Each field × extremes: 200 or an error of the client's; what passed can be encoded for an engine."""
    chat = kind is ChatRequest
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    passed = 0
    with httpx.Client(base_url=url) as http:
        for field, value in itertools.product(kind.__struct_fields__, EXTREMES):
            before = len(cluster.requests)
            response = http.post(path, content=json.dumps(body | {field: value, "stop": "zzz"}))
            assert response.status_code in (200, 400, 404), (field, value, response.text)
            for request in cluster.requests[before:]:
                passed += 1
                again = msgspec.msgpack.decode(msgspec.msgpack.encode(request.sampling), type=SamplingParams)
                assert again == request.sampling
    assert passed > 50


def test_echo_with_logprobs_puts_the_prompt_first(url: str) -> None:
    answer = post(url, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    assert answer["text"] == "hio"
    assert answer["logprobs"]["tokens"] == ["h", "i", "o"]
    assert answer["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]
    assert answer["logprobs"]["top_logprobs"] == [None, {"i": -1.5, "j": -1.0}, {"o": -0.5}]
    assert answer["logprobs"]["text_offset"] == [0, 1, 2]
    assert "prompt_logprobs" not in answer


def test_no_token_is_generated_at_max_tokens_0(url: str, cluster: FakeGenerator) -> None:
    """Also for a prompt that fills the whole context."""
    answer = post(url, prompt=[70] * MAX_MODEL_LEN_TOKENS, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert len(choice["logprobs"]["tokens"]) == MAX_MODEL_LEN_TOKENS
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert cluster.requests[-1].sampling.max_tokens == 1
    assert post(url, max_tokens=0)["choices"][0]["text"] == ""


def test_echo_without_logprobs_scores_nothing(url: str, cluster: FakeGenerator) -> None:
    assert post(url, prompt=ids("hi"), echo=True, max_tokens=2)["choices"][0]["text"] == "hiok"
    assert cluster.requests[-1].sampling.prompt_logprobs is None
    events = httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "echo": True, "stream": True}).text
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in events.splitlines() if line.startswith("data: {")]
    assert "".join(texts) == "hiok" and texts[0].startswith("hi")


def test_prompt_logprobs_have_vllm_s_shape(url: str) -> None:
    expected = [None, {"72": {"logprob": -1.5, "rank": 2, "decoded_token": "i"}}]
    expected[1]["73"] = {"logprob": -1.0, "rank": 1, "decoded_token": "j"}  # type: ignore[index]
    assert post(url, prompt_logprobs=1)["choices"][0]["prompt_logprobs"] == expected
    messages = [{"role": "user", "content": "hi"}]
    chat = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, "prompt_logprobs": 0}).json()
    assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_too_many_prompt_logprobs_are_refused(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": [[1] * 200] * 64, "prompt_logprobs": 20})
    assert response.status_code == 400
    assert "268800 log-probabilities" in response.json()["error"]["message"]


@pytest.mark.parametrize(("asked", "kept"), [(3, 3), (200, 200), (-1, MAX_MODEL_LEN_TOKENS - 10), (256, None)])
def test_a_prompt_is_cut_to_its_last_tokens(url: str, cluster: FakeGenerator, asked: int, kept: int | None) -> None:
    prompt = [i % 200 for i in range(300)]
    body = {"prompt": prompt, "max_tokens": 10, "truncate_prompt_tokens": asked}
    response = httpx.post(f"{url}/v1/completions", json=body)
    if kept is None:
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert response.json()["usage"]["prompt_tokens"] == kept
        assert cluster.requests[-1].prompt_token_ids == prompt[-kept:]


def test_a_stop_string_may_be_shown() -> None:
    with running_server(FakeGenerator(says("one two three"))) as url:
        for text, more in (("one ", {}), ("one two", {"include_stop_str_in_output": True})):
            assert post(url, stop="two", max_tokens=50, **more)["choices"][0]["text"] == text
        whole = post(url, max_tokens=50, include_stop_str_in_output=True, skip_special_tokens=False)
        assert whole["choices"][0]["text"] == "one two three<|im_end|>"
    matcher = StopMatcher(["abc", "bcd"], include=True)
    assert [matcher.push(c) for c in "xabcd"] == ["x", "", "", "abc", "d"]


def test_the_models_defaults_apply_where_a_request_says_nothing() -> None:
    defaults = GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1, max_tokens=5,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    cluster = FakeGenerator(says("a long answer"), defaults)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    with running_server(cluster) as url:
        httpx.post(f"{url}/v1/chat/completions", json=chat)
        bare = cluster.requests[-1].sampling
        assert (bare.temperature, bare.top_k, bare.top_p, bare.min_p) == (0.6, 20, 0.95, 0.01)
        assert (bare.repetition_penalty, bare.max_tokens) == (1.1, 5)
        assert bare.logprobs_mode == "processed_logprobs"
        given = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 9}
        httpx.post(f"{url}/v1/chat/completions", json=chat | given | {"logprobs_mode": "raw_logprobs"})
        assert cluster.requests[-1].sampling == SamplingParams(
            max_tokens=9, temperature=0, stop_token_ids=(EOS,), seed=cluster.requests[-1].sampling.seed
        )


# ── tokens' names and bytes ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_part_of_a_character_has_its_own_bytes() -> None:
    """The euro sign is three tokens; each has one byte, and its alternatives keep apart."""
    with running_server(FakeGenerator(says("€", finish_reason="length"))) as url:
        chat = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
        ).json()
        content = chat["choices"][0]["logprobs"]["content"]
        assert bytes(b for token in content for b in token["bytes"]) == "€".encode()
        assert content[0]["token"] == "\ufffd"
        logprobs = post(url, logprobs=4, max_tokens=3)["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
        assert [len(top) for top in logprobs["top_logprobs"]] == [4, 4, 4]
        named = post(url, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
        token_id = ids("€")[0]
        assert named["tokens"] == [f"token_id:{token_id}"] == list(named["top_logprobs"][0])


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = [("<unk>", 0.0), ("▁the", -1.0), ("the", -1.0), ("<0xE2>", -2.0), ("a", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [codec.token_bytes(i) for i in range(1, 6)] == [b" the", b"the", b"\xe2", b"a", b"<s>"]
    assert codec.token_text(1) == " the"
    assert codec.token_bytes(77) == b""


def test_tokens_with_one_text_keep_apart_in_completions() -> None:
    from dualpath.cluster.generator import TokenLogprob
    from dualpath.server.logprobs import LogprobShapes

    class Codec:
        def token_text(self, token_id: int) -> str:
            return "a"

        def token_bytes(self, token_id: int) -> bytes:
            return b"a"

    shapes = LogprobShapes(Codec(), tokens_as_ids=False)  # type: ignore[arg-type]
    entry = [TokenLogprob(4, -1.0), TokenLogprob(9, -0.5), TokenLogprob(4, -1.0)]
    shaped, offset = shapes.completion([entry], 3)
    assert shaped["top_logprobs"] == [{"a": -1.0, "token_id:9": -0.5}]
    assert (shaped["text_offset"], offset) == ([3], 4)
