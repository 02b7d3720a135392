"""The whole of a run on a device without values takes what was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import CUT, rows
from recare_patch.careset import Clip
from tests.erasure.making import small_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method", "changes"),
    [
        ("tiny_sd", "recare", {"memory": {"micro_batch": 1, "vae_tiling": True}}),
        ("tiny_sdxl", "recare", {"memory": {"encoders_off_device": True, "vae_off_device": True}}),
        ("tiny_sd", "s-grace", {}),
    ],
)
def test_no_stage_takes_more_than_was_planned(
    base: str, method: str, changes: dict[str, Any], tiny_clip: Path, request: pytest.FixtureRequest
) -> None:
    cut = {**CUT, "target_images.steps": 1, "erase.retained_images": 1, "precision": "bf16"}
    recipe = small_recipe(request.getfixturevalue(base), tiny_clip, method, **cut, **changes)
    found = rows(recipe, None, Clip.load(str(tiny_clip)))
    stages = {name for name, _, _ in found}
    assert {"target images", "encoding", "preview", "erase" if method == "recare" else "edit 1"} <= stages
    for name, planned, took in found:
        assert took <= 1.1 * planned, name
