"""The fitted generator: every mean of the paper's table, MaxLen, seeds, prepended rounds, scaling."""

import msgspec
import numpy as np
import pytest

from dualpath.traces.paper import PAPER_TRACES, TraceStatistics, fitted_table, measured, paper_agents

COLUMNS = ("turns", "append_tokens", "generate_tokens", "total_tokens", "context_tokens")


@pytest.mark.parametrize("trace", PAPER_TRACES)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_mean_is_the_papers_within_two_percent(trace, seed):
    wanted = PAPER_TRACES[trace]
    table = fitted_table(wanted, seed=seed)
    found = measured(table, wanted.max_context_tokens)
    assert len(table) == 500
    for column in COLUMNS:
        assert getattr(found, column) == pytest.approx(getattr(wanted, column), rel=0.02), column
    assert table.final_context_tokens.max() <= wanted.max_context_tokens
    assert min(table.append_tokens.min(), table.generate_tokens.min()) >= 1


def test_measured_by_hand_on_trajectory_objects():
    wanted = PAPER_TRACES["32K"]
    table = fitted_table(wanted, count=40)
    trajectories = [table.trajectory(index, str(index)) for index in range(40)]
    found = measured(table, wanted.max_context_tokens)
    means = [np.mean([span.prompt_tokens for span in one.spans()]) for one in trajectories]
    appends = [np.mean([round_.append_tokens for round_ in one.rounds]) for one in trajectories]
    totals = [sum(round_.append_tokens + round_.generate_tokens for round_ in one.rounds) for one in trajectories]
    assert found.context_tokens == pytest.approx(np.mean(means))
    assert found.append_tokens == pytest.approx(np.mean(appends))
    assert found.total_tokens == pytest.approx(np.mean(totals))


def test_the_same_seed_gives_the_same_trace_and_another_one_another():
    one, same, other = (fitted_table(PAPER_TRACES["32K"], seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.append_tokens, same.append_tokens)
    assert not np.array_equal(one.append_tokens[:100], other.append_tokens[:100])


def test_more_agents_have_a_prepended_round_and_leave_the_first_ones_alone():
    few, many = paper_agents("32K", 700), paper_agents("32K", 900)
    assert not few.prefix_tokens[:500].any()
    assert few.prefix_tokens[500:].all()
    for agent in (0, 499, 500, 699):
        assert few.trajectory(agent).rounds == many.trajectory(agent).rounds
    first, second, *_ = few.trajectory(600).rounds
    assert (first.generate_tokens, first.append_tokens) == (1, few.prefix_tokens[600])
    assert second.append_tokens == few.table.turn(few.table.starts[few.template[600]]).append_tokens


def test_prepended_agents_stop_at_max_len_and_keep_the_means():
    agents = paper_agents("32K", 3000)
    longest = 0
    for agent in range(0, 3000, 7):
        turns = [agents.turn(agent, index) for index in range(agents.turns[agent])]
        longest = max(longest, turns[-1].prompt_tokens + turns[-1].generate_tokens)
    assert 30_000 < longest <= 32_768
    assert agents.turns[500:].mean() == pytest.approx(60 + 1, rel=0.06)  # templates are drawn at random


def test_fewer_agents_than_trajectories():
    assert len(paper_agents("48K", 20)) == 20


def test_longer_appends_leave_fewer_rounds_before_max_len():
    plain, doubled = paper_agents("32K", 100), paper_agents("32K", 100, append_scale=2.0)
    assert doubled.turns.mean() < plain.turns.mean()
    assert doubled.table.final_context_tokens.max() <= 32_768
    assert doubled.turn(0, 0).append_tokens == 2 * plain.turn(0, 0).append_tokens
    assert doubled.turn(0, 0).generate_tokens == plain.turn(0, 0).generate_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_tokens": 40_000}, "total_tokens is 40000; it must be above 0 and below max_context_tokens"),
        ({"append_tokens": 100}, "less than total_tokens over turns"),
        ({"append_tokens": 20_000}, "append_tokens . generate_tokens is 20148; .* can't reach it"),
        ({"context_tokens": 28_000}, "context_tokens is 28000; trajectories with these turns and totals have means"),
        ({"turns": 0}, "must each be at least 1"),
    ],
)
def test_statistics_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fitted_table(msgspec.structs.replace(PAPER_TRACES["32K"], **change))


def test_an_unknown_trace_names_the_known_ones():
    with pytest.raises(ValueError, match="no trace '16K'; the paper has 32K, 48K, 64K"):
        paper_agents("16K", 10)


def test_other_statistics_can_be_asked_for():
    wanted = TraceStatistics(
        max_context_tokens=8192,
        turns=20,
        append_tokens=300,
        generate_tokens=100,
        total_tokens=6500,
        context_tokens=3900,
    )
    found = measured(fitted_table(wanted, count=400), 8192)
    for column in COLUMNS:
        assert getattr(found, column) == pytest.approx(getattr(wanted, column), rel=0.02), column


def test_turns_are_spread_as_public_sessions_are():
    """Weibull: shares of turns at the mean's multiples, and no trajectory of many times the mean."""
    turns = fitted_table(PAPER_TRACES["64K"]).turns / 157
    assert np.quantile(turns, 0.5) == pytest.approx(0.9, abs=0.1)
    assert np.quantile(turns, 0.99) == pytest.approx(2.5, abs=0.4)
    assert turns.max() < 4


def test_a_first_round_beyond_max_len_is_cut_to_it():
    """Of 32K, one that takes 20K by itself is among the 500."""
    plain, doubled = paper_agents("32K", 500), paper_agents("32K", 500, append_scale=2.0)
    first, long = (agents.table.append_tokens[agents.table.starts[:-1]] for agents in (plain, doubled))
    assert 2 * first.max() > 32_768
    assert 30_000 < long.max() < 32_768
    assert doubled.table.final_context_tokens.max() <= 32_768
    fits = np.flatnonzero(long < 30_000)
    assert np.array_equal(long[fits], 2 * first[fits])
