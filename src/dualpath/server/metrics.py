"""The content of /metrics: the server's own histograms and counters, then the cluster's figures."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dualpath.cluster.generator import GenerateRequest
from dualpath.spec import metrics
from dualpath.spec.metrics import CATALOGUE, Figures, Metric, metric_of
from dualpath.spec.timings import Timings


class ServerMetrics:
    """Counts and times the requests of one app. Each app has its own, so that a process can have two apps."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = (model, metrics.ONLY_ENGINE)
        self._requests, self._tokens = map(self._counter, (metrics.REQUESTS, metrics.REQUEST_TOKENS))
        # Every series is there from the start, so that a rate includes the first increment.
        self._histograms = {metric.name: self._histogram(metric).labels(*self._model) for metric in _HISTOGRAMS}
        self._counters = {metric.name: self._counter(metric).labels(*self._model) for metric in _COUNTERS}
        success = self._counter(metrics.SUCCESS)
        self._ended = {reason: success.labels(*self._model, reason) for reason in ("stop", "length", "abort", "error")}

    def failed(self, endpoint: str, code: str) -> None:
        self._requests.labels(endpoint, "", code).inc()

    def answered(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("cached").inc(cached_tokens)
        self._tokens.labels("completion").inc(completion_tokens)

    def finished(self, endpoint: str, finish_reason: str) -> None:
        self._requests.labels(endpoint, finish_reason, "").inc()

    def ended(self, reason: str) -> None:
        """Count a generation's end: a finish reason, ``abort`` or ``error``. Tool calls end it as ``stop``."""
        self._ended.get(reason, self._ended["stop"]).inc()

    def observe(self, metric: Metric, value: float) -> None:
        self._histograms[metric.name].observe(value)

    def count(self, metric: Metric, by: int) -> None:
        self._counters[metric.name].inc(by)

    def exposition(self, gauges: Figures) -> bytes:
        """Returns Prometheus' text format: the server's own series, then the cluster's `gauges`."""
        return generate_latest(_WithoutCreated(self._registry)) + _format(gauges).encode()

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self._registry)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)


_MEASURED_HERE = [metric for metric in CATALOGUE.values() if metric.labels == ("model_name", "engine")]
_HISTOGRAMS = [metric for metric in _MEASURED_HERE if metric.kind == "histogram"]
_COUNTERS = [metric for metric in _MEASURED_HERE if metric.kind == "counter"]


class GenerationTimer:
    """Times and counts one generation of a request that arrived at `arrived_s` (``time.perf_counter``)."""

    def __init__(self, measured: ServerMetrics, endpoint: str, arrived_s: float, request: GenerateRequest) -> None:
        self._metrics = measured
        self._endpoint = endpoint
        self._arrived_s = arrived_s
        self._request = request
        self._first_s = self._last_s = 0.0
        self._tokens = 0
        self._ended = False

    def step(self, tokens: int, cached_tokens: int, finish_reason: str | None, timings: Timings | None) -> None:
        """Note a step that brought `tokens`; `timings` are the cluster's up to it."""
        now_s = time.perf_counter()
        if not self._first_s:
            self._first_s = now_s
            self._begin(now_s, cached_tokens)
        else:
            self._metrics.observe(metrics.INTER_TOKEN, now_s - self._last_s)
        self._last_s = now_s
        self._tokens += tokens
        self._metrics.count(metrics.GENERATION_TOKENS, tokens)
        if finish_reason is not None:
            self._finish(now_s, finish_reason, timings)

    def close(self, failure: type[BaseException] | None) -> None:
        """The generation is over. If it has not finished, it failed with `failure`, or nobody wants it any more."""
        if not self._ended:
            self._ended = True
            failed = failure is not None and issubclass(failure, Exception)
            self._metrics.ended("error" if failed else "abort")

    def _begin(self, now_s: float, cached_tokens: int) -> None:
        self._metrics.observe(metrics.TTFT, now_s - self._arrived_s)
        prompt_tokens = len(self._request.prompt_token_ids)
        for metric in (metrics.PROMPT_TOKENS, metrics.PREFIX_QUERIES, metrics.OLD_PREFIX_QUERIES):
            self._metrics.count(metric, prompt_tokens)
        for metric in (metrics.PREFIX_HITS, metrics.OLD_PREFIX_HITS):
            self._metrics.count(metric, cached_tokens)

    def _finish(self, now_s: float, finish_reason: str, timings: Timings | None) -> None:
        self._ended = True
        self._metrics.finished(self._endpoint, finish_reason)
        self._metrics.ended(finish_reason)
        max_tokens, decode_s = self._request.sampling.max_tokens, now_s - self._first_s
        observed = {
            metrics.E2E: now_s - self._arrived_s,
            metrics.DECODE_TIME: decode_s,
            metrics.PROMPT_LENGTH: len(self._request.prompt_token_ids),
            metrics.GENERATION_LENGTH: self._tokens,
            metrics.MAX_GENERATION: max_tokens,
            metrics.MAX_TOKENS: max_tokens,
        }
        if self._tokens > 1:
            observed[metrics.TIME_PER_TOKEN] = decode_s / (self._tokens - 1)
        if timings is not None:
            prefill_s = timings.read_s + timings.prefill_s
            observed[metrics.QUEUE_TIME] = timings.scheduling_s + timings.allocation_s
            observed[metrics.PREFILL_TIME] = prefill_s
            observed[metrics.INFERENCE_TIME] = prefill_s + decode_s
        for metric, value in observed.items():
            self._metrics.observe(metric, value)


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
