"""One description of the two classes, which everything that marks or weighs follows."""

import inspect

from dualpath.core.arbiter import Arbiter
from dualpath.core.traffic_classes import CLASSES, WEIGHTS
from dualpath.core.vocabulary import TrafficClass

HIGH, LOW = CLASSES[TrafficClass.HIGH], CLASSES[TrafficClass.LOW]


def test_the_weights_are_the_arbiters() -> None:
    assert WEIGHTS == (99, 1)
    assert inspect.signature(Arbiter).parameters["weights"].default is WEIGHTS


def test_a_network_can_tell_the_classes_apart_by_each_mark() -> None:
    for mark in ("dscp", "tos", "priority", "service_level", "virtual_lane"):
        assert getattr(HIGH, mark) != getattr(LOW, mark), mark


def test_marks_are_those_of_the_standards() -> None:
    assert (HIGH.tos, HIGH.priority) == (0xB8, 5), "EF"
    assert (LOW.tos, LOW.priority) == (0x20, 1), "CS1"
    assert LOW.virtual_lane == 2, "the paper's"
    assert all(0 <= one.dscp < 64 and 0 <= one.service_level < 15 and 0 <= one.virtual_lane < 15 for one in (HIGH, LOW))
