"""The cluster that is measured, simulated: what a fit sets its measurements against."""

import statistics

import msgspec

from dualpath.calibration.kinds import Kind
from dualpath.prediction.machine import MachineRates
from dualpath.prediction.setup import RunSetup
from dualpath.prediction.turns import Turn
from dualpath.workload import Trajectory


def setup(rates: MachineRates, trajectories: tuple[Trajectory, ...], slowness: float = 1.0) -> RunSetup:
    """One PE and one DE without limits, and who asks them after the warm-up."""
    return RunSetup(
        rates=rates,
        prefill_engines=1,
        decode_engines=1,
        system="dualpath",
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        compute_quota_s=0.3,
        transport="shm",
        trajectories=trajectories,
        first_round=1,
        paced=True,
        slowness=slowness,
    )


def lone(kind: Kind) -> Trajectory:
    """A few requests of a kind, one by one, after its warm-up."""
    trajectory = kind.trajectory()
    return msgspec.structs.replace(trajectory, rounds=trajectory.rounds[:3])


def mean_ttft_ns(turns: list[Turn]) -> float:
    return statistics.mean(turn.first_token_ns - turn.sent_ns for turn in turns)
