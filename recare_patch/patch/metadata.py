"""What a patch says of itself, in the header of its file: read without torch."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recare_patch.core import PatchError, RecipeError, load_json, printable
from recare_patch.models import COMPILED
from recare_patch.recipe import TEXT_LAYER_SETS, Concept, Recipe, concept_key, stack_has_no_recipe

if TYPE_CHECKING:
    from recare_patch.careset import CareSet
    from recare_patch.models import BaseModel as Base
    from recare_patch.patch.patch import Patch

FORMAT_VERSION = 1
HEADER_PREFIX = "recare_patch."
_ENCODER = "text_encoder"
_MOST_CONCEPTS = 1000
_DOCUMENTS = ("recipe", "care_set")


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Erased(_Told):
    """One concept that a patch erases."""

    concept: str = Field(description="its name; an attribute is named with its subject, 'stars from Van Gogh'")
    kind: str | None = Field(None, description="None where it is not known")
    method: str | None = Field(None, description="how it was erased; None where it is not known")
    care_words: tuple[str, ...] = Field((), description="what was guarded while it was")

    @classmethod
    def by(cls, recipe: Recipe, care_words: Iterable[Sequence[str]]) -> tuple[Erased, ...]:
        """What a recipe erases, and the words that guard each of its concepts."""
        names = [recipe.title] if recipe.subject is not None else [one.text for one in recipe.concepts]
        return tuple(
            cls(concept=name, kind=one.kind, method=recipe.method, care_words=tuple(words))
            for name, one, words in zip(names, recipe.concepts, care_words, strict=True)
        )

    def as_concept(self) -> Concept:
        """With the prompts that speak of it.

        Raises:
            ConceptError: it is no concept, or its kind is not known.
        """
        return Concept(text=self.concept, kind=self.kind)  # type: ignore[arg-type]


def _each_once(found: Iterable[Erased]) -> tuple[Erased, ...]:
    """Every concept once, with all that was guarded for it."""
    kept: dict[str, Erased] = {}
    for one in found:
        other = kept.setdefault(concept_key(one.concept), one)
        if other is not one:
            words = tuple(dict.fromkeys((*other.care_words, *one.care_words)))
            same = {"kind": other.kind or one.kind, "care_words": words}
            kept[concept_key(one.concept)] = other.model_copy(update=same)
    return tuple(kept.values())


class PatchPart(_Told):
    """One patch in a stack, or one that was merged into a base."""

    name: str = Field(description="its concept, or its file")
    concept: str | None = Field(None, description="what it erases; None for a LoRA of other make")
    kind: str | None = None
    sha256: str = Field(description="of its weights file; where it has none, of its tensors in their order")
    scale: float = Field(description="its strength; stacks of stacks multiply theirs")
    care_words: tuple[str, ...] = ()
    method: str | None = None
    concepts: tuple[Erased, ...] | None = Field(
        None, max_length=_MOST_CONCEPTS, description="each, of a part that erases several"
    )

    @property
    def erased(self) -> tuple[Erased, ...]:
        """Each concept that it erases; none where it does not say."""
        if self.concepts or self.concept is None:
            return self.concepts or ()
        return (Erased.model_validate(self, from_attributes=True),)


class Named(_Told):
    """One name that a patch reads as something else, by a row of each layer's ``A`` and a column of its ``B``.

    The first name has the first row. Figures are of the text's values, without a picture.
    """

    name: str
    concept: str = Field(description="that it names")
    instead: str = Field(description="what it is read as")
    scale: float = Field(1.0, description="of its row, as it is in the tensors")
    left: float | None = Field(None, description="share of its way to that which it does not go at scale 1")
    worst: str | None = Field(None, description="the word that must stay and is moved most by its row alone")
    lost: float | None = Field(None, description="by how much of the length of what values make of that word")


class Stacking(_Told):
    """How a stack was made; see :func:`stack`."""

    method: str
    density: float | None = Field(None, description="share of the values that 'ties' and 'dare' keep")
    seed: int = Field(0, description="of every random draw")
    relative_error: float = Field(description="‖Δstack − Σ wΔ‖ / ‖Σ wΔ‖ over all layers, as measured")
    kept_weight: float | None = Field(None, description="of 'regmean', see Moments")


class PatchMetadata(_Told):
    """What a patch says of itself, stored as header entries ``recare_patch.<attribute>``."""

    format_version: int = Field(FORMAT_VERSION, description="a newer one than this package knows is refused")
    versions: dict[str, str] = Field({}, description="package → version, of the run that made it")
    base: str = Field(description="'atelier', a hub id, or the name of the folder")
    base_family: str
    base_denoiser_sha256: str
    prediction_type: str
    concept: str = Field(description="all that is erased, in words")
    kind: str = Field(description="of the recipe's first concept")
    method: str
    layers: str
    rank: int
    alpha: float = Field(description="of the adapter that was trained: alpha / rank is in the tensors")
    seed: int
    recipe: str | None = Field(None, description="the full recipe, YAML; a stack has none of its own")
    care_set: str | None = Field(None, description="JSON; None for methods without one")
    parts: tuple[PatchPart, ...] | None = Field(None, max_length=_MOST_CONCEPTS, description="of a stack, in its order")
    stacking: Stacking | None = None
    base_text_encoders_sha256: dict[str, str] | None = Field(
        None, description="by component; None for a patch that changes the denoiser alone"
    )
    base_prompt_width: int | None = Field(None, description="of the prompt embeddings that the denoiser reads")
    base_denoiser_class: str | None = Field(None, description="in diffusers, by which other tools' names are known")
    concepts: tuple[Erased, ...] | None = Field(
        None,
        max_length=_MOST_CONCEPTS,
        description="each, the earliest first, of a patch of several concepts or a continued one",
    )

    names: tuple[Named, ...] | None = Field(
        None, max_length=10 * _MOST_CONCEPTS, description="which the first rows belong to, where each has its own"
    )

    @model_validator(mode="after")
    def _is_single_or_stack(self) -> PatchMetadata:
        if self.recipe is None and not self.parts:
            raise ValueError("a patch has a recipe, and a stack has parts")
        try:
            readable = all(isinstance(word, str) for word in self.care_words)
        except (ValueError, LookupError, TypeError, AttributeError):
            readable = False
        if not readable:
            raise ValueError("its CARE-set is not readable")
        return self

    @classmethod
    def describe(
        cls, recipe: Recipe, base: Base, care_set: CareSet | None, versions: Mapping[str, str]
    ) -> PatchMetadata:
        """The metadata of a run of a full recipe on a base."""
        encoders = {part: base.component_hash(part) for part in base.components if part.startswith(_ENCODER)}
        return cls(
            versions=dict(versions),
            base=base.id,
            base_family=base.family,
            base_denoiser_sha256=base.denoiser_hash(),
            prediction_type=base.prediction_type,
            base_prompt_width=_prompt_width(base),
            base_denoiser_class=type(getattr(base.denoiser, COMPILED[:-1], base.denoiser)).__name__,
            concept=recipe.title,
            kind=recipe.concept.kind,
            method=recipe.method,
            layers=recipe.adapter.layers,
            rank=recipe.adapter.rank,
            alpha=recipe.adapter.alpha,
            seed=recipe.seed,
            recipe=recipe.to_yaml(),
            care_set=care_set.to_json() if care_set is not None else None,
            base_text_encoders_sha256=encoders if recipe.adapter.layers in TEXT_LAYER_SETS else None,
        )

    def with_concepts(self, own: Sequence[Erased], earlier: Patch | None = None) -> PatchMetadata:
        """The same, with each concept told: the run's own, after those of the patch that it went on from."""
        if earlier is None:
            return self.model_copy(update={"concepts": tuple(own)})
        before = earlier.metadata.erased if earlier.metadata is not None else ()
        told = earlier.metadata.concept if earlier.metadata is not None else Path(earlier.source).name
        both = _each_once((*before, *own))
        title = " + ".join([told, *(one.concept for one in both[len(before) :])])
        return self.model_copy(update={"concept": title, "concepts": both})

    @property
    def erased(self) -> tuple[Erased, ...]:
        """Each concept that it erases, the earliest first; none for a stack of LoRAs that do not say."""
        if self.parts:
            return _each_once(one for part in self.parts for one in part.erased)
        if self.concepts:
            return _each_once(self.concepts)
        try:
            recipe = self.parsed_recipe
        except RecipeError:
            # Of a newer version, say: it is told of where its settings are needed.
            return (Erased.model_validate(self, from_attributes=True),)
        return Erased.by(recipe, [self.care_words] * len(recipe.concepts))

    @property
    def by_concept(self) -> bool:
        """Whether it is judged by each of its concepts: a stack, or a patch that erases several."""
        return bool(self.parts) or len(self.erased) > 1

    def component_hash(self, component: str) -> str | None:
        """SHA-256 of one of the base's networks, where the patch names it."""
        if component.startswith(_ENCODER):
            return (self.base_text_encoders_sha256 or {}).get(component)
        return self.base_denoiser_sha256

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe as an object.

        Raises:
            RecipeError: it does not hold what this version of the package knows, or the patch is a stack.
        """
        if self.recipe is None:
            raise RecipeError(stack_has_no_recipe(f"'{self.concept}'", len(self.parts or ())))
        return _parsed(self.recipe)

    @property
    def care_words(self) -> tuple[str, ...]:
        """The words that the run guarded, in the CARE-set's order."""
        tokens = load_json(self.care_set).get("tokens", []) if self.care_set else []
        return tuple(token["text"] for token in tokens if token.get("kept"))

    def to_header(self) -> dict[str, str]:
        """Header entries: text as it is, everything else as JSON; what is ``None`` is left out."""
        return {
            f"{HEADER_PREFIX}{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in self.model_dump().items()
            if value is not None
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str], source: str) -> PatchMetadata | None:
        """Read the entries of a safetensors header; ``None`` where there are none of ours.

        Raises:
            PatchError: the entries are incomplete, malformed, or of a newer format.
        """
        ours = {k[len(HEADER_PREFIX) :]: v for k, v in header.items() if k.startswith(HEADER_PREFIX)}
        if not ours:
            return None
        text = {name for name, one in cls.model_fields.items() if one.annotation in (str, str | None)}
        try:
            values = {
                key: value if key in _DOCUMENTS else _shown(value if key in text else load_json(value))
                for key, value in ours.items()
            }
            version = values.get("format_version", 0)
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise PatchError(
                    f"{source} has patch format {version}, newer than the {FORMAT_VERSION} that this "
                    "version of recare-patch reads; update it"
                )
            return cls(**values)
        except ValidationError as fault:
            first = fault.errors()[0]
            raise PatchError(
                f"{source} has a malformed header entry "
                f"'{HEADER_PREFIX}{'.'.join(map(str, first['loc'])) or 'recipe'}': {first['msg'].lower()}"
            ) from None
        except ValueError:
            raise PatchError(f"{source} has a malformed header entry under '{HEADER_PREFIX}'") from None


@functools.lru_cache(maxsize=8)
def _parsed(recipe: str) -> Recipe:
    """A patch's recipe, which is asked for time and again, and takes PyYAML ten milliseconds."""
    return Recipe.from_yaml(recipe, source="the patch's recipe")


def _shown(value: Any) -> Any:
    """A header entry whose texts may be shown anywhere: what is no sign in them is an escape."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _shown(one) for key, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list) else value


def _prompt_width(base: Base) -> int | None:
    width = getattr(base.denoiser.config, "cross_attention_dim", None)
    return width if isinstance(width, int) else None


def finite(value: Any) -> float | None:
    """A finite number, or ``None``: records are files that anyone may have edited."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def spent(training: Mapping[str, Any]) -> list[str]:
    """What a run cost beside its time, in words, as far as its record tells."""
    evaluations, memory = (finite(training.get("denoiser_evaluations")), finite(training.get("peak_memory_bytes")))
    facts = [] if evaluations is None else [f"{evaluations:,.0f} denoiser evaluations"]
    return facts + ([f"{memory / 2**30:.1f} GiB of memory at most"] if memory else [])
