"""A span for each request: whose child it is, what it says, and that it never says what was asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import msgspec
import pytest
from fake_cluster import FakeGenerator, running_server, says

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.spec.timings import Timings

sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
from opentelemetry.sdk.trace import ReadableSpan  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from dualpath.server.tracing import Tracing, exporter_to  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMINGS = Timings(
    scheduling_s=1.0, allocation_s=2.0, read_s=4.0, prefill_s=8.0, decode_s=16.0, prefill_engine="PE0",
    decode_engine="DE0", pe_read_tokens=0, de_read_tokens=0, attempts=1,
)  # fmt: skip


@contextmanager
def traced(cluster: FakeGenerator) -> Iterator[tuple[str, InMemorySpanExporter]]:
    spans = InMemorySpanExporter()
    with running_server(cluster, observers=(Tracing("tiny", sdk.SimpleSpanProcessor(spans)),)) as url:
        yield url, spans


def script(request: GenerateRequest) -> list[GeneratedTokens | Exception | threading.Event]:
    steps = says("abc", cached_tokens=2)(request)
    return [msgspec.structs.replace(step, timings=TIMINGS) for step in steps]  # type: ignore[type-var]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_child_of_its_callers_span_and_says_what_it_took(stream: bool) -> None:
    body = {"prompt": "a secret", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "n": 2, "stream": stream}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "job-1"}
    with traced(FakeGenerator(script)) as (url, spans):
        httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        httpx.get(f"{url}/health")
    (span,) = spans.get_finished_spans()
    assert isinstance(span, ReadableSpan) and span.parent is not None and span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert (span.name, span.kind) == ("llm_request", SpanKind.SERVER)
    said = dict(span.attributes or {})
    assert 0 < said.pop("gen_ai.latency.time_to_first_token") <= said.pop("gen_ai.latency.e2e")  # type: ignore[operator]
    assert said == {
        "gen_ai.request.id": "job-1",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.prompt_tokens": 8,
        "gen_ai.usage.completion_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.latency.time_in_queue": 3.0,
        "gen_ai.latency.time_in_model_prefill": 12.0,
        "gen_ai.latency.time_in_model_decode": 16.0,
        "gen_ai.latency.time_in_model_inference": 28.0,
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert "secret" not in span.to_json()


def test_failures_are_marked_and_refusals_are_not() -> None:
    cluster = FakeGenerator(lambda _: [RequestError(503, "no_engine", "gone")])
    with traced(cluster) as (url, spans):
        httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers={"traceparent": "nonsense"})
        httpx.post(f"{url}/v1/completions", json={"prompt": ""})
    failed, refused = spans.get_finished_spans()
    assert (failed.status.status_code, failed.parent) == (StatusCode.ERROR, None)
    assert (refused.status.status_code, refused.name) == (StatusCode.UNSET, "POST")
    assert (refused.attributes or {})["http.response.status_code"] == 400


def test_the_protocol_is_opentelemetrys_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = exporter_to("http://127.0.0.1:9/v1/traces")
    assert "http" in type(exporter).__module__
    exporter.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke")
    with pytest.raises(ValueError, match="give http/protobuf or grpc"):
        exporter_to("http://127.0.0.1:9")


def test_a_collector_that_is_away_delays_neither_answers_nor_the_end() -> None:
    tracing = Tracing.to("http://127.0.0.1:9/v1/traces", "tiny")
    with running_server(FakeGenerator(script), observers=(tracing,)) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
    tracing.close()
