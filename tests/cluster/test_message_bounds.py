"""Every record that another process sends has bounds: each text, number and list in it, however deep.

The records are those of all decoders of the cluster's and of the transports' modules, so a new one is looked at too.
"""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import inspect

import dualpath.cluster
import dualpath.transfer
from dualpath.cluster import attachment as a
from dualpath.cluster import messages as m
from dualpath.cluster.attachment_frames import First, NotAPeerError, record
from dualpath.cluster.vllm_attachment import FromWorker
from dualpath.transfer.transports.framed.handshake import Challenge, Hello, Welcome

PACKAGES = (dualpath.cluster, dualpath.transfer)
LISTS = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType, inspect.CollectionType)


def modules() -> Iterator[str]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "fork_server" not in found.name:  # they do their work when imported, and ignore signals from then on
                yield found.name


def decoders() -> dict[str, Any]:
    found = {}
    for name in modules():
        for attribute, value in vars(importlib.import_module(name)).items():
            if isinstance(value, msgspec.msgpack.Decoder):
                found[f"{name}.{attribute}"] = value.type
    return found


def unbounded(kind: inspect.Type, at: str, seen: set[type]) -> Iterator[str]:
    """Yields the places in a type whose values may be as long or as large as a sender likes."""
    match kind:
        case inspect.StrType() | inspect.BytesType():
            if kind.max_length is None:
                yield at
        case inspect.IntType():
            if (kind.ge is None and kind.gt is None) or (kind.le is None and kind.lt is None):
                yield at
        case inspect.DictType():
            if kind.max_length is None:
                yield at
            yield from unbounded(kind.key_type, f"{at}.keys", seen)
            yield from unbounded(kind.value_type, f"{at}.values", seen)
        case inspect.TupleType():
            for n, item in enumerate(kind.item_types):
                yield from unbounded(item, f"{at}[{n}]", seen)
        case inspect.UnionType():
            for one in kind.types:
                yield from unbounded(one, at, seen)
        case inspect.StructType():
            if kind.cls not in seen:
                seen.add(kind.cls)
                for field in kind.fields:
                    yield from unbounded(field.type, f"{kind.cls.__name__}.{field.name}", seen)
        case inspect.Metadata():
            yield from unbounded(kind.type, at, seen)
        case inspect.BoolType() | inspect.FloatType() | inspect.NoneType() | inspect.EnumType() | inspect.LiteralType():
            return
        case _ if isinstance(kind, LISTS):
            if kind.max_length is None:
                yield at
            yield from unbounded(kind.item_type, f"{at}[]", seen)
        case _:
            yield f"{at}: {kind}"


@pytest.mark.parametrize(
    ("name", "kind"), decoders().items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_all_that_a_decoder_reads_is_bounded(name: str, kind: Any) -> None:
    assert list(unbounded(inspect.type_info(kind), name, set())) == []


def test_the_decoders_are_all_there_are() -> None:
    read = set(map(str, decoders().values()))
    for kind in (m.FromEngine, m.ToEngine, First, a.FromEngineProcess, a.ToEngineProcess, a.LayerCall, a.LayerResult):
        assert str(kind) in read
    assert str(FromWorker) in read
    for kind in (Challenge, Hello, Welcome):
        assert str(kind) in read
    for package in PACKAGES:
        for file in Path(package.__path__[0]).rglob("*.py"):
            calls = [
                ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
            ]
            assert not {"msgspec.msgpack.decode", "msgpack.decode"} & set(calls), f"{file}: name its decoder"


@pytest.mark.parametrize(
    "kind",
    [str, bytes, int, list[bool], dict[bool, bool], tuple[bool, ...], tuple[bool, int], set[bool], Any, msgspec.Raw,
     Annotated[list[str], msgspec.Meta(max_length=1)], Annotated[int, msgspec.Meta(ge=0)]],
)  # fmt: skip
def test_a_type_without_bounds_is_seen(kind: Any) -> None:
    nested = msgspec.defstruct("Nested", [("field", kind)])
    outer = msgspec.defstruct("Outer", [("inner", Annotated[list[nested], msgspec.Meta(max_length=2)] | None)])  # type: ignore[valid-type]
    (found,) = unbounded(inspect.type_info(outer), "", set())
    assert found.startswith("Nested.field")


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"\x81\xa4type\xa4\xed\xa0\x80x", b"\x82\xa4type\xa4Beat\xa4more" + b"\x91" * 100_000 + b"\xc0",
     msgspec.msgpack.encode({"type": "Reply", "call": -1}),
     msgspec.msgpack.encode({"type": "Reply", "call": 1, "error": "x" * 70_000}),
     msgspec.msgpack.encode({"type": "Beat", "gauges": {"x": 1e300}})],
)  # fmt: skip
def test_no_bytes_of_an_attachment_raise_anything_else(body: bytes) -> None:
    with pytest.raises(NotAPeerError, match="no record of ours"):
        record(msgspec.msgpack.Decoder(a.FromEngineProcess), body)
