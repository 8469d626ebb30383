import pytest

from dualpath.lab.report.balance import max_over_avg, readers, windows_of
from dualpath.results.file import SnicSample

ENGINES = ["PE0", "PE1", "DE0", "DE10", "DE2"]


def samples(*rows):
    return [SnicSample(float(at_s), dict(received)) for at_s, received in rows]


@pytest.mark.parametrize(
    ("system", "read"),
    [
        ("basic", ["PE0", "PE1"]),
        ("basic-layerwise", ["PE0", "PE1"]),
        ("de-only", ["DE0", "DE10", "DE2"]),
        ("dualpath", ENGINES),
        ("oracle", ENGINES),
    ],
)
def test_a_system_reads_with_its_side(system, read):
    assert readers(system, ENGINES) == read


def test_bytes_between_samples_are_shared_out_evenly():
    windows = windows_of(samples((0, {"PE0": 0}), (1, {"PE0": 30}), (4, {"PE0": 90})), at_most=2)
    assert windows.width_s == 2 and windows.starts_s.tolist() == [0, 2]
    assert windows.bytes_per_s.tolist() == [[25, 20]]


def test_engines_come_prefill_first_and_in_order_of_their_numbers():
    windows = windows_of(samples((0, dict.fromkeys(ENGINES, 0)), (1, dict.fromkeys(ENGINES, 1))), at_most=5)
    assert windows.engines == ["PE0", "PE1", "DE0", "DE2", "DE10"]


def test_max_over_avg_counts_idle_engines_that_might_have_read_and_skips_idle_windows():
    rows = [(0, (0, 0)), (1, (60, 20)), (2, (60, 20)), (3, (100, 20)), (4, (100, 21))]
    taken = samples(*((at_s, {"PE0": pe, "DE0": de}) for at_s, (pe, de) in rows))
    windows = windows_of(taken, at_most=10)
    assert max_over_avg(windows, "dualpath") == [1.5, None, 2.0, None]
    assert max_over_avg(windows, "basic") == [1.0, None, 1.0, None]


@pytest.mark.parametrize("taken", [(), [(0, {"PE0": 1})], [(2, {"PE0": 1}), (2, {"PE0": 2})]])
def test_no_time_between_samples_means_no_windows(taken):
    assert windows_of(samples(*taken), at_most=3) is None
