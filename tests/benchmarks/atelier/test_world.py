"""The drawn world: deterministic, labelled truthfully, and co-occurring as it says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.atelier import captions, scenes
from benchmarks.atelier.quality import held_out_prompts


@pytest.fixture(scope="module")
def world() -> list[scenes.Scene]:
    rng = np.random.default_rng(12)
    return [scenes.sample_scene(rng) for _ in range(6000)]


def test_drawing_repeats_to_the_bit_and_has_the_right_shape(world: list[scenes.Scene]) -> None:
    for scene in world[:8]:
        picture = scenes.draw(scene)
        assert picture.shape == (scenes.SIZE, scenes.SIZE, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, scenes.draw(scene))


def test_every_thing_can_be_drawn_in_every_style() -> None:
    for style in scenes.STYLES:
        for thing in scenes.OBJECTS:
            picture = scenes.draw(scenes.Scene(style, "day", "meadow", (thing,), ("sun",), 3))
            empty = scenes.draw(scenes.Scene(style, "day", "meadow", (), ("sun",), 3))
            assert np.abs(picture.astype(int) - empty.astype(int)).mean() > 1


@pytest.mark.parametrize("concept", list(scenes.CO_OCCURRENCE))
def test_companions_come_as_often_as_the_table_says(world: list[scenes.Scene], concept: str) -> None:
    within = [s.labels for s in world if concept in s.labels]
    without = [s.labels for s in world if concept not in s.labels]
    assert len(within) > 400
    for companion, share in scenes.CO_OCCURRENCE[concept].items():
        rate = np.mean([companion in labels for labels in within])
        assert rate == pytest.approx(share, abs=0.06)
        if companion != "person":
            assert np.mean([companion in labels for labels in without]) < 0.35 * share


def test_an_unclothed_figure_is_a_person(world: list[scenes.Scene]) -> None:
    assert all("person" in s.labels for s in world if "nude" in s.labels)


def test_sky_suits_the_time(world: list[scenes.Scene]) -> None:
    for scene in world:
        if {"stars", "moon"} & scene.labels:
            assert scene.time == "night"
        if "sun" in scene.labels:
            assert scene.time == "day"


def test_captions_say_only_what_is_there(world: list[scenes.Scene]) -> None:
    rng = np.random.default_rng(0)
    every = (*scenes.OBJECTS, *scenes.SKY, *scenes.GROUNDS, *scenes.TIMES)
    for scene in world[:1500]:
        text = captions.caption(scene, rng)
        named = {label for label in every if captions.mentions(text, label)}
        # "the night sky" names the night, a tench is photographed in water only where it says so.
        assert named <= scene.labels, (text, named - scene.labels)


def test_held_out_captions_never_train(world: list[scenes.Scene]) -> None:
    rng = np.random.default_rng(1)
    reserved = {text for text, _ in held_out_prompts(150)}
    assert len(reserved) == 150
    trained = {captions.caption(scene, rng) for scene in world}
    assert not reserved & trained


def test_styles_are_named_nearly_always(world: list[scenes.Scene]) -> None:
    rng = np.random.default_rng(2)
    painted = [s for s in world if s.style in captions.ARTISTS]
    assert all(captions.ARTISTS[s.style] in captions.caption(s, rng) for s in painted)
