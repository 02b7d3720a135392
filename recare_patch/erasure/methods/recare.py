"""ReCARE: erase a concept while its co-occurring concepts are guarded (Kim et al., arXiv 2606.24192).

Stage 1 searches for adversarial names of the concept, stage 2 erases them all from the untouched base.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from recare_patch import models
from recare_patch.core import CareSetError
from recare_patch.erasure.methods import Context, Instead, LossMethod, Needs, Work
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages
    from recare_patch.models import PromptEmbeds
    from recare_patch.recipe import Recipe

logger = logging.getLogger(__name__)

NAME_RECOVERY = 0.5
"""What share of the concept an adversarial name must explain to count as one."""

_MOST_IN_PICTURE = 20.0
"""By how much an error at high noise counts more in the picture, at most: beyond it there is hardly a picture left."""


def recare_target(uncond: Tensor, anchor: Tensor, erased: Tensor, w_plus: float, w_minus: float) -> Tensor:
    """``y = ε*(∅) + w⁺ [ε*(a) − ε*(∅)] − w⁻ · mean_k [ε*(k) − ε*(∅)]``, the composed target of stage 2.

    Towards a benign concept that co-occurs with the erased one, and away from all its names. It is linear in the
    prediction at a fixed noisy latent, so it holds for epsilon, velocity and flow alike.

    Args:
        uncond: frozen prediction under ``∅``, ``[batch, channels, height, width]``.
        anchor: frozen prediction under the anchor, same shape.
        erased: frozen predictions under each erased name, ``[names, batch, channels, height, width]``.
        w_plus: pull of the anchor, ``w⁺``.
        w_minus: push away from the concept, ``w⁻``.
    """
    return uncond + w_plus * (anchor - uncond) - w_minus * (erased.mean(0) - uncond)


def found_target(found: Tensor, uncond: Tensor, erased: Tensor, target: Tensor) -> Tensor:
    """``y = ε*(f) − max(s, 0) d + min(max(s, 0), 1) [y_c − ε*(∅)]``: what a found prompt ``f`` is to say.

    ``d = ε*(c) − ε*(∅)`` is what the concept's name says and ``s = ⟨ε*(f) − ε*(∅), d⟩ / ‖d‖²`` how much of it the
    found prompt says: that much is taken out of it, and for a name of the concept's own it is the name's target.
    What an adversary found in the adapted model need not name the concept in the frozen one. Were it sent to the
    name's target all the same, whatever else it says would go with it.

    Args:
        found: frozen prediction under the found prompt, ``[batch, ...]``.
        uncond: the same under ``∅``.
        erased: the same under the concept's name.
        target: ``y_c``, where the concept's name is sent.
    """
    concept, places = erased - uncond, tuple(range(1, erased.ndim))
    said = ((found - uncond) * concept).sum(places, keepdim=True)
    share = (said / concept.square().sum(places, keepdim=True).clamp(min=1e-12)).clamp(min=0)
    return found - share * concept + share.clamp(max=1) * (target - uncond)


class ReCARE(LossMethod):
    """Steers the concept's names to a composition of anchors, and holds retained prompts where they are.

    The loss is ``‖ε(z_t,e) − sg y‖² + λ ‖ε(z_t,r) − sg ε*(z_t,r)‖²`` with ``y`` of :func:`recare_target`. All of the
    frozen model's conditions go through it in one batch, and so do both of the adapted model's. A replacement, or
    a subject without its attribute, takes the place of ``y``. The second term is published as an error of the
    prediction; ``retain_in_picture`` counts it in the clean picture that the prediction stands for.
    """

    info = MethodInfo(
        title="ReCARE",
        paper=Paper(
            *("ReCARE", "Kim et al.", "ICLR 2026", "2606.24192", "Kim and others", "{ReCARE}"),
            "International Conference on Learning Representations",
        ),
        what="steers the concept's names to its companions, and holds what must not change",
        touches="linear layers of the denoiser's transformer blocks, other layers by name",
        reads="pictures of the concept, its CARE-set, adversarial names",
        strength="keeps companions and neighbours best",
        weakness="takes longest",
        caution="",
        searches=True,
        replaces="the prediction under the concept's prompts becomes that under the replacement's",
        separates="what the attribute adds to the subject's prompts is taken away",
    )
    needs = Needs(care_set=True, retained=True, retained_images=True, joined=True)

    def __init__(self, context: Context) -> None:
        base, erased, retained = context.base, context.erased, context.retained
        if not erased.anchors or not retained.prompts:
            raise CareSetError("method 'recare' needs a CARE-set with at least one word, and this one is empty")
        self.context = context
        self.empty, self.names = base.encode_prompts([""]), base.encode_prompts(list(erased.names))
        self.anchors = base.encode_prompts(list(erased.anchors))
        self.retained = base.encode_prompts(list(retained.prompts))
        self.tables = [base.encode_prompts(list(one)) for one in (erased.joined, erased.aliases) if one]
        self.instead: Instead | None = None
        if context.recipe.adversary.count and erased.attribute is None:
            from recare_patch.erasure.methods.adversaries import Adversaries

            self.adversaries = Adversaries(base, context.latents, context.concept, context.recipe.adversary)

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """The search's stages for each concept, then the erasing."""
        from recare_patch.erasure.inversion import HELD_OUT, most_evaluations
        from recare_patch.erasure.rollouts import rollout_evaluations
        from recare_patch.erasure.stages import stage_name

        search, erase, hunt = recipe.search, recipe.erase, recipe.adversary
        found: dict[str, Work] = {}
        separates = recipe.subject is not None
        for number in range(len(recipe.concepts)):
            for k in range(1, search.rounds + 1) if not separates else ():
                rows, looks = erase.batch_size, 0 if search.patience is None else HELD_OUT
                most = most_evaluations(search.inversion_steps, search.batch_size, search.patience)
                checked = min(recipe.target_images.count, 32)
                found |= {
                    # The frozen model's prediction and the trained one's, which counts as three.
                    stage_name(f"search {k} erase", number): Work(search.erase_steps * rows * 4, rows, rows),
                    stage_name(f"search {k} inversion", number): Work(most, search.batch_size, looks, reads=1),
                    stage_name(f"search {k} check", number): Work(3 * checked, 0, checked),
                }
        rows, held = erase.batch_size, erase.retain_batch_size or erase.batch_size
        hunts = bool(hunt.count) and not separates
        # An anchor or a replacement, and ∅ and the name to measure by; an attribute's prompts are as many.
        parts = 3 if separates or hunts or recipe.replace_with is None else 1
        frozen = rows * (parts + hunts) + held
        trained = rows * (1 + hunts) + held
        step = frozen + 3 * trained + hunts * hunt.steps * hunt.batch_size * 3
        found["erase"] = Work(
            len(recipe.concepts) * erase.steps * step + rollout_evaluations(recipe),
            max(trained, hunt.batch_size if hunts else 0),
            frozen,
            reads=int(hunts),
        )
        return found

    def search(self, stages: Stages) -> None:
        """Stage 1: erase the current name, invert the erased model for the next one, repeat (as in STEREO).

        Only the names stay; the stage's adapter is thrown away.
        """
        from recare_patch.models import PLACEHOLDER

        context, base, recipe = self.context, self.context.base, self.context.recipe
        options, found = recipe.search, []
        if options.rounds and context.erased.attribute is None:
            concept = base.encode_prompts([context.concept.target_prompt])
            template = context.concept.target_prompt_for(PLACEHOLDER)
            start = base.word_vector(options.init_word or context.concept.class_word).repeat(options.vectors, 1)
            current = concept
            with stages.adapter(recipe.seed + 1) as inner:
                for number in range(1, options.rounds + 1):
                    rate = options.erase_learning_rate or recipe.erase.learning_rate / 4
                    inner.fit(f"search {number} erase", self._forget(current), options.erase_steps, rate=rate)
                    stage = f"search {number} inversion"
                    vectors = inner.invert(stage, context.latents, template, start, options.inversion_steps)
                    name = base.encode_with_vectors([template], vectors).detach()
                    with inner.booked(f"search {number} check"):
                        recovered = self._recovery(name, concept)
                    logger.info("adversarial name %d explains %.0f %% of the concept", number, 100 * recovered)
                    if recovered >= NAME_RECOVERY:
                        # Otherwise it is no name of the concept in the base: erasing it would cost something
                        # else, and the next round goes on with the name before.
                        current, start = name, vectors if options.warm_start else start
                        found.append(name)
        self.names = models.PromptEmbeds.cat([self.names, *found])
        self.named = models.PromptEmbeds.cat([self.names, *self.tables])
        # An alias is erased, and tells nothing of the concept where the base does not know it by that name.
        given = len(context.erased.names)
        sure = given - (len(context.concept.aliases) if context.erased.attribute is None else 0)
        self.sure_names = (*range(max(sure, 1)), *range(given, len(self.names)))
        if context.erased.instead is not None:
            self.instead = Instead(base, context.erased, len(self.names))

    def _forget(self, name: PromptEmbeds) -> Callable[[int, torch.Generator], Tensor]:
        """The search's loss: a name is drawn as nothing."""
        import torch
        from torch.nn import functional as F

        from recare_patch.erasure.loop import TargetImageStates

        base, rows = self.context.base, self.context.recipe.erase.batch_size
        source = TargetImageStates(base, self.context.latents, name, self.empty)

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            which = torch.randint(0, 1, (rows,), generator=generator)
            states, timesteps = source.draw(step, which, generator)
            with torch.no_grad(), models.off(*base.components.values()):
                wanted = base.denoise(states, timesteps, self.empty.repeat(rows)).float()
            return F.mse_loss(base.denoise(states, timesteps, name.repeat(rows)).float(), wanted)

        return loss_at

    def _recovery(self, name: PromptEmbeds, concept: PromptEmbeds) -> float:
        """How much of the concept a name explains in the base: ``(L(∅) − L(name)) / (L(∅) − L(concept))``.

        ``L`` is the noise-prediction error on the target images, at the same noise for all three.
        """
        import torch
        from torch.nn import functional as F

        from recare_patch.erasure.loop import noised

        base, latents = self.context.base, self.context.latents[:32]
        generator = torch.Generator().manual_seed(self.context.recipe.seed)
        with torch.no_grad(), models.off(*base.components.values()):
            states, timesteps, noise = noised(base, latents, generator)
            target = base.training_target(latents, noise, timesteps)
            nothing, named, itself = (
                F.mse_loss(base.denoise(states, timesteps, one.repeat(len(latents))).float(), target.float()).item()
                for one in (self.empty, name, concept)
            )
        # A base that does not draw the concept gives no scale to measure by.
        return (nothing - named) / (nothing - itself) if nothing > itself else 0.0

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step of stage 2."""
        import torch
        from torch.nn import functional as F

        base, options, cat = self.context.base, self.context.recipe.erase, models.PromptEmbeds.cat
        rows = len(latents)
        chosen, picks = self._chosen(which, generator)
        named = self.named[chosen]
        held, held_times, retained, empty_ones = self._held(latents, timesteps, generator)
        # The mean over names is drawn, one name a row: the loss is quadratic in its target, so the
        # gradient is the same on average, and one prediction does where there were as many as names.
        pushed = torch.tensor(self.sure_names)
        names = pushed[torch.randint(0, len(pushed), (rows,), generator=generator)]
        towards = [self.anchors[picks]] if self.instead is None else self.instead.conditions(chosen)
        sides, hunted = [], []
        if self.instead is None or self.adversaries is not None:
            sides = [self.empty.repeat(rows), self.names[names]]
        if self.adversaries is not None:
            # What was found a moment ago is erased on the same states.
            self.adversaries.improve(generator)
            hunted = [self.adversaries.names(rows, generator)]
        # One forward pass of the frozen model: the anchor or what stands instead, ∅, erased name, found name, retained.
        parts, again = [*towards, *sides, *hunted], 1 + len(hunted)
        count = len(parts)
        with torch.no_grad(), models.off(*base.components.values()):
            states = torch.cat([latents.repeat(count, *(1,) * (latents.ndim - 1)), held])
            times = torch.cat([timesteps.repeat(count), held_times])
            frozen = base.denoise(states, times, cat([*parts, retained])).float()
        told, kept = frozen[: count * rows].chunk(count), frozen[count * rows :]
        if self.instead is not None:
            target = self.instead.target(told[: len(towards)], options.guidance_minus)
        else:
            anchor, empty, erased = told[:3]
            target = recare_target(empty, anchor, erased[None], options.guidance_plus, options.guidance_minus)
        student = base.denoise(
            torch.cat([*[latents] * again, held]),
            torch.cat([*[timesteps] * again, held_times]),
            cat([named, *hunted, retained]),
        ).float()
        loss = F.mse_loss(student[:rows], target)
        missed = F.mse_loss(student[again * rows :], kept, reduction="none")
        if share := options.retain_in_picture:
            weights = base.picture_weights(held_times, _MOST_IN_PICTURE).to(missed)
            # Guidance takes the empty prompt's prediction away at every noise: were that let go at low noise, where a
            # picture does not tell, it would go along with the concept, and what is drawn would keep it.
            weights = torch.where(empty_ones.to(weights.device), 1.0, weights)
            missed = missed.flatten(1).mean(1) * (1 - share + share * weights)
        loss = loss + options.retain_weight * self.retain_scale * missed.mean()
        if self.adversaries is not None:
            empty, erased, found = told[-3:]
            aim = found_target(found, empty, erased, target)
            loss = loss + self.adversaries.options.weight * F.mse_loss(student[rows : 2 * rows], aim)
        return loss

    def _held(
        self, latents: Tensor, timesteps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, PromptEmbeds, Tensor]:
        """States, timesteps and prompts of the retained rows, ``retain_batch_size``, and which have the empty prompt.

        Half of the rows are noised pictures of their own prompt. The others take any retained prompt
        on the erased prompt's states, so that many prompts are held although few pictures are drawn.
        """
        import torch

        from recare_patch.erasure.loop import noised

        context, texts = self.context, self.context.retained
        rows = context.recipe.erase.retain_batch_size or len(latents)
        again = torch.arange(rows, device=latents.device) % len(latents)
        latents, timesteps = latents[again], timesteps[again.to(timesteps.device)]
        picks = torch.randint(0, len(self.retained), (rows,), generator=generator)
        if texts.guarded:
            guarded = self._drawn(torch.arange(texts.guarded), rows, generator)
            picks = torch.where(torch.rand(rows, generator=generator) < 0.5, guarded, picks)
        void = torch.zeros(rows, dtype=torch.bool)
        if not len(texts.latents):
            return latents, timesteps, self.retained[picks], void
        pictures = self._drawn(texts.pictured, rows, generator)
        states, times, _ = noised(context.base, texts.latents[pictures], generator)
        ours = torch.rand(rows, generator=generator) < 0.5
        picks = torch.where(ours, texts.pictured[pictures], picks)
        here = ours.to(latents.device)
        states = torch.where(here.view(-1, *(1,) * (states.ndim - 1)), states, latents)
        table = self.retained
        if self.adversaries is not None:
            # Guidance goes from the empty prompt to the prompt: were the empty one pushed away from the
            # concept too, any learnt name would point back to it.
            void = ~ours & (torch.rand(rows, generator=generator) < 0.5)
            picks = torch.where(void, len(table), picks)
            table = models.PromptEmbeds.cat([table, self.empty])
        return states, torch.where(here, times, timesteps), table[picks], void

    def _drawn(self, prompts: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """Places in a table of retained prompts, ``[rows]``: guarded ones as often as the run's looks say."""
        import torch

        shares = self.held_shares
        if shares is None:
            return torch.randint(0, len(prompts), (rows,), generator=generator)
        weights = torch.where(prompts < len(shares), shares[prompts.clamp(max=len(shares) - 1)], shares.mean())
        return torch.multinomial(weights, rows, replacement=True, generator=generator)

    def _chosen(self, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows of all erased prompts to take, and the index of each one's anchor.

        Of the rows that have the concept's first name, half are joined to their anchor and a
        quarter take another name: how people write a concept varies more than one prompt does.
        """
        import torch

        erased, rows, chosen = self.context.erased, len(which), which
        picks = torch.randint(0, erased.guarded_anchors or len(self.anchors), (rows,), generator=generator)
        luck = torch.rand(rows, generator=generator)
        size = len(self.names)
        if erased.joined:
            joined = (which == 0) & (luck >= 0.5)
            # Half of them with a guarded word, half with any.
            any_anchor = torch.randint(0, len(self.anchors), (rows,), generator=generator)
            picks = torch.where(joined & (luck >= 0.75), any_anchor, picks)
            chosen = torch.where(joined, size + picks, chosen)
            size += len(erased.joined)
        if erased.aliases:
            alias = torch.randint(0, len(erased.aliases), (rows,), generator=generator)
            chosen = torch.where((which == 0) & (luck >= 0.25) & (luck < 0.5), size + alias, chosen)
        return chosen, picks

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """Stage 2: one loop over all concepts."""
        contexts = [one.context for one in methods]
        recipe, plain = contexts[0].recipe, all(one.erased.attribute is None for one in contexts)
        # An earlier patch is a start of its own, and an attribute has no name that could become something else.
        if recipe.erase.start == "closed" and plain and recipe.continue_from is None:
            from recare_patch.erasure.methods.closed import started

            stages.begin(stages.once("start", lambda generator: started(contexts, recipe.adapter.rank, generator)))
        stages.fit_losses(methods)
