"""Requests made from the server's own schema: each field of each body × wrong types and extremes.

An endpoint joins by a line in `ENDPOINTS`: its path, the record of its body, and a body that it answers with 200.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from dualpath.server.anthropic.request import CountTokensRequest, MessagesRequest
from dualpath.server.endpoints import rollout
from dualpath.server.endpoints.rollout import SglangGenerate, VllmGenerate
from dualpath.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dualpath.server.responses.request import InputTokensRequest, ResponsesRequest
from dualpath.server.unsupported import UNSUPPORTED


class Endpoint(NamedTuple):
    path: str
    kind: type[msgspec.Struct]
    smallest: dict[str, Any]
    """A body that is answered with 200."""
    free: tuple[str, tuple[str, ...]] = ("", ())
    """A field that is a record without a schema, and the names that are read from it."""


_SAMPLING = tuple(field.name for field in msgspec.structs.fields(CompletionRequest))
_SGLANG_SAMPLING = (*rollout._SAME, *rollout._OTHER_NAMES, *rollout._GRAMMARS)
_MESSAGES = [{"role": "user", "content": "a"}]
ENDPOINTS = [
    Endpoint("/v1/completions", CompletionRequest, {"prompt": "a", "max_tokens": 3}),
    Endpoint("/v1/completions", CompletionRequest, {"prompt": [1, 2], "max_tokens": 3, "stream": True}),
    Endpoint("/v1/chat/completions", ChatRequest, {"messages": _MESSAGES, "max_tokens": 3}),
    Endpoint("/v1/chat/completions", ChatRequest, {"messages": _MESSAGES, "max_tokens": 3, "stream": True}),
    Endpoint("/tokenize", TokenizeRequest, {"prompt": "a"}),
    Endpoint("/tokenize", TokenizeRequest, {"messages": _MESSAGES}),
    Endpoint("/detokenize", DetokenizeRequest, {"tokens": [1]}),
    Endpoint("/v1/messages", MessagesRequest, {"model": "tiny", "messages": _MESSAGES, "max_tokens": 3}),
    Endpoint(
        "/v1/messages", MessagesRequest, {"model": "tiny", "messages": _MESSAGES, "max_tokens": 3, "stream": True}
    ),
    Endpoint("/v1/messages/count_tokens", CountTokensRequest, {"model": "tiny", "messages": _MESSAGES}),
    Endpoint("/v1/responses", ResponsesRequest, {"input": "a", "max_output_tokens": 3}),
    Endpoint("/v1/responses", ResponsesRequest, {"input": "a", "max_output_tokens": 3, "stream": True}),
    Endpoint("/v1/responses/input_tokens", InputTokensRequest, {"input": "a"}),
    Endpoint("/inference/v1/generate", VllmGenerate, {"token_ids": [1]}, ("sampling_params", _SAMPLING)),
    Endpoint(
        "/generate",
        SglangGenerate,
        {"text": "a"},
        ("sampling_params", _SGLANG_SAMPLING),
    ),
]

VALUES: list[bytes] = [
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1",
    b"1",
    b"0.5",
    b"-0.0",
    b"1e308",
    b"1e-308",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"2147483648",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551616",
    b"9" * 400,
    b"9" * 4300,
    b"9" * 100_000,
    b'""',
    b'"a"',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\xff"',
    '"😀\u202e\ufffd"'.encode(),
    b'"%b"' % (b"a" * 5000),
    b'"{{ messages }}{% for x in range(9) %}"',
    b'"<|im_start|>"',
    b"[]",
    b"[null]",
    b"[1]",
    b"[-1]",
    b"[300]",
    b'["a"]',
    b'["", "a"]',
    b"[[1], [2]]",
    b"[[]]",
    b"[%b]" % b",".join([b"1"] * 2000),
    b"[%b]" % b",".join([b'"a"'] * 2000),
    b"{}",
    b'{"type": "text"}',
    b'{"type": "function", "function": {"name": "f"}}',
    b'{"": {}}',
    b'{"1": 100, "2": -1e300}',
    b'{"a": "b", "a": 1}',
    b"{%b}" % b",".join(b'"%d": %d' % (i, i) for i in range(2000)),
    b'[{"role": "tool", "content": null}]',
    b'[{"role": "user", "content": [{"type": "text"}, {"type": "image_url", "image_url": {"url": "file:///etc"}}]}]',
    b'[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]',
    b"[" * 50 + b"]" * 50,
    b"[" * 2000 + b"]" * 2000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
]


def requests(endpoint: Endpoint) -> Iterator[tuple[str, bytes]]:
    """Yields (what is special, body): every field, at any depth, with every value."""
    smallest = {name: msgspec.json.encode(value) for name, value in endpoint.smallest.items()}
    names = {field.encode_name for field in _fields(endpoint.kind)}
    names |= {entry.name for entry in UNSUPPORTED if getattr(endpoint.kind, "api", "") in entry.endpoints}
    for name, value in itertools.product(sorted(names), VALUES):
        yield f"{name} = {value[:40]!r}", _body(smallest | {name: value})
    field, free = endpoint.free
    paths = [*_inner(endpoint.kind), *([field, name] for name in free)]
    for path, value in itertools.product(paths, VALUES):
        yield f"{'.'.join(path)} = {value[:40]!r}", _body(smallest | {path[0]: _nested(path[1:], value)})


def sample(endpoint: Endpoint, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Returns `count` of the requests, drawn with `seed`; all of them if there are no more."""
    found = list(requests(endpoint))
    return found if len(found) <= count else random.Random(seed).sample(found, count)


def _body(fields: dict[str, bytes]) -> bytes:
    return b"{%b}" % b",".join(b'"%b":%b' % (name.encode(), value) for name, value in fields.items())


def _fields(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return described.fields


def _inner(kind: type[msgspec.Struct]) -> Iterator[list[str]]:
    """Yields the paths to fields of records within records; ``[]`` stands for an entry of a list."""

    def walk(path: list[str], described: inspect.Type) -> Iterator[list[str]]:
        if isinstance(described, inspect.UnionType):
            for one in described.types:
                yield from walk(path, one)
        elif isinstance(described, inspect.ListType):
            yield from walk([*path, "[]"], described.item_type)
        elif isinstance(described, inspect.StructType) and len(path) < 6:
            for field in described.fields:
                yield [*path, field.encode_name]
                yield from walk([*path, field.encode_name], field.type)

    for field in _fields(kind):
        yield from walk([field.encode_name], field.type)


_USUAL = {"role": b'"user"', "content": b'"a"', "type": b'"function"', "name": b'"f"'}


def _nested(path: list[str], value: bytes) -> bytes:
    """Returns `value` at `path`, beside what the records on the way usually need."""
    if not path:
        return value
    head, *rest = path
    inner = _nested(rest, value)
    if head == "[]":
        return b"[%b]" % inner
    return _body(_USUAL | {head: inner})
