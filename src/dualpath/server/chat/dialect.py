"""How the served model chats: its template, its formats of calls and reasoning, and what they make of a request."""

from typing import Any

import msgspec

from dualpath.server.chat.enforcement import GrammarChecker, GrammarError
from dualpath.server.chat.formats import CallFormat, ReasoningFormat, find_call_format, find_reasoning_format
from dualpath.server.chat.grammars import GrammarWriter, UnwritableError
from dualpath.server.chat.parsing import ReadingPlan
from dualpath.server.chat.schemas import value_types
from dualpath.server.chat.structured import Structure, structure
from dualpath.server.chat.template import ChatTemplate
from dualpath.server.chat.tools import ToolUse, tool_use
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.protocol import ChatRequest, GenerationRequest

_NO_TOOLS = ToolUse([], "none")


class Dialect:
    """One model's. `tool_call_parser` and `reasoning_parser` name formats, instead of what the template says.

    Raises UnknownNameError (a ValueError) for a name that is not in the table.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, tool_call_parser: str | None = None, reasoning_parser: str | None = None
    ) -> None:
        self.template = ChatTemplate(tokenizer)
        self.calls = find_call_format(tool_call_parser, self.template.text)
        self.reasoning = find_reasoning_format(reasoning_parser, self.template.text)
        named = tool_call_parser is not None or reasoning_parser is not None
        self._response_template = None if named else getattr(tokenizer, "response_template", None)
        self._grammars = GrammarChecker(tokenizer, vocab_size)
        self._hidden = _hidden_tokens(tokenizer, self.calls, self.reasoning)

    def close(self) -> None:
        """End the process that compiles grammars, if there is one."""
        self._grammars.close()

    def tool_use(self, asked: ChatRequest) -> ToolUse:
        """Returns what the request says of tools. Raises ApiError (400), also where this model can't use them."""
        use = tool_use(asked)
        if use.offered and not self.template.knows_tools:
            raise bad_parameter(
                "tools",
                "this model's chat template does not show tools to the model; serve a model whose template does, or "
                'send tool_choice: "none"',
                code="unsupported_parameter",
            )
        readable = self.calls is not None or (self._response_template is not None and use.mode == "auto")
        if use.offered and not readable:
            raise bad_parameter(
                "tools",
                "it is not known how this model writes tool calls; start the server with --tool-call-parser NAME",
                code="unsupported_parameter",
            )
        return use

    def reading(self, asked: ChatRequest, use: ToolUse, prompt_end: str) -> ReadingPlan | None:
        """Returns how to read the answer; None: all of it is content. `prompt_end` is the end of the prompt's text."""
        calls = self.calls if use.offered else None
        template = self._response_template
        if calls is None and self.reasoning is None and template is None:
            return None
        hides = asked.skip_special_tokens is not False and template is None
        return ReadingPlan(
            calls=calls,
            reasoning=self.reasoning,
            reasoning_open=_opened(self.reasoning, prompt_end, bool(asked.continue_final_message)),
            reasoning_closed=self.reasoning is not None and prompt_end.rstrip().endswith(self.reasoning.close),
            include_reasoning=asked.include_reasoning is not False,
            parallel=asked.parallel_tool_calls is not False,
            named=use.named,
            required=use.mode == "required",
            types={one.name: value_types(one.parameters) for one in use.functions} if calls else {},
            hidden_token_ids=self._hidden if hides else frozenset(),
            template=template,
            prompt_end=prompt_end,
            tools=[msgspec.to_builtins(tool) for tool in asked.tools or []] if template is not None else [],
        )

    async def grammar(self, asked: GenerationRequest, use: ToolUse = _NO_TOOLS, plan: ReadingPlan | None = None) -> str:
        """Returns the grammar that the answer is held to; empty: none. Raises ApiError (400) that names the field."""
        form = structure(asked)
        if form is not None and use.mode == "required":
            raise bad_parameter(
                form.param.split(".")[0], "an answer's form and a required tool call exclude each other"
            )
        strict = use.offered and (use.mode == "required" or any(one.strict for one in use.functions))
        if form is None and not strict:
            return ""
        plan = plan or ReadingPlan()
        try:
            await self._grammars.start()
            grammar = _grammar(GrammarWriter(self._grammars.split), form, use, plan)
            await self._grammars.check(grammar)
        except (GrammarError, UnwritableError, RecursionError) as error:
            raise await self._located(asked, form, use, plan, error) from None
        return grammar

    async def _located(
        self, asked: GenerationRequest, form: Structure | None, use: ToolUse, plan: ReadingPlan, why: Exception
    ) -> ApiError:
        """Returns the error for a grammar that can't be compiled, with the field whose own grammar can't."""
        parts: list[tuple[str, Structure | None, ToolUse]] = [] if form is None else [(form.param, form, _NO_TOOLS)]
        parts += [
            (f"tools[{place}].function.parameters", None, ToolUse([tool.function], "required"))
            for place, tool in enumerate(getattr(asked, "tools", None) or ())
            if tool.function in use.functions and (use.mode == "required" or tool.function.strict)
        ]
        for param, own_form, own_use in parts:
            try:
                await self._grammars.check(_grammar(GrammarWriter(self._grammars.split), own_form, own_use, plan))
            except (GrammarError, UnwritableError, RecursionError) as error:
                return bad_parameter(param, f"{param} can't be enforced: {error}")
        return bad_parameter(parts[0][0], f"the answer's form can't be enforced: {why}")


def _grammar(writer: GrammarWriter, form: Structure | None, use: ToolUse, plan: ReadingPlan) -> str:
    answer = None if form is None else writer.content(plan.reasoning, form.expression(writer))
    calls = None
    if use.offered and plan.calls is not None:
        if use.mode == "required":
            calls = writer.calls(plan.calls, use.parameters(), plan.parallel and not plan.named)
        elif answer is not None:
            calls = writer.calls(plan.calls, use.parameters(only_strict=True), plan.parallel)
        else:
            tools = use.parameters(only_strict=True)
            calls = writer.text_and_calls(plan.calls, plan.reasoning, tools, plan.parallel)
    body = " | ".join(part for part in (answer, calls) if part)
    reasoning = None if plan.reasoning_closed else plan.reasoning
    return writer.text(writer.after_reasoning(reasoning, plan.reasoning_open, writer.rule(body))) if body else ""


def _opened(form: ReasoningFormat | None, prompt_end: str, going_on: bool) -> bool:
    if form is None:
        return False
    if going_on:
        return prompt_end.rfind(form.open) > prompt_end.rfind(form.close)
    return prompt_end.rstrip().endswith(form.open)


def _hidden_tokens(tokenizer: Any, *formats: CallFormat | ReasoningFormat | None) -> frozenset[int]:
    """Returns the special tokens that are no marker of the formats, and so no text of an answer."""
    used = "".join(str(msgspec.to_builtins(form)) for form in formats if form is not None).replace("\\", "")
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(token for token, text in special.items() if text not in used)
