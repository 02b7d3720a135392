"""A CARE-set from pictures of a concept, by the words that the base confirms or as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recare_patch.careset.care_set import CareSet
from recare_patch.careset.companions import BaseReading, judge_words
from recare_patch.careset.mining import concept_feature, mined_care_set
from recare_patch.core import CareSetError, NullProgress
from recare_patch.recipe import CareSetOptions, Concept

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from recare_patch.careset.clip import Clip
    from recare_patch.core import Progress
    from recare_patch.models import BaseModel


def build_care_set(
    concept: Concept,
    images: Sequence[Image],
    clip: Clip,
    options: CareSetOptions | None = None,
    *,
    base: BaseModel | None = None,
    latents: Tensor | None = None,
    others: Sequence[Image] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> CareSet:
    """Find the benign concepts that come along with a concept in pictures of it from the untouched base.

    Args:
        concept: whose companions are sought.
        images: pictures of it.
        clip: proposes words.
        options: how; with ``source: clip`` the set is mined as published, and the rest is not looked at.
        base: confirms words; None: CLIP decides alone.
        latents: the pictures' clean latents, ``[pictures, c, h, w]``; the base needs them.
        others: pictures of :data:`OTHER_PROMPTS` in turn; where there are none, plain words stand in for them.
        seed: of what is drawn by lot.
        progress: told of three steps.

    Raises:
        CareSetError: no images, no word known, or nothing but names of the concept found.
    """
    options, progress = options or CareSetOptions(), progress or NullProgress()
    if options.source == "clip":
        return mined_care_set(concept, images, clip, options, seed=seed, progress=progress)
    if not len(images):
        raise CareSetError(f"a CARE-set for '{concept}' needs target images, and none were given")
    progress.update("CARE-set", 0, 3)
    seen = clip.image_features(images)
    elsewhere = clip.image_features(others)
    progress.update("CARE-set", 1, 3)
    reading = BaseReading(base, latents, concept, seed=seed) if base is not None and latents is not None else None
    u = concept_feature(concept, clip, seen)
    tokens, notes = judge_words(concept, clip, seen, elsewhere, u, reading=reading, seed=seed, keep=options.keep)
    progress.update("CARE-set", 3, 3)
    if not any(token.kept for token in tokens):
        raise CareSetError(
            f"no word that CLIP '{clip.id}' sees in the pictures of '{concept}' belongs to it: draw more target "
            "images, or give words of your own with --care-set"
        )
    return CareSet(
        concept=concept,
        clip=clip.id,
        seed=seed,
        images=len(images),
        settings=options.model_copy(update={"file": None}),
        tokens=tuple(tokens),
        notes=tuple(notes),
    )
