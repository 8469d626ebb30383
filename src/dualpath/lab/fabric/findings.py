"""What a check says: places where a fabric differs from what was meant, and what follows from it."""

import msgspec

Weights = tuple[int, int]
"""HIGH's and LOW's."""


class FabricError(Exception):
    """A fabric can't be rendered for or read back. The message says what was wrong, and what to do."""


class Difference(msgspec.Struct, frozen=True):
    """One thing that is not as meant, at one place or at many alike."""

    places: tuple[str, ...]
    what: str
    meant: str
    found: str
    follows: str
    """The consequence for KV and for the model's messages."""


class CheckReport(msgspec.Struct, frozen=True):
    """The outcome of a check."""

    fabric: str
    places: tuple[str, ...]
    """Ports or devices that were read."""
    compared: int
    """Values that were compared."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    """What could not be read here, or can't be had, and why that is no difference."""

    @property
    def is_as_meant(self) -> bool:
        return not self.differences


class Comparison:
    """Collects differences. Those that are alike at several places become one."""

    def __init__(self) -> None:
        self.compared = 0
        self._places: dict[tuple[str, str, str, str], list[str]] = {}

    def compare(self, place: str, what: str, meant: object, found: object, follows: str) -> None:
        """Notes a difference, with its consequence, unless `found` equals `meant`."""
        self.compared += 1
        if meant != found:
            self._places.setdefault((what, str(meant), str(found), follows), []).append(place)

    def differences(self) -> tuple[Difference, ...]:
        return tuple(Difference(tuple(dict.fromkeys(places)), *rest) for rest, places in self._places.items())


def lines(report: CheckReport) -> list[str]:
    """Renders a report for people: a paragraph per difference, then the sum."""
    shown = []
    for one in report.differences:
        more = f" and {len(one.places) - 4} more" if len(one.places) > 4 else ""
        everywhere = len(one.places) > 1 and set(one.places) == set(report.places)
        where = f"all {len(one.places)} places" if everywhere else ", ".join(one.places[:4]) + more
        shown += [
            f"{where}: {one.what}",
            f"    meant    {one.meant}",
            f"    found    {one.found}",
            f"    so       {one.follows}",
        ]
    shown += [f"note: {note}" for note in report.notes]
    count = len(report.differences)
    verdict = f"{count or 'no'} difference{'s' if count > 1 else ''}"
    places = report.places[0] if len(report.places) == 1 else f"{len(report.places)} places"
    return [*shown, f"{report.fabric}: {verdict}; {report.compared} values compared at {places}"]


def kv_is_left(share: float, meant: float) -> str:
    """Says what part of a link that model messages fill is left for KV; both are parts of one."""
    if share == 0:
        return "KV gets nothing while model messages fill the link"
    if abs(share - meant) <= meant / 100:
        return f"KV still has {meant:.2%} of a link that model messages fill: no effect on the shares"
    return f"KV has {share:.2%} of a link that model messages fill, instead of {meant:.2%}"


def not_kept(weights: Weights, share: float) -> tuple[str, ...]:
    """Says that KV comes out with `share` of a full link, where that is not within 5 % of what `weights` ask for."""
    asked = weights[1] / sum(weights)
    if abs(share - asked) <= asked / 20:
        return ()
    shown = ":".join(map(str, weights))
    return (f"{shown} can't be kept here: KV has {share:.2%} of a link that model messages fill, not {asked:.2%}",)
