"""Systems: the policies that commands, charts and reports know by name. To add one, add an entry here.

Another package adds one through the entry-point group ``dualpath.policies``; ``--system module:ATTRIBUTE`` names one
without an entry point. `system_or_unknown` stands in for a name in results whose package is not installed.
"""

import msgspec

from dualpath.core.policy import Policy
from dualpath.spec.registry import Registry, UnknownNameError


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A policy with a name. Colours are of the Okabe-Ito palette, distinct also for the colour-blind."""

    name: str
    summary: str
    """One line for ``dualpath serve --help``."""
    policy: Policy
    colour: str = "#D55E00"


BASELINE = "basic"
"""The system that others are compared with: ratios are this system's time over theirs."""
HEADLINE = "dualpath"
"""The system that charts and tables highlight."""

_OURS = (
    System(
        name="basic",
        summary="only prefill engines read, whole prompts at a time (the paper's baseline)",
        policy=Policy(placement="round_robin", read_path="pe_only", layerwise=False),
        colour="#8C8C8C",
    ),
    System(
        name="basic-layerwise",
        summary="the same, layer by layer",
        policy=Policy(placement="round_robin", read_path="pe_only"),
        colour="#CC79A7",
    ),
    System(
        name="dualpath-rr",
        summary="both sides read, in turns",
        policy=Policy(placement="round_robin", read_path="alternate"),
        colour="#E69F00",
    ),
    System(name="dualpath", summary="both sides read, the shorter queue first", policy=Policy(), colour="#0072B2"),
    System(
        name="dualpath-split",
        summary="both sides may read parts of one request",
        policy=Policy(read_path="split"),
        colour="#56B4E9",
    ),
    System(name="de-only", summary="only decode engines read", policy=Policy(read_path="de_only"), colour="#F0E442"),
    System(
        name="oracle",
        summary="storage and transfers cost nothing: an upper bound",
        policy=Policy(free_io=True),
        colour="#009E73",
    ),
)
SYSTEMS: Registry[System] = Registry("system", "dualpath.policies", known={one.name: one for one in _OURS})
"""The paper's Basic, its ablation steps, DualPath and Oracle; `dualpath-split` and `de-only` are ours."""


def find_system(name: str) -> System:
    """Raises UnknownNameError when no system has the name, or when what it names is not a `System`."""
    found = SYSTEMS.get(name)
    if not isinstance(found, System):
        raise UnknownNameError(f"system {name!r} is {found!r}, which is not a dualpath.System; name one that is")
    return found


def system_or_unknown(name: str) -> System:
    """For results. Returns a placeholder with the default policy and colour when the system is not installed."""
    try:
        return find_system(name)
    except UnknownNameError:
        return System(name=name, summary="not installed here", policy=Policy())
