"""Every setting that looks back draws the same tokens after a retry in the middle, on both read paths, with hits."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from llguidance import LLMatcher

from dualpath.cluster import messages as m
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.cluster.local import Cluster
from dualpath.core.vocabulary import Cause, Role
from dualpath.spec.sampling import SamplingParams

from .conftest import ANSWER_DEADLINE_S, cluster_config, gauge, in_cluster

pytestmark = pytest.mark.slow
PROMPT = [17 * i % 251 for i in range(200)]
ENDS = (258, 256)
WORD = {"type": "string", "pattern": "^[a-z ]{9}$"}
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": WORD, "minItems": 4, "maxItems": 4}},
    "required": ["words"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})
SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "min_p": {"min_p": 0.02},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "logit_bias": {"logit_bias": ((5, 6.0), (9, -50.0))},
    "bad_words": {"bad_words": ((5,), (65, 66), (10, 11, 12)), "logit_bias": ((65, 7.0), (66, 6.0))},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(40, 60))},
    "processed_logprobs": {"logprobs": 2, "logprobs_mode": "processed_logprobs", "top_k": 20},
    "prompt_logprobs": {"prompt_logprobs": 1, "logprobs": 1},
    "grammar": {"grammar": GRAMMAR, "stop_token_ids": ENDS},
    "grammar and penalties": {
        "grammar": GRAMMAR,
        "stop_token_ids": ENDS,
        "repetition_penalty": 1.2,
        "frequency_penalty": 1.0,
        "ignore_eos": True,
    },
}


async def answer(cluster: Cluster, prompt: list[int], fail_after: int | None, **more: object) -> list[GeneratedTokens]:
    """The steps of one answer; after so many tokens, an engine says that the attempt failed (it did not)."""
    params = SamplingParams(**({"max_tokens": 80, "temperature": 0.8, "seed": 5, "ignore_eos": True} | more))  # type: ignore[arg-type]
    serving = cluster.coordinator._founded
    steps: list[GeneratedTokens] = []
    async with asyncio.timeout(ANSWER_DEADLINE_S):
        async for step in cluster.coordinator.generate(GenerateRequest(prompt_token_ids=prompt, sampling=params)):
            steps.append(step)
            if fail_after is not None and sum(len(s.token_ids) for s in steps) == fail_after:
                (live,) = serving.requests.running.values()
                links = cluster.coordinator._links.by_engine
                decode = next(engine for engine, link in links.items() if link.join.role is Role.DECODE)
                assert live.current is not None
                failure = m.AttemptFailed(live.request, live.current.attempt, Cause.COMPUTE_FAILED, "said by the test")
                serving.on_message(decode, failure)
    return steps


def tokens(steps: list[GeneratedTokens]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


@pytest.mark.parametrize("system", ["basic-layerwise", "de-only"])
def test_a_retry_in_the_middle_draws_the_same_tokens(
    checkpoint: Callable[[str], Path], tmp_path: Path, system: str
) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path, "1P1D", system=system)

    async def work(cluster: Cluster) -> None:
        seen = set()
        for name, more in SETTINGS.items():
            undisturbed = await answer(cluster, PROMPT, None, **more)
            assert undisturbed[-1].finish_reason == ("stop" if "grammar" in more else "length"), name
            for fail_after in (1, 2, 31):
                before = gauge(cluster, "dualpath_scheduler_retried_total")
                disturbed = await answer(cluster, PROMPT, fail_after, **more)
                assert tokens(disturbed) == tokens(undisturbed), (name, fail_after)
                assert disturbed[-1].finish_reason == undisturbed[-1].finish_reason
                assert gauge(cluster, "dualpath_scheduler_retried_total") == before + 1
                if "prompt_logprobs" in more:
                    assert len(disturbed[0].prompt_logprobs or []) == len(PROMPT) - 1
                    assert disturbed[-1].cached_tokens == 0
                else:
                    assert disturbed[-1].cached_tokens == 192
            if "grammar" in more:
                jsonschema.validate(json.loads(text(tokens(undisturbed)[:-1])), SCHEMA)
            seen.add(tuple(tokens(undisturbed)))
        assert len(seen) >= len(SETTINGS) - 3, "most settings change what is drawn"

    in_cluster(config, work)


def text(token_ids: list[int]) -> str:
    """The text of a tiny checkpoint's tokens: one token a byte, in the order of the byte-level alphabet."""
    from tokenizers import decoders, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return decoders.ByteLevel().decode([letters[token] for token in token_ids])


def test_what_no_engine_can_do_is_refused_once_and_harms_nobody(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A grammar that can't be compiled, one that can't go on, and settings that leave nothing, beside a good answer."""
    config = cluster_config(checkpoint("qwen3"), tmp_path)
    yes = LLMatcher.grammar_from_regex("yes")
    cases = {
        "can't be compiled": {"grammar": "start: missing"},
        "no token to draw": {"grammar": yes, "stop_token_ids": ENDS, "allowed_token_ids": (5,)},
        "leave no token": {"allowed_token_ids": (7,), "bad_words": ((7,),)},
        "together leave": {"allowed_token_ids": (7, 8), "bad_words": ((8,), (7, 7)), "temperature": 0.0},
    }

    async def work(cluster: Cluster) -> None:
        expected = tokens(await answer(cluster, PROMPT, None))
        beside = asyncio.create_task(answer(cluster, PROMPT, None))
        for said, more in cases.items():
            with pytest.raises(RequestError, match=said) as caught:
                await answer(cluster, PROMPT[:70], None, **more)
            assert caught.value.status == 400
        assert tokens(await beside) == expected
        assert gauge(cluster, "dualpath_scheduler_retried_total") == 0

    in_cluster(config, work)


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3"])
def test_prompt_logprobs_over_chunks_and_stored_prefixes(
    checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    """A scored prompt reads no prefix, but later prompts hit what it has stored."""
    import torch
    from transformers import AutoModelForCausalLM

    config = cluster_config(checkpoint(architecture), tmp_path, max_batch_tokens=37)
    network = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32)
    with torch.inference_mode():
        logprobs = network(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)

    async def work(cluster: Cluster) -> None:
        for _ in range(2):
            steps = await answer(cluster, PROMPT, None, max_tokens=1, prompt_logprobs=2)
            scores = steps[0].prompt_logprobs
            assert scores is not None and steps[-1].cached_tokens == 0
            assert [score.tokens[0].token_id for score in scores] == PROMPT[1:]
            for row, token, score in zip(logprobs, PROMPT[1:], scores, strict=True):
                assert score.tokens[0].logprob == pytest.approx(float(row[token]), abs=1e-3)
                assert [t.logprob for t in score.tokens[1:]] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
        assert (await answer(cluster, PROMPT, None, max_tokens=1))[-1].cached_tokens == 192

    in_cluster(config, work)
