"""Suites: what the bundled ones hold, what is refused, and which one a patch gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.suites import CONCEPTS, FIRST_SEED
from benchmarks.suites import suite as benchmark_suite
from recare_patch.core import EvaluationError, UnknownNameError
from recare_patch.measure.judges import DISTRACTORS, can_tell, load_detector
from recare_patch.measure.suites import ConceptBench, Suite, find_suite_for, list_suites, load_suite, parse_suite
from recare_patch.measure.unwritten import default_suite
from recare_patch.recipe import Concept, Recipe, load_recipe
from tests.measure.making import SUITE

GROUPS = {"identity", "object", "style"}
ONE = tuple(f"{concept}-{base}" for concept in ("van-gogh", "tench", "nudity") for base in ("atelier", "sd"))
SEVERAL = tuple(f"conceptbench-{group}-{base}" for group in GROUPS for base in ("atelier", "sd"))


def loaded(name: str) -> list[Suite]:
    """A suite, or those of all concepts of a bench."""
    made = parse_suite(list_suites()[name].read_text(encoding="utf-8"))
    return [made] if isinstance(made, Suite) else [made.suite(one.concept) for one in made.concepts]


def all_prompts(suite: Suite) -> list[str]:
    sets = [suite.plain, suite.paraphrased, suite.implicit, suite.retained]
    sets += [one.prompts for one in (*suite.care, *suite.neighbours)]
    return [prompt for prompts in sets for prompt in prompts]


@pytest.mark.parametrize("name", sorted((*ONE, *SEVERAL)))
def test_a_bundled_suite_is_sound(name: str) -> None:
    assert set(list_suites()) == {*ONE, *SEVERAL}
    text = list_suites()[name].read_text(encoding="utf-8")
    assert text.startswith("# recare-patch evaluate --patch ") and f"--suite {name}" in text
    for suite in loaded(name):
        assert suite.name == name and suite.base == ("atelier" if "atelier" in name else "stable-diffusion")
        assert suite.plain and suite.retained and suite.neighbours
        assert parse_suite(suite.to_yaml()) == suite
        if name in ONE:
            assert min(map(len, (suite.plain, suite.paraphrased, suite.implicit))) >= 8
            assert len(suite.care) >= 2 and not set(suite.plain) & set(suite.paraphrased)


@pytest.mark.parametrize("name", sorted(name for name in (*ONE, *SEVERAL) if "atelier" in name))
def test_atelier_suites_are_apart_from_the_choosing_of_settings_and_known_to_the_judge(name: str) -> None:
    draws = [draw for c in CONCEPTS for figure in benchmark_suite(c, "choose") for draw in figure.draws("choose")]
    chosen = {prompt.casefold() for prompt, _, _ in draws}
    judge = load_detector("atelier-judge")
    for suite in loaded(name):
        assert not chosen & {prompt.casefold() for prompt in all_prompts(suite)}
        seeds = suite.drawing("retained", 500).seeds
        assert min(seeds) > max(seed for _, _, seed in draws) > FIRST_SEED["choose"]
        assert suite.detector == "atelier-judge"
        for label in (suite.label, *(one.label for one in (*suite.care, *suite.neighbours))):
            assert can_tell(judge, label), label


def test_no_prompt_of_nudity_is_anything_but_clinical() -> None:
    harmful = ("child", "girl", "boy", "teen", "young", "sex", "porn", "erotic", "kid", "minor", "explicit")
    for name in ("nudity-atelier", "nudity-sd"):
        for prompt in all_prompts(load_suite(name)):
            assert not [word for word in harmful if word in prompt.casefold().split()], prompt


@pytest.mark.parametrize("name", [name for name in ONE if name.endswith("-sd")])
def test_no_prompt_about_a_care_concept_names_what_it_competes_with(name: str) -> None:
    """CLIP may rightly answer that one. Atelier's suites have theirs: figures are published that were measured so."""
    (suite,) = loaded(name)
    for one in suite.care:
        rivals = [label for label in suite.labels or DISTRACTORS if label.casefold() != one.clip_word.casefold()]
        named = [*rivals, *("man", "woman", "people") * (one.clip_word != "person")]
        for prompt in one.prompts:
            assert not re.findall(rf"\b(?:{'|'.join(map(re.escape, named))})(?:e?s)?\b", prompt, re.IGNORECASE), prompt


def test_the_three_atelier_suites_share_what_they_can() -> None:
    van_gogh, tench, nudity = (load_suite(f"{c}-atelier") for c in ("van-gogh", "tench", "nudity"))
    assert van_gogh.drawing("retained", 30) == tench.drawing("retained", 30) == nudity.drawing("retained", 30)
    assert tench.drawing("neighbours", 30) == nudity.drawing("neighbours", 30)
    assert tench.care_drawing(0, 30) == nudity.care_drawing(0, 30)


def test_prompts_take_turns_and_fewer_pictures_are_the_first_of_more() -> None:
    suite = Suite(**SUITE)
    drawing = suite.drawing("plain", 5)
    assert drawing.prompts == (*SUITE["plain"], *SUITE["plain"], SUITE["plain"][0])
    assert len(set(drawing.seeds)) == 5 and set(drawing.labels) == {"van gogh"}
    fewer = suite.drawing("plain", 3)
    assert (fewer.prompts, fewer.seeds) == (drawing.prompts[:3], drawing.seeds[:3])
    assert suite.with_changes(implicit=()).drawing("implicit", 5).prompts == ()
    # Neighbours have a turn each before any has a second.
    two = [{"label": "a", "prompts": ["a one", "a two"]}, {"label": "b", "prompts": ["b one"]}]
    drawing = suite.with_changes(neighbours=two).drawing("neighbours", 5)
    assert drawing.prompts == ("a one", "b one", "a two", "b one", "a one")
    assert drawing.labels == ("a", "b", "a", "b", "a")


def test_no_two_sets_share_a_seed_and_a_care_concept_may_have_a_word_of_its_own() -> None:
    water = {"label": "water", "word": "freshwater", "prompts": ["a photo of water"]}
    suite = Suite(**{**SUITE, "care": [water, *SUITE["care"]]})
    assert [one.clip_word for one in suite.care] == ["freshwater", "stars"]
    sets = ("plain", "paraphrased", "implicit", "retained", "neighbours")
    drawings = [suite.drawing(which, 200) for which in sets] + [suite.care_drawing(k, 200) for k in (0, 1)]
    seeds = [seed for drawing in drawings for seed in drawing.seeds]
    assert len(set(seeds)) == len(seeds) == 1400
    assert suite.block("memorization") not in seeds


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"plane": []}, "plane is not a key, did you mean 'plain'"),
        ({"detector": "nudenet"}, "unknown detector 'nudenet'.*did you mean 'nudenet-[69]'"),
        ({"kind": "styl"}, "did you mean 'style'"),
        ({"plain": [""]}, "a prompt needs a word"),
        ({"plain": ["x" * 1001]}, "1000 characters"),
        ({"plain": ["a", "a"]}, "'a' is there twice"),
        ({"implicit": ["a house by VAN  GOGH."]}, "implicit prompt 'a house by VAN GOGH.' names the concept"),
        (
            {"kind": "nsfw", "concept": "nudity", "implicit": ["a nude person"]},
            "implicit prompt 'a nude person' names the concept",
        ),
        ({"detector_options": {"labels": ["Monet", "van goh"]}}, "does not .* did you mean 'van goh'"),
        ({"detector_options": {"labels": 3}}, "label set does not hold the target's label 'van gogh'"),
        ({"care": [{"label": one, "prompts": ["a"]} for one in ("stars", "Stars")]}, "'stars' is there twice"),
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
        (b"- a\n", "must be a mapping"),
        (b"name: [", "is not readable YAML"),
        (b"name: a\nname: b\n", "'name' is there twice in line 2"),
        (b"name: a\nlabel: b\n", "kind is missing"),
        (b"name: a\nconcepts: []\n", "group is missing"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_faulty_file_is_told_of(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text)
    with pytest.raises(EvaluationError, match=told):
        load_suite(file)


def test_a_suite_is_found_by_name_or_concept_and_guessed(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nudity-atelier'"):
        load_suite("nudty-atelier")
    with pytest.raises(UnknownNameError):
        load_suite("x" * 5000)
    for base, name in (("atelier", "van-gogh-atelier"), ("CompVis/stable-diffusion-v1-4", "van-gogh-sd")):
        found = find_suite_for(Concept(text="van gogh", kind="style"), base)
        assert found is not None and found.name == name
    assert find_suite_for("Rembrandt", "atelier") is None
    assert load_suite("Van Gogh") == load_suite("van-gogh-atelier")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"version": 1, **SUITE}))
    assert load_suite(tmp_path / "mine.yaml") == Suite(**SUITE)


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


def test_another_detector_brings_its_own_options() -> None:
    suite = load_suite("van-gogh-sd")
    other = suite.with_detector("clip:folder")
    assert other.detector_options == {**suite.detector_options, "clip": "folder"}
    style = suite.with_detector("image-classifier:owner/styles", "vincent-van-gogh")
    assert (style.detector, style.label) == ("image-classifier", "vincent-van-gogh")
    assert style.detector_options == {"source": "owner/styles"}
    renamed = suite.with_detector("clip", "a swirling picture")
    assert renamed.label in renamed.detector_options["labels"]


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
    bench: dict[str, Any] = {
        "name": "b",
        "group": "object",
        "detector": "clip",
        "templates": ["a photo of {}"],
        "concepts": [{"concept": "a", "label": "a"}, {"concept": "b", "label": "b"}],
    }
    assert ConceptBench(**bench).suite("a").plain == ("a photo of a",)
    with pytest.raises(EvaluationError, match=told):
        ConceptBench(**{**bench, **changes})
