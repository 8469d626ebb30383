"""Names of other packages' things: what is found, what is refused, and that the message says why."""

import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from dualpath.spec.registry import Registry, UnknownNameError, misfit

FOUND: Registry[int] = Registry("number", "dualpath.test_numbers", lazy={"two": lambda: 2}, known={"one": 1})


def test_ours_are_found_and_listed_in_order() -> None:
    assert (FOUND.names(), FOUND.get("one"), FOUND.get("two")) == (("two", "one"), 1, 2)


@pytest.mark.parametrize("name", ["three", ":", "a:", ":b", "a b:c"])
def test_what_is_no_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown number '.*'; choose from two, one"):
        FOUND.get(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "can't be loaded: KeyError: 'x'"),
        ("import sys; sys.exit(3)", "can't be loaded: SystemExit: 3"),
        ("", "can't be loaded: AttributeError: "),
    ],
)
def test_a_module_that_breaks_at_import_is_told(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_at_import.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "breaks_at_import", raising=False)
    with pytest.raises(UnknownNameError, match=message):
        FOUND.get("breaks_at_import:NUMBER")


def test_two_packages_with_one_name_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first", "second"):
        metadata = tmp_path / f"{package}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[dualpath.test_numbers]\nthree = math:pi\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert FOUND.names() == ("two", "one", "three")
    with pytest.raises(UnknownNameError, match="offered more than once: math:pi of first, math:pi of second"):
        FOUND.get("three")


class Asked(Protocol):
    """What a thing must have."""

    @property
    def place(self) -> str: ...

    def move(self, what: int, where: int = 0, *, how: str, soon: bool = False) -> None: ...


class Has:
    """Has a place."""

    place = "here"


class Fits(Has):
    def move(self, a: int, b: int = 1, **more: Any) -> None: ...


class TakesAnything(Has):
    def move(self, *given: Any, **named: Any) -> None: ...


class TakesLess(Has):
    def move(self, what: int, *, how: str, soon: bool) -> None: ...


class AsksForMore(Has):
    def move(self, what: int, where: int, why: str, *, how: str, soon: bool) -> None: ...


class Native(Has):
    """Its method does not tell its arguments."""

    move = staticmethod(dict.update)


class NoMethod(Has):
    move = 3


@pytest.mark.parametrize("thing", [Fits(), TakesAnything(), Native()])
def test_a_thing_that_can_be_called_so_fits(thing: object) -> None:
    assert misfit(thing, Asked) == ""


@pytest.mark.parametrize(
    ("thing", "why"),
    [
        (object(), "has no place and no move"),
        (NoMethod(), "has no move"),
        (TakesLess(), "can't be called as move(what, where, *, how, soon): too many positional arguments"),
        (AsksForMore(), "can't be called as move(what, where, *, how, soon): missing a required argument: 'why'"),
    ],
)
def test_one_that_does_not_fit_says_why(thing: object, why: str) -> None:
    assert misfit(thing, Asked) == why
