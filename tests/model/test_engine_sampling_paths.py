"""Sampling and log-probabilities through the engines, not only in isolation."""

from collections.abc import Callable

import pytest
import torch
from engine_world import BufferIO, DeBuffer, Engines, drain, enter, random_tokens

from dualpath.model import LayerwisePrefill, PagedDecode, PrefillItem
from dualpath.spec.sampling import SamplingParams

Prefills = Callable[..., LayerwisePrefill]


def sampled(
    engines: Engines, prefill_of: Prefills, prompt: list[int], so_far: int, params: SamplingParams
) -> list[int]:
    """Tokens `so_far` … of a request whose first `so_far` tokens are the end of `prompt`."""
    buffer = DeBuffer(engines.model.layout, prompt)
    items = [PrefillItem(prompt, 0, params, generated_so_far=so_far)]
    (first,) = prefill_of(engines.model).run(items, BufferIO([buffer], items))
    decode = PagedDecode(engines.model, blocks=4)
    if so_far:
        decode.admit(0, len(prompt), first.token.token_id, params, generated_so_far=so_far)
        for block, page in enumerate(buffer.pages):
            decode.fill_block(0, block, page.reshape(-1), min(64, len(prompt) - 64 * block))
        decode.join(0)
    else:
        enter(decode, 0, buffer, first, params)
    return [first.token.token_id, *drain(decode).get(0, [])]


def test_a_retried_attempt_draws_the_same_tokens(engines: Engines, prefill_of: Prefills) -> None:
    prompt = random_tokens(80, seed=1)
    params = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.95, seed=99)
    whole = sampled(engines, prefill_of, prompt, 0, params)
    assert len(whole) == 30 and len(set(whole)) > 10
    for lost_after in (1, 13, 29):
        rest = sampled(engines, prefill_of, prompt + whole[:lost_after], lost_after, params)
        assert rest == whole[lost_after:]


def test_logprobs_are_those_of_transformers(engines: Engines, prefill_of: Prefills) -> None:
    prompt = random_tokens(90, seed=2)
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=4)
    buffer = DeBuffer(engines.model.layout, prompt)
    items = [PrefillItem(prompt, 0, params)]
    (first,) = prefill_of(engines.model).run(items, BufferIO([buffer], items))
    decode = PagedDecode(engines.model, blocks=2)
    enter(decode, 0, buffer, first, params)
    draws = [first.token]
    while outputs := decode.step():
        draws.append(outputs[0].draw)
    tokens = prompt + [d.token_id for d in draws]
    with torch.no_grad():
        logits = engines.reference.network(torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    for position, d in enumerate(draws):
        assert d.logprob == pytest.approx(float(expected[position, d.token_id]), abs=2e-5)
        best = expected[position].topk(4)
        assert [t for t, _ in d.top] == best.indices.tolist()
        assert [p for _, p in d.top] == pytest.approx(best.values.tolist(), abs=2e-5)
