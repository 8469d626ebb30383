"""What routers before several clusters read of one, in vLLM's names: how much waits, how much runs, how full it is."""

from collections.abc import Iterable, Mapping

from dualpath.core.ledger import Holding
from dualpath.core.request import State
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

_WAITING = (State.QUEUED, State.ALLOCATING, State.RETRYING)
"""States in which a request does not progress. The other live ones are running."""


def router_figures(
    model: str,
    dtype: str,
    prefix_cache: bool,
    statistics: Mapping[str, int],
    holdings: Iterable[Holding],
    hbm_blocks: Mapping[EngineId, int],
) -> Figures:
    """Returns the series. `hbm_blocks` is each decode engine's KV memory, `statistics` the scheduler's."""
    labels = (model, metrics.ONLY_ENGINE)
    total_blocks = sum(hbm_blocks.values())
    promised = sum(holding.hbm_blocks for holding in holdings if holding.engine in hbm_blocks)
    usage = promised / total_blocks if total_blocks else 1.0
    live = {state: statistics[f"requests_{state.value}"] for state in State if not state.is_terminal}
    waiting = sum(live[state] for state in _WAITING)
    config = (metrics.ONLY_ENGINE, str(BLOCK_TOKENS), str(total_blocks), dtype, str(prefix_cache))
    return {
        metrics.RUNNING(*labels): float(sum(live.values()) - waiting),
        metrics.WAITING(*labels): float(waiting),
        metrics.KV_USAGE(*labels): usage,
        metrics.OLD_KV_USAGE(*labels): usage,
        metrics.CACHE_CONFIG(*config): 1.0,
    }
