"""Registries of things by name: ours, and those that installed packages add through an entry point.

A package adds one without changing ours. In its ``pyproject.toml``::

    [project.entry-points."dualpath.stores"]
    memory = "my_package.memory:MemoryStore"

A name may also be ``package.module:attribute``, which needs no entry point (``--system my_policies:MINE``).
"""

import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class UnknownNameError(ValueError):
    """The name is unknown, or what it names can't be loaded. The message lists the known names, or says why."""


class Registry(Generic[Thing]):
    """Things of one `kind`, which is their name in messages ("store"). `group` is the entry-point group.

    `known` holds things themselves, `lazy` functions that import and return one, so that listing stays cheap. Ours and
    those added here take precedence over installed ones. Without a group there are no installed ones. An installed name
    must give an object that fits the protocol which `protocol` imports and returns; `guide` says how to write one.
    """

    def __init__(
        self,
        kind: str,
        group: str | None,
        lazy: Mapping[str, Callable[[], Thing]] | None = None,
        known: Mapping[str, Thing] | None = None,
        protocol: Callable[[], type] | None = None,
        guide: str = "",
    ) -> None:
        self.kind = kind
        self._group = group
        self._protocol = protocol
        self._guide = guide
        self._lazy = dict(lazy or {})
        self._known = dict(known or {})

    def names(self) -> tuple[str, ...]:
        """Returns our names in their order, then those of installed packages, sorted."""
        installed = sorted({point.name for point in entry_points(group=self._group)}) if self._group else []
        return tuple(dict.fromkeys((*self._lazy, *self._known, *installed)))

    def add(self, name: str, thing: Thing) -> None:
        """Add a thing for this process only. Raises ValueError when another thing has the name."""
        if name in self._lazy or self._known.get(name, thing) is not thing:
            raise ValueError(f"{self.kind} {name!r} exists already; choose another name")
        self._known[name] = thing

    def get(self, name: str) -> Thing:
        """Returns the thing. Raises UnknownNameError."""
        if name in self._known:
            return self._known[name]
        if name in self._lazy:
            return self._lazy[name]()
        installed = list(entry_points(group=self._group, name=name)) if self._group else []
        if len(installed) > 1:
            offers = ", ".join(f"{point.value} of {point.dist.name if point.dist else '?'}" for point in installed)
            raise UnknownNameError(f"{self.kind} {name!r} is offered more than once: {offers}; uninstall all but one")
        if not installed and not re.fullmatch(r"[\w.]+:[\w.]+", name):
            raise UnknownNameError(f"unknown {self.kind} {name!r}; choose from {', '.join(self.names())}")
        return self._load(installed[0] if installed else EntryPoint(name, name, self._group or ""))

    def _load(self, point: EntryPoint) -> Thing:
        try:
            thing: Thing = point.load()
        except (Exception, SystemExit) as error:  # another package's code may raise anything
            what = f"{type(error).__name__}: {error}"
            raise UnknownNameError(f"{self.kind} {point.name!r} can't be loaded: {what}") from error
        if self._protocol is not None:
            if isinstance(thing, type):
                raise UnknownNameError(f"{point.value} is a class; name an object of it")
            if fault := misfit(thing, self._protocol()):
                raise UnknownNameError(f"{point.value} is no {self.kind}: it {fault}; see {self._guide}")
        return thing


def misfit(thing: object, protocol: type) -> str:
    """Returns why `thing` does not fit a protocol, as "has no close"; empty when it does.

    It lacks a method or a property, or a method can't be called as the protocol says. What a method gives is not looked
    at, nor the arguments of one that does not tell them (native code).
    """
    asked = {name: kind for name, kind in vars(protocol).items() if not name.startswith("_")}
    missing = [
        name
        for name, kind in asked.items()
        if not hasattr(thing, name) or (inspect.isfunction(kind) and not callable(getattr(thing, name)))
    ]
    if missing:
        return f"has no {' and no '.join(missing)}"
    for name, kind in asked.items():
        if inspect.isfunction(kind) and (why := _refusal(getattr(thing, name), inspect.signature(kind))):
            return f"can't be called as {name}{_arguments(kind)}: {why}"
    return ""


def _refusal(method: Callable[..., object], asked: inspect.Signature) -> str:
    """Returns why `method` does not take what a protocol's method takes beside `self`; empty when it does."""
    try:
        offered = inspect.signature(method)
    except (TypeError, ValueError):
        return ""
    _, *parameters = asked.parameters.values()
    by_name = {one.name: None for one in parameters if one.kind is one.KEYWORD_ONLY}
    try:
        offered.bind(*[None] * (len(parameters) - len(by_name)), **by_name)
    except TypeError as error:
        return str(error)
    return ""


def _arguments(method: Callable[..., object]) -> str:
    """Returns the names of a method's arguments, as "(pool, *, host)"."""
    _, *parameters = inspect.signature(method).parameters.values()
    bare = [one.replace(annotation=one.empty, default=one.empty) for one in parameters]
    return str(inspect.Signature(bare))
