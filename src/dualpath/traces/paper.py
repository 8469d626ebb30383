"""Generates trajectories with the statistics that the paper publishes of its trace (§9); the trace is not public.

Theory of operation. For each MaxLen the table gives means over 500 trajectories. They fit together in one way only:
"append" and "generated" are means over trajectories of each trajectory's mean per turn. (Pooled over turns, they would
sum to mean total over mean turns, 356 tokens at 64K; the table has 429 + 176 = 605, and 157 such turns exceed MaxLen.)
So some trajectories have few long turns, others many short ones, and all grow towards MaxLen. From that::

    total     MaxLen · u^k, u uniform         most end near MaxLen, some are done early; k from the mean total
        turns     Weibull, independent of total   its shape from mean(total / turns) = append + generated
    split     generated / (append + generated) of every trajectory
    growth    appends ∝ t^p − (t−1)^p         agents read much first and little later; p from the mean context
    a turn    each length times a gamma draw with standard deviation = mean, then scaled to the trajectory's total

k, the spread and p are solved for from the given statistics, so any such row works. Turns and totals are drawn by
strata, so 500 trajectories of any seed have the row's means within 2 %.

Why Weibull: of 312 public coding sessions cut at 64K, median, 90th, 99th percentile and longest are 0.7, 2.3, 3.8 and
5.6 times the mean. A Weibull distribution with their mean(1 / turns) has 0.8, 2.1, 3.8 and 5.0, a log-normal one 0.5,
2.3, 7.3 and 15. The longest trajectory matters: if all agents start at once, it is the end of every job.
"""

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath.traces.turn_table import Agents, Tokens, TurnTable

PAPER_TRAJECTORIES = 500
ROUND_SPREAD = 1.0
"""Standard deviation over mean of a trajectory's lengths. Not published; public coding sessions have at least this."""
MAX_SPREAD = 2.5
"""Bound on one over the Weibull shape of turns, where longest over median is beyond a hundred."""

Reals = npt.NDArray[np.float64]


class TraceStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the paper's table: means over trajectories, in tokens unless the field says otherwise."""

    max_context_tokens: int
    """MaxLen."""
    turns: float
    append_tokens: float
    """Mean over trajectories of each one's mean append per turn."""
    generate_tokens: float
    """Mean over trajectories of each one's mean generation per turn."""
    total_tokens: float
    """Context at the end of a trajectory."""
    context_tokens: float
    """Mean over trajectories of each one's mean prompt."""


def _row(length: int, turns: float, append: float, generate: float, total: float, context: float) -> TraceStatistics:
    return TraceStatistics(
        max_context_tokens=length,
        turns=turns,
        append_tokens=append,
        generate_tokens=generate,
        total_tokens=total,
        context_tokens=context,
    )


PAPER_TRACES: dict[str, TraceStatistics] = {
    "32K": _row(32_768, 60, 608, 148, 28_639, 17_183),
    "48K": _row(49_152, 106, 474, 172, 42_607, 25_120),
    "64K": _row(65_536, 157, 429, 176, 55_958, 32_721),
}


def paper_agents(
    trace: str, count: int, seed: int = 0, append_scale: float = 1.0, generate_scale: float = 1.0
) -> Agents:
    """Returns `count` agents of a row of the paper's table: ``32K``, ``48K``, ``64K``. Above 500, rounds are prepended.

    (§9). The scales multiply the lengths of every round. Trajectories still stop at MaxLen (§10), and a first round
    that is longer by itself is cut to it. Raises ValueError.
    """
    if trace not in PAPER_TRACES:
        raise ValueError(f"no trace {trace!r}; the paper has {', '.join(PAPER_TRACES)}")
    statistics = PAPER_TRACES[trace]
    table = fitted_table(statistics, PAPER_TRAJECTORIES, seed)
    if (append_scale, generate_scale) != (1.0, 1.0):
        table = _with_first_rounds_that_fit(table, append_scale, generate_scale, statistics.max_context_tokens)
        table = table.scaled(append_scale, generate_scale, statistics.max_context_tokens)
    return Agents.prepended(table, count, statistics.max_context_tokens, seed)


def fitted_table(statistics: TraceStatistics, count: int = PAPER_TRAJECTORIES, seed: int = 0) -> TurnTable:
    """Returns `count` trajectories with the given means, none longer than MaxLen.

    Raises ValueError, naming what contradicts what, if no trajectories of this shape have these means.
    """
    if count < 2 or seed < 0:
        raise ValueError(f"at least 2 trajectories and a seed from 0 up are needed, not {count} and {seed}")
    _check(statistics)
    rng = np.random.default_rng(seed)
    a_turn = statistics.append_tokens + statistics.generate_tokens
    share = statistics.generate_tokens / a_turn
    exponent = statistics.max_context_tokens / statistics.total_tokens - 1
    totals = np.floor(statistics.max_context_tokens * _strata(rng, count) ** exponent)
    turns = _fitted_turns(rng, statistics.turns, a_turn, totals, share)
    growth = _fitted_growth(statistics.context_tokens, turns, totals, share)
    lengths = [_rounds(rng, int(n), int(total), share, growth) for n, total in zip(turns, totals, strict=True)]
    return TurnTable.from_lengths([append for append, _ in lengths], [generate for _, generate in lengths])


def _with_first_rounds_that_fit(table: TurnTable, by_append: float, by_generate: float, limit: int) -> TurnTable:
    """Cuts first appends so that, once scaled, they leave room for the scaled generation."""
    append = table.append_tokens.copy()
    first = table.starts[:-1]
    room = (limit - 1 - np.rint(table.generate_tokens[first] * by_generate)) / by_append
    append[first] = np.minimum(append[first], np.maximum(1, np.floor(room)))
    rounds = [slice(start, stop) for start, stop in zip(table.starts[:-1], table.starts[1:], strict=True)]
    return TurnTable.from_lengths([append[r] for r in rounds], [table.generate_tokens[r] for r in rounds])


def measured(table: TurnTable, max_context_tokens: int) -> TraceStatistics:
    """The statistics of `table`'s templates, as the paper's table has them."""
    first = table.starts[:-1]
    turns = table.turns

    def mean_of_means(column: Tokens) -> float:
        return float(np.mean(np.add.reduceat(column.astype(np.float64), first) / turns))

    return TraceStatistics(
        max_context_tokens=max_context_tokens,
        turns=float(np.mean(turns)),
        append_tokens=mean_of_means(table.append_tokens),
        generate_tokens=mean_of_means(table.generate_tokens),
        total_tokens=float(np.mean(table.final_context_tokens)),
        context_tokens=mean_of_means(table.prompt_tokens),
    )


def _check(statistics: TraceStatistics) -> None:
    if not 0 < statistics.total_tokens < statistics.max_context_tokens:
        raise ValueError(
            f"total_tokens is {statistics.total_tokens:g}; it must be above 0 and below max_context_tokens "
            f"({statistics.max_context_tokens})"
        )
    if min(statistics.turns, statistics.append_tokens, statistics.generate_tokens) < 1:
        raise ValueError("turns, append_tokens and generate_tokens must each be at least 1")
    pooled = statistics.total_tokens / statistics.turns
    if statistics.append_tokens + statistics.generate_tokens < 0.999 * pooled:
        raise ValueError(
            f"append_tokens + generate_tokens is {statistics.append_tokens + statistics.generate_tokens:g}, less than "
            f"total_tokens over turns ({pooled:.0f}); a mean of each trajectory's mean per turn can't be below that"
        )


def _strata(rng: np.random.Generator, count: int) -> Reals:
    """Draws one value from the middle half of each of `count` equal slices of (0, 1), shuffled."""
    draws = (np.arange(count) + 0.25 + 0.5 * rng.random(count)) / count
    rng.shuffle(draws)
    return draws


def _fitted_turns(rng: np.random.Generator, mean: float, a_turn: float, totals: Reals, share: float) -> Reals:
    """Whole turns with that mean and mean(totals / turns) = `a_turn`; at least two tokens of each kind per turn."""
    exponential = -np.log(_strata(rng, len(totals)))
    most = np.floor(totals * min(share, 1 - share) / 2)

    def turns_at(spread: float) -> Reals:
        shape = exponential**spread
        whole: Reals = np.rint(shape * (mean / shape.mean()))
        return np.clip(whole, 1.0, most)

    turns = turns_at(_bisect(lambda spread: float(np.mean(totals / turns_at(spread))) - a_turn, 0.0, MAX_SPREAD))
    found = float(np.mean(totals / turns))
    if abs(found / a_turn - 1) > 0.05 or abs(float(turns.mean()) / mean - 1) > 0.05:
        raise ValueError(
            f"append_tokens + generate_tokens is {a_turn:g}; {len(totals)} trajectories with a mean of {mean:g} turns "
            f"and {totals.mean():.0f} tokens can't reach it (nearest: {found:.0f})"
        )
    return turns


def _fitted_growth(context: float, turns: Reals, totals: Reals, share: float) -> float:
    """Returns the p at which the mean of mean prompts is `context`."""

    def mean_prompt(p: float) -> float:
        fractions = [(1 - share) * _mean_power(int(n), p) + share * (n - 1) / (2 * n) for n in turns]
        return float(np.mean(totals * np.array(fractions)))

    if not mean_prompt(8.0) < context < mean_prompt(0.01):
        raise ValueError(
            f"context_tokens is {context:g}; trajectories with these turns and totals have means from "
            f"{mean_prompt(8.0):.0f} to {mean_prompt(0.01):.0f}"
        )
    return _bisect(lambda p: context - mean_prompt(p), 0.01, 8.0)


def _mean_power(turns: int, p: float) -> float:
    """Mean over t = 1…n of (t/n)^p: the share of a trajectory's appends that a prompt holds."""
    return float(np.mean((np.arange(1, turns + 1) / turns) ** p))


def _bisect(rises: Callable[[float], float], low: float, high: float) -> float:
    """Returns where the rising function crosses zero between `low` and `high`."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) > 0 else (middle, high)
    return (low + high) / 2


def _rounds(rng: np.random.Generator, turns: int, total: int, share: float, growth: float) -> tuple[Tokens, Tokens]:
    """Appends and generations of one trajectory: whole numbers of at least 1, `total` together."""
    steps = np.diff((np.arange(turns + 1) / turns) ** growth)
    shape = 1 / ROUND_SPREAD**2
    generated = max(turns, round(total * share))
    append = _apportion(steps * rng.gamma(shape, size=turns), total - generated)
    return append, _apportion(rng.gamma(shape, size=turns), generated)


def _apportion(weights: Reals, total: int) -> Tokens:
    """Returns whole numbers from 1 up, in proportion to `weights`, that sum to `total` (at least `len(weights)`)."""
    edges = np.rint(np.cumsum(weights) / weights.sum() * (total - len(weights))).astype(np.int64)
    return (1 + np.diff(np.concatenate([[0], edges]))).astype(np.int32)
