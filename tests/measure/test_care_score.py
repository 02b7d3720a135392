from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import CareSetError
from recare_patch.measure.care_score import care_hits, care_score
from recare_patch.measure.labels import COCO_CLASSES, DISTRACTORS


class TableClip:
    """Features looked up in a table; unknown texts get a random but fixed direction."""

    def __init__(self, width: int = 12) -> None:
        self.width = width
        self.asked: list[str] = []

    def _row(self, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31)
        return F.normalize(torch.randn(self.width, generator=generator), dim=0)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.stack([self._row(t) for t in texts]) if texts else torch.empty(0, self.width)

    def image_features(self, images: Sequence[Any]) -> Tensor:
        return torch.stack([F.normalize(self._row(a) + 0.9 * self._row(b), dim=0) for a, b in images])


def brute_score(clip: TableClip, images: Sequence[Any], word: str, labels: Sequence[str]) -> float:
    """The definition, picture by picture: is the arg max over {w*} and O the word?"""
    hits = 0
    choices = [word, *(label for label in labels if label != word)]
    for image in clip.image_features(images):
        cosines = [float(image @ clip._row(choice)) for choice in choices]
        hits += cosines.index(max(cosines)) == 0
    return hits / len(images)


@pytest.mark.parametrize("word", ["stars", "beach", "person"])
def test_score_equals_its_definition(word: str) -> None:
    clip = TableClip()
    images = [(word, label) for label in (*COCO_CLASSES[:20], "boat")]
    wanted = brute_score(clip, images, word, DISTRACTORS)
    assert care_score(images, word, None, clip) == pytest.approx(wanted)  # type: ignore[arg-type]
    assert 0 < wanted <= 1


def test_the_word_does_not_compete_with_itself() -> None:
    clip = TableClip()
    assert care_score([("car", "car")], " car ", ["Car", "boat"], clip) == 1.0  # type: ignore[arg-type, list-item]
    assert clip.asked == ["car", "boat"]


def test_without_distractors_every_picture_is_a_hit() -> None:
    clip = TableClip()
    assert care_score([("a", "b")], "c", [], clip) == 1.0  # type: ignore[arg-type, list-item]


def test_ties_count_for_the_word() -> None:
    feature = torch.tensor([1.0, 0.0])
    assert care_hits(feature[None], feature, feature[None]).tolist() == [True]


def test_bad_input() -> None:
    clip = TableClip()
    with pytest.raises(CareSetError, match="needs pictures"):
        care_score([], "stars", None, clip)  # type: ignore[arg-type]
    with pytest.raises(CareSetError, match="needs a word"):
        care_score([("a", "b")], "  ", None, clip)  # type: ignore[arg-type, list-item]


def test_labels() -> None:
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[9], COCO_CLASSES[-1]) == ("person", "traffic light", "toothbrush")
    assert (*COCO_CLASSES, "stars", "freshwater") == DISTRACTORS
