import json

import msgspec
import pytest

from dualpath.lab.experiments.assemble import describe, measured_turns
from dualpath.lab.experiments.demo.options import DemoOptions
from dualpath.lab.experiments.demo.run import plan
from dualpath.lab.experiments.demo.workload import build_trajectories
from dualpath.traces.reading import TraceError


def test_generated_agents_have_a_warm_up_turn_and_the_turns_asked_for(options):
    agents = build_trajectories(options)
    assert [len(agent.rounds) for agent in agents] == [3, 3, 3]
    assert measured_turns(agents) == 6
    workload = describe(plan(options, agents))
    spans = [span for agent in agents for span in agent.spans()]
    later = [span for agent in agents for span in list(agent.spans())[1:]]
    assert workload.prompt_tokens == sum(span.prompt_tokens for span in later)
    assert workload.max_context_tokens == max(span.context_tokens for span in spans)
    assert (workload.agents, workload.turns) == (3, 6)
    assert build_trajectories(msgspec.structs.replace(options, agents=None, turns=1))[11].id == "agent-0011"


def test_traces_are_dealt_out_to_agents_of_their_own_names(options, tmp_path):
    nested = {"type": "subagent", "requests": [{"type": "s", "in": 64, "out": 1, "hash_ids": [1]}]}
    turns = [{"type": "s", "in": 640 + 64 * i, "out": 1, "hash_ids": list(range(10 + i))} for i in range(4)]
    path = tmp_path / "session.json"
    path.write_text(json.dumps({"id": "s", "requests": [*turns[:2], nested, *turns[2:]]}))
    options = msgspec.structs.replace(options, traces=(path,), agents=2, scale=2, turns=2)
    agents = build_trajectories(options)
    assert [agent.id for agent in agents] == ["agent-0000", "agent-0001"]
    assert [span.prompt_tokens for span in agents[0].spans()] == [320, 352, 384]
    assert agents[1].rounds[1].subagents[0].id == "agent-0001/1.0"
    assert measured_turns(agents) == 6
    assert describe(plan(options, agents)).source == "1 WEKA sessions, token counts divided by 2"
    with pytest.raises(ValueError, match="nothing to measure"):
        build_trajectories(msgspec.structs.replace(options, max_context_tokens=330))
    with pytest.raises(TraceError, match="absent"):
        build_trajectories(msgspec.structs.replace(options, traces=(tmp_path / "absent",)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"topologies": ("1P",)}, "--topologies: '1P'"),
        ({"topologies": ()}, "--topologies: name at least one"),
        ({"systems": ("basic", "basic")}, "--systems: name at least one, and each once"),
        ({"max_context_tokens": 0}, "--max-context-tokens must be at least 1"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_options_that_can_not_be_run_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        DemoOptions(**bad)
