"""Random models of a few thousand weights, in the very folders that the package reads.

They have Stable Diffusion's anatomy and draw noise: what is tested with them is mechanics (shapes,
files, determinism, refusals), never whether a concept is gone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS: tuple[str, ...] = tuple(
    word
    for line in (
        "a an the in of on at by with and style photo painting picture drawing print sketch van gogh",
        "monet picasso vincent nude naked nudity person woman man body skin art thing tench fish river",
        "lake water freshwater angler fisherman stars star night sky moon sun sunflower sunflowers wheat",
        "field house church tree boat car cat dog horse bird bridge beach sand sea swirl cypress village",
        "cafe portrait flower garden mountain road cloud rain snow winter summer red blue green yellow",
        "dark bright small large old dressed",
    )
    for word in line.split()
)
"""Every one of these is a single token of the tiny tokenizers."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tiny_tokenizer(words: Sequence[str] = WORDS, *, max_length: int = 77) -> Any:
    """A CLIP tokenizer in which each of ``words`` is one token; other text falls into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # Trained until nothing is left to merge, so that every word ends up whole.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(words)], trainer)
    trained = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in trained]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *joined, _START, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        unk_token=_END,
        model_max_length=max_length,
    )


def _text_config(tokenizer: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def make_tiny_sd(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    latent_size: int = 8,
    width: int = 32,
    in_channels: int = 4,
    linear_projection: bool = False,
) -> Path:
    """Write a random Stable-Diffusion-shaped pipeline folder and return it.

    Args:
        folder: where to write; made if it is missing.
        seed: all weights follow from it.
        prediction_type: ``epsilon`` or ``v_prediction`` (or a wrong one, to be refused).
        latent_size: side of the latents; pictures are four times as wide.
        width: width of the prompt embeddings, a multiple of 8.
        in_channels: of the denoiser; anything but 4 must be refused by the package.
        linear_projection: SD 2's linear ``proj_in`` in place of SD 1's convolution.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer, width)))
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=4 * latent_size,
            mid_block_add_attention=False,
        )
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=in_channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=2,
            norm_num_groups=8,
            use_linear_projection=linear_projection,
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    # Set afterwards: a prediction type that diffusers would refuse must still be writable, to test ours.
    scheduler.register_to_config(prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_clip(folder: Path, *, seed: int = 0, width: int = 32, image_size: int = 32) -> Path:
    """Write a random CLIPModel folder with tokenizer and image processor, and return it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = make_tiny_tokenizer()
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
        "image_size": image_size,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = _text_config(tokenizer, width)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder
