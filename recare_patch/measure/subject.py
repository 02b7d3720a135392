"""What a patch is judged by: the concept it erases, or one of several.

A patch carries the recipe that made it, and each concept is judged by that one's settings. A stack has
none: its parts name their concepts, and each is judged by the settings that a recipe has where nothing
else is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recare_patch.core import EvaluationError, nearest
from recare_patch.measure.suites import find_suite_for
from recare_patch.patch import Erased, Patch, PatchMetadata, concepts_of
from recare_patch.recipe import Concept, Recipe, same_concept, slug_of


@dataclass(frozen=True)
class Subject:
    """One concept that a patch erases.

    Attributes:
        recipe: that made the patch, with this concept alone; of a stack, one of defaults with its base.
        care_words: what was guarded while it was erased.
        method: the patch's; "stack" for a stack.
    """

    recipe: Recipe
    care_words: tuple[str, ...]
    method: str

    @property
    def concept(self) -> Concept:
        """What was erased."""
        return self.recipe.concept


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
        raise EvaluationError(f"patch {patch.name} erases several concepts: choose one of {', '.join(known)}")
    if not metadata.by_concept:
        return Subject(metadata.parsed_recipe, metadata.care_words, metadata.method)
    one = next(one for one in metadata.erased if one.concept == chosen[0])
    alone = {"concept": _concept(metadata, one), "also": (), "subject": None}
    if metadata.parts:
        recipe = Recipe(concept=alone["concept"], base=metadata.base)
    else:
        recipe = metadata.parsed_recipe.model_copy(update=alone)
    return Subject(recipe, one.care_words, metadata.method)


def folder_of(patch: Patch, folder: Path, concept: str) -> Path:
    """Where evidence on one concept lies: in the patch's folder, or of several in one of its own within it.

    Args:
        patch: what was made.
        folder: the patch's, or another one chosen in its place.
        concept: the concept's text.
    """
    by_concept = patch.metadata is not None and patch.metadata.by_concept
    return folder / slug_of(concept) if by_concept else folder


def _concept(metadata: PatchMetadata, told: Erased) -> Concept:
    if told.kind is None:
        suite = find_suite_for(told.concept, metadata.base)
        if suite is None:
            raise EvaluationError(
                f"patch '{metadata.concept}' does not say what kind of concept '{told.concept}' is: make it "
                "again from patches that do"
            )
        return Concept(text=told.concept, kind=suite.kind)
    return told.as_concept()
