"""Agents that take their turns one after another, as the replay client lets them."""

from dualpath.prediction.cluster import Cluster
from dualpath.prediction.processes import Signal, Steps, all_of
from dualpath.prediction.setup import RunSetup
from dualpath.prediction.turns import Turn, whole_blocks
from dualpath.workload.trajectory import Trajectory


class Replay:
    """All agents of a run. `turns` are those that have ended, in that order."""

    def __init__(self, cluster: Cluster, setup: RunSetup) -> None:
        self._cluster = cluster
        self._setup = setup
        self._requests = 0
        self.turns: list[Turn] = []

    def start(self) -> Signal:
        """Set when every agent has ended."""
        setup = self._setup
        return all_of(
            [self._cluster.processes.start(self._agent(one, setup.first_round)) for one in setup.trajectories]
        )

    def _agent(self, trajectory: Trajectory, first_round: int) -> Steps:
        processes = self._cluster.processes
        context_tokens = 0
        for index, (round_, span) in enumerate(zip(trajectory.rounds, trajectory.spans(), strict=True)):
            if index >= first_round:
                yield processes.after(round_.gap_s * self._setup.gap_scale * 1e9)
                # Hits are what is kept of the context, but for its newest token, which has no KV, and one to compute.
                stored_tokens = min(span.kept_tokens, context_tokens - 1, span.prompt_tokens - 1)
                turn = Turn(
                    self._requests,
                    trajectory.id,
                    index,
                    prompt_tokens=span.prompt_tokens,
                    hit_tokens=whole_blocks(stored_tokens),
                    generate_tokens=round_.generate_tokens,
                )
                self._requests += 1
                yield self._cluster.ask(turn)
                self.turns.append(turn)
            if index >= first_round - 1:
                yield all_of([processes.start(self._agent(one, 0)) for one in round_.subagents])
            context_tokens = span.context_tokens
