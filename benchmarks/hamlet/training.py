"""Trains Hamlet from seeds: tokenizer, CLIP, judge, denoiser; the autoencoder is Atelier's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.atelier import training as atelier
from benchmarks.atelier.training import Progress, Source, Training, World
from benchmarks.hamlet import captions, scenes
from recare_patch.models.atelier import PIPELINE

STAGES = ("scenes", "tokenizer", "judge", "clip", "denoiser", "export")
VOCABULARY = 700
"""Entries of the tokenizer: 512 bytes, two markers and 186 merges. Most words are several tokens."""

WIDTH = 96
"""Of both of CLIP's towers, and of what the denoiser reads."""

SOURCE = Source(scenes.sample_scene, scenes.draw, captions.caption, captions.mentions, scenes.LABELS)
"""Hamlet's scenes."""

_AUTOENCODER = PIPELINE / "vae"


@dataclass(frozen=True)
class HamletTraining(Training):
    """Optimiser steps of each stage."""

    scenes: int = 12_000
    clip_steps: int = 1_700
    judge_steps: int = 700
    denoiser_steps: int = 4_600


def new_denoiser() -> Any:
    """The untrained denoiser: narrower than Atelier's and deeper, with attention below the full size alone."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(40, 80, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=5,
        norm_num_groups=8,
    )


def _train_tokenizer(
    config: HamletTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    atelier.train_tokenizer(world, work / "tokenizer", size=VOCABULARY)


def _train_judge(
    config: HamletTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    numbers = {"steps": config.judge_steps, "seed": config.seed + 21}
    atelier.train_judge(work, world, device, progress, labels=scenes.LABELS, **numbers)


def _train_clip(
    config: HamletTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    numbers = {"steps": config.clip_steps, "seed": config.seed + 22, "width": WIDTH, "layers": 3}
    atelier.train_clip("clip", work / "tokenizer", world, device, progress, out=work / "clip", **numbers)


def _train_denoiser(
    config: HamletTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    numbers = {"steps": config.denoiser_steps, "seed": config.seed + 23}
    atelier.train_denoiser(work, _AUTOENCODER, new_denoiser, world, device, progress, **numbers)


def _export(work: Path, out: Path) -> None:
    atelier.export(work, out, _AUTOENCODER)


def train(out: Path, work: Path, config: HamletTraining | None = None, **options: Any) -> dict[str, float]:
    """Train Hamlet, see :func:`benchmarks.atelier.training.run_stages`."""
    trainers = {"tokenizer": _train_tokenizer, "judge": _train_judge, "clip": _train_clip, "denoiser": _train_denoiser}
    settings = {"stages": STAGES, "source": SOURCE, **options}
    return atelier.run_stages(trainers, _export, out, work, config or HamletTraining(), **settings)
