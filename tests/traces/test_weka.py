import json
import pathlib

import pytest

from dualpath.traces.limits import TraceError, TraceLimits
from dualpath.traces.trajectory import Round, totals
from dualpath.traces.weka import read_weka

REAL = pathlib.Path(__file__).parents[3] / "shared" / "traces" / "weka-claude-code" / "sessions"


def turn(prompt, out, hash_ids=None, think_time=None, **other):
    hash_ids = list(range(prompt // 64)) if hash_ids is None else hash_ids
    return {"t": 0.0, "type": "s", "in": prompt, "out": out, "hash_ids": hash_ids, "think_time": think_time} | other


def session(path, *requests, **other):
    path.write_text(json.dumps({"id": "s1", "block_size": 64, "requests": requests} | other))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "session.json"


def test_turns_append_what_the_prompt_adds_to_context_and_generation(file):
    read = read_weka(session(file, turn(640, 10), turn(700, 20, think_time=1.5), turn(720, 5)))
    assert read.id == "s1"
    assert read.rounds == (
        Round(append_tokens=640, generate_tokens=10),
        Round(append_tokens=50, generate_tokens=20, gap_s=1.5),
        Round(append_tokens=0, generate_tokens=5),
    )
    assert [span.prompt_tokens for span in read.spans()] == [640, 700, 720]


def test_a_last_block_that_hashes_differently_is_no_compaction(file):
    read = read_weka(session(file, turn(640, 10), turn(704, 1, [*range(9), 90, 91])))
    assert read.rounds[1] == Round(append_tokens=54, generate_tokens=1)


def test_a_short_common_prefix_is_a_compaction(file):
    read = read_weka(session(file, turn(640, 10), turn(300, 3, [0, 1, 70, 71])))
    assert read.rounds[1] == Round(append_tokens=300 - 128, generate_tokens=3, keep_tokens=128)
    assert [span.prompt_tokens for span in read.spans()] == [640, 300]


def test_a_prompt_shorter_than_the_context_keeps_only_its_length(file):
    read = read_weka(session(file, turn(640, 100), turn(700, 3)))
    assert read.rounds[1] == Round(append_tokens=0, generate_tokens=3, keep_tokens=700)


def test_subagents_belong_to_the_turn_before_them_and_start_afresh(file):
    nested = [turn(128, 4), turn(192, 4)]
    read = read_weka(
        session(
            file,
            turn(640, 10),
            {"type": "subagent", "requests": nested},
            {"type": "subagent", "requests": nested[:1]},
            turn(700, 20),
        )
    )
    assert len(read.rounds) == 2
    first, second = read.rounds[0].subagents
    assert (first.id, second.id) == ("s1/1", "s1/2")
    assert [span.prompt_tokens for span in first.spans()] == [128, 192]
    assert read.rounds[1].subagents == ()
    assert totals([read]).trajectories == 3


def test_scale_divides_tokens_and_never_loses_a_generation(file):
    read = read_weka(session(file, turn(6400, 100), turn(6900, 3), turn(640, 8, [0, 1, 99])), TraceLimits(scale=16))
    assert read.rounds == (
        Round(append_tokens=400, generate_tokens=6),
        Round(append_tokens=25, generate_tokens=1),
        Round(append_tokens=32, generate_tokens=1, keep_tokens=8),
    )


def test_rounding_does_not_add_up(file):
    turns = [turn(1000 + 72 * i, 7) for i in range(50)]
    spans = list(read_weka(session(file, *turns), TraceLimits(scale=16)).spans())
    assert [span.prompt_tokens for span in spans] == [round((1000 + 72 * i) / 16) for i in range(50)]


def test_caps_end_a_session_early(file):
    turns = [turn(640, 10), {"type": "subagent", "requests": [turn(900, 1)]}, turn(700, 20), turn(800, 20)]
    session(file, *turns)
    assert len(read_weka(file, TraceLimits(max_turns=2)).rounds) == 2
    capped = read_weka(file, TraceLimits(max_context_tokens=720))
    assert [span.context_tokens for span in capped.spans()] == [650, 720]
    assert capped.rounds[0].subagents == ()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], r"requests is empty"),
        ([turn(640, 10), {"type": "s", "in": 5}], r"requests\[1\]\.out is missing"),
        ([turn(640, 10), turn(0, 1, [])], r"requests\[1\]\.in is 0"),
        ([turn(640, -1)], r"requests\[0\]\.out is -1"),
        ([turn(64, 1, [1, 2])], r"requests\[0\]\.hash_ids names 2 blocks"),
        ([turn("many", 1, [])], r"Expected `int \| null`, got `str` - at `\$\.requests\[0\]\.in`"),
        ([{"type": "subagent", "requests": [turn(64, 1)]}], r"requests\[0\]\.type is subagent before any turn"),
        ([turn(64, 1), {"type": "subagent"}], r"requests\[1\]\.requests is empty"),
    ],
)
def test_a_broken_session_names_the_file_and_the_field(file, requests, message):
    with pytest.raises(TraceError, match=message) as caught:
        read_weka(session(file, *requests))
    assert str(caught.value).startswith(str(file))


def test_unreadable_files_and_senseless_limits_are_refused(file):
    with pytest.raises(TraceError, match=r"session\.json: can't be read: No such file"):
        read_weka(file)
    file.write_text("{")
    with pytest.raises(TraceError, match="not a WEKA session"):
        read_weka(file)
    with pytest.raises(TraceError, match="block_size is 0"):
        read_weka(session(file, turn(64, 1), block_size=0))
    with pytest.raises(TraceError, match="no turn fits max_context_tokens=100"):
        read_weka(session(file, turn(640, 1)), TraceLimits(max_context_tokens=100))
    for bad in ({"scale": 0}, {"scale": float("nan")}, {"max_turns": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TraceLimits(**bad)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the public WEKA sessions are not at {REAL}")
def test_recorded_sessions_keep_their_prompt_lengths():
    compactions = turns = 0
    for path in sorted(REAL.glob("*.json")):
        recorded = [entry["in"] for entry in json.loads(path.read_text())["requests"] if entry["type"] != "subagent"]
        read = read_weka(path)
        assert [span.prompt_tokens for span in read.spans()] == recorded
        turns += len(recorded)
        compactions += sum(round_.keep_tokens is not None and round_.append_tokens > 0 for round_ in read.rounds)
    assert 0.01 < compactions / turns < 0.05
