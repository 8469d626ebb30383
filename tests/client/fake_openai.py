"""A small OpenAI server for tests: generates tokens from a hash of the prompt, remembers prefixes, and can misbehave.

`python fake_openai.py --port 0 --ready-file FILE …` stands in for `dualpath serve`: it takes the same options, paces
the bytes of loaded tokens by `--snic-rate` on one emulated NIC per engine that the system reads with, and counts them
in /metrics.
"""

import argparse
import asyncio
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import time
from collections import Counter

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from dualpath.spec.units import parse_rate

BLOCK_TOKENS = 64
KV_BYTES = 16384
TIMINGS = {
    "scheduling_s": 0.01,
    "allocation_s": 0.0,
    "read_s": 0.2,
    "prefill_s": 0.1,
    "decode_s": 0.3,
    "prefill_engine": "PE0",
    "decode_engine": "DE1",
    "pe_read_tokens": 64,
    "de_read_tokens": 0,
    "attempts": 1,
}


def generated(prompt, count):
    """`count` token ids that depend on the whole prompt."""
    tokens = []
    for position in range(count):
        digest = hashlib.blake2b(json.dumps([prompt, position]).encode(), digest_size=2).digest()
        tokens.append(int.from_bytes(digest, "little") % 256)
    return tokens


SETUP = {
    "layers": 5,
    "kv_bytes_per_token": 2560,
    "snic_bytes_per_s": None,
    "cnic_bytes_per_s": None,
    "compute_quota_s": 0.3,
    "threads": 1,
    "cores": 2,
    "dtype": "float32",
    "transport": "tcp",
}
"""What the command says of its cluster."""


class FakeServer:
    """State of the server; `faults` is a list of what goes wrong with the next completions, one entry each."""

    def __init__(self, engines=(("prefill", 0, None),)):
        self.engines = engines
        self.nic_bytes = Counter()
        self.nic_free_at_s = dict.fromkeys((engine for _, engine, _ in engines), 0.0)
        self.stored = set()
        self.prompts = []
        self.bodies = []
        self.headers = []
        self.faults = []
        self.step_s = 0.0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.owned_by = "dualpath"
        self.cluster = None
        self.lie = None
        self.knows_token_ids = True
        self.strict = False
        self.models = 1
        self.models_status = 200

    def _blocks(self, tokens):
        for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
            yield hashlib.blake2b(json.dumps(tokens[:end]).encode(), digest_size=16).digest()

    def hit_tokens(self, prompt):
        hit = 0
        for key in self._blocks(prompt[:-1]):
            if key not in self.stored:
                break
            hit += BLOCK_TOKENS
        return hit

    async def load(self, n_bytes):
        """Read through the engine whose NIC is free first."""
        readers = [(engine, rate) for _, engine, rate in self.engines if rate is not False]
        engine, rate = min(readers, key=lambda reader: (self.nic_free_at_s[reader[0]], reader[0]))
        self.nic_bytes[engine] += n_bytes
        if rate:
            start = max(time.monotonic(), self.nic_free_at_s[engine])
            self.nic_free_at_s[engine] = start + n_bytes / rate
            await asyncio.sleep(self.nic_free_at_s[engine] - time.monotonic())

    async def stream(self, body, fault):
        prompt, count = body["prompt"], body["max_tokens"]
        hit = self.hit_tokens(prompt)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            await self.load(hit * KV_BYTES)
            tokens = generated(prompt, count)
            for position, token in enumerate(tokens if fault != "short" else tokens[:-1]):
                await asyncio.sleep(self.step_s)
                if fault == "dropped" and position == 1:
                    raise ConnectionError("the fake drops this connection on purpose")
                if fault == "garbage":
                    yield b"data: {nope\n\n"
                if fault == "broken" and position == 1:
                    error = {"message": "engine lost", "type": "server_error", "code": "engine_lost"}
                    yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
                    return
                choice = {"index": 0, "text": "a", "finish_reason": None}
                if body.get("return_token_ids") and self.knows_token_ids:
                    choice["token_ids"] = [token]
                yield b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"
            self.stored |= set(self._blocks((prompt + tokens)[:-1]))
            usage = {
                "prompt_tokens": len(prompt),
                "completion_tokens": self.lie or count,
                "total_tokens": len(prompt) + count,
                "prompt_tokens_details": {"cached_tokens": hit},
            }
            last = {"id": "c", "choices": [], "usage": usage}
            if body.get("return_timings"):
                last["timings"] = TIMINGS if fault != "strange_timings" else {"prompt_ms": 3.5}
            if fault == "no_details":
                usage["prompt_tokens_details"] = None
            if fault != "no_usage":
                yield b"data: " + json.dumps(last).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            self.in_flight -= 1

    def app(self):
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            cards = [{"id": "fake", "object": "model", "owned_by": self.owned_by, "cluster": self.cluster}]
            return JSONResponse({"object": "list", "data": cards[: self.models]}, self.models_status)

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            if self.strict and "return_token_ids" in body:
                return JSONResponse({"error": {"message": "unknown field: return_token_ids"}}, 400)
            self.prompts.append(body["prompt"])
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, tuple):
                status, headers = fault
                error = {"message": f"fault {status}", "type": "t", "code": "c"}
                return JSONResponse({"error": error}, status, headers)
            if fault == "page":
                return PlainTextResponse("<html>Bad Gateway</html>", 502)
            if fault == "hang":
                await asyncio.sleep(60)
            return StreamingResponse(self.stream(body, fault), media_type="text/event-stream")

        @app.get("/metrics")
        async def metrics():
            lines = ["# TYPE dualpath_nic_bytes_total counter"]
            for role, engine, _ in self.engines:
                labels = f'engine="{engine}",role="{role}",nic="snic",direction="rx",traffic_class="low"'
                lines.append(f"dualpath_nic_bytes_total{{{labels}}} {self.nic_bytes[engine]}")
            return PlainTextResponse("\n".join(lines) + "\n")

        return app


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="1P1D")
    parser.add_argument("--system", default="dualpath")
    parser.add_argument("--snic-rate", default="unlimited")
    parser.add_argument("--ready-file", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--fail-system", help="exit with an error, as this system")
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    arguments, _ = parser.parse_known_args()
    if arguments.fail_system == arguments.system:
        print("loading the model\nRuntimeError: out of memory on the fake device", file=sys.stderr)
        sys.exit(3)
    prefill, decode = map(int, re.findall(r"\d+", arguments.topology))
    rate = None if arguments.system == "oracle" else parse_rate(arguments.snic_rate)
    roles = ["prefill"] * prefill + ["decode"] * decode
    reads = [role == "prefill" or not arguments.system.startswith("basic") for role in roles]
    server = FakeServer(tuple((role, i, rate if reads[i] else False) for i, role in enumerate(roles)))
    server.owned_by = "dualpath"
    server.cluster = {"topology": arguments.topology, "system": arguments.system, "setup": SETUP}
    pathlib.Path(arguments.store, "block").write_text("a block")
    asyncio.run(serve(server, arguments))


async def serve(server, arguments):
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="warning"))
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    if arguments.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = running.servers[0].sockets[0].getsockname()[1]
    draft = pathlib.Path(f"{arguments.ready_file}.tmp")
    draft.write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "pid": os.getpid()}))
    draft.rename(arguments.ready_file)
    await task


if __name__ == "__main__":
    main()
