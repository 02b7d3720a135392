"""The base of everything that users write, and tables of names: strict, and clear about faults.

Unknown keys are errors with the nearest known key, numbers written as text ("1e-4", which YAML
reads as a string) are converted, and all faults of one document are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from recare_patch.core.errors import RecipeError, SettingsError, nearest, unknown_name

_WANTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}

_MOST_FAULTS = 100
"""So many are told: a stranger's document may have millions."""


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and tells every fault in one sentence.

    Subclasses may set ``error`` to the error they raise and ``noun`` to what they are called in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True)

    error: ClassVar[type[SettingsError]] = RecipeError
    noun: ClassVar[str] = "settings"

    # A key of the data may be called "self".
    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as found:
            listed = found.errors(include_url=False)
            faults = [phrase for one in listed[:_MOST_FAULTS] for phrase in _phrases(one, type(self))]
            if (more := len(listed) - _MOST_FAULTS) > 0:
                faults.append(f"and {more:,} more faults")
            raise self.error(f"{self.noun}: {'; '.join(faults)}", faults) from None
        except TypeError as fault:
            # What a nested mapping's constructor says of a key such as 1.
            if "keywords must be strings" not in str(fault):
                raise
            told = "every key must be text"
            raise self.error(f"{self.noun}: {told}", (told,)) from None


def _phrases(fault: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """One pydantic fault in words; a nested model's own faults with their place in front."""
    place = ".".join(str(part) for part in fault["loc"])
    inner, kind = fault.get("ctx", {}).get("error"), fault["type"]
    given = repr(fault["input"])
    given = given if len(given) <= 60 else f"{given[:57]}…"
    if isinstance(inner, SettingsError):
        return [f"{place}.{phrase}" if place else phrase for phrase in inner.faults]
    if kind == "extra_forbidden":
        guess = nearest(place, model.model_fields)
        hint = f", did you mean '{guess}'?" if guess else f" (keys are {', '.join(model.model_fields)})"
        return [f"{place} is not a key{hint}"]
    if kind == "missing":
        return [f"{place} is missing"]
    if inner is not None:
        return [f"{place}: {inner}" if place else str(inner)]
    if kind in _WANTED:
        return [f"{place} must be {_WANTED[kind]}, got {given}"]
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return [f"{place} must be {words} {fault['ctx'][bound]}, got {given}"]
    return [f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {given}"]


class one_of:
    """A validator that accepts a name whatever its case and offers the nearest for a wrong one.

    Args:
        what: the kind of thing named, for the message.
        allowed: the names, in the order in which to list them.
    """

    def __init__(self, what: str, allowed: Iterable[str]) -> None:
        self.what, self._allowed = what, allowed

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are; a registry's are looked up when they are needed."""
        return tuple(self._allowed)

    def __call__(self, given: Any) -> Any:
        """The name as it is listed."""
        wanted = given.strip().casefold() if isinstance(given, str) else None
        for name in self.names:
            if name.casefold() == wanted:
                return name
        raise ValueError(str(unknown_name(self.what, str(given), self.names)))


class Registry:
    """Names and what they stand for, "module:attribute", imported only when it is asked for.

    A new method, base model, detector, attack or check is one file and one line in such a table, or an
    entry point of another installed package. The table is read without torch.

    Example:
        >>> loaders = Registry("serializer", {"json": "json:dumps"})
        >>> loaders.get("json")({})
        '{}'
    """

    def __init__(self, what: str, targets: Mapping[str, str], *, group: str | None = None) -> None:
        """A table.

        Args:
            what: the kind of thing it holds, for messages, such as "method".
            targets: name → "module:attribute", in the order in which names are listed.
            group: entry points of installed packages that add to it, such as "recare_patch.methods".

        Raises:
            ValueError: a target is malformed.
        """
        self.what, self.group, self._own = what, group, dict(targets)
        for name, target in targets.items():
            module, _, attribute = target.partition(":")
            if not module or not attribute or ":" in attribute:
                raise ValueError(f"{what} '{name}' must point to 'module:attribute', got '{target}'")

    @cached_property
    def targets(self) -> Mapping[str, str]:
        """Name → "module:attribute": the table's own, then those of installed packages by name.

        Raises:
            ValueError: an installed package claims a name of the table's own, or two the same one.
        """
        found = dict(self._own)
        points = entry_points(group=self.group) if self.group is not None else ()
        for point in sorted(points, key=lambda point: point.name):
            taken = found.setdefault(point.name, point.value)
            if taken != point.value:
                raise ValueError(
                    f"{self.what} '{point.name}' is taken by {taken}: the entry point {point.value} of "
                    f"{self.group} needs another name"
                )
        return found

    def get(self, name: str) -> Any:
        """The object behind a name; :class:`UnknownNameError` with the nearest where there is none."""
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
