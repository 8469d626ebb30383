"""Replays trajectories against an OpenAI server: every agent at once, each turn as soon as the one before is answered.

Theory of operation. A trajectory says how *many* tokens each round appends; which ones follows from the seed, the
trajectory's id and the round, so two replays send the same appends, and agents never share a prefix. The context of a
round is what was really sent and really generated before: the server's own tokens come back in the stream and go out
again in the next prompt, so its prefix is in storage if the server put it there. ::

    context ──keep──┬── append(seed, id, round) ──► prompt ──► server ──► token ids
       ▲            └──────────────────────────────────┴──────────────────────┘
       └──────────────────────── next round's context ──────────────────────┘

A first round has nothing in storage. `warm_up` runs the first rounds before the clock starts and returns the contexts
from which `replay` goes on.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence

import httpx
import msgspec
import numpy as np

from dualpath.workload.completion import Completion, CompletionError, complete, open_client, served_model
from dualpath.workload.result import ReplayResult, TurnFailure, TurnResult
from dualpath.workload.trajectory import Round, Trajectory

OnTurn = Callable[[TurnResult | TurnFailure], None]
MAX_RETRY_DELAY_S = 30.0


class ReplayError(Exception):
    """A replay that could not begin."""


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to replay."""

    seed: int = 0
    token_ids_below: int = 256
    """Appended token ids are uniform in ``[0, this)``; keep it below the vocabulary and out of the special tokens."""
    retries: int = 2
    """Further tries of a turn after an error that may pass: no connection, a broken stream, 408, 429 or 5xx."""
    retry_delay_s: float = 0.5
    """Before the second try; doubled before each further one. A server's Retry-After wins."""
    turn_timeout_s: float = 300.0
    """Deadline of one try."""
    gap_scale: float = 0.0
    """Factor on the trajectories' pauses; 0 replays without tool time (paper §9)."""
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.token_ids_below < 2 or self.retries < 0 or self.turn_timeout_s <= 0 or self.gap_scale < 0:
            raise ValueError(
                "token_ids_below must be at least 2, retries and gap_scale at least 0 and turn_timeout_s above 0, not "
                f"{self.token_ids_below}, {self.retries}, {self.gap_scale:g} and {self.turn_timeout_s:g}"
            )


async def warm_up(
    url: str, trajectories: Sequence[Trajectory], options: ReplayOptions, on_turn: OnTurn | None = None
) -> dict[str, list[int]]:
    """Run the first round of every trajectory; return the contexts (token ids) after it, by trajectory id.

    Raises ReplayError if a single one fails: what follows would not be the same for everyone.
    """
    async with open_client(url, options.api_key) as client:
        run = _Run(client, await _model(client), options, on_turn)
        contexts = await asyncio.gather(*(run.turn(one, 0, []) for one in _checked(trajectories)))
    if run.failures:
        first = run.failures[0]
        raise ReplayError(f"warm-up: {len(run.failures)} turns failed; {first.trajectory}: {first.message}")
    return {one.id: context for one, context in zip(trajectories, contexts, strict=True) if context is not None}


async def replay(
    url: str,
    trajectories: Sequence[Trajectory],
    options: ReplayOptions,
    *,
    contexts: Mapping[str, Sequence[int]] | None = None,
    on_turn: OnTurn | None = None,
) -> ReplayResult:
    """Run all `trajectories` at once to their ends; with `contexts` (from `warm_up`), from their second rounds.

    `on_turn` sees every turn as it ends. A turn that fails ends its trajectory and is in `ReplayResult.failures`.
    Raises ReplayError where there is no server, an id is not unique or has no context.
    """
    missing = [one.id for one in _checked(trajectories) if contexts is not None and one.id not in contexts]
    if missing:
        raise ReplayError(f"no context for {missing[0]!r}; warm up the same trajectories that are replayed")
    async with open_client(url, options.api_key) as client:
        run = _Run(client, await _model(client), options, on_turn)
        async with asyncio.TaskGroup() as agents:
            for one in trajectories:
                agents.create_task(run.agent(one, None if contexts is None else list(contexts[one.id])))
        jct_s = time.perf_counter() - run.started_at_s
    return ReplayResult(jct_s=jct_s, turns=tuple(run.turns), failures=tuple(run.failures))


def append_tokens(seed: int, trajectory: str, round_index: int, count: int, below: int) -> list[int]:
    """The `count` token ids that round `round_index` appends: a function of its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{trajectory}/{round_index}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    tokens: list[int] = rng.integers(0, below, size=count).tolist()
    return tokens


class _Run:
    """One replay under way: the clock, the client and what has been measured."""

    def __init__(self, client: httpx.AsyncClient, model: str, options: ReplayOptions, on_turn: OnTurn | None) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._on_turn = on_turn
        self.turns: list[TurnResult] = []
        self.failures: list[TurnFailure] = []
        self.started_at_s = time.perf_counter()

    async def agent(self, trajectory: Trajectory, context: list[int] | None) -> None:
        """All rounds of `trajectory`; from the second where `context` is what the first left."""
        if context is not None:
            await self._subagents(trajectory.rounds[0])
        for index in range(0 if context is None else 1, len(trajectory.rounds)):
            round_ = trajectory.rounds[index]
            await asyncio.sleep(round_.gap_s * self._options.gap_scale)
            context = await self.turn(trajectory, index, context or [])
            if context is None:
                return
            await self._subagents(round_)

    async def turn(self, trajectory: Trajectory, index: int, context: list[int]) -> list[int] | None:
        """One round: the context after it, or None when it failed (which is recorded)."""
        round_, options = trajectory.rounds[index], self._options
        append = append_tokens(options.seed, trajectory.id, index, round_.append_tokens, options.token_ids_below)
        prompt = context[: round_.keep_tokens] + append
        sent_at_s = time.perf_counter()
        for tried in range(1, options.retries + 2):
            try:
                done = await complete(self._client, self._model, prompt, round_.generate_tokens, options.turn_timeout_s)
            except CompletionError as error:
                if tried <= options.retries and error.retryable:
                    await asyncio.sleep(self._retry_delay_s(tried, error))
                    continue
                left = len(trajectory.rounds) - index - 1
                self._failed(
                    TurnFailure(
                        trajectory=trajectory.id,
                        round_index=index,
                        tries=tried,
                        message=str(error),
                        abandoned_rounds=left,
                    )
                )
                return None
            self._answered(trajectory.id, index, tried, sent_at_s, done)
            return prompt + done.token_ids
        raise AssertionError("unreachable: the last try returns")

    async def _subagents(self, round_: Round) -> None:
        async with asyncio.TaskGroup() as group:
            for subagent in round_.subagents:
                group.create_task(self.agent(subagent, None))

    def _retry_delay_s(self, tried: int, error: CompletionError) -> float:
        delay_s = self._options.retry_delay_s * 2 ** (tried - 1) if error.retry_after_s is None else error.retry_after_s
        return min(max(0.0, delay_s), MAX_RETRY_DELAY_S)

    def _answered(self, trajectory: str, index: int, tries: int, sent_at_s: float, done: Completion) -> None:
        first_s, later_tokens = done.first_token_at_s, len(done.token_ids) - 1
        turn = TurnResult(
            trajectory=trajectory,
            round_index=index,
            tries=tries,
            start_s=sent_at_s - self.started_at_s,
            ttft_s=first_s - sent_at_s,
            ttst_s=None if done.second_token_at_s is None else done.second_token_at_s - first_s,
            tpot_s=(done.last_token_at_s - first_s) / later_tokens if later_tokens else None,
            latency_s=done.last_token_at_s - sent_at_s,
            prompt_tokens=done.prompt_tokens,
            loaded_tokens=done.loaded_tokens,
            generated_tokens=len(done.token_ids),
            output_digest=hashlib.blake2b(np.array(done.token_ids, "<u4").tobytes(), digest_size=8).hexdigest(),
        )
        self.turns.append(turn)
        if self._on_turn is not None:
            self._on_turn(turn)

    def _failed(self, failure: TurnFailure) -> None:
        self.failures.append(failure)
        if self._on_turn is not None:
            self._on_turn(failure)


async def _model(client: httpx.AsyncClient) -> str:
    try:
        return await served_model(client)
    except CompletionError as error:
        raise ReplayError(str(error)) from error


def _checked(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """`trajectories`, whose ids, subagents' included, are unique; raises ReplayError."""
    seen: set[str] = set()
    for one in (inner for outer in trajectories for inner in outer.walk()):
        if one.id in seen:
            raise ReplayError(f"two trajectories are called {one.id!r}; ids seed the tokens, so they must be unique")
        seen.add(one.id)
    if not seen:
        raise ReplayError("nothing to replay: no trajectories")
    return trajectories
