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

from recare_patch.core import PatchError, RecipeError, Settings, UnknownNameError, files
from recare_patch.erasure.methods.s_grace import SGraceOptions
from recare_patch.recipe import (
    KINDS,
    METADATA_KEY,
    METHODS,
    PARTS_KEY,
    PRESETS,
    WEIGHTS_NAME,
    Concept,
    EraseOptions,
    Recipe,
    find_recipe_for,
    list_recipes,
    load_recipe,
    method_info,
    parse_assignment,
    preset_overrides,
    recipe_for,
    recipe_keys,
)

VAN_GOGH = Concept(text="Van Gogh", kind="style")
TENCH = {"text": "tench", "kind": "object"}
HEAD = "concept: {text: tench, kind: object}\n"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(concept=VAN_GOGH)


PART = '[{"name": "x", "sha256": "y", "scale": 1}]'


def _patch_file(path: Path, metadata: dict[str, str]) -> Path:
    """A safetensors file of no tensors, written without any library."""
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def _at(recipe: Recipe, key: str) -> Any:
    """What a recipe says under a dotted key; None for another method's own options."""
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(string.ascii_letters + "é葛' :#-", min_size=1, max_size=40).filter(
        lambda t: any(c.isalnum() for c in t)
    ),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-9, 1.0),
    notes=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=40),
    method=st.sampled_from(METHODS.names()),
)
def test_any_recipe_survives_yaml(text: str, kind: Any, rate: float, **keys: Any) -> None:
    made = Recipe(concept=Concept(text=text, kind=kind), erase=EraseOptions(learning_rate=rate), **keys)
    assert Recipe.from_yaml(made.to_yaml()) == made
    # Any YAML reader takes its numbers for numbers.
    read = yaml.safe_load(made.to_yaml())["erase"]["learning_rate"]
    assert isinstance(read, float) and math.isclose(read, rate)


def test_numbers_written_as_text_are_numbers() -> None:
    read = Recipe.from_yaml(HEAD + "erase: {learning_rate: 1e-4, steps: '7'}")
    assert (read.erase.learning_rate, read.erase.steps) == (1e-4, 7)


def test_all_faults_come_at_once_with_their_places() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(
            """
            concept: {text: " ", kind: stlye}
            seed: -1
            sed: 3
            method: s-grace
            adapter: {rank: 0, layers: cross-atention}
            erase: {stepz: 4, optimizer: adam8bit, learning_rate: .nan}
            s_grace: {roundz: 1}
            """
        )
    told = str(caught.value)
    for words in (
        "concept.text: a concept needs",
        "concept.kind: unknown kind 'stlye'",
        "seed must be at least 0, got -1",
        "sed is not a key, did you mean 'seed'?",
        "adapter.rank must be at least 1, got 0",
        "did you mean 'cross-attention'?",
        "erase.stepz is not a key, did you mean 'steps'?",
        "did you mean 'adamw8bit'?",
        "erase.learning_rate must be a finite number, got nan",
        "s_grace.roundz is not a key, did you mean 'rounds'?",
    ):
        assert words in told
    assert len(caught.value.faults) == 10 and "\n" not in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("concept: [}", "not readable YAML: .* in line 1"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice in line 2"),
        ("erase: {steps: 1, steps: 2}", "twice"),
        ("", "it must be a mapping"),
        ("- a", "it must be a mapping"),
        ("1: 2", "the key 1 is no text"),
        ("seed: 1", "concept is missing"),
        ("concept: Van Gogh", "concept must be a mapping"),
        ("concept: !!python/object:os.system {}", "not readable YAML"),
        ("[" * 5000, "not readable YAML"),
        (HEAD + "version: 2", "version: input should be 1, got 2"),
        (HEAD + "precision: fp8", "unknown precision 'fp8'"),
        (HEAD + "method: recar", "unknown method 'recar': .* did you mean 'recare'"),
        (HEAD + "method: 3", "unknown method '3'"),
        (HEAD + "erase: {composed: maybe}", "erase.composed must be true or false"),
        (HEAD + "erase: 3", "erase must be a mapping"),
        (HEAD + "adapter: {rank: 1000}", "rank must be at most 256, got 1000"),
        (HEAD + "base: 15", "base must be text, got 15"),
        (HEAD + "own: {rounds: 1}", "own is not a key"),
        (HEAD + "s_grace: 3", "s_grace must be a mapping of keys to values, got 3"),
        (HEAD + "esd: {eta: 1}", "esd is not a key"),
        (HEAD + "s_grace: {rounds: 1}", "s_grace is that of method 's-grace', and method 'recare' has"),
        (HEAD + "method: s-grace\nadapter: {layers: all}", "'s-grace' trains text-encoder: adapter.layers"),
        (HEAD + "method: forget-me-not\nmemory: {compile: true}", "closed: no memory.compile"),
        (HEAD + "memory: {offload: true}", "offload needs checkpointing"),
        (HEAD + "memory: {resolution: big}", "'big' is no size of pictures"),
    ],
)
def test_what_is_no_recipe(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fills_in_its_own_defaults(name: str, recipe: Recipe) -> None:
    info, plain = method_info(name), Recipe(concept=VAN_GOGH, method=name)
    assert plain == recipe.with_overrides({"method": name.upper()}) and plain.method == name
    assert {key: _at(plain, key) for key in info.defaults} == info.defaults
    assert plain.adapter.layers == info.layers[0]
    own = {key.removeprefix("erase."): value for key, value in info.defaults.items() if key.startswith("erase.")}
    assert plain.erase == recipe.erase.model_copy(update=own)
    section = name.replace("-", "_")
    assert (section in plain.as_data()) == (info.options is not None)
    assert plain.own == (info.options() if info.options else None)
    # What another method has no use for is no fault where it says nothing of its own.
    assert Recipe(concept=VAN_GOGH, method=name, s_grace={}) == plain


def test_what_is_said_goes_before_a_methods_defaults() -> None:
    said = Recipe.from_yaml(HEAD + "method: s-grace\nerase: {steps: 7}\ns_grace: {rounds: 1}")
    assert isinstance(said.own, SGraceOptions)
    assert (said.erase.steps, said.erase.batch_size, said.own.rounds, said.own.attack_steps) == (7, 8, 1, 10)
    with pytest.raises(ValidationError):
        said.seed = 1  # type: ignore[misc]


def test_another_method_starts_from_its_own_defaults(recipe: Recipe) -> None:
    first = recipe.with_overrides({"erase.steps": 7, "seed": 3, "search.init_word": "art"})
    changed = first.with_overrides({"method": "s-grace", "s_grace.rounds": 1, "adapter.rank": 4})
    assert (changed.erase.steps, changed.adapter.rank, changed.seed) == (50, 4, 3)
    assert changed.target_images.count == 8 and changed.search.init_word == "art"
    assert isinstance(changed.own, SGraceOptions) and changed.own.rounds == 1
    # A number of pictures that was asked for stays; a section of the old method goes.
    asked = recipe.with_overrides({"target_images.count": 5}).with_overrides({"method": "uce"})
    assert asked.target_images.count == 5 and asked.adapter.rank == 16
    back = changed.with_overrides({"method": "recare"})
    assert back.own is None and back.target_images == recipe.target_images and "s_grace" not in back.as_data()
    with pytest.raises(RecipeError, match="s_grace is that of method 's-grace'"):
        recipe.with_overrides({"method": "uce", "s_grace.rounds": 1})


def test_overrides(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"erase.steps": "50", "adapter": {"rank": 4}, "clip": None, "also": [TENCH]})
    assert (changed.erase.steps, changed.adapter.rank, changed.adapter.alpha) == (50, 4, 8.0)
    assert recipe.erase.steps == EraseOptions().steps and changed.slug == "van-gogh-tench"
    with pytest.raises(RecipeError) as caught:
        recipe.with_overrides({"erase.step": 1, "seed": -1, "seed.x": 2, "a.b.c": 3, "method": "recar"})
    assert "erase.step is not a key, did you mean 'erase.steps'?" in str(caught.value)
    assert len(caught.value.faults) == 5


def test_keys_are_the_leaves_of_a_recipe(recipe: Recipe) -> None:
    keys = recipe_keys()
    assert {"erase.guidance_minus", "concept.text", "uce.ridge"} <= set(keys)
    assert len(set(keys)) == len(keys) and "own" not in keys
    for key in keys:
        assert not isinstance(_at(recipe, key), Settings) or key == "subject"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe(name: str, recipe: Recipe) -> None:
    found = recipe.with_overrides(preset_overrides(name)).as_data()
    for key, value in PRESETS[name].items():
        section, _, option = key.partition(".")
        assert (found[section][option] if option else found[section]) == value
    with pytest.raises(UnknownNameError, match=f"did you mean '{name}'"):
        preset_overrides(f"{name}x")


def test_assignments() -> None:
    for text, pair in (
        ("erase.steps=5", ("erase.steps", 5)),
        (" clip = null", ("clip", None)),
        ("notes=a=b", ("notes", "a=b")),
        ("erase.composed=false", ("erase.composed", False)),
    ):
        assert parse_assignment(text) == pair
    for text in ("erase.steps", "=5", "", "notes=[", "notes='"):
        with pytest.raises(RecipeError, match="is not an assignment"):
            parse_assignment(text)


def test_the_bundled_recipes_are_sound_and_headed_by_their_command() -> None:
    bases = ["atelier", "sd-1.4", "sd-1.5", "sd-2.1", "sdxl"]
    bases += ["sd-3.5-medium", "flux-1-dev", "flux-2-klein", "z-image", "qwen-image"]
    expected = {f"{concept}-{base}" for concept in ("nudity", "tench", "van-gogh") for base in bases}
    assert {info.name for info in list_recipes()} == {*expected, "van-gogh-atelier-xl"}
    for info in list_recipes():
        assert info.path.read_text().startswith(f"# recare-patch erase --recipe {info.name}\n")
        plan = load_recipe(info.name)
        assert (plan.concept.text, plan.concept.kind, plan.base) == (info.concept, info.kind, info.base)
        # Samples through the denoiser, a training sample as 3; the paper's settings come to 107,400.
        drawn = plan.target_images.count * plan.target_images.steps * 2
        inverted = plan.search.rounds * plan.search.inversion_steps * plan.search.batch_size * 3
        searched = plan.search.rounds * plan.search.erase_steps * plan.erase.batch_size * (3 + 1)
        assert drawn + inverted + searched < 107_400, info.name


def test_a_bundled_recipe_is_found_by_its_concept_and_base() -> None:
    for source in ("van-gogh", "Van Gogh", "VAN_GOGH", "van-gogh-atelier"):
        assert load_recipe(source).base == "atelier"
    own = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for base in (own, "other/stable-diffusion-v1-5", "models/Stable-Diffusion-v1-5/"):
        found = find_recipe_for("Tench", base)
        assert found is not None and found.base == own
    assert find_recipe_for("tench", "some/folder") is None and find_recipe_for("cat") is None
    anywhere = find_recipe_for("nudity")
    assert anywhere is not None and anywhere.concept.kind == "nsfw"
    with pytest.raises(UnknownNameError, match="did you mean 'tench-atelier'"):
        load_recipe("tench-atelie")


def test_recipes_from_files_and_patches(tmp_path: Path, recipe: Recipe) -> None:
    seven, eight = (recipe.with_overrides({"seed": seed}).to_yaml() for seed in (7, 8))
    (tmp_path / "mine.yaml").write_text(seven)
    folder = tmp_path / "patch"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(seven)
    assert load_recipe(str(tmp_path / "mine.yaml")).seed == load_recipe(str(folder)).seed == 7
    header = _patch_file(folder / WEIGHTS_NAME, {METADATA_KEY: eight})
    assert load_recipe(str(header)).seed == load_recipe(str(folder)).seed == 8


@pytest.mark.parametrize(
    ("name", "content", "error", "sentence"),
    [
        ("a.safetensors", {"format": "pt"}, RecipeError, "carries no recipe"),
        ("b.safetensors", {PARTS_KEY: PART}, RecipeError, "stack of 1 patches"),
        ("c.safetensors", {PARTS_KEY: '[{"name": 1}]'}, RecipeError, "has a malformed header entry"),
        ("d.safetensors", {METADATA_KEY: "seed: 1"}, RecipeError, r"recipe in .*d.safetensors: concept"),
        ("e.safetensors", b"PK\x03\x04aaaaaaaaaa", PatchError, "is a pickle"),
        ("f.yaml", b"\xff\xfe\x00", RecipeError, "not UTF-8"),
        ("g.yaml", b"seed: 1", RecipeError, r"g.yaml: concept is missing"),
        (".", None, RecipeError, "holds no recipe"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, content: Any, error: type, sentence: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        _patch_file(tmp_path / name, content)
    with pytest.raises(error, match=sentence):
        load_recipe(str(tmp_path / name))


def test_recipes_are_found_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    inside = tmp_path / "recare_patch" / "_recipes"
    inside.mkdir(parents=True)
    (inside / "only.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(files, "__file__", str(tmp_path / "recare_patch" / "core" / "files.py"))
    assert [info.name for info in list_recipes()] == ["only"]


def test_words_stand_for_a_recipe(tmp_path: Path, recipe: Recipe) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def guess(text: str, base: str, clip: str | None) -> str:
        asked.append((text, base, clip))
        return "identity"

    def words(concept: str, **options: Any) -> Recipe:
        return recipe_for(concept, guess_kind=guess, **options)

    assert [words(one).concept.kind for one in ("van GOGH", "Tench", "nudity")] == ["style", "object", "nsfw"]
    known = words("", recipe="tench", preset="quick", overrides={"erase.steps": 9})
    assert (known.concept.text, known.erase.steps, known.search.rounds) == ("tench", 9, 0)
    cat = words("cat", kind="object", base="b", clip="c")
    assert (cat.base, cat.clip, asked) == ("b", "c", [])
    several = words("Mira Vale", also=["Tench", "Otto Bly"])
    assert [one.kind for one in several.concepts] == ["identity", "object", "identity"]
    assert asked == [("Mira Vale", "atelier", None), ("Otto Bly", "atelier", None)]
    part = words("stars", subject="Van Gogh")
    assert part.title == "stars from Van Gogh" and part.subject is not None and part.subject.kind == "style"
    # A recipe of one concept for another: only the concept changes.
    (tmp_path / "mine.yaml").write_text(recipe.with_overrides({"seed": 7}).to_yaml())
    other = words("Monet", recipe=str(tmp_path / "mine.yaml"))
    assert (other.concept.text, other.concept.kind, other.seed) == ("Monet", "style", 7)
    with pytest.raises(PatchError, match="there is no patch at nowhere"):
        words("cat", overrides={"continue_from": "nowhere"})
