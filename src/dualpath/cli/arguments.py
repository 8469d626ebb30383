"""Argument types, and how a command is added. A bad value ends with one line and exit code 2.

This module imports nothing heavy, because ``--help`` must be quick.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from dualpath.cluster.control_address import address_to_join, address_to_listen
from dualpath.core.systems import HEADLINE, SYSTEMS, System, find_system
from dualpath.spec.topology import Topology
from dualpath.spec.units import parse_bytes, parse_duration_ns, parse_rate, parse_rates
from dualpath.traces.formats import SOURCES_HELP as SOURCES_HELP

Value = TypeVar("Value")
PRESETS = sorted(path.stem for path in (Path(__file__).parents[1] / "lab" / "facts" / "presets").glob("*.toml"))
CLUSTER_HELP = f"CLUSTER is a TOML file, or a preset:\n  {', '.join(PRESETS)}"


class Parser(argparse.ArgumentParser):
    """A command's parser. What it does not know it refuses itself, with its own usage and the options that are near."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        mistyped = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
        if mistyped is not None:
            self.error(f"there is no option {mistyped}{did_you_mean(mistyped, self._option_string_actions)}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about a name that is not known; empty when none is near."""
    near = get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def systems_help() -> str:
    """Returns a line for every system."""
    return "\n".join(["systems:", *(f"  {name:<16}  {_summary(name)}" for name in SYSTEMS.names())])


def _summary(name: str) -> str:
    try:
        found: System = find_system(name)
    except ValueError as error:
        return str(error)
    return found.summary


def add_system(parser: Any) -> None:
    parser.add_argument("--system", type=system, metavar="NAME", default=HEADLINE, help="(default: %(default)s)")


def add_source(parser: Any) -> None:
    """Adds the options that say whose agents a cluster is planned or simulated for."""
    parser.add_argument("--trace", nargs="+", default=["64K"], metavar="TRACE", help=f"{SOURCES_HELP} (default: 64K)")
    parser.add_argument("--model", metavar="MODEL", help="replaces the cluster's: a name, or a config.json")
    parser.add_argument("--max-context", type=positive, metavar="N", help="end recorded agents at N tokens")


def add_profile(parser: Any) -> None:
    """Adds the option for measured step times of the cluster's engines."""
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="measured step times and rates (dualpath profile, or by hand)"
    )


def command(
    commands: Any, name: str, summary: str, epilog: str, run: Callable[[argparse.Namespace], int] | None = None
) -> Any:
    """Adds command `name` to a parser's `commands`; `run` executes it and returns the exit code."""
    parser = parser_of(
        commands.add_parser, name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def parser_of(make: Callable[..., Any], *names: str, **texts: Any) -> Any:
    return make(*names, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)


def _argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Wraps `parse` so that argparse shows its ValueError's message unchanged."""

    def checked(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _whole(least: int, most: int | None, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {what}") from None
        if value < least or (most is not None and value > most):
            raise ValueError(f"{text} is not {what}")
        return value

    return _argument(parse)


def _parse_positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def _parse_weights(text: str) -> tuple[int, int]:
    high, _, low = text.partition(":")
    if re.fullmatch(r"[0-9]{1,6}:[0-9]{1,6}", text) is None or not int(high) >= int(low) >= 1:
        raise ValueError(
            f"{text[:40]!r} are not two whole numbers below a million, the higher one first; give them like 99:1"
        )
    return int(high), int(low)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _parse_systems(text: str) -> tuple[str, ...]:
    return tuple(_parse_system(name) for name in _parse_names(text))


def _parse_system(text: str) -> str:
    find_system(text)
    return text


rate = _argument(parse_rate)
rates = _argument(parse_rates)
byte_count = _argument(parse_bytes)
duration_ns = _argument(parse_duration_ns)
positive = _whole(1, None, "a whole number from 1 up")
not_negative = _whole(0, None, "a whole number from 0 up")
port = _whole(0, 65535, "a port, 0 to 65535")
listen_address = _argument(address_to_listen)
join_address = _argument(address_to_join)
positive_number = _argument(_parse_positive_number)
system = _argument(_parse_system)
weights = _argument(_parse_weights)
"""Parses the shares of two traffic classes, HIGH:LOW."""
topology = _argument(Topology.parse)
topologies = _argument(lambda text: tuple(str(Topology.parse(name)) for name in _parse_names(text)))
milliseconds = _argument(lambda text: round(_parse_positive_number(text) * 1_000_000))
"""Parses a duration to nanoseconds."""
systems = _argument(_parse_systems)
