"""Reader of WEKA's agent sessions: JSON recordings of coding agents, one file a session.

An entry of ``requests`` is a turn: ``in`` prompt tokens, ``out`` generated ones, ``hash_ids`` one id per full block of
the prompt, ``think_time`` seconds of pause before it. What the prompt shares with the turn before is the longest common
prefix of their ``hash_ids``:

* it reaches the end of the prompt before (give or take a block): the context was kept, generated tokens included, and
  the rest of ``in`` is the append;
* it falls short: a compaction; the context shrinks to the shared blocks.

An entry of type ``subagent`` is a nested session in ``requests`` of its own, with a fresh context; its parent waits for
it. Subagents that follow one another ran together.
"""

from pathlib import Path

import msgspec

from dualpath.traces.limits import NO_LIMITS, TraceError, TraceLimits, limited
from dualpath.traces.trajectory import Round, Trajectory

_SLACK_BLOCKS = 1
"""A prompt's last block may hash differently once the generation follows it; more than this is a compaction."""


class _Entry(msgspec.Struct):
    type: str
    prompt_tokens: int | None = msgspec.field(name="in", default=None)
    generate_tokens: int | None = msgspec.field(name="out", default=None)
    hash_ids: list[int] | None = None
    think_time: float | None = None
    requests: list["_Entry"] | None = None


class _Session(msgspec.Struct):
    id: str
    requests: list[_Entry]
    block_size: int = 64


def read_weka(path: Path, limits: TraceLimits = NO_LIMITS) -> Trajectory:
    """What `limits` leave of the session in `path`; its id is the session's. Raises TraceError."""
    try:
        session = msgspec.json.decode(path.read_bytes(), type=_Session)
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise TraceError(f"{path}: not a WEKA session: {error}") from error
    if session.block_size < 1:
        raise TraceError(f"{path}: block_size is {session.block_size}; it must be at least 1")
    whole = _SessionReader(path, session.block_size).trajectory(session.id, session.requests, "requests")
    trajectory = limited(whole, limits)
    if trajectory is None:
        raise TraceError(
            f"{path}: requests: no turn fits max_context_tokens={limits.max_context_tokens} at scale {limits.scale:g}; "
            "raise the cap or the scale"
        )
    return trajectory


class _SessionReader:
    """Turns entries into rounds; `where` is the path of a field inside the file, for errors."""

    def __init__(self, path: Path, block_tokens: int) -> None:
        self._path = path
        self._block_tokens = block_tokens

    def trajectory(self, identity: str, entries: list[_Entry], where: str) -> Trajectory:
        if not entries:
            raise TraceError(f"{self._path}: {where} is empty; a session has at least one turn")
        rounds: list[Round] = []
        subagents: list[list[Trajectory]] = []
        before: _Turn | None = None
        for index, entry in enumerate(entries):
            here = f"{where}[{index}]"
            if entry.type == "subagent":
                if before is None:
                    raise TraceError(f"{self._path}: {here}.type is subagent before any turn of its parent")
                subagents[-1].append(self.trajectory(f"{identity}/{index}", entry.requests or [], f"{here}.requests"))
                continue
            before = self._turn(entry, before, here)
            rounds.append(before.round)
            subagents.append([])
        joined = (msgspec.structs.replace(r, subagents=tuple(s)) for r, s in zip(rounds, subagents, strict=True))
        return Trajectory(id=identity, rounds=tuple(joined))

    def _turn(self, entry: _Entry, before: "_Turn | None", where: str) -> "_Turn":
        prompt, generated, hash_ids = self._checked(entry, where)
        kept_tokens = self._kept_tokens(prompt, hash_ids, before)
        whole = before is None or kept_tokens == before.context_tokens
        return _Turn(
            round=Round(
                append_tokens=prompt - kept_tokens,
                generate_tokens=max(1, generated),
                gap_s=max(0.0, entry.think_time or 0.0),
                keep_tokens=None if whole else kept_tokens,
            ),
            hash_ids=hash_ids,
            context_tokens=prompt + max(1, generated),
        )

    def _checked(self, entry: _Entry, where: str) -> tuple[int, int, list[int]]:
        for name, value in (
            ("in", entry.prompt_tokens),
            ("out", entry.generate_tokens),
            ("hash_ids", entry.hash_ids),
        ):
            if value is None:
                raise TraceError(f"{self._path}: {where}.{name} is missing; a turn of type {entry.type!r} needs it")
        assert entry.prompt_tokens is not None and entry.generate_tokens is not None and entry.hash_ids is not None
        if entry.prompt_tokens < 1:
            raise TraceError(f"{self._path}: {where}.in is {entry.prompt_tokens}; a prompt has at least 1 token")
        if entry.generate_tokens < 0:
            raise TraceError(f"{self._path}: {where}.out is {entry.generate_tokens}; it can't be below 0")
        if (len(entry.hash_ids) - 1) * self._block_tokens >= entry.prompt_tokens:
            raise TraceError(
                f"{self._path}: {where}.hash_ids names {len(entry.hash_ids)} blocks of {self._block_tokens} tokens, "
                f"more than a prompt of {entry.prompt_tokens} tokens has"
            )
        return entry.prompt_tokens, entry.generate_tokens, entry.hash_ids

    def _kept_tokens(self, prompt: int, hash_ids: list[int], before: "_Turn | None") -> int:
        """Recorded tokens of the context that `prompt` begins with."""
        if before is None:
            return 0
        shared = 0
        for ours, theirs in zip(hash_ids, before.hash_ids, strict=False):
            if ours != theirs:
                break
            shared += 1
        if shared < len(before.hash_ids) - _SLACK_BLOCKS:
            return min(prompt, shared * self._block_tokens)
        return min(prompt, before.context_tokens)


class _Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn, and what the next one's prefix is told from."""

    round: Round
    hash_ids: list[int]
    context_tokens: int
