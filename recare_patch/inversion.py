"""Textual inversion: find the vector that makes a model draw given pictures (Gal et al., arXiv 2208.01618).

The search uses it to find adversarial names of a concept in a model that was made to forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch import adapters
from recare_patch.states import noised
from recare_patch.timesteps import training_target
from recare_patch.training import Checkpoint, Fitted, fit

if TYPE_CHECKING:
    from recare_patch.base_models import BaseModel
    from recare_patch.progress import Progress


def invert(
    base: BaseModel,
    latents: Tensor,
    prompts: Sequence[str],
    start: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    stage: str,
    checkpoint: Checkpoint | None = None,
    extra: Callable[[], Mapping[str, Any]] = dict,
    restore_extra: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Fitted]:
    """Fit token vectors so that the model, as it stands, predicts the noise on ``latents``.

    The latents are encoded once by the caller; only the vectors are trained.

    Args:
        base: the model to invert; an adapter that is on stays on.
        latents: clean latents of the pictures, ``[images, c, h, w]``.
        prompts: templates that hold :data:`PLACEHOLDER`.
        start: initial vectors ``[vectors, width]``.
        steps, batch_size, learning_rate, seed, stage: of the loop.
        checkpoint, extra, restore_extra, progress: see :func:`recare_patch.training.fit`.

    Returns:
        The vectors ``[vectors, width]``, fp32, and the fitted loop.
    """
    vectors = nn.Parameter(start.detach().clone().float())

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(latents), (batch_size,), generator=generator)
        states, timesteps, noise = noised(base, latents[index], generator)
        target = training_target(latents[index], noise, timesteps, base.alphas_cumprod, base.prediction_type)
        which = int(torch.randint(0, len(prompts), (1,), generator=generator))
        embeds = base.encode_with_vectors([prompts[which]], vectors).repeat(batch_size)
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target.float())

    with adapters.frozen(base.denoiser):
        fitted = fit(
            [vectors],
            loss_at,
            stage=stage,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            optimizer="adamw",
            checkpoint=checkpoint,
            save_every=50,
            extra=extra,
            restore_extra=restore_extra,
            progress=progress,
        )
    return vectors.detach(), fitted
