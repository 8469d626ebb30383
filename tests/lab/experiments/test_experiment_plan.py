"""What is planned: points, interleaving, shared warm-ups, and every experiment of the catalog."""

import json

import msgspec
import pytest

from dualpath.core.systems import SYSTEMS
from dualpath.lab.experiments.agents import arriving, generated_agents
from dualpath.lab.experiments.catalog import EXPERIMENTS, definition
from dualpath.lab.experiments.load import Load, agents_of, make_plan
from dualpath.lab.experiments.plan import Point, runs_of, warm_ups
from dualpath.traces.generate import AgentMix
from dualpath.traces.trajectory import totals


@pytest.fixture
def session(tmp_path):
    turns = [{"type": "s", "in": 1280 + 128 * i, "out": 64, "hash_ids": list(range(20 + 2 * i))} for i in range(8)]
    path = tmp_path / "session.json"
    path.write_text(json.dumps({"id": "s", "requests": [turn | {"think_time": 3.0} for turn in turns]}))
    return path


def test_systems_alternate_within_a_point():
    points = [Point(topology=name, systems=("basic", "dualpath"), agents="a") for name in ("1P1D", "1P2D")]
    assert [run.name for run in runs_of(points, 2)] == [
        *("1P1D basic", "1P1D dualpath", "1P1D basic #2", "1P1D dualpath #2"),
        *("1P2D basic", "1P2D dualpath", "1P2D basic #2", "1P2D dualpath #2"),
    ]


def test_a_run_is_named_by_all_that_sets_it_apart():
    point = Point(topology="1P1D", systems=("basic",), agents="a", parameters={"agents": 8.0, "kind": "x"})
    assert runs_of([point], 1)[0].name == "1P1D agents=8 kind=x basic"


def test_axes_are_combined_on_every_topology():
    load = Load(topologies=("1P1D", "1P2D"), axes={"agents": (2, 4), "context_tokens": (100, 200)}, turns=1)
    plan = make_plan("n", load, seed=0, repeats=1)
    assert list(plan.trajectories) == [f"agents={n}, context_tokens={c}" for n in (2, 4) for c in (100, 200)]
    assert [len(agents) for agents in plan.trajectories.values()] == [2, 2, 4, 4]
    assert len(plan.runs) == 4 * 2 * 3
    assert plan.runs[-1].point.parameters == {"agents": 4, "context_tokens": 200}
    assert plan.of(plan.runs[-1]) is plan.trajectories["agents=4, context_tokens=200"]


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
    plan = make_plan("n", Load(axes={axis: values}), seed=0, repeats=1)
    found = warm_ups(plan.trajectories)
    assert len(found) == expected
    assert sorted(key for one in found for key in one.keys) == sorted(plan.trajectories)
    for one in found:
        assert all(len(agent.rounds) == 1 for agent in one.trajectories)
        most = max(len(plan.trajectories[key]) for key in one.keys)
        assert len({agent.id for agent in one.trajectories}) == len(one.trajectories) == most


def test_a_warm_up_leaves_subagents_for_the_replay(session):
    document = json.loads(session.read_text())
    nested = {"type": "subagent", "requests": [{"type": "s", "in": 640, "out": 16, "hash_ids": list(range(10))}]}
    document["requests"].insert(1, nested)
    session.write_text(json.dumps(document))
    agents = agents_of(Load(traces=(str(session),), agents=1), seed=0)
    (warm,) = warm_ups({"a": agents})
    assert agents[0].rounds[0].subagents and not warm.trajectories[0].rounds[0].subagents


def test_arrivals_put_off_the_first_measured_turn_alone():
    agents = generated_agents(AgentMix(turns=3, first_context_tokens=9, append_tokens=9, generate_tokens=9), 4, seed=0)
    late = arriving(agents, 0.5, seed=0)
    starts_s = [agent.rounds[1].gap_s for agent in late]
    assert starts_s == sorted(starts_s) and starts_s[0] > 0
    assert all((agent.rounds[0].gap_s, agent.rounds[2].gap_s) == (0, 0) for agent in late)
    twice = arriving(agents, 1.0, seed=0)
    assert [agent.rounds[1].gap_s for agent in twice] == pytest.approx([start_s / 2 for start_s in starts_s])


def test_recorded_agents_do_not_pause(session):
    plan = make_plan("traces", Load(traces=(str(session),), agents=2, turns=3), seed=0, repeats=1)
    (agents,) = plan.trajectories.values()
    assert [len(agent.rounds) for agent in agents] == [4, 4]
    assert all(round_.gap_s == 0 for agent in agents for round_ in agent.rounds)
    assert plan.source == "recorded agents of 1 source, token counts divided by 16"


@pytest.mark.parametrize("one", EXPERIMENTS, ids=lambda one: one.name)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_can_be_planned(one, quick, session):
    given = {"traces": (str(session),)} if one.needs_traces else {}
    load = one.scaled(quick, given)
    plan = make_plan(one.name, load, seed=0, repeats=1)
    assert set(plan.systems) <= set(SYSTEMS.names())
    for agents in plan.trajectories.values():
        assert totals(agents).max_context_tokens + 64 < 32_768
    assert len({run.name for run in plan.runs}) == len(plan.runs)  # or their logs would overwrite each other
    assert definition(one.name) is one
    if quick:
        assert len(plan.runs) <= 6


def test_what_is_given_wins_over_the_experiment():
    sweep = definition("agents-context")
    load = sweep.scaled(False, {"agents": 3, "turns": 1})
    assert (load.agents, load.turns, dict(load.axes)) == (3, 1, {"context_tokens": (1000, 2000, 4000)})
    load = sweep.scaled(True, {"axes": {"spread": (0.0, 1.0)}})
    assert dict(load.axes) == {"spread": (0.0, 1.0)}
    assert load.context_tokens == 700


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axes": {"speed": (1,)}}, "'speed' can't be varied; choose from agents"),
        ({"axes": {"agents": ()}}, "--values agents: give at least one"),
        ({"axes": {"agents": (2.5,)}}, "--values agents: whole numbers"),
        ({"axes": {"append_tokens": (5.0, 5.0)}}, "each once"),
        ({"systems": ("basic", "basic")}, "--systems: name at least one, and each once"),
        ({"topologies": ()}, "--topologies: name at least one"),
        ({"agents": 0}, "--agents and --turns must be at least 1"),
    ],
)
def test_loads_that_can_not_be_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        definition("ablation").scaled(False, given)


def test_an_unknown_name_and_missing_traces_are_refused(session):
    with pytest.raises(ValueError, match=r"no experiment is called 'x'; choose from agents-context, pd-ratio"):
        definition("x")
    with pytest.raises(ValueError, match=r"traces replays recorded sessions: give them with --trace"):
        definition("traces").scaled(False, {})
    with pytest.raises(ValueError, match="nothing to measure"):
        make_plan("traces", Load(traces=(str(session),), max_context_tokens=90), 0, 1)


def test_a_load_is_not_changed_by_its_points():
    load = Load(axes={"agents": (2, 4)})
    before = msgspec.structs.asdict(load)
    assert [(parameters["agents"], here.agents) for parameters, here in load.points()] == [(2, 2), (4, 4)]
    assert msgspec.structs.asdict(load) == before
