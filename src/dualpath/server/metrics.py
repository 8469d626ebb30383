"""The content of /metrics: the server's own histograms and counters, then the cluster's figures."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dualpath.spec import metrics
from dualpath.spec.metrics import CATALOGUE, Figures, Metric, metric_of


class ServerMetrics:
    """Counts and times the requests of one app. Each app has its own, so that a process can have two apps."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._ttft, self._inter_token, self._e2e = (
            self._histogram(metric).labels(model) for metric in (metrics.TTFT, metrics.INTER_TOKEN, metrics.E2E)
        )
        self._requests, self._tokens = map(self._counter, (metrics.REQUESTS, metrics.REQUEST_TOKENS))

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

    def exposition(self, gauges: Figures) -> bytes:
        """Returns Prometheus' text format: the server's own series, then the cluster's `gauges`."""
        return generate_latest(_WithoutCreated(self._registry)) + _format(gauges).encode()

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self._registry)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)


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


class _WithoutCreated(Collector):
    """A registry without prometheus_client's extra series for the time at which each series was created."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Family]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _format(figures: Figures) -> str:
    """Returns the series, grouped by metric. Series that are not in the catalogue are counted, not shown.

    prometheus_client would sort and escape every label again, which takes three times as long.
    """
    lines: dict[str, list[str]] = {}
    unknown = 0
    for sample, value in figures.items():
        metric = metric_of(sample)
        if metric is None:
            unknown += 1
        else:
            lines.setdefault(metric.name, []).append(f"{sample} {_number(value)}\n")
    lines[metrics.UNKNOWN_SERIES.name] = [f"{metrics.UNKNOWN_SERIES()} {unknown}\n"]
    return "".join(
        f"# HELP {name} {CATALOGUE[name].help}\n# TYPE {name} {CATALOGUE[name].kind}\n{''.join(series)}"
        for name, series in lines.items()
    )


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
