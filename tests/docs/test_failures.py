"""Every row of docs/failures.md says who notices, what follows, which metric counts it and which test shows it."""

import re

import pytest
from documents import GUIDES, SERIES, SYMBOL, TEST

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GUIDES["docs/failures.md"].splitlines()
    if line.startswith("| ") and not line.startswith("| what |")
]


def test_there_are_rows() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_says_who_what_and_where(row: list[str]) -> None:
    _, noticed, follows, seen, counted, shown = row
    unnamed = ("as above", "nobody")
    assert SYMBOL.search(noticed) or noticed.startswith(unnamed), f"who notices? {noticed}"
    assert SYMBOL.search(follows), f"what follows, and where? {follows}"
    assert seen
    assert SERIES.search(counted) or counted.startswith(("none", "as ")), f"which metric? {counted}"
    assert TEST.search(shown), f"which test? {shown}"
    assert "`" not in re.sub(f"{TEST.pattern}|, ", "", shown), f"not a test's name: {shown}"
