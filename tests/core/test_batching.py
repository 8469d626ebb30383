"""Packing under the compute quota: exact examples, then what holds for any queue."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualpath.core.batching import AttentionCost, Chunk, PrefillQueue
from dualpath.core.policy import QUOTA_NS

BY_TOKEN = AttentionCost(fixed_ns=10, ns_per_flop=1.0, flops_per_token=10, flops_per_pair=0)
BY_PAIR = AttentionCost(fixed_ns=0, ns_per_flop=2.0, flops_per_token=3, flops_per_pair=5)


def test_cost_is_the_closed_form_of_the_sum() -> None:
    for cached in (0, 1, 17):
        for new in (0, 1, 2, 9):
            pairs = sum(cached + i + 1 for i in range(new))
            assert BY_PAIR.chunk_ns(cached, new) == 2.0 * (3 * new + 5 * pairs)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 200_000),
    st.integers(0, 300),
    st.floats(-10, 1e9),
    st.floats(1e-6, 1e3),
    st.sampled_from([(0.0, 1.0), (1.0, 0.0), (7e9, 3e5), (0.3, 0.7), (0.0, 0.0)]),
)
@example(0, 299, 350.35999999999996, 0.1, (0.1, 0.3))  # the root is rounded up
@example(1_000, 299, 7206.429999999999, 0.7, (0.1, 0.1))  # and down
def test_the_largest_chunk_that_fits_is_found_without_a_search(
    cached: int, most: int, budget: float, ns_per_flop: float, flops: tuple[float, float]
) -> None:
    cost = AttentionCost(fixed_ns=0, ns_per_flop=ns_per_flop, flops_per_token=flops[0], flops_per_pair=flops[1])
    fitting = [tokens for tokens in range(most + 1) if cost.chunk_ns(cached, tokens) <= budget]
    assert cost.fitting_tokens(cached, most, budget) == max(fitting, default=0)


def test_the_papers_quota() -> None:
    assert QUOTA_NS == 300_000_000


def test_whole_requests_share_a_batch_first_come_first_served() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=100)
    for request, tokens in ((7, 3), (5, 6)):
        queue.push(request, 0, 64, tokens)
    assert (queue.waiting_requests, queue.waiting_tokens) == (2, 9)
    assert queue.next_batch() == (Chunk(7, 0, 64, 3, True), Chunk(5, 0, 64, 6, True))
    assert (queue.waiting_requests, queue.waiting_tokens) == (0, 0)
    assert queue.next_batch() == ()


def test_the_request_that_exceeds_the_quota_is_cut_and_its_rest_stays_at_the_head() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=100)  # nine tokens a batch, after the fixed part
    queue.push(1, 0, 0, 5)
    queue.push(2, 0, 128, 10)
    queue.push(3, 0, 0, 1)
    assert queue.next_batch() == (Chunk(1, 0, 0, 5, True), Chunk(2, 0, 128, 4, False))
    assert (queue.waiting_requests, queue.waiting_tokens) == (2, 7)
    assert queue.next_batch() == (Chunk(3, 0, 0, 1, True),)  # 2 is passed over while its chunk is out
    assert queue.chunk_done(2, 0)
    assert queue.next_batch() == (Chunk(2, 0, 132, 6, True),)
    assert queue.chunk_done(2, 0)
    assert not queue.chunk_done(2, 0)


def test_a_request_of_which_no_token_fits_waits_for_the_next_batch() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=60)
    queue.push(1, 0, 0, 5)
    queue.push(2, 0, 0, 5)
    assert queue.next_batch() == (Chunk(1, 0, 0, 5, True),)
    assert queue.next_batch() == (Chunk(2, 0, 0, 5, True),)


def test_a_single_token_goes_out_though_it_alone_exceeds_the_quota() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=5)
    queue.push(1, 0, 0, 2)
    queue.push(2, 0, 0, 2)
    assert queue.next_batch() == (Chunk(1, 0, 0, 1, False),)


def test_nothing_goes_with_a_prompt_of_one_token_that_alone_exceeds_the_quota() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=5)
    queue.push(1, 0, 0, 1)
    queue.push(2, 0, 0, 1)
    assert queue.next_batch() == (Chunk(1, 0, 0, 1, True),)
    assert queue.next_batch() == (Chunk(2, 0, 0, 1, True),)


def test_a_long_context_costs_more_so_fewer_tokens_fit() -> None:
    pairs_only = AttentionCost(fixed_ns=0, ns_per_flop=1.0, flops_per_token=0, flops_per_pair=1)
    sizes = []
    for cached in (0, 1_000, 10_000):
        queue = PrefillQueue(pairs_only, quota_ns=100_000)
        queue.push(1, 0, cached, 5_000)
        sizes.append(queue.next_batch()[0].new_tokens)
    assert sizes == [446, 95, 9]


def test_limits_in_tokens_and_requests() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=10**9, max_batch_tokens=8, max_batch_requests=2)
    for request in range(4):
        queue.push(request, 0, 0, 3)
    assert [chunk.request for chunk in queue.next_batch()] == [0, 1]
    queue.push(9, 0, 0, 9)
    assert queue.next_batch() == (Chunk(2, 0, 0, 3, True), Chunk(3, 0, 0, 3, True))
    assert queue.next_batch() == (Chunk(9, 0, 0, 8, False),)


def test_limit_of_kv_tokens_in_a_batch_spares_the_head() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=10**9, max_batch_kv_tokens=1_000)
    queue.push(1, 0, 5_000, 10)
    queue.push(2, 0, 600, 10)
    queue.push(3, 0, 300, 10)
    queue.push(4, 0, 100, 10)
    assert [chunk.request for chunk in queue.next_batch()] == [1]
    assert [chunk.request for chunk in queue.next_batch()] == [2, 3]
    assert [chunk.request for chunk in queue.next_batch()] == [4]


def test_removing_a_request_waiting_or_in_flight() -> None:
    queue = PrefillQueue(BY_TOKEN, quota_ns=100)
    queue.push(1, 0, 0, 20)
    queue.push(2, 3, 0, 4)
    queue.next_batch()
    assert queue.remove(1, 0)
    assert not queue.remove(1, 0)
    assert not queue.chunk_done(1, 0)
    assert not queue.remove(2, 2)
    assert (queue.waiting_requests, queue.waiting_tokens) == (1, 4)
    assert queue.next_batch() == (Chunk(2, 3, 0, 4, True),)
    assert queue.remove(2, 3)
    assert (queue.waiting_requests, queue.waiting_tokens) == (0, 0)


def test_bad_input_is_refused() -> None:
    queue = PrefillQueue(BY_TOKEN)
    with pytest.raises(ValueError, match="request 1 attempt 0: 0 new tokens"):
        queue.push(1, 0, 64, 0)
    queue.push(1, 0, 64, 1)
    with pytest.raises(ValueError, match="already queued"):
        queue.push(1, 0, 64, 1)
    with pytest.raises(ValueError, match="above zero"):
        PrefillQueue(BY_TOKEN, quota_ns=0)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3_000), st.integers(1, 400)), min_size=1, max_size=12),
    st.integers(1, 3_000_000),
    st.integers(1, 300),
    st.integers(1, 5),
    st.integers(0, 500),
)
def test_every_token_goes_out_once_in_order_within_the_quota(
    prompts: list[tuple[int, int]], quota: int, max_tokens: int, max_requests: int, fixed: int
) -> None:
    cost = AttentionCost(fixed_ns=fixed, ns_per_flop=1.0, flops_per_token=50, flops_per_pair=2)
    queue = PrefillQueue(cost, quota, max_tokens, max_requests)
    left = {}
    for request, (cached, new) in enumerate(prompts):
        queue.push(request, 0, cached, new)
        left[request] = (cached, new)
    while left:
        batch = queue.next_batch()
        assert 1 <= len(batch) <= max_requests
        tokens = sum(chunk.new_tokens for chunk in batch)
        spent = fixed + sum(cost.chunk_ns(chunk.past_tokens, chunk.new_tokens) for chunk in batch)
        assert tokens <= max_tokens
        assert spent <= quota or tokens == 1
        assert [chunk.request for chunk in batch] == sorted(left)[: len(batch)], "first come, first served"
        for chunk in batch:
            cached, new = left.pop(chunk.request)
            assert chunk.past_tokens == cached
            assert chunk.last == (chunk.new_tokens == new)
            if not chunk.last:
                assert chunk is batch[-1]
                left[chunk.request] = (cached + chunk.new_tokens, new - chunk.new_tokens)
                more = fixed + cost.chunk_ns(cached, chunk.new_tokens + 1)
                more += sum(cost.chunk_ns(other.past_tokens, other.new_tokens) for other in batch[:-1])
                assert more > quota or tokens == max_tokens, "the cut is not the largest that fits"
            assert queue.chunk_done(chunk.request, 0)
        assert queue.waiting_tokens == sum(new for _, new in left.values())
        assert queue.waiting_requests == len(left)
