"""Further training of a base, for the checks that ask what becomes of a patch under it.

It is the plain noise prediction of every fine-tuning script (Ho et al., arXiv 2006.11239, equation
14), on pictures that the base has drawn itself, so that no data set is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.erasure import Checkpoint, fit, noised
from recare_patch.models import kept_requires_grad, named_layers

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.models import BaseModel
    from recare_patch.patch import Patch

SAVE_EVERY = 50
"""Steps between checkpoints."""


@dataclass(frozen=True)
class Material:
    """What a model is trained on.

    Attributes:
        latents: clean latents of pictures, ``[pictures, c, h, w]``.
        prompts: the prompt of each; encoded by the model that is trained, since a patch may change its
            text encoder.
    """

    latents: Tensor
    prompts: tuple[str, ...]


@contextlib.contextmanager
def changed(network: nn.Module) -> Iterator[None]:
    """Inside, a network's weights may change in place; afterwards they are what they were, to the bit."""
    saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    with kept_requires_grad(network):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in network.state_dict().items():
                    tensor.copy_(saved[name])
            for parameter in network.parameters():
                parameter.grad = None


@torch.no_grad()
def merge_into(parts: Mapping[str, nn.Module], patch: Patch, scale: float = 1.0) -> None:
    """Add a patch to the weights that it changes: ``W + scale · B A`` (Hu et al., arXiv 2106.09685).

    Args:
        parts: networks without adapters, whose shapes the patch fits, by component.
        patch: what is added.
        scale: its strength.
    """
    layers = named_layers(parts)
    for module in patch.modules:
        weight = layers[module].weight
        assert isinstance(weight, Tensor)
        weight.add_((scale * patch.update(module)).to(weight.device, weight.dtype))


def tune(
    base: BaseModel,
    parameters: Sequence[nn.Parameter],
    material: Material,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    stage: str,
    optimizer: str = "adamw",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> int:
    """Train parameters of the base, at a constant rate, to predict the noise on the material.

    Args:
        base: as it stands, adapters and all.
        parameters: what is trained.
        material: what on.
        steps: counted from the start; a checkpoint of fewer steps is gone on with.
        batch_size: states a step.
        learning_rate: the same throughout, so that fewer steps are a part of more.
        seed: of all draws.
        stage: how progress and the base's counter call it.
        optimizer: a name in :data:`OPTIMIZERS`.
        checkpoint: file to save to and go on from.
        progress: told of every step.

    Returns:
        Denoiser evaluations from the first step on, those before a resume among them.
    """
    counter = base.counter
    mark = counter.total
    embeds = base.encode_prompts(material.prompts)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(material.latents), (batch_size,), generator=generator)
        clean = material.latents[index.to(material.latents.device)]
        states, timesteps, noise = noised(base, clean, generator)
        target = base.training_target(clean, noise, timesteps)
        pred = base.denoise(states, timesteps, embeds[index])
        return F.mse_loss(pred.float(), target.float())

    def restore(kept: dict[str, int]) -> None:
        nonlocal mark
        mark = counter.total - int(kept["evaluations"])

    with counter.stage(stage):
        fitted = fit(
            parameters,
            loss_at,
            stage=stage,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            optimizer=optimizer,
            schedule="constant",
            checkpoint=Checkpoint(checkpoint) if checkpoint is not None else None,
            save_every=SAVE_EVERY,
            extra=lambda: {"evaluations": counter.total - mark},
            restore_extra=restore,
            progress=progress,
        )
    return int(fitted.extra["evaluations"])
