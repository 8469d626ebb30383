"""The scheduler's statistics as series."""

import pytest

from dualpath.core.counts import COUNTS, GAUGES, figures


def test_statistics_become_the_series_of_their_names() -> None:
    assert figures({"finished": 3, "overdue_releases": 0}) == {COUNTS["finished"]: 3.0, GAUGES["overdue_releases"]: 0.0}
    with pytest.raises(KeyError):
        figures({"nobody_counts_this": 1})
