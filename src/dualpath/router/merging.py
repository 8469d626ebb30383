"""Several choices as one answer: each has its own way through the cluster, as vLLM's engine has for each a request."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from dualpath.router.asked import Fields
from dualpath.router.choices import Run
from dualpath.router.reading import decoded, fields_of
from dualpath.router.upstream import data_of
from dualpath.server.generation import Usage

T = TypeVar("T")

_EVENTS_AHEAD = 2
_encode = msgspec.json.encode


class _End(msgspec.Struct):
    failure: Exception | None


async def interleaved(runs: Sequence[Run]) -> AsyncGenerator[bytes, None]:
    """Yields the events of all as they come, each under its own index. The first failure ends all of them."""
    queue: asyncio.Queue[tuple[Run, bytes] | _End] = asyncio.Queue(_EVENTS_AHEAD * len(runs))

    async def pump(run: Run) -> None:
        try:
            async with contextlib.aclosing(run.events()) as events:
                async for event in events:
                    await queue.put((run, event))
            await queue.put(_End(None))
        except Exception as error:
            await queue.put(_End(error))

    pumps = [asyncio.create_task(pump(run)) for run in runs]
    common: Fields = {}
    """What all events of an answer have in common, taken from the first one."""
    try:
        running = len(runs)
        while running:
            item = await queue.get()
            if isinstance(item, _End):
                if item.failure is not None:
                    raise item.failure
                running -= 1
            else:
                yield _of_choice(*item, common)
    finally:
        await _ended(pumps)


async def gathered(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results. The first failure ends all, then is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(tasks)


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _of_choice(run: Run, event: bytes, common: Fields) -> bytes:
    data = data_of(event)
    if not data:
        return event
    chunk = fields_of(data, "an event")
    if not common:
        common |= {name: value for name, value in named(chunk, run).items() if name in ("id", "created")}
    choices = decoded(chunk.get("choices", Raw(b"[]")), list[Fields], "an event's choices")
    return b"data: %b\n\n" % _encode(chunk | common | _indexed(choices, run.choice.index))


def named(answer: Fields, run: Run) -> Fields:
    """Returns an answer under the id of its request."""
    if "id" not in answer:
        return answer
    own = decoded(answer["id"], str, "an id")
    return answer | {"id": Raw(_encode(own.removesuffix(run.choice.suffix)))}


def _indexed(choices: list[Fields], first: int) -> Fields:
    if not choices:
        return {}
    return {"choices": Raw(_encode([{**choice, "index": first + i} for i, choice in enumerate(choices)]))}


def one_answer(runs: Sequence[Run], answers: Sequence[Fields], usage: Usage) -> Fields:
    """Returns whole answers as one, with their choices in order."""
    own = (decoded(answer["choices"], list[Fields], "the answer's choices") for answer in answers)
    choices = [choice for some in own for choice in some]
    first = named(answers[0], runs[0])
    metrics = {"metrics": Raw(b"null")} if "metrics" in first else {}
    return with_sums(first, usage) | metrics | _indexed(choices, 0)


def with_sums(answer: Fields, usage: Usage) -> Fields:
    """Returns an answer, or the event with the usage, with that of all choices.

    As in vLLM a prompt counts once, and figures of one generation are left out.
    """
    own: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    given = msgspec.json.decode(answer["usage"], type=Fields)
    for name, count in (("prompt_tokens_details", "cached_tokens"), ("completion_tokens_details", "reasoning_tokens")):
        if bytes(given.get(name, Raw(b"null"))) != b"null":
            own[name] = msgspec.json.decode(given[name], type=Fields) | {count: Raw(_encode(getattr(usage, count)))}
    kept = {name: value for name, value in answer.items() if name != "metrics"}
    return kept | {"usage": Raw(_encode(given | own))}
