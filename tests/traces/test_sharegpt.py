import json

import pytest

from dualpath.traces.reading import ReadOptions, TraceError
from dualpath.traces.sharegpt import read_sharegpt
from dualpath.traces.trajectory import Round


def said(speaker, tokens):
    return {"from": speaker, "value": "x" * 4 * tokens}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "sharegpt.json"


def test_a_conversation_of_people_models_and_tools(file):
    every = [
        {"id": "QWJhYvA_0", "conversations": [said("human", 5), said("gpt", 3), said("human", 2), said("gpt", 7)]},
        {
            "conversations": [
                said("system", 9),
                said("human", 1),
                said("function_call", 4),
                said("observation", 6),
                said("gpt", 2),
            ]
        },
    ]
    for text in (json.dumps(every), json.dumps(every, indent=2), "\n".join(map(json.dumps, every))):
        file.write_text(text)
        one, two = read_sharegpt(file)
        assert (one.id, two.id) == ("QWJhYvA_0", "conversation-00001")
        assert one.rounds == (Round(append_tokens=5, generate_tokens=3), Round(append_tokens=2, generate_tokens=7))
        assert two.rounds == (Round(append_tokens=10, generate_tokens=4), Round(append_tokens=6, generate_tokens=2))


def test_openings_of_the_model_are_context_and_conversations_without_a_question_are_left_out(file):
    opening = {"conversations": [said("gpt", 3), said("human", 2), {"from": "gpt", "value": None}]}
    file.write_text(json.dumps([{"conversations": []}, {"conversations": [said("gpt", 3)]}, opening]))
    (one,) = read_sharegpt(file)
    assert one.rounds == (Round(append_tokens=5, generate_tokens=1),)


def test_tokens_are_counted_as_the_options_say(file):
    file.write_text(json.dumps([{"conversations": [said("human", 5), said("gpt", 3)]}]))
    (one,) = read_sharegpt(file, ReadOptions(count_tokens=len))
    assert one.rounds == (Round(append_tokens=20, generate_tokens=12),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"conversations": [{"from": "human"}]}]',
            r"missing .* `value` - at `\$\[0\]\.conversations\[0\]",
        ),
        ('[{"conversations": [{"value": "x"}]}]', r"missing required field `from`"),
        ('[{"conversations": []},\n {"conversations": [\n', "line 2: not a ShareGPT conversation: .*truncated"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(file, text, message):
    file.write_text(text)
    with pytest.raises(TraceError, match=rf"sharegpt\.json: .*{message}"):
        read_sharegpt(file)
