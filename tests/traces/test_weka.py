import json
import pathlib

import pytest

from dualpath.traces.limits import TraceLimits, limited
from dualpath.traces.reading import TraceError
from dualpath.traces.trajectory import Round, totals
from dualpath.traces.weka import read_weka as read_all

REAL = pathlib.Path(__file__).parents[3] / "shared" / "traces" / "weka-claude-code" / "sessions"


def turn(prompt, out, hash_ids=None, think_time=None, **other):
    hash_ids = list(range(prompt // 64)) if hash_ids is None else hash_ids
    return {"t": 0.0, "type": "s", "in": prompt, "out": out, "hash_ids": hash_ids, "think_time": think_time} | other


def read_weka(path, limits=None):
    """The only session in `path`."""
    (one,) = read_all(path)
    return one if limits is None else limited(one, limits)


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
        ([turn(640, 10), {"type": "s", "in": 5}], r"requests\[1\]\.out is missing"),
        ([turn(640, 10), turn(0, 1, [])], r"Expected `int` >= 1 - at `\$\.requests\[1\]\.in`"),
        ([turn(640, -1)], r"Expected `int` >= 0 - at `\$\.requests\[0\]\.out`"),
        ([turn(64, 1, [1, 2])], r"requests\[0\]\.hash_ids names 2 blocks"),
        ([turn("many", 1, [])], r"Expected `int \| null`, got `str` - at `\$\.requests\[0\]\.in`"),
        ([{"type": "subagent", "requests": [turn(64, 1)]}], r"requests\[0\]\.type is subagent before any turn"),
        ([turn(64, 1), {"type": "s", "out": 1, "hash_ids": []}], r"requests\[1\]\.in is missing"),
        ([turn(64, 1, t=-1.0)], r"Expected `float` >= 0.0 - at `\$\.requests\[0\]\.t`"),
    ],
)
def test_a_broken_session_names_the_file_and_the_field(file, requests, message):
    with pytest.raises(TraceError, match=message) as caught:
        read_weka(session(file, *requests))
    assert str(caught.value).startswith(f"{file}: line 1: ")


def test_unreadable_files_are_refused(file):
    with pytest.raises(TraceError, match=r"session\.json: can't be read: No such file"):
        read_weka(file)
    file.write_text("{")
    with pytest.raises(TraceError, match="not a WEKA session"):
        read_weka(file)
    with pytest.raises(TraceError, match=r"Expected `int` >= 1 - at `\$\.block_size`"):
        read_weka(session(file, turn(64, 1), block_size=0))
    deep = turn(64, 1)
    for _ in range(40):
        deep = {"type": "subagent", "requests": [turn(64, 1), deep]}
    with pytest.raises(TraceError, match="is a subagent 33 levels deep; at most 32 are read"):
        read_weka(session(file, turn(64, 1), deep))


def test_subagents_and_sessions_without_turns_are_nothing(file):
    empty = [{"type": "subagent"}, {"type": "subagent", "requests": []}, {"type": "subagent", "requests": None}]
    nested = {"type": "subagent", "requests": [{"type": "subagent", "requests": []}]}
    read = read_weka(session(file, nested, turn(640, 10), *empty, nested, turn(700, 20)))
    assert [round_.subagents for round_ in read.rounds] == [(), ()]
    assert [span.prompt_tokens for span in read.spans()] == [640, 700]
    assert read_all(session(file)) == read_all(session(file, nested)) == []


def test_sessions_may_be_json_lines_or_an_array(file):
    sessions = [{"id": name, "requests": [turn(640, 10)]} for name in ("one", "two")]
    for text in ("\n".join(map(json.dumps, sessions)) + "\n\n", json.dumps(sessions), json.dumps(sessions, indent=2)):
        file.write_text(text)
        assert [one.id for one in read_all(file)] == ["one", "two"]
    sessions[1]["requests"] = [{"type": "s", "in": 5}]
    file.write_text("\n".join(map(json.dumps, sessions)))
    with pytest.raises(TraceError, match=r"session.json: line 2: requests\[0\]\.out is missing"):
        read_all(file)
    file.write_text(json.dumps(sessions))
    with pytest.raises(TraceError, match=r"session.json: \$\[1\]: requests\[0\]\.out is missing"):
        read_all(file)


def test_a_turn_after_a_side_request_continues_the_context_before_it(file):
    side = turn(100, 5, [900], think_time=1.0)
    read = read_weka(session(file, turn(640, 10), side, turn(700, 20, think_time=2.0), turn(720, 1)))
    assert [span.prompt_tokens for span in read.spans()] == [640, 700, 720]
    assert read.rounds[1] == Round(append_tokens=50, generate_tokens=20, gap_s=2.0)
    (aside,) = read.rounds[0].subagents
    assert (aside.id, aside.rounds) == ("s1/1", (Round(append_tokens=100, generate_tokens=5, gap_s=1.0),))


def test_the_longest_earlier_context_is_continued_and_all_after_it_is_set_aside(file):
    first, longer = turn(640, 10, list(range(10))), turn(1280, 10, list(range(20)))
    detour = [turn(640, 10, [*range(700, 710)]), turn(704, 3, [*range(700, 711)])]
    read = read_weka(session(file, first, longer, *detour, turn(1290, 1, list(range(20)))))
    assert [span.prompt_tokens for span in read.spans()] == [640, 1280, 1290]
    assert read.rounds[2].keep_tokens is None and read.rounds[2].append_tokens == 0
    (aside,) = read.rounds[1].subagents
    assert [span.prompt_tokens for span in aside.spans()] == [640, 704]
    assert aside.rounds[1] == Round(append_tokens=54, generate_tokens=3)


def test_side_requests_are_found_one_in_another(file):
    side, inner = turn(640, 1, [*range(500, 510)]), turn(64, 1, [800])
    read = read_weka(session(file, turn(640, 1), side, inner, turn(650, 1, [*range(500, 510)]), turn(660, 1)))
    assert [span.prompt_tokens for span in read.spans()] == [640, 660]
    (aside,) = read.rounds[0].subagents
    assert [span.prompt_tokens for span in aside.spans()] == [640, 650]
    assert [one.id for one in aside.rounds[0].subagents] == ["s1/2"]


def test_many_side_requests_and_then_others(file):
    sides = [turn(64, 1, [number]) for number in (901, 902, 903, 904)]
    main = [turn(640 + 64 * number, 1, list(range(10 + number))) for number in range(3)]
    read = read_weka(session(file, main[0], *sides[:3], main[1], sides[3], main[2]))
    assert [span.prompt_tokens for span in read.spans()] == [640, 704, 768]
    assert [len(one.rounds) for one in read.walk()] == [3, 3, 1]


def test_a_detour_that_shares_more_than_its_end_gains_stays_in_line(file):
    detour = turn(640, 1, [*range(8), 70, 71])  # 8 of 10 blocks shared: fresh, it would lose them
    read = read_weka(session(file, turn(640, 10), detour, turn(700, 1)))
    assert [round_.keep_tokens for round_ in read.rounds] == [None, 512, 512]


@pytest.mark.parametrize("ids", [[], [900]])
def test_a_tiny_prompt_is_not_taken_to_be_kept(file, ids):
    read = read_weka(session(file, turn(70, 5, ids), turn(640, 1)))
    assert read.rounds[1].keep_tokens == 0
    assert read_weka(session(file, turn(70, 5, ids), turn(60, 1, []))).rounds[1].keep_tokens == 0


def test_a_pause_that_is_not_recorded_is_the_time_since_the_end_of_what_ran_before(file):
    nested = {"type": "subagent", "t": 12.0, "requests": [turn(64, 1, t=12.0, api_time=8.0), turn(64, 1, t=21.0)]}
    turns = [
        turn(640, 10, t=0.0, api_time=4.0),
        turn(700, 10, t=10.0, api_time=1.0),
        nested,
        turn(720, 10, t=30.0, api_time=1.0),
        turn(730, 10, t=30.5),  # before the end of the one above: clocks that were rounded
        turn(740, 10, t=40.0, think_time=3.5),
        turn(750, 10, t=None),
    ]
    read = read_weka(session(file, *turns))
    assert [round_.gap_s for round_ in read.rounds] == [0.0, 6.0, 9.0, 0.0, 3.5, 0.0]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the public WEKA sessions are not at {REAL}")
def test_recorded_sessions_keep_their_prompt_lengths():
    compactions = turns = 0
    for path in sorted(REAL.glob("*.json")):
        recorded = [entry["in"] for entry in json.loads(path.read_text())["requests"] if entry["type"] != "subagent"]
        read = read_weka(path)
        assert sorted(span.prompt_tokens for one in read.walk() for span in one.spans()) == sorted(recorded)
        turns += len(recorded)
        compactions += sum(round_.keep_tokens is not None and round_.append_tokens > 0 for round_ in read.rounds)
    assert 0.01 < compactions / turns < 0.05


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the public WEKA sessions are not at {REAL}")
def test_derived_pauses_are_the_recorded_ones_within_the_second_that_times_are_rounded_to(file):
    compared = 0
    for path in sorted(REAL.glob("*.json")):
        recorded = json.loads(path.read_text())
        before = recorded["requests"][0]
        for entry in recorded["requests"][1:]:
            if entry.get("think_time") is not None and before.get("api_time") is not None:
                pair = [before | {"t": before["t"]}, {name: entry[name] for name in entry if name != "think_time"}]
                rounds = read_weka(session(file, *pair)).rounds
                assert rounds[-1].gap_s == pytest.approx(entry["think_time"], abs=1.0)
                compared += 1
            before = entry
        if compared > 300:
            return
    pytest.fail("no session has both")
