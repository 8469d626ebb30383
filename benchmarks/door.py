"""What giant requests do to everybody else: peak memory of the server, and latency of a short prompt beside them.

    python benchmarks/door.py [giant|long|messages|ids] …

Each case runs in a server of its own, over a cluster that answers at once, with a tokenizer trained on this repository
(16,000 tokens) and a context of 131,072. A second process asks for one token after a short prompt, over and over.
"""

import asyncio
import http.client
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, ModelFacts
from dualpath.server import bind, create_app, serve
from dualpath.spec.metrics import Figures

ROOT = Path(__file__).parents[1]
TEXT = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def text(characters: int) -> str:
    return (TEXT * (characters // len(TEXT) + 1))[:characters]


CASES: dict[str, tuple[int, str, Any]] = {
    "giant": (7, "/v1/completions", lambda: {"prompt": text(12_000_000)}),
    "long": (7, "/v1/completions", lambda: {"prompt": text(1_000_000)}),
    "messages": (1, "/v1/chat/completions", lambda: {"messages": [{"role": "", "content": ""}] * 1_250_000}),
    "ids": (1, "/v1/completions", lambda: {"prompt": [1] * 15_000_000}),
}


class Cluster:
    """Answers every request with one token."""

    model = ModelFacts(name="m", path="m", max_model_len_tokens=2**17, vocab_size=16_000, eos_token_ids=(1,))

    async def generate(self, _request: GenerateRequest) -> AsyncIterator[GeneratedTokens]:
        yield GeneratedTokens(token_ids=[300], finish_reason="length")

    def health(self) -> dict[str, object]:
        return {"status": "ok", "engines": []}

    def gauges(self) -> Figures:
        return {}


def serving(tokenizer: str, ports: Any) -> None:
    loaded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer), chat_template=CHATML)
    cluster: Any = Cluster()
    asyncio.run(serve(create_app(cluster, loaded), bind("127.0.0.1", 0), on_bound=ports.put))


def post(port: int, path: str, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, body)
    status = connection.getresponse().status
    connection.close()
    return status


def asking(port: int, latencies_s: Any, stop: Any) -> None:
    body = msgspec.json.encode({"prompt": "a short one", "max_tokens": 1})
    while not stop.is_set():
        begun_s = time.perf_counter()
        assert post(port, "/v1/completions", body) == 200
        latencies_s.put(time.perf_counter() - begun_s)
        time.sleep(0.02)


def drained(queue: Any) -> list[float]:
    return [queue.get() for _ in range(queue.qsize())]


def measure(case: str, tokenizer: str) -> None:
    count, path, make = CASES[case]
    body = msgspec.json.encode(make() | {"max_tokens": 1})
    context = multiprocessing.get_context("spawn")
    ports, latencies_s, stop = context.Queue(), context.Queue(), context.Event()
    server = context.Process(target=serving, args=(tokenizer, ports), daemon=True)
    server.start()
    port = ports.get()
    asker = context.Process(target=asking, args=(port, latencies_s, stop), daemon=True)
    asker.start()
    latencies_s.get()  # it has started
    time.sleep(3)
    idle_s = statistics.median(drained(latencies_s))
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        statuses = list(threads.map(lambda _: post(port, path, body), range(count)))
    took_s = time.perf_counter() - begun_s
    stop.set()
    asker.join()
    status = Path(f"/proc/{server.pid}/status").read_text()
    peak_gib = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    beside_s = max(drained(latencies_s))
    print(f"{case}: {count} × {len(body) / 1e6:.0f} MB answered {sorted(set(statuses))} in {took_s:.2f} s;", end=" ")
    print(f"a short prompt took {idle_s * 1e3:.0f} ms before, at most {beside_s * 1e3:.0f} ms beside;", end=" ")
    print(f"peak {peak_gib:.2f} GiB", flush=True)
    server.terminate()
    server.join()


def main() -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=16_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    for case in sys.argv[1:] or CASES:
        measure(case, trained.to_str())
    os._exit(0)


if __name__ == "__main__":
    main()
