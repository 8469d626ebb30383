"""Options that `serve` and `engine` share. `ClusterConfig` has their names, defaults and checks."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec

from dualpath.cli.arguments import byte_count, milliseconds, positive, rates, system, topology
from dualpath.cli.outcome import UsageError, usage_errors
from dualpath.cluster.cluster_secret import SECRET_VARIABLE, ClusterSecret
from dualpath.cluster.config import DEVICE_COPIES, DTYPES, ClusterConfig, KVEventsConfig
from dualpath.cluster.vllm_settings import VllmSettings
from dualpath.spec.cluster_setup import ENGINES
from dualpath.spec.generation_defaults import GENERATION_CONFIGS
from dualpath.spec.sampling import LogprobsMode
from dualpath.transfer import TRANSPORTS

DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(ClusterConfig)}


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines")
    option = partial(_add_option, group)
    group.add_argument(
        "--model", metavar="DIR", help="a Hugging Face checkpoint's directory, or its name in the local cache"
    )
    what = "what computes: dualpath, or servers of vLLM (default: %(default)s)"
    option("--engine", "engine", what, choices=ENGINES)
    pythons = "of an environment with vLLM and dualpath (default: this one's, else .venv-vllm of the clone)"
    group.add_argument("--vllm-python", metavar="PYTHON", default="", help=pythons)
    hosts = "where vLLM's servers listen, for the router and the node's agent (default: --data-host)"
    group.add_argument("--vllm-host", metavar="ADDRESS", default="", help=hosts)
    logs = "folder for the logs of vLLM's servers (default: one is made, and named)"
    group.add_argument("--vllm-logs", metavar="DIR", default="", help=logs)
    nodes = "nodes, such as 1P2D, 1P2Dx4 with four engines each, or 1Px4+2Dx2 (default: %(default)s)"
    option("--topology", "topology", nodes, topology, "T")
    memory = "KV memory of a DE; of each vLLM server (default: 1GiB; with vLLM on a GPU what is left)"
    option("--hbm", "hbm_bytes", memory, byte_count, "SIZE")
    option("--threads", "threads", "torch threads per engine (default: %(default)s)", positive, "N")
    option(
        "--quota-ms",
        "quota_ns",
        f"compute quota of a prefill batch (default: {DEFAULTS['quota_ns'] / 1e6:g})",
        milliseconds,
        "MS",
    )
    option(
        "--generation-config",
        "generation_config",
        "auto: sampling defaults of the model's generation_config.json; vllm: none (default: %(default)s)",
        choices=GENERATION_CONFIGS,
    )
    option(
        "--logprobs-mode",
        "logprobs_mode",
        "log-probabilities of the model's own distribution, or of the one drawn from (default: %(default)s)",
        choices=get_args(LogprobsMode),
    )
    dtypes = "auto is the checkpoint's own on a GPU, float32 on a CPU (default: %(default)s)"
    option("--dtype", "dtype", dtypes, choices=DTYPES)
    option("--device", "device", "cpu, or cuda where there is one (default: %(default)s)")
    copies = "KV between host and device by memcpy, or through the compute NIC: cnic, with NIXL (default: %(default)s)"
    option("--device-copies", "device_copies", copies, choices=DEVICE_COPIES)
    add_node_options(parser)


def add_node_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a node's agent must know, whatever its engines are."""
    group = parser.add_argument_group("cluster")
    option = partial(_add_option, group)
    group.add_argument("--store", metavar="PLACE", help="store of KV blocks: a directory, or a URL")
    option("--system", "system", "one of the systems below (default: %(default)s)", system, "NAME")
    of_groups = ", or of each group of nodes, such as 100MB/s+50MB/s (default: unlimited)"
    option("--snic-rate", "snic_bytes_per_s", f"rate of each node's storage NIC{of_groups}", rates, "RATE")
    option("--cnic-rate", "cnic_bytes_per_s", f"rate of each engine's compute NIC{of_groups}", rates, "RATE")
    option("--buffer", "buffer_bytes", "size of a PE or DE buffer (default: 1GiB)", byte_count, "SIZE")
    option("--store-quota", "store_quota_bytes", "evict blocks beyond this (default: no quota)", byte_count, "SIZE")
    late = "seconds for one block; a store that takes longer does not answer (default: %(default)g)"
    option("--store-timeout", "store_timeout_s", late, float, "S")
    transports = f"{', '.join(TRANSPORTS.names())}, or MODULE:ATTRIBUTE"
    option("--transport", "transport", f"between engines: {transports} (default: %(default)s)", metavar="NAME")
    at = "address at which engines on other hosts reach this host's engines (default: %(default)s)"
    option("--data-host", "data_host", at, metavar="HOST")
    secret = (
        f"what the cluster's processes know each other by; or ${SECRET_VARIABLE} (default: made for this host alone)"
    )
    option("--cluster-secret-file", "cluster_secret", secret, cluster_secret, "FILE")
    grace = "seconds that an engine without a coordinator keeps its memory before it leaves (default: %(default)g)"
    option("--grace", "grace_s", grace, float, "S")


def _add_option(
    group: Any, flag: str, field: str, text: str, kind: Any = str, metavar: str | None = None, **more: Any
) -> None:
    group.add_argument(flag, dest=field, type=kind, metavar=metavar, default=DEFAULTS[field], help=text, **more)


def kv_events(text: str) -> KVEventsConfig:
    """The type of --kv-events-config."""
    try:
        return msgspec.json.decode(text, type=KVEventsConfig)
    except msgspec.MsgspecError as error:
        example = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'
        raise argparse.ArgumentTypeError(f"{error}; give JSON such as {example}") from None


def cluster_secret(path: str) -> ClusterSecret:
    """The type of --cluster-secret-file."""
    try:
        return ClusterSecret.of_file(Path(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cluster_config(arguments: argparse.Namespace, starts_engines: bool = True) -> ClusterConfig:
    """Makes the configuration from the options. Processes that this one starts don't inherit the environment's secret.

    Raises UsageError.
    """
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS}
    for name in ("model", "store"):
        if given.get(name) is None:
            raise UsageError(f"give --{name}")
    from dualpath.cluster.preflight import settled
    from dualpath.kv import StoreError

    with usage_errors(ValueError, StoreError):
        given["vllm"] = _vllm(arguments)
        config = settled(ClusterConfig(**given), starts_engines)
    os.environ.pop(SECRET_VARIABLE, None)
    return config


def _vllm(arguments: argparse.Namespace) -> VllmSettings:
    """Raises UsageError, or ValueError for an argument of vLLM's that is ours."""
    passed = after_dashes(arguments.command_line)
    ours = {name: getattr(arguments, f"vllm_{name}") for name in ("python", "host", "logs")}
    if arguments.engine != "vllm" and (passed or any(ours.values())):
        raise UsageError("--vllm-… and what follows -- are for vLLM: give --engine vllm too")
    return VllmSettings(arguments=passed, **ours)


def before_dashes(command_line: Sequence[str]) -> list[str]:
    """Returns the part of a command line that is ours."""
    return list(command_line[: command_line.index("--")] if "--" in command_line else command_line)


def after_dashes(command_line: Sequence[str]) -> tuple[str, ...]:
    """Returns what follows ``--``: vLLM's arguments."""
    return tuple(command_line[len(before_dashes(command_line)) + 1 :])
