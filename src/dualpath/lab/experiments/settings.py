"""What every run of an experiment shares: model, rates, places, deadlines."""

from pathlib import Path

import msgspec

from dualpath.lab.experiments.launcher import SERVE


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Raises ValueError for what can't be run, naming the option."""

    snic_bytes_per_s: int | None = 40_000_000
    """Each storage NIC's rate; None: not limited."""
    cnic_bytes_per_s: int | None = 320_000_000
    seed: int = 0
    model: Path = Path(".models/demo")
    """A checkpoint; made if absent."""
    out: Path = Path("results/experiments")
    """The result file, its figure and the clusters' logs go here."""
    work: Path = Path(".store")
    """Stores are made, and removed again, under here: a few GB."""
    serve_command: tuple[str, ...] = SERVE
    start_timeout_s: float = 180.0
    turn_timeout_s: float = 300.0
    command: str = ""
    """As typed; kept in the result file."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}")
