"""What busy cores take from each other: one factor, from the CPU time of crowds of agents.

Agents that ask at once use more of the cores than they do in the simulation of lone parts: caches and memory are
shared, threads are switched. The slowdown is the one with which the crowds' CPU times are least off. It is not fitted
to how long the crowds took, which is therefore a first check of a prediction.
"""

import statistics
from collections.abc import Callable

import msgspec

from dualpath.calibration.busy import CROWDS, Busy, mean_of
from dualpath.calibration.simulated import setup
from dualpath.prediction.machine import Fit, MachineRates
from dualpath.prediction.predict import simulate

MAX_OTHERS_CORES = 0.1
"""Beyond it, waiting for what else ran is in the measured times."""
MOST, COARSE, FINE = 3.0, 0.1, 0.02
"""Slowdowns that are tried: up to `MOST` in coarse steps, then in fine ones around the best."""


def fit_slowdown(rates: MachineRates, busy: dict[str, Busy]) -> MachineRates:
    """With the slowdown, and how far off completion times are with it."""
    over_all = mean_of(list(busy.values()))
    rates = msgspec.structs.replace(rates, reference_ns=over_all.reference_ns, others_cores=over_all.others_cores)

    def errors(slowdown: float) -> list[tuple[float, float]]:
        """By crowd: relative errors of CPU time and completion time."""
        slowed = msgspec.structs.replace(rates, slowdown=slowdown)
        of = []
        for name, measured in busy.items():
            cluster, _, jct_ns = simulate(setup(slowed, CROWDS[name], measured.reference_ns / rates.reference_ns))
            of.append((cluster.cpu.busy_core_ns / measured.cpu_ns - 1, jct_ns / measured.jct_ns - 1))
        return of

    slowdown = _least(lambda tried: sum(cpu**2 for cpu, _ in errors(tried)))
    off = [abs(time) for _, time in errors(slowdown)]
    check = Fit(samples=len(off), mean_error=statistics.mean(off), max_error=max(off))
    return msgspec.structs.replace(rates, slowdown=slowdown, fits=rates.fits | {"how long crowds take": check})


def _least(error: Callable[[float], float]) -> float:
    """The slowdown with the least error."""
    best = min(_steps(1.0, MOST, COARSE), key=error)
    return min(_steps(max(1.0, best - COARSE), best + COARSE, FINE), key=error)


def _steps(first: float, last: float, step: float) -> list[float]:
    return [round(first + number * step, 3) for number in range(1 + round((last - first) / step))]
