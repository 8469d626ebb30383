"""A system for tests: the PE reads, the DE reads, both read a half, in turns."""

from dualpath.core.policy import Policy
from dualpath.core.read_path import PathFacts
from dualpath.core.systems import System


def each_in_turn(facts: PathFacts) -> int:
    return (facts.hit_blocks, 0, facts.hit_blocks // 2)[facts.turn % 3]


ROTATION = System(name="rotation", summary="every path in turn", policy=Policy(read_path="vllm_rotation:each_in_turn"))
