"""ESD, the baseline: steer a concept's prompt away from itself (Gandikota et al., arXiv 2303.07345)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch import adapters
from recare_patch.base_models import PromptEmbeds
from recare_patch.guidance import esd_target
from recare_patch.methods.protocol import ErasingContext


class ESD:
    """``‖ε(z_t,c) − sg(ε*(z_t,∅) − η [ε*(z_t,c) − ε*(z_t,∅)])‖²``: no anchors, nothing retained."""

    def __init__(self, context: ErasingContext) -> None:
        self.context = context

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`recare_patch.methods.protocol.Method`."""
        context, base = self.context, self.context.base
        named = context.erased[which]
        conditions = PromptEmbeds.cat([context.empty.repeat(len(latents)), named])
        with torch.no_grad(), adapters.off(base.denoiser):
            frozen = base.denoise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), conditions).float()
        empty, erased = frozen.chunk(2)
        student = base.denoise(latents, timesteps, named).float()
        return F.mse_loss(student, esd_target(empty, erased, context.options.eta))
