"""A request as the coordinator holds it: what the client asked, what it got so far, and the attempt under way."""

import asyncio
import time

import msgspec

from dualpath.cluster.api import GeneratedTokens, GenerateRequest, RequestError, TokenLogprob
from dualpath.cluster.coordinator.stages import Stages
from dualpath.cluster.messages import Draw
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, RequestFacts, RequestId
from dualpath.kv.keys import BlockKey, Namespace
from dualpath.spec.sampling import finish_reason
from dualpath.spec.timings import Timings


class Attempt(msgspec.Struct):
    """One try at a request. Its prompt is the client's plus what earlier attempts generated, so nothing is lost."""

    attempt: int
    prompt_token_ids: list[int]
    keys: list[BlockKey]
    hit_tokens: int
    legs: list[Leg] = []
    decode_pages: list[int] | None = None
    first_draw: Draw | None = None
    stages: Stages = msgspec.field(default_factory=Stages)


class LiveRequest:
    """Owned by the coordinator from `submit` until its last event is in `events`."""

    def __init__(self, request: RequestId, asked: GenerateRequest, namespace: Namespace, arrived_ns: int) -> None:
        self.request = request
        self.asked = asked
        self._arrived_ns = arrived_ns
        self._first_token_ns = 0
        self._timings: Timings | None = None
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
        if self.asked.return_timings:
            self._stamp()
        self.events.put_nowait(self._step([draw.token_id], logprobs))

    def end(self, outcome: str | RequestError) -> None:
        """The last event: a finish reason, or the error the client gets."""
        if isinstance(outcome, str):
            self.events.put_nowait(self._step([], finish_reason=outcome))
        else:
            self.events.put_nowait(outcome)
        self.current = None

    def _step(
        self, token_ids: list[int], logprobs: list[list[TokenLogprob]] | None = None, finish_reason: str | None = None
    ) -> GeneratedTokens:
        return GeneratedTokens(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            cached_tokens=self.cached_tokens or 0,
            timings=self._timings,
        )

    def _stamp(self) -> None:
        """A token is out: its stages if it is the first, else how long decoding has taken so far."""
        assert self.current is not None
        attempts = self.current.attempt + 1
        if self._timings is None:
            self._first_token_ns = time.monotonic_ns()
            self._timings = self.current.stages.timings(self._arrived_ns, self.current.legs, attempts)
        else:
            decode_s = (time.monotonic_ns() - self._first_token_ns) / 1e9
            self._timings = msgspec.structs.replace(self._timings, decode_s=decode_s, attempts=attempts)
