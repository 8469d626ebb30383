"""Which vLLM server gets what is not routed: prompts to render, and requests that pass without KV from elsewhere."""

import asyncio
from itertools import count
from typing import Any

import msgspec
from starlette.types import Scope

from dualpath.cluster.generator import Router
from dualpath.router.asked import Fields, Rendered
from dualpath.router.choices import refused
from dualpath.router.upstream import RefusalError, Upstream, UpstreamError, left_s, whole
from dualpath.server.errors import ApiError

_RETRY_AFTER_S = 1.0
_HOW = "start it with --enable-scale-out, and give the router its key in VLLM_API_KEY"


class Servers:
    """The servers of a cluster, taken in turn."""

    def __init__(self, cluster: Router, upstream: Upstream) -> None:
        self._cluster = cluster
        self._upstream = upstream
        self._turn = count()

    def urls(self, role: str | None = None) -> list[str]:
        """Returns the servers to try, in this order; `role` is prefill or decode. Raises ApiError (503)."""
        servers = self._cluster.vllm_servers()
        urls = list(dict.fromkeys(one.url for one in servers if role in (None, one.role.value)))
        if not urls:
            message = "no vLLM server has joined yet; try again soon"
            raise ApiError(503, message, code="no_engine", retry_after_s=_RETRY_AFTER_S)
        first = next(self._turn) % len(urls)
        return urls[first:] + urls[:first]

    def names(self) -> frozenset[str]:
        """The names of the model whose KV is transferred: adapters have others."""
        return frozenset(one.model for one in self._cluster.vllm_servers())

    @property
    def shares_ports(self) -> bool:
        """Whether several engines are behind one server (data parallelism)."""
        return any(one.dp_rank is not None for one in self._cluster.vllm_servers())

    async def rendered(self, path: str, fields: Fields, scope: Scope, deadline_s: float) -> list[Rendered]:
        """Returns the prompts of a request as tokens. Raises RefusalError with what is wrong with it, and ApiError."""
        body = msgspec.json.encode(fields | {"mm_payload": msgspec.Raw(b'"none"')})
        answer = await self.asked(path + "/render", scope, deadline_s, body)
        kind: Any = list[Rendered] if path == "/v1/completions" else Rendered
        try:
            rendered = msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            message = f"a vLLM server of this version can't be used: its {path}/render gives {error}"
            raise ApiError(502, message, code="bad_render") from error
        return rendered if isinstance(rendered, list) else [rendered]

    async def asked(self, path: str, scope: Scope, deadline_s: float, body: bytes = b"", method: str = "POST") -> bytes:
        """Returns the answer of the first server that gives one. Raises RefusalError and ApiError."""
        try:
            async with asyncio.timeout(left_s(deadline_s)):
                return await self._asked(path, scope, body, method)
        except TimeoutError:
            message = f"no vLLM server has answered {path} in time"
            raise ApiError(504, message, code="deadline_exceeded") from None

    async def _asked(self, path: str, scope: Scope, body: bytes, method: str) -> bytes:
        why = ""
        for url in self.urls():
            try:
                response = await self._upstream.send(url + path, self._upstream.headers(scope), body, method)
                try:
                    if response.status_code == 200:
                        return await whole(response)
                    failure = await refused(response)
                finally:
                    await response.aclose()
            except UpstreamError as error:
                failure = error
            if isinstance(failure, RefusalError) and not _is_missing(failure):
                raise failure
            why = str(failure)
        message = f"no vLLM server answers {path}: {why}; where it is refused, {_HOW}"
        raise ApiError(503, message, code="no_engine", retry_after_s=_RETRY_AFTER_S)


def _is_missing(refusal: RefusalError) -> bool:
    """Whether the server lacks the endpoint. (An unknown model is said as an ``error``.)"""
    return refusal.status in (404, 405) and b'"error"' not in refusal.body
