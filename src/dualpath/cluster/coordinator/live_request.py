"""The coordinator's record of a request: what the client asked, what it got so far, its current attempt (`attempt`).

`order` turns core's commands into control messages: core says which engine gets which command, and `order` adds the
payload that core does not know.
"""

import asyncio
import time

import msgspec

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.attempt import Attempt
from dualpath.cluster.generator import (
    GeneratedTokens,
    GenerateRequest,
    Handoff,
    PromptLogprob,
    RequestError,
    TokenLogprob,
)
from dualpath.cluster.messages import Draw
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Decode,
    Leg,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    RequestId,
    Side,
)
from dualpath.kv.keys import BlockKey, Namespace
from dualpath.spec.sampling import finish_reason, token_history
from dualpath.spec.timings import Timings


class LiveRequest:
    """A request that the coordinator owns from `submit` until its last event is in `events`.

    One that is `routed` is answered by a vLLM server: no tokens come here, and each attempt has the client's prompt.
    """

    def __init__(self, asked: GenerateRequest, arrived_ns: int, routed: bool = False) -> None:
        self.asked = asked
        self.routed = routed
        self.ended_as: str | None = None
        """The finish reason that the decode engine has told of a routed request."""
        self.owner: tuple[int, int] | None = None
        """The attempt that was handed off and whose answer counts, also once it has ended well."""
        self._arrived_ns = arrived_ns
        self._first_token_ns = 0
        self._timings: Timings | None = None
        self._earlier_attempts = 0
        self.ended = False
        self.generated: list[int] = []
        self.cached_tokens: int | None = None
        # Bounded by max_tokens + 1 entries, so a slow client never makes the producer wait.
        self.events: asyncio.Queue[GeneratedTokens | Handoff | RequestError] = asyncio.Queue()
        self.current: Attempt | None = None
        self.recompute = False
        """True once an engine could not reach the store: later attempts compute the whole prompt."""

    def enter(self, request: RequestId, namespace: Namespace) -> None:
        """The scheduler will know it as `request`, and its KV is in `namespace`; after a pause both are new."""
        self.request = request
        self.namespace = namespace

    def leave(self) -> None:
        """It is taken off the engines, to `enter` again later."""
        self._earlier_attempts += self.current.attempt + 1 if self.current is not None else 0
        self.current = self.owner = None

    def begin(self, attempt: int, prompt_token_ids: list[int], keys: list[BlockKey], hit_blocks: int) -> RequestFacts:
        """Start an attempt that has `hit_blocks` of its prompt in storage. Returns its facts for core."""
        self.owner = None
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
    def reads(self) -> bool:
        """Whether the attempt waits for its prefix to be read."""
        return self.current is not None and self.current.loaded_legs < len(self.current.legs)

    @property
    def generated_before(self) -> int:
        """Number of tokens in the attempt's prompt that earlier attempts generated."""
        assert self.current is not None
        return len(self.current.prompt_token_ids) - len(self.asked.prompt_token_ids)

    @property
    def reason(self) -> str | None:
        """Why generation has ended; None while it goes on."""
        if not self.generated:
            return self.ended_as
        return finish_reason(self.asked.sampling, self.generated[-1], len(self.generated))

    @property
    def scores_prompt(self) -> bool:
        """Whether this attempt owes the client its prompt's log-probabilities, which come with the first token."""
        return self.asked.sampling.prompt_logprobs is not None and not self.generated

    def note_scores(self, scores: m.PromptLogprobs) -> None:
        """Keep the scores of one prefill chunk for the first token."""
        assert self.current is not None
        for token_ids, logprobs, rank in zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True):
            tokens = [TokenLogprob(token, logprob) for token, logprob in zip(token_ids, logprobs, strict=True)]
            self.current.prompt_logprobs.append(PromptLogprob(rank, tokens))

    def emit(self, draw: Draw) -> None:
        """Send a token to the client; no later attempt generates it again."""
        scores = self.current.prompt_logprobs if self.current is not None and self.scores_prompt else None
        self.generated.append(draw.token_id)
        logprobs = None
        if draw.logprobs is not None:
            logprobs = [[TokenLogprob(token_id, logprob) for token_id, logprob in draw.logprobs]]
        self._stamp()
        self.events.put_nowait(self._step([draw.token_id], logprobs, prompt_logprobs=scores))

    @property
    def answered(self) -> bool:
        """Whether the client has got something."""
        return self._timings is not None

    def hand_off(self, url: str, model: str, dp_rank: int | None) -> None:
        """The decode engine that has this URL may be asked now."""
        assert self.current is not None
        self.owner = owner = (self.request, self.current.attempt)
        hit_tokens = self.current.hit_tokens
        self.events.put_nowait(Handoff(url=url, model=model, dp_rank=dp_rank, owner=owner, cached_tokens=hit_tokens))

    def stamp(self) -> Timings:
        """The client has got something; see `cluster.generator.Router.answered`."""
        if self.current is not None:
            self._stamp()
        assert self._timings is not None
        return self._timings

    def end(self, outcome: str | RequestError) -> None:
        """Send the last event: a finish reason, or the error that the client gets."""
        if isinstance(outcome, RequestError):
            self.owner = None
        elif self.owner is not None and not self.answered:
            self._stamp()  # the server was quicker with the end than its answer is on the way to the router
        if isinstance(outcome, str):
            self.events.put_nowait(self._step([], finish_reason=outcome))
        else:
            self.events.put_nowait(outcome)
        self.current = None
        self.ended = True

    def _step(
        self,
        token_ids: list[int],
        logprobs: list[list[TokenLogprob]] | None = None,
        finish_reason: str | None = None,
        prompt_logprobs: list[PromptLogprob] | None = None,
    ) -> GeneratedTokens:
        return GeneratedTokens(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            cached_tokens=self.cached_tokens or 0,
            timings=self._timings,
            prompt_logprobs=prompt_logprobs,
        )

    def _stamp(self) -> None:
        """Note the time of a token: the stages for the first one, else how long decoding has taken so far."""
        assert self.current is not None
        attempts = self._earlier_attempts + self.current.attempt + 1
        if self._timings is None:
            self._first_token_ns = time.monotonic_ns()
            kv_bytes = self.namespace.layout.kv_bytes
            self._timings = self.current.stages.timings(self._arrived_ns, self.current.legs, kv_bytes, attempts)
        else:
            decode_s = (time.monotonic_ns() - self._first_token_ns) / 1e9
            self._timings = msgspec.structs.replace(self._timings, decode_s=decode_s, attempts=attempts)


def order(live: LiveRequest, command: Prepare | Load | Prefill | Decode, decode_address: str) -> m.ToEngine:
    """Returns the message that carries out `command`, and records the leg of a `Load` in the attempt.

    `decode_address` is that of the decode engine's data server, for `Prefill`.
    """
    attempt = live.current
    assert attempt is not None and attempt.attempt == command.attempt
    ids = (live.request, attempt.attempt)
    sampling = live.asked.sampling
    match command:
        case Prepare() | Decode():
            attempt.decode_engine = command.engine
        case Load(leg=Leg(side=Side.DE)):
            attempt.decode_engine = command.engine
        case Load() | Prefill():
            attempt.prefill_engine = command.engine
    match command:
        case Prepare():
            return m.PrepareDecode(
                *ids, len(attempt.prompt_token_ids), attempt.hit_tokens, live.namespace, attempt.keys
            )
        case Load(leg=leg):
            attempt.legs.append(leg)
            keys = attempt.keys[leg.first_block : leg.first_block + leg.blocks]
            return m.LoadLeg(*ids, leg, attempt.hit_tokens, live.namespace, keys)
        case Prefill():
            assert attempt.decode_pages is not None
            if not live.scores_prompt:
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
            return m.StartPrefill(
                *ids,
                attempt.hit_tokens,
                attempt.prompt_token_ids[attempt.hit_tokens :],
                attempt.legs,
                command.decode_engine,
                decode_address,
                attempt.decode_pages,
                sampling,
                live.generated_before,
                token_history(sampling, live.asked.prompt_token_ids, live.generated),
                attempt.prompt_token_ids[: attempt.hit_tokens] if live.routed else [],
            )
        case Decode():
            assert attempt.prefilled
            tail = attempt.prompt_token_ids[len(attempt.keys) * BLOCK_TOKENS :]
            history = token_history(sampling, live.asked.prompt_token_ids, live.generated)
            return m.StartDecode(*ids, attempt.first_draw, tail, sampling, live.generated_before, history)
