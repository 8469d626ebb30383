"""Replays trajectories against an OpenAI server: all agents start at once, each turn follows the answer before it.

Theory of operation. A trajectory says how *many* tokens each round appends; the seed, the trajectory's id and the round
determine which ones, so two replays send the same appends, and agents never share a prefix. The context of a round is
what was really sent and generated before: the server's own tokens come back in the stream and go out again in the next
prompt, so its prefix is in storage if the server put it there. ::

    context ──keep──┬── append(seed, id, round) ──► prompt ──► server ──► token ids
       ▲            └──────────────────────────────────┴──────────────────────┘
       └──────────────────────── next round's context ──────────────────────┘

A first round has nothing in storage. `warm_up` runs the first rounds before the clock starts and returns the contexts
from which `replay` continues. With a journal, an interrupted replay continues from its last answered turns.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from dualpath.client.completion import CompletionError, asked_for_token_ids, open_client
from dualpath.client.http_client import HttpClient
from dualpath.client.open_files import OpenFilesError, allow_open_files
from dualpath.client.prompt import Prompt
from dualpath.client.resume import Journal, JournalError
from dualpath.client.rollout import OnTurn, ReplayOptions, Rollout
from dualpath.client.server import ServedModel, ServerError, find_server
from dualpath.client.token_ids import append_tokens, fill_tokens
from dualpath.results.turns import ReplayResult
from dualpath.traces.trajectory import Trajectory

__all__ = ["OnTurn", "ReplayError", "ReplayOptions", "append_tokens", "connected", "replay", "warm_up"]

PROBE_TOKENS = 8


class ReplayError(Exception):
    """The replay could not begin, or could not write its journal."""


async def warm_up(
    url: str, trajectories: Sequence[Trajectory], options: ReplayOptions, on_turn: OnTurn | None = None
) -> dict[str, list[int]]:
    """Runs the first round of every trajectory; returns the contexts (token ids) after it, by trajectory id.

    Raises ReplayError if a single one fails, because what follows would not be the same for everyone.
    """
    async with connected(url, _agents(trajectories), options) as (client, server):
        run = Rollout(client, server, options, on_turn)
        contexts = {one.id: Prompt() for one in trajectories}
        now_s = time.perf_counter()
        await asyncio.gather(*(run.turn(one, 0, contexts[one.id], now_s) for one in trajectories))
    if run.failures:
        first = run.failures[0]
        raise ReplayError(f"warm-up: {len(run.failures)} turns failed; {first.trajectory}: {first.message}")
    return {name: context.token_ids() for name, context in contexts.items()}


async def replay(
    url: str,
    trajectories: Sequence[Trajectory],
    options: ReplayOptions,
    *,
    contexts: Mapping[str, Sequence[int]] | None = None,
    on_turn: OnTurn | None = None,
    journal: Journal | None = None,
) -> ReplayResult:
    """Runs all `trajectories` at once to their ends; with `contexts` (from `warm_up`), from their second rounds.

    `on_turn` gets every turn as it ends, those from `journal` included. A turn that fails ends its trajectory and is in
    `ReplayResult.failures`. Raises ReplayError if no server answers, an id is not unique or has no context, or the
    journal can't be written.
    """
    agents = _agents(trajectories)
    missing = [one.id for one in trajectories if contexts is not None and one.id not in contexts]
    if missing:
        raise ReplayError(f"no context for {missing[0]!r}; warm up the same trajectories that are replayed")
    async with connected(url, agents, options) as (client, server), recorded(journal, server):
        run = Rollout(client, server, options, on_turn, journal)
        async with asyncio.TaskGroup() as group:
            for one in trajectories:
                context = None if contexts is None else contexts[one.id]
                group.create_task(run.agent(one, run.started_at_s, context))
        return run.result()


@contextlib.asynccontextmanager
async def connected(url: str, agents: int, options: ReplayOptions) -> AsyncIterator[tuple[HttpClient, ServedModel]]:
    """Yields a client for `agents` connections and the server it found. Raises ReplayError."""
    try:
        allow_open_files(agents)
        opened = open_client(url, options.api_key)
    except (OpenFilesError, ValueError) as error:
        raise ReplayError(str(error)) from error
    async with opened as client:
        try:
            server = await find_server(client, url, options.server)
            few = Prompt(fill_tokens(options.seed, "", 0, PROBE_TOKENS, options.token_ids_below))
            server = await asked_for_token_ids(client, server, few, options.turn_timeout_s)
        except (ServerError, CompletionError) as error:
            raise ReplayError(str(error)) from error
        with rare_garbage_collection():
            yield client, server


@contextlib.asynccontextmanager
async def recorded(journal: Journal | None, server: ServedModel) -> AsyncIterator[None]:
    """Runs a part of `journal`, if there is one. Raises ReplayError if it can't be written."""
    failed: JournalError | None = None
    if journal is None:
        yield
        return
    try:
        async with journal.syncing():
            journal.begin(server.context)
            yield
    except* JournalError as errors:
        failed = _first(errors)
    if failed is not None:
        raise ReplayError(str(failed)) from failed


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Makes garbage collections rare: with thousands of agents' objects, one stops the loop for tenths of a second."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _first(errors: BaseExceptionGroup[JournalError]) -> JournalError:
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _agents(trajectories: Sequence[Trajectory]) -> int:
    """Returns how many agents can be under way. Raises ReplayError unless all ids, subagents' too, are unique."""
    seen: set[str] = set()
    for one in (inner for outer in trajectories for inner in outer.walk()):
        if one.id in seen:
            raise ReplayError(f"two trajectories are called {one.id!r}; ids seed the tokens, so they must be unique")
        seen.add(one.id)
    if not seen:
        raise ReplayError("nothing to replay: no trajectories")
    return len(seen)
