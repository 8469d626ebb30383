"""The simulator: core's scheduler under a virtual clock, and the agents that keep it busy.

Theory of operation. The simulator is the coordinator and all engines of a cluster in one thread, on virtual time. An
event (`events`) makes an input of the `Scheduler`; `_drain` then takes its commands and gives each to the part that
carries it out, until there are none left. The scheduler's own wake time is an event like any other. There is no policy
here.

```
 agent ── submit ─> Scheduler ─┬─ Prepare ─> prepared
   ^                           ├─ Load ────> storage.Storage ....... loaded
   |                           ├─ Prefill ─> prefill.PrefillPart ... first token, prefill_done
   |                           ├─ Decode ──> fabric (copy) ......... buffer_freed
   +---- Finish <──────────────┴─            decode.DecodePart ..... finished
```

A turn costs about five events, whatever its length (4.8 at 2P4D with 512 agents).
"""

from collections.abc import Callable, Sequence
from typing import Any

from dualpath.core.journal import JournaledScheduler
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Abort,
    Decode,
    Fail,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    RequestId,
    Resubmit,
    Side,
)
from dualpath.lab.sim.events import Events
from dualpath.lab.sim.machine import Machine
from dualpath.lab.sim.measure import Measurements
from dualpath.lab.sim.parts import Hooks, make_parts
from dualpath.lab.sim.turns import Agent, LiveTurn, whole_blocks
from dualpath.traces.turn_table import Agents

ABORT_NS = 1_000_000
"""Delay of an engine's answer to an Abort: the time until its channels are quiet."""


class Simulator:
    """One run. Give it arrivals, then call `run`; the results are in `measured` and in the parts."""

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        constants: Constants,
        limits: Limits,
        *,
        exact: bool = False,
        balance_window_ns: int = 1_000_000_000,
        journal: Callable[[bytes], object] | None = None,
    ) -> None:
        self.machine = machine
        self.policy = policy
        self.exact = exact
        self.events = Events()
        self.measured = Measurements()
        self.on_turn: Callable[[LiveTurn], None] | None = None
        """Called with every finished turn."""
        scheduler = Scheduler(policy, constants, limits)
        self.scheduler: Scheduler | JournaledScheduler = (
            scheduler if journal is None else JournaledScheduler(scheduler, journal)
        )
        self.lives: dict[RequestId, LiveTurn] = {}
        self._next_request = 0
        self._agents: Agents | None = None
        self._open_agents = 0
        self._paused = False
        self._wakes: list[int] = []
        self._node_of = [facts.node for facts in machine.engines]
        self._free_io = policy.free_io
        self._kv = machine.costs.kv
        self.unread_bytes = 0  # of hit KV, left in storage by windows
        hooks = Hooks(self.lives, self._on_loaded, self._on_first_token, self._on_prefilled, self._on_decoded)
        parts = make_parts(machine, policy, self.events, hooks, exact=exact, window_ns=balance_window_ns)
        self.storage, self.fabric, self.prefill, self.decode = parts.storage, parts.fabric, parts.prefill, parts.decode
        self._handlers = self._command_handlers()
        for facts in machine.engines:
            self.scheduler.engine_joined(0, facts)

    def _command_handlers(self) -> dict[type[Any], Callable[[Any], None]]:
        return {
            Prepare: self._prepare,
            Load: self._load,
            Prefill: self._prefill,
            Decode: self._decode,
            Finish: self._finish,
            Abort: self._abort,
            Resubmit: self._resubmit,
            Fail: self._fail,
        }

    # ── agents ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def arrive(self, agents: Agents, start_ns: Sequence[int] | None = None) -> None:
        """Starts these agents at the given times, or all of them now. Call it once per run."""
        self._agents = agents
        starts = [self.events.now] * len(agents) if start_ns is None else start_ns
        for number, (turns, start) in enumerate(zip(agents.turns.tolist(), starts, strict=True)):
            self._open_agents += 1
            self.events.at(int(start), self._start, Agent(number, int(start), turns))

    def run(self, until_ns: int | None = None, on_progress: Callable[["Simulator"], None] | None = None) -> None:
        """Runs until all agents are done, or until `until_ns`, then can continue. Calls `on_progress` now and then."""
        step, drain = self.events.step, self._drain
        if until_ns is not None:
            self.events.at(until_ns, self._pause)
        countdown = 0
        self._paused = False
        while self._open_agents and not self._paused:
            step()
            drain()
            countdown -= 1
            if countdown < 0:
                countdown = 20_000
                if on_progress is not None:
                    on_progress(self)

    def _pause(self, _: None) -> None:
        self._paused = True

    def _start(self, agent: Agent) -> None:
        self.measured.agent_started()
        assert self._agents is not None
        agent.next_turn = self._agents.turn(agent.number, 0)
        agent.context_tokens = agent.next_turn.kept_tokens  # the context before a recording's start is in storage
        self._submit(agent)

    def _submit(self, agent: Agent) -> None:
        now = self.events.now
        assert agent.next_turn is not None
        turn = LiveTurn(self._next_request, agent, agent.next_turn, now)
        self._next_request += 1
        self.lives[turn.request] = turn
        self.measured.turn_submitted(now)
        costs = self.machine.costs
        lag_ns = costs.request_ns + costs.loop_steps * self.prefill.pace_ns
        if lag_ns:
            self.events.at(now + int(lag_ns), self._hand_in, turn)
        else:
            self._hand_in(turn)

    def _hand_in(self, turn: LiveTurn) -> None:
        """Submits the turn. All of the prefill loop's lag is taken here, before anything is held for the turn."""
        facts = RequestFacts(turn.request, 0, turn.prompt_tokens, turn.hit_tokens, turn.generate_tokens)
        self.scheduler.submit(self.events.now, facts)

    # ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drain(self) -> None:
        """Carries out the scheduler's commands until it has no more, then posts its next wake."""
        scheduler, handlers = self.scheduler, self._handlers
        while commands := scheduler.take_commands():
            for command in commands:
                handlers[type(command)](command)
        wake_ns = scheduler.next_wake()
        wakes = self._wakes
        if wake_ns is not None and (not wakes or wake_ns < wakes[-1]):
            wakes.append(wake_ns)
            self.events.at(wake_ns, self._wake)

    def _wake(self, _: None) -> None:
        self._wakes.pop()
        self.scheduler.wake(self.events.now)

    def _prepare(self, command: Prepare) -> None:
        self.lives[command.request].decode_engine = command.engine
        self.scheduler.prepared(self.events.now, command.request, command.attempt)

    def _load(self, command: Load) -> None:
        turn = self.lives[command.request]
        leg = command.leg
        side, engine, tokens = leg.side, command.engine, leg.blocks * BLOCK_TOKENS
        if side is Side.PE:
            turn.pe_tokens = tokens
            turn.load_engine = engine
        if self._free_io:
            self.scheduler.loaded(self.events.now, command.request, command.attempt, side)
            return
        n_bytes = self._kv.seen_bytes(leg.first_block * BLOCK_TOKENS, tokens, turn.hit_tokens, BLOCK_TOKENS)
        self.unread_bytes += tokens * self._kv.bytes_per_token - n_bytes
        self.storage.read(self._node_of[engine], n_bytes, turn, side)

    def _prefill(self, command: Prefill) -> None:
        turn = self.lives[command.request]
        turn.prefill_engine = command.engine
        self.prefill.push(turn)

    def _decode(self, command: Decode) -> None:
        turn = self.lives[command.request]
        if self._free_io:
            self._on_copied((turn, turn.attempt))
            return
        n_bytes = self._kv.seen_bytes(0, turn.prompt_tokens, turn.prompt_tokens, BLOCK_TOKENS)
        least_ns = 0.0
        if not self.policy.layerwise:
            least_ns = -(-turn.prompt_tokens // BLOCK_TOKENS) * self.machine.costs.copy_ns_per_block
        self.fabric.copy(command.engine, n_bytes, least_ns, self._on_copied, (turn, turn.attempt))

    def _finish(self, command: Finish) -> None:
        now = self.events.now
        turn = self.lives.pop(command.request)
        agent = turn.agent
        self.measured.turn_finished(turn, now)
        if self.on_turn is not None:
            self.on_turn(turn)
        agent.context_tokens = turn.prompt_tokens + turn.generate_tokens
        agent.taken += 1
        if agent.taken == agent.turns:
            self.measured.agent_finished(agent, now)
            self._open_agents -= 1
            return
        assert self._agents is not None
        agent.next_turn = self._agents.turn(agent.number, agent.taken)
        gap_ns = agent.next_turn.gap_ns
        if gap_ns:
            self.events.at(now + gap_ns, self._submit, agent)
        else:
            self._submit(agent)

    def _abort(self, command: Abort) -> None:
        """Stops the attempt and answers when the channels are quiet; reads under way continue in vain."""
        turn = self.lives[command.request]
        if command.engine == turn.decode_engine:
            self.stop_decoding(turn)
        elif turn.prefill_engine == command.engine:
            self.prefill.remove(turn)
        self.events.at(self.events.now + ABORT_NS, self._released, command)

    def stop_decoding(self, turn: LiveTurn) -> None:
        """Takes the turn off its decode engine; what the client has seen is kept for the next attempt."""
        generated = self.decode.remove(turn)
        if turn.copied_ns:
            turn.keep_generated(1 + generated)
            turn.copied_ns = 0

    def _released(self, command: Abort) -> None:
        self.scheduler.released(self.events.now, command.request, command.attempt, command.engine)

    def _resubmit(self, command: Resubmit) -> None:
        turn = self.lives[command.request]
        turn.begin_attempt(command.attempt)
        self.measured.retries += 1
        facts = RequestFacts(turn.request, turn.attempt, turn.prompt_tokens, turn.hit_tokens, turn.generate_tokens)
        self.scheduler.resubmit(self.events.now, facts)

    def _fail(self, command: Fail) -> None:
        turn = self.lives.pop(command.request)
        turn.attempt = -1  # whatever is still under way for it is stale
        self.measured.turn_failed(self.events.now, command.cause)
        self._open_agents -= 1

    # ── what the parts report ───────────────────────────────────────────────────────────────────────────────────────

    def _on_loaded(self, leg: tuple[LiveTurn, Side, int]) -> None:
        turn, side, attempt = leg
        self.scheduler.loaded(self.events.now, turn.request, attempt, side)

    def _on_first_token(self, turn: LiveTurn) -> None:
        if not turn.first_token_ns:
            turn.first_token_ns = self.events.now

    def _on_prefilled(self, turns: list[tuple[LiveTurn, int]]) -> None:
        now, prefill_done = self.events.now, self.scheduler.prefill_done
        for turn, attempt in turns:
            prefill_done(now, turn.request, attempt)

    def _on_copied(self, copied: tuple[LiveTurn, int]) -> None:
        turn, attempt = copied
        if turn.attempt != attempt or turn.decode_engine < 0:
            return  # aborted meanwhile
        now = turn.copied_ns = self.events.now
        self.scheduler.buffer_freed(now, turn.request, attempt, -(-turn.prompt_tokens // BLOCK_TOKENS))
        lag_ns = self.machine.costs.loop_steps * self.decode.engines[turn.decode_engine].group.step_ns
        if lag_ns:
            self.events.at(now + int(lag_ns), self._join, copied)
        else:
            self.decode.join(turn)

    def _join(self, copied: tuple[LiveTurn, int]) -> None:
        turn, attempt = copied
        if turn.attempt == attempt and turn.decode_engine >= 0 and turn.copied_ns:
            self.decode.join(turn)

    def _on_decoded(self, turn: LiveTurn) -> None:
        whole = whole_blocks(turn.prompt_tokens + turn.generate_tokens - 1) - turn.hit_tokens
        if not self._free_io:
            self.storage.write(self._node_of[turn.decode_engine], whole * self._kv.bytes_per_token)
        self.scheduler.finished(self.events.now, turn.request, turn.attempt)
