"""Turn tables against trajectory objects, agents against both, and the memory of the largest run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.traces.trajectory import Round, Trajectory
from dualpath.traces.turn_table import Agents, Turn, TurnTable

LENGTHS = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


def trajectories_of(lengths):
    return [
        Trajectory(
            id=str(number),
            rounds=tuple(Round(append_tokens=a, generate_tokens=g, gap_s=float(gap)) for a, g, gap in rounds),
        )
        for number, rounds in enumerate(lengths)
    ]


@settings(deadline=None, derandomize=True)
@given(LENGTHS)
def test_there_and_back_again(lengths):
    trajectories = trajectories_of(lengths)
    table = TurnTable.from_trajectories(trajectories)
    assert [table.trajectory(index, str(index)) for index in range(len(table))] == trajectories
    spans = [span for trajectory in trajectories for span in trajectory.spans()]
    assert table.prompt_tokens.tolist() == [span.prompt_tokens for span in spans]
    assert table.context_tokens.tolist() == [span.context_tokens for span in spans]


@settings(deadline=None, derandomize=True)
@given(LENGTHS, st.integers(1, 30), st.integers(60, 300))
def test_a_prepended_round_lengthens_every_prompt_and_stops_in_time(lengths, count, limit):
    table = TurnTable.from_trajectories(trajectories_of(lengths))
    agents = Agents.prepended(table, count, limit, seed=1)
    assert len(agents) == count
    for agent in range(count):
        turns = [agents.turn(agent, index) for index in range(agents.turns[agent])]
        expected = table.trajectory(int(agents.template[agent]), "x").rounds
        prefix = int(agents.prefix_tokens[agent])
        if prefix:
            assert turns[0] == Turn(0, prefix, 1, 0)
            expected = (Round(append_tokens=prefix, generate_tokens=1), *expected)
            contexts = np.cumsum([round_.append_tokens + round_.generate_tokens for round_ in expected])
            assert len(turns) == max(1, int((contexts <= limit).sum()))
        assert agents.trajectory(agent).rounds == expected[: len(turns)]


def test_compactions_are_kept():
    rounds = (
        Round(append_tokens=100, generate_tokens=10),
        Round(append_tokens=5, generate_tokens=10, keep_tokens=64),
    )
    trajectory = Trajectory(id="a", rounds=rounds)
    table = TurnTable.from_trajectories([trajectory])
    assert table.turn(1) == Turn(64, 5, 10, 0)
    assert table.turn(1).prompt_tokens == 69
    assert table.trajectory(0, "a") == trajectory


def test_scaling_by_hand():
    table = TurnTable.from_lengths([np.array([10, 3, 5])], [np.array([4, 1, 4])])
    scaled = table.scaled(append=2.0, generate=0.5, max_context_tokens=30)
    assert scaled.append_tokens.tolist() == [20, 6]
    assert scaled.generate_tokens.tolist() == [2, 1]
    assert scaled.prompt_tokens.tolist() == [20, 28]
    with pytest.raises(ValueError, match="first round of 20 \\+ 2 tokens does not fit 21"):
        table.scaled(append=2.0, generate=0.5, max_context_tokens=21)
    with pytest.raises(ValueError, match="factors must be above zero"):
        table.scaled(append=0, generate=1)


def test_scaling_keeps_the_pauses_of_the_rounds_that_are_left():
    table = TurnTable.from_lengths([np.array([9, 9]), np.array([9])], [np.array([1, 1]), np.array([1])])
    scaled = table.with_gaps(np.array([1, 2, 3])).scaled(append=1, generate=1, max_context_tokens=10)
    assert scaled.gap_ns.tolist() == [1, 3]


def test_subagents_are_refused():
    nested = Trajectory(id="b", rounds=(Round(append_tokens=1, generate_tokens=1),))
    parent = Trajectory(id="a", rounds=(Round(append_tokens=1, generate_tokens=1, subagents=(nested,)),))
    with pytest.raises(ValueError, match="'a' has subagents"):
        TurnTable.from_trajectories([parent])


def test_columns_must_fit():
    column = np.ones(2, np.int32)
    with pytest.raises(ValueError, match="do not fit starts"):
        TurnTable(np.array([0, 3]), column, column, column, column.astype(np.int64))
    with pytest.raises(ValueError, match="at least one turn"):
        TurnTable(np.array([0, 0, 2]), column, column, column, column.astype(np.int64))


def test_48_thousand_agents_share_their_templates():
    lengths = np.full(157, 100, np.int32)
    agents = Agents.prepended(TurnTable.from_lengths([lengths] * 500, [lengths] * 500), 48_000, None, seed=0)
    assert agents.total_turns() == 500 * 157 + 47_500 * 158
    columns = (agents.template, agents.prefix_tokens, agents.turns, agents.table.append_tokens)
    assert sum(column.nbytes for column in columns) < 2_000_000
