"""The list of experiments: what each varies, which figure of the paper it mirrors, and what to expect.

Conditions are sized for two cores and a checkpoint with 16 KiB of KV per token. There, 40 MB/s storage NICs bind
generated agents; recorded sessions append and generate more, so they need 15 MB/s. Rates hold for real bytes, so
compare shapes with the paper's, not absolute times.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from dualpath.core.systems import BASELINE, HEADLINE
from dualpath.lab.experiments import findings
from dualpath.lab.experiments.conditions import DEMO, Conditions
from dualpath.lab.report.summary import explain, gains
from dualpath.results.file import ResultFile

Draw = Callable[[ResultFile, Path], None]
BOTH = (BASELINE, HEADLINE)
QUICK: dict[str, Any] = {"agents": 3, "turns": 2, "context_tokens": 700, "snic_bytes_per_s": 20_000_000}
"""A load just large enough to show that an experiment works."""


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment."""

    name: str
    summary: str
    mirrors: str
    """The paper's figure or table that it mirrors."""
    expect: str
    minutes: int
    """Duration on two idle cores, without repeats."""
    conditions: Conditions
    quick: dict[str, Any]
    """Conditions that ``--quick`` changes."""
    figure: str
    """Function of `dualpath.lab.experiments.figures`, as ``module.function``."""
    find: Callable[[ResultFile], list[str]]
    needs_traces: bool = False

    def under(self, quick: bool, given: dict[str, Any]) -> Conditions:
        """Returns the conditions with the user's changes; an axis given as one value is no axis. Raises ValueError."""
        own = msgspec.structs.replace(self.conditions, **self.quick) if quick else self.conditions
        axes = given.get("axes") or {name: values for name, values in own.axes.items() if name not in given}
        found = msgspec.structs.replace(own, **(given | {"axes": axes}))
        if self.needs_traces and not found.traces:
            raise ValueError(f"{self.name} replays recorded sessions: give them with --trace FILE …")
        return found

    def draw(self, result: ResultFile, path: Path) -> None:
        """Writes the figure. Raises ValueError if `result` has nothing to draw."""
        module, _, function = self.figure.partition(".")
        draw: Draw = getattr(import_module(f"dualpath.lab.experiments.figures.{module}"), function)
        draw(result, path)


EXPERIMENTS = (
    Definition(
        name="demo",
        summary="basic, dualpath and oracle side by side: what `dualpath demo` runs",
        mirrors="the headline of the offline experiments",
        expect="dualpath over basic comes near (P + D) / P, and storage NICs are read evenly",
        minutes=4,
        conditions=DEMO,
        quick=QUICK,
        figure="bars.draw_traffic",
        find=explain,
    ),
    Definition(
        name="agents-context",
        summary="job completion time over the number of agents and the length of their contexts",
        mirrors="offline inference, agents × MaxLen",
        expect="dualpath over basic grows with contexts and agents until storage binds, then stays at (P + D) / P",
        minutes=15,
        conditions=Conditions(axes={"agents": (4, 8, 16), "context_tokens": (1000, 2000, 4000)}),
        quick=QUICK | {"axes": {"agents": (2, 4), "context_tokens": (600,)}, "systems": BOTH},
        figure="sweep.draw_sweep",
        find=gains,
    ),
    Definition(
        name="pd-ratio",
        summary="1P1D, 2P1D and 1P2D, and the pairs of them that read with as many storage NICs",
        mirrors="the P/D sweep of DS 27B",
        expect="basic 1P1D ties with basic 1P2D, dualpath 1P1D with basic 2P1D, dualpath 2P1D with dualpath 1P2D",
        minutes=6,
        conditions=Conditions(topologies=("1P1D", "2P1D", "1P2D"), agents=12),
        quick=QUICK | {"systems": BOTH},
        figure="bars.draw_topologies",
        find=findings.pairs,
    ),
    Definition(
        name="append-scaling",
        summary="job completion time over the tokens that a turn appends",
        mirrors="append-length scaling",
        expect="basic approaches dualpath as appends grow: computing takes over from reading",
        minutes=8,
        conditions=Conditions(topologies=("1P2D",), axes={"append_tokens": (16, 64, 192, 512)}),
        quick=QUICK | {"axes": {"append_tokens": (16, 128)}, "systems": BOTH},
        figure="sweep.draw_sweep",
        find=gains,
    ),
    Definition(
        name="generation-scaling",
        summary="job completion time over the tokens that a turn generates",
        mirrors="generation-length scaling",
        expect="basic approaches dualpath as generations grow: decoding takes over from reading",
        minutes=8,
        conditions=Conditions(topologies=("1P2D",), axes={"generate_tokens": (4, 16, 64, 160)}),
        quick=QUICK | {"axes": {"generate_tokens": (4, 32)}, "systems": BOTH},
        figure="sweep.draw_sweep",
        find=gains,
    ),
    Definition(
        name="aps",
        summary="TTFT, TTST and TPOT while agents arrive at random, at higher and higher rates",
        mirrors="online serving, agents per second",
        expect="basic's TTFT takes off at a lower rate than dualpath's; TPOT stays",
        minutes=9,
        conditions=Conditions(systems=BOTH, agents=14, axes={"agents_per_s": (0.15, 0.3, 0.45, 0.6)}),
        quick=QUICK | {"axes": {"agents_per_s": (0.5, 2.0)}},
        figure="latencies.draw_arrivals",
        find=findings.arrivals,
    ),
    Definition(
        name="ttft-breakdown",
        summary="where the time to first token goes: scheduling, allocation, read, prefill",
        mirrors="the TTFT breakdown",
        expect="dualpath's gain is in the read, and in the scheduling that waits for a read queue",
        minutes=4,
        conditions=Conditions(topologies=("1P1D", "1P2D")),
        quick=QUICK | {"topologies": ("1P2D",)},
        figure="latencies.draw_stages",
        find=findings.stages,
    ),
    Definition(
        name="ablation",
        summary="basic, then layerwise prefill, then both read paths in turns, then the scheduler's choice",
        mirrors="the ablation",
        expect="every step is faster than the one before; on so small a machine layerwise gains least",
        minutes=3,
        conditions=Conditions(
            topologies=("1P2D",), systems=("basic", "basic-layerwise", "dualpath-rr", "dualpath"), spread=0.5
        ),
        quick=QUICK,
        figure="bars.draw_ablation",
        find=findings.ablation,
    ),
    Definition(
        name="snic-balance",
        summary="bytes through the storage NICs over time, round robin against the scheduler's choice",
        mirrors="SNIC traffic max/avg, there 1.53 round robin and 1.18 scheduled",
        expect="in a window the busiest NIC is further above the average under round robin",
        minutes=3,
        conditions=Conditions(
            topologies=("1P2D",), systems=("dualpath-rr", "dualpath"), agents=10, turns=8, spread=0.6
        ),
        quick=QUICK | {"turns": 4},
        figure="over_time.draw_snic_balance",
        find=findings.snic,
    ),
    Definition(
        name="attention-balance",
        summary="attention of the prefill engines over time, round robin against the scheduler's choice",
        mirrors="attention time max/avg in an EP group, there 1.06 scheduled",
        expect="prefill engines differ less when the scheduler chooses between them by their tokens",
        minutes=3,
        conditions=Conditions(
            topologies=("2P1D",),
            systems=("dualpath-rr", "dualpath"),
            agents=10,
            turns=8,
            append_tokens=160,
            spread=0.6,
        ),
        quick=QUICK | {"turns": 4},
        figure="over_time.draw_attention_balance",
        find=findings.attention,
    ),
    Definition(
        name="traces",
        summary="recorded agent sessions on 1P1D, 2P1D and 1P2D",
        mirrors="the offline experiments, on sessions that anybody can get",
        expect="90 % of the ideal where storage binds, no loss where it does not, and ties of equal storage bandwidth",
        minutes=10,
        conditions=Conditions(
            topologies=("1P1D", "2P1D", "1P2D"),
            agents=16,
            turns=3,
            max_context_tokens=3072,
            snic_bytes_per_s=15_000_000,
        ),
        quick={"agents": 3, "turns": 3, "topologies": ("1P1D",), "systems": BOTH},
        figure="bars.draw_topologies",
        find=findings.real_sessions,
        needs_traces=True,
    ),
)


def definition(name: str) -> Definition:
    """Returns the experiment called `name`. Raises ValueError if there is none."""
    for one in EXPERIMENTS:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in EXPERIMENTS)
    raise ValueError(f"no experiment is called {name!r}; choose from {known}")
