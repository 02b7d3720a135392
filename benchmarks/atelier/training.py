"""Trains everything the package bundles, from seeds: tokenizer, CLIP, autoencoder, judge, denoiser.

Each stage is a function of the scenes and its seed, writes a checkpoint every few hundred steps
and goes on from it when it is run again. The sizes are those that train on two CPU cores in
about an hour and a half.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.atelier import captions, scenes
from recare_patch.models.atelier import JUDGE, judge
from recare_patch.models.atelier.labels import ATELIER, Labels

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, float], None]
"""Called with stage, step, steps and loss."""

Trainer = Callable[[Any, Path, Any, torch.device, Progress | None], None]
"""Trains a stage by its config, in a folder of work, on scenes (:class:`World`)."""

STAGES = ("scenes", "tokenizer", "clip", "autoencoder", "judge", "denoiser", "export")
PROMPT_LENGTH = 77
_CLIP_LENGTH = 32
"""Tokens that the contrastive training reads: causal text towers never look past the end of text,
so cutting the padding changes no gradient and saves more than half the work."""


@dataclass(frozen=True)
class Training:
    """How many scenes are drawn, with how many captions each, and from which seed all follows."""

    scenes: int = 16_000
    captions: int = 4
    seed: int = 0


@dataclass(frozen=True)
class AtelierTraining(Training):
    """Optimiser steps of each stage."""

    clip_steps: int = 3_000
    autoencoder_steps: int = 1_800
    judge_steps: int = 1_500
    denoiser_steps: int = 6_400


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 saves time: it halves it on GPUs and where a processor has tiles (AMX) for it.

    On processors with AVX-512 alone it takes twice as long as fp32.
    """
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported()


class Loop:
    """An AdamW loop with cosine decay whose every step depends on (seed, step) alone."""

    def __init__(
        self,
        stage: str,
        work: Path,
        module: nn.Module,
        *,
        steps: int,
        lr: float,
        seed: int,
        weight_decay: float = 0.01,
        ema: float | None = None,
        save_every: int = 250,
        device: torch.device,
    ) -> None:
        self.stage, self.work, self.module, self.device = stage, work, module.to(device), device
        self.steps, self.lr, self.seed, self.ema, self.save_every = steps, lr, seed, ema, save_every
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99)
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if ema else {}
        self.log: list[tuple[int, float]] = []

    @property
    def _file(self) -> Path:
        return self.work / f"{self.stage}.checkpoint.safetensors"

    def _save(self, step: int) -> None:
        # Tied weights have two names and one memory, which the format refuses.
        tensors: dict[str, Tensor] = {
            f"model.{k}": v.clone(memory_format=torch.contiguous_format) for k, v in self.module.state_dict().items()
        }
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        temporary = self._file.with_suffix(".part")
        save_file(tensors, temporary, {"step": str(step), "log": json.dumps(self.log)})
        temporary.replace(self._file)

    def _resume(self) -> int:
        if not self._file.exists():
            return 0
        tensors = load_file(self._file)
        self.module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k: tensors[f"average.{k}"].to(p.device) for k, p in self.parameters.items()} if self.ema else {}
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        with safe_open(self._file, "pt") as handle:
            meta = handle.metadata()
        self.log = [tuple(entry) for entry in json.loads(meta["log"])]
        return int(meta["step"])

    def run(self, loss_at: Callable[[int, torch.Generator], Tensor], progress: Progress | None) -> None:
        """Train to the end; the module is left with its averaged weights, where it has some."""
        start = self._resume()
        self.module.train()
        half = multiplies_bfloat16(self.device)
        running = 0.0
        for step in range(start, self.steps):
            warm = min(1.0, (step + 1) / 100)
            rate = self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # Weights stay fp32.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = loss_at(step, _generator(self.seed, step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            if self.ema:
                decay = min(self.ema, (step + 1) / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
            running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
            if progress:
                progress(self.stage, step + 1, self.steps, running)
            if (step + 1) % 50 == 0:
                self.log.append((step + 1, round(running, 5)))
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                self._save(step + 1)
        if self.ema:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.average[name])
        self.module.eval()


@dataclass
class World:
    """Drawn scenes.

    Attributes:
        images: ``[scenes, height, width, 3]``, uint8.
        captions: several of each scene.
        labels: what each scene shows.
    """

    images: np.ndarray
    captions: list[list[str]]
    labels: list[frozenset[str]]

    def pixels(self, index: Tensor) -> Tensor:
        """Pictures of scenes, ``[batch, 3, height, width]``, −1 … 1."""
        return torch.from_numpy(self.images[index.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1

    def words(self, index: Tensor, generator: torch.Generator) -> list[str]:
        """A caption of each scene, by lot."""
        which = torch.randint(0, len(self.captions[0]), (len(index),), generator=generator)
        return [self.captions[int(i)][int(k)] for i, k in zip(index, which, strict=True)]


@dataclass(frozen=True)
class Source:
    """Where a world comes from, and what its judge can say.

    Attributes:
        sample: draws what a picture holds.
        draw: renders it.
        caption: puts it into words; with ``held_out=True`` into words that training never uses.
        mentions: whether a caption names a label.
        labels: what the judge can say.
    """

    sample: Callable[[np.random.Generator], Any]
    draw: Callable[[Any], np.ndarray]
    caption: Callable[..., str]
    mentions: Callable[[str, str], bool]
    labels: Labels


SOURCE = Source(scenes.sample_scene, scenes.draw, captions.caption, captions.mentions, ATELIER)
"""Atelier's scenes."""


def draw_world(count: int, per_scene: int, seed: int, file: Path, source: Source = SOURCE) -> World:
    """Draw ``count`` scenes, or read them from ``file`` where an earlier run left them."""
    if file.exists():
        stored = np.load(file, allow_pickle=False)
        rows = json.loads(str(stored["text"]))
        return World(stored["images"], rows["captions"], [frozenset(r) for r in rows["labels"]])
    rng = np.random.default_rng(seed)
    drawn = [source.sample(rng) for _ in range(count)]
    world = World(
        np.stack([source.draw(scene) for scene in drawn]),
        [[source.caption(scene, rng) for _ in range(per_scene)] for scene in drawn],
        [scene.labels for scene in drawn],
    )
    text = json.dumps({"captions": world.captions, "labels": [sorted(found) for found in world.labels]})
    temporary = file.with_suffix(".part.npz")
    np.savez(temporary, images=world.images, text=text)
    temporary.replace(file)
    return world


def _train_tokenizer(
    config: AtelierTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    train_tokenizer(world, work / "tokenizer", size=2_000)


def train_tokenizer(world: World, folder: Path, *, size: int) -> None:
    """A CLIP tokenizer of at most ``size`` entries: byte-level BPE over lower-cased words, each ending in ``</w>``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=20, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator((text for row in world.captions for text in row), trainer)
    merges = [
        tuple(m) if not isinstance(m, str) else tuple(m.split(" "))
        for m in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The trainer counts the letters that it met alone: what goes beyond the size are its last, rarest merges.
    merges = merges[: size - 2 * len(letters) - 2]
    # The order of OpenAI's vocabulary: bytes, bytes that end a word, merges, the two markers.
    entries = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    markers = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": PROMPT_LENGTH, "do_lower_case": True, **markers}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(markers, indent=2))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that :func:`train_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def new_clip(vocabulary: int, end_of_text: int, width: int = 128, layers: int = 4) -> Any:
    """An untrained CLIP for scenes, with heads of 32 values."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "projection_dim": width,
        "hidden_act": "gelu",
    }
    text = {
        **tower,
        "vocab_size": vocabulary,
        "max_position_embeddings": PROMPT_LENGTH,
        "bos_token_id": end_of_text - 1,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    vision = {**tower, "image_size": scenes.SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    # At these sizes a plain attention in bfloat16 trains twice as fast as the fused kernel on CPUs.
    model.set_attn_implementation("eager")
    return model


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _train_clip(
    config: AtelierTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    train_clip(
        "clip",
        work / "tokenizer",
        world,
        device,
        progress,
        steps=config.clip_steps,
        seed=config.seed + 1,
        out=work / "clip",
    )


def train_clip(
    stage: str,
    tokens: Path,
    world: World,
    device: torch.device,
    progress: Progress | None,
    *,
    steps: int,
    seed: int,
    out: Path,
    width: int = 128,
    layers: int = 4,
) -> None:
    """A CLIP for scenes and their captions, written to ``out``; checkpoints lie beside it."""
    tokenizer = load_tokenizer(tokens)
    torch.manual_seed(seed)
    model = new_clip(len(tokenizer), tokenizer.eos_token_id, width, layers)
    loop = Loop(stage, out.parent, model, steps=steps, lr=1e-3, seed=seed, weight_decay=0.05, device=device)
    loop.run(contrastive_loss(model, tokenizer, world, device), progress)
    model.cpu().save_pretrained(out)


def contrastive_loss(
    model: Any, tokenizer: Any, world: World, device: torch.device
) -> Callable[[int, torch.Generator], Tensor]:
    """CLIP's loss on scenes and their captions, for a :class:`Loop`."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(world.images), (128,), generator=generator)
        pixels = world.pixels(index).to(device)
        flip = (torch.rand(128, generator=generator) < 0.5).to(device)
        pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        words = world.words(index, generator)
        tokens = tokenizer(words, padding="longest", max_length=_CLIP_LENGTH, truncation=True, return_tensors="pt").to(
            device
        )
        out = model(pixel_values=(pixels * 0.5 + 0.5 - mean) / std, input_ids=tokens.input_ids)
        # Equal captions are no negatives of one another.
        same = torch.tensor([[a == b for b in words] for a in words], device=device).float()
        share = same / same.sum(1, keepdim=True)
        logits = out.logits_per_text.float()
        return (-(share * logits.log_softmax(1)).sum(1).mean() - (share * logits.T.log_softmax(1)).sum(1).mean()) / 2

    return loss_at


def _train_autoencoder(
    config: AtelierTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed + 2)
    model = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    )

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(world.images), (24,), generator=generator)
        pixels = world.pixels(index).to(device)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample.float()
        # The KL weight only keeps the scale of the latents in bounds: at 1e-5 the brush strokes were lost.
        return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 1e-7 * posterior.kl().mean()

    loop = Loop(
        "autoencoder",
        work,
        model,
        steps=config.autoencoder_steps,
        lr=2e-3,
        seed=config.seed + 2,
        weight_decay=0.0,
        ema=0.995,
        device=device,
    )
    loop.run(loss_at, progress)
    with torch.no_grad():
        sample = torch.cat(
            [
                model.encode(world.pixels(torch.arange(i, i + 64)).to(device)).latent_dist.mean
                for i in range(0, 1024, 64)
            ]
        )
    model.register_to_config(scaling_factor=round(1 / sample.std().item(), 5))
    model.cpu().save_pretrained(work / "vae")


def _train_judge(
    config: AtelierTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    train_judge(work, world, device, progress, steps=config.judge_steps, seed=config.seed + 3)


def train_judge(
    work: Path,
    world: World,
    device: torch.device,
    progress: Progress | None,
    *,
    steps: int,
    seed: int,
    labels: Labels = ATELIER,
) -> None:
    """A judge of scenes, written to ``work / "judge"``."""
    torch.manual_seed(seed)
    network = judge.JudgeNetwork(labels=labels)
    wanted = judge.targets(world.labels, labels)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(world.images), (64,), generator=generator)
        pixels = world.pixels(index)
        flip = torch.rand(64, generator=generator) < 0.5
        pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        # Blur, noise and shifts of contrast: the softness of any decoder, without showing it one.
        soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        blur = torch.rand(64, 1, 1, 1, generator=generator) * 0.9
        pixels = pixels * (1 - blur) + soft * blur
        pixels = pixels * (0.85 + 0.3 * torch.rand(64, 1, 1, 1, generator=generator))
        pixels = pixels + 0.1 * torch.randn(64, 3, 1, 1, generator=generator)
        pixels = pixels + 0.06 * torch.randn(pixels.shape, generator=generator)
        return judge.judge_loss(network(pixels.to(device)).float(), wanted[index].to(device), labels)

    loop = Loop("judge", work, network, steps=steps, lr=3e-3, seed=seed, weight_decay=0.02, device=device)
    loop.run(loss_at, progress)
    (work / "judge").mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.cpu().state_dict().items()}, work / "judge" / "judge.safetensors")


def new_scheduler() -> Any:
    """DDIM with Stable Diffusion's noise schedule, predicting epsilon."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def new_denoiser(sample_size: int = 16) -> Any:
    """The untrained denoiser: Stable Diffusion's anatomy in 7.2 million parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encoded(vae: Any, world: World, file: Path, device: torch.device) -> Tensor:
    """Scaled latents of all scenes ``[scenes, 4, 16, 16]``, encoded once and kept for a resumed run."""
    if not file.exists():
        parts = []
        for start in range(0, len(world.images), 64):
            pixels = world.pixels(torch.arange(start, min(start + 64, len(world.images))))
            parts.append(vae.encode(pixels.to(device)).latent_dist.mean.cpu() * vae.config.scaling_factor)
        temporary = file.with_suffix(".part")
        save_file({"latents": torch.cat(parts).contiguous()}, temporary)
        temporary.replace(file)
    return load_file(file)["latents"]


def _train_denoiser(
    config: AtelierTraining, work: Path, world: World, device: torch.device, progress: Progress | None
) -> None:
    train_denoiser(
        work, work / "vae", new_denoiser, world, device, progress, steps=config.denoiser_steps, seed=config.seed + 4
    )


def train_denoiser(
    work: Path,
    autoencoder: Path,
    new: Callable[[], Any],
    world: World,
    device: torch.device,
    progress: Progress | None,
    *,
    steps: int,
    seed: int,
) -> None:
    """A denoiser of scenes that reads the text encoder in ``work / "clip"``, written to ``work / "unet"``."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPModel

    tokenizer = load_tokenizer(work / "tokenizer")
    text = CLIPModel.from_pretrained(work / "clip", dtype=torch.float32).text_model.to(device).eval()
    vae = AutoencoderKL.from_pretrained(autoencoder, torch_dtype=torch.float32).to(device).eval()
    latents = encoded(vae, world, work / "latents.safetensors", device)
    torch.manual_seed(seed)
    denoiser = new()
    denoiser.set_attn_processor(AttnProcessor())

    conditions = captioned(world, text, tokenizer, device)
    loop = Loop("denoiser", work, denoiser, steps=steps, lr=8e-4, seed=seed, ema=0.999, device=device)
    loop.run(denoising_loss(denoiser, latents, conditions, device), progress)
    denoiser.cpu().save_pretrained(work / "unet")


def tokenized(tokenizer: Any, words: list[str], device: torch.device) -> Tensor:
    """Token ids of prompts, padded to the length that pipelines use."""
    tokens = tokenizer(words, padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


Conditions = Callable[[Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor] | None]]
"""Gives, for scenes by number, what the denoiser reads of their captions, and what is told beside it."""


def captioned(world: World, text: Any, tokenizer: Any, device: torch.device) -> Callable[..., tuple[Tensor, None]]:
    """What a text encoder says of pictures' captions, one in ten of them empty so that there is guidance."""

    def conditions(index: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        words = world.words(index, generator)
        dropped = torch.rand(len(words), generator=generator) < 0.1
        words = ["" if drop else w for w, drop in zip(words, dropped, strict=True)]
        with torch.no_grad():
            return text(tokenized(tokenizer, words, device)).last_hidden_state, None

    return conditions


def denoising_loss(
    denoiser: Any, latents: Tensor, conditions: Conditions, device: torch.device, batch: int = 32
) -> Callable[[int, torch.Generator], Tensor]:
    """The loss of predicting the noise in latents, for a :class:`Loop`."""
    scheduler = new_scheduler()

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(latents), (batch,), generator=generator)
        text, added = conditions(index, generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        model_pred = denoiser(noisy.to(device), timesteps.to(device), text, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return F.mse_loss(model_pred.float(), noise.to(device))

    return loss_at


def save_half(pipeline: Any, folder: Path) -> None:
    """Write a pipeline's folder in fp16."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipeline.save_pretrained(folder)
    for config in folder.rglob("config.json"):
        # diffusers notes the folder that a part came from: it means nothing on another machine.
        _set_entry(config, "_name_or_path", None)
        if config.parent.name.startswith("text_encoder"):
            # transformers loads a model in the dtype that its config names, diffusers in float32: without
            # this, the plainest call would mix the two and fail.
            _set_entry(config, "dtype", "float32")


def copy_judge(out: Path) -> None:
    """Put the bundled judge beside a pipeline that was trained on the same scenes."""
    (out / "judge").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(JUDGE, out / "judge" / JUDGE.name)


def _set_entry(file: Path, key: str, value: str | None) -> None:
    entries = json.loads(file.read_text())
    if value is None:
        entries.pop(key, None)
    else:
        entries[key] = value
    file.write_text(json.dumps(entries, indent=2) + "\n")


def _export(work: Path, out: Path) -> None:
    export(work, out, work / "vae")


def export(work: Path, out: Path, autoencoder: Path) -> None:
    """Write the fp16 folders that the package bundles: a plain diffusers pipeline, CLIP, the judge."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

    tokenizer = load_tokenizer(work / "tokenizer")
    clip = CLIPModel.from_pretrained(work / "clip", dtype=torch.float32)
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(autoencoder),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_half(pipeline, out / "pipeline")
    clip.half().save_pretrained(out / "clip")
    _set_entry(out / "clip" / "config.json", "dtype", "float32")
    tokenizer.save_pretrained(out / "clip")
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    processor = CLIPImageProcessor(
        size=size, do_center_crop=False, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    processor.save_pretrained(out / "clip")
    (out / "judge").mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.half() if v.is_floating_point() else v for k, v in load_file(work / "judge" / "judge.safetensors").items()
    }
    save_file(weights, out / "judge" / "judge.safetensors")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def run_stages(
    trainers: Mapping[str, Trainer],
    export: Callable[[Path, Path], None],
    out: Path,
    work: Path,
    config: Any,
    *,
    stages: Iterable[str],
    device: str = "cpu",
    progress: Progress | None = None,
    source: Source = SOURCE,
) -> dict[str, float]:
    """Train from seeds; an interrupted run goes on from its checkpoints.

    Args:
        trainers: stage → what trains it, in order; scenes are drawn before and the export comes last.
        export: writes what was made, from the second folder into the first.
        out: folder for the finished pipeline and its judge.
        work: folder for scenes, checkpoints and half-made parts.
        config: sizes and seed, a :class:`Training`.
        stages: which to run; those before must have run already.
        device: where to train.
        progress: called after every step.
        source: of the scenes.

    Returns:
        Seconds by stage.
    """
    work.mkdir(parents=True, exist_ok=True)
    chosen, seconds = set(stages), {}
    world: World | None = None
    for stage in ("scenes", *trainers, "export"):
        if stage not in chosen:
            continue
        began = time.perf_counter()
        if stage == "export":
            export(work, out)
        elif world is None:
            world = draw_world(config.scenes, config.captions, config.seed, work / "scenes.npz", source)
        if stage in trainers:
            trainers[stage](config, work, world, torch.device(device), progress)
        seconds[stage] = time.perf_counter() - began
        logger.info("%s: %.0f s", stage, seconds[stage])
    return seconds


def train(out: Path, work: Path, config: AtelierTraining | None = None, **options: Any) -> dict[str, float]:
    """Train the bundled base, see :func:`run_stages`; the config's defaults made what the package bundles."""
    trainers = {
        "tokenizer": _train_tokenizer,
        "clip": _train_clip,
        "autoencoder": _train_autoencoder,
        "judge": _train_judge,
        "denoiser": _train_denoiser,
    }
    return run_stages(trainers, _export, out, work, config or AtelierTraining(), **{"stages": STAGES, **options})
