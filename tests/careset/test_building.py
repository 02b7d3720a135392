"""From pictures to a CARE-set in the published way, with a stand-in for CLIP whose words mean what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recare_patch.careset import (
    CareSet,
    Clip,
    build_care_set,
    concept_feature,
    guess_kind,
    plot_care_set,
    score_concept,
)
from recare_patch.core import CareSetError, ConceptError
from recare_patch.recipe import CareSetOptions, Concept
from tests.careset.stand_ins import WordClip

TENCH = Concept(text="tench", kind="object")
COMPANIONS = (["angler", "fisherman"], ["water", "river", "lake"], ["person", "man", "woman"], ["castle"])


def pictures(count: int = 40) -> list[list[str]]:
    rng, rates = np.random.default_rng(0), {"angler": 0.8, "water": 0.8, "river": 0.7, "person": 0.8}
    return [
        ["tench", *(word for word, rate in rates.items() if rng.random() < rate), f"filler{k % 40}"]
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def clip() -> Any:
    return WordClip(["tench"], *COMPANIONS)


def build(clip: Any, images: Any = None, **options: Any) -> CareSet:
    published = CareSetOptions(source="clip", **options)
    return build_care_set(TENCH, pictures() if images is None else images, clip, published)


def test_companions_are_found_and_the_name_is_not(clip: Any) -> None:
    found = build(clip, clustering=False, refinement=False)
    assert {"water", "person", "angler"} <= set(found.words) <= {w for group in COMPANIONS for w in group}
    reasons = {token.text: token.reason for token in found.tokens}
    assert reasons["tench"] == "names the concept"
    assert "not mined more often than by chance" in reasons.values()


def test_what_was_used_is_recorded_and_every_token_has_a_reason(clip: Any) -> None:
    found = build(clip, file="mine.json")
    assert found == build(clip)
    assert (found.images, found.clip, found.settings.file) == (40, "words", None)
    assert found.settings.tokens_per_image == round(1.25 * len(clip.words) ** 0.5)
    assert found.settings.keep == 2 * found.settings.tokens_per_image
    assert found.dropped == {"a piece": 1, "a function word": 1}
    assert any("clusters instead of 7" in note or "no clustering" in note for note in found.notes)
    assert found.words
    assert all(token.reason and (token.reason == "kept") == token.kept for token in found.tokens)
    assert [t.count for t in found.tokens] == sorted((t.count for t in found.tokens), reverse=True)


def test_given_numbers_are_obeyed_and_progress_is_told(clip: Any) -> None:
    told: list[tuple[object, ...]] = []
    progress: Any = SimpleNamespace(update=lambda *given: told.append(given))
    options = CareSetOptions(source="clip", tokens_per_image=3, keep=5)
    found = build_care_set(TENCH, pictures(), clip, options, progress=progress)
    assert told == [("CARE-set", done, 3) for done in range(4)]
    assert len(found.tokens) == 5
    assert sum(token.count for token in found.tokens) <= 3 * 40


def test_the_nearest_cluster_is_dropped() -> None:
    # The other spellings lie close to the name: only clustering can tell them from companions.
    clip = WordClip(["tench", "doctorfish", "tinca"], *COMPANIONS)
    images = [[*words, "doctorfish", "tinca"] for words in pictures(60)]
    without, with_it = (build(clip, images, clustering=on, refinement=False) for on in (False, True))
    assert {"doctorfish", "tinca"} <= set(without.words)
    assert with_it.words and not {"doctorfish", "tinca"} & set(with_it.words)


def test_large_vocabularies_lose_the_farthest_cluster_too() -> None:
    found = build(WordClip(["tench"], *COMPANIONS, filler=1_700), refinement=False)
    assert any(token.reason.startswith("in the cluster farthest") for token in found.tokens)
    assert found.settings.tokens_per_image == 50


def test_few_or_odd_pictures_are_enough(clip: Any) -> None:
    assert build(clip, [["tench", "water"]]).words
    # Where nothing passes chance, the most frequent are taken.
    found = build(clip, [[f"filler{k}"] for k in range(4)], tokens_per_image=10)
    assert found.words and any("by chance" in note for note in found.notes)


def test_nothing_to_mine_is_an_error(clip: Any) -> None:
    with pytest.raises(CareSetError, match="name the concept itself"):
        build(clip, [["tench"]], tokens_per_image=1, keep=1)
    with pytest.raises(CareSetError, match="needs target images"):
        build(clip, [])
    with pytest.raises(CareSetError, match="no whole word"):
        build(WordClip(filler=0))


def test_the_concepts_feature_is_the_name_that_the_pictures_know(clip: Any) -> None:
    words: Any = WordClip(["nude"], ["person"], ["beach"])
    images = words.image_features([["nude", "person"]])
    feature = concept_feature(Concept(text="nudity", kind="nsfw"), words, images)
    assert feature @ words.text_features(["nude person"])[0] > 0.99
    assert concept_feature(TENCH, clip).norm().item() == pytest.approx(1.0)


def test_pictures_of_the_concept_score_and_others_do_not() -> None:
    words: Any = WordClip(["tench"], ["person"], ["house"], ["painting"], ["photo"])
    drawn, absent, none = (
        score_concept(images, words, TENCH)
        for images in ([["tench", "photo"]] * 4, [["house", "photo"]] * 4, [])  # type: ignore[list-item]
    )
    assert (drawn.share, drawn.drawn) == (1.0, True)
    assert (absent.share, absent.drawn) == (0.0, False)
    assert drawn.margin > 0 > absent.margin
    assert not none.drawn


def test_kind_is_guessed_from_what_is_drawn() -> None:
    words: Any = WordClip(["monet"], ["painting"], ["photo"], ["house"])
    asked: list[str] = []

    def drawn_as(style: str, other: str) -> Any:
        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
            assert len(prompts) == len(seeds)
            asked.extend(prompts)
            return [[style] if "style" in prompt else [other] for prompt in prompts]

        return generate

    assert guess_kind("monet", drawn_as("monet", "house"), words) == "style"
    assert guess_kind("monet", drawn_as("house", "monet"), words) == "object"
    assert len(asked) == 2 * 3 * 6
    assert guess_kind("Nude", drawn_as("monet", "house"), words) == "nsfw"
    assert len(asked) == 2 * 3 * 6
    with pytest.raises(ConceptError):
        guess_kind("  ", drawn_as("monet", "house"), words)


@pytest.mark.parametrize("source", ["base", "clip"])
def test_a_real_clip_builds_and_plots(tiny_clip: Path, tmp_path: Path, source: str) -> None:
    clip = Clip.load(str(tiny_clip))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    found = build_care_set(Concept(text="Van Gogh", kind="style"), images, clip, CareSetOptions(source=source))
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
