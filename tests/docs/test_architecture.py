"""What docs/architecture.md draws is what the code does."""

from pathlib import Path

from dualpath.core.request import render_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_the_request_states_are_those_of_the_table() -> None:
    text = DOCUMENT.read_text()
    drawn = text.partition("<!-- request-states -->\n")[2].partition("\n<!-- /request-states -->")[0]
    assert drawn == render_table()
