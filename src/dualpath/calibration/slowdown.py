"""What busy cores take from each other: one factor, from crowds of agents.

Agents that ask at once take longer than they do in the simulation of lone parts. The slowdown is the one with which
the crowds' completion times are least off; their CPU time, which has no waiting in it, gives another.
"""

import functools
from collections.abc import Callable

import msgspec

from dualpath.calibration.busy import CROWDS, Busy, mean_of
from dualpath.calibration.simulated import setup
from dualpath.prediction.machine import MachineRates
from dualpath.prediction.predict import simulate

MAX_OTHERS_CORES = 0.1
"""Beyond it, times of a busy cluster say more of what else ran than of the cluster."""
MOST, COARSE, FINE = 3.0, 0.1, 0.02
"""Slowdowns that are tried: up to `MOST` in coarse steps, then in fine ones around the best."""


def fit_slowdown(rates: MachineRates, busy: dict[str, Busy]) -> MachineRates:
    """By completion times, or by CPU time alone where others kept cores busy."""
    over_all = mean_of(list(busy.values()))
    rates = msgspec.structs.replace(rates, reference_ns=over_all.reference_ns, others_cores=over_all.others_cores)

    def off(slowdown: float) -> tuple[float, float]:
        """Squared relative errors of the crowds' completion times and CPU times."""
        slowed = msgspec.structs.replace(rates, slowdown=slowdown)
        time_error = cpu_error = 0.0
        for name, measured in busy.items():
            cluster, _, jct_ns = simulate(setup(slowed, CROWDS[name], measured.reference_ns / rates.reference_ns))
            time_error += (jct_ns / measured.jct_ns - 1) ** 2
            cpu_error += (cluster.cpu.busy_core_ns / measured.cpu_ns - 1) ** 2
        return time_error, cpu_error

    tried = functools.cache(off)
    by_time, by_cpu = _least(lambda slowdown: tried(slowdown)[0]), _least(lambda slowdown: tried(slowdown)[1])
    lost_to_others = rates.others_cores > MAX_OTHERS_CORES
    return msgspec.structs.replace(rates, slowdown=by_cpu if lost_to_others else by_time, cpu_slowdown=by_cpu)


def _least(error: Callable[[float], float]) -> float:
    """The slowdown with the least error."""
    best = min(_steps(1.0, MOST, COARSE), key=error)
    return min(_steps(max(1.0, best - COARSE), best + COARSE, FINE), key=error)


def _steps(first: float, last: float, step: float) -> list[float]:
    return [round(first + number * step, 3) for number in range(1 + round((last - first) / step))]
