from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recare_patch.core.errors import PatchError, RecipeError, UnknownNameError
from recare_patch.recipe import recipe as module
from recare_patch.recipe.concept import KINDS, Concept
from recare_patch.recipe.recipe import (
    KEYS,
    METADATA_KEY,
    WEIGHTS_NAME,
    AdapterOptions,
    EraseOptions,
    Recipe,
    find_recipe_for,
    list_recipes,
    load_recipe,
    parse_assignment,
)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(concept=Concept(text="Van Gogh", kind="style"))


def patch_file(path: Path, metadata: dict[str, str]) -> Path:
    """A safetensors file of no tensors, written without any library."""
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_yaml_round_trip_is_exact(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).hash == recipe.hash


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(string.ascii_letters + "é葛' :#-", min_size=1, max_size=40).filter(
        lambda t: any(c.isalnum() for c in t)
    ),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-9, 1.0),
    notes=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=40),
)
def test_any_recipe_survives_yaml(text: str, kind: Any, seed: int, rate: float, notes: str) -> None:
    made = Recipe(
        concept=Concept(text=text, kind=kind), seed=seed, erase=EraseOptions(learning_rate=rate), notes=notes
    )
    assert Recipe.from_yaml(made.to_yaml()) == made


def test_numbers_written_as_text_are_numbers() -> None:
    read = Recipe.from_yaml("concept: {text: tench, kind: object}\nerase: {learning_rate: 1e-4, steps: '7'}")
    assert read.erase.learning_rate == 1e-4
    assert read.erase.steps == 7


def test_all_faults_come_at_once_with_their_places() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(
            """
            concept: {text: " ", kind: stlye}
            seed: -1
            sed: 3
            method: recar
            adapter: {rank: 0, layers: cross-atention}
            erase: {stepz: 4, optimizer: adam8bit, learning_rate: .nan}
            """
        )
    told = str(caught.value)
    for words in (
        "concept.text: a concept needs",
        "concept.kind: unknown kind 'stlye'",
        "seed must be at least 0, got -1",
        "sed is not a key, did you mean 'seed'?",
        "did you mean 'recare'?",
        "adapter.rank must be at least 1, got 0",
        "did you mean 'cross-attention'?",
        "erase.stepz is not a key, did you mean 'steps'?",
        "did you mean 'adamw8bit'?",
        "erase.learning_rate must be a finite number, got nan",
    ):
        assert words in told
    assert len(caught.value.faults) == 10
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("concept: [}", "not readable YAML: .* in line 1"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice in line 2"),
        ("erase: {steps: 1, steps: 2}", "twice"),
        ("", "it must be a mapping"),
        ("- a", "it must be a mapping"),
        ("1: 2", "it must be a mapping"),
        ("seed: 1", "concept is missing"),
        ("concept: Van Gogh", "concept must be a mapping"),
        ("concept: !!python/object:os.system {}", "not readable YAML"),
        ("version: 2\nconcept: {text: a, kind: style}", "version: input should be 1, got 2"),
        ("concept: {text: a, kind: style}\nprecision: fp8", "unknown precision 'fp8'"),
        ("concept: {text: a, kind: style}\nerase: {composed: maybe}", "erase.composed must be true or false"),
        ("concept: {text: a, kind: style}\nbase: 15", "base must be text, got 15"),
        ("[" * 5000, "not readable YAML"),
    ],
)
def test_what_is_no_recipe(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_yaml(text)


def test_options_alone_raise_the_same_error() -> None:
    with pytest.raises(RecipeError, match="rank must be at most 256, got 1000"):
        AdapterOptions(rank=1000)


def test_a_recipe_does_not_change(recipe: Recipe) -> None:
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_the_hash_follows_what_decides_the_result(recipe: Recipe) -> None:
    assert recipe.with_overrides({"notes": "x"}).hash == recipe.hash
    for key, value in (("seed", 1), ("erase.steps", 7), ("concept.text", "Monet"), ("adapter.rank", 4)):
        assert recipe.with_overrides({key: value}).hash != recipe.hash


def test_overrides(recipe: Recipe) -> None:
    changed = recipe.with_overrides(
        {"erase.steps": "50", "adapter": {"rank": 4}, "clip": None, "method": "ESD"}
    )
    assert (changed.erase.steps, changed.adapter.rank, changed.adapter.alpha) == (50, 4, 8.0)
    assert changed.method == "esd"
    assert recipe.erase.steps == EraseOptions().steps


def test_override_faults_come_at_once(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.with_overrides({"erase.step": 1, "seed": -1, "seed.x": 2, "a.b.c": 3})
    assert "erase.step is not a key, did you mean 'erase.steps'?" in str(caught.value)
    assert len(caught.value.faults) == 4


def test_keys_are_the_leaves_of_a_recipe(recipe: Recipe) -> None:
    assert "erase.guidance_minus" in KEYS and "concept.text" in KEYS and "erase" not in KEYS
    for key in KEYS:
        place: Any = recipe
        for part in key.split("."):
            place = getattr(place, part)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("erase.steps=5", ("erase.steps", 5)),
        (" clip = null", ("clip", None)),
        ("notes=a=b", ("notes", "a=b")),
        ("erase.composed=false", ("erase.composed", False)),
    ],
)
def test_assignments(text: str, pair: tuple[str, Any]) -> None:
    assert parse_assignment(text) == pair


@pytest.mark.parametrize("text", ["erase.steps", "=5", "", "notes=[", "notes='"])
def test_what_is_no_assignment(text: str) -> None:
    with pytest.raises(RecipeError, match="is not an assignment"):
        parse_assignment(text)


# ---------------------------------------------------------------------- where recipes come from


def test_the_bundled_recipes_are_sound_and_headed_by_their_command() -> None:
    found = list_recipes()
    expected = {
        f"{concept}-{base}"
        for concept in ("nudity", "tench", "van-gogh")
        for base in ("atelier", "sd-1.4", "sd-1.5", "sd-2.1", "sdxl")
    }
    assert sorted(info.name for info in found) == sorted({*expected, "van-gogh-atelier-xl"})
    for info in found:
        assert info.path.read_text().startswith(f"# recare-patch erase --recipe {info.name}\n")
        loaded = load_recipe(info.name)
        assert (loaded.concept.text, loaded.concept.kind, loaded.base) == (info.concept, info.kind, info.base)


def test_bundled_recipes_stay_under_a_tenth_of_the_published_cost() -> None:
    # Samples through the denoiser, a training sample as 3; the paper's settings come to 107,400.
    for info in list_recipes():
        plan = load_recipe(info.name)
        drawn = plan.target_images.count * plan.target_images.steps * 2
        inverted = plan.search.rounds * plan.search.inversion_steps * plan.search.batch_size * 3
        searched = plan.search.rounds * plan.search.erase_steps * plan.erase.batch_size * (3 + 1)
        assert drawn + inverted + searched < 107_400, info.name


@pytest.mark.parametrize("source", ["van-gogh", "Van Gogh", "VAN_GOGH", "van-gogh-atelier"])
def test_a_concept_alone_means_the_bundled_base(source: str) -> None:
    assert load_recipe(source).base == "atelier"


def test_find_recipe_for() -> None:
    found = find_recipe_for("van gogh", "atelier")
    assert found is not None and found.concept.kind == "style" and found.base == "atelier"
    for base in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "other/stable-diffusion-v1-5",
        "models/Stable-Diffusion-v1-5/",
    ):
        found = find_recipe_for("Tench", base)
        assert found is not None and found.base == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert find_recipe_for("tench", "some/folder") is None
    assert find_recipe_for("cat") is None
    anywhere = find_recipe_for("nudity")
    assert anywhere is not None and anywhere.concept.kind == "nsfw"


def test_recipes_from_files_and_patches(tmp_path: Path, recipe: Recipe) -> None:
    text = recipe.with_overrides({"seed": 7}).to_yaml()
    (tmp_path / "mine.yaml").write_text(text)
    folder = tmp_path / "patch"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "mine.yaml")).seed == 7
    assert load_recipe(str(folder)).seed == 7
    header = patch_file(folder / WEIGHTS_NAME, {METADATA_KEY: recipe.with_overrides({"seed": 8}).to_yaml()})
    assert load_recipe(str(header)).seed == 8
    assert load_recipe(str(folder)).seed == 8


def test_a_patch_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="carries no recipe"):
        load_recipe(str(patch_file(tmp_path / "x.safetensors", {"format": "pt"})))
    with pytest.raises(RecipeError, match="holds no recipe"):
        load_recipe(str(tmp_path))
    (tmp_path / "p.safetensors").write_bytes(b"PK\x03\x04aaaaaaaaaa")
    with pytest.raises(PatchError, match="is a pickle"):
        load_recipe(str(tmp_path / "p.safetensors"))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(str(tmp_path / "x.yaml"))


def test_the_file_is_named_in_its_faults(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seed: 1")
    with pytest.raises(RecipeError, match=r"x.yaml: concept is missing"):
        load_recipe(str(tmp_path / "x.yaml"))


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tench-atelier'"):
        load_recipe("tench-atelie")


def test_recipes_are_found_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    inside = tmp_path / "recare_patch" / "_recipes"
    inside.mkdir(parents=True)
    (inside / "only.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(module, "__file__", str(tmp_path / "recare_patch" / "recipe" / "recipe.py"))
    assert [info.name for info in list_recipes()] == ["only"]


def test_yaml_floats_are_read_back_as_floats_by_any_yaml_reader(recipe: Recipe) -> None:
    small = recipe.with_overrides({"erase.learning_rate": 1e-5})
    read = yaml.safe_load(small.to_yaml())["erase"]["learning_rate"]
    assert isinstance(read, float) and math.isclose(read, 1e-5)
