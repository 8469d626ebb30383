"""Token ids in, token ids and log-probabilities out: vLLM's /inference/v1/generate and SGLang's /generate.

Both bodies are translated to the fields of /v1/completions and checked as those are, so that every sampling parameter,
bound and refusal is the same. What differs is the shape of the answer (`server/rollout_writers.py`).
"""

import time
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dualpath.server.door import Route
from dualpath.server.errors import bad_parameter, in_words_of_client
from dualpath.server.protocol import CompletionRequest, StreamOptions, decode_body
from dualpath.server.requests import CheckedRequest
from dualpath.server.rollout_writers import SglangWriter, VllmWriter
from dualpath.server.service import Service
from dualpath.server.unsupported import refuse_unsupported

AS_SAMPLED = "processed_logprobs"
"""Both endpoints' default of `logprobs_mode`: what importance ratios need."""
_SGLANG_MAX_TOKENS = 128
_MOST_IDS_CHARACTERS = 256
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "stop"),
    *("stop_token_ids", "ignore_eos", "skip_special_tokens", "n", "logit_bias", "logprobs_mode"),
)
"""SGLang's sampling parameters that have vLLM's names too."""
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}
_GRAMMARS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}
_SGLANG_WORDS = {
    **{ours: theirs for theirs, ours in _OTHER_NAMES.items()},
    **{rf"structured_outputs\.{ours}": theirs for theirs, ours in _GRAMMARS.items()},
    "prompt_logprobs": "top_logprobs_num",
    "logprobs": "top_logprobs_num",
    "cache_salt": "extra_key",
}
"""Fields of /v1/completions, and what SGLang calls them."""
_NOT_GIVEN = msgspec.Raw(b"null")


class VllmGenerate(msgspec.Struct, kw_only=True):
    """Body of /inference/v1/generate."""

    api: ClassVar[str] = "/inference/v1/generate"

    token_ids: msgspec.Raw
    sampling_params: dict[str, msgspec.Raw] | None = None
    request_id: str | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None


class SglangGenerate(msgspec.Struct, kw_only=True):
    """Body of /generate: `text` or `input_ids`, one or a list of either."""

    api: ClassVar[str] = "/generate"

    text: str | list[str] | None = None
    input_ids: msgspec.Raw = _NOT_GIVEN
    sampling_params: dict[str, Any] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    extra_key: str | None = None


def routes(service: Service) -> list[Route]:
    api = _Rollout(service)
    return [
        Route("/inference/v1/generate", api.vllm, ("POST",)),
        Route("/generate", api.sglang, ("POST", "PUT")),
    ]


class _Rollout:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._checker = service.checker

    async def vllm(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        service = self._service
        asked = await service.body(request, VllmGenerate)
        (prompt,) = await self._token_prompts(asked.token_ids, "token_ids", several=False)
        fields: dict[str, Any] = {"logprobs_mode": AS_SAMPLED, **(asked.sampling_params or {})}
        for name in ("model", "stream", "stream_options", "cache_salt"):
            fields[name] = getattr(asked, name)
        if "max_tokens" not in fields:
            fields["max_tokens"] = self._room([prompt])
        with in_words_of_client({"prompt": "token_ids"}):
            checked = await self._check(fields, [prompt], [asked.request_id or ""])
        return await service.answer(request, checked, VllmWriter(service, checked, asked.request_id), arrived_s)

    async def sglang(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        service = self._service
        asked = await service.body(request, SglangGenerate)
        prompts = await self._sglang_prompts(asked)
        fields = _sglang_fields(asked)
        room = self._room(prompts)
        wanted = fields.get("max_tokens")
        if wanted is None or (isinstance(wanted, int) and wanted > room):  # SGLang cuts off what can't fit
            fields["max_tokens"] = room if wanted is not None else min(_SGLANG_MAX_TOKENS, room)
        scored_from = asked.logprob_start_len if asked.return_logprob else None
        if scored_from is not None and not 0 <= scored_from < min(map(len, prompts)):
            scored_from = None  # SGLang's -1, or nothing of a prompt
        if scored_from is not None:
            fields["prompt_logprobs"] = asked.top_logprobs_num or 0
        rids = [asked.rid] * len(prompts) if isinstance(asked.rid, str) else asked.rid or [""] * len(prompts)
        if len(rids) != len(prompts):
            raise bad_parameter("rid", f"there are {len(rids)} names for {len(prompts)} prompts")
        given = "text" if asked.text is not None else "input_ids"
        with in_words_of_client(_SGLANG_WORDS | {"prompt": given}):
            checked = await self._check(fields, prompts, rids)
        several = isinstance(asked.text, list) or _is_nested(asked.input_ids) or len(checked.choices) > 1
        writer = SglangWriter(service, checked, several, bool(asked.return_text_in_logprobs), scored_from)
        return await service.answer(request, checked, writer, arrived_s)

    async def _sglang_prompts(self, asked: SglangGenerate) -> list[list[int]]:
        has_ids = bytes(asked.input_ids) != b"null"
        if (asked.text is None) != has_ids:
            raise bad_parameter("text", "give either text or input_ids")
        if has_ids:
            return await self._token_prompts(asked.input_ids, "input_ids", several=True)
        most = self._service.limits.max_choices
        texts = [asked.text] if isinstance(asked.text, str) else asked.text or []
        if not 0 < len(texts) <= most:
            raise bad_parameter("text", f"text has {len(texts)} prompts; a request may have 1 to {most}")
        return await self._service.codec.encode_all(texts, add_special_tokens=True)

    async def _token_prompts(self, raw: msgspec.Raw, param: str, several: bool) -> list[list[int]]:
        with in_words_of_client({"prompt": param}):
            prompts = await self._checker.given_prompts(raw)
        ids = [prompt for prompt in prompts if isinstance(prompt, list)]
        if len(ids) != len(prompts) or (_is_nested(raw) and not several):
            raise bad_parameter(param, f"{param} must be a list of token ids" + (", or a list of such" * several))
        return ids

    def _room(self, prompts: list[list[int]]) -> int:
        """Returns how many tokens the longest prompt leaves; at least 1, so that the checker says what does not fit."""
        return max(1, self._service.generator.model.max_model_len_tokens - max(map(len, prompts)))

    async def _check(self, fields: dict[str, Any], prompts: list[list[int]], rids: list[str]) -> CheckedRequest:
        """Check the fields as those of /v1/completions. `rids` name the requests of each prompt, for an abort."""
        if max(map(len, rids)) > _MOST_IDS_CHARACTERS:
            raise bad_parameter("rid", f"a request's name may have up to {_MOST_IDS_CHARACTERS} characters")
        fields["prompt"] = prompts
        completion = decode_body(msgspec.json.encode(fields), CompletionRequest)
        checked = await self._checker.completion(completion)
        named = [
            msgspec.structs.replace(
                choice, request=msgspec.structs.replace(choice.request, request_id=rids[choice.prompt_index])
            )
            for choice in checked.choices
        ]
        return msgspec.structs.replace(checked, choices=named)


def _sglang_fields(asked: SglangGenerate) -> dict[str, Any]:
    """Returns the fields of /v1/completions that ask for the same."""
    params = asked.sampling_params or {}
    refuse_unsupported(params, asked.api)
    fields: dict[str, Any] = {name: params[name] for name in _SAME if params.get(name) is not None}
    fields |= {ours: params[theirs] for theirs, ours in _OTHER_NAMES.items() if params.get(theirs) is not None}
    grammar = {ours: params[theirs] for theirs, ours in _GRAMMARS.items() if params.get(theirs) is not None}
    if grammar:
        fields["structured_outputs"] = grammar
    if asked.return_logprob:
        fields["logprobs"] = asked.top_logprobs_num or 0
    fields.setdefault("logprobs_mode", AS_SAMPLED)
    return fields | {"stream": bool(asked.stream), "cache_salt": asked.extra_key}


def _is_nested(raw: msgspec.Raw) -> bool:
    return bytes(raw)[1:].lstrip(b" \t\r\n")[:1] == b"["
