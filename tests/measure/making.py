"""What several tests of the evaluation need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recare_patch.careset import CareSet
from recare_patch.models import BaseModel
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch, PatchMetadata
from recare_patch.recipe import Concept, Recipe

SUITE: dict[str, Any] = {
    "name": "tiny",
    "base": "stable-diffusion",
    "concept": "Van Gogh",
    "kind": "style",
    "detector": "clip",
    "label": "van gogh",
    "plain": ["a painting by van gogh", "van gogh"],
    "paraphrased": ["a drawing by van gogh"],
    "implicit": ["stars in the night"],
    "care": [{"label": "stars", "prompts": ["a photo of stars", "a painting of stars"]}],
    "neighbours": [
        {"label": "monet", "prompts": ["a painting by monet"]},
        {"label": "picasso", "prompts": ["a painting by picasso"]},
    ],
    "retained": ["a photo of a cat", "a photo of a dog", "a house"],
    "labels": ["cat", "dog", "house"],
    "steps": 2,
}
"""A suite for the tiny models: what they draw is noise, so only its mechanics can be tested."""


def make_patch(
    base: BaseModel, folder: Path, clip: Path | None = None, *, seed: int = 0, concept: str = "Van Gogh"
) -> Path:
    """A patch of random numbers, large enough to change every picture."""
    recipe = Recipe(
        concept=Concept(text=concept, kind="style"), base=base.id, clip=str(clip) if clip else None
    ).with_overrides({"adapter.rank": 2, "adapter.alpha": 2.0, "search.batch_size": 2})
    generator = torch.Generator().manual_seed(seed)
    parameters = adapters.attach(base.denoiser, layers="cross-attention", rank=2, alpha=2.0, generator=generator)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    metadata = PatchMetadata.describe(recipe, base, CareSet.of_words(recipe.concept, ["stars", "night"]), {})
    patch = Patch.from_adapter(base, adapters.ADAPTER_NAME, 2, 2.0, metadata)
    adapters.detach(base.denoiser)
    patch.save(folder)
    return folder


def noise(count: int, seed: int = 0, size: int = 32) -> list[Image.Image]:
    """Pictures of noise."""
    draws = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in draws]
