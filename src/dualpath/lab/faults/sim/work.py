"""What engines do with commands: jobs that end when a step says so. They assert what a real engine would trip over."""

from collections.abc import Callable

from dualpath.core.vocabulary import BLOCK_TOKENS, Abort, Cause, Command, Decode, Load, Prefill, Prepare, Role, Side
from dualpath.lab.faults.matrix import Phase
from dualpath.lab.faults.sim.engines import Job, Key, ModelEngine, ModelRequest


class EngineWork:
    """The work of a cluster's engines, which shares its `requests` and `jobs`; ``say(engine, name, …)`` reports."""

    def __init__(self, requests: dict[int, ModelRequest], jobs: list[Job], say: Callable[..., None]) -> None:
        self.requests = requests
        self.jobs = jobs
        self.say = say

    def arrive(self, engine: ModelEngine, command: Command) -> None:
        match command:
            case Prepare():
                self._prepare(engine, command)
            case Load():
                self._load(engine, command)
            case Prefill():
                self._stage(engine, command)
                self._job(engine, command, Phase.PREFILLING, self._prefilling(engine, command))
            case Decode():
                self._job(engine, command, Phase.ADMITTING, self._decoding(engine, command))
            case Abort():
                self._abort(engine, command)

    def _job(
        self,
        engine: ModelEngine,
        command: Prepare | Load | Prefill | Decode | Abort,
        phase: Phase,
        work: Callable[[bool], None],
    ) -> None:
        self.jobs.append(Job(engine.facts.engine, (command.request, command.attempt), work, phase))

    def _prepare(self, engine: ModelEngine, command: Prepare) -> None:
        key = (command.request, command.attempt)
        assert engine.facts.role is Role.DECODE
        engine.take_buffer(key, command.buffer_blocks)
        engine.take_hbm(key, command.hbm_blocks)

        def work(success: bool) -> None:
            if success:
                request = self.requests[command.request]
                request.prepared |= request.facts.attempt == command.attempt
                self.say(command.engine, "prepared", *key)
            else:
                self.say(command.engine, "attempt_failed", *key, command.engine, Cause.COMPUTE_FAILED)

        self._job(engine, command, Phase.ALLOCATING, work)

    def _load(self, engine: ModelEngine, command: Load) -> None:
        key = (command.request, command.attempt)
        assert (engine.facts.role is Role.PREFILL) == (command.leg.side is Side.PE)
        if command.leg.side is Side.PE:
            engine.take_buffer(key, command.leg.blocks)
        else:
            assert command.leg.first_block + command.leg.blocks <= engine.buffer[key]

        def work(success: bool) -> None:
            request = self.requests[command.request]
            if success and request.facts.attempt == command.attempt:
                request.loaded_blocks += command.leg.blocks
            self.say(command.engine, "loaded" if success else "load_failed", *key, command.leg.side)

        self._job(engine, command, Phase.READING, work)

    def _stage(self, engine: ModelEngine, command: Prefill) -> None:
        """Take what the prompt needs beside the blocks of a leg, where the engine stages."""
        request = self.requests[command.request]
        if engine.facts.stages and request.facts.attempt == command.attempt:
            key = (command.request, command.attempt)
            engine.drop(key)
            engine.take_buffer(key, -(-request.facts.prompt_tokens // BLOCK_TOKENS))

    def _prefilling(self, engine: ModelEngine, command: Prefill) -> Callable[[bool], None]:
        """Compute, then ship."""
        key = (command.request, command.attempt)

        def compute(success: bool) -> None:
            if not success:
                self.say(command.engine, "attempt_failed", *key, command.engine, Cause.COMPUTE_FAILED)
                return
            self._enter(key, Phase.SHIPPING)
            self._job(engine, command, Phase.SHIPPING, ship)

        def ship(success: bool) -> None:
            if not success:
                self.say(command.engine, "attempt_failed", *key, command.engine, Cause.TRANSFER_FAILED)
                return
            if key not in engine.aborted:
                engine.drop(key)
            self.say(command.engine, "prefill_done", *key)

        return compute

    def _decoding(self, engine: ModelEngine, command: Decode) -> Callable[[bool], None]:
        """Free the buffer piece by piece, then generate, then persist."""
        key = (command.request, command.attempt)

        def admit(success: bool) -> None:
            blocks = engine.buffer.get(key, 0)
            piece = (blocks + 1) // 2
            if _failed(success):
                return
            if blocks > 1:
                engine.buffer[key] = blocks - piece
                self._job(engine, command, Phase.ADMITTING, admit)
                self.say(command.engine, "buffer_freed", *key, piece)
                return
            self._enter(key, Phase.DECODING)
            self._job(engine, command, Phase.DECODING, generate)

        def generate(success: bool) -> None:
            if not _failed(success):
                self._enter(key, Phase.PERSISTING)
                self._job(engine, command, Phase.PERSISTING, persist)

        def persist(success: bool) -> None:
            if _failed(success):
                return
            if key not in engine.aborted:
                engine.drop(key)
            self.say(command.engine, "finished", *key)  # perhaps before it heard of the Abort

        def _failed(success: bool) -> bool:
            if not success:
                self.say(command.engine, "attempt_failed", *key, command.engine, Cause.COMPUTE_FAILED)
            return not success

        return admit

    def _enter(self, key: Key, part: Phase) -> None:
        request = self.requests[key[0]]
        if request.facts.attempt == key[1]:
            request.part = part

    def _abort(self, engine: ModelEngine, command: Abort) -> None:
        key = (command.request, command.attempt)
        assert key not in engine.aborted, "aborted twice"
        engine.aborted.add(key)

        def work(_: bool) -> None:
            self.jobs[:] = [job for job in self.jobs if job.key != key or job.engine != command.engine]
            writes = [job for job in self.jobs if job.key == key and job.phase in (Phase.PREFILLING, Phase.SHIPPING)]
            assert not writes, f"engine {command.engine} frees the buffer of {key}, into which a PE still writes"
            engine.drop(key)
            self.say(command.engine, "released", *key, command.engine)

        self._job(engine, command, Phase.QUEUED, work)
