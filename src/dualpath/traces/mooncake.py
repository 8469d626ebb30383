"""Reads Mooncake's traces: JSON lines of requests.

A line has `input_length` and `output_length` (tokens) and `hash_ids`, one id for each block of the prompt, of which
the last may be partial. An id names its block *and all before it*, so prompts that share an id share all up to it.
`timestamp` is the arrival, in ms. Mooncake's own blocks have 512 tokens; `_block_tokens` finds the size of a file's.

If lines have a `session_id`, the lines of one session are a trajectory, in their order. The pause before a request is
its `delay` (ms) or else the time between arrivals. A line without a session is then a trajectory by itself.

If no line has one, sessions are put together from the ids. A request continues an earlier one if its prompt begins
with *all full blocks* of that one's prompt; among several, the one with most blocks, then the latest. Each is
continued at most once; a second continuation is a fork and starts a trajectory. Prompts of fewer than
`MIN_SHARED_BLOCKS` full blocks are never continued, because one block is what a system prompt alone looks like::

    A  [b0 b1 b2 ~b3]  → answer        3 full blocks
    B  [b0 b1 b2 b4 b5 ~b6]            continues A: same first 3 blocks, and then the answer and a new question

If B's prompt has room for A's whole context (prompt and answer), B keeps it and appends the rest. Otherwise the answer
was changed, and B keeps the shared blocks only (a compaction). Times between arrivals include the recorded service time
of the request before.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from dualpath.traces.reading import NO_OPTIONS, Milliseconds, PromptTokens, ReadOptions, Tokens, TraceError, records
from dualpath.traces.sharing import next_round, shared_prefix
from dualpath.traces.trajectory import Round, Trajectory

BLOCK_TOKENS = 512
MIN_SHARED_BLOCKS = 2


class _Line(msgspec.Struct, frozen=True, gc=False):
    input_length: PromptTokens
    output_length: Tokens
    hash_ids: list[int]
    timestamp: Milliseconds | None = None
    session_id: str | int | None = None
    delay: Milliseconds | None = None


class _Chain(msgspec.Struct):
    """A trajectory being put together, and its last request."""

    id: str
    block_tokens: int
    last: _Line | None = None
    context_tokens: int = 0
    rounds: list[Round] = msgspec.field(default_factory=list)

    @property
    def full_blocks(self) -> int:
        """Number of full blocks in the last prompt."""
        return 0 if self.last is None else self.last.input_length // self.block_tokens

    def add(self, line: _Line, shared_blocks: int) -> None:
        """Appends `line`, which begins with `shared_blocks` blocks of the last prompt."""
        kept_tokens, gap_ms = 0, 0.0
        if self.last is not None:
            whole = shared_blocks >= self.full_blocks and line.input_length >= self.context_tokens
            kept_tokens = self.context_tokens if whole else min(shared_blocks * self.block_tokens, line.input_length)
            gap_ms = _gap_ms(self.last, line)
        made = next_round(self.context_tokens, kept_tokens, line.input_length, line.output_length, gap_ms / 1000)
        self.rounds.append(made)
        self.context_tokens = kept_tokens + made.append_tokens + made.generate_tokens
        self.last = line


def read_mooncake(path: Path, options: ReadOptions = NO_OPTIONS) -> list[Trajectory]:
    """Returns the trajectories in `path`, in order of their first requests. Raises TraceError."""
    lines = list(records(path, _Line, "a request of a Mooncake trace"))
    block_tokens = _block_tokens(path, lines, options.block_tokens)
    given = any(line.session_id is not None for _, line in lines)
    chains = _sessions(path, lines, block_tokens) if given else _chains(path, lines, block_tokens)
    return [Trajectory(id=chain.id, rounds=tuple(chain.rounds)) for chain in chains]


def _block_tokens(path: Path, lines: list[tuple[str, _Line]], given: int | None) -> int:
    """Tokens per block: `given`; else 512 if every line allows it; else the only size (or power of two) that fits."""
    least, most = (1, None) if given is None else (given, given)
    for where, line in lines:
        blocks, tokens = len(line.hash_ids), line.input_length
        low = max(least, -(-tokens // blocks)) if blocks else tokens + 1
        high = most if blocks <= 1 else min(most or tokens, (tokens - 1) // (blocks - 1))
        if not blocks or (high is not None and low > high):
            raise TraceError(
                f"{path}: {where}: hash_ids names {blocks} blocks, but input_length is {tokens}: that fits no block "
                f"size of {_span(least, most)} tokens{', as the lines above have' if given is None else ''}"
            )
        least, most = low, high
    if given is not None or (least <= BLOCK_TOKENS and (most is None or most >= BLOCK_TOKENS)):
        return given or BLOCK_TOKENS
    powers = [2**n for n in range(31) if least <= 2**n and (most is None or 2**n <= most)]
    if least == most or len(powers) == 1:
        return least if least == most else powers[0]
    raise TraceError(
        f"{path}: blocks of {_span(least, most)} tokens all fit; give the size, such as "
        f"mooncake@{powers[0] if powers else least}:{path}"
    )


def _span(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"


def _sessions(path: Path, lines: list[tuple[str, _Line]], block_tokens: int) -> list[_Chain]:
    chains: dict[str | int, _Chain] = {}
    for number, (where, line) in enumerate(lines):
        name = f"request-{number:05d}" if line.session_id is None else line.session_id
        chain = chains.setdefault(name, _Chain(str(name), block_tokens))
        shared_blocks = 0
        if chain.last is not None:
            _check_order(f"{path}: {where}", chain.last, line)
            shared_blocks = min(shared_prefix(chain.last.hash_ids, line.hash_ids), chain.full_blocks)
        chain.add(line, shared_blocks)
    return list(chains.values())


def _chains(path: Path, lines: list[tuple[str, _Line]], block_tokens: int) -> list[_Chain]:
    chains: list[_Chain] = []
    open_tails: dict[int, _Chain] = {}
    """Chains that can be continued, by the id of the last full block of their last prompt."""
    before: _Line | None = None
    for where, line in lines:
        if line.timestamp is None:
            raise TraceError(f"{path}: {where}: timestamp is missing; a request without a session_id needs it")
        if before is not None:
            _check_order(f"{path}: {where}", before, line)
        before = line
        chain = _continued(line, open_tails)
        if chain is None:
            chain = _Chain(f"chain-{len(chains):05d}", block_tokens)
            chains.append(chain)
        chain.add(line, chain.full_blocks)
        if chain.full_blocks >= MIN_SHARED_BLOCKS:
            open_tails[line.hash_ids[chain.full_blocks - 1]] = chain
    return chains


def _continued(line: _Line, open_tails: dict[int, _Chain]) -> _Chain | None:
    """Takes the chain that `line` continues out of `open_tails`; None if there is none."""
    for blocks in range(len(line.hash_ids), MIN_SHARED_BLOCKS - 1, -1):
        chain = open_tails.get(line.hash_ids[blocks - 1])
        if chain is not None and blocks == chain.full_blocks:
            return open_tails.pop(line.hash_ids[blocks - 1])
    return None


def _check_order(place: str, before: _Line, line: _Line) -> None:
    if line.timestamp is not None and before.timestamp is not None and line.timestamp < before.timestamp:
        raise TraceError(
            f"{place}: timestamp {line.timestamp:g} is before {before.timestamp:g} of the request it continues; "
            "sort the file by timestamp"
        )


def _gap_ms(before: _Line, line: _Line) -> float:
    if line.delay is not None:
        return line.delay
    if line.timestamp is None or before.timestamp is None:
        return 0.0
    return line.timestamp - before.timestamp
