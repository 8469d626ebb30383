"""Turns the cluster's tokens into pieces of text: for one choice, for many concurrent choices, and their usage.

Every generation is closed where it is used, whatever ends it (its last piece, a stop string, an error, a client that
went away), because closing it frees its blocks in the cluster.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import msgspec

from dualpath.cluster.generator import (
    GeneratedTokens,
    GenerateRequest,
    Generator,
    PromptLogprob,
    RequestError,
    TokenLogprob,
)
from dualpath.server.chat.deltas import Delta
from dualpath.server.chat.parsing import ChatParser, ReadingPlan
from dualpath.server.chat.response_template import TemplateParser
from dualpath.server.codec import IncrementalDetokenizer, StopMatcher, TextCodec
from dualpath.server.errors import INTERNAL, ApiError
from dualpath.server.metrics import GenerationTimer
from dualpath.server.requests import CheckedRequest, Choice
from dualpath.spec.timings import Timings

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0
_PIECES_AHEAD = 2


class Piece(msgspec.Struct, kw_only=True):
    """One step of one choice. The last has a `finish_reason`. Its text may lag behind its tokens, never the reverse."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None
    finish_reason: str | None
    cached_tokens: int
    timings: Timings | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    """With the first piece, if requested."""
    stop_string: str | None = None
    """The stop string that ended the text."""
    deltas: list[Delta] = []
    """Chats: what this step adds to the message."""


def merged(pieces: Sequence[Piece]) -> Piece:
    """Returns one choice's pieces as one."""
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[entry for piece in pieces for entry in piece.logprobs or []],
        prompt_logprobs=pieces[0].prompt_logprobs,
        deltas=[delta for piece in pieces for delta in piece.deltas],
    )


def by_choice(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns one piece for each choice, in their order, from all pieces of an answer."""
    of_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_choice.setdefault(piece.choice, []).append(piece)
    return [merged(own) for _, own in sorted(of_choice.items())]


class ChoiceText:
    """Turns one choice's steps into pieces: completes characters, cuts stop strings off, leaves a stop token out
    (unless they are to be shown).

    Stop strings are searched only in the text after `min_tokens` tokens, and not inside the tool calls of `message`.
    """

    def __init__(
        self,
        codec: TextCodec,
        choice: Choice,
        stop: Sequence[str],
        skip_special_tokens: bool,
        hidden_token_ids: frozenset[int] = frozenset(),
        include_stop: bool = False,
        message: "MessageOfChoice | None" = None,
    ) -> None:
        self._choice = choice.index
        # A stop token is no text, and may come a step before the finish reason does.
        stop_tokens = () if include_stop else choice.request.sampling.stop_token_ids
        self._hidden = hidden_token_ids.union(stop_tokens)
        self._detokenizer = IncrementalDetokenizer(
            lambda ids: codec.decode(ids, skip_special_tokens=skip_special_tokens), choice.request.prompt_token_ids
        )
        self._matcher = StopMatcher(stop, include_stop)
        self._stoppable = bool(stop)
        self._message = message
        self._unstoppable_tokens = choice.request.sampling.min_tokens

    def take(self, step: GeneratedTokens) -> Piece:
        """Returns the piece of `step`. At a stop string it has the tokens up to the one that completed the string."""
        texts: list[str] = []
        used, finish_reason = len(step.token_ids), step.finish_reason
        for i, token in enumerate(step.token_ids):
            text = "" if token in self._hidden else self._detokenizer.push(token)
            texts.append(self._searched(text) if self._stoppable else text)
            if self._matcher.matched is not None:
                used, finish_reason = i + 1, "stop"
                break
        if finish_reason is not None and self._matcher.matched is None:
            texts += [self._searched(self._detokenizer.finish()), self._shown(self._matcher.finish())]
            finish_reason = finish_reason if self._matcher.matched is None else "stop"
        text = "".join(texts)
        if self._message is not None and not self._stoppable:
            self._message.push(text)
        return Piece(
            choice=self._choice,
            text=text,
            token_ids=step.token_ids if used == len(step.token_ids) else step.token_ids[:used],
            logprobs=None if step.logprobs is None else step.logprobs[:used],
            finish_reason=finish_reason,
            cached_tokens=step.cached_tokens,
            timings=step.timings,
            prompt_logprobs=step.prompt_logprobs,
            stop_string=self._matcher.matched,
        )

    def _searched(self, text: str) -> str:
        if self._unstoppable_tokens > 0:
            self._unstoppable_tokens -= 1
        elif self._message is not None and self._message.in_call:
            text = self._matcher.finish() + text
        else:
            text = self._matcher.push(text)
        return self._shown(text)

    def _shown(self, text: str) -> str:
        """What is searched next depends on what this text means, so the message reads it at once."""
        if self._message is not None and self._stoppable:
            self._message.push(text)
        return text


class MessageOfChoice:
    """Reads a chat's text, and fills the deltas of its pieces."""

    def __init__(self, plan: ReadingPlan | None) -> None:
        self._parser: ChatParser | TemplateParser | None = None
        if plan is not None:
            self._parser = ChatParser(plan) if plan.template is None else TemplateParser(plan)
        self._named = plan is not None and plan.named
        self._deltas: list[Delta] = []

    @property
    def in_call(self) -> bool:
        return self._parser is not None and self._parser.in_call

    def push(self, text: str) -> None:
        """Read text of the piece that comes next."""
        if self._parser is not None:
            self._deltas += self._parser.push(text)

    def fill(self, piece: Piece) -> None:
        """Set the deltas of `piece`. An answer with calls that stopped finishes with ``tool_calls``.

        As at OpenAI, a function that the request named is no decision of the model: such an answer just stops.
        """
        if self._parser is None:
            piece.deltas = [Delta("content", piece.text)]
            return
        piece.deltas, self._deltas = self._deltas, []
        if piece.finish_reason is not None:
            piece.deltas += self._parser.finish()
            if piece.finish_reason == "stop" and self._parser.calls and not self._named:
                piece.finish_reason = "tool_calls"


async def run_choice(
    generator: Generator, codec: TextCodec, checked: CheckedRequest, choice: Choice, timer: GenerationTimer
) -> AsyncGenerator[Piece, None]:
    """Yields pieces of one choice. Raises RequestError as the cluster does, ApiError without a finish reason."""
    plan = checked.reading
    skip = checked.skip_special_tokens and plan is None
    hidden = plan.hidden_token_ids if plan else frozenset()
    message = MessageOfChoice(plan) if checked.is_chat else None
    read = None if checked.prompt_only else message
    text = ChoiceText(codec, choice, checked.stop, skip, hidden, checked.include_stop, read)
    steps = generator.generate(choice.request)
    try:
        async for step in steps:
            if not step.token_ids and step.finish_reason is None:
                continue
            piece = text.take(step)
            if checked.prompt_only:  # the cluster always draws one token
                piece = msgspec.structs.replace(piece, text="", token_ids=[], logprobs=None, finish_reason="length")
            timer.step(len(piece.token_ids), piece.cached_tokens, piece.finish_reason, piece.timings)
            if message is not None:
                message.fill(piece)
            yield piece
            if piece.finish_reason is not None:
                return
    except RequestError as error:
        raise _located(error, checked.form) from None
    finally:
        timer.close(sys.exc_info()[0])
        await _close(steps)
    raise ApiError(500, "the generation ended without a finish reason; please report it", code=INTERNAL)


def _located(error: RequestError, form: str) -> Exception:
    """Returns the error with the field it comes from, where that is a grammar that an engine could not follow."""
    if not (form and error.status == 400 and "grammar" in str(error)):
        return error
    return ApiError(400, f"{form} can't be enforced: {error}", code=error.code, param=form)


async def run_request(
    generator: Generator,
    codec: TextCodec,
    checked: CheckedRequest,
    new_timer: Callable[[GenerateRequest], GenerationTimer],
) -> AsyncGenerator[Piece, None]:
    """Yields pieces of all choices as they come. The first failure ends all of them."""
    sources = [run_choice(generator, codec, checked, choice, new_timer(choice.request)) for choice in checked.choices]
    async with contextlib.aclosing(sources[0] if len(sources) == 1 else _merged(sources)) as pieces:
        async for piece in pieces:
            yield piece


async def _merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(_PIECES_AHEAD * len(sources))

    async def pump(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for piece in source:
                    await queue.put(piece)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(sources)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finish_reason is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _close(steps: AsyncGenerator[GeneratedTokens, None]) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await steps.aclose()
    except TimeoutError:
        logger.error("the cluster did not end a cancelled generation within %.0f s", _CLOSE_TIMEOUT_S)


class Usage:
    """A request's token counts and timings. Each prompt counts once, however many choices answer it."""

    def __init__(self, checked: CheckedRequest) -> None:
        self._prompt_of = [choice.prompt_index for choice in checked.choices]
        self._cached_tokens = [0] * len(checked.prompts)
        self._reasoning = [False] * len(checked.choices)
        self.prompt_tokens = sum(map(len, checked.prompts))
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        """Tokens of the steps at whose end the model was reasoning."""
        self.timings: Timings | None = None
        self.first_token_s: float | None = None
        """When the first token came, by ``time.perf_counter``."""

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached_tokens)

    def add(self, piece: Piece) -> None:
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter()
        prompt = self._prompt_of[piece.choice]
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], piece.cached_tokens)
        self.completion_tokens += len(piece.token_ids)
        self.timings = piece.timings
        if piece.deltas:
            self._reasoning[piece.choice] = piece.deltas[-1].kind == "reasoning"
        if self._reasoning[piece.choice]:
            self.reasoning_tokens += len(piece.token_ids)
