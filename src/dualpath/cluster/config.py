"""A cluster's settings: one record, filled from the command line and sent to every engine process."""

import os
from typing import Annotated, Any, Literal, get_args

import msgspec

from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.vllm_settings import VllmSettings
from dualpath.core.policy import QUOTA_NS, Policy
from dualpath.core.systems import HEADLINE, find_system
from dualpath.core.vocabulary import Role
from dualpath.spec.cluster_setup import ENGINES, ClusterSetup, ServedCluster
from dualpath.spec.generation_defaults import GENERATION_CONFIGS, GenerationDefaults, read_generation_defaults
from dualpath.spec.kv_bytes import KVBytes
from dualpath.spec.log import FORMATS
from dualpath.spec.sampling import LogprobsMode
from dualpath.spec.topology import Rates, Topology
from dualpath.transfer import TRANSPORTS

HBM_BYTES = 2**30
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_COPIES = ("memcpy", "cnic")


class KVEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV events are published: the fields of vLLM's ``--kv-events-config``, with its defaults but one."""

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] | None = None
    """None: ``zmq`` when events are enabled."""
    endpoint: str | None = None
    """None: port 5557 of loopback alone, where vLLM listens everywhere: events have prompts' tokens."""
    replay_endpoint: str | None = None
    buffer_steps: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    """Batches that can be replayed."""
    hwm: Annotated[int, msgspec.Meta(ge=1)] = 100_000
    """Batches that wait for a subscriber; more are dropped, for it alone."""
    max_queue_size: int = 100_000
    """Not used: no queue stands before the socket."""
    topic: str = ""

    @property
    def enabled(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `dualpath serve` decides. Rates are in bytes per second, of all nodes or of each group of the
    topology; None means no limit."""

    model: str
    store: str
    engine: str = "dualpath"
    """What computes: ``dualpath``, the embedded engine, or ``vllm``, servers of vLLM with our connector."""
    vllm: VllmSettings = VllmSettings()
    topology: Topology = Topology(1, 1)
    system: str = HEADLINE
    rules: Policy | None = None
    """The system's policy, looked up by its name when not given; engines therefore need not know the name."""
    snic_bytes_per_s: Rates = None
    cnic_bytes_per_s: Rates = None
    buffer_bytes: int = 2**30
    """Size of each engine's PE buffer or DE buffer."""
    hbm_bytes: int = HBM_BYTES
    """Device memory for KV on each decode engine; with vLLM on each engine."""
    store_quota_bytes: int | None = None
    store_timeout_s: float = 10.0
    """Longest time for one block, or for one look at the store. A store that takes longer does not answer."""
    durable: bool = True
    """fsync every block before it is published."""
    transport: str = "shm"
    """How KV moves between engines: a name in `dualpath.transfer.TRANSPORTS`."""
    data_host: str = "127.0.0.1"
    """Address at which other hosts reach this host's engines, for a transport between hosts."""
    device_copies: str = "memcpy"
    """How KV is copied between host memory and the device: by ``memcpy``, or through the compute NIC (``cnic``)."""
    device: str = "cpu"
    dtype: str = "auto"
    """``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's own on a GPU, float32 on a CPU."""
    threads: int = 1
    quota_ns: int = QUOTA_NS
    """Compute quota of a prefill batch: predicted attention-layer time (paper §6.2)."""
    max_batch_tokens: int = 8192
    """Most new tokens in a prefill batch."""
    max_batch_kv_tokens: int = 32_768
    """Most hit and new tokens together in a prefill batch, unless one prompt alone has more."""
    max_batch_requests: int = 16
    device_layers: int = 3
    """Layers whose KV a prefill device holds at once."""
    max_waiting: int = 1024
    """Most requests that wait for engines; beyond that, clients get 429."""
    max_attempts: int = 3
    request_deadline_ns: int = 300_000_000_000
    """Longest stay in any one stage of a request's life."""
    prefix_cache: bool = True
    """False: no prefix is matched, so every prompt token is computed; blocks are still written to storage."""
    lease_ns: int = 5_000_000_000
    """An engine that is silent for this long is lost."""
    heartbeat_ns: int = 200_000_000
    grace_s: float = 600.0
    """How long an engine that has lost its coordinator, or waits for its first, keeps its memory before it leaves."""
    replacement_timeout_s: float = 30.0
    """How long requests wait for a new engine when the last one of its role is lost; 0: they fail at once."""
    join_timeout_s: float = 180.0
    """How long engines may take to import torch, load the model and join, when a cluster starts."""
    control_address: str = "tcp://127.0.0.1:0"
    """Address at which engines join; port 0 picks a free port."""
    cluster_secret: ClusterSecret | None = None
    """What the cluster's processes know each other by. None: one is made at start, for this host alone."""
    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: str | None = None
    """The server's certificate, with its chain: it then speaks HTTPS alone."""
    ssl_keyfile: str | None = None
    """That certificate's key, where it is not in the same file."""
    ssl_ca_certs: str | None = None
    """Whose certificates clients may show."""
    ssl_cert_reqs: int = 0
    """Whether clients must show one: 0 no, 1 they may, 2 they must; as Python's `ssl.VerifyMode`."""
    api_keys: tuple[str, ...] = ()
    """Keys that clients need, if any. Engines are not told."""
    drain_s: float = 20.0
    """How long running requests have to end when the server is told to stop."""
    enable_control: bool = False
    """Open the server's endpoints for trainers: pause, other weights, sleep."""
    served_model_name: str | None = None
    """The name that answers carry; the checkpoint's directory, or its name in a hub, when not given."""
    served_model_aliases: tuple[str, ...] = ()
    """More names that requests may use."""
    generation_config: str = "auto"
    """``auto``: the model's generation_config.json has the defaults of sampling; ``vllm``: it is ignored, as there."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    """Of which distribution log-probabilities are, for requests that don't say."""
    tool_call_parser: str | None = None
    """How the model writes tool calls, a name of vLLM's; None: as its chat template says; "none": it has none."""
    reasoning_parser: str | None = None
    """How the model marks reasoning, likewise."""
    access_log: bool = False
    log_format: str = "text"
    """``text`` or ``json``."""
    otlp_traces_endpoint: str | None = None
    """Where traces are sent, such as http://localhost:4318/v1/traces; None: there are none."""
    kv_events: KVEventsConfig | None = None
    """None: not published."""
    journal: str | None = None
    """File for every scheduler input and its commands, one JSON line each."""
    ready_file: str | None = None
    """File that is there while requests are served, and says where and by whom."""
    weights_version: str = ""

    def __post_init__(self) -> None:
        if self.rules is None:
            msgspec.structs.force_setattr(self, "rules", find_system(self.system).policy)
        for name in (
            "buffer_bytes",
            "hbm_bytes",
            "threads",
            "quota_ns",
            "max_waiting",
            "lease_ns",
            "heartbeat_ns",
            "store_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not isinstance(self.topology, Topology):
            raise ValueError(f"topology is {self.topology!r}; give Topology.parse('1P2D')")
        for name in ("snic_bytes_per_s", "cnic_bytes_per_s"):
            rates = getattr(self, name)
            if any(rate is not None and rate <= 0 for rate in self.topology.by_node(rates)):
                raise ValueError(f"{name} is {rates}; it must be above 0, or None for no limit")
        for name in ("grace_s", "join_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number of seconds above 0")
        for name in ("drain_s", "replacement_timeout_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number of seconds, 0 or more")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs):
            raise ValueError("--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"--ssl-cert-reqs is {self.ssl_cert_reqs}; it must be 0, 1 (optional) or 2 (required)")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ValueError("--ssl-cert-reqs needs --ssl-ca-certs: whose certificates clients may show")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535")
        if self.generation_config not in GENERATION_CONFIGS:
            raise ValueError(f"generation_config is {self.generation_config!r}; give {' or '.join(GENERATION_CONFIGS)}")
        if self.logprobs_mode not in get_args(LogprobsMode):
            raise ValueError(f"logprobs_mode is {self.logprobs_mode!r}; give {' or '.join(get_args(LogprobsMode))}")
        for name, allowed in (
            ("dtype", DTYPES),
            ("log_format", FORMATS),
            ("engine", ENGINES),
            ("device_copies", DEVICE_COPIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.device_copies == "cnic" and self.engine == "vllm":
            raise ValueError("--device-copies cnic: vLLM copies by itself; leave it out, or use --engine dualpath")
        TRANSPORTS.get(self.transport)  # raises UnknownNameError, which is a ValueError
        if self.device_layers < 3:
            raise ValueError("device_layers must be at least 3: one loading, one computing, one shipping")

    def __repr__(self) -> str:
        """Keys are counted, not shown."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "api_keys"}
        fields = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"ClusterConfig({fields}, api_keys=<{len(self.api_keys)}>)"

    def without_api_keys(self) -> "ClusterConfig":
        """Returns the settings for a process that needs no client's key."""
        return msgspec.structs.replace(self, api_keys=())

    def without_secrets(self) -> "ClusterConfig":
        """Returns the settings for a process that speaks only with its parent and its node's agent."""
        return msgspec.structs.replace(self.without_api_keys(), cluster_secret=None)

    @property
    def secret(self) -> ClusterSecret:
        """The cluster's secret; every process of a cluster has one, given or made."""
        assert self.cluster_secret is not None, "a secret is made before engines start"
        return self.cluster_secret

    @property
    def tls(self) -> dict[str, Any]:
        """uvicorn's settings of TLS; empty for none."""
        names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs")
        return {} if self.ssl_certfile is None else {name: getattr(self, name) for name in names}

    @property
    def policy(self) -> Policy:
        assert self.rules is not None
        return self.rules

    def of_node(self, role: Role, rank: int) -> "ClusterConfig":
        """Returns the settings of one node: every node has its size and its rates. Ranks beyond the topology's are
        like the last."""
        whole = self.topology
        first, nodes = (0, whole.prefill_nodes) if role is Role.PREFILL else (whole.prefill_nodes, whole.decode_nodes)
        node = first + min(rank, nodes - 1)
        return msgspec.structs.replace(
            self,
            topology=Topology(1, 1, whole.sizes[node]),
            snic_bytes_per_s=whole.by_node(self.snic_bytes_per_s)[node],
            cnic_bytes_per_s=whole.by_node(self.cnic_bytes_per_s)[node],
        )

    @property
    def snic_rate(self) -> int | None:
        """The rate that prefill nodes enforce (their mean); None when the policy says that I/O costs nothing (oracle).
        Also a decode node's, in the settings of that node alone."""
        return self._enforced(self.snic_bytes_per_s)

    @property
    def cnic_rate(self) -> int | None:
        return self._enforced(self.cnic_bytes_per_s)

    @property
    def copies_pass_cnic(self) -> bool:
        """Whether copies between host and device are charged to the CNIC's lanes: those that pass it, and all where its
        rate is emulated, since then so is the paper's node."""
        return self.device_copies == "cnic" or self.cnic_rate is not None

    def _enforced(self, rates: Rates) -> int | None:
        each = [rate for rate in self.topology.by_node(rates)[: self.topology.prefill_nodes] if rate is not None]
        return None if self.policy.free_io or not each else round(sum(each) / len(each))

    def generation_defaults(self) -> GenerationDefaults:
        """Returns what requests get that don't say otherwise. Raises ValueError for a file that makes no sense."""
        fields: dict[str, Any] = {} if self.generation_config == "vllm" else read_generation_defaults(self.model)
        return GenerationDefaults(**fields, logprobs_mode=self.logprobs_mode)

    def served(self, layers: int, kv_bytes: KVBytes) -> ServedCluster:
        """Returns what clients are told of the cluster, to simulate it."""
        setup = ClusterSetup(
            layers=layers,
            kv_bytes_per_token=kv_bytes.bytes_per_token,
            kv_windows=kv_bytes.windows,
            snic_bytes_per_s=None if self.policy.free_io else self.snic_bytes_per_s,
            cnic_bytes_per_s=None if self.policy.free_io else self.cnic_bytes_per_s,
            compute_quota_s=self.quota_ns / 1e9,
            threads=self.threads,
            cores=len(os.sched_getaffinity(0)),
            dtype=self.dtype,
            transport=self.transport,
        )
        return ServedCluster(topology=str(self.topology), system=self.system, setup=setup)
