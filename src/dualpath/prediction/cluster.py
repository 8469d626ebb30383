"""One cluster under virtual time: core's scheduler between simulated clients and simulated engines.

Theory of operation. This is the runtime's coordinator without its sockets: requests and engines' messages become inputs
of the same `Scheduler` that serves in the runtime, its commands become orders to the simulated engines. What the
coordinator and the client themselves take is time on the shared cores, one thread each. There is no policy here.

```
 agent ─ client thread ─ hop ─> coordinator thread ─> Scheduler ─┬─ Prepare ─> DecodeEngine.prepare
   ^                                    ^                        ├─ Load ────> .load of either
   |                                    └── hop ── reports <──── ├─ Prefill ─> PrefillEngine.prefill
   └──────────── tokens, end of stream ─────────────────────────┴─ Decode ──> DecodeEngine.decode
```
"""

from collections.abc import Callable
from typing import Any

from dualpath.core.batching import PrefillQueue
from dualpath.core.policy import SYSTEMS, Constants, Limits
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    Command,
    Decode,
    EngineFacts,
    Fail,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    Role,
    Side,
)
from dualpath.prediction.decode import DecodeEngine
from dualpath.prediction.plant import Plant
from dualpath.prediction.prefill import PrefillEngine
from dualpath.prediction.processes import Signal, Steps, Workers
from dualpath.prediction.setup import RunSetup
from dualpath.prediction.turns import Turn
from dualpath.sim.events import Events

_NEVER_NS = 10**18
_UNLIMITED_BYTES_PER_S = 10**12
"""Stands for a SNIC without a limit where alpha is computed, as in the runtime."""


class PredictionError(ValueError):
    """A run that can't be predicted. The message says which and why."""


class Cluster:
    """A running cluster; `ask` sends it a turn."""

    def __init__(self, setup: RunSetup) -> None:
        rates, policy = setup.rates, SYSTEMS[setup.system]
        snic, cnic = (None, None) if policy.free_io else (setup.snic_bytes_per_s, setup.cnic_bytes_per_s)
        self.events = Events()
        engines = setup.prefill_engines + setup.decode_engines
        transport = rates.transports[setup.transport]
        self._plant = Plant(self.events, rates, engines, transport, snic, cnic, setup.paced, setup.slowness)
        self._plant.reports = self
        self.processes = self._plant.processes
        self.snics = self._plant.snics
        self.cpu = self._plant.cpu
        self._client_thread = Workers(self.processes)
        self._control = rates.control
        constants = Constants.from_rates(
            snic_tokens_per_s=(snic or _UNLIMITED_BYTES_PER_S) / rates.kv_bytes_per_token,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
        )
        self._scheduler = Scheduler(policy, constants, _limits())
        self._turns: dict[int, Turn] = {}
        self._driving = False
        self._wake_ns: int | None = None
        self._prefill: dict[int, PrefillEngine] = {}
        self._decode: dict[int, DecodeEngine] = {}
        self._orders: dict[type[Any], Callable[[Any], None]] = {
            Prepare: self._prepare, Load: self._load, Prefill: self._start_prefill, Decode: self._start_decode,
            Finish: self._finish, Fail: self._fail,
        }  # fmt: skip
        for engine in range(engines):
            self._join(engine, setup, policy.layerwise)

    def _join(self, engine: int, setup: RunSetup, layerwise: bool) -> None:
        limits, role = setup.rates.limits, Role.PREFILL if engine < setup.prefill_engines else Role.DECODE
        if role is Role.PREFILL:
            queue = PrefillQueue(
                setup.rates.attention,
                setup.compute_quota_s * 1e9,
                limits.max_batch_tokens,
                limits.max_batch_requests,
                limits.max_batch_kv_tokens,
            )
            self._prefill[engine] = PrefillEngine(self._plant, engine, queue, layerwise)
        else:
            self._decode[engine] = DecodeEngine(self._plant, engine)
        facts = EngineFacts(
            engine=engine,
            role=role,
            node=engine,
            group=0 if role is Role.PREFILL else 1,
            buffer_blocks=limits.buffer_bytes // self._plant.block_bytes,
            hbm_blocks=limits.hbm_bytes // self._plant.block_bytes if role is Role.DECODE else 0,
        )
        self._input(lambda now: self._scheduler.engine_joined(now, facts))

    # ── the client's side ───────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, turn: Turn) -> Signal:
        """Send a turn; set when the client has the end of its stream."""
        turn.sent_ns = self.events.now
        self.processes.start(self._sending(turn))
        return turn.ended

    def _sending(self, turn: Turn) -> Steps:
        control, plant = self._control, self._plant
        asking_ns = control.client_request_ns + turn.prompt_tokens * control.client_prompt_token_ns
        yield self._client_thread.submit(plant.working(asking_ns))
        yield self.processes.after(control.hop_ns)
        taking_ns = control.request_ns + turn.prompt_tokens * control.prompt_token_ns
        yield plant.coordinator_thread.submit(plant.working(taking_ns))
        turn.arrived_ns = self.events.now
        self._turns[turn.request] = turn
        facts = RequestFacts(turn.request, 0, turn.prompt_tokens, turn.hit_tokens, turn.generate_tokens)
        self._input(lambda now: self._scheduler.submit(now, facts))

    def _token(self, turn: Turn) -> Steps:
        """A token on its way to the client."""
        yield self.processes.after(self._control.hop_ns)
        yield self._client_thread.submit(self._plant.working(self._control.client_token_ns))
        now = self.events.now
        if not turn.first_token_ns:
            turn.first_token_ns = now
        elif not turn.second_token_ns:
            turn.second_token_ns = now
        turn.last_token_ns = now

    def _end(self, turn: Turn) -> Steps:
        yield self.processes.after(self._control.hop_ns)
        yield self._client_thread.submit(self._plant.working(self._control.client_token_ns))
        turn.ended.set()

    # ── what engines report ─────────────────────────────────────────────────────────────────────────────────────────

    def prepared(self, turn: Turn) -> None:
        turn.allocated_ns = turn.read_ns = self.events.now
        self._input(lambda now: self._scheduler.prepared(now, turn.request, 0))

    def loaded(self, turn: Turn, side: Side) -> None:
        turn.read_ns = self.events.now
        self._input(lambda now: self._scheduler.loaded(now, turn.request, 0, side))

    def prefill_done(self, turn: Turn) -> None:
        turn.first_out_ns = turn.last_out_ns = self.events.now
        turn.generated_tokens = 1
        self.processes.start(self._token(turn))
        self._input(lambda now: self._scheduler.prefill_done(now, turn.request, 0))

    def tokens(self, turns: list[Turn]) -> None:
        for turn in turns:
            turn.last_out_ns = self.events.now
            self.processes.start(self._token(turn))

    def buffer_freed(self, turn: Turn, blocks: int) -> None:
        self._input(lambda now: self._scheduler.buffer_freed(now, turn.request, 0, blocks))

    def stored(self, turn: Turn) -> None:
        """Published. The turn's own agent alone could hit it, and asks again only when the turn is finished."""

    def finished(self, turn: Turn) -> None:
        self._input(lambda now: self._scheduler.finished(now, turn.request, 0))

    # ── core ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _input(self, call: Callable[[int], None]) -> None:
        """One input, the commands that follow from it, the next timer; inputs made meanwhile wait for their turn."""
        call(self.events.now)
        if self._driving:
            return
        self._driving = True
        while commands := self._scheduler.take_commands():
            for command in commands:
                self._carry_out(command)
        self._driving = False
        wake_ns = self._scheduler.next_wake()
        if wake_ns is not None and wake_ns != self._wake_ns:
            self._wake_ns = wake_ns
            self.events.at(wake_ns, self._wake, wake_ns)

    def _wake(self, wake_ns: int) -> None:
        if wake_ns == self._wake_ns:
            self._wake_ns = None
            self._input(self._scheduler.wake)

    def _carry_out(self, command: Command) -> None:
        order = self._orders.get(type(command))
        if order is None:
            raise AssertionError(f"core commands {command} where nothing fails and nobody cancels")
        order(command)

    def _order(self, steps: Steps) -> None:
        """To an engine, over the control socket."""

        def on_its_way() -> Steps:
            yield self.processes.after(self._control.hop_ns)
            yield self.processes.start(steps)

        self.processes.start(on_its_way())

    def _prepare(self, command: Prepare) -> None:
        turn = self._turns[command.request]
        turn.decode_engine = command.engine
        turn.placed_ns = self.events.now
        self._order(self._decode[command.engine].prepare(turn))

    def _load(self, command: Load) -> None:
        turn = self._turns[command.request]
        turn.legs.append(command.leg)
        turn.allocated_ns = turn.read_ns = self.events.now
        engine = self._prefill[command.engine] if command.leg.side is Side.PE else self._decode[command.engine]
        self._order(engine.load(turn, command.leg))

    def _start_prefill(self, command: Prefill) -> None:
        turn = self._turns[command.request]
        turn.prefill_engine = command.engine
        self._order(self._prefill[command.engine].prefill(turn))

    def _start_decode(self, command: Decode) -> None:
        self._order(self._decode[command.engine].decode(self._turns[command.request]))

    def _finish(self, command: Finish) -> None:
        self.processes.start(self._end(self._turns.pop(command.request)))

    def _fail(self, command: Fail) -> None:
        turn = self._turns[command.request]
        raise PredictionError(
            f"{turn.trajectory}, turn {turn.round_index}: the cluster refuses it ({command.cause.value}), so its run "
            "can't be predicted"
        )


def _limits() -> Limits:
    """Deadlines and the admission bound are for failures, which are not predicted."""
    return Limits(
        max_waiting=1_000_000, queue_ns=_NEVER_NS, load_ns=_NEVER_NS, prefill_ns=_NEVER_NS, decode_ns=_NEVER_NS,
        release_ns=_NEVER_NS,
    )  # fmt: skip
