"""What a demo run may be told. The defaults take a few minutes on two cores."""

import sys
from pathlib import Path

import msgspec

from dualpath.spec.topology import Topology


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Raises ValueError for what can't be run, naming the option."""

    topologies: tuple[str, ...] = ("1P1D", "1P2D")
    systems: tuple[str, ...] = ("basic", "dualpath", "oracle")
    agents: int | None = None
    """None: 12 generated ones, or one per trace."""
    turns: int = 4
    """Measured turns of an agent at most, after the warm-up turn that brings its first context into storage."""
    first_context_tokens: float = 2800
    append_tokens: float = 64
    generate_tokens: float = 16
    traces: tuple[Path, ...] = ()
    """WEKA sessions to replay instead of generated agents."""
    scale: float = 16
    """Token counts of traces are divided by this."""
    max_context_tokens: int = 6144
    """A trace ends before its context grows beyond this."""
    snic_bytes_per_s: int | None = 40_000_000
    cnic_bytes_per_s: int | None = 320_000_000
    repeats: int = 1
    seed: int = 0
    model: Path = Path(".models/demo")
    """A checkpoint; made if absent."""
    out: Path = Path("results")
    """``demo.json``, ``demo.png`` and the clusters' logs go here."""
    work: Path = Path(".store")
    """Stores are made, and removed again, under here: a few GB."""
    serve_command: tuple[str, ...] = (sys.executable, "-m", "dualpath", "serve")
    start_timeout_s: float = 180.0
    turn_timeout_s: float = 300.0
    command: str = "dualpath demo"
    """As typed; kept in the result file."""

    def __post_init__(self) -> None:
        for topology in self.topologies:
            try:
                Topology.parse(topology)
            except ValueError as error:
                raise ValueError(f"--topologies: {error}") from None
        for name in ("topologies", "systems"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name}: name at least one, and each once, not {','.join(given) or 'nothing'}")
        for name in ("agents", "turns", "repeats", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}")
