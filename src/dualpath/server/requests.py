"""Turns a request body into a checked request: prompts as tokens, and one `GenerateRequest` per choice.

Every mistake that a client can make is refused here, before the request reaches the cluster.
"""

import secrets
from functools import partial

import msgspec

from dualpath.cluster.generator import GenerateRequest, ModelFacts
from dualpath.server.chat.dialect import Dialect
from dualpath.server.chat.messages import template_messages, template_options
from dualpath.server.chat.parsing import ReadingPlan
from dualpath.server.chat.structured import grammar_field
from dualpath.server.codec import TextCodec
from dualpath.server.errors import ApiError, bad_parameter, context_exceeded
from dualpath.server.lanes import decoding
from dualpath.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
    decode_prompts,
)
from dualpath.server.sampling import MAX_LOGPROBS, MAX_SCORED, SEEDS, Asked, SamplingChecker, check_range

_COMPLETION_MAX_TOKENS = 16
_INLINE_BYTES = 2**16
_CUT_CONTEXTS = 4
"""A prompt that is to be cut (`truncate_prompt_tokens`) may be so many contexts long."""
_MAX_STOPS = 64
_MAX_STOP_CHARACTERS = 1000
_MAX_SALT_CHARACTERS = 1000
_PROMPT_END_TOKENS = (64, 4096)
"""How much of a prompt's end says whether it ends inside reasoning: of a turn that opens, of one that goes on."""


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
    prompt_logprobs: int | None = None
    """Asked for by that name; `echo` with `logprobs` asks for them too."""
    echo: list[str] | None = None
    """Texts of the prompts, where the answers begin with them."""
    prompt_only: bool = False
    """True: nothing is generated (`max_tokens` 0)."""
    include_stop: bool = False
    tokens_as_ids: bool = False
    """Log-probabilities name tokens as ``token_id:123``."""
    is_chat: bool = False
    reading: ReadingPlan | None = None
    """How to read a chat's answer; None: it is content and nothing else."""
    form: str = ""
    """The field that the answer's grammar comes from; empty: there is none."""

    @property
    def scores_prompt(self) -> bool:
        return self.prompt_logprobs is not None or (self.echo is not None and self.logprobs is not None)


class RequestChecker:
    """Checks requests against the model's facts and this server's limits. Every method raises ApiError."""

    def __init__(self, model: ModelFacts, codec: TextCodec, dialect: Dialect, max_choices: int) -> None:
        self._model = model
        self._codec = codec
        self._dialect = dialect
        self._max_choices = max_choices
        self._sampling = SamplingChecker(model, codec)
        self.check_token_ids = self._sampling.check_token_ids

    async def completion(self, asked: CompletionRequest) -> CheckedRequest:
        self.check_model(asked.model)
        contexts = _contexts(asked)
        given = await self.given_prompts(asked.prompt, contexts)
        self._check_fan_out(asked, len(given))
        prompts = [prompt for prompt in given if isinstance(prompt, list)]
        if not prompts:
            texts = [prompt for prompt in given if isinstance(prompt, str)]
            special = asked.add_special_tokens is not False
            prompts = await self._codec.encode_all(texts, add_special_tokens=special, contexts=contexts)
        check_range("logprobs", asked.logprobs, 0, MAX_LOGPROBS)
        limit, echo, grammar = asked.max_tokens, bool(asked.echo), await self._dialect.grammar(asked)
        checked = await self._checked(
            asked, prompts, "prompt", limit, _COMPLETION_MAX_TOKENS, asked.logprobs, echo, grammar
        )
        if not asked.echo:
            return checked
        special = checked.skip_special_tokens
        texts = [p if isinstance(p, str) else self._codec.decode(p, skip_special_tokens=special) for p in given]
        return msgspec.structs.replace(checked, echo=texts)

    async def given_prompts(self, raw: msgspec.Raw, contexts: int = 1) -> list[str] | list[list[int]]:
        """Returns prompts, each of up to so many contexts of token ids (`decode_prompts`)."""
        context = self._model.max_model_len_tokens
        decode = partial(decode_prompts, raw, self._max_choices, context, context * contexts)
        return decode() if len(bytes(raw)) <= _INLINE_BYTES else await decoding(decode)

    async def chat(self, asked: ChatRequest) -> CheckedRequest:
        self.check_model(asked.model)
        self._check_fan_out(asked, 1)
        use = self._dialect.tool_use(asked)
        prompt = await self.chat_prompt(asked, asked.messages)
        check_range("top_logprobs", asked.top_logprobs, 0, MAX_LOGPROBS)
        if asked.top_logprobs and not asked.logprobs:
            raise bad_parameter("top_logprobs", "top_logprobs needs logprobs: true")
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        end = _PROMPT_END_TOKENS[bool(asked.continue_final_message)]
        plan = self._dialect.reading(asked, use, self._codec.decode(prompt[-end:], skip_special_tokens=False))
        grammar = await self._dialect.grammar(asked, use, plan)
        checked = await self._checked(asked, [prompt], "messages", limit, None, logprobs, grammar=grammar)
        return msgspec.structs.replace(checked, is_chat=True, reading=plan)

    async def chat_up_to(self, asked: ChatRequest, param: str, limit: int | None) -> CheckedRequest:
        """Check a chat that gets at most `limit` tokens, or as many as the context leaves, if those are fewer."""
        check_range(param, limit, 1, None)
        checked = await self.chat(asked)
        return (
            checked
            if limit is None
            else msgspec.structs.replace(checked, choices=[_cut(c, limit) for c in checked.choices])
        )

    async def chat_prompt(self, asked: ChatRequest | TokenizeRequest, messages: list[ChatMessage]) -> list[int]:
        """Returns the tokens of a chat, as the model's template renders it."""
        if not messages:
            raise bad_parameter("messages", "messages is empty; give at least one message")
        going_on = bool(asked.continue_final_message)
        options = template_options(asked)
        opens_turn = asked.add_generation_prompt
        options["add_generation_prompt"] = not going_on if opens_turn is None else opens_turn
        options["continue_final_message"] = going_on
        if going_on and options["add_generation_prompt"]:
            raise bad_parameter(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
            )
        rendered = template_messages(messages, self._dialect.template)
        return await self._codec.encode_chat(rendered, options, _contexts(asked))

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self._model.names:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {', '.join(map(repr, self._model.names))}",
                code="model_not_found",
                param="model",
            )

    def _check_fan_out(self, asked: GenerationRequest, prompts: int) -> None:
        check_range("n", asked.n, 1, self._max_choices)
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

    async def _checked(
        self,
        asked: GenerationRequest,
        prompts: list[list[int]],
        param: str,
        limit: int | None,
        default: int | None,
        logprobs: int | None,
        echo: bool = False,
        grammar: str = "",
    ) -> CheckedRequest:
        check_range("max_tokens", limit, 0, None)
        prompts = self._truncated(prompts, asked.truncate_prompt_tokens, limit)
        scored = self._scored(asked, prompts, logprobs if echo else None)
        bad_words = await self._sampling.bad_words(asked.bad_words)
        if asked.stream_options is not None and not asked.stream:
            raise bad_parameter("stream_options", "stream_options needs stream: true")
        choices: list[Choice] = []
        for prompt_index, prompt in enumerate(prompts):
            self.check_token_ids(prompt, param)
            max_tokens = self._max_tokens(len(prompt), param, limit, default)
            wanted = Asked(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=scored, grammar=grammar)
            sampling = self._sampling.params(asked, wanted, bad_words)
            base = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
            for i in range(asked.n or 1):
                request = GenerateRequest(
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=(base + i) % SEEDS),
                    tenant=_tenant(asked.cache_salt),
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
            prompt_logprobs=asked.prompt_logprobs,
            prompt_only=limit == 0,
            form=grammar_field(asked) if grammar else "",
            include_stop=bool(asked.include_stop_str_in_output),
            tokens_as_ids=bool(asked.return_tokens_as_token_ids),
        )

    def _truncated(self, prompts: list[list[int]], tokens: int | None, limit: int | None) -> list[list[int]]:
        """Keeps the last tokens of each prompt: so many, or as many as leave room for the answer (-1)."""
        context = self._model.max_model_len_tokens
        check_range("truncate_prompt_tokens", tokens, -1, context)
        if tokens is None:
            return prompts
        if tokens == 0:
            raise bad_parameter("truncate_prompt_tokens", "truncate_prompt_tokens is 0, which leaves no prompt")
        kept = tokens if tokens > 0 else max(1, context - (1 if limit is None else limit))
        return [prompt[-kept:] for prompt in prompts]

    def _scored(self, asked: GenerationRequest, prompts: list[list[int]], echoed: int | None) -> int | None:
        """Returns how many alternatives to each prompt token are asked for; None when prompts are not scored."""
        counts = [count for count in (asked.prompt_logprobs, echoed) if count is not None]
        if not counts:
            return None
        if asked.stream and asked.prompt_logprobs is not None:
            raise bad_parameter("prompt_logprobs", "prompt_logprobs can't be streamed; set stream to false")
        entries = sum(map(len, prompts)) * (1 + max(counts)) * (asked.n or 1)
        if entries > MAX_SCORED:
            raise bad_parameter(
                "prompt_logprobs",
                f"{sum(map(len, prompts))} prompt tokens with {max(counts)} alternatives and n={asked.n or 1} are "
                f"{entries} log-probabilities; one answer may have {MAX_SCORED}. Send several requests, or ask for "
                "fewer alternatives",
            )
        return max(counts)

    def _max_tokens(self, prompt_tokens: int, param: str, limit: int | None, default: int | None) -> int:
        if prompt_tokens == 0:
            raise bad_parameter(param, "the prompt is empty; give at least one token")
        room = self._model.max_model_len_tokens - prompt_tokens
        least = 1 if limit is None else limit
        if room < least:
            raise context_exceeded(self._model.max_model_len_tokens, prompt_tokens, limit, param)
        if limit is not None:
            return limit
        return min(default or room, self._model.defaults.max_tokens or room, room)


def _cut(choice: Choice, max_tokens: int) -> Choice:
    sampling = choice.request.sampling
    sampling = msgspec.structs.replace(sampling, max_tokens=min(max_tokens, sampling.max_tokens))
    return msgspec.structs.replace(choice, request=msgspec.structs.replace(choice.request, sampling=sampling))


def _contexts(asked: GenerationRequest | TokenizeRequest) -> int:
    """Returns how many contexts the prompt may have."""
    cut = getattr(asked, "truncate_prompt_tokens", None) is not None
    return _CUT_CONTEXTS if cut else 1


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
