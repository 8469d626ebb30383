"""A model of engines and a driver, for tests: it carries out core's commands with books of its own.

Every answer an engine owes is a `Job` that a test may deliver in any order, late, or never (its engine dies). The model
asserts what a real engine would trip over: an allocation without room, a command to a dead engine, a prefill before its
KV is there, a second terminal command.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from dualpath.core.journal import JournaledScheduler
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Abort,
    Cancelled,
    Cause,
    Command,
    Decode,
    EngineFacts,
    Fail,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    Resubmit,
    Role,
    Side,
)

Key = tuple[int, int]


@dataclass
class Job:
    """Something an engine (or, with engine None, the driver) still has to do and then say."""

    engine: int | None
    key: Key
    work: Callable[[bool], None]
    """Called with True for success."""


@dataclass
class ModelEngine:
    """An engine's own books: blocks by attempt."""

    facts: EngineFacts
    buffer: dict[Key, int] = field(default_factory=dict)
    hbm: dict[Key, int] = field(default_factory=dict)
    aborted: set[Key] = field(default_factory=set)

    def take_buffer(self, key: Key, blocks: int) -> None:
        assert key not in self.buffer, f"{key} has buffer blocks on engine {self.facts.engine} already"
        self.buffer[key] = blocks
        assert sum(self.buffer.values()) <= self.facts.buffer_blocks, f"engine {self.facts.engine} is out of buffer"

    def take_hbm(self, key: Key, blocks: int) -> None:
        self.hbm[key] = blocks
        assert sum(self.hbm.values()) <= self.facts.hbm_blocks, f"engine {self.facts.engine} is out of device memory"

    def drop(self, key: Key) -> None:
        self.buffer.pop(key, None)
        self.hbm.pop(key, None)


@dataclass
class ModelRequest:
    facts: RequestFacts
    outcome: Command | None = None
    loaded_blocks: int = 0
    prepared: bool = False


class ModelCluster:
    """A driver with its engines, around a journaled scheduler."""

    def __init__(self, policy: Policy, constants: Constants, limits: Limits) -> None:
        self.journal: list[bytes] = []
        self.core = JournaledScheduler(Scheduler(policy, constants, limits), self.journal.append)
        self.constants = constants
        self.now = 0
        self.engines: dict[int, ModelEngine] = {}
        self.requests: dict[int, ModelRequest] = {}
        self.jobs: list[Job] = []
        self.said: list[tuple[str, tuple[object, ...]]] = []
        """What engines have said, for saying it again."""
        self._next_engine = 0

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def join(self, role: Role, buffer_blocks: int, hbm_blocks: int, *, neighbour: bool = False) -> int:
        """A new engine, on a node of its own or, with `neighbour`, next to the last one of its role."""
        engine = self._next_engine
        self._next_engine += 1
        node, group = engine, engine % 2
        if neighbour:
            for other in self.engines.values():
                if other.facts.role is role:
                    node, group = other.facts.node, other.facts.group
        facts = EngineFacts(engine, role, node, group, buffer_blocks, hbm_blocks if role is Role.DECODE else 0)
        self.engines[engine] = ModelEngine(facts)
        self.core.engine_joined(self.now, facts)
        self.carry_out()
        return engine

    def lose(self, engine: int) -> None:
        del self.engines[engine]
        self.jobs = [job for job in self.jobs if job.engine != engine]
        self.core.engine_lost(self.now, engine)
        self.carry_out()

    def submit(self, prompt_tokens: int, hit_blocks: int, max_new_tokens: int) -> int:
        request = len(self.requests)
        hit_tokens = min(hit_blocks, (prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        facts = RequestFacts(request, 0, prompt_tokens, hit_tokens, max_new_tokens)
        self.requests[request] = ModelRequest(facts)
        self.core.submit(self.now, facts)
        self.carry_out()
        return request

    def cancel(self, request: int) -> None:
        self.core.cancel(self.now, request)
        self.carry_out()

    def say(self, name: str, *arguments: object) -> None:
        """An engine's message reaches core."""
        self.said = [*self.said[-40:], (name, arguments)]
        getattr(self.core, name)(self.now, *arguments)
        self.carry_out()

    def deliver(self, index: int, success: bool = True) -> None:
        self.jobs.pop(index).work(success)

    def pass_time(self, duration_ns: int) -> None:
        self.now += duration_ns
        self.core.wake(self.now)
        self.carry_out()

    # ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    def carry_out(self) -> None:
        for command in self.core.take_commands():
            self._one(command)

    def _one(self, command: Command) -> None:
        request = self.requests[command.request]
        assert isinstance(command, Abort) or request.outcome is None, f"{command} after {request.outcome}"
        match command:
            case Prepare():
                self._prepare(command)
            case Load():
                self._load(command)
            case Prefill():
                self._prefill(command)
            case Decode():
                self._decode(command)
            case Abort():
                self._abort(command)
            case Resubmit():
                assert command.attempt == request.facts.attempt + 1
                self._job(None, command.request, command.attempt, lambda _: self._resubmit(command))
            case Finish() | Fail() | Cancelled():
                request.outcome = command

    def _job(self, engine: int | None, request: int, attempt: int, work: Callable[[bool], None]) -> None:
        assert engine is None or engine in self.engines, f"a command for engine {engine}, which is gone"
        self.jobs.append(Job(engine, (request, attempt), work))

    def _prepare(self, command: Prepare) -> None:
        key = (command.request, command.attempt)
        engine = self.engines[command.engine]
        assert engine.facts.role is Role.DECODE
        engine.take_buffer(key, command.buffer_blocks)
        engine.take_hbm(key, command.hbm_blocks)

        def work(success: bool) -> None:
            if success:
                request = self.requests[command.request]
                request.prepared |= request.facts.attempt == command.attempt
                self.say("prepared", *key)
            else:
                self.say("attempt_failed", *key, command.engine, Cause.COMPUTE_FAILED)

        self._job(command.engine, *key, work)

    def _load(self, command: Load) -> None:
        key = (command.request, command.attempt)
        engine = self.engines[command.engine]
        assert (engine.facts.role is Role.PREFILL) == (command.leg.side is Side.PE)
        if command.leg.side is Side.PE:
            engine.take_buffer(key, command.leg.blocks)
        else:
            assert command.leg.first_block + command.leg.blocks <= engine.buffer[key]

        def work(success: bool) -> None:
            request = self.requests[command.request]
            if success and request.facts.attempt == command.attempt:
                request.loaded_blocks += command.leg.blocks
            self.say("loaded" if success else "load_failed", *key, command.leg.side)

        self._job(command.engine, *key, work)

    def _prefill(self, command: Prefill) -> None:
        key = (command.request, command.attempt)
        request = self.requests[command.request]
        assert request.prepared and request.loaded_blocks * BLOCK_TOKENS == request.facts.hit_tokens
        assert key in self.engines[command.decode_engine].buffer

        def work(success: bool) -> None:
            engine = self.engines[command.engine]
            if not success:
                self.say("attempt_failed", *key, command.engine, Cause.TRANSFER_FAILED)
                return
            if key not in engine.aborted:
                engine.drop(key)
            self.say("prefill_done", *key)

        self._job(command.engine, *key, work)

    def _decode(self, command: Decode) -> None:
        key = (command.request, command.attempt)

        def work(success: bool) -> None:
            engine = self.engines[command.engine]
            blocks = engine.buffer.get(key, 0)
            if not success:
                self.say("attempt_failed", *key, command.engine, Cause.COMPUTE_FAILED)
            elif key in engine.aborted:
                self.say("finished", *key)  # said before it heard of the Abort
            elif blocks > 1:
                piece = (blocks + 1) // 2
                engine.buffer[key] = blocks - piece
                self._job(command.engine, *key, work)
                self.say("buffer_freed", *key, piece)
            else:
                engine.drop(key)
                self.say("finished", *key)

        self._job(command.engine, *key, work)

    def _abort(self, command: Abort) -> None:
        key = (command.request, command.attempt)
        engine = self.engines[command.engine]
        assert key not in engine.aborted, "aborted twice"
        assert command.lost_peer not in self.engines or command.lost_peer is None
        engine.aborted.add(key)

        def work(_: bool) -> None:
            engine.drop(key)
            self.say("released", *key, command.engine)

        self._job(command.engine, *key, work)

    def _resubmit(self, command: Resubmit) -> None:
        request = self.requests[command.request]
        old = request.facts
        hit_tokens = old.hit_tokens // 2 // BLOCK_TOKENS * BLOCK_TOKENS
        facts = RequestFacts(old.request, command.attempt, old.prompt_tokens, hit_tokens, old.max_new_tokens)
        self.requests[command.request] = ModelRequest(facts, request.outcome)
        self.core.resubmit(self.now, facts)
        self.carry_out()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def open_requests(self) -> list[int]:
        return [number for number, request in self.requests.items() if request.outcome is None]

    def drain(self) -> None:
        """Everybody answers, nothing else happens: all requests must end without any deadline's help."""
        while self.jobs or self.open_requests:
            if self.jobs:
                self.deliver(0)
                continue
            wake_ns = self.core.next_wake()
            assert wake_ns is not None and wake_ns <= self.now + self.constants.fetch_interval_ns, (
                f"requests {self.open_requests} are stuck: nothing is under way"
            )
            self.pass_time(max(0, wake_ns - self.now))
