"""Requests of clients: OpenAI's request bodies with vLLM's extensions, as msgspec records.

Every field may be null, which means "not given". Unknown fields are ignored, as in vLLM. `_NEUTRAL` lists the fields
that would change the answer and are not supported, with the values that change nothing; any other value is refused.
"""

import re
from typing import Any, TypeVar

import msgspec

from dualpath.server.errors import ApiError, bad_parameter
from dualpath.spec.sampling import LogprobsMode

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class GenerationRequest(msgspec.Struct, kw_only=True):
    """Fields that completions and chats share. Documented in docs/how-to/openai-api.md."""

    model: str | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None
    cache_salt: str | None = None
    structured_outputs: "StructuredOutputs | None" = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/completions. `prompt` is one text, one list of token ids, or a list of either."""

    prompt: msgspec.Raw
    logprobs: int | None = None
    echo: bool | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One message. `content` is a text or a list of parts, of which only text parts are supported."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: str
    function: FunctionTool


class FunctionName(msgspec.Struct):
    name: str


class NamedToolChoice(msgspec.Struct):
    type: str
    function: FunctionName


class ResponseFormat(msgspec.Struct, omit_defaults=True):
    """`type` is text, json_object, or json_schema with a `json_schema` {name, schema, strict}."""

    type: str
    json_schema: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, omit_defaults=True):
    """vLLM's structured_outputs: one of the four."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of /v1/chat/completions. The other chat APIs are translated into this record."""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of /tokenize: a `prompt` or chat `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=msgspec.Struct)
_FIELD = re.compile(r"(?:at|in) `\$\.(\w+)|required field `(\w+)`")


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """Parse a request body. Raises ApiError (400) that names the field at fault, if any."""
    try:
        record = msgspec.json.decode(body, type=kind)
        if issubclass(kind, GenerationRequest):
            fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            if kind is CompletionRequest:
                fields.pop("echo", None)  # the one field of these that completions have and chats don't
            _refuse_unsupported(fields)
    except msgspec.ValidationError as error:
        match = _FIELD.search(str(error))
        param = (match[1] or match[2]) if match else None
        raise ApiError(400, f"the request body is invalid: {error}", code="invalid_value", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    return record


def decode_prompts(raw: msgspec.Raw) -> list[str] | list[list[int]]:
    """Returns the prompts of a completion, at least one: texts, or lists of token ids. Raises ApiError (400)."""
    text = bytes(raw)
    inner = text[1:].lstrip(b" \t\r\n")[:1] if text[:1] == b"[" else b""
    try:
        if text[:1] == b'"':
            return [msgspec.json.decode(text, type=str)]
        if inner == b'"':
            return msgspec.json.decode(text, type=list[str])
        if inner == b"[":
            return msgspec.json.decode(text, type=list[list[int]])
        return [msgspec.json.decode(text, type=list[int])]
    except msgspec.ValidationError as error:
        raise bad_parameter(
            "prompt", f"prompt must be a text, a list of token ids, or a list of either: {error}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # decoding the body did not look inside
        raise _malformed(error) from None


def _malformed(error: Exception) -> ApiError:
    return ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json")


def _refuse_unsupported(fields: dict[str, msgspec.Raw]) -> None:
    for name in _NEUTRAL.keys() & fields.keys():
        value = msgspec.json.decode(fields[name])
        if value is not None and value not in _NEUTRAL[name]:
            raise bad_parameter(
                name, f"{name} is not supported by this server; leave it out", code="unsupported_parameter"
            )
