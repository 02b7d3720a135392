"""Trains Atelier XL: SDXL's anatomy on Atelier's scenes, with Atelier's tokenizer, autoencoder and judge.

Two text encoders stand side by side, and the denoiser is told the second one's pooled text, the size that a
picture had, and where it was cropped (Podell et al., arXiv 2307.01952). It is built by a command and not
bundled.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.atelier.training import (
    PROMPT_LENGTH,
    Loop,
    Progress,
    World,
    contrastive_loss,
    draw_world,
    load_tokenizer,
    new_clip,
    new_scheduler,
    save_half,
)
from recare_patch.models.atelier import CLIP, JUDGE, PIPELINE

logger = logging.getLogger(__name__)

STAGES = ("scenes", "second encoder", "denoiser", "export")
WIDTH = 160
"""Of the second text encoder; the first is Atelier's own, 128 wide."""

_SIZES = 16
"""Values that each of the six numbers beside the prompt becomes."""

_PLAIN = 0.7
"""Share of scenes that are shown whole and sharp; the others are enlarged small ones, or crops."""


@dataclass(frozen=True)
class XLTraining:
    """How long each stage trains, and from which seed.

    Attributes:
        scenes: number of drawn pictures.
        captions: captions drawn for each of them.
        encoder_steps, denoiser_steps: optimiser steps.
        seed: all else follows from it.
    """

    scenes: int = 16_000
    captions: int = 4
    encoder_steps: int = 1_000
    denoiser_steps: int = 4_500
    seed: int = 0


def new_denoiser(sample_size: int = 16) -> Any:
    """The untrained denoiser: no attention at full size, more of it below, pooled text and sizes."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=128 + WIDTH,
        attention_head_dim=(3, 6, 12),
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_SIZES,
        projection_class_embeddings_input_dim=WIDTH + 6 * _SIZES,
    )


# ---------------------------------------------------------------------------- stages


def _train_encoder(
    config: XLTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    tokenizer = load_tokenizer(CLIP)
    torch.manual_seed(config.seed + 11)
    model = new_clip(len(tokenizer), tokenizer.eos_token_id, WIDTH)
    loop = Loop(
        "second-encoder",
        work,
        model,
        steps=config.encoder_steps,
        lr=1e-3,
        seed=config.seed + 11,
        weight_decay=0.05,
        device=device,
    )
    loop.run(contrastive_loss(model, tokenizer, world, device), progress)
    model.cpu().save_pretrained(work / "clip_2")


def _encoders(work: Path) -> tuple[Any, Any]:
    """Atelier's text encoder, and the second one with its projection."""
    from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

    first = CLIPTextModel.from_pretrained(PIPELINE / "text_encoder", dtype=torch.float32)
    whole = CLIPModel.from_pretrained(work / "clip_2", dtype=torch.float32)
    second = CLIPTextModelWithProjection(whole.config.text_config)
    second.text_model.load_state_dict(whole.text_model.state_dict())
    second.text_projection.load_state_dict(whole.text_projection.state_dict())
    return first.eval(), second.eval()


def shown(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes as a collection of pictures would hold them: whole, small and enlarged, or cropped.

    Args:
        pixels: ``[batch, 3, side, side]``.
        generator: for every draw.

    Returns:
        Pictures of the same shape, and ``[batch, 6]``: original height and width, crop's top and left,
        target height and width.
    """
    side = pixels.shape[-1]
    found, numbers = [], []
    for picture in pixels[:, None]:
        luck = float(torch.rand(1, generator=generator))
        size, top, left = side, 0, 0
        if luck >= (1 + _PLAIN) / 2:
            size = int(torch.randint(side * 5 // 8, side * 7 // 8, (1,), generator=generator))
            picture = F.interpolate(picture, size=(size, size), mode="area")
            picture = F.interpolate(picture, size=(side, side), mode="bilinear")
        elif luck >= _PLAIN:
            size = int(torch.randint(side * 9 // 8, side * 11 // 8, (1,), generator=generator))
            top, left = torch.randint(0, size - side + 1, (2,), generator=generator).tolist()
            picture = F.interpolate(picture, size=(size, size), mode="bilinear")
            picture = picture[..., top : top + side, left : left + side]
        found.append(picture)
        # A crop's original is the scene as it was drawn; its offsets are in the enlarged picture.
        original = min(size, side)
        numbers.append([original, original, top, left, side, side])
    return torch.cat(found), torch.tensor(numbers, dtype=torch.float32)


@torch.no_grad()
def _encoded(config: XLTraining, world: World, file: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled latents ``[scenes, 4, 16, 16]`` and sizes ``[scenes, 6]``, kept for a resumed run."""
    if not file.exists():
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(PIPELINE / "vae").to(device).eval()
        generator = torch.Generator().manual_seed(config.seed + 12)
        latents, sizes = [], []
        for start in range(0, len(world.images), 64):
            index = torch.arange(start, min(start + 64, len(world.images)))
            pixels, numbers = shown(world.pixels(index), generator)
            mean = vae.encode(pixels.to(device)).latent_dist.mean
            latents.append(mean.cpu() * vae.config.scaling_factor)
            sizes.append(numbers)
        temporary = file.with_suffix(".part")
        save_file({"latents": torch.cat(latents), "sizes": torch.cat(sizes)}, temporary)
        temporary.replace(file)
    stored = load_file(file)
    return stored["latents"], stored["sizes"]


def _train_denoiser(
    config: XLTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    tokenizer = load_tokenizer(CLIP)
    encoders = [encoder.to(device) for encoder in _encoders(work)]
    latents, sizes = _encoded(config, world, work / "latents-xl.safetensors", device)
    torch.manual_seed(config.seed + 13)
    denoiser, scheduler = new_denoiser(), new_scheduler()
    batch = 32

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(latents), (batch,), generator=generator)
        words = world.words(index, generator)
        tokens = tokenizer(
            words, padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            outputs = [encoder(tokens.input_ids, output_hidden_states=True) for encoder in encoders]
        # Guidance starts from zeros, as in the pipeline.
        kept = (torch.rand(batch, generator=generator) >= 0.1).float().to(device)
        text = torch.cat([one.hidden_states[-2] for one in outputs], -1) * kept[:, None, None]
        pooled = outputs[1].text_embeds * kept[:, None]
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        model_pred = denoiser(
            noisy.to(device),
            timesteps.to(device),
            text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes[index].to(device)},
            return_dict=False,
        )[0]
        return F.mse_loss(model_pred.float(), noise.to(device))

    loop = Loop(
        "denoiser-xl",
        work,
        denoiser,
        steps=config.denoiser_steps,
        lr=8e-4,
        seed=config.seed + 13,
        ema=0.999,
        device=device,
    )
    loop.run(loss_at, progress)
    denoiser.cpu().save_pretrained(work / "unet_xl")


def _export(work: Path, out: Path) -> None:
    """Write a plain diffusers pipeline in fp16, with the judge beside it."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    first, second = _encoders(work)
    tokenizer = load_tokenizer(CLIP)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(PIPELINE / "vae"),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet_xl"),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    save_half(pipeline, out / "pipeline")
    (out / "judge").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(JUDGE, out / "judge" / JUDGE.name)


def train(
    out: Path,
    work: Path,
    config: XLTraining | None = None,
    *,
    stages: Iterable[str] = STAGES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train Atelier XL from seeds; an interrupted run goes on from its checkpoints.

    Args:
        out: folder for the finished pipeline and its judge.
        work: folder for scenes, checkpoints and half-made parts; Atelier's own will do.
        config: sizes and seed.
        stages: which of :data:`STAGES` to run; those before must have run already.
        device: where to train.
        progress: called after every step.

    Returns:
        Seconds by stage.
    """
    config = config or XLTraining()
    work.mkdir(parents=True, exist_ok=True)
    target, chosen = torch.device(device), set(stages)
    seconds: dict[str, float] = {}
    world: World | None = None
    for stage in (stage for stage in STAGES if stage in chosen):
        began = time.perf_counter()
        if world is None and stage != "export":
            world = draw_world(config.scenes, config.captions, config.seed, work / "scenes.npz")
        if stage == "second encoder":
            assert world is not None
            _train_encoder(config, work, world, target, progress)
        elif stage == "denoiser":
            assert world is not None
            _train_denoiser(config, work, world, target, progress)
        elif stage == "export":
            _export(work, out)
        seconds[stage] = time.perf_counter() - began
        logger.info("%s: %.0f s", stage, seconds[stage])
    return seconds
