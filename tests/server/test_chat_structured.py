"""Answers of a given form: response_format and structured_outputs, on both endpoints, and what can't be enforced."""

import json
import re
from typing import Any

import jsonschema
import psutil
import pytest
from fake_cluster import TOKENIZER, byte_tokenizer, running_server, says
from openai import BadRequestError
from test_chat_tools import HELLO, MODEL, WEATHER, Roomy, client, obeys

from dualpath.cluster.generator import RequestError

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
LARK = 'start: "a" b\nb: "b" | "c"'
GBNF = 'root ::= "a" b\nb ::= "b" | "c"'

ENDLESS = {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"response_format": SCHEMA}, lambda text: isinstance(json.loads(text)["x"], int)),
        ({"structured_outputs": {"json": POINT}}, lambda text: isinstance(json.loads(text)["x"], int)),
        ({"structured_outputs": {"json": json.dumps(POINT)}}, lambda text: isinstance(json.loads(text)["x"], int)),
        ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"regex": r"[a-c]{2}/\d\n"}}, lambda text: re.fullmatch(r"[a-c]{2}/\d\n", text)),
        ({"structured_outputs": {"choice": ["yes", "né \"o\"\n"]}}, lambda text: text in ("yes", 'né "o"\n')),
        ({"structured_outputs": {"grammar": LARK}}, lambda text: text in ("ab", "ac")),
        ({"structured_outputs": {"grammar": GBNF}}, lambda text: text in ("ab", "ac")),
    ],
)  # fmt: skip
def test_every_form_is_enforced_on_chats_and_completions(options: Any, fits: Any) -> None:
    cluster = Roomy(obeys)
    with running_server(cluster) as url:
        for seed in range(3):
            chat = client(url).chat.completions.create(model="tiny", messages=HELLO, extra_body=options, seed=seed)
            text = client(url).completions.create(model="tiny", prompt="x", extra_body=options, seed=seed)
            assert fits(chat.choices[0].message.content)
            assert fits(text.choices[0].text)


def test_no_form_leaves_the_answer_free() -> None:
    cluster = Roomy(says("ok"))
    with running_server(cluster) as url:
        for options in ({"response_format": {"type": "text"}}, {"structured_outputs": None}):
            client(url).chat.completions.create(model="tiny", messages=HELLO, extra_body=options)
    assert [request.sampling.grammar for request in cluster.requests] == ["", ""]


def test_tools_and_a_form_leave_the_model_the_choice() -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": POINT, "strict": True}}]
    cluster = Roomy(obeys)
    calls = answers = 0
    with running_server(cluster) as url:
        for seed in range(12):
            answer = client(url).chat.completions.create(
                model="tiny", messages=HELLO, tools=tools, response_format=SCHEMA, seed=seed
            )
            message = answer.choices[0].message
            for call in message.tool_calls or []:
                assert call.type == "function" and isinstance(json.loads(call.function.arguments)["x"], int)
            calls += bool(message.tool_calls)
            answers += message.content is not None and isinstance(json.loads(message.content)["x"], int)
    assert calls and answers and calls + answers == 12


@pytest.mark.parametrize(
    ("options", "param", "says_why"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format.type", "must be text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "must be a JSON schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}},
            "response_format.json_schema.schema",
            "Unimplemented keys",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": {"type": 3}}}, "structured_outputs.json", "can't be enforced"),
        ({"structured_outputs": {"json": {"$ref": "#/$defs/none"}}}, "structured_outputs.json", "can't be enforced"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "can't be enforced"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "neither Lark nor GBNF"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of them"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": SCHEMA}, "structured_outputs", "exclude"),
        ({"guided_json": POINT}, "guided_json", "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs", "has none of json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "has none of json"),
        ({"structured_outputs": {"jsn": POINT}}, "structured_outputs", "unknown field `jsn`"),
        ({"structured_outputs": {"json": ENDLESS}}, "structured_outputs.json", "no text can begin: NoExtensionBias$"),
        ({"structured_outputs": {"json": {"pattern": "(["}}}, "structured_outputs.json", r"\(\[ error: .*class$"),
        ({"structured_outputs": {"json": {"pattern": "(?=a)"}}}, "structured_outputs.json", "look-ahead .*supported$"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs.regex", "longer than"),
    ],
)  # fmt: skip
def test_what_cant_be_enforced_is_refused_with_its_place(options: Any, param: str, says_why: str) -> None:
    cluster = Roomy(says("ok"))
    with running_server(cluster) as url:
        for ask in (
            lambda: client(url).chat.completions.create(model="tiny", messages=HELLO, extra_body=options),
            lambda: client(url).completions.create(model="tiny", prompt="x", extra_body=options),
        ):
            with pytest.raises(BadRequestError, match=says_why) as caught:
                ask()
            assert caught.value.param == param
    assert cluster.requests == []


def test_a_grammar_that_an_engine_cant_follow_is_named() -> None:
    refused = RequestError(400, "invalid_value", "the grammar can't be followed: too many expressions")
    with running_server(Roomy(lambda request: [refused])) as url:
        with pytest.raises(BadRequestError, match="regex can't be enforced: the grammar can't be followed") as caught:
            client(url).completions.create(model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "a"}})
        assert caught.value.param == "structured_outputs.regex"
        with pytest.raises(BadRequestError) as caught:
            client(url).chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required")
        assert caught.value.param == "tools"


LARGE = 2**53 + 1


@pytest.mark.parametrize(
    ("schema", "says_where"),
    [
        ({"const": LARGE}, f"const has {LARGE}"),
        ({"properties": {"a": {"enum": [1, {"b": [LARGE]}]}}}, rf"properties\.a\.enum has {LARGE}"),
        ({"properties": {"const": {"type": "integer", "minimum": LARGE}}}, r"properties\.const\.minimum is"),
        ({"anyOf": [{}, {"type": "integer", "minimum": 10**22}]}, r"anyOf\[1\]\.minimum is 1"),
        ({"items": {"type": "integer", "maximum": -(2**63)}}, r"items\.maximum is -9"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum is 9"),
        ({"type": "integer", "multipleOf": LARGE}, "multipleOf is 9"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.001}, "exclusiveMinimum is 0.*shorter than 1"),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, "exclusiveMaximum is -1.*shorter than 1"),
    ],
)
def test_numbers_that_would_be_enforced_as_others_are_refused(schema: Any, says_where: str) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    with running_server(Roomy(obeys)) as url, pytest.raises(BadRequestError, match=says_where) as caught:
        client(url).completions.create(model="tiny", prompt="x", extra_body={"response_format": form})
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**60},
        {"type": "integer", "minimum": 2**60, "maximum": 2**63 - 1},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 3},
        {"type": "object", "properties": {"minimum": {"default": LARGE, "const": 5}}, "required": ["minimum"]},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
        {"enum": [True, None, "9007199254740993", 0.1]},
    ],
)
def test_numbers_that_can_be_kept_are(schema: Any) -> None:
    with running_server(Roomy(obeys)) as url:
        for seed in range(3):
            answer = client(url).completions.create(
                model="tiny", prompt="x", seed=seed, extra_body={"structured_outputs": {"json": schema}}
            )
            jsonschema.validate(json.loads(answer.choices[0].text), schema)


def test_a_schema_that_would_compute_for_ever_is_refused_and_harms_nobody() -> None:
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}$"} for i in range(30, 60)]
    with running_server(Roomy(obeys)) as url:
        ask = client(url).chat.completions.create
        with pytest.raises(BadRequestError, match="too much time or memory") as caught:
            ask(model="tiny", messages=HELLO, extra_body={"structured_outputs": {"json": {"allOf": patterns}}})
        assert caught.value.param == "structured_outputs.json"
        answer = ask(model="tiny", messages=HELLO, extra_body={"structured_outputs": {"choice": ["yes"]}})
        assert answer.choices[0].message.content == "yes"


def test_no_process_is_left_when_the_server_has_stopped() -> None:
    def workers() -> int:
        return sum(is_worker(child) for child in psutil.Process().children(recursive=True))

    def is_worker(child: psutil.Process) -> bool:
        try:
            return "grammar_worker" in " ".join(child.cmdline())
        except psutil.NoSuchProcess:  # a zombie is one: others' children, of earlier tests, may end just now
            return False

    before = workers()
    with running_server(Roomy(obeys)) as url:
        client(url).chat.completions.create(model="tiny", messages=HELLO, response_format=SCHEMA)
        assert workers() == before + 1
    assert workers() == before


def test_grammars_are_refused_where_the_tokenizer_can_have_none() -> None:
    class Slow:
        """The byte tokenizer without its fast form."""

        backend_tokenizer = None

        def __init__(self) -> None:
            self._fast = byte_tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fast, name)

    with running_server(Roomy(says("ok")), Slow()) as url:
        with pytest.raises(BadRequestError, match="no fast form") as caught:
            client(url).chat.completions.create(model="tiny", messages=HELLO, response_format=SCHEMA)
        assert caught.value.param == "response_format.json_schema.schema"
        assert client(url).chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == "ok"


def reasoning_tokenizer() -> Any:
    """ChatML whose template can open reasoning, close it, or leave it to the model, as Qwen's and DeepSeek's do."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += (
        "{% if add_generation_prompt and thinking %}{{ '<think>\\n' }}{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("kwargs", "start"),
    [({"thinking": True}, "Hm.</think>"), ({}, "<think>Hm.</think>"), ({"enable_thinking": False}, "")],
)
def test_the_form_holds_after_reasoning(kwargs: Any, start: str) -> None:
    def script(request: Any) -> Any:
        text = TOKENIZER.decode(MODEL.draw(request.sampling.grammar, request.sampling.seed, start))
        return says(text)(request)

    with running_server(Roomy(script), reasoning_tokenizer()) as url:
        answer: Any = client(url).chat.completions.create(
            model="tiny",
            messages=HELLO,
            response_format=SCHEMA,
            seed=1,
            extra_body={"chat_template_kwargs": kwargs},
        )
    message = answer.choices[0].message
    assert isinstance(json.loads(message.content)["x"], int)
    assert getattr(message, "reasoning", None) == ("Hm." if start else None)
    assert getattr(message, "reasoning_content", None) == ("Hm." if start else None)


def test_reasoning_is_streamed_apart_and_can_be_left_out() -> None:
    cluster = Roomy(says("<think>\nHm,\nwell.\n</think>\n\nYes."))
    with running_server(cluster, reasoning_tokenizer()) as url:
        ask = client(url).chat.completions.create
        deltas: list[Any] = [chunk.choices[0].delta for chunk in ask(model="tiny", messages=HELLO, stream=True)]
        bare: Any = ask(model="tiny", messages=HELLO, extra_body={"include_reasoning": False})
        effort = ask(model="tiny", messages=HELLO, reasoning_effort="none")
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "Hm,\nwell."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert not hasattr(bare.choices[0].message, "reasoning") and bare.choices[0].message.content == "Yes."
    assert effort.choices[0].message.content == "Yes."
    assert TOKENIZER.decode(cluster.requests[2].prompt_token_ids).endswith("</think>\n\n")


def test_a_turn_that_goes_on_inside_reasoning() -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "<think>\nHm"}]
    with running_server(Roomy(says(", yes.</think>Done")), reasoning_tokenizer()) as url:
        answer: Any = client(url).chat.completions.create(
            model="tiny", messages=messages, extra_body={"continue_final_message": True}
        )
    assert (answer.choices[0].message.reasoning, answer.choices[0].message.content) == (", yes.", "Done")
