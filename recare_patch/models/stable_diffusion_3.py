"""Stable Diffusion 3, and any pipeline of its shape (Esser et al., arXiv 2403.03206).

A transformer in which prompt and picture attend to each other, trained by flow matching: it predicts the
velocity from the picture to the noise. Its third text encoder, T5, is left out, as the model allows: it
has another vocabulary, and is larger than all the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import BaseModelError
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.layout import Layout

logger = logging.getLogger(__name__)

_T5_TOKENS = 256
"""Zeros that stand where T5 would: the length that diffusers gives it."""


class StableDiffusion3(LatentDiffusion):
    """A transformer trained by flow matching, with two CLIP text encoders."""

    family = "stable-diffusion-3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    encoder_names = ("text_encoder", "text_encoder_2")
    left_out = ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder")
    other_prompts = ("prompt_2", "prompt_3")

    @property
    def _step(self) -> int:
        return int(self.pipeline.vae_scale_factor * self._config.patch_size)

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether there is a transformer of SD3's class."""
        return layout.configs.get("transformer", {}).get("_class_name") == "SD3Transformer2DModel"

    @classmethod
    def check(cls, layout: Layout, *, weights: bool = True) -> None:
        """Refuse another scheduler too; warn of T5."""
        super().check(layout, weights=weights)
        scheduler = layout.index.get("scheduler", [None, None])[1]
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise BaseModelError(
                f"base {layout.name} has a {scheduler}, and its transformer needs a FlowMatchEulerDiscreteScheduler"
            )
        if "text_encoder_3" in layout.listed:
            told = "base %s is used without its T5 encoder: the patch is made for its two CLIP encoders"
            logger.warning(told, layout.name)

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        clip = torch.cat([one.hidden_states[-2] for one in outputs], -1)
        padded = F.pad(clip, (0, int(self._config.joint_attention_dim) - clip.shape[-1]))
        nothing = padded.new_zeros((len(padded), _T5_TOKENS, padded.shape[-1]))
        pooled = torch.cat([one.text_embeds for one in outputs], -1)
        return PromptEmbeds(torch.cat([padded, nothing], 1), pooled)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        found: tuple[Tensor] = self.denoiser(
            hidden_states=latents,
            timestep=timesteps.expand(len(latents)),
            encoder_hidden_states=embeds.prompt_embeds,
            pooled_projections=embeds.pooled_prompt_embeds,
            return_dict=False,
        )
        return found[0]
