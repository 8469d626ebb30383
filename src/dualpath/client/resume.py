"""``turns.jsonl``: the journal of a replay's turns, from which an interrupted replay continues.

Theory of operation. A line is appended when a turn ends, so a killed process loses no finished turn. The file is synced
once a second, so a machine that dies loses at most that. A resumed replay reads the lines back: answered turns are not
sent again, and the tokens generated in them restore each context. A turn that failed or was under way is sent
again. ::

        {"kind":"part","number":0,"identity":"…"}      the replay starts; the identity tells what it replays
    {"kind":"turn","turn":{…},"token_ids":[…]}     answered
    {"kind":"failure","failure":{…}}               given up
        {"kind":"end","wall_s":12.3}                   it ended or was interrupted; missing after a kill

A last line that a kill cut off is dropped. Only one process at a time holds the file.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import msgspec

from dualpath.results.turns import Part, TurnFailure, TurnResult

SYNC_EVERY_S = 1.0


class JournalError(Exception):
    """The journal can't be read or written. The message names the file, the line and what to do."""


class PartLine(msgspec.Struct, frozen=True, tag="part", tag_field="kind"):
    number: int
    identity: str
    context: str
    started_at: str


class TurnLine(msgspec.Struct, frozen=True, tag="turn", tag_field="kind"):
    turn: TurnResult
    token_ids: list[int] | None


class FailureLine(msgspec.Struct, frozen=True, tag="failure", tag_field="kind"):
    failure: TurnFailure


class EndLine(msgspec.Struct, frozen=True, tag="end", tag_field="kind"):
    wall_s: float


Line = PartLine | TurnLine | FailureLine | EndLine
_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class Journal:
    """One replay's journal: what earlier parts answered, and the file that this part appends to."""

    def __init__(self, path: Path, file: IO[bytes], identity: str, earlier: list[Line]) -> None:
        self.path = path
        self._identity = identity
        self.answered = {
            (line.turn.trajectory, line.turn.round_index): line for line in earlier if isinstance(line, TurnLine)
        }
        """Turns answered in earlier parts, by trajectory and round."""
        self.parts = _parts(earlier)
        """Earlier parts."""
        self._context = next((line.context for line in earlier if isinstance(line, PartLine)), None)
        self._file = file
        self._dirty = False
        self._failed: JournalError | None = None
        self.turns = 0
        """Turns answered in this part."""
        self._started_at = ""
        self._started_s = 0.0

    @classmethod
    def create(cls, path: Path, identity: str) -> "Journal":
        """Makes a new journal, which replaces the content of `path` when its first part begins. Raises JournalError."""
        return cls(path, _opened(path), identity, [])

    @classmethod
    def resume(cls, path: Path, identity: str) -> "Journal":
        """Continues the journal in `path` of a replay with this `identity`. Raises JournalError."""
        if not path.is_file():
            raise JournalError(f"{path} does not exist: there is nothing to resume; leave --resume out")
        file = _opened(path)
        try:
            lines, whole_bytes = _lines(path, file.read())
            _check(path, lines, identity)
        except BaseException:
            file.close()
            raise
        file.truncate(whole_bytes)
        file.seek(whole_bytes)
        return cls(path, file, identity, lines)

    def begin(self, context: str) -> None:
        """Begins a part with this kind of contexts. Raises JournalError if earlier parts have the other kind."""
        if self._context not in (None, context):
            raise JournalError(
                f"{self.path} has {self._context} contexts, and this server gives {context} ones; resume against the "
                "kind of server it began with"
            )
        if not self.parts:
            self._empty()
        self._started_at, self._started_s = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        self._append(PartLine(len(self.parts), self._identity, context, self._started_at))

    def turn(self, turn: TurnResult, token_ids: list[int] | None) -> None:
        self.turns += 1
        self._append(TurnLine(turn, token_ids))

    def failure(self, failure: TurnFailure) -> None:
        self._append(FailureLine(failure))

    def all_parts(self) -> tuple[Part, ...]:
        """Earlier parts and this one up to now."""
        wall_s = time.perf_counter() - self._started_s
        return (*self.parts, Part(started_at=self._started_at, wall_s=wall_s, turns=self.turns))

    @contextlib.asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        """Syncs the file once a second inside, and writes and syncs the end however it is left.

        Raises JournalError; if a sync inside fails, the next write raises it.
        """
        syncer = asyncio.create_task(self._sync_now_and_then())
        try:
            yield
        finally:
            syncer.cancel()
            await asyncio.gather(syncer, return_exceptions=True)
            if self._started_s:
                self._append(EndLine(time.perf_counter() - self._started_s))
                self._sync()

    def close(self) -> None:
        self._file.close()

    def _empty(self) -> None:
        try:
            if os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
        except OSError as error:
            raise JournalError(f"{self.path} can't be emptied: {error.strerror}") from error

    def _append(self, line: Line) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
        except OSError as error:
            raise JournalError(f"{self.path} can't be written: {error.strerror}") from error
        self._dirty = True

    async def _sync_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            if self._dirty:
                try:
                    await asyncio.to_thread(self._sync)
                except JournalError as error:
                    self._failed = error
                    return

    def _sync(self) -> None:
        self._dirty = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(f"{self.path} can't be synced: {error.strerror}") from error


def _opened(path: Path) -> IO[bytes]:
    try:
        file = path.open("r+b" if path.exists() else "w+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise JournalError(f"{path} is being written by another replay; give another --out") from error
    except OSError as error:
        raise JournalError(f"{path} can't be opened: {error.strerror}") from error
    return file


def _lines(path: Path, content: bytes) -> tuple[list[Line], int]:
    """Returns the lines of `content`, and where its last whole line ends."""
    lines: list[Line] = []
    whole_bytes = 0
    texts = content.splitlines(keepends=True)
    for number, text in enumerate(texts, 1):
        try:
            line = _DECODER.decode(text)
        except msgspec.MsgspecError as error:
            if number == len(texts):
                break
            raise JournalError(f"{path}: line {number} is damaged ({error}); start again without --resume") from error
        if not text.endswith(b"\n"):
            break
        lines.append(line)
        whole_bytes += len(text)
    return lines, whole_bytes


def _check(path: Path, lines: list[Line], identity: str) -> None:
    if not lines or not isinstance(lines[0], PartLine):
        raise JournalError(f"{path} is not the journal of a replay; start again without --resume")
    if lines[0].identity != identity:
        raise JournalError(
            f"{path} is of another replay: its agents, lengths or seed differ; give the options it began with, "
            "or start again without --resume"
        )


def _parts(lines: list[Line]) -> list[Part]:
    """Returns the parts; one that was killed ends with its last answer."""
    parts: list[Part] = []
    before_s = 0.0
    for line in lines:
        if isinstance(line, PartLine):
            before_s = sum(part.wall_s for part in parts)
            parts.append(Part(started_at=line.started_at, wall_s=0.0, turns=0))
        elif isinstance(line, TurnLine):
            ended_s = line.turn.start_s + line.turn.latency_s - before_s
            wall_s = max(parts[-1].wall_s, ended_s)
            parts[-1] = msgspec.structs.replace(parts[-1], wall_s=wall_s, turns=parts[-1].turns + 1)
        elif isinstance(line, EndLine):
            parts[-1] = msgspec.structs.replace(parts[-1], wall_s=line.wall_s)
    return parts
