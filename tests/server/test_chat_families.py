"""Whatever a grammar of calls lets a model write, the parser reads it back: known names, arguments that are valid."""

import asyncio
import functools
import json
import random
from typing import Any

import jsonschema
import pytest
from fake_cluster import byte_tokenizer
from masked_model import MaskedModel
from schemas_at_random import random_parameters

from dualpath.server.chat.deltas import Message, fold
from dualpath.server.chat.dialect import Dialect
from dualpath.server.chat.formats import CALL_FORMATS, REASONING_FORMATS
from dualpath.server.chat.parsing import ChatParser, ReadingPlan
from dualpath.server.chat.tools import ToolUse
from dualpath.server.errors import ApiError
from dualpath.server.protocol import ChatRequest, FunctionTool, Tool

FAMILIES = [form.names[0] for form in CALL_FORMATS]
MARKERS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>",
    "<|constrain|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>", "｜DSML｜",
]  # fmt: skip


def marker_tokenizer() -> Any:
    """The byte tokenizer, with every family's markers as tokens of their own."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(MARKERS)
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer(), "markers": marker_tokenizer()}
MODELS = {name: MaskedModel(tokenizer, 320) for name, tokenizer in TOKENIZERS.items()}


@functools.cache
def dialect_of(family: str, tokenizer: str) -> Dialect:
    reasoning = "openai_gptoss" if family == "openai" else "qwen3"
    return Dialect(TOKENIZERS[tokenizer], 320, family, reasoning)


def drawn_message(
    family: str, tokenizer: str, use: ToolUse, plan: ReadingPlan, seed: int, start: str = ""
) -> tuple[str, Message]:
    """Returns the text that the masked model writes, and the message that the parser reads, in random pieces."""
    dialect = dialect_of(family, tokenizer)
    grammar = asyncio.run(dialect.grammar(ChatRequest(messages=[]), use, plan))
    tokens = MODELS[tokenizer].draw(grammar, seed, start)
    text = TOKENIZERS[tokenizer].backend_tokenizer.decode(tokens, skip_special_tokens=False)
    parser, deltas, drawn, at = ChatParser(plan), [], random.Random(seed), 0
    while at < len(text):
        size = drawn.choice((1, 1, 2, 5, 40))
        deltas += parser.push(text[at : at + size])
        at += size
    return text, fold([*deltas, *parser.finish()])


def plan_of(family: str, **options: Any) -> ReadingPlan:
    dialect = dialect_of(family, "bytes")
    return ReadingPlan(calls=dialect.calls, reasoning=dialect.reasoning, **options)


def functions(seed: int) -> list[FunctionTool]:
    drawn = random.Random(seed)
    return [FunctionTool(name=name, parameters=random_parameters(drawn)) for name in ("get_weather", "b.2", "c-d")]


def with_types(plan: ReadingPlan, tools: list[FunctionTool]) -> ReadingPlan:
    import msgspec

    from dualpath.server.chat.schemas import value_types

    return msgspec.structs.replace(plan, types={tool.name: value_types(tool.parameters) for tool in tools})


def check_calls(text: str, message: Message, tools: list[FunctionTool]) -> None:
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in message.calls:
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, schemas[call.name] or {})
    assert len({call.call_id for call in message.calls}) == len(message.calls) or "functions." in text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_valid_and_nothing_else_is_said(family: str, tokenizer: str, parallel: bool) -> None:
    for seed in range(12):
        tools = functions(seed)
        plan = with_types(plan_of(family, parallel=parallel, reasoning_closed=family != "openai"), tools)
        text, message = drawn_message(family, tokenizer, ToolUse(tools, "required"), plan, seed)
        assert message.calls and (parallel or len(message.calls) == 1), text
        assert message.content is None, text
        check_calls(text, message, tools)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_may_come_first(family: str, tokenizer: str) -> None:
    for seed in range(6):
        tools = functions(seed)
        plan = with_types(plan_of(family, reasoning_open=True), tools)
        text, message = drawn_message(family, tokenizer, ToolUse(tools, "required"), plan, seed)
        assert message.calls and message.content is None, text
        check_calls(text, message, tools)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strict_call_is_valid_wherever_it_starts_in_free_text(family: str, tokenizer: str) -> None:
    form = dialect_of(family, tokenizer).calls
    assert form is not None
    start = ("" if form.instead else "Let me see.\n") + (form.begin or form.opening)
    for seed in range(6):
        tools = [FunctionTool(name="f", parameters=random_parameters(random.Random(seed)), strict=True)]
        plan = with_types(plan_of(family, reasoning_closed=family != "openai"), tools)
        text, message = drawn_message(family, tokenizer, ToolUse(tools, "auto"), plan, seed, start)
        assert message.calls and (form.instead or (message.content or "").startswith("Let me see.")), text
        check_calls(text, message, tools)


TAGGED = [form.names[0] for form in CALL_FORMATS if form.parameters is not None]
OPTIONAL_TEXT: dict[str, Any] = {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}


def with_parameter(schema: Any) -> list[FunctionTool]:
    return [FunctionTool("f", parameters={"type": "object", "properties": {"a": schema}, "required": ["a"]})]


@pytest.mark.parametrize("family", TAGGED)
@pytest.mark.parametrize("schema", [OPTIONAL_TEXT, {"oneOf": [{"enum": ["x", "yes"]}, {"type": "boolean"}]}])
def test_alternatives_of_a_text_are_enforced_in_tagged_formats(family: str, schema: Any) -> None:
    tools = with_parameter(schema)
    plan = with_types(plan_of(family, reasoning_closed=True), tools)
    for seed in range(8):
        text, message = drawn_message(family, "bytes", ToolUse(tools, "required"), plan, seed)
        check_calls(text, message, tools)


@pytest.mark.parametrize("family", TAGGED)
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "string", "not": {"const": "x"}}}},
        {"properties": {"a": {"anyOf": 5}}},
        {"properties": {"a": {"enum": 5, "type": "string"}}},
        {"properties": []},
        {"required": 5},
        {"required": ["a"]},
    ],
)
def test_what_tagged_formats_cant_enforce_is_refused(family: str, parameters: Any) -> None:
    tool = Tool("function", FunctionTool("f", parameters=parameters))
    plan, asked = plan_of(family, reasoning_closed=True), ChatRequest(messages=[], tools=[tool])
    with pytest.raises(ApiError) as caught:
        asyncio.run(dialect_of(family, "bytes").grammar(asked, ToolUse([tool.function], "required"), plan))
    assert (caught.value.status, caught.value.param) == (400, "tools[0].function.parameters")


@pytest.mark.parametrize("family", TAGGED)
def test_a_value_with_the_formats_own_mark_is_refused(family: str) -> None:
    form = dialect_of(family, "bytes").calls
    assert form is not None and form.parameters is not None
    tool = Tool("function", with_parameter({"enum": ["x", f"y{form.parameters.end}z"]})[0])
    asked = ChatRequest(messages=[], tools=[tool])
    with pytest.raises(ApiError, match="own mark"):
        asyncio.run(dialect_of(family, "bytes").grammar(asked, ToolUse([tool.function], "required"), plan_of(family)))


@pytest.mark.parametrize("family", TAGGED)
def test_arguments_that_are_cut_are_the_beginning_of_the_whole(family: str) -> None:
    tools = with_parameter({"type": "string", "minLength": 4, "maxLength": 9})
    plan = with_types(plan_of(family, reasoning_closed=True), tools)
    text, message = drawn_message(family, "bytes", ToolUse(tools, "required"), plan, 1)
    for cut in range(len(text)):
        parser = ChatParser(plan)
        calls = fold([*parser.push(text[:cut]), *parser.finish()]).calls
        assert all(
            whole.arguments.startswith(call.arguments) for whole, call in zip(message.calls, calls, strict=False)
        )


def test_every_format_has_a_name_of_its_own() -> None:
    for table in (CALL_FORMATS, REASONING_FORMATS):
        names = [name for form in table for name in form.names]
        assert len(names) == len(set(names))
