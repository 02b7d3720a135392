"""Where the noisy latents of a training step come from.

The published way rolls the adapted model out from noise and keeps one state of each rollout. Two
cheaper sources stand beside it: the states of one rollout serve many steps, or target images,
which the CARE-set needs anyway, are noised and give states for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from recare_patch.core import Registry
from recare_patch.erasure.targets import classifier_free
from recare_patch.models import sample_timesteps

if TYPE_CHECKING:
    from recare_patch.models import BaseModel, PromptEmbeds

STATES = Registry(
    "states",
    {
        "rollout": "recare_patch.erasure.states:RolloutStates",
        "shared-rollout": "recare_patch.erasure.states:SharedRolloutStates",
        "target-images": "recare_patch.erasure.states:TargetImageStates",
    },
)


class StateSource(Protocol):
    """Gives each training step its noisy latents.

    Attributes:
        period: a checkpoint may only fall on a multiple of this many steps.
    """

    period: int

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(z_t, timesteps)`` of one step: ``[batch, c, h, w]`` and ``[batch]``.

        Args:
            step: number of the step.
            which: index of each row's erased prompt, ``[batch]``.
            generator: for every draw.
        """


def timestep_limit(base: BaseModel, up_to: float) -> int:
    """The first timestep beyond a share of the process, counted from its clean end."""
    return max(1, round(up_to * base.num_train_timesteps))


def noised(
    base: BaseModel, latents: Tensor, generator: torch.Generator, up_to: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise clean latents ``[batch, c, h, w]`` to uniformly drawn timesteps ``[batch]``.

    Args:
        base: whose process it is.
        latents: clean.
        generator: for every draw.
        up_to: the share of the process, from its clean end, that timesteps are drawn from.

    Returns:
        ``(z_t, timesteps, noise)``.
    """
    timesteps = sample_timesteps(len(latents), 0, timestep_limit(base, up_to), generator).to(base.device)
    noise = torch.randn(latents.shape, generator=generator).to(base.device, latents.dtype)
    return base.add_noise(latents, noise, timesteps), timesteps, noise


class TargetImageStates:
    """Noised latents of the target images."""

    period = 1

    def __init__(self, base: BaseModel, latents: Tensor, erased: PromptEmbeds, empty: PromptEmbeds) -> None:
        self.base, self.latents = base, latents

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`StateSource`."""
        index = torch.randint(0, len(self.latents), (len(which),), generator=generator)
        states, timesteps, _ = noised(self.base, self.latents[index], generator)
        return states, timesteps


class RolloutStates:
    """One rollout of the adapted model for each state, under its own erased prompt (as published)."""

    period = 1
    steps = 50
    guidance_scale = 3.0

    def __init__(self, base: BaseModel, latents: Tensor, erased: PromptEmbeds, empty: PromptEmbeds) -> None:
        self.base, self.shape = base, tuple(latents.shape[1:])
        self.erased, self.empty = erased, empty

    @torch.no_grad()
    def roll(
        self, which: Tensor, generator: torch.Generator, stops: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """The states of a rollout before each of the step numbers in ``stops``."""
        base = self.base
        scheduler = type(base.pipeline.scheduler).from_config(base.pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        rows = len(which)
        latents = torch.randn((rows, *self.shape), generator=generator).to(base.device, base.dtype)
        # Schedulers of flow matching start from plain noise, and scale nothing.
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        prompts = type(self.erased).cat([self.empty.repeat(rows), self.erased[which]])
        found = []
        for number, timestep in enumerate(scheduler.timesteps[: max(stops) + 1]):
            times = timestep.expand(rows).to(base.device)
            if number in stops:
                found.append((latents, times))
            if number == max(stops):
                break
            pred = base.denoise(scaled(latents, timestep).repeat(2, 1, 1, 1), times.repeat(2), prompts)
            uncond, cond = pred.chunk(2)
            latents = scheduler.step(
                classifier_free(uncond, cond, self.guidance_scale), timestep, latents
            ).prev_sample
        return found

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`StateSource`."""
        stop = int(torch.randint(0, self.steps, (1,), generator=generator))
        return self.roll(which, generator, [stop])[0]


class SharedRolloutStates(RolloutStates):
    """One rollout serves ``period`` training steps: each draws from all the states it passed through."""

    period = 20
    steps = 20

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`StateSource`."""
        if step % self.period == 0:
            self.pool = self.roll(which, generator, list(range(self.steps)))
        picks = torch.randint(0, len(self.pool), (len(which),), generator=generator)
        latents = torch.stack([self.pool[int(k)][0][row] for row, k in enumerate(picks)])
        return latents, torch.stack([self.pool[int(k)][1][row] for row, k in enumerate(picks)])
