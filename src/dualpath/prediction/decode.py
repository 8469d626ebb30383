"""A decode engine of the runtime, simulated: its legs, the copy to its device memory, steps, and blocks made durable.

Theory of operation. One thread copies prompts to the device, one after another; a turn joins the running batch when its
copy is complete. A step gives every joined turn one token and takes what the fitted cost says for the batch. Prompt
blocks that were computed are written to storage one by one, then the generated ones as they fill; the turn is finished
when its last token is out and its last block durable, and only then does the client see the end of its stream.
"""

from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Leg, Side
from dualpath.prediction.machine import MoveCost
from dualpath.prediction.plant import BlockReader, BlockWriter, Plant
from dualpath.prediction.processes import Condition, Steps, Workers
from dualpath.prediction.turns import Turn


class DecodeEngine:
    """One DE."""

    def __init__(self, plant: Plant, engine: EngineId) -> None:
        self._plant = plant
        self._nic = plant.cnics[engine]
        self._reader = BlockReader(plant, engine)
        self._writer = BlockWriter(plant, engine)
        self._main = Workers(plant.processes)
        self._copies = Workers(plant.processes)
        self._joined: list[Turn] = []
        self._stepping = False
        self._progress = Condition()

    def prepare(self, turn: Turn) -> Steps:
        """The coordinator's order to set pages aside."""
        yield self._main.submit(self._plant.working(self._plant.rates.control.decode_request_ns / 2))
        self._plant.tell(lambda: self._plant.reports.prepared(turn))

    def load(self, turn: Turn, leg: Leg) -> Steps:
        """The coordinator's order to read a leg."""
        yield self._reader.read(leg)
        self._plant.tell(lambda: self._plant.reports.loaded(turn, Side.DE))

    def decode(self, turn: Turn) -> Steps:
        """The coordinator's order to go on from the first token, which is out: to the end, with everything stored."""
        plant = self._plant
        yield self._main.submit(plant.working(plant.rates.control.decode_request_ns / 2))
        yield self._copies.submit(self._copy(turn.prompt_tokens * plant.rates.kv_bytes_per_token, plant.rates.fill))
        self._free(turn, turn.prompt_blocks - (turn.full_blocks - turn.hit_blocks))
        if turn.generate_tokens > 1:
            self._join(turn)
        for _ in range(turn.hit_blocks, turn.full_blocks):
            yield self._writer.write()
            plant.tell(lambda: plant.reports.stored(turn))
            self._free(turn, 1)
        yield plant.processes.start(self._generated_blocks(turn))
        plant.tell(lambda: plant.reports.finished(turn))

    def _free(self, turn: Turn, blocks: int) -> None:
        if blocks:
            self._plant.tell(lambda: self._plant.reports.buffer_freed(turn, blocks))

    def _copy(self, n_bytes: int, cost: MoveCost) -> Steps:
        """On the copying thread: between the DE buffer, or a block on its way to storage, and the device."""
        return self._plant.mover.move((self._nic.tx, self._nic.rx), n_bytes, cost)

    def _generated_blocks(self, turn: Turn) -> Steps:
        """Each block as it fills: the newest token has no KV yet."""
        plant = self._plant
        last_tokens = turn.prompt_tokens + turn.generate_tokens - 1
        for block in range(turn.full_blocks, last_tokens // BLOCK_TOKENS):
            filled_tokens = (block + 1) * BLOCK_TOKENS + 1
            yield self._progress.when(lambda filled=filled_tokens: turn.context_tokens >= filled)  # type: ignore[misc]
            yield self._copies.submit(self._copy(plant.block_bytes, plant.rates.copy_out))
            yield self._writer.write()
            plant.tell(lambda: plant.reports.stored(turn))
        yield self._progress.when(lambda: turn.generated_tokens == turn.generate_tokens)

    def _join(self, turn: Turn) -> None:
        self._joined.append(turn)
        if not self._stepping:
            self._stepping = True
            self._plant.processes.start(self._steps())

    def _steps(self) -> Steps:
        plant = self._plant
        while batch := list(self._joined):
            step_ns = plant.rates.decode.step_ns([turn.context_tokens for turn in batch])
            yield plant.cpu.run_decode(step_ns, plant.rates.threads)
            telling_ns = plant.rates.control.decode_step_ns + len(batch) * plant.rates.control.decode_token_ns
            yield self._main.submit(plant.working(telling_ns))
            for turn in batch:
                turn.generated_tokens += 1
                if turn.generated_tokens == turn.generate_tokens:
                    self._joined.remove(turn)
            plant.tell(lambda batch=batch: plant.reports.tokens(batch), tokens=len(batch))  # type: ignore[misc]
            self._progress.changed()
        self._stepping = False
