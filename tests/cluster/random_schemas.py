"""Random JSON schemas whose texts are short, from a seed: what structured outputs are asked for, nested and mixed."""

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "id", "naïve", "x y", "kind", "0", "value", "$ref")
PATTERNS = ("^[a-f]{2,5}$", "^(yes|no)$", "^[A-Z][a-z]{0,4}$", "^\\d{4}-\\d{2}$", "^x*y$")
FORMATS = ("date", "uuid", "ipv4")
CONSTANTS: tuple[Any, ...] = (None, True, 0, -12, 3.5, "text", '€ "quoted" \\ \n', [1, "b"], {"k": None})


def random_schema(seed: int) -> Schema:
    """Returns a schema that some text matches; one in three has definitions that refer to themselves."""
    rng = random.Random(seed)
    if rng.random() < 0.67:
        return rng.choice([_object, _object, _array, _union])(rng, 2)
    after = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"next": after, "value": _any(rng, 1)}}
    node |= {"required": ["next"], "additionalProperties": False}
    return {
        "$defs": {"node": node},
        "type": "array",
        "items": {"$ref": "#/$defs/node"},
        "maxItems": rng.randrange(1, 3),
    }


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = [_string, _integer, _number, _constant, _plain]
    return rng.choice(leaves if depth == 0 else [*leaves, _object, _object, _array, _union])(rng, depth - 1)


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["null", "boolean", ["boolean", "null"]])}


def _constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(CONSTANTS)} if rng.random() < 0.5 else {"enum": rng.sample(CONSTANTS, 3)}


def _string(rng: random.Random, depth: int) -> Schema:
    match rng.randrange(3):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(6)}


def _integer(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(300)}


def _number(rng: random.Random, depth: int) -> Schema:
    return {"type": "number", "minimum": rng.randrange(-20, 0), "exclusiveMaximum": rng.randrange(1, 20)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randrange(3)}


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randrange(2, 4))]}
