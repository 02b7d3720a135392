"""How a base's pictures become noise, and what its denoiser is trained to predict, as its own scheduler says.

Two laws serve all pipelines: a discrete schedule ``z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε`` (Ho et al., arXiv 2006.11239,
equation 4), and a straight line ``z_σ = (1−σ) z_0 + σ ε`` (Liu et al., arXiv 2209.03003, equation 1), where ``σ`` is
the timestep's share of the process. Predictions are ``ε``, ``v = √ᾱ_t ε − √(1−ᾱ_t) z_0`` (Salimans and Ho, arXiv
2202.00512, appendix D), or the line's velocity ``ε − z_0``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recare_patch.core import BaseModelError, unknown_name

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
_LINES = ("flow", "flow_prediction")
"""What schedulers call the prediction of a velocity along the line."""


class Noising:
    """The noise law of a pipeline's scheduler."""

    id: str
    pipeline: Any
    alphas_cumprod: Tensor | None  # ᾱ, [num_train_timesteps], fp32; None: the straight line
    prediction_type: str  # of PREDICTION_TYPES
    num_train_timesteps: int  # length of the diffusion process

    def _read_schedule(self) -> None:
        """Read the scheduler; BaseModelError for one that follows neither law."""
        scheduler = self.pipeline.scheduler
        kind, config = type(scheduler).__name__, scheduler.config
        told = config.get("prediction_type", "epsilon")
        straight = kind.startswith("FlowMatch") or bool(config.get("use_flow_sigmas")) or told in _LINES
        self.alphas_cumprod = None if straight else getattr(scheduler, "alphas_cumprod", None)
        if not straight and self.alphas_cumprod is None:
            raise BaseModelError(f"base {self.id} has a {kind}, which has no discrete noise schedule")
        if self.alphas_cumprod is not None:
            self.alphas_cumprod = self.alphas_cumprod.float()
        self.num_train_timesteps = int(config.num_train_timesteps)
        self.prediction_type = "flow" if straight else told

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of picture and noise, shaped to multiply ``like``; roots are taken in fp32."""
        shape, at = (-1,) + (1,) * (like.ndim - 1), timesteps.to(like.device)
        if self.alphas_cumprod is None:
            sigma = (at.float() / self.num_train_timesteps).to(like).view(shape)
            return 1 - sigma, sigma
        kept = self.alphas_cumprod.to(like.device)[at.round().long() if at.is_floating_point() else at]
        return kept.sqrt().to(like.dtype).view(shape), (1 - kept).sqrt().to(like.dtype).view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t`` from clean latents ``[batch, …]`` and timesteps ``[batch]``."""
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * latents + sigma * noise.to(latents)

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser was trained to predict for :meth:`add_noise` of the same arguments.

        Raises:
            UnknownNameError: the denoiser predicts something else.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise.to(latents) - latents
        if self.prediction_type != "v_prediction":
            raise unknown_name("prediction type", self.prediction_type, PREDICTION_TYPES)
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * noise.to(latents) - sigma * latents

    def picture_weights(self, timesteps: Tensor, most: float) -> Tensor:
        """What the squared error of a prediction counts in the clean picture that it stands for, ``[timesteps]``.

        ``z_0 = (z_t − √(1−ᾱ_t) ε) / √ᾱ_t`` is wrong by ``(1−ᾱ_t) / ᾱ_t`` times the squared error of ``ε``; by ``1−ᾱ_t``
        times that of ``v``, and by ``σ²`` times that of the line's velocity. Over the whole process the mean is one.

        Args:
            timesteps: of the process, any shape.
            most: bounds the factor before the mean is taken: pure noise stands for no picture.
        """

        def factor(at: Tensor) -> Tensor:
            signal, sigma = self._coefficients(at.flatten(), at.float().flatten())
            found = (sigma / signal.clamp(min=1e-6) if self.prediction_type == "epsilon" else sigma).square()
            return found.clamp(max=most)

        whole = factor(torch.arange(self.num_train_timesteps, device=timesteps.device))
        return (factor(timesteps) / whole.mean()).view(timesteps.shape)
