"""Mooncake traces: chains put together from shared prefixes, compactions, forks, errors with line numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.traces.mooncake import read_mooncake
from dualpath.traces.reading import ReadOptions, TraceError
from dualpath.traces.trajectory import Round


def request(at_s, prompt, output, ids):
    return {"timestamp": at_s * 1000, "input_length": prompt, "output_length": output, "hash_ids": ids}


def read(tmp_path, *lines, block_tokens=None):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return read_mooncake(path, ReadOptions(block_tokens=block_tokens))


FIRST = request(0, 1600, 100, [0, 1, 2, 3])  # three full blocks and 64 tokens


def test_a_prompt_that_begins_with_all_full_blocks_continues(tmp_path):
    trace = read(tmp_path, FIRST, request(30, 2100, 7, [0, 1, 2, 4, 5]))
    (trajectory,) = trace
    assert trajectory.rounds == (
        Round(append_tokens=1600, generate_tokens=100),
        Round(append_tokens=400, generate_tokens=7, gap_s=30.0),
    )
    assert [span.prompt_tokens for span in trajectory.spans()] == [1600, 2100]


def test_a_changed_answer_keeps_the_shared_blocks_only(tmp_path):
    trace = read(tmp_path, FIRST, request(30, 1650, 7, [0, 1, 2, 4]))
    second = trace[0].rounds[1]
    assert (second.keep_tokens, second.append_tokens) == (1536, 114)
    assert [span.prompt_tokens for span in trace[0].spans()] == [1600, 1650]


def test_a_prompt_that_shares_less_is_another_trajectory(tmp_path):
    trace = read(tmp_path, FIRST, request(5, 2100, 7, [0, 1, 9, 10, 11]))
    assert [len(one.rounds) for one in trace] == [1, 1]


def test_one_shared_block_is_a_system_prompt_and_no_continuation(tmp_path):
    trace = read(tmp_path, request(0, 600, 1, [0, 1]), request(1, 1100, 1, [0, 2, 3]))
    assert len(trace) == 2


def test_a_request_is_continued_once_and_a_fork_starts_anew(tmp_path):
    trace = read(tmp_path, FIRST, request(10, 2100, 1, [0, 1, 2, 4, 5]), request(20, 2200, 1, [0, 1, 2, 6, 7]))
    assert [len(one.rounds) for one in trace] == [2, 1]
    assert trace[1].rounds[0].append_tokens == 2200


def test_of_two_that_fit_the_longest_prefix_wins(tmp_path):
    trace = read(
        tmp_path,
        request(0, 1024, 1, [0, 1]),
        request(1, 1600, 1, [0, 1, 2, 3]),  # continues the first
        request(2, 1024, 1, [0, 1]),
        request(3, 2100, 1, [0, 1, 2, 4, 5]),  # three shared blocks with the second, two with the third
    )
    assert [len(one.rounds) for one in trace] == [3, 1]


def test_an_answer_of_no_tokens_counts_as_one(tmp_path):
    assert read(tmp_path, request(0, 10, 0, [0]))[0].rounds[0].generate_tokens == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not a request"),
        ('{"timestamp": 1}', "line 2: not a request .*input_length"),
        (
            request(1, 1600, 1, [0]),
            "line 2: .* 1 blocks, but input_length is 1600: .* 400 to 533 tokens, as the lines above have",
        ),
        (request(1, 0, 1, []), r"line 2: .*Expected `int` >= 1 - at `\$\.input_length`"),
        (request(-1, 10, 1, [0]), r"line 2: .*Expected `float` >= 0.0 - at `\$\.timestamp`"),
        (request(1, 100, 1, []), "line 2: hash_ids names 0 blocks"),
        ({"input_length": 9, "output_length": 1, "hash_ids": [0]}, "line 2: timestamp is missing"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, line, message):
    with pytest.raises(TraceError, match=r"trace\.jsonl: " + message):
        read(tmp_path, FIRST, line)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(TraceError, match="the file is empty"):
        read(tmp_path, "")
    with pytest.raises(TraceError, match="can't be read"):
        read_mooncake(tmp_path / "nothing.jsonl")


def sized(tokens, blocks, first=0):
    return {
        "timestamp": 0,
        "input_length": tokens,
        "output_length": 1,
        "hash_ids": list(range(first, first + blocks)),
    }


def test_the_block_size_is_told_from_lengths_and_numbers_of_ids(tmp_path):
    # 500 tokens in 8 blocks: 63 to 71 tokens each; the only power of two is 64.
    later = {"timestamp": 9, "input_length": 600, "output_length": 1, "hash_ids": [*range(7), 90, 91, 92]}
    (one,) = read(tmp_path, sized(500, 8), later)
    assert one.rounds[1].append_tokens == 600 - 501
    # 448 to 463 tokens each, then 448 to 450: no power of two, but the last line leaves one size only.
    (first, *_) = read(tmp_path, sized(1389, 4), sized(1351, 4, 10), sized(1344, 3, 20), sized(897, 3, 30))
    assert first.rounds[0].append_tokens == 1389
    # One block says only that it is no smaller; 512 is the format's own.
    assert len(read(tmp_path, sized(300, 1))) == 1


def test_a_block_size_that_is_not_clear_is_asked_for(tmp_path):
    with pytest.raises(TraceError, match=r"blocks of 348 to 462 tokens all fit; give .* mooncake@348:.*trace\.jsonl"):
        read(tmp_path, sized(1389, 4))
    with pytest.raises(TraceError, match=r"blocks of 600 or more tokens all fit; give .* mooncake@1024:"):
        read(tmp_path, sized(600, 1))
    assert len(read(tmp_path, sized(600, 1), block_tokens=700)) == 1
    with pytest.raises(TraceError, match=r"line 2: .* that fits no block size of 64 tokens$"):
        read(tmp_path, sized(500, 8), sized(500, 1), block_tokens=64)


def in_session(session, prompt, ids, **other):
    return {"session_id": session, "input_length": prompt, "output_length": 10, "hash_ids": ids} | other


def test_given_sessions_are_not_guessed_and_delays_are_pauses(tmp_path):
    one, two, alone, other = read(
        tmp_path,
        in_session("a", 1600, [0, 1, 2, 3], timestamp=0),
        in_session(7, 1600, [0, 1, 2, 4], timestamp=0),
        in_session("a", 2100, [0, 1, 2, 5, 6], delay=2500),
        request(3, 2100, 1, [0, 1, 2, 5, 6]),
        request(3, 2100, 1, [0, 1, 2, 5, 7]),
        in_session(7, 1600, [0, 8, 9, 10], timestamp=4000),
        in_session(7, 1600, [20, 21, 22, 23]),
    )
    assert [one.id, two.id, alone.id, other.id] == ["a", "7", "request-00003", "request-00004"]
    assert one.rounds[1] == Round(append_tokens=490, generate_tokens=10, gap_s=2.5)
    assert [(r.keep_tokens, r.append_tokens, r.gap_s) for r in two.rounds] == [
        (None, 1600, 0.0),
        (512, 1088, 4.0),
        (0, 1600, 0.0),
    ]
    assert len(alone.rounds) == 1


def test_times_of_a_session_go_forward(tmp_path):
    with pytest.raises(TraceError, match=r"line 3: timestamp 5 is before 9 .* sort the file by timestamp"):
        read(
            tmp_path,
            in_session("a", 600, [0, 1], timestamp=9),
            in_session("b", 600, [0, 1], timestamp=4),
            in_session("a", 600, [0, 1], timestamp=5),
        )


@given(st.integers(16, 2048), st.lists(st.integers(1, 60_000), min_size=1, max_size=30))
def test_a_block_size_is_never_refused_where_it_is_the_true_one(tmp_path_factory, size, lengths):
    lines = [sized(length, -(-length // size), 1000 * number) for number, length in enumerate(lengths)]
    directory = tmp_path_factory.mktemp("mooncake")
    assert len(read(directory, *lines, block_tokens=size)) == len(lengths)
    try:
        read(directory, *lines)
    except TraceError as error:
        assert "all fit; give the size" in str(error)
