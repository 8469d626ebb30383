"""What is asked of a tool's parameters beyond JSON: the types of each, where a format writes them as text."""

from collections.abc import Mapping
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
