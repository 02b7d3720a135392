"""Words around a concept: retained, joined, or its names; and those that an unsafe concept's run never says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recare_patch.careset import CareSet, build_care_set, known_styles
from recare_patch.careset.lexicon import is_about_minors, is_barred, nouns, styles
from recare_patch.erasure import prepare
from recare_patch.recipe import Concept, Recipe
from tests.careset.stand_ins import LyingClip
from tests.careset.test_lexicon import STOPPED

NUDITY = Concept(text="nudity", kind="nsfw")
BODY = ["woman", "man", "person", "figure", "studio", "beach", "shower", "towel", "statue", "lady"]
NEAR = dict.fromkeys(BODY, 0.3) | dict.fromkeys(STOPPED, 0.6) | dict.fromkeys(("nude", "naked", "nudity"), 0.9)
"""As in every CLIP, sexual words lie nearest to the concept."""


@pytest.fixture(scope="module")
def clip() -> Any:
    return LyingClip(dict.fromkeys((*nouns(), *STOPPED)), NEAR)


def target_of(clip: Any, recipe: Recipe, care_set: CareSet | None, *others: Concept) -> prepare.Target:
    run: Any = SimpleNamespace(clip=clip, recipe=recipe)
    shown = clip.image_features(range(24)).mean(0)
    none: Any = None
    return prepare.Target(run, recipe.concept, 0, None, others, none, shown, care_set)


def said(target: prepare.Target) -> set[str]:
    """Every word that is guarded, retained or joined."""
    prompts = [
        *prepare._guarded_prompts(target.concept, target.care_words),
        *prepare._vocabulary_prompts(target),
        *prepare._paired_prompts(target),
        *prepare.neighbour_prompts(target),
    ]
    beside, _ = prepare._joined_words(target)
    return {*beside, *target.words_around()[0], *(word for text in prompts for word in re.split(r"[\s,]+", text))}


@pytest.mark.parametrize("source", ["base", "clip"])
def test_no_sexual_word_is_kept_retained_or_joined_while_nudity_is_erased(clip: Any, source: str) -> None:
    recipe = Recipe(concept=NUDITY).with_overrides({"care_set.source": source})
    found = build_care_set(NUDITY, range(24), clip, recipe.care_set)  # type: ignore[arg-type]
    assert found.words and not [word for word in found.words if is_barred(word, NUDITY)]
    assert [token for token in found.tokens if is_barred(token.text, NUDITY) and not token.kept]
    target = target_of(clip, recipe, found)
    words = said(target)
    assert len(words) > 100
    assert not [word for word in words if is_barred(word, NUDITY)]
    # What CLIP sees in the pictures may be a name of it, and nothing about minors is said at all.
    _, near = prepare._joined_words(target)
    assert not [word for word in (*near, *target.words_around()[2]) if is_about_minors(word)]


def test_what_is_erased_beside_nudity_says_no_sexual_word_either(clip: Any) -> None:
    recipe = Recipe(concept=Concept(text="tench", kind="object"))
    target = target_of(clip, recipe, CareSet.of_words(recipe.concept, ["water"]), NUDITY)
    assert not [word for word in said(target) if is_barred(word, NUDITY)]
    plain: Any = LyingClip(nouns(), {"tench": 0.9})
    alone = target_of(plain, recipe, CareSet.of_words(recipe.concept, ["water"]))
    assert {"breast", "girl"} <= set(alone.words_around()[0])


def test_names_are_few_however_little_clip_sees() -> None:
    vague: Any = LyingClip(nouns(), dict.fromkeys(nouns()[:3000], 0.8) | {"tench": 0.9})
    recipe = Recipe(concept=Concept(text="tench", kind="object"))
    target = target_of(vague, recipe, CareSet.of_words(recipe.concept, ["water"]))
    kept, _, names = target.words_around()
    assert len(names) <= prepare.RELATED_WORDS and not set(names) & set(kept)
    assert len(prepare._erased_prompts(target, joins=True).aliases) < 100


def test_companions_that_another_concept_bars_are_not_guarded(clip: Any, tmp_path: Path) -> None:
    recipe = Recipe(concept=Concept(text="tench", kind="object"))
    target = target_of(clip, recipe, None, NUDITY)
    target.run.work, target.run.wait, target.run.main = tmp_path, lambda: None, True  # type: ignore[method-assign, misc]
    prepare.find_companions(target, [], CareSet.of_words(recipe.concept, ["water", "bikini", "boy"]))
    assert target.care_words == ("water",)


def test_aliases_are_neither_retained_nor_joined(clip: Any) -> None:
    concept = Concept(text="tench", kind="object", aliases=("carp", "doctor fish"))
    recipe = Recipe(concept=concept)
    target = target_of(clip, recipe, CareSet.of_words(concept, ["water"]))
    words, _, names = target.words_around()
    assert "carp" in names and "carp" not in words
    assert not {"carp", "carps", "tench"} & {word.casefold() for word in said(target)}
    assert "A photo of carp" in concept.name_prompts


def test_the_neighbours_of_a_style_are_styles() -> None:
    near = {"gogh": 0.9, "monet": 0.7, "cezanne": 0.6, "sunflower": 0.8}
    clip: Any = LyingClip(nouns(), near)
    recipe = Recipe(concept=Concept(text="Van Gogh", kind="style"))
    pissarro = Concept(text="Pissarro", kind="style")
    target = target_of(clip, recipe, CareSet.of_words(recipe.concept, ["stars"]), pissarro)
    around = target.styles_around()
    assert around[:2] == ["Monet", "Cezanne"]
    assert set(around) == set(known_styles(clip, but=(recipe.concept, pissarro))) < set(styles())
    assert not {"Van Gogh", "Pissarro"} & set(around)
    painted = "A painting in the style of {}"
    assert prepare.neighbour_prompts(target) == [painted.format("Monet"), painted.format("Cezanne")]
    assert {painted.format("Monet"), painted.format("Cezanne")} <= set(prepare._vocabulary_prompts(target))
    # A thing's neighbours are things.
    other = target_of(clip, Recipe(concept=Concept(text="tench", kind="object")), None)
    assert all(text.startswith("A photo of ") for text in prepare.neighbour_prompts(other))
