"""What a request says of the answer's form: OpenAI's response_format and vLLM's structured_outputs."""

from typing import Any, Literal

import msgspec

from dualpath.server.chat.grammars import GrammarWriter, UnwritableError
from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import GenerationRequest

_CHOICES = 10_000
_OUTPUTS = ("json", "json_object", "regex", "choice", "grammar")


class Structure(msgspec.Struct, frozen=True):
    """The form that an answer must have, and the field that says so."""

    param: str
    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any

    def expression(self, writer: GrammarWriter) -> str:
        """Returns the form as an expression of `writer`'s grammar. Raises UnwritableError."""
        match self.kind:
            case "json":
                return writer.json(self.value)
            case "regex":
                return writer.regex(self.value)
            case "choice":
                return writer.choice(self.value)
        return writer.lark(_as_lark(self.value))


def structure(asked: GenerationRequest) -> Structure | None:
    """Returns the form that is asked for; None: any text. Raises ApiError (400)."""
    by_format, by_outputs = _of_format(asked), _of_outputs(asked)
    if by_format and by_outputs:
        raise bad_parameter("structured_outputs", "response_format and structured_outputs exclude each other")
    return by_format or by_outputs


def grammar_field(asked: GenerationRequest) -> str:
    """Returns the field that the grammar of a request comes from."""
    form = structure(asked)
    return "tools" if form is None else form.param


def _of_format(asked: GenerationRequest) -> Structure | None:
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Structure("response_format", "json", {"type": "object"})
    if form.type != "json_schema":
        raise bad_parameter(
            "response_format.type",
            f"response_format.type is {form.type!r}; it must be text, json_object or json_schema",
            code="unsupported_parameter",
        )
    schema = (form.json_schema or {}).get("schema")
    param = "response_format.json_schema.schema"
    if not isinstance(schema, dict | bool):
        raise bad_parameter(param, f"{param} must be a JSON schema")
    return Structure(param, "json", schema)


def _of_outputs(asked: GenerationRequest) -> Structure | None:
    outputs = asked.structured_outputs
    if outputs is None:
        return None
    if outputs.structural_tag is not None:
        raise bad_parameter(
            "structured_outputs.structural_tag",
            "structural_tag is not supported; use tools with strict: true, or a grammar",
            code="unsupported_parameter",
        )
    given = [name for name in _OUTPUTS if getattr(outputs, name) not in (None, False)]
    if not given:
        raise bad_parameter("structured_outputs", f"structured_outputs has none of {', '.join(_OUTPUTS)}; give one")
    if len(given) > 1:
        raise bad_parameter("structured_outputs", f"structured_outputs has {' and '.join(given)}; give one of them")
    return _of_output(given[0], getattr(outputs, given[0]))


def _of_output(name: str, value: Any) -> Structure:
    param = f"structured_outputs.{name}"
    if name == "json_object":
        return Structure(param, "json", {"type": "object"})
    if name == "json" and isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad_parameter(param, f"{param} is not valid JSON: {error}") from None
        if not isinstance(value, dict | bool):
            raise bad_parameter(param, f"{param} must be a JSON schema")
    if name == "choice" and not (0 < len(value) <= _CHOICES and all(value)):
        raise bad_parameter(param, f"{param} must be 1 to {_CHOICES} texts, none of them empty")
    return Structure(param, name, value)  # type: ignore[arg-type]


def _as_lark(grammar: str) -> str:
    """Returns a grammar as Lark: it may be Lark already, or GBNF (EBNF), which vLLM's users send."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # the converter raises anything, also plain Exception
        raise UnwritableError(f"it is neither Lark nor GBNF: {error}") from None
