"""ReCARE: erase a concept while its co-occurring concepts are guarded (Kim et al., arXiv 2606.24192)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch import adapters
from recare_patch.base_models import PromptEmbeds
from recare_patch.errors import CareSetError
from recare_patch.guidance import recare_target
from recare_patch.methods.protocol import ErasingContext
from recare_patch.states import noised


class ReCARE:
    """Steers the concept's names to a composition of anchors, and holds retained prompts where they are.

    The loss is ``‖ε(z_t,e) − sg y‖² + λ ‖ε(z_t,r) − sg ε*(z_t,r)‖²`` with ``y`` from
    :func:`recare_patch.guidance.recare_target`. All of the frozen model's conditions go through it
    in one batch, and so do both of the adapted model's.
    """

    def __init__(self, context: ErasingContext) -> None:
        if not context.anchors or not context.retained:
            raise CareSetError(
                "method 'recare' needs a CARE-set with at least one word, and this one is empty"
            )
        self.context = context
        self.anchors: PromptEmbeds = context.anchors
        self.retained: PromptEmbeds = context.retained

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`recare_patch.methods.protocol.Method`."""
        context, options, base = self.context, self.context.options, self.context.base
        rows, names = len(latents), len(context.erased)
        picks = torch.randint(0, len(self.anchors), (rows,), generator=generator)
        held, held_times, retained = self._retained(latents, timesteps, generator)
        # One forward pass of the frozen model: ∅, anchor, every erased name, retained.
        conditions = PromptEmbeds.cat(
            [
                context.empty.repeat(rows),
                self.anchors[picks],
                *(context.erased[k : k + 1].repeat(rows) for k in range(names)),
                retained,
            ]
        )
        copies = names + 2
        with torch.no_grad(), adapters.off(base.denoiser):
            states = torch.cat([latents.repeat(copies, 1, 1, 1), held])
            times = torch.cat([timesteps.repeat(copies), held_times])
            frozen = base.denoise(states, times, conditions).float()
        empty, anchor, *erased, kept = frozen.chunk(copies + 1)
        target = recare_target(
            empty, anchor, torch.stack(erased), options.guidance_plus, options.guidance_minus
        )
        both = PromptEmbeds.cat([self._named(which, picks, generator), retained])
        student = base.denoise(torch.cat([latents, held]), torch.cat([timesteps, held_times]), both).float()
        erase, retain = student.chunk(2)
        return F.mse_loss(erase, target) + options.retain_weight * F.mse_loss(retain, kept)

    def _retained(
        self, latents: Tensor, timesteps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """States, timesteps and prompts of the retained half, ``batch`` rows each."""
        own = self.context.retained_latents
        if own is None:
            picks = torch.randint(0, len(self.retained), (len(latents),), generator=generator)
            return latents, timesteps, self.retained[picks]
        picks = torch.randint(0, len(own), (len(latents),), generator=generator)
        states, times, _ = noised(self.context.base, own[picks], generator)
        return states, times, self.retained[picks % len(self.retained)]

    def _named(self, which: Tensor, picks: Tensor, generator: torch.Generator) -> PromptEmbeds:
        """The erased prompt of each row; half of the plain names are joined to the row's anchor."""
        composed = self.context.composed
        if composed is None:
            return self.context.erased[which]
        join = (which == 0) & (torch.rand(len(which), generator=generator) < 0.5)
        table = PromptEmbeds.cat([self.context.erased, composed])
        return table[torch.where(join, len(self.context.erased) + picks, which)]
