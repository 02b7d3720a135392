"""Sources of noisy latents, and textual inversion on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.erasure.inversion import invert
from recare_patch.erasure.states import STATES, noised
from recare_patch.models import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.recipe.recipe import STATES as NAMES


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(str(tiny_sd), device="cpu")


def _source(base: BaseModel, name: str) -> object:
    latents = torch.randn((3, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    source = STATES.get(name)
    assert isinstance(source, type)
    return source(base, latents, base.encode_prompts(["Van Gogh", "stars"]), base.encode_prompts([""]))


def test_recipe_names_are_the_registered_sources() -> None:
    assert sorted(NAMES) == sorted(STATES.names())


@pytest.mark.parametrize("name", STATES.names())
def test_every_source_gives_repeatable_states(base: BaseModel, name: str) -> None:
    which = torch.tensor([0, 1])
    first = _source(base, name).draw(0, which, torch.Generator().manual_seed(1))  # type: ignore[attr-defined]
    again = _source(base, name).draw(0, which, torch.Generator().manual_seed(1))  # type: ignore[attr-defined]
    latents, timesteps = first
    assert latents.shape == (2, *base.latent_shape) and timesteps.shape == (2,)
    assert torch.isfinite(latents).all()
    assert int(timesteps.min()) >= 0 and int(timesteps.max()) < base.num_train_timesteps
    assert torch.equal(latents, again[0]) and torch.equal(timesteps, again[1])


def test_target_images_cost_no_evaluation_and_a_shared_rollout_is_cheaper(base: BaseModel) -> None:
    cost = {}
    for name in STATES.names():
        source, before = _source(base, name), base.counter.total
        for step in range(20):
            source.draw(step, torch.tensor([0, 1]), torch.Generator().manual_seed(step))  # type: ignore[attr-defined]
        cost[name] = base.counter.total - before
    assert cost["target-images"] == 0
    # 19 steps, both halves, two rows, once in 20 training steps.
    assert cost["shared-rollout"] == 19 * 2 * 2
    assert cost["rollout"] > 5 * cost["shared-rollout"]


def test_noised_matches_the_scheduler(base: BaseModel) -> None:
    clean = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    states, timesteps, noise = noised(base, clean, torch.Generator().manual_seed(2))
    expected = base.pipeline.scheduler.add_noise(clean, noise, timesteps)
    assert torch.allclose(states, expected, atol=1e-6)


def test_inversion_lowers_the_loss_and_touches_nothing_else(base: BaseModel) -> None:
    own = {k: v.clone() for k, v in base.denoiser.state_dict().items()}
    latents = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    start = base.word_vector("painting")[None]
    template = ["A painting in the style of <*>"]
    # The same draws twice: with steps too small to matter, and with real ones.
    _, still = invert(
        base, latents, template, start, steps=40, batch_size=2, learning_rate=1e-9, seed=0, stage="inversion"
    )
    vectors, fitted = invert(
        base, latents, template, start, steps=40, batch_size=2, learning_rate=0.5, seed=0, stage="inversion"
    )
    assert vectors.shape == start.shape and not torch.equal(vectors, start)
    assert sum(fitted.losses[-20:]) < sum(still.losses[-20:])
    assert all(torch.equal(own[k], v) for k, v in base.denoiser.state_dict().items())
