import itertools
import json
import os
import pathlib

import pytest

from dualpath.lab.planning.plan import load_of
from dualpath.lab.sim.workloads import agents_of
from dualpath.traces.limits import TraceLimits
from dualpath.traces.reading import TraceError
from dualpath.traces.sources import format_of, load_source
from dualpath.traces.trajectory import Round, Trajectory, renamed, totals

TRACES = pathlib.Path(os.environ.get("DUALPATH_TRACES", pathlib.Path(__file__).parents[3] / "shared" / "traces"))
WEKA = {
    "id": "w",
    "block_size": 64,
    "requests": [
        {"t": 0, "type": "s", "in": 640, "out": 10, "hash_ids": list(range(10))},
        {"type": "subagent", "requests": [{"t": 1, "type": "s", "in": 64, "out": 3, "hash_ids": [1]}]},
        {"t": 2, "type": "s", "in": 700, "out": 10, "hash_ids": list(range(10)), "think_time": 2.0},
    ],
}
MOONCAKE = [{"timestamp": t, "input_length": 1500, "output_length": 5, "hash_ids": [t, t + 1, t + 2]} for t in (0, 9)]
MINISWE = [{"timestamp": 1, "input": 'a"hash_ids"' * 400, "output": "b", "session_id": "s"}]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "weka.json").write_text(json.dumps(WEKA))
    (tmp_path / "weka-pretty").write_text("\n" + json.dumps(WEKA, indent=2))
    (tmp_path / "mooncake.jsonl").write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    (tmp_path / "mini.jsonl").write_text("\n" + json.dumps(MINISWE[0]) + "\n")
    return tmp_path


def test_formats_are_told_from_content(files):
    kinds = {path.name: format_of(path).name for path in files.iterdir()}
    assert kinds == {"weka.json": "weka", "weka-pretty": "weka", "mooncake.jsonl": "mooncake", "mini.jsonl": "miniswe"}


def test_files_and_directories_of_any_format_give_agents(files):
    source = load_source([str(files)])
    assert [one.id for one in source.trajectories] == ["s", "chain-00000", "chain-00001", "w"]
    assert source.description == (
        "4 agents of mini-SWE-agent sessions and Mooncake traces and WEKA sessions, tokens of texts counted as bytes "
        "over 4"
    )
    assert len(load_source([str(files / "weka.json"), str(files / "mini.jsonl")]).trajectories) == 2


def test_columns_take_every_context_as_an_agent(files):
    agents = agents_of([str(files / "weka.json")])
    assert agents.table.prompt_tokens.tolist() == [640, 700, 64] and agents.turns.tolist() == [2, 1]
    assert load_of([str(files / "weka.json")]).turns_per_agent == 3


def test_the_papers_statistics_are_a_source_too():
    source = load_source(["32K"], TraceLimits(max_turns=3, max_context_tokens=20_000), agents=6, seed=4)
    assert len(source.trajectories) == 6 and max(len(one.rounds) for one in source.trajectories) <= 3
    assert source.description == "the paper's 32K statistics, seed 4; cut at 20000 tokens; at most 3 turns each"
    assert (
        source.trajectories
        == load_source(["32K"], TraceLimits(max_turns=3, max_context_tokens=20_000), agents=6, seed=4).trajectories
    )


def test_limits_hold_for_every_format_and_are_described(files):
    source = load_source([str(files)], TraceLimits(scale=2, max_context_tokens=700))
    assert totals(source.trajectories).max_context_tokens <= 700
    assert source.description.endswith("; token counts divided by 2; cut at 700 tokens, which leaves 2 out")
    with pytest.raises(TraceError, match="no turn fits max_context_tokens=1 at scale 1"):
        load_source([str(files)], TraceLimits(max_context_tokens=1))


def test_agents_take_recordings_in_turns_under_names_of_their_own(files):
    source = load_source([str(files / "weka.json")])
    agents = source.agents(3)
    assert [one.id for one in agents] == ["agent-0000", "agent-0001", "agent-0002"]
    assert len({inner.id for one in agents for inner in one.walk()}) == 6
    assert agents[1].rounds[1].gap_s == 2.0 and agents[1].rounds[0].subagents[0].rounds[0].append_tokens == 64
    assert source.agent(7, "probe-1").id == "probe-1-0007"
    assert len(source.agents()) == 1


def test_renamed_names_every_subagent_at_every_depth():
    def nest(depth):
        inner = (nest(depth - 1),) if depth else ()
        return Trajectory(id=f"d{depth}", rounds=(Round(append_tokens=1, generate_tokens=1, subagents=inner),))

    assert [one.id for one in renamed(nest(2), "x").walk()] == ["x", "x/0.0", "x/0.0/0.0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\nnot json\n", "line 2: not a trace"),
        (b'{"a": 1}\n', "fit no known format: WEKA sessions"),
        (b"[1, 2]\n", r"not a trace: .*\$\[0\]"),
        (b"\xff\xfe\x00", "line 1: not a trace"),
        (b'{"requests": 7}', "not a WEKA session"),
        (b'{"hash_ids": [], "input_length": -1, "timestamp": 0, "output_length": 1}\n', "line 1"),
    ],
)
def test_what_can_not_be_told_or_read_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=rf"trace\.jsonl.*{message}"):
        load_source([str(path)])


def test_names_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(TraceError, match="no trace 'absent': give 32K, 48K or 64K"):
        load_source(["absent"])
    with pytest.raises(TraceError, match="the directory has no"):
        load_source([str(tmp_path)])
    with pytest.raises(TraceError, match="no agents are named"):
        load_source([])


@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded traces: set DUALPATH_TRACES to a directory that has them")
@pytest.mark.parametrize(
    ("name", "sessions", "rounds"), [("lmcache-miniswe", 12, 260), ("weka-claude-code/sessions", 40, None)]
)
def test_real_sessions(name, sessions, rounds):
    found = load_source([str(TRACES / name)]).trajectories
    assert len(found) == sessions
    assert rounds is None or totals(found).rounds == rounds


@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded traces: set DUALPATH_TRACES to a directory that has them")
def test_real_mini_swe_prompts_are_each_the_one_before_and_more():
    for one in load_source([str(TRACES / "lmcache-miniswe")]).trajectories:
        spans = list(one.spans())
        for index, (before, after) in enumerate(itertools.pairwise(spans), 1):
            assert one.rounds[index].keep_tokens == before.prompt_tokens
            assert after.prompt_tokens >= before.prompt_tokens
            assert 0 <= one.rounds[index].gap_s < 60
