"""How model families write tool calls and reasoning: the one table, for the parser and for the grammars.

A format is chosen by what the model's chat template says (`markers`), or by a name of vLLM's (``--tool-call-parser``,
``--reasoning-parser``). A new family is one more entry. Text between the parts of a call is what the family's own
template writes, so a call that a grammar enforces is rendered to the same text next turn.
"""

from typing import TypeVar

import msgspec

from dualpath.spec.registry import UnknownNameError


class TaggedParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments as one tagged text for each parameter: strings as they are, everything else as JSON.

    `before` stands before the parameter's name, `as_text` between it and a value that is a string, `after` after that.
    """

    before: str
    as_text: str
    after: str
    tag: str
    """Regular expression of all that stands before the value, with group `key`."""
    end: str
    """What ends the value."""
    as_json: str = ""
    """Stands between the name and any other value; empty: `as_text` does."""
    padded: bool = False
    """A line break before the value and one after it are not part of it."""


class CallFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A call is `opening`, the name, `naming`, the arguments, `closing`; a message has `begin`, calls, `end`."""

    names: tuple[str, ...]
    markers: tuple[str, ...]
    """All of these stand in the template of such a model."""
    begin: str = ""
    opening: str
    naming: str
    indexed: bool = False
    """The name is followed by ``:`` and the call's number, and the two are the call's id."""
    closing: str
    separator: str = ""
    end: str = ""
    parameters: TaggedParameters | None = None
    """None: the arguments are one JSON object."""
    parallel: bool = True
    """False: the family writes at most one call in a message."""
    opener: str
    """Regular expression of what starts a call."""
    only_first: bool = False
    """A call starts only where a message does: its opener is ordinary text elsewhere."""
    instead: bool = False
    """A message is content or a call, not both."""
    header: str
    """Regular expression from the opener to the arguments, with groups `name` and, if the model gives one, `id`."""
    object_start: str = ""
    """Regular expression of a call that is one object with the name anywhere in it."""
    closer: str
    """Regular expression of what ends a call; white space and ``}`` may come before."""
    noise: str = ""
    """Regular expression of markers that are neither content nor the start of a call."""


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Reasoning is what stands between `open` and `close`; the template may have written `open` already."""

    names: tuple[str, ...]
    markers: tuple[str, ...]
    open: str
    close: str
    anywhere: bool = False
    """False: only a message's start is reasoning; `open` later is ordinary text."""
    after: str = ""
    """What the model writes after `close`, whatever comes next; before content it writes `content`."""
    content: str = ""
    noise: str = ""  # as a call's


_OBJECT = r'\s*\{\s*"(?:name|arguments|parameters|type|id)"'
_OBJECT_HEADER = r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL, _DEEPSEEK_CALL_END, _DEEPSEEK_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_DEEPSEEK_NOISE = rf"\s*(?:{_DEEPSEEK_BEGIN}|{_DEEPSEEK_END})"
_GLM_HEADER = r"<tool_call>\s*(?P<name>[^<\s]+)\s*(?=<)"
_LLAMA = r"(?:;\s*)?(?:<\|python_tag\|>)?"
_DSML = "<｜DSML｜"
_ARG_TAG = r"\s*<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>"

CALL_FORMATS = (
    CallFormat(
        names=("qwen3_coder", "qwen3_xml"),
        markers=("<tool_call>", "<function=", "<parameter="),
        opening="<tool_call>\n<function=",
        naming=">\n",
        closing="</function>\n</tool_call>",
        separator="\n",
        parameters=TaggedParameters(
            before="<parameter=",
            as_text=">\n",
            after="\n</parameter>\n",
            tag=r"\s*<parameter=(?P<key>[^>\n]+)>",
            end="</parameter>",
            padded=True,
        ),
        opener=r"<tool_call>|<function=",
        header=r"(?:<tool_call>)?\s*<function=(?P<name>[^>\n]+)>",
        closer=r"</function>(?:\s*</tool_call>)?",
        noise=r"\s*</tool_call>",
    ),
    CallFormat(
        names=("glm47",),
        markers=("{function-name}<arg_key>", "<arg_value>"),
        opening="<tool_call>",
        naming="",
        closing="</tool_call>",
        parameters=TaggedParameters(
            before="<arg_key>",
            as_text="</arg_key><arg_value>",
            after="</arg_value>",
            tag=_ARG_TAG,
            end="</arg_value>",
        ),
        opener=r"<tool_call>",
        header=_GLM_HEADER,
        closer=r"</tool_call>",
    ),
    CallFormat(
        names=("glm45",),
        markers=("<tool_call>", "<arg_key>", "<arg_value>"),
        opening="<tool_call>",
        naming="\n",
        closing="</tool_call>",
        separator="\n",
        parameters=TaggedParameters(
            before="<arg_key>",
            as_text="</arg_key>\n<arg_value>",
            after="</arg_value>\n",
            tag=_ARG_TAG,
            end="</arg_value>",
        ),
        opener=r"<tool_call>",
        header=_GLM_HEADER,
        closer=r"</tool_call>",
    ),
    CallFormat(
        names=("deepseek_v32",),
        markers=(f"{_DSML}function_calls", f"{_DSML}invoke"),
        begin=f"{_DSML}function_calls>\n",
        opening=f'{_DSML}invoke name="',
        naming='">\n',
        closing="</｜DSML｜invoke>\n",
        end="</｜DSML｜function_calls>",
        parameters=TaggedParameters(
            before=f'{_DSML}parameter name="',
            as_text='" string="true">',
            as_json='" string="false">',
            after="</｜DSML｜parameter>\n",
            tag=rf'\s*{_DSML}parameter\s+name="(?P<key>[^"\n]+)"(?:\s+string="\w+")?\s*>',
            end="</｜DSML｜parameter>",
        ),
        opener=f"{_DSML}invoke",
        header=rf'{_DSML}invoke name="(?P<name>[^"\n]+)"\s*>',
        closer=r"</｜DSML｜invoke>",
        noise=r"\s*</?｜DSML｜function_calls>",
    ),
    CallFormat(
        names=("deepseek_v3", "deepseek_r1"),
        markers=(_DEEPSEEK_CALL, _DEEPSEEK_SEP, "```json"),
        begin=_DEEPSEEK_BEGIN,
        opening=f"{_DEEPSEEK_CALL}function{_DEEPSEEK_SEP}",
        naming="\n```json\n",
        closing=f"\n```{_DEEPSEEK_CALL_END}",
        separator="\n",
        end=_DEEPSEEK_END,
        opener=_DEEPSEEK_CALL,
        header=rf"{_DEEPSEEK_CALL}\w*{_DEEPSEEK_SEP}(?P<name>[^\n]+?)\s*\n```json\n",
        closer=rf"(?:\s*```)?\s*{_DEEPSEEK_CALL_END}",
        noise=_DEEPSEEK_NOISE,
    ),
    CallFormat(
        names=("deepseek_v31",),
        markers=(_DEEPSEEK_CALL, _DEEPSEEK_SEP),
        begin=_DEEPSEEK_BEGIN,
        opening=_DEEPSEEK_CALL,
        naming=_DEEPSEEK_SEP,
        closing=_DEEPSEEK_CALL_END,
        end=_DEEPSEEK_END,
        opener=_DEEPSEEK_CALL,
        header=rf"{_DEEPSEEK_CALL}\s*(?P<name>[^\s<]+)\s*{_DEEPSEEK_SEP}",
        closer=_DEEPSEEK_CALL_END,
        noise=_DEEPSEEK_NOISE,
    ),
    CallFormat(
        names=("kimi_k2",),
        markers=("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
        begin="<|tool_calls_section_begin|>",
        opening="<|tool_call_begin|>functions.",
        naming="<|tool_call_argument_begin|>",
        indexed=True,
        closing="<|tool_call_end|>",
        end="<|tool_calls_section_end|>",
        opener=r"<\|tool_call_begin\|>",
        header=r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^\s<:]+)(?::\d+)?)\s*"
        r"<\|tool_call_argument_begin\|>",
        closer=r"<\|tool_call_end\|>",
        noise=r"\s*<\|tool_calls_section_(?:begin|end)\|>",
    ),
    CallFormat(
        names=("openai", "gpt_oss"),
        markers=("<|channel|>", "<|message|>", "to=functions."),
        opening="<|channel|>commentary to=functions.",
        naming=" <|constrain|>json<|message|>",
        closing="",
        parallel=False,
        instead=True,
        opener=r"<\|channel\|>commentary\s+to=|\s+to=functions\.",
        header=r"(?:<\|channel\|>commentary)?\s+to=functions\.(?P<name>[^\s<]+)(?:<\|channel\|>commentary)?"
        r"\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>",
        closer=r"<\|call\|>",
    ),
    CallFormat(
        names=("hermes", "qwen25"),
        markers=("<tool_call>", "arguments"),
        opening='<tool_call>\n{"name": "',
        naming='", "arguments": ',
        closing="}\n</tool_call>",
        separator="\n",
        opener=r"<tool_call>",
        header=r"<tool_call>" + _OBJECT_HEADER,
        object_start=r"<tool_call>" + _OBJECT,
        closer=r"</tool_call>",
    ),
    CallFormat(
        names=("llama3_json", "llama4_json"),
        markers=("<|start_header_id|>", '"parameters"'),
        opening='{"name": "',
        naming='", "parameters": ',
        closing="}",
        parallel=False,
        opener=_LLAMA + r'\s*\{(?=\s*")',
        only_first=True,
        instead=True,
        header=_LLAMA + _OBJECT_HEADER,
        object_start=_LLAMA + _OBJECT,
        closer=r"\}",
    ),
)

REASONING_FORMATS = (
    ReasoningFormat(
        names=("openai_gptoss", "gpt_oss"),
        markers=("<|channel|>analysis", "<|message|>"),
        open="<|channel|>analysis<|message|>",
        close="<|end|>",
        anywhere=True,
        after="<|start|>assistant",
        content="<|channel|>final<|message|>",
        noise=r"<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>\w+)?<\|message\|>"
        r"|<\|end\|>|<\|start\|>assistant",
    ),
    ReasoningFormat(
        names=("qwen3", "deepseek_r1", "deepseek_v3", "glm45", "kimi_k2"),
        markers=("</think>",),
        open="<think>",
        close="</think>",
    ),
)


Format = TypeVar("Format", CallFormat, ReasoningFormat)


def _find(table: tuple[Format, ...], kind: str, name: str | None, template: str) -> Format | None:
    if name == "none":
        return None
    if name is not None:
        for entry in table:
            if name in entry.names:
                return entry
        known = ", ".join(known for entry in table for known in entry.names)
        raise UnknownNameError(f"unknown {kind} {name!r}; choose from {known}, or none")
    return next((entry for entry in table if all(marker in template for marker in entry.markers)), None)


def find_call_format(name: str | None, template: str) -> CallFormat | None:
    """Returns the format called `name`, or without a name the one that `template` describes; None: there is none.

    Raises UnknownNameError (a ValueError) for a name that is not in the table.
    """
    return _find(CALL_FORMATS, "tool call parser", name, template)


def find_reasoning_format(name: str | None, template: str) -> ReasoningFormat | None:
    """As `find_call_format`, for reasoning."""
    return _find(REASONING_FORMATS, "reasoning parser", name, template)
