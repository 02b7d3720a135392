"""Trains Atelier Flow: FLUX's anatomy on Atelier's scenes, with Atelier's autoencoder, judge and CLIP.

A transformer of two-stream and single-stream blocks learns a rectified flow (Esser et al., arXiv 2403.03206). It
reads a T5 encoder, which is trained along with it, and CLIP's pooled text. Guidance is distilled into it at the end
(Meng et al., arXiv 2210.03142), so that a plain call of the pipeline needs no second evaluation. It is built by a
command and not bundled.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.atelier.training import (
    PROMPT_LENGTH,
    Loop,
    Progress,
    Training,
    World,
    copy_judge,
    encoded,
    load_tokenizer,
    run_stages,
    save_half,
)
from recare_patch.models.atelier import CLIP, PIPELINE

STAGES = ("scenes", "t5 tokenizer", "denoiser", "guidance", "export")
PROMPT_TOKENS = 24
"""Length that T5 pads prompts to; captions have 20 tokens at most."""

_HEADS, _HEAD = 5, 32
_T5_WIDTH = 128
_BATCH = 32
_STRONGEST = 6.0
"""Guidance is distilled from 1 to this."""

_DROPPED, _UNPOOLED = 0.1, 0.4
"""Shares of prompts that are emptied, and of the others whose pooled text is the empty prompt's: FLUX leans on T5."""


@dataclass(frozen=True)
class FlowTraining(Training):
    """Optimiser steps of each stage."""

    denoiser_steps: int = 10_400
    guidance_steps: int = 400


def _train_tokenizer(
    config: FlowTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    """A T5 tokenizer: the captions' words in either case, and letters for all others."""
    from transformers import T5Tokenizer

    counts = Counter(word for row in world.captions for text in row for word in re.findall(r"\w+", text))
    forms: Counter[str] = Counter()
    for word, count in counts.items():
        for form in (word, word.lower(), word.capitalize()):
            forms[form] += count
    total = sum(forms.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{form}", math.log(count / total)) for form, count in forms.most_common() if len(form) > 1]
    # A letter is rarer than any word: words are split only where they are unknown.
    pieces += [(letter, -2 * math.log(total)) for letter in ("▁", *map(chr, range(33, 127)))]
    pieces += [(f"▁{form}", math.log(count / total)) for form, count in forms.items() if len(form) == 1]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(work / "tokenizer_2")


def load_t5_tokenizer(folder: Path) -> Any:
    """The tokenizer that the training wrote."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder)


def new_text_encoder(vocabulary: int) -> Any:
    """The untrained T5 encoder, version 1.1."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": _T5_WIDTH, "d_kv": 32, "d_ff": 2 * _T5_WIDTH, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False, **sizes)
    )


def new_denoiser() -> Any:
    """The untrained transformer: two blocks of two streams and four of one, 3.7 million parameters."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        joint_attention_dim=_T5_WIDTH,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # Every block begins as the identity, which is what makes transformers of this kind train fast (Peebles & Xie,
    # arXiv 2212.09748).
    modulations = [m.linear for n, m in model.named_modules() if "norm" in n.split(".")[-1] and hasattr(m, "linear")]
    for layer in [*modulations, model.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class Texts:
    """Captions as the pipeline encodes them: T5's hidden states and CLIP's pooled text."""

    def __init__(self, work: Path, world: World, t5: Any, device: torch.device) -> None:
        from transformers import CLIPTextModel

        self.world, self.t5, self.device = world, t5, device
        self.t5_tokenizer, self.tokenizer = load_t5_tokenizer(work / "tokenizer_2"), load_tokenizer(CLIP)
        clip = CLIPTextModel.from_pretrained(PIPELINE / "text_encoder", dtype=torch.float32)
        self.clip = clip.to(device).eval().requires_grad_(False)

    def words(self, index: Tensor, generator: torch.Generator) -> list[str]:
        """A caption of each scene, by lot, and written as people do: with a capital, or without any."""
        texts = self.world.words(index, generator)
        luck = torch.rand(len(texts), 2, generator=generator).tolist()
        cased = [
            text[:1].upper() + text[1:] if case < 0.4 else text.lower() if case < 0.5 else text
            for text, (case, _) in zip(texts, luck, strict=True)
        ]
        return ["" if b < _DROPPED else text for text, (_, b) in zip(cased, luck, strict=True)]

    def hidden(self, words: list[str]) -> Tensor:
        """``[prompts, tokens, width]``; padding is read like any token, as in the pipeline."""
        tokens = self.t5_tokenizer(
            words, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.t5(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def pooled(self, words: list[str]) -> Tensor:
        """``[prompts, 128]``; a causal tower never looks past the end of text, so padding is cut."""
        tokens = self.tokenizer(words, padding=True, max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt")
        return self.clip(tokens.input_ids.to(self.device)).pooler_output


def _packed_latents(work: Path, world: World, device: torch.device) -> Tensor:
    """Scaled latents of all scenes as the pipeline packs them, ``[scenes, 64, 16]``."""
    from diffusers import AutoencoderKL, FluxPipeline

    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae").to(device).eval()
    latents = encoded(vae, world, work / "latents.safetensors", device)
    return FluxPipeline._pack_latents(latents, *latents.shape)


def _predictor(model: Any, device: torch.device) -> Callable[..., Tensor]:
    """The transformer's velocity for packed latents, times, hidden states, pooled text and guidance."""
    from diffusers import FluxPipeline

    places = FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
    text_places = torch.zeros(PROMPT_TOKENS, 3, device=device)

    def velocity(latents: Tensor, times: Tensor, hidden: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        return model(latents, hidden, pooled, times, places, text_places, guidance, return_dict=False)[0]

    return velocity


def _states(latents: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """Noisy latents of scenes drawn by lot, with scene numbers, times in 0 … 1 and velocities."""
    index = torch.randint(0, len(latents), (_BATCH,), generator=generator)
    clean, noise = latents[index], torch.randn(_BATCH, *latents.shape[1:], generator=generator)
    times = torch.randn(_BATCH, generator=generator).sigmoid()
    # The scheduler's own shift at 64 tokens.
    times = (_SHIFT * times / (1 + (_SHIFT - 1) * times))[:, None, None]
    found = ((1 - times) * clean + times * noise, times.flatten(), noise - clean)
    return index, *(one.to(device) for one in found)


_SHIFT = math.exp(0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256))


def _train_denoiser(
    config: FlowTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    latents = _packed_latents(work, world, device)
    torch.manual_seed(config.seed + 21)
    t5 = new_text_encoder(len(load_t5_tokenizer(work / "tokenizer_2")))
    both = nn.ModuleDict({"transformer": new_denoiser(), "text_encoder_2": t5})
    texts, velocity = Texts(work, world, t5, device), _predictor(both["transformer"], device)
    unguided = torch.ones(_BATCH, device=device)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index, noisy, times, wanted = _states(latents, generator, device)
        words = texts.words(index, generator)
        kept = torch.rand(_BATCH, generator=generator) >= _UNPOOLED
        pooled = texts.pooled([text if keep else "" for text, keep in zip(words, kept, strict=True)])
        return F.mse_loss(velocity(noisy, times, texts.hidden(words), pooled, unguided).float(), wanted)

    seed = config.seed + 21
    loop = Loop(
        "denoiser-flow", work, both, steps=config.denoiser_steps, lr=1.2e-3, seed=seed, ema=0.998, device=device
    )
    loop.run(loss_at, progress)
    for name, part in both.cpu().items():
        part.save_pretrained(work / name)


def _load_denoiser(folder: Path) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(folder)


def _load_text_encoder(folder: Path) -> Any:
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()


def _distil_guidance(
    config: FlowTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    """Teach the transformer what classifier-free guidance of a given strength would have predicted."""
    latents = _packed_latents(work, world, device)
    student = _load_denoiser(work / "transformer")
    teacher = copy.deepcopy(student).to(device).eval().requires_grad_(False)
    t5 = _load_text_encoder(work / "text_encoder_2").to(device).requires_grad_(False)
    texts = Texts(work, world, t5, device)
    taught, teaches = _predictor(student, device), _predictor(teacher, device)
    unguided = torch.ones(_BATCH, device=device)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index, noisy, times, _ = _states(latents, generator, device)
        words = texts.words(index, generator)
        guidance = torch.rand(_BATCH, generator=generator).to(device) * 1.2 - 0.2
        guidance = 1 + (_STRONGEST - 1) * guidance.clamp(min=0)
        with torch.no_grad():
            text, empty = ((texts.hidden(x), texts.pooled(x)) for x in (words, [""] * _BATCH))
            without = teaches(noisy, times, *empty, unguided)
            wanted = without + guidance[:, None, None] * (teaches(noisy, times, *text, unguided) - without)
        return F.mse_loss(taught(noisy, times, *text, guidance).float(), wanted.float())

    seed = config.seed + 22
    loop = Loop(
        "guidance-flow", work, student, steps=config.guidance_steps, lr=6e-4, seed=seed, ema=0.99, device=device
    )
    loop.run(loss_at, progress)
    student.cpu().save_pretrained(work / "transformer_guided")


def _export(work: Path, out: Path) -> None:
    """Write a plain diffusers pipeline in fp16, with the judge beside it."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae")
    vae.register_to_config(shift_factor=0.0)
    tokenizers = load_tokenizer(CLIP), load_t5_tokenizer(work / "tokenizer_2")
    for tokenizer in tokenizers:
        # FLUX pads prompts to 512 tokens unless it is told otherwise; bases ask tokenizers how many they read.
        tokenizer.model_max_length = PROMPT_TOKENS
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(PIPELINE / "text_encoder", dtype=torch.float32),
        tokenizer=tokenizers[0],
        text_encoder_2=_load_text_encoder(work / "text_encoder_2"),
        tokenizer_2=tokenizers[1],
        transformer=_load_denoiser(work / "transformer_guided"),
    )
    save_half(pipeline, out / "pipeline")
    copy_judge(out)


def train(out: Path, work: Path, config: FlowTraining | None = None, **options: Any) -> dict[str, float]:
    """Train Atelier Flow, see :func:`run_stages`; Atelier's own folder of work will do."""
    trainers = {"t5 tokenizer": _train_tokenizer, "denoiser": _train_denoiser, "guidance": _distil_guidance}
    return run_stages(trainers, _export, out, work, config or FlowTraining(), **{"stages": STAGES, **options})
