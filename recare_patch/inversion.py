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
from recare_patch.base_models import PLACEHOLDER
from recare_patch.states import noised
from recare_patch.training import Checkpoint, Fitted, fit

if TYPE_CHECKING:
    from recare_patch.base_models import BaseModel
    from recare_patch.concepts import Concept
    from recare_patch.progress import Progress


def name_templates(concept: Concept) -> tuple[str, ...]:
    """The concept's own prompts with :data:`PLACEHOLDER` where its name stands."""
    with_name = [prompt.replace(concept.text, PLACEHOLDER) for prompt in concept.name_prompts]
    return tuple(
        dict.fromkeys(
            [concept.target_prompt_for(PLACEHOLDER), *(one for one in with_name if PLACEHOLDER in one)]
        )
    )


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
        target = base.training_target(latents[index], noise, timesteps)
        which = int(torch.randint(0, len(prompts), (1,), generator=generator))
        embeds = base.encode_with_vectors([prompts[which]], vectors).repeat(batch_size)
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target.float())

    with adapters.frozen(*base.components.values()):
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
            crew=base.crew,
        )
    return vectors.detach(), fitted
