"""Turns a request body into a checked request: prompts as tokens, and one `GenerateRequest` per choice.

Every mistake that a client can make is refused here, before the request reaches the cluster.
"""

import secrets
from typing import Any

import msgspec

from dualpath.cluster.generator import GenerateRequest, ModelFacts
from dualpath.server.codec import TextCodec
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
    decode_prompts,
)
from dualpath.spec.sampling import SamplingParams

_COMPLETION_MAX_TOKENS = 16
_MAX_LOGPROBS = 20
_MAX_STOPS = 64
_MAX_STOP_CHARACTERS = 1000
_MAX_SALT_CHARACTERS = 1000
_SEEDS = 2**63


class Choice(msgspec.Struct, frozen=True):
    """One answer to generate: choice `index` of the response, for prompt `prompt_index` of the request."""

    index: int
    prompt_index: int
    request: GenerateRequest


class CheckedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to answer a request. `n` choices of each prompt, in order."""

    prompts: list[list[int]]
    choices: list[Choice]
    stop: tuple[str, ...]
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool
    return_timings: bool
    logprobs: int | None


class RequestChecker:
    """Checks requests against the model's facts and this server's limits. Every method raises ApiError."""

    def __init__(self, model: ModelFacts, codec: TextCodec, max_choices: int) -> None:
        self._model = model
        self._codec = codec
        self._max_choices = max_choices

    async def completion(self, asked: CompletionRequest) -> CheckedRequest:
        self.check_model(asked.model)
        given = decode_prompts(asked.prompt)
        self._check_fan_out(asked, len(given))
        special = asked.add_special_tokens is not False
        prompts = [
            prompt if isinstance(prompt, list) else await self._codec.encode(prompt, add_special_tokens=special)
            for prompt in given
        ]
        _check_range("logprobs", asked.logprobs, 0, _MAX_LOGPROBS)
        return self._checked(asked, prompts, "prompt", asked.max_tokens, _COMPLETION_MAX_TOKENS, asked.logprobs)

    async def chat(self, asked: ChatRequest) -> CheckedRequest:
        self.check_model(asked.model)
        self._check_fan_out(asked, 1)
        prompt = await self.chat_prompt(asked, asked.messages)
        _check_range("top_logprobs", asked.top_logprobs, 0, _MAX_LOGPROBS)
        if asked.top_logprobs and not asked.logprobs:
            raise bad_parameter("top_logprobs", "top_logprobs needs logprobs: true")
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._checked(asked, [prompt], "messages", limit, None, logprobs)

    async def chat_prompt(self, asked: ChatRequest | TokenizeRequest, messages: list[ChatMessage]) -> list[int]:
        """Returns the tokens of a chat, as the model's template renders it."""
        if not messages:
            raise bad_parameter("messages", "messages is empty; give at least one message")
        going_on = bool(asked.continue_final_message)
        options: dict[str, Any] = dict(asked.chat_template_kwargs or {})
        if forbidden := options.keys() & {"chat_template", "tokenize"}:
            raise bad_parameter("chat_template_kwargs", f"{', '.join(sorted(forbidden))} may not be set here")
        opens_turn = asked.add_generation_prompt
        options["add_generation_prompt"] = not going_on if opens_turn is None else opens_turn
        options["continue_final_message"] = going_on
        if going_on and options["add_generation_prompt"]:
            raise bad_parameter(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
            )
        return await self._codec.encode_chat([_template_message(i, m) for i, m in enumerate(messages)], options)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self._model.name!r}",
                code="model_not_found",
                param="model",
            )

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Refuse token ids for which the model has no embedding."""
        vocabulary = self._model.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary):
            at, token = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocabulary)
            raise bad_parameter(
                param, f"token id {token} at position {at} is outside the model's vocabulary of {vocabulary} tokens"
            )

    def _check_fan_out(self, asked: GenerationRequest, prompts: int) -> None:
        _check_range("n", asked.n, 1, self._max_choices)
        if asked.return_timings and (asked.n or 1) * prompts > 1:
            raise bad_parameter(
                "return_timings",
                f"return_timings is for a single answer, not for {prompts} prompts with n={asked.n or 1}; send several "
                "requests",
            )
        if (asked.n or 1) * prompts > self._max_choices:
            raise bad_parameter(
                "n",
                f"{prompts} prompts with n={asked.n or 1} ask for more than the {self._max_choices} choices a request "
                "may have; send several requests",
            )

    def _checked(
        self,
        asked: GenerationRequest,
        prompts: list[list[int]],
        param: str,
        limit: int | None,
        default: int | None,
        logprobs: int | None,
    ) -> CheckedRequest:
        _check_range("max_tokens", limit, 1, None)
        if asked.stream_options is not None and not asked.stream:
            raise bad_parameter("stream_options", "stream_options needs stream: true")
        choices: list[Choice] = []
        for prompt_index, prompt in enumerate(prompts):
            self.check_token_ids(prompt, param)
            sampling = self._sampling(asked, self._max_tokens(len(prompt), param, limit, default), logprobs)
            base = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
            for i in range(asked.n or 1):
                request = GenerateRequest(
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=(base + i) % _SEEDS),
                    tenant=_tenant(asked.cache_salt),
                    return_timings=bool(asked.return_timings),
                )
                choices.append(Choice(len(choices), prompt_index, request))
        return CheckedRequest(
            prompts=prompts,
            choices=choices,
            stop=_stop_strings(asked.stop),
            skip_special_tokens=asked.skip_special_tokens is not False,
            stream=bool(asked.stream),
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            return_token_ids=bool(asked.return_token_ids),
            return_timings=bool(asked.return_timings),
            logprobs=logprobs,
        )

    def _max_tokens(self, prompt_tokens: int, param: str, limit: int | None, default: int | None) -> int:
        if prompt_tokens == 0:
            raise bad_parameter(param, "the prompt is empty; give at least one token")
        room = self._model.max_model_len_tokens - prompt_tokens
        if room < (limit or 1):
            raise bad_parameter(
                param,
                f"the prompt has {prompt_tokens} tokens and max_tokens is {limit or 1}, together "
                f"{prompt_tokens + (limit or 1)}; the model's context is {self._model.max_model_len_tokens} tokens. "
                "Shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )
        return limit or min(default or room, room)

    def _sampling(self, asked: GenerationRequest, max_tokens: int, logprobs: int | None) -> SamplingParams:
        _check_range("min_tokens", asked.min_tokens, 0, max_tokens)
        _check_range("temperature", asked.temperature, 0, None)
        _check_range("top_p", asked.top_p, 0, 1)
        if asked.top_p == 0:
            raise bad_parameter("top_p", "top_p must be above 0; for greedy decoding set temperature to 0")
        _check_range("top_k", asked.top_k, -1, None)
        _check_range("seed", asked.seed, -_SEEDS, _SEEDS - 1)
        stops = asked.stop_token_ids or []
        self.check_token_ids(stops, "stop_token_ids")
        ends = () if asked.ignore_eos else self._model.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=asked.min_tokens or 0,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(asked.top_k or 0, 0),
            stop_token_ids=tuple(dict.fromkeys((*stops, *ends))),
            ignore_eos=bool(asked.ignore_eos),
            logprobs=logprobs,
        )


def _check_range(param: str, value: float | None, least: float, most: float | None) -> None:
    if value is None:
        return
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise bad_parameter(param, f"{param} is {value}; it must be {bounds}")


def _tenant(salt: str | None) -> str:
    if salt is not None and not 0 < len(salt) <= _MAX_SALT_CHARACTERS:
        raise bad_parameter("cache_salt", f"cache_salt must have 1 to {_MAX_SALT_CHARACTERS} characters")
    return salt or ""


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(0 < len(s) <= _MAX_STOP_CHARACTERS for s in stops):
        raise bad_parameter(
            "stop", f"stop may be up to {_MAX_STOPS} strings of 1 to {_MAX_STOP_CHARACTERS} characters each"
        )
    return stops


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    """Returns a message as chat templates need it: plain text, and only keys that were given."""
    where = f"messages[{index}]"
    if message.tool_calls or message.function_call:
        raise bad_parameter(
            "messages", f"{where} has tool calls, which are not supported", code="unsupported_parameter"
        )
    record: dict[str, Any] = msgspec.to_builtins(message)
    record.pop("tool_calls", None)
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_parameter(
                    "messages",
                    f"{where} has a content part of type {part.get('type')!r}; this server takes only "
                    '{"type": "text", "text": "…"}',
                    code="unsupported_content",
                )
        content = "\n".join(part["text"] for part in content)
    if content is None and message.role != "assistant":
        raise bad_parameter("messages", f"{where} has no content; give a text")
    record["content"] = content or ""
    return record
