"""Drawing tokens: the same (seed, index) draws the same, and what is drawn follows the filtered distribution."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpath.model.sampling import TokenDraw, _best, draw
from dualpath.spec.sampling import SamplingParams, finish_reason

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def tokens(logits: torch.Tensor, indices: range, **settings: object) -> list[int]:
    params = SamplingParams(max_tokens=10**9, **settings)
    rows = draw(logits.expand(len(indices), -1), [params] * len(indices), list(indices))
    assert all(isinstance(row, TokenDraw) for row in rows)
    return [row.token_id for row in rows if isinstance(row, TokenDraw)]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    greedy = SamplingParams(max_tokens=1, temperature=0)
    assert draw(logits, [greedy, greedy], [0, 0]) == [TokenDraw(1), TokenDraw(0)]


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    first = tokens(LOGITS, range(200), seed=4)
    assert tokens(LOGITS, range(200), seed=4) == first
    assert tokens(LOGITS, range(50, 60), seed=4) == first[50:60]
    assert tokens(LOGITS, range(200), seed=5) != first
    assert len(set(first)) > 2


@pytest.mark.parametrize("seed", [-1, 0, 2**64 + 3, 2**200])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert tokens(LOGITS, range(30), seed=seed) == tokens(LOGITS, range(30), seed=seed)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 2]),
        ({"top_p": 0.6}, [1]),
        ({"top_p": 0.85}, [1, 2]),
        ({"top_k": 3, "top_p": 0.9}, [1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_frequencies_follow_the_filtered_distribution(settings: dict[str, float], allowed: list[int]) -> None:
    """Expected by hand: softmax at the temperature, all but `allowed` dropped, renormalised."""
    expected = torch.zeros(5, dtype=torch.double)
    expected[allowed] = (LOGITS.double() / settings.get("temperature", 1.0)).softmax(0)[allowed]
    expected /= expected.sum()
    count = 4000
    seen = Counter(tokens(LOGITS, range(count), seed=1, **settings))
    assert set(seen) <= set(allowed)
    for token in allowed:
        deviation = (float(expected[token]) * (1 - float(expected[token])) / count) ** 0.5
        assert abs(seen[token] / count - float(expected[token])) <= 5 * deviation + 1e-12


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30), st.integers(0, 10**6))
def test_narrow_filters_are_greedy(values: list[float], seed: int) -> None:
    logits = torch.tensor(values)
    best = int(logits.argmax())
    assert tokens(logits, range(3), seed=seed, top_k=1) == [best] * 3
    assert tokens(logits, range(3), seed=seed, top_p=1e-9) == [best] * 3


def test_ties_at_the_edge_of_top_k_keep_the_lower_ids() -> None:
    assert set(tokens(torch.zeros(6), range(300), top_k=2)) == {0, 1}


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=60), st.data())
def test_the_best_tokens_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    logits = torch.tensor(values, dtype=torch.double)
    count = data.draw(st.integers(1, len(values)))
    assert torch.equal(_best(logits, count), logits.sort(descending=True, stable=True).indices[:count])


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    settings = {"temperature": 0.0, "stop_token_ids": (1,), "min_tokens": 3}
    assert tokens(LOGITS, range(5), **settings) == [2, 2, 2, 1, 1]
    assert 1 not in tokens(LOGITS, range(3), stop_token_ids=(1,), min_tokens=3)


def test_logprobs_are_of_the_raw_distribution() -> None:
    params = SamplingParams(
        max_tokens=9, temperature=0.0, logprobs=2, stop_token_ids=(1,), min_tokens=1, top_k=1, top_p=0.1
    )
    (row,) = draw(LOGITS[None], [params], [0])
    raw = LOGITS.log_softmax(0)
    assert row.token_id == 2
    assert row.logprob == pytest.approx(float(raw[2]))
    assert row.top == ((1, pytest.approx(float(raw[1]))), (2, pytest.approx(float(raw[2]))))
    (row,) = draw(LOGITS[None], [SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)], [0])
    assert row.logprob is not None and row.top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_fail_their_row_only(temperature: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 3] = torch.nan
    params = SamplingParams(max_tokens=1, temperature=temperature)
    bad, good = draw(logits, [params] * 2, [0, 0])
    assert isinstance(bad, FloatingPointError)
    assert isinstance(good, TokenDraw)


def test_rows_params_and_positions_must_match() -> None:
    with pytest.raises(ValueError, match="1 rows of logits, 2 params, 1 positions"):
        draw(LOGITS[None], [SamplingParams(max_tokens=1)] * 2, [0])


@pytest.mark.parametrize(
    ("token", "generated", "reason"),
    [(5, 3, "stop"), (6, 3, None), (6, 4, "length"), (5, 4, "stop"), (5, 2, None), (5, 1, None)],
)
def test_reasons_to_finish(token: int, generated: int, reason: str | None) -> None:
    params = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(5,))
    assert finish_reason(params, token, generated) == reason
