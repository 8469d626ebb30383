"""Measures how punctual the replay client is: many agents against a server that costs next to nothing.

A stub server in its own process answers every completion after `--prefill` seconds with a token every `--interval`
seconds. It only writes prepared bytes, so the client is what is measured. The client's pacing error is how much later
than due a turn was sent. The benchmark prints one line: turns, events per second, pacing p50 and p99 of first and later
turns, and the share of a core that client and stub took.

    python benchmarks/replay_pacing.py --agents 2000 --turns 4 --gap 5
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import time
from multiprocessing.connection import Connection
from typing import cast

import numpy as np

from dualpath.client.open_files import allow_open_files
from dualpath.client.replay import replay
from dualpath.client.rollout import ReplayOptions
from dualpath.traces.trajectory import Round, Trajectory

TOKEN = b'data: {"id":"c","choices":[{"index":0,"text":"a","token_ids":[7],"finish_reason":null}]}\n\n'
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"stub","object":"model","owned_by":"vllm"}]}'


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


TOKEN_CHUNK = chunk(TOKEN)


class StubConnection(asyncio.Protocol):
    """One connection, which reads a whole request and then streams its tokens by a timer."""

    def __init__(self, prefill_s: float, interval_s: float) -> None:
        self._prefill_s, self._interval_s = prefill_s, interval_s
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = re.search(rb"(?i)content-length: (\d+)", self._received[:end])
        total_bytes = end + 4 + (int(length[1]) if length else 0)
        if len(self._received) < total_bytes:
            return
        body = bytes(self._received[end + 4 : total_bytes])
        del self._received[:total_bytes]
        if not body:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(MODELS)
            self._transport.write(head + MODELS)
            return
        found = re.search(rb'"max_tokens":(\d+)', body)
        assert found is not None, "a completion without max_tokens"
        self._loop.call_later(self._prefill_s, self._token, int(found[1]), int(found[1]))

    def _token(self, left: int, count: int) -> None:
        if self._transport.is_closing():
            return
        if left == count:
            self._transport.write(HEADERS)
        if left:
            self._transport.write(TOKEN_CHUNK)
            self._loop.call_later(self._interval_s, self._token, left - 1, count)
            return
        usage = {"prompt_tokens": 1, "completion_tokens": count}
        last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
        self._transport.write(chunk(last) + b"0\r\n\r\n")


def stub(agents: int, prefill_s: float, interval_s: float, ready: Connection) -> None:
    """Runs the server's process; reports its port, and at the end its CPU seconds."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: StubConnection(prefill_s, interval_s), "127.0.0.1", 0, backlog=agents + 16
        )
        ready.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, ready.recv)
        ready.send(time.process_time())
        os._exit(0)

    allow_open_files(agents)
    asyncio.run(serve())


def sleeper(results: Connection) -> None:
    """Runs a process that only sleeps, to show how late the machine itself is. Reports p50 and p99, in seconds."""
    late_s = []
    while not results.poll():
        due_s = time.perf_counter() + 0.005
        time.sleep(0.005)
        late_s.append(time.perf_counter() - due_s)
    results.send(tuple(np.percentile(late_s, [50, 99]).tolist()))


def trajectories(arguments: argparse.Namespace) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            id=f"agent-{number:05d}",
            rounds=tuple(
                Round(
                    append_tokens=arguments.append if turn else arguments.context,
                    generate_tokens=arguments.generate,
                    gap_s=float(rng.gamma(4, arguments.gap / 4)),
                )
                for turn in range(arguments.turns)
            ),
        )
        for number in range(arguments.agents)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--context", type=int, default=4000, help="tokens of the first prompt")
    parser.add_argument("--append", type=int, default=429)
    parser.add_argument("--generate", type=int, default=50)
    parser.add_argument("--gap", type=float, default=5.0, help="mean pause before each turn, seconds")
    parser.add_argument("--prefill", type=float, default=0.5)
    parser.add_argument("--interval", type=float, default=0.05, help="between tokens of a stream, seconds")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=stub, args=(arguments.agents, arguments.prefill, arguments.interval, theirs), daemon=True
    )
    process.start()
    sleeping, sleeps = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=sleeper, args=(sleeps,), daemon=True).start()
    url = f"http://127.0.0.1:{ours.recv()}"
    agents = trajectories(arguments)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    result = asyncio.run(replay(url, agents, ReplayOptions(gap_scale=1.0, turn_timeout_s=120)))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    ours.send("end")
    sleeping.send("end")
    idle_p50_s, idle_p99_s = sleeping.recv()
    stub_cpu_s = ours.recv()
    events = sum(turn.generated_tokens for turn in result.turns)
    first, later = result.start_pacing, result.pacing
    assert first is not None and later is not None, result.failures[:1]
    print(
        f"{len(result.turns)} turns, {len(result.failures)} failed, {result.retries} retries, {wall_s:.1f} s, "
        f"{events / wall_s:.0f} events/s; pacing p50 / p99 in ms: first turns {first.p50_s * 1e3:.1f} / "
        f"{first.p99_s * 1e3:.1f}, later {later.p50_s * 1e3:.1f} / {later.p99_s * 1e3:.1f}; "
        f"client {cpu_s / wall_s:.0%} of a core ({cpu_s / events * 1e6:.0f} us an event), "
        f"stub {stub_cpu_s / wall_s:.0%}; "
        f"a process that only sleeps: {idle_p50_s * 1e3:.1f} / {idle_p99_s * 1e3:.1f}"
    )


if __name__ == "__main__":
    main()
