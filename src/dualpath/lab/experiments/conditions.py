"""What an experiment asks of which clusters, and on what machine: records that the command line takes its options from.

Conditions say it for one point. Their axes name fields and the values these take one after another: every combination,
on every topology, is a point of the series. Nothing heavy is imported here: ``--help`` must be quick.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dualpath.spec.topology import Topology

AXES = ("agents", "turns", "context_tokens", "append_tokens", "generate_tokens", "spread", "agents_per_s")
GENERATED_AGENTS = 12
SERVE = (sys.executable, "-m", "dualpath", "serve")
Parameters = dict[str, float | str]


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Topologies, systems, and means of generated agents or recorded ones. Raises ValueError naming the option."""

    topologies: tuple[str, ...] = ("1P1D",)
    systems: tuple[str, ...] = ("basic", "dualpath", "oracle")
    agents: int | None = 8
    """None: one of each recording, or GENERATED_AGENTS."""
    turns: int = 3
    """Measured turns of an agent (at most, of a recorded one), after the one that brings its first context into
    storage.
    """
    context_tokens: float = 2000
    """At first."""
    append_tokens: float = 64
    generate_tokens: float = 16
    spread: float = 0.25
    """Of the generated lengths: standard deviation over mean."""
    agents_per_s: float | None = None
    """Poisson arrivals; None: all at once."""
    axes: dict[str, tuple[float, ...]] = {}
    snic_bytes_per_s: int | None = 40_000_000
    """Each storage NIC's rate; None: not limited."""
    cnic_bytes_per_s: int | None = 320_000_000
    traces: tuple[str, ...] = ()
    """Recorded agents instead of generated ones: what `traces.sources.load_source` takes."""
    scale: float = 16
    """Token counts of recorded sessions are divided by this."""
    max_context_tokens: int = 6144
    """A recorded session ends before its context grows beyond this."""

    def __post_init__(self) -> None:
        for name in ("topologies", "systems"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name}: name at least one, and each once, not {','.join(given) or 'nothing'}")
        for topology in self.topologies:
            try:
                Topology.parse(topology)
            except ValueError as error:
                raise ValueError(f"--topologies: {error}") from None
        for name, option in (("agents", "agents"), ("turns", "turns"), ("max_context_tokens", "max-context")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{option} must be at least 1, not {value}")
        if self.agents_per_s is not None and self.agents_per_s <= 0:
            raise ValueError(f"agents_per_s must be above 0, not {self.agents_per_s:g}")
        for name, values in self.axes.items():
            _check_axis(name, values)

    @property
    def source(self) -> str:
        """Where the agents come from, in words."""
        if self.traces:
            sources = "source" if len(self.traces) == 1 else "sources"
            return f"recorded agents of {len(self.traces)} {sources}, token counts divided by {self.scale:g}"
        return (
            f"generated: contexts of {self.context_tokens:g} tokens at first, {self.append_tokens:g} appended and "
            f"{self.generate_tokens:g} generated a turn, where not varied"
        )

    def points(self) -> Iterator[tuple[Parameters, "Conditions"]]:
        """Every combination of the axes' values, and the conditions there."""
        for values in itertools.product(*self.axes.values()):
            varied: dict[str, float] = dict(zip(self.axes, values, strict=True))
            whole = {name: int(value) for name, value in varied.items() if name in ("agents", "turns")}
            yield dict(varied), msgspec.structs.replace(self, axes={}, **(varied | whole))


def _check_axis(name: str, values: tuple[float, ...]) -> None:
    if name not in AXES:
        raise ValueError(f"--values: {name!r} can't be varied; choose from {', '.join(AXES)}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"--values {name}: give at least one value, and each once")
    if name in ("agents", "turns") and any(value != int(value) or value < 1 for value in values):
        raise ValueError(f"--values {name}: whole numbers from 1 up, not {values}")


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what all runs of a series are made. Raises ValueError for what can't be, naming the option."""

    repeats: int = 1
    seed: int = 0
    """Of the agents."""
    model: Path = Path(".models/demo")
    """A checkpoint; made if absent."""
    out: Path = Path("results/experiments")
    """The result file, its figure and the clusters' logs go here."""
    work: Path = Path(".store")
    """Stores are made, and removed again, under here: a few GB."""
    serve_command: tuple[str, ...] = SERVE
    start_timeout_s: float = 180.0
    command: str = ""
    """As typed; kept in the result file."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.repeats < 1:
            raise ValueError(f"--seed must be at least 0 and --repeat at least 1, not {self.seed} and {self.repeats}")


DEMO = Conditions(topologies=("1P1D", "1P2D"), agents=None, turns=4, context_tokens=2800)
"""What `dualpath demo` runs: a few minutes on two cores."""
DEMO_OUT = Path("results")
