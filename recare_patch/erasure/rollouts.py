"""States of rollouts: what the adapted model passes through on its way from noise to a picture.

The published way rolls out anew for each state. Here the states of one rollout may serve many steps; noised target
images, which the CARE-set needs anyway, give states for nothing (:class:`TargetImageStates`).
"""

from __future__ import annotations

import math
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recare_patch.models import PromptEmbeds

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Recipe


def classifier_free(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """``uncond + scale (cond − uncond)`` (Ho and Salimans, arXiv 2207.12598, equation 6, with scale = 1 + w).

    Predictions ``[batch, channels, height, width]`` under the empty prompt and under the prompt.
    """
    return uncond + guidance_scale * (cond - uncond)


class RolloutStates:
    """One rollout of the adapted model for each state, under its own erased prompt (as published)."""

    steps = 50
    guidance_scale = 3.0

    def __init__(self, base: BaseModel, latents: Tensor, erased: PromptEmbeds, empty: PromptEmbeds) -> None:
        self.base, self.shape = base, tuple(latents.shape[1:])
        self.erased, self.empty = erased, empty

    @torch.no_grad()
    def roll(self, which: Tensor, generator: torch.Generator, stops: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The states of a rollout before each of the step numbers in ``stops``."""
        base = self.base
        scheduler = type(base.pipeline.scheduler).from_config(base.pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        rows = len(which)
        latents = torch.randn((rows, *self.shape), generator=generator).to(base.device, base.dtype)
        # Schedulers of flow matching start from plain noise, and scale nothing.
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        # Ancestral schedulers draw noise at each step, which must follow from the seed too.
        draws = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        prompts = PromptEmbeds.cat([self.empty.repeat(rows), self.erased[which]])
        found = []
        for number, timestep in enumerate(scheduler.timesteps[: max(stops) + 1]):
            # Some schedulers count in fp64, which not every device has.
            time = timestep.float() if timestep.is_floating_point() else timestep
            times = time.expand(rows).to(base.device)
            # Schedulers over σ keep latents of that size, and the denoiser sees them scaled to unit variance.
            seen = scaled(latents, timestep)
            if number in stops:
                found.append((seen, times))
            if number == max(stops):
                break
            uncond, cond = base.denoise(torch.cat([seen, seen]), times.repeat(2), prompts).chunk(2)
            guided = classifier_free(uncond, cond, self.guidance_scale)
            latents = scheduler.step(guided, timestep, latents, **draws).prev_sample
        return found

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States and timesteps of one step."""
        stop = int(torch.randint(0, self.steps, (1,), generator=generator))
        return self.roll(which, generator, [stop])[0]


class SharedRolloutStates(RolloutStates):
    """One rollout serves ``period`` training steps: each draws from all the states it passed through."""

    period = 20
    steps = 20

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States and timesteps of one step."""
        if step % self.period == 0:
            self.pool = self.roll(which, generator, list(range(self.steps)))
        picks = torch.randint(0, len(self.pool), (len(which),), generator=generator)
        latents = torch.stack([self.pool[int(k)][0][row] for row, k in enumerate(picks)])
        return latents, torch.stack([self.pool[int(k)][1][row] for row, k in enumerate(picks)])


def rollout_evaluations(recipe: Recipe) -> int:
    """Denoiser evaluations of the rollouts that all concepts' training steps share; 0 where there are none."""
    if recipe.erase.states != "shared-rollout":
        return 0
    rollouts = math.ceil(recipe.erase.steps / SharedRolloutStates.period)
    return len(recipe.concepts) * rollouts * (SharedRolloutStates.steps - 1) * 2 * recipe.erase.batch_size
