"""Kernel rates and classes of one network device: HTB, as lines for ``tc -batch``, and their check.

HTB keeps a rate where packets leave a device, so a NIC takes two: one at the node's end of its veth pair and one at the
switch's. Under the root there are two classes, 99 : 1, told apart by DSCP. Each may use all that the other leaves, and
the high one goes first (paper §5). A queue holds a few milliseconds, or one large packet.

``fifo`` is the contrast: one queue for all packets.
"""

import re
from typing import Any, Literal

from dualpath.core.traffic_classes import CLASSES, WEIGHTS
from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.fabric.findings import CheckReport, Comparison, Weights

Discipline = Literal["classes", "fifo"]
TOS_MASK = 0xFC
LINK_CLASS = "1:1"
HIGH_CLASS = "1:10"
LOW_CLASS = "1:20"
QUEUE_S = 0.02
MIN_QUEUE_BYTES = 512 * 1024
MAX_QUEUE_BYTES = 8 * 1024 * 1024
BURST_S = 0.001
MIN_BURST_BYTES = 64 * 1024
"""Size of one packet of segmentation offload."""
QUANTUM_BYTES = 64 * 1024
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CLASS = re.compile(r"^class htb (\S+) (?:root|parent \S+)(.*?) rate (\d+)(\w?)bit ceil (\d+)(\w?)bit", re.MULTILINE)
_MATCHES = {"ip": f"{CLASSES[TrafficClass.HIGH].tos << 16:x}", "ipv6": f"{CLASSES[TrafficClass.HIGH].tos << 20:x}"}
"""The first word of a packet of the high class, by protocol, as tc's JSON writes it."""


def shaping(device: str, rate_bytes_per_s: int | None, discipline: Discipline, weights: Weights = WEIGHTS) -> list[str]:
    """Returns lines that give `device` exactly this rate; None removes all limits."""
    clear = f"qdisc replace dev {device} root noqueue"
    if rate_bytes_per_s is None:
        return [clear]
    rate = rate_bytes_per_s * 8
    burst_bytes = max(MIN_BURST_BYTES, round(rate_bytes_per_s * BURST_S))
    queue_bytes = min(max(MIN_QUEUE_BYTES, round(rate_bytes_per_s * QUEUE_S)), MAX_QUEUE_BYTES)

    def htb(parent: str, name: str, own_rate: int, prio: int) -> str:
        return (
            f"class add dev {device} parent {parent} classid {name} htb rate {max(own_rate, 8)}bit ceil {rate}bit "
            f"burst {burst_bytes} cburst {burst_bytes} quantum {QUANTUM_BYTES} prio {prio}"
        )

    lines = [clear, f"qdisc replace dev {device} root handle 1: htb default 20", htb("1:", LINK_CLASS, rate, 0)]
    mark = f"{CLASSES[TrafficClass.HIGH].tos:#x} {TOS_MASK:#x} flowid {HIGH_CLASS}"
    if discipline == "classes":
        high, low = _shares(weights)
        lines += [
            htb(LINK_CLASS, HIGH_CLASS, round(rate * high), 0),
            htb(LINK_CLASS, LOW_CLASS, round(rate * low), 1),
            f"qdisc add dev {device} parent {HIGH_CLASS} handle 10: bfifo limit {queue_bytes}",
            f"filter add dev {device} parent 1: protocol ip prio 1 u32 match ip tos {mark}",
            f"filter add dev {device} parent 1: protocol ipv6 prio 2 u32 match ip6 priority {mark}",
        ]
    else:
        lines.append(htb(LINK_CLASS, LOW_CLASS, rate, 0))
    return [*lines, f"qdisc add dev {device} parent {LOW_CLASS} handle 20: bfifo limit {queue_bytes}"]


def check(
    device: str,
    qdiscs: list[dict[str, Any]],
    classes: str,
    filters: list[dict[str, Any]],
    weights: Weights = WEIGHTS,
    rate_bytes_per_s: int | None = None,
) -> CheckReport:
    """Compares what ``tc`` shows of `device` with `shaping`'s lines.

    `qdiscs` and `filters` are ``tc -json qdisc|filter show``, `classes` the text of ``tc class show``, which has no
    JSON in iproute2 6.1. Without `rate_bytes_per_s` the link's rate is taken as found.
    """
    comparison = Comparison()
    root = next((one for one in qdiscs if one.get("root")), {})
    comparison.compare(device, "root qdisc", "htb", root.get("kind", "none"), "one queue for all: KV delays messages")
    if root.get("kind") == "htb":
        default = str(root.get("options", {}).get("default", "0"))
        lost = "traffic without a mark bypasses the classes and their rate"
        comparison.compare(device, "class of unmarked traffic", "0x20", default, lost)
        _compare_classes(comparison, device, classes, weights, rate_bytes_per_s)
        for protocol, word in _MATCHES.items():
            targets = [_flow_of(one, word) for one in filters if one.get("protocol") == protocol]
            found = next((target for target in targets if target), "none")
            so = f"model messages over {protocol} queue with KV, in the low class"
            comparison.compare(
                device, f"{protocol} filter of DSCP {CLASSES[TrafficClass.HIGH].dscp}", HIGH_CLASS, found, so
            )
    return CheckReport("linux", (device,), comparison.compared, comparison.differences())


def _compare_classes(
    comparison: Comparison, device: str, text: str, weights: Weights, rate_bytes_per_s: int | None
) -> None:
    found = {
        name: (_bits(rate, unit), _bits(ceil, ceil_unit), *re.findall(r"prio (\d)", rest))
        for name, rest, rate, unit, ceil, ceil_unit in _CLASS.findall(text)
    }
    link = found.get(LINK_CLASS, (0, 0))[0]
    if rate_bytes_per_s is not None:
        so = "the shares are of another rate than the link's: they don't hold, or the link is not used in full"
        comparison.compare(
            device, "rate of the link", _shown(rate_bytes_per_s * 8), _near(rate_bytes_per_s * 8, link), so
        )
    for name, what, share, prio in zip(
        (HIGH_CLASS, LOW_CLASS), ("the high class", "the low class (KV)"), _shares(weights), "01", strict=True
    ):
        if name not in found:
            comparison.compare(device, what, f"class {name}", "none", "its packets bypass the classes")
            continue
        rate, ceil, *prios = found[name]
        meant = max(round(link * share), 8)
        comparison.compare(device, f"rate of {what}", _shown(meant), _near(meant, rate), "other shares than meant")
        borrow = f"it borrows nothing: {what} may not use what the other leaves idle"
        comparison.compare(device, f"ceiling of {what}", _shown(link), _near(link, ceil), borrow)
        so = "what the link has to spare does not go to model messages first"
        comparison.compare(device, f"priority of {what}", prio, "".join(map(str, prios)) or "0", so)


def _shares(weights: Weights) -> tuple[float, float]:
    return weights[0] / sum(weights), weights[1] / sum(weights)


def _flow_of(one: dict[str, Any], word: str) -> str | None:
    """The class that a filter sends the high class's packets to, if it is about them."""
    options = one.get("options", {})
    match = options.get("match", {})
    return str(options.get("flowid")) if (match.get("value"), match.get("off")) == (word, 0) else None


def _bits(number: str, unit: str) -> int:
    return int(number) * _UNITS[unit]


def _shown(bits_per_s: int) -> str:
    return f"{bits_per_s:,} bit/s"


def _near(meant: int, found: int) -> str:
    """Shows `found`; as `meant` if it is that but for the rounding of tc, which shows rates in whole units."""
    return _shown(meant if abs(found - meant) <= meant / 100 else found)
