"""A cluster's interface to its server: what a server, or a test, asks of a cluster and what it gets back."""

from collections.abc import AsyncGenerator, Collection
from typing import Literal, Protocol

import msgspec

from dualpath.core.vocabulary import Role
from dualpath.spec.cluster_setup import ServedCluster
from dualpath.spec.generation_defaults import GenerationDefaults
from dualpath.spec.metrics import Figures
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.timings import Timings


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, already tokenised and validated."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    tenant: str = ""
    """Salt of the prefix namespace: requests of different tenants never share KV."""
    request_id: str = ""
    """The client's name for the request, by which `Control.abort` finds it; several requests may have the same."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one token at one position."""

    token_id: int
    logprob: float


class PromptLogprob(msgspec.Struct, frozen=True):
    """What the model gave to one prompt token, after those before it."""

    rank: int
    """How many tokens were at least as likely; 1: it was the most likely one."""
    tokens: list[TokenLogprob]
    """The prompt's token, then the most likely ones, best first."""


class GeneratedTokens(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the stream. The last one has a `finish_reason` and may carry no tokens."""

    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    """For each token, if requested: the chosen one first, then the most likely ones."""
    finish_reason: str | None = None
    """``"stop"`` (a stop token, included in `token_ids`), ``"length"``, ``"abort"`` (`Control.abort`, or a pause), or
    None while more tokens follow."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was read from storage in the attempt that produced the first token (`loaded`)."""
    timings: Timings | None = None
    """Timings up to this step; a test's cluster may have none."""
    prompt_logprobs: list[PromptLogprob] | None = None
    """With the first tokens, if requested: of every prompt token but the first, which has nothing before it."""


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """A vLLM server holds the prompt's KV: post the client's request there now, and close what was posted before."""

    url: str
    model: str
    """The name by which that server knows its model."""
    dp_rank: int | None
    """Goes into the header ``X-data-parallel-rank``, if given."""
    owner: tuple[int, int]
    """``(request, attempt)``, for ``kv_transfer_params``, `Router.answered` and `Router.hand_off_failed`."""
    cached_tokens: int
    """Prompt tokens whose KV was read from storage in this attempt."""


class VllmServer(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a vLLM server that has joined."""

    url: str
    model: str
    dp_rank: int | None
    role: Role


class RequestError(Exception):
    """A request that ends without its tokens. The server turns it into an OpenAI-shaped error.

    `status` is the HTTP status, `code` a stable word for programs; the message says what to do. `retry_after_s` is
    given when waiting helps.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


def overflow_message(context_tokens: int, prompt_tokens: int, completion_tokens: int) -> str:
    """Says that a request does not fit the model's context, in the words by which agents know to shorten their history.

    (LiteLLM, and so aider and mini-SWE-agent, and Cline, OpenHands, opencode and others search the message for them.)
    """
    return (
        f"This model's maximum context length is {context_tokens} tokens. However, you requested "
        f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the messages, {completion_tokens} in the "
        "completion). Please reduce the length of the messages or completion."
    )


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the server must know about the model it serves."""

    name: str
    """What answers carry."""
    path: str
    max_model_len_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: GenerationDefaults = GenerationDefaults()
    """What requests get that don't say otherwise."""
    aliases: tuple[str, ...] = ()
    """More names that requests may use."""
    cluster: ServedCluster | None = None
    """The cluster that serves it, if it says so."""
    weight_version: str = "default"
    """The name of the weights that are served now; what `Control.update_weights` was given last."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use; the first is what answers carry."""
        return (self.name, *self.aliases)


Inflight = Literal["abort", "wait", "keep"]
"""What a pause does with running requests. ``abort``: they end with finish reason ``abort``. ``wait``: they run to
their end. ``keep``: they are taken off the engines, and go on after `resume` with the tokens that they have."""

Memory = Literal["weights", "kv_cache"]
"""What `Control.sleep` gives back."""


class Generator(Protocol):
    """A running cluster as the server sees it."""

    @property
    def model(self) -> ModelFacts: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GeneratedTokens, None]:
        """Stream tokens as engines produce them. Closing it (`aclose`) cancels the request and frees all it holds.

        Raises RequestError: 429 when admission is full, 503 when no engine is left, 400 when the request can never fit,
        504 when a deadline has passed.
        """
        ...

    def health(self) -> dict[str, object]:
        """``{"status": "ok" | "degraded" | "unavailable", "engines": [...]}``; unavailable: no PE or no DE is left.

        ``store`` has its own status: ``ok``, or what is wrong, since when (Unix time) and a reason; that is degraded.
        """
        ...

    def gauges(self) -> Figures:
        """Returns the numbers of /metrics. One that is not in the catalogue is counted and not shown."""
        ...

    @property
    def control(self) -> "Control":
        """For trainers and operators."""
        ...


class Router(Protocol):
    """A running cluster of vLLM servers as its router sees it: tokens go from the server to the client, past us."""

    def route(self, request: GenerateRequest) -> AsyncGenerator[Handoff | GeneratedTokens, None]:
        """Bring the prompt's KV to a decode engine; of `sampling` only `max_tokens` is used.

        Gives a `Handoff` for each attempt that gets so far, and at last, when the answer's blocks are durable, a
        `GeneratedTokens` without tokens and with a finish reason. Closing it cancels the request and frees all it
        holds. Raises RequestError as `Generator.generate`. An attempt that fails is retried from the prompt until
        `answered`; from then on it is not: RequestError then says that blocks may not be stored, while the server
        may well go on answering, except after ``deadline_exceeded``.
        """
        ...

    def hand_off_failed(self, owner: tuple[int, int], why: str) -> None:
        """The server has not answered the client's request, before its first byte. Nothing happens if the attempt is
        over; else `route` gives another Handoff, or raises."""
        ...

    def answered(self, owner: tuple[int, int]) -> Timings | None:
        """The first byte of the answer is there; call it again with the last one. Returns the timings so far.

        None: the attempt has failed, or another has taken its place: drop this answer then. An answer may come after
        its own end, if `route` has given that; as long as that is open, the answer counts.
        """
        ...

    def vllm_servers(self) -> list[VllmServer]: ...


class Control(Protocol):
    """Changes how a cluster serves. Every call raises RequestError; calls that would meet are carried out in turn."""

    async def pause(self, inflight: Inflight) -> None:
        """Hold back new requests until `resume`. Returns when no engine has a request in hand."""
        ...

    async def resume(self) -> None: ...

    @property
    def paused(self) -> bool: ...

    @property
    def requests(self) -> int:
        """How many requests have not ended, those that wait for `resume` included."""
        ...

    def abort(self, request_ids: Collection[str] | None) -> int:
        """End the requests of these names, or all, with finish reason ``abort``. Returns how many there were."""
        ...

    async def update_weights(self, path: str, version: str, inflight: Inflight) -> None:
        """Serve the checkpoint in `path`, a folder on every engine's host, from now on under the name `version`.

        KV of other weights is never hit. After an error the old weights still serve, on every engine.
        """
        ...

    async def reset_prefix_cache(self) -> None:
        """From now on no request hits what has been stored before."""
        ...

    async def sleep(self, memory: Collection[Memory], keep_weights: bool, inflight: Inflight) -> None:
        """Pause, and give device memory back. Weights that are not kept in host memory are read again at `wake`."""
        ...

    async def wake(self, memory: Collection[Memory]) -> None:
        """Take the memory again; when nothing sleeps any more, resume."""
        ...

    @property
    def sleeping(self) -> frozenset[Memory]: ...
