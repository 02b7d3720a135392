"""The bundled base as users meet it: plain diffusers, quality by the judge, an erasure on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.atelier import scenes
from benchmarks.atelier.quality import measure
from benchmarks.atelier.report import judge_accuracy
from recare_patch.careset.clip import Clip
from recare_patch.erasure import erase, resolve_recipe
from recare_patch.models import BaseModel, atelier, load_base
from recare_patch.models.atelier.judge import LABELS, Judge
from recare_patch.patch import generate_pictures


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("atelier", device="cpu")


def test_it_is_small_enough_for_the_wheel() -> None:
    facts = atelier.info()
    assert facts.megabytes <= 25
    assert 6e6 < facts.parameters["pipeline/unet"] < 9e6


def test_the_plainest_diffusers_call_works() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(atelier.PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a cat", num_inference_steps=2).images[0]
    assert image.size == (scenes.SIZE, scenes.SIZE)


def test_clip_and_pipeline_share_their_text_tower(base: BaseModel) -> None:
    clip = Clip.load("atelier")
    own = base.pipeline.text_encoder.state_dict()
    theirs = clip._model.text_model.state_dict()
    for name, value in own.items():
        assert torch.equal(value, theirs[name.removeprefix("text_model.")]), name


def test_the_judge_is_right_on_drawn_scenes() -> None:
    right = judge_accuracy(Judge.load(), count=300)
    assert min(right.values()) >= 0.96, right


def test_the_judge_takes_pictures_of_any_size() -> None:
    picture = Image.fromarray(scenes.draw(scenes.Scene("photo", "night", "snow", ("cat",), ("stars",), 1)))
    for size in (64, 128, 512):
        (found,) = Judge.load()([picture.resize((size, size))])
        assert {"photo", "night", "snow", "cat", "stars"} <= found
    assert set(found) <= set(LABELS)


def test_it_draws_what_held_out_captions_ask_for(base: BaseModel) -> None:
    """A smoke test on few pictures; docs/atelier.md has the measurement."""
    rates = measure(
        lambda prompts, seeds: base.generate(prompts, seeds, steps=20, guidance_scale=5.0, batch_size=32),
        Judge.load(),
        count=48,
    )
    assert rates["style"].value >= 0.85
    assert rates["object"].value >= 0.80


def test_a_patch_made_here_gives_plain_diffusers_the_same_pictures(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    small = {
        "target_images.count": 4,
        "target_images.steps": 4,
        "care_set.source": "clip",
        "search.rounds": 0,
        "erase.steps": 4,
        "erase.ends": "steps",
        "erase.retained_images": 4,
    }
    folder = tmp_path / "p"
    erase(resolve_recipe("van gogh", overrides=small), folder, device="cpu", preview=False)
    prompts, seeds = ["A painting in the style of Van Gogh", "a photo of stars"], [3, 4]
    pairs = generate_pictures("atelier", [(folder, 1.0)], prompts, seeds, steps=4, device="cpu")
    pipe = StableDiffusionPipeline.from_pretrained(atelier.PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    for pair in pairs:
        generator = torch.Generator().manual_seed(pair.seed)
        plain = pipe(pair.prompt, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0]
        assert np.abs(np.asarray(plain, int) - np.asarray(pair.after, int)).max() <= 1
        assert np.abs(np.asarray(pair.before, int) - np.asarray(pair.after, int)).max() > 1
