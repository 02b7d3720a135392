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
        """States, timesteps and prompts of the retained half, ``batch`` rows each.

        Half of the rows are noised pictures of their own prompt. The others take any retained prompt
        on the erased prompt's states, so that many prompts are held although few pictures are drawn.
        """
        own, rows = self.context.retained_latents, len(latents)
        picks = torch.randint(0, len(self.retained), (rows,), generator=generator)
        if self.context.guarded:
            guarded = torch.randint(0, self.context.guarded, (rows,), generator=generator)
            picks = torch.where(torch.rand(rows, generator=generator) < 0.5, guarded, picks)
        if own is None or self.context.pictured is None:
            return latents, timesteps, self.retained[picks]
        pictures = torch.randint(0, len(own), (rows,), generator=generator)
        states, times, _ = noised(self.context.base, own[pictures], generator)
        ours = torch.rand(rows, generator=generator) < 0.5
        picks = torch.where(ours, self.context.pictured[pictures], picks)
        here = ours.to(latents.device)
        states = torch.where(here.view(-1, 1, 1, 1), states, latents)
        return states, torch.where(here, times, timesteps), self.retained[picks]

    def _named(self, which: Tensor, picks: Tensor, generator: torch.Generator) -> PromptEmbeds:
        """The erased prompt of each row.

        Of the rows that have the concept's first name, half are joined to the row's anchor and a
        quarter take another name: how people write a concept varies more than one prompt does.
        """
        context = self.context
        table, chosen = [context.erased], which
        luck = torch.rand(len(which), generator=generator)
        size = len(context.erased)
        for extra, low, high in ((context.composed, 0.5, 1.0), (context.aliases, 0.25, 0.5)):
            if extra is None:
                continue
            # A composed prompt belongs to its anchor, an alias to nothing in particular.
            any_row = torch.randint(0, len(extra), (len(which),), generator=generator)
            index = picks if extra is context.composed else any_row
            chosen = torch.where((which == 0) & (luck >= low) & (luck < high), size + index, chosen)
            table.append(extra)
            size += len(extra)
        return PromptEmbeds.cat(table)[chosen]
