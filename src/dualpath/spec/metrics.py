"""The catalogue of all series that ``/metrics`` shows: the only place that names metrics.

Code makes a series by calling a member, ``NIC_BYTES("snic", "rx", "high")``, so no other name can be used. Series from
engines of another version are checked against the same catalogue. To add a metric, add one line here and one increment
or figure where it is measured; then run ``python -m dualpath.spec.metrics > docs/metrics.md``.
"""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NewType

import msgspec

Sample = NewType("Sample", str)
"""One series: ``name`` or ``name{label="value"}``. Only a `Metric` makes one."""

Figures = dict[Sample, float]

_LABELS = re.compile(r'(\w+)="((?:[^"\\\n]|\\.)*)"')
_ENGINE_LABELS = ("engine", "role")


class Metric(msgspec.Struct, frozen=True):
    """A family of series. A name that ends in ``_total`` is a counter's; one that has `buckets` is a histogram's."""

    where: str
    """The file or folder that measures it, under ``src/dualpath``."""
    name: str
    help: str
    labels: tuple[str, ...] = ()
    """Names of its labels, without those that the coordinator adds to engines' series."""
    unit: str = ""
    """The unit, if the last word of the name does not say it."""
    by_engine: bool = False
    buckets: tuple[float, ...] = ()

    def __call__(self, *values: str) -> Sample:
        """Returns the series with these values of `labels`. Raises ValueError for more or fewer values."""
        return _series(self.name, dict(zip(self.labels, map(_escaped, values), strict=True)))

    @property
    def kind(self) -> str:
        return "histogram" if self.buckets else "counter" if self.name.endswith("_total") else "gauge"

    @property
    def shown_labels(self) -> tuple[str, ...]:
        return (*_ENGINE_LABELS, *self.labels) if self.by_engine else self.labels

    @property
    def shown_unit(self) -> str:
        return self.unit or self.name.removesuffix("_total").rpartition("_")[2]


_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_E2E_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_LENGTH_TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
ONLY_ENGINE = "0"
"""The label `engine` of series with vLLM's names. To a router the whole cluster is one engine."""

# Series with vLLM's names, which routers and its dashboard read. A request is one generation: one choice.
_vllm = partial(Metric, "server/metrics.py", labels=("model_name", "engine"))
TTFT = _vllm("vllm:time_to_first_token_seconds", "From a request's arrival to its first token", buckets=_TTFT_S)
INTER_TOKEN = _vllm("vllm:inter_token_latency_seconds", "Between two steps of a generation", buckets=_STEP_S)
_TPOT = "A generation's time after its first token, for each token after that"
TIME_PER_TOKEN = _vllm("vllm:request_time_per_output_token_seconds", _TPOT, buckets=_STEP_S)
E2E = _vllm("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token", buckets=_E2E_S)
_QUEUE = "From arrival at the scheduler until engines and their memory were there"
QUEUE_TIME = _vllm("vllm:request_queue_time_seconds", _QUEUE, buckets=_E2E_S)
_PREFILL = "From then to the first token: reading hit tokens from storage, and prefill"
PREFILL_TIME = _vllm("vllm:request_prefill_time_seconds", _PREFILL, buckets=_E2E_S)
DECODE_TIME = _vllm("vllm:request_decode_time_seconds", "From the first token to the last", buckets=_E2E_S)
_INFERENCE = "Prefill and decode time together"
INFERENCE_TIME = _vllm("vllm:request_inference_time_seconds", _INFERENCE, buckets=_E2E_S)
PROMPT_LENGTH = _vllm("vllm:request_prompt_tokens", "Tokens of the prompt", buckets=_LENGTH_TOKENS)
GENERATION_LENGTH = _vllm("vllm:request_generation_tokens", "Tokens generated", buckets=_LENGTH_TOKENS)
_LIMIT = "Most tokens that may be generated"
MAX_GENERATION = _vllm("vllm:request_max_num_generation_tokens", _LIMIT, buckets=_LENGTH_TOKENS)
MAX_TOKENS = _vllm("vllm:request_params_max_tokens", "The same, under another name", buckets=_LENGTH_TOKENS)
PROMPT_TOKENS = _vllm("vllm:prompt_tokens_total", "Prompt tokens of requests that got a first token")
GENERATION_TOKENS = _vllm("vllm:generation_tokens_total", "Tokens generated")
PREFIX_QUERIES = _vllm("vllm:prefix_cache_queries_total", "The same prompt tokens: each is looked up", unit="tokens")
PREFIX_HITS = _vllm("vllm:prefix_cache_hits_total", "Those of them that were read from storage", unit="tokens")
OLD_PREFIX_QUERIES = _vllm("vllm:gpu_prefix_cache_queries_total", "Older name of the queries", unit="tokens")
OLD_PREFIX_HITS = _vllm("vllm:gpu_prefix_cache_hits_total", "Older name of the hits", unit="tokens")
_SUCCESS = "Requests that ended: stop, length, abort (the client left), error"
SUCCESS = Metric(
    "server/metrics.py", "vllm:request_success_total", _SUCCESS, ("model_name", "engine", "finished_reason"), "requests"
)
_routed = partial(Metric, "cluster/coordinator/router_figures.py", labels=("model_name", "engine"))
RUNNING = _routed("vllm:num_requests_running", "Requests that are read, prefilled or decoded", unit="requests")
WAITING = _routed("vllm:num_requests_waiting", "Requests that wait for engines or for their memory", unit="requests")
_USAGE = "Share of decode engines' KV memory that is promised to requests; 1 when there is no decode engine"
KV_USAGE = _routed("vllm:kv_cache_usage_perc", _USAGE, unit="ratio")
OLD_KV_USAGE = _routed("vllm:gpu_cache_usage_perc", "Older name of the same", unit="ratio")
_CONFIG_LABELS = ("engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
_CONFIG = "1; its labels have the tokens of a block and the blocks of KV memory of all decode engines"
CACHE_CONFIG = Metric(
    "cluster/coordinator/router_figures.py", "vllm:cache_config_info", _CONFIG, _CONFIG_LABELS, unit="blocks"
)

# The server's own.
_server = partial(Metric, "server/metrics.py")
_ENDED = "Generations that finished, by finish reason, and requests that failed, by error code"
REQUESTS = _server("dualpath_requests_total", _ENDED, ("endpoint", "finish_reason", "error_code"))
_TOKENS = "Tokens of answered requests: prompt, cached (of the prompt), completion"
REQUEST_TOKENS = _server("dualpath_request_tokens_total", _TOKENS, ("kind",))
UNKNOWN_SERIES = _server("dualpath_unknown_series", "Series that engines send and this version can't show")

# The coordinator's.
_head = partial(Metric, "cluster/coordinator/coordinator.py")
STRANGE_MESSAGES = _head("dualpath_strange_messages_total", "Messages of engines that have not joined or are lost")
MALFORMED_MESSAGES = _head("dualpath_malformed_messages_total", "Messages that the coordinator can't decode")
_STRANGERS = "Connections to the control port without the cluster's secret, or that are not ZeroMQ's"
CONTROL_REFUSED = _head("dualpath_control_refused_total", _STRANGERS, unit="connections")
UNROUTABLE_MESSAGES = _head("dualpath_unroutable_messages_total", "Messages that the coordinator could not send")
ENGINES_REFUSED = _head("dualpath_refused_engines_total", "Engines that asked to join and do not fit the cluster")
ENGINES_LOST = _head("dualpath_lost_engines_total", "Engines that had joined and are gone, for whatever reason")
ENGINES_RETURNED = _head(
    "dualpath_returned_engines_total", "Engines that had lost this coordinator and came back to it"
)
PARTS_RESTARTED = _head(
    "dualpath_restarted_parts_total", "Processes of this host that had ended and were started again"
)
_serving = partial(Metric, "cluster/coordinator/serving.py")
REQUESTS_LIVE = _serving("dualpath_requests_live", "Requests that have not ended", unit="requests")
REQUESTS_PARKED = _serving("dualpath_requests_parked", "Those that wait while generation is paused", unit="requests")
_FOREIGN = "Reports that an engine can't make: about other engines' attempts, or of what can't be"
FOREIGN_MESSAGES = _serving("dualpath_foreign_messages_total", _FOREIGN)
STALE_MESSAGES = _serving("dualpath_stale_messages_total", "Reports about a request or an attempt that is over")
_operator = partial(Metric, "cluster/coordinator/operator.py")
WEIGHTS_INFO = _operator("dualpath_weights_info", "Always 1: the version of the weights", ("version",), "versions")
WEIGHTS_UPDATES = _operator("dualpath_weights_updates_total", "Times that other weights were taken into use")
_store = partial(Metric, "cluster/coordinator/prefixes.py")
STORE_NAMESPACES = _store("dualpath_store_namespaces", "Tenants' namespaces in the prefix index")
STORE_BLOCKS = _store("dualpath_store_blocks", "Full Blocks in the prefix index")
STORE_BYTES = _store("dualpath_store_stored_bytes", "What these blocks take in the store")
STORE_PINNED_BLOCKS = _store("dualpath_store_pinned_blocks", "Blocks that a request needs; they are not evicted")
STORE_PIN_OWNERS = _store("dualpath_store_pin_owners", "Requests that have pinned blocks", unit="requests")
STORE_MATCHES = _store("dualpath_store_matches_total", "Times that a prompt was matched against the index")
STORE_ASKED_BLOCKS = _store("dualpath_store_asked_blocks_total", "Full Blocks of the prompts that were matched")
STORE_HIT_BLOCKS = _store("dualpath_store_hit_blocks_total", "Those of them that were found")
STORE_PUBLISHED_BLOCKS = _store("dualpath_store_published_blocks_total", "Blocks that entered the index")
STORE_EVICTED_BLOCKS = _store("dualpath_store_evicted_blocks_total", "Blocks that left it to keep to the quota")
STORE_DROPPED_BLOCKS = _store("dualpath_store_dropped_blocks_total", "Blocks that left it with one that can't be read")
STORE_REFUSED_BLOCKS = _store("dualpath_store_refused_blocks_total", "Reports of blocks that make no sense")
STORE_LOOKS = _store("dualpath_store_looks_total", "Looks at the store for what a neighbour has stored", unit="looks")
STORE_FOUND_BLOCKS = _store("dualpath_store_found_blocks_total", "Blocks of neighbours that were found so")
STORE_RECOUNTS = _store(
    "dualpath_store_recounts_total", "Scans of the whole store for blocks that trouble had left uncounted", unit="looks"
)
STORE_FILE_ERRORS = _store("dualpath_store_file_errors_total", "Opening, deleting or setting aside files that failed")
STORE_FILE_JOBS = _store("dualpath_store_file_jobs_waiting", "File jobs that are not done yet", unit="jobs")
STORE_FAULTS = _store("dualpath_store_faults_total", "Blocks that could not be read, by what is wrong", ("cause",))
_IO = "The coordinator's calls of the store: look (for neighbours' blocks), file (deleting, setting aside)"
STORE_IO_RUNNING = _store("dualpath_store_io_running", f"{_IO}: in progress", ("work",), "jobs")
STORE_IO_HUNG = _store(
    "dualpath_store_io_hung", "Those that have missed their deadline and not ended", ("work",), "jobs"
)
STORE_IO_LATE = _store("dualpath_store_io_late_total", "Those that have missed their deadline", ("work",), "jobs")
_TROUBLE = "For how long the store is unreachable, slow or read-only, to the coordinator or an engine; 0: it is not"
STORE_TROUBLE = Metric("cluster/coordinator/store_health.py", "dualpath_store_trouble_seconds", _TROUBLE, ("trouble",))

KV_EVENTS = Metric("cluster/coordinator/kv_events.py", "dualpath_kv_events_total", "KV events that were published")

# The scheduler's; `core.counts` pairs them with its statistics.
_core = partial(Metric, "core/counts.py")
SUBMITTED = _core("dualpath_scheduler_submitted_total", "Requests that came", unit="requests")
PLACED = _core("dualpath_scheduler_placed_total", "Attempts that got a PE and a DE", unit="attempts")
FINISHED = _core("dualpath_scheduler_finished_total", "Requests that were answered", unit="requests")
CANCELLED = _core(
    "dualpath_scheduler_cancelled_total",
    "Requests ended early or taken off their engines: by their client, an abort, a pause",
    unit="requests",
)
FETCHES = _core("dualpath_scheduler_fetches_total", "Rounds of placing the requests that wait")
PE_READ_BLOCKS = _core("dualpath_scheduler_pe_read_blocks_total", "Hit blocks placed to be read by PEs")
DE_READ_BLOCKS = _core("dualpath_scheduler_de_read_blocks_total", "Hit blocks placed to be read by DEs")
RETRIED = _core("dualpath_scheduler_retried_total", "Attempts that were followed by another", ("cause",), "attempts")
FAILED = _core("dualpath_scheduler_failed_total", "Requests that were given up", ("cause",), "requests")
DROPPED = _core("dualpath_scheduler_dropped_total", "Inputs that came too late to mean anything", ("input",), "inputs")
SCHEDULED = _core("dualpath_scheduler_requests", "Requests by state", ("state",))
DRAINING_BUFFER = _core("dualpath_scheduler_draining_buffer_blocks", "Buffer that aborted attempts still hold")
DRAINING_HBM = _core("dualpath_scheduler_draining_hbm_blocks", "Device memory that aborted attempts still hold")
OVERDUE_RELEASES = _core("dualpath_scheduler_overdue_releases", "Aborts unanswered past their deadline", unit="aborts")

# The engines'; they come with heartbeats.
_engine = partial(Metric, "cluster/agent", by_engine=True)
ENGINE_ATTEMPTS = _engine("dualpath_engine_attempts", "Attempts that the engine has in hand")
ENGINE_STALE_MESSAGES = _engine("dualpath_engine_stale_messages_total", "Orders for an attempt that is over")
_link = partial(Metric, "cluster/control_link.py", by_engine=True)
ENGINE_MALFORMED_MESSAGES = _link("dualpath_engine_malformed_messages_total", "Messages that the engine can't decode")
_host = partial(Metric, "cluster/agent/host.py", by_engine=True)
BUFFER_FREE_BLOCKS = _host("dualpath_buffer_free_blocks", "Pages of the engine's buffer that nobody holds")
BUFFER_HELD_BLOCKS = _host("dualpath_buffer_held_blocks", "Pages that an attempt holds")
BUFFER_QUARANTINED_BLOCKS = _host("dualpath_buffer_quarantined_blocks", "Pages that a lost peer might still write to")
BUFFER_HIGH_WATER_BLOCKS = _host("dualpath_buffer_high_water_blocks", "The most pages that were taken at one time")
_UNPROVEN = "Connections to the data port that did not prove that they have the cluster's secret, or were too many"
DATA_REFUSED = _host("dualpath_data_refused_total", _UNPROVEN, unit="connections")
_NIC = "Bytes through the engine's storage NIC (snic) and compute NIC (cnic)"
NIC_BYTES = _host("dualpath_nic_bytes_total", _NIC, ("nic", "direction", "traffic_class", "node"))
_io = partial(Metric, "cluster/agent/block_io.py", by_engine=True)
BLOCK_IO_RUNNING = _io("dualpath_block_io_running", "Reads and writes of blocks in progress", ("work",), "jobs")
BLOCK_IO_HUNG = _io("dualpath_block_io_hung", "Those that have missed their deadline and not ended", ("work",), "jobs")
BLOCK_IO_LATE = _io("dualpath_block_io_late_total", "Those that have missed their deadline", ("work",), "jobs")
_IO_TROUBLE = "For how long the engine finds the store unreachable, slow or read-only; 0: it does not"
BLOCK_IO_TROUBLE = _io("dualpath_block_io_trouble_seconds", _IO_TROUBLE, ("trouble",))
_prefill = partial(Metric, "cluster/agent/prefill.py", by_engine=True)
_decode = partial(Metric, "cluster/agent/decode.py", by_engine=True)
PREFILL_WAITING_TOKENS = _prefill("dualpath_prefill_waiting_tokens", "Tokens that wait to be prefilled")
PREFILL_PEAK_KV_BYTES = Metric(
    "cluster/engines/prefill.py",
    "dualpath_prefill_peak_device_kv_bytes",
    "The most KV on the device at one time",
    by_engine=True,
)
PREFILL_BATCHES = _prefill("dualpath_prefill_batches_total", "Batches prefilled")
PREFILL_CHUNKS = _prefill("dualpath_prefill_chunks_total", "Chunks of prompts in these batches")
PREFILL_TOKENS = _prefill("dualpath_prefill_tokens_total", "Tokens computed in them (miss tokens)")
DECODE_RUNNING_REQUESTS = _decode("dualpath_decode_running_requests", "Requests in the running batch")
DECODE_STEPS = _decode("dualpath_decode_steps_total", "Steps of the running batch")
DECODE_TOKENS = _decode("dualpath_decode_tokens_total", "Tokens generated in them")
HBM_FREE_BLOCKS = Metric(
    "cluster/engines/decode.py",
    "dualpath_hbm_free_blocks",
    "Full Blocks of device memory that nobody holds",
    by_engine=True,
)
_writes = partial(Metric, "cluster/agent/decode_attempt.py", by_engine=True)
STORE_WRITE_ERRORS = _writes("dualpath_store_write_errors_total", "Writes of blocks that failed; generation goes on")

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in globals().values() if isinstance(metric, Metric)}
ENGINE_COUNTERS = [m for m in CATALOGUE.values() if m.by_engine and m.kind == "counter" and not m.labels]
"""Counters that are shown as 0 from the start, so that a rate includes the first increment."""


def of_engine(sample: Sample, engine: int, role: str) -> Sample:
    """Returns an engine's series with the cluster's labels. It need not be in the catalogue."""
    name, _, labels = sample.partition("{")
    return Sample(f'{name}{{engine="{engine}",role="{role}"{"," if labels else ""}{labels or "}"}')


@lru_cache(maxsize=4096)
def metric_of(sample: Sample) -> Metric | None:
    """Returns a series' metric; None when the catalogue has none of that name with those labels."""
    name, _, labels = sample.partition("{")
    metric, found = CATALOGUE.get(name), dict(_LABELS.findall(labels))
    if metric is None or tuple(found) != metric.shown_labels or _series(name, found) != sample:
        return None  # a known series in another spelling could appear twice, which makes the answer unreadable
    return metric


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _series(name: str, labels: dict[str, str]) -> Sample:
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return Sample(f"{name}{{{inside}}}" if inside else name)


def document() -> Iterator[str]:
    """Yields the lines of ``docs/metrics.md``."""
    yield "# Metrics\n\nEvery series of `/metrics`. Engines send theirs; the coordinator adds `engine` and `role`."
    yield "\n`python -m dualpath.spec.metrics > docs/metrics.md` writes this file from"
    yield "[spec/metrics.py](../src/dualpath/spec/metrics.py).\n"
    yield "| name | kind | labels | unit | what | measured in |\n|---|---|---|---|---|---|"
    for metric in CATALOGUE.values():
        labels = ", ".join(f"`{label}`" for label in metric.shown_labels)
        file = f"[{metric.where}](../src/dualpath/{metric.where})"
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.shown_unit} | {metric.help} | {file} |"


if __name__ == "__main__":
    print("\n".join(document()))
