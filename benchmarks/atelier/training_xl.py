"""Trains Atelier XL: SDXL's anatomy on Atelier's scenes, with Atelier's tokenizer, autoencoder and judge.

Two text encoders stand side by side, and the denoiser is told the second one's pooled text, the size that a
picture had, and where it was cropped (Podell et al., arXiv 2307.01952). It is built by a command and not
bundled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.atelier.training import (
    Loop,
    Progress,
    Training,
    World,
    copy_judge,
    denoising_loss,
    load_tokenizer,
    new_scheduler,
    run_stages,
    save_half,
    tokenized,
    train_clip,
)
from recare_patch.models.atelier import CLIP, PIPELINE

STAGES = ("scenes", "second encoder", "denoiser", "export")
WIDTH = 160
"""Of the second text encoder; the first is Atelier's own, 128 wide."""

_SIZES = 16
"""Values that each of the six numbers beside the prompt becomes."""

_PLAIN = 0.7
"""Share of scenes that are shown whole and sharp; the others are enlarged small ones, or crops."""


@dataclass(frozen=True)
class XLTraining(Training):
    """Optimiser steps of each stage."""

    encoder_steps: int = 1_000
    denoiser_steps: int = 4_500


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


def _train_encoder(
    config: XLTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    lengths = {"steps": config.encoder_steps, "seed": config.seed + 11, "width": WIDTH}
    train_clip("second-encoder", CLIP, world, device, progress, out=work / "clip_2", **lengths)


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
        save_file({"latents": torch.cat(latents).contiguous(), "sizes": torch.cat(sizes)}, temporary)
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
    denoiser = new_denoiser()

    def conditions(index: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = tokenized(tokenizer, world.words(index, generator), device)
        with torch.no_grad():
            outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        # Guidance starts from zeros, as in the pipeline.
        kept = (torch.rand(len(index), generator=generator) >= 0.1).float().to(device)
        text = torch.cat([one.hidden_states[-2] for one in outputs], -1) * kept[:, None, None]
        pooled = outputs[1].text_embeds * kept[:, None]
        return text, {"text_embeds": pooled, "time_ids": sizes[index].to(device)}

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
    loop.run(denoising_loss(denoiser, latents, conditions, device), progress)
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
    copy_judge(out)


def train(out: Path, work: Path, config: XLTraining | None = None, **options: Any) -> dict[str, float]:
    """Train Atelier XL, see :func:`run_stages`; Atelier's own folder of work will do."""
    trainers = {"second encoder": _train_encoder, "denoiser": _train_denoiser}
    return run_stages(trainers, _export, out, work, config or XLTraining(), **{"stages": STAGES, **options})
