import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dualpath.traces.miniswe import read_miniswe
from dualpath.traces.reading import ReadOptions, TraceError
from dualpath.traces.texts import load_tokenizer
from dualpath.traces.trajectory import Round


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(at, prompt, output="x" * 8, session="s", **other):
    return {"timestamp": at, "input": prompt, "output": output, "session_id": session} | other


@pytest.fixture
def file(tmp_path):
    return tmp_path / "session.jsonl"


def test_a_prompt_that_holds_the_answer_keeps_the_context(file):
    first, answer = "a" * 400, "b" * 40
    (one,) = read_miniswe(write(file, line(10, first, answer), line(12.5, first + answer + "c" * 80)))
    assert one.id == "s"
    assert one.rounds == (
        Round(append_tokens=100, generate_tokens=10),
        Round(append_tokens=20, generate_tokens=2, gap_s=2.5),
    )


def test_prompts_that_leave_answers_out_keep_the_prompt_before(file):
    (one,) = read_miniswe(write(file, line(1, "a" * 400, "b" * 40), line(2, "a" * 400 + "c" * 80)))
    assert one.rounds[1] == Round(append_tokens=20, generate_tokens=2, gap_s=1.0, keep_tokens=100)
    assert [span.prompt_tokens for span in one.spans()] == [100, 120]


def test_a_prompt_that_changes_in_the_middle_keeps_what_is_before(file):
    (one,) = read_miniswe(write(file, line(1, "a" * 400), line(2, "a" * 200 + "z" * 40)))
    assert one.rounds[1] == Round(append_tokens=10, generate_tokens=2, gap_s=1.0, keep_tokens=50)
    (cut,) = read_miniswe(write(file, line(1, "a" * 400), line(2, "a" * 200)))
    assert cut.rounds[1] == Round(append_tokens=0, generate_tokens=2, gap_s=1.0, keep_tokens=50)


def test_lines_are_put_in_order_and_sessions_apart(file):
    lines = [line(30, "bb" * 40, session="t"), line(20, "a" * 80), line(10, "a" * 40), line(9, "b" * 40, session="t")]
    one, other = read_miniswe(write(file, *lines))
    assert [(one.id, len(one.rounds)), (other.id, len(other.rounds))] == [("t", 2), ("s", 2)]
    assert [span.prompt_tokens for span in other.spans()] == [10, 20]


@pytest.mark.parametrize("unit", [1, 1e3, 1e6, 1e9])
def test_timestamps_are_in_the_unit_that_their_size_tells(file, unit):
    at = int(1_760_428_436 * unit)
    (one,) = read_miniswe(write(file, line(at, "a" * 40), line(at + 2 * unit, "a" * 80)))
    assert one.rounds[1].gap_s == pytest.approx(2.0)


def test_chat_messages_are_joined(file):
    asked = [{"role": "system", "content": "s" * 40}, {"role": "user", "content": [{"type": "text", "text": "u" * 40}]}]
    then = [*asked, {"role": "assistant", "content": "b" * 16}, {"role": "user", "content": "v" * 8}]
    empty = [*then, {"role": "assistant", "content": None}]
    (one,) = read_miniswe(write(file, line(1, asked, "b" * 16), line(2, then), line(3, empty)))
    assert one.rounds[0] == Round(append_tokens=20, generate_tokens=4)
    assert one.rounds[1] == Round(append_tokens=2, generate_tokens=2, gap_s=1.0)
    assert one.rounds[2].keep_tokens == 26


def test_tokens_are_counted_with_the_given_tokenizer(file, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = load_tokenizer(tmp_path / "tokenizer.json")
    (one,) = read_miniswe(
        write(file, line(1, "a b a ", "b b"), line(2, "a b a b b a a")), ReadOptions(count_tokens=count)
    )
    assert one.rounds == (
        Round(append_tokens=3, generate_tokens=2),
        Round(append_tokens=2, generate_tokens=1, gap_s=1.0),
    )
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TraceError, match=r"bad\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"timestamp": 1}\n', r"line 1: not a request of a mini-SWE-agent session: .*session_id"),
        ("\n{broken\n", "line 2: not a request"),
        (json.dumps(line(-1, "a")), r"line 1: .*Expected `float` >= 0.0 - at `\$\.timestamp`"),
        (json.dumps(line(1, "")), "line 1: the prompt is empty"),
        (json.dumps(line(1, 7)), r"\$\.input"),
    ],
)
def test_what_is_no_session_is_refused_with_its_line(file, text, message):
    file.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_miniswe(file)
    with pytest.raises(TraceError, match="can't be read"):
        read_miniswe(file / "absent")
