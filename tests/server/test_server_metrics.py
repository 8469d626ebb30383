"""The series with vLLM's names: what routers and dashboards read, and that each figure is true."""

import threading

import httpx
import msgspec
import pytest
from fake_cluster import FakeGenerator, running_server, says
from prometheus_client.parser import text_string_to_metric_families

from dualpath.cluster.coordinator.router_figures import router_figures
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.core.counts import GAUGES
from dualpath.core.ledger import Holding
from dualpath.spec.metrics import CATALOGUE
from dualpath.spec.timings import Timings

# Of vLLM's Grafana dashboard, of production-stack's router, and of the gateway API inference extension (llm-d).
READ_BY_OTHERS = {
    "vllm:cache_config_info",
    "vllm:e2e_request_latency_seconds",
    "vllm:generation_tokens_total",
    "vllm:gpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:inter_token_latency_seconds",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds",
    "vllm:request_generation_tokens",
    "vllm:request_inference_time_seconds",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_prefill_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_queue_time_seconds",
    "vllm:request_success_total",
    "vllm:request_time_per_output_token_seconds",
    "vllm:time_to_first_token_seconds",
}
TIMINGS = Timings(
    scheduling_s=1.0, allocation_s=2.0, read_s=4.0, prefill_s=8.0, decode_s=0.0, prefill_engine="PE0",
    decode_engine="DE0", pe_read_tokens=0, de_read_tokens=0, attempts=1,
)  # fmt: skip


def figures(url: str) -> dict[str, float]:
    """The samples of one model and engine by name, with the finish reason if there is one."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("vllm:")]
    assert all(sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0" for sample in samples)
    return {
        sample.name + (f" {reason}" if (reason := sample.labels.get("finished_reason")) else ""): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


def ask(url: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "hello", **fields}, timeout=30)


def test_the_catalogue_has_what_others_read() -> None:
    assert {name for name in CATALOGUE if name.startswith("vllm:")} == READ_BY_OTHERS


def test_totals_are_counters_and_every_series_is_there_from_the_start() -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
        shown = figures(url)
    kinds = {family.name: family.type for family in families}
    for metric in (CATALOGUE[name] for name in READ_BY_OTHERS if CATALOGUE[name].where.startswith("server")):
        name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
        assert kinds[name] == metric.kind
        assert all(family.documentation for family in families)
    assert set(shown.values()) == {0.0}
    assert {name for name in shown if "success" in name} == {
        f"vllm:request_success_total {reason}" for reason in ("stop", "length", "abort", "error")
    }


def test_what_a_request_took_and_why_it_ended() -> None:
    def script(request: GenerateRequest) -> list[GeneratedTokens | Exception | threading.Event]:
        steps = says("abcdefgh", cached_tokens=3, finish_reason="length")(request)
        return [msgspec.structs.replace(step, timings=TIMINGS) for step in steps]  # type: ignore[type-var]

    with running_server(FakeGenerator(script)) as url:
        ask(url, max_tokens=4)
        ask(url, max_tokens=1, n=2, stream=True)
        shown = figures(url)
    assert shown["vllm:prompt_tokens_total"] == shown["vllm:prefix_cache_queries_total"] == 3 * 5
    assert shown["vllm:prefix_cache_hits_total"] == shown["vllm:gpu_prefix_cache_hits_total"] == 3 * 3
    assert shown["vllm:generation_tokens_total"] == shown["vllm:request_generation_tokens_sum"] == 4 + 2
    assert shown["vllm:request_prompt_tokens_sum"] == 15
    assert shown["vllm:request_params_max_tokens_sum"] == 6
    assert shown["vllm:request_queue_time_seconds_sum"] == 3 * 3.0
    assert shown["vllm:request_prefill_time_seconds_sum"] == 3 * 12.0
    assert shown["vllm:request_inference_time_seconds_sum"] == pytest.approx(
        3 * 12.0 + shown["vllm:request_decode_time_seconds_sum"]
    )
    assert shown["vllm:request_time_per_output_token_seconds_count"] == 1  # the others have one token each
    assert shown["vllm:request_success_total length"] == 3


def test_a_request_that_fails_or_is_left_is_no_success() -> None:
    script: list[list[GeneratedTokens | Exception | threading.Event]] = [
        [GeneratedTokens(token_ids=[65]), RequestError(503, "no_engine", "gone")],
        [GeneratedTokens(token_ids=[65]), threading.Event()],
    ]
    cluster = FakeGenerator(lambda _: script.pop(0))
    with running_server(cluster) as url:
        assert ask(url).status_code == 503
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as answer:
            next(answer.iter_lines())
        assert cluster.all_closed.wait(10)
        shown = figures(url)
    assert (shown["vllm:request_success_total error"], shown["vllm:request_success_total abort"]) == (1, 1)
    assert shown["vllm:generation_tokens_total"] == 2
    assert shown["vllm:e2e_request_latency_seconds_count"] == 0


def test_router_figures_are_cores_counts() -> None:
    states = {"queued": 1, "allocating": 2, "retrying": 4, "loading": 8, "prefilling": 16, "decoding": 32}
    statistics = dict.fromkeys(GAUGES, 0) | {f"requests_{state}": count for state, count in states.items()}
    holdings = [
        Holding(engine=1, request=7, attempt=0, buffer_blocks=9, hbm_blocks=30, draining=False),
        Holding(engine=2, request=8, attempt=0, buffer_blocks=0, hbm_blocks=15, draining=True),
        Holding(engine=0, request=7, attempt=0, buffer_blocks=9, hbm_blocks=0, draining=False),
    ]
    shown = router_figures('a "b"\\', "float32", True, statistics, holdings, {1: 100, 2: 50})
    text = "".join(f"{sample} {value}\n" for sample, value in shown.items())
    found = {s.name: (s.labels, s.value) for f in text_string_to_metric_families(text) for s in f.samples}
    labels = {"model_name": 'a "b"\\', "engine": "0"}
    assert found["vllm:num_requests_waiting"] == (labels, 7)
    assert found["vllm:num_requests_running"] == (labels, 56)
    assert found["vllm:kv_cache_usage_perc"] == found["vllm:gpu_cache_usage_perc"] == (labels, 0.3)
    config = found["vllm:cache_config_info"][0]
    assert (config["block_size"], config["num_gpu_blocks"]) == ("64", "150")


def test_a_cluster_without_decode_engines_is_full() -> None:
    shown = router_figures("m", "float32", True, dict.fromkeys(GAUGES, 0), (), {})
    assert [value for sample, value in shown.items() if "usage" in sample] == [1.0, 1.0]
