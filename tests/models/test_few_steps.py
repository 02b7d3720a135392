"""Bases that were distilled to few steps, and those that only look like them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from recare_patch.measure.suites import Suite, suited
from recare_patch.models import load_base
from recare_patch.models.few_steps import few_steps
from recare_patch.patch import generate_pictures
from tests.measure.making import SUITE

TRAILING = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
ZERO_SNR = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("name", "scheduler", "config", "unet", "wanted"),
    [
        ("latent-consistency/lcm-dreamshaper-v7", "LCMScheduler", {}, {"time_cond_proj_dim": 256}, (4, 8.0, "reads")),
        ("'mine'", "LCMScheduler", {}, {}, (4, 1.0, "LCMScheduler")),
        ("stabilityai/sdxl-turbo", "EulerAncestralDiscreteScheduler", TRAILING, {}, (4, 1.0, "trail and 'turbo'")),
        ("'renamed'", "EulerDiscreteScheduler", TRAILING, {}, (4, 1.0, "probably.*trailing")),
        ("'JuggernautXL-Lightning-8steps'", "EulerDiscreteScheduler", {}, {}, (8, 1.0, "probably.*'lightning'")),
        ("'Hyper-SDXL-1step'", "DDIMScheduler", TRAILING, {}, (1, 1.0, "'hyper'")),
        ("'TurboVisionXL'", "EulerDiscreteScheduler", {}, {}, (8, 2.0, "probably.*'turbo'")),
        ("'copy'", "EulerDiscreteScheduler", {}, {"_name_or_path": "stabilityai/sdxl-turbo"}, (8, 2.0, "probably")),
        ("'zero-snr'", "EulerDiscreteScheduler", ZERO_SNR, {}, None),
        ("'dpm'", "DPMSolverMultistepScheduler", TRAILING, {}, None),
        ("'stable-diffusion-v1-5'", "PNDMScheduler", {}, {}, None),
        ("'hyperrealistic-lcmlike-turbocharged'", "PNDMScheduler", {}, {}, None),
    ],
)
def test_few_steps_are_told_by_layout_and_name(
    name: str, scheduler: str, config: dict[str, Any], unet: dict[str, Any], wanted: tuple[int, float, str] | None
) -> None:
    found = few_steps(name, {"scheduler": ["diffusers", scheduler]}, {"unet": unet, "scheduler": config})
    if wanted is None:
        assert found is None
        return
    assert found is not None and (found.steps, found.guidance) == wanted[:2]
    assert re.search(wanted[2], found.why)


def test_what_draws_follows_the_base(tiny_sd: Path, tmp_path: Path) -> None:
    turbo = tmp_path / "tiny-turbo"
    shutil.copytree(tiny_sd, turbo)
    base = load_base(str(turbo), device="cpu")
    assert base.few_steps is not None and load_base(str(tiny_sd), device="cpu").few_steps is None
    plain = Suite(**(SUITE | {"steps": 20}))
    changed = suited(plain, base)
    assert (changed.steps, changed.guidance_scale, changed.scheduler) == (8, 2.0, None)
    assert suited(Suite(**(SUITE | {"steps": 4})), base).steps == 4
    [own] = generate_pictures(str(turbo), [], ["stars"], [0], device="cpu")
    [said] = generate_pictures(str(turbo), [], ["stars"], [0], steps=8, guidance_scale=2.0, device="cpu")
    assert own.before.tobytes() == said.before.tobytes()
