"""ESD, the baseline: steer a concept's prompt away from itself (Gandikota et al., arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from recare_patch import models
from recare_patch.erasure.methods import Context, Instead, LossMethod, Work
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages
    from recare_patch.recipe import Recipe


def esd_target(uncond: Tensor, cond: Tensor, eta: float) -> Tensor:
    """``y = ε*(∅) − η [ε*(c) − ε*(∅)]``: guidance with its sign turned (equation 5).

    Args:
        uncond: frozen prediction under the empty prompt, ``[batch, channels, height, width]``.
        cond: frozen prediction under the concept, same shape.
        eta: strength ``η``.
    """
    return uncond - eta * (cond - uncond)


class ESD(LossMethod):
    """``‖ε(z_t,c) − sg(y)‖²``: no anchors, nothing retained.

    A replacement, or a subject without its attribute, takes the whole target's place.
    """

    info = MethodInfo(
        title="ESD",
        paper=Paper(
            *("ESD", "Gandikota et al.", "ICCV 2023", "2303.07345"),
            "Gandikota, Rohit and Materzy{\\'n}ska, Joanna and Fiotto-Kaufman, Jaden and Bau, David",
            "Erasing Concepts from Diffusion Models",
            "IEEE/CVF International Conference on Computer Vision",
        ),
        what="steers the concept's prompt away from itself",
        touches="cross-attention of the denoiser, other layers by name",
        reads="pictures of the concept",
        strength="the simplest training; a baseline",
        weakness="companions fade with the concept",
        caution="ESD guards nothing: what goes along with the concept may fade with it.",
        replaces="the prediction under the concept's prompt becomes that under the replacement's",
        separates="what the attribute adds to the subject's prompts is taken away",
        # The baseline trains as published.
        defaults={"erase.ends": "steps"},
    )

    def __init__(self, context: Context) -> None:
        self.context, base, erased = context, context.base, context.erased
        self.empty, self.names = base.encode_prompts([""]), base.encode_prompts(list(erased.names))
        self.instead = Instead(base, erased, len(erased.names)) if erased.instead is not None else None

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step."""
        import torch
        from torch.nn import functional as F

        base, eta, named = self.context.base, self.context.recipe.erase.eta, self.names[which]
        parts = [self.empty.repeat(len(latents)), named]
        if self.instead is not None:
            parts = self.instead.conditions(which)
        with torch.no_grad(), models.off(*base.components.values()):
            states, times = latents.repeat(len(parts), *(1,) * (latents.ndim - 1)), timesteps.repeat(len(parts))
            frozen = base.denoise(states, times, models.PromptEmbeds.cat(parts)).float().chunk(len(parts))
        target = self.instead.target(frozen, eta) if self.instead is not None else esd_target(frozen[0], frozen[1], eta)
        return F.mse_loss(base.denoise(latents, timesteps, named).float(), target)

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """One stage: the frozen conditions and one training sample a state."""
        from recare_patch.erasure.rollouts import rollout_evaluations

        rows = recipe.erase.batch_size
        frozen = rows * (3 if recipe.subject is not None else 1 if recipe.replace_with is not None else 2)
        evaluations = len(recipe.concepts) * recipe.erase.steps * (frozen + 3 * rows)
        return {"erase": Work(evaluations + rollout_evaluations(recipe), rows, frozen)}

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One loop over all concepts."""
        stages.fit_losses(methods)
