"""Requests whose right tokens are known, as streams that can be watched, left alone, read slowly or closed."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from typing import NamedTuple

import msgspec

VOCABULARY = 250


class Waits:
    """How long is waited for what; a run has one kind of engine."""

    answer_s = 60.0
    """By then a request has its tokens or an error."""
    start_s = 120.0
    served_again_s = 30.0

    def for_vllm(self) -> None:
        """Its servers take most of a minute to start, beside each other minutes; a request may wait for one."""
        self.answer_s, self.start_s, self.served_again_s = 300.0, 600.0, 240.0


WAITS = Waits()


class Prompt(msgspec.Struct, frozen=True):
    """Token ids by seed: `hit` tokens that are in the store beforehand, then `miss` tokens that are not."""

    hit: int
    miss: int
    new: int
    """Tokens to generate."""
    seed: int
    """Of the tokens that are not in the store."""
    prefix: int = 0
    """Which tokens are: prompts of one prefix share them."""
    before: tuple[int, ...] = ()
    """What stands before them all: earlier turns."""

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *_drawn(self.hit, f"prefix {self.prefix}"), *_drawn(self.miss, f"{self.seed}")]

    @property
    def stored(self) -> "Prompt":
        """The prompt that puts the hit tokens into the store."""
        return Prompt(self.hit, 0, 1, 0, self.prefix)


def _drawn(count: int, seed: str) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


class Answer(msgspec.Struct):
    """What came. `error` is the error's code, or starts with ``broken`` when the connection ended without a word."""

    tokens: list[int] = []
    cached: int = 0
    error: str = ""
    seconds: float = 0.0


class Asked(threading.Thread):
    """One request under way. `hang_up` may be called at any moment, also before a word of the answer has come."""

    def __init__(self, address: str, prompt: Prompt, salt: str = "") -> None:
        super().__init__(daemon=True)
        self.answer = Answer(tokens=[])
        self.prompt = prompt
        self.may_read = threading.Event()
        """Cleared: the client does not read."""
        self.may_read.set()
        self.pace_s = 0.0
        self._address = address
        self._salt = salt
        self._socket: socket.socket | None = None
        self._hung_up = False
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        body = {"prompt": self.prompt.tokens, "max_tokens": self.prompt.new, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
        body |= {"cache_salt": self._salt} if self._salt else {}
        try:
            self._stream(json.dumps(body))
        except (HTTPException, OSError) as error:
            self.answer.error = self.answer.error or f"broken: {type(error).__name__}"
        if self._hung_up:
            self.answer.error = "hung up"
        self.answer.seconds = time.monotonic() - began

    def _stream(self, body: str) -> None:
        with closing(HTTPConnection(self._address, timeout=WAITS.answer_s)) as connection:
            connection.connect()
            self._socket = connection.sock
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.answer.error = _code(response.read())
                return
            for line in response:
                self.may_read.wait(WAITS.answer_s)
                time.sleep(self.pace_s)
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    self._take(json.loads(line[6:]))
        self.answer.error = self.answer.error or "broken: the stream ended early"

    def hang_up(self) -> None:
        self._hung_up = True
        self.may_read.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _take(self, event: dict[str, object]) -> None:
        if "error" in event:
            self.answer.error = _code(json.dumps(event).encode())
            return
        for choice in event.get("choices") or ():  # type: ignore[attr-defined]
            self.answer.tokens += choice.get("token_ids") or []
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def wait(self) -> Answer:
        self.join(WAITS.answer_s)
        if self.is_alive():
            return Answer(self.answer.tokens, 0, f"late: no end after {WAITS.answer_s:.0f} s", WAITS.answer_s)
        return self.answer


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "broken: an error without a code"


def verdict(answer: Answer, right: Sequence[int], may_break: bool) -> str:
    """Returns ``right``, ``error CODE``, or what is wrong with the answer, starting with ``WRONG``."""
    if answer.tokens != list(right[: len(answer.tokens)]):
        return "WRONG tokens"
    if answer.error == "hung up":
        return "hung up"
    if not answer.error:
        return "right" if len(answer.tokens) == len(right) else "WRONG: tokens are missing"
    if answer.error.startswith("late") or (answer.error.startswith("broken") and not may_break):
        return f"WRONG end: {answer.error}"
    return f"error {answer.error}"


class Turn(NamedTuple):
    """What a lane of load asks next."""

    prompt: Prompt
    salt: str = ""
    leaves_s: float | None = None
    """The client hangs up after so long."""


class Load:
    """Requests in the background, in each lane one after the other. `verdicts` counts them.

    Connections may break for requests during which `may_break` was set. A lane rests for `pause_s` after each.
    """

    def __init__(
        self,
        address: str,
        right: dict[Prompt, list[int]],
        lanes: Iterable[Iterator[Turn]],
        may_break: bool = False,
        pause_s: float = 0.0,
    ) -> None:
        self.verdicts: Counter[str] = Counter()
        self.may_break = may_break
        self._pause_s = pause_s
        self._stopped = threading.Event()
        self._address, self._right = address, right
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    def _run(self, lane: Iterator[Turn]) -> None:
        while not self._stopped.is_set():
            turn, may_break = next(lane), self.may_break
            asked = Asked(self._address, turn.prompt, turn.salt)
            if turn.leaves_s is not None:
                asked.join(turn.leaves_s)
                asked.hang_up()
            answer = asked.wait()
            self.verdicts[verdict(answer, self._right[turn.prompt], may_break or self.may_break)] += 1
            self._stopped.wait(0.2 if answer.error else self._pause_s)  # a client backs off

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(WAITS.answer_s)


def until(condition: Callable[[], object], seconds: float, poll_s: float = 0.05) -> bool:
    """Returns whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
