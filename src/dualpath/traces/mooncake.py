"""Reader of Mooncake's traces: JSON lines of requests, without sessions.

A line has `timestamp` (ms, of arrival), `input_length` and `output_length` (tokens), and `hash_ids`, one id for each
block of 512 prompt tokens, the last perhaps not full. An id names its block *and all before it*, so two prompts that
share an id share everything up to it.

Sessions are put together from that: a request continues an earlier one if its prompt begins with *all full blocks* of
that one's prompt. Of several such, the one with most blocks, then the latest; each is continued at most once (what
comes second was a fork: it starts a trajectory of its own). Prompts of fewer than `MIN_SHARED_BLOCKS` full blocks are
never continued, as one block is what a system prompt alone looks like::

    A  [b0 b1 b2 ~b3]  → answer        3 full blocks
    B  [b0 b1 b2 b4 b5 ~b6]            continues A: same first 3 blocks, and then the answer and a new question

If B's prompt has room for A's whole context (prompt and answer), B keeps it and appends the rest. Otherwise the answer
was changed, and B keeps the shared blocks only (a compaction). Pauses are the times between arrivals, so they include
the recorded service time of the request before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from dualpath.traces.limits import TraceError
from dualpath.traces.trajectory import Round, Trajectory

BLOCK_TOKENS = 512
MIN_SHARED_BLOCKS = 2


class MooncakeTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Trajectories in order of their first arrival."""

    trajectories: tuple[Trajectory, ...]
    arrivals_s: tuple[float, ...]
    """Of each trajectory's first request, from the first of all."""


class _Line(msgspec.Struct, frozen=True, gc=False):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class _Chain(msgspec.Struct):
    """A trajectory being put together, and its last request."""

    number: int
    arrival_ms: float
    last: _Line
    context_tokens: int
    rounds: list[Round]


def read_mooncake(path: Path) -> MooncakeTrace:
    """The trace in `path`. Raises TraceError."""
    chains: list[_Chain] = []
    open_tails: dict[int, _Chain] = {}
    """By the id of the last full block of a chain's last prompt: the chain to continue from there."""
    for line in _lines(path):
        chain = _continued(line, open_tails)
        if chain is None:
            chain = _Chain(len(chains), line.timestamp, line, 0, [])
            chains.append(chain)
            round_ = Round(append_tokens=line.input_length, generate_tokens=max(1, line.output_length))
        else:
            round_ = _next_round(chain, line)
        kept_tokens = chain.context_tokens if round_.keep_tokens is None else round_.keep_tokens
        chain.context_tokens = kept_tokens + round_.append_tokens + round_.generate_tokens
        chain.rounds.append(round_)
        chain.last = line
        full_blocks = line.input_length // BLOCK_TOKENS
        if full_blocks >= MIN_SHARED_BLOCKS:
            open_tails[line.hash_ids[full_blocks - 1]] = chain
    if not chains:
        raise TraceError(f"{path}: holds no requests")
    return MooncakeTrace(
        trajectories=tuple(Trajectory(id=f"chain-{chain.number:05d}", rounds=tuple(chain.rounds)) for chain in chains),
        arrivals_s=tuple((chain.arrival_ms - chains[0].arrival_ms) / 1000 for chain in chains),
    )


def _lines(path: Path) -> Iterator[_Line]:
    """Checked lines in order of arrival."""
    decoder = msgspec.json.Decoder(_Line)
    before_ms = 0.0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                line = decoder.decode(text)
                problem = _problem(line, before_ms)
                if problem:
                    raise TraceError(f"{path}: line {number}: {problem}")
                before_ms = line.timestamp
                yield line
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise TraceError(f"{path}: line {number}: not a request of a Mooncake trace: {error}") from error


def _problem(line: _Line, before_ms: float) -> str | None:
    if line.input_length < 1 or line.output_length < 0:
        return f"input_length {line.input_length} must be at least 1 and output_length {line.output_length} at least 0"
    if len(line.hash_ids) != -(-line.input_length // BLOCK_TOKENS):
        return (
            f"hash_ids names {len(line.hash_ids)} blocks of {BLOCK_TOKENS} tokens; a prompt of {line.input_length} "
            f"tokens has {-(-line.input_length // BLOCK_TOKENS)}"
        )
    if line.timestamp < before_ms:
        return f"timestamp {line.timestamp:g} is before the line above ({before_ms:g}); sort the file by timestamp"
    return None


def _continued(line: _Line, open_tails: dict[int, _Chain]) -> _Chain | None:
    """The chain that `line` continues, no longer open, or None."""
    for blocks in range(len(line.hash_ids), MIN_SHARED_BLOCKS - 1, -1):
        chain = open_tails.get(line.hash_ids[blocks - 1])
        if chain is not None and blocks == chain.last.input_length // BLOCK_TOKENS:
            return open_tails.pop(line.hash_ids[blocks - 1])
    return None


def _next_round(chain: _Chain, line: _Line) -> Round:
    last = chain.last
    gap_s = (line.timestamp - last.timestamp) / 1000
    generate_tokens = max(1, line.output_length)
    if line.input_length >= chain.context_tokens:
        append_tokens = line.input_length - chain.context_tokens
        return Round(append_tokens=append_tokens, generate_tokens=generate_tokens, gap_s=gap_s)
    shared_tokens = last.input_length // BLOCK_TOKENS * BLOCK_TOKENS
    return Round(
        append_tokens=line.input_length - shared_tokens,
        generate_tokens=generate_tokens,
        gap_s=gap_s,
        keep_tokens=shared_tokens,
    )
