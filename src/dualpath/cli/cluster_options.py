"""Options that `serve` and `engine` share. `ClusterConfig` has their names, defaults and checks."""

import argparse
from pathlib import Path
from typing import Any, get_args

import msgspec

from dualpath.cli.arguments import byte_count, milliseconds, positive, rate, system, topology
from dualpath.cli.outcome import UsageError, usage_errors
from dualpath.cluster.config import ClusterConfig
from dualpath.spec.generation_defaults import GENERATION_CONFIGS
from dualpath.spec.sampling import LogprobsMode
from dualpath.transfer import TRANSPORTS

DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(ClusterConfig)}


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")

    def option(flag: str, field: str, text: str, kind: Any = str, metavar: str | None = None, **more: Any) -> None:
        group.add_argument(flag, dest=field, type=kind, metavar=metavar, default=DEFAULTS[field], help=text, **more)

    group.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint")
    group.add_argument("--store", required=True, metavar="PLACE", help="store of KV blocks: a directory, or a URL")
    option("--topology", "topology", "prefill and decode nodes, such as 1P2D (default: %(default)s)", topology, "T")
    option("--system", "system", "one of the systems below (default: %(default)s)", system, "NAME")
    option("--snic-rate", "snic_bytes_per_s", "rate of each storage NIC (default: unlimited)", rate, "RATE")
    option("--cnic-rate", "cnic_bytes_per_s", "rate of each compute NIC (default: unlimited)", rate, "RATE")
    option("--buffer", "buffer_bytes", "size of a PE or DE buffer (default: 1GiB)", byte_count, "SIZE")
    option("--hbm", "hbm_bytes", "KV memory of a DE (default: 1GiB)", byte_count, "SIZE")
    option("--store-quota", "store_quota_bytes", "evict blocks beyond this (default: no quota)", byte_count, "SIZE")
    transports = f"{', '.join(TRANSPORTS.names())}, or MODULE:ATTRIBUTE"
    option("--transport", "transport", f"between engines: {transports} (default: %(default)s)", metavar="NAME")
    at = "address at which engines on other hosts reach this host's engines (default: %(default)s)"
    option("--data-host", "data_host", at, metavar="HOST")
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
    option("--dtype", "dtype", "(default: %(default)s)", choices=("float32", "bfloat16", "float16"))
    option("--device", "device", "cpu, or cuda where there is one (default: %(default)s)")


def cluster_config(arguments: argparse.Namespace) -> ClusterConfig:
    """Makes the configuration from the options. Raises UsageError."""
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS}
    given["api_keys"] = tuple(given.get("api_keys", ()))
    if not (Path(arguments.model) / "config.json").is_file():
        raise UsageError(f"--model: {arguments.model} has no config.json; give a Hugging Face checkpoint's directory")
    _check_store(arguments.store)
    with usage_errors(ValueError):
        return ClusterConfig(**given)


def _check_store(location: str) -> None:
    """Checks the store's location here, so that one error is shown and not one per engine."""
    from dualpath.kv import StoreLocationError, open_store

    with usage_errors(StoreLocationError):
        open_store(location)
