"""Things found by name: ours, and those that installed packages add through an entry point.

A package adds one without editing ours. In its ``pyproject.toml``::

    [project.entry-points."dualpath.stores"]
    memory = "my_package.memory:MemoryStore"

A name may also be ``package.module:attribute``, which needs no entry point (``--system my_policies:MINE``).
"""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class UnknownNameError(ValueError):
    """No such thing, or one that can't be loaded. The message lists what there is, or says why."""


class Registry(Generic[Thing]):
    """Things of one kind. `ours` maps names to functions that import and return a thing, so that listing is cheap.

    ``kind`` is what messages call one ("store"), ``group`` the entry-point group ("dualpath.stores"). Two packages that
    add one name, or a package that takes one of ours, are an error when that name is asked for. Where `methods` are
    given, a loaded thing is an object that has them.
    """

    def __init__(
        self, kind: str, group: str, ours: Mapping[str, Callable[[], Thing]], methods: tuple[str, ...] = ()
    ) -> None:
        self.kind = kind
        self.group = group
        self._methods = methods
        self._ours = dict(ours)
        self._added: dict[str, Thing] = {}

    def names(self) -> tuple[str, ...]:
        """Ours in their order, then added ones, then those of installed packages by name."""
        installed = sorted({point.name for point in entry_points(group=self.group)})
        return tuple(dict.fromkeys((*self._ours, *self._added, *installed)))

    def add(self, name: str, thing: Thing) -> None:
        """For this process alone. Raises ValueError for a name that is taken."""
        if name in self.names() and self._added.get(name) is not thing:
            raise ValueError(f"{self.kind} {name!r} exists already")
        self._added[name] = thing

    def get(self, name: str) -> Thing:
        """Raises UnknownNameError."""
        if name in self._added:
            return self._added[name]
        installed = list(entry_points(group=self.group, name=name))
        if name in self._ours and not installed:
            return self._ours[name]()
        if len(installed) + (name in self._ours) > 1:
            offers = ", ".join(point.value for point in installed)
            raise UnknownNameError(f"{self.kind} {name!r} is offered more than once: {offers}; uninstall one")
        if not installed and ":" not in name:
            raise UnknownNameError(f"unknown {self.kind} {name!r}; choose from {', '.join(self.names())}")
        return self._load(installed[0] if installed else EntryPoint(name, name, self.group))

    def _load(self, point: EntryPoint) -> Thing:
        try:
            thing: Thing = point.load()
        except Exception as error:  # another package's code may raise anything
            raise UnknownNameError(f"{self.kind} {point.name!r} ({point.value}) can't be loaded: {error}") from error
        missing = [method for method in self._methods if not callable(getattr(thing, method, None))]
        if missing:
            raise UnknownNameError(f"{point.value} is no {self.kind}: it has no {' and no '.join(missing)}")
        if self._methods and isinstance(thing, type):
            raise UnknownNameError(f"{point.value} is a class; name an object of it")
        return thing
