"""What /health and /metrics say of the store: what the coordinator finds, and what engines tell with heartbeats."""

import math
import time
from collections.abc import Iterable, Mapping

from dualpath.cluster.store_standing import READ_ONLY, SLOW, TROUBLES, UNREACHABLE
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

_REASONS = {
    UNREACHABLE: "reads fail, and prompts are computed",
    SLOW: "calls miss their deadline (--store-timeout), and prompts are computed",
    READ_ONLY: "writing or deleting is refused, and new blocks may not be kept",
}


class StoreHealth:
    """The state at one moment. `seen` are the troubles that each observer finds, by its name, in seconds."""

    def __init__(self, seen: Mapping[str, Mapping[str, float]]) -> None:
        self._seen = seen
        self._longest_s = {
            trouble: max((troubles_s.get(trouble, 0.0) for troubles_s in seen.values()), default=0.0)
            for trouble in TROUBLES
        }

    @classmethod
    def of(cls, own: Mapping[str, float], engines: Iterable[tuple[str, Figures]]) -> "StoreHealth":
        """`own` is what the coordinator finds; `engines` are their names and the gauges that they have sent."""
        seen = {"coordinator": own}
        for name, gauges in engines:
            told = {trouble: gauges.get(metrics.BLOCK_IO_TROUBLE(trouble), 0.0) for trouble in TROUBLES}
            seen[name] = {trouble: seconds for trouble, seconds in told.items() if 0 < seconds < math.inf}
        return cls(seen)

    @property
    def ok(self) -> bool:
        return not any(self._longest_s.values())

    def facts(self) -> dict[str, object]:
        """Returns ``{"status": "ok"}``, or the worst trouble, since when (Unix time), and who finds what."""
        trouble = next((trouble for trouble in TROUBLES if self._longest_s[trouble]), None)
        if trouble is None:
            return {"status": "ok"}
        finders = [name for name, troubles_s in self._seen.items() if troubles_s.get(trouble)]
        reason = f"{', '.join(finders)}: {_REASONS[trouble]}; the log says why"
        return {"status": trouble, "since": round(time.time() - self._longest_s[trouble]), "reason": reason}

    def gauges(self) -> Figures:
        return {metrics.STORE_TROUBLE(trouble): seconds for trouble, seconds in self._longest_s.items()}
