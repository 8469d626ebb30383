"""What the connector costs vLLM where nothing hits, in pairs: the same requests to a plain server, then to another.

    loaded     one vLLM server with the connector, requests that are none of the cluster's: the hooks alone
    cluster    `dualpath serve --engine vllm` 1P1D with an empty store: every prompt is computed on one server, its KV
               shipped, decoded on another, and written to storage

For ``loaded`` the figure is throughput over the plain server's, round by round. A cluster has two servers on the same
cores, so its figure is CPU time: of all its processes for a round, over the plain server's. Needs `make setup-vllm`.

    python benchmarks/vllm_connector.py --rounds 10
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "vllm_serving"))
from vllm_servers import NAME, cluster, plain_vllm  # noqa: E402

AT_ONCE = 8
CONNECTOR = {
    "kv_connector": "DualPathConnector",
    "kv_connector_module_path": "dualpath.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
random_prompt = random.Random(3)


def ask(url: str, prompt: list[int], tokens: int) -> None:
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=600, trust_env=False).raise_for_status()


def cpu_s() -> dict[int, float]:
    """CPU time of all descendants of this process, by pid."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def round_of(url: str, prompt_tokens: int, tokens: int) -> tuple[float, float]:
    """Returns seconds, and CPU seconds of all servers, for a round of requests with prompts that nobody has seen."""
    prompts = [[random_prompt.randrange(10, 250) for _ in range(prompt_tokens)] for _ in range(AT_ONCE)]
    before, began_s = cpu_s(), time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(lambda prompt: ask(url, prompt, tokens), prompts))
    seconds = time.monotonic() - began_s
    time.sleep(1.0)  # what is stored behind the answers
    return seconds, sum(now - before.get(pid, 0.0) for pid, now in cpu_s().items())


def spread(ratios: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)], "pairs": len(ratios)}  # type: ignore[dict-item]


def paired(plain: str, other: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    lengths = (options.prompt, options.tokens)
    for url in (plain, other):
        round_of(url, *lengths)
    throughput, cpu = [], []
    for number in range(options.rounds):
        order = (plain, other) if number % 2 else (other, plain)  # a drift of the machine favours neither
        took = {url: round_of(url, *lengths) for url in order}
        throughput.append(took[plain][0] / took[other][0])
        cpu.append(took[other][1] / took[plain][1])
        print(f"  pair {number}: throughput {throughput[-1]:.3f}, CPU {cpu[-1]:.3f}", flush=True)
    return {"throughput": spread(throughput), "cpu": spread(cpu)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="loaded,cluster")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="generated for each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint

    results = {}
    with tempfile.TemporaryDirectory() as work:
        where = Path(work)
        model = make_checkpoint(where / "model", **DEMO_MODEL)
        common = ("--dtype", "float32", "--block-size", "64")
        extra = {"role": "decode", "agent": f"{work}/nobody.sock", "url": "http://127.0.0.1:1", "name": "alone"}
        connector = json.dumps(CONNECTOR | {"kv_connector_extra_config": extra})
        with plain_vllm(model, where / "plain.log", *common) as plain:
            if "loaded" in options.parts:
                with plain_vllm(model, where / "loaded.log", *common, "--kv-transfer-config", connector) as loaded:
                    print("loaded", flush=True)
                    results["loaded"] = paired(plain, loaded, options)
            if "cluster" in options.parts:
                with cluster(model, where, "--dtype", "float32") as (url, _):
                    print("cluster", flush=True)
                    results["cluster"] = paired(plain, url, options)
    print(json.dumps(results, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
