"""A prefill engine's computing: batches that its agent packs, run layer by layer on the compute thread.

The layers' KV is in `SharedRows`. The loader thread and the shipper thread ask the agent to move each layer
(`AgentLayerIO`), on a connection of their own each.
"""

import time

import msgspec

from dualpath.cluster import attachment as a
from dualpath.cluster.attachment_frames import Connection
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.constraining import REFUSALS, Constrainer
from dualpath.cluster.engines.drawing import as_draw
from dualpath.cluster.shared_rows import SharedRows
from dualpath.model import DeviceCopies, LayerwisePrefill, LoadedModel, PrefillItem, PrefillOutput, Scored
from dualpath.model.layers import Bytes
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

PROBE_HIT_TOKENS = 2048
PROBE_NEW_TOKENS = 64

_decoder = msgspec.msgpack.Decoder(a.LayerResult)


class MovingError(Exception):
    """The agent could not move an item's layer; it knows why."""


class NoTransfers:
    """A `LayerIO` that moves no bytes, to measure compute alone."""

    def load_layer(self, _layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(destinations)

    def ship_layer(self, _layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(rows)


class AgentLayerIO:
    """A `LayerIO` that has the agent move the bytes. Raises ConnectionError once the agent is gone."""

    def __init__(self, rows: SharedRows, loads: Connection, ships: Connection) -> None:
        self._rows = rows
        self._loads, self._ships = loads, ships

    def load_layer(self, layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        return self._ask(self._loads, layer, destinations)

    def ship_layer(self, layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        return self._ask(self._ships, layer, rows)

    def _ask(self, connection: Connection, layer: int, parts: list[Bytes | None]) -> list[Exception | None]:
        connection.send(a.LayerCall(layer, [None if part is None else self._rows.span(part) for part in parts]))
        return [MovingError(error) if error else None for error in connection.receive(_decoder).errors]

    def close(self) -> None:
        self._loads.close()
        self._ships.close()


class PrefillCompute:
    """Runs batches, one after another, on the thread that calls `run_batch`."""

    def __init__(
        self, model: LoadedModel, cluster: ClusterConfig, constrainer: Constrainer, copies: DeviceCopies
    ) -> None:
        self._model = model
        self._constrainer = constrainer
        most_tokens = max(model.max_length_tokens, cluster.max_batch_kv_tokens)
        layers = cluster.device_layers if cluster.policy.layerwise else model.layout.layers
        page_bytes = 4096
        layer_bytes = -(-most_tokens * max(model.layout.row_bytes) // page_bytes) * page_bytes
        self.rows = SharedRows.create("rows", max(layers, 2) * layer_bytes)
        self._prefill = LayerwisePrefill(
            model,
            device_layers=cluster.device_layers,
            layerwise=cluster.policy.layerwise,
            max_batch_tokens=most_tokens,
            memory=self.rows,
            copies=copies,
        )
        self._peak_device_kv_bytes = 0
        self.io: AgentLayerIO | None = None

    def measure_tokens_per_s(self) -> float:
        """Returns prompt tokens per second, hits included, of a typical agent turn: the second, warm run of two."""
        new_tokens = min(PROBE_NEW_TOKENS, self._model.max_length_tokens)
        hit_tokens = min(PROBE_HIT_TOKENS, self._model.max_length_tokens - new_tokens)
        item = PrefillItem(token_ids=[0] * new_tokens, past_tokens=hit_tokens)
        elapsed_ns = 0
        for _ in range(2):
            started_ns = time.monotonic_ns()
            self._prefill.run([item], NoTransfers())
            elapsed_ns = time.monotonic_ns() - started_ns
        return (hit_tokens + new_tokens) * 1e9 / elapsed_ns

    def run_batch(self, message: a.RunBatch) -> a.BatchDone:
        """Raises LayerIOTimeoutError when a thread hangs in a transfer: only the end of this process helps then."""
        assert self.io is not None
        outputs = self._prefill.run([self._item(item) for item in message.items], self.io)
        statistics = self._prefill.statistics
        if statistics is not None:
            self._peak_device_kv_bytes = max(self._peak_device_kv_bytes, statistics.peak_device_kv_bytes)
        return a.BatchDone(message.call, [_result(output) for output in outputs])

    def _item(self, item: a.ChunkItem) -> PrefillItem:
        return PrefillItem(
            token_ids=item.token_ids,
            past_tokens=item.past_tokens,
            sampling=item.sampling,
            generated_so_far=item.generated_tokens,
            constraints=self._constrainer.made(item.owner) if item.sampling is not None else None,
            scored=None if item.next_token_ids is None else Scored(item.next_token_ids, item.top),
        )

    def release_memory(self) -> None:
        """Give the layers' memory back, with nothing in hand; the next batch takes new."""
        self._prefill.release_memory()

    def restore_memory(self) -> None:
        """Nothing to do: the next batch takes its buffers."""

    def gauges(self) -> Figures:
        return {metrics.PREFILL_PEAK_KV_BYTES(): float(self._peak_device_kv_bytes)}

    def detach(self) -> None:
        """The agent is gone: layers in progress fail."""
        if self.io is not None:
            self.io.close()

    def close(self) -> None:
        self.detach()
        self._prefill.close()
        self.rows.remove()


def _result(output: PrefillOutput) -> a.ChunkResult:
    scores = output.scores
    return a.ChunkResult(
        error="" if output.error is None else str(output.error) or repr(output.error),
        refused=isinstance(output.error, REFUSALS),
        draw=as_draw(output.token),
        scores=None
        if scores is None
        else a.Scores(scores.token_ids.tolist(), scores.logprobs.tolist(), scores.ranks.tolist()),
    )
