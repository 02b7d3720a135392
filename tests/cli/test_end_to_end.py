"""The commands for real, on random models: erase, use, look at and make again a patch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file

from recare_patch.recipe import WEIGHTS_NAME

SMALL = {
    "target_images.count": 3,
    "target_images.steps": 2,
    "search.rounds": 1,
    "search.erase_steps": 1,
    "search.inversion_steps": 1,
    "erase.steps": 2,
    "erase.retained_images": 2,
}
"""Enough to pass through every stage, not enough to erase anything."""


def small() -> list[str]:
    return [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


def test_the_life_of_a_patch(invoke: Callable[..., Result], tiny_sd: Path, tiny_clip: Path) -> None:
    models = ("--base", tiny_sd, "--clip", tiny_clip, "--device", "cpu")
    made = invoke("erase", "--concept", "van gogh", "--kind", "style", "--out", "patch", *models, *small())
    assert made.exit_code == 0, made.output
    for name in (WEIGHTS_NAME, "recipe.yaml", "care_set.json", "training.json", "preview.png", "README.md"):
        assert Path("patch", name).is_file(), name

    used = invoke("erase", "--concept", "van gogh", "--kind", "style", "--out", "patch", *models, *small())
    assert used.exit_code == 2 and "already holds files" in used.stderr

    facts = json.loads(invoke("inspect", "patch", "--json").stdout)
    assert (facts["erases"], facts["format"], facts["made_by"]) == ("van gogh", "diffusers", "recare-patch")
    assert facts["checked"] and facts["ranks"] == {"2": facts["modules"]}

    shown = invoke("careset", "show", "patch", "--all")
    assert shown.exit_code == 0 and "kept of" in shown.stdout

    drawn = invoke(
        "generate", "--patch", "patch:0.5", "--prompt", "stars", "--count", 1, "--steps", 2, "--device", "cpu"
    )
    assert drawn.exit_code == 0, drawn.output
    assert Path("generated.png").is_file()

    again = invoke("erase", "--recipe", "patch", "--out", "again", "--device", "cpu")
    assert again.exit_code == 0, again.output
    first, second = load_file(f"patch/{WEIGHTS_NAME}"), load_file(f"again/{WEIGHTS_NAME}")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("option", ["--base", "--clip"])
def test_a_model_that_is_not_there(invoke: Callable[..., Result], tiny_sd: Path, tiny_clip: Path, option: str) -> None:
    places = {"--base": tiny_sd, "--clip": tiny_clip} | {option: Path("nowhere")}
    words = [word for pair in places.items() for word in pair]
    result = invoke("erase", "--concept", "tench", "--kind", "object", "--out", "patch", *words, *small())
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("Error: ") and "nowhere" in last
    assert not Path("patch", WEIGHTS_NAME).exists()
