"""What a base asks of a recipe, by its size and family."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bases import write_configurations
from recare_patch.erasure import erase_concept, resolve_recipe
from recare_patch.models import defaults
from recare_patch.recipe import Recipe, find_recipe_for, preset_overrides


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Configurations of the real sizes."""
    return {name: write_configurations(name, tmp_path / name) for name in ("sd-1.5", "sd-2.1", "sdxl")}


def _settings(recipe: Recipe) -> dict[str, Any]:
    own = {"concept", "base", "clip", "search", "notes"}
    found = recipe.as_data()
    found["search"].pop("init_word")
    return {key: value for key, value in found.items() if key not in own} | {"search": found["search"]}


def test_a_fine_tune_gets_what_the_model_of_its_shape_gets(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd-1.5"], tmp_path / "dreamshaper-8")
    tuned = resolve_recipe("Greg Rutkowski", kind="style", base=str(tmp_path / "dreamshaper-8"))
    shutil.move(folders["sd-1.5"], tmp_path / "stable-diffusion-v1-5")
    known = resolve_recipe("Van Gogh", base=str(tmp_path / "stable-diffusion-v1-5"))
    assert find_recipe_for("Van Gogh", str(tmp_path / "stable-diffusion-v1-5")) is not None
    assert known.search.init_word == "art" and tuned.search.init_word is None
    assert _settings(tuned) == _settings(known)


def test_the_family_tells_guidance_and_rank_and_the_device_precision(folders: dict[str, Path]) -> None:
    made = {name: resolve_recipe("x", kind="style", base=str(folder)) for name, folder in folders.items()}
    assert [one.target_images.guidance_scale for one in made.values()] == [7.5, 7.5, 5.0]
    assert [one.adapter.rank for one in made.values()] == [2, 2, 2]
    searched = [resolve_recipe("x", kind="style", base=str(one), preset="measured") for one in folders.values()]
    assert [one.adapter.rank for one in searched] == [8, 8, 4]
    assert {one.precision for one in made.values()} == {"fp32"}
    # What takes in a pooled prompt is trained with the cross-attention.
    assert [one.adapter.layers for one in searched] == ["cross-attention", "cross-attention", "text"]
    layers = {
        name: resolve_recipe("x", kind="style", base=str(folders["sdxl"]), **how).adapter.layers
        for name, how in {
            "esd": {"overrides": {"method": "esd"}},
            "robust": {"preset": "robust"},
            "default": {},
            "quick": {"preset": "quick"},
        }.items()
    }
    blocks = dict.fromkeys(("robust", "default"), "transformer-blocks")
    assert layers == {"esd": "text", "quick": "text", **blocks}
    half = resolve_recipe("x", kind="style", base=str(folders["sdxl"]), device="meta")
    assert half.precision == "bf16"
    # A small base is left alone.
    assert resolve_recipe("cat", kind="object").target_images == Recipe(concept=half.concept).target_images


def test_what_is_said_goes_before_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    base = str(folders["sdxl"])
    (tmp_path / "mine.yaml").write_text("concept: {text: cat, kind: object}\ntarget_images: {count: 5}\n")
    mine = resolve_recipe("", recipe=str(tmp_path / "mine.yaml"), base=base)
    assert (mine.target_images.count, mine.target_images.steps) == (5, 25)
    # A method's own default, and a switch of the method.
    fast = resolve_recipe("cat", kind="object", base=base, preset="fast")
    assert (fast.method, fast.adapter.layers) == ("closed", "cross-attention-v")
    other = resolve_recipe("cat", kind="object", base=base, overrides={"method": "forget-me-not"})
    assert (other.method, other.target_images.count, other.adapter.layers) == ("forget-me-not", 8, "cross-attention-kv")
    assert (other.erase.steps, other.erase.learning_rate) == (35, 4e-3)
    esd = resolve_recipe("", recipe=str(tmp_path / "mine.yaml"), base=base, overrides={"method": "esd"})
    assert (esd.adapter.rank, esd.erase.steps, esd.erase.ends) == (4, 200, "steps")
    # The recipe of a finished patch is whole: another base changes nothing in it.
    (tmp_path / "whole.yaml").write_text(mine.to_yaml())
    again = resolve_recipe("", recipe=str(tmp_path / "whole.yaml"), base=str(folders["sd-1.5"]))
    assert _settings(again) == _settings(mine)


@pytest.mark.parametrize("preset", ["quick", "robust", None])
def test_a_preset_keeps_its_share_of_the_reach(folders: dict[str, Path], preset: str | None) -> None:
    def reach(base: str, chosen: str | None) -> float:
        erase = resolve_recipe("cat", kind="object", base=base, preset=chosen).erase
        return erase.steps * erase.learning_rate

    full, small = str(folders["sd-1.5"]), "atelier"
    shares = [reach(base, preset) / reach(base, "measured") for base in (full, small)]
    assert shares[0] == pytest.approx(shares[1], rel=0.01)
    told = resolve_recipe("cat", kind="object", base=full, preset=preset, overrides={"erase.learning_rate": 1e-4})
    assert told.erase.learning_rate == 1e-4


def test_a_base_of_few_steps_draws_in_no_other_way(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.move(folders["sdxl"], tmp_path / "sdxl-turbo-4step")
    base = str(tmp_path / "sdxl-turbo-4step")
    for words in ({"concept": "cat", "kind": "object", "preset": "quick"}, {"concept": "", "recipe": "tench-sdxl"}):
        images = resolve_recipe(**words, base=base).target_images  # type: ignore[arg-type]
        assert (images.steps, images.scheduler) == (4, None) and images.guidance_scale <= 2
    told = resolve_recipe("cat", kind="object", base=base, overrides={"target_images.steps": 7}).target_images
    assert told.steps == 7
    known = resolve_recipe("cat", kind="object", base="stabilityai/sdxl-turbo").target_images
    assert (known.steps, known.guidance_scale) == (4, 1.0)


def test_levers_are_those_of_the_card_at_hand(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from recare_patch.erasure import run

    seen: list[Recipe] = []
    monkeypatch.setattr(run, "erase", lambda recipe, *_, **__: seen.append(recipe))
    monkeypatch.setattr(run, "device_memory", lambda _: 8.0)
    words: dict[str, Any] = {"kind": "style", "base": str(folders["sd-1.5"]), "out": "x"}
    erase_concept("Greg Rutkowski", **words, overrides={"precision": "bf16"})
    erase_concept("Greg Rutkowski", **words, overrides={"precision": "fp32"})
    erase_concept("Greg Rutkowski", **words, overrides={"precision": "bf16", "memory.vae_off_device": True})
    assert [one.memory.encoders_off_device for one in seen] == [True, False, False]
    assert defaults.device_memory("cpu") is None


def test_a_plain_erasing_is_the_robust_one_where_the_base_allows_it(tiny_sd: Path, tiny_sd3: Path) -> None:
    robust, base = preset_overrides("robust"), str(tiny_sd)

    def as_robust(**words: Any) -> list[str]:
        """Of the preset's keys, those that a recipe has otherwise."""
        made = resolve_recipe(**{"concept": "cat", "kind": "object", "base": base, **words}).as_data()
        found = {key: made[key.partition(".")[0]][key.partition(".")[2]] for key in robust}
        return sorted(key for key, value in robust.items() if found[key] != value)

    assert as_robust() == as_robust(preset="robust") == []
    assert as_robust(overrides={"erase.steps": 9}) == ["erase.steps"]
    assert "adversary.count" in as_robust(preset="measured")
    # Another method, an attribute, a replacement, and a base whose denoiser is a transformer.
    others: list[dict[str, Any]] = [{"subject": "dog"}, {"overrides": {"replace_with": "dog"}}, {"base": str(tiny_sd3)}]
    for words in ({"overrides": {"method": "esd"}}, *others):
        assert "adversary.count" in as_robust(**words)


def test_a_recipe_file_says_what_it_says(tiny_sd: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("concept: {text: cat, kind: object}\nerase: {guidance_minus: 2.5}\nadversary: {count: 0}\n")
    made = resolve_recipe("", recipe=str(mine), base=str(tiny_sd))
    assert (made.erase.guidance_minus, made.adversary.count, made.adapter.layers) == (2.5, 0, "transformer-blocks")
