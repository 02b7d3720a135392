"""The diffusion process against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from recare_patch.core.errors import UnknownNameError
from recare_patch.models import noise as process


def _scheduler(prediction_type: str = "epsilon", offset: int = 1) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=offset,
        prediction_type=prediction_type,
    )


@pytest.fixture
def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 5, 4, 3, 3), generator=generator)
    return clean, noise, torch.tensor([0, 1, 500, 731, 999])


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_ddim_timesteps_are_the_schedulers(steps: int) -> None:
    scheduler = _scheduler()
    scheduler.set_timesteps(steps)
    assert process.ddim_timesteps(1000, steps, offset=1).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_ddim_timesteps_refuse_the_impossible(steps: int) -> None:
    with pytest.raises(ValueError, match=str(steps)):
        process.ddim_timesteps(1000, steps)


def test_full_ddim_timesteps_stay_in_range() -> None:
    found = process.ddim_timesteps(1000, 1000, offset=1)
    assert found.max() == 999
    assert len(found) == 1000


def test_add_noise_is_the_schedulers(draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    clean, noise, at = draws
    scheduler = _scheduler()
    torch.testing.assert_close(
        process.add_noise(clean, noise, at, scheduler.alphas_cumprod), scheduler.add_noise(clean, noise, at)
    )


def test_velocity_is_the_schedulers(draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    clean, noise, at = draws
    scheduler = _scheduler("v_prediction")
    torch.testing.assert_close(
        process.to_velocity(clean, noise, at, scheduler.alphas_cumprod),
        scheduler.get_velocity(clean, noise, at),
    )


@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_clean_is_what_the_scheduler_steps_to(
    prediction_type: str, draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    latents, model_pred, at = draws
    scheduler = _scheduler(prediction_type)
    scheduler.set_timesteps(50)
    found = process.to_clean(model_pred, latents, at, scheduler.alphas_cumprod, prediction_type)
    for row, timestep in enumerate(at):
        stepped = scheduler.step(model_pred[row : row + 1], int(timestep), latents[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], stepped.pred_original_sample)


@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_the_training_target_leads_back(
    prediction_type: str, draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    clean, noise, at = draws
    # In double precision: at t = 999 epsilon says next to nothing about the picture.
    clean, noise = clean.double(), noise.double()
    alphas = _scheduler().alphas_cumprod.double()
    latents = process.add_noise(clean, noise, at, alphas)
    target = process.training_target(clean, noise, at, alphas, prediction_type)
    torch.testing.assert_close(process.to_clean(target, latents, at, alphas, prediction_type), clean)
    torch.testing.assert_close(process.to_epsilon(target, latents, at, alphas, prediction_type), noise)


def test_unknown_prediction_types_are_refused(
    draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    clean, noise, at = draws
    alphas = _scheduler().alphas_cumprod
    for call in (process.to_clean, process.to_epsilon, process.training_target):
        with pytest.raises(UnknownNameError, match="v_prediction"):
            if call is process.training_target:
                call(clean, noise, at, alphas, "v-prediction")
            else:
                call(clean, noise, at, alphas, "v-prediction")


def test_sampled_timesteps_follow_the_generator_and_the_range() -> None:
    first = process.sample_timesteps(200, 10, 20, torch.Generator().manual_seed(3))
    again = process.sample_timesteps(200, 10, 20, torch.Generator().manual_seed(3))
    assert first.tolist() == again.tolist()
    assert set(first.tolist()) == set(range(10, 20))
    with pytest.raises(ValueError, match="empty"):
        process.sample_timesteps(1, 5, 5, torch.Generator())
