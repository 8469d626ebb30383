"""The longest chain of one agent: no job of agents ends before the last one, however well storage NICs are used."""

from collections import defaultdict
from itertools import pairwise

import msgspec

from dualpath.results.file import Run
from dualpath.results.roles import readers
from dualpath.results.turns import TurnResult, stages_of


class Chain(msgspec.Struct, frozen=True):
    """One agent's turns in a row, in seconds."""

    trajectory: str
    decode_s: float
    prefill_s: float
    reads_alone_s: float
    """Its reads, if it had every storage NIC to itself."""
    reads_s: float
    """As they were: the other agents' reads too."""
    pauses_s: float
    """Between an answer and the next turn."""

    @property
    def total_s(self) -> float:
        """How long it would take with the batches of this run, and nobody else's reads."""
        return self.decode_s + self.prefill_s + self.reads_alone_s + self.pauses_s


def longest_chain(run: Run, snic_bytes_per_s: int) -> Chain | None:
    """Returns the longest chain of a run, whose storage NICs have that rate; None if its turns were not kept or timed.

    A loaded token has the same bytes in every turn, so what the NICs received gives them.
    """
    turns = run.turn_results
    loaded_tokens = sum(turn.loaded_tokens for turn in turns)
    if not loaded_tokens or any(turn.timings is None for turn in turns):
        return None
    nics = len(readers(run.system, list(run.snic_bytes)))
    token_s = sum(run.snic_bytes.values()) / loaded_tokens / (snic_bytes_per_s * nics)
    by_agent: defaultdict[str, list[TurnResult]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.start_s):
        by_agent[turn.trajectory].append(turn)
    chains = [_chain(trajectory, own, token_s) for trajectory, own in by_agent.items()]
    return max(chains, key=lambda chain: chain.total_s)


def _chain(trajectory: str, turns: list[TurnResult], token_s: float) -> Chain:
    stages = [stages_of(turn) for turn in turns]
    return Chain(
        trajectory,
        decode_s=sum(stage["decode"] for stage in stages),
        prefill_s=sum(stage["prefill"] for stage in stages),
        reads_alone_s=token_s * sum(turn.loaded_tokens for turn in turns),
        reads_s=sum(stage["read"] for stage in stages),
        pauses_s=sum(
            max(0.0, later.start_s - earlier.start_s - earlier.latency_s) for earlier, later in pairwise(turns)
        ),
    )
