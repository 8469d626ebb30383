import json

import msgspec
import pytest
from result_documents import document, full, run

from dualpath.results.file import ResultFileError, decode, load, representatives


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "demo.json"
    written = decode(full())
    path.write_bytes(msgspec.json.encode(written))
    assert load(path) == written


def test_what_is_no_result_file_is_refused_by_name_and_field(tmp_path):
    path = tmp_path / "demo.json"
    with pytest.raises(ResultFileError, match=r"demo\.json can't be read: No such file"):
        load(path)
    path.write_text("{")
    with pytest.raises(ResultFileError, match="is not JSON"):
        load(path)
    broken = full()
    broken["runs"][3]["jct_s"] = "slow"
    path.write_text(json.dumps(broken))
    with pytest.raises(ResultFileError, match=r"demo\.json is not a result file: Expected `float`.*runs\[3\]\.jct_s"):
        load(path)


def test_the_run_with_the_median_time_stands_for_its_repeats():
    runs = [run("1P1D", "basic", jct_s, {"PE0": 10, "DE1": 0}, repeat=i) for i, jct_s in enumerate([9.0, 5.0, 7.0])]
    (row,) = representatives(decode(document(*runs)))
    assert (row.run.jct_s, row.run.repeat, row.repeats, row.jct_min_s, row.jct_max_s) == (7.0, 2, 3, 5.0, 9.0)


def test_a_repeat_that_lost_turns_stands_for_nothing_unless_all_did():
    lost = [run("1P1D", "basic", jct_s, {"PE0": 10}, errors=1) for jct_s in (1.0, 2.0)]
    (row,) = representatives(decode(document(*lost, run("1P1D", "basic", 9.0, {"PE0": 10}))))
    assert (row.run.jct_s, row.repeats, row.jct_min_s) == (9.0, 1, 9.0)
    (row,) = representatives(decode(document(*lost)))
    assert (row.run.jct_s, row.repeats) == (1.0, 2)


def test_rows_come_in_the_order_of_the_configuration():
    result = decode(full() | {"runs": full()["runs"][::-1]})
    assert [(row.run.topology, row.run.system) for row in representatives(result)] == [
        (topology, system) for topology in ("1P1D", "1P2D") for system in ("basic", "dualpath", "oracle")
    ]
