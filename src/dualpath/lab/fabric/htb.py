"""Kernel rates and classes of one network device: HTB, as lines for ``tc -batch``, and their check.

HTB keeps a rate where packets leave a device, so a NIC takes two: one at the node's end of its veth pair and one at the
switch's. Under the root there are two classes, 99 : 1, told apart by DSCP. Each may use all that the other leaves, and
the high one goes first (paper §5). A queue holds a few milliseconds, or one large packet.

``fifo`` is the contrast: one queue for all packets.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

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
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_CLASS = re.compile(r"^class htb (\S+) (?:root|parent (\S+))(.*)$", re.MULTILINE)
_RENDERED = re.compile(r"^class add dev \S+ (parent \S+) classid (\S+) htb", re.MULTILINE)
_QUEUE = re.compile(r"^qdisc add dev \S+ parent (\S+) handle \S+ (.*)$", re.MULTILINE)
_SCAFFOLD = re.compile(r"u32 (?:chain 0)?(?: fh \w+: ht divisor 1)?\s*$")
"""What tc shows besides the u32 filters themselves: their kind, and a hash table of one row."""
_PLACE = re.compile(r"\bparent 1:|\b(?:pref|chain|fh|order|ht|bkt) \S+|\bkey\b|\bnot_in_hw\b|\*")
"""What tc shows of a filter besides what it matches and does."""
_TOS = CLASSES[TrafficClass.HIGH].tos
_FILTERS = {
    protocol: f"protocol {protocol} u32 flowid {HIGH_CLASS} match {_TOS << shift:08x}/{TOS_MASK << shift:08x} at 0"
    for protocol, shift in (("ip", 16), ("ipv6", 20))
}
_NAMES = {LINK_CLASS: "the link", HIGH_CLASS: "the high class", LOW_CLASS: "the low class (KV)"}
_LONGEST_BURST_S = 274.0
"""The kernel keeps a burst as 32 bits of 64 ns at the class's rate; of longer ones it shows what is left."""


class Qdisc(msgspec.Struct, frozen=True):
    """Of ``tc -json qdisc show``."""

    kind: str
    handle: str = ""
    parent: str = ""
    root: bool = False
    options: dict[str, Any] | None = None

    @property
    def shown(self) -> str:
        return " ".join([self.kind, *(f"{name} {value}" for name, value in (self.options or {}).items())])


class HtbClass(msgspec.Struct, frozen=True):
    """Rates in bit/s, sizes in bytes; tc shows a priority and a quantum of classes with a queue alone."""

    parent: str
    rate: int
    ceil: int
    burst: int
    cburst: int
    prio: str | None = None
    quantum: int | None = None


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
    mark = f"{_TOS:#x} {TOS_MASK:#x} flowid {HIGH_CLASS}"
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
    qdiscs: Sequence[Qdisc],
    classes: str,
    filters: str,
    weights: Weights = WEIGHTS,
    rate_bytes_per_s: int | None = None,
) -> CheckReport:
    """Compares all that ``tc`` shows of `device` with what `shaping`'s lines install; anything besides differs too.

    `qdiscs` are ``tc -json qdisc show``, `classes` the text of ``tc -details class show``, which has no JSON in
    iproute2 6.1, and `filters` that of ``tc filter show``, whose JSON repeats keys. Without `rate_bytes_per_s` the
    link's rate is taken as found. Raises ValueError for what tc does not print.
    """
    comparison = Comparison()
    root = next((one for one in qdiscs if one.root), Qdisc("none"))
    shown = f"{root.kind} {root.handle}".strip()
    comparison.compare(device, "root qdisc", "htb 1:", shown, "one queue for all, or other classes: KV delays messages")
    if shown == "htb 1:":
        found = _classes(classes)
        default = f"1:{int(str((root.options or {}).get('default', '0')), 16):x}"
        goes = f"joins {_name(default)}" if default in found else "bypasses the classes and their rate"
        so = f"what no filter matches, KV with it, {goes}"
        comparison.compare(device, "class of unmarked traffic", LOW_CLASS, default, so)
        link = found[LINK_CLASS].rate if LINK_CLASS in found else max((one.ceil for one in found.values()), default=0)
        lines = "\n".join(shaping(device, rate_bytes_per_s or link // 8, "classes", weights))
        _compare_classes(comparison, device, _classes(_RENDERED.sub(r"class htb \2 \1", lines)), found)
        _compare_queues(comparison, device, dict(_QUEUE.findall(lines)), qdiscs)
        _compare_filters(comparison, device, filters)
    return CheckReport("linux", (device,), comparison.compared, comparison.differences())


def _compare_classes(
    comparison: Comparison, device: str, meant: dict[str, HtbClass], found: dict[str, HtbClass]
) -> None:
    for name in [*meant, *(other for other in found if other not in meant)]:
        what, one, other = _name(name), meant.get(name), found.get(name)
        if one is None or other is None:
            so = "its packets bypass the classes" if one else "its rate comes off what the two classes share"
            shown = other and f"rate {_bits(other.rate)} under {other.parent}"
            comparison.compare(device, what, f"class {name}" if one else "none", shown or "none", so)
            continue
        so = "the two classes do not share one link: one may starve the other, or exceed the rate"
        comparison.compare(device, f"parent of {what}", one.parent, other.parent, so)
        link = name == LINK_CLASS
        so = "the shares are of another rate than the link's: they don't hold, or the link is not used in full"
        so = so if link else "other shares than meant"
        comparison.compare(device, f"rate of {what}", _bits(one.rate), _bits(_near(one.rate, other.rate)), so)
        so = f"it borrows nothing: {what} may not use what the other leaves idle"
        so = "the link stops there, whatever its classes may use" if link else so
        comparison.compare(device, f"ceiling of {what}", _bits(one.ceil), _bits(_near(one.ceil, other.ceil)), so)
        if not link:
            so = "what the link has to spare does not go to model messages first"
            comparison.compare(device, f"priority of {what}", one.prio, other.prio or "none", so)
            so = "turns of another size: the classes share what is to spare otherwise than meant"
            comparison.compare(device, f"quantum of {what}", one.quantum, other.quantum, so)
        so = "it does not reach its rate between two ticks of the kernel's clock, or exceeds it for longer than meant"
        bursts = [_burst(one.burst, other.burst, one.rate), _burst(one.cburst, other.cburst, one.ceil)]
        comparison.compare(device, f"bursts of {what}", f"{[one.burst, one.cburst]} bytes", f"{bursts} bytes", so)


def _compare_queues(comparison: Comparison, device: str, meant: dict[str, str], qdiscs: Sequence[Qdisc]) -> None:
    found = {one.parent: one.shown for one in qdiscs if not one.root and one.kind != "ingress"}
    for parent in [*meant, *(other for other in found if other not in meant)]:
        so = "it may drop, delay or send elsewhere what is to leave by the class's rate alone"
        what = f"queue of {_NAMES.get(parent, parent)}"
        comparison.compare(device, what, meant.get(parent, "none"), found.get(parent, "none"), so)


def _compare_filters(comparison: Comparison, device: str, text: str) -> None:
    blocks = [block for block in re.split(r"^filter ", text, flags=re.MULTILINE)[1:] if not _SCAFFOLD.search(block)]
    found = Counter(" ".join(_PLACE.sub(" ", block).split()) for block in blocks)
    for protocol, shown in _FILTERS.items():
        so = f"model messages over {protocol} queue with KV, in the low class, unless another filter takes them"
        what = f"{protocol} filter of DSCP {CLASSES[TrafficClass.HIGH].dscp}"
        comparison.compare(device, what, shown, shown if found[shown] else "none", so)
        found[shown] -= 1
    for shown in (+found).elements():
        target = re.search(r"flowid (\S+)", shown)
        goes = f"goes to {_name(target[1])}" if target else "may go elsewhere"
        comparison.compare(
            device, "another filter", "none", shown, f"what it matches {goes}, if no earlier filter does"
        )


def _classes(text: str) -> dict[str, HtbClass]:
    """Reads classes by name. Raises ValueError (msgspec's too) for what lacks a rate."""
    found = {}
    for name, parent, rest in _CLASS.findall(text):
        words = dict(re.findall(r"([a-z]+) (\S+)", rest))
        sizes = {key: _number(words[key]) for key in ("rate", "ceil", "burst", "cburst", "quantum") if key in words}
        found[name] = msgspec.convert({**words, **sizes, "parent": parent or "1:"}, HtbClass)
    return found


def _shares(weights: Weights) -> tuple[float, float]:
    return weights[0] / sum(weights), weights[1] / sum(weights)


def _name(place: str) -> str:
    return _NAMES.get(place, f"class {place}")


def _number(text: str) -> int:
    """Reads a rate in bits, or a size in bytes, whose units are of 1024."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(bit|b|)(?:/\d+)?", text)
    if match is None:
        raise ValueError(f"{text!r} is no rate or size")
    return int(match[1]) * int((1000 if match[3] == "bit" else 1024) ** _UNITS[match[2]])


def _bits(rate: int) -> str:
    return f"{rate:,} bit/s"


def _near(meant: int, found: int) -> int:
    """Returns `meant` if `found` is that, but for tc's rounding to whole units, and the kernel's to whole bytes."""
    return meant if abs(found - meant) <= max(meant / 100, 8) else found


def _burst(meant: int, found: int, rate: int) -> int:
    return meant if meant * 8 > rate * _LONGEST_BURST_S else _near(meant, found)
