"""What /metrics says: the server's own histograms and counters, then the cluster's gauges.

Latencies carry the names that external routers read from vLLM; counters are ours.
"""

import re
import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.utils import floatToGoString

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?")


class ServerMetrics:
    """Counts and times requests of one app. Not shared between apps, so that two of them can live in a process."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token", _TTFT_BUCKETS_S, model
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between a generation's steps", _STEP_BUCKETS_S, model
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its last token", _E2E_BUCKETS_S, model
        )
        self._requests = Counter(
            "dualpath_requests_total",
            "Generations that finished, by finish reason, and requests that failed, by error code",
            ["endpoint", "finish_reason", "error_code"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "dualpath_request_tokens_total",
            "Tokens of answered requests: prompt, cached (of the prompt), completion",
            ["kind"],
            registry=self._registry,
        )

    def failed(self, endpoint: str, code: str) -> None:
        self._requests.labels(endpoint, "", code).inc()

    def answered(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("cached").inc(cached_tokens)
        self._tokens.labels("completion").inc(completion_tokens)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_step(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def finished(self, endpoint: str, finish_reason: str, seconds: float) -> None:
        self._e2e.observe(seconds)
        self._requests.labels(endpoint, finish_reason, "").inc()

    def exposition(self, gauges: dict[str, float]) -> bytes:
        """Prometheus' text format, `gauges` (``name`` or ``name{label="value"}`` → number) included."""
        return generate_latest(self._registry) + format_gauges(gauges).encode()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], model: str) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry).labels(model)


class GenerationTimer:
    """Times one generation of a request that arrived at `arrived_s` (``time.perf_counter``), observing as it goes."""

    def __init__(self, metrics: ServerMetrics, endpoint: str, arrived_s: float) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrived_s = arrived_s
        self._last_s: float | None = None

    def step(self, finish_reason: str | None) -> None:
        now_s = time.perf_counter()
        if self._last_s is None:
            self._metrics.first_token(now_s - self._arrived_s)
        else:
            self._metrics.next_step(now_s - self._last_s)
        self._last_s = now_s
        if finish_reason is not None:
            self._metrics.finished(self._endpoint, finish_reason, now_s - self._arrived_s)


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def format_gauges(gauges: dict[str, float]) -> str:
    """Text lines, the series of a name together under one ``# TYPE``. A name ending in ``_total`` is a counter.

    Raises ValueError for a name that Prometheus could not read.
    """
    families: dict[str, list[str]] = {}
    for sample, value in gauges.items():
        match = _SAMPLE.fullmatch(sample)
        if match is None:
            raise ValueError(f'{sample!r} is not a metric\'s name; write name or name{{label="value"}}')
        families.setdefault(match[1], []).append(f"{sample} {_number(value)}\n")
    return "".join(
        f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n{''.join(lines)}"
        for name, lines in families.items()
    )
