"""Sampling step by step, with a look at the latents and a hand on them between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recare_patch.models.inputs import PromptEmbeds

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import BaseModel


def classifier_free(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """``uncond + scale (cond − uncond)`` (Ho and Salimans, arXiv 2207.12598, equation 6, with scale = 1 + w).

    Predictions ``[batch, channels, height, width]`` under the empty prompt and under the prompt.
    """
    return uncond + guidance_scale * (cond - uncond)


class Trajectory:
    """The way from noise to a picture with the base's own scheduler, ``len(timesteps)`` steps long.

    Latents ``[batch, channels, height, width]`` are of the scheduler's own scale, and of the base's dtype.
    """

    def __init__(self, base: BaseModel, steps: int, generator: torch.Generator | None = None) -> None:
        """The generator is for schedulers that draw noise at each step."""
        self.base = base
        own = base.pipeline.scheduler
        self.scheduler = type(own).from_config(own.config)
        self.scheduler.set_timesteps(steps)
        self.timesteps: Tensor = self.scheduler.timesteps
        # Ancestral schedulers draw noise at each step, which must follow from the seed too.
        takes = "generator" in signature(self.scheduler.step).parameters
        self._draws = {"generator": generator} if takes else {}

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Unit noise, each row from a generator of its own, as :meth:`LatentDiffusion.generate` draws it."""
        shape = self.base.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.base.device, self.base.dtype)

    def start(self, noise: Tensor) -> Tensor:
        """The latents before the first step."""
        # Schedulers of flow matching start from plain noise, and scale nothing.
        return noise.to(self.base.device, self.base.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def noised(self, clean: Tensor, noise: Tensor, number: int) -> Tensor:
        """Clean latents as they would be before a step, by its number; after the last step as they are."""
        clean = clean.to(noise)
        if number >= len(self.timesteps):
            return clean
        times = self.timesteps[number].expand(len(clean))
        # Schedulers of flow matching call it otherwise.
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(clean, times, noise)
        return self.scheduler.add_noise(clean, noise, times)

    def seen(self, latents: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Latents and timesteps ``[batch]`` as the denoiser sees them before a step."""
        timestep = self.timesteps[number]
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        # Some schedulers count in fp64, which not every device has.
        time = timestep.float() if timestep.is_floating_point() else timestep
        # Schedulers over σ keep latents of that size, and the denoiser sees them scaled to unit variance.
        return scaled(latents, timestep), time.expand(len(latents)).to(latents.device)

    @torch.no_grad()
    def step(
        self,
        latents: Tensor,
        number: int,
        prompts: PromptEmbeds,
        empty: PromptEmbeds | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The latents after a step, guided from the one row of ``empty`` where it is given."""
        rows = len(latents)
        seen, times = self.seen(latents, number)
        if empty is None:
            predicted = self.base.denoise(seen, times, prompts)
        else:
            both = PromptEmbeds.cat([empty.repeat(rows), prompts])
            uncond, cond = self.base.denoise(torch.cat([seen, seen]), times.repeat(2), both).chunk(2)
            predicted = classifier_free(uncond, cond, guidance_scale)
        return self.scheduler.step(predicted, self.timesteps[number], latents, **self._draws).prev_sample
