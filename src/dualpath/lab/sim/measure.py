"""Measures a run as it goes: latencies of turns, ends of agents, and the number of turns in the system.

Latencies are one number per turn in flat arrays (7.5 million turns take 90 MB), everything else is sums.
"""

from array import array

from dualpath.core.vocabulary import Cause
from dualpath.lab.sim.turns import Agent, LiveTurn


class Measurements:
    """Counts, and columns with an entry per finished turn. Times are in seconds unless the name says otherwise."""

    def __init__(self) -> None:
        self.submitted = 0
        self.finished = 0
        self.agents_started = 0
        self.agents_finished = 0
        self.retries = 0
        self.failed: dict[Cause, int] = {}
        self.ended_s = array("d")
        """Time at which the turn finished."""
        self.ttft_s = array("f")
        """Submission to first token."""
        self.ttst_s = array("f")
        """First token to second; 0 for a turn of one token."""
        self.tpot_s = array("f")
        """Mean time between later tokens; 0 for a turn of fewer than three."""
        self.latency_s = array("f")
        """Submission to last token."""
        self.agent_jct_s = array("d")
        """Start of the agent to its last token."""
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.generated_tokens = 0
        self.turn_ns = 0
        """Turns in the system, integrated over time (by Little's law also the sum of their latencies)."""
        self._in_system = 0
        self._since_ns = 0

    def agent_started(self) -> None:
        self.agents_started += 1

    def agent_finished(self, agent: Agent, now: int) -> None:
        self.agents_finished += 1
        self.agent_jct_s.append((now - agent.start_ns) / 1e9)

    def turn_submitted(self, now: int) -> None:
        self._integrate(now)
        self._in_system += 1
        self.submitted += 1

    def turn_finished(self, turn: LiveTurn, now: int) -> None:
        self._integrate(now)
        self._in_system -= 1
        self.finished += 1
        generated = turn.generate_tokens + turn.done_tokens
        self.prompt_tokens += turn.prompt_tokens
        self.hit_tokens += turn.hit_tokens
        self.generated_tokens += generated
        first_ns, second_ns = turn.first_token_ns, turn.second_token_ns
        self.ended_s.append(now / 1e9)
        self.ttft_s.append((first_ns - turn.submitted_ns) / 1e9)
        self.ttst_s.append((second_ns - first_ns) / 1e9 if generated > 1 else 0.0)
        self.tpot_s.append((now - second_ns) / 1e9 / (generated - 2) if generated > 2 else 0.0)
        self.latency_s.append((now - turn.submitted_ns) / 1e9)

    def turn_failed(self, now: int, cause: Cause) -> None:
        self._integrate(now)
        self._in_system -= 1
        self.failed[cause] = self.failed.get(cause, 0) + 1

    def _integrate(self, now: int) -> None:
        spent_ns = now - self._since_ns
        self.turn_ns += spent_ns * self._in_system
        self._since_ns = now
