"""Every way a request can go wrong reaches the client as an error of OpenAI's shape."""

import re
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from fake_cluster import FakeGenerator, running_server, says
from openai import OpenAI

from dualpath.cluster.generator import GeneratedTokens, RequestError
from dualpath.server import ServerLimits


def client(url: str, api_key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=30)


def assert_shape(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "code", "param", "says_why"),
    [
        (b"{", "invalid_json", None, "not valid JSON"),
        (b"", "invalid_json", None, "not valid JSON"),
        (b'{"prompt": "\xff"}', "invalid_json", None, "not valid JSON"),
        (b'{"prompt": [1,,2]}', "invalid_json", None, "not valid JSON"),
        (b"[]", "invalid_value", None, "object"),
        (b"{}", "invalid_value", "prompt", "prompt"),
        (b'{"prompt": ""}', "invalid_value", "prompt", "prompt is empty"),
        (b'{"prompt": []}', "invalid_value", "prompt", "prompt is empty"),
        (b'{"prompt": [[]]}', "invalid_value", "prompt", "prompt is empty"),
        (b'{"prompt": ["a", 1]}', "invalid_value", "prompt", "list of token ids"),
        (b'{"prompt": [1, true]}', "invalid_value", "prompt", "list of token ids"),
        (b'{"prompt": {"a": 1}}', "invalid_value", "prompt", "list of token ids"),
        (b'{"prompt": null}', "invalid_value", "prompt", "list of token ids"),
        (b'{"prompt": [1, 300]}', "invalid_value", "prompt", "token id 300 at position 1"),
        (b'{"prompt": [-1]}', "invalid_value", "prompt", "token id -1 at position 0"),
        (b'{"prompt": "a", "max_tokens": -1}', "invalid_value", "max_tokens", "at least 0"),
        (b'{"prompt": "a", "max_tokens": 1%b}' % (b"0" * 5000), "invalid_value", "max_tokens", "out of range"),
        (
            b'{"prompt": "a", "max_tokens": 1%b}' % (b"0" * 400),
            "invalid_value",
            "max_tokens",
            "out of range; it must be between",
        ),
        (b'{"prompt": "a", "max_tokens": 1%b}' % (b"0" * 18), "context_length_exceeded", "prompt", "256 tokens"),
        (b'{"prompt": "a", "temperature": 1%b}' % (b"0" * 400), "invalid_value", "temperature", "out of range"),
        (b'{"prompt": "a", "max_tokens": "9"}', "invalid_value", "max_tokens", "int"),
        (b'{"prompt": "a", "max_tokens": 256}', "context_length_exceeded", "prompt", "is 256 .* 257 tokens"),
        (b'{"prompt": "a", "min_tokens": 17}', "invalid_value", "min_tokens", "between 0 and 16"),
        (b'{"prompt": "a", "temperature": -1}', "invalid_value", "temperature", "between 0 and 2"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value", "temperature", "out of range"),
        (b'{"prompt": "a", "top_p": 0}', "invalid_value", "top_p", "above 0"),
        (b'{"prompt": "a", "top_p": 1.5}', "invalid_value", "top_p", "between 0 and 1"),
        (b'{"prompt": "a", "top_k": -2}', "invalid_value", "top_k", "between -1 and"),
        (b'{"prompt": [1, 2, 3], "max_tokens": 1, "top_k": 18446744073709551616}', "invalid_value", "top_k", "between"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "invalid_value", "seed", "between"),
        (b'{"prompt": "a", "n": 0}', "invalid_value", "n", "between 1 and 128"),
        (b'{"prompt": ["a", "b"], "n": 65}', "invalid_value", "n", "send several requests"),
        (b'{"prompt": "a", "stop": [""]}', "invalid_value", "stop", "1 to 1000 characters"),
        (b'{"prompt": "a", "stop_token_ids": [300]}', "invalid_value", "stop_token_ids", "token id 300"),
        (b'{"prompt": "a", "logprobs": 21}', "invalid_value", "logprobs", "between 0 and 20"),
        (b'{"prompt": "a", "cache_salt": ""}', "invalid_value", "cache_salt", "1 to 1000"),
        (b'{"prompt": "a", "stream_options": {}}', "invalid_value", "stream_options", "stream: true"),
        (
            b'{"prompt": "a", "prompt_logprobs": 1, "stream": true}',
            "invalid_value",
            "prompt_logprobs",
            "can't be streamed",
        ),
        (b'{"prompt": "a", "prompt_logprobs": -1}', "invalid_value", "prompt_logprobs", "between 0 and 20"),
        (b'{"prompt": "a", "logit_bias": {"300": 1}}', "invalid_value", "logit_bias", "token id 300"),
        (b'{"prompt": "a", "logit_bias": {"5": 101}}', "invalid_value", "logit_bias", "between -100 and 100"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "invalid_value", "logit_bias", "int"),
        (b'{"prompt": "a", "bad_words": [" "]}', "invalid_value", "bad_words", "1 to 200 characters"),
        (b'{"prompt": "a", "allowed_token_ids": [-1]}', "invalid_value", "allowed_token_ids", "token id -1"),
        (b'{"prompt": "a", "logprobs_mode": "raw"}', "invalid_value", "logprobs_mode", "raw"),
        (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "invalid_value", "truncate_prompt_tokens", "no prompt"),
        (b'{"prompt": "a", "truncate_prompt_tokens": 257}', "invalid_value", "truncate_prompt_tokens", "and 256"),
        (b'{"prompt": "a", "best_of": 2}', "unsupported_parameter", "best_of", "not supported"),
        (b'{"prompt": "a", "suffix": "b"}', "unsupported_parameter", "suffix", "not supported"),
    ],
)
def test_bad_bodies(shared_url: str, body: bytes, code: str, param: str | None, says_why: str) -> None:
    message = assert_shape(httpx.post(f"{shared_url}/v1/completions", content=body), 400, code, param)
    assert re.search(says_why, message), message


@pytest.fixture(scope="module")
def shared_url() -> Any:
    """One server for requests that never get as far as the cluster."""

    def script(request: Any) -> list[Any]:
        raise AssertionError("the cluster was asked")

    with running_server(FakeGenerator(script)) as url:
        yield url


def test_unknown_model_path_and_method(shared_url: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(shared_url).completions.create(model="huge", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert_shape(httpx.get(f"{shared_url}/v1/nothing"), 404, "not_found")
    response = httpx.get(f"{shared_url}/v1/completions")
    assert_shape(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_context_length_says_the_figures(shared_url: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"260 tokens \(250 in the messages, 10 in") as caught:
        client(shared_url).completions.create(model="tiny", prompt=[1] * 250, max_tokens=10)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RequestError(429, "overloaded", "the queue is full", retry_after_s=1.2), openai.RateLimitError),
        (RequestError(503, "no_engine", "no decode engine is alive"), openai.InternalServerError),
        (RequestError(504, "timeout", "no answer in time"), openai.InternalServerError),
        (RequestError(400, "too_large", "it can never fit"), openai.BadRequestError),
        (ZeroDivisionError("a bug"), openai.InternalServerError),
    ],
)
def test_the_clusters_refusals_before_the_first_token(stream: bool, error: Exception, raised: Any) -> None:
    cluster = FakeGenerator(lambda request: [error])
    with running_server(cluster) as url, pytest.raises(raised) as caught:
        client(url).completions.create(model="tiny", prompt="a", stream=stream)
    if isinstance(error, RequestError):
        assert (caught.value.status_code, caught.value.code) == (error.status, error.code)
        assert str(error) in caught.value.message
    else:
        assert (caught.value.status_code, caught.value.code) == (500, "internal_error")
        assert "a bug" not in caught.value.message
    assert caught.value.response.headers.get("retry-after") == ("2" if caught.value.status_code == 429 else None)
    assert cluster.all_closed.wait(5)


def test_a_failure_midway_is_an_event_and_ends_the_stream() -> None:
    cluster = FakeGenerator(
        lambda request: [GeneratedTokens(token_ids=[65]), RequestError(503, "engine_lost", "the engine is gone")]
    )
    with running_server(cluster) as url:
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "stream": True})
        with pytest.raises(openai.APIError, match="the engine is gone"):
            list(client(url).completions.create(model="tiny", prompt="a", stream=True))
        metrics = httpx.get(f"{url}/metrics").text
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert len(events) == 2
    assert events[1].startswith('data: {"error":{"message":"the engine is gone"')
    assert 'endpoint="/v1/completions",error_code="engine_lost",finish_reason=""} 2.0' in metrics


def test_one_failing_choice_ends_the_others() -> None:
    never = threading.Event()

    def script(request: Any) -> list[Any]:
        first = GeneratedTokens(token_ids=[65])
        return [first, RequestError(503, "engine_lost", "gone") if request.sampling.seed == 2 else never]

    cluster = FakeGenerator(script)
    with running_server(cluster) as url:
        with pytest.raises(openai.InternalServerError):
            client(url).completions.create(model="tiny", prompt="a", n=3, seed=1)
        assert cluster.all_closed.wait(5)
    assert len(cluster.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_without_a_finish_reason_is_an_error(stream: bool) -> None:
    cluster = FakeGenerator(lambda request: [GeneratedTokens(token_ids=[65])])
    with running_server(cluster) as url, pytest.raises(openai.APIError, match="without a finish reason"):
        answer: Any = client(url).completions.create(model="tiny", prompt="a", stream=stream)
        list(answer)


def test_a_body_over_the_limit_with_and_without_a_declared_length() -> None:
    with running_server(FakeGenerator(says("ok")), limits=ServerLimits(max_body_bytes=1000)) as url:
        body = b'{"prompt": "' + b"a" * 1000 + b'"}'
        assert_shape(httpx.post(f"{url}/v1/completions", content=body), 413, "body_too_large")
        chunked = (body[i : i + 100] for i in range(0, len(body), 100))
        assert_shape(httpx.post(f"{url}/v1/completions", content=chunked), 413, "body_too_large")


def test_a_body_that_never_comes_is_given_up() -> None:
    with running_server(FakeGenerator(says("ok")), limits=ServerLimits(body_timeout_s=0.05)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer


def test_keys_are_asked_for_everywhere_but_health_and_metrics() -> None:
    with running_server(FakeGenerator(says("ok")), api_keys={"right", "too"}) as url:
        assert client(url, "too").completions.create(model="tiny", prompt="a").choices[0].text == "ok"
        with pytest.raises(openai.AuthenticationError) as caught:
            client(url, "wrong").completions.create(model="tiny", prompt="a")
        assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/tokenize", "/docs"):
            assert_shape(httpx.get(f"{url}{path}"), 401, "invalid_api_key")
        for path in ("/health", "/metrics", "/version"):
            assert httpx.get(f"{url}{path}").status_code == 200


def test_requests_in_flight_are_bounded_and_the_place_is_given_back() -> None:
    release = threading.Event()

    def script(request: Any) -> list[Any]:
        return [release, *says("ok")(request)]

    cluster = FakeGenerator(script)
    with running_server(cluster, limits=ServerLimits(max_inflight_requests=1)) as url:
        texts: list[str] = []
        first = threading.Thread(
            target=lambda: texts.append(client(url).completions.create(model="tiny", prompt="a").choices[0].text)
        )
        first.start()
        while not cluster.requests:
            first.join(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            client(url).completions.create(model="tiny", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health").status_code == 200
        release.set()
        first.join(30)
        assert client(url).completions.create(model="tiny", prompt="a").choices[0].text == "ok"
    assert texts == ["ok"]
