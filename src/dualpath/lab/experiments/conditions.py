"""Conditions and bench of an experiment: what is asked of which clusters, on what machine. They define the options.

Conditions describe one point. Their axes name fields and the values these take: every combination, on every topology,
is a point of the series. This module imports nothing heavy, because ``--help`` must be quick.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dualpath.spec.cluster_setup import ENGINES
from dualpath.spec.topology import Topology

AXES = ("agents", "turns", "context_tokens", "append_tokens", "generate_tokens", "spread", "agents_per_s")
GENERATED_AGENTS = 12
VLLM_CONTEXT_TOKENS = 16_384
"""The demo's model would take eight times as many, for which vLLM wants more memory than these clusters have."""
SERVE = (sys.executable, "-m", "dualpath", "serve")
Parameters = dict[str, float | str]


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Topologies, systems, and generated (by means) or recorded agents. Raises ValueError naming the option."""

    topologies: tuple[str, ...] = ("1P1D",)
    systems: tuple[str, ...] = ("basic", "dualpath", "oracle")
    agents: int | None = 8
    """Number of agents; None: one per recording, or GENERATED_AGENTS."""
    turns: int = 3
    """Measured turns per agent (of a recorded one at most), after the turn that stores its first context."""
    context_tokens: float = 2000
    """Mean tokens of the first prompt."""
    append_tokens: float = 64
    generate_tokens: float = 16
    spread: float = 0.25
    """Standard deviation over mean of the generated lengths."""
    agents_per_s: float | None = None
    """Rate of Poisson arrivals; None: all at once."""
    axes: dict[str, tuple[float, ...]] = {}
    snic_bytes_per_s: int | None = 40_000_000
    """Each storage NIC's rate; None: not limited."""
    cnic_bytes_per_s: int | None = 320_000_000
    traces: tuple[str, ...] = ()
    """Sources of recorded agents for `traces.sources.load_source`; empty: generated agents."""
    scale: float = 16
    """Divides the token counts of recorded sessions."""
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
        """Describes where the agents come from."""
        if self.traces:
            sources = "source" if len(self.traces) == 1 else "sources"
            return f"recorded agents of {len(self.traces)} {sources}, token counts divided by {self.scale:g}"
        return (
            f"generated: contexts of {self.context_tokens:g} tokens at first, {self.append_tokens:g} appended and "
            f"{self.generate_tokens:g} generated a turn, where not varied"
        )

    def points(self) -> Iterator[tuple[Parameters, "Conditions"]]:
        """Yields every combination of the axes' values with the conditions there."""
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
    """Place, model and options of all runs of a series. Raises ValueError naming the option that is wrong."""

    repeats: int = 1
    seed: int = 0
    """Seed of the agents."""
    model: Path = Path(".models/demo")
    """A checkpoint, which is made if absent."""
    engine: str = ENGINES[0]
    """What computes: the engine of this package, or vLLM servers."""
    transport: str | None = None
    """What moves KV between engines, for `dualpath serve` to check; None: its default."""
    out: Path = Path("results/experiments")
    """Directory of the result file, its figure and the clusters' logs."""
    work: Path = Path(".store")
    """Directory in which stores are made and removed again: a few GB."""
    serve_command: tuple[str, ...] = SERVE
    start_timeout_s: float = 600.0
    """vLLM servers that come up beside each other on few cores take minutes."""
    command: str = ""
    """The command as typed; kept in the result file."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.repeats < 1:
            raise ValueError(f"--seed must be at least 0 and --repeat at least 1, not {self.seed} and {self.repeats}")
        if self.engine not in ENGINES:
            raise ValueError(f"--engine is {self.engine!r}; give {' or '.join(ENGINES)}")

    @property
    def engine_options(self) -> tuple[str, ...]:
        """Options of the commands that start a cluster."""
        return () if self.engine == ENGINES[0] else ("--engine", self.engine)

    @property
    def engine_arguments(self) -> tuple[str, ...]:
        """What those that start engines end with."""
        return () if self.engine == ENGINES[0] else ("--", "--max-model-len", str(VLLM_CONTEXT_TOKENS))


DEMO = Conditions(topologies=("1P1D", "1P2D"), agents=None, turns=4, context_tokens=2800)
"""What `dualpath demo` runs: a few minutes on two cores."""
DEMO_OUT = Path("results")
