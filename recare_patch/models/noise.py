"""The discrete diffusion process: timesteps, noising, and what a prediction says about the picture.

Notation: ``ᾱ_t`` is ``alphas_cumprod[t]``, ``z_0`` a clean latent, ``ε`` unit noise and
``z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε`` (Ho et al., arXiv 2006.11239, equation 4). A velocity is
``v = √ᾱ_t ε − √(1−ᾱ_t) z_0`` (Salimans and Ho, arXiv 2202.00512, appendix D). Flow matching goes
straight from the picture to the noise instead: ``z_σ = (1−σ) z_0 + σ ε`` (Liu et al., arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from recare_patch.core import unknown_name

PREDICTION_TYPES = ("epsilon", "v_prediction")


def ddim_timesteps(num_train_timesteps: int, steps: int, *, offset: int = 0) -> Tensor:
    """Evenly spaced timesteps from noisy to clean (Song et al., arXiv 2010.02502, section 4.2, linear).

    Args:
        num_train_timesteps: length of the process the model was trained on.
        steps: how many to take.
        offset: added to each; Stable Diffusion's schedulers use 1.

    Returns:
        Falling timesteps ``[steps]``, int64.

    Raises:
        ValueError: if ``steps`` is not in 1 … ``num_train_timesteps``.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps must lie in 1 … {num_train_timesteps}, got {steps}")
    stride = num_train_timesteps // steps
    return (torch.arange(steps - 1, -1, -1) * stride + offset).clamp(max=num_train_timesteps - 1)


def sample_timesteps(count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Uniform timesteps ``low ≤ t < high``, ``[count]``, int64, on the generator's device."""
    if not low < high:
        raise ValueError(f"the range of timesteps is empty: low {low}, high {high}")
    return torch.randint(low, high, (count,), generator=generator, device=generator.device)


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``√ᾱ_t`` and ``√(1−ᾱ_t)``, shaped to multiply ``like``; roots are taken in the table's precision."""
    at = alphas_cumprod.to(like.device)[timesteps.to(like.device)]
    shape = (-1,) + (1,) * (like.ndim - 1)
    return at.sqrt().to(like.dtype).view(shape), (1 - at).sqrt().to(like.dtype).view(shape)


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``z_t`` from ``z_0`` and ``ε`` (arXiv 2006.11239, equation 4).

    Args:
        clean: ``z_0``, ``[batch, channels, height, width]``.
        noise: ``ε``, same shape.
        timesteps: ``[batch]``.
        alphas_cumprod: ``ᾱ``, ``[num_train_timesteps]``.
    """
    signal, sigma = _coefficients(timesteps, alphas_cumprod, clean)
    return signal * clean + sigma * noise.to(clean)


def to_clean(
    model_pred: Tensor, latents: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """The clean latent ``z_0`` that a prediction implies.

    Args:
        model_pred: what the denoiser returned, ``[batch, channels, height, width]``.
        latents: ``z_t``, same shape.
        timesteps: ``[batch]``.
        alphas_cumprod: ``ᾱ``, ``[num_train_timesteps]``.
        prediction_type: a name in :data:`PREDICTION_TYPES`.

    Raises:
        UnknownNameError: for another prediction type.
    """
    signal, sigma = _coefficients(timesteps, alphas_cumprod, latents)
    if prediction_type == "epsilon":
        return (latents - sigma * model_pred) / signal
    if prediction_type == "v_prediction":
        return signal * latents - sigma * model_pred
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def to_epsilon(
    model_pred: Tensor, latents: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """The noise ``ε`` that a prediction implies; arguments as in :func:`to_clean`."""
    if prediction_type == "epsilon":
        return model_pred
    if prediction_type == "v_prediction":
        signal, sigma = _coefficients(timesteps, alphas_cumprod, latents)
        return signal * model_pred + sigma * latents
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def to_velocity(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The velocity ``v`` of a clean latent and its noise; shapes as in :func:`add_noise`."""
    signal, sigma = _coefficients(timesteps, alphas_cumprod, clean)
    return signal * noise.to(clean) - sigma * clean


def training_target(
    clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """What a denoiser of this prediction type is trained to return for :func:`add_noise`'s latent.

    Raises:
        UnknownNameError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return to_velocity(clean, noise, timesteps, alphas_cumprod)
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def add_flow_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``z_σ`` on the straight line from ``z_0`` to ``ε`` (arXiv 2209.03003, equation 1).

    Args:
        clean: ``z_0``, ``[batch, channels, height, width]``.
        noise: ``ε``, same shape.
        sigmas: how far along, 0 … 1, ``[batch]``.
    """
    share = sigmas.to(clean).view(-1, *(1,) * (clean.ndim - 1))
    return (1 - share) * clean + share * noise.to(clean)


def flow_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity ``ε − z_0`` along that line, the same at every point of it."""
    return noise.to(clean) - clean
