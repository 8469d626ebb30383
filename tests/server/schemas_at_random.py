"""Random schemas of functions' parameters: nested, with enumerations, limits, definitions and unions."""

import random
from typing import Any

_SCALARS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 5},
    {"type": "integer"},
    {"type": "integer", "minimum": -3, "maximum": 400},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "dark blue", "é"]},
    {"enum": [1, "one", None]},
    {"const": "x"},
    {"type": ["integer", "null"]},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"anyOf": [{"type": "boolean"}, {"type": "integer"}]},
    {"type": "string", "pattern": "^[a-z]{2,4}$"},
    {"$ref": "#/$defs/point"},
]
_DEFINITIONS = {
    "point": {
        "type": "object",
        "properties": {"x": {"type": "number"}, "y": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
}


def random_parameters(drawn: random.Random) -> dict[str, Any]:
    return {**_object(drawn, 0), "$defs": _DEFINITIONS}


def _object(drawn: random.Random, depth: int) -> dict[str, Any]:
    names = drawn.sample(["path", "a", "b_2", "with space", "ü", "old-name"], drawn.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _value(drawn, depth + 1) for name in names},
        "required": [name for name in names if drawn.random() < 0.6],
        "additionalProperties": False,
    }


def _value(drawn: random.Random, depth: int) -> dict[str, Any]:
    kind = drawn.random()
    if depth < 3 and kind < 0.15:
        return _object(drawn, depth)
    if depth < 3 and kind < 0.3:
        return {"type": "array", "items": _value(drawn, depth + 1), "maxItems": 3}
    return drawn.choice(_SCALARS)
