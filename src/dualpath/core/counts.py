"""The names of the scheduler's statistics, and the series of ``/metrics`` that each becomes."""

from dualpath.core.request import ACCEPTS, State
from dualpath.core.vocabulary import Cause
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures, Sample

_INPUTS = (*ACCEPTS, "released", "engine_lost", "engine_draining", "resubmit", "cancel")

COUNTS: dict[str, Sample] = {
    "submitted": metrics.SUBMITTED(),
    "placed": metrics.PLACED(),
    "finished": metrics.FINISHED(),
    "cancelled": metrics.CANCELLED(),
    "fetches": metrics.FETCHES(),
    "pe_read_blocks": metrics.PE_READ_BLOCKS(),
    "de_read_blocks": metrics.DE_READ_BLOCKS(),
    **{f"retried_{cause.value}": metrics.RETRIED(cause.value) for cause in Cause},
    **{f"failed_{cause.value}": metrics.FAILED(cause.value) for cause in Cause},
    **{f"dropped_{name}": metrics.DROPPED(name) for name in _INPUTS},
}
"""Every counter: counting under another name raises KeyError."""

GAUGES: dict[str, Sample] = {
    **{f"requests_{state.value}": metrics.SCHEDULED(state.value) for state in State if not state.is_terminal},
    "draining_buffer_blocks": metrics.DRAINING_BUFFER(),
    "draining_hbm_blocks": metrics.DRAINING_HBM(),
    "overdue_releases": metrics.OVERDUE_RELEASES(),
}


def figures(statistics: dict[str, int]) -> Figures:
    """Returns a scheduler's statistics as series."""
    samples = COUNTS | GAUGES
    return {samples[name]: float(value) for name, value in statistics.items()}
