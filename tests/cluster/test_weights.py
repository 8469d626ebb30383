"""Other weights in a running cluster: the new ones' tokens, no KV of the old ones, and nothing mixed when it fails."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.cluster.local import Cluster
from dualpath.spec.sampling import SamplingParams

from .conftest import ANSWER_DEADLINE_S, ask, cluster_config, gauge, in_cluster

PROMPT = [(7 * i) % 200 + 20 for i in range(300)]
ARCHITECTURE = "qwen3"
Greedy = Callable[[Path, list[int], int], list[int]]


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of one model with different weights, as a trainer writes them, and one of another model."""
    from dualpath.model.checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("trained")
    same = [make_checkpoint(folder / f"step-{seed}", ARCHITECTURE, seed=seed) for seed in (7, 8)]
    return [*same, make_checkpoint(folder / "wider", ARCHITECTURE, seed=7, intermediate_size=160)]


@pytest.fixture(scope="session")
def greedy() -> Greedy:
    """Transformers' own `generate` with a checkpoint's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    def generate(path: Path, prompt: list[int], n: int) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n)
        return output[0, len(prompt) :].tolist()

    return generate


class Stream:
    """A request whose steps are collected while the test does other things."""

    def __init__(self, cluster: Cluster, prompt: list[int], n: int, request_id: str = "") -> None:
        sampling = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
        asked = GenerateRequest(prompt_token_ids=prompt, sampling=sampling, request_id=request_id)
        self.steps: list[GeneratedTokens] = []
        self.task = asyncio.create_task(self._listen(cluster.coordinator.generate(asked)))

    async def _listen(self, steps: AsyncIterator[GeneratedTokens]) -> None:
        async for step in steps:
            self.steps.append(step)

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.steps[-1].finish_reason

    async def has(self, tokens: int) -> None:
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            while len(self.token_ids) < tokens:
                await asyncio.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["basic-layerwise", "de-only"])
def test_new_weights_give_their_own_tokens_and_never_hit_old_kv(
    steps: list[Path], greedy: Greedy, tmp_path: Path, system: str
) -> None:
    old, new, _ = steps

    async def work(cluster: Cluster) -> None:
        control = cluster.coordinator.control
        expected = {path: await asyncio.to_thread(greedy, path, PROMPT, 20) for path in (old, new)}
        assert expected[old] != expected[new]

        async def turn() -> tuple[list[int], int]:
            answer = await ask(cluster, PROMPT, 20)
            return answer.token_ids, answer.cached_tokens

        assert await turn() == (expected[old], 0)
        assert await turn() == (expected[old], 256)
        await control.update_weights(str(new), "1", "wait")
        assert cluster.coordinator.model.weight_version == "1"
        assert await turn() == (expected[new], 0)
        assert await turn() == (expected[new], 256)
        # The weights themselves name their KV: going back, whatever the version is called, hits the old blocks.
        await control.update_weights(str(old), "2", "wait")
        assert await turn() == (expected[old], 256)
        assert gauge(cluster, "dualpath_weights_updates_total") == 2

    in_cluster(cluster_config(old, tmp_path, system=system), work)


@pytest.mark.slow
def test_what_runs_during_an_update_ends_as_the_caller_asks(steps: list[Path], greedy: Greedy, tmp_path: Path) -> None:
    old, new, _ = steps

    async def work(cluster: Cluster) -> None:
        control = cluster.coordinator.control

        async def running(n: int = 400) -> Stream:
            stream = Stream(cluster, PROMPT, n)
            await stream.has(5)
            return stream

        kept = await running()
        await control.update_weights(str(new), "kept", "keep")
        await kept.task
        tokens = kept.token_ids
        assert (kept.finish_reason, len(tokens)) == ("length", 400)
        # Where the new weights took over, everything so far was their prompt, computed anew.
        whole = {path: await asyncio.to_thread(greedy, path, PROMPT, 400) for path in (old, new)}
        before = next(i for i in range(400) if tokens[i] != whole[old][i])
        assert before >= 5
        candidates = range(5, before + 1)
        tails = [await asyncio.to_thread(greedy, new, PROMPT + tokens[:i], 8) for i in candidates[-3:]]
        assert any(tokens[i : i + 8] == tail for i, tail in zip(candidates[-3:], tails, strict=True))

        aborted = await running()
        await control.update_weights(str(old), "aborted", "abort")
        await aborted.task
        assert aborted.finish_reason == "abort"
        assert aborted.token_ids == whole[new][: len(aborted.token_ids)] and len(aborted.token_ids) < 400

        waited = await running(60)
        await control.update_weights(str(new), "waited", "wait")
        assert waited.task.done() or waited.finish_reason == "length"
        await waited.task
        assert waited.token_ids == whole[old][:60]

    in_cluster(cluster_config(old, tmp_path), work)


@pytest.fixture
def unfit(steps: list[Path], tmp_path: Path) -> Iterator[dict[str, tuple[Path, str]]]:
    """Folders that can't be served, with a word of the reason."""
    _, new, wider = steps
    other_tokenizer, cut = tmp_path / "other-tokenizer", tmp_path / "cut"
    for folder in (other_tokenizer, cut):
        shutil.copytree(new, folder)
    tokenizer: dict[str, Any] = json.loads((new / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other_tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    yield {
        "wider": (wider, "intermediate_size"),
        "tokenizer": (other_tokenizer, "tokenizer"),
        "cut": (cut, "[PD]E0: "),
        "none": (tmp_path / "nowhere", "not a folder"),
    }


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    steps: list[Path], greedy: Greedy, tmp_path: Path, unfit: dict[str, tuple[Path, str]]
) -> None:
    old = steps[0]

    async def work(cluster: Cluster) -> None:
        expected = await asyncio.to_thread(greedy, old, PROMPT, 10)
        running = Stream(cluster, PROMPT, 300)
        await running.has(3)
        for path, why in unfit.values():
            with pytest.raises(RequestError, match=why) as refused:
                await cluster.coordinator.control.update_weights(str(path), "x", "abort")
            assert (refused.value.status, refused.value.code) == (400, "weights_refused")
        await running.task
        assert running.finish_reason == "length"  # nobody was aborted for weights that were refused
        assert (await ask(cluster, PROMPT, 10)).token_ids == expected
        assert cluster.coordinator.model.weight_version == "default"
        assert cluster.coordinator.health()["status"] == "ok"

    in_cluster(cluster_config(old, tmp_path / "store"), work)


@pytest.mark.slow
def test_sleep_gives_memory_back_and_wakes_to_the_same_tokens(
    steps: list[Path], greedy: Greedy, tmp_path: Path
) -> None:
    old, new, _ = steps

    async def work(cluster: Cluster) -> None:
        control = cluster.coordinator.control
        first = await ask(cluster, PROMPT, 10)
        before = private_bytes(cluster)
        for keep_weights in (True, False):
            await control.sleep(("weights", "kv_cache"), keep_weights, "abort")
            assert control.sleeping == {"weights", "kv_cache"}
            assert before - private_bytes(cluster) > 2**25  # of the 64 MiB of KV that the decode engine had
            waiting = Stream(cluster, PROMPT, 10)
            with pytest.raises(RequestError, match="wake_up"):
                await control.update_weights(str(new), "x", "wait")
            await control.wake(("weights",))
            assert control.sleeping == {"kv_cache"} and control.paused
            await control.wake(("kv_cache",))
            await waiting.task
            assert waiting.token_ids == first.token_ids
            assert waiting.steps[-1].cached_tokens == 256
        assert not control.sleeping and not control.paused

    in_cluster(cluster_config(old, tmp_path), work)


def private_bytes(cluster: Cluster) -> int:
    """Memory that the engines' processes have and do not share."""
    total = 0
    for engine in cluster.coordinator.health()["engines"]:  # type: ignore[attr-defined]
        status = Path(f"/proc/{engine['pid']}/status").read_text()
        total += int(status.split("RssAnon:")[1].split()[0]) * 1024
    return total


@pytest.mark.slow
def test_weights_changed_on_disk_during_sleep_are_told_from_the_old_ones(
    steps: list[Path], greedy: Greedy, tmp_path: Path
) -> None:
    """A trainer writes over the folder while the engines sleep without weights: no KV of the old ones is hit."""
    old, new, _ = steps
    folder = tmp_path / "served"
    shutil.copytree(old, folder)

    async def work(cluster: Cluster) -> None:
        control = cluster.coordinator.control
        await ask(cluster, PROMPT, 10)
        await control.sleep(("weights", "kv_cache"), False, "wait")
        shutil.copyfile(new / "model.safetensors", folder / "model.safetensors")
        await control.wake(("weights", "kv_cache"))
        answer = await ask(cluster, PROMPT, 10)
        assert answer.token_ids == await asyncio.to_thread(greedy, new, PROMPT, 10)
        assert answer.cached_tokens == 0

    in_cluster(cluster_config(folder, tmp_path / "store"), work)
