"""Erasing on every architecture, as far as plain diffusers with the patch in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recare_patch.erasure.run import erase
from recare_patch.models import load_base
from recare_patch.models.stable_diffusion_xl import size_buckets
from recare_patch.patch import Patch
from recare_patch.recipe import Recipe
from tests.erasure import making

SHORT = {"search.erase_steps": 2, "search.inversion_steps": 2, "erase.steps": 4, "erase.retained_images": 2}
PROMPTS, SEEDS = ["a painting in the style of van gogh", "a cat"], [3, 4]


def small_recipe(base: Path, clip: Path, **changes: object) -> Recipe:
    return making.small_recipe(base, clip, **{**SHORT, **changes})


def _plain(folder: Path, pipe: Any) -> list[np.ndarray[Any, Any]]:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = pipe(PROMPTS, num_inference_steps=2, guidance_scale=5.0, generator=generators)
    return [np.asarray(image, dtype=int) for image in drawn.images]


@pytest.mark.parametrize(
    ("name", "start", "part", "states"),
    [
        ("tiny_sd_v", "unet.", "attn2.to_k", "target-images"),
        ("tiny_sdxl", "unet.", "attn2.to_k", "target-images"),
        ("tiny_sd3", "transformer.", "attn.add_k_proj", "shared-rollout"),
    ],
)
def test_an_erased_patch_loads_in_plain_diffusers(
    name: str, start: str, part: str, states: str, request: Any, tiny_clip: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folder: Path = request.getfixturevalue(name)
    recipe = small_recipe(folder, tiny_clip, **{"erase.states": states})
    result = erase(recipe, tmp_path / "patch", device="cpu", preview=False)
    assert all(key.startswith(start) for key in result.patch.tensors)
    assert any(part in key for key in result.patch.tensors)
    assert result.patch.metadata is not None and result.patch.metadata.base_family == load_base(folder).family

    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny_sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **left_out)
    before = _plain(folder, pipe)
    pipe.load_lora_weights(tmp_path / "patch", weight_name="pytorch_lora_weights.safetensors")
    after = _plain(folder, pipe)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    ours = load_base(folder)
    with Patch.load(tmp_path / "patch").apply(ours.pipeline):
        drawn = ours.generate(PROMPTS, SEEDS, steps=2, guidance_scale=5.0)
    for picture, wanted in zip(drawn, after, strict=True):
        assert np.abs(np.asarray(picture, dtype=int) - wanted).max() <= 1


def test_size_buckets() -> None:
    found = size_buckets(1024)
    assert {(512, 2048), (512, 1856), (704, 1344), (768, 1280), (1024, 960), (1024, 1024)} <= set(found)
    assert not {(512, 1792), (640, 1472), (960, 960), (1088, 1024)} & set(found)
    assert all((width, height) in found for height, width in found)
