"""Requests of clients: OpenAI's request bodies with vLLM's extensions, as msgspec records.

Every field may be null, which means "not given". Unknown fields are ignored, as in vLLM, except those that would change
the answer: `unsupported` lists them by `api`, and they are refused.
"""

import re
from typing import Any, ClassVar, TypeVar

import msgspec

from dualpath.server.errors import ApiError, bad_parameter, context_exceeded
from dualpath.server.unsupported import refuse_unsupported
from dualpath.spec.sampling import LogprobsMode


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
    response_format: "ResponseFormat | None" = None
    structured_outputs: "StructuredOutputs | None" = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/completions. `prompt` is one text, one list of token ids, or a list of either."""

    api: ClassVar[str] = "completions"

    prompt: msgspec.Raw
    logprobs: int | None = None
    echo: bool | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One message. `content` is a text or a list of parts, of which only text parts are supported."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, omit_defaults=True):
    type: str
    function: FunctionTool | None = None


class FunctionName(msgspec.Struct):
    name: str


class FunctionChoice(msgspec.Struct):
    type: str
    function: FunctionName


class AllowedTools(msgspec.Struct):
    """`mode` is auto or required."""

    mode: str
    tools: list[FunctionChoice]


class NamedToolChoice(msgspec.Struct):
    """`type` is function or allowed_tools, and says which of the two is given."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ResponseFormat(msgspec.Struct, omit_defaults=True):
    """`type` is text, json_object, or json_schema with a `json_schema` {name, schema, strict}."""

    type: str
    json_schema: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """vLLM's structured_outputs: one of the first five. An unknown one is refused: it would leave the answer free."""

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of /v1/chat/completions. The other chat APIs are translated into this record."""

    api: ClassVar[str] = "chats"

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
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
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=msgspec.Struct)
_HALF_CHARACTER = re.compile(
    rb"(?<!\\)(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_FIELD = re.compile(r"(?:at|in) `\$\.(\w+)|required field `(\w+)`")


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """Parse a request body. Raises ApiError (400) that names the field at fault, if any."""
    try:
        record = msgspec.json.decode(body, type=kind)
        if (api := getattr(kind, "api", None)) is not None:
            refuse_unsupported(msgspec.json.decode(body, type=dict[str, msgspec.Raw]), api)
    except msgspec.ValidationError as error:
        match = _FIELD.search(str(error))
        param = (match[1] or match[2]) if match else None
        raise ApiError(400, f"the request body is invalid: {error}", code="invalid_value", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error, body) from None
    for name, value in zip(record.__struct_fields__, msgspec.structs.astuple(record), strict=True):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:  # sums of such may have no decimal form
            raise bad_parameter(name, f"{name} is out of range; it must be between {-(2**63)} and {2**64 - 1}")
    return record


def decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """Returns an object's fields, each as it came. Raises ApiError (400)."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise ApiError(400, "the request body is no JSON object", code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error, body) from None


def decode_prompts(
    raw: msgspec.Raw, most_prompts: int, context_tokens: int, most_tokens: int
) -> list[str] | list[list[int]]:
    """Returns the prompts of a completion, at least one: texts, or lists of token ids.

    Raises ApiError (400), also for more than `most_prompts` prompts, or more than `most_tokens` ids in one of them,
    which are counted before anything is made of them.
    """
    text = bytes(raw)
    inner = text[1:].lstrip(b" \t\r\n")[:1] if text[:1] == b"[" else b""
    try:
        if text[:1] == b'"':
            return [msgspec.json.decode(text, type=str)]
        if inner not in (b'"', b"["):
            return [_token_ids(text, context_tokens, most_tokens)]
        prompts = msgspec.json.decode(text, type=list[msgspec.Raw])
        if len(prompts) > most_prompts:
            raise bad_parameter("prompt", f"prompt has {len(prompts)} prompts; a request may have {most_prompts}")
        if inner == b'"':
            return [msgspec.json.decode(prompt, type=str) for prompt in prompts]
        return [_token_ids(bytes(prompt), context_tokens, most_tokens) for prompt in prompts]
    except msgspec.ValidationError as error:
        raise bad_parameter(
            "prompt", f"prompt must be a text, a list of token ids, or a list of either: {error}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # decoding the body did not look inside
        raise _malformed(error, text) from None


def _token_ids(text: bytes, context_tokens: int, most_tokens: int) -> list[int]:
    tokens = text.count(b",") + 1
    if tokens > most_tokens:
        raise context_exceeded(context_tokens, tokens, None, "prompt")
    return msgspec.json.decode(text, type=list[int])


def _malformed(error: Exception, text: bytes) -> ApiError:
    why: object = error
    if half := _HALF_CHARACTER.search(text):
        why = f"{half[0].decode()} is half of a character, as of an emoji that was cut; send whole ones"
    return ApiError(400, f"the request body is not valid JSON: {why}", code="invalid_json")
