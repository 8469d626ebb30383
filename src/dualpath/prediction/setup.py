"""What is to be predicted of one run, taken from a result file: its cluster and its agents, and nothing it measured."""

import re

import msgspec

from dualpath.core.policy import SYSTEMS
from dualpath.prediction.machine import MachineError, MachineRates
from dualpath.report.result_file import ResultFile, Run
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.workload.trajectory import Trajectory

_TOPOLOGY = re.compile(r"([1-9]\d*)P([1-9]\d*)D")


class RunSetup(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster on a measured machine, and who asks it what. Rates in bytes per second, None for no limit."""

    rates: MachineRates
    prefill_engines: int
    decode_engines: int
    system: str
    snic_bytes_per_s: int | None
    cnic_bytes_per_s: int | None
    compute_quota_s: float
    transport: str
    trajectories: tuple[Trajectory, ...]
    first_round: int
    """Rounds before it are in storage."""
    gap_scale: float = 1.0
    """Factor on the agents' pauses."""
    paced: bool
    """The traffic manager keeps the compute NICs' rates, chunk by chunk; else the kernel does."""
    slowness: float
    """How many times as long everything takes on the cores as when the machine was calibrated."""


def setup_of(result: ResultFile, number: int, rates: MachineRates, as_calibrated: bool = False) -> RunSetup:
    """The setup of run `number`, on the machine as fast as it was meanwhile or, `as_calibrated`, as then.

    Raises MachineError where the file does not say what was set up, or the machine is for another.
    """
    run = result.runs[number]
    name = f"run {number} ({run.topology} {run.system})"
    if run.cluster is None or run.trajectories not in result.trajectories:
        raise MachineError(
            f"{name} does not say what its {'cluster was' if run.cluster is None else 'agents asked'}; results of "
            "dualpath demo and experiment do, and of replays against dualpath serve"
        )
    if result.kind == "replay" and (run.agents_per_s is not None or len(run.parts) > 1):
        raise MachineError(
            f"{name}: of replays only those whose agents all start at once, without --resume, can be predicted"
        )
    topology = _TOPOLOGY.fullmatch(run.topology)
    if topology is None or run.system not in SYSTEMS:
        raise MachineError(f"{name}: only runs of a topology such as 1P2D and of dualpath's systems can be predicted")
    _check(name, run.cluster, rates)
    return RunSetup(
        rates=msgspec.structs.replace(rates, cores=run.cluster.cores),
        prefill_engines=int(topology[1]),
        decode_engines=int(topology[2]),
        system=run.system,
        snic_bytes_per_s=run.cluster.snic_bytes_per_s,
        cnic_bytes_per_s=run.cluster.cnic_bytes_per_s,
        compute_quota_s=run.cluster.compute_quota_s,
        transport=run.cluster.transport,
        trajectories=tuple(result.trajectories[run.trajectories]),
        first_round=run.first_round,
        gap_scale=run.gap_scale,
        paced=run.cluster.links == "emulated",
        slowness=_slowness(run, rates, as_calibrated),
    )


def _slowness(run: Run, rates: MachineRates, as_calibrated: bool) -> float:
    return 1.0 if run.reference_ns is None or as_calibrated else run.reference_ns / rates.reference_ns


def _check(name: str, cluster: ClusterSetup, rates: MachineRates) -> None:
    """The machine was measured with this model, in this dtype, with as many threads."""
    for what, ran, measured in (
        ("layers", cluster.layers, rates.layers),
        ("bytes of KV a token", cluster.kv_bytes_per_token, rates.kv_bytes_per_token),
        ("as dtype", cluster.dtype, rates.dtype),
        ("threads an engine", cluster.threads, rates.threads),
    ):
        if ran != measured:
            raise MachineError(
                f"{name} ran with {ran} {what}, the machine was measured with {measured}; run dualpath calibrate with "
                "its model, --dtype and --threads"
            )
    if cluster.transport not in rates.transports:
        known = ", ".join(rates.transports)
        raise MachineError(f"{name} moved KV over {cluster.transport!r}, the machine was measured with {known}")
