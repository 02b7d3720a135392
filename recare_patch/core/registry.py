"""Tables from a name to code that is imported only when it is asked for.

A new method, base model or metric is one file and one line in such a table. The table itself is
cheap to read, so the command line can list and check names without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from recare_patch.core.errors import unknown_name


class Registry:
    """Names and the objects they stand for, written as "module:attribute".

    Example:
        >>> loaders = Registry("serializer")
        >>> loaders.register("json", "json:dumps")
        >>> loaders.get("json")({})
        '{}'
    """

    def __init__(self, what: str) -> None:
        """An empty table.

        Args:
            what: the kind of thing it holds, for messages, such as "method".
        """
        self.what = what
        self._targets: dict[str, str] = {}

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
        taken = self._targets.get(name)
        if taken is not None and taken != target:
            raise ValueError(f"{self.what} '{name}' is taken by {taken}, cannot register {target}")
        self._targets[name] = target

    def get(self, name: str) -> Any:
        """The object behind a name, imported on first use.

        Raises:
            UnknownNameError: no such name; the sentence offers the nearest.
        """
        if name not in self._targets:
            raise unknown_name(self.what, name, self.names())
        module, _, attribute = self._targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._targets
