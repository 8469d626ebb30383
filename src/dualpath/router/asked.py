"""What a client asks, as it goes on to the vLLM servers: the client's own fields, less what is ours or dangerous.

Whatever says how KV is transferred is taken out: by it one client could reach another's.
"""

from typing import Any

import msgspec
from msgspec import Raw

from dualpath.cluster.generator import GenerateRequest, Handoff
from dualpath.server.errors import bad_parameter
from dualpath.spec.sampling import SamplingParams

Fields = dict[str, Raw]

_TRANSFER = ("kv_transfer_params", "ec_transfer_params")
_FALSE = (b"null", b"false", b"0", b'""', b"[]")
_STORED = "; a response is kept by one vLLM server alone. Send the whole conversation as input"
_encode = msgspec.json.encode


class Sampling(msgspec.Struct):
    """What the router must know of vLLM's sampling parameters; vLLM leaves out those that have their defaults."""

    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    prompt_logprobs: int | None = None
    skip_reading_prefix_cache: bool | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Rendered(msgspec.Struct):
    """One prompt, as vLLM's render endpoints give it."""

    token_ids: list[int]
    sampling_params: Sampling
    features: Any = None
    """Not None: the prompt has media."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None

    def request(self) -> GenerateRequest:
        sampling = self.sampling_params
        return GenerateRequest(
            prompt_token_ids=self.token_ids,
            sampling=SamplingParams(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p
            ),
            tenant=self.cache_salt or "",
        )


def is_set(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) not in _FALSE


def without_transfer(fields: Fields) -> Fields:
    """Returns the fields that may go on, whatever the endpoint."""
    kept = {name: value for name, value in fields.items() if name not in _TRANSFER}
    extra = kept.get("vllm_xargs")
    if extra is not None and any(name.encode() in bytes(extra) for name in _TRANSFER):
        try:
            given = msgspec.json.decode(extra, type=Fields)
        except msgspec.ValidationError:  # no object: vLLM says so
            return kept
        kept["vllm_xargs"] = Raw(_encode({name: value for name, value in given.items() if name not in _TRANSFER}))
    return kept


def refuse_stored(fields: Fields) -> None:
    """Raises ApiError for what would need the one server that has an earlier response."""
    for name in ("previous_response_id", "background"):
        if is_set(fields, name):
            raise bad_parameter(name, f"{name} is not supported{_STORED}", code="unsupported_parameter")


def why_direct(path: str, fields: Fields) -> str | None:
    """Returns why a request goes to a decode server without KV from elsewhere; None: nothing in its fields says so."""
    if is_set(fields, "use_beam_search"):
        return "beam search"
    if is_set(fields, "echo"):
        return "echo"
    if path == "/v1/chat/completions" and is_set(fields, "return_prompt_text"):
        return "the prompt's text"
    if path == "/v1/completions" and is_set(fields, "prompt_embeds"):
        return "embeddings"
    return None


def why_direct_rendered(prompts: list[Rendered]) -> str | None:
    """The same, as the rendered prompts show."""
    for prompt in prompts:
        if prompt.features is not None:
            return "media"
        if prompt.sampling_params.prompt_logprobs is not None:
            return "log-probabilities of the prompt"
        if prompt.sampling_params.skip_reading_prefix_cache:
            return "no prefix cache"
    return None


def for_choice(path: str, fields: Fields, prompt: Rendered, index: int | None) -> Fields:
    """Returns the body of one choice, without its hand-off. `index` of `n` choices, or None: there is but one.

    As in vLLM, choice i of n draws with ``seed + i``.
    """
    body = {name: value for name, value in fields.items() if name != "return_timings"}
    if index is not None:
        body["n"] = Raw(b"1")
        if (seed := prompt.sampling_params.seed) is not None:
            body["seed"] = Raw(_encode(seed + index))
    if path in ("/v1/chat/completions", "/v1/completions") and prompt.stream:
        given = is_set(body, "stream_options")
        options: Fields = msgspec.json.decode(body["stream_options"], type=Fields) if given else {}
        body["stream_options"] = Raw(_encode(options | {"include_usage": Raw(b"true")}))
    if path == "/v1/completions":
        body["prompt"] = Raw(_encode(prompt.token_ids))
        body.pop("suffix", None)  # is part of the ids
    return body


def handed(path: str, body: Fields, prompt: Rendered, handoff: Handoff) -> bytes:
    """Returns the body of one choice for the server that has the prompt's KV."""
    params: dict[str, Any] = {"dualpath": {"owner": handoff.owner, "prompt_tokens": len(prompt.token_ids)}}
    if path != "/v1/completions":
        params["prompt_token_ids"] = prompt.token_ids
    return _encode(body | {"kv_transfer_params": Raw(_encode(params))})
