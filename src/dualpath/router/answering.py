"""How the router answers: by the choices of a routed request, merged if several, or by what one server says."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dualpath.cluster.generator import Generator, ModelFacts, Router
from dualpath.router.asked import Fields, Rendered, for_choice, is_set
from dualpath.router.choices import Choice, Run, Shared, refused
from dualpath.router.merging import gathered, interleaved, named, one_answer, with_sums
from dualpath.router.passing import Passing
from dualpath.router.reading import DONE, READERS
from dualpath.router.servers import Servers
from dualpath.router.upstream import RefusalError, Upstream, UpstreamError, left_s
from dualpath.server.door import Door
from dualpath.server.drain import Drain
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.generation import Usage
from dualpath.server.http import EventStream, while_connected
from dualpath.server.limits import ServerLimits
from dualpath.server.request_record import current
from dualpath.server.requests import CheckedRequest
from dualpath.server.requests import Choice as CheckedChoice

_encode = msgspec.json.encode


class RoutingCluster(Generator, Router, Protocol):
    """A cluster of vLLM servers, as its router sees it."""


class RouterDoor(Door):
    """The state of one router. `patience_s`: how long an answer may take."""

    def __init__(
        self, cluster: RoutingCluster, limits: ServerLimits, drain: Drain, upstream: Upstream, patience_s: float
    ) -> None:
        super().__init__(cluster, limits, drain)
        self._cluster = cluster
        self._upstream = upstream
        self.servers = Servers(cluster, upstream)
        self._patience_s = patience_s

    def deadline_s(self) -> float:
        """Returns when a request that comes now must have its answer, by the loop's clock."""
        return asyncio.get_running_loop().time() + self._patience_s

    @property
    def model(self) -> ModelFacts:
        return self._cluster.model

    # ── routed ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def routed(
        self, request: Request, fields: Fields, prompts: list[Rendered], arrived_s: float, deadline_s: float
    ) -> Response:
        """Answer with the cluster's placement."""
        path, first = request.url.path, prompts[0]
        choices = self._choices(path, fields, prompts)
        returns_timings = is_set(fields, "return_timings")
        asked_usage = returns_timings or bool(first.stream_options and first.stream_options.include_usage)
        checked = _checked(prompts, choices, asked_usage, returns_timings)
        record = current()
        record.checked, record.usage = checked, (usage := Usage(checked))
        shared = Shared(
            cluster=self._cluster,
            upstream=self._upstream,
            metrics=self.metrics,
            path=path,
            scope=request.scope,
            stream=checked.stream,
            asked_usage=asked_usage,
            usage=usage,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
        )
        runs = [Run(shared, choice) for choice in choices]
        if not checked.stream:
            return await while_connected(request.receive, self._whole(runs, checked, usage))
        on_failure = partial(self.failed_midway, path, lambda error: runs[0].reader.failed(error))
        events = self._events(runs, checked, usage)
        return EventStream(events, on_failure, self.limits.write_timeout_s, self.drain)

    def _choices(self, path: str, fields: Fields, prompts: list[Rendered]) -> list[Choice]:
        n = prompts[0].sampling_params.n
        if len(prompts) * n > self.limits.max_choices:
            message = f"{len(prompts)} prompts with n={n} are {len(prompts) * n} choices; a request may have "
            raise bad_parameter("n", f"{message}{self.limits.max_choices}")
        alone = len(prompts) * n == 1
        choices: list[Choice] = []
        for prompt in prompts:
            asked = prompt.request()
            for i in range(n):
                body = for_choice(path, fields, prompt, None if n == 1 else i)
                suffix = "" if alone else f"-{len(choices)}"
                choices.append(Choice(len(choices), prompt, asked, body, suffix))
        return choices

    async def _whole(self, runs: Sequence[Run], checked: CheckedRequest, usage: Usage) -> Response:
        answers = await gathered([run.whole() for run in runs])
        answer = answers[0] if len(runs) == 1 else one_answer(runs, answers, usage)
        self._count(usage)
        return Response(_encode(_with_timings(answer, checked, usage)), media_type="application/json")

    async def _events(self, runs: Sequence[Run], checked: CheckedRequest, usage: Usage) -> AsyncGenerator[bytes, None]:
        async with aclosing(runs[0].events() if len(runs) == 1 else interleaved(runs)) as events:
            async for event in events:
                yield event
        self._count(usage)
        last = (runs[0].reader.last or DONE) + b"\n\n"
        counted = runs[0].reader.usage_event
        if counted is not None and checked.include_usage:
            if len(runs) > 1:
                counted = with_sums(named(counted, runs[0]), usage)
            last = b"data: %b\n\n" % _encode(_with_timings(counted, checked, usage)) + last
        yield last

    def _count(self, usage: Usage) -> None:
        self.metrics.answered(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    # ── passed ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def passed(self, request: Request, body: bytes, deadline_s: float) -> Response:
        """Answer with what a decode server says, without KV from elsewhere."""
        try:
            async with asyncio.timeout(left_s(deadline_s)):
                return await while_connected(request.receive, self._passed(request, body, deadline_s))
        except TimeoutError:
            message = "no vLLM server has answered in time"
            raise ApiError(504, message, code="deadline_exceeded") from None

    async def _passed(self, request: Request, body: bytes, deadline_s: float) -> Response:
        path, query = request.url.path, request.url.query
        failed = READERS.get(path, READERS["/v1/chat/completions"])(0, False).failed
        why: Exception | None = None
        for url in self.servers.urls("decode"):
            headers = self._upstream.headers(request.scope)
            try:
                answer = await self._upstream.send(f"{url}{path}{f'?{query}' if query else ''}", headers, body)
                if answer.status_code < 400:
                    on_failure = partial(self.failed_midway, path, failed)
                    return Passing(answer, on_failure, self.limits.write_timeout_s, deadline_s, self.drain)
                try:
                    raise await refused(answer)
                finally:
                    await answer.aclose()
            except UpstreamError as error:
                why = error
                if error.reached:
                    break
        message = f"no vLLM server answers {path}: {why}; try again soon"
        raise ApiError(503, message, code="no_engine", retry_after_s=1.0)

    async def refusal(self, request: Request, refusal: Exception) -> Response:
        """Answer what a server has refused, in its words; Anthropic's clients get them in their own shape."""
        assert isinstance(refusal, RefusalError)
        error = ApiError(refusal.status, _detail(refusal.body), code="refused_by_vllm")
        self.count_failure(request.url.path, error)
        body, kind = refusal.body, refusal.content_type
        if b'"error"' not in body:  # the words of vLLM's framework, in a shape that OpenAI's clients do not know
            body, kind = error.body, "application/json"
        if request.url.path.startswith("/v1/messages"):
            body = _for_anthropic(body)
        return Response(body, refusal.status, media_type=kind)


def _detail(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["detail"])
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError):
        return body[:300].decode(errors="replace")


def _checked(
    prompts: list[Rendered], choices: list[Choice], asked_usage: bool, returns_timings: bool
) -> CheckedRequest:
    """Returns the request as the access log and traces look at it."""
    n = prompts[0].sampling_params.n
    return CheckedRequest(
        prompts=[prompt.token_ids for prompt in prompts],
        choices=[CheckedChoice(choice.index, choice.index // n, choice.request) for choice in choices],
        stop=(),
        skip_special_tokens=True,
        stream=bool(prompts[0].stream),
        include_usage=asked_usage,
        return_token_ids=False,
        return_timings=returns_timings,
        logprobs=None,
    )


def _with_timings(answer: Fields, checked: CheckedRequest, usage: Usage) -> Fields:
    if not checked.return_timings or usage.timings is None:
        return answer
    return answer | {"timings": msgspec.Raw(_encode(usage.timings))}


class _Why(msgspec.Struct):
    message: str
    type: str = "invalid_request_error"


class _Said(msgspec.Struct):
    error: _Why
    type: str = ""


def _for_anthropic(body: bytes) -> bytes:
    try:
        said = msgspec.json.decode(body, type=_Said)
    except msgspec.MsgspecError:
        return body
    return body if said.type == "error" else _encode({"type": "error", "error": said.error})
