"""The result file of a demo, an experiment, a replay or a simulation: its records, writing and reading.

Times are in seconds, rates in bytes per second. A prediction (`dualpath simulate --like`) is a result file too, with
the runs of the measurement in their order. Files of earlier versions lack newer fields, which then take their defaults.
"""

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import msgspec

from dualpath.results.online import Capacity, Slo, Window
from dualpath.results.turns import Part, Percentiles, TurnFailure, TurnResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.spec.topology import Rates
from dualpath.spec.whole_file import write_whole
from dualpath.traces.trajectory import Trajectory


class ResultFileError(ValueError):
    """A result file can't be read. The message names the file and the field."""


class SnicSample(msgspec.Struct, frozen=True):
    """Bytes each engine's SNIC had received from storage `at_s` after the run's start."""

    at_s: float
    received_bytes: dict[str, int]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One replay of the workload on one cluster."""

    parameters: dict[str, float | str] = {}
    """What this run varies besides topology and system, such as ``{"agents": 16, "append_scale": 2}``."""
    trajectories: str = ""
    """Key of the agents in `ResultFile.trajectories`; empty if the file does not keep them."""
    first_round: int = 0
    """Round of every trajectory with which the measured part begins: 1 after a warm-up."""
    agents_per_s: float | None = None
    """Rate of Poisson arrivals; None: all agents start at once."""
    cluster: ClusterSetup | None = None
    turn_results: list[TurnResult] = []
    failures: list[TurnFailure] = []
    snic_samples: list[SnicSample] = []
    gap_scale: float = 1.0
    """Factor on the trajectories' pauses."""
    context: Literal["own", "filled"] = "own"
    """What stood for generated tokens in later prompts: ``own`` tokens, or ids chosen by the replay (``filled``)."""
    parts: list[Part] = []
    """Parts of a replay; with more than one it was resumed, and `jct_s` is not comparable."""
    windows: list[Window] = []
    """Windows of a replay with arrivals."""
    verdict: str = ""
    """Verdict of a replay with arrivals: ``steady`` or ``duration`` (the SLO holds), ``ttft``, ``tpot``, ``errors``."""
    start_pacing: Percentiles | None = None
    """How much later than due the client sent first turns."""
    pacing: Percentiles | None = None
    """How much later than due the client sent later turns."""

    topology: str
    """Prefill and decode nodes, such as ``1P2D``; ``served`` for a replay whose server does not say."""
    system: str
    repeat: int = 0
    jct_s: float
    """Job completion time: from the start of all agents until all have ended."""
    ratio_to_basic: float | None = None
    """Basic's median JCT on this topology over this JCT; None if either lost turns or basic was not run."""
    ideal_ratio: float | None = None
    """min((P + D) / P, basic's JCT over oracle's): the most that pooling every storage NIC could give."""
    ratio_to_ideal: float | None = None
    """`ratio_to_basic` over `ideal_ratio`; None for the baseline and for oracles, which have no ideal."""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    ttst_p50_s: float | None
    ttst_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    hit_rate: float
    """Prompt tokens loaded from storage over all prompt tokens."""
    snic_max_over_avg: float | None
    """Busiest SNIC's bytes over the average, of the engines that the system may read with; None if nothing was read."""
    snic_bytes: dict[str, int]
    """Bytes each engine's SNIC received from storage, by engine name (``PE0``, ``DE1``; ranks within a role)."""
    turns: int
    """Number of answered turns."""
    retries: int = 0
    errors: int
    """Number of failed turns; above 0, `jct_s` is not comparable."""
    error_messages: list[str] = []
    same_tokens_as_basic: float | None = None
    """Share of turns whose generated tokens equal those of basic's first run on this topology."""

    @property
    def ideal_s(self) -> float | None:
        """The JCT that `ideal_ratio` stands for; None if the run is compared with nothing."""
        return self.jct_s * self.ratio_to_basic / self.ideal_ratio if self.ratio_to_basic and self.ideal_ratio else None

    @property
    def mean_ttft_s(self) -> float | None:
        """Mean time to first token; None if the file does not keep the run's turns."""
        return fmean(turn.ttft_s for turn in self.turn_results) if self.turn_results else None


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """What was the same in every run."""

    model: str
    topologies: list[str]
    systems: list[str]
    snic_bytes_per_s: Rates
    """Each storage NIC's rate, enforced on real bytes; or each group's of the topology. None: not limited. Oracle runs
    have no limit."""
    cnic_bytes_per_s: Rates
    repeats: int
    seed: int
    machine: str

    @property
    def snic_rate(self) -> int | None:
        """The one rate of all storage NICs; None: not limited, or they differ."""
        return self.snic_bytes_per_s if isinstance(self.snic_bytes_per_s, int) else None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What the agents asked; lengths in tokens. Counts exclude the warm-up."""

    source: str
    agents: int
    turns: int
    prompt_tokens: int
    append_tokens: int
    generate_tokens: int
    max_context_tokens: int
    warm_up: str


class ResultFile(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one invocation, in the order they were made."""

    kind: Literal["demo", "experiment", "replay", "prediction"] = "demo"
    name: str = "demo"
    trajectories: dict[str, list[Trajectory]] = {}
    runs: list[Run]
    configuration: Configuration
    command: str
    workload: Workload
    slo: Slo | None = None
    """The SLO of a replay with arrivals."""
    capacity: Capacity | None = None
    """The result of a search for the most agents per second."""


def decode(document: dict[str, Any], name: str = "result") -> ResultFile:
    """Checks and types a decoded document. Raises ResultFileError naming `name` and the field."""
    try:
        return msgspec.convert(document, ResultFile)
    except msgspec.ValidationError as error:
        raise ResultFileError(f"{name} is not a result file: {error}") from error


def load_results(path: Path | str) -> ResultFile:
    """Reads a result file. Raises ResultFileError."""
    try:
        document = msgspec.json.decode(Path(path).read_bytes())
    except OSError as error:
        raise ResultFileError(f"{path} can't be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ResultFileError(f"{path} is not JSON: {error}") from error
    return decode(document, str(path))


def write_results(result: ResultFile, path: Path) -> None:
    """Writes a result file, completely or not at all. Raises OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
