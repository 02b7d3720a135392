"""Whether pictures show the concept at all, and what kind of concept a name is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recare_patch.recipe import Concept, Kind

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset.clip import Clip

_MEDIA = ("A photo", "A painting")
_PEOPLE = ("A photo of a person", "A photo of a man", "A photo of a woman")
_PLACES = ("A photo of a house", "A photo of a tree", "A photo of a street")
_NEUTRAL: dict[str, tuple[str, ...]] = {
    "style": (*_MEDIA, "An oil painting", "A sketch", "A painting of a person", "A painting of a house"),
    "object": (*_MEDIA, *_PEOPLE[:1], *_PLACES),
    "identity": (*_MEDIA, *_PEOPLE, *_PLACES[:1]),
    "nsfw": (*_MEDIA, *_PEOPLE, *_PLACES[:1]),
}
"""What a base draws that does not know the concept: the medium, and the plainest subjects."""

_THRESHOLD = 0.5
_GUESSED: tuple[Kind, ...] = ("style", "object", "identity")


@dataclass(frozen=True)
class ConceptScore:
    """How well pictures show a concept.

    Attributes:
        share: share of the pictures that are more like a name of the concept than like any plain
            description without it, 0 to 1.
        margin: mean difference of the two cosines.
        threshold: the share below which the base is taken not to draw the concept.
    """

    share: float
    margin: float
    threshold: float = _THRESHOLD

    @property
    def drawn(self) -> bool:
        """Whether enough of the pictures show the concept."""
        return self.share >= self.threshold


def score_concept(images: Sequence[Image], clip: Clip, concept: Concept) -> ConceptScore:
    """Measure whether pictures show a concept rather than anything plain.

    Args:
        images: its target images.
        clip: compares them with texts.
        concept: what they should show.

    Returns:
        The score; 0 for no pictures.
    """
    if not len(images):
        return ConceptScore(0.0, 0.0)
    seen = clip.image_features(images)
    own = [name for name in concept.name_prompts if name != concept.text] or [concept.text]
    best = (seen @ clip.text_features(own).T).amax(1)
    plain = (seen @ clip.text_features(_NEUTRAL[concept.kind]).T).amax(1)
    margin = best - plain
    return ConceptScore(float((margin > 0).float().mean()), float(margin.mean()))


def guess_kind(
    text: str,
    generate: Callable[[Sequence[str], Sequence[int]], Sequence[Image]],
    clip: Clip,
    *,
    seed: int = 0,
    count: int = 6,
) -> Kind:
    """The kind whose prompt template draws a concept best.

    Words for nudity are of kind "nsfw" without drawing anything. Otherwise a few pictures are drawn
    with each template at the same seeds, and the kind wins whose pictures are most like the name.

    Args:
        text: the concept's name.
        generate: draws one picture for each prompt and seed.
        clip: compares pictures with the name.
        seed: of the first picture.
        count: pictures a kind.

    Raises:
        ConceptError: the name is empty or too long.
    """
    if "nude" in Concept(text=text, kind="nsfw").words:
        return "nsfw"
    concepts = [Concept(text=text, kind=kind) for kind in _GUESSED]
    seeds = list(range(seed, seed + count))
    images = list(generate([c.target_prompt for c in concepts for _ in seeds], seeds * len(concepts)))
    name = clip.text_features([text])[0]
    scores = (clip.image_features(images) @ name).view(len(concepts), count).mean(1)
    # Templates that draw the same thing differ by noise: the first of them is the plainer reading.
    close = (scores >= scores.max() - 0.01).nonzero().flatten()
    return _GUESSED[int(torch.min(close))]
