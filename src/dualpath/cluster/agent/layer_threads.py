"""Serves the loader thread and the shipper thread of one prefill engine: each layer's copies and transfers.

The engine calls once a layer and way; the batch that runs says what is to be moved. Each connection has a thread here,
which waits most of its time: for the engine, or for a NIC.
"""

import threading

import msgspec

from dualpath.cluster import attachment as a
from dualpath.cluster.agent.layer_transfers import BatchTransfers
from dualpath.cluster.attachment_frames import Connection, NotAPeerError
from dualpath.cluster.shared_rows import SharedRows

_decoder = msgspec.msgpack.Decoder(a.LayerCall)


class LayerThreads:
    """The batch that runs is set before the engine is told to run it, and taken away when the engine has answered."""

    def __init__(self, rows: SharedRows | None) -> None:
        """`rows` are None of a decode engine, which has no layers to move."""
        self.batch: BatchTransfers | None = None
        self._rows = rows
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []

    def serve(self, way: a.Way, connection: Connection) -> None:
        """Serve one connection on a thread of its own, until it ends."""
        thread = threading.Thread(target=self._serve, args=(way, connection), name=f"layer-{way}", daemon=True)
        self._connections.append(connection)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """The engine is gone. Waits for transfers in progress, which end by their deadline."""
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join()
        if self._rows is not None:
            self._rows.close()

    def _serve(self, way: a.Way, connection: Connection) -> None:
        try:
            while True:
                call = connection.receive(_decoder)
                connection.send(a.LayerResult(self._move(way, call)))
        except (OSError, NotAPeerError):
            connection.close()  # the engine is gone, or not one of ours: its agent's other connection ends as well

    def _move(self, way: a.Way, call: a.LayerCall) -> list[str]:
        batch = self.batch
        if batch is None or self._rows is None:
            return ["no batch runs"] * len(call.spans)
        view = self._rows.view
        rows = [None if span is None else view(span) for span in call.spans]
        move = batch.load_layer if way == "load" else batch.ship_layer
        errors = move(call.layer, rows)
        batch.note(errors)
        return ["" if error is None else repr(error) for error in errors]
