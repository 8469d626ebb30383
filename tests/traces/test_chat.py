"""Chat messages: answers and appends, growing requests, tool calls, content without text."""

import json

import pytest

from dualpath.traces.chat import read_chat
from dualpath.traces.reading import NO_OPTIONS, ReadOptions, TraceError
from dualpath.traces.trajectory import Round

SYSTEM, USER = {"role": "system", "content": "s" * 40}, {"role": "user", "content": "u" * 40}
ANSWER, TOOL = {"role": "assistant", "content": "a" * 16}, {"role": "tool", "content": "t" * 8, "tool_call_id": "1"}


@pytest.fixture
def read(tmp_path):
    def reads(*conversations, options=NO_OPTIONS, **other):
        path = tmp_path / "chat.jsonl"
        path.write_text("".join(json.dumps({"messages": one} | other) + "\n" for one in conversations))
        return read_chat(path, options)

    return reads


def test_answers_are_generated_and_what_is_between_them_is_appended(read):
    one, two = read([SYSTEM, USER, ANSWER, TOOL, USER, ANSWER], [USER, ANSWER, ANSWER])
    assert one.rounds == (
        Round(append_tokens=20, generate_tokens=4),
        Round(append_tokens=12, generate_tokens=4),
    )
    assert two.rounds == (Round(append_tokens=10, generate_tokens=4), Round(append_tokens=0, generate_tokens=4))
    assert (one.id, two.id) == ("conversation-00000", "conversation-00001")


def test_a_request_without_its_answer_generates_one_token(read):
    (one,) = read([USER, ANSWER, TOOL])
    assert one.rounds[1] == Round(append_tokens=2, generate_tokens=1)


def test_requests_that_grow_are_one_conversation_also_where_two_take_turns(read):
    other = [SYSTEM, {"role": "user", "content": "v" * 40}]
    one, two = read([SYSTEM, USER], other, [SYSTEM, USER, ANSWER, TOOL], [*other, ANSWER, USER])
    for agent in (one, two):
        assert [round_.generate_tokens for round_ in agent.rounds] == [4, 1]
    assert [round_.append_tokens for round_ in one.rounds] == [20, 2]
    assert [round_.append_tokens for round_ in two.rounds] == [20, 10]


def test_a_request_is_continued_once_and_equal_conversations_stay_apart(read):
    fork = [USER, {"role": "assistant", "content": "other"}, USER]
    assert [len(one.rounds) for one in read([USER], [USER, ANSWER, USER], fork)] == [2, 2]
    assert len(read([USER, ANSWER], [USER, ANSWER])) == 2
    assert len(read([USER], [{"role": "user", "content": "changed"}, ANSWER])) == 2


def test_session_ids_name_conversations_and_keep_them_apart(read, tmp_path):
    lines = [
        {"session_id": "a", "messages": [USER]},
        {"session_id": 2, "messages": [USER, ANSWER, USER]},
        {"session_id": "a", "messages": [USER, ANSWER, TOOL, ANSWER]},
    ]
    path = tmp_path / "sessions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [(one.id, len(one.rounds)) for one in read_chat(path)] == [("a", 2), ("2", 2)]


def test_tool_calls_count_and_content_may_be_null_or_parts(read):
    call = {"id": "1", "type": "function", "function": {"name": "n" * 8, "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "p" * 8}, {"type": "image_url", "image_url": {"url": "data:"}}]
    calls = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    old = {"role": "assistant", "content": "c" * 4, "function_call": {"name": "n" * 4, "arguments": {"b": [2]}}}
    nothing = {"role": "assistant", "content": None}
    (one,) = read([{"role": "user", "content": parts}, calls, TOOL, old, nothing])
    assert one.rounds == (
        Round(append_tokens=2, generate_tokens=8),
        Round(append_tokens=2, generate_tokens=5),
        Round(append_tokens=0, generate_tokens=1),
    )


def test_an_answer_before_any_question_is_context(read):
    (one,) = read([ANSWER, USER, ANSWER])
    assert one.rounds == (Round(append_tokens=14, generate_tokens=4),)
    assert read([], [ANSWER]) == []


def test_the_given_count_is_used_and_a_prompt_has_a_token_at_least(read):
    (one,) = read([USER, ANSWER, USER, ANSWER], options=ReadOptions(count_tokens=lambda text: 0))
    assert one.rounds == (Round(append_tokens=1, generate_tokens=1), Round(append_tokens=0, generate_tokens=1))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {"content": "x"}], r"line 2: messages\[1\] has no role"),
        (
            [USER, {"role": "user", "content": 7}],
            r"line 2: not a record of .*\$\.messages\[1\]\.content",
        ),
        ("hello", r"line 2: not a record of chat messages: .*\$\.messages"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], r"\$\.messages\[0\]\.tool_calls\[0\]\.function"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_line(read, messages, message):
    with pytest.raises(TraceError, match=rf"chat\.jsonl: .*{message}"):
        read([USER, ANSWER], messages)
