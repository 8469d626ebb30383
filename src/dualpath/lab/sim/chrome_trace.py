"""Writes a run as a timeline for ``chrome://tracing`` or Perfetto: prefill groups' steps, and turns by decode engine.

The format is a JSON array of complete events (``"ph": "X"``) with microseconds. Process 0 holds the prefill groups, one
thread each. Every decode engine is a process, in which a turn is three spans: until its first token, its copy to the
device, decoding.
"""

from pathlib import Path
from typing import Any

import msgspec

from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.turns import LiveTurn

MAX_TURNS = 200_000
"""Spans after which the timeline stops, because viewers don't take more."""


class ChromeTrace:
    """Collects spans while a simulator runs; call `write` when it is over."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._spans: list[dict[str, Any]] = []
        self._turns = 0
        simulator.on_turn = self._add_turn

    def write(self, path: Path) -> None:
        """Writes the file. Raises OSError."""
        path.write_bytes(msgspec.json.encode(self._names() + self._spans + self._steps()))

    def _add_turn(self, turn: LiveTurn) -> None:
        if self._turns == MAX_TURNS:
            return
        self._turns += 1
        facts = {
            "request": turn.request,
            "agent": turn.agent.number,
            "prompt_tokens": turn.prompt_tokens,
            "hit_tokens": turn.hit_tokens,
            "pe_read_tokens": turn.pe_tokens,
            "prefill_engine": turn.prefill_engine,
        }
        marks = [turn.submitted_ns, turn.first_token_ns, turn.copied_ns, self._simulator.events.now]
        for name, start_ns, end_ns in zip(("prefill", "copy", "decode"), marks, marks[1:], strict=False):
            self._spans.append(
                _span(name, 1 + turn.decode_engine, turn.agent.number, start_ns, end_ns - start_ns, facts)
            )

    def _steps(self) -> list[dict[str, Any]]:
        return [
            _span("step", 0, step.group, step.start_ns, step.end_ns - step.start_ns, {"new_tokens": step.new_tokens})
            for step in self._simulator.prefill.steps[:MAX_TURNS]
        ]

    def _names(self) -> list[dict[str, Any]]:
        engines = self._simulator.decode.engines
        named = [(0, "prefill groups"), *((1 + engine, f"decode engine {engine}") for engine in engines)]
        return [{"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}} for pid, name in named]


def _span(name: str, pid: int, tid: int, start_ns: int, length_ns: int, facts: dict[str, Any]) -> dict[str, Any]:
    span = {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start_ns / 1e3, "dur": length_ns / 1e3}
    return span | {"args": facts}
