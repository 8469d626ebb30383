"""Prefill engines: batches come from core's `PrefillQueue`, times from the cost model; groups step together.

Theory of operation. With expert parallelism the engines of a group meet in every layer, so a step lasts as long as its
slowest engine's attention plus the group's share of the experts (`costs`); a request that becomes ready during a step
waits for the next. Otherwise every engine is a group of its own. A step is two events, however large its batches are:

    layerwise      head + max(compute, I/O) ........ prompts end, next step begins;   + tail: prefill_done
    whole prompts  load + compute + transfer .......... the same, without a tail

`head` is the first layer's load, `tail` the last layer's transfer. I/O is the busiest direction of the engine's own
CNIC. A whole-prompt load takes as long as its bytes or as submitting its copies, whichever is longer. First tokens
leave when the step ends.
"""

from collections.abc import Callable

from dualpath.core.batching import Chunk, PrefillQueue
from dualpath.core.policy import Policy
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, RequestId
from dualpath.lab.sim.costs import StepCosts
from dualpath.lab.sim.events import Events
from dualpath.lab.sim.fabric import Fabric
from dualpath.lab.sim.turns import LiveTurn

Batch = list[tuple["PrefillEngine", tuple[Chunk, ...]]]


class PrefillEngine:
    """One PE: its queue, and whether it is alive."""

    __slots__ = ("engine", "group", "queue")

    def __init__(self, engine: EngineId, group: "PrefillGroup", queue: PrefillQueue) -> None:
        self.engine = engine
        self.group = group
        self.queue = queue


class PrefillGroup:
    """Engines that step together."""

    __slots__ = ("busy", "engines", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.engines: list[PrefillEngine] = []
        self.busy = False


class StepRecord:
    """Record of a finished step, for statistics and the trace."""

    __slots__ = ("attention_mean_ns", "attention_peak_ns", "end_ns", "group", "new_tokens", "paced", "start_ns")

    def __init__(self, group: int, start_ns: int, end_ns: int, peak_ns: float, mean_ns: float, new_tokens: int) -> None:
        self.group = group
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.attention_peak_ns = peak_ns
        self.attention_mean_ns = mean_ns
        self.new_tokens = new_tokens
        self.paced: list[tuple[EngineId, float]] = []
        """Bytes that it pulls from DEs while it lasts."""


class PrefillPart:
    """All prefill engines. Calls `on_first_token(turn)` at a prompt's end, `on_done(turns)` once its KV is shipped."""

    def __init__(
        self,
        events: Events,
        costs: StepCosts,
        fabric: Fabric,
        lives: dict[RequestId, LiveTurn],
        on_first_token: Callable[[LiveTurn], None],
        on_done: Callable[[list[tuple[LiveTurn, int]]], None],
        policy: Policy,
    ) -> None:
        self._events = events
        self._costs = costs
        self._fabric = fabric
        self._lives = lives
        self._on_first_token = on_first_token
        self._on_done = on_done
        self._layerwise = policy.layerwise
        self._free_io = policy.free_io
        self.engines: dict[EngineId, PrefillEngine] = {}
        self.groups: list[PrefillGroup] = []
        self.steps: list[StepRecord] = []
        self.chunks = 0
        """Tokens computed or being computed."""
        self.busy_ns = 0
        """Sum over groups."""
        self._last_step_ns = 0
        self.busy_groups = 0
        self.stretch: Callable[[], float] | None = None
        """Factor on a step's compute if engines share cores; read when the step begins."""

    @property
    def pace_ns(self) -> int:
        """Length of the latest step; 0 while no group steps."""
        return self._last_step_ns if self.busy_groups else 0

    def add_group(self, queues: dict[EngineId, PrefillQueue]) -> None:
        """Adds engines that step together, by id."""
        group = PrefillGroup(len(self.groups))
        self.groups.append(group)
        for engine, queue in queues.items():
            self.engines[engine] = PrefillEngine(engine, group, queue)
            group.engines.append(self.engines[engine])

    def push(self, turn: LiveTurn) -> None:
        """Queues a turn whose KV is all loaded."""
        engine = self.engines[turn.prefill_engine]
        engine.queue.push(turn.request, turn.attempt, turn.hit_tokens, turn.prompt_tokens - turn.hit_tokens)
        group = engine.group
        if not group.busy:
            group.busy = True
            self.busy_groups += 1
            self._events.at(self._events.now, self._begin, group)

    def remove(self, turn: LiveTurn) -> None:
        """Removes an aborted attempt; a chunk of it that is being computed is wasted."""
        self.engines[turn.prefill_engine].queue.remove(turn.request, turn.attempt)

    def lose(self, engine: EngineId) -> None:
        """Removes a lost engine; its group continues without it."""
        lost = self.engines.pop(engine)
        lost.group.engines.remove(lost)

    def _begin(self, group: PrefillGroup) -> None:
        batch = [
            (engine, chunks)
            for engine in group.engines
            if engine.queue.waiting_requests and (chunks := engine.queue.next_batch())
        ]
        if not batch:
            group.busy = False
            self.busy_groups -= 1
            return
        chunk_ns = self._costs.attention.chunk_ns
        peak_ns = total_ns = 0.0
        new_tokens = 0
        for _, chunks in batch:
            self.chunks += len(chunks)
            attention_ns = len(chunks) * self._costs.prefill_chunk_ns
            for chunk in chunks:
                attention_ns += chunk_ns(chunk.past_tokens, chunk.new_tokens)
                new_tokens += chunk.new_tokens
            total_ns += attention_ns
            if attention_ns > peak_ns:
                peak_ns = attention_ns
        engines = len(group.engines)
        compute_ns = self._costs.prefill_ns(peak_ns, new_tokens / engines)
        if self.stretch is not None:
            compute_ns *= self.stretch()
        now = self._events.now
        record = StepRecord(group.number, now, now, peak_ns, total_ns / engines, new_tokens)
        self._run(group, batch, compute_ns, record)

    def _run(self, group: PrefillGroup, batch: Batch, compute_ns: float, record: StepRecord) -> None:
        """Runs the step as a whole; calls `_end`."""
        pulls: list[tuple[EngineId, int]] = []
        step_ns, tail_ns = self._with_io(batch, compute_ns, pulls)
        record.paced = self._fabric.pace(pulls, step_ns)
        self.busy_ns += int(step_ns)
        record.end_ns += int(step_ns)
        self._events.at(record.end_ns, self._end, (group, batch, int(tail_ns), record))

    def _with_io(self, batch: Batch, compute_ns: float, pulls: list[tuple[EngineId, int]]) -> tuple[float, float]:
        """Returns the step's length, and how much later its KV is in the DE buffers; adds what DEs send to `pulls`."""
        if self._free_io:
            return compute_ns, 0.0
        load_ns = ship_ns = both_ns = copies_ns = 0.0
        for engine, chunks in batch:
            read, write, shipped = self._move(engine.engine, chunks, pulls)
            ns_per_byte = self._fabric.ns_per_byte[engine.engine]
            load_ns = max(load_ns, write * ns_per_byte)
            ship_ns = max(ship_ns, shipped * ns_per_byte)
            both_ns = max(both_ns, max(read, write) * ns_per_byte)
            if not self._layerwise:
                copies_ns = max(copies_ns, self._submissions_ns(chunks))
        if self._layerwise:
            return load_ns / self._costs.layers + max(compute_ns, both_ns), ship_ns / self._costs.layers
        return max(load_ns, copies_ns) + compute_ns + ship_ns, 0.0

    def _submissions_ns(self, chunks: tuple[Chunk, ...]) -> float:
        return sum(-(-chunk.past_tokens // BLOCK_TOKENS) for chunk in chunks) * self._costs.copy_ns_per_block

    def _move(
        self, engine: EngineId, chunks: tuple[Chunk, ...], pulls: list[tuple[EngineId, int]]
    ) -> tuple[int, int, int]:
        """Counts the chunks' traffic; returns what the PE's CNIC reads, writes, and sends to DEs.

        The bytes are those of `core.load_plan.chunk_plan`, without the ranges.
        """
        fabric, kv = self._fabric, self._costs.kv
        read = write = ship = 0
        for chunk in chunks:
            turn = self._lives[chunk.request]
            decode, past_tokens = turn.decode_engine, chunk.past_tokens
            pe_bytes = kv.seen_bytes(0, turn.pe_tokens, past_tokens)
            de_bytes = kv.seen_bytes(0, past_tokens, past_tokens) - pe_bytes
            ship_bytes = chunk.new_tokens * kv.bytes_per_token
            if past_tokens == turn.hit_tokens:
                ship_bytes += pe_bytes
            if de_bytes:
                pulls.append((decode, de_bytes))
            fabric.count_chunk(decode, de_bytes, ship_bytes)
            read += pe_bytes + ship_bytes
            write += pe_bytes + de_bytes
            ship += ship_bytes
        fabric.count_step(engine, read, write)
        return read, write, ship

    def _end(self, step: tuple[PrefillGroup, Batch, int, StepRecord]) -> None:
        group, batch, tail_ns, record = step
        self._fabric.unpace(record.paced)
        record.paced = []
        done = self._close(batch, record)
        if done and tail_ns:
            self._events.at(record.end_ns + tail_ns, self._on_done, done)
        elif done:
            self._on_done(done)
        # Posted, not called: what this step's end frees may be ready for the next one.
        self._events.at(record.end_ns, self._begin, group)

    def _close(self, batch: Batch, record: StepRecord) -> list[tuple[LiveTurn, int]]:
        """Ends the computed step; returns the turns whose prompts ended with it, and their attempts."""
        self.steps.append(record)
        self._last_step_ns = record.end_ns - record.start_ns
        done: list[tuple[LiveTurn, int]] = []
        for engine, chunks in batch:
            if engine.engine not in self.engines:
                continue
            chunk_done = engine.queue.chunk_done
            for chunk in chunks:
                if chunk_done(chunk.request, chunk.attempt) and chunk.last:
                    turn = self._lives[chunk.request]
                    done.append((turn, turn.attempt))
                    self._on_first_token(turn)
        return done
