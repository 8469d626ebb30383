"""What a system is in a comparison, by its facts; one that another package adds stands everywhere by itself."""

import pytest

from dualpath.core.policy import Policy
from dualpath.core.systems import SYSTEMS, System
from dualpath.results.roles import contenders, foremost, is_oracle, oracle_among, readers, reading_nics

ENGINES = ["PE0", "PE1", "DE0", "DE10", "DE2"]


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


def test_the_nics_of_a_system_are_its_sides():
    assert [reading_nics(system, "2P3D") for system in ("basic", "de-only", "dualpath", "oracle")] == [2, 3, 5, 5]


def test_contenders_are_neither_the_baseline_nor_free_of_io():
    assert contenders(["basic", "oracle", "dualpath-rr", "unheard-of"]) == ["dualpath-rr", "unheard-of"]
    assert oracle_among(["basic", "dualpath"]) is None and oracle_among(["basic", "oracle"]) == "oracle"


@pytest.mark.parametrize(
    ("systems", "expected"),
    [
        (["dualpath", "dualpath-rr", "unheard-of"], "dualpath"),
        (["basic", "dualpath-rr", "basic-layerwise"], "dualpath-rr"),
        (["basic", "b", "a"], "a"),
        (["basic", "oracle"], None),
    ],
)
def test_the_foremost_is_the_headline_or_the_last_of_ours_or_any(systems, expected):
    assert foremost(systems) == expected


def test_another_packages_free_io_is_an_oracle(monkeypatch):
    assert not is_oracle("their-bound")
    bound = System(name="their-bound", summary="", policy=Policy(free_io=True))
    monkeypatch.setitem(SYSTEMS._known, "their-bound", bound)
    assert is_oracle("their-bound") and oracle_among(["basic", "their-bound"]) == "their-bound"
    assert contenders(["basic", "their-bound"]) == []
