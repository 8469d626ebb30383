import json

import pytest
from result_documents import full

from dualpath.results import ResultFileError, load_results
from dualpath.results.file import decode, write_results


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "demo.json"
    written = decode(full())
    write_results(written, path)
    assert [one.name for one in tmp_path.iterdir()] == ["demo.json"]
    assert load_results(path) == written


def test_what_is_no_result_file_is_refused_by_name_and_field(tmp_path):
    path = tmp_path / "demo.json"
    with pytest.raises(ResultFileError, match=r"demo\.json can't be read: No such file"):
        load_results(path)
    path.write_text("{")
    with pytest.raises(ResultFileError, match="is not JSON"):
        load_results(path)
    broken = full()
    broken["runs"][3]["jct_s"] = "slow"
    path.write_text(json.dumps(broken))
    with pytest.raises(ResultFileError, match=r"demo\.json is not a result file: Expected `float`.*runs\[3\]\.jct_s"):
        load_results(path)


def test_a_file_of_before_turns_and_samples_were_kept_is_read_with_defaults(tmp_path):
    """What the first version wrote: no kind, no name, no turns."""
    path = tmp_path / "old.json"
    path.write_text(json.dumps(full()))
    result = load_results(str(path))
    assert (result.kind, result.name, len(result.runs)) == ("demo", "demo", 6)
    assert (result.runs[0].turn_results, result.runs[0].mean_ttft_s) == ([], None)


def test_fields_of_other_versions_are_passed_over(tmp_path):
    path = tmp_path / "new.json"
    path.write_text(json.dumps(full() | {"calibration": {"kind": "new"}}))
    assert load_results(path) == decode(full())
