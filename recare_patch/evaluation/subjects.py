"""What a patch is judged by: the concept it erases, or one of those that a stack erases.

A patch carries the recipe that made it. A stack has none: its parts name their concepts, and each is
judged on its own, by the settings that a recipe has where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recare_patch.concepts import Concept, same_concept, slug_of
from recare_patch.errors import EvaluationError, nearest
from recare_patch.evaluation.suites import find_suite_for
from recare_patch.patch import Patch, PatchMetadata, PatchPart
from recare_patch.recipe import Recipe


@dataclass(frozen=True)
class Subject:
    """One concept that a patch erases.

    Attributes:
        recipe: that made the patch; of a stack's part, one of defaults with its concept and base.
        care_words: what was guarded while it was erased.
        method: how it was erased; "stack" for a stack's part.
        stacked: whether it is one of a stack's concepts.
    """

    recipe: Recipe
    care_words: tuple[str, ...]
    method: str
    stacked: bool

    @property
    def concept(self) -> Concept:
        """What was erased."""
        return self.recipe.concept


def concepts_of(patch: Patch) -> tuple[str, ...]:
    """What a patch erases; several for a stack, none for a LoRA that does not say."""
    metadata = patch.metadata
    if metadata is None:
        return ()
    if not metadata.parts:
        return (metadata.concept,)
    return tuple(dict.fromkeys(part.concept for part in metadata.parts if part.concept is not None))


def subject_of(patch: Patch, concept: str | None = None) -> Subject:
    """One concept that a patch erases.

    Args:
        patch: what was made.
        concept: which; may be left out where there is only one.

    Raises:
        EvaluationError: the patch erases no such concept, or several and none was chosen.
        RecipeError: the patch's recipe cannot be read.
    """
    metadata, known = patch.metadata, concepts_of(patch)
    if metadata is None or not known:
        raise EvaluationError(f"{patch.source} does not say what it erases, so that nothing can be judged")
    chosen = [one for one in known if concept is None or same_concept(one, concept)]
    if not chosen:
        assert concept is not None
        guess = nearest(concept, known)
        hint = f"; did you mean '{guess}'?" if guess and len(known) > 1 else ""
        raise EvaluationError(f"patch {patch.name} erases {' and '.join(known)}, not '{concept}'{hint}")
    if len(chosen) > 1:
        raise EvaluationError(
            f"patch {patch.name} is a stack and erases several concepts: choose one of {', '.join(known)}"
        )
    if not metadata.parts:
        return Subject(metadata.parsed_recipe, metadata.care_words, metadata.method, stacked=False)
    parts = [part for part in metadata.parts if part.concept == chosen[0]]
    recipe = Recipe(concept=_concept(metadata, parts), base=metadata.base)
    words = dict.fromkeys(word for part in parts for word in part.care_words)
    return Subject(recipe, tuple(words), metadata.method, stacked=True)


def folder_of(patch: Patch, folder: Path, concept: str) -> Path:
    """Where evidence on one concept lies: in the patch's folder, or in one of its own within a stack's.

    Args:
        patch: what was made.
        folder: the patch's, or another one chosen in its place.
        concept: the concept's text.
    """
    if patch.metadata is None or not patch.metadata.parts:
        return folder
    return folder / slug_of(concept)


def _concept(metadata: PatchMetadata, parts: list[PatchPart]) -> Concept:
    text = parts[0].concept or ""
    kinds = [part.kind for part in parts if part.kind is not None]
    suite = find_suite_for(text, metadata.base)
    kind = kinds[0] if kinds else suite.kind if suite is not None else None
    if kind is None:
        raise EvaluationError(
            f"the stack does not say what kind of concept '{text}' is: stack it again from its patches"
        )
    return Concept(text=text, kind=kind)  # type: ignore[arg-type]
