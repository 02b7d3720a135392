"""Stable Diffusion 1.x and 2.x, and any pipeline of their shape.

One CLIP text encoder, an AutoencoderKL and a UNet whose cross-attention reads the encoder's last
hidden state (Rombach et al., arXiv 2112.10752). 2.x reads OpenCLIP's penultimate layer: its encoder is
stored without the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from recare_patch.core import BaseModelError, unknown_name
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.layout import Layout

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DiscreteDiffusion(LatentDiffusion):
    """A UNet trained on a discrete noise schedule, which predicts noise or velocity.

    ``z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε`` of a clean latent ``z_0`` and unit noise ``ε`` (Ho et al., arXiv
    2006.11239, equation 4); the velocity is ``v = √ᾱ_t ε − √(1−ᾱ_t) z_0`` (Salimans and Ho, arXiv
    2202.00512, appendix D).
    """

    alphas_cumprod: Tensor  # ᾱ, [num_train_timesteps], fp32

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

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``√ᾱ_t`` and ``√(1−ᾱ_t)``, shaped to multiply ``like``; roots are taken in fp32."""
        at = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return at.sqrt().to(like.dtype).view(shape), (1 - at).sqrt().to(like.dtype).view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t`` from ``z_0`` and ``ε``."""
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * latents + sigma * noise.to(latents)

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``ε`` or ``v``.

        Raises:
            UnknownNameError: the denoiser predicts something else.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type != "v_prediction":
            raise unknown_name("prediction type", self.prediction_type, PREDICTION_TYPES)
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * noise.to(latents) - sigma * latents


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
