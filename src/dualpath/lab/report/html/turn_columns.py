"""All turns as columns, for the page's table and timeline.

A page stays quick up to about `MAX_TURNS` turns. Beyond that, whole agents are left out evenly, the same in every run,
so that a lane of the timeline is complete or absent. Charts are drawn from all turns.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from dualpath.lab.report.balance import prefill_first
from dualpath.lab.report.html.runs import Column, Entry
from dualpath.results.turns import STAGES, TurnResult, stages_of

MAX_TURNS = 100_000
TURN_COLUMNS = [
    Column("run", "run"),
    Column("agent", "agent"),
    Column("round", "round", 0),
    Column("start", "start s", 2),
    Column("ttft", "TTFT ms", 0),
    Column("ttst", "TTST ms", 1),
    Column("tpot", "TPOT ms", 1),
    Column("latency", "latency ms", 0),
    Column("prompt", "prompt tokens", 0),
    Column("loaded", "loaded tokens", 0),
    Column("generated", "generated tokens", 0),
    Column("pe", "PE"),
    Column("de", "DE"),
    Column("pe_read", "read by PE tokens", 0),
    Column("de_read", "read by DE tokens", 0),
    Column("scheduling", "scheduling ms", 1),
    Column("allocation", "allocation ms", 1),
    Column("read", "read ms", 0),
    Column("prefill", "prefill ms", 0),
    Column("decode", "decode ms", 0),
    Column("tries", "tries", 0),
    Column("attempts", "attempts", 0),
]


class RunTurns(msgspec.Struct, frozen=True):
    """One run's turns: a column per fact, all of one length. Times in milliseconds from the run's start."""

    run: int
    agents: list[str]
    engines: list[str]
    columns: dict[str, list[Any]]


class Turns(msgspec.Struct, frozen=True):
    """All of a page's turns."""

    runs: list[RunTurns]
    all_turns: int
    kept_turns: int


def turns_of(entries: Sequence[Entry], at_most: int = MAX_TURNS) -> Turns:
    """Returns the turns of every run that has any; beyond `at_most`, of every n-th agent only."""
    timed = [entry for entry in entries if entry.run.turn_results]
    all_turns = sum(len(entry.run.turn_results) for entry in timed)
    step = -(-all_turns // at_most)
    runs = [_columns(entry.number, _every(entry.run.turn_results, step)) for entry in timed]
    return Turns(runs, all_turns, sum(len(run.columns["agent"]) for run in runs))


def _every(turns: list[TurnResult], step: int) -> list[TurnResult]:
    kept = set(sorted({turn.trajectory for turn in turns})[:: max(1, step)])
    return sorted((turn for turn in turns if turn.trajectory in kept), key=lambda turn: turn.start_s)


def _columns(number: int, turns: list[TurnResult]) -> RunTurns:
    agents = {name: at for at, name in enumerate(dict.fromkeys(turn.trajectory for turn in turns))}
    told = [turn.timings for turn in turns]
    named = {name for t in told if t is not None for name in (t.prefill_engine, t.decode_engine)}
    engines = sorted(named, key=prefill_first)
    place = {name: at for at, name in enumerate(engines)}
    columns: dict[str, list[Any]] = {
        "agent": [agents[turn.trajectory] for turn in turns],
        "round": [turn.round_index for turn in turns],
        "start": [_ms(turn.start_s) for turn in turns],
        "ttft": [_ms(turn.ttft_s) for turn in turns],
        "ttst": [_ms(turn.ttst_s) for turn in turns],
        "tpot": [_ms(turn.tpot_s) for turn in turns],
        "latency": [_ms(turn.latency_s) for turn in turns],
        "prompt": [turn.prompt_tokens for turn in turns],
        "loaded": [turn.loaded_tokens for turn in turns],
        "generated": [turn.generated_tokens for turn in turns],
        "tries": [turn.tries for turn in turns],
    }
    stages = [stages_of(turn) for turn in turns]
    columns |= {stage: [_ms(one[stage]) for one in stages] for stage in STAGES}
    if engines:
        columns |= {
            "pe": [None if t is None else place[t.prefill_engine] for t in told],
            "de": [None if t is None else place[t.decode_engine] for t in told],
            "pe_read": [None if t is None else t.pe_read_tokens for t in told],
            "de_read": [None if t is None else t.de_read_tokens for t in told],
            "attempts": [None if t is None else t.attempts for t in told],
        }
    return RunTurns(number, list(agents), engines, columns)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
