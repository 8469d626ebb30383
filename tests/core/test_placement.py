"""PE and DE choice by example, class by class, and round robin."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.engines import DecodeEngines, PrefillEngines, ReadQueues
from dualpath.core.fleet import Fleet
from dualpath.core.placement import (
    RoundRobin,
    choose_decode_engine,
    choose_group,
    choose_prefill_engine,
    next_decode_engine,
    next_prefill_engine,
    z_tokens,
)
from dualpath.core.policy import Constants
from dualpath.core.request import Request
from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineFacts, Leg, RequestFacts, Role, Side

CONSTANTS = Constants(alpha_tokens=1_000, beta_tokens=5_000)


def prefill_engines(*loads: tuple[int, int], buffer_blocks: int = 100) -> PrefillEngines:
    """PEs 1, 2, … with (tok, read queue), each on a node of its own."""
    queues = ReadQueues()
    engines = PrefillEngines(queues)
    for engine, (tok, read_queue) in enumerate(loads, start=1):
        engines.add(EngineFacts(engine, Role.PREFILL, engine, 0, buffer_blocks))
        engines.start(engine, tok)
        queues.tokens_at[queues.place(engine)] = read_queue
    return engines


def decode_engines(*loads: tuple[int, int, int, int], buffer_blocks: int = 100) -> DecodeEngines:
    """DEs 1, 2, … with (group, seq, tok, free HBM blocks)."""
    engines = DecodeEngines()
    for engine, (group, seq, tok, free) in enumerate(loads, start=1):
        engines.add(EngineFacts(engine, Role.DECODE, engine, group, buffer_blocks, 1_000))
        for part in range(seq):
            engines.start(engine, tok if part == 0 else 0)
        engines.promise_hbm(engine, 1_000 - free)
    return engines


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        (((300, 0), (200, 0), (100, 0)), 3),  # all short: the smallest tok
        (((100, 0), (100, 0)), 1),  # a tie goes to the smallest id
        (((100, 1_001), (200, 1_000)), 2),  # a short queue beats a smaller tok
        (((5_001, 0), (5_000, 9_999)), 2),  # beta excludes; a long queue will do
        (((200, 2_000), (100, 3_000)), 2),  # all long: the smallest tok again
        (((5_001, 0), (6_000, 0)), None),  # nobody takes anything
        (((100, 5_000), (100, 10)), 2),  # equal tok, the first one with a long queue
    ],
)
def test_pe_choice(loads: tuple[tuple[int, int], ...], chosen: int | None) -> None:
    assert choose_prefill_engine(prefill_engines(*loads), CONSTANTS, 0) == chosen


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(4_998, 5_003), st.integers(998, 1_003)), min_size=1, max_size=6))
def test_pe_choice_is_what_the_paper_says(loads: list[tuple[int, int]]) -> None:
    takes = [(tok, engine, read) for engine, (tok, read) in enumerate(loads, start=1) if tok <= 5_000]
    short = [candidate for candidate in takes if candidate[2] <= 1_000]
    chosen = min(short or takes, default=(0, None, 0))[1]
    assert choose_prefill_engine(prefill_engines(*loads), CONSTANTS, 0) == chosen


def test_pe_choice_passes_over_buffers_that_could_never_hold_the_hit() -> None:
    engines = prefill_engines((100, 0), (200, 0), buffer_blocks=10)
    engines.add(EngineFacts(9, Role.PREFILL, 9, 0, 50))
    engines.start(9, 4_000)
    assert choose_prefill_engine(engines, CONSTANTS, 10) == 1
    assert choose_prefill_engine(engines, CONSTANTS, 11) == 9
    assert choose_prefill_engine(engines, CONSTANTS, 51) is None


def test_round_robin_over_pes_ignores_load_and_wraps() -> None:
    engines = prefill_engines((9_000, 9_000), (0, 0), (5, 5))
    order, last = [], None
    for _ in range(5):
        last = next_prefill_engine(engines, last, 0)
        order.append(last)
    assert order == [1, 2, 3, 1, 2]
    engines.remove(3)
    assert next_prefill_engine(engines, 2, 0) == 1
    assert next_prefill_engine(engines, 3, 0) == 1
    assert next_prefill_engine(engines, 1, 101) is None


def test_round_robin_goes_on_where_it_was_after_a_request_that_nobody_could_hold() -> None:
    turns, engines = RoundRobin(CONSTANTS), prefill_engines((0, 0), (0, 0), (0, 0))
    assert [turns.prefill_engine(engines, blocks) for blocks in (1, 101, 1, 1)] == [1, None, 2, 3]


def test_a_request_goes_to_the_group_with_the_least_load_queue_included() -> None:
    engines = decode_engines((7, 1, 500, 100), (7, 1, 500, 100), (8, 1, 900, 100))
    assert choose_group(engines, 1, 1) == 8
    engines.queue(8, 200)
    assert choose_group(engines, 1, 1) == 7
    engines.queue(8, -200)
    assert choose_group(engines, 1, 1) == 8


def test_a_group_without_an_engine_large_enough_is_passed_over() -> None:
    engines = decode_engines((1, 0, 0, 1_000))
    engines.add(EngineFacts(50, Role.DECODE, 50, 2, 500, 4_000))
    engines.start(50, 10_000)
    assert choose_group(engines, 100, 1_000) == 1
    assert choose_group(engines, 101, 1_000) == 2
    assert choose_group(engines, 100, 1_001) == 2


def test_z_counts_the_head_of_the_queue_that_fits_the_groups_free_memory() -> None:
    group = decode_engines((0, 1, 1_000, 10), (0, 1, 3_000, 20)).groups[0]
    queue = [waiting(600, 10), waiting(400, 20), waiting(9, 1)]  # the third does not fit after the first two
    assert z_tokens(group, queue, 1.05) == 1.05 * (600 + 400 + 4_000) / 2
    assert z_tokens(group, [waiting(600, 31), waiting(1, 1)], 1.05) == 1.05 * 4_000 / 2
    assert z_tokens(group, [], 1.0) == 2_000


def waiting(prompt_tokens: int, hbm_blocks: int) -> Request:
    """A request that may generate as much as fills its blocks."""
    request = Request(RequestFacts(1, 0, prompt_tokens, 0, hbm_blocks * BLOCK_TOKENS - prompt_tokens))
    assert request.hbm_blocks == hbm_blocks
    return request


@pytest.mark.parametrize(
    ("loads", "z", "chosen"),
    [
        (((0, 3, 100, 50), (0, 2, 300, 50)), 1_000.0, 2),  # none high: the smallest seq
        (((0, 2, 100, 50), (0, 2, 50, 50)), 1_000.0, 1),  # a tie in seq goes to the smallest id
        (((0, 1, 950, 50), (0, 9, 100, 50)), 1_000.0, 2),  # 1 is high (950 + 100 > 1000)
        (((0, 1, 900, 50), (0, 9, 100, 50)), 1_000.0, 1),  # 900 + 100 is not above Z
        (((0, 1, 950, 50), (0, 2, 920, 50)), 1_000.0, 2),  # all high: the smallest tok
        (((0, 1, 10, 4), (0, 9, 100, 50)), 1_000.0, 2),  # 1 lacks memory
        (((0, 1, 10, 4), (0, 9, 2_000, 50)), 1_000.0, 2),  # high, but the only one that fits
        (((0, 1, 10, 4), (0, 2, 10, 3)), 1_000.0, None),  # none fits
        (((0, 1, 10, 4), (0, 2, 900, 50), (0, 9, 100, 50)), 1_000.0, 2),  # 900 + 100 is not above Z, here either
    ],
)
def test_de_choice_in_a_group(loads: tuple[tuple[int, int, int, int], ...], z: float, chosen: int | None) -> None:
    group = decode_engines(*loads).groups[0]
    assert choose_decode_engine(group, 100, z, 2, 5) == chosen


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.just(0), st.integers(1, 3), st.integers(98, 102), st.integers(3, 6)), min_size=1, max_size=6)
)
def test_de_choice_is_what_the_paper_says(loads: list[tuple[int, int, int, int]]) -> None:
    fits = [(seq, tok, engine) for engine, (_, seq, tok, free) in enumerate(loads, start=1) if free >= 5]
    not_high = [(seq, engine) for seq, tok, engine in fits if tok + 100 <= 200]
    high = [(tok, engine) for _, tok, engine in fits]
    chosen = min(not_high or high, default=(0, None))[1]
    assert choose_decode_engine(decode_engines(*loads).groups[0], 100, 200.0, 2, 5) == chosen


def test_de_choice_passes_over_buffers_that_could_never_hold_the_prompt() -> None:
    engines = decode_engines((0, 1, 0, 50), buffer_blocks=5)
    engines.add(EngineFacts(9, Role.DECODE, 9, 0, 50, 1_000))
    for _ in range(4):
        engines.start(9, 10)
    assert choose_decode_engine(engines.groups[0], 100, 1_000.0, 5, 5) == 1
    assert choose_decode_engine(engines.groups[0], 100, 1_000.0, 6, 5) == 9


def test_round_robin_over_des_skips_who_has_no_room_and_wraps() -> None:
    engines = decode_engines((0, 0, 0, 50), (0, 0, 0, 2), (1, 0, 0, 50))
    order, last = [], None
    for _ in range(4):
        last = next_decode_engine(engines, last, 2, 5)
        assert last is not None
        order.append(last.engine)
    assert order == [1, 3, 1, 3]
    assert next_decode_engine(engines, None, 2, 51) is None
    assert next_decode_engine(engines, last, 101, 1) is None


def test_columns_follow_engines_that_come_and_go() -> None:
    fleet = Fleet()
    for engine, role in ((5, Role.PREFILL), (2, Role.PREFILL), (8, Role.DECODE), (3, Role.DECODE)):
        fleet.add(EngineFacts(engine, role, engine, 10 - engine, 10, 20))
    fleet.prefill.start(5, 500)
    fleet.decode.start(3, 300)
    fleet.add(EngineFacts(1, Role.PREFILL, 1, 0, 10))
    fleet.add(EngineFacts(7, Role.DECODE, 7, 1, 10, 20))
    assert [facts.engine for facts in fleet.prefill.facts] == [1, 2, 5]
    assert fleet.prefill.tok.tolist() == [0, 0, 500]
    assert [facts.engine for facts in fleet.decode.facts] == [7, 8, 3]  # by group, then id
    assert fleet.decode.tok.tolist() == [0, 0, 300]
    fleet.remove(2)
    fleet.remove(8)
    assert fleet.prefill.tok.tolist() == [0, 500]
    assert fleet.decode.tok.tolist() == [0, 300]
    assert fleet.decode.group_ids == [1, 7]


def test_senseless_engines_are_refused() -> None:
    fleet = Fleet()
    fleet.add(EngineFacts(1, Role.PREFILL, 1, 0, 10))
    with pytest.raises(ValueError, match="joined already"):
        fleet.add(EngineFacts(1, Role.PREFILL, 2, 0, 10))
    with pytest.raises(ValueError, match="needs a buffer"):
        fleet.add(EngineFacts(2, Role.PREFILL, 2, 0, 0))
    with pytest.raises(ValueError, match="device memory"):
        fleet.add(EngineFacts(2, Role.DECODE, 2, 0, 10, 0))
    with pytest.raises(ValueError, match="shares its node"):
        fleet.add(EngineFacts(2, Role.DECODE, 1, 0, 10, 10))
    with pytest.raises(ValueError, match="shares its node"):
        fleet.add(EngineFacts(2, Role.PREFILL, 1, 9, 10))


def test_engines_of_a_node_share_its_read_queue() -> None:
    fleet = Fleet()
    for engine in (1, 2):
        fleet.add(EngineFacts(engine, Role.PREFILL, 77, 0, 10))
    fleet.start_read(1, Leg(Side.PE, 0, 3))
    fleet.add(EngineFacts(3, Role.PREFILL, 77, 0, 10))
    assert fleet.prefill.read_queue.tolist() == [192, 192, 192]
    fleet.remove(1)
    assert fleet.read_queue_tokens(2) == 192
    fleet.end_read(3, Leg(Side.PE, 0, 3))
    assert fleet.prefill.read_queue.tolist() == [0, 0]


def test_a_node_that_comes_back_has_nothing_in_its_read_queue_and_the_others_keep_theirs() -> None:
    fleet = Fleet()
    for engine in (1, 2):
        fleet.add(EngineFacts(engine, Role.PREFILL, 70 + engine, 0, 10))
    fleet.start_read(2, Leg(Side.PE, 0, 3))
    fleet.remove(1)
    assert fleet.prefill.read_queue.tolist() == [192]
    fleet.add(EngineFacts(3, Role.PREFILL, 71, 0, 10))
    assert fleet.prefill.read_queue.tolist() == [192, 0]
    assert [fleet.prefill.read_queue_at(slot) for slot in (0, 1)] == [192, 0]


def test_what_no_engine_could_ever_take() -> None:
    fleet = Fleet()
    assert fleet.refusal(0, 1, 1) is Cause.NO_ENGINE
    fleet.add(EngineFacts(1, Role.PREFILL, 1, 0, 10))
    assert fleet.refusal(0, 1, 1) is Cause.NO_ENGINE
    fleet.add(EngineFacts(2, Role.DECODE, 2, 1, 10, 50))
    fleet.add(EngineFacts(3, Role.DECODE, 3, 1, 50, 10))
    assert fleet.refusal(10, 10, 10) is None
    assert fleet.refusal(11, 10, 10) is Cause.TOO_LARGE
    assert fleet.refusal(10, 50, 10) is None
    assert fleet.refusal(10, 10, 50) is None
    assert fleet.refusal(10, 11, 11) is Cause.TOO_LARGE  # one engine must hold both
    fleet.add(EngineFacts(4, Role.PREFILL, 4, 0, 20))
    assert fleet.refusal(11, 10, 10) is None
