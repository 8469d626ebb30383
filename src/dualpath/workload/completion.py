"""One streamed completion over the OpenAI API, with the times at which tokens arrive.

``POST /v1/completions`` with token ids as the prompt, `ignore_eos`, ``min_tokens = max_tokens`` (exactly that many are
generated), `return_token_ids` (the ids really generated) and `stream_options.include_usage` (which says how many
prompt tokens the server loaded instead of computing).

httpx and msgspec rather than the official client: a load generator shares the machine with what it measures, so an
event is decoded into the few fields used here and nothing more.
"""

import asyncio
import time
from collections.abc import Sequence

import httpx
import msgspec


class CompletionError(Exception):
    """A completion that did not come. `retryable` tells whether the same request may do better later."""

    def __init__(self, message: str, *, retryable: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What came, and when (`time.perf_counter` seconds)."""

    token_ids: list[int]
    first_token_at_s: float
    second_token_at_s: float | None
    last_token_at_s: float
    prompt_tokens: int
    loaded_tokens: int
    """Prompt tokens whose KV the server read from storage."""


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Models(msgspec.Struct):
    class _Model(msgspec.Struct):
        id: str

    data: list[_Model]


_EVENT = msgspec.json.Decoder(_Event)


def open_client(url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """A client for the server at `url` (``/v1`` optional). Connections have no bound of their own: agents are it."""
    root = url.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(
        base_url=root,
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(None, connect=10.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def served_model(client: httpx.AsyncClient) -> str:
    """The id of the first model the server lists. Raises CompletionError."""
    try:
        response = await client.get("/v1/models", timeout=10.0)
        response.raise_for_status()
        models = msgspec.json.decode(response.content, type=_Models).data
    except (httpx.HTTPError, msgspec.MsgspecError) as error:
        raise CompletionError(
            f"{client.base_url}v1/models does not answer as an OpenAI server: {_describe(error)}", retryable=True
        ) from error
    if not models:
        raise CompletionError(f"{client.base_url}v1/models lists no model", retryable=False)
    return models[0].id


async def complete(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], generate_tokens: int, timeout_s: float
) -> Completion:
    """Generate exactly `generate_tokens` tokens, greedily. Raises CompletionError, also after `timeout_s`."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": generate_tokens,
        "min_tokens": generate_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream(
                "POST",
                "/v1/completions",
                content=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
            ) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                raise _refused(response)
            return await _read(response, generate_tokens)
    except TimeoutError as error:
        raise CompletionError(f"no complete answer within {timeout_s:g} s", retryable=True) from error
    except httpx.HTTPError as error:
        raise CompletionError(f"connection failed: {_describe(error)}", retryable=True) from error


async def _read(response: httpx.Response, generate_tokens: int) -> Completion:
    token_ids: list[int] = []
    arrived_at_s: list[float] = []
    usage: _Usage | None = None
    async for line in response.aiter_lines():
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        now_s = time.perf_counter()
        event = _decode(line)
        if event.error is not None:
            raise CompletionError(f"the stream broke off: {event.error.message or event.error.code}", retryable=True)
        usage = event.usage or usage
        for choice in event.choices:
            token_ids += choice.token_ids or ()
            arrived_at_s += [now_s] * len(choice.token_ids or ())
    if len(token_ids) != generate_tokens:
        raise CompletionError(
            f"asked for exactly {generate_tokens} tokens, the stream's token_ids held {len(token_ids)}; the server "
            "must honour min_tokens, ignore_eos and return_token_ids",
            retryable=False,
        )
    if usage is None:
        raise CompletionError("the stream had no usage; the server must honour stream_options", retryable=False)
    return Completion(
        token_ids=token_ids,
        first_token_at_s=arrived_at_s[0],
        second_token_at_s=arrived_at_s[1] if len(arrived_at_s) > 1 else None,
        last_token_at_s=arrived_at_s[-1],
        prompt_tokens=usage.prompt_tokens,
        loaded_tokens=0 if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens,
    )


def _decode(line: str) -> _Event:
    try:
        return _EVENT.decode(line[5:])
    except msgspec.MsgspecError as error:
        raise CompletionError(f"not an OpenAI event: {line[:200]!r}: {error}", retryable=False) from error


def _refused(response: httpx.Response) -> CompletionError:
    status = response.status_code
    try:
        decoded = _EVENT.decode(response.content).error
        message = decoded.message if decoded is not None else response.text
    except msgspec.MsgspecError:
        message = response.text
    try:
        retry_after_s = float(response.headers.get("Retry-After", ""))
    except ValueError:
        retry_after_s = None
    return CompletionError(
        f"HTTP {status}: {message[:500]}", retryable=status in (408, 429) or status >= 500, retry_after_s=retry_after_s
    )


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
