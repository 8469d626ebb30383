"""What is planned: points, interleaving, shared warm-ups, and every experiment of the catalog."""

import json

import msgspec
import pytest

from dualpath.core.systems import SYSTEMS
from dualpath.lab.experiments.catalog import EXPERIMENTS, definition
from dualpath.lab.experiments.conditions import Bench, Conditions
from dualpath.lab.experiments.series import PlannedRun, agents_under, arriving, series_of, warm_ups
from dualpath.traces.reading import TraceError
from dualpath.traces.trajectory import totals


@pytest.fixture
def session(tmp_path):
    turns = [{"type": "s", "in": 1280 + 128 * i, "out": 64, "hash_ids": list(range(20 + 2 * i))} for i in range(8)]
    path = tmp_path / "session.json"
    path.write_text(json.dumps({"id": "s", "requests": [turn | {"think_time": 3.0} for turn in turns]}))
    return path


def test_systems_alternate_within_a_point():
    asked = Conditions(topologies=("1P1D", "1P2D"), systems=("basic", "dualpath"), agents=1)
    assert [run.name for run in series_of("n", asked, 0, 2).runs] == [
        *("1P1D basic", "1P1D dualpath", "1P1D basic #2", "1P1D dualpath #2"),
        *("1P2D basic", "1P2D dualpath", "1P2D basic #2", "1P2D dualpath #2"),
    ]


def test_a_run_is_named_by_all_that_sets_it_apart():
    run = PlannedRun(topology="1P1D", system="basic", agents="a", parameters={"agents": 8.0, "kind": "x"})
    assert run.name == "1P1D agents=8 kind=x basic"


def test_axes_are_combined_on_every_topology():
    asked = Conditions(topologies=("1P1D", "1P2D"), axes={"agents": (2, 4), "context_tokens": (100, 200)}, turns=1)
    series = series_of("n", asked, seed=0, repeats=1)
    assert list(series.trajectories) == [f"agents={n}, context_tokens={c}" for n in (2, 4) for c in (100, 200)]
    assert [len(agents) for agents in series.trajectories.values()] == [2, 2, 4, 4]
    assert len(series.runs) == 4 * 2 * 3
    assert series.runs[-1].parameters == {"agents": 4, "context_tokens": 200}
    assert series.agents_of(series.runs[-1]) is series.trajectories["agents=4, context_tokens=200"]


@pytest.mark.parametrize(
    ("axis", "values", "expected"),
    [
        ("agents", (2, 4, 8), 1),
        ("append_tokens", (16, 512), 1),
        ("generate_tokens", (4, 160), 1),
        ("turns", (1, 5), 1),
        ("agents_per_s", (0.5, 2.0), 1),
        ("context_tokens", (100, 200), 2),
    ],
)
def test_agents_that_begin_alike_share_a_warm_up(axis, values, expected):
    series = series_of("n", Conditions(axes={axis: values}), seed=0, repeats=1)
    found = warm_ups(series.trajectories)
    assert len(found) == expected
    assert sorted(key for one in found for key in one.keys) == sorted(series.trajectories)
    for one in found:
        assert all(len(agent.rounds) == 1 for agent in one.trajectories)
        most = max(len(series.trajectories[key]) for key in one.keys)
        assert len({agent.id for agent in one.trajectories}) == len(one.trajectories) == most


def test_a_warm_up_leaves_subagents_for_the_replay(session):
    document = json.loads(session.read_text())
    nested = {"type": "subagent", "requests": [{"type": "s", "in": 640, "out": 16, "hash_ids": list(range(10))}]}
    document["requests"].insert(1, nested)
    session.write_text(json.dumps(document))
    agents = agents_under(Conditions(traces=(str(session),), agents=1), seed=0)
    (warm,) = warm_ups({"a": agents})
    assert agents[0].rounds[0].subagents and not warm.trajectories[0].rounds[0].subagents


def test_arrivals_put_off_the_first_measured_turn_alone():
    agents = agents_under(Conditions(agents=4, turns=2, context_tokens=9, append_tokens=9, generate_tokens=9), 0)
    late = arriving(agents, 0.5, seed=0)
    starts_s = [agent.rounds[1].gap_s for agent in late]
    assert starts_s == sorted(starts_s) and starts_s[0] > 0
    assert all((agent.rounds[0].gap_s, agent.rounds[2].gap_s) == (0, 0) for agent in late)
    twice = arriving(agents, 1.0, seed=0)
    assert [agent.rounds[1].gap_s for agent in twice] == pytest.approx([start_s / 2 for start_s in starts_s])


def test_recorded_agents_do_not_pause(session):
    series = series_of("traces", Conditions(traces=(str(session),), agents=2, turns=3), seed=0, repeats=1)
    (agents,) = series.trajectories.values()
    assert [len(agent.rounds) for agent in agents] == [4, 4]
    assert all(round_.gap_s == 0 for agent in agents for round_ in agent.rounds)
    assert series.conditions.source == "recorded agents of 1 source, token counts divided by 16"


@pytest.mark.parametrize("one", EXPERIMENTS, ids=lambda one: one.name)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_can_be_planned(one, quick, session):
    given = {"traces": (str(session),)} if one.needs_traces else {}
    asked = one.under(quick, given)
    series = series_of(one.name, asked, seed=0, repeats=1)
    assert set(asked.systems) <= set(SYSTEMS.names())
    for agents in series.trajectories.values():
        assert totals(agents).max_context_tokens + 64 < 32_768
    assert len({run.name for run in series.runs}) == len(series.runs)  # or their logs would overwrite each other
    assert definition(one.name) is one
    if quick:
        assert len(series.runs) <= 6


def test_what_is_given_wins_over_the_experiment():
    sweep = definition("agents-context")
    asked = sweep.under(False, {"agents": 3, "turns": 1})
    assert (asked.agents, asked.turns, dict(asked.axes)) == (3, 1, {"context_tokens": (1000, 2000, 4000)})
    asked = sweep.under(True, {"axes": {"spread": (0.0, 1.0)}})
    assert dict(asked.axes) == {"spread": (0.0, 1.0)}
    assert asked.context_tokens == 700


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axes": {"speed": (1,)}}, "'speed' can't be varied; choose from agents"),
        ({"axes": {"agents": ()}}, "--values agents: give at least one"),
        ({"axes": {"agents": (2.5,)}}, "--values agents: whole numbers"),
        ({"axes": {"append_tokens": (5.0, 5.0)}}, "each once"),
        ({"systems": ("basic", "basic")}, "--systems: name at least one, and each once"),
        ({"topologies": ()}, "--topologies: name at least one"),
        ({"agents": 0}, "--agents must be at least 1, not 0"),
        ({"turns": 0}, "--turns must be at least 1, not 0"),
        ({"topologies": ("1P",)}, "--topologies: '1P'"),
        ({"max_context_tokens": 0}, "--max-context must be at least 1, not 0"),
    ],
)
def test_conditions_that_can_not_be_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        definition("ablation").under(False, given)


def test_an_unknown_name_and_missing_traces_are_refused(session):
    with pytest.raises(ValueError, match=r"no experiment is called 'x'; choose from demo, agents-context"):
        definition("x")
    with pytest.raises(ValueError, match=r"traces replays recorded sessions: give them with --trace"):
        definition("traces").under(False, {})
    with pytest.raises(ValueError, match="nothing to measure"):
        series_of("traces", Conditions(traces=(str(session),), max_context_tokens=90), 0, 1)
    with pytest.raises(TraceError, match="absent"):
        series_of("traces", Conditions(traces=("absent",)), 0, 1)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"repeats": 0}])
def test_a_bench_that_can_not_be_is_refused(bad):
    with pytest.raises(ValueError, match="--seed must be at least 0 and --repeat at least 1"):
        Bench(**bad)


def test_conditions_are_not_changed_by_its_points():
    asked = Conditions(axes={"agents": (2, 4)})
    before = msgspec.structs.asdict(asked)
    assert [(parameters["agents"], here.agents) for parameters, here in asked.points()] == [(2, 2), (4, 4)]
    assert msgspec.structs.asdict(asked) == before
