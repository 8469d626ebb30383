"""The two traffic classes as networks know them: the one description that all marks, weights and tables follow from.

The arbiter takes the weights, transports mark what they send, a testbed's kernel classes and `dualpath qos` render the
rest: OpenSM's tables, `dcb` commands, HTB. What a class *is* says `TrafficClass`.
"""

import msgspec

from dualpath.core.vocabulary import TrafficClass


class ClassMarks(msgspec.Struct, frozen=True):
    """How packets of a class are told from others, and its part of a full link."""

    weight: int
    """Bytes per round while both classes are backlogged (paper §5: 99 : 1)."""
    dscp: int
    """Differentiated services code point, 0 to 63, of IP and RoCE v2."""
    service_level: int
    """InfiniBand's SL, 0 to 15."""
    virtual_lane: int
    """The VL that switches and HCAs queue that SL on (paper A.1: KV on 2)."""

    @property
    def tos(self) -> int:
        """The byte of the IP header that holds `dscp`: type of service, or traffic class in UCX and NCCL."""
        return self.dscp << 2

    @property
    def priority(self) -> int:
        """Ethernet's priority, 0 to 7: the class selector in `dscp`, as NICs map it unless told otherwise."""
        return self.dscp >> 3


CLASSES = {
    TrafficClass.HIGH: ClassMarks(weight=99, dscp=46, service_level=0, virtual_lane=0),
    TrafficClass.LOW: ClassMarks(weight=1, dscp=8, service_level=2, virtual_lane=2),
}
"""HIGH is EF (RFC 3246) and on SL 0, which libraries use unless told otherwise. LOW is CS1, less than best effort."""
WEIGHTS = (CLASSES[TrafficClass.HIGH].weight, CLASSES[TrafficClass.LOW].weight)
"""HIGH's and LOW's."""
