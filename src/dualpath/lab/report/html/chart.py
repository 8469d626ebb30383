"""A chart: a figure for plotly.js without theme colours, and the same values as a table.

The page's script adds what depends on the theme; the table is for screen readers, paper and precise values.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

Value = str | float | int | None


class Variant(msgspec.Struct, frozen=True):
    """The chart under one of its section's options."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    columns: list[str]
    rows: list[list[Value]]


class Chart(msgspec.Struct, frozen=True):
    """One figure, with a variant for each option of its section; None if it has nothing to show."""

    id: str
    title: str
    note: str
    variants: list[Variant | None]


class Section(msgspec.Struct, frozen=True):
    """Charts that change together when another option is chosen."""

    id: str
    title: str
    text: str
    choice: str
    """Kind of the options, such as "setting"."""
    options: list[str]
    charts: list[Chart]

    @property
    def used(self) -> bool:
        return any(variant is not None for chart in self.charts for variant in chart.variants)


def axis(title: str, **other: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True} | other


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def line(
    name: str, colour: str, x: Sequence[Value], y: Sequence[float | None], hover: str, **more: Any
) -> dict[str, Any]:
    """Makes a line's trace; `hover` is its hover text after the name. `more` goes into its ``line``."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": [rounded(value) for value in y],
        "line": {"color": colour, "width": 2} | more,
        "hovertemplate": f"<b>{name}</b> {hover}<extra></extra>",
    }
