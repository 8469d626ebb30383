"""Reads the records of a trace file in any layout: JSON lines, one JSON object, or a JSON array of objects.

`records` decodes and checks them one by one. A record that can't be read raises a one-line `TraceError` that names the
file, the line (in an array also the path, such as ``$[3].in``) and the reason.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec
from msgspec import Meta

MAX_TOKENS = 2**30 - 1
"""Limit of a prompt or an answer: both together fit the 32 bits of `TurnTable`."""
MAX_SECONDS = 4e9
"""Limit of a time or a pause: above the seconds since 1970 this year, and its nanoseconds fit 64 bits."""

Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
PromptTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Milliseconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS * 1000)]

BYTES_PER_TOKEN = 4
NEWLINE = b"\n"

CountTokens = Callable[[str], int]
Record = TypeVar("Record")


def tokens_of_bytes(text: str) -> int:
    """Estimates the tokens of a text without a tokenizer: its UTF-8 bytes over BYTES_PER_TOKEN, rounded up."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


class TraceError(ValueError):
    """A trace that can't be read. The message names the file, the line or JSON path, and what was wrong."""


class ReadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader is told besides the file."""

    count_tokens: CountTokens = tokens_of_bytes
    """Counts the tokens of a text."""
    block_tokens: int | None = None
    """Tokens per hash id of the file; None: the reader finds out."""


NO_OPTIONS = ReadOptions()


def records(path: Path, kind: type[Record], what: str) -> Iterator[tuple[str, Record]]:
    """Yields each record of `path` decoded as `kind`, with its place (``line 7``, ``$[3]``). Errors call one `what`.

    Blank lines are skipped but counted. Raises TraceError.
    """
    try:
        with path.open("rb") as file:
            number, first = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (0, b""))
            if not first:
                raise TraceError(f"{path}: the file is empty")
            if first.lstrip().startswith(b"[") or _goes_on(first):
                yield from _document(path, NEWLINE * (number - 1) + first + file.read(), number, kind, what)
            else:
                yield from _lines(path, first, number, file, kind, what)
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from error


def _goes_on(line: bytes) -> bool:
    """Whether a line begins JSON that goes on in further lines."""
    try:
        msgspec.json.decode(line, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        return line.lstrip().startswith(b"{") and "truncated" in str(error)
    except RecursionError:
        pass
    return False


def _lines(
    path: Path, first: bytes, number: int, file: BinaryIO, kind: type[Record], what: str
) -> Iterator[tuple[str, Record]]:
    decoder = msgspec.json.Decoder(kind)
    line = first
    while line:
        if line.strip():
            where = f"line {number}"
            yield where, _decoded(decoder.decode, line, f"{path}: {where}: not {what}")
        line = file.readline()
        number += 1


def _document(path: Path, data: bytes, number: int, kind: type[Record], what: str) -> Iterator[tuple[str, Record]]:
    one = not data.lstrip().startswith(b"[")

    def refuse(error: Exception) -> str:
        byte = _byte(error, data)
        if byte is None:
            return f"{path}: line {number}: not {what}" if one else f"{path}: not {what}"
        return f"{path}: line {1 + data.count(NEWLINE, 0, byte)}: not {what}"

    if one:
        yield f"line {number}", _decoded(msgspec.json.Decoder(kind).decode, data, refuse)
        return
    every: list[Record] = _decoded(msgspec.json.Decoder(list[kind]).decode, data, refuse)  # type: ignore[valid-type]
    for index, record in enumerate(every):
        yield f"$[{index}]", record


def _decoded(decode: Callable[[bytes], Record], data: bytes, refused: str | Callable[[Exception], str]) -> Record:
    try:
        return decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        place = refused if isinstance(refused, str) else refused(error)
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    except RecursionError:
        place = refused if isinstance(refused, str) else refused(RecursionError())
        why = "it is nested too deeply"
    raise TraceError(f"{place}: {why}")


def _byte(error: Exception, data: bytes) -> int | None:
    """Returns where in `data` the decoder stopped; None if the message has a JSON path instead."""
    if isinstance(error, UnicodeDecodeError):
        try:
            data.decode()
        except UnicodeDecodeError as bad:
            return bad.start
    if "truncated" in str(error):
        return len(data.rstrip())
    found = re.search(r"\(byte (\d+)\)", str(error))
    return int(found.group(1)) if found else None
