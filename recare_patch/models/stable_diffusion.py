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
from recare_patch.models import noise as process
from recare_patch.models.embeds import PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.layout import Layout


class DiscreteDiffusion(LatentDiffusion):
    """A UNet trained on a discrete noise schedule, which predicts noise or velocity.

    Attributes:
        alphas_cumprod: ``ᾱ``, ``[num_train_timesteps]``, fp32.
    """

    alphas_cumprod: Tensor

    def _read_schedule(self) -> None:
        scheduler = self.pipeline.scheduler
        schedule = getattr(scheduler, "alphas_cumprod", None)
        if schedule is None:
            name = type(scheduler).__name__
            raise BaseModelError(f"base {self.id} has a {name}, which has no discrete noise schedule")
        self.alphas_cumprod = schedule.float()
        self.num_train_timesteps = len(schedule)
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")

    @classmethod
    def check(cls, layout: Layout) -> None:
        """See :meth:`check`."""
        cls._require(layout)
        unet, vae = layout.configs["unet"], layout.configs["vae"]
        channels = unet.get("in_channels", 4)
        if channels != 4:
            kind = "an inpainting model" if channels == 9 else "another kind of model"
            raise BaseModelError(
                f"base {layout.name} is {kind}: its UNet takes {channels} channels, and 4 are needed"
            )
        if vae.get("_class_name") != "AutoencoderKL" or vae.get("latent_channels", 4) != 4:
            raise BaseModelError(
                f"base {layout.name} has a {vae.get('_class_name')} with {vae.get('latent_channels', 4)} "
                "latent channels, and an AutoencoderKL with 4 is needed"
            )
        wanted = unet.get("cross_attention_dim", 1280)
        widths = [layout.configs[name].get("hidden_size") for name in cls.encoder_names]
        known = [one for one in widths if isinstance(one, int)]
        if isinstance(wanted, int) and len(known) == len(widths) and sum(known) != wanted:
            raise BaseModelError(
                f"base {layout.name} does not fit together: its UNet reads prompts {wanted} wide, "
                f"its text encoder{'s make' if len(widths) > 1 else ' makes'} them {sum(known)} wide"
            )
        kind = layout.configs["scheduler"].get("prediction_type", "epsilon")
        if kind not in process.PREDICTION_TYPES:
            raise BaseModelError(
                f"base {layout.name} predicts '{kind}': supported are {', '.join(process.PREDICTION_TYPES)}"
            )

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`BaseModel`."""
        return process.add_noise(latents, noise, timesteps, self.alphas_cumprod)

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`BaseModel`."""
        return process.training_target(latents, noise, timesteps, self.alphas_cumprod, self.prediction_type)


class StableDiffusion(DiscreteDiffusion):
    """See :class:`BaseModel`."""

    family = "stable-diffusion"
    pipeline_class = "StableDiffusionPipeline"
    left_out = ("safety_checker", "feature_extractor", "image_encoder")

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether a folder has this family's shape: one text encoder and a prompt-reading UNet."""
        unet = layout.configs.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and "text_encoder_2" not in layout.listed
            and unet.get("addition_embed_type") is None
        )

    def _through_pipeline(self, prompts: list[str]) -> PromptEmbeds:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return PromptEmbeds(embeds)

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        return PromptEmbeds(outputs[0].last_hidden_state)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        model_pred: Tensor = self.denoiser(
            latents, timesteps, encoder_hidden_states=embeds.prompt_embeds, return_dict=False
        )[0]
        return model_pred
