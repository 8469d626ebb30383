"""What a chart is: a figure for plotly.js without its colours of ink and paper, and the same figures as a table.

The page's script adds what depends on the theme; the table is for readers of screens, paper and precise values.
"""

from typing import Any

import msgspec

Value = str | float | int | None


class Variant(msgspec.Struct, frozen=True):
    """A chart under one of its section's options."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    columns: list[str]
    rows: list[list[Value]]


class Chart(msgspec.Struct, frozen=True):
    """One figure, with a variant for each option of its section; None where it has nothing to show."""

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
    """What the options are, such as "setting"."""
    options: list[str]
    charts: list[Chart]

    @property
    def used(self) -> bool:
        return any(variant is not None for chart in self.charts for variant in chart.variants)


def axis(title: str, **other: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True} | other


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
