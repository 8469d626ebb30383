"""A row of the comparison: one figure of the paper beside ours."""

from typing import Literal

import msgspec

Kind = Literal["fitted", "predicted"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `kind` says whether the figure was used to fit a constant of the simulator."""

    item: str
    """The command line's name of the group of rows."""
    what: str
    theirs: float
    ours: float
    error: float
    """Ours over theirs, less one."""
    kind: Kind = "predicted"
    note: str = ""


def row(item: str, what: str, theirs: float, ours: float, kind: Kind = "predicted", note: str = "") -> Row:
    """Makes a row with its error. Raises ValueError if theirs is zero, because the error is a ratio."""
    if theirs == 0:
        raise ValueError(f"{item}, {what}: a figure of zero can't be compared by ratio")
    return Row(item=item, what=what, theirs=theirs, ours=ours, error=ours / theirs - 1, kind=kind, note=note)
