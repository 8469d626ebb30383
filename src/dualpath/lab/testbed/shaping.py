"""Kernel rates and classes of one network device, as lines for ``tc -batch``.

HTB keeps a rate where packets leave a device, so a NIC takes two: one at the node's end of its veth pair and one at the
switch's. Under the root there are two classes, 99 : 1, told apart by DSCP. Each may use all that the other leaves, and
the high one goes first (paper §5). A queue holds a few milliseconds, or one large packet.

``fifo`` is the contrast: one queue for all packets.
"""

from typing import Literal

Discipline = Literal["classes", "fifo"]
HIGH_SHARE = 0.99
HIGH_TOS = 0xB8
"""DSCP EF, as `dualpath.transfer.transports.tcp` marks its high class."""
TOS_MASK = 0xFC
HIGH_CLASS = "1:10"
LOW_CLASS = "1:20"
QUEUE_S = 0.02
MIN_QUEUE_BYTES = 512 * 1024
MAX_QUEUE_BYTES = 8 * 1024 * 1024
BURST_S = 0.001
MIN_BURST_BYTES = 64 * 1024
"""Size of one packet of segmentation offload."""
QUANTUM_BYTES = 64 * 1024


def shaping(device: str, rate_bytes_per_s: int | None, discipline: Discipline) -> list[str]:
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

    lines = [clear, f"qdisc replace dev {device} root handle 1: htb default 20", htb("1:", "1:1", rate, 0)]
    high = f"u32 match ip tos {HIGH_TOS:#x} {TOS_MASK:#x} flowid {HIGH_CLASS}"
    if discipline == "classes":
        lines += [
            htb("1:1", HIGH_CLASS, round(rate * HIGH_SHARE), 0),
            htb("1:1", LOW_CLASS, round(rate * (1 - HIGH_SHARE)), 1),
            f"qdisc add dev {device} parent {HIGH_CLASS} handle 10: bfifo limit {queue_bytes}",
            f"filter add dev {device} parent 1: protocol ip prio 1 {high}",
        ]
    else:
        lines.append(htb("1:1", LOW_CLASS, rate, 0))
    return [*lines, f"qdisc add dev {device} parent {LOW_CLASS} handle 20: bfifo limit {queue_bytes}"]
