"""A request as the coordinator holds it: what the client asked, what it got so far, and the attempt under way."""

import asyncio

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, RequestFacts, RequestId
from dualpath.kv.keys import BlockKey, Namespace
from dualpath.runtime.api import GeneratedTokens, GenerateRequest, RequestError, TokenLogprob
from dualpath.runtime.messages import Draw
from dualpath.spec.sampling import finish_reason


class Attempt(msgspec.Struct):
    """One try at a request. Its prompt is the client's plus what earlier attempts generated, so nothing is lost."""

    attempt: int
    prompt_token_ids: list[int]
    keys: list[BlockKey]
    hit_tokens: int
    legs: list[Leg] = []
    decode_pages: list[int] | None = None
    first_draw: Draw | None = None


class LiveRequest:
    """Owned by the coordinator from `submit` until its last event is in `events`."""

    def __init__(self, request: RequestId, asked: GenerateRequest, namespace: Namespace) -> None:
        self.request = request
        self.asked = asked
        self.namespace = namespace
        self.generated: list[int] = []
        self.cached_tokens: int | None = None
        # Bounded by max_tokens + 1 entries: the producer can never be made to wait by a slow client.
        self.events: asyncio.Queue[GeneratedTokens | RequestError] = asyncio.Queue()
        self.current: Attempt | None = None
        self.recompute = False
        """An engine could not reach the store: later attempts do without."""

    def begin(self, attempt: int, prompt_token_ids: list[int], keys: list[BlockKey], hit_blocks: int) -> RequestFacts:
        """Start an attempt, `hit_blocks` of whose prompt are in storage; returns what core must know of it."""
        self.current = Attempt(attempt, prompt_token_ids, keys, hit_blocks * BLOCK_TOKENS)
        return RequestFacts(
            request=self.request,
            attempt=attempt,
            prompt_tokens=len(prompt_token_ids),
            hit_tokens=self.current.hit_tokens,
            max_new_tokens=self.asked.sampling.max_tokens - len(self.generated),
        )

    def is_current(self, attempt: int) -> bool:
        return self.current is not None and self.current.attempt == attempt

    @property
    def generated_before(self) -> int:
        """Tokens of the attempt's prompt that earlier attempts generated."""
        assert self.current is not None
        return len(self.current.prompt_token_ids) - len(self.asked.prompt_token_ids)

    @property
    def reason(self) -> str | None:
        """Why generation has ended, None while it has not."""
        if not self.generated:
            return None
        return finish_reason(self.asked.sampling, self.generated[-1], len(self.generated))

    def emit(self, draw: Draw) -> None:
        """A token is out: it reaches the client now and is never generated again."""
        self.generated.append(draw.token_id)
        logprobs = None
        if draw.logprobs is not None:
            logprobs = [[TokenLogprob(token_id, logprob) for token_id, logprob in draw.logprobs]]
        self.events.put_nowait(
            GeneratedTokens(token_ids=[draw.token_id], logprobs=logprobs, cached_tokens=self.cached_tokens or 0)
        )

    def end(self, outcome: str | RequestError) -> None:
        """The last event: a finish reason, or the error the client gets."""
        if isinstance(outcome, str):
            self.events.put_nowait(
                GeneratedTokens(token_ids=[], finish_reason=outcome, cached_tokens=self.cached_tokens or 0)
            )
        else:
            self.events.put_nowait(outcome)
        self.current = None
