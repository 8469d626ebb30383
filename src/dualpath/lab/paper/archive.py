"""Earlier results of `dualpath paper`: the results directory's ``paper.json``, item by item.

Running some items replaces them in the file and leaves the others, so the page can be kept up to date without an hour
of simulation. Results of other constants or of another scale are dropped, because they don't compare.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dualpath.lab.paper.items import ITEMS
from dualpath.lab.paper.rows import Row
from dualpath.lab.paper.runner import Runner
from dualpath.lab.paper.sensitivity import WhatIf
from dualpath.lab.sim.costs import Calibration

FILE_NAME = "paper.json"


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``paper.json``."""

    rows: list[Row]
    calibration: Calibration
    scale: float
    sensitivity: list[WhatIf]


class ArchiveError(ValueError):
    """The results directory's file can't be read. The message names it."""


def merged(directory: Path, rows: Sequence[Row], what_if: Sequence[WhatIf], runner: Runner) -> Archive:
    """Returns the directory's archive with the items of `rows` and `what_if` replaced. Raises ArchiveError."""
    known = _read(directory / FILE_NAME)
    if known is None or (known.calibration, known.scale) != (runner.calibration, runner.scale):
        known = Archive(rows=[], calibration=runner.calibration, scale=runner.scale, sensitivity=[])
    fresh = {row.item for row in rows}
    order = {item: position for position, item in enumerate(ITEMS)}
    kept = [row for row in known.rows if row.item not in fresh and row.item in order]
    return msgspec.structs.replace(
        known,
        rows=sorted([*kept, *rows], key=lambda row: order[row.item]),
        sensitivity=list(what_if) or known.sensitivity,
    )


def _read(path: Path) -> Archive | None:
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Archive)
    except (OSError, msgspec.DecodeError) as error:
        raise ArchiveError(f"{path}: can't be read as earlier results: {error}; move it away to start anew") from error
