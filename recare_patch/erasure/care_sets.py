"""A CARE-set without an erasing: what a run of a recipe would guard."""

from __future__ import annotations

import tempfile
from pathlib import Path

from recare_patch.careset import CareSet, Clip
from recare_patch.core import CareSetError, NullProgress, Progress
from recare_patch.erasure.prepare import draw_target, find_companions, targets_of
from recare_patch.erasure.stages import Run
from recare_patch.models import BaseModel
from recare_patch.recipe import Recipe


def care_set_of(recipe: Recipe, base: BaseModel, clip: Clip, progress: Progress | None = None) -> CareSet:
    """Draw a recipe's target images, and find in them the companions that :func:`erase` would guard.

    Args:
        recipe: of which only the concept counts, its pictures and ``care_set``; a file named there is not read.
        base: draws, and confirms words.
        clip: proposes words.
        progress: told of every stage's steps.

    Raises:
        CareSetError: no word belongs to the concept.
    """
    afresh = recipe.care_set.model_copy(update={"file": None})
    alone = recipe.model_copy(update={"subject": None, "also": (), "care_set": afresh})
    with tempfile.TemporaryDirectory() as folder:
        (target,) = targets_of(Run(alone, Path(folder), base, clip, progress or NullProgress(), False))
        find_companions(target, draw_target(target), None)
    if target.care_set is None:
        raise CareSetError(f"nothing was found beside '{recipe.concept}'")
    return target.care_set
