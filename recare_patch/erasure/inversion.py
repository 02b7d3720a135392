"""Names that are fitted to pictures: textual inversion (Gal et al., arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.erasure.loop import EarlyStop, Fitted, Loop, fit, noised, step_generator, timestep_limit
from recare_patch.models import PLACEHOLDER, frozen

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

HELD_OUT = 16
"""States that a look at the held-out loss predicts."""

_LOOK_EVERY = 10
"""Steps between two looks."""


def most_evaluations(steps: int, batch_size: int, patience: int | None) -> int:
    """Denoiser evaluations of an inversion that takes all its steps; a training sample counts as 3."""
    looks = 0 if patience is None else -(-steps // _LOOK_EVERY)
    return steps * batch_size * 3 + looks * HELD_OUT


def name_templates(concept: Concept) -> tuple[str, ...]:
    """The concept's own prompts with :data:`PLACEHOLDER` where its name stands."""
    with_name = [prompt.replace(concept.text, PLACEHOLDER) for prompt in concept.name_prompts]
    return tuple(
        dict.fromkeys([concept.target_prompt_for(PLACEHOLDER), *(one for one in with_name if PLACEHOLDER in one)])
    )


def invert(
    base: BaseModel,
    latents: Tensor,
    prompts: Sequence[str],
    start: Tensor,
    loop: Loop,
    *,
    batch_size: int,
    patience: int | None = None,
    noise_up_to: float = 1.0,
) -> tuple[Tensor, Fitted]:
    """Fit token vectors so that the model, as it stands, predicts the noise on ``latents``.

    Args:
        base: the model to invert; an adapter that is on stays on.
        latents: clean latents of the pictures, ``[images, c, h, w]``.
        prompts: templates that hold :data:`PLACEHOLDER`.
        start: initial vectors ``[vectors, width]``.
        loop: its optimizer is AdamW whatever it says.
        patience: looks at a held-out fifth of the pictures without a new best that end the loop; the best
            vectors are returned then. None: all steps, on all pictures.
        noise_up_to: the share of the process, from its clean end, that states are drawn from.

    Returns:
        The vectors ``[vectors, width]``, fp32, and the fitted loop.
    """
    vectors, stop = nn.Parameter(start.detach().clone().float()), None
    if patience is not None:
        kept = max(1, len(latents) // 5)
        latents, held = latents[:-kept], latents[-kept:]
        generator = step_generator(loop.seed, f"{loop.stage} held out", 0)
        look = _held_out(base, held, prompts, vectors, noise_up_to, generator)
        stop = EarlyStop([vectors], look, patience=patience, every=_LOOK_EVERY)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(latents), (batch_size,), generator=generator)
        states, timesteps, noise = noised(base, latents[index], generator, noise_up_to)
        target = base.training_target(latents[index], noise, timesteps)
        which = int(torch.randint(0, len(prompts), (1,), generator=generator))
        embeds = base.encode_with_vectors([prompts[which]], vectors).repeat(batch_size)
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target.float())

    with frozen(*base.components.values()):
        loop = replace(loop, optimizer="adamw", save_every=50, crew=base.crew, dtype=base.dtype)
        return vectors.detach(), fit([vectors], loss_at, loop, stop=stop)


def _held_out(
    base: BaseModel, latents: Tensor, prompts: Sequence[str], vectors: Tensor, up_to: float, generator: torch.Generator
) -> Callable[[], float]:
    """The loss of the vectors as they stand, always on the same states, spread evenly over the timesteps."""
    rows = torch.arange(HELD_OUT)
    clean = latents[rows % len(latents)]
    timesteps = ((rows + 0.5) / HELD_OUT * timestep_limit(base, up_to)).long().to(base.device)
    noise = torch.randn(clean.shape, generator=generator).to(base.device, clean.dtype)
    states = base.add_noise(clean, noise, timesteps)
    target = base.training_target(clean, noise, timesteps).float()

    def loss() -> float:
        embeds = base.encode_with_vectors(prompts, vectors)[rows % len(prompts)]
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target).item()

    return loss
