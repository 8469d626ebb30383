"""The public Python API, for notebooks and operators' scripts. Import it from `dualpath` itself.

Functions here are synchronous, even while an event loop is running (a notebook). They return records
(`msgspec.Struct`), with lengths in tokens and times in seconds.
"""

import asyncio
import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, TypeVar

import msgspec

from dualpath.client.replay import replay as replay_async
from dualpath.client.replay import warm_up
from dualpath.client.rollout import ReplayOptions
from dualpath.cluster.config import ClusterConfig
from dualpath.results.turns import ReplayResult
from dualpath.serving.cluster_server import ClusterServer
from dualpath.spec.metrics import Figures
from dualpath.traces.trajectory import Trajectory

Result = TypeVar("Result")
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
ASK_TIMEOUT_S = 300.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A completion."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from storage."""
    generated_tokens: int


class AskError(Exception):
    """The server's error: its message, and the HTTP `status` (0 when there was no answer)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A cluster on this host with its OpenAI server, on a thread of this process; each engine is a separate process.

    ::

        with dualpath.Server(dualpath.ClusterConfig(model="models/tiny", store="/mnt/kv", port=0)) as server:
            print(server.ask("Once upon a time", max_tokens=8).text)

    Entering it waits until every engine has joined. Raises one of `serving.StartErrors` when the cluster can't start.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dualpath-server", daemon=True)
        self._server = ClusterServer(config)

    def __enter__(self) -> "Server":
        self._thread.start()
        try:
            self._on_loop(self._server.__aenter__(), START_TIMEOUT_S)
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._on_loop(self._server.__aexit__(), STOP_TIMEOUT_S)
        finally:
            self._end_loop()

    @property
    def url(self) -> str:
        """The API's base URL for any OpenAI client: ``http://host:port/v1``."""
        return f"{self._server.url}/v1"

    def health(self) -> dict[str, object]:
        """``{"status": "ok" | "degraded" | "unavailable", "engines": […]}``."""
        return self._on_loop(_value(self._server.cluster.coordinator.health), ASK_TIMEOUT_S)

    def gauges(self) -> Figures:
        """The numbers of ``/metrics``, by name."""
        return self._on_loop(_value(self._server.cluster.coordinator.gauges), ASK_TIMEOUT_S)

    def ask(self, prompt: str | Sequence[int], **fields: Any) -> Answer:
        """See `ask`."""
        keys = self.config.api_keys
        return ask(self.url, prompt, api_key=keys[0] if keys else None, **fields)

    def _on_loop(self, work: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()


async def _value(read: Any) -> Any:
    return read()


def ask(url: str, prompt: str | Sequence[int], *, api_key: str | None = None, **fields: Any) -> Answer:
    """Returns one completion of text or token ids; `fields` are the API's (``max_tokens=8``). Raises AskError."""
    body = {"prompt": prompt if isinstance(prompt, str) else list(prompt)} | fields
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{url}/completions", msgspec.json.encode(body), headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as response:
            told = msgspec.json.decode(response.read(), type=_Told)
    except urllib.error.HTTPError as error:
        raise AskError(error.code, _message(error.read())) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AskError(0, f"{url} does not answer as an OpenAI server: {error}") from error
    (choice, *_), usage = told.choices, told.usage
    return Answer(
        text=choice.text,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(usage.prompt_tokens_details or {}).get("cached_tokens") or 0,
        generated_tokens=usage.completion_tokens,
    )


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int | None] | None = None


class _Told(msgspec.Struct):
    """What is read of a completion."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: _Usage


def _message(body: bytes) -> str:
    """Returns the message of an OpenAI error; the whole body when it is not one."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode(errors="replace")


def replay(
    url: str, agents: Sequence[Trajectory], options: ReplayOptions | None = None, *, measured_from: int = 0
) -> ReplayResult:
    """Run agents against an OpenAI server, all at once. Each turn starts as soon as the one before is answered.

    With `measured_from` 1, every agent's first turn is answered before the clock starts. Raises ReplayError
    (`dualpath.client.replay`).
    """
    chosen = options or ReplayOptions()
    if measured_from not in (0, 1):
        raise ValueError(f"measured_from must be 0 or 1, not {measured_from}")

    async def run() -> ReplayResult:
        contexts = await warm_up(url, agents, chosen) if measured_from else None
        return await replay_async(url, agents, chosen, contexts=contexts)

    return _in_a_loop(run())


def _in_a_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` in a new event loop on a new thread, because the caller's loop may be running."""
    found: Future[Result] = Future()

    def target() -> None:
        try:
            found.set_result(asyncio.run(work))
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=target, name="dualpath-replay", daemon=True)
    thread.start()
    thread.join()
    return found.result()
