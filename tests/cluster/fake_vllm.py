"""A vLLM server with a connector, as an agent, a router and a store see it: processes' worth of threads, no model.

It speaks the protocol of `vllm_attachment` over the agent's real socket, maps the real buffer, and serves HTTP. KV is
a pattern made of the tokens before it (`kv_of`), so that every byte that arrives anywhere can be checked. A worker has
the same part of each Layer Block on every rank's device: that of its rank.

A test makes it misbehave: `gate` stops it at a named place until the test lets it on; `errors` are what it answers.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import numpy as np
import xxhash

from dualpath.cluster import attachment as a
from dualpath.cluster import vllm_attachment as v
from dualpath.cluster.attachment_frames import Connection, NotAPeerError
from dualpath.core.vocabulary import BLOCK_TOKENS, Role
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.transfer.pool import BufferPool

LAYOUT = KVLayout.alike(layers=3, parts=(KVPart("k", 2, 4), KVPart("v", 2, 4)), dtype="float32")
WAIT_S = 10.0
_decoder = msgspec.msgpack.Decoder(v.ToWorker)
Owner = tuple[int, int]


def kv_of(token_ids: list[int], layer: int, block: int) -> np.ndarray:
    """Returns a Layer Block's bytes: a function of the tokens up to the block's end, as far as there are any."""
    before = np.asarray(token_ids[: (block + 1) * BLOCK_TOKENS], np.int64).tobytes()
    seed = xxhash.xxh64_intdigest(before, seed=layer)
    return np.random.default_rng(seed).integers(0, 256, LAYOUT.layer_block_bytes[0], dtype=np.uint8)


def full_block(token_ids: list[int], block: int) -> bytes:
    return b"".join(kv_of(token_ids, layer, block).tobytes() for layer in range(LAYOUT.layers))


def next_token(token_ids: list[int]) -> int:
    return (sum(token_ids) + len(token_ids)) % 251


class Dropped(Exception):  # noqa: N818
    """The agent has dropped the attempt, or its client has gone."""


class Worker:
    """One rank's connector: a receiving thread, the agent's pages, its part of the device."""

    def __init__(self, server: "FakeVllm", rank: int) -> None:
        self.server = server
        self.rank = rank
        self.changed = threading.Condition()
        self.expected: dict[Owner, v.Expect] = {}
        self.ready: dict[Owner, int] = {}
        self.running: set[Owner] = set()
        self.dropped: list[Owner] = []
        self.admits: dict[Owner, a.Admit] = {}
        self.fills: list[a.Fill] = []
        self.begun: set[int] = set()
        self.stopped: set[int] = set()
        self.released: set[int] = set()
        self.device: dict[tuple[int, int], np.ndarray] = {}
        """By sequence and block: this rank's part of each layer."""
        self.left: list[a.Leave] = []
        self.silent = False
        self.connection = Connection.to(server.agent)
        self.connection.send(server.attach_worker(rank))
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def close(self) -> None:
        self.connection.close()
        self._thread.join()
        self._beats.join()

    def say(self, message: msgspec.Struct) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def part(self, layer: int) -> slice:
        """This rank's part of a page's layer."""
        start, stop = LAYOUT.layer_range(layer)
        share = (stop - start) // self.server.workers_wanted
        return slice(start + self.rank * share, start + (self.rank + 1) * share)

    def own(self, layer_block: np.ndarray) -> np.ndarray:
        share = len(layer_block) // self.server.workers_wanted
        return layer_block[self.rank * share : (self.rank + 1) * share]

    def wait(self, holds: Callable[[], bool], owner: Owner, gone: Callable[[], bool]) -> None:
        """Raises Dropped, also when nothing comes."""
        deadline_s = time.monotonic() + WAIT_S
        with self.changed:
            while not holds():
                if owner in self.dropped or gone() or time.monotonic() > deadline_s:
                    raise Dropped
                self.changed.wait(0.01)

    def begin(self, owner: Owner, gone: Callable[[], bool]) -> None:
        """Raises Dropped. From here on a drop is answered at the end."""
        with self.changed:
            self.wait(lambda: owner in self.expected, owner, gone)
            self.running.add(owner)

    def end(self, owner: Owner) -> None:
        with self.changed:
            if owner in self.running and owner in self.dropped:
                self.say(v.Quiet(owner))
            self.running.discard(owner)

    def admit(self, owner: Owner, gone: Callable[[], bool]) -> int:
        """Returns the sequence. Raises Dropped."""
        with self.changed:
            self.wait(lambda: owner in self.admits, owner, gone)
            admit = self.admits.pop(owner)
            self.say(a.Reply(admit.call))
            return admit.sequence

    def _beat(self) -> None:
        while self._thread.is_alive():
            if not self.silent:
                self.say(a.Beat({}))
            self._thread.join(0.1)

    def _receive(self) -> None:
        try:
            while True:
                message = self.connection.receive(_decoder)
                with self.changed:
                    self._handle(message)
                    self.changed.notify_all()
        except (OSError, NotAPeerError):
            return

    def _handle(self, message: msgspec.Struct) -> None:
        match message:
            case a.Attached():
                self.pages = BufferPool.attach(message.pool_path)
                self.server.attached.release()
            case a.Leave():
                self.left.append(message)
            case v.Expect():
                self.expected[message.owner] = message
            case v.LayersReady():
                self.ready[message.owner] = message.layers
            case v.Drop():
                self.dropped.append(message.owner)
                self.expected.pop(message.owner, None)
                if message.owner not in self.running:
                    self.say(v.Quiet(message.owner))
            case a.Admit():
                self.admits[message.owner] = message
            case a.Fill():
                self._fill(message)
            case a.Begin():
                self.begun.add(message.sequence)
                self.say(a.Reply(message.call))
            case a.CopyOut():
                self._copy_out(message)
            case a.Stop():
                self._stop(message.sequence)
            case a.Release():
                self.released.add(message.sequence)
                self.say(a.Reply(message.call))

    def _fill(self, message: a.Fill) -> None:
        if message.sequence in self.stopped:
            self.say(a.Reply(message.call, error="stopped"))
            return
        for block, page, _ in message.blocks:
            parts = [self.pages.view(page)[self.part(layer)] for layer in range(LAYOUT.layers)]
            self.device[message.sequence, block] = np.array(parts)
        self.say(a.Reply(message.call))

    def _stop(self, sequence: int) -> None:
        self.stopped.add(sequence)
        for owner, admit in list(self.admits.items()):
            if admit.sequence == sequence:
                del self.admits[owner]
                self.say(a.Reply(admit.call, error="stopped"))

    def _copy_out(self, message: a.CopyOut) -> None:
        block = self.device.get((message.sequence, message.block))
        if block is None:
            self.say(a.Reply(message.call, error="not held any more"))
            return
        for layer in range(LAYOUT.layers):
            self.pages.view(message.page)[self.part(layer)] = block[layer]
        self.say(a.Reply(message.call))


class FakeVllm:
    """One engine. Used from tests' threads; its HTTP handlers are threads of their own."""

    def __init__(self, agent: str, role: Role, name: str, workers: int = 1, chunk_tokens: int = 192) -> None:
        self.agent = agent
        self.role = role
        self.name = name
        self.workers_wanted = workers
        self.chunk_tokens = chunk_tokens
        self.attached = threading.Semaphore(0)
        self.step = threading.Lock()
        """Held by the prompt that computes: steps come one after another."""
        self.errors: list[int] = []
        """Statuses of the next answers; servers may share them."""
        self.posted: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.wrong: list[str] = []
        """Bytes that were not what they should be."""
        self.gates: dict[str, tuple[threading.Event, threading.Event]] = {}
        self.preempt_once = False
        self.skip_saving = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.workers: list[Worker] = []

    def attach_worker(self, rank: int, **changes: object) -> v.AttachWorker:
        facts = a.Attach(
            role=self.role,
            name=self.name,
            pid=1 + rank,
            layout=LAYOUT,
            model_fingerprint="fake",
            max_model_len_tokens=4096,
            vocab_size=256,
            eos_token_ids=(0,),
            hbm_blocks=64 if self.role is Role.DECODE else 0,
            ticket=f"ticket of {self.name}",
        )
        said = {"engine": facts, "rank": rank, "workers": self.workers_wanted, "url": self.url, "model": "fake"}
        return v.AttachWorker(**(said | changes))  # type: ignore[arg-type]

    def start(self) -> "FakeVllm":
        self.workers = [Worker(self, rank) for rank in range(self.workers_wanted)]
        return self

    def restart(self) -> "FakeVllm":
        """As if its process had died, whatever was left of it, and another taken its place."""
        for worker in self.workers:
            worker.close()
        return self.start()

    def close(self) -> None:
        for _, go_on in self.gates.values():
            go_on.set()
        for worker in self.workers:
            worker.close()
        self._http.shutdown()
        self._http.server_close()

    def gate(self, place: str) -> tuple[threading.Event, threading.Event]:
        """The server stops there once: it sets the first event, and waits for the second."""
        return self.gates.setdefault(place, (threading.Event(), threading.Event()))

    def _pass(self, place: str) -> None:
        if place in self.gates:
            reached, go_on = self.gates[place]
            reached.set()
            go_on.wait(WAIT_S)

    # ── prefill ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill(self, body: dict[str, object], gone: Callable[[], bool]) -> None:
        """Raises Dropped."""
        params = body["kv_transfer_params"]["dualpath"]  # type: ignore[index]
        owner, hit, tokens = tuple(params["owner"]), params["hit_tokens"], body["prompt"]
        assert isinstance(tokens, list)
        self._pass("posted")
        with self.step:
            try:
                for worker in self.workers:
                    worker.begin(owner, gone)
                self._chunks(owner, tokens, hit, gone)
            finally:
                for worker in self.workers:
                    worker.end(owner)
        self._pass("answer")

    def _chunks(self, owner: Owner, tokens: list[int], hit: int, gone: Callable[[], bool]) -> None:
        starts = list(range(hit, len(tokens), self.chunk_tokens))
        if self.preempt_once and len(starts) > 1:
            self.preempt_once = False
            starts = [*starts[:-1], *starts]  # all but the last chunk are computed, lost and computed again
        for start in starts:
            end = min(start + self.chunk_tokens, len(tokens))
            for layer in range(LAYOUT.layers):
                for worker in self.workers:
                    self._load(worker, owner, tokens, hit, layer, gone)
                self._pass(f"layer {layer}")
                for worker in reversed(self.workers):
                    self._save(worker, owner, tokens, layer, start, end)
            self._pass("step")
            for worker in self.workers:
                worker.say(v.StepSaved([(owner, end)]))

    def _load(
        self, worker: Worker, owner: Owner, tokens: list[int], hit: int, layer: int, gone: Callable[[], bool]
    ) -> None:
        if hit:
            worker.wait(lambda: worker.ready.get(owner, 0) > layer, owner, gone)
        pages = worker.expected[owner].pages if owner in worker.expected else []
        for block, page in enumerate(pages[: hit // BLOCK_TOKENS]):
            found = worker.pages.view(page)[worker.part(layer)]
            if owner[0] < 1 << 60 and not np.array_equal(found, worker.own(kv_of(tokens, layer, block))):
                self.wrong.append(f"hit block {block} of {owner}, layer {layer}, worker {worker.rank}")

    def _save(self, worker: Worker, owner: Owner, tokens: list[int], layer: int, start: int, end: int) -> None:
        blocks = range(start // BLOCK_TOKENS, -(-end // BLOCK_TOKENS))
        with worker.changed:
            if owner in worker.dropped:
                raise Dropped
            for block in blocks:
                page = worker.expected[owner].pages[block]
                worker.pages.view(page)[worker.part(layer)] = worker.own(kv_of(tokens[:end], layer, block))
        if not (self.skip_saving and layer == 1):
            worker.say(v.LayerSaved(layer, [v.Saved(owner, blocks.start, len(blocks))]))

    # ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, body: dict[str, object], gone: Callable[[], bool]) -> list[int]:
        """Returns the generated tokens. Raises Dropped."""
        params = body["kv_transfer_params"]["dualpath"]  # type: ignore[index]
        owner, prompt = tuple(params["owner"]), list(body["prompt"])  # type: ignore[call-overload]
        sequence, *_ = [worker.admit(owner, gone) for worker in self.workers]
        for worker in self.workers:
            worker.wait(lambda worker=worker: sequence in worker.begun, owner, gone)  # type: ignore[misc]
            self._check(worker, sequence, prompt)
        self._pass("decoding")
        return self._generate(sequence, prompt, int(body["max_tokens"]), gone)  # type: ignore[call-overload]

    def _check(self, worker: Worker, sequence: int, prompt: list[int]) -> None:
        for block in range(-(-len(prompt) // BLOCK_TOKENS)):
            for layer in range(LAYOUT.layers):
                found = worker.device[sequence, block][layer]
                if not np.array_equal(found, worker.own(kv_of(prompt, layer, block))):
                    self.wrong.append(f"prompt block {block} of sequence {sequence}, layer {layer}")

    def _generate(self, sequence: int, prompt: list[int], max_tokens: int, gone: Callable[[], bool]) -> list[int]:
        tokens, told = list(prompt), len(prompt)
        for _ in range(max_tokens):
            tokens.append(next_token(tokens))
            if gone():
                self.workers[0].say(v.Generated(sequence, tokens[told:], "abort"))
                raise Dropped
            if (len(tokens) - 1) % BLOCK_TOKENS == 0:  # the newest token's KV is not there yet
                block = (len(tokens) - 1) // BLOCK_TOKENS - 1
                for worker in self.workers:
                    parts = [worker.own(kv_of(tokens[:-1], layer, block)) for layer in range(LAYOUT.layers)]
                    worker.device[sequence, block] = np.array(parts)
                self.workers[0].say(v.Generated(sequence, tokens[told:]))
                told = len(tokens)
        self.workers[0].say(v.Generated(sequence, tokens[told:], "length"))
        return tokens[len(prompt) :]


def _handler(server: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.posted.append(body)
            server.headers.append(dict(self.headers))
            if server.errors:
                self._answer(server.errors.pop(), {"error": "out of order"})
                return
            try:
                if server.role is Role.PREFILL:
                    server.prefill(body, self._gone)
                    self._answer(200, {"choices": [{"text": ""}]})
                else:
                    self._answer(200, {"token_ids": server.decode(body, self._gone)})
            except Dropped:
                self.close_connection = True

        def _gone(self) -> bool:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

        def _answer(self, status: int, body: object) -> None:
            payload = json.dumps(body).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

    return Handler


@contextmanager
def fake_vllm(agent: str, role: Role, name: str, **settings: int) -> Iterator[FakeVllm]:
    server = FakeVllm(agent, role, name, **settings)
    try:
        yield server.start()
    finally:
        server.close()
