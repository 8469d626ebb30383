"""One streamed completion over the OpenAI API, with the times at which tokens arrive.

The request is ``POST /v1/completions`` with token ids as the prompt, `ignore_eos`, ``min_tokens = max_tokens`` (so that
exactly that many are generated) and `stream_options.include_usage` (which tells how many prompt tokens the server did
not compute). A server that has them (`dualpath.client.server`) is also asked for generated ids and for its timings.

A load generator shares the machine with what it measures, so the pieces of a stream are stamped when they arrive and
parsed only after the stream has ended (`dualpath.client.http_client`).
"""

import asyncio
from collections.abc import Callable, Iterator

import msgspec

from dualpath.client.http_client import HttpClient, HttpError, Pieces, Response
from dualpath.client.prompt import Prompt
from dualpath.client.server import ServedModel
from dualpath.spec.timings import Timings


class CompletionError(Exception):
    """A completion that failed. `retryable` tells whether the same request may succeed later."""

    def __init__(self, message: str, *, retryable: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What came, and when (`time.perf_counter` seconds). Without token ids, an event counts as one token."""

    token_ids: list[int] | None
    """Generated ids; None if the server does not return them."""
    generated_tokens: int
    sent_at_s: float
    """When the request went out, with its connection made."""
    first_token_at_s: float
    second_token_at_s: float | None
    last_token_at_s: float
    ended_at_s: float
    """When the answer was complete."""
    prompt_tokens: int
    loaded_tokens: int | None
    """Prompt tokens whose KV the server had or read; None if it does not say."""
    timings: Timings | None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    text: str = ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None
    timings: msgspec.Raw = msgspec.Raw()
    """Kept raw: other servers have a field of this name with other contents."""


_EVENT = msgspec.json.Decoder(_Event)


def open_client(url: str, api_key: str | None = None) -> HttpClient:
    """Returns a client for the server at `url` (``/v1`` optional). Raises ValueError if `url` is not a URL."""
    root = url.rstrip("/").removesuffix("/v1")
    return HttpClient(root, {} if api_key is None else {"Authorization": f"Bearer {api_key}"})


async def complete(
    client: HttpClient,
    server: ServedModel,
    prompt: Prompt,
    generate_tokens: int,
    timeout_s: float,
    on_first: Callable[[], object] | None = None,
) -> Completion:
    """Generates exactly `generate_tokens` tokens, greedily; calls `on_first` when the first of them arrives.

    Raises CompletionError, also when `timeout_s` is over.
    """
    body = prompt.body(_fields(server, generate_tokens))
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.request("POST", "/v1/completions", body, on_first)
    except HttpError as error:
        raise CompletionError(f"connection failed: {error}", retryable=True) from error
    except TimeoutError as error:
        raise CompletionError(f"no complete answer within {timeout_s:g} s", retryable=True) from error
    if response.status != 200:
        raise _refused(response)
    return _read(response, server, generate_tokens)


async def asked_for_token_ids(client: HttpClient, server: ServedModel, prompt: Prompt, timeout_s: float) -> ServedModel:
    """Finds out by one token whether `server` returns token ids. Raises CompletionError for an error that may pass."""
    if server.returns_token_ids:
        return server
    asking = msgspec.structs.replace(server, returns_token_ids=True)
    try:
        await complete(client, asking, prompt, 1, timeout_s)
    except CompletionError as error:
        if error.retryable:
            raise
        return server
    return asking


def _fields(server: ServedModel, generate_tokens: int) -> Iterator[tuple[str, object]]:
    yield "model", server.model
    yield "max_tokens", generate_tokens
    yield "min_tokens", generate_tokens
    yield "ignore_eos", True
    yield "temperature", 0
    yield "stream", True
    yield "stream_options", {"include_usage": True}
    if server.returns_token_ids:
        yield "return_token_ids", True
    if server.returns_timings:
        yield "return_timings", True


def _read(response: Response, server: ServedModel, generate_tokens: int) -> Completion:
    token_ids: list[int] = []
    arrived_at_s: list[float] = []
    usage: _Usage | None = None
    timings: Timings | None = None
    for at_s, event in _events(response.pieces):
        if event.error is not None:
            raise CompletionError(f"the stream broke off: {event.error.message or event.error.code}", retryable=True)
        if event.usage is not None:
            usage = event.usage
            timings = _timings(event) if server.returns_timings else None
        for choice in event.choices:
            token_ids += choice.token_ids or ()
            # A last event may end the choice and bring no token.
            new_tokens = len(choice.token_ids or ()) if server.returns_token_ids else bool(choice.text)
            arrived_at_s += [at_s] * (new_tokens or (not arrived_at_s and not server.returns_token_ids))
    if usage is None:
        raise CompletionError("the stream had no usage; the server must honour stream_options", retryable=False)
    _check_length(server, token_ids, arrived_at_s, usage, generate_tokens)
    details = usage.prompt_tokens_details
    return Completion(
        token_ids=token_ids if server.returns_token_ids else None,
        generated_tokens=generate_tokens,
        sent_at_s=response.sent_at_s,
        first_token_at_s=arrived_at_s[0],
        second_token_at_s=arrived_at_s[1] if len(arrived_at_s) > 1 else None,
        last_token_at_s=arrived_at_s[-1],
        ended_at_s=response.pieces[-1][0],
        prompt_tokens=usage.prompt_tokens,
        loaded_tokens=None if details is None else details.cached_tokens,
        timings=timings,
    )


def _events(pieces: Pieces) -> Iterator[tuple[float, _Event]]:
    """Yields server-sent events, each with the time at which it was complete."""
    rest = b""
    for at_s, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                try:
                    yield at_s, _EVENT.decode(line[5:])
                except msgspec.MsgspecError as error:
                    raise CompletionError(f"not an OpenAI event: {line[:200]!r}: {error}", retryable=False) from error


def _check_length(
    server: ServedModel, token_ids: list[int], arrived_at_s: list[float], usage: _Usage, generate_tokens: int
) -> None:
    if server.returns_token_ids and len(token_ids) != generate_tokens:
        raise CompletionError(
            f"asked for exactly {generate_tokens} tokens, the stream's token_ids held {len(token_ids)}; the server "
            "must honour min_tokens, ignore_eos and return_token_ids",
            retryable=False,
        )
    if usage.completion_tokens != generate_tokens or not arrived_at_s:
        raise CompletionError(
            f"asked for exactly {generate_tokens} tokens, got {usage.completion_tokens} in {len(arrived_at_s)} events "
            "with text; the server must honour min_tokens and ignore_eos",
            retryable=False,
        )


def _timings(event: _Event) -> Timings | None:
    if not event.timings:
        return None
    try:
        return msgspec.json.decode(event.timings, type=Timings)
    except msgspec.MsgspecError as error:
        raise CompletionError(f"timings have an unknown form: {error}", retryable=False) from error


def _refused(response: Response) -> CompletionError:
    text = response.body.decode(errors="replace")
    try:
        decoded = _EVENT.decode(response.body).error
        message = decoded.message if decoded is not None else text
    except msgspec.MsgspecError:
        message = text
    try:
        retry_after_s = float(response.headers.get("retry-after", ""))
    except ValueError:
        retry_after_s = None
    retryable = response.status in (408, 429) or response.status >= 500
    return CompletionError(f"HTTP {response.status}: {message[:500]}", retryable=retryable, retry_after_s=retry_after_s)
