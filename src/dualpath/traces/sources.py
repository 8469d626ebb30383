"""What a user names as agents → trajectories: one loader for every command that takes them.

A name is ``32K``, ``48K`` or ``64K`` (agents with the statistics of the paper's traces), a file, or a directory of
files. What a file holds is told from its content:

* one JSON object with ``requests``: a WEKA session (`dualpath.traces.weka`);
* JSON lines with ``hash_ids`` and ``input_length``: a Mooncake trace (`dualpath.traces.mooncake`);
* JSON lines with ``session_id`` and ``input``: mini-SWE-agent sessions with their text (`dualpath.traces.miniswe`).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from dualpath.traces.limits import NO_LIMITS, TraceError, TraceLimits, limited
from dualpath.traces.miniswe import BYTES_PER_TOKEN, load_tokenizer, read_miniswe, tokens_of_bytes
from dualpath.traces.mooncake import read_mooncake
from dualpath.traces.paper import PAPER_TRACES, paper_agents
from dualpath.traces.trajectory import Trajectory
from dualpath.traces.weka import read_weka

SOURCES_HELP = "32K, 48K or 64K (the paper's), or files: WEKA or mini-SWE-agent sessions, a Mooncake trace"
PAPER_AGENTS = 500
_DETECT_BYTES = 1 << 16


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Agents as recorded or as the paper has them, in order, and a sentence about where they are from."""

    trajectories: list[Trajectory]
    description: str

    def agent(self, number: int, prefix: str = "agent") -> Trajectory:
        """Agent `number` of any number of agents: recordings are taken in turns, each time under a name of its own."""
        return renamed(self.trajectories[number % len(self.trajectories)], f"{prefix}-{number:04d}")

    def agents(self, count: int | None = None) -> list[Trajectory]:
        """`count` agents, or one of each recording."""
        return [self.agent(number) for number in range(count or len(self.trajectories))]


def load_source(
    names: Sequence[str],
    limits: TraceLimits = NO_LIMITS,
    *,
    agents: int | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Source:
    """The agents that `names` name, cut to `limits`. Raises TraceError, naming file and line, and ValueError.

    Of the paper's, `agents` are made (500 where None), so that they differ; `tokenizer` counts the tokens of texts.
    """
    if not names:
        raise TraceError(f"no source is named: give {SOURCES_HELP}")
    if len(names) == 1 and names[0] in PAPER_TRACES:
        made = paper_agents(names[0], agents or PAPER_AGENTS, seed)
        found = [made.trajectory(number) for number in range(len(made))]
        what = f"the paper's {names[0]} statistics, seed {seed}"
    else:
        files = list(_files(names))
        count = tokens_of_bytes if tokenizer is None else load_tokenizer(tokenizer)
        kinds = {path: kind_of(path) for path in files}
        found = [one for path in files for one in _READERS[kinds[path]](path, count)]
        what = _described(kinds, len(found), tokenizer)
    cut = [limited(one, limits) for one in found]
    kept = [one for one in cut if one is not None]
    if not kept:
        raise TraceError(
            f"{', '.join(names)}: no turn fits max_context_tokens={limits.max_context_tokens} at scale "
            f"{limits.scale:g}; raise the cap or the scale"
        )
    return Source(trajectories=kept, description=what + _limits_described(limits, len(found) - len(kept)))


def kind_of(path: Path) -> str:
    """``weka``, ``mooncake`` or ``miniswe``, from the content of `path`. Raises TraceError."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
            start = first + file.read(_DETECT_BYTES)
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from error
    try:
        keys = set(msgspec.json.decode(first, type=dict[str, msgspec.Raw]))
    except msgspec.MsgspecError:  # an object over many lines, or no JSON at all
        keys = {"requests"} if start.lstrip()[:1] == b"{" and b'"requests"' in start else set()
    for kind, needed in _KEYS.items():
        if needed <= keys:
            return kind
    raise TraceError(
        f"{path}: no format known here: neither a WEKA session (an object with requests), nor lines of a Mooncake "
        "trace (hash_ids, input_length) or of mini-SWE-agent sessions (session_id, input)"
    )


def renamed(trajectory: Trajectory, identity: str) -> Trajectory:
    """The trajectory under a name of its own, so that two agents of one recording have tokens of their own."""
    rounds = tuple(
        msgspec.structs.replace(
            round_,
            subagents=tuple(
                renamed(subagent, f"{identity}/{index}.{number}") for number, subagent in enumerate(round_.subagents)
            ),
        )
        if round_.subagents
        else round_
        for index, round_ in enumerate(trajectory.rounds)
    )
    return Trajectory(id=identity, rounds=rounds)


_Reader = Callable[[Path, Callable[[str], int]], list[Trajectory]]
_READERS: dict[str, _Reader] = {
    "mooncake": lambda path, _count: list(read_mooncake(path).trajectories),
    "weka": lambda path, _count: [read_weka(path)],
    "miniswe": read_miniswe,
}
_KEYS = {"mooncake": {"hash_ids", "input_length"}, "weka": {"requests"}, "miniswe": {"session_id", "input"}}
_NAMES = {"mooncake": "a Mooncake trace", "weka": "WEKA sessions", "miniswe": "mini-SWE-agent sessions"}


def _files(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
            if not inside:
                raise TraceError(f"{path}: a directory without .json or .jsonl files")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise TraceError(f"no trace {name!r}: give {SOURCES_HELP}")


def _described(kinds: dict[Path, str], sessions: int, tokenizer: Path | None) -> str:
    names = " and ".join(_NAMES[kind] for kind in dict.fromkeys(kinds.values()))
    counted = ""
    if "miniswe" in kinds.values():
        by = f"with {tokenizer.name}" if tokenizer else f"as bytes over {BYTES_PER_TOKEN}"
        counted = f", tokens of texts counted {by}"
    return f"{sessions} agents of {names}{counted}"


def _limits_described(limits: TraceLimits, dropped: int) -> str:
    said = [f"token counts divided by {limits.scale:g}"] if limits.scale != 1 else []
    if limits.max_context_tokens is not None:
        said.append(f"cut at {limits.max_context_tokens} tokens" + (f", which leaves {dropped} out" if dropped else ""))
    if limits.max_turns is not None:
        said.append(f"at most {limits.max_turns} turns each")
    return "".join(f"; {one}" for one in said)
