"""Agents under way: each sends its turns one after another, on time, and continues from what was really generated.

Offline replays (`dualpath.client.replay`) and online ones (`dualpath.client.online`) use this; they differ in when
agents start and when they stop. A turn is due when its agent's pause ends. How much later it is sent is its pacing
error: the load generator's own share of the measurement.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from dualpath.client.completion import Completion, CompletionError, complete
from dualpath.client.http_client import HttpClient
from dualpath.client.prompt import Prompt
from dualpath.client.resume import Journal
from dualpath.client.server import ServedModel, ServerKind
from dualpath.client.token_ids import append_tokens, digest, fill_tokens
from dualpath.results.turns import Part, ReplayResult, TurnFailure, TurnResult
from dualpath.traces.trajectory import Round, Trajectory

OnTurn = Callable[[TurnResult | TurnFailure], None]
MAX_RETRY_DELAY_S = 30.0


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to replay."""

    seed: int = 0
    token_ids_below: int = 256
    """Appended token ids are uniform in ``[0, this)``; keep it below the vocabulary and out of the special tokens."""
    retries: int = 2
    """Further tries of a turn after a transient error: no connection, a broken stream, 408, 429 or 5xx."""
    retry_delay_s: float = 0.5
    """Delay before the second try; doubled before each further one. A server's Retry-After overrides it."""
    turn_timeout_s: float = 300.0
    """Deadline of one try."""
    gap_scale: float = 0.0
    """Factor on the trajectories' pauses; 0 replays without tool time (paper §9)."""
    api_key: str | None = None
    server: ServerKind | None = None
    """None: the kind that the server says it is."""

    def __post_init__(self) -> None:
        if self.token_ids_below < 2 or self.retries < 0 or self.turn_timeout_s <= 0 or self.gap_scale < 0:
            raise ValueError(
                "token_ids_below must be at least 2, retries and gap_scale at least 0 and turn_timeout_s above 0, not "
                f"{self.token_ids_below}, {self.retries}, {self.gap_scale:g} and {self.turn_timeout_s:g}"
            )


class Rollout:
    """One replay under way: its clock, its client and its measurements."""

    def __init__(
        self,
        client: HttpClient,
        server: ServedModel,
        options: ReplayOptions,
        on_turn: OnTurn | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._client = client
        self._server = server
        self._options = options
        self._on_turn = on_turn
        self._journal = journal
        self._stopped = False
        self._reports_loaded = False
        self.turns: list[TurnResult] = []
        self.failures: list[TurnFailure] = []
        self.waiting_since_s: dict[str, float] = {}
        """Agents that wait for a first token, with the time their turns were due."""
        earlier = () if journal is None else journal.parts
        self._earlier_s = sum(part.wall_s for part in earlier)
        self.started_at_s = time.perf_counter()

    def stop(self) -> None:
        """Lets no agent send another turn; turns under way may end."""
        self._stopped = True

    def result(self) -> ReplayResult:
        """Returns the measurements up to now."""
        wall_s = time.perf_counter() - self.started_at_s
        parts = self._journal.all_parts() if self._journal else ()
        return ReplayResult(
            jct_s=self._earlier_s + wall_s,
            turns=tuple(self.turns),
            failures=tuple(self.failures),
            context=self._server.context,
            server=self._server.kind,
            model=self._server.model,
            cluster=self._server.cluster,
            reports_loaded=self._reports_loaded or not self.turns,
            parts=parts or (Part(started_at="", wall_s=wall_s, turns=len(self.turns)),),
        )

    async def agent(self, trajectory: Trajectory, due_s: float, context: Sequence[int] | None = None) -> None:
        """Runs all rounds of `trajectory`, the first due at `due_s`; with `context`, from the second round."""
        prompt = Prompt(context or ())
        if context is not None:
            await self._subagents(trajectory.rounds[0])
        for index in range(0 if context is None else 1, len(trajectory.rounds)):
            round_ = trajectory.rounds[index]
            if not self._recall(trajectory.id, index, round_, prompt):
                due_s += round_.gap_s * self._options.gap_scale
                await _sleep_until(due_s)
                ended_s = None if self._stopped else await self.turn(trajectory, index, prompt, due_s)
                if ended_s is None:
                    return
                due_s = ended_s
            if round_.subagents:
                await self._subagents(round_)
                due_s = time.perf_counter()

    async def turn(self, trajectory: Trajectory, index: int, prompt: Prompt, due_s: float) -> float | None:
        """Runs one round; `prompt` becomes the context after it. Returns when its answer ended, None if it failed."""
        round_, options = trajectory.rounds[index], self._options
        self._append(trajectory.id, index, round_, prompt)
        sent_at_s: float | None = None
        self.waiting_since_s[trajectory.id] = due_s
        first_token = partial(self.waiting_since_s.pop, trajectory.id, None)
        try:
            for tried in range(1, options.retries + 2):
                began_s = time.perf_counter()
                try:
                    done = await complete(
                        self._client,
                        self._server,
                        prompt,
                        round_.generate_tokens,
                        options.turn_timeout_s,
                        first_token,
                    )
                except CompletionError as error:
                    sent_at_s = sent_at_s or began_s
                    if tried <= options.retries and error.retryable:
                        await asyncio.sleep(self._retry_delay_s(tried, error))
                        continue
                    self._failed(trajectory, index, tried, error)
                    return None
                self._answered(trajectory.id, index, tried, due_s, sent_at_s or done.sent_at_s, done, prompt)
                return done.ended_at_s
        finally:
            self.waiting_since_s.pop(trajectory.id, None)
        raise AssertionError("unreachable: the last try returns")

    def _append(self, trajectory: str, index: int, round_: Round, prompt: Prompt) -> None:
        options = self._options
        if round_.keep_tokens is not None:
            prompt.keep(round_.keep_tokens)
        prompt.extend(append_tokens(options.seed, trajectory, index, round_.append_tokens, options.token_ids_below))

    def _recall(self, trajectory: str, index: int, round_: Round, prompt: Prompt) -> bool:
        """Whether an earlier part answered this turn; if so, makes `prompt` the context after it."""
        line = None if self._journal is None else self._journal.answered.get((trajectory, index))
        if line is None:
            return False
        self._append(trajectory, index, round_, prompt)
        prompt.extend(line.token_ids or self._fill(trajectory, index, line.turn.generated_tokens))
        self._reports_loaded = True
        self.turns.append(line.turn)
        if self._on_turn is not None:
            self._on_turn(line.turn)
        return True

    def _fill(self, trajectory: str, index: int, count: int) -> list[int]:
        return fill_tokens(self._options.seed, trajectory, index, count, self._options.token_ids_below)

    async def _subagents(self, round_: Round) -> None:
        async with asyncio.TaskGroup() as group:
            for subagent in round_.subagents:
                group.create_task(self.agent(subagent, time.perf_counter()))

    def _retry_delay_s(self, tried: int, error: CompletionError) -> float:
        delay_s = self._options.retry_delay_s * 2 ** (tried - 1) if error.retry_after_s is None else error.retry_after_s
        return min(max(0.0, delay_s), MAX_RETRY_DELAY_S)

    def _answered(
        self, trajectory: str, index: int, tries: int, due_s: float, sent_at_s: float, done: Completion, prompt: Prompt
    ) -> None:
        first_s = done.first_token_at_s
        # Without a second event, nobody can tell how long the tokens after the first took.
        later_tokens = 0 if done.second_token_at_s is None else done.generated_tokens - 1
        turn = TurnResult(
            trajectory=trajectory,
            round_index=index,
            tries=tries,
            start_s=self._earlier_s + sent_at_s - self.started_at_s,
            ttft_s=first_s - sent_at_s,
            ttst_s=None if done.second_token_at_s is None else done.second_token_at_s - first_s,
            tpot_s=(done.last_token_at_s - first_s) / later_tokens if later_tokens else None,
            latency_s=done.last_token_at_s - sent_at_s,
            prompt_tokens=done.prompt_tokens,
            loaded_tokens=done.loaded_tokens or 0,
            generated_tokens=done.generated_tokens,
            output_digest="" if done.token_ids is None else digest(done.token_ids),
            timings=done.timings,
            pacing_error_s=sent_at_s - due_s,
        )
        prompt.extend(done.token_ids or self._fill(trajectory, index, done.generated_tokens))
        self._reports_loaded |= done.loaded_tokens is not None
        self.turns.append(turn)
        if self._journal is not None:
            self._journal.turn(turn, done.token_ids)
        if self._on_turn is not None:
            self._on_turn(turn)

    def _failed(self, trajectory: Trajectory, index: int, tries: int, error: CompletionError) -> None:
        failure = TurnFailure(
            trajectory=trajectory.id,
            round_index=index,
            tries=tries,
            message=str(error),
            abandoned_rounds=len(trajectory.rounds) - index - 1,
        )
        self.failures.append(failure)
        if self._journal is not None:
            self._journal.failure(failure)
        if self._on_turn is not None:
            self._on_turn(failure)


def identity_of(trajectories: Sequence[Trajectory], options: ReplayOptions) -> str:
    """Returns what decides which prompts a replay sends; it is the same for all parts of a replay."""
    decides = [options.seed, options.token_ids_below, trajectories]
    return hashlib.blake2b(msgspec.json.encode(decides), digest_size=16).hexdigest()


async def _sleep_until(due_s: float) -> None:
    left_s = due_s - time.perf_counter()
    if left_s > 0:
        await asyncio.sleep(left_s)
