"""Trajectories as columns, for simulations of millions of turns.

`TurnTable` holds templates, with the turns of all of them in flat arrays. `Agents` are many runs of few templates, each
with its own length and perhaps a round before it (the paper makes more trajectories by *prepending* a round, §9), so
48,000 agents of 157 turns take megabytes and not gigabytes::

    template 3      turns   starts[3] … starts[4]-1 of every column
    agent           turn 0: its prefix round (append prefix, generate 1), where it has one
                    then the template's turns, every prompt longer by the prefix
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath.traces.trajectory import Round, Trajectory

Tokens = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]


class Turn(msgspec.Struct, frozen=True, gc=False):
    """One turn of one agent, lengths in tokens."""

    kept_tokens: int
    """Context tokens that the prompt begins with: all of them unless there was a compaction."""
    append_tokens: int
    generate_tokens: int
    gap_ns: int
    """Pause before the turn (tool or think time)."""

    @property
    def prompt_tokens(self) -> int:
        return self.kept_tokens + self.append_tokens


class TurnTable:
    """Turns of templates in flat columns. Immutable by convention: every method returns a new table."""

    def __init__(self, starts: Starts, kept: Tokens, append: Tokens, generate: Tokens, gap_ns: Starts) -> None:
        """`starts` has one entry more than there are templates. Raises ValueError if the columns don't fit it."""
        columns = (kept, append, generate, gap_ns)
        if len(starts) < 2 or starts[0] != 0 or np.any(np.diff(starts) < 1):
            raise ValueError("starts must begin with 0 and give every template at least one turn")
        if any(len(column) != starts[-1] for column in columns):
            raise ValueError(f"columns of {[len(column) for column in columns]} turns do not fit starts ({starts[-1]})")
        self.starts = starts
        self.kept_tokens = kept
        self.append_tokens = append
        self.generate_tokens = generate
        self.gap_ns = gap_ns
        # Reading one entry of a memoryview gives a plain int, five times as fast as an array's.
        self._views = tuple(np.ascontiguousarray(column).data for column in columns)

    @classmethod
    def from_lengths(
        cls, append: Sequence[Tokens], generate: Sequence[Tokens], gap_ns: Sequence[Starts] | None = None
    ) -> TurnTable:
        """Makes templates without compactions from the lengths of their turns."""
        starts = np.concatenate([[0], np.cumsum([len(one) for one in append])]).astype(np.int64)
        gaps = np.zeros(starts[-1], np.int64) if gap_ns is None else np.concatenate(gap_ns)
        kept = [_kept(a, g) for a, g in zip(append, generate, strict=True)]
        columns = [np.concatenate(column).astype(np.int32) for column in (kept, append, generate)]
        return cls(starts, columns[0], columns[1], columns[2], gaps)

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> TurnTable:
        """Makes one template of each, compactions kept. It refuses subagents, whose contexts differ (ValueError)."""
        for trajectory in trajectories:
            if any(round_.subagents for round_ in trajectory.rounds):
                raise ValueError(f"trajectory {trajectory.id!r} has subagents, which a turn table does not hold")
        rounds = [round_ for trajectory in trajectories for round_ in trajectory.rounds]
        spans = [span for trajectory in trajectories for span in trajectory.spans()]
        return cls(
            np.concatenate([[0], np.cumsum([len(trajectory.rounds) for trajectory in trajectories])]).astype(np.int64),
            np.array([span.kept_tokens for span in spans], np.int32),
            np.array([round_.append_tokens for round_ in rounds], np.int32),
            np.array([round_.generate_tokens for round_ in rounds], np.int32),
            np.array([round(round_.gap_s * 1e9) for round_ in rounds], np.int64),
        )

    def __len__(self) -> int:
        """Number of templates."""
        return len(self.starts) - 1

    @property
    def turns(self) -> npt.NDArray[np.int64]:
        """Turns of each template."""
        return np.diff(self.starts)

    @property
    def prompt_tokens(self) -> Tokens:
        return self.kept_tokens + self.append_tokens

    @property
    def context_tokens(self) -> Tokens:
        """Prompt and generation of each turn."""
        return self.prompt_tokens + self.generate_tokens

    @property
    def final_context_tokens(self) -> Tokens:
        """Context at the end of each template, in tokens."""
        return self.context_tokens[self.starts[1:] - 1]

    def turn(self, position: int) -> Turn:
        """Returns the turn at `position` of the columns."""
        return self.turn_behind(0, position)

    def turn_behind(self, tokens: int, position: int) -> Turn:
        """Returns the turn at `position` in a context that is longer by `tokens` at its beginning."""
        kept, append, generate, gap = self._views
        return Turn(kept[position] + tokens, append[position], generate[position], gap[position])

    def trajectory(self, template: int, identity: str) -> Trajectory:
        """Returns a template as an object."""
        return _trajectory(
            identity, [self.turn(position) for position in range(self.starts[template], self.starts[template + 1])]
        )

    def scaled(self, append: float, generate: float, max_context_tokens: int | None = None) -> TurnTable:
        """Multiplies appends and generations (to at least one token) and cuts trajectories at `max_context_tokens`.

        This is the paper's scaling of append lengths (§10): a trajectory of longer rounds has fewer rounds. Compactions
        are dropped: kept tokens are the sum of what came before. Raises ValueError if a trajectory has no turn left.
        """
        if not (append > 0 and generate > 0):
            raise ValueError(f"factors must be above zero, not {append} and {generate}")
        bounds = [slice(start, stop) for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True)]
        cut = [
            _scaled(self.append_tokens[b], self.generate_tokens[b], append, generate, max_context_tokens)
            for b in bounds
        ]
        gaps = [self.gap_ns[b][: len(a)] for b, (a, _) in zip(bounds, cut, strict=True)]
        return TurnTable.from_lengths([a for a, _ in cut], [g for _, g in cut], gaps)

    def with_gaps(self, gap_ns: Starts) -> TurnTable:
        """Returns the same turns with other pauses, one for each position."""
        return TurnTable(self.starts, self.kept_tokens, self.append_tokens, self.generate_tokens, gap_ns)


class Agents:
    """Runs of the templates of `table`."""

    def __init__(
        self, table: TurnTable, template: npt.NDArray[np.int32], prefix_tokens: Tokens, turns: npt.NDArray[np.int32]
    ) -> None:
        """Takes per agent its template, the append of its prefix round (0: none) and its turns, prefix included."""
        self.table = table
        self.template = template
        self.prefix_tokens = prefix_tokens
        self.turns = turns
        self._start = np.ascontiguousarray(table.starts[template]).data
        self._prefix = np.ascontiguousarray(prefix_tokens).data

    @classmethod
    def of_templates(cls, table: TurnTable) -> Agents:
        """Makes one agent per template."""
        count = len(table)
        zeros = np.zeros(count, np.int32)
        return cls(table, np.arange(count, dtype=np.int32), zeros, table.turns.astype(np.int32))

    @classmethod
    def prepended(cls, table: TurnTable, count: int, max_context_tokens: int | None, seed: int) -> Agents:
        """The first agents are the templates; each further one is a template after a random round with g = 1 (§9).

        That round's append is drawn from the table's. Agents stop before the turn that exceeds `max_context_tokens`.
        A larger `count` leaves the first agents unchanged. Raises ValueError for a count below 1 or a seed below 0.
        """
        if count < 1 or seed < 0:
            raise ValueError(f"the number of agents must be at least 1 and the seed at least 0, not {count} and {seed}")
        rng = np.random.default_rng([seed, 9])
        draws = rng.random((max(0, count - len(table)), 2))
        template = np.concatenate([np.arange(len(table)), (draws[:, 0] * len(table)).astype(np.int64)])[:count]
        drawn = table.append_tokens[(draws[:, 1] * len(table.append_tokens)).astype(np.int64)]
        drawn = np.clip(drawn, 1, None if max_context_tokens is None else max_context_tokens - 1)
        prefix = np.concatenate([np.zeros(len(table), np.int32), drawn])[:count].astype(np.int32)
        turns = _turns_that_fit(table, template, prefix, max_context_tokens)
        return cls(table, template.astype(np.int32), prefix, turns)

    def __len__(self) -> int:
        return len(self.template)

    def turn(self, agent: int, index: int) -> Turn:
        """Turn `index` of `agent`, from 0; the caller stays below ``turns[agent]``."""
        prefix = self._prefix[agent]
        if not prefix:
            return self.table.turn(self._start[agent] + index)
        if index == 0:
            return Turn(0, prefix, 1, 0)
        return self.table.turn_behind(prefix + 1, self._start[agent] + index - 1)

    def trajectory(self, agent: int) -> Trajectory:
        """Returns an agent as an object; its id contains its number."""
        return _trajectory(f"agent-{agent:05d}", [self.turn(agent, index) for index in range(self.turns[agent])])

    def total_turns(self) -> int:
        return int(self.turns.sum(dtype=np.int64))


def _trajectory(identity: str, turns: list[Turn]) -> Trajectory:
    rounds, context_tokens = [], 0
    for turn in turns:
        keep = None if turn.kept_tokens == context_tokens else turn.kept_tokens
        rounds.append(
            Round(
                append_tokens=turn.append_tokens,
                generate_tokens=turn.generate_tokens,
                gap_s=turn.gap_ns / 1e9,
                keep_tokens=keep,
            )
        )
        context_tokens = turn.prompt_tokens + turn.generate_tokens
    return Trajectory(id=identity, rounds=tuple(rounds))


def _kept(append: Tokens, generate: Tokens) -> npt.NDArray[np.int64]:
    """Context before each turn if nothing is ever dropped."""
    after = np.cumsum(append.astype(np.int64) + generate)
    return np.concatenate([[0], after[:-1]])


def _scaled(
    append: Tokens, generate: Tokens, by_append: float, by_generate: float, limit: int | None
) -> tuple[Tokens, Tokens]:
    a = np.maximum(1, np.rint(append * by_append)).astype(np.int32)
    g = np.maximum(1, np.rint(generate * by_generate)).astype(np.int32)
    fits = len(a) if limit is None else int(np.searchsorted(np.cumsum(a.astype(np.int64) + g), limit, side="right"))
    if not fits:
        raise ValueError(f"a trajectory's first round of {a[0]} + {g[0]} tokens does not fit {limit} tokens")
    return a[:fits], g[:fits]


def _turns_that_fit(
    table: TurnTable, template: npt.NDArray[np.int64], prefix: Tokens, limit: int | None
) -> npt.NDArray[np.int32]:
    turns = table.turns[template] + (prefix > 0)
    if limit is not None:
        for agent in np.flatnonzero(prefix):
            start, stop = table.starts[template[agent]], table.starts[template[agent] + 1]
            room = limit - prefix[agent] - 1
            over = table.context_tokens[start:stop] > room
            turns[agent] = 1 + (int(np.argmax(over)) if over.any() else stop - start)
    return turns.astype(np.int32)
