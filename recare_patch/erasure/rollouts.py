"""States of rollouts: what the adapted model passes through on its way from noise to a picture.

The published way rolls out anew for each state. Here the states of one rollout may serve many steps; noised target
images, which the CARE-set needs anyway, give states for nothing (:class:`TargetImageStates`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recare_patch.models import Trajectory

if TYPE_CHECKING:
    from recare_patch.models import BaseModel, PromptEmbeds
    from recare_patch.recipe import Recipe


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
        trajectory = Trajectory(self.base, self.steps, generator)
        latents = trajectory.start(torch.randn((len(which), *self.shape), generator=generator))
        found = []
        for number in range(max(stops) + 1):
            if number in stops:
                found.append(trajectory.seen(latents, number))
            if number < max(stops):
                latents = trajectory.step(latents, number, self.erased[which], self.empty, self.guidance_scale)
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
