"""A cluster with its OpenAI server in this process: for `dualpath.Server`, and for the server part of `dualpath serve`.

A successor, which takes over from a server that still ends its requests, goes through its start in steps (`Standby`):
it loads, then takes new connections and lets their requests wait, then starts its coordinator, then answers.
"""

import asyncio
import contextlib
import os
import shlex
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.local import Cluster, Situation
from dualpath.cluster.preflight import settled
from dualpath.cluster.preflight_files import warn_of_open_key
from dualpath.cluster.supervisor import wait_out
from dualpath.kv import StoreError
from dualpath.server import bind, create_app, load_tokenizer, serve
from dualpath.server.front import Front
from dualpath.server.listening import Application
from dualpath.server.request_log import Observer, RequestLog, log_access

StartErrors = (OSError, RuntimeError, StoreError, TimeoutError, ValueError)
"""The exceptions of entering a `ClusterServer` when the cluster can't start; the message says why."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ClusterServer:
    """A cluster and its server. An async context manager, entered once all engines have joined and requests are served.

    The port answers probes from the start (`server.front`). With `local_engines` False, engines join from other hosts
    (`dualpath engine`). Entering raises `StartErrors`.
    """

    def __init__(self, config: ClusterConfig, local_engines: bool = True, situation: Situation | None = None) -> None:
        self.config = config
        self._local_engines = local_engines
        self._situation = situation or Situation()
        self.cluster = Cluster(config, local_engines)
        self.chats = False
        """Whether the model has a chat template."""
        self._front = Front(lambda: self.cluster.progress())
        self._serving: asyncio.Task[None] | None = None
        self._port = 0
        self._closing = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """``http://host:port`` or ``https:``, as this host reaches it; the API is below ``/v1``."""
        host = _LOOPBACK.get(self.config.host, self.config.host)
        scheme = "https" if self.config.tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def __aenter__(self) -> "ClusterServer":
        situation = self._situation
        listener = situation.listener or bind(self.config.host, self.config.port)
        try:
            self.config = await asyncio.to_thread(settled, self.config, self._local_engines)
        except BaseException:
            listener.close()
            raise
        self._port = int(listener.getsockname()[1])
        self.cluster = Cluster(self.config, self._local_engines, situation)
        try:
            if situation.standby is None:
                self._listen(listener)
                app, _ = await _all(asyncio.to_thread(self._application), self._start_cluster())
            else:
                app = await asyncio.to_thread(self._application)
                await situation.standby.may_listen()
                self._front.patience_s = self.config.request_deadline_ns / 1e9
                self._listen(listener)
                await situation.standby.may_control()
                await self._start_cluster()
            self._front.open(app(self.cluster.coordinator))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _listen(self, listener: socket.socket) -> None:
        warn_of_open_key(self.config)
        app = RequestLog(self._front, self._observers())
        self._serving = asyncio.create_task(serve(app, listener, drain_s=self.config.drain_s, tls=self.config.tls))

    async def _start_cluster(self) -> None:
        await self.cluster.__aenter__()

    def _application(self) -> Callable[[Coordinator], Application]:
        """Returns what makes the application once there is a coordinator. Takes seconds."""
        config, front = self.config, self._front
        if config.engine == "vllm":
            from dualpath.router import create_router

            self.chats = _has_chat_template(config.model)
            return partial(
                create_router,
                api_keys=config.api_keys,
                limits=front.limits,
                drain=front.drain,
                deadline_s=config.request_deadline_ns / 1e9,
            )
        tokenizer = load_tokenizer(config.model)
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        return partial(
            create_app,
            tokenizer=tokenizer,
            api_keys=config.api_keys,
            limits=front.limits,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
            drain=front.drain,
            enable_control=config.enable_control,
        )

    async def __aexit__(self, *_: object) -> None:
        """Give running requests `drain_s` to end, then stop the cluster. Cancelled: end them at once.

        After `hand_over` the engines stay, for the successor.
        """
        try:
            if self._serving is not None:
                self._serving.cancel()
                await asyncio.gather(self._serving, return_exceptions=True)
        finally:
            closing = asyncio.ensure_future(self.cluster.__aexit__())
            try:
                await asyncio.shield(closing)
            finally:
                await closing  # a signal does not leave engines behind
                await asyncio.to_thread(self._closing.close)

    def _observers(self) -> tuple[Observer, ...]:
        observers: list[Observer] = [log_access] if self.config.access_log else []
        if self.config.otlp_traces_endpoint is not None:
            from dualpath.server.tracing import Tracing

            tracing = Tracing.to(self.config.otlp_traces_endpoint, self.config.served_model_name or "")
            self._closing.callback(tracing.close)
            observers.append(tracing)
        return tuple(observers)

    def hand_over(self) -> None:
        """Take no more connections; `ended` returns when all have been answered and closed."""
        self.cluster.keeps_engines = True
        self._front.drain.hand_over.set()

    async def ended(self) -> None:
        """Wait until it serves no more. Raises RuntimeError that says why it can't."""
        assert self._serving is not None
        watched: list[asyncio.Future[Any]] = [self._serving, self.cluster.coordinator.failure]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for one in watched:
            if one.done() and not one.cancelled() and one.exception() is not None:
                raise RuntimeError(f"the server stopped: {one.exception()!r}") from one.exception()

    def facts(self) -> dict[str, object]:
        """Returns the content of the ready file."""
        coordinator = self.cluster.coordinator
        return {
            "url": self.url,
            "pid": os.getpid(),
            "engines": coordinator.health()["engines"],
            "control_address": coordinator.control_address,
        }

    def welcome(self) -> str:
        """Returns what a newcomer needs: the model's name, the address, and a request to copy."""
        name = self.cluster.coordinator.model.name
        config = self.config
        asked = {"messages": [{"role": "user", "content": "Hello!"}]} if self.chats else {"prompt": "Once upon a time"}
        body = msgspec.json.encode({"model": name, **asked, "max_tokens": 32}).decode()
        key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
        path = "chat/completions" if self.chats else "completions"
        on = (
            f"{config.dtype} on {config.device}"
            if config.engine == "dualpath"
            else f"vLLM {config.vllm.version}".strip()
        )
        return (
            f"dualpath {config.system} {config.topology} serves {name} at {self.url}/v1\n"
            f"KV-cache in {config.store}, {on}. Try:\n"
            f"  curl {self.url}/v1/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
        )


def _has_chat_template(checkpoint: str) -> bool:
    """Returns whether a checkpoint has one, without its tokenizer."""
    folder = Path(checkpoint)
    told = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (told.is_file() and b'"chat_template"' in told.read_bytes())


def in_one_line(error: BaseException) -> str:
    """Returns what went wrong, for the last line that a user reads."""
    ours = isinstance(error, OSError) and error.filename is None and error.strerror
    return " ".join((ours or str(error)).split())


async def _all(*works: Coroutine[Any, Any, Any]) -> list[Any]:
    """Returns the results. The first failure cancels and awaits the others, then is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second cancellation would interrupt the first one's cleaning up
                task.cancel()
        await wait_out(tasks)
