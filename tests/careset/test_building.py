from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import (
    CareSet,
    build_care_set,
    concept_feature,
    guess_kind,
    plot_care_set,
    score_concept,
)
from recare_patch.careset.clip import Clip
from recare_patch.core.errors import CareSetError, ConceptError
from recare_patch.recipe.concept import Concept
from recare_patch.recipe.recipe import CareSetOptions

TENCH = Concept(text="tench", kind="object")


class WordClip:
    """A stand-in for CLIP: a text is the sum of its words' axes, a picture the words it is made of.

    Words in one group share most of their axis, as synonyms do.
    """

    id = "words"

    def __init__(self, groups: Sequence[Sequence[str]], filler: int = 40) -> None:
        self.groups = [*groups, *([f"filler{k}"] for k in range(filler))]
        self.words = [word for group in self.groups for word in group]
        generator = torch.Generator().manual_seed(0)
        width = 2 * len(self.groups) + 8
        self.axes: dict[str, Tensor] = {}
        for at, group in enumerate(self.groups):
            for word in group:
                own = 0.25 * torch.randn(width, generator=generator) / width**0.5
                own[at] += 1
                self.axes[word] = F.normalize(own, dim=0)
        self.width = width

    def vocabulary(self) -> tuple[list[str], list[tuple[str, str]]]:
        return list(self.words), [("ight", "a piece"), ("the", "a function word")]

    def text_features(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            parts = [self.axes[w] for w in text.lower().split() if w in self.axes]
            rows.append(F.normalize(sum(parts, torch.full((self.width,), 1e-3)), dim=0))
        return torch.stack(rows) if rows else torch.empty(0, self.width)

    def image_features(self, images: Sequence[Any], batch_size: int = 32) -> Tensor:
        return self.text_features([" ".join(words) for words in images])


def pictures(count: int = 40, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        words = ["tench"]
        for word, rate in (("angler", 0.8), ("water", 0.8), ("river", 0.7), ("person", 0.8)):
            if rng.random() < rate:
                words.append(word)
        found.append([*words, f"filler{k % 40}"])
    return found


GROUPS = (
    ["tench"],
    ["angler", "fisherman"],
    ["water", "river", "lake"],
    ["person", "man", "woman"],
    ["castle"],
)


@pytest.fixture(scope="module")
def clip() -> Any:
    return WordClip(GROUPS)


def build(clip: Any, images: Any = None, concept: Concept = TENCH, **options: Any) -> CareSet:
    return build_care_set(concept, pictures() if images is None else images, clip, CareSetOptions(**options))


def test_companions_are_found_and_the_name_is_not(clip: Any) -> None:
    found = build(clip, clustering=False, refinement=False)
    assert "tench" not in found.words
    assert set(found.words) <= {"angler", "fisherman", "water", "river", "lake", "person", "man", "woman"}
    assert {"water", "person", "angler"} <= set(found.words)
    reasons = {token.text: token.reason for token in found.tokens}
    assert reasons["tench"] == "names the concept"
    assert "not mined more often than by chance" in reasons.values()


def test_what_was_used_is_recorded(clip: Any) -> None:
    found = build(clip, file="mine.json")
    assert found.images == 40
    assert found.clip == "words"
    assert found.settings.tokens_per_image == round(1.25 * len(clip.words) ** 0.5)
    assert found.settings.keep == 2 * found.settings.tokens_per_image
    assert found.settings.file is None
    assert found.dropped == {"a piece": 1, "a function word": 1}
    assert any("clusters instead of 7" in note or "no clustering" in note for note in found.notes)


def test_every_dropped_token_has_a_reason(clip: Any) -> None:
    found = build(clip)
    assert found.words
    assert all(token.reason for token in found.tokens)
    assert all((token.reason == "kept") == token.kept for token in found.tokens)
    assert [t.count for t in found.tokens] == sorted((t.count for t in found.tokens), reverse=True)


def test_the_same_seed_gives_the_same_set(clip: Any) -> None:
    assert build(clip) == build(clip)


def test_given_numbers_are_obeyed(clip: Any) -> None:
    found = build(clip, tokens_per_image=3, keep=5)
    assert len(found.tokens) == 5
    assert sum(token.count for token in found.tokens) <= 3 * 40


def test_the_nearest_cluster_is_dropped() -> None:
    # The other spellings lie close to the name: only clustering can tell them from companions.
    clip = WordClip((["tench", "doctorfish", "tinca"], *GROUPS[1:]))
    images = [[*words, "doctorfish", "tinca"] for words in pictures(60)]
    with_it = build(clip, images, clustering=True, refinement=False)
    without = build(clip, images, clustering=False, refinement=False)
    assert {"doctorfish", "tinca"} <= set(without.words)
    assert not {"doctorfish", "tinca"} & set(with_it.words)
    assert with_it.words


def test_large_vocabularies_lose_the_farthest_cluster_too() -> None:
    clip = WordClip(GROUPS, filler=1_700)
    found = build(clip, refinement=False)
    assert any(token.reason.startswith("in the cluster farthest") for token in found.tokens)
    assert found.settings.tokens_per_image == 50


def test_one_picture_is_enough(clip: Any) -> None:
    assert build(clip, [["tench", "water"]]).words


def test_when_nothing_passes_chance_the_most_frequent_are_taken(clip: Any) -> None:
    found = build(clip, [[f"filler{k}"] for k in range(4)], tokens_per_image=10)
    assert found.words
    assert any("by chance" in note for note in found.notes)


def test_only_names_of_the_concept_is_an_error(clip: Any) -> None:
    with pytest.raises(CareSetError, match="name the concept itself"):
        build(clip, [["tench"]], tokens_per_image=1, keep=1)


def test_no_pictures_and_no_words_are_errors(clip: Any) -> None:
    with pytest.raises(CareSetError, match="needs target images"):
        build(clip, [])
    with pytest.raises(CareSetError, match="no whole word"):
        build(WordClip((), filler=0))


def test_the_concepts_feature_is_the_name_that_the_pictures_know(clip: Any) -> None:
    nudity = Concept(text="nudity", kind="nsfw")
    words = WordClip((["nude"], ["person"], ["beach"]))
    feature = concept_feature(nudity, words, words.image_features([["nude", "person"]]))  # type: ignore[arg-type]
    assert feature @ words.text_features(["nude person"])[0] > 0.99
    blind = concept_feature(TENCH, clip)
    assert blind.norm().item() == pytest.approx(1.0)


def test_progress_is_told(clip: Any) -> None:
    class Told:
        steps: list[tuple[int, int]] = []  # noqa: RUF012

        def update(self, stage: str, done: int, total: int, note: str = "") -> None:
            self.steps.append((done, total))

    told = Told()
    build_care_set(TENCH, pictures(), clip, progress=told)
    assert told.steps[0] == (0, 3)
    assert told.steps[-1] == (3, 3)


def test_pictures_of_the_concept_score_and_others_do_not() -> None:
    words = WordClip((["tench"], ["person"], ["house"], ["painting"], ["photo"]))
    drawn = score_concept([["tench", "photo"]] * 4, words, TENCH)  # type: ignore[list-item, arg-type]
    absent = score_concept([["house", "photo"]] * 4, words, TENCH)  # type: ignore[list-item, arg-type]
    assert (drawn.share, drawn.drawn) == (1.0, True)
    assert (absent.share, absent.drawn) == (0.0, False)
    assert drawn.margin > 0 > absent.margin
    assert not score_concept([], words, TENCH).drawn  # type: ignore[arg-type]


def test_kind_is_guessed_from_what_is_drawn() -> None:
    words = WordClip((["monet"], ["painting"], ["photo"], ["house"]))
    asked: list[str] = []

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        assert len(prompts) == len(seeds)
        asked.extend(prompts)
        return [["monet"] if "style" in prompt else ["house"] for prompt in prompts]

    def elsewhere(prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        return [["house"] if "style" in prompt else ["monet"] for prompt in prompts]

    assert guess_kind("monet", generate, words) == "style"  # type: ignore[arg-type]
    assert guess_kind("monet", elsewhere, words) == "object"  # type: ignore[arg-type]
    asked.clear()
    assert guess_kind("Nude", generate, words) == "nsfw"  # type: ignore[arg-type]
    assert asked == []
    with pytest.raises(ConceptError):
        guess_kind("  ", generate, words)  # type: ignore[arg-type]


def test_a_real_clip_builds_and_plots(tiny_clip: Path, tmp_path: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    found = build_care_set(Concept(text="Van Gogh", kind="style"), images, clip)
    assert found.words
    found.save(tmp_path / "care_set.json")
    read = CareSet.load(tmp_path / "care_set.json").with_added(["cypress trees"])
    plot_care_set(read, tmp_path / "map.png", clip)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    with pytest.raises(CareSetError, match="no tokens to draw"):
        plot_care_set(CareSet(concept=read.concept, tokens=()), tmp_path / "none.png", clip)
    assert not (tmp_path / "none.png").exists()
