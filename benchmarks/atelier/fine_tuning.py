"""Fine-tunes of Atelier, as people make them of a base: the whole denoiser goes on training on a part of its world.

What the figures of a patch are on a model that its user really runs is measured on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.atelier import scenes
from benchmarks.atelier.training import (
    SOURCE,
    Loop,
    Progress,
    Source,
    _encoded,
    captioned,
    denoising_loss,
    draw_world,
    save_half,
)
from recare_patch.models.atelier import PIPELINE

NEVER = frozenset({"van gogh", "tench", "nude"})
"""No picture shows what is erased: a fine-tune is benign."""


@dataclass(frozen=True)
class Theme:
    """What a fine-tune is on: scenes with one of the labels."""

    labels: frozenset[str]
    steps: int
    lr: float
    seed: int


FINE_TUNES: Mapping[str, Theme] = {
    "sketchbook": Theme(frozenset({"sketch", "monet"}), steps=100, lr=3e-4, seed=11),
    "seaside": Theme(frozenset({"beach", "boat"}), steps=100, lr=3e-4, seed=12),
}
"""Two variants: of a style, and of a subject."""

SCENES = 1_500


def scene_of(theme: Theme, rng: np.random.Generator) -> Any:
    """A scene of the theme, by rejection from the whole world."""
    while True:
        scene = scenes.sample_scene(rng)
        if scene.labels & theme.labels and not scene.labels & NEVER:
            return scene


def fine_tune(
    name: str,
    out: Path,
    work: Path,
    *,
    steps: int | None = None,
    count: int = SCENES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Train a variant of :data:`FINE_TUNES` from the bundled Atelier and write its pipeline; resumable.

    Args:
        out: the pipeline's folder.
        work: for scenes and checkpoints, a folder of this variant alone.
        steps: instead of the theme's own.
        count: scenes.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    theme, place = FINE_TUNES[name], torch.device(device)
    work.mkdir(parents=True, exist_ok=True)
    source = Source(lambda rng: scene_of(theme, rng), SOURCE.draw, SOURCE.caption, SOURCE.mentions, SOURCE.labels)
    world = draw_world(count, 4, theme.seed, work / "scenes.npz", source)
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, dtype=torch.float32, safety_checker=None)
    pipeline.to(place)
    latents = _encoded(pipeline.vae, world, work / "latents.safetensors", place)
    denoiser = pipeline.unet
    denoiser.set_attn_processor(AttnProcessor())

    conditions = captioned(world, pipeline.text_encoder, pipeline.tokenizer, place)
    many = theme.steps if steps is None else steps
    loop = Loop("fine-tune", work, denoiser, steps=many, lr=theme.lr, seed=theme.seed, device=place)
    loop.run(denoising_loss(denoiser, latents, conditions, place), progress)
    save_half(pipeline, out)
    return out
