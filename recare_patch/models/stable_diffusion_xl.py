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
from recare_patch.models.embeds import PromptEmbeds
from recare_patch.models.layout import Layout
from recare_patch.models.stable_diffusion import DiscreteDiffusion

logger = logging.getLogger(__name__)


def size_buckets(side: int) -> tuple[tuple[int, int], ...]:
    """The picture sizes that SDXL was trained on, ``(height, width)``, tallest first.

    Multiples of a sixteenth of the native side, between half of it and twice, whose area is at least nine
    tenths of the native one and not larger. For 1024 that gives the sizes of arXiv 2307.01952, appendix I.

    Args:
        side: of the native, square picture in pixels.
    """
    step = max(1, side // 16)
    sides = range(side // 2, 2 * side + 1, step)
    area = side * side
    found = [(height, width) for height in sides for width in sides if 0.9 * area <= height * width <= area]
    return tuple(sorted(found, reverse=True))


class StableDiffusionXL(DiscreteDiffusion):
    """See :class:`BaseModel`."""

    family = "stable-diffusion-xl"
    pipeline_class = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    left_out = ("feature_extractor", "image_encoder")
    upcast_vae = True

    def __init__(self, pipeline: Any, base_id: str, **options: Any) -> None:
        """See :meth:`__init__`."""
        super().__init__(pipeline, base_id, **options)
        size = self._picture_size
        buckets = size_buckets(max(self._native_size) * pipeline.vae_scale_factor)
        if size not in buckets:
            ratio = size[0] / size[1]
            near = min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))
            logger.warning(
                "base %s was not trained on pictures of %dx%d: the nearest of its sizes is %dx%d",
                *(base_id, size[1], size[0], near[1], near[0]),
            )

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether a folder has this family's shape: two text encoders and sizes beside the prompt."""
        unet = layout.configs.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and unet.get("addition_embed_type") == "text_time"
            and "text_encoder" in layout.listed
            and "text_encoder_2" in layout.listed
        )

    @classmethod
    def check(cls, layout: Layout) -> None:
        """See :meth:`check`."""
        super().check(layout)
        first, second = (layout.configs[name].get("vocab_size") for name in cls.encoder_names)
        if first != second:
            raise BaseModelError(
                f"base {layout.name} has text encoders of different vocabularies ({first} and {second} "
                "tokens), and one is needed for both"
            )

    def _through_pipeline(self, prompts: list[str]) -> PromptEmbeds:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return self._without_empty(PromptEmbeds(embeds, pooled), [not prompt for prompt in prompts])

    def _without_empty(self, embeds: PromptEmbeds, empty: Sequence[bool]) -> PromptEmbeds:
        """Zeros for empty prompts, where the pipeline guides away from zeros."""
        if not self.pipeline.config.force_zeros_for_empty_prompt or not any(empty):
            return embeds
        kept = 1 - torch.tensor(empty, device=embeds.prompt_embeds.device).to(embeds.prompt_embeds.dtype)
        assert embeds.pooled_prompt_embeds is not None
        return PromptEmbeds(
            embeds.prompt_embeds * kept[:, None, None], embeds.pooled_prompt_embeds * kept[:, None]
        )

    def _encode_tokens(
        self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], vectors: Tensor
    ) -> PromptEmbeds:
        embeds = super()._encode_tokens(rows, places, vectors)
        return self._without_empty(embeds, [not row for row in rows])

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        return PromptEmbeds(
            torch.cat([one.hidden_states[-2] for one in outputs], -1), outputs[-1].text_embeds
        )

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        height, width = self._picture_size
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=latents.dtype)
        model_pred: Tensor = self.denoiser(
            latents,
            timesteps,
            encoder_hidden_states=embeds.prompt_embeds,
            added_cond_kwargs={
                "text_embeds": embeds.pooled_prompt_embeds,
                "time_ids": sizes.expand(len(latents), -1),
            },
            return_dict=False,
        )[0]
        return model_pred
