"""ESD, the baseline: steer a concept's prompt away from itself (Gandikota et al., arXiv 2303.07345)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.erasure.methods.protocol import LossMethod
from recare_patch.erasure.targets import esd_target
from recare_patch.models import PromptEmbeds
from recare_patch.models import lora as adapters


class ESD(LossMethod):
    """``‖ε(z_t,c) − sg(ε*(z_t,∅) − η [ε*(z_t,c) − ε*(z_t,∅)])‖²``: no anchors, nothing retained.

    A replacement, or a subject without its attribute, takes the whole target's place.
    """

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`LossMethod`."""
        context, base = self.context, self.context.base
        named = context.erased[which]
        parts = [context.empty.repeat(len(latents)), named]
        if context.instead is not None:
            parts = context.instead.conditions(which)
        count = len(parts)
        with torch.no_grad(), adapters.off(*base.components.values()):
            states, times = latents.repeat(count, 1, 1, 1), timesteps.repeat(count)
            frozen = base.denoise(states, times, PromptEmbeds.cat(parts)).float().chunk(count)
        if context.instead is not None:
            target = context.instead.target(frozen, context.options.eta)
        else:
            empty, erased = frozen
            target = esd_target(empty, erased, context.options.eta)
        return F.mse_loss(base.denoise(latents, timesteps, named).float(), target)
