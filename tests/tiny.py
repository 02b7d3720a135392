"""Random models of a few thousand weights, in the very folders that the package reads.

They have Stable Diffusion's anatomy and draw noise: what is tested with them is mechanics (shapes,
files, determinism, refusals), never whether a concept is gone. All weights follow from ``seed``; pictures
are four times as wide as latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_WORDS = """
    a an the in of on at by with and style photo painting picture drawing print sketch van gogh
    monet picasso vincent nude naked nudity person woman man body skin art thing tench fish river
    lake water freshwater angler fisherman stars star night sky moon sun sunflower sunflowers wheat
    field house church tree boat car cat dog horse bird bridge beach sand sea swirl cypress village
    cafe portrait flower garden mountain road cloud rain snow winter summer red blue green yellow
    dark bright small large old dressed
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""Every one of these is a single token of the tiny tokenizers."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tiny_tokenizer(words: Sequence[str] = WORDS, *, max_length: int = 77, padding: str = _END) -> Any:
    """A CLIP tokenizer in which each of ``words`` is one token; other text falls into letters.

    OpenCLIP's pad with "!" instead of the end of the text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # Trained until nothing is left to merge, so that every word ends up whole.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=20_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words)], trainer)
    trained = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in trained]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(entries))},
        merges=merges,
        bos_token=_START,
        eos_token=_END,
        pad_token=padding,
        unk_token=_END,
        model_max_length=max_length,
    )


def real_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own vocabulary, 49,408 tokens, and its merges, from the file that its package ships.

    pytest skips where the package `openai-clip`, of the extra `test`, is not there; it is never imported.
    """
    import gzip
    from importlib.util import find_spec

    import pytest
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spec = find_spec("clip")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [file for place in places for file in Path(place).glob("bpe_simple_vocab_16e6.txt.gz")]
    if not found:
        pytest.skip("CLIP's vocabulary comes with the package openai-clip, which is not installed")
    letters = list(bytes_to_unicode().values())
    assert set(letters) == set(ByteLevel.alphabet())
    lines = gzip.decompress(found[0].read_bytes()).decode().split("\n")[1:48895]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    entries = [*letters, *(f"{one}</w>" for one in letters), *map("".join, merges), _START, _END]
    return {token: index for index, token in enumerate(entries)}, merges


def make_real_tokenizer(*, padding: str = _END) -> Any:
    """CLIP's own tokenizer; OpenCLIP's pad with "!" instead of the end of the text."""
    from transformers import CLIPTokenizer

    vocabulary, merges = real_vocabulary()
    markers = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": padding}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **markers)


def as_on_the_hub(folder: Path) -> Path:
    """Write a folder's tokenizers and configurations anew, in the shape that the hub's models of 2022 have."""
    vocabulary, merges = real_vocabulary()
    for place in (folder, folder / "tokenizer", folder / "tokenizer_2"):
        if not (place / "tokenizer_config.json").is_file():
            continue
        padding = json.loads((place / "tokenizer_config.json").read_text())["pad_token"]
        for file in ("tokenizer.json", "special_tokens_map.json"):
            (place / file).unlink(missing_ok=True)
        (place / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (place / "merges.txt").write_text("\n".join(lines) + "\n")
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        special: dict[str, Any] = {
            name: {"content": token, **plain}
            for name, token in (("bos_token", _START), ("eos_token", _END), ("unk_token", _END))
        }
        special["pad_token"] = padding
        (place / "special_tokens_map.json").write_text(json.dumps(special))
        old = {"do_lower_case": True, "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        (place / "tokenizer_config.json").write_text(json.dumps(special | old))
    for place in (folder / "text_encoder", folder / "text_encoder_2", folder):
        config = place / "config.json"
        if config.is_file():
            # The ids of 2021, which transformers still reads as "the end is the highest id".
            told = json.loads(config.read_text())
            inner = told.get("text_config", told)
            inner.update(bos_token_id=0, eos_token_id=2, pad_token_id=1)
            config.write_text(json.dumps(told))
    return folder


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _saved(folder: Path, *parts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _tower(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }


def _text_config(tokenizer: Any, width: int, **changes: Any) -> dict[str, Any]:
    markers = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return {**_tower(width), **sizes, **markers, **changes}


def _texts(encoders: Sequence[Any], tokenizers: Sequence[Any]) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return dict(zip(names, (*encoders, *tokenizers), strict=True))


def _tiny_vae(latent_size: int, blocks: int = 3, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=latent_size * 2 ** (blocks - 1),
        mid_block_add_attention=False,
        **{"latent_channels": 4, **changes},
    )


def _tiny_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_tiny_sd(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    latent_size: int = 8,
    width: int = 32,
    in_channels: int = 4,
    linear_projection: bool = False,
    open_clip: bool = False,
    real: bool = False,
) -> Path:
    """Write a random Stable-Diffusion-shaped pipeline folder and return it.

    Prompt embeddings are ``width`` wide, a multiple of 8. ``prediction_type`` and ``in_channels`` may be
    wrong, to be refused. SD 2 has a linear ``proj_in`` and OpenCLIP's kind of text encoder and padding.
    ``real``, here and below, is for CLIP's own vocabulary in the hub's files.
    """
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer_maker(real)(padding="!" if open_clip else _END)
    config = _text_config(tokenizer, width, hidden_act="gelu" if open_clip else "quick_gelu")
    with _seeded(seed):
        text_encoder = CLIPTextModel(CLIPTextConfig(**config))
        vae = _tiny_vae(latent_size, 4 if real else 3)
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
    scheduler = _tiny_scheduler()
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
    return as_on_the_hub(_saved(folder, pipeline)) if real else _saved(folder, pipeline)


def _tokenizer_maker(real: bool) -> Any:
    return make_real_tokenizer if real else make_tiny_tokenizer


def make_tiny_sdxl(
    folder: Path, *, seed: int = 2, latent_size: int = 16, widths: tuple[int, int] = (32, 48), real: bool = False
) -> Path:
    """Write a random SDXL-shaped pipeline folder and return it: two encoders, pooled text, sizes."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizers = _tokenizer_maker(real)(), _tokenizer_maker(real)(padding="!")
    first, second = (_text_config(one, width) for one, width in zip(tokenizers, widths, strict=True))
    with _seeded(seed):
        encoders = (
            CLIPTextModel(CLIPTextConfig(**first)),
            CLIPTextModelWithProjection(CLIPTextConfig(**second, hidden_act="gelu")),
        )
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(widths),
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=widths[1] + 6 * 8,
        )
        vae = _tiny_vae(latent_size, 4 if real else 3)
    pipeline = StableDiffusionXLPipeline(
        vae=vae, **_texts(encoders, tokenizers), unet=unet, scheduler=_tiny_scheduler(), add_watermarker=False
    )
    return as_on_the_hub(_saved(folder, pipeline)) if real else _saved(folder, pipeline)


def make_tiny_sd3(folder: Path, *, seed: int = 3, latent_size: int = 8, widths: tuple[int, int] = (32, 48)) -> Path:
    """Write a random SD3-shaped pipeline folder and return it: joint attention, flow matching, no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizers = make_tiny_tokenizer(), make_tiny_tokenizer(padding="!")
    configs = [_text_config(one, width) for one, width in zip(tokenizers, widths, strict=True)]
    with _seeded(seed):
        encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**config)) for config in configs]
        transformer = SD3Transformer2DModel(
            sample_size=latent_size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            # Wider than both encoders together, as T5's part is in the original.
            joint_attention_dim=sum(widths) + 16,
            caption_projection_dim=16,
            pooled_projection_dim=sum(widths),
            pos_embed_max_size=16,
        )
        vae = _tiny_vae(latent_size, shift_factor=0.0609, scaling_factor=1.5305)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **_texts(encoders, tokenizers),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return _saved(folder, pipeline)


def make_tiny_clip(folder: Path, *, seed: int = 0, width: int = 32, image_size: int = 32, real: bool = False) -> Path:
    """Write a random CLIPModel folder with tokenizer and image processor, and return it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = _tokenizer_maker(real)()
    text = _text_config(tokenizer, width)
    vision = {**_tower(width), "image_size": image_size, "patch_size": 8}
    with _seeded(seed):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    saved = _saved(folder, model, tokenizer, processor)
    return as_on_the_hub(saved) if real else saved
