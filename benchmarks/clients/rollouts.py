"""The HTTP clients of six frameworks for rollouts, from their own sources, against a server with --enable-control.

    python benchmarks/clients/rollouts.py URL SOURCES WEIGHTS TURN_BACK

SOURCES has a checkout of each framework, in folders named as in `RUNS`; WEIGHTS and TURN_BACK are two checkpoints of
the served model. Packages that a client imports and does not use here (sglang, vllm, ray, …) are stood in for by
empty classes; everything that speaks HTTP is the frameworks' own. Prints what each one did.
"""

import asyncio
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import httpx

PROMPT = list(range(40, 140))
ABSENT = ("sglang", "vllm", "ray", "verifiers", "renderers", "datasets", "pylatexenc", "wandb")


class _Empty:
    """Stands in for any class of a package that is not installed."""

    def __init__(self, *_: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class _StandIn(ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Empty,), {})


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules in checkouts, without running a package's __init__, and stand-ins for what is absent."""

    def __init__(self, roots: dict[str, Path], absent: tuple[str, ...]) -> None:
        self._roots = roots
        self._absent = absent

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        top, *rest = name.split(".")
        if any(name == gone or name.startswith(f"{gone}.") for gone in self._absent):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if top not in self._roots:
            return None
        where = self._roots[top].joinpath(*rest)
        if where.is_dir():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(where)]
            return spec
        return importlib.util.spec_from_file_location(name, where.with_suffix(".py"))

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def trl(url: str, weights: str, _turn_back: str) -> str:
    importlib.import_module("accelerate").PartialState()  # its logger asks for it
    client = importlib.import_module("trl.experimental.async_grpo.vllm_client").VLLMClient(url, server_timeout=30)
    client.wait_for_server_ready()
    longest = client.get_max_model_len()
    client.pause()
    assert httpx.get(f"{url}/is_paused").json()["is_paused"]
    client.update_weights({"model_path": weights})  # its own update_info names tensors for NCCL
    client.resume()
    assert not httpx.get(f"{url}/is_paused").json()["is_paused"]
    return f"ready, max_model_len {longest}, pause, update_weights with a path, resume"


def skyrl(url: str, weights: str, turn_back: str) -> str:
    module = importlib.import_module("skyrl.backends.skyrl_train.inference_servers.remote_inference_client")

    async def run() -> str:
        client = module.RemoteInferenceClient(url, [url], 1, model_name=_model(url))
        batch = {
            "prompt_token_ids": [PROMPT, PROMPT[:50]],
            "sampling_params": {"max_tokens": 300, "temperature": 0.8, "logprobs": 1, "ignore_eos": True},
        }
        running = asyncio.create_task(client.generate(batch))
        await asyncio.sleep(0.3)
        assert not running.done()
        await client.pause_generation()
        await client.update_named_weights({"model_path": weights})
        await client.reset_prefix_cache()
        await client.resume_generation()
        kept = await running
        assert [len(ids) for ids in kept["response_ids"]] == [300, 300] and kept["stop_reasons"] == ["length"] * 2
        assert [len(own) for own in kept["response_logprobs"]] == [300, 300]
        running = asyncio.create_task(client.generate(batch))
        await asyncio.sleep(0.3)
        await client.pause(module.PauseMode.ABORT)
        partial = await running
        assert partial["stop_reasons"] == ["abort"] * 2 and 0 < len(partial["response_ids"][0]) < 300
        await client.sleep(level=2)
        await client.wake_up(tags=["weights"])
        await client.update_named_weights({"model_path": turn_back})
        await client.wake_up(tags=["kv_cache"])
        again = await client.generate(batch | {"sampling_params": {"max_tokens": 4, "ignore_eos": True}})
        await client.teardown()
        assert len(again["response_ids"][0]) == 4
        return (
            "generate with log-probabilities, keep through an update, abort with what came before, sleep 2, wake by tag"
        )

    return asyncio.run(run())


def prime_rl(url: str, weights: str, _turn_back: str) -> str:
    client = importlib.import_module("prime_rl.utils.client")

    async def run() -> str:
        async with httpx.AsyncClient(base_url=url) as admin:
            await client.check_health([admin], timeout=10)
            await client.maybe_check_has_model([admin], _model(url))
            await client.update_weights([admin], Path(weights), step=1)
        return "health, model check, update_weights (pause keep, weight_dir, resume)"

    return asyncio.run(run())


def slime(url: str, weights: str, turn_back: str) -> str:
    engine_module = importlib.import_module("slime.backends.sglang_utils.sglang_engine")
    at = urlparse(url)
    engine = object.__new__(engine_module.SGLangEngine)
    engine.node_rank, engine.server_host, engine.server_port = 0, at.hostname, at.port
    assert engine.health_generate()
    kept = _slime_samples(url)
    engine.pause_generation()
    engine.flush_cache()
    assert engine.update_weights_from_disk(weights, weight_version="41")["success"]
    engine.continue_generation()
    assert engine.get_weight_version() == "41"
    engine.release_memory_occupation()
    engine.resume_memory_occupation(tags=["weights"])
    engine.resume_memory_occupation(tags=["kv_cache"])
    assert engine.update_weights_from_disk(turn_back, weight_version="42")["success"]
    return f"generate, abort until idle ({kept} tokens kept), pause, flush, update, release, resume"


def _slime_samples(url: str) -> int:
    """Its rollout function: a sample to the end, and one that is aborted. Returns how many tokens the latter kept."""
    control = importlib.import_module("slime.backends.sglang_utils.server_control")
    rollout = importlib.import_module("slime.rollout.sglang_rollout")
    http = importlib.import_module("slime.utils.http_utils")
    sample_type = importlib.import_module("slime.utils.types").Sample
    at = urlparse(url)
    args = Namespace(ci_test=False, sglang_router_ip=at.hostname, sglang_router_port=at.port, partial_rollout=False)
    args.use_rollout_routing_replay, args.rollout_top_p, args.sglang_speculative_algorithm = False, 1.0, None
    rollout.GenerateState = lambda _args: SimpleNamespace(tokenizer=None, processor=None)
    rollout._prepare_prompt_ids = lambda *_: PROMPT
    sampling = {"temperature": 0.9, "top_p": 1.0, "top_k": -1, "ignore_eos": True, "skip_special_tokens": True}

    async def generated(max_new_tokens: int) -> Any:
        http._http_client = httpx.AsyncClient(timeout=None)
        sample = sample_type(prompt="x", tokens=[])
        return await rollout.generate(args, sample, sampling | {"max_new_tokens": max_new_tokens})

    async def aborted() -> Any:
        running = asyncio.create_task(generated(2000))
        await asyncio.sleep(0.4)
        await control.abort_servers_until_idle([url])
        return await running

    sample = asyncio.run(generated(8))
    assert sample.response_length == len(sample.rollout_log_probs) == 8, sample
    cut = asyncio.run(aborted())
    assert cut.status is sample_type.Status.ABORTED and 0 < cut.response_length < 2000, cut.status
    return int(cut.response_length)


def verl(url: str, _weights: str, _turn_back: str) -> str:
    module = importlib.import_module("verl.workers.rollout.sglang_rollout.http_server_engine")
    at = urlparse(url)
    where = {"host": at.hostname, "port": at.port, "node_rank": 0, "launch_server": False}
    sampling = {"max_new_tokens": 6, "temperature": 0.7, "n": 1, "ignore_eos": True}
    plain = module.HttpServerAdapter(**where)
    answer = plain.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"]) == 6
    plain.flush_cache()

    async def run() -> None:
        adapter = module.AsyncHttpServerAdapter(**where)
        long = {"max_new_tokens": 3000, "ignore_eos": True}
        running = asyncio.create_task(adapter.generate(input_ids=PROMPT, sampling_params=long))
        await asyncio.sleep(0.4)
        await adapter.abort_request(abort_all=True)
        assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"
        await adapter.release_memory_occupation(["kv_cache"])
        await adapter.resume_memory_occupation(["kv_cache"])

    asyncio.run(run())
    return "generate with log-probabilities, flush, abort all, release and resume of kv_cache"


def agent_lightning(url: str, _weights: str, _turn_back: str) -> str:
    proxy = importlib.import_module("agentlightning.server.proxy")
    events: list[Any] = []
    proxy.record_event = lambda *event: events.append(event)
    model = _model(url)
    router = proxy.ProxyRouter({"model_name": model, "train": {"temperature": 0.6}, "val": {"temperature": 0.0}})
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "ignore_eos": True}
    server = SimpleNamespace(endpoint=f"{url}/v1", model=model, version=0)

    async def run() -> Any:
        async with httpx.AsyncClient() as client:
            body = router.prepare_body(asked, "train")
            return await proxy.forward_request(client=client, server=server, body=body, rollout_id="r", attempt_id="a")

    response = asyncio.run(run())
    recorded = events[0][3]["response"]
    choice = recorded["choices"][0]
    assert response.status_code == 200 and recorded["prompt_token_ids"] and len(choice["token_ids"]) == 5
    assert len(choice["logprobs"]["content"]) == 5
    return "chat through its proxy: prompt_token_ids, token_ids, log-probabilities"


def _model(url: str) -> str:
    return str(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])


RUNS = {
    "trl": (trl, "trl", "trl"),
    "SkyRL": (skyrl, "skyrl", "skyrl"),
    "prime-rl": (prime_rl, "prime_rl", "src/prime_rl"),
    "slime": (slime, "slime", "slime"),
    "verl": (verl, "verl", "verl"),
    "agent-lightning": (agent_lightning, "agentlightning", "agentlightning"),
}


def main() -> int:
    url, sources, weights, turn_back, *chosen = sys.argv[1:]
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    roots = {package: Path(sources) / name / folder for name, (_, package, folder) in RUNS.items()}
    installed = tuple(name for name in ABSENT if importlib.util.find_spec(name) is None)
    unused = ("prime_rl.configs", "prime_rl.utils.logger", "slime.ray.ray_actor", "agentlightning.server.routes.events")
    unused += ("skyrl.backends.skyrl_train.weight_sync", "agentlightning.server.store", "agentlightning.schemas")
    unused += ("slime.rollout.rm_hub", "slime.utils.data", "slime.utils.processing_utils", "slime.utils.eval_config")
    sys.meta_path.insert(0, _Sources(roots, installed + unused))
    failed = 0
    for name, (run, _, _) in RUNS.items():
        if chosen and name not in chosen:
            continue
        started_s = time.perf_counter()
        try:
            did = run(url, weights, turn_back)
        except Exception as error:
            failed += 1
            did = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name:16} {time.perf_counter() - started_s:5.1f} s  {did}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
