import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.trajectory import Round, Totals, Trajectory, totals


def test_a_prompt_is_all_that_came_before_plus_the_append():
    one = Trajectory(
        id="a",
        rounds=(
            Round(append_tokens=100, generate_tokens=10),
            Round(append_tokens=20, generate_tokens=5),
            Round(append_tokens=7, generate_tokens=1, keep_tokens=64),
        ),
    )
    assert [(s.kept_tokens, s.prompt_tokens, s.context_tokens) for s in one.spans()] == [
        (0, 100, 110),
        (110, 130, 135),
        (64, 71, 72),
    ]


def test_totals_count_subagents_at_every_depth():
    leaf = Trajectory(id="leaf", rounds=(Round(append_tokens=8, generate_tokens=2),))
    middle = Trajectory(id="middle", rounds=(Round(append_tokens=4, generate_tokens=1, subagents=(leaf,)),))
    top = Trajectory(id="top", rounds=(Round(append_tokens=2, generate_tokens=3, subagents=(middle,)),))
    assert totals([top]) == Totals(3, 3, prompt_tokens=14, append_tokens=14, generate_tokens=6, max_context_tokens=10)
    assert totals([]) == Totals(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Trajectory(id="x", rounds=()), "'x' has no rounds"),
        (lambda: Round(append_tokens=-1, generate_tokens=1), "at least 0 tokens"),
        (lambda: Round(append_tokens=1, generate_tokens=0), "generates at least 1"),
        (lambda: Round(append_tokens=1, generate_tokens=1, gap_s=-0.1), "gap_s"),
        (lambda: Trajectory(id="x", rounds=(Round(append_tokens=0, generate_tokens=1),)), "empty prompt"),
        (
            lambda: Trajectory(id="x", rounds=(Round(append_tokens=1, generate_tokens=1, keep_tokens=1),)),
            "round 0 keeps 1 tokens of a context of 0",
        ),
    ],
)
def test_an_impossible_trajectory_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_generated_lengths_have_the_means_asked_for():
    mix = AgentMix(
        turns=20, first_context_tokens=2000, append_tokens=400, generate_tokens=100, gap_s=2.0, turns_spread=0.3
    )
    agents = generate_trajectories(mix, 400, seed=1)
    later = [round_ for agent in agents for round_ in agent.rounds[1:]]
    assert np.mean([len(agent.rounds) for agent in agents]) == pytest.approx(20, rel=0.05)
    assert np.mean([agent.rounds[0].append_tokens for agent in agents]) == pytest.approx(2000, rel=0.05)
    assert np.mean([round_.append_tokens for round_ in later]) == pytest.approx(400, rel=0.02)
    assert np.std([round_.append_tokens for round_ in later]) == pytest.approx(100, rel=0.05)
    assert np.mean([round_.generate_tokens for round_ in later]) == pytest.approx(100, rel=0.02)
    assert np.mean([round_.gap_s for round_ in later]) == pytest.approx(2.0, rel=0.02)
    assert {agent.rounds[0].gap_s for agent in agents} == {0.0}


@given(seed=st.integers(0, 2**32), count=st.integers(1, 5), more=st.integers(0, 3))
def test_more_agents_leave_the_first_ones_alone(seed, count, more):
    mix = AgentMix(turns=3, first_context_tokens=50, append_tokens=10, generate_tokens=4)
    few = generate_trajectories(mix, count, seed)
    assert generate_trajectories(mix, count + more, seed)[:count] == few
    assert generate_trajectories(mix, count, seed + 1) != few


def test_no_spread_makes_all_agents_alike():
    mix = AgentMix(turns=2, first_context_tokens=50, append_tokens=10, generate_tokens=4, spread=0)
    assert {agent.rounds for agent in generate_trajectories(mix, 3, 0)} == {
        (Round(append_tokens=50, generate_tokens=4), Round(append_tokens=10, generate_tokens=4))
    }


@pytest.mark.parametrize("bad", [{"turns": 0.5}, {"append_tokens": float("nan")}, {"spread": -1}])
def test_an_impossible_mix_is_refused(bad):
    good = {"turns": 2, "first_context_tokens": 50, "append_tokens": 10, "generate_tokens": 4}
    with pytest.raises(ValueError, match=next(iter(bad))):
        AgentMix(**good | bad)


def test_a_mix_makes_at_least_one_agent():
    mix = AgentMix(turns=2, first_context_tokens=50, append_tokens=10, generate_tokens=4)
    with pytest.raises(ValueError, match="number of agents"):
        generate_trajectories(mix, 0, seed=0)
