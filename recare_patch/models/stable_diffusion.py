"""Stable Diffusion 1.x and 2.x, and any pipeline of their shape.

One CLIP text encoder, an AutoencoderKL and a UNet whose cross-attention reads the encoder's last
hidden state (Rombach et al., arXiv 2112.10752). 2.x reads OpenCLIP's penultimate layer: its encoder is
stored without the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from recare_patch.core import BaseModelError
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.layout import Layout

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DiscreteDiffusion(LatentDiffusion):
    """A UNet trained on a discrete noise schedule, which predicts noise or velocity."""

    def _read_schedule(self) -> None:
        super()._read_schedule()
        if self.alphas_cumprod is None:
            name = type(self.pipeline.scheduler).__name__
            raise BaseModelError(f"base {self.id} has a {name}, which has no discrete noise schedule")

    @classmethod
    def check(cls, layout: Layout, *, weights: bool = True) -> None:
        """Refuse inpainting models, other autoencoders and predictions, and parts that do not fit."""
        super().check(layout, weights=weights)
        unet, vae = layout.configs["unet"], layout.configs["vae"]
        channels = unet.get("in_channels", 4)
        if channels != 4:
            kind = "an inpainting model" if channels == 9 else "another kind of model"
            raise BaseModelError(f"base {layout.name} is {kind}: its UNet takes {channels} channels, and 4 are needed")
        if vae.get("_class_name") != "AutoencoderKL" or vae.get("latent_channels", 4) != 4:
            raise BaseModelError(
                f"base {layout.name} has a {vae.get('_class_name')} with {vae.get('latent_channels', 4)} "
                "latent channels, and an AutoencoderKL with 4 is needed"
            )
        wanted = unet.get("cross_attention_dim", 1280)
        widths: list[Any] = [layout.configs[name].get("hidden_size") for name in cls.encoder_names]
        if all(isinstance(one, int) for one in (wanted, *widths)) and sum(widths) != wanted:
            raise BaseModelError(
                f"base {layout.name} does not fit together: its UNet reads prompts {wanted} wide, "
                f"its text encoder{'s make' if len(widths) > 1 else ' makes'} them {sum(widths)} wide"
            )
        kind = layout.configs["scheduler"].get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise BaseModelError(f"base {layout.name} predicts '{kind}': supported are {', '.join(PREDICTION_TYPES)}")


class StableDiffusion(DiscreteDiffusion):
    """One text encoder and a UNet that reads nothing but its output."""

    family = "stable-diffusion"
    pipeline_class = "StableDiffusionPipeline"
    left_out = ("safety_checker", "feature_extractor", "image_encoder")

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether there is one text encoder and a prompt-reading UNet."""
        unet = layout.configs.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and "text_encoder_2" not in layout.listed
            and unet.get("addition_embed_type") is None
        )

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        return PromptEmbeds(outputs[0].last_hidden_state)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        text = embeds.prompt_embeds
        found: tuple[Tensor] = self.denoiser(latents, timesteps, encoder_hidden_states=text, return_dict=False)
        return found[0]
