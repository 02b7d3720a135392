"""Tables from a name to code that is imported only when it is asked for.

A new method, base model, detector, attack or check is one file and one line in such a table, or an entry
point of another installed package. The table itself is cheap to read, so the command line can list and
check names without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from recare_patch.core.errors import unknown_name


class Registry:
    """Names and the objects they stand for, written as "module:attribute".

    Example:
        >>> loaders = Registry("serializer", {"json": "json:dumps"})
        >>> loaders.get("json")({})
        '{}'
    """

    def __init__(
        self, what: str, targets: Mapping[str, str] | None = None, *, group: str | None = None
    ) -> None:
        """A table.

        Args:
            what: the kind of thing it holds, for messages, such as "method".
            targets: name → "module:attribute", in the order in which names are listed.
            group: entry points of installed packages that add to it, such as "recare_patch.methods".
        """
        self.what, self.group = what, group
        self._own: dict[str, str] = {}
        for name, target in (targets or {}).items():
            self.register(name, target)

    def register(self, name: str, target: str) -> None:
        """Add one entry.

        Args:
            name: how users call it.
            target: where it is, "module:attribute".

        Raises:
            ValueError: the name is taken by another target, or the target is malformed.
        """
        module, _, attribute = target.partition(":")
        if not module or not attribute or ":" in attribute:
            raise ValueError(f"{self.what} '{name}' must point to 'module:attribute', got '{target}'")
        taken = self._own.get(name)
        if taken is not None and taken != target:
            raise ValueError(f"{self.what} '{name}' is taken by {taken}, cannot register {target}")
        self._own[name] = target
        self.__dict__.pop("targets", None)

    @cached_property
    def targets(self) -> Mapping[str, str]:
        """Name → "module:attribute": the table's own, then those of installed packages by name.

        Raises:
            ValueError: an installed package claims a name of the table's own, or two the same one.
        """
        found = dict(self._own)
        if self.group is not None:
            for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
                taken = found.setdefault(point.name, point.value)
                if taken != point.value:
                    raise ValueError(
                        f"{self.what} '{point.name}' is taken by {taken}: the entry point {point.value} of "
                        f"{self.group} needs another name"
                    )
        return found

    def get(self, name: str) -> Any:
        """The object behind a name, imported on first use.

        Raises:
            UnknownNameError: no such name; the sentence offers the nearest.
        """
        if name not in self.targets:
            raise unknown_name(self.what, name, self.names())
        module, _, attribute = self.targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def names(self) -> tuple[str, ...]:
        """All names, in the order in which they are listed."""
        return tuple(self.targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __contains__(self, name: object) -> bool:
        return name in self.targets
