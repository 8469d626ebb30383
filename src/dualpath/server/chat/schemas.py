"""What a schema says beyond what llguidance reads in it.

The types of a tool's parameters, where a format writes them as text, and the numbers that llguidance can't keep.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dualpath.server.chat.arguments import json_types

_MAX_DEPTH = 16
_ALL = frozenset(("string", "integer", "number", "boolean", "null", "array", "object"))


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Returns `schema` with a local ``$ref`` followed, as far as it leads to something."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            return schema
        target: Any = root
        for key in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        schema = {**target, **{k: v for k, v in schema.items() if k != "$ref"}} if isinstance(target, dict) else target
    return None


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Returns the JSON types that a value of `schema` may have; `root` is the schema that holds its definitions."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return _ALL
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind,))
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset().union(*map(json_types, values))
    for key in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(key), list):
            return frozenset().union(*(types_of(branch, root, depth + 1) for branch in branches))
    return _ALL


def value_types(parameters: Mapping[str, Any] | None) -> dict[str, frozenset[str]]:
    """Returns the types of each property of a tool's `parameters`."""
    parameters = parameters or {}
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: types_of(schema, parameters) for name, schema in properties.items()}


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_EXACT = 2**53
"""llguidance keeps numbers as floats of 64 bits, and integers of an answer in 64 bits."""
_ANNOTATIONS = frozenset(("default", "examples", "title", "description", "x-guidance"))
_NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


def inexact_number(schema: Any, place: str = "") -> str | None:
    """Returns which number of `schema` would be enforced as another one, and where it is; None: there is none."""
    if isinstance(schema, list):
        return _first(inexact_number(one, f"{place}[{i}]") for i, one in enumerate(schema))
    if not isinstance(schema, dict):
        return None
    return _lost_bound(schema, place) or _first(_inexact_member(key, schema[key], _under(place, key)) for key in schema)


def _inexact_member(key: str, value: Any, place: str) -> str | None:
    if key in _ANNOTATIONS:
        return None
    if key in _NAMED_SCHEMAS and isinstance(value, dict):
        return _first(inexact_number(one, _under(place, name)) for name, one in value.items())
    if key in ("const", "enum"):
        return _inexact_value(value, place)
    if key in _BOUNDS and isinstance(value, int | float) and not _BOUNDS[key](value):
        return f"{place} is {value}, which can't be kept exactly; numbers are exact up to 2^53"
    return inexact_number(value, place)


def _inexact_value(value: Any, place: str) -> str | None:
    match value:
        case int() if not _is_float(value):
            return f"{place} has {value}, which can't be kept exactly; integers are exact up to 2^53"
        case list():
            return _first(_inexact_value(one, place) for one in value)
        case dict():
            return _first(_inexact_value(one, place) for one in value.values())
    return None


def _lost_bound(schema: Mapping[str, Any], place: str) -> str | None:
    """llguidance forgets that a whole number is excluded where all that is allowed begins with its digits."""
    above, below = (_bound(schema, f"exclusive{end}") for end in ("Minimum", "Maximum"))
    tops = [top for key in ("maximum", "exclusiveMaximum") if (top := _bound(schema, key)) is not None]
    bottoms = [low for key in ("minimum", "exclusiveMinimum") if (low := _bound(schema, key)) is not None]
    if above is not None and above >= 0 and above == int(above) and tops and min(tops) < above + 1:
        key, value = "exclusiveMinimum", above
    elif below is not None and below <= 0 and below == int(below) and bottoms and max(bottoms) > below - 1:
        key, value = "exclusiveMaximum", below
    else:
        return None
    return f"{_under(place, key)} is {value}, and can't be excluded from a range that is shorter than 1"


def _bound(schema: Mapping[str, Any], key: str) -> float | None:
    value = schema.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_float(value: float) -> bool:
    return abs(value) < 2**1023 and float(value) == value


_BOUNDS: dict[str, Callable[[float], bool]] = {
    "minimum": lambda value: abs(value) < 2**63 and _is_float(value),
    # An integer never exceeds 64 bits, so a bound beyond them holds as it is.
    "maximum": lambda value: value >= 2**63 - 1 or (value > -(2**63) and _is_float(value)),
    "exclusiveMinimum": lambda value: abs(value) < _EXACT,
    "exclusiveMaximum": lambda value: value >= 2**63 or abs(value) < _EXACT,
    "multipleOf": lambda value: abs(value) < _EXACT,
}


def _under(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _first(found: Iterable[str | None]) -> str | None:
    return next(filter(None, found), None)
