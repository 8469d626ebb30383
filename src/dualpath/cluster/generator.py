"""A cluster's interface to its server: what a server, or a test, asks of a cluster and what it gets back."""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

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
    """``"stop"`` (a stop token, included in `token_ids`), ``"length"``, or None while more tokens follow."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was read from storage in the attempt that produced the first token (`loaded`)."""
    timings: Timings | None = None
    """Timings up to this step; a test's cluster may have none."""
    prompt_logprobs: list[PromptLogprob] | None = None
    """With the first tokens, if requested: of every prompt token but the first, which has nothing before it."""


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

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use; the first is what answers carry."""
        return (self.name, *self.aliases)


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
        """``{"status": "ok" | "degraded" | "unavailable", "engines": [...]}``; unavailable: no PE or no DE is left."""
        ...

    def gauges(self) -> Figures:
        """Returns the numbers of /metrics. One that is not in the catalogue is counted and not shown."""
        ...
