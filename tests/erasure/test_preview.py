"""The pictures of a finished run: what CLIP sees in them, and when that is a warning."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from recare_patch.careset import CareSet
from recare_patch.erasure import EraseResult, prepare, preview
from recare_patch.erasure.preview import EACH, Seen
from recare_patch.recipe import Recipe
from tests.erasure.making import STARS_FROM_VAN_GOGH

Scene = Callable[..., EraseResult]


@pytest.fixture
def scene(small: Callable[..., Recipe], run: Callable[..., EraseResult], monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A run with a preview in which CLIP sees what it is told: text → pictures before and after."""

    def make(method: str, told: dict[str, tuple[int, int]], words: Sequence[str] = (), **changes: Any) -> EraseResult:
        asked: list[str] = []

        def shows(images: Sequence[Any], clip: Any, own: Sequence[str], rivals: Sequence[str]) -> list[bool]:
            assert set(own).isdisjoint(rivals) and len(images) == EACH
            count = told.get(own[0], (0, 0))[asked.count(own[0])]
            asked.append(own[0])
            return [k < count for k in range(EACH)]

        monkeypatch.setattr(preview, "shows", shows)
        # What is erased is compared with pictures of its own.
        monkeypatch.setattr(
            prepare, "sees", lambda target, images: shows(images, None, target.concept.name_prompts, ())
        )
        recipe = small(method, **{"erase.steps": 1, "search.rounds": 0, "erase.ends": "steps", **changes})
        care_set = CareSet.of_words(recipe.concept, list(words)) if words else None
        return run(recipe, preview=True, care_set=care_set)

    return make


OWN, STARS = "A painting in the style of Van Gogh", "A painting of stars"


def test_what_is_seen_is_a_sentence() -> None:
    assert str(Seen("kept", "stars", 4, 3, 4)) == "stars in 3 of 4 pictures, before 4 of 4"


def test_everything_is_told_and_faults_are_warnings(scene: Scene) -> None:
    result = scene("recare", {OWN: (3, 2), STARS: (4, 1)}, ["stars", "night"])
    told = json.loads((result.folder / "training.json").read_text())
    rows = [(one["role"], one["what"], one["before"], one["after"], one["of"]) for one in told["seen"]]
    assert rows[:3] == [("erased", "Van Gogh", 3, 2, 4), ("kept", "stars", 4, 1, 4), ("kept", "night", 0, 0, 4)]
    assert {role for role, *_ in rows[3:]} == {"neighbour"}
    assert not any(what.startswith("A p") for _, what, *_ in rows)
    found = [one for one in result.warnings if "CLIP" in one]
    assert found == told["warnings"][-2:]
    assert found[0].startswith("CLIP still sees Van Gogh in 2 of 4 pictures, before 3 of 4; look at preview.png")
    assert found[1] == "a companion has suffered: CLIP sees stars in 1 of 4 pictures, before 4 of 4"


def test_what_clip_did_not_see_before_is_no_fault(scene: Scene) -> None:
    # Of the concept one picture of four may be taken for it, and of a companion half may go.
    result = scene("recare", {OWN: (4, 1), STARS: (4, 2), "A painting of night": (3, 0)}, ["stars", "night"])
    assert not [one for one in result.warnings if "CLIP" in one]
    seen = {one["what"]: (one["before"], one["after"]) for one in result.cost["seen"]}
    assert (seen["Van Gogh"], seen["stars"], seen["night"]) == ((4, 1), (4, 2), (3, 0))


def test_an_attribute_is_looked_for_in_the_subject(scene: Scene) -> None:
    asked = "A painting of stars in the style of Van Gogh"
    result = scene("esd", {asked: (4, 4)}, **STARS_FROM_VAN_GOGH)
    assert result.cost["seen"][0] == {"role": "erased", "what": "stars", "before": 4, "after": 4, "of": 4}
    assert any("CLIP still sees stars in 4 of 4" in one for one in result.warnings)


def test_the_replaced_is_looked_for_too(scene: Scene) -> None:
    result = scene("esd", {OWN: (4, 0)}, replace_with="Monet")
    assert result.cost["seen"][0]["role"] == "replaced"
    assert not [one for one in result.warnings if "CLIP" in one]
