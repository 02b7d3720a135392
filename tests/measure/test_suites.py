"""Suites: what the bundled ones hold, what is refused, and which one a patch gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.suites import CONCEPTS, FIRST_SEED
from benchmarks.suites import suite as benchmark_suite
from recare_patch.core import EvaluationError, UnknownNameError
from recare_patch.measure.judges import can_tell, load_detector
from recare_patch.measure.suites import (
    ConceptBench,
    Suite,
    SuiteInfo,
    default_suite,
    find_suite_for,
    list_suites,
    load_suite,
    suites_folder,
)
from recare_patch.recipe import Concept, Recipe, load_recipe
from tests.measure.making import SUITE

ALL = list_suites()
SEVERAL = [info for info in ALL if info.bench]
ONE = [info for info in ALL if not info.bench]


def loaded(info: SuiteInfo) -> list[Suite]:
    return [load_suite(info.name, concept=concept) for concept in info.concepts]


def all_prompts(suite: Suite) -> list[str]:
    sets = [suite.plain, suite.paraphrased, suite.implicit, suite.retained]
    sets += [one.prompts for one in (*suite.care, *suite.neighbours)]
    return [prompt for prompts in sets for prompt in prompts]


# ------------------------------------------------------------------------ the bundled ones


def test_the_bundled_suites_are_all_there() -> None:
    assert {info.name for info in ONE} == {
        f"{concept}-{base}" for concept in ("van-gogh", "tench", "nudity") for base in ("atelier", "sd")
    }
    assert {info.name for info in SEVERAL} == {
        f"conceptbench-{group}-{base}"
        for group in ("identity", "object", "style")
        for base in ("atelier", "sd")
    }
    assert suites_folder().parent.name in ("recipes", "_recipes")


@pytest.mark.parametrize("info", ALL, ids=lambda info: info.name)
def test_a_bundled_suite_is_sound(info: SuiteInfo) -> None:
    text = info.path.read_text(encoding="utf-8")
    assert text.startswith("# recare-patch evaluate --patch ") and f"--suite {info.name}" in text
    for suite in loaded(info):
        assert suite.name == info.name and suite.base == info.base
        assert suite.plain and suite.retained and suite.neighbours
        assert Suite.from_yaml(suite.to_yaml()) == suite


@pytest.mark.parametrize("info", ONE, ids=lambda info: info.name)
def test_a_suite_names_and_paraphrases_and_hints_and_guards(info: SuiteInfo) -> None:
    suite = load_suite(info.name)
    assert min(map(len, (suite.plain, suite.paraphrased, suite.implicit))) >= 8
    assert len(suite.care) >= 2
    assert not set(suite.plain) & set(suite.paraphrased)


@pytest.mark.parametrize("info", [i for i in ALL if i.base == "atelier"], ids=lambda info: info.name)
def test_atelier_suites_are_apart_from_the_choosing_of_settings(info: SuiteInfo) -> None:
    draws = [
        draw for c in CONCEPTS for figure in benchmark_suite(c, "choose") for draw in figure.draws("choose")
    ]
    chosen = {prompt.casefold() for prompt, _, _ in draws}
    for suite in loaded(info):
        assert not chosen & {prompt.casefold() for prompt in all_prompts(suite)}
        seeds = suite.drawing("retained", 500).seeds
        assert min(seeds) > max(seed for _, _, seed in draws) > FIRST_SEED["choose"]


@pytest.mark.parametrize("info", [i for i in ALL if i.base == "atelier"], ids=lambda info: info.name)
def test_the_judge_knows_every_label_of_atelier(info: SuiteInfo) -> None:
    judge = load_detector("atelier-judge")
    for suite in loaded(info):
        assert suite.detector == "atelier-judge"
        for label in (suite.label, *(one.label for one in (*suite.care, *suite.neighbours))):
            assert can_tell(judge, label), label


def test_no_prompt_of_nudity_is_anything_but_clinical() -> None:
    harmful = ("child", "girl", "boy", "teen", "young", "sex", "porn", "erotic", "kid", "minor", "explicit")
    for name in ("nudity-atelier", "nudity-sd"):
        for prompt in all_prompts(load_suite(name)):
            assert not [word for word in harmful if word in prompt.casefold().split()], prompt


def test_the_three_atelier_suites_share_what_they_can() -> None:
    van_gogh, tench, nudity = (load_suite(f"{c}-atelier") for c in ("van-gogh", "tench", "nudity"))
    assert van_gogh.drawing("retained", 30) == tench.drawing("retained", 30) == nudity.drawing("retained", 30)
    assert tench.drawing("neighbours", 30) == nudity.drawing("neighbours", 30)
    assert tench.care_drawing(0, 30) == nudity.care_drawing(0, 30)


# ------------------------------------------------------------------------ what is drawn


def test_prompts_take_turns_and_fewer_pictures_are_the_first_of_more() -> None:
    suite = Suite(**SUITE)
    drawing = suite.drawing("plain", 5)
    assert drawing.prompts == (*SUITE["plain"], *SUITE["plain"], SUITE["plain"][0])
    assert len(set(drawing.seeds)) == 5 and set(drawing.labels) == {"van gogh"}
    fewer = suite.drawing("plain", 3)
    assert (fewer.prompts, fewer.seeds) == (drawing.prompts[:3], drawing.seeds[:3])
    assert suite.with_changes(implicit=()).drawing("implicit", 5).prompts == ()


def test_neighbours_have_a_turn_each_before_any_has_a_second() -> None:
    changed = Suite(
        **{
            **SUITE,
            "neighbours": [
                {"label": "a", "prompts": ["a one", "a two"]},
                {"label": "b", "prompts": ["b one"]},
            ],
        }
    )
    drawing = changed.drawing("neighbours", 5)
    assert drawing.prompts == ("a one", "b one", "a two", "b one", "a one")
    assert drawing.labels == ("a", "b", "a", "b", "a")


def test_no_two_sets_share_a_seed() -> None:
    suite = Suite(**SUITE)
    drawings = [
        suite.drawing(which, 200) for which in ("plain", "paraphrased", "implicit", "retained", "neighbours")
    ]
    drawings.append(suite.care_drawing(0, 200))
    seeds = [seed for drawing in drawings for seed in drawing.seeds]
    assert len(set(seeds)) == len(seeds) == 1200
    assert suite.block("memorization") not in seeds


def test_a_care_concept_may_have_a_word_of_its_own() -> None:
    suite = Suite(
        **{**SUITE, "care": [{"label": "water", "word": "freshwater", "prompts": ["a photo of water"]}]}
    )
    assert suite.care[0].clip_word == "freshwater" and Suite(**SUITE).care[0].clip_word == "stars"


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"plane": []}, "plane is not a key, did you mean 'plain'"),
        ({"detector": "nudenet"}, "unknown detector 'nudenet'.*did you mean 'nudenet-[69]'"),
        ({"kind": "styl"}, "did you mean 'style'"),
        ({"plain": [""]}, "a prompt needs a word"),
        ({"plain": ["x" * 1001]}, "1000 characters"),
        ({"plain": ["a", "a"]}, "'a' is there twice"),
        (
            {"implicit": ["a house by VAN  GOGH."]},
            "the implicit prompt 'a house by VAN GOGH.' names the concept",
        ),
        (
            {"detector_options": {"labels": ["Monet", "van goh"]}},
            "label set does not hold the target's label 'van gogh'; did you mean 'van goh'",
        ),
        (
            {"care": [{"label": "stars", "prompts": ["a"]}, {"label": "Stars", "prompts": ["b"]}]},
            "CARE concept 'stars' is there twice",
        ),
        ({"care": [{"label": "stars", "prompts": []}]}, "care.0.prompts"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"version": 2}, "version"),
        ({"plain": [], "care": [], "neighbours": [], "retained": []}, "there is no prompt to draw"),
    ],
)
def test_faults_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EvaluationError, match=told):
        Suite(**{**SUITE, **changes})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "must be a mapping"),
        ("name: [", "is not readable YAML"),
        ("name: a\nname: b\n", "'name' is there twice in line 2"),
        ("name: a\nlabel: b\n", "kind is missing"),
        ("name: a\nconcepts: []\n", "group is missing"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_faulty_file_is_told_of(tmp_path: Path, text: str | bytes, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EvaluationError, match=told):
        load_suite(file)


def test_an_unknown_suite_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nudity-atelier'"):
        load_suite("nudty-atelier")
    with pytest.raises(UnknownNameError):
        load_suite("x" * 5000)
    assert load_suite("Van Gogh") == load_suite("van-gogh-atelier")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"version": 1, **SUITE}))
    assert load_suite(tmp_path / "mine.yaml") == Suite(**SUITE)


# ------------------------------------------------------------------------ which one


def test_the_suite_of_a_concept_is_found_by_base() -> None:
    for base, name in (("atelier", "van-gogh-atelier"), ("CompVis/stable-diffusion-v1-4", "van-gogh-sd")):
        found = find_suite_for(Concept(text="van gogh", kind="style"), base)
        assert found is not None and found.name == name
    assert find_suite_for("Rembrandt", "atelier") is None


def test_a_suite_is_made_where_none_was_written() -> None:
    recipe = Recipe(concept=Concept(text="Monet", kind="style"))
    suite = default_suite(recipe, ["water", "boat", "sun", "meadow", "snow"])
    assert (suite.detector, suite.label, suite.base) == ("atelier-judge", "monet", "atelier")
    assert [one.label for one in suite.care] == ["water", "boat", "sun", "meadow"]
    assert suite.plain == recipe.concept.name_prompts and not suite.implicit
    for kind, text in (("style", "Rembrandt"), ("object", "teapot"), ("identity", "Ada"), ("nsfw", "nudity")):
        recipe = Recipe(concept=Concept(text=text, kind=kind), base="owner/model")  # type: ignore[arg-type]
        suite = default_suite(recipe, [])
        assert suite.detector == "clip" and suite.base == "stable-diffusion"
        labels = suite.detector_options.get("labels")
        assert labels is None or suite.label in labels
    assert default_suite(load_recipe("nudity"), []).label == "nude"


def test_a_bench_gives_each_concept_a_suite() -> None:
    suite = load_suite("conceptbench-object-atelier", concept="Tench")
    assert suite.label == "tench" and "a photograph of a tench" in suite.plain
    assert {one.label for one in suite.neighbours} >= {"house", "cat"} - {"tench"}
    assert "tench" not in {one.label for one in suite.neighbours}
    # Of a concept from elsewhere, all of the bench must stay.
    other = load_suite("conceptbench-object-atelier", concept="Van Gogh", kind="style")
    assert not other.plain and len(other.neighbours) == len(suite.neighbours) + 1
    assert (other.concept, other.kind) == ("Van Gogh", "style")
    with pytest.raises(EvaluationError, match="bench of 8 concepts: say which"):
        load_suite("conceptbench-object-atelier")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"templates": ["a house"]}, "has no {} for the concept's name"),
        ({"templates": []}, "'a' has no prompts, and there are no templates"),
        ({"concepts": [{"concept": "a", "label": "a"}]}, "concepts"),
        ({"group": "things"}, "unknown group 'things'"),
    ],
)
def test_a_faulty_bench_is_told_of(changes: dict[str, Any], told: str) -> None:
    bench = {
        "name": "b",
        "group": "object",
        "detector": "clip",
        "templates": ["a photo of {}"],
        "concepts": [{"concept": "a", "label": "a"}, {"concept": "b", "label": "b"}],
    }
    assert ConceptBench(**bench).suite("a", "object").plain == ("a photo of a",)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=told):
        ConceptBench(**{**bench, **changes})  # type: ignore[arg-type]
