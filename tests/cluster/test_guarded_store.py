"""What a store's code raises is the store's failure: no other exception gets out, and none that is known is changed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualpath.cluster.deadline_threads import AbandonedError
from dualpath.cluster.guarded_store import guarded
from dualpath.kv import (
    BlockError,
    BlockFault,
    BlockUnavailableError,
    Inspectable,
    KVLayout,
    KVPart,
    PosixStore,
    StoreError,
    StoreLocationError,
    block_keys,
    namespace,
    open_store,
)
from dualpath.kv.stores.conformance import CHECKS, wrong_sizes_and_keys_are_refused

from .faulty_store import FaultyStore

LAYOUT = KVLayout.alike(2, (KVPart("kv", 1, 4),), "float32")
SPACE = namespace("model", "", LAYOUT)
KEY, OTHER = block_keys(SPACE.root, range(128))
BLOCK = bytes(LAYOUT.full_block_bytes)


class Panic(BaseException):
    """As pyo3's, of a store in Rust."""


class Odd:
    """A store whose every call does `act`."""

    location = "odd://"

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self._act()


CALLS: dict[str, Callable[[Any], Any]] = {
    "prepare": lambda store: store.prepare(SPACE),
    "write": lambda store: store.write(SPACE, KEY, SPACE.root, BLOCK),
    "read": lambda store: store.read(SPACE, KEY, bytearray(BLOCK)),
    "find": lambda store: store.find(SPACE.root, [KEY]),
    "delete": lambda store: store.delete(SPACE.root, KEY),
    "quarantine": lambda store: store.quarantine(SPACE.root, KEY),
    "scan": lambda store: list(store.scan()),
}


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyError("x"), ValueError("bad"), Panic("odd"), SystemExit(3)])
def test_an_unknown_exception_is_the_stores_failure(call: str, error: BaseException) -> None:
    with pytest.raises(StoreError, match=f"^odd://: its {call} raised {type(error).__name__}: ") as told:
        CALLS[call](guarded(Odd(raising(error))))
    assert told.value.__cause__ is error


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error",
    [
        BlockError(KEY, BlockFault.MISSING, ""),
        BlockUnavailableError(KEY, ""),
        StoreError("away"),
        OSError(5, "I/O error"),
        MemoryError(),
        AbandonedError(),
    ],
)
def test_what_callers_know_is_passed_on(call: str, error: Exception) -> None:
    with pytest.raises(type(error)) as told:
        CALLS[call](guarded(Odd(raising(error))))
    assert told.value is error


@pytest.mark.parametrize(
    ("call", "result"),
    [("write", None), ("write", "9"), ("find", None), ("find", [KEY]), ("scan", None), ("scan", [KEY])],
)
def test_a_result_of_a_wrong_kind_is_one_too(call: str, result: Any) -> None:
    with pytest.raises(StoreError, match=f"its {call} raised TypeError"):
        CALLS[call](guarded(Odd(lambda: result)))


def test_a_block_error_without_a_cause_that_is_known() -> None:
    error = BlockError(KEY, BlockFault.MISSING, "")
    error.cause = "gone"  # type: ignore[assignment]
    with pytest.raises(StoreError, match="raised BlockError"):
        CALLS["read"](guarded(Odd(raising(error))))


def test_each_kind_of_mistake_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([RuntimeError("one"), RuntimeError("two"), KeyError("three")])
    store = guarded(Odd(lambda: raising(next(errors))()))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with pytest.raises(StoreError):
                CALLS["read"](store)
    assert [("one" in message, "three" in message) for message in caplog.messages] == [(True, False), (False, True)]
    assert all(record.exc_info for record in caplog.records)


def test_a_scan_that_fails_midway_has_given_what_came_before(tmp_path: Path) -> None:
    genuine = PosixStore(tmp_path, durable=False)
    for key, parent in ((KEY, SPACE.root), (OTHER, KEY)):
        genuine.write(SPACE, key, parent, BLOCK)

    def records() -> Any:
        yield next(genuine.scan())
        raise RuntimeError("odd")

    found = []
    with pytest.raises(StoreError, match="its scan raised RuntimeError"):
        for record in guarded(Odd(records)).scan():
            found.append(record.key)  # noqa: PERF401 (what came before the error)
    assert len(found) == 1


KEPT = [check for check in CHECKS if check is not wrong_sizes_and_keys_are_refused]
"""A ValueError speaks against the caller only where its argument was wrong; ours never are."""


@pytest.mark.parametrize("check", KEPT, ids=lambda check: check.__name__)
def test_a_sound_store_is_as_it_was(tmp_path: Path, check: Callable[[Any], None]) -> None:
    check(lambda: guarded(PosixStore(tmp_path, durable=False)))


def test_one_that_can_not_be_inspected_does_not_pretend(tmp_path: Path) -> None:
    assert isinstance(guarded(PosixStore(tmp_path)), Inspectable)
    assert not isinstance(guarded(FaultyStore(PosixStore(tmp_path), dict)), Inspectable)


class BeforeLayers(PosixStore):
    """Written when a block was always read whole."""

    def read(self, space: Any, key: Any, into: Any, pace: Any = None) -> None: ...  # type: ignore[override]


class LeftoversAlways(PosixStore):
    """One of the methods by which it is inspected takes no argument."""

    def leftovers(self) -> list[str]:  # type: ignore[override]
        return []


def before_layers(location: str, *, durable: bool) -> Any:
    return BeforeLayers(location.partition("://")[2])


def leftovers_always(location: str, *, durable: bool) -> Any:
    return LeftoversAlways(location.partition("://")[2])


def nothing(location: str, *, durable: bool) -> Any:
    return None


def exits(location: str, *, durable: bool) -> Any:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("opener", "complaint"),
    [
        ("before_layers", r"can't be called as read\(space, key, into, pace, layers\): too many positional arguments"),
        (
            "leftovers_always",
            r"can't be called as leftovers\(\*, remove\): got an unexpected keyword",
        ),
        ("nothing", "NoneType is no store: it has no location and no prepare and no write and no read"),
        ("exits", "can't be opened: SystemExit: 7"),
    ],
)
def test_what_is_no_store_is_refused_when_it_is_opened(tmp_path: Path, opener: str, complaint: str) -> None:
    with pytest.raises(StoreLocationError, match=complaint):
        open_store(f"{__name__}:{opener}://{tmp_path}")


def opens_nothing(location: str, *, durable: bool) -> Any:
    raise RuntimeError("no such luck")


def test_an_opener_that_raises_anything_names_a_bad_location() -> None:
    with pytest.raises(StoreLocationError, match=r"--store .*:opens_nothing:// can't be opened: RuntimeError: no such"):
        open_store("tests.cluster.test_guarded_store:opens_nothing://")
