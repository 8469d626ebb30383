"""What bends a draw, against Transformers' own `generate` and against vLLM's rules written down once more."""

import pytest
import torch
from engine_world import Engines, random_tokens

from dualpath.model import TokenConstraints
from dualpath.model.sampling import NoTokenError, TokenDraw, draw
from dualpath.spec.sampling import SamplingParams, TokenHistory, token_history

VOCABULARY = 40
PROMPT = [3, 3, 7, 11]


def rows(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def rules(params: SamplingParams, generated: list[int] | None = None) -> TokenConstraints:
    return TokenConstraints(params, token_history(params, PROMPT, generated or []), None)


def settings(**more: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 100, "temperature": 0.0} | more))  # type: ignore[arg-type]


def test_vllm_s_order_and_formulas() -> None:
    """Bias, then repetition over prompt and answer, then frequency and presence over the answer."""
    params = settings(
        logit_bias=((5, 4.0), (6, -1.5)), repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=-0.9
    )
    generated = [5, 9, 5, 7]
    logits = rows(1)[0]
    expected = logits.clone()
    expected[5] += 4.0
    expected[6] -= 1.5
    for token in {*PROMPT, *generated}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token in set(generated):
        expected[token] -= 0.4 * generated.count(token) - 0.9
    held = rules(params, generated)
    assert torch.allclose(held.apply(logits, 4), expected, atol=1e-6)
    held.accept(9)
    again = rules(params, [*generated, 9])
    assert torch.equal(held.apply(logits, 5), again.apply(logits, 5))


def test_bad_words_are_those_of_the_answer_alone() -> None:
    """As in vLLM: what the prompt ends with completes no bad word."""
    params = settings(bad_words=((8,), (2, 11, 4)))
    logits = rows(2)[0]
    assert [i for i, v in enumerate(rules(params, [2, 11]).apply(logits, 2)) if v == -torch.inf] == [4, 8]
    assert [i for i, v in enumerate(rules(params, [11]).apply(logits, 1)) if v == -torch.inf] == [8]
    assert [i for i, v in enumerate(rules(params).apply(logits, 0)) if v == -torch.inf] == [8]


def test_only_allowed_tokens_are_drawn_and_stop_tokens_wait() -> None:
    params = settings(temperature=1.0, allowed_token_ids=(1, 2, 39), stop_token_ids=(2,), min_tokens=5)
    held = rules(params)
    for index in range(10):
        (row,) = draw(rows(index), [params], [index], [held])
        assert isinstance(row, TokenDraw)
        assert row.token_id in ((1, 39) if index < 5 else (1, 2, 39))


def test_nothing_left_to_draw_is_an_error_of_its_row() -> None:
    params = settings(allowed_token_ids=(4,), bad_words=((4,),))
    bad, good = draw(rows(3, 2), [params, settings()], [0, 0], [rules(params), None])
    assert isinstance(bad, NoTokenError) and isinstance(good, TokenDraw)


def test_min_p_keeps_what_has_its_share_of_the_best() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
    share = (logits - 2.0).exp()[0]  # 1, 0.37, 0.14, 0.007
    for min_p, kept in ((0.2, {0, 1}), (0.1, {0, 1, 2}), (1.0, {0})):
        params = [settings(temperature=1.0, min_p=min_p, seed=s) for s in range(200)]
        drawn = draw(logits.expand(200, -1), params, [0] * 200)
        assert {row.token_id for row in drawn if isinstance(row, TokenDraw)} == kept
        assert all(share[token] >= min_p for token in kept)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_processed_logprobs_are_of_what_was_drawn_from(temperature: float) -> None:
    params = settings(
        temperature=temperature,
        top_k=3,
        top_p=0.99,
        logprobs=5,
        logprobs_mode="processed_logprobs",
        logit_bias=((5, 4.0),),
    )
    logits = rows(4)
    (row,) = draw(logits, [params], [0], [rules(params)])
    biased = logits[0].double()
    biased[5] += 4.0
    if temperature:
        best = (biased / temperature).topk(3)
        kept = best.values.softmax(0)
        expected = dict(zip(best.indices.tolist(), kept.log().tolist(), strict=True))
        assert sum(torch.tensor(list(expected.values())).exp()) == pytest.approx(1.0)
    else:
        whole = biased.log_softmax(0).topk(5)
        expected = dict(zip(whole.indices.tolist(), whole.values.tolist(), strict=True))
    assert isinstance(row, TokenDraw)
    assert dict(row.top) == pytest.approx(expected, abs=1e-5)
    assert row.logprob == pytest.approx(expected[row.token_id], abs=1e-5)
    (raw,) = draw(logits, [settings(logprobs=0, temperature=temperature, logit_bias=((5, 4.0),))], [0], [rules(params)])
    assert isinstance(raw, TokenDraw)
    assert raw.logprob == pytest.approx(float(logits[0].log_softmax(0)[raw.token_id]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"bad_words": ((5,), (7, 9))}, {"bad_words_ids": [[5], [7, 9]]}),
        ({"logit_bias": ((12, 3.5),)}, {"sequence_bias": [[[12], 3.5]]}),
    ],
)
def test_tokens_are_those_of_transformers_generate(qwen: Engines, ours: dict, theirs: dict) -> None:
    """Greedy, with the logits of each step computed by Transformers, drawn by us."""
    prompt = random_tokens(30, seed=8)
    network, ids = qwen.reference.network, torch.tensor([prompt])
    expected = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
        **theirs,
    )[0, len(prompt) :].tolist()
    params = settings(**ours)
    held = TokenConstraints(params, token_history(params, prompt, []), None)
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < 40:
            logits = network(torch.tensor([prompt + tokens])).logits[:, -1]
            (row,) = draw(logits, [params], [len(tokens)], [held])
            assert isinstance(row, TokenDraw)
            tokens.append(row.token_id)
            held.accept(row.token_id)
    assert tokens == expected


def test_a_request_carries_only_what_its_draws_need() -> None:
    assert token_history(settings(min_p=0.5, logit_bias=((1, 1.0),), allowed_token_ids=(1,)), PROMPT, [1]) is None
    assert token_history(settings(presence_penalty=1.0), PROMPT, [1, 1]) == TokenHistory([], [1, 1])
    assert token_history(settings(repetition_penalty=2.0), PROMPT, [1, 1]) == TokenHistory([3, 7, 11], [1, 1])
