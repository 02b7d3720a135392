"""Bases that were distilled to few steps, and those that only look like them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from recare_patch.models.few_steps import few_steps

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
