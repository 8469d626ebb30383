import msgspec
import pytest
from result_records import run, turn

from dualpath.lab.report.balance import attention_balance, balance_of, snic_balance, snic_windows
from dualpath.results import SnicSample

ENGINES = ["PE0", "PE1", "DE0", "DE10", "DE2"]


def samples(*rows):
    return [SnicSample(float(at_s), dict(received)) for at_s, received in rows]


def test_bytes_between_samples_are_shared_out_evenly():
    windows = snic_windows(samples((0, {"PE0": 0}), (1, {"PE0": 30}), (4, {"PE0": 90})), 1.0, at_most=2)
    assert windows.width_s == 2 and windows.ends_s == [2, 4]
    assert windows.work.tolist() == [[50, 40]]


def test_windows_are_as_wide_as_asked_or_as_the_run_is_long():
    taken = samples((1, {"PE0": 10}), (5, {"PE0": 50}))
    assert snic_windows(taken, 2.0).ends_s == [2, 4]
    assert snic_windows(taken, 9.0).ends_s == [5]


def test_engines_come_prefill_first_and_in_order_of_their_numbers():
    windows = snic_windows(samples((0, dict.fromkeys(ENGINES, 0)), (1, dict.fromkeys(ENGINES, 1))), 1.0)
    assert windows.engines == ["PE0", "PE1", "DE0", "DE2", "DE10"]


def test_max_over_avg_counts_idle_engines_that_might_have_read_and_skips_idle_windows():
    rows = [(0, (0, 0)), (1, (60, 20)), (2, (60, 20)), (3, (100, 20)), (4, (100, 21))]
    taken = samples(*((at_s, {"PE0": pe, "DE0": de}) for at_s, (pe, de) in rows))
    both = snic_windows(taken, 1.0)
    assert balance_of(both).max_over_avg == [1.5, None, 2.0, None]
    assert balance_of(both.of(["PE0"])).max_over_avg == [1.0, None, 1.0, None]
    received = {"snic_samples": taken, "snic_bytes": taken[-1].received_bytes}
    assert snic_balance(run("dualpath", **received), 1.0).max_over_avg == [1.5, None, 2.0, None]
    assert snic_balance(run("basic", **received), 1.0).max_over_avg == [1.0, None, 1.0, None]


@pytest.mark.parametrize("taken", [(), [(0, {"PE0": 1})], [(2, {"PE0": 1}), (2, {"PE0": 2})]])
def test_no_time_between_samples_means_no_windows(taken):
    assert snic_windows(samples(*taken), 1.0) is None


def test_snic_balance_is_window_by_window_where_totals_are_even():
    """Two NICs take turns at being idle: even in total, as uneven as can be at any time."""
    taken = [
        SnicSample(2.0, {"PE0": 100, "DE0": 0}),
        SnicSample(4.0, {"PE0": 100, "DE0": 100}),
        SnicSample(6.0, {"PE0": 150, "DE0": 150}),
        SnicSample(8.0, {"PE0": 151, "DE0": 150}),
    ]
    balance = snic_balance(run("dualpath", snic_samples=taken), 2.0)
    assert balance.max_over_avg == [2.0, 2.0, 1.0, None]  # the last window has next to nothing
    assert balance.overall == pytest.approx((100 + 100 + 50) / (50 + 50 + 50))
    assert snic_balance(run("basic", snic_samples=taken), 2.0).overall == 1.0  # one side reads
    assert snic_balance(run("dualpath", snic_samples=taken[:1]), 2.0) is None


def test_attention_counts_new_tokens_times_what_they_attend_to():
    shared = {"prompt_tokens": 200, "loaded_tokens": 100, "prefill_s": 2.0, "ttft_s": 2.0}
    turns = [turn(0, prefill_engine="PE0", **shared), turn(1, prefill_engine="PE1", **shared)]
    even = run("dualpath", topology="2P1D", turn_results=turns)
    assert attention_balance(even, 2.0).max_over_avg == [1.0]
    # 100 new tokens after 700 are 100 × 750 pairs, five times 100 × 150.
    longer = turn(1, prefill_engine="PE1", **(shared | {"prompt_tokens": 800, "loaded_tokens": 700}))
    uneven = run("dualpath", topology="2P1D", turn_results=[turns[0], longer])
    assert attention_balance(uneven, 2.0).max_over_avg == [pytest.approx(2 * 5 / 6)]
    assert attention_balance(run("dualpath"), 2.0) is None  # one PE
    untold = [msgspec.structs.replace(one, timings=None) for one in turns]
    assert attention_balance(run("dualpath", topology="2P1D", turn_results=untold), 2.0) is None
