"""ReCARE: erase a concept while its co-occurring concepts are guarded (Kim et al., arXiv 2606.24192)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import CareSetError
from recare_patch.erasure.methods.protocol import ErasingContext, LossMethod, Needs
from recare_patch.erasure.states import noised
from recare_patch.erasure.targets import recare_target
from recare_patch.models import PromptEmbeds
from recare_patch.models import lora as adapters


class ReCARE(LossMethod):
    """Steers the concept's names to a composition of anchors, and holds retained prompts where they are.

    The loss is ``‖ε(z_t,e) − sg y‖² + λ ‖ε(z_t,r) − sg ε*(z_t,r)‖²`` with ``y`` from
    :func:`recare_target`. All of the frozen model's conditions go through it
    in one batch, and so do both of the adapted model's.

    A replacement, or a subject without its attribute, takes the place of ``y``.
    """

    needs = Needs(
        care_set=True,
        search=True,
        retained=True,
        retained_images=True,
        composed=True,
        adversaries=True,
    )

    def __init__(self, context: ErasingContext) -> None:
        if not context.anchors or not context.retained:
            raise CareSetError(
                "method 'recare' needs a CARE-set with at least one word, and this one is empty"
            )
        super().__init__(context)
        self.anchors: PromptEmbeds = context.anchors
        self.retained: PromptEmbeds = context.retained
        # All that is erased: the names, then what they are joined to, then other names.
        tables = [context.erased, context.composed, context.aliases]
        self.named = PromptEmbeds.cat([table for table in tables if table is not None])

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`LossMethod`."""
        context, options, base = self.context, self.context.options, self.context.base
        rows = len(latents)
        chosen, picks = self._chosen(which, generator)
        named = self.named[chosen]
        held, held_times, retained = self._retained(latents, timesteps, generator)
        # The mean over names is drawn, one name a row: the loss is quadratic in its target, so the
        # gradient is the same on average, and one prediction does where there were as many as names.
        names = torch.randint(0, len(context.erased), (rows,), generator=generator)
        # One forward pass of the frozen model: ∅, anchor, erased name, retained.
        parts = [context.empty.repeat(rows), self.anchors[picks], context.erased[names]]
        if context.instead is not None:
            parts = context.instead.conditions(chosen)
        count = len(parts)
        with torch.no_grad(), adapters.off(*base.components.values()):
            states = torch.cat([latents.repeat(count, 1, 1, 1), held])
            times = torch.cat([timesteps.repeat(count), held_times])
            frozen = base.denoise(states, times, PromptEmbeds.cat([*parts, retained])).float()
        steered, kept = frozen[: count * rows].chunk(count), frozen[count * rows :]
        if context.instead is not None:
            target = context.instead.target(steered, options.guidance_minus)
        else:
            empty, anchor, erased = steered
            target = recare_target(empty, anchor, erased[None], options.guidance_plus, options.guidance_minus)
        hunted = []
        if context.adversaries is not None:
            # What was found a moment ago is erased on the same states, so the frozen model's part is there.
            context.adversaries.improve(generator)
            hunted = [context.adversaries.names(rows, generator)]
        again = 1 + len(hunted)
        student = base.denoise(
            torch.cat([*[latents] * again, held]),
            torch.cat([*[timesteps] * again, held_times]),
            PromptEmbeds.cat([named, *hunted, retained]),
        ).float()
        erase, retain = student[:rows], student[again * rows :]
        loss = F.mse_loss(erase, target) + options.retain_weight * F.mse_loss(retain, kept)
        if context.adversaries is not None:
            found = student[rows : 2 * rows]
            loss = loss + context.adversaries.options.weight * F.mse_loss(found, target)
        return loss

    def _retained(
        self, latents: Tensor, timesteps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """States, timesteps and prompts of the retained rows, ``retain_batch_size`` of them.

        Half of the rows are noised pictures of their own prompt. The others take any retained prompt
        on the erased prompt's states, so that many prompts are held although few pictures are drawn.
        """
        own = self.context.retained_latents
        rows = self.context.options.retain_batch_size or len(latents)
        again = torch.arange(rows, device=latents.device) % len(latents)
        latents, timesteps = latents[again], timesteps[again.to(timesteps.device)]
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
        table = self.retained
        if self.context.adversaries is not None:
            # Guidance goes from the empty prompt to the prompt: were the empty one pushed away from the
            # concept too, any learnt name would point back to it.
            void = ~ours & (torch.rand(rows, generator=generator) < 0.5)
            picks = torch.where(void, len(table), picks)
            table = PromptEmbeds.cat([table, self.context.empty])
        return states, torch.where(here, times, timesteps), table[picks]

    def _chosen(self, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows of all erased prompts to take, and the index of each one's anchor.

        Of the rows that have the concept's first name, half are joined to their anchor and a
        quarter take another name: how people write a concept varies more than one prompt does.
        """
        context, rows = self.context, len(which)
        chosen = which
        picks = torch.randint(0, context.guarded_anchors or len(self.anchors), (rows,), generator=generator)
        luck = torch.rand(rows, generator=generator)
        size = len(context.erased)
        if context.composed is not None:
            joined = (which == 0) & (luck >= 0.5)
            # Half of them with a guarded word, half with any.
            any_anchor = torch.randint(0, len(self.anchors), (rows,), generator=generator)
            picks = torch.where(joined & (luck >= 0.75), any_anchor, picks)
            chosen = torch.where(joined, size + picks, chosen)
            size += len(context.composed)
        if context.aliases is not None:
            alias = torch.randint(0, len(context.aliases), (rows,), generator=generator)
            chosen = torch.where((which == 0) & (luck >= 0.25) & (luck < 0.5), size + alias, chosen)
        return chosen, picks
