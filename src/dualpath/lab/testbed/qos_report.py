"""What `dualpath testbed qos` or `benchmarks/channels.py` has found, and the rule of isolation that it is held to."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median, quantiles
from typing import TypeVar

import msgspec

from dualpath.lab.testbed.expert_traffic import Messages
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.qos_peer import Exchanged

WANTED_LATENCY_RATIO = 1.1
WANTED_KV_SHARE = 0.97
Known = TypeVar("Known")


class Times(msgspec.Struct, frozen=True):
    """Of one kind of messages in one phase; in a report, medians over the rounds."""

    p50_us: float
    p99_us: float
    messages: int


class Phase(msgspec.Struct, frozen=True):
    """What is None did not take part. Rates are pe0's, while KV is counted."""

    name: str
    pings: Times | None = None
    all_to_alls: Times | None = None
    high_bytes_per_s: float = 0.0
    kv_bytes_per_s: float | None = None


class Ratio(msgspec.Struct, frozen=True):
    """Median and quartiles of the rounds' ratios."""

    median: float
    low: float
    high: float


class Delays(msgspec.Struct, frozen=True):
    """p50 of one kind of messages, over other p50s of the same round."""

    idle: Ratio
    """Beside KV in two classes ÷ idle: the rule's."""
    busy: Ratio
    """Beside KV in two classes ÷ with KV elsewhere: the effect without that of a busy processor."""
    fifo: Ratio
    """Beside KV in one queue ÷ idle."""


class QosReport(msgspec.Struct, frozen=True):
    """The measurements, and the three figures with a goal: ≤ 1.1 twice, and ≥ 0.97."""

    transport: str
    cnic_bytes_per_s: int
    all_to_all: Messages
    rounds: int
    seconds: float
    phases: tuple[Phase, ...]
    pings: Delays
    all_to_alls: Delays
    kv_share: Ratio
    """KV beside messages ÷ (KV alone − messages)."""

    @property
    def is_as_wanted(self) -> bool:
        delays = (self.pings.idle.median, self.all_to_alls.idle.median)
        return max(delays) <= WANTED_LATENCY_RATIO and self.kv_share.median >= WANTED_KV_SHARE


def times_of(ranks: Sequence[Exchanged]) -> Times:
    """An exchange takes as long as its slowest rank. Raises TestbedError if the ranks have no exchange in common."""
    common = set.intersection(*(set(one.took_ns) for one in ranks))
    slowest_us = sorted(max(one.took_ns[period] for one in ranks) / 1e3 for period in common)
    if not slowest_us:
        raise TestbedError("no exchange in which all ranks took part; measure for more seconds")
    return Times(median(slowest_us), slowest_us[len(slowest_us) * 99 // 100], len(slowest_us))


def make_report(
    transport: str, rate_bytes_per_s: int, all_to_all: Messages, seconds: float, seen: dict[str, list[Phase]]
) -> QosReport:
    """`seen` has every phase's rounds, by its name."""
    return QosReport(
        transport=transport,
        cnic_bytes_per_s=rate_bytes_per_s,
        all_to_all=all_to_all,
        rounds=len(seen["idle"]),
        seconds=seconds,
        phases=tuple(_middle(found) for found in seen.values()),
        pings=_delays(seen, lambda phase: _of(phase.pings).p50_us),
        all_to_alls=_delays(seen, lambda phase: _of(phase.all_to_alls).p50_us),
        kv_share=_ratio(
            _of(beside.kv_bytes_per_s) / (_of(alone.kv_bytes_per_s) - beside.high_bytes_per_s)
            for beside, alone in zip(seen["classes"], seen["kv alone"], strict=True)
        ),
    )


def _middle(found: list[Phase]) -> Phase:
    """Returns the medians of a phase's rounds."""

    def times(kind: str) -> Times | None:
        known: list[Times] = [one for one in (getattr(phase, kind) for phase in found) if one is not None]
        if not known:
            return None
        p50_us, p99_us = (median(getattr(one, field) for one in known) for field in ("p50_us", "p99_us"))
        return Times(p50_us, p99_us, sum(one.messages for one in known))

    kv = [phase.kv_bytes_per_s for phase in found if phase.kv_bytes_per_s is not None]
    high_bytes_per_s = median(phase.high_bytes_per_s for phase in found)
    return Phase(found[0].name, times("pings"), times("all_to_alls"), high_bytes_per_s, median(kv) if kv else None)


def _delays(seen: dict[str, list[Phase]], p50_us: Callable[[Phase], float]) -> Delays:
    def over(name: str, base: str) -> Ratio:
        return _ratio(p50_us(one) / p50_us(other) for one, other in zip(seen[name], seen[base], strict=True))

    return Delays(over("classes", "idle"), over("classes", "elsewhere"), over("fifo", "idle"))


def _ratio(values: Iterable[float]) -> Ratio:
    found = list(values)
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Ratio(median(found), low, high)


def _of(value: Known | None) -> Known:
    assert value is not None
    return value
