"""The options that `serve` and `engine` share, and the configuration they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import SYSTEMS, byte_count, positive, positive_number, rate
from dualpath.cli.outcome import UsageError, usage_errors

if TYPE_CHECKING:
    from dualpath.cluster.config import ClusterConfig


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint")
    group.add_argument("--store", required=True, metavar="PLACE", help="of KV blocks: a directory, or a URL")
    group.add_argument(
        "--topology", default="1P1D", help="prefill and decode nodes, such as 1P2D (default: %(default)s)"
    )
    group.add_argument("--system", choices=SYSTEMS, default="dualpath", help="see below (default: %(default)s)")
    group.add_argument("--snic-rate", type=rate, metavar="RATE", help="of each storage NIC (default: unlimited)")
    group.add_argument("--cnic-rate", type=rate, metavar="RATE", help="of each compute NIC (default: unlimited)")
    group.add_argument(
        "--buffer", type=byte_count, default="1GiB", metavar="SIZE", help="PE or DE buffer (%(default)s)"
    )
    group.add_argument("--hbm", type=byte_count, default="1GiB", metavar="SIZE", help="KV memory of a DE (%(default)s)")
    group.add_argument("--store-quota", type=byte_count, metavar="SIZE", help="evict beyond this (default: no quota)")
    group.add_argument("--transport", choices=("shm", "tcp"), default="shm", help="engine to engine (%(default)s)")
    group.add_argument(
        "--data-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address at which other engines reach this host's with --transport tcp (default: %(default)s)",
    )
    group.add_argument("--threads", type=positive, default=1, metavar="N", help="torch's, per engine (%(default)s)")
    group.add_argument(
        "--quota-ms", type=positive_number, default=300, metavar="MS", help="compute quota (%(default)s)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--device", default="cpu", help="cpu, or cuda where there is one (default: %(default)s)")


def cluster_config(arguments: argparse.Namespace) -> "ClusterConfig":
    from dualpath.cluster.config import ClusterConfig, Topology

    given: dict[str, Any] = {
        "model": arguments.model,
        "store": arguments.store,
        "system": arguments.system,
        "snic_bytes_per_s": arguments.snic_rate,
        "cnic_bytes_per_s": arguments.cnic_rate,
        "buffer_bytes": arguments.buffer,
        "hbm_bytes": arguments.hbm,
        "store_quota_bytes": arguments.store_quota,
        "transport": arguments.transport,
        "data_host": arguments.data_host,
        "threads": arguments.threads,
        "quota_ns": round(arguments.quota_ms * 1_000_000),
        "dtype": arguments.dtype,
        "device": arguments.device,
    }
    if arguments.command == "serve":
        given |= {
            "host": arguments.host,
            "port": arguments.port,
            "api_keys": tuple(arguments.api_key),
            "served_model_name": arguments.name,
            "max_waiting": arguments.max_waiting,
            "journal": arguments.journal,
            "ready_file": arguments.ready_file,
        }
        given |= {"control_address": arguments.join_address} if arguments.join_address else {}
    if not (Path(arguments.model) / "config.json").is_file():
        raise UsageError(f"--model: {arguments.model} has no config.json; give a Hugging Face checkpoint's directory")
    _check_store(arguments.store)
    with usage_errors(ValueError):
        return ClusterConfig(topology=Topology.parse(arguments.topology), **given)


def _check_store(location: str) -> None:
    """What makes no store is better told now than by every engine."""
    from dualpath.kv import StoreLocationError, open_store

    with usage_errors(StoreLocationError):
        open_store(location)
