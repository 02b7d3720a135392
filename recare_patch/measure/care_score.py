"""The CARE score: are benign companions of an erased concept still drawn?

Kim et al., "ReCARE", arXiv 2606.24192, section 4: with benign prompts about a CARE-concept ``w*``,
the share of pictures that CLIP finds most like ``w*`` among it and a set of distractor labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from recare_patch.core import CareSetError
from recare_patch.measure.labels import DISTRACTORS

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset import Clip


def care_hits(image_features: Tensor, word_feature: Tensor, distractor_features: Tensor) -> Tensor:
    """Which pictures are more like the word than like any distractor.

    Args:
        image_features: ``[images, width]``, unit rows.
        word_feature: ``[width]``, unit vector of ``w*``.
        distractor_features: ``[labels, width]``, unit rows of ``O`` without ``w*``.

    Returns:
        ``[images]`` bool. A tie counts for the word, as it stands first in the arg max.
    """
    own = image_features @ word_feature
    if not len(distractor_features):
        return own == own
    return own >= (image_features @ distractor_features.T).amax(1)


def care_score(images: Sequence[Image], word: str, labels: Sequence[str] | None, clip: Clip) -> float:
    """``(1/S) Σ_s 1[argmax_{w ∈ {w*} ∪ O} cos(CLIP(x_s), CLIP(w)) = w*]``.

    Args:
        images: the S pictures ``x_s``, drawn from benign prompts about the word.
        word: the CARE-concept ``w*``.
        labels: the distractors ``O``; the word itself does not compete with itself, whatever its
            case. None: :data:`DISTRACTORS`.
        clip: compares pictures with words; the paper's is ViT-B/32.

    Returns:
        A share, 0 to 1.

    Raises:
        CareSetError: no pictures or no word.
    """
    word = word.strip()
    if not word:
        raise CareSetError("the CARE score needs a word, got an empty one")
    if not len(images):
        raise CareSetError(f"the CARE score of '{word}' needs pictures, and none were given")
    others = [
        label
        for label in (DISTRACTORS if labels is None else labels)
        if label.strip().casefold() != word.casefold()
    ]
    hits = care_hits(clip.image_features(images), clip.text_features([word])[0], clip.text_features(others))
    return float(hits.float().mean())
