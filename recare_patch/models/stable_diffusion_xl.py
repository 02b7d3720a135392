"""Stable Diffusion XL, and any pipeline of its shape (Podell et al., arXiv 2307.01952).

Two text encoders, whose penultimate layers stand side by side, and beside the prompt the second
encoder's pooled text and six numbers: the picture's size, where it was cropped, and the size that is
wanted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recare_patch.core import BaseModelError
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.layout import Layout
from recare_patch.models.stable_diffusion import DiscreteDiffusion

logger = logging.getLogger(__name__)


def size_buckets(side: int) -> tuple[tuple[int, int], ...]:
    """The picture sizes that SDXL was trained on, ``(height, width)`` in pixels, tallest first.

    Multiples of a sixteenth of the native side, between half of it and twice, whose area is at least nine
    tenths of the native one and not larger. For 1024 that gives the sizes of arXiv 2307.01952, appendix I.
    """
    sides = range(side // 2, 2 * side + 1, max(1, side // 16))[::-1]
    return tuple((high, wide) for high in sides for wide in sides if 0.9 * side**2 <= high * wide <= side**2)


class StableDiffusionXL(DiscreteDiffusion):
    """Two text encoders, pooled text and sizes beside the prompt."""

    family = "stable-diffusion-xl"
    pipeline_class = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    left_out = ("feature_extractor", "image_encoder")
    upcast_vae = True

    def __init__(self, pipeline: Any, base_id: str, **options: Any) -> None:
        """As the parent's; warns of a size that the model was not trained on."""
        super().__init__(pipeline, base_id, **options)
        height, width = self._size.values()
        buckets = size_buckets(max(self._native_size) * pipeline.vae_scale_factor)
        if (height, width) not in buckets:
            near = min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - height / width))
            logger.warning(
                "base %s was not trained on pictures of %dx%d: the nearest of its sizes is %dx%d",
                *(base_id, width, height, near[1], near[0]),
            )

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether there are two text encoders and sizes beside the prompt."""
        unet = layout.configs.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and unet.get("addition_embed_type") == "text_time"
            and {"text_encoder", "text_encoder_2"} <= set(layout.listed)
        )

    @classmethod
    def check(cls, layout: Layout, *, weights: bool = True) -> None:
        """Refuse text encoders of different vocabularies too."""
        super().check(layout, weights=weights)
        first, second = (layout.configs[name].get("vocab_size") for name in cls.encoder_names)
        if first != second:
            raise BaseModelError(
                f"base {layout.name} has text encoders of different vocabularies ({first} and {second} "
                "tokens), and one is needed for both"
            )

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """As the parent's, without gradient; empty prompts may be zeros."""
        return self._without_empty(super().encode_prompts(prompts), [not prompt for prompt in prompts])

    def _without_empty(self, embeds: PromptEmbeds, empty: Sequence[bool]) -> PromptEmbeds:
        """Zeros for empty prompts, where the pipeline guides away from zeros."""
        text, pooled = embeds.prompt_embeds, embeds.pooled_prompt_embeds
        if not self.pipeline.config.force_zeros_for_empty_prompt or not any(empty):
            return embeds
        assert pooled is not None
        kept = 1 - torch.tensor(empty, device=text.device).to(text.dtype)
        return PromptEmbeds(text * kept[:, None, None], pooled * kept[:, None])

    def _encode_tokens(self, read: Sequence[Any], vectors: Tensor) -> PromptEmbeds:
        return self._without_empty(super()._encode_tokens(read, vectors), [not row for row in read[0][0]])

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        text = torch.cat([one.hidden_states[-2] for one in outputs], -1)
        return PromptEmbeds(text, outputs[-1].text_embeds)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        height, width = self._size.values()
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=latents.dtype)
        beside = {"text_embeds": embeds.pooled_prompt_embeds, "time_ids": sizes.expand(len(latents), -1)}
        text = embeds.prompt_embeds
        found: tuple[Tensor] = self.denoiser(
            latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=beside, return_dict=False
        )
        return found[0]
