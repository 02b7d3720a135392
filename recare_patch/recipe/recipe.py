"""A recipe: everything that a run needs to know, in one readable file.

A recipe names only registered things (methods, layer sets, optimizers), never code, because it travels inside
patches. What a run leaves unsaid is filled from the defaults here and from the method's own; the full recipe is
stored with the result, so that the run can be made again from the patch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from recare_patch.core import RecipeError, Settings, nearest, one_of, yaml_mapping
from recare_patch.recipe.concept import MAX_LENGTH, Concept, check_text, same_concept, slug_of
from recare_patch.recipe.methods import ABILITIES, METHODS, RANK_KEYS, MethodInfo, method_info, own_rank, section_of
from recare_patch.recipe.options import (
    PRECISIONS,
    AdapterOptions,
    AdversaryOptions,
    CareSetOptions,
    EraseOptions,
    MemoryOptions,
    SearchOptions,
    TargetImageOptions,
)

Fill = Callable[[dict[str, Any]], dict[str, Any]]


class Recipe(Settings):
    """One erasure from end to end.

    A method's own options stand in a section called like the method, and are :attr:`own` here.

    Raises:
        RecipeError: with all faults at once.
    """

    noun: ClassVar[str] = "recipe"

    version: Literal[1] = Field(1, description="of this format")
    concept: Concept = Field(description="what is erased")
    also: tuple[Concept, ...] = Field((), description="more concepts that the same patch erases")
    replace_with: Annotated[str, Field(min_length=1, max_length=MAX_LENGTH), AfterValidator(check_text)] | None = Field(
        None, description='what the concept\'s prompts show instead, such as "cat"; null: nothing in particular'
    )
    subject: Concept | None = Field(
        None, description="the concept is an attribute, and only what shows this subject loses it: stars from Van Gogh"
    )
    continue_from: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a patch whose training is gone on with, so that what it erased stays erased"
    )
    base: str = Field("atelier", min_length=1, description="atelier (bundled), a pipeline folder or a hub id")
    clip: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a CLIP folder or hub id; null: the one that fits the base"
    )
    method: Annotated[str, BeforeValidator(one_of("method", METHODS))] = Field(
        "recare", description="a name of METHODS"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="all random draws follow from it")
    precision: Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(one_of("precision", PRECISIONS))] = Field(
        "fp32", description="in which the base computes; the adapter is always fp32"
    )
    adapter: AdapterOptions = AdapterOptions()
    target_images: TargetImageOptions = TargetImageOptions()
    care_set: CareSetOptions = CareSetOptions()
    search: SearchOptions = SearchOptions()
    erase: EraseOptions = EraseOptions()
    adversary: AdversaryOptions = AdversaryOptions()
    memory: MemoryOptions = MemoryOptions()
    own: Settings | None = Field(None, exclude=True)
    notes: str = Field("", description="for the reader; no effect")

    def __init__(self, /, **data: Any) -> None:
        filled, faults = _with_method(data)
        try:
            super().__init__(**filled)
        except RecipeError as found:
            faults = [*found.faults, *faults]
        if faults:
            raise RecipeError(f"recipe: {'; '.join(faults)}", faults)

    @model_validator(mode="after")
    def _fits_its_method(self) -> Recipe:
        info, quoted = self.method_info, f"method '{self.method}'"
        if self.adapter.layers not in info.layers:
            raise ValueError(
                f"{quoted} trains {' or '.join(info.layers)}: adapter.layers cannot be {self.adapter.layers}"
            )
        for key, (ability, what) in ABILITIES.items():
            if getattr(self, key) is not None and not getattr(info, ability):
                able = [name for name in METHODS.names() if getattr(method_info(name), ability)]
                raise ValueError(f"{quoted} cannot {what}: {', '.join(able)} can")
        if self.memory.compile and not info.compiles:
            raise ValueError(f"{quoted} looks into layers, and compiled ones are closed: no memory.compile")
        if self.search.patience is not None and self.target_images.count < 2:
            raise ValueError("search.patience holds pictures out: target_images.count must be at least 2")
        return self

    @model_validator(mode="after")
    def _concepts_fit_together(self) -> Recipe:
        if self.replace_with is not None and self.subject is not None:
            raise ValueError("replace_with and subject do not go together: a concept is replaced or taken out")
        if self.also and (self.replace_with is not None or self.subject is not None):
            raise ValueError("also, and replace_with or subject, do not go together: write a recipe for each concept")
        if self.replace_with is not None and same_concept(self.replace_with, self.concept):
            raise ValueError(f"the concept '{self.concept}' cannot be replaced with itself")
        if self.subject is not None and same_concept(self.subject, self.concept):
            raise ValueError(f"the concept '{self.concept}' cannot be taken out of itself")
        for k, one in enumerate(self.concepts):
            if any(same_concept(one, other) for other in self.concepts[:k]):
                raise ValueError(f"the concept '{one}' is there twice")
        return self

    @property
    def method_info(self) -> MethodInfo:
        """What is known of its method."""
        return method_info(self.method)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """All that its patch erases, the first one first."""
        return (self.concept, *self.also)

    @property
    def title(self) -> str:
        """What its patch erases, in words: "Van Gogh", "tench + cat", "stars from Van Gogh"."""
        text = " + ".join(one.text for one in self.concepts)
        return f"{text} from {self.subject.text}" if self.subject is not None else text

    @property
    def slug(self) -> str:
        """Its title, fit for a folder: "stars-from-van-gogh"."""
        return slug_of(self.title)

    def as_data(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain data in the order of a recipe file."""
        data = self.model_dump(mode="json")
        if self.own is not None:
            notes = data.pop("notes")
            data |= {section_of(self.method): self.own.model_dump(mode="json"), "notes": notes}
        return data

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML."""
        return yaml.safe_dump(self.as_data(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe", fill: Fill = dict) -> Recipe:
        """Read a recipe; only plain data is read, never objects, and ``fill`` makes it whole.

        Raises:
            RecipeError: it is not YAML, no mapping, or holds faults; all are told at once, with their ``source``.
        """
        try:
            return cls(**fill(yaml_mapping(text, source=source, noun="recipe", error=RecipeError)))
        except RecipeError as fault:
            if str(fault).startswith(source):
                raise
            raise RecipeError(f"{source}: {'; '.join(fault.faults)}", fault.faults) from None

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """A copy with some keys set otherwise.

        Args:
            overrides: dotted key → value, such as ``{"erase.steps": 50, "seed": 1}``. A section may be given as a
                mapping; its other keys keep their values. Where the method changes, the sections ``adapter``,
                ``search`` and ``erase`` start from the new one's defaults.

        Raises:
            RecipeError: unknown keys or bad values; all are told at once.
        """
        data = self.as_data()
        own, new = self.method, str(overrides.get("method", self.method)).strip().casefold()
        if new != own:
            data.pop(section_of(own), None)
        faults: list[str] = []
        for key, value in overrides.items():
            *path, last = key.split(".")
            place: Any = data
            for part in path:
                if place is data and part not in data and part in _own_sections():
                    data[part] = {}
                place = place.get(part) if isinstance(place, dict) else None
            known = isinstance(place, dict) and (last in place or key in (*recipe_keys(), *_own_sections()))
            if not known:
                guess = nearest(key, recipe_keys())
                faults.append(f"{key} is not a key" + (f", did you mean '{guess}'?" if guess else ""))
            elif isinstance(place.get(last), dict) and isinstance(value, Mapping):
                place[last] = {**place[last], **value}
            else:
                place[last] = value
        told = {key: getattr(self.adapter, key.removeprefix("adapter.")) for key in RANK_KEYS}
        if own_rank(self.method_info, vars(self)) == told:
            # There may be other names now.
            for section, _, name in (key.partition(".") for key in RANK_KEYS):
                if f"{section}.{name}" not in overrides and name not in overrides.get(section, {}):
                    data[section].pop(name, None)
        if new != own and new in METHODS:
            _leave_to_method(data, overrides, self.method_info, method_info(new))
        try:
            changed = type(self)(**data)
        except RecipeError as found:
            faults.extend(found.faults)
        if not faults:
            return changed
        raise RecipeError(f"recipe: {'; '.join(faults)}", faults)


def _with_method(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's data with its method's section checked and its method's defaults filled in; and faults."""
    sections = {section_of(name): name for name in METHODS.names()}
    method = data.get("method", "recare")
    name = method.strip().casefold() if isinstance(method, str) else ""
    filled = {key: value for key, value in data.items() if key not in sections}
    faults = ["own is not a key"] if "own" in data else []
    if name not in METHODS:
        return filled, faults
    info = method_info(name)
    own: Settings | None = info.options() if info.options else None
    for key in data.keys() & sections.keys():
        value, kind = data[key], method_info(sections[key]).options
        if kind is None:
            faults.append(f"{key} is not a key")
            continue
        try:
            read = value if isinstance(value, kind) else kind(**(value or {}))
        except TypeError:
            faults.append(f"{key} must be a mapping of keys to values, got {value!r}")
        except RecipeError as fault:
            faults += [f"{key}.{phrase}" for phrase in fault.faults]
        else:
            if sections[key] == name:
                own = read
            elif read != kind():
                owner = sections[key]
                faults.append(f"the section {key} is that of method '{owner}', and method '{name}' has no use for it")
    filled["own"] = own
    for key, value in {**info.defaults, **own_rank(info, data)}.items():
        section, _, option = key.partition(".")
        said = filled.get(section, {})
        if isinstance(said, Settings):
            said = said.model_dump(exclude_unset=True)
        if isinstance(said, Mapping) and option not in said:
            filled[section] = {**said, option: value}
    return filled, faults


def _leave_to_method(data: dict[str, Any], overrides: Mapping[str, Any], old: MethodInfo, new: MethodInfo) -> None:
    """A recipe's numbers are its method's: another method starts from its own defaults."""

    def is_set(section: str, name: str) -> bool:
        return f"{section}.{name}" in overrides or name in overrides.get(section, {})

    for section in _METHOD_SECTIONS:
        data[section] = {
            name: value
            for name, value in data[section].items()
            # Of the sections' keys this one speaks of the concept, not of the method.
            if f"{section}.{name}" == "search.init_word" or is_set(section, name)
        }
    for key in dict.fromkeys((*old.defaults, *new.defaults)):
        section, _, name = key.partition(".")
        if section in _METHOD_SECTIONS or is_set(section, name):
            continue
        # Elsewhere only what was the old one's default is left to the new one.
        plain = getattr(Recipe.model_fields[section].default, name)
        if data[section].get(name) == old.defaults.get(key, plain):
            data[section].pop(name, None)


_METHOD_SECTIONS = ("adapter", "search", "erase")


def _own_sections() -> dict[str, type[Settings]]:
    infos = {name: method_info(name) for name in METHODS.names()}
    return {section_of(name): info.options for name, info in infos.items() if info.options}


def _dotted(model: type[Settings]) -> Iterator[str]:
    for name, field_info in model.model_fields.items():
        inner = field_info.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from (f"{name}.{key}" for key in _dotted(inner))
        elif not field_info.exclude:
            yield name


def recipe_keys() -> tuple[str, ...]:
    """Every key of a recipe, dotted: "erase.steps"; those of the methods' own sections too."""
    own = (f"{section}.{key}" for section, kind in _own_sections().items() for key in _dotted(kind))
    return (*_dotted(Recipe), *own)
