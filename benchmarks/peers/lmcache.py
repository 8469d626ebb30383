"""DualPath on vLLM beside what a user would pick: the same vLLM with LMCache, on the same nodes, agents and store rate.

Each node is a network namespace; its storage NIC has a rate that the kernel keeps, and so has each compute NIC. Every
node has one vLLM server on one core's worth of threads, the same memory for device KV, and the same DRAM beside it: an
LMCache server's first tier, or a node agent's buffer. LMCache's second tier is a Redis in the storage node.

    sticky      every node prefills and decodes; an agent keeps to its node, so each node reads with its own NIC
    apart       prefill and decode apart: the prefill node computes and stores, the decode node reads the prompt again
    basic       `dualpath serve --engine vllm`: prefill nodes read
    dualpath    `dualpath serve --engine vllm`: all nodes read

The first turns fill the store without rate limits; then everything is started afresh and the agents go on. Needs root,
redis-server, nginx, and `make setup-vllm`; LMCache goes into a folder of its own.

    python benchmarks/peers/lmcache.py --topology 1P1D --agents 12
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dualpath.client.interrupts import until_terminated
from dualpath.client.replay import ReplayOptions, replay, warm_up
from dualpath.cluster.vllm_launch import on_cpu
from dualpath.lab.experiments.conditions import Conditions
from dualpath.lab.experiments.series import agents_under
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.launcher import TestbedLauncher, temporary_testbed
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import Node, Rates
from dualpath.spec.topology import Topology

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
LMCACHE = ROOT / ".peers" / "lmcache"
PACKAGES = ("lmcache==0.5.6", "sortedcontainers==2.4.0", "aiofile==3.12.3", "caio==0.12.10", "aiofiles==25.1.0")
TESTBED, SUBNET = "peers", "10.91"
REDIS_PORT, LMCACHE_PORT, VLLM_PORT = 6379, 5777, 8100
START_S, LOAD_S = 600.0, 0.5
LMCACHE_SYSTEMS, OURS = ("sticky", "apart"), ("basic", "dualpath")
ENVIRONMENT = on_cpu(1) | {"PYTHONHASHSEED": "0"}
ENVIRONMENT["PYTHONPATH"] += f":{LMCACHE}"
Row = dict[str, Any]


class Bench:
    """What all systems share."""

    def __init__(self, options: argparse.Namespace, testbed: Testbed) -> None:
        self.options = options
        self.testbed = testbed
        self.out: Path = options.out
        conditions = Conditions(
            agents=options.agents, turns=options.turns, context_tokens=options.context, append_tokens=options.append
        )
        self.agents = agents_under(conditions, seed=0)
        self.rates = Rates(options.snic_rate, options.cnic_rate)

    def nodes(self) -> list[Node]:
        return [node for node in self.testbed.plan.nodes if node.is_engine]

    async def measure(self, system: str, cluster: Callable[[bool], Any]) -> Row:
        """Fill the store by the first turns, start afresh with rates, and replay the others."""
        replaying = ReplayOptions(turn_timeout_s=600.0)
        async with cluster(False) as url:
            contexts = await warm_up(url, self.agents, replaying)
            await asyncio.sleep(5)  # what is stored behind the answers
        async with cluster(True) as url:
            before = self._received()
            result = await replay(url, self.agents, replaying, contexts=contexts)
            after = self._received()
        read_mb = {node: round((after[node] - before[node]) / 1e6, 1) for node in after}
        ttft, tpot = result.ttft, result.tpot
        assert ttft is not None and tpot is not None
        return {
            "system": system,
            "jct_s": round(result.jct_s, 2),
            "ttft_p50_s": round(ttft.p50_s, 2),
            "ttft_p90_s": round(ttft.p90_s, 2),
            "tpot_p50_s": round(tpot.p50_s, 3),
            "hit_rate": round(result.hit_rate, 3),
            "failures": len(result.failures),
            "snic_read_mb": read_mb,
        }

    def _received(self) -> dict[str, int]:
        """Bytes that each node's storage NIC has received, by the kernel."""
        received = {}
        for node in self.nodes():
            link = iproute.read_json("ip", "-n", node.namespace, "-s", "link", "show", "dev", "snic0")
            received[node.name] = int(link[0]["stats64"]["rx"]["bytes"])
        return received


# ── vLLM with LMCache ────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def started(node: Node, command: Sequence[object], log: Path) -> AsyncIterator[None]:
    """A process in a node, and all that it starts; it is killed at the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*iproute.inside(node.namespace), *map(str, command)],
            env=os.environ | ENVIRONMENT, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)


async def answers(url: str, log: Path) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        for _ in range(round(START_S / LOAD_S)):
            try:
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(LOAD_S)
    raise SystemExit(f"{url} did not come up; see {log}")


def lmcache_server(bench: Bench, node: Node) -> list[object]:
    store = bench.testbed.plan.node("storage").address("storage")
    return [
        *(VLLM, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", LMCACHE_PORT),
        *("--chunk-size", 64, "--l1-size-gb", bench.options.dram_mib / 1024, "--eviction-policy", "LRU"),
        *("--supported-transfer-mode", "auto", "--shm-name", f"peers-{node.name}", "--disable-observability"),
        *("--l2-adapter", json.dumps({"type": "resp", "host": store, "port": REDIS_PORT, "num_workers": 4})),
    ]


def vllm_server(bench: Bench, node: Node) -> list[object]:
    connector = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": LMCACHE_PORT},
    }
    return [
        *(VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", bench.options.model, "--served-model-name", "m"),
        *("--host", node.address("management"), "--port", VLLM_PORT, "--enforce-eager", "--block-size", 64),
        *("--dtype", "float32", "--kv-cache-memory-bytes", bench.options.device_mib << 20, "--max-num-seqs", 16),
        *("--max-model-len", 8192, "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(connector)),
    ]


class Proxy:
    """What stands before the instances: it keeps an agent to its node; with prefill apart, prefill comes first."""

    def __init__(self, apart: bool, prefill: list[str], decode: list[str]) -> None:
        self._prefill = itertools.cycle(prefill)
        self._decode = itertools.cycle(decode if apart else [*prefill, *decode])
        self._apart = apart
        self._homes: dict[tuple[int, ...], str] = {}
        self._client = httpx.AsyncClient(trust_env=False, timeout=600.0, limits=httpx.Limits(max_connections=None))
        paths = ["/v1/completions", "/v1/models", "/version", "/health"]
        self.app = Starlette(routes=[Route(path, self.handle, methods=["GET", "POST"]) for path in paths])

    async def handle(self, request: Request) -> Response:
        if request.method == "GET":
            answer = await self._client.get(f"{next(self._decode)}{request.url.path}")
            return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))
        body = await request.json()
        session = tuple(body["prompt"][:64])  # agents never share a prefix
        home = self._homes.setdefault(session, "") or next(self._decode)
        self._homes[session] = home
        if self._apart:
            first = body | {"max_tokens": 1, "min_tokens": 0, "stream": False}
            first.pop("stream_options", None)
            (await self._client.post(f"{next(self._prefill)}/v1/completions", json=first)).raise_for_status()
        sent = self._client.build_request("POST", f"{home}/v1/completions", json=body)
        answer = await self._client.send(sent, stream=True)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, media_type=answer.headers["content-type"])


@asynccontextmanager
async def lmcache_cluster(bench: Bench, system: str, limited: bool) -> AsyncIterator[str]:
    network.set_rates(bench.testbed, bench.rates if limited else Rates())
    async with AsyncExitStack() as stack:
        urls: dict[str, list[str]] = {"pe": [], "de": []}
        for node in bench.nodes():
            logs = [bench.out / f"{system}-{node.name}-{what}.log" for what in ("lmcache", "vllm")]
            await stack.enter_async_context(started(node, lmcache_server(bench, node), logs[0]))
            await stack.enter_async_context(started(node, vllm_server(bench, node), logs[1]))
            urls[node.name[:2]].append(f"http://{node.address('management')}:{VLLM_PORT}")
        await asyncio.gather(*(answers(url, bench.out) for url in (*urls["pe"], *urls["de"])))
        proxy = Proxy(system == "apart", urls["pe"], urls["de"])
        server = uvicorn.Server(uvicorn.Config(proxy.app, port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def redis(bench: Bench) -> AsyncIterator[None]:
    storage = bench.testbed.plan.node("storage")
    command = ["redis-server", "--bind", storage.address("storage"), "--port", REDIS_PORT, "--save", ""]
    command += ["--protected-mode", "no", "--dir", bench.out]
    async with started(storage, command, bench.out / "redis.log"):
        await asyncio.sleep(1)
        yield


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def our_cluster(bench: Bench, system: str, store: Path, limited: bool) -> AsyncIterator[str]:
    memory = ("--buffer", f"{bench.options.dram_mib}MiB", "--hbm", f"{bench.options.device_mib}MiB")
    launcher = TestbedLauncher(
        bench.testbed, model=bench.options.model, rates=bench.rates, logs=bench.out, work=bench.out / "work",
        options=("--engine", "vllm", "--dtype", "float32", *memory), start_timeout_s=START_S,
        engine_arguments=("--", "--max-model-len", "8192", "--max-num-seqs", "16"),
    )  # fmt: skip
    async with launcher.cluster(system, bench.options.topology, system, store, limited) as cluster:
        yield cluster.url


async def run(bench: Bench) -> list[Row]:
    rows = []
    for system in bench.options.systems:
        print(f"{system} …", flush=True)
        if system in OURS:
            store = bench.out / "store"
            shutil.rmtree(store, ignore_errors=True)
            rows.append(
                await bench.measure(system, lambda limited, s=system, at=store: our_cluster(bench, s, at, limited))
            )
            shutil.rmtree(store, ignore_errors=True)
        else:
            async with redis(bench):
                rows.append(await bench.measure(system, lambda limited, s=system: lmcache_cluster(bench, s, limited)))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def get_lmcache() -> None:
    if not (LMCACHE / "lmcache").exists():
        pip = [VLLM, "-m", "pip", "install", "-q", "--no-deps", "--target", LMCACHE]
        subprocess.run([*pip, *PACKAGES], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="1P1D")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=[*LMCACHE_SYSTEMS, *OURS])
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "demo")
    parser.add_argument("--agents", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--context", type=int, default=2800)
    parser.add_argument("--append", type=int, default=64)
    parser.add_argument("--snic-rate", type=int, default=40_000_000, help="bytes per second")
    parser.add_argument("--cnic-rate", type=int, default=320_000_000, help="bytes per second")
    parser.add_argument("--dram-mib", type=int, default=256, help="LMCache's first tier, or a node agent's buffer")
    parser.add_argument("--device-mib", type=int, default=256, help="device KV of each vLLM server")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peer-lmcache")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    Topology.parse(options.topology)
    get_lmcache()
    if not options.model.exists():
        subprocess.run([sys.executable, "-m", "dualpath", "checkpoint", options.model, "--demo"], check=True)
    with temporary_testbed([options.topology], Rates(), TESTBED, SUBNET):
        rows = asyncio.run(until_terminated(run(Bench(options, network.load(TESTBED)))))
    (options.out / f"{options.topology}.json").write_text(json.dumps({"options": sys.argv[1:], "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
