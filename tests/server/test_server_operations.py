"""What operators meet: health, metrics, models, tokenisation, clients that leave, start and shutdown."""

import asyncio
import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_cluster import EOS, TOKENIZER, VOCABULARY_TOKENS, FakeGenerator, byte_tokenizer, ids, running_server, says
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from dualpath import __version__
from dualpath.cluster.generator import GeneratedTokens, TokenLogprob
from dualpath.server import ServerLimits, bind, create_app, load_tokenizer
from dualpath.server.codec import TextCodec
from dualpath.spec.metrics import Sample


def samples(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_models_and_version() -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        (model,) = client.models.list().data
        assert model.id == "tiny"
        assert client.models.retrieve("tiny").id == "tiny"
        assert httpx.get(f"{url}/v1/models/org/other").json()["error"]["code"] == "model_not_found"
        assert httpx.get(f"{url}/version").json() == {"version": __version__}


@pytest.mark.parametrize("path", ["health", "ready", "ping"])
@pytest.mark.parametrize(("status", "http"), [("ok", 200), ("degraded", 200), ("unavailable", 503)])
def test_health_is_the_clusters(status: str, http: int, path: str) -> None:
    cluster = FakeGenerator(says("ok"))
    cluster.status = status
    with running_server(cluster, api_keys=["secret"]) as url:
        response = httpx.get(f"{url}/{path}")
        alive = httpx.get(f"{url}/livez")
    assert (response.status_code, response.json()["status"]) == (http, status)
    assert alive.status_code == 200


def test_tokenize_and_detokenize() -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        answer = httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "héllo"}).json()
        assert answer == {"count": 6, "max_model_len": 256, "tokens": ids("héllo")}
        chat = httpx.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
        assert TOKENIZER.decode(chat["tokens"]) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        back = httpx.post(f"{url}/detokenize", json={"tokens": [*ids("hé"), EOS]}).json()
        assert back == {"prompt": "hé<|im_end|>"}
        both = httpx.post(f"{url}/tokenize", json={"prompt": "x", "messages": []})
        assert (both.status_code, both.json()["error"]["param"]) == (400, "prompt")
        outside = httpx.post(f"{url}/detokenize", json={"tokens": [VOCABULARY_TOKENS]})
        assert (outside.status_code, outside.json()["error"]["param"]) == (400, "tokens")


def test_metrics_count_what_happened() -> None:
    cluster = FakeGenerator(says("abc", cached_tokens=1))
    cluster.numbers = {
        Sample("dualpath_requests_live"): 3.0,
        Sample('dualpath_scheduler_failed_total{cause="timeout"}'): 10.0,
        Sample('dualpath_scheduler_failed_total{cause="no_engine"}'): 20.0,
    }
    with running_server(cluster) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client.completions.create(model="tiny", prompt="hi")
        list(client.completions.create(model="tiny", prompt="hi", max_tokens=2, stream=True))
        httpx.post(f"{url}/v1/completions", json={"prompt": ""})
        httpx.get(f"{url}/a/path/nobody/has")
        found = samples(url)
    model = (("engine", "0"), ("model_name", "tiny"))
    assert found["vllm:time_to_first_token_seconds_count", model] == 2
    assert found["vllm:inter_token_latency_seconds_count", model] == 3 + 1
    assert found["vllm:e2e_request_latency_seconds_count", model] == 2

    def requests(endpoint: str, error_code: str, finish_reason: str) -> float:
        labels = (("endpoint", endpoint), ("error_code", error_code), ("finish_reason", finish_reason))
        return found["dualpath_requests_total", labels]

    assert requests("/v1/completions", "", "stop") == 1
    assert requests("/v1/completions", "", "length") == 1
    assert requests("/v1/completions", "invalid_value", "") == 1
    assert requests("other", "not_found", "") == 1
    assert found["dualpath_request_tokens_total", (("kind", "prompt"),)] == 4
    assert found["dualpath_request_tokens_total", (("kind", "cached"),)] == 2
    assert found["dualpath_request_tokens_total", (("kind", "completion"),)] == 4 + 2
    assert found["dualpath_requests_live", ()] == 3
    assert found["dualpath_scheduler_failed_total", (("cause", "no_engine"),)] == 20


def test_an_engine_of_another_version_does_not_break_metrics() -> None:
    """What it says is shown as far as this version knows it, and the rest is counted."""
    cluster = FakeGenerator(says("ok"))
    labels = 'engine="0",role="decode"'
    cluster.numbers = {
        Sample(f"dualpath_decode_steps_total{{{labels}}}"): float("inf"),
        Sample(f"dualpath_decode_of_tomorrow{{{labels}}}"): 2.0,
        Sample(f'dualpath_decode_tokens_total{{{labels},kind="new"}}'): 2.0,
        Sample("not a name"): 2.0,
        Sample(f"dualpath_hbm_free_blocks{{{labels}}}"): float("nan"),
    }
    with running_server(cluster) as url:
        text = httpx.get(f"{url}/metrics").text
        found = samples(url)
    shown = 'dualpath_decode_steps_total{engine="0",role="decode"} +Inf'
    assert f"# TYPE dualpath_decode_steps_total counter\n{shown}\n" in text
    assert 'dualpath_hbm_free_blocks{engine="0",role="decode"} NaN\n' in text
    assert found["dualpath_unknown_series", ()] == 3
    assert not [name for name, _ in found if "tomorrow" in name or name == "dualpath_decode_tokens_total"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_closes_its_generations(
    stream: bool, first_token: bool, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    cluster = FakeGenerator(lambda request: [*([GeneratedTokens(token_ids=[65])] if first_token else []), never])
    with running_server(cluster) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"prompt": "a", "n": %d, "stream": %s}' % (n, b"true" if stream else b"false")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            connection.sendall(body)
            while cluster.open < n:
                threading.Event().wait(0.005)
            if stream and first_token:
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
            assert not cluster.all_closed.is_set()
        assert cluster.all_closed.wait(10)
        found = {labels: value for (name, labels), value in samples(url).items() if name == "dualpath_requests_total"}
    expected = (("endpoint", "/v1/completions"), ("error_code", "client_disconnected"), ("finish_reason", ""))
    assert found == {expected: 1.0}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_stops_reading_loses_its_generation() -> None:
    entries = [[TokenLogprob(token_id=65, logprob=-0.5)] * 1000] * 10
    flood = FakeGenerator(lambda request: [GeneratedTokens(token_ids=[65] * 10, logprobs=entries)] * 5000)
    with running_server(flood, limits=ServerLimits(write_timeout_s=0.1)) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"messages": [{"role": "user", "content": "a"}], "stream": true, "logprobs": true}'
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            connection.sendall(body)
            while not flood.requests:
                threading.Event().wait(0.005)
            assert flood.all_closed.wait(30)


def test_the_openai_client_closing_its_stream_closes_the_generation() -> None:
    never = threading.Event()
    cluster = FakeGenerator(lambda request: [GeneratedTokens(token_ids=[65]), never])
    with running_server(cluster) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client.completions.create(model="tiny", prompt="a", stream=True) as stream:
            next(iter(stream))
        assert cluster.all_closed.wait(10)


def test_a_taken_port_is_said_plainly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*port 0"):
            bind("127.0.0.1", port)


def test_an_event_never_waits_for_the_acknowledgement_of_the_one_before() -> None:
    """Nagle's algorithm is off on what the listener accepts: headers and the first event are two segments."""
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_slow_tokenizer_does_too() -> None:
    class Slow:
        """No backend: Transformers' Python interface alone."""

        chat_template = None

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            return "".join(map(chr, ids))

    codec = TextCodec(Slow())
    assert asyncio.run(codec.encode("abc", add_special_tokens=True)) == [97, 98, 99]
    assert codec.decode([97, 98], skip_special_tokens=True) == "ab"


def test_a_saved_tokenizer_loads_and_serves(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    tokenizer.save_pretrained(tmp_path)
    cluster = FakeGenerator(says("grüße"))
    with running_server(cluster, load_tokenizer(str(tmp_path))) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "héllo"}])
    assert answer.choices[0].message.content == "grüße"
    assert TOKENIZER.decode(cluster.requests[0].prompt_token_ids).startswith(
        "<|im_start|>user\nhéllo<|im_end|>"
    )  # neither cut nor padded


def test_many_streams_at_once_do_not_mix() -> None:
    def script(request: Any) -> list[Any]:
        return says(f"answer to {TOKENIZER.decode(request.prompt_token_ids)}")(request)

    async def ask(client: AsyncOpenAI, question: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=question, stream=True, max_tokens=50)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main(url: str) -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, f"question {i}") for i in range(32)))

    with running_server(FakeGenerator(script)) as url:
        assert asyncio.run(main(url)) == [f"answer to question {i}" for i in range(32)]


@pytest.mark.parametrize("keys", ["a-string", ["good", ""]])
def test_keys_that_would_let_anybody_in_are_refused(keys: Any) -> None:
    with pytest.raises(ValueError, match="api_keys"):
        create_app(FakeGenerator(says("ok")), TOKENIZER, api_keys=keys)


def test_importing_the_server_loads_no_torch() -> None:
    code = "import sys, dualpath.server; sys.exit(int(bool({'torch', 'transformers'} & sys.modules.keys())))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
