"""How a result was made, as pairs of a name and a value."""

from collections.abc import Iterable

from dualpath.results.file import ResultFile
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.spec.topology import Rates
from dualpath.spec.units import format_bytes, format_rate


def provenance(result: ResultFile) -> list[tuple[str, str]]:
    """Configuration and workload; the cluster's setup too, if all runs had the same."""
    made, work = result.configuration, result.workload
    rows = [
        ("machine", made.machine),
        ("model", made.model),
        ("topologies", ", ".join(made.topologies)),
        ("systems", ", ".join(made.systems)),
        ("storage NIC", _rate(made.snic_bytes_per_s)),
        ("compute NIC", _rate(made.cnic_bytes_per_s)),
        ("repeats", f"{made.repeats}"),
        ("seed", f"{made.seed}"),
        ("agents", f"{work.agents}, {work.source}"),
        ("appended tokens", f"{work.append_tokens:,}"),
        ("generated tokens", f"{work.generate_tokens:,}"),
        ("before the clock starts", work.warm_up),
    ]
    clusters = [run.cluster for run in result.runs if run.cluster is not None]
    return rows + (_cluster(clusters) if clusters else [])


def _cluster(clusters: list[ClusterSetup]) -> list[tuple[str, str]]:
    return [
        ("layers", _same(f"{one.layers}" for one in clusters)),
        ("KV per token", _same(format_bytes(one.kv_bytes_per_token) for one in clusters)),
        ("compute quota", _same(f"{one.compute_quota_s * 1e3:g} ms" for one in clusters)),
        ("threads of an engine", _same(f"{one.threads}" for one in clusters)),
        ("cores", _same(f"{one.cores}" for one in clusters)),
        ("data type", _same(one.dtype for one in clusters)),
        ("transport", _same(one.transport for one in clusters)),
        ("links", _same(one.links for one in clusters)),
    ]


def _same(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _rate(rates: Rates) -> str:
    each = rates if isinstance(rates, tuple) else (rates,)
    return "not limited" if rates is None else " + ".join(map(format_rate, each))
