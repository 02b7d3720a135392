"""Ways to combine predictions of the denoiser, as pure tensor functions.

Notation: ``∅`` is the empty prompt, ``c`` the erased concept, ``a`` an anchor. Every formula is
linear in the prediction at a fixed noisy latent, so it holds for epsilon, velocity and flow alike.
None of the functions detaches anything: that is the caller's business.
"""

from __future__ import annotations

from torch import Tensor


def classifier_free(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, equation 6, with scale = 1 + w).

    Args:
        uncond: prediction under ``∅``, ``[batch, channels, height, width]``.
        cond: prediction under the prompt, same shape.
        guidance_scale: 0 gives ``uncond``, 1 gives ``cond``, more extrapolates.

    Returns:
        ``uncond + scale (cond − uncond)``.
    """
    return uncond + guidance_scale * (cond - uncond)


def recare_target(uncond: Tensor, anchor: Tensor, erased: Tensor, w_plus: float, w_minus: float) -> Tensor:
    """The composed target of ReCARE's second stage (Kim et al., arXiv 2606.24192).

    ``y = ε*(∅) + w⁺ [ε*(a) − ε*(∅)] − w⁻ · mean_k [ε*(k) − ε*(∅)]``: towards a benign concept that
    co-occurs with the erased one, and away from all the names the erased one is known by.

    Args:
        uncond: frozen prediction under ``∅``, ``[batch, channels, height, width]``.
        anchor: frozen prediction under the anchor, same shape.
        erased: frozen predictions under each erased name, ``[names, batch, channels, height, width]``.
        w_plus: pull of the anchor, ``w⁺``.
        w_minus: push away from the concept, ``w⁻``.

    Raises:
        ValueError: if ``erased`` has no leading axis of names.
    """
    if erased.ndim != uncond.ndim + 1 or erased.shape[0] == 0:
        raise ValueError(
            f"erased must stack at least one name in front of {tuple(uncond.shape)}, "
            f"got {tuple(erased.shape)}"
        )
    return uncond + w_plus * (anchor - uncond) - w_minus * (erased.mean(0) - uncond)


def esd_target(uncond: Tensor, cond: Tensor, eta: float) -> Tensor:
    """The target of ESD (Gandikota et al., arXiv 2303.07345, equation 5).

    ``y = ε*(∅) − η [ε*(c) − ε*(∅)]``: guidance with its sign turned.

    Args:
        uncond: frozen prediction under ``∅``, ``[batch, channels, height, width]``.
        cond: frozen prediction under the concept, same shape.
        eta: strength ``η``.
    """
    return uncond - eta * (cond - uncond)


def separated_target(subject: Tensor, joined: Tensor, plain: Tensor, weight: float) -> Tensor:
    """The target that takes an attribute out of a subject and leaves the rest of it.

    ``y = ε*(s) − w [ε*(p ∘ a) − ε*(p)]``: what the attribute ``a`` adds to the subject's plain prompt ``p``
    is taken away from any of its prompts ``s``. It is ESD's target (Gandikota et al., arXiv 2303.07345,
    equation 5) with the subject in the place of the empty prompt.

    Args:
        subject: frozen prediction under ``s``, ``[batch, channels, height, width]``.
        joined: frozen prediction under ``p ∘ a``, the subject with the attribute.
        plain: frozen prediction under ``p``.
        weight: strength ``w``.
    """
    return subject - weight * (joined - plain)
