"""A model of engines and a driver: it carries out core's commands with books of its own.

Every answer an engine owes is a `Job`, which may be delivered in any order, late, or never (its engine dies). The links
between driver and engines keep order, and hold what is under way while they are cut. The model asserts what a real
engine would trip over: an allocation without room, a command to a dead engine, a prefill before its KV is there, a
second terminal command, blocks that core gives away while an engine still uses them.
"""

from dualpath.core.journal import JournaledScheduler
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Abort,
    Cancelled,
    Command,
    Decode,
    EngineFacts,
    Fail,
    Finish,
    Prefill,
    RequestFacts,
    Resubmit,
    Role,
)
from dualpath.lab.faults.matrix import Phase
from dualpath.lab.faults.sim.engines import Job, ModelEngine, ModelRequest, Word
from dualpath.lab.faults.sim.work import EngineWork


class ModelCluster:
    """A driver with its engines, around a scheduler (or one that keeps a journal)."""

    def __init__(self, core: Scheduler | JournaledScheduler, fetch_interval_ns: int, staging: bool = False) -> None:
        """With `staging`, every second prefill engine stages (`EngineFacts.stages`)."""
        self.core = core
        self.fetch_interval_ns = fetch_interval_ns
        self.now = 0
        self.engines: dict[int, ModelEngine] = {}
        self.requests: dict[int, ModelRequest] = {}
        self.open: dict[int, None] = {}
        """Requests without an outcome."""
        self.jobs: list[Job] = []
        self.said: list[Word] = []
        """What engines have said lately, for saying it again."""
        self.under_way: list[tuple[int, Word]] = []
        """What engines have said and the driver has not heard, with the speaker; in order."""
        self.late = False
        """True while what is said goes to `under_way`."""
        self._work = EngineWork(self.requests, self.jobs, self.say)
        self._next_engine = 0
        self._staging = staging

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
        prefills = role is Role.PREFILL
        stages = self._staging and prefills and engine % 2 == 0
        facts = EngineFacts(engine, role, node, group, buffer_blocks, 0 if prefills else hbm_blocks, stages)
        self.engines[engine] = ModelEngine(facts)
        self.core.engine_joined(self.now, facts)
        self.carry_out()
        return engine

    def lose(self, engine: int) -> None:
        """It is dead; what it said before may still come."""
        del self.engines[engine]
        self.jobs[:] = [job for job in self.jobs if job.engine != engine]
        self.core.engine_lost(self.now, engine)
        self.carry_out()

    def drain_engine(self, engine: int, draining: bool) -> None:
        self.core.engine_draining(self.now, engine, draining)
        self.carry_out()

    def submit(self, prompt_tokens: int, hit_blocks: int, max_new_tokens: int) -> int:
        request = len(self.requests)
        hit_tokens = min(hit_blocks, (prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        facts = RequestFacts(request, 0, prompt_tokens, hit_tokens, max_new_tokens)
        self.requests[request] = ModelRequest(facts)
        self.open[request] = None
        self.core.submit(self.now, facts)
        self.carry_out()
        return request

    def cancel(self, request: int) -> None:
        self.core.cancel(self.now, request)
        self.carry_out()

    def say(self, engine: int, name: str, *arguments: object) -> None:
        """An engine's message leaves it, and reaches core unless something holds it up."""
        if self.late or self.engines[engine].cut_from:
            self.under_way.append((engine, (name, arguments)))
        else:
            self.hear((name, arguments))

    def hear(self, word: Word) -> None:
        """A message reaches core."""
        self.said.append(word)
        if len(self.said) > 80:
            del self.said[:40]
        name, arguments = word
        getattr(self.core, name)(self.now, *arguments)
        self.carry_out()

    def deliver(self, index: int, success: bool = True) -> None:
        """Do the job, if its engine can at present."""
        job = self.jobs[index]
        if job.hung or (job.engine is not None and not self.engines[job.engine].works):
            return
        self.jobs.pop(index).work(success)

    def pass_time(self, duration_ns: int) -> None:
        self.now += duration_ns
        self.core.wake(self.now)
        self.carry_out()

    def heal(self, engine: ModelEngine) -> None:
        """Nothing is wrong with it any more: what was under way arrives, in order."""
        engine.silent_since = None
        engine.stopped = engine.slow = engine.cut_to = engine.cut_from = False
        commands, engine.inbox = engine.inbox, []
        for command in commands:
            self._work.arrive(engine, command)
        number = engine.facts.engine
        words = [word for speaker, word in self.under_way if speaker == number]
        self.under_way = [said for said in self.under_way if said[0] != number]
        for word in words:
            self.hear(word)

    def check_books(self) -> None:
        """Asserts that core counts as held whatever an engine uses: it gives nothing away too early."""
        accounts = self.core.life.ledger.accounts
        for number, engine in self.engines.items():
            held = accounts[number].held
            for key, blocks in engine.buffer.items():
                assert key in held, f"core gave away the buffer of {key} on engine {number}, which still uses it"
                assert held[key].buffer_blocks >= blocks, f"core gave away a part of the buffer of {key} on {number}"
            for key, blocks in engine.hbm.items():
                assert held[key].hbm_blocks >= blocks, f"core gave away device memory of {key} on engine {number}"

    # ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    def carry_out(self) -> None:
        for command in self.core.take_commands():
            self._one(command)

    def _one(self, command: Command) -> None:
        request = self.requests[command.request]
        assert isinstance(command, Abort) or request.outcome is None, f"{command} after {request.outcome}"
        match command:
            case Resubmit():
                assert command.attempt == request.facts.attempt + 1
                key = (command.request, command.attempt)
                self.jobs.append(Job(None, key, lambda _: self._resubmit(command), Phase.QUEUED))
            case Finish() | Fail() | Cancelled():
                request.outcome = command
                del self.open[command.request]
            case _:
                assert command.engine in self.engines, f"a command for engine {command.engine}, which is gone"
                self._check(command, request)
                engine = self.engines[command.engine]
                if engine.cut_to or engine.stopped:
                    engine.inbox.append(command)
                else:
                    self._work.arrive(engine, command)

    def _check(self, command: Command, request: ModelRequest) -> None:
        """What must be so when core gives the command, whenever it arrives."""
        if isinstance(command, Prefill):
            key = (command.request, command.attempt)
            assert request.prepared and request.loaded_blocks * BLOCK_TOKENS == request.facts.hit_tokens
            assert key in self.engines[command.decode_engine].buffer
            request.part = Phase.PREFILLING
        elif isinstance(command, Decode):
            request.part = Phase.ADMITTING
        elif isinstance(command, Abort):
            assert command.lost_peer is None or command.lost_peer not in self.engines

    def _resubmit(self, command: Resubmit) -> None:
        request = self.requests[command.request]
        old = request.facts
        hit_tokens = old.hit_tokens // 2 // BLOCK_TOKENS * BLOCK_TOKENS
        facts = RequestFacts(old.request, command.attempt, old.prompt_tokens, hit_tokens, old.max_new_tokens)
        self.requests[command.request] = ModelRequest(facts, request.outcome)
        self.core.resubmit(self.now, facts)
        self.carry_out()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def drain(self) -> None:
        """All heals, lost engines are replaced, all answer; requests must then end without any deadline's help."""
        for job in self.jobs:
            job.hung = False
        for number, engine in list(self.engines.items()):
            self.heal(engine)
            self.drain_engine(number, False)
        for role in Role:
            if all(engine.facts.role is not role for engine in self.engines.values()):
                self.join(role, 36, 52)
        for _, word in self.under_way:  # of the dead
            self.hear(word)
        self.under_way.clear()
        while self.jobs or self.open:
            if self.jobs:
                self.deliver(0)
                continue
            wake_ns = self.core.next_wake()
            assert wake_ns is not None and wake_ns <= self.now + self.fetch_interval_ns, (
                f"requests {list(self.open)} are stuck: nothing is under way"
            )
            self.pass_time(max(0, wake_ns - self.now))
