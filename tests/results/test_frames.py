"""Data frames, with a stand-in for pandas that keeps the rows it is given."""

import sys
import types

import pytest
from result_records import result, run, turn

from dualpath.results import to_dataframe


@pytest.fixture
def pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))


def found():
    runs = [run("basic", parameters={"agents": 2.0}), run("dualpath", 5.0, turn_results=[turn(3)], agents_per_s=0.5)]
    return result(*runs)


def test_a_run_is_a_row_without_what_is_nested(pandas):
    basic, dualpath = to_dataframe(found())
    assert (basic["system"], basic["jct_s"], basic["agents"], basic["snic_bytes.PE0"]) == ("basic", 10.0, 2.0, 10**8)
    assert dualpath["agents_per_s"] == 0.5
    assert not [name for name, value in (basic | dualpath).items() if isinstance(value, list | dict)]


def test_a_turn_is_a_row_with_its_run_and_its_stages(pandas):
    rows = to_dataframe(found(), "turns")
    assert len(rows) == 9 and {row["system"] for row in rows[:8]} == {"basic"}
    assert (rows[8]["trajectory"], rows[8]["ttft_s"], rows[8]["timings.read_s"]) == ("agent-0003", 1.0, 0.5)
    assert "timings" not in rows[8] and rows[8]["topology"] == "1P1D"


def test_without_pandas_a_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_dataframe needs pandas.*pip install pandas"):
        to_dataframe(found())


def test_other_rows_are_refused(pandas):
    with pytest.raises(ValueError, match="'runs' or 'turns', not 'agents'"):
        to_dataframe(found(), "agents")
