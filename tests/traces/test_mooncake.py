"""Mooncake traces: chains put together from shared prefixes, compactions, forks, errors with line numbers."""

import json

import pytest

from dualpath.traces.limits import TraceError
from dualpath.traces.mooncake import read_mooncake
from dualpath.traces.trajectory import Round


def request(at_s, prompt, output, ids):
    return {"timestamp": at_s * 1000, "input_length": prompt, "output_length": output, "hash_ids": ids}


def read(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return read_mooncake(path)


FIRST = request(0, 1600, 100, [0, 1, 2, 3])  # three full blocks and 64 tokens


def test_a_prompt_that_begins_with_all_full_blocks_continues(tmp_path):
    trace = read(tmp_path, FIRST, request(30, 2100, 7, [0, 1, 2, 4, 5]))
    (trajectory,) = trace.trajectories
    assert trajectory.rounds == (
        Round(append_tokens=1600, generate_tokens=100),
        Round(append_tokens=400, generate_tokens=7, gap_s=30.0),
    )
    assert [span.prompt_tokens for span in trajectory.spans()] == [1600, 2100]


def test_a_changed_answer_keeps_the_shared_blocks_only(tmp_path):
    trace = read(tmp_path, FIRST, request(30, 1650, 7, [0, 1, 2, 4]))
    second = trace.trajectories[0].rounds[1]
    assert (second.keep_tokens, second.append_tokens) == (1536, 114)
    assert [span.prompt_tokens for span in trace.trajectories[0].spans()] == [1600, 1650]


def test_a_prompt_that_shares_less_is_another_trajectory(tmp_path):
    trace = read(tmp_path, FIRST, request(5, 2100, 7, [0, 1, 9, 10, 11]))
    assert [len(one.rounds) for one in trace.trajectories] == [1, 1]
    assert trace.arrivals_s == (0, 5)


def test_one_shared_block_is_a_system_prompt_and_no_continuation(tmp_path):
    trace = read(tmp_path, request(0, 600, 1, [0, 1]), request(1, 1100, 1, [0, 2, 3]))
    assert len(trace.trajectories) == 2


def test_a_request_is_continued_once_and_a_fork_starts_anew(tmp_path):
    trace = read(tmp_path, FIRST, request(10, 2100, 1, [0, 1, 2, 4, 5]), request(20, 2200, 1, [0, 1, 2, 6, 7]))
    assert [len(one.rounds) for one in trace.trajectories] == [2, 1]
    assert trace.trajectories[1].rounds[0].append_tokens == 2200


def test_of_two_that_fit_the_longest_prefix_wins(tmp_path):
    trace = read(
        tmp_path,
        request(0, 1024, 1, [0, 1]),
        request(1, 1600, 1, [0, 1, 2, 3]),  # continues the first
        request(2, 1024, 1, [0, 1]),
        request(3, 2100, 1, [0, 1, 2, 4, 5]),  # three shared blocks with the second, two with the third
    )
    assert [len(one.rounds) for one in trace.trajectories] == [3, 1]


def test_an_answer_of_no_tokens_counts_as_one(tmp_path):
    assert read(tmp_path, request(0, 10, 0, [0])).trajectories[0].rounds[0].generate_tokens == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not a request"),
        ('{"timestamp": 1}', "line 2: not a request .*input_length"),
        (request(1, 1600, 1, [0]), r"line 2: hash_ids names 1 blocks of 512 tokens; a prompt of 1600 tokens has 4"),
        (request(1, 0, 1, []), "line 2: input_length 0 must be at least 1"),
        (request(-1, 10, 1, [0]), "line 2: timestamp -1000 is before the line above"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, line, message):
    with pytest.raises(TraceError, match=r"trace\.jsonl: " + message):
        read(tmp_path, FIRST, line)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(TraceError, match="holds no requests"):
        read(tmp_path, "")
    with pytest.raises(TraceError, match="can't be read"):
        read_mooncake(tmp_path / "nothing.jsonl")
