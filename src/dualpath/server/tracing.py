"""OpenTelemetry traces: a span for each request, with the attributes that vLLM gives its own.

The span is made once its request has ended, from what the request noted anyway, so answering costs nothing more.
Imported only with ``--otlp-traces-endpoint``; needs the extra ``dualpath[otel]``.
"""

import os
import time
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from dualpath import __version__
from dualpath.server.http import OPEN_PATHS
from dualpath.server.request_record import RequestRecord

_EXPORT_S = 3
"""How long a batch of spans may take, so also how long the server's end waits for a collector that is away."""
_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


def exporter_to(endpoint: str) -> SpanExporter:
    """Returns an exporter by HTTP, or by gRPC where the environment says so. Raises ValueError, ModuleNotFoundError."""
    protocol = os.environ.get(_PROTOCOL, "http/protobuf")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        by_http: SpanExporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
        return by_http
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter

        over_grpc: SpanExporter = GrpcSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
        return over_grpc
    raise ValueError(f"{_PROTOCOL} is {protocol!r}; give http/protobuf or grpc")


class Tracing:
    """An observer of requests. `processor` sends what it gets off from a thread of its own."""

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        self._model = model
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
        resource = Resource({"service.name": "dualpath"}).merge(Resource.create())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dualpath", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @staticmethod
    def to(endpoint: str, model: str) -> "Tracing":
        return Tracing(model, BatchSpanProcessor(exporter_to(endpoint)))

    def __call__(self, scope: Scope, record: RequestRecord) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        ended_ns, took_s = time.time_ns(), time.perf_counter() - record.arrived_s
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            "llm_request" if record.checked is not None else f"{scope['method']}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=ended_ns - round(took_s * 1e9),
            attributes={"gen_ai.request.id": record.id, "gen_ai.latency.e2e": took_s, **_http(scope, record)},
        )
        if record.checked is not None:
            span.set_attributes({"gen_ai.response.model": self._model, **_asked(record), **_used(record)})
        if (record.status or 499) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    def close(self) -> None:
        """Send what is left, within seconds."""
        self._provider.shutdown()


def _http(scope: Scope, record: RequestRecord) -> dict[str, Any]:
    return {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "http.response.status_code": record.status or 499,
    }


def _asked(record: RequestRecord) -> dict[str, Any]:
    checked = record.checked
    assert checked is not None
    sampling = checked.choices[0].request.sampling
    return {
        "gen_ai.request.n": len(checked.choices) // len(checked.prompts),
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
    }


def _used(record: RequestRecord) -> dict[str, Any]:
    usage = record.usage
    assert usage is not None
    found: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
    if usage.first_token_s is not None:
        found["gen_ai.latency.time_to_first_token"] = usage.first_token_s - record.arrived_s
    if (timings := usage.timings) is not None:
        prefill_s = timings.read_s + timings.prefill_s
        found["gen_ai.latency.time_in_queue"] = timings.scheduling_s + timings.allocation_s
        found["gen_ai.latency.time_in_model_prefill"] = prefill_s
        found["gen_ai.latency.time_in_model_decode"] = timings.decode_s
        found["gen_ai.latency.time_in_model_inference"] = prefill_s + timings.decode_s
    return found
