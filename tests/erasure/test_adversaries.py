"""Adversaries in the loop: they learn, are erased with the concept, and a resumed run meets the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.erasure.loop import Checkpoint, fit
from recare_patch.erasure.methods import ErasingContext
from recare_patch.erasure.methods.adversaries import Adversaries
from recare_patch.erasure.methods.recare import ReCARE
from recare_patch.models import PLACEHOLDER, BaseModel
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base
from recare_patch.recipe.recipe import (
    ADVERSARY_SPACES,
    PRESETS,
    AdversaryOptions,
    EraseOptions,
    Recipe,
    preset_overrides,
)

TEMPLATES = (f"A painting in the style of {PLACEHOLDER}", f"a {PLACEHOLDER} painting")


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(str(tiny_sd), device="cpu")


def _adversaries(base: BaseModel, **options: object) -> Adversaries:
    latents = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(5))
    chosen = AdversaryOptions(**{"count": 2, "vectors": 3, "batch_size": 2, "steps": 1, **options})  # type: ignore[arg-type]
    return Adversaries(base, latents, TEMPLATES, "art", chosen)


def _improve(adversaries: Adversaries, steps: range) -> None:
    for step in steps:
        adversaries.improve(torch.Generator().manual_seed(step))


def _attach(base: BaseModel) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return adapters.attach(base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=generator)


@pytest.fixture(params=ADVERSARY_SPACES)
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_adversaries_take_turns_and_one_too_old_starts_anew(base: BaseModel) -> None:
    adversaries = _adversaries(base, life=2)
    ages = []
    for step in range(8):
        _improve(adversaries, range(step, step + 1))
        state = adversaries.state()
        ages.append([int(state[f"{k}.age"]) for k in range(2) if f"{k}.age" in state])
    assert ages == [[1], [1, 1], [2, 1], [2, 2], [1, 2], [1, 1], [2, 1], [2, 2]]
    assert {len(state[f"{k}.vectors"]) for k in range(2)} <= {1, 3}


def test_adversaries_learn_what_the_model_makes_of_the_pictures(base: BaseModel, space: str) -> None:
    """Against one fixed picture, the noise is predicted better with a name that was sought for long."""
    adversaries = _adversaries(base, count=1, life=1000, batch_size=4, learning_rate=5e-2, space=space)
    adversaries.latents = adversaries.latents[:1]
    generator = torch.Generator().manual_seed(77)
    noise = torch.randn((16, *base.latent_shape), generator=generator)
    timesteps = torch.randint(0, 1000, (16,), generator=generator)
    latents = adversaries.latents.repeat(16, 1, 1, 1)
    states = base.add_noise(latents, noise, timesteps)

    def error() -> float:
        names = adversaries.names(1, torch.Generator().manual_seed(0)).repeat(16)
        with torch.no_grad():
            return float((base.denoise(states, timesteps, names) - noise).square().mean())

    _improve(adversaries, range(1))
    before = error()
    _improve(adversaries, range(1, 60))
    assert error() < before


def test_state_goes_on_where_it_stopped(base: BaseModel, space: str) -> None:
    whole, first, second = (_adversaries(base, life=3, space=space) for _ in range(3))
    _improve(whole, range(9))
    _improve(first, range(5))
    second.load_state(first.state())
    _improve(second, range(5, 9))
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_embeddings_of_a_whole_prompt_are_an_adversary_too(base: BaseModel) -> None:
    adversaries = _adversaries(base, space="embeddings")
    _improve(adversaries, range(3))
    said = adversaries.names(2, torch.Generator().manual_seed(0))
    plain = base.encode_prompts(["a cat"])
    assert said.prompt_embeds.shape == (2, *plain.prompt_embeds.shape[1:])
    assert not said.prompt_embeds.requires_grad


def test_seeking_leaves_the_adapter_without_gradient(base: BaseModel) -> None:
    parameters = _attach(base)
    _improve(_adversaries(base), range(2))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


class _Killed(Exception):
    pass


def _train(
    base: BaseModel, checkpoint: Path | None, space: str, stop: int | None = None
) -> list[torch.Tensor]:
    parameters = _attach(base)
    try:
        adversaries = _adversaries(base, space=space)
        options = EraseOptions(batch_size=2, retain_batch_size=2)
        context = ErasingContext(
            base,
            options,
            erased=base.encode_prompts(["A painting in the style of Van Gogh"]),
            empty=base.encode_prompts([""]),
            anchors=base.encode_prompts(["A stars", "A night"]),
            retained=base.encode_prompts(["A painting of stars", "A painting of night"]),
            retained_latents=adversaries.latents[:2],
            pictured=torch.tensor([0, 1]),
            adversaries=adversaries,
        )
        method = ReCARE(context)

        def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop:
                raise _Killed
            latents = torch.randn((2, *base.latent_shape), generator=generator)
            return method.loss(latents, torch.tensor([200, 600]), torch.tensor([0, 0]), generator)

        fit(
            parameters,
            loss_at,
            stage="erase",
            steps=6,
            learning_rate=1e-2,
            seed=0,
            optimizer="adamw",
            checkpoint=Checkpoint(checkpoint) if checkpoint else None,
            save_every=2,
            carried=adversaries,
        )
        return [parameter.detach().clone() for parameter in parameters]
    finally:
        adapters.detach(base.denoiser)


def test_a_resumed_run_meets_the_same_adversaries(base: BaseModel, space: str, tmp_path: Path) -> None:
    whole = _train(base, None, space)
    with pytest.raises(_Killed):
        _train(base, tmp_path / "loop.safetensors", space, stop=5)
    resumed = _train(base, tmp_path / "loop.safetensors", space)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_recipe_without_adversaries_keeps_its_hash_and_every_preset_is_a_recipe() -> None:
    recipe = Recipe(concept={"text": "Van Gogh", "kind": "style"})  # type: ignore[arg-type]
    assert recipe.with_overrides({"adversary.life": 7}).hash == recipe.hash
    for name in PRESETS:
        assert recipe.with_overrides(preset_overrides(name)).hash != recipe.hash
