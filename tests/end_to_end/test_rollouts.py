"""A trainer's step over HTTP against the real server: generate, other weights, generate; and who may do that."""

import asyncio
from pathlib import Path

import httpx
import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.serving.cluster_server import ClusterServer

PROMPT = list(range(40, 240))


@pytest.mark.slow
def test_a_trainers_step(tmp_path: Path) -> None:
    from dualpath.model.checkpoint import make_checkpoint

    old, new = (make_checkpoint(tmp_path / f"step-{seed}", "llama", seed=seed) for seed in (1, 2))
    config = ClusterConfig(
        model=str(old),
        store=str(tmp_path / "store"),
        buffer_bytes=2**25,
        hbm_bytes=2**26,
        port=0,
        durable=False,
        enable_control=True,
    )

    async def run() -> None:
        async with ClusterServer(config) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def post(path: str, **body: object) -> dict[str, object]:
                answer = await client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            greedy = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
            first = await post("/generate", input_ids=PROMPT, sampling_params=greedy, return_logprob=True)
            again = await post("/generate", input_ids=PROMPT, sampling_params=greedy)
            assert again["output_ids"] == first["output_ids"]
            assert (first["meta_info"]["cached_tokens"], again["meta_info"]["cached_tokens"]) == (0, 192)
            assert [token for _, token, _ in first["meta_info"]["output_token_logprobs"]] == first["output_ids"]
            long = asyncio.create_task(
                post("/generate", input_ids=PROMPT, rid="long", sampling_params=greedy | {"max_new_tokens": 3000})
            )
            while (await client.get("/v1/loads")).json()["loads"][0]["num_reqs"] < 1:
                await asyncio.sleep(0.01)
            assert (await post("/abort_request", rid="long"))["aborted"] == 1
            assert (await long)["meta_info"]["finish_reason"]["type"] == "abort"
            assert (await post("/update_weights_from_disk", model_path=str(new), weight_version="2"))["success"]
            params = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
            after = await post("/inference/v1/generate", token_ids=PROMPT, sampling_params=params)
            assert after["choices"][0]["token_ids"] != first["output_ids"]
            assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert (await client.get("/v1/models")).json()["data"][0]["weight_version"] == "2"
            assert 'dualpath_weights_info{version="2"} 1' in (await client.get("/metrics")).text
            assert (await client.get("/health_generate")).status_code == 200

    asyncio.run(run())
