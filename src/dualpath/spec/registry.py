"""Registries of things by name: ours, and those that installed packages add through an entry point.

A package adds one without changing ours. In its ``pyproject.toml``::

    [project.entry-points."dualpath.stores"]
    memory = "my_package.memory:MemoryStore"

A name may also be ``package.module:attribute``, which needs no entry point (``--system my_policies:MINE``).
"""

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
    must give an object that has all `methods`.
    """

    def __init__(
        self,
        kind: str,
        group: str | None,
        lazy: Mapping[str, Callable[[], Thing]] | None = None,
        known: Mapping[str, Thing] | None = None,
        methods: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self._group = group
        self._methods = methods
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
        missing = [method for method in self._methods if not callable(getattr(thing, method, None))]
        if missing:
            raise UnknownNameError(f"{point.value} is no {self.kind}: it has no {' and no '.join(missing)}")
        if self._methods and isinstance(thing, type):
            raise UnknownNameError(f"{point.value} is a class; name an object of it")
        return thing
