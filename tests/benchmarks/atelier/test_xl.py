"""Atelier XL: a few steps of its training, and an erasure on what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.atelier import training_xl
from benchmarks.atelier.training_xl import XLTraining, shown
from recare_patch.erasure.run import erase
from recare_patch.models import load_base
from recare_patch.models.atelier.judge import Judge
from recare_patch.patch import Patch
from recare_patch.recipe import load_recipe
from tests.erasure.making import SMALL

SHORT = XLTraining(scenes=96, captions=2, encoder_steps=1, denoiser_steps=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("xl")
    training_xl.train(place / "atelier-xl", place / "work", SHORT)
    return place


def test_it_is_a_plain_sdxl_pipeline(built: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(built / "atelier-xl" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a cat", num_inference_steps=1).images[0]
    assert image.size == (64, 64)
    assert Judge.load(built / "atelier-xl" / "judge" / "judge.safetensors")([image])
    base = load_base(built / "atelier-xl" / "pipeline")
    assert (base.family, base.token_width, base.latent_shape) == ("stable-diffusion-xl", 288, (4, 16, 16))
    assert 6e6 < sum(p.numel() for p in base.denoiser.parameters()) < 14e6


def test_a_second_run_finds_its_work_done(built: Path) -> None:
    steps: list[str] = []
    training_xl.train(built / "again", built / "work", SHORT, progress=lambda stage, *_: steps.append(stage))
    assert steps == []
    one, other = (load_base(built / name / "pipeline") for name in ("atelier-xl", "again"))
    assert one.denoiser_hash() == other.denoiser_hash()


def test_its_recipe_erases_on_it(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    recipe = load_recipe("van-gogh-atelier-xl").with_overrides(SMALL | {"erase.steps": 4, "care_set.source": "clip"})
    result = erase(recipe, tmp_path / "patch", device="cpu", preview=False)
    assert result.patch.metadata is not None and result.patch.metadata.base_family == "stable-diffusion-xl"
    assert Patch.load(tmp_path / "patch").check_base(load_base(recipe.base))


def test_pictures_are_whole_small_or_cropped() -> None:
    pixels = torch.rand((200, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    found, numbers = shown(pixels, torch.Generator().manual_seed(1))
    assert found.shape == pixels.shape and numbers.shape == (200, 6)
    whole = (numbers == torch.tensor([64, 64, 0, 0, 64, 64])).all(1)
    small, cropped = numbers[:, 0] < 64, numbers[:, 2:4].sum(1) > 0
    assert 0.6 < whole.float().mean() < 0.8 and small.any() and cropped.any()
    assert not (small & cropped).any()
    assert all(torch.equal(found[k], pixels[k]) == bool(whole[k]) for k in range(200) if not cropped[k])
