"""Loads trajectories from what a user names as agents. Every command that takes agents uses this loader.

A name is ``32K``, ``48K`` or ``64K`` (agents with the statistics of the paper's traces), a file, or a directory of
``.json`` and ``.jsonl`` files. The keys of a file's first record tell its format (`dualpath.traces.formats`);
``sharegpt:FILE`` names it instead, and ``mooncake@64:FILE`` also gives the tokens per block of its hash ids.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dualpath.traces.formats import BY_NAME, FORMATS, PAPER_ROWS, SOURCES_HELP, Format
from dualpath.traces.limits import NO_LIMITS, TraceLimits, limited
from dualpath.traces.paper import PAPER_TRAJECTORIES, paper_agents
from dualpath.traces.reading import (
    BYTES_PER_TOKEN,
    CountTokens,
    ReadOptions,
    TraceError,
    records,
    tokens_of_bytes,
)
from dualpath.traces.texts import load_tokenizer
from dualpath.traces.trajectory import Trajectory, renamed


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded agents or the paper's, in order, with a sentence that says where they are from."""

    trajectories: list[Trajectory]
    description: str

    def agent(self, number: int, prefix: str = "agent") -> Trajectory:
        """Returns agent `number` of any number: recordings are reused in turn, each time under a new name."""
        return renamed(self.trajectories[number % len(self.trajectories)], f"{prefix}-{number:04d}")

    def agents(self, count: int | None = None) -> list[Trajectory]:
        """Returns `count` agents, or one per recording."""
        return [self.agent(number) for number in range(count or len(self.trajectories))]


class _File(NamedTuple):
    path: Path
    format: Format
    block_tokens: int | None


def load_source(
    names: Sequence[str],
    limits: TraceLimits = NO_LIMITS,
    *,
    agents: int | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Source:
    """Loads the agents that `names` name, cut to `limits`. Raises ValueError, or TraceError naming file and line.

    For a row of the paper, `agents` distinct ones are made (None: 500). `tokenizer` counts the tokens of texts.
    """
    row = paper_row(names)
    if row is not None:
        made = paper_agents(row, agents or PAPER_TRAJECTORIES, seed)
        found = [made.trajectory(number) for number in range(len(made))]
        what = f"the paper's {row} statistics, seed {seed}"
    else:
        files = [file for name in names for file in _files(name)]
        count_tokens = tokens_of_bytes if tokenizer is None else load_tokenizer(tokenizer)
        found = _with_own_ids([one for file in files for one in _read(file, count_tokens)])
        what = _described(files, len(found), tokenizer)
    cut = [limited(one, limits) for one in found]
    kept = [one for one in cut if one is not None]
    if not kept:
        raise TraceError(
            f"{', '.join(names)}: no turn fits max_context_tokens={limits.max_context_tokens} at scale "
            f"{limits.scale:g}; raise the cap or the scale"
        )
    return Source(trajectories=kept, description=what + _limits_described(limits, len(found) - len(kept)))


def paper_row(names: Sequence[str]) -> str | None:
    """Returns the row of the paper's table that `names` name; None if they name files.

    Raises TraceError for no names, and for a row mixed with other names.
    """
    if not names:
        raise TraceError(f"no agents are named: give {SOURCES_HELP}")
    if len(names) == 1:
        return names[0] if names[0] in PAPER_ROWS else None
    for name in names:
        if name in PAPER_ROWS:
            raise TraceError(f"{name} can't be mixed with other sources: give it alone, or files only")
    return None


def format_of(path: Path) -> Format:
    """Returns the format of `path`, told from the keys of its first record. Raises TraceError."""
    _, first = next(records(path, dict[str, msgspec.Raw], "a trace"), ("", {}))
    fits = [one for one in FORMATS if one.keys <= first.keys()]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise TraceError(
            f"{path}: may be {' or '.join(one.title for one in fits)}: say which, such as {fits[0].name}:{path}"
        )
    known = "; ".join(f"{one.title} ({', '.join(sorted(one.keys))})" for one in FORMATS)
    raise TraceError(f"{path}: the keys of its first record fit no known format: {known}")


def _files(name: str) -> Iterator[_File]:
    """Yields the files that `name` names, each with its format."""
    try:
        path, kind, block_tokens = _split(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
            if not inside:
                raise TraceError(f"{path}: the directory has no .json or .jsonl files")
        elif path.is_file() or path.is_symlink():
            inside = [path]
        else:
            raise TraceError(f"no trace {name!r}: give {SOURCES_HELP}")
    except OSError as error:
        raise TraceError(f"{name}: can't be read: {error.strerror}") from error
    for file in inside:
        yield _File(file, kind or format_of(file), block_tokens)


def _split(name: str) -> tuple[Path, Format | None, int | None]:
    """Splits ``mooncake@64:FILE`` into path, format and tokens per block. A file of that very name comes first."""
    head, colon, rest = name.partition(":")
    kind, at, tokens = head.partition("@")
    if not colon or kind not in BY_NAME or Path(name).exists():
        return Path(name), None, None
    if at and not BY_NAME[kind].blocks:
        raise TraceError(f"{name}: {kind} has no blocks, so no block size can be given; write {kind}:{rest}")
    if at and not (tokens.isdecimal() and tokens.isascii() and int(tokens[:10])):
        raise TraceError(f"{name}: the tokens of a block must be a whole number from 1 up, not {tokens!r}")
    return Path(rest), BY_NAME[kind], int(tokens[:10]) if at else None


def _read(file: _File, count_tokens: CountTokens) -> list[Trajectory]:
    options = ReadOptions(count_tokens=count_tokens, block_tokens=file.block_tokens)
    found = file.format.load_reader()(file.path, options)
    if not found:
        raise TraceError(f"{file.path}: holds no requests")
    return found


def _with_own_ids(found: list[Trajectory]) -> list[Trajectory]:
    """Renames all but the first trajectory of the same id, because an id seeds an agent's tokens."""
    seen: Counter[str] = Counter()
    own = []
    for one in found:
        seen[one.id] += 1
        own.append(one if seen[one.id] == 1 else renamed(one, f"{one.id}~{seen[one.id]}"))
    return own


def _described(files: list[_File], sessions: int, tokenizer: Path | None) -> str:
    formats = list(dict.fromkeys(file.format for file in files))
    counted = ""
    if any(one.texts for one in formats):
        by = f"with {tokenizer.name}" if tokenizer else f"as bytes over {BYTES_PER_TOKEN}"
        counted = f", tokens of texts counted {by}"
    return f"{sessions} agents of {' and '.join(one.title for one in formats)}{counted}"


def _limits_described(limits: TraceLimits, dropped: int) -> str:
    said = [f"token counts divided by {limits.scale:g}"] if limits.scale != 1 else []
    if limits.max_context_tokens is not None:
        said.append(f"cut at {limits.max_context_tokens} tokens" + (f", which leaves {dropped} out" if dropped else ""))
    if limits.max_turns is not None:
        said.append(f"at most {limits.max_turns} turns each")
    return "".join(f"; {one}" for one in said)
